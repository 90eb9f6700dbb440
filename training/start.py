"""Where a method with a global stream starts: at the tuned linear probe itself, its rival."""

import functools
import math
from dataclasses import dataclass
from typing import cast

from torch import nn

from training.data import Cache
from training.layers.blocks import Standardise
from training.loop import EVALUATION_BATCH
from training.methods import linear_probe

# The probe's strength where no val chooses it: on cub100's development classes, 1 and 4 shots, within .004 of the best
# of 100 .. 1e-4.
L2_WITHOUT_VAL = 0.01


@dataclass(frozen=True)
class StartingPoint:
    """What a method with a global stream starts from, equal for all of them."""

    standardise_global: Standardise
    standardise_nodes: Standardise
    probe: nn.Linear  # (D -> C), on standardised global vectors: what the method linear_probe fits by its defaults


@functools.lru_cache(maxsize=1)  # the seeds of a run share it
def starting_point(cache: Cache) -> StartingPoint:
    """The fit of linear_probe, over all views, and the standardisation of nodes by training images in view 0."""
    train, has_val = cache.images("train"), len(cache.images("val")) > 0
    settings = linear_probe.Settings() if has_val else linear_probe.Settings(l2=[L2_WITHOUT_VAL])
    fitted = cast(linear_probe.LinearProbe, linear_probe.fit(cache, settings, 0).model)
    sample = cache.batch(train[:: math.ceil(len(train) / EVALUATION_BATCH)])
    return StartingPoint(fitted.standardise, Standardise(sample.nodes[sample.mask]), fitted.linear)
