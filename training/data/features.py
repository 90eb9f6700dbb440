"""The vectors of a whole image that probes put side by side, by the names in their `features`.

A part may bring vectors of its own (`Part.features`: `global`, `nodes`, `descriptions`). `again/NAME` are the two
vectors of a second look, `asked/NAME/FIELD` is the mean of what a question was answered in a field. `inherited/NAME` is
what was said of an image, or of those that links/NAME link it to; it follows from training images too, and so
layers/inherited.py makes it. Every other name is a NAME of moments.
"""

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from training.data.again import WORD as AGAIN
from training.data.again import is_again
from training.data.asked import WORD as ASKED
from training.data.asked import asked_word, is_asked, mean_said
from training.data.links import WORD as LINKS
from training.data.moments import WORD, read_as
from training.data.part import NAME, Part, part_kinds

if TYPE_CHECKING:
    from training.data.cache import Fields

INHERITED = "inherited"
DESCRIPTIONS = "descriptions"


@functools.cache
def feature_kinds() -> dict[str, type[Part]]:
    """By the name of each vector that a part brings, the part; NAMEs of moments, second looks and questions apart."""
    return {name: kind for kind in part_kinds().values() for name in kind.features}


def feature_words() -> frozenset[str]:
    """What READS names so that any feature may be read."""
    return frozenset({WORD, AGAIN, ASKED, LINKS}).union(*(kind.provides for kind in feature_kinds().values()))


def words_behind(feature: str) -> frozenset[str]:
    """What READS has to name so that a feature can be read. Raises ValueError where it cannot be the NAME of one."""
    if feature in feature_kinds():
        return feature_kinds()[feature].provides
    if is_asked(feature):
        return frozenset({asked_word(feature)})
    inherited = inherited_name(feature)
    again, rest = is_again(feature), feature.removeprefix(f"{AGAIN}/")
    if not NAME.fullmatch(rest if again else feature if inherited is None else inherited):
        known = ", ".join(sorted(feature_kinds()))
        keys = f"a key under moments.ENCODER in params.yaml, {AGAIN}/NAME with a key under train.first_looks,"
        keys += f" {ASKED}/NAME/FIELD with a key under ask, or {INHERITED}/NAME with a key under links"
        raise ValueError(f"input should be one of {known}, {keys}")
    if inherited is not None:
        return frozenset({DESCRIPTIONS, f"{LINKS}/{inherited}"})
    return frozenset({feature if again else read_as(feature)})


def inherited_name(feature: str) -> str | None:
    """The NAME of the links by which a feature is handed on; None for another feature."""
    head, slash, name = feature.partition("/")
    return name if head == INHERITED and slash else None


def feature_blocks(feature: str, fields: "Fields") -> tuple[Tensor, ...]:
    """A feature of a batch, or of another encoder in it: blocks (B, F) float32.

    Raises UserError where the method's READS does not name what is behind it (`words_behind`).
    """
    if feature in feature_kinds():
        return feature_kinds()[feature].features[feature](fields)
    if is_again(feature):
        return fields.of(feature).unbind(1)
    if is_asked(feature):
        return (mean_said(feature, fields),)
    return (fields.moments[feature],)
