"""What the report reads of runs, and what it refuses: runs that are missing, stale, or contradict themselves."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation.calibration import read_half
from evaluation.report import report
from evaluation.runs import NotMade, read_logits, read_run
from fieldmark.command import UserError
from fieldmark.params import Train
from fieldmark.store import bucket_path
from tests.evaluation.reported import RUNS, make_params, rewrite
from tests.training.cache import ENCODER
from training.train import train


def test_runs_that_cannot_stand_are_named(data: Path) -> None:
    folder = data / "runs/zero_shot"

    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "test": {"accuracy": 0.99}}))
    with pytest.raises(
        UserError, match=r"metrics\.json: disagrees with predictions\.parquet on test; .*train@zero_shot"
    ):
        report(make_params(), data)

    for name in ("predictions.parquet", "metrics.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"zero_shot/{name}: is missing; .*training\.train --run zero_shot"):
            report(make_params(), data)
    assert not (data / "report").exists()


def test_stale_inputs_are_refused(data: Path) -> None:
    config = json.loads((data / "runs/linear_probe/config.json").read_text())
    config["fingerprints"][f"labels/{ENCODER}"] = "former"
    (data / "runs/linear_probe/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"was trained on another .*labels/{ENCODER} .* train@linear_probe"):
        report(make_params(), data)

    rewrite(data / "index/images.parquet", "index.images/1", {0: {"status": "broken"}})
    with pytest.raises(UserError, match=r"runs/zero_shot: was made from other images"):
        report(make_params(), data)

    bucket_path(data / "thumbs", 0).unlink()
    (data / "index/classes.parquet").unlink()
    with pytest.raises(UserError, match=r"classes\.parquet: is missing"):
        report(make_params(), data)


def test_predictions_of_many_row_groups_say_the_same(data: Path) -> None:
    path = data / "runs/linear_probe/predictions.parquet"
    whole = read_run(data, "linear_probe", ENCODER)
    assert not isinstance(whole, NotMade)
    logits, half = read_logits(data, whole), read_half(data, "linear_probe")
    pq.write_table(pq.read_table(path), path, row_group_size=5, write_page_checksum=True)
    cut = read_run(data, "linear_probe", ENCODER)
    assert not isinstance(cut, NotMade)
    for one, other in zip(cut, whole, strict=True):
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    assert np.array_equal(read_logits(data, cut), logits)
    assert np.array_equal(read_logits(data, cut, ["val", "test"]), logits[np.isin(cut.split, ["val", "test"])])
    assert np.array_equal(read_half(data, "linear_probe").logits, half.logits)
    table = pq.read_table(path).slice(1)  # one seed lacks an image
    pq.write_table(table, path, row_group_size=5, write_page_checksum=True)
    with pytest.raises(UserError, match="its seeds predict different images"):
        read_run(data, "linear_probe", ENCODER)


def test_reads_what_train_writes(data: Path) -> None:
    # Two strengths are enough here: what linear_probe finds is not the question.
    settings = {"zero_shot": {}, "linear_probe": {"l2": [0.1, 1.0]}}
    block = {name: {"method": name, "encoder": ENCODER, "settings": settings[name]} for name in RUNS}
    params = make_params(reference="zero_shot")
    params = params.model_copy(update={"train": Train.model_validate({"seeds": 2, "runs": block})})
    for name in RUNS:
        train(params, "params.yaml", name, data)
    summary = report(params, data)
    for line, name in zip(summary.splitlines()[1:], RUNS, strict=False):
        metrics = json.loads((data / f"runs/{name}/metrics.json").read_text())
        name_of_run, val, _, test, _, trained = re.split(r"  +", line)
        expected = [
            f"{100 * metrics[split]['accuracy']:.1f} +- {100 * metrics[split]['accuracy_std']:.1f}"
            for split in ("val", "test", "train")
        ]
        assert [name_of_run, val, test, trained] == [name, *expected]


def test_reads_what_train_writes_of_a_method_that_cannot_work(data: Path) -> None:
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", {row: {"kept": False} for row in (2, 3, 4)})  # of one class
    params = make_params(runs={**RUNS, "description_zero_shot": ENCODER})
    train(params, "params.yaml", "description_zero_shot", data)
    found = read_run(data, "description_zero_shot", ENCODER)
    assert isinstance(found, NotMade)
    assert "class class-00 has no kept concept" in found.reason
    assert f"description_zero_shot: cannot work on this data: {found.reason}" in report(params, data).splitlines()
