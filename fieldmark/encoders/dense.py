"""Other rules for the cells of a ViT that pools by its CLS token: `encoders.NAME.dense`.

CLIP trains the CLS token alone. Its last block moves what it needs of the picture there, and what the block leaves in a
cell need not be of that cell. These rules leave the tower and its global embedding as they are, and take instead of the
last block's cells what its attention would give with another map. Nothing is trained. Of the last block, q, k and v
(heads, T, d) are those of the T cells, as the block itself made them of LN(x) of the block before; W_o is its output
projection, behind which a cell goes through the tower's last norm and the projection, as it would else (maps.py):

  value      MaskCLIP (Zhou et al., ECCV 2022 [mem]): v
  self       SCLIP (Wang et al., ECCV 2024 [mem]): (softmax(q q^T / sqrt d) + softmax(k k^T / sqrt d)) v
  neighbour  NACLIP (Hajimiri et al., WACV 2025 [mem]): softmax(k k^T / sqrt d + w) v with
             w_ij = exp(-|p_i - p_j|^2 / (2 REACH^2)), places p in cells
  proxy      ProxyCLIP (Lan et al., ECCV 2024 [mem]): A v, A = softmax over the positive entries of
             GAMMA (S - BETA mean S), S the cosines of a tower's cells

As against the papers [design]: CLS and registers are in no attention map, neither as rows nor as columns. Residual, MLP
and layer scale are dropped by every rule; SCLIP as published keeps the first two. Mean S is of one picture, where some
code averages over a batch. A row without a positive entry keeps its own value: cells of open water are all alike, and
then no entry is positive.

The tower of `proxy` sees the pixels that the encoder sees, mirrored and cropped as they are, scaled to its own size and
normalised as it wants them; its map is scaled to the grid of the encoder.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import Attention
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder

# Raised when the cells that a rule gives for the same weights and picture change.
RULES = 1
REACH = 5.0  # of neighbour, in cells
BETA, GAMMA = 1.2, 3.0  # of proxy
Found = TypeVar("Found")


@dataclass(frozen=True)
class Dense:
    """A rule for the cells of one image tower."""

    rule: str
    visual: Any
    tower: ImageEncoder | None  # of `proxy`
    show: Callable[[Tensor], Tensor]  # the encoder's normalised pixels as the tower's
    identity: dict[str, Any]  # all that changes a cell, for the encoder's fingerprint

    def cells(self, query: Tensor, key: Tensor, value: Tensor, pixels: Tensor) -> Tensor:
        """The cells (n, T, D) that a picture's head reads, of what its last block attends with (n, heads, P + T, d).

        P tokens stand before the cells. `pixels` (n, 3, H, W) are the batch that the tower has seen.
        """
        height, width = grid_of(self.visual)
        query, key, value = (each[:, :, -height * width :] for each in (query, key, value))
        if self.rule == "value":
            mixed = value
        elif self.rule == "self":
            attend = functional.scaled_dot_product_attention
            mixed = attend(query, query, value) + attend(key, key, value)
        elif self.rule == "neighbour":
            near = nearness(height, width).to(key)
            mixed = functional.scaled_dot_product_attention(key, key, value, attn_mask=near)
        else:
            mixed = proxy_attention(self.proxy_cells(pixels, height, width)).to(value.dtype)[:, None] @ value
        rows, block = mixed.transpose(1, 2).flatten(2), last_block(self.visual)
        if isinstance(block.attn, nn.MultiheadAttention):
            return block.attn.out_proj(rows)
        return self.visual.trunk.norm(block.attn.proj(block.attn.norm(rows)))

    def proxy_cells(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """The cells (n, T, D) of the tower's map of a batch, scaled to a grid."""
        assert self.tower is not None
        # Its batches are those of the encoder: one shape, and half of it where memory is not enough.
        self.tower.batch_size = len(pixels)
        cells = self.tower.embed_images(self.show(pixels))[1].permute(0, 3, 1, 2)
        if cells.shape[2:] != (height, width):
            cells = functional.interpolate(cells, (height, width), mode="bilinear", antialias=True)
        return cells.flatten(2).transpose(1, 2)


def run_dense(dense: Dense | None, forward: Callable[[], Found], pixels: Tensor) -> tuple[Found, Tensor | None]:
    """What `forward` gives, which shows pixels (n, 3, H, W) to the image tower once, and the cells of a rule (n, T, D).

    The cells are None where there is no rule: then they are those of the last block.
    """
    if dense is None:
        return forward(), None
    with last_attention(last_block(dense.visual).attn) as seen:
        found = forward()
    # Whoever records the attention of the encoder's own blocks (layers.py) shall see neither this nor a tower's.
    with torch._C.DisableTorchFunction():
        return found, dense.cells(*seen[-1], pixels)


def with_cells(features: Tensor, cells: Tensor | None) -> Tensor:
    """What a tower's head reads (n, P + T, D), with other cells (n, T, D) where there are any."""
    return features if cells is None else torch.cat([features[:, : -cells.shape[1]], cells], dim=1)


def proxy_attention(cells: Tensor) -> Tensor:
    """A of `proxy` (n, T, T), float32, of a tower's cells (n, T, D)."""
    unit = functional.normalize(cells.float(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    scores = GAMMA * (cosines - BETA * cosines.mean(dim=(1, 2), keepdim=True))
    scores = scores.masked_fill(scores <= 0, -torch.inf)
    own = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own & ~(scores > 0).any(dim=2, keepdim=True), 0).softmax(dim=2)


def nearness(height: int, width: int) -> Tensor:
    """w of `neighbour` (T, T), cells row by row."""
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    apart = (places[:, None] - places).square().sum(dim=2)
    return torch.exp(-apart / (2 * REACH**2))


class LastCall(TorchFunctionMode):
    """A context in which queries, keys and values of PyTorch's scaled_dot_product_attention are kept, of one call."""

    def __init__(self, seen: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            self.seen[:] = [args[:3]]
        return function(*args, **kwargs or {})


@contextmanager
def last_attention(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """A context with a list, into which a pass puts the queries, keys and values (n, heads, T, d) of its last block.

    `attention` is that of the block.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    if not isinstance(attention, nn.MultiheadAttention):
        with LastCall(seen):
            yield seen
        return

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [queries_keys_values(module, inputs[0])]

    # In a TorchFunctionMode, PyTorch's MultiheadAttention computes by another path, and that would change bits.
    hook = attention.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def queries_keys_values(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What PyTorch's MultiheadAttention makes of tokens (n, T, D), each (n, heads, T, d)."""
    made = functional.linear(tokens, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    query, key, value = (each.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for each in made)
    return query, key, value


def last_block(visual: Any) -> Any:
    """The last block of a ViT whose head reads the CLS token alone; None for any other tower."""
    if isinstance(visual, VisionTransformer):
        block: Any = visual.transformer.resblocks[-1]
        reads_cls = visual.pool_type == "tok" and visual.attn_pool is None
        return block if reads_cls and isinstance(block.attn, nn.MultiheadAttention) else None
    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    if not isinstance(trunk, TimmVisionTransformer | Eva) or trunk.global_pool != "token":
        return None
    block = trunk.blocks[-1]
    plain = type(block) in (Block, EvaBlock) and type(block.attn) in (Attention, EvaAttention)
    return block if plain and block.attn.fused_attn and block.attn.gate is None else None


def grid_of(visual: Any) -> tuple[int, int]:
    """Rows and columns of the map of a ViT that has a last_block."""
    return visual.grid_size if isinstance(visual, VisionTransformer) else visual.trunk.patch_embed.grid_size


def check_dense(rule: str, visual: Any, key: str) -> None:
    """Raises UserError, under `key`, for an image tower that has no such cells."""
    if last_block(visual) is None:
        tower = visual.trunk if isinstance(visual, TimmModel) else visual
        pool = getattr(tower, "pool_type", None) or getattr(tower, "global_pool", None)
        pooling = f" with pooling {pool}" if isinstance(pool, str) else ""
        problem = f"{rule} needs a ViT with plain blocks that pools by its CLS token, and this is a"
        raise UserError(f"{key}: {problem} {type(tower).__name__}{pooling}; use last")


def make_dense(rule: str, visual: Any, tower: ImageEncoder | None, preprocessing: Mapping[str, Any]) -> Dense:
    """The rule for an image tower that check_dense lets pass.

    `tower` is that of `proxy`, None for the others; `preprocessing` is the encoder's.
    """
    identity = {"rule": rule, "rules": RULES}
    if tower is None:
        return Dense(rule, visual, None, lambda pixels: pixels, identity)
    return Dense(rule, visual, tower, shown_to(tower, preprocessing), identity | {"tower": tower.fingerprint})


def shown_to(tower: ImageEncoder, preprocessing: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Pixels (n, 3, H, W) that an encoder with this preprocessing has normalised, as a tower wants to see them."""

    def numbers(of: Mapping[str, Any], name: str) -> Tensor:
        return torch.as_tensor(of[name], dtype=torch.float32, device=tower.device)[:, None, None]

    mean, std = (numbers(preprocessing, name) for name in ("mean", "std"))
    own_mean, own_std = (numbers(tower.preprocessing, name) for name in ("mean", "std"))
    height, width = np.broadcast_to(tower.preprocessing["size"], 2).tolist()

    def show(pixels: Tensor) -> Tensor:
        raw = pixels.float() * std + mean
        if raw.shape[2:] != (height, width):
            raw = functional.interpolate(raw, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        return (raw - own_mean) / own_std

    return show
