"""Refuse an encoder that would bring code of its own, before anything of it is loaded.

Weights are read as tensors alone (`weights_only`, safetensors). What is left are the JSON files beside them, whose keys
open_clip, timm and transformers follow: to Python files in the folder or in a repository of the hub, to an object of
any installed module, to compiled kernels that are fetched, or to another file in the place of the one that was looked
at. open_clip hands on `tokenizer_kwargs` as arguments, so only those are taken that mean something to a CLIP.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers.dynamic_module_utils
from transformers.utils import cached_file

from fieldmark.command import UserError

# Keys that lead to code, or to files that are not looked at here.
LEAD_TO_CODE = {
    "auto_map", "trust_remote_code", "code_revision", "custom_pipelines", "custom_generate", "auto_mapping",
    "parent_library", "quantization_config", "kernel_config", "use_kernels", "configuration_files",
}  # fmt: skip
# `attn_implementation` and its kin name a way to compute, or a repository of kernels as OWNER/NAME.
IMPLEMENTATION = "_implementation"
# Arguments of open_clip's own two tokenizers.
TOKENIZER_ARGUMENTS = {"clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask"}
# What transformers reads of a text tower or of a tokenizer before anything else.
FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")

# transformers would ask on the terminal whether to run such code; 0 is its way not to ask and to refuse.
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def check_architecture(architecture: dict[str, Any], folder: Path | None, key: str) -> None:
    """Raises UserError where an open_clip configuration, or the text tower and tokenizer that it names, leads to code.

    `folder` is that of a local-dir, which open_clip takes for the tokenizer's. `key` begins the message.
    """
    where = str(folder / "open_clip_config.json") if folder else "open_clip_config.json"
    check_keys(architecture, f"{key}: {where}")
    text = architecture.get("text_cfg")
    text = text if isinstance(text, dict) else {}
    given = text.get("tokenizer_kwargs") or {}
    unknown = sorted(given.keys() - TOKENIZER_ARGUMENTS) if isinstance(given, dict) else [repr(given)]
    if unknown:
        said = f"text_cfg.tokenizer_kwargs: {unknown[0]} may lead to code"
        raise UserError(f"{key}: {where}: {said}; leave none but {', '.join(sorted(TOKENIZER_ARGUMENTS))}")
    for path, value in walk(architecture):
        name = path[-1]
        if name == "timm_model_name" and isinstance(value, str) and (":" in value or "/" in value):
            said = f"{'.'.join(path)}: {value!r} is another encoder's settings"
            raise UserError(f"{key}: {where}: {said}; write the plain name of a timm model")
        if name == "hf_model_name" and value:
            check_source(str(value), key)
        if name == "hf_tokenizer_name" and value:
            check_source(str(folder or value), key)


def check_source(source: str, key: str) -> None:
    """Raises UserError where the files of a folder, or of a repository of the hub, lead to code."""
    for name in FILES:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            continue
        content = json.loads(Path(found).read_bytes())
        check_keys(content, f"{key}: {source}/{name}")
        if name == "adapter_config.json":
            raise UserError(f"{key}: {source}/{name}: stands for weights that lie elsewhere; merge them and remove it")


def check_keys(content: Any, where: str) -> None:
    for path, value in walk(content):
        leads = path[-1] in LEAD_TO_CODE and value not in (None, False)
        if leads or (path[-1].endswith(IMPLEMENTATION) and "/" in str(value)):
            remedy = "an encoder that brings code is not loaded; remove the key, or use another encoder"
            raise UserError(f"{where}: {'.'.join(path)}: leads to code; {remedy}")


def walk(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value under a key, at any depth, with the keys that lead to it."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield (*path, str(name)), value
            yield from walk(value, (*path, str(name)))
    elif isinstance(content, list):
        for value in content:
            yield from walk(value, path)
