"""One file a method, registered by its name: `train.methods.NAME` in params.yaml is `training/methods/NAME.py`.

A method's module holds `Settings`, a `fieldmark.params.Block` with every knob and its default; `SEEDED`, false where no
random number is drawn, so that one fit stands for every seed; `READS`, what it looks at beside vectors, under any
settings; a torch module whose `forward(batch)` returns an `Output`; and `fit(cache, settings, seed)`, which returns a
`Fitted`. There is no list of methods to extend, so that editing one method reruns one stage.

READS is some of `names` and `concepts` (the bank's texts of class names, and its others), `owners` (which class a text
belongs to), `labels` (what label_patches says of nodes and images), `edges`, and `others` (vectors of other encoders).
A study leaves out what follows from it: no run of a method under a control that changes none of these, as its plain run
stands for that. Only a method that reads others can be given several encoders.
"""

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

from pydantic import ValidationError
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.params import Block, Params, explain
from training.data import Cache
from training.layers.logistic import assess, require_val

BUDGET = 16  # settings that val may choose among, the same for every method
PARTS = frozenset({"names", "concepts", "owners", "labels", "edges", "others"})  # what READS may name


class Output(NamedTuple):
    """What a method says of a batch. `losses` are auxiliary, filled in training mode only; the trainer weighs them."""

    logits: Tensor  # (B, C)
    losses: dict[str, Tensor]  # scalars
    node_scores: Tensor | None  # (B, N+1) in [0,1], 0 where padded: how much each node counted


@dataclass(frozen=True)
class Fitted:
    """A model and how it was come by. `history` has one row an epoch (or a step of the search), equal keys in each."""

    model: nn.Module
    history: list[dict[str, float]]
    chosen: dict[str, float | str] = field(default_factory=dict)  # what val chose, by the name of the knob
    epoch_seconds: float = 0.0  # one pass over the training images with its updates, evaluation apart


class MethodModule(Protocol):
    Settings: type[Block]
    SEEDED: bool
    READS: frozenset[str]
    fit: Callable[[Cache, Block, int], Fitted]


def load_method(name: str) -> MethodModule:
    """The module of a method whose file exists. Raises UserError where it is not whole."""
    module = cast(MethodModule, importlib.import_module(f"training.methods.{name}"))
    for part in MethodModule.__annotations__:
        if not hasattr(module, part):
            raise UserError(f"training/methods/{name}.py: has no {part}; training/methods/__init__.py says what it is")
    if unknown := module.READS - PARTS:
        known = ", ".join(sorted(PARTS))
        raise UserError(f"training/methods/{name}.py: READS: {min(unknown)!r} is no part; choose from: {known}")
    return module


def read_settings(path: str, params: Params, name: str) -> Block:
    """The settings of a run of train.methods or train.several, checked. Raises UserError naming file and key."""
    method, several = params.train.method_of(name), name in params.train.several
    module, given = load_method(method), params.train.runs[name].settings
    key = f"train.{'several' if several else 'methods'}.{name}"
    if several:
        require_others(path, f"{key}.also", method)
    try:
        return module.Settings.model_validate(given)
    except ValidationError as error:
        raise UserError(explain(path, error, given, f"{key}.", module.Settings)) from None


def require_others(path: str, key: str, method: str) -> None:
    """Raise UserError for a method that reads one encoder only."""
    if "others" not in load_method(method).READS:
        raise UserError(f"{path}: {key}: {method} reads one encoder only; choose a method with `others` in its READS")


def grid(settings: Block) -> dict[str, list[float]]:
    """The knobs that hold a list of numbers: the values val chooses from."""
    return {
        name: value
        for name, value in settings
        if isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    }


def search_points(settings: Block) -> int:
    """How many settings val chooses among; no more than BUDGET, so that no method wins by a longer search."""
    return math.prod(len(values) for values in grid(settings).values())


def single_points(settings: Block) -> list[Block]:
    """Every point of the grid as settings of its own, with one value a knob."""
    knobs = grid(settings)
    return [
        settings.model_copy(update={name: [value] for name, value in zip(knobs, values, strict=True)})
        for values in itertools.product(*knobs.values())
    ]


def search(
    cache: Cache, settings: Block, logits: Callable[..., Tensor]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The point of the grid that val prefers, by accuracy and then log loss, and a row of history for every point.

    `logits(**point)` are those of the val images. Raises UserError for several points and no val.
    """
    y, knobs = cache.y[cache.images("val")], grid(settings)
    require_val(len(y), search_points(settings), ", ".join(knobs))
    best: tuple[tuple[float, float], dict[str, float]] | None = None
    history: list[dict[str, float]] = []
    for step, values in enumerate(itertools.product(*knobs.values()), start=1):
        point = dict(zip(knobs, values, strict=True))
        accuracy, log_loss = assess(logits(**point), y)
        history.append({"epoch": step, **point, "val_loss": log_loss, "val_accuracy": accuracy})
        if best is None or (accuracy, -log_loss) > best[0]:
            best = (accuracy, -log_loss), point
    assert best is not None
    return best[1], history
