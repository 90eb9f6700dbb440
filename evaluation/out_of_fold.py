"""Out-of-fold images for the report: each image of train and val as that fit of a study answers it that never saw it.

A study in folds (evaluation/study.py) has a run for each fold, whose predictions name the images held out. Of a few
val images most pairs have one mistake or none; out-of-fold there are as many images as in train and val together. What
is read is what the study left in data/studies/NAME, whatever code made it: `make study` tells whether it would be made
so now.
"""

from collections import defaultdict
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
    again = f"run `make study NAME={study}`"
    rows: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.glob("*/config.json")):
        config = read_json(file, again)
        plain = config.get("control", {}).get("name") == "none" and config.get("encoder") == shown.encoder
        if plain and config.get("regime", {}).get("kind") == "folds" and "classes" in config:
            # ENCODER.METHOD.CONTROL.REGIME.FOLD
            rows[file.parent.name.removeprefix(f"{shown.encoder}.").split(".")[0]].append(file.parent)
    if shown.name not in rows:
        there = ", ".join(rows) or "none"
        raise UserError(
            f"{folder}: has no row {shown.name} on {shown.encoder} in folds; name one of these in report.run: {there}"
        )
    usable = index.filter((pc.field("status") == "ok") & pc.field("split").isin(["train", "val"]))
    paths = sorted(usable["path"].to_pylist())
    runs, logits = [], np.zeros(0)
    for name, folds in rows.items():
        tables = [store.read_table(fold / "predictions.parquet", PREDICTIONS) for fold in folds]
        held = pa.concat_tables([table.filter(pc.field("split") == "held_out") for table in tables]).sort_by("path")
        marks = [store.read_header(fold / "predictions.parquet", PREDICTIONS) for fold in folds]
        if held["path"].to_pylist() != paths or any(mark.params["classes"] != shown.classes for mark in marks):
            raise UserError(f"{folder}: folds of {name} do not hold each image of train and val out once; {again}")
        own = store.vectors_of(held, "logits").astype(np.float64)
        y = pc.index_in(held["class_id"], value_set=pa.array(shown.classes)).to_numpy().astype(np.int64)
        run = shown._replace(
            name=name,
            seeds=[0],
            model_seed=0,
            paths=paths,
            split=np.full(len(paths), FOLD),
            y=y,
            predicted=own.argmax(axis=1)[None],
            mark=store.fingerprint(study, {"folds": [mark.fingerprint for mark in marks]}),
        )
        runs.append(run)
        logits = own if name == shown.name else logits
    return next(run for run in runs if run.name == shown.name), runs, logits


def half_of(run: Run, logits: Floats, index: pa.Table, classes: pa.Table) -> Half:
    """What `calibrate` reads, of out-of-fold images: none of them had a part in the fit that answers it."""
    named = groups_of(index)
    groups = None if named is None else [named[path] for path in run.paths]
    return Half(logits, run.y, groups, run.classes, lineages_of(classes, run.classes), run.paths)
