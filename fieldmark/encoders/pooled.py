"""The pooled vector: what the head of an image tower gives of a picture before the projection into the space of texts.

What it is, family by family (d is its length):

- conv towers of timm: the mean of the cells after the last norm or `conv_head`, with the norm of the head where there
  is one (ConvNeXt)
- open_clip's ViT: the CLS token, or the mean of the cells, after `ln_post`; with attentional pooling (CoCa) what that
  gives after `ln_post`
- CLIP's ResNet (ModifiedResNet): what `c_proj` takes, that is the values `v_proj` gives of mean and cells, weighted as
  the mean attends to them, head beside head; d is the width of the map
- timm's ViTs: what their classifier or open_clip's `proj` takes: CLS, a mean after `fc_norm`, or what attention pools
- towers without texts, and heads that end with their pooling (SigLIP): the global embedding, which nothing projects
"""

from functools import partial
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import AttentionPool2d, RotAttentionPool2d
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder, make_batch
from fieldmark.encoders.dense import run_dense, with_cells
from fieldmark.encoders.layers import count_layers, find_tower, run_tower
from fieldmark.encoders.maps import find_visual, pool_cells, pool_map


@torch.inference_mode()
def pool_batch(encoder: ImageEncoder, pixels: Tensor, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Pixels (n, 3, H, W) to the pooled vectors (n, d) and the cells (n, h, w, D) of each of `layers`, in one pass.

    Pixels are bytes or normalised floats, as for embed_images; n is at most `batch_size`. `layers` are those of a
    LayerChoice: counted from 0, in order, `head` as one past the last, and `projected`, these cells after the
    projection, as two. All is float32, on the device, and no row depends on the others of the batch. Raises UserError
    for `projected` where the head is not linear.
    """
    count, tower = len(pixels), find_tower(encoder.model)
    if not hasattr(tower, "forward_features") and not isinstance(tower, VisionTransformer | ModifiedResNet):
        # A tower of another library, without layers to choose from: what it embeds is pooled and not projected.
        return encoder.embed_images(pixels)[0], []
    visual, last = find_visual(encoder.model), count_layers(tower) or 0
    key = f"params.yaml: moments.{encoder.name}: {type(tower).__name__}"
    blocks = [layer for layer in layers if layer < last]
    batch, of_head = make_batch(encoder, pixels), len(layers) > len(blocks)
    run = partial(run_tower, tower, batch, blocks)
    (maps, _, features), replaced = run_dense(encoder.dense if of_head else None, run, batch)
    cells = [each.permute(0, 2, 3, 1) for each in maps]
    if of_head:
        head = pool_cells(visual, with_cells(features, replaced), key)[0]
        cells += [head if layer == last else project(encoder, head) for layer in layers[len(blocks) :]]
    return pool_map(visual, features, key)[:count].float(), [each[:count].float() for each in cells]


def project(encoder: ImageEncoder, cells: Tensor) -> Tensor:
    """What `head` gives of each cell (n, h, w, d), as the head projects a pooled vector: (n, h, w, D) float32.

    Raises UserError where that is not linear.
    """
    found = projection_of(encoder)
    if found is None:
        what = "its head is not one linear projection, so that cells have no projected form"
        raise UserError(f"params.yaml: moments.{encoder.name}: layer: projected: {what}; take another layer")
    weight, bias = found
    projected = cells.float() @ weight.T.to(cells.device)
    return projected if bias is None else projected + bias.to(cells.device)


def projection_of(encoder: ImageEncoder) -> tuple[Tensor, Tensor | None] | None:
    """The projection of pooled vectors where it is linear: weight (D, d) and bias (D,) or None, float32 on the CPU.

    The global embedding is `weight @ pooled + bias`. None where the head ends with an MLP or with its pooling, and for
    towers without texts.
    """
    visual = getattr(encoder.model, "visual", None)
    if isinstance(visual, VisionTransformer):
        return None if visual.proj is None else (visual.proj.detach().T.float().cpu().contiguous(), None)
    last = find_last(visual)
    if not isinstance(last, nn.Linear):
        return None
    bias = None if last.bias is None else last.bias.detach().float().cpu()
    return last.weight.detach().float().cpu(), bias


def find_last(visual: Any) -> Any:
    """The module that is the last step of the head of CLIP's ResNet or of open_clip's timm model."""
    if isinstance(visual, ModifiedResNet):
        return visual.attnpool.c_proj
    if not isinstance(visual, TimmModel):
        return None
    if not len(visual.head):
        return visual.trunk.get_classifier()
    last = visual.head[-1]
    return last.proj if isinstance(last, AttentionPool2d | RotAttentionPool2d) else last
