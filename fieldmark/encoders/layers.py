"""The hidden states of an image tower, layer by layer: the cells of its map, its CLS token, and attention rollout.

A layer is a block of a ViT, or a stage of a tower whose map becomes smaller from stage to stage (Swin, ConvNeXt,
ResNet). Layers are counted from 0, or from the end with -1. A ResNet's stem is layer 0, as timm and open_clip count.
A hidden state is read as it leaves the layer: before the tower's last norm, its pooling and its projection. Register
and distillation tokens are left out.

One layer more stands behind the last one: `head`, which is what the projection takes of each cell, after the last norm
or `conv_head` (maps.pool_cells). Its cells, projected, are the dense tokens of embed_images: where a rule makes these
(dense.py), `head` holds what it gives, and the blocks what they are without it.

Attention rollout, as TransFG uses it (He et al., AAAI 2022; read in its code), says how much of each cell
has reached the CLS token. For a ViT of L blocks it is the product A_{L-1} ... A_2 A_1 of the attention maps of all
blocks but the last, head by head; no identity is added and rows are not scaled anew. Of this product the row of CLS is
kept, and of that the columns of the cells. It belongs to block L-1, the last but one (layer L-2, counted from 0).
Together with the columns of the other tokens the row sums to 1. Only this row is multiplied: O(L T^2) for T tokens.

Attention kernels do not return their maps. So a map A_i = softmax(q k^T / sqrt(d) + bias) is computed again in float32,
from the q and k that the block itself used, after its norms and rotary positions. The hidden states have the same bits
as without rollout.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.dense import Dense, run_dense, with_cells
from fieldmark.encoders.maps import find_visual, pool_cells
from fieldmark.params import Layer, MomentLayer

# Raised when what this module gives for the same weights and picture changes.
RULES = 1


class LayerChoice(NamedTuple):
    """Which layers of a tower are read."""

    layers: list[int]  # counted from 0, in order; `head` is one past the last
    rollout: int | None  # the one of them whose rollout is asked for


class HiddenStates(NamedTuple):
    """What the chosen layers hold of n pictures, layer by layer."""

    cells: list[Tensor]  # (n, h, w, D), each layer its own h, w and D
    cls: list[Tensor]  # (n, D), or (n, 0) where the tower has no CLS token
    rollout: Tensor  # (n, heads, h w) of layer L-2, or (n, 0, 0) where it is not asked for


class Attention(NamedTuple):
    """What an attention map is made of: queries and keys (n, heads, T, d), and a bias added to their scaled product."""

    query: Tensor
    key: Tensor
    bias: Tensor | None = None

    def rows(self, count: int | None = None) -> Tensor:
        """The map's first `count` rows, all by default: (n, heads, count, T), float32, each of sum 1."""
        scores = self.query[:, :, :count].float() @ self.key.float().transpose(-2, -1)
        scores = scores / math.sqrt(self.query.shape[-1])
        if self.bias is not None:
            scores = scores + self.bias[..., :count, :].float()
        return scores.softmax(dim=-1)


class AttentionRecorder(TorchFunctionMode):
    """A context in which the inputs of every call of PyTorch's scaled_dot_product_attention are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Attention] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.recorded.append(Attention(args[0], args[1], kwargs.get("attn_mask")))
        return function(*args, **kwargs)


def find_tower(model: Any) -> nn.Module:
    """The part of a loaded model that has the layers: one of open_clip's own image towers, or a timm model."""
    visual = getattr(model, "visual", model)
    return visual.trunk if isinstance(visual, TimmModel) else visual


def choose_layers(tower: Any, asked: Sequence[Layer], rollout: bool, key: str) -> LayerChoice:
    """The layers that are `asked` for, as the tower counts them. Raises UserError, under `key`, for others."""
    layers = sorted(number_layer(tower, layer, f"{key}.layers") for layer in asked)
    kind, count = type(tower).__name__, count_layers(tower) or 0
    if len(set(layers)) < len(layers):
        raise UserError(f"{key}.layers: {list(asked)} are {layers} of {count}, one of them twice; take one out")
    if not rollout:
        return LayerChoice(layers, None)
    if not has_cls(tower):
        raise UserError(f"{key}.rollout: a {kind} has no CLS token that looks at cells; set it to false")
    if count < 2:
        raise UserError(f"{key}.rollout: it ends before the last block, and there is but one; set it to false")
    if count - 2 not in layers:
        raise UserError(f"{key}.rollout: it is stored with the last layer but one, {count - 2}; add -2 to {key}.layers")
    return LayerChoice(layers, count - 2)


def number_layer(tower: Any, layer: MomentLayer, key: str) -> int:
    """A layer as the tower counts it; `head` is one past the last, and `projected` two. Raises UserError for others.

    `key` is where it stands, for messages.
    """
    kind, count = type(tower).__name__, count_layers(tower)
    if count is None:
        remedy = "take it out, or use a ViT, a Swin or a convolutional tower"
        raise UserError(f"{key}: a {kind} does not give its hidden states layer by layer; {remedy}")
    if isinstance(layer, str):
        return count + ["head", "projected"].index(layer)
    if not -count <= layer < count:
        given = f"0 to {count - 1}, or -{count} to -1 from the end, and head"
        raise UserError(f"{key}: {layer} is not there; this {kind} has {given}")
    return layer % count


def count_layers(tower: Any) -> int | None:
    """How many layers a tower has; None if it gives no hidden states."""
    if isinstance(tower, VisionTransformer):
        return len(tower.transformer.resblocks)
    if isinstance(tower, ModifiedResNet):
        return 5
    info = getattr(tower, "feature_info", None)
    return len(info) if info and hasattr(tower, "forward_intermediates") else None


def count_prefix(tower: Any) -> int:
    """How many tokens stand before the cells: CLS, which is the first where there is one, and registers."""
    if isinstance(tower, VisionTransformer):
        return 1
    # Other towers (CaiT, XCiT) add CLS only after the last layer.
    gives_them = "return_prefix_tokens" in inspect.signature(tower.forward_intermediates).parameters
    return getattr(tower, "num_prefix_tokens", 0) if gives_them else 0


def has_cls(tower: Any) -> bool:
    return isinstance(tower, VisionTransformer) or (
        count_prefix(tower) > 0 and getattr(tower, "cls_token", None) is not None
    )


def hidden_states(
    model: Any, pixels: Tensor, choice: LayerChoice, key: str, dense: Dense | None = None
) -> HiddenStates:
    """The hidden states of pixels (n, 3, H, W), from one forward pass up to the last layer chosen.

    `model` is a loaded model or its tower; `head` needs the model, for what the tower's head does. `dense` is the rule
    for its cells, where the encoder has one.
    Raises UserError, under `key`, where rollout is asked of a tower whose blocks do not attend from all tokens to all.
    """
    tower = find_tower(model)
    count = count_layers(tower)
    blocks = [layer for layer in choice.layers if layer != count]
    whole = len(blocks) < len(choice.layers)

    def run() -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        return run_tower(tower, pixels, blocks) if whole else (*run_layers(tower, pixels, blocks), None)

    def run_both() -> tuple[tuple[list[Tensor], list[Tensor], Tensor | None], Tensor | None]:
        return run_dense(dense if whole else None, run, pixels)

    if choice.rollout is None:
        (maps, prefixes, features), replaced = run_both()
        rollout = pixels.new_empty(len(pixels), 0, 0)
    else:
        with record_attention(tower) as recorded:
            (maps, prefixes, features), replaced = run_both()
        prefix, (height, width) = count_prefix(tower), maps[-1].shape[2:]
        ran = choice.layers[-1] + (1 if features is None else 0)
        if [each.key.shape[2] for each in recorded] != [prefix + height * width] * ran:
            problem = f"the blocks of a {type(tower).__name__} do not each attend once, from all tokens to all"
            raise UserError(f"{key}.rollout: {problem}; set it to false")
        rollout = attention_rollout(recorded[: choice.rollout + 1])[:, :, prefix:]
    cells = [each.permute(0, 2, 3, 1) for each in maps]
    cls = [each[:, 0] for each in prefixes] if has_cls(tower) else [pixels.new_empty(len(pixels), 0)] * len(maps)
    if features is not None:
        shown = with_cells(features, replaced)
        last, first = pool_cells(find_visual(model), shown, f"{key}: {type(tower).__name__}")
        cells.append(last)
        cls.append(first if has_cls(tower) else pixels.new_empty(len(pixels), 0))
    return HiddenStates(cells, cls, rollout)


def check_rollout(encoder: ImageEncoder, key: str) -> None:
    """Raises UserError, under `key`, for an encoder that embed_with_rollout cannot run."""
    tower = find_tower(encoder.model)
    if not has_cls(tower) or (count_layers(tower) or 0) < 2:
        kind = type(tower).__name__
        remedy = "use norm or similarity, or a ViT with a CLS token"
        raise UserError(f"{key}: a {kind} has no CLS token that looks at cells, in two blocks or more; {remedy}")


@torch.inference_mode()
def embed_with_rollout(encoder: ImageEncoder, key: str, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `embed_images` gives of pixels (n, 3, H, W), and rollout (n, heads, h w) to the last block but one, float32.

    Raises UserError, under `key`, for a tower whose blocks do not attend from all tokens to all.
    """
    tower = find_tower(encoder.model)
    with record_attention(tower) as recorded:
        pooled, tokens = encoder.embed_images(pixels)
    prefix, cells = count_prefix(tower), tokens.shape[1] * tokens.shape[2]
    if [each.key.shape[2] for each in recorded] != [prefix + cells] * (count_layers(tower) or 0):
        problem = f"the blocks of a {type(tower).__name__} do not each attend once, from all tokens to all"
        raise UserError(f"{key}: {problem}; use norm or similarity")
    return pooled, tokens, attention_rollout(recorded[:-1])[: len(pixels), :, prefix:]


def run_tower(tower: Any, pixels: Tensor, layers: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """run_layers, and the features that the tower's head takes (maps.pool_map), from one pass through all of it."""
    if isinstance(tower, VisionTransformer | ModifiedResNet):
        last, asked = count_layers(tower), len(layers)
        assert last is not None
        maps, prefixes = run_layers(tower, pixels, sorted({*layers, last - 1}))
        features = maps[-1]
        if prefixes:
            features = torch.cat([prefixes[-1], features.flatten(2).transpose(1, 2)], dim=1)
        return maps[:asked], prefixes[:asked], features
    if not layers:
        return [], [], tower.forward_features(pixels)
    options = {"indices": layers, "norm": False, "output_fmt": "NCHW"}
    if not count_prefix(tower):
        features, maps = tower.forward_intermediates(pixels, **options)
        return maps, [], features
    features, pairs = tower.forward_intermediates(pixels, return_prefix_tokens=True, **options)
    return [cells for cells, _ in pairs], [prefix for _, prefix in pairs], features


def run_layers(tower: Any, pixels: Tensor, layers: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The maps (n, D, h, w) of layers, and the tokens before the cells (n, prefix, D) where there are any."""
    options = {"indices": layers, "stop_early": True, "intermediates_only": True, "output_fmt": "NCHW"}
    if isinstance(tower, VisionTransformer):
        output = tower.forward_intermediates(pixels, output_extra_tokens=True, **options)
        return output["image_intermediates"], output["image_intermediates_prefix"]
    if isinstance(tower, ModifiedResNet):
        return tower.forward_intermediates(pixels, **options)["image_intermediates"], []
    if not count_prefix(tower):
        return tower.forward_intermediates(pixels, norm=False, **options), []
    pairs = tower.forward_intermediates(pixels, norm=False, return_prefix_tokens=True, **options)
    return [cells for cells, _ in pairs], [prefix for _, prefix in pairs]


@contextmanager
def record_attention(tower: Any) -> Iterator[list[Attention]]:
    """A context with a list, to which each block that runs adds what its attention map is made of."""
    blocks = tower.transformer.resblocks if isinstance(tower, VisionTransformer) else []
    attentions = [block.attn for block in blocks if isinstance(block.attn, nn.MultiheadAttention)]
    if not attentions:
        with AttentionRecorder() as recorder:
            yield recorder.recorded
        return
    # In a TorchFunctionMode, PyTorch's MultiheadAttention computes by another path, and that would change bits.
    recorded: list[Attention] = []
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs: recorded.append(queries_and_keys(module, inputs[0])))
        for part in attentions
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def queries_and_keys(attention: Any, tokens: Tensor) -> Attention:
    """The queries and keys that PyTorch's MultiheadAttention makes of tokens (n, T, D)."""
    width = attention.embed_dim
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[: 2 * width]
    both = functional.linear(tokens, attention.in_proj_weight[: 2 * width], bias)
    query, key = (half.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for half in both.chunk(2, dim=-1))
    return Attention(query, key)


def attention_rollout(attentions: Sequence[Attention]) -> Tensor:
    """The row of the first token in the product of attention maps, the last map on the left: (n, heads, T), float32."""
    *earlier, last = attentions
    row = last.rows(1)
    for each in reversed(earlier):
        row = row @ each.rows()
    return row[:, :, 0]
