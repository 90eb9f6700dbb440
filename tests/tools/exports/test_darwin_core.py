"""A Darwin Core archive as python-dwca-reader opens it."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fieldmark import store
from fieldmark.listing import WORMS
from tools.exports.darwin_core import DWC, TERMS, event_date, taxon

reading = pytest.importorskip("dwca.read")
Row = dict[str, Any]
Export = Callable[..., str]
Kept = tuple[np.ndarray, np.ndarray, np.ndarray]


def rows_of(path: Path) -> tuple[list[Row], Any]:
    with reading.DwCAReader(str(path)) as archive:
        assert archive.descriptor.core.type == f"{DWC}Occurrence"
        rows = [(row.id, {term.rpartition("/")[2]: value for term, value in row.data.items()}) for row in archive]
        assert all(number == row["occurrenceID"] for number, row in rows)
        return [row for _, row in rows], archive.metadata


def test_dwca_reader_opens_every_occurrence(made: list[Row], calibrated: Kept, export: Export, tmp_path: Path) -> None:
    said = export("darwin-core", tmp_path / "x.zip", "--run", "zero_shot", "--split", "all", "--media-url", "https://x/")
    assert "30 occurrences, 0 of them PredictedByMachine; 10 without a scientificName, of 1 class" in said
    assert "12 without an eventDate" in said
    assert "10 without coordinates" in said
    rows, metadata = rows_of(tmp_path / "x.zip")
    assert [row["occurrenceID"] for row in rows] == [image["image_id"] for image in made]
    split, y, probabilities = calibrated
    names = {"tang": "Paracanthurus hepatus", "other": "Acanthurus coeruleus", "wrasse": ""}
    classes = sorted(names)
    right = probabilities.argmax(1) == y
    assert 0 < right.sum() < 30
    for number, (row, image) in enumerate(zip(rows, made, strict=True)):
        assert (row["basisOfRecord"], row["occurrenceStatus"]) == ("MachineObservation", "present")
        # The label names the row, whatever the run says.
        assert row["scientificName"] == names[image["class_id"]]
        assert row["identificationVerificationStatus"] == "ValidatedByHuman"
        assert ("zero_shot" in row["identifiedBy"]) is bool(right[number])
        best = classes[probabilities[number].argmax()]
        said = "" if right[number] else (names[best] or "Wrasse | <b>")
        assert row["previousIdentifications"].startswith(said)
        assert bool(row["previousIdentifications"]) is not bool(right[number])
        about = json.loads(row["dynamicProperties"])
        assert (about["path"], about["split"]) == (image["path"], split[number])
        assert about["probability"] == pytest.approx(probabilities[number, y[number]], abs=1e-4)
        assert row["license"] == (image["licence"] or "")
        assert row["verbatimEventDate"] == (image["captured_at"] or "")
        assert row["minimumDepthInMeters"] == row["maximumDepthInMeters"]
        assert row["minimumDepthInMeters"] == ("" if image["depth_m"] is None else str(image["depth_m"]))
        where = [row[name] for name in ("decimalLatitude", "decimalLongitude", "geodeticDatum")]
        assert where == (["", "", ""] if image["latitude"] is None else ["-17.5", "-149.75", "not recorded"])
        assert row["associatedMedia"].startswith("https://x/")
        assert row["associatedMedia"].isascii()
    assert metadata.find("dataset/creator/organizationName").text == "to be filled in by who publishes"


def test_classes_are_named_as_far_as_they_are_known() -> None:
    lineage = ["Animalia", "Acanthuridae", "Acanthurus coeruleus"]
    aliases = ["blue doctor", f"{WORMS}159580"]
    row = {"name": "Blue tang", "scientific_name": "Acanthurus coeruleus", "lineage": lineage, "aliases": aliases}
    assert taxon(row) == {
        "scientificName": "Acanthurus coeruleus",
        "scientificNameID": "urn:lsid:marinespecies.org:taxname:159580",
        "kingdom": "Animalia",
        "higherClassification": "Animalia | Acanthuridae",
        "vernacularName": "Blue tang",
        "verbatimIdentification": "Blue tang",
    }
    row |= {"name": "Acanthurus coeruleus", "lineage": ["Surgeonfish"], "aliases": None}
    assert taxon(row)["vernacularName"] == taxon(row)["kingdom"] == ""
    assert taxon(row)["scientificNameID"] == ""
    assert taxon(row | {"scientific_name": None, "lineage": None})["scientificName"] == ""


def test_a_taxon_of_worms_is_named_by_its_number(
    made: list[Row], export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a class has an AphiaID there is a column of it more; elsewhere the archive is as it was."""
    export("darwin-core", tmp_path / "before.zip", "--run", "zero_shot")
    assert "scientificNameID" not in rows_of(tmp_path / "before.zip")[0][0]
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    path = "data/index/classes.parquet"
    header, classes = store.read_header(path, "index.classes/2"), store.read_table(path, "index.classes/2").to_pylist()
    rows = [row | ({"aliases": [f"{WORMS}219671"]} if row["class_id"] == "tang" else {}) for row in classes]
    store.write_table(
        store.make_table("index.classes/2", rows), path, "index.classes/2", header.params, header.fingerprint
    )
    export("darwin-core", tmp_path / "after.zip", "--run", "zero_shot")
    found = {(row["scientificName"], row["scientificNameID"]) for row in rows_of(tmp_path / "after.zip")[0]}
    assert found == {
        ("Paracanthurus hepatus", "urn:lsid:marinespecies.org:taxname:219671"), ("Acanthurus coeruleus", ""), ("", ""),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2024-05-01", "2024-05-01"),
        ("2024-05-01 10:11:12", "2024-05-01T10:11:12"),
        ("2024-05-01T10:11:12Z", "2024-05-01T10:11:12Z"),
        ("2024:05:01 10:11:12", "2024-05-01T10:11:12"),
        ("2024", "2024"),
        ("2024-05", "2024-05"),
        ("2024-13", ""),
        ("01/05/2024", ""),  # the first of May or the fifth of January
        ("0000:00:00 00:00:00", ""),  # a camera whose clock was never set
        ("spring", ""),
        (None, ""),
    ],
)
def test_a_date_that_could_be_misread_is_none(given: str | None, expected: str) -> None:
    assert event_date(given) == expected


def test_equal_inputs_equal_bytes(made: list[Row], export: Export, tmp_path: Path) -> None:
    export("darwin-core", tmp_path / "a.zip", "--run", "zero_shot")
    export("darwin-core", tmp_path / "b.zip", "--run", "zero_shot")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["meta.xml", "eml.xml", "occurrence.txt"]
        lines = archive.read("occurrence.txt").decode().splitlines()
        assert {line.count("\t") for line in lines} == {len(TERMS) - 1}
        for name in ("meta.xml", "eml.xml"):
            ElementTree.fromstring(archive.read(name))
