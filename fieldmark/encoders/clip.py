"""Encoders that open_clip loads, and how their image cells and texts reach one space.

An image gives one global embedding and a map of dense tokens from one forward pass. One rule holds for every family:
what follows the feature map (the tower's own norm, pooling, projection) is applied to each cell as if the whole map
were that cell. So a map whose cells are all equal has tokens that all equal its global embedding. By kind of pooling:

- average (ConvNeXt, MobileCLIP-S, ViTamin, Swin, CLIPA): the mean of the cells is the global embedding exactly if the
  projection is linear and no norm stands between.
- CLS token (ViTs of OpenAI and LAION, EVA, MobileCLIP-B): a cell takes the place of the CLS token. The mean of the
  cells is not the global embedding, here and below.
- attention (SigLIP, SigLIP 2, PE: `map`; CoCa; `rot_attn`): a cell pays all its attention to itself, so that values and
  output projection alone act on it.
- attention with positions (ModifiedResNet, CLIP's ResNets): the cell stands at every place at once and attends to
  itself there. Without the positions this is the rule of MaskCLIP (Zhou et al., ECCV 2022) [mem]: `v_proj`, then
  `c_proj`. Pooling of timm's that adds positions (`abs_attn`) is refused: no configuration of open_clip has it.

CLS and register tokens are no cells; where pooling reads them too, they give way to copies of the cell. The cells of
every transformer carry context from the whole picture. A text goes through the encoder's own tokenizer: open_clip's, or
one of Hugging Face's with its own cleaning. LongCLIP's checkpoints: see longclip.py.

Weights trained with QuickGELU (OpenAI's, DFN's, MetaCLIP's) need open_clip's NAME-quickgelu: under NAME their tag is
refused. A checkpoint file does not say which it needs, so there the name decides.

Vectors leave here in float32, not normalised. An encoder's fingerprint covers architecture, weights, preprocessing,
precision, these rules and those of decoding (images.py), a Hugging Face text tower and tokenizer by what is in them and
not by where they lie; the device and the batch size are not in it.
"""

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors import SafetensorError
from timm.layers import AttentionPool2d, AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import Compose, PILToTensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders import longclip
from fieldmark.params import Encoder
from fieldmark.pictures import decode as images

# Raised when a rule in this module changes what it gives for the same weights and picture.
RULES = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What open_clip and torch raise for files and configurations that are broken or do not fit.
LOADING_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, EOFError,
    StopIteration, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass
class LoadedEncoder:
    """One loaded dual encoder on one device."""

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
        """Pixels (n, 3, H, W) to the global embeddings (n, D) and the dense tokens (n, h, w, D), float32 on the device.

        Pixels are bytes as `preprocess` gives them, or floats that are normalised already. n is at most batch_size; the
        batch is padded to it, since another batch shape changes bits.
        """
        count = len(pixels)
        pixels = pad_rows(pixels, self.batch_size).to(self.device)
        if pixels.dtype == torch.uint8:
            pixels = self.normalise(pixels)
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        pooled, tokens = image_features(self.model.visual, pixels, self.name)
        return pooled[:count].float(), tokens[:count].float()

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts (n) to embeddings (n, D), float32 on the CPU, padded as images are."""
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
    """LoadedEncoder.count_tokens for open_clip's HFTokenizer: special tokens count, padding does not."""
    length, encode, text = tokenizer.context_length, tokenizer.tokenizer, tokenizer.clean_fn(text)
    if tokenizer.tokenizer_mode == "clips":
        needed = len(encode(text, add_special_tokens=False, verbose=False).input_ids) + 3  # start, end, class
        return min(needed, length), needed > length
    needed = len(encode(text, verbose=False).input_ids)
    read = encode(text, truncation=True, max_length=length).input_ids
    # strip_sep_token puts 0 in the place of each separator, and 0 is padding to most vocabularies.
    stripped = read.count(encode.sep_token_id) if tokenizer.strip_sep_token and encode.pad_token_id == 0 else 0
    return len(read) - stripped, needed > length


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are `count`."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); use cpu, cuda or cuda:N") from None
    return torch.device(name)


def load_encoder(name: str, settings: Encoder, device: torch.device) -> LoadedEncoder:
    """Load `encoders.NAME`. Raises UserError where open_clip cannot, with its reason."""
    key = f"params.yaml: encoders.{name}"
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32 on this machine")
    folder = settings.model.removeprefix("local-dir:")
    local = folder != settings.model
    if local and not Path(folder).is_dir():
        raise UserError(f"{key}.model: there is no folder {folder}; correct the path")
    by_name = not local and not settings.model.startswith("hf-hub:")
    if by_name and settings.model not in open_clip.list_models():
        remedy = "see open_clip.list_models(), or use local-dir:PATH"
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
        if by_name:
            check_activation(settings.model, str(settings.pretrained), architecture, key)
        long = longclip.read_checkpoint(str(settings.pretrained)) if by_name else None
        if long is None:
            model = open_clip.create_model(
                settings.model, settings.pretrained, precision=settings.precision, device=device,
                require_pretrained=True,
            )
        else:
            architecture = longclip.adapt(architecture, long)
            model = longclip.build(architecture, long, settings.precision).to(device)
        tokenizer = open_clip.get_tokenizer(
            settings.model, context_length=architecture["text_cfg"]["context_length"] if long else None
        )
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{key}: open_clip cannot load {settings.model!r} ({reason}); correct it") from None
    model.eval().requires_grad_(False)
    visual = model.visual
    preprocessing = dict(visual.preprocess_cfg)
    identity = {
        "rules": RULES,
        "decoding": images.RULES,
        # The configuration, since what PyTorch prints of a model leaves out attention heads and pooling.
        "architecture": {**architecture, "text_cfg": architecture["text_cfg"] | hf_content(model, tokenizer, key)},
        "weights": weights_sha(model),
        "preprocessing": preprocessing,
        "precision": settings.precision,
    }
    preprocess, normalise = split_transform(image_transform_v2(PreprocessCfg(**preprocessing), is_train=False), device)
    encoder = LoadedEncoder(
        name=name, model=model, preprocess=preprocess, normalise=normalise,
        preprocessing=preprocessing, tokenizer=tokenizer,
        dtype=DTYPES[settings.precision], device=device, batch_size=settings.batch_size,
        fingerprint=store.sha256(store.canonical_json(identity)),
    )
    if settings.precision != "fp32":
        check_precision(encoder, settings.precision)
    return encoder


def check_activation(model: str, tag: str, architecture: dict[str, Any], key: str) -> None:
    """Raises UserError for a tag of open_clip's whose weights need QuickGELU, where the model is the one without.

    open_clip warns and embeds. The other way round there is one model (roberta-ViT-B-32): its own configuration counts.
    """
    if open_clip.get_pretrained_cfg(model, tag).get("quick_gelu") and not architecture.get("quick_gelu"):
        raise UserError(f"{key}.model: {tag} was trained with QuickGELU, and {model} is without; use {model}-quickgelu")


@torch.inference_mode()
def check_precision(encoder: LoadedEncoder, precision: str) -> None:
    """Raises UserError where open_clip leaves parts of a model in fp32 that do not fit the rest.

    So it does with layer scale, CoCa's poolings and a Hugging Face text tower beside a ViT of its own.
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


def hf_content(model: nn.Module, tokenizer: Any, key: str) -> dict[str, Any]:
    """What the paths in `text_cfg` lead to: the text tower's settings and a sha of the tokenizer. Empty without them.

    Raises UserError for a tokenizer that transformers runs without a tokenizer.json: its rules cannot be read.
    """
    content: dict[str, Any] = {}
    if isinstance(tower := getattr(model, "text", None), HFTextEncoder):
        config = tower.config
        # Against the class's defaults, so that an option which a new transformers adds changes nothing.
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
        # open_clip's calls set both anew.
        del rules["truncation"], rules["padding"]
        sides = [inner.padding_side, inner.truncation_side, inner.split_special_tokens]
        content["hf_tokenizer_name"] = store.sha256(store.canonical_json([rules, inner.special_tokens_map, sides]))
    return content


def weights_sha(model: nn.Module) -> str:
    """sha256 over every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_features(visual: Any, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Global embeddings (n, D) and dense tokens (n, h, w, D) of one forward pass. Raises UserError for other towers."""
    key = f"params.yaml: encoders.{name}"
    if isinstance(visual, TimmModel):
        return timm_features(visual, pixels, f"{key}: {type(visual.trunk).__name__}")
    if isinstance(visual, VisionTransformer):
        return vit_features(visual, pixels, f"{key}: {type(visual).__name__}")
    if isinstance(visual, ModifiedResNet):
        return resnet_features(visual, pixels)
    remedy = "use a timm tower, or a ViT or a ResNet of open_clip"
    raise UserError(f"{key}: no rule for the dense tokens of a {type(visual).__name__}; {remedy}")


def vit_features(visual: Any, pixels: Tensor, tower: str) -> tuple[Tensor, Tensor]:
    """image_features for a ViT of open_clip's own, which errors call `tower`."""
    pool = visual.attn_pool
    output = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=pool is None)
    pooled, cells = output["image_features"], output["image_intermediates"][0].permute(0, 2, 3, 1)
    if pooled.ndim != 2:
        problem = f"gives {tuple(pooled.shape)} for a batch of pictures"
        raise UserError(f"{tower}: {problem}; give it pooling (pool_type tok or avg, attentional_pool true)")
    if pool is not None:
        alone = pool.ln_k(cells).reshape(-1, 1, cells.shape[-1])
        # Over one key, every query gives the same.
        query = pool.ln_q(pool.query[:1]).expand(len(alone), 1, -1)
        attended, _ = pool.attn(query, alone, alone, need_weights=False)
        cells = visual.ln_post(attended).reshape(*cells.shape[:3], -1)
    # Without the copy the product takes ten times as long.
    return pooled, cells.contiguous() @ visual.proj


def resnet_features(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """image_features for CLIP's ResNet, whose pooling adds positions p: p_0 to the mean, p_1 to p_hw to the cells x.

    Over a map of one cell x everywhere, keys and values are W_k (x + p_i) and W_v (x + p_i): softmax drops q W_k x, and
    the weights sum to one, so what is pooled is W_v x + sum_i softmax_i(q W_k p_i) W_v p_i with q = W_q (x + p_0).
    """
    output = visual.forward_intermediates(pixels, indices=1)
    pool, cells = visual.attnpool, output["image_intermediates"][0].permute(0, 2, 3, 1)
    places = pool.positional_embedding.to(cells.dtype)

    def heads(rows: Tensor) -> Tensor:
        return rows.reshape(-1, pool.num_heads, rows.shape[-1] // pool.num_heads).transpose(0, 1)

    query = heads(pool.q_proj(cells + places[0]))
    keys, values = (heads(functional.linear(places, linear.weight)) for linear in (pool.k_proj, pool.v_proj))
    attended = functional.scaled_dot_product_attention(query, keys, values)
    return output["image_features"], pool.c_proj(pool.v_proj(cells) + attended.transpose(0, 1).reshape(cells.shape))


def timm_features(visual: Any, pixels: Tensor, tower: str) -> tuple[Tensor, Tensor]:
    """image_features for a timm tower, which errors call `tower`."""
    trunk = visual.trunk
    for part in visual.modules():
        if isinstance(part, AttentionPool2d | AttentionPoolLatent) and part.pos_embed is not None:
            problem = "its pooling adds a learned position to each cell, and no rule for that is written"
            raise UserError(f"{tower}: {problem}; use another encoder")
    features = trunk.forward_features(pixels)
    maps = cut_cells(trunk, features)
    if maps is None:
        raise UserError(f"{tower}: gives no map of cells; use a convolutional timm tower, a ViT or a Swin")
    cells, (height, width) = maps
    pooled = visual.head(trunk.forward_head(features))
    if pooled.ndim != 2:
        raise UserError(f"{tower}: gives {tuple(pooled.shape)} for a batch of pictures; give it pooling (timm_pool)")
    tokens = visual.head(trunk.forward_head(cells))
    return pooled, tokens.reshape(len(pixels), height, width, -1)


def cut_cells(trunk: Any, features: Any) -> tuple[Tensor, tuple[int, int]] | None:
    """Each cell as a feature map (n h w, ...) of its own, row by row, and the grid (h, w). None: there is no map."""
    channels = trunk.num_features
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 4 and getattr(trunk, "output_fmt", None) == "NHWC":
        height, width = features.shape[1:3]
        return features.reshape(-1, 1, 1, channels), (height, width)
    if features.ndim == 4 and features.shape[1] == channels:
        height, width = features.shape[2:]
        return features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1), (height, width)
    prefix = getattr(trunk, "num_prefix_tokens", None)
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if prefix is None or grid is None or features.shape[1:] != (prefix + math.prod(grid), channels):
        return None
    cells = features[:, prefix:].reshape(-1, 1, channels)
    # A copy for each prefix token: whichever of them the pooling reads or skips, it reads this cell alone.
    return cells.expand(-1, prefix + 1, -1), grid


def split_transform(
    transform: Compose, device: torch.device
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor]]:
    """A library's preprocessing in two steps: a picture to bytes (3, H, W), and bytes (n, 3, H, W) to float32.

    Together they give its bits. A thread that decodes moves a quarter of the memory so, and no tensor in it is large
    enough for PyTorch to start threads of its own.
    """
    *cut, _, normalize = transform.transforms
    mean, std = (torch.as_tensor(each, device=device)[:, None, None] for each in (normalize.mean, normalize.std))

    def normalise(pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).sub_(mean).div_(std)

    return Compose([*cut, PILToTensor()]), normalise
