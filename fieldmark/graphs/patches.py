"""Links between the nodes of one image: neighbours in the picture, likenesses in the embedding, and whole to parts.

Over the nodes of the kinds in `graphs.nodes`, at most 64 [design]:
  spatial_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)), p the centres of the boxes in [0,1]^2, where over spatial_threshold;
  semantic_ij = max(0, cos(v_i, v_j)) where j is among the `neighbours` nearest of i or i among those of j;
  the global node is linked to all others with both weights 1; the other weight of an edge is 0 where one rule made it.
Edges stand in both directions, without self-loops, sorted by src, then dst; both are `node` numbers of embed.nodes.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Graphs

SCHEMA = "graphs/1"
MAX_NODES = 64


def spatial_weights(centres: Tensor, sigma: float, threshold: float) -> Tensor:
    """(B, N, N) radial basis weights of centres (B, N, 2), 0 at and under the threshold."""
    squared = (centres[:, :, None] - centres[:, None]).square().sum(dim=-1)
    weights = torch.exp(-squared / (2 * sigma**2))
    return torch.where(weights > threshold, weights, 0.0)


def semantic_weights(vectors: Tensor, neighbours: int) -> Tensor:
    """(B, N, N) cosines of unit vectors (B, N, D), kept between nearest neighbours of either side, negatives 0."""
    cosine = vectors @ vectors.transpose(1, 2)
    diagonal = torch.eye(cosine.shape[1], dtype=torch.bool)
    count = min(neighbours, cosine.shape[1] - 1)
    nearest = cosine.masked_fill(diagonal, -torch.inf).topk(count, dim=2).indices
    linked = torch.zeros_like(cosine, dtype=torch.bool).scatter_(2, nearest, True)
    return torch.where(linked | linked.transpose(1, 2), cosine.clamp(0, 1), 0.0)


def link(vectors: Tensor, centres: Tensor, settings: Graphs) -> tuple[Tensor, Tensor]:
    """Spatial and semantic weights (B, N, N) of views whose node 0 is global; zero diagonals, symmetric."""
    spatial = torch.zeros(len(vectors), vectors.shape[1], vectors.shape[1])
    semantic = torch.zeros_like(spatial)
    if vectors.shape[1] > 1:
        spatial[:, 1:, 1:] = spatial_weights(centres[:, 1:], settings.sigma, settings.spatial_threshold)
        semantic[:, 1:, 1:] = semantic_weights(vectors[:, 1:], settings.neighbours)
    for weights in (spatial, semantic):
        weights[:, 0, :] = weights[:, :, 0] = 1.0
        weights.diagonal(dim1=1, dim2=2).zero_()
    return spatial, semantic


def graph_rows(nodes: pa.Table, settings: Graphs) -> pa.Table:
    """The graphs rows of the views in `nodes`, whose rows are sorted by image, view and node."""
    nodes = nodes.filter(pc.is_in(nodes.column("kind"), pa.array(settings.nodes)))
    if len(nodes) == 0:
        return store.arrow_schema(SCHEMA).empty_table()
    numbers = nodes.column("node").to_numpy()
    starts = np.flatnonzero(numbers == 0)
    size = len(nodes) // len(starts)
    if size > MAX_NODES:
        raise UserError(
            f"params.yaml: graphs.nodes: {size} nodes an image, and a graph holds at most {MAX_NODES};"
            " take kinds out, or coarsen embed.grids and embed.crops"
        )
    if not np.array_equal(numbers, np.tile(numbers[:size], len(starts))):
        raise UserError("data/embed: views of one encoder differ in their nodes; run embed_images again")
    vectors = torch.from_numpy(store.vectors_of(nodes).astype(np.float32)).reshape(len(starts), size, -1)
    corners = np.stack([nodes.column(name).to_numpy() for name in ("x0", "y0", "x1", "y1")], axis=1)
    centres = torch.from_numpy((corners[:, :2] + corners[:, 2:]) / 2).reshape(len(starts), size, 2)
    # In half precision first: a weight that rounds to 0 is no edge.
    spatial, semantic = (weights.half() for weights in link(vectors, centres, settings))

    image, src, dst = torch.nonzero((spatial > 0) | (semantic > 0), as_tuple=True)
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(image.numpy(), minlength=len(starts)))]), pa.int32())

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    first = nodes.take(pa.array(starts))
    return pa.table({
        "image_id": first.column("image_id"),
        "view": first.column("view"),
        "src": lists(numbers[src.numpy()].astype(np.int16)),
        "dst": lists(numbers[dst.numpy()].astype(np.int16)),
        "spatial": lists(spatial[image, src, dst].numpy()),
        "semantic": lists(semantic[image, src, dst].numpy()),
    })
