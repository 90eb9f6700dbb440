"""The vectors of a whole image that probes put side by side, by the names in their `features`.

A part may bring vectors of its own (`Part.features`: `global`, `nodes`, `descriptions`). `again/NAME` are the two
vectors of a second look, `asked/NAME/FIELD` is the mean of what a question was answered in a field. Every other name is
a NAME of moments.
"""

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from training.data.again import WORD as AGAIN
from training.data.again import is_again
from training.data.asked import WORD as ASKED
from training.data.asked import asked_word, is_asked, mean_said
from training.data.moments import WORD, read_as
from training.data.part import NAME, Part, part_kinds

if TYPE_CHECKING:
    from training.data.cache import Fields


@functools.cache
def feature_kinds() -> dict[str, type[Part]]:
    """By the name of each vector that a part brings, the part; NAMEs of moments, second looks and questions apart."""
    return {name: kind for kind in part_kinds().values() for name in kind.features}


def feature_words() -> frozenset[str]:
    """What READS names so that any feature may be read."""
    return frozenset({WORD, AGAIN, ASKED}).union(*(kind.provides for kind in feature_kinds().values()))


def word_behind(feature: str) -> str:
    """What READS has to name so that a feature can be read. Raises ValueError where it cannot be the NAME of one."""
    if feature in feature_kinds():
        [word] = feature_kinds()[feature].provides
        return word
    if is_asked(feature):
        return asked_word(feature)
    again, rest = is_again(feature), feature.removeprefix(f"{AGAIN}/")
    if not NAME.fullmatch(rest if again else feature):
        known = ", ".join(sorted(feature_kinds()))
        keys = f"a key under moments.ENCODER in params.yaml, {AGAIN}/NAME with a key under train.first_looks, or"
        keys += f" {ASKED}/NAME/FIELD with a key under ask"
        raise ValueError(f"input should be one of {known}, {keys}")
    return feature if again else read_as(feature)


def feature_blocks(feature: str, fields: "Fields") -> tuple[Tensor, ...]:
    """A feature of a batch, or of another encoder in it: blocks (B, F) float32.

    Raises UserError where the method's READS does not name what is behind it (`word_behind`).
    """
    if feature in feature_kinds():
        return feature_kinds()[feature].features[feature](fields)
    if is_again(feature):
        return fields.of(feature).unbind(1)
    if is_asked(feature):
        return (mean_said(feature, fields),)
    return (fields.moments[feature],)
