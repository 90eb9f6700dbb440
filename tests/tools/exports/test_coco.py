"""COCO files as pycocotools opens them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fieldmark import store
from fieldmark.command import UserError
from tools.exports.coco import keypoints_of

pycocotools = pytest.importorskip("pycocotools.coco")
Row = dict[str, Any]
Export = Callable[..., str]
Kept = tuple[np.ndarray, np.ndarray, np.ndarray]


def test_pycocotools_opens_truth_and_predictions(
    made: list[Row], calibrated: Kept, export: Export, tmp_path: Path
) -> None:
    said = export("coco", tmp_path / "coco", "--run", "zero_shot", "--split", "all")
    assert "30 images of 3 categories, 15 with a box of the object, 0 parts" in said
    truth = pycocotools.COCO(tmp_path / "coco/truth.json")
    found = truth.loadRes(str(tmp_path / "coco/results.json"))
    categories = {row["id"]: row for row in truth.loadCats(truth.getCatIds())}
    assert {number: row["class_id"] for number, row in categories.items()} == {1: "other", 2: "tang", 3: "wrasse"}
    # Two classes of one name would be one to FiftyOne and LightlyStudio.
    assert categories[1]["name"] == "Blue tang (other)"
    assert [categories[2]["supercategory"], categories[3]["supercategory"]] == ["surgeonfish", ""]
    split, y, probabilities = calibrated
    for number, image in enumerate(made, start=1):
        [row] = truth.loadImgs([number])
        assert (row["file_name"], row["width"], row["height"]) == (image["path"], 80, 60)
        assert row["fieldmark_image_id"] == image["image_id"]
        assert row["split"] == split[number - 1]
        assert row["date_captured"] == image["captured_at"]
        licence = next((each["name"] for each in truth.dataset["licenses"] if each["id"] == row["license"]), None)
        assert licence == image["licence"]
        box = [20, 30, 40, 30] if image["box"] else [0, 0, 80, 60]
        [label] = truth.loadAnns(truth.getAnnIds(number))
        [said_of] = found.loadAnns(found.getAnnIds(number))
        assert (label["bbox"], label["area"], label["iscrowd"]) == (box, box[2] * box[3], 0)
        assert said_of["bbox"] == box
        assert categories[label["category_id"]]["class_id"] == image["class_id"]
        assert said_of["category_id"] == probabilities[number - 1].argmax() + 1
        assert said_of["score"] == pytest.approx(probabilities[number - 1].max(), abs=1e-4)
    assert (y == [label["category_id"] - 1 for label in truth.dataset["annotations"]]).all()


def test_its_evaluation_counts_what_is_right(made: list[Row], calibrated: Kept, export: Export, tmp_path: Path) -> None:
    """Recall at one detection an image is the accuracy within each class, averaged."""
    from pycocotools.cocoeval import COCOeval

    export("coco", tmp_path, "--run", "zero_shot")
    truth = pycocotools.COCO(tmp_path / "truth.json")
    judge = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    split, y, probabilities = calibrated
    right = (probabilities.argmax(1) == y)[split == "val"]
    of = y[split == "val"]
    assert judge.stats[6] == pytest.approx(np.mean([right[of == each].mean() for each in np.unique(of)]))


def test_the_default_is_the_half_of_val_that_chose_nothing(
    made: list[Row], calibrated: Kept, export: Export, tmp_path: Path
) -> None:
    export("coco", tmp_path, "--run", "zero_shot")
    truth, predictions = (json.loads((tmp_path / name).read_text()) for name in ("truth.json", "predictions.json"))
    expected = [number for number, split in enumerate(calibrated[0], start=1) if split == "val"]
    assert [row["id"] for row in truth["images"]] == expected
    assert predictions["images"] == truth["images"]
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {key: row[key] for key in ("image_id", "category_id", "bbox", "score")} for row in predictions["annotations"]
    ]


def test_whoever_looks_at_test_is_told(
    made: list[Row], run_stage: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, told in (("val", False), ("test", True), ("all", True)):
        run_stage("tools.export", "--to", "coco", "--run", "zero_shot", "--split", split, str(tmp_path))
        assert ("images of test" in capsys.readouterr().err) is told


def test_parts_are_keypoints(
    made: list[Row], export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"eye": {"x": 0.5, "y": 0.25, "visible": True}, "tail": {"x": 0.1, "y": 1.0, "visible": False}}
    image = {"width": 80, "height": 60}
    assert keypoints_of(image, ["eye", "fin", "tail"], places) == {
        "keypoints": [40, 15, 2, 0, 0, 0, 8, 60, 1], "num_keypoints": 2,
    }  # fmt: skip
    rows = [{"path": made[0]["path"], "part": part, **place} for part, place in places.items()]
    rows.append({"path": made[1]["path"], "part": "fin", "visible": False})  # as CUB has what is not to be seen
    table = store.make_table("index.parts/1", rows)
    monkeypatch.setattr("tools.exports.coco.store.read_table", lambda *_: table)
    from tools.exports.coco import read_parts

    names, parts = read_parts(Path("data"), [made[0]["path"], made[1]["path"]])
    assert names == ["eye", "fin", "tail"]
    assert keypoints_of(image, names, parts[made[0]["path"]])["num_keypoints"] == 2
    assert keypoints_of(image, names, parts[made[1]["path"]]) == {"keypoints": [0] * 9, "num_keypoints": 0}


def test_equal_inputs_equal_bytes_and_no_other_file_is_touched(made: list[Row], export: Export, tmp_path: Path) -> None:
    out = tmp_path / "coco"
    export("coco", out, "--run", "zero_shot")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    export("coco", out, "--run", "zero_shot")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt, which this export does not write"):
        export("coco", out, "--run", "zero_shot")
