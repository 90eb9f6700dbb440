"""Ridge regression with a free intercept, and what it says of each image when that image is left out, exactly.

    minimise   |Y - K A - 1 b^T|^2 + penalty tr(A^T K A)        K (m, m) the kernel of the training rows, Y (m, C)

The fit is A = B Y with B = R^-1 - R^-1 1 1^T R^-1 / (1^T R^-1 1), R = K + penalty I. Leaving the rows I of one image
out, intercept refitted, kernel, scale and basis held fixed, changes what is said of them to Y_I - B_II^-1 (B Y)_I:
residual (B Y)_i / B_ii for a single row (Allen's PRESS; with the free intercept as in generalised least squares
[mem]). Centring K and leaving out of its inverse would not do: a held-out row would be minus the sum of the rest.

B is the inverse of R within the complement of the constant, so one eigendecomposition there serves every penalty:
penalty B = rest + U diag(penalty / (spread + penalty)) U^T, where `rest` projects on what neither the constant nor U
spans. All in float64: penalties reach down to 1e-3 of a spread whose sum is 1 a row.

The smaller Gram matrix is taken. Of more rows than dimensions it is X^T X, the normal equations: rows are then read a
chunk of images at a time, once for the Gram matrix and once to leave images out, and never held; memory is that of a
few (F, F) matrices. U of a chunk follows from its rows. Of more dimensions than rows it is X X^T, and U is held.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fieldmark.command import UserError
from training.data import Cache
from training.layers.features import Features, chunk_of
from training.layers.logistic import ROOM, Tally, as_probabilities
from training.metrics import fit_temperature

RANK = 1e-13  # of the largest eigenvalue: what is below it is rounding
MAX_SCALE = 100.0  # of scores, which are about 0 and 1, into logits: where leaving out mistakes nothing, none is best
SCALE = 10.0  # where no class has two images, so that none can be left out [design]
SCALED = 2**22  # scores of left-out images, at most, by which the scale is found: it is one number


@dataclass(frozen=True, eq=False)
class Rows:
    """What a ridge is fitted to, a chunk of images at a time: m = V n rows, those of view 0 first."""

    images: int  # n
    views: int  # V
    size: int  # F
    chunk: int  # images read at a time
    x: Callable[[slice], Tensor]  # of b images, in every view: (V, b, F) float64
    y: Callable[[slice], Tensor]  # what training is told of them: (b, C) float64, the same in every view

    @property
    def count(self) -> int:
        """m."""
        return self.views * self.images

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows (V b, F) and what they are told (V b, C), a chunk of images at a time."""
        for chunk in self.chunks():
            yield self.x(chunk).flatten(0, 1), torch.cat([self.y(chunk)] * self.views)

    def chunks(self) -> list[slice]:
        return [slice(start, min(start + self.chunk, self.images)) for start in range(0, self.images, self.chunk)]

    @cached_property
    def told(self) -> Tensor:
        """Of how many images each class (C,) is told, in one view."""
        return torch.stack([self.y(chunk).sum(0) for chunk in self.chunks()]).sum(0)


@dataclass(frozen=True, eq=False)
class Basis:
    """Axes in which every penalty costs a product. U (m, r) is orthonormal and orthogonal to the constant."""

    rows: Rows
    spread: Tensor  # (r,) > 0, and 0 where a kernel leaves axes empty
    told: Tensor  # U^T Y (r, C)
    u: Callable[[slice], Tensor]  # the rows of U of b images (V, b, r)
    turn: Callable[[Tensor], Tensor]  # U a of a (r, C), or of a linear kernel X^T U a (F, C)

    @property
    def whole(self) -> bool:
        """Whether the constant and U span everything: the rest is exactly 0, and not what rounding leaves of it."""
        return len(self.spread) == self.rows.count - 1

    @property
    def mean(self) -> Tensor:
        """Of Y (C,)."""
        return self.rows.told / self.rows.images

    def filter(self, penalty: float) -> Tensor:
        """(r,): penalty / (spread + penalty), less the 1 that stands in the rest where there is one."""
        return (penalty if self.whole else -self.spread) / (self.spread + penalty)

    def solve(self, penalty: float) -> Tensor:
        """B Y (m, C), or X^T B Y (F, C) of a linear kernel: its weights."""
        return self.turn(self.told / (self.spread + penalty)[:, None])

    def left_out(self, u: Tensor, y: Tensor, penalty: float) -> Tensor:
        """(V, b, C): what the fit without any view of an image says of it; u (V, b, r) its rows of U, y (b, C)."""
        weight = self.filter(penalty)
        moved = (u @ (weight[:, None] * self.told)).transpose(0, 1)  # penalty B Y (b, V, C)
        blocks = torch.einsum("vbr,r,wbr->bvw", u, weight, u)  # penalty B_II (b, V, V)
        if not self.whole:
            moved = moved + (y - self.mean)[:, None]
            blocks = blocks + torch.eye(len(u), dtype=u.dtype, device=u.device) - 1 / self.rows.count
        return y - torch.linalg.solve(blocks, moved).transpose(0, 1)


def basis_of_rows(rows: Rows) -> tuple[Basis, Tensor]:
    """Of the linear kernel X X^T, by the smaller of its two Gram matrices; and the mean (F,) of the rows."""
    return narrow_basis(rows) if rows.size < rows.count - 1 else wide_basis(rows)


def narrow_basis(rows: Rows) -> tuple[Basis, Tensor]:
    """By X^T X (F, F): two passes over the rows, the second as images are left out."""
    size, classes = rows.size, len(rows.told)
    gram, total, told = (rows.told.new_zeros(shape) for shape in ((size, size), (size,), (size, classes)))
    for chunk in rows.chunks():
        x = rows.x(chunk)
        flat = x.flatten(0, 1)
        gram.addmm_(flat.T, flat)
        total += flat.sum(0)
        told.addmm_(x.sum(0).T, rows.y(chunk))
    mean = total / rows.count
    gram.addr_(total, mean, alpha=-1)
    spread, axes = torch.linalg.eigh(gram)
    del gram
    first = int((spread <= RANK * spread[-1]).sum())  # eigenvalues ascend
    spread, axes = spread[first:], axes[:, first:]
    axes *= spread.rsqrt()  # U = (X - mean) axes
    told -= torch.outer(total, rows.told / rows.images)
    basis = Basis(
        rows, spread, axes.T @ told, lambda chunk: (rows.x(chunk) - mean) @ axes, lambda a: axes @ (spread[:, None] * a)
    )
    return basis, mean


def wide_basis(rows: Rows) -> tuple[Basis, Tensor]:
    """By X X^T (m, m): rows are held, no more of them than they have dimensions."""
    x = torch.cat([rows.x(chunk) for chunk in rows.chunks()], 1).flatten(0, 1)
    mean = x.mean(0)
    x -= mean
    basis = basis_of_kernel(x @ x.T, rows)
    return replace(basis, turn=lambda a: x.T @ basis.turn(a)), mean


def basis_of_kernel(kernel: Tensor, rows: Rows) -> Basis:
    """Of a kernel (m, m) of these rows, all m - 1 axes. The kernel's memory is used up."""
    row = kernel.mean(0)
    kernel -= row
    kernel -= (row - row.mean())[:, None]
    # The constant becomes the last axis, of the greatest eigenvalue, and is left out.
    kernel += (1 + 2 * kernel.trace()) / len(kernel)
    spread, axes = torch.linalg.eigh(kernel)
    u = axes[:, :-1]
    by_view = u.unflatten(0, (rows.views, -1))
    told = sum(by_view[:, chunk].sum(0).T @ rows.y(chunk) for chunk in rows.chunks())
    assert isinstance(told, Tensor)
    return Basis(rows, spread[:-1].clamp(min=0), told, lambda chunk: by_view[:, chunk], lambda a: u @ a)


class Judged(NamedTuple):
    """How well a fit says what each image is told when that image is left out; nan where no class has two images."""

    accuracy: float  # the share of what an image is told that falls to the class said
    loss: float  # squared error an image
    scale: float  # that makes logits of scores: the log loss of the left-out scores is least there


def judge_left_out(basis: Basis, penalties: Sequence[float]) -> list[Judged]:
    """Judge every penalty by view 0 of the images whose class has another image, in one pass over the rows."""
    rows = basis.rows
    step = math.ceil(rows.images * len(rows.told) / SCALED)  # images apart, those that the scale is found by
    count, hits, squares = 0, [0.0] * len(penalties), [0.0] * len(penalties)
    scores: list[list[Tensor]] = [[] for _ in penalties]
    labels: list[Tensor] = []
    for chunk in rows.chunks():
        u, y = basis.u(chunk), rows.y(chunk)
        label = y.argmax(1)
        judged = (rows.told - y).gather(1, label[:, None])[:, 0] > 0
        sampled = judged & (torch.arange(chunk.start, chunk.stop, device=y.device) % step == 0)
        count += int(judged.sum())
        labels.append(label[sampled])
        for place, penalty in enumerate(penalties):
            said = basis.left_out(u, y, penalty)[0]
            hits[place] += y[judged].gather(1, said[judged].argmax(1, keepdim=True)).sum().item()
            squares[place] += (said - y)[judged].square().sum().item()
            scores[place].append(said[sampled])
    if not count:
        return [Judged(math.nan, math.nan, SCALE)] * len(penalties)
    truth = torch.cat(labels).cpu().numpy()
    temperatures = [fit_temperature(torch.cat(said).cpu().numpy(), truth) for said in scores]
    return [
        Judged(right / count, squared / count, min(1 / temperature, MAX_SCALE))
        for right, squared, temperature in zip(hits, squares, temperatures, strict=True)
    ]


Build = Callable[[float, Judged], nn.Module]  # of a penalty and how it did: a layer on x


def choose_left_out(
    cache: Cache,
    features: Features,
    knobs: Mapping[str, Sequence[float]],
    basis_of: Callable[[Mapping[str, float]], tuple[Basis, Build]],
) -> tuple[nn.Module, dict[str, float | str], list[dict[str, float]]]:
    """The point of the grid by which left-out images are told best, as a layer on x; the point; a row a point.

    By accuracy, then by squared error. `basis_of` is asked once for all penalties, which are the last of the knobs. Val
    is read out and chooses nothing. Raises UserError for several points where no class has two images.
    """
    others = {name: values for name, values in knobs.items() if name != "penalty"}
    count = math.prod(len(values) for values in knobs.values())
    points: list[dict[str, float]] = []
    judged: list[Judged] = []
    layers: list[nn.Module] = []
    for values in itertools.product(*others.values()):
        point = dict(zip(others, values, strict=True))
        basis, build = basis_of(point)
        found = judge_left_out(basis, knobs["penalty"])
        if math.isnan(found[0].loss) and count > 1:
            raise UserError(
                "train: no class has two training images, so leaving one out cannot choose among"
                f" {count} settings of {', '.join(knobs)}; give each of them one value"
            )
        points += [{**point, "penalty": penalty} for penalty in knobs["penalty"]]
        judged += found
        layers += [build(penalty, one) for penalty, one in zip(knobs["penalty"], found, strict=True)]
    val = cache.images("val")
    assessed = assess_layers(layers, cache, features, val)
    history = [
        {
            "epoch": step,
            **point,
            "left_out_accuracy": left.accuracy,
            "left_out_loss": left.loss,
            "val_loss": log_loss,
            "val_accuracy": accuracy,
        }
        for step, (point, left, (accuracy, log_loss)) in enumerate(zip(points, judged, assessed, strict=True), start=1)
    ]
    best = max(range(len(points)), key=lambda place: (judged[place].accuracy, -judged[place].loss))
    return layers[best], {**points[best]}, history


@torch.no_grad()
def assess_layers(
    layers: Sequence[nn.Module], cache: Cache, features: Features, images: Tensor
) -> list[tuple[float, float]]:
    """Accuracy and log loss of several layers on x, which is read once, a chunk at a time.

    The logits that wait to be judged are no more of all layers together than of one elsewhere.
    """
    tallies = [Tally(room=ROOM // len(layers)) for _ in layers]
    for some in images.split(features.chunk):
        x = features.of(cache, some)
        for layer, tally in zip(layers, tallies, strict=True):
            tally.add(layer(x), cache.y[some])
    return [tally.result() for tally in tallies]


def training_rows(cache: Cache, features: Features, unit: float = 1.0, kept: int = 0) -> Rows:
    """The training images by their vectors x / unit; no more numbers of them than `kept` are one chunk.

    Numbers of an image are those of x or of what is told of it, whichever are more.
    """
    train, size = cache.images("train"), max(features.size, len(cache.classes))
    is_kept = len(train) * cache.views * size <= kept

    def x(chunk: slice) -> Tensor:
        views = [features.of(cache, train[chunk], view) for view in range(cache.views)]
        return torch.stack(views).double() / unit

    def y(chunk: slice) -> Tensor:
        return as_probabilities(cache.target[train[chunk]], len(cache.classes)).double()

    chunk = max(1, len(train)) if is_kept else max(1, chunk_of(size) // cache.views)
    return Rows(len(train), cache.views, features.size, chunk, x, y)


def training_targets(cache: Cache) -> Tensor:
    """(V n, C) float64: what training is told of its images, once a view."""
    told = as_probabilities(cache.target[cache.images("train")], len(cache.classes)).double()
    return torch.cat([told] * cache.views)
