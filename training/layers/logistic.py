"""Multinomial logistic regression by full-batch L-BFGS, its L2 strength chosen on val.

Minimises mean cross entropy + l2/2 * |W|^2 (the bias is free), from the strongest l2 to the weakest, each from where
the last one ended. Val chooses by accuracy, then by log loss. scikit-learn's C is 1 / (n * l2). Every method whose last
layer is fitted so goes through `fit_probe`, which says of what images and targets.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.params import Block, Count
from training.data import Cache
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


def minimise(
    linear: nn.Linear, x: Tensor, y: Tensor, l2: float, max_iterations: int, offset: Tensor | float = 0.0
) -> tuple[float, int]:
    """Move `linear` to the minimum; the cross entropy there and the number of passes over x (n, D).

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

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimiser.zero_grad()
        loss = F.cross_entropy(linear(x) + offset, y) + l2 / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return F.cross_entropy(linear(x) + offset, y).item(), passes


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
    require_val(len(y_val), len(strengths), "l2")
    home = x.device
    if x.numel() * classes < SMALL:
        x, y, x_val, y_val = (each.cpu() for each in (x, y, x_val, y_val))
    if linear is None:
        linear = silent(x.shape[1], classes)
    linear = linear.to(x.device)
    beside = 0.0 if offset is None else offset.to(x.device)
    best: tuple[float, float] | None = None
    best_l2, best_state = 0.0, linear.state_dict()
    history: list[dict[str, float]] = []
    started, passes = perf_counter(), 0
    for step, l2 in enumerate(sorted(strengths, reverse=True), start=1):
        train_loss, spent = minimise(linear, x, y, l2, max_iterations, beside)
        passes += spent
        with torch.no_grad():
            accuracy, log_loss = assess(linear(x_val), y_val)
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
    """Logistic regression on `features(images, view)` (len(images), F): fitted over every view, val read in view 0."""
    train, val = cache.images("train"), cache.images("val")
    return fit_logistic(
        torch.cat([features(train, view) for view in range(cache.views)]),
        torch.cat([cache.target[train]] * cache.views),
        features(val, 0),
        cache.y[val],
        len(cache.classes),
        settings.l2,
        settings.max_iterations,
        linear,
    )
