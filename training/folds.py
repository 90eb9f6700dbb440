"""Cross-fitting: every development image (train and val) is judged once, by a fit that it had no part in.

Development images are dealt to `folds` outer folds by sha256 of their group, or of the image itself where the index
names none. So groups stay whole, and an image more moves no other image. A class's groups spread over the folds by a
binomial law, which is as even as that allows. Of fold k the images outside it train. One further split of these
chooses settings and epochs: the groups that come first by another hash, until one image in INNER is among them, are
`choose`, the rest `train`. Then all of them train under the settings that were chosen (`refit`, `settle`), and the
images of the fold, `held_out`, are judged.

Test images are `unused`: they stay out.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from fieldmark.command import UserError
from fieldmark.params import Block
from fieldmark.store import sha256
from training.data import Cache
from training.methods import OwnPoints, grid

HELD_OUT = "held_out"
INNER = 5  # one in so many of a fold's training images chooses


def deal(unit: str, hands: int) -> int:
    """Which of 0 .. hands-1 a name falls to, whatever other names there are."""
    return int(sha256(unit)[:8], 16) % hands


def split_fold(cache: Cache, folds: int, number: int) -> Cache:
    """The cache with the splits of one fold. Raises UserError where a part of it is left without an image."""
    development = np.isin(cache.split, ("train", "choose", "val"))
    held = np.array([deal(f"fold {group}", folds) == number for group in cache.groups], dtype=bool)
    split = np.where(development, np.where(held, HELD_OUT, "train"), "unused")
    sizes = Counter(np.array(cache.groups)[split == "train"].tolist())
    left, choose = sizes.total() / INNER, set[str]()
    for group in sorted(sizes, key=lambda group: sha256(f"inner {number} {group}")):
        if left > 0:
            choose.add(group)
            left -= sizes[group]
    split = np.where((split == "train") & np.isin(cache.groups, sorted(choose)), "choose", split)
    for part in ("train", "choose", HELD_OUT):
        if not (split == part).any():
            count = len({group for group, within in zip(cache.groups, development, strict=True) if within})
            raise UserError(
                f"regime folds-{folds}: fold {number} has no {part} image: there are {count} groups or images to deal;"
                " it takes more of them, or fewer folds"
            )
    return replace(cache, split=split)


def refit(cache: Cache) -> Cache:
    """A fold's cache where those that chose train too: nothing is left to choose."""
    return replace(cache, split=np.where(cache.split == "choose", "train", cache.split))


def settle(settings: Block, chosen: dict[str, float | str]) -> Block:
    """The settings as val chose them: one value for each knob, and training that stops at the epoch that was best.

    `chosen` is what a fit under `settings` says of itself. The schedule stays that of the search: it is stopped, not
    made shorter. Raises UserError where `chosen` lacks a knob that had several values.
    """
    if isinstance(settings, OwnPoints):
        return settings.settle(chosen)
    several = [knob for knob, values in grid(settings).items() if len(values) > 1]
    if missing := [knob for knob in several if knob not in chosen]:
        raise UserError(
            f"{type(settings).__module__}: fit does not say which {missing[0]} val chose; put it into Fitted.chosen"
        )
    stops = {"stop": int(chosen["epoch"])} if "stop" in type(settings).model_fields else {}
    starts = {"start_l2": chosen["start_l2"]} if "start_l2" in chosen else {}
    probe: Any = getattr(settings, "with_probe", None)
    probes = {} if probe is None else {"with_probe": probe.settle(chosen)}
    return settings.model_copy(update={knob: [chosen[knob]] for knob in several} | stops | starts | probes)
