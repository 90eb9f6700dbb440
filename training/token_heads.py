"""What heads over raw tokens share: the layer that they read, how they begin, and a rival beside them.

Such a head is a system of the field over tokens that were computed once. Its last layers begin at zero (`silent`).
Alone, they answer. Beside a probe (`with_probe`) their logits are added to the probe's, as training/offset.py says, so
that at epoch 0 the head is the probe: "what does the system tell by itself" and "what does it add to the rival" are two
runs of one method.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Protocol, Self

from pydantic import Field
from torch import Tensor, nn

from training.data import Batch, Cache
from training.layers.states import State, within
from training.loop import Retell, Schedule, fit_epochs
from training.methods import Fitted
from training.offset import Offset, ProbeBeside, fit_rival, probe_also_reads, reduce, with_reads

Layer = Annotated[int, Field(ge=0)] | None


class HasLayer(Protocol):
    """Settings of a method that takes the tokens of one layer."""

    @property
    def layer(self) -> int | None: ...


class BesideSettings(Schedule):
    """The knobs of a method that answers alone or beside a probe, whatever it reads."""

    with_probe: ProbeBeside = None  # {method, settings}: the probe whose logits it adds to; true: probes; null: none


class HeadSettings(BesideSettings):
    """The knobs that heads over tokens share."""

    layer: Layer = None  # of `tokens.ENCODER`, by its number; null: the deepest stored


def tokens_word(settings: HasLayer) -> str:
    """What READS calls the tokens of that layer."""
    return "tokens" if settings.layer is None else f"tokens/{settings.layer}"


def head_reads(settings: BesideSettings, own: frozenset[str]) -> frozenset[str]:
    """`reads` of a head that itself reads the parts `own`."""
    return with_reads(own, settings.with_probe)


def own_layer(settings: HeadSettings) -> frozenset[str]:
    """What a head over one layer reads itself, and not by its probe."""
    return frozenset({tokens_word(settings)})


def layer_reads(settings: HeadSettings) -> frozenset[str]:
    """`reads` of every head over one layer."""
    return head_reads(settings, own_layer(settings))


def head_also_reads(settings: BesideSettings) -> frozenset[str]:
    """`also_reads` of every head: what its probe reads of other encoders."""
    return probe_also_reads(settings.with_probe)


class Beside(nn.Module):
    """What a head's logits are added to: z (B, C) of the rival, or nothing."""

    def __init__(self, offset: Offset | None) -> None:
        super().__init__()
        self.offset = offset

    @classmethod
    def from_state(cls, state: State, settings: BesideSettings, classes: int) -> Self:
        """From that of the module."""
        if settings.with_probe is None:
            return cls(None)
        return cls(Offset.from_state(within(state, "offset"), settings.with_probe, classes))

    def forward(self, batch: Batch, logits: Tensor) -> Tensor:
        """The logits (B, C) of a stream, and those of the rival."""
        logits = logits.float()
        return logits if self.offset is None else self.offset(batch) + logits


def fit_head(
    cache: Cache,
    settings: BesideSettings,
    seed: int,
    own_reads: frozenset[str],
    build: Callable[[Beside], nn.Module],
    weights: Mapping[str, float] | None = None,
    retell: Retell | None = None,
    own_also: frozenset[str] = frozenset(),
) -> Fitted:
    """Train a head, beside its rival where settings name one; `build` makes a fresh one and draws on the CPU.

    `own_reads` are the parts that it reads itself, and `own_also` those of other encoders; `weights` those of its
    losses; `retell` as in fit_epochs.
    """
    if settings.with_probe is None:
        told = reduce(cache, own_reads, own_also)
        return fit_epochs(lambda: build(Beside(None)), told, settings, seed, weights, retell)
    rival = fit_rival(cache, settings.with_probe)
    told = reduce(rival.told(cache), own_reads, own_also)
    fitted = fit_epochs(lambda: build(Beside(rival.offset())), told, settings, seed, weights, retell)
    return replace(fitted, chosen={**fitted.chosen, **rival.chosen})
