"""Where a method with a global stream starts: at the tuned linear probe itself, its rival."""

import functools
import math
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from training.data import Cache
from training.layers.blocks import Standardise
from training.layers.logistic import L2_WITHOUT_VAL
from training.loop import EVALUATION_BATCH
from training.methods import linear_probe


@dataclass(frozen=True)
class StartingPoint:
    """What a method with a global stream starts from, equal for all of them."""

    standardise_global: Standardise
    standardise_nodes: Standardise
    probe: nn.Linear  # (D -> C), on standardised global vectors: what the method linear_probe fits by its defaults
    l2: float  # the probe's strength


@functools.lru_cache(maxsize=2)  # the seeds of a run share it, and the variants of a fold's two fits
def starting_point(cache: Cache, l2: float | None = None) -> StartingPoint:
    """The fit of linear_probe, over all views, and the standardisation of nodes by training images in view 0.

    With `l2` it is the probe of that strength, and val has no say.
    """
    train = cache.images("train")
    if l2 is None and not len(cache.images("val")):
        l2 = L2_WITHOUT_VAL
    settings = linear_probe.Settings() if l2 is None else linear_probe.Settings(l2=[l2])
    fitted = linear_probe.fit(replace(cache, also=()), settings, 0)  # of this encoder's vector alone
    probe = cast(linear_probe.Probe, fitted.model)
    sample = cache.batch(train[:: math.ceil(len(train) / EVALUATION_BATCH)])
    nodes = Standardise(sample.nodes[sample.mask])
    # Of one block of features, the global vector, the weight is 1.
    of_global, linear = cast(Standardise, probe.features.standardise[0]), cast(nn.Linear, probe.layer)
    return StartingPoint(of_global, nodes, linear, float(fitted.chosen["l2"]))
