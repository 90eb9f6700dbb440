"""What the report reads of runs, and what it refuses: runs that are missing, stale, or contradict themselves."""

import json
import re
from pathlib import Path

import pytest

from evaluation.report import report
from fieldmark.command import UserError
from fieldmark.params import Train
from fieldmark.store import bucket_path
from tests.evaluation.reported import METHODS, make_params, rewrite
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
        with pytest.raises(UserError, match=rf"zero_shot/{name}: is missing; .*training\.train --method zero_shot"):
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


def test_reads_what_train_writes(data: Path) -> None:
    # Two strengths are enough here: what linear_probe finds is not the question.
    block = {"zero_shot": {"encoder": ENCODER}, "linear_probe": {"encoder": ENCODER, "l2": [0.1, 1.0]}}
    params = make_params(reference="zero_shot")
    params = params.model_copy(update={"train": Train.model_validate({"seeds": 2, "methods": block})})
    for method in METHODS:
        train(params, "params.yaml", method, data)
    summary = report(params, data)
    for line, method in zip(summary.splitlines()[1:], METHODS, strict=False):
        metrics = json.loads((data / f"runs/{method}/metrics.json").read_text())
        cells = re.split(r"  +", line)
        expected = [
            f"{100 * metrics[split]['accuracy']:.1f} +- {100 * metrics[split]['accuracy_std']:.1f}"
            for split in ("train", "val", "test")
        ]
        assert cells[:4] == [method, *expected]
