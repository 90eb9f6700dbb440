"""Encoders of images and texts that open_clip loads.

The rules of maps.py make a global embedding and dense tokens of an image. A text goes through the encoder's own
tokenizer: open_clip's, or one of Hugging Face's with its own cleaning. Checkpoints of LongCLIP are read by longclip.py.

Weights that were trained with QuickGELU (OpenAI's, DFN's, MetaCLIP's) need open_clip's model NAME-quickgelu: under NAME
their tag is refused. A checkpoint file does not say which of the two it needs, so there the name of the model decides.

`image_size` shows the pictures at another size than the model's own. Texts stay the same, so one model at two sizes is
two encoders of one space. Convolutional towers take the other size as they are. A ViT's positions are interpolated, by
open_clip or timm. CLIP's ResNet pools with one position a cell, which nothing interpolates.

Vectors leave this module in float32, not normalised. In the fingerprint of an encoder a Hugging Face text tower and its
tokenizer count by what is in them, not by where they lie.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPVisionCfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from PIL import Image
from torch import Tensor, nn

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.devices import keep_float32
from fieldmark.encoders import longclip
from fieldmark.encoders.base import (
    DTYPES,
    LOADING_ERRORS,
    check_size,
    encoder_fingerprint,
    is_unreachable,
    make_batch,
    pad_rows,
    split_transform,
)
from fieldmark.encoders.dense import Dense, check_dense, make_dense
from fieldmark.encoders.foreign_code import check_architecture
from fieldmark.encoders.maps import image_features
from fieldmark.encoders.towers import load_tower
from fieldmark.params import Encoder, Proxy, Tower


@dataclass
class LoadedEncoder:
    """One loaded encoder of images (base.ImageEncoder) and of texts, on one device."""

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]  # to bytes (3, H, W)
    normalise: Callable[[Tensor], Tensor]  # of bytes (n, 3, H, W), to float32
    preprocessing: dict[str, Any]
    tokenizer: Callable[[list[str]], Tensor]
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    fingerprint: str
    dense: Dense | None = None  # how cells come about, where not as the last block has them

    @property
    def logit_scale(self) -> float:
        """The factor that turns a cosine into a logit, as the encoder was trained."""
        scale = self.model.logit_scale
        assert isinstance(scale, Tensor)
        return float(scale.detach().float().exp())

    @property
    def dimension(self) -> int:
        """D, the length of a vector."""
        return self.embed_texts([""]).shape[1]

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """ImageEncoder.embed_images: pixels (n, 3, H, W) to global embeddings (n, D) and dense tokens (n, h, w, D)."""
        pooled, tokens = image_features(self.model.visual, make_batch(self, pixels), self.name, self.dense)
        return pooled[: len(pixels)].float(), tokens[: len(pixels)].float()

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts (n) to embeddings (n, D), float32 on the CPU. Their batch is padded as that of images (make_batch)."""
        tokens = pad_rows(self.tokenizer(texts), self.batch_size).to(self.device)
        encode = self.model.encode_text
        assert callable(encode)
        # CoCa normalises unless told not to.
        return encode(tokens, normalize=False)[: len(texts)].float().cpu()

    def count_tokens(self, text: str) -> tuple[int, bool]:
        """How many tokens the encoder reads of a text, start and end included, and whether it had to cut it."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            needed, length = len(self.tokenizer.encode(text)) + 2, self.tokenizer.context_length
            return min(needed, length), needed > length
        if isinstance(self.tokenizer, HFTokenizer):
            return count_hf_tokens(self.tokenizer, text)
        kind = type(self.tokenizer).__name__
        raise UserError(f"params.yaml: encoders.{self.name}: {kind} cannot count tokens; use another encoder")


def count_hf_tokens(tokenizer: Any, text: str) -> tuple[int, bool]:
    """LoadedEncoder.count_tokens for open_clip's HFTokenizer. Special tokens are counted, padding is not."""
    length, encode, text = tokenizer.context_length, tokenizer.tokenizer, tokenizer.clean_fn(text)
    if tokenizer.tokenizer_mode == "clips":
        needed = len(encode(text, add_special_tokens=False, verbose=False).input_ids) + 3  # start, end, class
        return min(needed, length), needed > length
    needed = len(encode(text, verbose=False).input_ids)
    read = encode(text, truncation=True, max_length=length).input_ids
    # strip_sep_token puts 0 in the place of each separator, and 0 is padding to most vocabularies.
    stripped = read.count(encode.sep_token_id) if tokenizer.strip_sep_token and encode.pad_token_id == 0 else 0
    return len(read) - stripped, needed > length


def load_encoder(
    name: str, settings: Encoder, device: torch.device, towers: Mapping[str, Tower] | None = None
) -> LoadedEncoder:
    """Load `encoders.NAME`, with that of the `towers` which its `dense` names, if it does.

    Raises UserError where open_clip cannot, with its reason, where the encoder has not the cells that `dense` asks for,
    and as load_tower does.
    """
    key = f"params.yaml: encoders.{name}"
    keep_float32()
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32 on this machine")
    folder = settings.model.removeprefix("local-dir:")
    local = folder != settings.model
    if local and not Path(folder).is_dir():
        raise UserError(f"{key}.model: there is no folder {folder}; correct the path")
    by_name = not local and not settings.model.startswith("hf-hub:")
    if by_name and settings.model not in open_clip.list_models():
        known = {each.casefold(): each for each in open_clip.list_models()}
        close = difflib.get_close_matches(settings.model.casefold(), known, n=1)
        otherwise = "see open_clip.list_models(), or use local-dir:FOLDER"
        remedy = f"did you mean {known[close[0]]}?" if close else otherwise
        raise UserError(f"{key}.model: open_clip knows no {settings.model!r}; {remedy}")
    if by_name and settings.pretrained is None:
        remedy = "name a tag or a checkpoint file"
        raise UserError(f"{key}.pretrained: is missing, and random weights embed nothing; {remedy}")
    try:
        architecture = open_clip.get_model_config(settings.model)
        text_tower = architecture["text_cfg"].get("hf_model_name") or ""
        if text_tower.startswith((".", "/")) and not Path(text_tower).is_dir():
            remedy = "correct it there (a path counts from where the command runs)"
            raise UserError(f"{key}.model: {folder} names its text tower {text_tower}, which is no folder; {remedy}")
        check_architecture(architecture, Path(folder) if local else None, f"{key}.model")
        vision = architecture["vision_cfg"]
        own, _ = to_2tuple(vision.get("image_size", CLIPVisionCfg.image_size))
        # By this open_clip knows its ResNets.
        if settings.image_size not in (None, own) and isinstance(vision.get("layers"), list):
            problem = f"CLIP's ResNet pools with a position for each cell of {own} pixels, which nothing interpolates"
            raise UserError(f"{key}.image_size: {problem}; leave it out, or use a ViT or a ConvNeXt")
        if by_name:
            check_activation(settings.model, str(settings.pretrained), architecture, key)
        long = longclip.read_checkpoint(str(settings.pretrained)) if by_name else None
        if long is None:
            model = open_clip.create_model(
                settings.model, settings.pretrained, precision=settings.precision, device=device,
                force_image_size=settings.image_size, require_pretrained=True,
            )
        else:
            architecture = longclip.adapt(architecture, long)
            model = longclip.build(architecture, long, settings.precision, settings.image_size).to(device)
        is_hugging_face = bool(architecture["text_cfg"].get("hf_tokenizer_name"))
        tokenizer = open_clip.get_tokenizer(
            settings.model,
            context_length=architecture["text_cfg"]["context_length"] if long else None,
            **({"trust_remote_code": False} if is_hugging_face else {}),
        )
    except LOADING_ERRORS as error:
        if is_unreachable(error):
            instead = "give `pretrained:` a checkpoint file or" if by_name else "give"
            raise UserError(
                f"{key}: {settings.model!r} cannot be downloaded: no network? {instead} `model: local-dir:FOLDER`"
                " (docs/own-data.md#encoders); the demo's local-dir:data/demo/encoder works offline"
            ) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "correct it" if settings.image_size is None else "correct it, or leave image_size out"
        raise UserError(f"{key}: open_clip cannot load {settings.model!r} ({reason}); {remedy}") from None
    model.eval().requires_grad_(False)
    preprocessing = dict(model.visual.preprocess_cfg)
    # The configuration, since what PyTorch prints of a model leaves out attention heads and pooling.
    architecture = {**architecture, "text_cfg": architecture["text_cfg"] | hf_content(model, tokenizer, key)}
    preprocess, normalise = split_transform(image_transform_v2(PreprocessCfg(**preprocessing), is_train=False), device)
    dense = find_dense(settings.dense, model.visual, preprocessing, towers or {}, f"{key}.dense", device)
    encoder = LoadedEncoder(
        name=name, model=model, preprocess=preprocess, normalise=normalise,
        preprocessing=preprocessing, tokenizer=tokenizer,
        dtype=DTYPES[settings.precision], device=device, batch_size=settings.batch_size, dense=dense,
        fingerprint=encoder_fingerprint(
            model, architecture, preprocessing, settings.precision, None if dense is None else dense.identity
        ),
    )
    if settings.precision != "fp32":
        check_precision(encoder, settings.precision)
    if settings.image_size is not None:
        check_resized(encoder, settings.image_size, own)
    return encoder


def find_dense(
    asked: str | Proxy,
    visual: Any,
    preprocessing: Mapping[str, Any],
    towers: Mapping[str, Tower],
    key: str,
    device: torch.device,
) -> Dense | None:
    """What `encoders.NAME.dense`, which stands under `key`, asks of an image tower; None for `last`. Loads a proxy."""
    if asked == "last":
        return None
    if isinstance(asked, str):
        check_dense(asked, visual, key)
        return make_dense(asked, visual, None, preprocessing)
    check_dense("proxy", visual, key)
    if asked.proxy not in towers:
        raise UserError(f"{key}.proxy: {asked.proxy!r} is not under `towers`; add it there")
    return make_dense("proxy", visual, load_tower(asked.proxy, towers[asked.proxy], device), preprocessing)


def check_activation(model: str, tag: str, architecture: dict[str, Any], key: str) -> None:
    """Raises UserError for a tag of open_clip's whose weights need QuickGELU, where the model has none.

    open_clip itself only warns, and embeds. Of one model (roberta-ViT-B-32) the configuration has QuickGELU and the tag
    does not say so: there the configuration counts.
    """
    if open_clip.get_pretrained_cfg(model, tag).get("quick_gelu") and not architecture.get("quick_gelu"):
        raise UserError(f"{key}.model: {tag} was trained with QuickGELU, and {model} is without; use {model}-quickgelu")


@torch.inference_mode()
def check_precision(encoder: LoadedEncoder, precision: str) -> None:
    """Raises UserError where open_clip leaves parts of a model in fp32, so that they do not fit the rest.

    It does so with layer scale, with CoCa's poolings and with a Hugging Face text tower beside a ViT of its own.
    """
    model: Any = encoder.model
    blank = encoder.preprocess(Image.new("RGB", (8, 8)))[None]
    try:
        model.encode_text(encoder.tokenizer(["a"]).to(encoder.device))
        model.encode_image(encoder.normalise(blank.to(encoder.device)).to(encoder.dtype))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        remedy = f"open_clip cannot run this model in {precision} ({reason}); use fp32"
        raise UserError(f"params.yaml: encoders.{encoder.name}.precision: {remedy}") from None


def check_resized(encoder: LoadedEncoder, size: int, own: int) -> None:
    """Raises UserError where the model cannot run at `size` pixels, or not in whole cells as at its `own` size."""
    key, visual = f"params.yaml: encoders.{encoder.name}", encoder.model.visual
    check_size(size, own, side_of_cell(visual), key)
    try:
        encoder.embed_images(encoder.preprocess(Image.new("RGB", (8, 8)))[None])
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        problem = f"open_clip cannot run this model at {size} pixels ({reason})"
        raise UserError(f"{key}.image_size: {problem}; leave it out, or use another encoder") from None


def side_of_cell(visual: Any) -> int:
    """Pixels a side of a cell of an image tower's map; 1 where the library does not say."""
    if isinstance(visual, VisionTransformer):
        return visual.patch_size[0]
    layers = getattr(visual.trunk, "feature_info", None) if isinstance(visual, TimmModel) else None
    return layers[-1]["reduction"] if layers else 1


def hf_content(model: nn.Module, tokenizer: Any, key: str) -> dict[str, Any]:
    """What stands behind the paths in `text_cfg`: the text tower's settings and a sha of the tokenizer, or nothing.

    Raises UserError for a tokenizer that transformers runs without a tokenizer.json: its rules are code, not a file.
    """
    content: dict[str, Any] = {}
    if isinstance(tower := getattr(model, "text", None), HFTextEncoder):
        config = tower.config
        # Only what differs from the class's defaults, so that an option that a new transformers adds changes nothing.
        defaults = type(config)().to_dict()
        settings = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
        settings.pop("_name_or_path", None)
        content["hf_model_name"] = settings | {"model_type": config.model_type}
    if isinstance(tokenizer, HFTokenizer):
        inner = tokenizer.tokenizer
        if not inner.is_fast:
            remedy = "save it as a fast one (tokenizer.json), or use another encoder"
            raise UserError(f"{key}.model: the rules of {type(inner).__name__} are code, not a file; {remedy}")
        rules = json.loads(inner.backend_tokenizer.to_str())
        # open_clip sets both in every call.
        del rules["truncation"], rules["padding"]
        sides = [inner.padding_side, inner.truncation_side, inner.split_special_tokens]
        content["hf_tokenizer_name"] = store.sha256(store.canonical_json([rules, inner.special_tokens_map, sides]))
    return content
