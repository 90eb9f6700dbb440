"""What a run leaves on disk: tables and files that training, studies and everything that judges share."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.store import ROW_GROUP, RowGroups, canonical_json, write_atomic, write_text
from training.data import Cache
from training.methods import Fitted

SCHEMA = "run.predictions/1"
ROOM = 2**24  # logits in a row group, 64 MB: one holds what most runs say


def predictions_table(seed: int, logits: np.ndarray, cache: Cache, images: slice = slice(None)) -> pa.Table:
    """One row an image: path, split, seed, class_id (the true one), logits in the order of the classes.

    `logits` (n, C) are of all images of the cache, of which `images` become rows.
    """
    values = logits[images].astype(np.float32)
    of_classes = pa.list_(pa.field("element", pa.float32()), len(cache.classes))
    return pa.table(
        {
            "path": pa.array(cache.paths[images], pa.string()),
            "split": pa.array(cache.split[images].tolist(), pa.string()),
            "seed": pa.array(np.full(len(values), seed, dtype=np.int32)),
            "class_id": pa.array([cache.classes[label] for label in cache.y[images].tolist()], pa.string()),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=of_classes),
        }
    )


def write_predictions(path: Path, logits: Iterable[tuple[int, np.ndarray]], cache: Cache, mark: str) -> None:
    """Write predictions.parquet (run.predictions/1) under the run's fingerprint `mark`.

    `logits` gives each seed and its logits (n, C) of all images of the cache, one seed at a time; without any seed the
    table has no row. A row group has as many rows as ROOM logits make, and it alone is held beside them.
    """
    metadata = {"schema": SCHEMA, "fingerprint": mark, "params": canonical_json({"classes": cache.classes})}
    nothing = predictions_table(0, np.zeros((len(cache.paths), len(cache.classes))), cache, slice(0))
    columns = nothing.schema.with_metadata(metadata)
    step = max(ROW_GROUP, ROOM // max(len(cache.classes), 1))
    groups = RowGroups(columns, step)

    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, columns, compression="zstd", write_page_checksum=True) as writer:
            for seed, values in logits:
                for start in range(0, len(values), step):
                    piece = predictions_table(seed, values, cache, slice(start, start + step))
                    for full in groups.add(piece):
                        writer.write_table(full)
            writer.write_table(groups.rest())

    write_atomic(path, write)


def history_csv(fits: Mapping[int, Fitted]) -> str:
    """Every seed's history; the columns are those of its rows."""
    text = io.StringIO()
    first = next(iter(fits.values())).history[0] if fits else {"epoch": 0, "val_accuracy": 0}
    writer = csv.DictWriter(text, ["seed", *first], lineterminator="\n")
    writer.writeheader()
    for seed, fitted in fits.items():
        writer.writerows({"seed": seed, **row} for row in fitted.history)
    return text.getvalue()


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
