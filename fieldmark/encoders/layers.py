"""What the layers of an image tower hold: the cells of its map, its CLS token, and where CLS has looked on the way.

A layer is a block of a ViT, or a stage of a tower whose map narrows (Swin, ConvNeXt, ResNet). Layers are counted from
0, or from the end with -1; a ResNet's stem is its layer 0, as timm and open_clip count. What is read is the hidden
state as it leaves the layer: before the tower's last norm, its pooling and its projection. Register and distillation
tokens are left out.

Attention rollout, as TransFG uses it (He et al., AAAI 2022; methods.md M8, read in its code): of a ViT of L blocks, the
product A_{L-1} ... A_2 A_1 of its attention maps, head by head, with no identity added and no row scaled anew. Of that
product the row of CLS is kept, its columns of cells alone: how much of each cell has reached CLS after block L-1, the
last but one (layer L-2, counted from 0). With the columns of the other tokens a row sums to 1. Only the row is
multiplied: O(L T^2) for T tokens.

A map A_i = softmax(q k^T / sqrt(d) + bias) is made again, in float32, from the q and k that the block itself used,
after its norms and rotary positions: kernels do not give their maps out. Hidden states are the same bits as without
rollout.

"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fieldmark.command import UserError

# Raised when a rule in this module changes what it gives for the same weights and picture.
RULES = 1


class Choice(NamedTuple):
    """What is read of a tower: layers as they count from 0, in order, and the one that has rollout."""

    layers: list[int]
    rollout: int | None


class Hidden(NamedTuple):
    """What layers hold of n pictures, layer by layer."""

    cells: list[Tensor]  # (n, h, w, D), each layer its own h, w and D
    cls: list[Tensor]  # (n, D), or (n, 0) where the tower has no CLS token
    rollout: Tensor  # (n, heads, h w) of layer L-2, or (n, 0, 0) where it is not asked


class Attention(NamedTuple):
    """What a block's map is made of: queries and keys (n, heads, T, d), and a bias added to their scaled products."""

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


class KeepAttention(TorchFunctionMode):
    """While it is entered, what every call of PyTorch's scaled_dot_product_attention was given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Attention] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.kept.append(Attention(args[0], args[1], kwargs.get("attn_mask")))
        return function(*args, **kwargs)


def find_tower(model: Any) -> nn.Module:
    """The part of a loaded model that holds the layers: an open_clip image tower of its own, or a timm model."""
    visual = getattr(model, "visual", model)
    return visual.trunk if isinstance(visual, TimmModel) else visual


def choose_layers(tower: Any, asked: Sequence[int], rollout: bool, key: str) -> Choice:
    """What is asked for, as the tower counts it. Raises UserError, under `key`, for what it cannot give."""
    kind, count = type(tower).__name__, count_layers(tower)
    if count is None:
        remedy = "take it out of `tokens`, or use a ViT, a Swin or a convolutional tower"
        raise UserError(f"{key}: a {kind} does not give its hidden states layer by layer; {remedy}")
    for layer in asked:
        if not -count <= layer < count:
            given = f"0 to {count - 1}, or -{count} to -1 from the end"
            raise UserError(f"{key}.layers: {layer} is not there; this {kind} has {given}")
    layers = sorted(layer % count for layer in asked)
    if len(set(layers)) < len(layers):
        raise UserError(f"{key}.layers: {list(asked)} are {layers} of {count}, one of them twice; take one out")
    if not rollout:
        return Choice(layers, None)
    if not has_cls(tower):
        raise UserError(f"{key}.rollout: a {kind} has no CLS token that looks at cells; set it to false")
    if count < 2:
        raise UserError(f"{key}.rollout: it ends before the last block, and there is but one; set it to false")
    if count - 2 not in layers:
        raise UserError(f"{key}.rollout: it is stored with the last layer but one, {count - 2}; add -2 to {key}.layers")
    return Choice(layers, count - 2)


def count_layers(tower: Any) -> int | None:
    """How many layers a tower has; None: it gives no hidden states."""
    if isinstance(tower, VisionTransformer):
        return len(tower.transformer.resblocks)
    if isinstance(tower, ModifiedResNet):
        return 5
    info = getattr(tower, "feature_info", None)
    return len(info) if info and hasattr(tower, "forward_intermediates") else None


def count_prefix(tower: Any) -> int:
    """Tokens before the cells: CLS, the first where there is one, and registers."""
    if isinstance(tower, VisionTransformer):
        return 1
    # Others (CaiT, XCiT) let CLS in after the last layer.
    gives_them = "return_prefix_tokens" in inspect.signature(tower.forward_intermediates).parameters
    return getattr(tower, "num_prefix_tokens", 0) if gives_them else 0


def has_cls(tower: Any) -> bool:
    return isinstance(tower, VisionTransformer) or (
        count_prefix(tower) > 0 and getattr(tower, "cls_token", None) is not None
    )


def hidden_states(tower: Any, pixels: Tensor, choice: Choice, key: str) -> Hidden:
    """One forward pass of pixels (n, 3, H, W), up to the last layer chosen.

    Raises UserError, under `key`, where rollout is asked of a tower whose blocks attend in another way.
    """
    if choice.rollout is None:
        maps, prefixes = run_layers(tower, pixels, choice.layers)
        rollout = pixels.new_empty(len(pixels), 0, 0)
    else:
        with keep_attention(tower) as kept:
            maps, prefixes = run_layers(tower, pixels, choice.layers)
        prefix, (height, width) = count_prefix(tower), maps[-1].shape[2:]
        if [each.key.shape[2] for each in kept] != [prefix + height * width] * (choice.layers[-1] + 1):
            problem = f"the blocks of a {type(tower).__name__} do not each attend once, from all tokens to all"
            raise UserError(f"{key}.rollout: {problem}; set it to false")
        rollout = roll_out(kept[: choice.rollout + 1])[:, :, prefix:]
    cells = [each.permute(0, 2, 3, 1) for each in maps]
    cls = [each[:, 0] for each in prefixes] if has_cls(tower) else [pixels.new_empty(len(pixels), 0)] * len(maps)
    return Hidden(cells, cls, rollout)


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
def keep_attention(tower: Any) -> Iterator[list[Attention]]:
    """While it is entered, a list to which each block that runs adds what its attention map is made of."""
    blocks = tower.transformer.resblocks if isinstance(tower, VisionTransformer) else []
    attentions = [block.attn for block in blocks if isinstance(block.attn, nn.MultiheadAttention)]
    if not attentions:
        with KeepAttention() as mode:
            yield mode.kept
        return
    # PyTorch's own module takes another path where functions are watched, and that would change bits.
    kept: list[Attention] = []
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs: kept.append(project(module, inputs[0])))
        for part in attentions
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def project(attention: Any, tokens: Tensor) -> Attention:
    """The queries and keys that PyTorch's MultiheadAttention makes of tokens (n, T, D)."""
    width = attention.embed_dim
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[: 2 * width]
    both = functional.linear(tokens, attention.in_proj_weight[: 2 * width], bias)
    query, key = (half.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for half in both.chunk(2, dim=-1))
    return Attention(query, key)


def roll_out(attentions: Sequence[Attention]) -> Tensor:
    """The first token's row of the product of attention maps, the last map on the left: (n, heads, T), float32."""
    *earlier, last = attentions
    row = last.rows(1)
    for each in reversed(earlier):
        row = row @ each.rows()
    return row[:, :, 0]
