"""Out-of-fold images for the report: each image of train and val as that fit of a study answers it that never saw it.

A study in folds (evaluation/study.py) has a run for each fold, whose predictions name the images held out. Of a few
val images most pairs have one mistake or none; out-of-fold there are as many images as in train and val together. What
is read is what the study left in data/studies/NAME, whatever code made it: `make study` tells whether it would be made
so now.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from evaluation.calibration import Half
from evaluation.runs import PREDICTIONS, Run, groups_of, read_json
from evaluation.taxonomy import lineages_of
from fieldmark import store
from fieldmark.command import UserError
from training.metrics import Floats

FOLD = "fold"  # the split of such an image in the report


def read_out_of_fold(data: Path, study: str, shown: Run, index: pa.Table) -> tuple[Run, list[Run], Floats]:
    """The row of the study that has the name of run `shown`, all rows on its encoder in folds, and logits of the first.

    Raises UserError where the study has no such row, or one of its rows does not hold each image out once.
    """
    folder = data / "studies" / study
    rows = {name: folds for (encoder, name), folds in rows_in_folds(data, study).items() if encoder == shown.encoder}
    if shown.name not in rows:
        there = ", ".join(rows) or "none"
        raise UserError(
            f"{folder}: has no row {shown.name} on {shown.encoder} in folds; name one of these in report.run: {there}"
        )
    runs: list[Run] = []
    logits: Floats = np.zeros(0)
    for name, folds in rows.items():
        run, own = read_row(data, study, name, shown.encoder, folds, shown.classes, index)
        runs.append(run._replace(fingerprints=shown.fingerprints, by_class=shown.by_class))
        logits = own if name == shown.name else logits
    return next(run for run in runs if run.name == shown.name), runs, logits


def rows_in_folds(data: Path, study: str) -> dict[tuple[str, str], list[Path]]:
    """By encoder and name, the rows of a study in folds that are under no control, each with its folders."""
    rows: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in sorted((data / "studies" / study).glob("*/config.json")):
        config = read_json(file, f"run `make study NAME={study}`")
        plain = config.get("control", {}).get("name") == "none"
        if plain and config.get("regime", {}).get("kind") == "folds" and "classes" in config:
            # ENCODER.METHOD.CONTROL.REGIME.FOLD
            encoder = config["encoder"]
            rows[encoder, file.parent.name.removeprefix(f"{encoder}.").split(".")[0]].append(file.parent)
    return dict(rows)


def read_row(
    data: Path, study: str, name: str, encoder: str, folds: Sequence[Path], classes: list[str], index: pa.Table
) -> tuple[Run, Floats]:
    """One row of a study in folds, and its logits (n, C) in the order of its paths.

    Raises UserError where it does not hold each image of train and val out once, or its classes are others.
    """
    usable = index.filter((pc.field("status") == "ok") & pc.field("split").isin(["train", "val"]))
    paths = sorted(usable["path"].to_pylist())
    tables = [store.read_table(fold / "predictions.parquet", PREDICTIONS) for fold in folds]
    held = pa.concat_tables([table.filter(pc.field("split") == "held_out") for table in tables]).sort_by("path")
    marks = [store.read_header(fold / "predictions.parquet", PREDICTIONS) for fold in folds]
    if held["path"].to_pylist() != paths or any(mark.params["classes"] != classes for mark in marks):
        raise UserError(
            f"{data / 'studies' / study}: folds of {name} do not hold each image of train and val out once; run `make"
            f" study NAME={study}`"
        )
    logits = store.vectors_of(held, "logits").astype(np.float64)
    run = Run(
        name=name,
        encoder=encoder,
        seeds=[0],
        model_seed=0,
        classes=classes,
        paths=paths,
        split=np.full(len(paths), FOLD),
        y=pc.index_in(held["class_id"], value_set=pa.array(classes)).to_numpy().astype(np.int64),
        predicted=logits.argmax(axis=1)[None],
        fingerprints={},
        mark=store.fingerprint(study, {"folds": [mark.fingerprint for mark in marks]}),
        by_class=False,
    )
    return run, logits


def half_of(run: Run, logits: Floats, index: pa.Table, classes: pa.Table) -> Half:
    """What `calibrate` reads, of out-of-fold images: none of them had a part in the fit that answers it."""
    named = groups_of(index)
    groups = None if named is None else [named[path] for path in run.paths]
    return Half(logits, run.y, groups, run.classes, lineages_of(classes, run.classes), run.paths)
