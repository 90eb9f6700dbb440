"""What training may see: few images, many of some classes, uncertain or wrong labels, some classes only.

A regime is a block of settings with a function from a cache to a cache (`apply`). It changes `split` (images that
training may not use become `unused`) and `target` (what training is told); vectors, labels and graphs are shared, and
the index is never touched. Everything drawn follows from `draw` and from paths and class ids, so that all methods share
a draw, and one image more moves no other. `Cache.y` stays the truth.

What val is: `long_tail`, `partial` and `noise` keep both halves of it (fieldmark/halves.py), with clean labels: their
figures say what a method reaches that was tuned on clean images. Who has wrong labels has them in val too: under
`noise` with `val: noisy` the half that chooses is told wrong classes as often as training is; so is the choice of a
seed or a run, and, in a study, the gate of the bank; the half that is reported keeps its own. `shots` has no val: k
images a class leave nothing to tune on, so its settings come from other classes (`restrict_classes`). `unseen` has val
images of the seen classes, and of development classes, which training does not see either.

`folds` judges train and val by cross-fitting (training/folds.py). Whatever a regime hides, a study hides from bank and
labels too (evaluation/other_labels.py); a single run under `train.regime` reads those on disk, which know
the truth.

`hide_test` makes the cache that a method's fit is given: it holds no label of an image that is evaluated, the truth of
no other where a regime tells another class, and the half of val that chooses is all its val.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.halves import halve
from fieldmark.params import Block, Fraction, read_block
from fieldmark.store import class_id_of, sha256
from training.data import Cache
from training.folds import split_fold
from training.layers.blocks import Standardise
from training.layers.logistic import fit_logistic

FOLDS = 5
# The cross-fitted probe need not be the best one: it only says which classes look alike. Val chooses among these.
PROBE_STRENGTHS = (1.0, 0.1, 0.01)
# A file that names classes, one a line (folder, class_id or given name), or a share of them, drawn.
Classes = Annotated[float, Field(gt=0, lt=1)] | str


class RegimeBlock(Block):
    """What every regime says of itself."""

    @property
    def draws(self) -> bool:
        """Whether another draw makes another cache."""
        return True

    @property
    def label(self) -> str:
        """Its name in files and tables."""
        raise NotImplementedError

    @property
    def by_vectors(self) -> bool:
        """Whether it looks at the global vectors."""
        return False

    def apply(self, cache: Cache, draw: int) -> Cache:
        """The cache as training sees it; `draw` (0, 1, ...) seeds it."""
        raise NotImplementedError


class Full(RegimeBlock):
    """Every training image with its own label."""

    kind: Literal["full"] = "full"

    @property
    def draws(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return "full"

    def apply(self, cache: Cache, draw: int) -> Cache:
        return cache


class Shots(RegimeBlock):
    """k images a class: the first k of its training images in the order of sha256(draw, path).

    So the images of 1-shot are among those of 2-shot. A class with fewer than k gives all it has. Val is empty.
    """

    kind: Literal["shots"] = "shots"
    shots: Literal[1, 2, 4, 8, 16]

    @property
    def label(self) -> str:
        return f"{self.shots}-shot"

    def apply(self, cache: Cache, draw: int) -> Cache:
        few = keep_first(cache, draw, dict.fromkeys(range(len(cache.classes)), self.shots))
        return replace(few, split=np.where(np.isin(few.split, ("choose", "val")), "unused", few.split))


class LongTail(RegimeBlock):
    """Many images of some classes and few of others; n is the largest class's number of training images.

    exponent: n_r = max(1, round(n r^-exponent)) images of the class of rank r = 1 .. C, a power law. The largest class
    has about C^exponent times the images of the smallest. imbalance: n_r = max(1, round(n imbalance^(-(r-1)/(C-1)))),
    which falls from n to n / imbalance by the same factor from class to class (Cui et al., CVPR 2019 [mem]); where that
    is under one image, the smallest classes have one. One of the two is given.

    Ranks are drawn; images within a class are taken as in `Shots`. A class with fewer gives all it has.
    """

    kind: Literal["long_tail"] = "long_tail"
    exponent: Annotated[float, Field(gt=0)] | None = Field(default=None, exclude_if=lambda value: value is None)
    imbalance: Annotated[float, Field(gt=1)] | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _has_one_profile(self) -> Self:
        if (self.exponent is None) == (self.imbalance is None):
            raise ValueError("give either exponent (a power law) or imbalance (the largest class over the smallest)")
        return self

    @property
    def label(self) -> str:
        return f"long-tail-{self.exponent:g}" if self.imbalance is None else f"imbalance-{self.imbalance:g}"

    def apply(self, cache: Cache, draw: int) -> Cache:
        return keep_first(cache, draw, tail_sizes(cache, self, draw))

    def share(self, rank: int, classes: int) -> float:
        """Of the largest class's images, what the class of rank 1 .. `classes` may keep."""
        if self.exponent is not None:
            return float(rank**-self.exponent)
        assert self.imbalance is not None
        return float(self.imbalance ** (-(rank - 1) / max(classes - 1, 1)))


class Partial(RegimeBlock):
    """Each training image has candidates, the true class among them, and its target is uniform over them.

    random: every wrong class c is a candidate with probability q. instance: with probability q p_c / max p, p from an
    image-only probe that was not fitted on this image, the maximum over wrong classes [design: over all classes, an
    image that the probe is sure of would hardly have a candidate]. For one draw, the candidates at a smaller q are
    among those at a larger.
    """

    kind: Literal["partial"] = "partial"
    wrong: Literal["random", "instance"]
    q: Fraction

    @property
    def label(self) -> str:
        return f"partial-{self.wrong}-{self.q:g}"

    @property
    def by_vectors(self) -> bool:
        return self.wrong == "instance"

    def apply(self, cache: Cache, draw: int) -> Cache:
        return replace(cache, target=candidate_targets(cache, self, draw))


class Noise(RegimeBlock):
    """round(share n) training images are told a wrong class; n is how many there are.

    symmetric: each other class with the same probability. confused: the class that theirs is most often taken for,
    argmax over c' of the mean p_c' over the class's training images, p from the probe of `Partial`. nearest: the class
    whose mean global vector, over training images with their own labels, has the largest cosine with that of theirs.
    Of these three the images told so are the first in the order of sha256(draw, path).

    instance: what the web gives, as far as clean data can show it: who is wrong depends on the image, not on its class
    alone. An image is told the class that it looks most like among the wrong ones, argmax of p, and which images are is
    drawn without replacement, each with a weight of that p. Score and class are those of Chen et al. (AAAI 2021 [mem]);
    there p is the mean over a network's epochs and the highest scores are taken, here p is cross-fitted and they are
    drawn [design]. p is of a linear probe on the vectors that the rivals read. Pictures of none of the classes, which
    the web gives too, are not among them.

    val: clean leaves val as it is; noisy tells the same share of its half that chooses a wrong class, by the same rule,
    with p the mean of the five probes.
    """

    kind: Literal["noise"] = "noise"
    wrong: Literal["symmetric", "confused", "nearest", "instance"]
    share: Fraction
    val: Literal["clean", "noisy"] = Field(default="clean", exclude_if=lambda value: value == "clean")

    @property
    def label(self) -> str:
        return f"noise-{self.wrong}-{self.share:g}" + ("-val" if self.val == "noisy" else "")

    @property
    def by_vectors(self) -> bool:
        return self.wrong != "symmetric"

    def apply(self, cache: Cache, draw: int) -> Cache:
        return replace(cache, target=noisy_targets(cache, self, draw))


class Unseen(RegimeBlock):
    """Train on the seen classes, test on the others by their texts. `label_spaces` says how to evaluate.

    Of the classes that are not seen, those of `development` are for choosing: their training and val images are val, in
    its two halves, beside those of the seen classes, and their test images are unused. A choice on seen classes alone
    would tell how well texts fit images that training saw; one on the classes that are reported would leak. The others'
    training and val images are unused.
    """

    kind: Literal["unseen"] = "unseen"
    seen: Classes
    development: Classes = 0.2  # of the classes that are not seen

    @property
    def draws(self) -> bool:
        """Every draw is another split of the classes, but where files name them all."""
        return not (isinstance(self.seen, str) and isinstance(self.development, str))

    @property
    def label(self) -> str:
        return f"unseen-{Path(self.seen).stem}" if isinstance(self.seen, str) else f"unseen-{self.seen:g}"

    def apply(self, cache: Cache, draw: int) -> Cache:
        """Raises UserError where a file names a class that is not there, or leaves none."""
        return replace(cache, split=unseen_split(cache, self, draw))


class Folds(RegimeBlock):
    """Cross-fitting over train and val (training/folds.py): the draw is the fold's number, test stays out."""

    kind: Literal["folds"] = "folds"
    folds: Annotated[int, Field(ge=2)] = 5

    @property
    def label(self) -> str:
        return f"folds-{self.folds}"

    def apply(self, cache: Cache, draw: int) -> Cache:
        return split_fold(cache, self.folds, draw)


Regime = Annotated[Full | Shots | LongTail | Partial | Noise | Unseen | Folds, Field(discriminator="kind")]


REGIMES: dict[str, type[RegimeBlock]] = {
    model.model_fields["kind"].default: model for model in get_args(get_args(Regime)[0])
}


def read_regime(path: str, key: str, given: Any) -> Regime:
    """A regime, given by its kind alone or as a block with its knobs. Raises UserError naming file and key."""
    given = {"kind": given} if isinstance(given, str) else given
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind not in REGIMES:
        raise UserError(f"{path}: {key}: names no regime; give a `kind`, one of: {', '.join(REGIMES)}")
    regime: Any = read_block(path, key, given, REGIMES[kind])
    return regime


def with_globals(reads: Collection[str]) -> frozenset[str]:
    """The parts to read where a probe on global vectors is asked beside a method that reads `reads`."""
    return frozenset(reads) if {"nodes", "globals"} & set(reads) else frozenset({*reads, "globals"})


def by_draw(draw: int) -> Callable[[str], str]:
    """The order of paths or class ids in a draw."""
    return lambda name: sha256(f"{draw} {name}")


def split_order(cache: Cache, split: str, draw: int) -> list[int]:
    """The images of a split in the order of a draw."""
    key = by_draw(draw)
    return sorted(cache.images(split).tolist(), key=lambda image: key(cache.paths[image]))


def keep_first(cache: Cache, draw: int, sizes: dict[int, int]) -> Cache:
    """Training keeps the first sizes[c] images of each class c in the order of the draw; the others are unused."""
    taken: Counter[int] = Counter()
    left = np.zeros(len(cache.split), dtype=bool)
    for image in split_order(cache, "train", draw):
        label = int(cache.y[image])
        left[image] = taken[label] >= sizes[label]
        taken[label] += 1
    return replace(cache, split=np.where(left, "unused", cache.split))


def tail_sizes(cache: Cache, regime: LongTail, draw: int) -> dict[int, int]:
    """How many images each class may keep, by its position."""
    largest = int(torch.bincount(cache.y[cache.images("train")]).max())
    ranked = sorted(cache.classes, key=by_draw(draw))
    return {
        cache.classes.index(class_id): max(1, round(largest * regime.share(rank, len(ranked))))
        for rank, class_id in enumerate(ranked, start=1)
    }


@functools.lru_cache(maxsize=1)  # draws and shares of a study share it
def probed(cache: Cache) -> Tensor:
    """p (n, C): class probabilities of training images, and of those that choose, by linear probes that saw them not.

    Logistic regression on global vectors of view 0, fitted on four of five folds of the training images; sha256(path)
    says which fold. An image that chooses has the mean over the five probes; any other image has zeros.
    """
    train, val = cache.images("train"), cache.images("choose")
    fold = torch.tensor([int(sha256(cache.paths[image])[:8], 16) % FOLDS for image in train.tolist()])
    x, y, x_val = cache.globals(train), cache.y[train], cache.globals(val)
    p = torch.zeros(len(cache.paths), len(cache.classes))
    for held in range(FOLDS):
        rest, standardise = fold != held, Standardise(x[fold != held])
        probe = fit_logistic(
            standardise(x[rest]), y[rest], standardise(x_val), cache.y[val], p.shape[1], PROBE_STRENGTHS
        ).linear
        with torch.no_grad():
            p[train[~rest]] = probe(standardise(x[~rest])).softmax(-1)
            p[val] += probe(standardise(x_val)).softmax(-1) / FOLDS
    return p


def cross_fitted(cache: Cache) -> Tensor:
    """p (n_train, C): class probabilities of each training image by a linear probe that it had no part in."""
    return probed(cache)[cache.images("train")]


def wrong_probabilities(cache: Cache) -> Tensor:
    """cross_fitted with 0 for the true class."""
    return cross_fitted(cache).scatter(1, cache.y[cache.images("train")][:, None], 0.0)


def candidate_targets(cache: Cache, regime: Partial, draw: int) -> Tensor:
    """(n, C) float32: uniform over a training image's candidates, and the true class for the other images."""
    train, target = cache.images("train"), F.one_hot(cache.y, len(cache.classes)).float()
    uniform = torch.from_numpy(np.random.default_rng(draw).random((len(train), len(cache.classes)), dtype=np.float32))
    chance = torch.full_like(uniform, regime.q)
    if regime.wrong == "instance":
        p = wrong_probabilities(cache)
        chance = regime.q * p / p.amax(1, keepdim=True).clamp(min=1e-30)
    candidates = (target[train] > 0) | (uniform < chance)
    target[train] = candidates / candidates.sum(1, keepdim=True)
    return target


def noisy_targets(cache: Cache, regime: Noise, draw: int) -> Tensor:
    """(n,): the truth, but for the images that are told a wrong class.

    Confused and nearest say nothing of a class without a training image: images of it that choose keep theirs, and are
    not counted in the share.
    """
    target, is_trained = cache.y.clone(), set(cache.y[cache.images("train")].tolist())
    for split in ("train", "choose") if regime.val == "noisy" else ("train",):
        order = instance_order(cache, split, draw) if regime.wrong == "instance" else split_order(cache, split, draw)
        if regime.wrong in ("confused", "nearest"):
            order = [image for image in order if int(cache.y[image]) in is_trained]
        changed = order[: round(regime.share * len(order))]
        target[changed] = wrong_classes(cache, regime, changed, draw)
    return target


def wrong_classes(cache: Cache, regime: Noise, images: list[int], draw: int) -> Tensor:
    """What each of these images is told under `Noise`, (len(images),): never its own class.

    Under confused and nearest their classes have training images.
    """
    classes, y, train = len(cache.classes), cache.y[images], cache.images("train")
    if regime.wrong == "symmetric":
        steps = [1 + int(sha256(f"{draw} wrong {cache.paths[image]}")[:8], 16) % (classes - 1) for image in images]
        return (y + torch.tensor(steps, dtype=torch.int64)) % classes
    if regime.wrong == "confused":
        confusion = torch.zeros(classes, classes).index_add(0, cache.y[train], wrong_probabilities(cache))
        return confusion.argmax(1)[y]
    if regime.wrong == "nearest":
        return nearest_classes(cache)[y]
    return probed(cache)[images].scatter(1, y[:, None], -1.0).argmax(1)


def nearest_classes(cache: Cache) -> Tensor:
    """(C,): of each class the other one whose mean over training images is nearest by cosine; view 0, true labels."""
    train, classes = cache.images("train"), len(cache.classes)
    x, y = cache.globals(train), cache.y[train]
    means = F.normalize(torch.zeros(classes, x.shape[1]).index_add(0, y, x), dim=1)
    cosine = means @ means.T
    cosine[:, torch.bincount(y, minlength=classes) == 0] = -2.0  # a class without images has no mean to be near
    return cosine.fill_diagonal_(-3.0).argmax(1)


def instance_order(cache: Cache, split: str, draw: int) -> list[int]:
    """The images of a split, drawn one by one without replacement, each with the weight of its largest wrong p.

    By the keys u^(1 / weight) of Efraimidis and Spirakis (2006), the largest first; u is a hash of draw and path.
    """
    images = cache.images(split)
    weight = probed(cache)[images].scatter(1, cache.y[images][:, None], 0.0).amax(1).double().clamp(min=1e-30)
    u = [(int(sha256(f"{draw} {cache.paths[image]}")[:12], 16) + 0.5) / 16**12 for image in images.tolist()]
    key = torch.tensor(u, dtype=torch.float64).log() / weight
    return images[key.argsort(descending=True, stable=True)].tolist()


def unseen_split(cache: Cache, regime: Unseen, draw: int) -> np.ndarray:
    """(n,) str: the split under `Unseen`."""
    seen = choose_classes(cache.classes, cache.classes, regime.seen, draw)
    others = [class_id for class_id in cache.classes if class_id not in seen]
    development = choose_classes(cache.classes, others, regime.development, draw)
    if both := seen & development:
        raise UserError(f"{regime.development}: class {min(both)} is in {regime.seen} too; take it out of one of them")
    if len(development) >= len(others):
        raise UserError(f"regime {regime.label}: leaves no unseen class to test on; name fewer classes")
    class_of = np.array(cache.classes)[cache.y.numpy()]
    is_seen, is_development = (np.isin(class_of, sorted(chosen)) for chosen in (seen, development))
    test = cache.split == "test"
    split = np.where(is_seen | test, cache.split, "unused")
    split = halve(np.where(is_development, "unused", split), is_development & ~test, cache.groups, cache.y.numpy())
    # What another reason has put aside stays there.
    return np.where(np.isin(cache.split, ("train", "choose", "val", "test")), split, cache.split)


def choose_classes(classes: Sequence[str], among: Sequence[str], wanted: Classes, draw: int) -> set[str]:
    """The classes that a file names, or a share of `among`: at least one, and not all."""
    if isinstance(wanted, str):
        return set(read_classes(wanted, classes))
    count = min(max(1, round(wanted * len(among))), len(among) - 1)
    return set(sorted(among, key=by_draw(draw))[:count])


def read_classes(path: str | Path, classes: Sequence[str]) -> list[str]:
    """The class ids that a file names, one a line, by class_id or folder. Raises UserError for one not in `classes`."""
    known, found = set(classes), []
    for number, line in enumerate(read_lines(path), start=1):
        class_id = line if line in known else class_id_of(line)
        if line and class_id not in known:
            raise UserError(f"{path}: line {number}: there is no class {line!r}; write its folder's name or class_id")
        if line:
            found.append(class_id)
    return found


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file of names, stripped. Raises UserError where it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it should name classes, one a line") from None
    return [line.strip() for line in lines]


def label_spaces(cache: Cache, split: str = "test") -> dict[str, tuple[Tensor, Tensor]]:
    """How to evaluate a cache under `Unseen`: by name, the classes to choose among (C,) bool and the split's images.

    seen: images of the classes that training has, among these; unseen: images of the others that occur in the split,
    among those; joint: all of them among both. On val the others are the development classes.
    """
    images = cache.images(split)
    trained, present = (torch.zeros(len(cache.classes), dtype=torch.bool) for _ in range(2))
    trained[cache.y[cache.images("train")]] = True
    present[cache.y[images]] = True
    others = present & ~trained
    return {
        "seen": (trained, images[trained[cache.y[images]]]),
        "unseen": (others, images[others[cache.y[images]]]),
        "joint": (trained | others, images),
    }


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b) of two accuracies, 0 where one is 0: the one figure for seen and unseen classes together."""
    return 2 * a * b / (a + b) if a and b else 0.0


def restrict_classes(cache: Cache, class_ids: Sequence[str], others: Sequence[str] = ()) -> Cache:
    """Only these classes and their images, in the order of `cache.classes`: for settings from development classes.

    `others` are classes that a method may learn from and is never asked about (`Cache.others`): no regime touches them.

    Concepts whose owners are all gone are no longer kept: they weigh nothing in the nodes' labels and are none of an
    image's selected concepts. So labels cannot be restricted without owners. Restrict before a regime or hide_test,
    not after. Raises ValueError for an unknown class, or where `target` is not the truth any more.
    """
    wanted = set(class_ids)
    if unknown := wanted - set(cache.classes):
        raise ValueError(f"unknown classes: {sorted(unknown)}")
    if cache.target.shape != cache.y.shape or not torch.equal(cache.target, cache.y):
        raise ValueError("restrict classes before a regime")
    columns = torch.tensor([class_id in wanted for class_id in cache.classes])
    if others:
        if both := wanted & set(others):
            raise ValueError(f"classes that are told apart and lent: {sorted(both)}")
        return replace(restrict_classes(cache, class_ids), others=restrict_classes(cache, others))
    if columns.all():
        return cache
    few = cache.take(columns[cache.y].nonzero().flatten())
    y = (columns.cumsum(0) - 1)[few.y]
    left = [name for name in cache.classes if name in wanted]
    return replace(few, classes=left, y=y, target=y, parts=few.parts.of_classes(columns))


def hide_test(cache: Cache) -> Cache:
    """What a method's fit is given: no label of an image that does not train or choose, be it as class, target or path.

    y of images that train or choose is what they are told (`target`), of several classes the most probable one, the
    first of equals. The half of val that chooses (`choose`) is `val`. The other one, which is reported, has split
    `hidden`, as test has. Hidden and unused images have y -1, a target of -1 (or of zeros), a path and group without
    meaning, no marks.
    Evaluate on the cache as it was.
    """
    hidden = ~np.isin(cache.split, ("train", "choose"))
    rows, names = torch.from_numpy(hidden), [f"hidden/{n}" for n in range(len(hidden))]
    target = cache.target
    told = target if target.ndim == 1 else target.argmax(1)
    target = target.masked_fill(rows, -1) if target.ndim == 1 else target.masked_fill(rows[:, None], 0.0)
    return replace(
        cache,
        paths=np.where(hidden, names, cache.paths).tolist(),
        groups=np.where(hidden, names, cache.groups).tolist(),
        split=np.select(
            [cache.split == "choose", np.isin(cache.split, ("val", "test"))], ["val", "hidden"], cache.split
        ),
        y=told.masked_fill(rows, -1),
        target=target,
        parts=cache.parts.hide(rows),
        others=None if cache.others is None else hide_test(cache.others),
    )
