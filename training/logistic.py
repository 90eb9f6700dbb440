"""Multinomial logistic regression by full-batch L-BFGS, its L2 strength chosen on val.

Minimises mean cross entropy + l2/2 * |W|^2 (the bias is free), from the strongest l2 to the weakest, each from where
the last one ended. Val chooses by accuracy, then by log loss. scikit-learn's C is 1 / (n * l2).
"""

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Half-decades from 100 to 1e-5, for vectors whose dimensions have a mean variance of 1.
STRENGTHS = tuple(float(f"{10 ** (2 - step / 2):.3g}") for step in range(15))
MAX_ITERATIONS = 300


class Chosen(NamedTuple):
    linear: nn.Linear
    l2: float
    history: list[dict[str, float]]  # a row for every l2
    pass_seconds: float  # one look at all of x, with its gradient


def assess(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and log loss, the two numbers by which val chooses everywhere."""
    return (logits.argmax(-1) == y).float().mean().item(), F.cross_entropy(logits, y).item()


def minimise(linear: nn.Linear, x: Tensor, y: Tensor, l2: float, max_iterations: int) -> tuple[float, int]:
    """Move `linear` to the minimum; the cross entropy there and the number of passes over x (n, D)."""
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
        loss = F.cross_entropy(linear(x), y) + l2 / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return F.cross_entropy(linear(x), y).item(), passes


def fit_logistic(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
) -> Chosen:
    """Fit x (n, D) to y at every strength, and keep the fit that x_val, y_val prefer.

    y is classes (n,), or probabilities (n, C); y_val is classes.
    """
    linear = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    best, best_l2, best_state = (-1.0, 0.0), 0.0, linear.state_dict()
    history: list[dict[str, float]] = []
    started, passes = perf_counter(), 0
    for step, l2 in enumerate(sorted(strengths, reverse=True), start=1):
        train_loss, spent = minimise(linear, x, y, l2, max_iterations)
        passes += spent
        with torch.no_grad():
            accuracy, log_loss = assess(linear(x_val), y_val)
        history.append(
            {"epoch": step, "l2": l2, "train_loss": train_loss, "val_loss": log_loss, "val_accuracy": accuracy}
        )
        if (accuracy, -log_loss) > best:
            best, best_l2 = (accuracy, -log_loss), l2
            best_state = {name: value.clone() for name, value in linear.state_dict().items()}
    linear.load_state_dict(best_state)
    return Chosen(linear, best_l2, history, (perf_counter() - started) / passes)
