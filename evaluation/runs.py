"""What the report reads of runs: what each predicted, checked against what else the run and the cache say."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError
from training.links import TRANSDUCTIVE
from training.metrics import TOLD_CHOOSE, Bools, Floats, Ints, mean_and_deviation

PREDICTIONS = "run.predictions/1"
SPLITS = ("train", "val", "test")
Row = dict[str, Any]


class Run(NamedTuple):
    """What one run predicted: S seeds, n images in the order of their paths."""

    name: str
    encoder: str
    seeds: list[int]
    model_seed: int  # the one that is best where val chooses, whose model is kept
    classes: list[str]
    paths: list[str]
    split: np.ndarray  # (n,) str: train, test, and of val `choose`, which chose, and `val`, which is reported
    y: Ints  # (n,) positions in classes
    predicted: Ints  # (S, n)
    fingerprints: dict[str, str]  # of what it was trained on, by file or folder under data/
    mark: str  # its own fingerprint
    by_class: bool  # whether its regime makes its accuracy a claim about other classes: few shots, unseen classes
    transductive: bool = False  # whether images that are judged sent to each other (training/links.py)
    told: float | None = None  # mean accuracy where val chooses, by what that was told; None where that is the truth

    @property
    def right(self) -> Bools:
        """(S, n): whether each image is classified rightly."""
        return self.predicted == self.y

    def on(self, split: str) -> Bools:
        """(S, images of the split): whether each is classified rightly."""
        return self.right[:, self.split == split]

    def accuracy(self, split: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds; for one seed the deviation is 0."""
        return mean_and_deviation(self.on(split).mean(axis=1).tolist())

    @property
    def chosen_by(self) -> float:
        """The accuracy that runs are chosen by: on the half of val that chooses, by the labels that it is told."""
        return self.accuracy("choose")[0] if self.told is None else self.told


class NotMade(NamedTuple):
    """A run whose method cannot work on this data, and why."""

    name: str
    encoder: str
    reason: str


def read_run(data: Path, name: str, encoder: str) -> Run | NotMade:
    """Read one run. Raises UserError where a file is missing, broken, or disagrees with another."""
    folder = data / "runs" / name
    again = f"run `python -m training.train --run {name}` (dvc repro train@{name})"
    config, metrics = (read_json(folder / file, again) for file in ("config.json", "metrics.json"))
    path = folder / "predictions.parquet"
    if not path.is_file():
        raise UserError(f"{path}: is missing; {again}")
    if config["encoder"] != encoder:
        raise UserError(f"{folder}/config.json: is of encoder {config['encoder']}, not {encoder}; {again}")
    if "not_possible" in config:
        return NotMade(name, encoder, config["not_possible"])
    header = store.read_header(path, PREDICTIONS)
    classes = header.params["classes"]
    table = read_answers(path).sort_by([("seed", "ascending"), ("path", "ascending")])
    seeds = table["seed"].unique().to_pylist()
    y = pc.index_in(table["class_id"], value_set=pa.array(classes))
    images = len(table) // max(len(seeds), 1)
    paths = table["path"].slice(0, images)
    if not images or any(
        not table["path"].slice(seed * images, len(table) if seed + 1 == len(seeds) else images).equals(paths)
        for seed in range(len(seeds))
    ):
        raise UserError(f"{path}: its seeds predict different images; {again}")
    if y.null_count or config["model_seed"] not in seeds:
        raise UserError(f"{path}: holds a class or lacks a seed that config.json does not expect; {again}")
    found = Run(
        name=name,
        encoder=encoder,
        seeds=seeds,
        model_seed=config["model_seed"],
        classes=classes,
        paths=paths.to_pylist(),
        split=np.array(table["split"].slice(0, images).to_pylist(), dtype=str),
        y=y.to_numpy().astype(np.int64)[:images],
        predicted=table["predicted"].to_numpy().reshape(len(seeds), images),
        fingerprints=config["fingerprints"],
        mark=header.fingerprint,
        by_class=config["regime"]["kind"] in ("shots", "unseen"),
        transductive=config.get(TRANSDUCTIVE, False),
        told=config[TOLD_CHOOSE]["accuracy"] if TOLD_CHOOSE in config else None,
    )
    for split in SPLITS:
        if not found.on(split).size or abs(metrics[split]["accuracy"] - found.accuracy(split)[0]) > 1e-6:
            raise UserError(f"{folder}/metrics.json: disagrees with predictions.parquet on {split}; {again}")
    return found


def read_answers(path: Path) -> pa.Table:
    """predictions.parquet with the class of the highest logit, `predicted`, in the logits' place.

    One row group is held at a time.
    """
    found = []
    for group in store.iterate_groups(path, PREDICTIONS, ["path", "split", "seed", "class_id", "logits"]):
        predicted = store.vectors_of(group, "logits").argmax(axis=1)
        found.append(group.drop_columns("logits").append_column("predicted", pa.array(predicted)))
    return pa.concat_tables(found)


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file. Raises UserError, which ends with `remedy`, where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}); {remedy}") from None


def read_logits(data: Path, run: Run, splits: Sequence[str] = (*SPLITS, "choose")) -> Floats:
    """(n, C) float32: the logits of the seed whose model is kept, in the order of run.paths; of these splits alone."""
    return store.vectors_of(read_seed(data / f"runs/{run.name}/predictions.parquet", run.model_seed, splits), "logits")


def read_seed(path: Path, seed: int, splits: Sequence[str]) -> pa.Table:
    """The rows of predictions.parquet of one seed and these splits, by path; one row group is held beside them."""
    groups = store.iterate_groups(path, PREDICTIONS, ["path", "split", "seed", "class_id", "logits"])
    wanted = (pc.field("seed") == seed) & pc.field("split").isin(list(splits))
    return pa.concat_tables([group.filter(wanted) for group in groups]).sort_by("path")


def check_same_images(data: Path, runs: Sequence[Run], index: pa.Table) -> None:
    """Raise UserError for the first run that was not made from the images of the index."""
    usable = index.select(["path", "split", "class_id", "status"]).filter(pc.field("status") == "ok").sort_by("path")
    paths, splits = usable["path"].to_pylist(), np.array(usable["split"].to_pylist(), dtype=str)
    for found in runs:
        split = np.where(found.split == "choose", "val", found.split)
        y = pc.index_in(usable["class_id"], value_set=pa.array(found.classes)).fill_null(-1).to_numpy()
        if found.paths != paths or not np.array_equal(split, splits) or not np.array_equal(found.y, y):
            raise UserError(
                f"{data}/runs/{found.name}: was made from other images than {data}/index holds;"
                f" run train@{found.name} again (dvc repro)"
            )


def read_marks(data: Path, encoder: str, buckets: int, with_texts: bool) -> dict[str, str]:
    """By file or folder under data/, the fingerprints of the tables of an encoder that the page explains with.

    `with_texts`: labels and bank, which a tower has none of.
    """
    folders = {f"embed/{encoder}/images": "embed.nodes/1"}
    folders |= {f"labels/{encoder}": "labels/1"} if with_texts else {}
    marks = {name: store.read_folder_header(data / name, schema, buckets) for name, schema in folders.items()}
    if with_texts:
        marks[f"bank/{encoder}.parquet"] = store.read_header(data / f"bank/{encoder}.parquet", "bank/1")
    return {name: header.fingerprint for name, header in sorted(marks.items())}


def check_marks(data: Path, found: Run, marks: Mapping[str, str]) -> None:
    """Raise UserError where a run was trained on other tables than the page would explain it with.

    What the run did not read cannot be another.
    """
    for name, mark in marks.items():
        if found.fingerprints.get(name, mark) != mark:
            raise UserError(
                f"{data}/runs/{found.name}: was trained on another {data / name} than is there now;"
                f" run train@{found.name} again (dvc repro)"
            )


def groups_of(index: pa.Table) -> dict[str, str] | None:
    """By path, the group of each usable image: its track, camera or site, or the image itself where it names none.

    `index` has path, group and status. None where no image names a group.
    """
    index = index.filter(pc.equal(index["status"], "ok"))
    if index["group"].null_count == len(index):
        return None
    rows = zip(index["path"].to_pylist(), index["group"].to_pylist(), strict=True)
    return {path: f"image {path}" if group is None else f"group {group}" for path, group in rows}


def group_numbers(paths: Sequence[str], groups: Mapping[str, str] | None) -> Ints | None:
    """(n,): which group each of these images is of."""
    return None if groups is None else np.unique([groups[path] for path in paths], return_inverse=True)[1]


def query(sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
    """The rows of a DuckDB query over Arrow tables."""
    with database().cursor() as connection:  # a connection of its own, whose tables no other query sees
        for name, table in tables.items():
            connection.register(name, table)
        return connection.execute(sql).fetchall()


@cache
def database() -> duckdb.DuckDBPyConnection:
    """One in memory, empty: a new one for each query takes longer than the query."""
    return duckdb.connect()
