"""Encoders that bring code of their own: refused before anything of them is loaded, in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.foreign_code import check_source
from fieldmark.encoders.towers import load_tower
from fieldmark.params import Encoder, Tower
from tests.fieldmark.encoders.test_clip import save_bert, save_siglip
from tests.fieldmark.encoders.test_longclip import Hostile
from tests.project import ROOT

CPU = torch.device("cpu")
AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
# The file, the keys that lead to the change, and the change.
CHANGES: dict[str, tuple[str, list[str], Any]] = {
    "tokenizer_kwargs": (
        "open_clip_config.json", ["model_cfg", "text_cfg", "tokenizer_kwargs"], {"trust_remote_code": True}
    ),
    "another tokenizer": ("open_clip_config.json", ["model_cfg", "text_cfg", "tokenizer_kwargs"], {"subfolder": "x"}),
    "no kwargs": ("open_clip_config.json", ["model_cfg", "text_cfg", "tokenizer_kwargs"], [1]),
    "vision": ("open_clip_config.json", ["model_cfg", "vision_cfg", "trust_remote_code"], True),
    "timm hub": ("open_clip_config.json", ["model_cfg", "vision_cfg", "timm_model_name"], "hf-hub:me/evil"),
    "timm folder": ("open_clip_config.json", ["model_cfg", "vision_cfg", "timm_model_name"], "local-dir:evil"),
    "tokenizer": ("tokenizer_config.json", ["auto_map"], AUTO_MAP),
    "tokenizer by config": ("config.json", ["auto_map"], AUTO_MAP),
    "text tower": ("text/config.json", ["auto_map"], AUTO_MAP),
    "text tower, deep": ("text/config.json", ["text_config"], {"layers": [{"auto_map": AUTO_MAP}]}),
    "text tower, elsewhere": ("text/config.json", ["configuration_files"], ["config.1.0.0.json"]),
    "kernels": ("text/config.json", ["attn_implementation"], "me/evil-kernels"),
    "kernels by part": ("text/config.json", ["_attn_implementation"], {"": "me/evil-kernels"}),
    "quantised": ("text/config.json", ["quantization_config"], {"quant_method": "mxfp4"}),
    "adapter": ("text/adapter_config.json", ["auto_mapping"], {"parent_library": "evil"}),
    "adapter of another": ("text/adapter_config.json", ["base_model_name_or_path"], "me/evil"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a Hugging Face text tower, and Python beside all its files that leaves a mark when it runs."""
    folder = save_bert(tmp_path_factory.mktemp("encoders") / "bert")
    for place in (folder, folder / "text"):
        (place / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Evil: pass\n")
    return folder


def change(folder: Path, file: str, keys: list[str], value: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    block = content
    for key in keys[:-1]:
        block = block[key]
    block[keys[-1]] = value
    path.write_text(json.dumps(content))


def copy(good: Path, target: Path) -> Path:
    shutil.copytree(good, target)
    change(target, "open_clip_config.json", ["model_cfg", "text_cfg", "hf_model_name"], str(target / "text"))
    return target


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_leads_to_code_is_refused(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(good)
    # Whoever is asked on the terminal would say yes.
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    file, keys, value = CHANGES[name]
    change(copy(good, tmp_path / "mine"), file, keys, value)
    with pytest.raises(UserError, match=r"params\.yaml: encoders\.mine\.model: ") as caught:
        load_encoder("mine", Encoder(model="local-dir:mine"), CPU)
    assert Path(file).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_leads_nowhere_is_loaded(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy(good, tmp_path / "mine")
    change(folder, "text/config.json", ["attn_implementation"], "eager")
    change(folder, "open_clip_config.json", ["model_cfg", "text_cfg", "tokenizer_kwargs"], {"clean": "lower"})
    assert load_encoder("mine", Encoder(model="local-dir:mine"), CPU).embed_texts(["a fish"]).shape == (1, 16)
    siglip = save_siglip(tmp_path / "siglip")
    assert load_encoder("mine", Encoder(model=f"local-dir:{siglip}"), CPU).embed_texts(["a fish"]).shape == (1, 64)


def test_a_relative_text_tower_is_looked_at(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy(good, tmp_path / "mine")
    change(folder, "open_clip_config.json", ["model_cfg", "text_cfg", "hf_model_name"], "mine/text")
    change(folder, "text/config.json", ["auto_map"], AUTO_MAP)
    with pytest.raises(UserError, match=r"mine/text/config\.json: auto_map: leads to code"):
        load_encoder("mine", Encoder(model="local-dir:mine"), CPU)


HUB = """
import sys
import torch
from fieldmark.command import run
from fieldmark.encoders.clip import load_encoder
from fieldmark.params import Encoder
run(lambda: load_encoder("mine", Encoder(model="hf-hub:me/evil"), torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer_kwargs", "text tower"])
def test_a_repository_of_the_hub_that_leads_to_code_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    for repository, source in (("evil", good), ("text", good / "text")):
        place = tmp_path / f"hub/models--me--{repository}"
        shutil.copytree(source, place / "snapshots/0123456789abcdef0123456789abcdef01234567")
        (place / "refs").mkdir()
        (place / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    [evil] = tmp_path.glob("hub/models--me--evil/snapshots/*")
    [text] = tmp_path.glob("hub/models--me--text/snapshots/*")
    for key in ("hf_model_name", "hf_tokenizer_name"):
        change(evil, "open_clip_config.json", ["model_cfg", "text_cfg", key], "me/text")
    file, keys, value = CHANGES[name]
    change(text if file.startswith("text/") else evil, file.removeprefix("text/"), keys, value)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HUB], cwd=tmp_path, env=environment, input="y\n" * 9, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: params.yaml: encoders.mine.model: " in done.stderr
    assert keys[-1] in done.stderr
    assert "to code; " in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_source_that_is_not_there_is_for_the_loader_to_tell(tmp_path: Path) -> None:
    check_source(str(tmp_path), "key")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".npz"])
def test_a_checkpoint_that_runs_code_is_refused(suffix: str, good: Path, tmp_path: Path) -> None:
    hostile = tmp_path / f"open_clip_model{suffix}"
    torch.save({"state_dict": {"x": Hostile(tmp_path / "ran")}}, hostile)
    folder = copy(good, tmp_path / "mine")
    (folder / "open_clip_model.safetensors").unlink()
    shutil.copy(hostile, folder)
    for load in (
        lambda: load_encoder("mine", Encoder(model=f"local-dir:{folder}"), CPU),
        lambda: load_encoder("mine", Encoder(model="ViT-S-32-alt", pretrained=str(hostile)), CPU),
        lambda: load_tower("mine", Tower(model="resnet10t", pretrained=str(hostile)), CPU),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
