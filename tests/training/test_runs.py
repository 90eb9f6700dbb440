"""predictions.parquet, written row group by row group."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fieldmark.store import canonical_json
from tests.training.cache import Plan
from training import loop, metrics, runs
from training.data import Cache
from training.layers.logistic import assess
from training.loop import assess_split, predict, predict_all
from training.methods import linear_probe
from training.metrics import calibration_error, fit_temperature, log_loss, top_k_accuracy
from training.runs import SCHEMA, predictions_table, write_predictions

Planted = Callable[[Plan], Cache]


@pytest.fixture
def cache(planted: Planted) -> Cache:
    return planted(Plan())


def logits_of(cache: Cache) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = len(cache.paths), len(cache.classes)
    return [(seed, rng.standard_normal(shape).astype(np.float32)) for seed in (3, 4)]


def test_the_bytes_are_those_of_one_table_of_all_seeds(cache: Cache, tmp_path: Path) -> None:
    said = logits_of(cache)
    write_predictions(tmp_path / "found.parquet", iter(said), cache, "mark")
    metadata = {"schema": SCHEMA, "fingerprint": "mark", "params": canonical_json({"classes": cache.classes})}
    table = pa.concat_tables([predictions_table(seed, logits, cache) for seed, logits in said]).combine_chunks()
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "expected.parquet", compression="zstd", write_page_checksum=True)
    assert (tmp_path / "found.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()


def test_row_groups_are_full_whatever_the_seeds(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = logits_of(cache)
    write_predictions(tmp_path / "one.parquet", said, cache, "mark")
    monkeypatch.setattr(runs, "ROW_GROUP", 50)
    monkeypatch.setattr(runs, "ROOM", 1)
    write_predictions(tmp_path / "many.parquet", said, cache, "mark")
    many = pq.ParquetFile(tmp_path / "many.parquet")
    sizes = [many.metadata.row_group(number).num_rows for number in range(many.num_row_groups)]
    assert sizes[:-1] == [50] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 50
    assert many.read().equals(pq.read_table(tmp_path / "one.parquet"))


def test_logits_in_a_file_are_those_in_memory(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_probe.fit(cache, linear_probe.Settings(l2=[0.1]), 0).model
    expected = predict(model, cache, torch.arange(len(cache.paths))).numpy()
    assert np.array_equal(predict_all(model, cache, tmp_path), expected)
    monkeypatch.setattr(loop, "HELD", 0)
    found = predict_all(model, cache, tmp_path)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, expected)
    assert not list(tmp_path.iterdir())
    val = cache.images("val")
    assert assess_split(model, cache, "val") == assess(torch.from_numpy(expected[val]), cache.y[val])


def test_metrics_in_blocks_are_the_same_numbers(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    [(_, logits), _], y = logits_of(cache), cache.y.numpy()

    def figures() -> list[float]:
        measures = log_loss, calibration_error, fit_temperature
        return [top_k_accuracy(logits, y, 2), *(measure(logits, y) for measure in measures)]

    whole = figures()
    monkeypatch.setattr(metrics, "ROOM", 12)
    assert figures() == whole
