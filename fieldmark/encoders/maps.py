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

For a ViT that pools by its CLS token there are other rules for what its last block gives a cell (dense.py); what
follows the map is applied to these cells as to its own.

The last step of the head is the projection into the space of texts: a matrix (`proj`, `c_proj`, timm's classifier) or
an MLP (`timm_proj: mlp`). `pool_map` and `pool_cells` give what it takes: of the whole map, and of each cell by the
rule above. So in every family a cell of `pool_cells`, projected, is the dense token. A head that ends with its pooling
(SigLIP), and that of a tower without texts, has no projection: what would be projected is the embedding itself.
"""

import math
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d
from torch import Tensor, nn
from torch.nn import functional

from fieldmark.command import UserError
from fieldmark.encoders.dense import Dense, run_dense


def image_features(visual: Any, pixels: Tensor, name: str, dense: Dense | None = None) -> tuple[Tensor, Tensor]:
    """The global embeddings (n, D) and dense tokens (n, h, w, D) that an image tower of open_clip's makes of pixels.

    `name` is that of the encoder, `dense` its rule for the cells of the last block, where it has one. Raises UserError
    for a tower that no rule fits.
    """
    if dense is not None:
        (pooled, tokens), cells = run_dense(dense, lambda: image_features(visual, pixels, name), pixels)
        assert cells is not None
        return pooled, project_cells(visual, cells).reshape(tokens.shape)
    key = f"params.yaml: encoders.{name}"
    if isinstance(visual, TimmModel):
        return timm_features(visual, pixels, f"{key}: {type(visual.trunk).__name__}")
    if isinstance(visual, VisionTransformer):
        return vit_features(visual, pixels, f"{key}: {type(visual).__name__}")
    if isinstance(visual, ModifiedResNet):
        return resnet_features(visual, pixels)
    remedy = "use a timm tower, or a ViT or a ResNet of open_clip"
    raise UserError(f"{key}: no rule for the dense tokens of a {type(visual).__name__}; {remedy}")


def project_cells(visual: Any, cells: Tensor) -> Tensor:
    """The dense tokens (n, T, D') of cells (n, T, D) that stand for those of the last block, of a ViT of dense.py."""
    if isinstance(visual, VisionTransformer):
        return vit_alone(visual, cells) @ visual.proj
    return visual.head(visual.trunk.forward_head(copy_cells(visual.trunk, cells)))


def vit_features(visual: Any, pixels: Tensor, tower: str) -> tuple[Tensor, Tensor]:
    """image_features of a ViT of open_clip's own. Errors call it `tower`."""
    output = visual.forward_intermediates(pixels, indices=1)
    pooled, cells = output["image_features"], output["image_intermediates"][0].permute(0, 2, 3, 1)
    check_pooled(pooled, tower, "pool_type tok or avg, attentional_pool true")
    return pooled, vit_alone(visual, cells) @ visual.proj


def vit_alone(visual: Any, tokens: Tensor) -> Tensor:
    """What the projection of open_clip's ViT takes of each of the tokens (..., D) after its last block: (..., d)."""
    # Of a view that `permute` gives the norm and the projection take ten times as long.
    tokens, pool = tokens.contiguous(), visual.attn_pool
    if pool is None:
        return visual.ln_post(tokens)
    alone = pool.ln_k(tokens).reshape(-1, 1, tokens.shape[-1])
    # With a single key all queries give the same, so that one query is enough.
    query = pool.ln_q(pool.query[:1]).expand(len(alone), 1, -1)
    attended, _ = pool.attn(query, alone, alone, need_weights=False)
    return visual.ln_post(attended).reshape(*tokens.shape[:-1], -1)


def resnet_features(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """image_features of CLIP's ResNet, whose pooling adds positions p: p_0 to the mean, p_1 to p_hw to the cells x.

    Where every cell of the map is x, keys and values are W_k (x + p_i) and W_v (x + p_i). The softmax does not change
    with q W_k x, which is the same for all i, and its weights sum to one. So the pooling gives
    W_v x + sum_i softmax_i(q W_k p_i) W_v p_i with q = W_q (x + p_0).
    """
    output = visual.forward_intermediates(pixels, indices=1)
    cells = output["image_intermediates"][0].permute(0, 2, 3, 1)
    return output["image_features"], visual.attnpool.c_proj(resnet_alone(visual.attnpool, cells))


def resnet_alone(pool: Any, cells: Tensor) -> Tensor:
    """What `c_proj` takes of each of the cells (n, h, w, D) of CLIP's ResNet, at every position at once: as large."""
    places = pool.positional_embedding.to(cells.dtype)

    def heads(rows: Tensor) -> Tensor:
        return rows.reshape(-1, pool.num_heads, rows.shape[-1] // pool.num_heads).transpose(0, 1)

    query = heads(pool.q_proj(cells + places[0]))
    keys, values = (heads(functional.linear(places, linear.weight)) for linear in (pool.k_proj, pool.v_proj))
    attended = functional.scaled_dot_product_attention(query, keys, values)
    return pool.v_proj(cells) + attended.transpose(0, 1).reshape(cells.shape)


def resnet_pooled(pool: Any, cells: Tensor) -> Tensor:
    """What `c_proj` takes of the whole map (n, h, w, D) of CLIP's ResNet: the values that the mean attends to (n, D).

    open_clip hands `c_proj` to one function that pools and projects, so that the pooling is written out here.
    """
    cells = cells.flatten(1, 2)
    tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) + pool.positional_embedding.to(cells.dtype)

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

    query, keys, values = heads(pool.q_proj(tokens[:, :1])), heads(pool.k_proj(tokens)), heads(pool.v_proj(tokens))
    return functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1)


def timm_features(visual: Any, pixels: Tensor, tower: str) -> tuple[Tensor, Tensor]:
    """image_features of a timm model (`visual.trunk`) and what follows it (`visual.head`). Errors call it `tower`."""
    trunk = visual.trunk
    features = trunk.forward_features(pixels)
    cells, (height, width) = timm_cells(visual, features, tower)
    pooled = visual.head(trunk.forward_head(features))
    check_pooled(pooled, tower, "timm_pool")
    tokens = visual.head(trunk.forward_head(cells))
    return pooled, tokens.reshape(len(pixels), height, width, -1)


def timm_unprojected(visual: Any, features: Tensor) -> Tensor:
    """What the projection of a timm model takes of the features that its head reads: (n, d)."""
    *before, last = visual.head or (None,)
    pooled = visual.trunk.forward_head(features, pre_logits=last is None)
    for part in before:
        pooled = part(pooled)
    return last(pooled, pre_logits=True) if isinstance(last, AttentionPool2d | RotAttentionPool2d) else pooled


def timm_cells(visual: Any, features: Any, tower: str) -> tuple[Tensor, tuple[int, int]]:
    """cut_cells. Raises UserError where there is no map, or where the pooling knows the places of its cells."""
    for part in visual.modules():
        if isinstance(part, AttentionPool2d | AttentionPoolLatent) and part.pos_embed is not None:
            problem = "its pooling adds a learned position to each cell, and no rule for that is written"
            raise UserError(f"{tower}: {problem}; use another encoder")
    maps = cut_cells(visual.trunk, features)
    if maps is None:
        raise UserError(f"{tower}: gives no map of cells; use a convolutional timm tower, a ViT or a Swin")
    return maps


def check_pooled(pooled: Tensor, tower: str, remedy: str) -> None:
    """Raises UserError for a tower that does not pool."""
    if pooled.ndim != 2:
        problem = f"gives {tuple(pooled.shape)} for a batch of pictures"
        raise UserError(f"{tower}: {problem}; give it pooling ({remedy})")


def find_visual(model: Any) -> Any:
    """The image tower of a loaded model, and its head: one of open_clip's, or a timm model whose head has no more."""
    visual = getattr(model, "visual", model)
    if isinstance(visual, TimmModel | VisionTransformer | ModifiedResNet):
        return visual
    return nn.ModuleDict({"trunk": visual, "head": nn.Sequential()})


def pool_map(visual: Any, features: Tensor, tower: str) -> Tensor:
    """What the projection takes of a whole picture: (n, d). Errors call the tower `tower`.

    `features` is what the tower gives its head: the tokens (n, 1 + h w, D) of open_clip's ViT after its last block, the
    map (n, D, h, w) of CLIP's ResNet, what `forward_features` gives of a timm model.
    """
    if isinstance(visual, VisionTransformer):
        pooled, _ = visual._pool(features)
    elif isinstance(visual, ModifiedResNet):
        pooled = resnet_pooled(visual.attnpool, features.permute(0, 2, 3, 1))
    else:
        pooled = timm_unprojected(visual, features)
    check_pooled(pooled, tower, "timm_pool, or pool_type of open_clip's own ViT")
    return pooled


def pool_cells(visual: Any, features: Tensor, tower: str) -> tuple[Tensor, Tensor]:
    """What the projection takes of each cell (n, h, w, d), and of the CLS token in a cell's place (n, d).

    `features` as in pool_map. CLS is (n, 0) where no token stands before the cells.
    """
    if isinstance(visual, VisionTransformer):
        tokens = vit_alone(visual, features)
        return tokens[:, 1:].unflatten(1, visual.grid_size), tokens[:, 0]
    if isinstance(visual, ModifiedResNet):
        return resnet_alone(visual.attnpool, features.permute(0, 2, 3, 1)), features.new_empty(len(features), 0)
    cells, (height, width) = timm_cells(visual, features, tower)
    tokens = timm_unprojected(visual, cells).reshape(len(features), height, width, -1)
    if features.ndim == 4 or features.shape[1] == height * width:
        return tokens, features.new_empty(len(features), 0)
    return tokens, timm_unprojected(visual, features[:, :1].expand(-1, cells.shape[1], -1))


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
    return copy_cells(trunk, features[:, prefix:]), grid


def copy_cells(trunk: Any, cells: Tensor) -> Tensor:
    """Each of the cells (n, T, D) as a map of its own (n T, P + 1, D).

    A copy stands in the place of each prefix token: whichever tokens the pooling reads, they are this cell.
    """
    return cells.reshape(-1, 1, cells.shape[-1]).expand(-1, trunk.num_prefix_tokens + 1, -1)
