"""Where a method with a global stream starts: at the tuned linear probe itself, its rival, or beside another one."""

import functools
from dataclasses import dataclass, field, replace
from typing import Self, cast

from torch import nn

from training.data import Cache
from training.layers.blocks import Standardise, silent
from training.layers.logistic import L2_WITHOUT_VAL, training_globals
from training.layers.states import State, within
from training.methods import linear_probe
from training.offset import Offset, Rival, WithProbe, fit_rival


@dataclass(frozen=True)
class StartingPoint:
    """What a method with a global stream starts from, equal for all of them."""

    standardise_global: Standardise
    probe: nn.Linear  # (D -> C), on standardised global vectors: where the global stream starts
    offset: Offset | None = None  # what the streams are added to; the global one is silent then
    rival: Rival | None = None  # whose logits those are; a model that is made from its state alone has none
    chosen: dict[str, float | str] = field(default_factory=dict)  # of the rival that it starts as, for Fitted.chosen

    @classmethod
    def from_state(cls, state: State, with_probe: WithProbe | None, classes: int) -> Self:
        """From that of a method's model, whose global stream is silent until its state is loaded."""
        standardise = Standardise.from_state(within(state, "standardise_global"))
        offset = None if with_probe is None else Offset.from_state(within(state, "offset"), with_probe, classes)
        return cls(standardise, silent(len(standardise.mean), classes), offset)


@functools.lru_cache(maxsize=2)  # the seeds of a run share it, and the variants of a fold's two fits
def starting_point(cache: Cache, l2: float | None = None, with_probe: WithProbe | None = None) -> StartingPoint:
    """The fit of linear_probe over all views, by its defaults; or that of `with_probe`, under a silent stream.

    With `l2` it is the probe of that strength, and val has no say.
    """
    if with_probe is not None:
        vectors, _ = training_globals(cache)
        rival = fit_rival(cache, with_probe)
        silence = silent(vectors.shape[1], len(cache.classes))
        return StartingPoint(Standardise(vectors), silence, rival.offset(), rival, rival.chosen)
    if l2 is None and not len(cache.images("val")):
        l2 = L2_WITHOUT_VAL
    settings = linear_probe.Settings() if l2 is None else linear_probe.Settings(l2=[l2])
    fitted = linear_probe.fit(replace(cache, also=()), settings, 0)  # the global stream is of the run's own encoder
    probe = cast(linear_probe.Probe, fitted.model)
    # Of one block of features, the global vector, the weight is 1.
    of_global, linear = cast(Standardise, probe.features.standardise[0]), cast(nn.Linear, probe.layer)
    return StartingPoint(of_global, linear, chosen={"start_l2": float(fitted.chosen["l2"])})
