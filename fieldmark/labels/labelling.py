"""What each node of each image shows, in concepts, and which nodes and concepts are worth a closer look.

For node n with unit vector l_n and the kept concepts K_k, M of them [design]:
  P_n, of which the `labels.top` largest are stored:
    softmax  P_n = softmax_k(scale * l_n . K_k / labels.temperature);
    splice   P_n = W_n / sum W_n, W_n the sparse non-negative combination of splice.py; l_n is centred by the mean of
             our training nodes (view 0), global and local ones apart; all weights are 0 if no concept helps;
  entropy H_n = -sum_k P_nk ln P_nk, in nats; ln M where all weights are 0;
  density, in [0, 1], by `labels.density`:
    neg_entropy  1 - H_n / ln M: 1 where one concept explains the node, 0 where all do equally;
    entropy      H_n / ln M;
    gaga         1 / (1 + |l_n - c_n|), c_n the nearest of the k-means centres of local training nodes (after
                 GAGA, Xie et al., 2025);
    product      neg_entropy times gaga;
    pixel        Hpix_n / 8, Hpix_n the entropy in bits of the grey values in the node's box (pixels.py);
    times the share of the node's box inside the object's, with `labels.inside_object`, where the index has a box;
  selected: node 0, and `labels.select_locals` others taken one by one at the maximum of density_n - redundancy * r_n,
  r_n the largest l_n . l_m over those taken before, node 0 aside, and never under 0 (maximal marginal relevance);
  on node 0 also
    selected_concepts: the `labels.select_concepts` largest of P_0k + sum over selected n of density_n P_nk;
    ring_gains: the `labels.rings` values of rings.py, dH_2 .. dH_K and JS over the other nodes; all 0 if there are
    none.

Without a kept concept (M = 0, a bank of names alone) there is nothing to compare a node with: P_n is empty, no concept
is stored, and H_n and the ring gains are 0. So are the densities that ask how sure concepts are: neg_entropy, entropy
and product. Nodes of one density are selected by how little they are like one another.

The stage label_patches labels what is on disk, the trainer's controls and studies a cache in memory.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.labels.kmeans import PER_CENTRE, find_centres, nearest_centres
from fieldmark.labels.rings import ring_gains
from fieldmark.labels.splice import centre, decompose
from fieldmark.labels.splits import count_locals, iterate_nodes, sample_locals
from fieldmark.params import Labels

# Nodes labelled at once, at most, and their weights: nodes x concepts floats in memory, some times over.
CHUNK, CHUNK_WEIGHTS = 8_192, 2**22
# k-means centres a class for density gaga, and the nodes a centre stands for at least.
CENTRES_PER_CLASS, NODES_PER_CENTRE = 10, 10


@dataclass(frozen=True)
class Reference:
    """What labels know of the training images, view 0; None where the settings do not ask."""

    means: Tensor | None = None  # (2, D): of global nodes, and of local ones
    centres: Tensor | None = None  # (K, D): k-means of local nodes


def entropy_of(weights: Tensor) -> Tensor:
    """Shannon entropy in nats of each row."""
    return torch.special.entr(weights).sum(dim=1)


def softmax_weights(nodes: Tensor, concepts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P (n, M), softmax over concepts of scale * cosine, and entropy (n,), ln Z - sum P logit: one logarithm a row."""
    logits = scale * nodes @ concepts.T
    largest, place = logits.max(dim=1)
    weights = torch.softmax(logits, dim=1)
    log_z = largest - weights.gather(1, place[:, None])[:, 0].log()
    return weights, (log_z - torch.einsum("nm,nm->n", weights, logits)).clamp(0, math.log(len(concepts)))


def splice_weights(
    nodes: Tensor, is_global: Tensor, concepts: Tensor, means: Tensor, sparsity: float
) -> tuple[Tensor, Tensor]:
    """Sparse weights (n, M), of sum 1 or 0, and their entropy: ln M where the sum is 0."""
    targets = centre(nodes, means[(~is_global).long()])
    weights = decompose(targets, centre(concepts, concepts.mean(dim=0)), sparsity)
    total = weights.sum(dim=1)
    weights /= torch.where(total > 0, total, 1.0)[:, None]
    return weights, torch.where(total > 0, entropy_of(weights), math.log(len(concepts)))


def label_nodes(
    nodes: Tensor,
    is_global: Tensor,
    concepts: Tensor,
    scale: float,
    settings: Labels,
    reference: Reference,
    pixels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights P (n, M), entropy (n,) and density (n,) of nodes (n, D), of which is_global (n,) are whole images.

    `concepts` (M, D) are the kept ones, M may be 0, `scale` the encoder's, `reference` what read_reference gave for
    `settings`, and `pixels` (n,) the density where it is of pixels: no vector tells it.
    """
    if len(concepts) == 0:
        weights, entropy = nodes.new_zeros(len(nodes), 0), nodes.new_zeros(len(nodes))
    elif settings.mode == "softmax":
        weights, entropy = softmax_weights(nodes, concepts, scale / settings.temperature)
    else:
        assert reference.means is not None
        weights, entropy = splice_weights(nodes, is_global, concepts, reference.means, settings.sparsity)
    most = math.log(max(len(concepts), 1)) or 1.0  # one concept explains all: H is 0, density 1
    unsure = (entropy / most).clamp(0, 1)
    sure = 1 - unsure if len(concepts) else unsure  # none explains nothing
    density = unsure if settings.density == "entropy" else sure
    if settings.density in ("gaga", "product"):
        assert reference.centres is not None
        typical = 1 / (1 + (nodes - reference.centres[nearest_centres(nodes, reference.centres)]).norm(dim=1))
        density = typical if settings.density == "gaga" else typical * density
    if settings.density == "pixel":
        assert pixels is not None
        density = pixels
    return weights, entropy, density


def select_nodes(vectors: Tensor, density: Tensor, count: int, redundancy: float) -> Tensor:
    """Which nodes are selected: (B, N) bool from vectors (B, N, D) and density (B, N), node 0 always, by greedy MMR."""
    images, nodes, _ = vectors.shape
    cosine = vectors @ vectors.transpose(1, 2)
    selected = torch.zeros(images, nodes, dtype=torch.bool)
    selected[:, 0] = True
    nearest = torch.zeros(images, nodes)
    for _ in range(min(count, nodes - 1)):
        score = (density - redundancy * nearest).masked_fill(selected, -math.inf)
        chosen = score.argmax(dim=1, keepdim=True)
        selected.scatter_(1, chosen, True)
        to_chosen = cosine.gather(1, chosen[:, :, None].expand(-1, 1, nodes))
        nearest = torch.maximum(nearest, to_chosen[:, 0])
    return selected


def score_concepts(weights: Tensor, density: Tensor, selected: Tensor) -> Tensor:
    """How much the selected nodes show of each concept: (B, M) from P (B, N, M); node 0 counts fully."""
    share = torch.where(selected, density, 0.0)
    share[:, 0] = 1.0
    return torch.einsum("bn,bnm->bm", share, weights)


def largest_weights(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of weights (n, M), falling, and where they stand: topk, in a third of the time.

    Columns are dealt to about sqrt(count M) groups; the largest are in the `count` groups of the largest maxima.
    """
    columns = weights.shape[1]
    groups = max(count, math.isqrt(count * columns), 1)
    size = columns // groups
    if size < 2:
        best = weights.topk(count, dim=1)
        return best.values, best.indices
    dealt = weights[:, : groups * size].unflatten(1, (size, groups))
    top = dealt.amax(dim=1).topk(count, dim=1).indices
    place = (top[:, None] + groups * torch.arange(size)[:, None]).flatten(1)
    rest = torch.arange(groups * size, columns).expand(len(weights), -1)
    place = torch.cat([place, rest], dim=1)
    best = weights.gather(1, place).topk(count, dim=1)
    return best.values, place.gather(1, best.indices)


def object_share(corners: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Share (n,) of each node's box (n, 4) inside the object's (n, 4), x0 y0 x1 y1; 1 where the object's is nan."""
    low, high = np.maximum(corners[:, :2], objects[:, :2]), np.minimum(corners[:, 2:], objects[:, 2:])
    area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    share = np.prod((high - low).clip(min=0), axis=1) / np.maximum(area, np.finfo(np.float32).tiny)
    return np.where(np.isnan(objects[:, 0]), 1.0, share.clip(0, 1)).astype(np.float32)


def object_boxes(image_ids: pa.ChunkedArray, index: pa.Table) -> np.ndarray:
    """The object's box (n, 4) of each image_id from the columns image_id and box of an index, nan where it has none."""
    boxes = np.full((len(index) + 1, 4), np.nan, dtype=np.float32)  # the last row: an image that is not there
    known = index.column("box").is_valid().to_numpy()
    flat = pc.list_flatten(index.column("box").drop_null()).to_numpy()
    boxes[:-1][known] = flat.reshape(-1, 4)
    row = pc.fill_null(pc.index_in(image_ids, index.column("image_id").combine_chunks()), len(index))
    return boxes[row.to_numpy()]


class Labelled(NamedTuple):
    """What label_images says of B views of n nodes each; concepts by their place in the M that were given."""

    idx: Tensor  # (B, n, top): the concepts of the largest weights, falling
    weight: Tensor  # (B, n, top)
    entropy: Tensor  # (B, n), nats
    density: Tensor  # (B, n)
    selected: Tensor  # (B, n) bool
    shown: Tensor  # (B, select_concepts): what the selected nodes show most
    gains: Tensor  # (B, rings)


def label_images(
    vectors: Tensor,
    places: Tensor,
    concepts: Tensor,
    scale: float,
    settings: Labels,
    reference: Reference,
    share: Tensor | None = None,
    pixels: Tensor | None = None,
) -> Iterator[tuple[slice, Labelled]]:
    """Labels of views, some at a time, with the slice of the views they are of.

    vectors (V, n, D) and places (V, n, 2), the centres of their boxes, are all nodes of the views, node 0 the whole
    image. `concepts` (M, D), `scale`, `settings`, `reference` and `pixels` (V, n) are as in label_nodes; share (V, n)
    multiplies the density.
    """
    size, count = vectors.shape[1], len(concepts)
    step = max(1, min(CHUNK, CHUNK_WEIGHTS // max(count, 1)) // size)
    for start in range(0, len(vectors), step):
        rows = slice(start, start + step)
        nodes = vectors[rows].float()
        shape = nodes.shape[:2]
        is_global = torch.arange(shape.numel()) % size == 0
        flat, entropy, density = label_nodes(
            nodes.flatten(0, 1), is_global, concepts, scale, settings, reference,
            None if pixels is None else pixels[rows].flatten(),
        )  # fmt: skip
        weights, density = flat.view(*shape, count), density.view(shape)
        if share is not None:
            density = density * share[rows]
        selected = select_nodes(nodes, density, settings.select_locals, settings.redundancy)
        shown = score_concepts(weights, density, selected).topk(min(settings.select_concepts, count), dim=1).indices
        gains = torch.zeros(shape[0], settings.rings)
        if size > 1 and count > 0:
            gains = ring_gains(weights[:, 1:], density[:, 1:], places[rows, 1:], settings)
        weight, idx = largest_weights(flat, min(settings.top, count))
        yield rows, Labelled(
            idx.view(*shape, -1), weight.view(*shape, -1), entropy.view(shape), density, selected, shown, gains
        )


def node_means(folder: Path, buckets: int, images: Mapping[str, str]) -> Tensor:
    """(2, D): the mean vectors of these images' global and local nodes; the global one stands for local if none is."""
    sums: list[np.ndarray] = []
    counts = np.zeros(2)
    for table in iterate_nodes(folder, buckets, images, ["image_id", "node", "vector"]):
        vectors, is_local = store.vectors_of(table).astype(np.float32), table.column("node").to_numpy() > 0
        sums.append(np.stack([vectors[~is_local].sum(axis=0), vectors[is_local].sum(axis=0)]))
        counts += [(~is_local).sum(), is_local.sum()]
    total = np.sum(sums, axis=0)
    if counts[1] == 0:
        total[1], counts[1] = total[0], counts[0]
    return torch.from_numpy((total / counts[:, None]).astype(np.float32))


def leans_on_images(settings: Labels) -> bool:
    """Whether labels depend on which images train."""
    return settings.mode == "splice" or settings.density in ("gaga", "product")


def read_reference(folder: Path, images: Mapping[str, str], buckets: int, settings: Labels) -> Reference:
    """What `settings` need to know of the training images, from data/embed/NAME/images: maybe nothing.

    `images` is the class_id of each training image by its image_id. Raises UserError where there is none, or none with
    a local node for k-means.
    """
    if not leans_on_images(settings):
        return Reference()
    if not images:
        raise UserError(f"{folder}: holds no training image; labels.mode and labels.density, as set, lean on them")
    by_centres = settings.density in ("gaga", "product")
    means = node_means(folder, buckets, images) if settings.mode == "splice" else None
    if not by_centres:
        return Reference(means)
    count = count_locals(folder, buckets, images)
    if count == 0:
        raise UserError(
            f"{folder}: images have no node but the global one, and labels.density {settings.density} is learnt from"
            " others; set embed.tokens, embed.grids or embed.crops, or another labels.density"
        )
    wanted = max(1, min(CENTRES_PER_CLASS * len(set(images.values())), count // NODES_PER_CENTRE))
    vectors, _ = sample_locals(folder, buckets, images, PER_CENTRE * wanted / count)
    return Reference(means, find_centres(torch.from_numpy(vectors), wanted))
