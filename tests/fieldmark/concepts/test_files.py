"""Each layout of concept files, told by what it holds, and every way in which one can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.concepts.files import read_concept_file

# As LaBo, CuPL, Label-free CBM and VLG-CBM name the classes of CUB, and as the index does.
CLASSES: list[dict[str, Any]] = [
    {"class_id": "001-black-footed-albatross-4697a2c4", "name": "Black footed Albatross"},
    {"class_id": "cardinal", "name": "Cardinal"},
    {"class_id": "le-conte-1a2b3c4d", "name": "Le Conte's Sparrow"},
]
ALBATROSS, CARDINAL, SPARROW = (row["class_id"] for row in CLASSES)
WANTED = {ALBATROSS: ["black feet", "a white, \"curved\" bill"], CARDINAL: ["a red crest"]}


@pytest.mark.parametrize(
    "name",
    [
        *("001.Black_footed_Albatross", "Black footed Albatross", "black-footed albatross"),
        *("BLACK_footed-albatross", ALBATROSS),
    ],
)
def test_lists_call_classes_as_each_project_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / "class2concepts.txt"  # what it holds counts, not its name
    path.write_text(json.dumps({name: WANTED[ALBATROSS], "Cardinal": WANTED[CARDINAL]}))
    assert read_concept_file(path, CLASSES) == WANTED


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "sheet.json"
    rows = [("Text", "note", "Class"), ("black feet", "x", "Black footed Albatross"), ("a red crest", "", "Cardinal")]
    rows += [('"a white, ""curved"" bill"', "", "Black footed Albatross"), ("", "", "Le Conte's Sparrow")]
    path.write_text("\ufeff" + "".join(separator.join(row) + "\r\n" for row in rows), encoding="utf-8")
    assert read_concept_file(path, CLASSES) == {**WANTED, SPARROW: []}


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cardinal.txt").write_text("a red crest\n\n")
    (tmp_path / "Black footed Albatross.txt").write_text("black feet\na white, \"curved\" bill\n")
    assert read_concept_file(tmp_path, CLASSES) == WANTED


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["a red crest"]', "is a JSON list, which says of no text which class it is of"),
        ("a red crest\nblack feet\n", "line 1: 'a red crest' is no head with the columns class and text"),
        ("class,text\n,a red crest\n", "line 2: a text has no class"),
        ("{}", "holds no class"),
        ("{", "is not JSON"),
        ('{"Cardnal": ["a red crest"]}', "'Cardnal': is no folder, class_id or name .* did you mean 'Cardinal'"),
        ('{"Cardinal": ["red"], "cardinal": ["a crest"]}', "'cardinal': stands for the class of 'Cardinal' too"),
        ('{"Cardinal": ["red"], "Cardinal": ["a crest"]}', "'Cardinal': stands for the class of 'Cardinal' too"),
        ('{"Cardinal": "a red crest"}', "'Cardinal': is not a list of texts"),
        ('{"Cardinal": {"bill": ["red"]}}', "'Cardinal': is not a list of texts"),
    ],
)
def test_what_is_wrong_names_file_and_key(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "concepts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as raised:
        read_concept_file(path, CLASSES)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_of_two_classes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "concepts.json"
    path.write_text('{"robin": ["a red breast"]}')
    twice = [{"class_id": "robin-eu", "name": "Robin"}, {"class_id": "robin-us", "name": "Robin"}]
    with pytest.raises(UserError, match="'robin': is the name of robin-eu, robin-us"):
        read_concept_file(path, twice)


def test_the_numbers_of_an_aircraft_are_its_name(tmp_path: Path) -> None:
    craft = [{"class_id": f"{name}-1a2b", "name": name} for name in ("747-100", "737-400")]
    path = tmp_path / "concepts.json"
    path.write_text('{"737_400": ["two engines"], "747-100": ["a hump"]}')
    assert read_concept_file(path, craft) == {"747-100-1a2b": ["a hump"], "737-400-1a2b": ["two engines"]}
    for stranger in ("787-100", "100", "717 400"):
        path.write_text(json.dumps({stranger: ["two engines"]}))
        with pytest.raises(UserError, match=f"'{stranger}': is no folder, class_id or name"):
            read_concept_file(path, craft)
