"""What a run leaves on disk: tables and files that training, studies and everything that judges share."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.store import canonical_json, write_atomic, write_text
from training.data import Cache
from training.methods import Fitted

SCHEMA = "run.predictions/1"


def predictions_table(logits: Mapping[int, np.ndarray], cache: Cache) -> pa.Table:
    """One row an image and seed: path, split, seed, class_id (the true one), logits in the order of the classes.

    `logits` (n, C) are of all images of the cache, by seed; without any seed the table has no row.
    """
    images, seeds = len(cache.paths), len(logits)
    values = np.concatenate([np.zeros((0, len(cache.classes))), *logits.values()]).astype(np.float32)
    of_classes = pa.list_(pa.field("element", pa.float32()), len(cache.classes))
    return pa.table(
        {
            "path": pa.array(cache.paths * seeds, pa.string()),
            "split": pa.array(cache.split.tolist() * seeds, pa.string()),
            "seed": pa.array(np.repeat(np.array(list(logits), dtype=np.int32), images)),
            "class_id": pa.array([cache.classes[label] for label in cache.y.tolist()] * seeds, pa.string()),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=of_classes),
        }
    )


def write_predictions(path: Path, logits: Mapping[int, np.ndarray], cache: Cache, mark: str) -> None:
    """Write predictions.parquet (run.predictions/1) under the run's fingerprint `mark`."""
    metadata = {"schema": SCHEMA, "fingerprint": mark, "params": canonical_json({"classes": cache.classes})}
    table = predictions_table(logits, cache).replace_schema_metadata(metadata)
    write_atomic(path, lambda partial: pq.write_table(table, partial, compression="zstd", write_page_checksum=True))


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
