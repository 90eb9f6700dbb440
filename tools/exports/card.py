"""A model card of a run: what it is, what it was trained on, how well it does and where not, how to load it.

OUT is a Markdown file with the YAML front matter that the Hugging Face hub reads (README.md of a model repository). Its
figures are those of the seed whose model is kept, computed from predictions.parquet: first of val, the half that chose
nothing; of test as what it is, a single reading that no correction was made for.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import NormalDist
from typing import Any

import numpy as np

from evaluation.calibration import calibrate
from evaluation.health import contamination, read_health
from evaluation.reliability import cross_judge, rows
from evaluation.runs import Run, group_numbers, groups_of, read_logits
from evaluation.taxonomy import lineages_of
from evaluation.words import percent_and_deviation
from fieldmark import store
from fieldmark.params import Encoder, Params, Tower
from tools.exports.index import Index, Row, check_file
from tools.exports.markdown import render
from training.links import named
from training.metrics import (
    Bools,
    Floats,
    Ints,
    accuracy,
    calibration_error,
    class_accuracy,
    confusion,
    correct,
    log_loss,
    macro_accuracy,
    top_k_accuracy,
)

JUDGED = ("val", "test")
WORST = 5  # classes and pairs listed


@dataclass(frozen=True)
class Figures:
    """How well the kept model does on a split."""

    images: int
    accuracy: float
    low: float  # 95 % interval of accuracy
    high: float
    macro_accuracy: float
    top5_accuracy: float
    log_loss: float
    calibration_error: float


def measure(logits: Floats, y: Ints, groups: Ints | None) -> Figures:
    low, high = interval(correct(logits, y), groups)
    return Figures(
        images=len(y),
        accuracy=accuracy(logits, y),
        low=low,
        high=high,
        macro_accuracy=macro_accuracy(logits, y),
        top5_accuracy=top_k_accuracy(logits, y, 5),
        log_loss=log_loss(logits, y),
        calibration_error=calibration_error(logits, y),
    )


def interval(right: Bools, groups: Ints | None) -> tuple[float, float]:
    """The 95 % interval of an accuracy on images (n,): Wilson's (JASA 1927 [mem]), of as many as they are worth.

    Images of one group are right or wrong together, so they are worth fewer than they are: n over the design effect,
    the variance of the mean over whole groups over that of n single images (Kish 1965 [mem]); where all are right, or
    none, as many as there are groups.
    """
    n, p = float(len(right)), float(right.mean())
    if groups is not None:
        own = np.bincount(np.unique(groups, return_inverse=True)[1], right - p)
        count = len(own)
        variance = float(np.square(own).sum()) * count / max(count - 1, 1) / n**2
        n = count if p in (0, 1) else min(n, p * (1 - p) / max(variance, 1e-12))
    z = NormalDist().inv_cdf(0.975)
    middle, width = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    half = width * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def weakest(logits: Floats, y: Ints, names: Sequence[str]) -> list[Row]:
    """The classes of lowest accuracy, those with more images first among equals."""
    within, count = class_accuracy(logits, y), np.bincount(y, minlength=len(names))
    order = sorted(np.flatnonzero(count).tolist(), key=lambda each: (within[each], -count[each], names[each]))
    return [
        {"name": names[each], "right": round(within[each] * count[each]), "images": int(count[each])}
        for each in order[:WORST]
        if within[each] < 1
    ]


def confused(logits: Floats, y: Ints, names: Sequence[str]) -> list[Row]:
    """The classes that are most often taken for another."""
    matrix = confusion(logits, y) * (1 - np.eye(len(names), dtype=int))
    order = sorted(zip(*np.nonzero(matrix), strict=True), key=lambda pair: (-matrix[pair], pair))
    return [{"name": names[a], "as": names[b], "images": int(matrix[a, b])} for a, b in order[:WORST]]


def encoder_row(data: Path, name: str, settings: Encoder | Tower, buckets: int) -> Row:
    """What an encoder is; a folder of this machine is named by its last part alone."""
    model = settings.model
    if model.startswith("local-dir:"):
        model = f"local-dir:{PurePath(model.removeprefix('local-dir:')).name}"
    pretrained = settings.pretrained and PurePath(settings.pretrained).name
    folder = data / "embed" / name / "images"
    params = store.read_folder_header(folder, "embed.nodes/1", buckets).params if folder.is_dir() else {}
    return {
        "name": name,
        "model": model,
        "pretrained": pretrained,
        "precision": settings.precision,
        "image_size": settings.image_size,
        "mark": params.get("encoder"),
    }


def text_rows(data: Path, config: Row) -> list[Row]:
    """Who wrote the texts that the run reads: by table, source and model, how many answers. None where none is read."""
    read = config["fingerprints"]
    tables = {
        "concepts": any(name.startswith(("bank/", "labels/")) for name in read),
        "descriptions": any(name.startswith("descriptions/") for name in read),
        **{f"asked/{name.split('/')[1]}": True for name in sorted(read) if name.startswith("asked/")},
    }
    found = []
    for table in (name for name, wanted in tables.items() if wanted):
        path = data / table / "answers.parquet"
        answers = store.read_table(path, "llm.answers/1", ["status", "source", "model_reported", "model_requested"])
        ok = [row for row in answers.to_pylist() if row["status"] == "ok"]
        # An imported text was written by whoever wrote the file: no model was asked.
        count = Counter(
            (row["source"], None if row["source"] in ("import", "edited") else row["model_reported"]) for row in ok
        )
        params = store.read_header(path, "llm.answers/1").params
        for (source, model), answered in sorted(count.items(), key=str):
            found.append({
                "table": table, "source": source, "model": model, "answers": answered,
                "prompt": params.get("prompt_sha"),
            })  # fmt: skip
    return found


def front_matter(name: str, encoder: Row, params: Params, figures: Mapping[str, Figures]) -> Row:
    """What the hub reads; `name` as it stands beside numbers. It states no licence: whoever publishes knows which."""
    notes = {"val": "the half of val that chose nothing", "test": "a single, uncorrected reading"}
    subject: Row = {"type": store.class_id_of(params.domain.group), "name": params.domain.group}
    results: list[Row] = [
        {
            "task": {"type": "image-classification"},
            "dataset": {**subject, "split": split},
            "metrics": [
                {"type": "accuracy", "value": round(found.accuracy, 6), "name": f"accuracy, {notes[split]}"},
                {"type": "log_loss", "value": round(found.log_loss, 6), "name": f"log loss, {notes[split]}"},
            ],
        }
        for split, found in figures.items()
    ]
    front: Row = {
        "library_name": "fieldmark",
        "pipeline_tag": "image-classification",
        "tags": ["fine-grained", "image-classification", "fieldmark"],
        "model-index": [{"name": name, "results": results}],
    }
    if encoder["model"].startswith("hf-hub:"):
        front["base_model"] = encoder["model"].removeprefix("hf-hub:")
    return front


def licences(index: Index, split: str) -> str:
    """The licences of the pictures of a split, with how many there are of each."""
    count = Counter(row["licence"] or "none stated" for row in index.images if row["split"] == split)
    return ", ".join(f"{name} ({images})" for name, images in count.most_common())


def make_card(data: Path, params: Params, index: Index, run: Run, config: Row) -> str:
    """The card's text. `index` has licence and group. Raises UserError where a file that it speaks of is missing."""
    logits, names = read_logits(data, run), [row["name"] for row in index.classes]
    table = store.read_table(data / "index/images.parquet", "index.images/1", ["path", "group", "status"])
    groups = groups_of(table)
    classes = store.read_table(data / "index/classes.parquet", "index.classes/2")
    figures = {}
    for split in JUDGED:
        chosen = np.flatnonzero(run.split == split)
        paths = [run.paths[image] for image in chosen]
        figures[split] = measure(logits[chosen], run.y[chosen], group_numbers(paths, groups))
    val = run.split == "val"
    units = None if groups is None else [groups[path] for path in np.array(run.paths)[val]]
    calibrated = logits[val], run.y[val], units, run.classes, lineages_of(classes, run.classes)
    unsure = rows(calibrate(*calibrated), cross_judge(*calibrated)) if len(set(units or range(val.sum()))) > 1 else []
    counts = Counter(row["split"] for row in index.images)
    images = {split: counts[split] for split in ("train", "val", "test")}
    health = read_health(data / "index/metrics.json", images)
    encoders = [
        encoder_row(data, name, params.image_encoder(name), params.dataset.buckets)
        for name in (config["encoder"], *config["also"])
    ]
    return render(
        "card.jinja",
        front_matter(named(run.name, run.transductive), encoders[0], params, figures),
        run=run,
        title=named(run.name, run.transductive),
        config=config,
        domain=params.domain,
        encoders=encoders,
        texts=text_rows(data, config),
        figures=figures,
        over_seeds={split: percent_and_deviation(*run.accuracy(split)) for split in JUDGED},
        train_accuracy=accuracy(logits[run.split == "train"], run.y[run.split == "train"]),
        images=images,
        choosing=int((run.split == "choose").sum()),
        fewest=min(Counter(row["class_id"] for row in index.images if row["split"] == "train").values()),
        licences=licences(index, "train"),
        unsure=unsure,
        contamination=contamination(health, images["test"]),
        grouped=groups is not None,
        weakest=weakest(logits[val], run.y[val], names),
        confused=confused(logits[val], run.y[val], names),
        names=names,
    )


def write_card(data: Path, out: Path, params: Params, index: Index, run: Run, config: dict[str, Any]) -> str:
    """Write the card. Returns what there is to say of it."""
    check_file(out, "README.md")
    store.write_text(out, make_card(data, params, index, run, config))
    return f"model card of {run.name}; state a licence in its front matter before you publish it"
