"""A sparse last layer: multinomial logistic regression with an L1 penalty, at a wanted number of concepts a class.

    minimise   mean cross entropy + penalty (share |W|_1 + (1 - share)/2 |W|_F^2)        the bias is free

An elastic net as in GLM-SAGA (Wong et al., ICML 2021 [mem]), by which VLG-CBM (Srivastava et al., NeurIPS 2024 [web])
judges a bottleneck at a number of effective concepts, NEC: the non-zero weights of a class, averaged over classes.
Theirs draws batches and cuts the smallest weights until NEC is met [mem]; here nothing is drawn or cut [design].
Penalties fall from where all weights are zero, each fit starts from the one before, and the penalty at which NEC passes
the wanted number is closed in on by halving. What is returned is an optimum, with no more weights than asked for.

Solved by accelerated proximal gradient steps on all weights at once (FISTA; Beck and Teboulle, 2009 [mem]), which start
afresh where they turn back (O'Donoghue and Candes, 2015 [mem]). A step grows by itself, and is halved where the loss
bends more than the step assumed. A fit ends where the conditions of an optimum (Karush, Kuhn and Tucker) are met: of
the penalised objective's subgradient, no entry is further from 0 than `tolerance` x penalty.

x is standardised column by column, so that one penalty treats all concepts alike; weights and biases are then put back,
and are those of the features as they came. Everything is in the features' precision, float32 at least.

L1 chooses weights and shrinks them, the more the fewer it leaves. `fit_sparse` keeps its choice and fits the weights
that are left anew under L2 (the relaxed lasso; Meinshausen, 2007 [mem]): on cub100, at 5 a class, val goes from .65 to
.80 by that.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.blocks import linear_layer
from training.layers.gaussian import NEVER
from training.layers.logistic import MAX_ITERATIONS, STRENGTHS, Chosen, as_probabilities, fit_logistic

SHARE = 0.99  # of the penalty that is L1, as VLG-CBM has it [mem]
TOLERANCE = 1e-2  # on cub100's concepts NEC is then within 0.1 of that of 1e-3, in less than half of the time
RATIO = 0.8  # of a penalty to the one before it
WEAKEST = 1e-3  # where the path ends, as a share of the least penalty under which all weights are zero
SLACK = 0.05  # of the wanted number: how far NEC may stay under it
HALVINGS = 16  # where weights come in together, no penalty may give the number
STEPS = 5000  # for one penalty, at most
GROWTH = 1.05  # of a step
CONSTANT = 1e-12  # a variance that is rounding
ROWS = 4096  # of features, that are in float64 at a time


class Sparse(NamedTuple):
    """The optimum for one penalty, or what was reached of it after `STEPS`: `violation` tells."""

    weight: Tensor  # (C, M)
    bias: Tensor  # (C,)
    penalty: float
    nec: float  # non-zero weights a class, of the classes that have images
    violation: float  # of the conditions of an optimum, in units of the penalty
    steps: int


def sparse_layers(
    features: Tensor,
    labels: Tensor,
    classes: int,
    wanted: Sequence[float],
    share: float = SHARE,
    tolerance: float = TOLERANCE,
) -> list[Sparse]:
    """For each wanted number the layer with so many non-zero weights a class, of features (n, M) and labels.

    Labels are classes (n,) or probabilities (n, C). NEC is between 95 % of the number and the number, unless weights
    come in together, or the path ends before: then it is less. inf is the end of the path, hardly penalised; a dense
    layer whose strength val chooses is `fit_logistic`'s. A class without images has no weight and is never said.
    """
    return walk(Problem(features, labels, classes, share, tolerance), wanted)


def walk(problem: "Problem", wanted: Sequence[float]) -> list[Sparse]:
    """The layers of all wanted numbers, in one walk along the path."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    found: dict[int, Sparse] = {}
    sparser: Point | None = None
    for point in problem.path():
        while len(found) < len(order) and point.nec > wanted[order[len(found)]]:
            place = order[len(found)]
            found[place] = problem.layer(close_in(problem, wanted[place], sparser or point, point))
        sparser = point
        if len(found) == len(order):
            break
    assert sparser is not None
    for place in order[len(found) :]:
        found[place] = problem.layer(sparser)
    return [found[place] for place in range(len(wanted))]


class Masked(nn.Linear):
    """A linear layer, some weights of which are and stay zero. It says nothing at first."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        """kept (C, M) bool."""
        super().__init__(kept.shape[1], len(kept))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.kept, self.bias)


def fit_sparse(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    classes: int,
    nec: float,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
) -> Chosen:
    """`fit_logistic` on the weights that `sparse_layers` keeps, x (n, M) standardised column by column; a layer on x.

    History also says what was kept: its NEC, the L1 penalty, and how well the conditions of its optimum are met.
    """
    problem = Problem(x, y, classes, SHARE, TOLERANCE)
    found = walk(problem, [nec])[0]
    taken = found.weight.any(0)
    taken[0] = True  # a layer has a column at least
    used = taken.nonzero()[:, 0]
    scale = problem.scale.only(used)
    said = {"nec": found.nec, "l1_penalty": found.penalty, "violation": found.violation}
    chosen = fit_logistic(
        *(problem.x[:, used], y, scale.of(x_val[:, used]), y_val, classes, strengths, max_iterations),
        linear=Masked(found.weight[:, used] != 0),
    )
    weight, bias = scale.back(chosen.linear.weight * (found.weight[:, used] != 0), chosen.linear.bias)
    full = torch.zeros_like(found.weight)
    full[:, used] = weight.detach()
    history = [{**row, **said} for row in chosen.history]
    return chosen._replace(linear=linear_layer(full, bias.detach()), history=history)


class ColumnScale(NamedTuple):
    """What standardises features (n, M) column by column; float64, of which ROWS rows of them are held at a time."""

    mean: Tensor  # (M,)
    scale: Tensor  # (M,)

    @classmethod
    def measure(cls, features: Tensor) -> "ColumnScale":
        chunks, count = features.split(ROWS), len(features)
        mean = torch.stack([rows.double().sum(0) for rows in chunks]).sum(0) / count
        variance = torch.stack([(rows.double() - mean).square().sum(0) for rows in chunks]).sum(0) / count
        return cls(mean, variance.clamp(min=CONSTANT).sqrt())

    def of(self, features: Tensor) -> Tensor:
        found = features.new_empty(features.shape, dtype=torch.promote_types(features.dtype, torch.float32))
        for rows, into in zip(features.split(ROWS), found.split(ROWS), strict=True):
            into.copy_((rows.double() - self.mean) / self.scale)
        return found

    def only(self, columns: Tensor) -> "ColumnScale":
        """That of these columns (k,) int64."""
        return ColumnScale(self.mean[columns], self.scale[columns])

    def back(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (C, M) and bias (C,) on standardised columns as those on features as they came."""
        moved = weight.double() / self.scale
        return moved.to(weight.dtype), (bias.double() - moved @ self.mean).to(bias.dtype)


@dataclass(frozen=True, eq=False)
class Point:
    """A point of the path, of standardised features and of the classes that have images."""

    weight: Tensor  # (M + 1, K), the bias last
    penalty: float
    step: float  # that the next point may start with
    violation: float = 0.0
    steps: int = 0

    @property
    def nec(self) -> float:
        return self.weight[:-1].count_nonzero().item() / self.weight.shape[1]


class Problem:
    def __init__(self, features: Tensor, labels: Tensor, classes: int, share: float, tolerance: float) -> None:
        """Features (n, M) with n >= 1; labels (n,) or (n, C)."""
        told = as_probabilities(labels, classes)
        self.known = told.sum(0) > 0
        self.scale = ColumnScale.measure(features)
        x = self.scale.of(features)
        self.x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (n, M + 1)
        self.y = told[:, self.known].to(x.dtype)
        self.share, self.tolerance = share, tolerance

    def path(self) -> Iterator[Point]:
        """From no weight at all, where the shares of the classes are said, to `WEAKEST` of that penalty.

        Each penalty is `RATIO` of the one before.
        """
        empty = self.x.new_zeros(self.x.shape[1], self.y.shape[1])
        empty[-1] = self.y.mean(0).log()
        top = self.gradient(self.x @ empty, self.x)[:-1].abs().max().item() / self.share
        point = Point(empty, top, step=1.0)
        yield point
        for step in itertools.count(1):
            if top * RATIO**step < top * WEAKEST or top == 0:
                return
            point = self.solve(top * RATIO**step, point)
            yield point

    def gradient(self, logits: Tensor, x: Tensor) -> Tensor:
        """(k, K), of the mean cross entropy by the weights of columns x (n, k) where the logits (n, K) are these."""
        return x.T @ ((logits.softmax(1) - self.y) / len(self.y))

    def off(self, weight: Tensor, logits: Tensor, penalty: float) -> Tensor:
        """(M + 1, K): how far from 0 the subgradient nearest to it is, entry by entry."""
        slope, w = self.gradient(logits, self.x), weight[:-1]
        pull = slope[:-1] + penalty * (1 - self.share) * w
        at_zero = (pull.abs() - penalty * self.share).clamp(min=0)
        off = torch.where(w == 0, at_zero, (pull + penalty * self.share * w.sign()).abs())
        return torch.cat([off, slope[-1:].abs()])

    def solve(self, penalty: float, start: Point) -> Point:
        """The optimum for a penalty, from another one's.

        Of the columns only those take part that have a weight, or would gain by one; the others are asked at the end.
        """
        weight, step, taken = start.weight.clone(), start.step, 0
        off = self.off(weight, self.x @ weight, penalty)
        taking = weight.any(1)
        taking[-1] = True
        while True:
            taking |= (off > self.tolerance * penalty).any(1)
            columns = taking.nonzero()[:, 0]
            weight[columns], step, spent = self.descend(columns, penalty, weight[columns], step, STEPS - taken)
            taken += spent
            off = self.off(weight, self.x @ weight, penalty)
            violation = off.max().item() / penalty
            if violation <= self.tolerance or taken >= STEPS:
                return Point(weight, penalty, step, violation, taken)

    def descend(
        self, columns: Tensor, penalty: float, weight: Tensor, step: float, most: int
    ) -> tuple[Tensor, float, int]:
        """The optimum over the weights (k, K) of these columns, the bias last; the step, and how many were taken."""
        x, before = self.x.index_select(1, columns), weight
        logits = logits_before = x @ weight
        lasso, ridge = penalty * self.share, penalty * (1 - self.share)
        momentum, taken = 1.0, 0
        while True:
            taken += 1
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            carried = (momentum - 1) / following
            momentum = following
            # Logits are linear in the weights: what is carried on needs no product with x.
            ahead = weight + carried * (weight - before)
            logits_ahead = logits + carried * (logits - logits_before)
            slope = self.gradient(logits_ahead, x)
            while True:
                moved = ahead - step * slope
                w = moved[:-1]
                moved[:-1] = w.sign() * (w.abs() - step * lasso).clamp(min=0) / (1 + step * ridge)
                logits_moved = x @ moved
                way = (moved - ahead).double().square().sum().item()
                if bend(logits_ahead, logits_moved) <= way / (2 * step) or way == 0:
                    break
                step /= 2
            if ((ahead - moved) * (moved - weight)).sum() > 0:
                momentum = 1.0
            # The subgradient is this move over its step, and what the gradient changed by on it, which is no more.
            last = (moved - ahead).abs().max().item() / step
            before, logits_before, weight, logits = weight, logits, moved, logits_moved
            if last <= self.tolerance * penalty / 2 or taken >= most:
                return weight, step, taken
            step *= GROWTH

    def layer(self, point: Point) -> Sparse:
        """On the features as they came."""
        weight = self.x.new_zeros(len(self.known), len(point.weight) - 1)
        bias = self.x.new_full((len(self.known),), NEVER)
        weight[self.known], bias[self.known] = self.scale.back(point.weight[:-1].T, point.weight[-1])
        return Sparse(weight, bias, point.penalty, point.nec, point.violation, point.steps)


def bend(start: Tensor, end: Tensor) -> float:
    """By how much the mean cross entropy at the second logits (n, K) lies above its tangent at the first.

    Summed in float64 and of small terms alone, so that it is right where it is far smaller than the loss.
    """
    p, way = start.double().softmax(1), (end - start).double()
    way = way - (p * way).sum(1, keepdim=True)
    return torch.log1p((p * (way.expm1() - way)).sum(1)).mean().item()


def close_in(problem: Problem, wanted: float, sparser: Point, denser: Point) -> Point:
    """The sparser of two points moved towards the denser one, until its NEC is just under the wanted number."""
    for _ in range(HALVINGS):
        if sparser.nec >= (1 - SLACK) * wanted:
            break
        middle = problem.solve(math.sqrt(sparser.penalty * denser.penalty), sparser)
        if middle.nec <= wanted:
            sparser = middle
        else:
            denser = middle
    return sparser
