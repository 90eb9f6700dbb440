"""The rival as an offset: what a probe says of an image, to which a method with gradients adds its own streams.

    logits = z + own streams, which begin at zero: at epoch 0 the method is its rival
    z      = (the probe's logits) / T;   of a training image in training by a fit that it had no part in, else by the
             fit of all training images

A probe with more dimensions than images explains every image that it was fitted on: with its own answers to them as
offset, nothing is left to learn. So in training an image's logits are out of fold. Its FOLDS fits take the training
images less one fold, groups whole, and the settings that the full fit chose; val has no part in them. The method fits
the probe itself, from parts of the cache that it declares, and reads no other run.

T makes the log loss of the out-of-fold logits least, over all views. It serves the full fit too: what that says of an
image it never saw is drawn as an out-of-fold answer is, by a fit of a fourth more images, and the streams have learned
what to add on this scale. A T of the full fit's own would have to be fitted on images that it explains.
"""

import copy
import hashlib
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch import Tensor, nn

from fieldmark.params import Block
from fieldmark.store import sha256
from training.data import Batch, Cache, Part, feature_words
from training.data.again import is_again
from training.data.asked import is_asked
from training.data.nodes import Globals
from training.folds import HELD_OUT, settle
from training.layers.logistic import as_probabilities
from training.layers.states import State, within
from training.links import LinkSettings
from training.loop import EVALUATION_BATCH, predict
from training.methods import NotPossible, also_reads_of, borrows_others, load_method, method_names, reads_of
from training.metrics import fit_temperature

FOLDS = 5
COLDEST = 0.01  # T at least: where no out-of-fold image is mistaken, the log loss falls with T for ever
REMEMBERED = 2**28  # bytes of rivals, 256 MiB
PREFIX = "with_probe."  # of what the probe's full fit chose, in Fitted.chosen


def is_probe(method: str) -> bool:
    """Whether a method is of the probe family: fitted whole, on vectors that `features` names and nothing else."""
    settings = load_method(method).Settings
    takes = "features" in settings.model_fields and not issubclass(settings, LinkSettings)
    return takes and feature_words() >= load_method(method).READS and not borrows_others(method)


def reads_of_probe(method: str, settings: dict[str, Any], why: str) -> frozenset[str]:
    """What a probe reads. Raises ValueError, which says `why`, where that is a second look."""
    reads = reads_of(method, load_method(method).Settings.model_validate(settings))
    if again := sorted(filter(is_again, reads)):
        raise ValueError(f"{again[0]} cannot be among them: its first look was fitted to all of these, {why}")
    return reads


class WithProbe(Block):
    """A probe, and its settings as a run of its own would have them."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _is_a_probe(cls, method: str) -> str:
        if method not in method_names() or not is_probe(method):
            raise ValueError(f"input should be a probe: {', '.join(filter(is_probe, method_names()))}")
        return method

    @field_validator("settings")
    @classmethod
    def _are_its_settings(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "method" in info.data:
            why = "and a probe beside a method has to tell training images that it was not fitted to"
            reads = reads_of_probe(info.data["method"], settings, why)
            if said := sorted(word for word in reads if word == "descriptions" or is_asked(word)):
                raise ValueError(f"{said[0]} cannot be among them: a probe beside a method reads what an image shows")
        return settings

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def block(self) -> Block:
        """The probe's settings with their defaults."""
        return load_method(self.method).Settings.model_validate(self.settings)

    def settle(self, chosen: dict[str, float | str]) -> "WithProbe":
        """The probe as its full fit chose it; `chosen` is what the method around it says of itself."""
        own = {name.removeprefix(PREFIX): value for name, value in chosen.items() if name.startswith(PREFIX)}
        return self.model_copy(update={"settings": settle(self.block, own).model_dump()})


def as_probe(value: Any) -> Any:
    """`true` is the rival itself: the best of the probe family, by its defaults; `false` is none."""
    return {True: {"method": "probes"}, False: None}[value] if isinstance(value, bool) else value


# What READS and ALSO of a method name for the probe beside it: what is seen of an image, and not what was said of it.
PROBE_WORDS = feature_words() - {"again", "asked", "descriptions", "links"}
# The knob of a method that can stand beside a probe.
ProbeBeside = Annotated[WithProbe | None, BeforeValidator(as_probe)]


def with_reads(own: frozenset[str], with_probe: WithProbe | None) -> frozenset[str]:
    """The parts `own`, and those that the probe reads under its settings."""
    reads = own if with_probe is None else own | reads_of(with_probe.method, with_probe.block)
    return reads - {"globals"} if "nodes" in reads else reads  # node 0 is the global vector


def probe_also_reads(with_probe: WithProbe | None) -> frozenset[str]:
    """The parts that the probe reads of other encoders."""
    return frozenset() if with_probe is None else also_reads_of(with_probe.method, with_probe.block)


def reduce(cache: Cache, reads: frozenset[str], also_reads: frozenset[str]) -> Cache:
    """The cache without what the probe alone reads: no step of training looks at it."""
    if "globals" in reads and not cache.has(Globals):
        reads |= {"nodes"}  # node 0 is the global vector
    return replace(cache.only(reads), also=tuple(parts.only(also_reads) for parts in cache.also))


@dataclass(frozen=True)
class OutOfFold(Part):
    """A part that a method adds to its cache: in training, the offset of training images."""

    out_of_fold: Tensor  # (n V, C) float32; nan for images that do not train


@dataclass(frozen=True)
class FullFit(Part):
    """A part that a method adds to its cache: at evaluation, the offset of each image, so that none is found twice."""

    by_image = True

    full_fit: Tensor  # (n, C) float32, of view 0


class Offset(nn.Module):
    """z (B, C) of a batch. In training mode the batch has to be of `Rival.told`; no gradient reaches the probe."""

    temperature: Tensor

    def __init__(self, probe: nn.Module, temperature: float) -> None:
        """`probe` is copied."""
        super().__init__()
        self.probe = copy.deepcopy(probe).requires_grad_(False)
        self.register_buffer("temperature", torch.tensor(temperature))

    @classmethod
    def from_state(cls, state: State, with_probe: WithProbe, classes: int) -> Self:
        probe = load_method(with_probe.method).build(within(state, "probe"), with_probe.block, classes)
        return cls(probe, float(state["temperature"]))

    def forward(self, batch: Batch) -> Tensor:
        if self.training:
            return batch.out_of_fold
        if batch.has("full_fit"):
            return batch.full_fit
        z: Tensor = self.probe(batch).logits.float() / self.temperature
        return z


@dataclass(frozen=True)
class Rival:
    """A probe as it was fitted on a cache."""

    probe: nn.Module
    temperature: float
    chosen: dict[str, float | str]  # by the probe's full fit, and the temperature, under PREFIX
    trains: Tensor  # (n,) bool: images with an answer out of fold
    out_of_fold: Tensor  # (n V, C) float32, on the temperature

    def offset(self) -> Offset:
        return Offset(self.probe, self.temperature)

    def told(self, cache: Cache) -> Cache:
        """The cache as training sees it: with z, and without the training images that have no answer out of fold."""
        full = predict(self.probe, cache, torch.arange(len(cache.paths))) / self.temperature
        split = np.where((cache.split == "train") & ~self.trains.numpy(), "unused", cache.split)
        return replace(cache, split=split).with_part(OutOfFold(self.out_of_fold)).with_part(FullFit(full))


class Seen(NamedTuple):
    """All that the fit of a rival depends on."""

    with_probe: WithProbe
    labels: str  # sha256 of who trains, in which groups, what training is told, and what val is
    names: tuple[tuple[Any, ...], ...]  # of the tensors, with their parts
    tensors: tuple[Tensor, ...]  # of the parts that the probe reads

    @classmethod
    def of(cls, cache: Cache, with_probe: WithProbe) -> Self:
        read = reduce(cache, with_reads(frozenset(), with_probe), probe_also_reads(with_probe))
        found = {
            (place, kind, name): tensor
            for place, parts in enumerate((read.parts, *read.also))
            for kind, part in parts.by_kind.items()
            for name, tensor in part.tensors().items()
        }
        digest = hashlib.sha256(repr((cache.views, cache.classes, cache.groups, str(cache.device))).encode())
        for array in (cache.split, cache.y.cpu().numpy(), cache.target.cpu().numpy()):
            digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return cls(with_probe, digest.hexdigest(), tuple(found), tuple(found.values()))


class Remembered:
    """A rival, and what it was fitted on; it keeps no tensor of a cache alive."""

    def __init__(self, seen: Seen, rival: Rival) -> None:
        self.key, self.tensors = seen[:3], [weakref.ref(tensor) for tensor in seen.tensors]
        self.rival = rival
        self.size = rival.out_of_fold.nbytes + sum(tensor.nbytes for tensor in rival.probe.state_dict().values())

    def can_return(self) -> bool:
        """Whether all that it was fitted on is still held by somebody."""
        return all(ref() is not None for ref in self.tensors)

    def is_of(self, seen: Seen) -> bool:
        same = (ref() is tensor for ref, tensor in zip(self.tensors, seen.tensors, strict=True))
        return self.key == seen[:3] and all(same)


# The last one first. A study meets a fold again under each control and each method.
remembered: list[Remembered] = []


def fit_rival(cache: Cache, with_probe: WithProbe) -> Rival:
    """A probe as `fit_both` fits it, or as it did in this process, where all is the same that it reads.

    Runs share it that differ in their seed, in the method around it, or in a part that no probe reads: links under a
    control. The last two are remembered, and more of them as long as they take REMEMBERED bytes together.
    """
    seen = Seen.of(cache, with_probe)
    known = next((each for each in remembered if each.is_of(seen)), None)
    if known is None:
        known = Remembered(seen, fit_both(cache, with_probe))
    else:
        remembered.remove(known)
    remembered[:] = [known, *(each for each in remembered if each.can_return())]
    while len(remembered) > 2 and sum(each.size for each in remembered) > REMEMBERED:
        remembered.pop()
    return known.rival


def fit_both(cache: Cache, with_probe: WithProbe) -> Rival:
    """Fit a probe on all training images, and out of fold.

    An image whose class no other fold has cannot be told rightly out of its fold: it teaches the full fit alone.
    Raises NotPossible where that leaves no image.
    """
    train, fold, label = cache.images("train"), deal_training(cache), training_labels(cache)
    by_fold = torch.zeros(len(cache.classes), FOLDS).index_put((label, fold), torch.ones(()), accumulate=True)
    elsewhere = by_fold.sum(1)[label] > by_fold[label, fold]
    if not elsewhere.any():
        raise NotPossible(
            "with_probe: no class has training images in two groups, so that none can be told by a fit without it;"
            " take more images a class, or with_probe: null"
        )
    full = load_method(with_probe.method).fit(cache, with_probe.block, 0)
    said = out_of_fold(cache, with_probe.method, settle(with_probe.block, full.chosen), fold)
    rows = (train[elsewhere][:, None] * cache.views + torch.arange(cache.views)).flatten()
    y = label[elsewhere].repeat_interleave(cache.views).numpy()
    temperature = max(fit_temperature(said[rows].numpy(), y), COLDEST)
    trains = torch.zeros(len(cache.paths), dtype=torch.bool)
    trains[train[elsewhere]] = True
    chosen = {f"{PREFIX}{name}": value for name, value in {**full.chosen, "temperature": temperature}.items()}
    return Rival(full.model, temperature, chosen, trains, said / temperature)


def training_labels(cache: Cache) -> Tensor:
    """(n_train,): the likeliest class of what training is told of each image, on the CPU as positions are."""
    return as_probabilities(cache.target[cache.images("train")], len(cache.classes)).argmax(1).cpu()


def deal_training(cache: Cache) -> Tensor:
    """(n_train,): the fold of each training image.

    The groups of each class are dealt in turn, in the order of their sha256: so every fold lacks a like share of every
    class. A group of several classes is dealt once, with the class of its first image.
    """
    train, label = cache.images("train").tolist(), training_labels(cache).tolist()
    dealt, fold = Counter[int](), dict[str, int]()
    for place in sorted(range(len(train)), key=lambda place: sha256(f"offset {cache.groups[train[place]]}")):
        group = cache.groups[train[place]]
        if group not in fold:
            fold[group] = dealt[label[place]] % FOLDS
            dealt[label[place]] += 1
    return torch.tensor([fold[cache.groups[image]] for image in train])


def out_of_fold(cache: Cache, method: str, settings: Block, fold: Tensor) -> Tensor:
    """(n V, C) float32: the logits of each training image, in each view, by a fit without its fold; nan for others.

    `fold` (n_train,). Val takes no part: `settings` leave nothing to choose.
    """
    train, said = cache.images("train"), torch.full((len(cache.split) * cache.views, len(cache.classes)), torch.nan)
    for number in fold.unique():
        held = train[fold == number]
        is_held = np.isin(np.arange(len(cache.split)), held.numpy())
        split = np.select([is_held, cache.split == "val"], [HELD_OUT, "unused"], cache.split)
        model = load_method(method).fit(replace(cache, split=split), settings, 0).model.eval()
        with torch.no_grad():
            for view in range(cache.views):
                for chunk in held.split(EVALUATION_BATCH):
                    batch = cache.batch(chunk, torch.full_like(chunk, view))
                    said[chunk * cache.views + view] = model(batch).logits.float().cpu()
    return said
