"""First looks: methods that say where a picture deserves more pixels, planned beside the runs and checked like them.

A first look is a block of `train.first_looks`: a method that has `maps_of`, an encoder, settings. It is fitted as a run
is, on all training images and the half of val that chooses, and asked for maps of every image (training/first_look.py);
a stage resamples the pictures by them and embeds what comes of it (stages/look_again.py), and runs read that as
again/NAME. So a run that reads it knows, through the first look, the labels of all training images and of that half,
whatever its own regime hides: it stands under the regime `full` alone.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fieldmark.command import UserError
from fieldmark.params import Block, FirstLook, Params
from training.controls import Control
from training.data import INDEX
from training.data.again import is_again
from training.inputs import ROOT, Reading, code_of, reading_of
from training.methods import check_texts, load_method, method_names, read_settings
from training.regimes import Full, RegimeBlock


@dataclass(frozen=True)
class PlannedLook:
    """A first look of train.first_looks, checked."""

    name: str
    method: str
    settings: Block
    reading: Reading

    def describe(self) -> dict[str, Any]:
        """What its maps follow from, the seed and what it reads apart."""
        return {"method": self.method, "encoder": self.reading.encoder, "settings": self.settings.model_dump()}

    @property
    def code(self) -> dict[str, str]:
        """The sha256 of every module that makes its maps."""
        return code_of(ROOT / "training/first_look.py", self.reading.methods, self.reading.needs, Control())


def plan_look(path: str, params: Params, name: str) -> PlannedLook:
    """A first look, checked as far as no file has to be read; `path` is the parameters' file, for messages.

    Raises UserError naming file and key.
    """
    key, looks = f"train.first_looks.{name}", params.train.first_looks
    if name not in looks:
        known = ", ".join(looks) or "none"
        raise UserError(f"{path}: train.first_looks: has no {name}; choose one of: {known}, or add it")
    given = looks[name]
    settings = read_settings(path, key, given.method, given.settings)
    if not hasattr(load_method(given.method), "maps_of"):
        able = ", ".join(method for method in method_names() if hasattr(load_method(method), "maps_of"))
        raise UserError(f"{path}: {key}.method: {given.method} says nowhere to look again; choose one of: {able}")
    check_texts(path, f"{key}.encoder", params, given.method, settings, given.encoder)
    reading = reading_of(given.method, settings, given.encoder, (), Control(), Full())
    if again := sorted(filter(is_again, reading.reads)):
        raise UserError(f"{path}: {key}.settings: reads {again[0]}, and no first look reads a second one; take it out")
    # What DVC makes before it: plan_first_looks depends on no more.
    if later := sorted(file for file in reading.files if file not in INDEX and not file.startswith("embed/")):
        what = f"{given.method} reads {later[0]}, and first looks are made of data/index and data/embed alone"
        raise UserError(f"{path}: {key}.method: {what}; take another method or other settings")
    return PlannedLook(name, given.method, settings, reading)


def check_looks(
    path: str, key: str, looks: dict[str, FirstLook], reading: Reading, regime: RegimeBlock
) -> None:
    """Raise UserError where a run that stands under `key` cannot have the second looks that it reads."""

    def refuse(where: str, words: Collection[str], why: str) -> None:
        raise UserError(f"{path}: {key}.{where}: reads {', '.join(sorted(words))}, {why}")

    words = set(filter(is_again, reading.reads))
    if words and not isinstance(regime, Full):
        why = (
            f"whose first look was trained on the labels of all training images, those that the regime {regime.label}"
            " hides among them; take it out, or compare under regime full"
        )
        refuse("settings", words, why)
    for word in words:
        name = word.partition("/")[2]
        if name not in looks:
            known = ", ".join(looks) or "none is there"
            refuse("settings", [word], f"which is no name under train.first_looks ({known}); add it there")
        if looks[name].encoder != reading.encoder:
            why = f"which {looks[name].encoder} looks at, and not {reading.encoder}; take that encoder"
            refuse("encoder", [word], why)
    if also := set(filter(is_again, reading.also_reads)):
        refuse("also", also, "which other encoders have not; leave `also` out, or take it out of the settings")
