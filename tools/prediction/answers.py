"""What is said of a picture: probabilities of classes, calibrated on the run's own val, and what it is most like."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

from evaluation.calibration import Calibration, calibrate
from evaluation.rejection import class_means, distance
from evaluation.runs import PREDICTIONS, NotMade, groups_of, read_run
from evaluation.taxonomy import lineages_of
from evaluation.votes import calibrate_votes, vote
from fieldmark import store
from fieldmark.command import UserError, name_some
from fieldmark.listing import hint, read_lines
from fieldmark.params import Params
from fieldmark.store import class_id_of, nfc
from tools.prediction.output import Row, empty_row
from tools.prediction.pictures import Looked, Question
from tools.prediction.reasons import Reasons
from training.data import Cache, kind_of, read_cache
from training.data.moments import Moments
from training.data.nodes import Globals, Nodes
from training.loop import predict
from training.metrics import Bools, Floats, Ints
from training.restore import Restored

if TYPE_CHECKING:
    from tools.prediction.features import Features

TOP = 5  # classes, and training pictures, that are named
LIMITS = ("set", "sure_rank", "sure_name", "sure_p", "none_of_these")  # of a row, what holds for single pictures
ROWS = 65_536  # training vectors that are compared at once


def best_run(params: Params, data: Path) -> tuple[str, float]:
    """The run that is best on the half of val that chooses, the first in params.yaml of equals, and its accuracy there.

    Accuracy is Run.chosen_by. Runs that are not trained, or not possible, do not count. Raises UserError where none is
    left.
    """
    best: tuple[str, float] | None = None
    for name, planned in params.train.runs.items():
        if not (data / "runs" / name / "predictions.parquet").is_file():
            continue
        found = read_run(data, name, planned.encoder)
        if isinstance(found, NotMade):
            continue
        accuracy = found.chosen_by
        if best is None or accuracy > best[1]:
            best = name, accuracy
    if best is None:
        raise UserError(f"{data}/runs: no run is trained yet; make repro trains those of train.runs in params.yaml")
    return best


@dataclass(frozen=True)
class Stored:
    """The n pictures of the index that a run has predicted, and the logits of the seed whose model was kept."""

    paths: list[str]
    image_ids: list[str]
    groups: list[str] | None  # as evaluation.runs.groups_of
    split: np.ndarray  # (n,) str: train, choose, val, test
    y: Ints  # (n,)
    logits: Floats  # (n, C) float32

    @cached_property
    def place(self) -> dict[str, int]:
        """By image_id, which of them it is."""
        return {image_id: number for number, image_id in enumerate(self.image_ids)}


def read_stored(data: Path, run: Restored) -> Stored:
    """What run.predictions/1 and the index say. A picture that the index no longer has is not stored."""
    path = data / "runs" / run.name / "predictions.parquet"
    if store.read_header(path, PREDICTIONS).params["classes"] != run.classes:
        raise UserError(f"{path}: has other classes than config.json; run train@{run.name} again (dvc repro)")
    table = store.read_table(path, PREDICTIONS)
    table = table.filter(pc.field("seed") == run.seed)
    index = store.read_table(data / "index/images.parquet", "index.images/1", ["path", "image_id", "group", "status"])
    groups, usable = groups_of(index), index.filter(pc.field("status") == "ok")
    place = pc.index_in(table["path"], value_set=usable["path"].combine_chunks())
    table, place = table.filter(pc.is_valid(place)), place.drop_null()
    paths = table["path"].to_pylist()
    return Stored(
        paths=paths,
        image_ids=usable["image_id"].take(place).to_pylist(),
        groups=None if groups is None else [groups[path] for path in paths],
        split=np.array(table["split"].to_pylist(), dtype=str),
        y=pc.index_in(table["class_id"], value_set=pa.array(run.classes)).to_numpy().astype(np.int64),
        logits=store.vectors_of(table, "logits"),
    )


def read_candidates(path: Path, classes: Sequence[str], names: Mapping[str, str]) -> Bools:
    """(C,): the classes that a file names, one a line, by class_id, name or folder.

    Raises UserError naming the lines that are no class of the run.
    """
    known = {nfc(names[class_id]).casefold(): class_id for class_id in classes} | {each: each for each in classes}
    found, unknown = set(), []
    for line in map(str.strip, read_lines(path)):
        class_id = known.get(line) or known.get(nfc(line).casefold()) or class_id_of(line)
        if class_id in known:
            found.add(class_id)
        else:
            unknown.append(line)
    if unknown:
        remedy = hint(unknown[0], [*names.values(), *classes], "write the class_id or name of a class of this run")
        raise UserError(f"{path}: no class of this run: {name_some(list(map(repr, unknown)), 5)}; {remedy}")
    if not found:
        raise UserError(f"{path}: names no class; write one a line")
    return np.array([class_id in found for class_id in classes])


def whole_word(reads: Collection[str]) -> str | None:
    """What READS calls the vector of a whole picture by which a run's pictures are compared; None where it has none."""
    if {kind_of(word) for word in reads} & {Globals, Nodes}:
        return "globals"
    moments = sorted(word for word in reads if kind_of(word) is Moments)
    return "pooled" if "pooled" in moments else moments[0] if moments else None


def whole_vectors(cache: Cache, word: str, images: Tensor) -> Tensor:
    """(len(images), D) float32 of unit length, view 0."""
    if word == "globals":
        return functional.normalize(cache.globals(images).cpu(), dim=1)
    vectors = cache.part(Moments).vectors[word.rpartition("/")[2]]
    return functional.normalize(vectors[images.to(vectors.device) * cache.views].cpu().float(), dim=1)


@dataclass(frozen=True)
class Whole:
    """The vectors of all pictures of the index, to find what a picture is like."""

    word: str
    cache: Cache

    @cached_property
    def place(self) -> dict[str, int]:
        return {image_id: number for number, image_id in enumerate(self.cache.image_ids)}

    def of(self, image_ids: Sequence[str]) -> Tensor:
        """(n, D): the vectors of stored pictures."""
        places = torch.tensor([self.place[image_id] for image_id in image_ids], dtype=torch.long)
        return whole_vectors(self.cache, self.word, places)

    def means(self, among: Bools) -> Floats | None:
        """rejection.class_means of the training pictures of some classes (C,); None where they have none."""
        train = self.cache.images("train")
        train = train[torch.from_numpy(among)[self.cache.y[train]]]
        if not len(train):
            return None
        return class_means(whole_vectors(self.cache, self.word, train).numpy(), self.cache.y[train].numpy())

    def nearest(self, vectors: Tensor, image_ids: Sequence[str]) -> list[list[Row]]:
        """Of each vector (n, D) the TOP training pictures of largest cosine, the picture itself apart."""
        best, where = torch.empty(len(vectors), 0), torch.empty(len(vectors), 0, dtype=torch.long)
        for rows in self.cache.images("train").split(ROWS):
            cosine = vectors @ whole_vectors(self.cache, self.word, rows).T
            best, where = torch.cat([best, cosine], 1), torch.cat([where, rows.expand(len(vectors), -1)], 1)
            # One more than are named: a training picture is its own nearest.
            best, kept = best.topk(min(TOP + 1, best.shape[1]), dim=1)
            where = where.gather(1, kept)
        own = (self.place.get(image_id) for image_id in image_ids)
        found = []
        for image, places, cosines in zip(own, where.tolist(), best.tolist(), strict=True):
            others = [(place, cosine) for place, cosine in zip(places, cosines, strict=True) if place != image][:TOP]
            found.append([self.row(place, cosine) for place, cosine in others])
        return found

    def row(self, place: int, cosine: float) -> Row:
        class_id = self.cache.classes[int(self.cache.y[place])]
        image = {"path": self.cache.paths[place], "image_id": self.cache.image_ids[place]}
        return {**image, "class_id": class_id, "cosine": round(cosine, 4)}


def read_whole(params: Params, data: Path, run: Restored) -> Whole | None:
    """The vectors that a run's pictures are compared by; None where it reads none, or they are not on this machine."""
    word = whole_word(run.reads)
    if word is None:
        return None
    [folder] = kind_of(word).files(run.encoder, [word])
    if not (data / folder).is_dir():
        return None
    return Whole(word, read_cache(data, run.encoder, params.dataset.buckets, {word}))


def clean(path: str) -> str:
    """A path as UTF-8, whatever bytes it has: what is none stands as an escape."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Seen(NamedTuple):
    """Some of n pictures, as the run sees them."""

    which: Ints  # (m,) of the n
    cache: Cache
    images: Tensor  # (m,): their positions in the cache


class Said(NamedTuple):
    """What a run says of n pictures that are not broken."""

    logits: Floats  # (n, K), of the candidates
    vectors: Tensor | None  # (n, D), of whole pictures
    new: Seen | None  # those that went through the encoder


@dataclass(frozen=True)
class Judge:
    """A run, and all that makes answers of its logits. Of its C classes the K candidates count."""

    run: Restored
    names: Mapping[str, str]  # of classes, by class_id
    stored: Stored
    candidates: Bools  # (C,)
    whole: Whole | None
    means: Floats | None  # Whole.means of the candidates
    calibration: Calibration
    of_groups: Calibration | None  # the same of votes; None where val names no group
    features: "Callable[[], Features]"  # loads the encoders, the first time
    reasons: Reasons
    device: torch.device

    def say(self, looked: Sequence[Looked], question: Question) -> Said:
        """What the run says of pictures: of those that it has predicted, what it said; of others, what it says now."""
        known = np.array([each.image_id in self.stored.place for each in looked], dtype=bool)
        old, fresh = np.flatnonzero(known), np.flatnonzero(~known)
        kept, new = [looked[place].image_id for place in old.tolist()], None
        logits = np.zeros((len(looked), len(self.run.classes)), dtype=np.float32)
        logits[old] = self.stored.logits[[self.stored.place[image_id] for image_id in kept]]
        vectors = [] if self.whole is None else [self.whole.of(kept)]
        if len(fresh):
            made = self.features().make([looked[place] for place in fresh.tolist()], question).on(self.device)
            new = Seen(fresh, made, torch.arange(len(fresh)))
            logits[fresh] = predict(self.run.model, made.only(self.run.reads), new.images).cpu().numpy()
            if self.whole is not None:
                vectors.append(whole_vectors(made, self.whole.word, new.images))
        in_order = torch.from_numpy(np.argsort(np.concatenate([old, fresh])))
        return Said(logits[:, self.candidates], torch.cat(vectors)[in_order] if vectors else None, new)

    def rows(self, looked: Sequence[Looked], question: Question, explained: bool) -> tuple[list[Row], Floats]:
        """A row for each picture, the broken ones among them, and the logits (n, K) of the others."""
        whole = [each for each in looked if each.error is None]
        said = self.say(whole, question)
        found = self.answers(said.logits, said.vectors)
        if self.whole is not None and said.vectors is not None:
            alike = self.whole.nearest(said.vectors, [each.image_id for each in whole])
            found = [row | {"nearest": each} for row, each in zip(found, alike, strict=True)]
        if explained and self.candidates.sum() > 1:
            found = [row | each for row, each in zip(found, self.explain(whole, said), strict=True)]
        answers = iter(found)
        rows = []
        for each in looked:
            row = empty_row() | {"path": clean(each.picture.path), "group": each.picture.group, "error": each.error}
            row["image_id"] = each.image_id or None
            if each.error is None:
                row |= next(answers) | {"split": self.split(each.image_id)}
            rows.append(row)
        return rows, said.logits

    def explain(self, looked: Sequence[Looked], said: Said) -> list[Row]:
        """What speaks for the first class of each picture against the second."""
        best = np.argsort(-said.logits, axis=1, kind="stable")[:, :2]
        pairs = torch.from_numpy(np.flatnonzero(self.candidates)[best])
        found: list[Row] = [{} for _ in looked]
        old = np.array([place for place, each in enumerate(looked) if each.image_id in self.stored.place], dtype=int)
        parts = [] if said.new is None else [said.new]
        if len(old):
            parts.append(Seen(old, *self.reasons.stored([looked[place].image_id for place in old.tolist()])))
        for which, cache, images in parts:
            for place, row in zip(which.tolist(), self.reasons.of(cache, images, pairs[which]), strict=True):
                found[place] = row
        return found

    def answers(
        self, logits: Floats, vectors: Tensor | None = None, calibration: Calibration | None = None
    ) -> list[Row]:
        """What logits (n, K) mean, calibrated, and whether pictures are far from all that was trained on.

        `calibration` stands in the place of that of single pictures.
        """
        found = calibration or self.calibration
        far = None if vectors is None or self.means is None else distance(vectors.numpy(), self.means)
        p, classes = found.probabilities(logits), found.classes
        rows = []
        for chances, sure in zip(p, found.answer(logits, far), strict=True):
            best = np.argsort(-chances, kind="stable")[:TOP].tolist()
            top = [self.named(classes[number]) | {"p": round(float(chances[number]), 6)} for number in best]
            answer = {f"sure_{key}": sure[key] for key in ("rank", "name", "p")}
            if sure["rank"] == 0:
                answer["sure_name"] = self.names[sure["name"]]
            rows.append({**top[0], "top": top, "set": sure["set"], **answer, "none_of_these": sure["none_of_these"]})
        return rows

    def named(self, class_id: str) -> Row:
        return {"class_id": class_id, "name": self.names[class_id]}

    def split(self, image_id: str) -> str | None:
        """The split of a picture that the run has predicted."""
        place = self.stored.place.get(image_id)
        return None if place is None else str(self.stored.split[place])


def read_judge(
    params: Params,
    data: Path,
    run: Restored,
    candidates: Path | None,
    features: "Callable[[], Features]",
    device: torch.device,
) -> Judge:
    """A run, calibrated on those pictures of the half of val that chose nothing that show a candidate.

    `candidates` names a file. Raises UserError where there is no such picture.
    """
    index = store.read_table(data / "index/classes.parquet", "index.classes/2")
    given = dict(zip(index["class_id"].to_pylist(), index["name"].to_pylist(), strict=True))
    names = {class_id: given.get(class_id, class_id) for class_id in run.classes}
    among = np.ones(len(run.classes), dtype=bool)
    if candidates is not None:
        among = read_candidates(candidates, run.classes, names)
    classes = [class_id for class_id, counts in zip(run.classes, among, strict=True) if counts]
    stored, whole = read_stored(data, run), read_whole(params, data, run)
    means = None if whole is None else whole.means(among)
    half = np.flatnonzero((stored.split == "val") & among[stored.y])
    if not len(half):
        raise UserError(f"{candidates or data}: val has no picture of these classes to calibrate on; name more classes")
    far = None
    if whole is not None and means is not None:
        far = distance(whole.of([stored.image_ids[image] for image in half]).numpy(), means)
    logits, y = stored.logits[half][:, among], (np.cumsum(among) - 1)[stored.y[half]]
    lineages = lineages_of(index, classes)
    groups = None if stored.groups is None else [stored.groups[image] for image in half]
    calibration = calibrate(logits, y, groups, classes, lineages, distances=far)
    of_groups = None if groups is None else calibrate_votes(logits, y, groups, classes, lineages)
    reasons = Reasons(run, params, data, names, device)
    return Judge(run, names, stored, among, whole, means, calibration, of_groups, features, reasons, device)


class Votes:
    """The votes of groups of pictures, however many pictures they have: evaluation.votes, chunk by chunk."""

    def __init__(self) -> None:
        self.sums: dict[str, Floats] = {}
        self.counts: Counter[str] = Counter()

    def add(self, groups: Sequence[str], logits: Floats) -> None:
        """Pictures of these groups (n,), with their logits (n, K)."""
        names, means = vote(logits, np.array(groups))
        counts = Counter(groups)
        for name, mean in zip(names.tolist(), means, strict=True):
            self.sums[name] = self.sums.get(name, 0) + counts[name] * mean
        self.counts += counts

    def rows(self, judge: Judge) -> list[Row]:
        """A row for each group, by its name.

        Limits that were calibrated on single pictures promise nothing of it: where val names no group, it has none.
        """
        names = sorted(self.sums)
        if not names:
            return []
        logits = np.stack([self.sums[name] / self.counts[name] for name in names])
        unknown = dict.fromkeys(LIMITS) if judge.of_groups is None else {}
        return [
            empty_row() | {"group": name, "pictures": self.counts[name]} | row | unknown
            for name, row in zip(names, judge.answers(logits, calibration=judge.of_groups), strict=True)
        ]
