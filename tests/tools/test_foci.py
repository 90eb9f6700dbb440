"""The command on runs that were really trained on a planted cache: who mines, what is judged, what is written down."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML

from fieldmark.command import UserError
from fieldmark.store import canonical_json, make_table, read_header, read_table, write_table
from tests.tools.conftest import run_module
from tests.training.cache import ENCODER, Plan, write_cache
from training.runs import SCHEMA

FOLDER = Path("data/studies/foci")
OPENED = Path("data/studies/test_was_opened.json")
PLAN = Plan(classes=6, train=6, val=8, test=4, nodes=4, noise=4.0)


def write_params() -> None:
    params: dict[str, Any] = {
        "domain": {"noun": "fish", "group": "fish"},
        "dataset": {"root": "images", "buckets": PLAN.buckets},
        "llm": {"model": "none"},
        "encoders": {ENCODER: {"model": "none"}},
        "report": {"reference": "linear_probe"},
        "train": {
            "device": "cpu",
            "seeds": 1,
            "runs": {
                "zero_shot": {"method": "zero_shot", "encoder": ENCODER},
                "linear_probe": {"method": "linear_probe", "encoder": ENCODER, "settings": {"l2": [1.0]}},
            },
        },
    }
    with open("params.yaml", "w") as file:
        YAML().dump(params, file)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: a planted cache, and two trained runs."""
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "data", PLAN)
    write_params()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("zero_shot", "linear_probe"):
        run_module("training.train", "--run", name)
    yield tmp_path
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name / "tables.json").read_text())
    return found


def judged(name: str) -> dict[str, Any]:
    return {row["name"]: row for row in figures(name)["judges"]}


def test_an_encoder_mines_as_its_zero_shot_run_does(project: Path) -> None:
    run_module("tools.foci")
    run_module("tools.foci", "--run", "zero_shot")
    named, by_run = "tiny-by-class-names-val-seed-0", "run-zero_shot-val-seed-0"
    options = read_table(FOLDER / named / "options.parquet", "options/1")
    assert options.equals(read_table(FOLDER / by_run / "options.parquet", "options/1"))
    index = {
        row["image_id"]: row for row in read_table("data/index/images.parquet", "index.images/1").to_pylist()
    }
    rows = options.to_pylist()
    assert {index[row["image_id"]]["split"] for row in rows} == {"val"}
    assert len(rows) == PLAN.classes * PLAN.val // 2  # the half of val that chose nothing
    for row in rows:
        assert row["options"].index(index[row["image_id"]]["class_id"]) == row["answer"]
        assert row["names"] == [class_id.title() for class_id in row["options"]]
        assert row["path"] == index[row["image_id"]]["path"]
        assert len(set(row["options"])) == 4
    assert len({row["answer"] for row in rows}) == 4
    named_beside = json.loads((FOLDER / named / "siblings.json").read_text())
    assert sorted(named_beside) == sorted({row["options"][row["answer"]] for row in rows})
    for class_id, names in named_beside.items():
        of_class = [row for row in rows if row["options"][row["answer"]] == class_id]
        assert set(names) == {name for row in of_class for name in row["names"]} - {class_id.title()}
    header = read_header(FOLDER / named / "options.parquet", "options/1")
    assert header.params == {"miner": "tiny by class names", "stands_on": ["tiny"], "split": "val", "seed": 0}

    found = figures(named)
    assert found["miner"]["accuracy"] == found["miner"]["top1"] == judged(named)["zero_shot"]["top1"]
    assert all(row["kin"] for row in found["judges"])
    probe = judged(named)["linear_probe"]
    assert probe["paired"] is None
    assert probe["accuracy"] >= probe["top1"]
    assert probe["unit"] == "images"
    assert not OPENED.exists()


def test_options_can_be_shared_and_are_checked(project: Path) -> None:
    run_module("tools.foci", "--seed", "4")
    name = "tiny-by-class-names-val-seed-4"
    first = (FOLDER / name / "options.parquet").read_bytes()
    theirs = project / "theirs.parquet"
    theirs.write_bytes(first)
    params = str(project / "params.yaml")
    run_module("tools.foci", "--options", str(theirs), "--judge", "linear_probe", "--params", params)
    assert (FOLDER / name / "options.parquet").read_bytes() == first
    assert list(judged(name)) == ["linear_probe"]
    text = (FOLDER / name / "tables.txt").read_text()
    assert "drawn by seed 4" in text
    # Tables go to others too: no folder of this machine is in them.
    assert "--options theirs.parquet --judge linear_probe --params params.yaml, code" in text
    # Another order does not replace the one that was handed out.
    run_module("tools.foci", "--seed", "1")
    assert (FOLDER / name / "options.parquet").read_bytes() == first

    table, header = read_table(theirs, "options/1"), read_header(theirs, "options/1")
    right = table.to_pylist()[0]["answer"]
    for wrong in ((right + 1) % 4, 4, 9, -1):
        changed = table.to_pylist()
        changed[0]["answer"] = wrong
        write_table(make_table("options/1", changed), theirs, "options/1", header.params, header.fingerprint)
        with pytest.raises(UserError, match=r"its options are not 4 classes of .* with its own at `answer`"):
            run_module("tools.foci", "--options", str(theirs))
    write_table(table[1:], theirs, "options/1", header.params, header.fingerprint)
    with pytest.raises(UserError, match=r"has no options for .* \(val\); mine them"):
        run_module("tools.foci", "--options", str(theirs))
    for change in ({"note": "x"}, {"seed": "4"}):
        write_table(table, theirs, "options/1", header.params | change, header.fingerprint)
        with pytest.raises(UserError, match=r"params in its header are not miner, stands_on, split, seed"):
            run_module("tools.foci", "--options", str(theirs))
    write_table(table, theirs, "options/1", header.params | {"split": "test"}, header.fingerprint)
    with pytest.raises(UserError, match=r"theirs.parquet: has options of test, and val is judged"):
        run_module("tools.foci", "--options", str(theirs))


def test_test_is_judged_on_request_alone_and_written_down(project: Path) -> None:
    run_module("tools.foci", "--open-test", "--judge", "linear_probe")
    options = read_table(FOLDER / "tiny-by-class-names-test-seed-0/options.parquet", "options/1")
    assert options.num_rows == PLAN.classes * PLAN.test
    openings = json.loads(OPENED.read_text())
    assert [opening["run"] for opening in openings] == ["tiny by class names", "linear_probe"]
    assert all(len(opening["images"].split()) == options.num_rows for opening in openings)
    # A run that mines answers too, and so does whoever mined before: written down before that is read.
    run_module("tools.foci", "--open-test", "--run", "zero_shot", "--judge", "linear_probe")
    assert [opening["run"] for opening in json.loads(OPENED.read_text())[2:]] == ["zero_shot"]
    header = read_header(FOLDER / "run-zero_shot-test-seed-0/options.parquet", "options/1")
    theirs = header.params | {"miner": "somebody"}
    write_table(options[1:], Path("theirs.parquet"), "options/1", theirs, "a fingerprint")
    with pytest.raises(UserError, match=r"has no options for .* \(test\)"):
        run_module("tools.foci", "--open-test", "--options", "theirs.parquet", "--judge", "linear_probe")
    [opening] = json.loads(OPENED.read_text())[3:]
    assert (opening["run"], opening["fingerprint"]) == ("somebody", "a fingerprint")


def test_rows_of_a_study_are_judged_out_of_fold(project: Path) -> None:
    index = read_table("data/index/images.parquet", "index.images/1").to_pylist()
    images = [row for row in index if row["status"] == "ok" and row["split"] != "test"]
    images.sort(key=lambda row: row["path"])
    classes = [f"class-{number:02d}" for number in range(PLAN.classes)]
    for row, right in (("good", True), ("bad", False)):
        for fold in range(2):
            folder = Path(f"data/studies/small/{ENCODER}.{row}.none.folds-2.{fold}")
            folder.mkdir(parents=True)
            rows = []
            for number, image in enumerate(images):
                own, held = classes.index(image["class_id"]), number % 2 == fold
                # What a fold says of images that it trained on must not count.
                said = own if right == held else (own + 1) % len(classes)
                rows.append({
                    "path": image["path"], "split": "held_out" if held else "train", "seed": fold,
                    "class_id": image["class_id"], "logits": np.eye(len(classes))[said].tolist(),
                })  # fmt: skip
            types = {"seed": pa.int32(), "logits": pa.list_(pa.float32(), len(classes))}
            schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]])
            header = {"schema": SCHEMA, "fingerprint": f"{row}{fold}", "params": canonical_json({"classes": classes})}
            table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(header)
            pq.write_table(table, folder / "predictions.parquet")
            regime, control = {"kind": "folds", "folds": 2}, {"name": "none"}
            config = {"encoder": ENCODER, "regime": regime, "control": control, "classes": classes}
            (folder / "config.json").write_text(json.dumps(config))
    run_module("tools.foci", "--study", "small")
    found = judged("tiny-by-class-names-small-fold-seed-0")
    assert found["good"]["accuracy"] == found["good"]["top1"] == 1
    # Its one wrong class is not always among the options; where it is not, the four are equal and the first is taken.
    assert found["bad"]["top1"] == 0
    assert found["bad"]["accuracy"] < 0.5
    run_module("tools.foci", "--study", "small", "--run", "bad")
    mined = figures("run-bad-small-fold-seed-0")
    assert mined["miner"]["accuracy"] == 0
    assert judged("run-bad-small-fold-seed-0")["bad"]["accuracy"] == 0
    with pytest.raises(UserError, match=r"--judge nobody: is no row of study small in folds; name one of bad, good"):
        run_module("tools.foci", "--study", "small", "--judge", "nobody")

    # With several encoders each row is held against the reference of its own.
    for folder in list(Path("data/studies/small").iterdir()):
        folder = folder.rename(folder.with_name(folder.name.replace(".bad.", ".linear_probe.")))
        other = folder.with_name(folder.name.replace(ENCODER, "other"))
        shutil.copytree(folder, other)
        config = json.loads((folder / "config.json").read_text()) | {"encoder": "other"}
        (other / "config.json").write_text(json.dumps(config))
    run_module("tools.foci", "--study", "small")
    name = "tiny-by-class-names-small-fold-seed-0"
    assert {row: found["paired"] is not None for row, found in judged(name).items()} == {
        f"{encoder}.{row}": row == "good" for encoder in (ENCODER, "other") for row in ("good", "linear_probe")
    }
    assert "- linear_probe: that of the same encoder" in (FOLDER / name / "tables.txt").read_text()


def test_what_is_not_there_is_named(project: Path) -> None:
    with pytest.raises(UserError, match=r"--encoder nobody: is no encoder with texts in params.yaml; name one of tiny"):
        run_module("tools.foci", "--encoder", "nobody")
    with pytest.raises(UserError, match=r"nobody: is no run of train.runs in params.yaml; name one of zero_shot, li"):
        run_module("tools.foci", "--judge", "nobody")


def test_no_option_is_dropped_in_silence(project: Path) -> None:
    with pytest.raises(UserError, match=r"--encoder tiny: run zero_shot mines by what it predicted"):
        run_module("tools.foci", "--run", "zero_shot", "--encoder", "tiny")
    for option, value in (("--encoder", "tiny"), ("--seed", "0")):
        with pytest.raises(UserError, match=rf"{option}: options of --options were mined before"):
            run_module("tools.foci", "--options", "theirs.parquet", option, value)
    config = Path("data/runs/linear_probe/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"not_possible": "there is too little"}))
    with pytest.raises(UserError, match=r"linear_probe: is not trained: there is too little; name another run"):
        run_module("tools.foci", "--judge", "linear_probe", "--judge", "zero_shot")
    run_module("tools.foci")
    assert list(judged("tiny-by-class-names-val-seed-0")) == ["zero_shot"]
