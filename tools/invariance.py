"""What shifting, turning, scaling, cropping, mirroring and darkening pictures does to answers, node scores and rings.

Reads   pictures of the half of val that chose nothing, and what tools.predict reads of each run; of an encoder with
        labels, what label_patches reads. Never test.
Writes  data/studies/invariance/{tables.txt,answers.md,tables.json}. Nothing else: no changed picture is kept.
Costs   a forward pass of each encoder for each picture and each of some twenty transforms; --images takes fewer.

Each picture is transformed at full sharpness, then goes through the pipeline's own decoding, cutting and encoding, as a
new picture of tools.predict does, in memory; every run is asked on the same features. The model is that of the seed
which the run has kept. What the figures mean stands in evaluation/invariance.py, what is done to a picture in
fieldmark/pictures/transforms.py.

    python -m tools.invariance
    python -m tools.invariance --run concept_graph --run linear_probe --images 100
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.compare import describe_commit
from evaluation.invariance import (
    Followed,
    Gains,
    Images,
    RingRow,
    Row,
    Scored,
    Shown,
    as_json,
    as_markdown,
    as_text,
    corrected,
    follow,
    judge,
    judge_rings,
    scored,
    unchanged,
)
from evaluation.runs import NotMade, Run, check_same_images, group_numbers, groups_of, read_run
from fieldmark.command import UserError, counted, run, stage_parser
from fieldmark.devices import choose_device
from fieldmark.memory import keep_memory
from fieldmark.params import Params, load_params
from fieldmark.pictures.cuts import object_of, part_of
from fieldmark.pictures.transforms import UNCHANGED, Transform, motion_of, moved_box
from fieldmark.store import read_table, write_text
from stages.label_patches import Labelling
from tools.predict import DATA, chunk_of, say
from tools.prediction.features import Features, tables_of
from tools.prediction.pictures import Picture, Question, look
from tools.prediction.reasons import reads_of
from training.data import Cache, Parts
from training.data.boxes import Boxes
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.explain import node_scores
from training.loop import predict
from training.metrics import Floats, Ints
from training.restore import Restored, restore
from training.runs import write_json

FOLDER = DATA / "studies/invariance"
SPLIT = "val"
TURNS = (5, 15, 30, 90)  # degrees
TRANSFORMS = [
    *(Transform(f"shift {percent} %", shift=percent / 100) for percent in (5, 10, 20)),
    *(Transform(f"rotate {degrees}", degrees=degrees) for degrees in TURNS),
    *(Transform(f"scale {scale}", scale=scale) for scale in (0.8, 1.25)),
    *(Transform(f"crop {crop}", crop=crop) for crop in (0.9, 0.75)),
    Transform("flip", flip=True),
    *(Transform(f"darken {light}", light=light) for light in (0.7, 0.5)),
]
LABELLED = frozenset({"nodes", "boxes", "labels"})


class Judged(NamedTuple):
    """The pictures that are judged, as the index has them."""

    pictures: list[Picture]
    image_ids: list[str]
    sizes: list[tuple[int, int]]  # width, height
    images: Images

    def some(self, rows: slice, transform: Transform) -> list[Picture]:
        """Some of the pictures, each with the box that its object has under a transform."""
        found = []
        for picture, image_id, size in zip(self.pictures[rows], self.image_ids[rows], self.sizes[rows], strict=True):
            if picture.box is not None and transform.moves and not transform.in_place:
                x0, y0, x1, y1 = picture.box
                picture = picture._replace(box=list(moved_box((x0, y0, x1, y1), motion_of(transform, image_id, size))))
            found.append(picture)
        return found

    def origins(self, rows: slice, transform: Transform, places: Floats) -> Floats:
        """Where in the pictures as they are lie the places (n, N, 2) of transformed ones."""
        if not transform.moves:
            return places
        pictures = zip(self.image_ids[rows], self.sizes[rows], places, strict=True)
        return np.stack([motion_of(transform, image_id, size).origins(at) for image_id, size, at in pictures])


class Said(NamedTuple):
    """What is said of some pictures under a transform."""

    predicted: dict[str, Ints]  # (n,) by run
    scores: dict[str, Scored]  # by run that has node scores
    shown: dict[str, Shown]  # by encoder whose nodes are labelled


class Collected:
    """What is kept of all pictures, chunk by chunk."""

    def __init__(self) -> None:
        self.predicted: dict[tuple[str, Transform], list[Ints]] = {}
        self.followed: dict[tuple[str, Transform], list[Followed]] = {}
        self.gains: dict[tuple[str, str], list[Gains]] = {}


def choose_runs(params: Params, path: str, names: Sequence[str]) -> list[tuple[Restored, Run]]:
    """The runs that are named, or all that are trained and can be asked.

    Raises UserError where one that is named cannot, or none is left.
    """
    trained = [name for name in params.train.runs if (DATA / "runs" / name / "predictions.parquet").is_file()]
    found = []
    for name in names or trained:
        try:
            found.append(open_run(params, path, name))
        except UserError as error:
            if names:
                raise
            say(f"{name} is passed over: {error}")
    if not found:
        raise UserError(f"{DATA}/runs: no run is trained that can be asked; make repro trains those of params.yaml")
    return found


def open_run(params: Params, path: str, name: str) -> tuple[Restored, Run]:
    """A run's model and what it predicted. Raises UserError where a changed picture lacks what it reads."""
    asked = restore(params, path, name, DATA)
    reads = asked.reads | asked.also_reads
    if {"descriptions", "cell_descriptions"} & reads:
        raise UserError(f"{name}: reads descriptions, and a changed picture has none; ask another run (--run)")
    if "labels" in reads and params.labels.density == "pixel":
        raise UserError(f"{name}: labels.density pixel reads stored thumbnails, which nothing moves; ask another run")
    for encoder in (asked.encoder, *asked.also):
        tables_of(encoder, reads)
    of_run = read_run(DATA, name, asked.encoder)
    assert not isinstance(of_run, NotMade)  # restore has said so
    return asked, of_run


def choose_pictures(runs: Sequence[Run], most: int | None) -> Judged:
    """Of the half of val that chose nothing all pictures, or so many, those of the lowest image_id."""
    columns = ["path", "image_id", "class_id", "group", "split", "status", "box", "width", "height"]
    index = read_table(DATA / "index/images.parquet", "index.images/1", columns)
    check_same_images(DATA, runs, index)
    rows = {row["path"]: row for row in index.to_pylist()}
    first, groups = runs[0], groups_of(index)
    places = np.flatnonzero(first.split == SPLIT).tolist()
    places = sorted(sorted(places, key=lambda place: rows[first.paths[place]]["image_id"])[:most])
    chosen = [rows[first.paths[place]] for place in places]
    return Judged(
        [picture_of(row) for row in chosen],
        [row["image_id"] for row in chosen],
        [(row["width"], row["height"]) for row in chosen],
        Images(first.y[places], group_numbers([row["path"] for row in chosen], groups), first.by_class),
    )


def picture_of(row: dict[str, Any]) -> Picture:
    path, box = row["path"], row["box"]
    return Picture(path, row["group"], object_of(path, box), part_of(path, box))


def what_is_read(params: Params, runs: Sequence[Restored]) -> dict[str, frozenset[str]]:
    """Of each encoder, what runs read of it, where their patches lie, and labels where there are any."""
    reads: dict[str, frozenset[str]] = {}
    for asked in runs:
        reads[asked.encoder] = reads.get(asked.encoder, frozenset()) | reads_of(asked)
        for other in asked.also:
            reads[other] = reads.get(other, frozenset()) | asked.also_reads
    for name, words in reads.items():
        if params.labels.density != "pixel" and name in params.encoders and (DATA / f"labels/{name}").is_dir():
            reads[name] = words | LABELLED
    return reads


def as_run_sees(cache: Cache, parts: Mapping[str, Parts], asked: Restored) -> Cache:
    """Of what was made of all encoders (`parts`), what one run reads."""
    also = tuple(parts[other].only(asked.also_reads) for other in asked.also)
    return replace(cache, parts=parts[asked.encoder].only(asked.reads), also=also)


@dataclass(frozen=True)
class Asking:
    """All that it takes to ask runs about changed pictures."""

    params: Params
    judged: Judged
    runs: Sequence[Restored]
    features: Features
    device: torch.device

    def say(self, transform: Transform, rows: slice) -> Said:
        """What all runs say of some pictures under a transform, and what these show."""
        question = Question(Path(self.params.dataset.folder), self.judged.some(rows, transform))
        prepare = partial(self.features.prepare, transform=transform)
        looked = list(look(question, (), prepare, ahead=os.cpu_count() or 1))
        for each in looked:
            if each.error is not None:
                raise UserError(f"{question.file(each.picture)}: {each.error}; run index_images again (dvc repro)")
        made, recipes = self.features.make(looked, question), self.features.recipes
        by_encoder = {recipe.encoder.name: each for recipe, each in zip(recipes, (made.parts, *made.also), strict=True)}
        said, images = Said({}, {}, {}), torch.arange(len(looked))
        for asked in self.runs:
            seen, parts = as_run_sees(made, by_encoder, asked).on(self.device), by_encoder[asked.encoder]
            said.predicted[asked.name] = predict(asked.model, seen, images).argmax(1).cpu().numpy()
            scores = node_scores(asked.model, seen, images)
            if scores is not None and parts.has(Boxes):
                box, mask = parts.part(Boxes).box[images, 1:], parts.part(Nodes).mask[images, 1:]
                said.scores[asked.name] = scored(scores.cpu().double().numpy(), box.double().numpy(), mask.numpy())
        for recipe in recipes:
            parts, labelling = by_encoder[recipe.encoder.name], recipe.labelling
            if labelling is not None and len(labelling.numbers) and parts.has(Boxes):
                said.shown[recipe.encoder.name] = shown_by(parts.part(Labels), parts.part(Boxes), images, labelling)
        return said

    def collect(self) -> Collected:
        """Ask all runs about all pictures under all transforms."""
        kept, judged = Collected(), self.judged
        size = max(chunk_of(self.params, asked) for asked in self.runs)
        asked = [UNCHANGED, *TRANSFORMS, *(each._replace(in_place=True) for each in TRANSFORMS if each.loses)]
        total = len(judged.pictures)
        with tqdm(total=total * len(asked), desc="ask", unit="img") as progress:
            for start in range(0, total, size):
                rows = slice(start, start + size)
                before = self.say(UNCHANGED, rows)
                for transform in asked:
                    said = before if transform == UNCHANGED else self.say(transform, rows)
                    for name, of_run in said.predicted.items():
                        kept.predicted.setdefault((name, transform), []).append(of_run)
                    if transform != UNCHANGED and not transform.in_place:
                        for name, after in said.scores.items():
                            origins = judged.origins(rows, transform, after.middles)
                            found = follow(before.scores[name], after, origins)
                            kept.followed.setdefault((name, transform), []).append(found)
                    for key, shown in ways_shown(said.shown, transform, self.params):
                        kept.gains.setdefault(key, []).append(shown.gains(self.params.labels))
                    progress.update(len(judged.pictures[rows]))
        return kept


def shown_by(labels: Labels, boxes: Boxes, images: Tensor, labelling: Labelling) -> Shown:
    """What the local nodes of images (n,) show, of the stored labels."""
    concepts, weight, density, box = (
        each[images, 1:] for each in (labels.concept_idx, labels.concept_weight, labels.density, boxes.box)
    )
    return Shown(concepts, weight, density, (box[..., :2] + box[..., 2:]) / 2, labelling.numbers)


def ways_shown(
    shown: Mapping[str, Shown], transform: Transform, params: Params
) -> Iterator[tuple[tuple[str, str], Shown]]:
    """By encoder and by what is done: what nodes show, and for pictures as they are the same with boxes turned."""
    for name, of_encoder in shown.items():
        if not transform.in_place:
            yield (name, transform.name), of_encoder
        if transform == UNCHANGED:
            for degrees in TURNS:
                yield (name, boxes_turned(degrees)), of_encoder.turned(degrees, params.labels)


def boxes_turned(degrees: float) -> str:
    return f"boxes turned {degrees}"


def rows_of(kept: Collected, judged: Judged, runs: Sequence[Run]) -> list[Row]:
    predicted = {key: np.concatenate(chunks) for key, chunks in kept.predicted.items()}
    followed = {
        key: Followed(*map(np.concatenate, zip(*chunks, strict=True))) for key, chunks in kept.followed.items()
    }
    rows = []
    for of_run in runs:
        name, still = of_run.name, predicted[of_run.name, UNCHANGED]
        place = {path: number for number, path in enumerate(of_run.paths)}
        stored = of_run.predicted[of_run.seeds.index(of_run.model_seed)]
        known = stored[[place[picture.path] for picture in judged.pictures]]
        rows.append(unchanged(name, still, known, judged.images))
        for transform in TRANSFORMS:
            in_place = predicted.get((name, transform._replace(in_place=True)))
            moved = followed.get((name, transform))
            rows.append(judge(name, transform.name, predicted[name, transform], still, in_place, moved, judged.images))
    return corrected(rows)


def ring_rows_of(kept: Collected, judged: Judged) -> list[RingRow]:
    gains = {key: Gains(*map(np.concatenate, zip(*chunks, strict=True))) for key, chunks in kept.gains.items()}
    turning = {boxes_turned(degrees) for degrees in TURNS} | {each.name for each in TRANSFORMS if each.degrees}
    return [
        judge_rings(name, label, gains[name, UNCHANGED.name], after, judged.images, label in turning)
        for (name, label), after in gains.items()
        if label != UNCHANGED.name
    ]


def main() -> None:
    parser = stage_parser(__doc__)
    said = "a run of train.runs, as often as there are some (default: all that are trained)"
    parser.add_argument("--run", action="append", default=[], metavar="NAME", help=said)
    parser.add_argument("--images", type=int, metavar="N", help="no more pictures than N (default: all)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    arguments = parser.parse_args()
    if arguments.images is not None and arguments.images < 2:
        raise UserError("--images: pictures are compared with each other; name 2 or more")
    keep_memory()
    params, device = load_params(arguments.params), choose_device(arguments.device)
    asked, runs = zip(*choose_runs(params, arguments.params, arguments.run), strict=True)
    judged = choose_pictures(runs, arguments.images)
    known: dict[str, str] = {}
    for each in asked:
        each.model.to(device)
        known |= each.config["fingerprints"]
    features = Features(params, what_is_read(params, asked), known, asked[0].classes, device)
    kept = Asking(params, judged, asked, features, device).collect()
    rows, rings = rows_of(kept, judged, runs), ring_rows_of(kept, judged)
    command = "python -m tools.invariance" + "".join(f" --run {name}" for name in arguments.run)
    command += "" if arguments.images is None else f" --images {arguments.images}"
    pictures, classes = counted(len(judged.pictures), "picture", "pictures"), len(np.unique(judged.images.y))
    title = f"{command}, code {describe_commit() or 'unknown'}: {SPLIT}, {pictures} of {classes} classes"
    text = as_text(title, rows, rings)
    write_json(FOLDER / "tables.json", as_json(rows, rings))
    write_text(FOLDER / "answers.md", as_markdown(title, rows, rings))
    write_text(FOLDER / "tables.txt", text)
    print(text, end="")
    say(f"{FOLDER}: tables.txt, answers.md and tables.json are written")


if __name__ == "__main__":
    run(main)
