"""Multinomial logistic regression by full-batch L-BFGS, its L2 strength chosen on val.

Minimises mean cross entropy + l2/2 * |W|^2 (the bias is free), from the strongest l2 to the weakest, each from where
the last one ended. Val chooses by accuracy, then by log loss. scikit-learn's C is 1 / (n * l2). Every method whose last
layer is fitted so goes through `fit_probe`, which says of what images and targets.

Memory does not grow with the rows: more than KEPT numbers of them are read anew at every pass, and logits are held of
ROOM numbers at a time. Loss and gradient are sums over these blocks; what fits into one is one product, as ever.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.params import Block, Count
from training.data import CPU, Cache
from training.layers.blocks import silent

# Half-decades from 100 to 1e-5, for vectors whose dimensions have a mean variance of 1.
STRENGTHS = tuple(float(f"{10 ** (2 - step / 2):.3g}") for step in range(15))
MAX_ITERATIONS = 300
# Products a pass, n D C, under which a GPU takes longer to begin its many small steps than a CPU to finish them: of
# reef's 1,632 x 512 x 24 an H200 made a fit in 20 s, 16 cores beside it in 6. Such a fit is made on the CPU.
SMALL = 2**28
# The strength where no val chooses it: on cub100's development classes, 1 and 4 shots, within .004 of the best of
# 100 .. 1e-4.
L2_WITHOUT_VAL = 0.01
KEPT = 2**27  # numbers of rows that stay in memory from pass to pass: 0.5 GB
ROOM = 2**24  # logits that are held at a time, and numbers of rows that are read anew: 64 MB
Positive = Annotated[float, Field(gt=0)]


class ProbeSettings(Block):
    l2: list[Positive] = Field(default=list(STRENGTHS), min_length=1)  # strengths that val chooses from
    max_iterations: Count = MAX_ITERATIONS  # of L-BFGS, for each strength


class Chosen(NamedTuple):
    linear: nn.Linear
    l2: float
    history: list[dict[str, float]]  # a row for every l2
    pass_seconds: float  # one look at all of x, with its gradient


def assess(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and log loss, the two numbers by which val chooses everywhere."""
    return (logits.argmax(-1) == y).float().mean().item(), F.cross_entropy(logits, y).item()


@dataclass
class Tally:
    """`assess` of logits that come in chunks. Few are judged at once, so that chunks change no bit of it."""

    count: int = 0
    right: int = 0
    loss: float = 0.0  # a sum
    room: int = ROOM  # logits that may wait
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, logits: Tensor, y: Tensor) -> None:
        """logits (n, C) of images of the classes y (n,)."""
        self.waiting.append((logits, y))
        if sum(some.numel() for some, _ in self.waiting) > self.room:
            self.settle()

    def settle(self) -> None:
        logits, y = (torch.cat(chunks) for chunks in zip(*self.waiting, strict=True))
        self.waiting = []
        self.count += len(y)
        self.right += int((logits.argmax(-1) == y).sum())
        self.loss += F.cross_entropy(logits, y, reduction="sum").item()

    def result(self) -> tuple[float, float]:
        """Accuracy and log loss; nan where there was nothing."""
        if not self.waiting and not self.count:
            return math.nan, math.nan
        if not self.count:
            logits, y = (torch.cat(chunks) for chunks in zip(*self.waiting, strict=True))
            return assess(logits, y)
        if self.waiting:
            self.settle()
        return self.right / self.count, self.loss / self.count


def require_val(images: int, points: int, knobs: str) -> None:
    """Raises UserError where val has to choose among the points of a grid and holds no image."""
    if points > 1 and not images:
        raise UserError(
            f"train: val holds no image, so nothing can choose among {points} settings of {knobs};"
            " give each of them one value"
        )


def as_probabilities(target: Tensor, classes: int) -> Tensor:
    """(n, C) float32: what training is told, whether as classes (n,) or as probabilities (n, C)."""
    return F.one_hot(target, classes).float() if target.ndim == 1 else target.float()


def training_globals(cache: Cache) -> tuple[Tensor, Tensor]:
    """Global vectors (n V, D) of the training images in every view, and what training is told of each."""
    train = cache.images("train")
    vectors = torch.cat([cache.globals(train, view) for view in range(cache.views)])
    return vectors, torch.cat([cache.target[train]] * cache.views)


Piece = tuple[Tensor, Tensor]  # rows (b, D), and what each is told: classes (b,) or probabilities (b, C)


@dataclass(frozen=True)
class Rows:
    """What a layer is fitted to, or judged by."""

    count: int  # n
    size: int  # D
    device: torch.device
    blocks: Callable[[], Iterable[Piece]]  # all rows, in order, each time it is called

    @classmethod
    def of(cls, x: Tensor, y: Tensor, classes: int) -> Self:
        """Of x (n, D) and y as they are."""
        step = max(1, ROOM // classes)
        blocks = list(zip(x.split(step), y.split(step), strict=True))
        return cls(len(x), x.shape[1], x.device, lambda: blocks)

    @classmethod
    def read(
        cls, features: Callable[[Tensor, int], Tensor], images: Tensor, views: int, told: Tensor, classes: int
    ) -> Self:
        """Of features(images, view) (len(images), D) in every view, all of view 0 first; `told` of the images (n, ..).

        Where there are more than KEPT numbers they are read whenever they are asked for.
        """
        first = features(images[:1], 0)
        count, size = len(images) * views, first.shape[1]
        if count * size <= KEPT:
            x = torch.cat([features(images, view) for view in range(views)])
            return cls.of(x, torch.cat([told] * views), classes)
        step = max(1, ROOM // max(size, classes))

        def blocks() -> Iterator[Piece]:
            for view in range(views):
                for some, own in zip(images.split(step), told.split(step), strict=True):
                    yield features(some, view), own

        return cls(count, size, first.device, blocks)

    def to(self, device: torch.device) -> "Rows":
        """The same on a device, where they then stay: for few rows."""
        if device == self.device:
            return self
        held = [(x.to(device), y.to(device)) for x, y in self.blocks()]
        return replace(self, device=device, blocks=lambda: held)


def minimise(
    linear: nn.Linear, rows: Rows, l2: float, max_iterations: int, offset: Tensor | float = 0.0
) -> tuple[float, int]:
    """Move `linear` to the minimum; the cross entropy there and the number of passes over the rows.

    offset (C,) stands beside the logits in the loss.
    """
    optimiser = torch.optim.LBFGS(
        linear.parameters(),
        max_iter=max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    passes = 0

    def losses() -> Iterator[Tensor]:
        """Of each block, its part in the mean."""
        for x, y in rows.blocks():
            loss = F.cross_entropy(linear(x) + offset, y)
            yield loss if len(x) == rows.count else loss * (len(x) / rows.count)

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        linear.zero_grad()  # the optimiser's own takes as long as a small product
        penalty = l2 / 2 * linear.weight.square().sum()
        total: Tensor | None = None
        for loss in losses():
            # The penalty goes with the first block, so that one block alone is one sum.
            part = loss + penalty if total is None else loss
            part.backward()
            total = part.detach() if total is None else total + part.detach()
        assert total is not None
        return total

    optimiser.step(closure)
    with torch.no_grad():
        return math.fsum(loss.item() for loss in losses()), passes


def judge(layer: nn.Module, rows: Rows) -> tuple[float, float]:
    """Accuracy and log loss of a layer on rows."""
    tally = Tally()
    with torch.no_grad():
        for x, y in rows.blocks():
            tally.add(layer(x), y)
    return tally.result()


def fit_logistic(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
    linear: nn.Linear | None = None,
    offset: Tensor | None = None,
) -> Chosen:
    """Fit x (n, D) to y at every strength, and keep the fit that x_val, y_val prefer.

    y is classes (n,), or probabilities (n, C), which may be weighed: rows sum to the weight of an image then. y_val is
    classes. `linear` is the layer to fit, of any subclass, and where it starts; the default starts at zero. offset (C,)
    stands beside the logits in the loss, and not on val. Raises UserError for several strengths and no val.
    """
    train, val = Rows.of(x, y, classes), Rows.of(x_val, y_val, classes)
    return fit_rows(train, val, classes, strengths, max_iterations, linear, offset)


def fit_rows(
    train: Rows,
    val: Rows,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
    linear: nn.Linear | None = None,
    offset: Tensor | None = None,
) -> Chosen:
    """fit_logistic of rows that may be too many for memory."""
    require_val(val.count, len(strengths), "l2")
    home = train.device
    if train.count * train.size * classes < SMALL:
        train, val = train.to(CPU), val.to(CPU)
    if linear is None:
        linear = silent(train.size, classes)
    linear = linear.to(train.device)
    beside = 0.0 if offset is None else offset.to(train.device)
    best: tuple[float, float] | None = None
    best_l2, best_state = 0.0, linear.state_dict()
    history: list[dict[str, float]] = []
    started, passes = perf_counter(), 0
    for step, l2 in enumerate(sorted(strengths, reverse=True), start=1):
        train_loss, spent = minimise(linear, train, l2, max_iterations, beside)
        passes += spent
        accuracy, log_loss = judge(linear, val)
        history.append(
            {"epoch": step, "l2": l2, "train_loss": train_loss, "val_loss": log_loss, "val_accuracy": accuracy}
        )
        if best is None or (accuracy, -log_loss) > best:
            best, best_l2 = (accuracy, -log_loss), l2
            best_state = {name: value.clone() for name, value in linear.state_dict().items()}
    linear.load_state_dict(best_state)
    return Chosen(linear.to(home), best_l2, history, (perf_counter() - started) / passes)


def fit_probe(
    cache: Cache,
    settings: ProbeSettings,
    features: Callable[[Tensor, int], Tensor],
    linear: nn.Linear | None = None,
) -> Chosen:
    """Logistic regression on `features(images, view)` (len(images), F): fitted over every view, val read in view 0.

    What they give of an image follows from that image: they may be asked for some of the images at a time.
    """
    train, val, classes = cache.images("train"), cache.images("val"), len(cache.classes)
    return fit_rows(
        Rows.read(features, train, cache.views, cache.target[train], classes),
        Rows.read(features, val, 1, cache.y[val], classes),
        classes,
        settings.l2,
        settings.max_iterations,
        linear,
    )
