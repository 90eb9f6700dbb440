"""The dense tokens of an image: each cell of an encoder's feature map, brought into the space of its global embedding.

One forward pass gives the global embedding of an image and a feature map of h x w cells. One rule makes a dense token
of a cell, for every family: what follows the feature map (the tower's own norm, pooling and projection) is applied to
the cell as if the whole map consisted of that cell. So in a map whose cells are all equal, every token equals the
global embedding. What this means depends on how the tower pools:

- average (ConvNeXt, MobileCLIP-S, ViTamin, Swin, CLIPA): the mean of the tokens is exactly the global embedding if the
  projection is linear and no norm follows the pooling.
- CLS token (ViTs of OpenAI and LAION, EVA, MobileCLIP-B): the cell takes the place of the CLS token. The mean of the
  tokens is not the global embedding, neither here nor with the kinds below.
- attention (SigLIP, SigLIP 2, PE: `map`; CoCa; `rot_attn`): the cell attends to nothing but itself, so that of the
  attention only its values and its output projection act on the cell.
- attention with positions (ModifiedResNet, CLIP's ResNets): the cell stands at every position at once and attends to
  itself at each of them. Without the positions this is the rule of MaskCLIP (Zhou et al., ECCV 2022) [mem]: `v_proj`,
  then `c_proj`. timm's pooling that adds positions (`abs_attn`) is refused: no configuration of open_clip has it.

CLS and register tokens are not cells. Where the pooling reads them too, copies of the cell take their places. In a
transformer the cells have already mixed with each other: each carries context from the whole picture.
"""

import math
from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import AttentionPool2d, AttentionPoolLatent
from torch import Tensor
from torch.nn import functional

from fieldmark.command import UserError


def image_features(visual: Any, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The global embeddings (n, D) and dense tokens (n, h, w, D) that an image tower of open_clip's makes of pixels.

    `name` is that of the encoder. Raises UserError for a tower that no rule fits.
    """
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
    """image_features of a ViT of open_clip's own. Errors call it `tower`."""
    pool = visual.attn_pool
    output = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=pool is None)
    pooled, cells = output["image_features"], output["image_intermediates"][0].permute(0, 2, 3, 1)
    if pooled.ndim != 2:
        problem = f"gives {tuple(pooled.shape)} for a batch of pictures"
        raise UserError(f"{tower}: {problem}; give it pooling (pool_type tok or avg, attentional_pool true)")
    if pool is not None:
        alone = pool.ln_k(cells).reshape(-1, 1, cells.shape[-1])
        # With a single key all queries give the same, so that one query is enough.
        query = pool.ln_q(pool.query[:1]).expand(len(alone), 1, -1)
        attended, _ = pool.attn(query, alone, alone, need_weights=False)
        cells = visual.ln_post(attended).reshape(*cells.shape[:3], -1)
    # Of a view that `permute` gives the product takes ten times as long.
    return pooled, cells.contiguous() @ visual.proj


def resnet_features(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """image_features of CLIP's ResNet, whose pooling adds positions p: p_0 to the mean, p_1 to p_hw to the cells x.

    Where every cell of the map is x, keys and values are W_k (x + p_i) and W_v (x + p_i). The softmax does not change
    with q W_k x, which is the same for all i, and its weights sum to one. So the pooling gives
    W_v x + sum_i softmax_i(q W_k p_i) W_v p_i with q = W_q (x + p_0).
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
    """image_features of a timm model (`visual.trunk`) and what follows it (`visual.head`). Errors call it `tower`."""
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
    """Each cell as a feature map (n h w, ...) of its own, row by row, and the grid (h, w). None if there is no map."""
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
    # A copy in the place of each prefix token: whichever tokens the pooling reads, they are this cell.
    return cells.expand(-1, prefix + 1, -1), grid
