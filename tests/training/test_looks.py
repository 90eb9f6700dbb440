"""First looks as params.yaml has them, and the runs that may read what comes of them."""

from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.params import check_params
from training.looks import plan_look
from training.methods import load_method
from training.train import plan_run

LOOKS: dict[str, Any] = {"zoom": {"method": "s3n", "encoder": "one"}}
AGAIN = {"method": "probes", "encoder": "one", "settings": {"features": ["global", "again/zoom"]}}


def params(run: dict[str, Any] = AGAIN, looks: dict[str, Any] = LOOKS, **train: Any) -> Any:
    return check_params("p.yaml", {
        "domain": {"noun": "fish", "group": "fish"},
        "dataset": {"root": "images"},
        "llm": {"model": "none"},
        "encoders": {"one": {"model": "x"}, "two": {"model": "y"}},
        "report": {"reference": "r"},
        "train": {"runs": {"r": run}, "first_looks": looks, **train},
    })


def test_a_run_reads_a_second_look_from_a_folder_of_its_own() -> None:
    reading = plan_run("p.yaml", params(), "r").reading
    assert reading.files["again/zoom"] == "again/1"
    assert not any("first_looks" in file or "tokens" in file for file in reading.files)
    look = plan_look("p.yaml", params(), "zoom").reading
    assert set(look.files) == {"embed/one/tokens", "index/images.parquet", "index/classes.parquet"}


@pytest.mark.parametrize(
    ("look", "said"),
    [
        ({"method": "mlp", "encoder": "one"}, r"\.method: mlp says nowhere to look again; choose one of: s3n"),
        ({"method": "s4n", "encoder": "one"}, r"\.method: there is no training/methods/s4n\.py; did you mean s3n"),
        ({"method": "s3n", "encoder": "one", "settings": {"warm": 1}}, r"\.settings\.warm: unknown key"),
        (
            {"method": "s3n", "encoder": "one", "settings": {"with_probe": {"method": "ridge", "settings": {
                "features": ["again/zoom"]}}}},
            r"\.settings\.with_probe\.settings: .*again/zoom cannot be among them: its first look was fitted to all",
        ),
    ],
)  # fmt: skip
def test_a_first_look_that_cannot_stand(look: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^p\.yaml: train\.first_looks\.zoom{said}"):
        plan_look("p.yaml", params(looks={"zoom": look}), "zoom")


def test_a_first_look_is_made_of_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC makes it before labels and banks."""
    monkeypatch.setattr(load_method("concept_graph"), "maps_of", None, raising=False)
    said = r"zoom\.method: concept_graph reads bank/one\.parquet, and first looks are made of data/index and data/embed"
    with pytest.raises(UserError, match=rf"^p\.yaml: train\.first_looks\.{said} alone"):
        plan_look("p.yaml", params(looks={"zoom": {"method": "concept_graph", "encoder": "one"}}), "zoom")


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ({"zoom": {"method": "s3n", "encoder": "three"}}, r"zoom\.encoder: 'three' is neither"),
        ({"zoom": {"method": "s3n", "encoder": "one", "also": []}}, r"zoom\.also: unknown key"),
        ({"Zoom": {"method": "s3n", "encoder": "one"}}, r"Zoom: is used as a folder name"),
        ({"inputs": {"method": "s3n", "encoder": "one"}}, r"inputs: is the folder in data/again"),
    ],
)
def test_a_block_that_cannot_stand(looks: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^p\.yaml: train\.first_looks\.{said}"):
        params(looks=looks)


@pytest.mark.parametrize(
    ("changed", "train", "said"),
    [
        ({"settings": {"features": ["again/other"]}}, {}, r"settings: reads again/other, which is no name under"),
        ({"encoder": "two"}, {}, r"encoder: reads again/zoom, which one looks at, and not two"),
        ({"also": ["two"]}, {}, r"also: reads again/zoom, which other encoders have not"),
        ({}, {"regime": {"kind": "shots", "shots": 1}}, r"settings: reads again/zoom, whose first look was trained on"),
        ({}, {"regime": {"kind": "unseen", "seen": 0.5}}, r"settings: reads again/zoom, whose first look was trained"),
        ({"settings": {"features": ["again/"]}}, {}, r"settings\.features\.0: .*again/NAME with a key under train"),
        ({"settings": {"features": ["again/../x"]}}, {}, r"settings\.features\.0: .*again/NAME with a key under train"),
    ],
)
def test_a_run_that_cannot_have_a_second_look(changed: dict[str, Any], train: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^p\.yaml: train\.runs\.r\.{said}"):
        plan_run("p.yaml", params({**AGAIN, **changed}, **train), "r")
