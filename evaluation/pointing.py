"""Whether concepts that name a part point at it: which patch they choose, and how often that patch holds the part.

All images are scored on one scale: the score of concept k is s_k = sum over an image's patches n of u_n . (K_k - K).
u_n is the patch's vector at the norm that it had before it was made of unit length, and K is the mean of the bank's
kept concepts. For an encoder that pools its map by the mean, the sum of u_n points along its global vector, and s_k is
then that vector's score, written as a sum over patches. Patches are an image's finest local nodes (see `finest`): never
the whole picture, and a larger box cannot win by its size. The patch that raises the score most is the one with the
largest term.

A part is named by the kept concepts whose text has a word for it and no word for another place (PARTS, PLACES). An
image is asked with those of them that its predicted class owns, since these would be shown to explain that decision;
where that class owns none, it is asked with all that name the part. No true label is read.

A hit: the patch's box holds the part's point (the centre of the part's box; for wings, that of either wing). Hits are
judged on images that show the part and at least one other part. Three rivals (RIVALS) stand against a patch: the
patches that the same concepts choose on other images that show the part, at their places in this one; the place that
hits the part most often on training images; and the patches that concepts naming the other parts choose on the same
image. A random patch is there for orientation.

Nothing here reads a file. explanations.py reads, compares and writes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data import Cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.nodes import Nodes
from training.metrics import Bools, Floats, Ints

OTHERS = 10  # other images that each image is compared with


class PartWords(NamedTuple):
    """A part of a body, or a mark on it."""

    words: frozenset[str]  # that name it in a text
    points: frozenset[str]  # its names in index.parts/1, as the data sets (cub, reef) give them


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def make_part(words: str, *points: str) -> PartWords:
    return PartWords(words_of(words), frozenset(points))


PARTS = {
    "bill": make_part("bill bills beak beaks mandible mandibles", "beak"),
    "crown": make_part("crown crowns cap caps", "crown"),
    "belly": make_part("belly bellies underbelly abdomen", "belly"),
    "wing": make_part("wing wings wingbar wingbars", "left wing", "right wing"),
    "tail": make_part("tail tails", "tail"),
    "forehead": make_part("forehead foreheads", "forehead"),
    "eye": make_part("eye eyes mask", "left eye", "right eye", "eye"),
    "throat": make_part("throat throats chin", "throat"),
    "nape": make_part("nape napes", "nape"),
    "breast": make_part("breast breasts chest chests", "breast"),
    "back": make_part("back backs mantle", "back"),
    "leg": make_part("leg legs foot feet", "left leg", "right leg"),
    "head": make_part("head heads", "head"),
    "cheek": make_part("cheek cheeks", "cheek"),
    "body": make_part("body bodies", "body"),
    "dorsal fin": make_part("dorsal", "dorsal_fin"),
    "bars": make_part("bar bars", "bars"),
    "stripes": make_part("stripe stripes", "stripes"),
    "spots": make_part("spots", "spots"),
}
# Words that name a place, whether or not the data set marks it. A text with one of them beside the words of its part
# speaks of two places, so it names no part.
PLACES = words_of(
    "back base bib body breast cheek cheeks chest collar coverts crest eyebrow face flank flanks head lores neck rump"
    " shoulder shoulders side sides supercilium underparts underside undertail upperparts"
)


def named_part(text: str, parts: Mapping[str, PartWords]) -> str | None:
    """The part of `parts` that a text names; None where it names none, several, or another place beside it."""
    words = words_of(text)
    named = [name for name, part in parts.items() if words & part.words]
    return named[0] if len(named) == 1 and not words & PLACES - parts[named[0]].words else None


def part_concepts(texts: Sequence[str | None], kept: Tensor, parts: Mapping[str, PartWords]) -> dict[str, Tensor]:
    """By part, which of the bank's M concepts are kept and name it, (M,) bool. A part that none names is left out."""
    found = [named_part(text, parts) if text else None for text in texts]
    rows = {name: torch.tensor([one == name for one in found]) & kept for name in parts}
    return {name: chosen for name, chosen in rows.items() if chosen.any()}


def directions(concepts: Tensor, kept: Tensor, chosen: Tensor, own: Tensor, predicted: Tensor) -> Tensor:
    """(n, D): what each image is asked with, the mean of K_k - K over some of the `chosen` concepts.

    These are the chosen concepts that the image's predicted class owns, or all chosen ones where it owns none.
    `concepts` (M, D) are the bank's vectors, `kept` and `chosen` (M,) bool, `own` (M, C) says which class owns which
    concept, `predicted` (n,) holds classes.
    """
    rows = chosen[:, None] & own
    rows = torch.where(rows.any(0), rows, chosen[:, None]).float()  # (M, C)
    by_class = rows.T @ concepts / rows.sum(0)[:, None]
    return (by_class - concepts[kept].mean(0))[predicted]


def finest(boxes: Tensor, mask: Tensor) -> Bools:
    """(n, N): which local nodes are patches: those with a box of at most twice the area of the image's smallest box.

    `boxes` (n, N, 4), `mask` (n, N): which nodes there are.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1).masked_fill(~mask, torch.inf)
    return (mask & (area <= 2 * area.min(1, keepdim=True).values)).numpy()


def covers(boxes: Floats, points: Floats) -> Bools:
    """(n, N): whether each of the boxes (n, N, 4) holds any of its image's points (n, P, 2). No box holds a nan."""
    x, y = points[:, None, :, 0], points[:, None, :, 1]
    x0, y0, x1, y1 = (boxes[:, :, None, side] for side in range(4))
    return np.asarray(((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).any(2))


def best_patch(direction: Tensor, vectors: Tensor, patches: Bools) -> Ints:
    """(n,): the patch with the largest term u_n . direction; direction (n, D), vectors (n, N, D), patches (n, N)."""
    terms = torch.einsum("nd,nkd->nk", direction, vectors).masked_fill(~torch.from_numpy(patches), -torch.inf)
    return terms.argmax(1).numpy()


def others(count: int, seed: int) -> Iterator[Ints]:
    """OTHERS permutations of `count` images (or count - 1, where that is less).

    Each gives every image another one, never the image itself, and no two of them give an image the same one.
    """
    order = np.random.default_rng(seed).permutation(count)
    for step in range(1, min(OTHERS, count - 1) + 1):
        other = np.empty(count, dtype=np.int64)
        other[order] = np.roll(order, step)
        yield other


class Marked(NamedTuple):
    """Where n images show a part."""

    seen: Bools  # (n,) whether the part is visible
    covered: Bools  # (n, N) whether a local node's box holds the part


def best_cell(marked: Marked, patches: Bools) -> int:
    """The local node that, as a patch, holds the part on most images; patches (n, N)."""
    return int((marked.covered & patches).sum(0).argmax())


RIVALS = ("another image", "best fixed place", "another part")


class Hits(NamedTuple):
    """How often patches hit a part, on the m images that show it and another part."""

    images: Ints  # (m,) positions among the images judged
    own: Floats  # (m,) 0 or 1: the patch that the part's own concepts choose
    rivals: Floats  # (3, m) in [0, 1], in the order of RIVALS: means over the other images, and over the other parts
    random: Floats  # (m,) the mean over the image's patches


def beside_others(name: str, asked: Mapping[str, Tensor], marked: Mapping[str, Marked]) -> tuple[list[str], Ints]:
    """The other parts that images are asked with, and the images (m,) that show part `name` and one of these."""
    rest = [part for part in asked if part != name]
    shown = np.any([marked[part].seen for part in rest], axis=0)
    return rest, np.flatnonzero(marked[name].seen & shown)


def judge_part(
    name: str,
    asked: Mapping[str, Tensor],
    vectors: Tensor,
    patches: Bools,
    marked: Mapping[str, Marked],
    cell: int,
    seed: int,
) -> Hits | None:
    """Hits of part `name` and of its rivals; None where fewer than two images show it and another part.

    Of n images, by part: `asked` (n, D) is what they are asked with (`directions`), `marked` is where they show it.
    `vectors` (n, N, D) have the norms that they had before they were made of unit length, `patches` (n, N) says which
    nodes are patches, `cell` is the best fixed place.
    """
    rest, images = beside_others(name, asked, marked)
    if len(images) < 2:
        return None
    direction, u, mine = asked[name][images], vectors[images], patches[images]
    hit, row = marked[name].covered[images].astype(np.float64), np.arange(len(images))
    other_image = [hit[row, best_patch(direction, u[other], mine)] for other in others(len(images), seed)]
    other_part = np.stack([hit[row, best_patch(asked[part][images], u, mine)] for part in rest])
    shown = np.stack([marked[part].seen[images] for part in rest])
    return Hits(
        images,
        hit[row, best_patch(direction, u, mine)],
        np.stack([np.mean(other_image, axis=0), hit[:, cell], (other_part * shown).sum(0) / shown.sum(0)]),
        (hit * mine).sum(1) / mine.sum(1),
    )


# lam, from the place alone to almost the concepts alone.
WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
PLACE_RIVALS = ("place alone", "concepts alone", "place and another part")


class Ranked(NamedTuple):
    """How often patches ranked by place and concept hit a part, on the m images that show it and another part."""

    images: Ints  # (m,) positions among the images judged
    own: Floats  # (WEIGHTS, m) 0 or 1: with the part's own concepts
    others: Floats  # (WEIGHTS, m) in [0, 1]: with those of the other parts that the image shows, the mean over them
    concepts: Floats  # (m,) 0 or 1: with the part's own concepts and no place


class Placed(NamedTuple):
    """How often place and concept together hit a part, on m images that had no part in the choice of lam."""

    images: Ints  # (m,) positions among the images judged
    own: Floats  # (m,) 0 or 1
    rivals: Floats  # (3, m) in [0, 1], in the order of PLACE_RIVALS


class Weights(NamedTuple):
    """What lam was chosen, on how many images, and how often the part was hit with each of WEIGHTS there."""

    own: float
    others: float
    images: int
    hits: list[float]


def log_places(marked: Marked, patches: Bools) -> Floats:
    """(N,): log P(place | part), of training images with patches (n, N) that show a part there."""
    counts = (marked.covered & patches).sum(0) + 1.0
    return np.log(counts / counts.sum())


def standard_terms(direction: Tensor, vectors: Tensor, patches: Bools) -> Floats:
    """(n, N): the terms u_n . direction of an image's patches with mean 0 and deviation 1; 0 where they do not differ.

    direction (n, D), vectors (n, N, D), patches (n, N). What is no patch has -inf.
    """
    terms = torch.einsum("nd,nkd->nk", direction, vectors).double().numpy()
    count = patches.sum(1, keepdims=True)
    centred = np.where(patches, terms - (terms * patches).sum(1, keepdims=True) / count, 0.0)
    deviation = np.sqrt((centred**2).sum(1, keepdims=True) / count)
    return np.where(patches, centred / np.where(deviation > 0, deviation, 1.0), -np.inf)


def rank_part(
    name: str,
    asked: Mapping[str, Tensor],
    vectors: Tensor,
    patches: Bools,
    marked: Mapping[str, Marked],
    places: Floats,
) -> Ranked | None:
    """Hits of part `name` with every lam; None where no image shows it and another part.

    Of n images as in judge_part; `places` (N,) are the part's log_places.
    """
    rest, images = beside_others(name, asked, marked)
    if not len(images):
        return None
    covered, row, u, mine = marked[name].covered[images], np.arange(len(images)), vectors[images], patches[images]

    def hits(part: str) -> Floats:
        """(WEIGHTS, m)"""
        terms = standard_terms(asked[part][images], u, mine)
        # Of no patch, lam x -inf is no number where lam is 0.
        ranks = [np.where(mine, places + lam * np.where(mine, terms, 0.0), -np.inf) for lam in WEIGHTS]
        return np.stack([covered[row, rank.argmax(1)] for rank in ranks]).astype(np.float64)

    shown = np.stack([marked[part].seen[images] for part in rest])
    of_rest = np.stack([hits(part) for part in rest])  # (parts, WEIGHTS, m)
    mean = (of_rest * shown[:, None]).sum(0) / shown.sum(0)
    alone = covered[row, best_patch(asked[name][images], u, mine)].astype(np.float64)
    return Ranked(images, hits(name), mean, alone)


def choose_weight(found: Mapping[str, Ranked], what: str) -> int:
    """The place in WEIGHTS of the smallest lam that hits best over all images and parts, for field `what` of Ranked."""
    return int(np.concatenate([getattr(one, what) for one in found.values()], axis=1).mean(1).argmax())


def place_parts(
    choosing: Mapping[str, Ranked], judged: Mapping[str, Ranked]
) -> tuple[dict[str, Placed], Weights | None]:
    """By part, hits on the images judged, with the lam that other images choose, and which it is.

    Empty and None where no image chooses.
    """
    if not choosing:
        return {}, None
    own, other = (choose_weight(choosing, what) for what in ("own", "others"))
    placed = {
        part: Placed(one.images, one.own[own], np.stack([one.own[0], one.concepts, one.others[other]]))
        for part, one in judged.items()
    }
    hits = np.concatenate([one.own for one in choosing.values()], axis=1).mean(1).tolist()
    images = len(set().union(*(one.images.tolist() for one in choosing.values())))
    return placed, Weights(WEIGHTS[own], WEIGHTS[other], images, hits)


def judged_patches(cache: Cache, images: Tensor) -> Bools:
    """(n, N): which local nodes of the images (n,), in view 0, are patches."""
    rows = images * cache.views
    return finest(cache.part(Boxes).box[rows, 1:], cache.part(Nodes).mask[rows, 1:])


class Scene(NamedTuple):
    """What n images show of parts, and what they are asked with."""

    asked: dict[str, Tensor]  # by part, (n, D)
    vectors: Tensor  # (n, N, D) local nodes, at the norms that they had before they were made of unit length
    patches: Bools  # (n, N)
    marked: dict[str, Marked]  # by part


def mark(cache: Cache, images: Tensor, points: Floats) -> Marked:
    """Where images (n,) show a part, by its points (all images, P, 2)."""
    at, boxes = points[images.numpy()], cache.part(Boxes).box[images * cache.views, 1:].numpy()
    return Marked(~np.isnan(at[..., 0]).all(1), covers(boxes, at))


def set_scene(
    cache: Cache,
    images: Tensor,
    norms: Tensor,
    concepts: Mapping[str, Tensor],
    points: Mapping[str, Floats],
    predicted: Tensor,
) -> Scene:
    """What `images` (n,) show, and what they are asked with; the arguments as in judge_parts."""
    bank = cache.part(Bank)
    return Scene(
        {part: directions(bank.K, bank.kept, rows, bank.own, predicted) for part, rows in concepts.items()},
        cache.part(Nodes).nodes[images * cache.views, 1:].float() * norms[images][..., None],
        judged_patches(cache, images),
        {part: mark(cache, images, points[part]) for part in concepts},
    )


def judge_parts(
    cache: Cache,
    images: Tensor,
    norms: Tensor,
    concepts: Mapping[str, Tensor],
    points: Mapping[str, Floats],
    predicted: Tensor,
    seed: int,
) -> dict[str, Hits]:
    """Hits by part on `images` (n,). A part is left out that fewer than two of them show together with another part.

    `norms` (all images, N) are those of local nodes in view 0. By part, `concepts` says which concepts name it
    (`part_concepts`), and `points` (all images, P, 2) holds its points, nan where it is not visible. `predicted` (n,)
    holds the classes that the judged model predicts.
    """
    train, scene = cache.images("train"), set_scene(cache, images, norms, concepts, points, predicted)
    patches = judged_patches(cache, train)
    cells = {part: best_cell(mark(cache, train, points[part]), patches) for part in concepts}
    hits = {part: judge_part(part, *scene, cells[part], seed) for part in concepts}
    return {part: found for part, found in hits.items() if found is not None}


def rank_parts(
    cache: Cache,
    images: Tensor,
    train: Tensor,
    norms: Tensor,
    concepts: Mapping[str, Tensor],
    points: Mapping[str, Floats],
    predicted: Tensor,
) -> dict[str, Ranked]:
    """Hits by part on `images` (n,) with every lam, places from the images `train`; the others as in judge_parts."""
    scene, patches = set_scene(cache, images, norms, concepts, points, predicted), judged_patches(cache, train)
    places = {part: log_places(mark(cache, train, points[part]), patches) for part in concepts}
    ranked = {part: rank_part(part, *scene, places[part]) for part in concepts}
    return {part: found for part, found in ranked.items() if found is not None}
