"""One file a method, registered by its name: `method: NAME` of a run or study is `training/methods/NAME.py`.

A method's module holds `Settings`, a `fieldmark.params.Block` with every knob, its default and a comment on its line;
`SEEDED`, false where no random number is drawn, so that one fit stands for every seed; `READS`, the parts of the cache
that it looks at under any settings; a torch module whose `forward(batch)` returns an `Output`;
`fit(cache, settings, seed)`, which returns a `Fitted`; and `build(state, settings, classes)`, which makes that module
again without an image. There is no list of methods to extend.

`build` is given the module's `state_dict`, the settings as val chose them (`settle` of training/folds.py) and how many
classes there are. What it returns has each tensor of that state in its shape, and all that is no tensor as it was; then
the state is loaded (training/restore.py).

What READS names (`training/data/` has the parts) decides what is read, what a run's identity and its controls are, and
what a second machine has to fetch; nothing else can be seen. A method may hold more: `reads(settings)`, what
of READS these settings leave; `ALSO`, the parts that it reads of other encoders, and `also_reads(settings)`, what of
ALSO is left. A method without ALSO takes one encoder alone. `BORROWS` says that it learns from images of other classes
too, where it is lent some (`Cache.others`). `texts_add(model, settings, cache, images, classes)` says what each text of
the bank adds to logit a - logit b, (B, M) of images (B,) with a and b in classes (B, 2), or None where the settings
leave no text (training/explain.py); `pairs_add`, called alike, what each of P pairs of texts adds at the same place,
(B, P), which texts these are, (P, 2), and whether the image has more of the pair than training images on average,
(B, P). A method that finds that this data leaves it nothing to do raises `NotPossible`.
What val chose of knobs with several values stands in `Fitted.chosen`: folds are fitted again with it
(training/folds.py). Settings whose choices are no grid of knobs say what they are themselves (`OwnPoints`).
"""

import difflib
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.params import Block, Params, read_block
from training.data import Cache, kind_of
from training.layers.logistic import assess, require_val
from training.layers.states import State

BUDGET = 16  # times that val may be looked at to choose, settings times epochs: the same for every method
METHODS = Path(__file__).parent


class Output(NamedTuple):
    """What a method says of a batch. `losses` are auxiliary, filled in training mode only; the trainer weighs them."""

    logits: Tensor  # (B, C)
    losses: dict[str, Tensor]  # scalars
    node_scores: Tensor | None  # (B, N+1) in [0,1], 0 where padded: how much each node counted


@dataclass(frozen=True)
class Fitted:
    """A model and how it was come by. `history` has a row a look at val, with equal keys in each."""

    model: nn.Module
    history: list[dict[str, float]]
    chosen: dict[str, float | str] = field(default_factory=dict)  # what val chose, by the name of the knob
    epoch_seconds: float = 0.0  # one pass over the training images with its updates, evaluation apart


class NotPossible(UserError):
    """This method cannot work on this data, whatever its settings; other methods can, and go on."""


class MethodModule(Protocol):
    Settings: type[Block]
    SEEDED: bool
    READS: frozenset[str]
    fit: Callable[[Cache, Block, int], Fitted]
    build: Callable[[State, Block, int], nn.Module]


@runtime_checkable
class OwnPoints(Protocol):
    """Settings whose choices are no grid of knobs, and say themselves what they are."""

    def points(self) -> list[Block]:
        """Everything that val chooses among, each as settings that leave nothing to choose."""
        ...

    def settle(self, chosen: dict[str, float | str]) -> Block:
        """The settings as val chose them; `chosen` is Fitted.chosen of a fit under these."""
        ...

    def candidate(self, chosen: dict[str, float | str]) -> Block:
        """The block with the knobs that were chosen from."""
        ...


def method_names() -> list[str]:
    """Every method: the files of this folder."""
    return sorted(file.stem for file in METHODS.glob("[a-z]*.py"))


def method_file(name: str) -> Path:
    return METHODS / f"{name}.py"


def load_method(name: str) -> MethodModule:
    """The module of a method of `method_names`. Raises UserError where it is not whole."""
    module = cast(MethodModule, importlib.import_module(f"training.methods.{name}"))
    for part in MethodModule.__annotations__:
        if not hasattr(module, part):
            raise UserError(f"training/methods/{name}.py: has no {part}; training/methods/__init__.py says what it is")
    for constant in ("READS", "ALSO"):
        for named in sorted(getattr(module, constant, frozenset())):
            try:
                kind_of(named)
            except UserError as error:
                raise UserError(f"training/methods/{name}.py: {constant}: {error}") from None
    return module


def reads_of(name: str, settings: Block) -> frozenset[str]:
    """The parts of the cache that a method reads under these settings."""
    module: Any = load_method(name)
    found: frozenset[str] = module.reads(settings) if hasattr(module, "reads") else module.READS
    return found


def methods_of(name: str, settings: Block) -> tuple[str, ...]:
    """The method, and the probe that it fits itself (`with_probe`), where it does."""
    with_probe = getattr(settings, "with_probe", None)
    return (name,) if with_probe is None else (name, with_probe.method)


def borrows_others(name: str) -> bool:
    """Whether a method learns from images of other classes, where a study lends it some."""
    found: bool = getattr(load_method(name), "BORROWS", False)
    return found


def also_reads_of(name: str, settings: Block) -> frozenset[str]:
    """The parts that a method reads of other encoders under these settings; none where it takes one encoder alone."""
    module: Any = load_method(name)
    found: frozenset[str] = (
        module.also_reads(settings) if hasattr(module, "also_reads") else getattr(module, "ALSO", frozenset())
    )
    return found


def read_settings(path: str, key: str, method: str, given: dict[str, Any]) -> Block:
    """A method's settings as they stand under `key`, checked. Raises UserError naming file and key."""
    known = method_names()
    if method not in known:
        close = difflib.get_close_matches(method, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(known)}"
        raise UserError(f"{path}: {key}.method: there is no training/methods/{method}.py; {hint}")
    return read_block(path, f"{key}.settings", given, load_method(method).Settings)


def check_texts(path: str, key: str, params: Params, method: str, settings: Block, encoder: str) -> None:
    """Raise UserError where a method reads texts, and the encoder that stands under `key` is a tower, without any."""
    texts = sorted(name for name in reads_of(method, settings) if kind_of(name).of_text)
    if texts and encoder in params.towers:
        known = ", ".join(params.encoders)
        what = f"{encoder!r} is a tower, without texts, and {method} reads {', '.join(texts)}"
        raise UserError(f"{path}: {key}: {what}; choose one of `encoders`: {known}, or another method")


def check_also(path: str, key: str, method: str, settings: Block, also: Sequence[str]) -> None:
    """Raise UserError where other encoders stand under `key`, and the method, under its settings, takes one alone."""
    if also and not hasattr(load_method(method), "ALSO"):
        raise UserError(f"{path}: {key}: {method} reads one encoder only; choose a method that has ALSO")
    if also and not also_reads_of(method, settings):
        raise UserError(f"{path}: {key}: {method} reads nothing of other encoders under its settings; remove it")


def grid(settings: Block) -> dict[str, list[float]]:
    """The knobs that hold a list of numbers: the values val chooses from."""
    return {
        name: value
        for name, value in settings
        if isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    }


def search_points(settings: Block) -> int:
    """How many settings val chooses among; no more than BUDGET, so that no method wins by a longer search."""
    if isinstance(settings, OwnPoints):
        return len(settings.points())
    return math.prod(len(values) for values in grid(settings).values())


def single_points(settings: Block) -> list[Block]:
    """Every point of the grid as settings of its own, with one value a knob."""
    if isinstance(settings, OwnPoints):
        return settings.points()
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
    y = cache.y[cache.images("val")]
    return search_judged(cache, settings, lambda **point: assess(logits(**point), y))


def search_judged(
    cache: Cache, settings: Block, judged: Callable[..., tuple[float, float]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """`search` by `judged(**point)`: accuracy and log loss on the val images."""
    knobs = grid(settings)
    require_val(len(cache.images("val")), search_points(settings), ", ".join(knobs))
    best: tuple[tuple[float, float], dict[str, float]] | None = None
    history: list[dict[str, float]] = []
    for step, values in enumerate(itertools.product(*knobs.values()), start=1):
        point = dict(zip(knobs, values, strict=True))
        accuracy, log_loss = judged(**point)
        history.append({"epoch": step, **point, "val_loss": log_loss, "val_accuracy": accuracy})
        if best is None or (accuracy, -log_loss) > best[0]:
            best = (accuracy, -log_loss), point
    assert best is not None
    return best[1], history
