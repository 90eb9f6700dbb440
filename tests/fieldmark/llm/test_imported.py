"""Imported texts: what a key stands for, what a row holds, and how each thing wrong with a source is said."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.command import UserError
from fieldmark.llm.imported import EDITS, IMPORT, read_own, read_texts, row_of, start_edit
from fieldmark.llm.prompts import load_prompt, problem
from fieldmark.params import NONE, Concepts
from fieldmark.store import canonical_json, class_id_of, make_table, sha256
from tests.project import ROOT

CUB = ROOT.parent / "shared/data/cub100"
RAY, TANG = class_id_of("001.Iron_ray"), class_id_of("Blue Tang")
CLASSES = [
    {"class_id": RAY, "name": "Iron ray"},
    {"class_id": TANG, "name": "Blue tang"},
    {"class_id": "twin-a", "name": "Twin"},
    {"class_id": "twin-b", "name": "Twin"},
]


def read(path: Path, content: str | bytes | Any) -> dict[str, list[str]]:
    """What is imported from a file of these bytes, of this text, or of this value as JSON."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_texts(str(path), IMPORT, CLASSES)


@pytest.mark.parametrize("key", ["001.Iron_ray", RAY, "Iron ray"])
def test_a_key_is_a_folder_a_class_id_or_a_name(tmp_path: Path, key: str) -> None:
    assert read(tmp_path / "own.json", {key: ["a", " b "], "Blue Tang": ["c"]}) == {RAY: ["a", " b "], TANG: ["c"]}


def test_a_star_stands_for_no_class(tmp_path: Path) -> None:
    assert read(tmp_path / "own.json", {"*": ["a wavy tip"], "Iron ray": ["a"]}) == {"*": ["a wavy tip"], RAY: ["a"]}


def test_a_folder_goes_before_a_name(tmp_path: Path) -> None:
    classes = [{"class_id": "a", "name": "b"}, {"class_id": "b", "name": "x"}]
    path = tmp_path / "own.json"
    path.write_text('{"b": ["of b"]}')
    assert read_texts(str(path), IMPORT, classes) == {"b": ["of b"]}


def test_a_folder_holds_one_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "001.Iron_ray.txt").write_bytes("\ufeffa grey fish\r\n\r\n  a fish with é \r\n".encode())
    (tmp_path / "Blue tang.txt").write_text("a blue fish")
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    assert read_texts(str(tmp_path), IMPORT, CLASSES) == {RAY: ["a grey fish", "a fish with é"], TANG: ["a blue fish"]}


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    assert read(tmp_path / "own.json", '\ufeff{"Iron ray": ["é"]}') == {RAY: ["é"]}


def test_none_imports_nothing_and_another_empty_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"own\.json: is not JSON"):
        read(tmp_path / "own.json", "")
    monkeypatch.chdir(tmp_path)
    assert read_texts(NONE, IMPORT, CLASSES) == {}
    monkeypatch.chdir(ROOT)
    assert Path(NONE).read_bytes() == b""


ALL = {"Iron ray": ["a"], "Blue tang": ["b"], "twin-a": ["c"], "twin-b": ["d"]}


def test_texts_of_a_class_that_was_removed_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every class has its texts, so that no other one can be meant; among edits, no name like it is meant."""
    texts = read(tmp_path / "own.json", {**ALL, "Great auk": ["x"]})
    assert list(texts) == [RAY, TANG, "twin-a", "twin-b"]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/own.json: 1 name is of no class, and is passed over: 'Great auk'\n"
    )
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits/great-auk-0123abcd.txt").write_text("x")
    assert read_texts(str(tmp_path / "edits"), EDITS, CLASSES) == {}
    assert "edits: 1 name is of no class, and is passed over: 'great-auk-0123abcd'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "content", "said"),
    [
        # Renamed, removed and another added, or of another data set.
        (IMPORT, {**ALL, "Iron rays": ["x"]} | {"Iron ray": []}, "'Iron ray': has no text"),
        (IMPORT, {"Iron rays": ["a"], "Blue tang": ["b"], "twin-a": ["c"], "twin-b": ["d"]}, "did you mean 'Iron ray'"),
        (IMPORT, {"Great auk": ["a"], "Blue tang": ["b"], "twin-a": ["c"], "twin-b": ["d"]}, "'Great auk': is no "),
        (IMPORT, {**ALL, **{f"x{n}": ["x"] for n in range(4)}}, r"'x0': is no folder, .* \(and 3 more\)"),
        (IMPORT, {"Great auk": ["a"]}, "name of a class \\(these are Iron ray, Blue tang, Twin\\); correct it$"),
        (EDITS, {"Iron rays": ["a"]}, r"'Iron rays': is no .*; did you mean 'Iron ray'\?"),
        (EDITS, {"iron-rays-0123abcd": ["a"]}, f"did you mean '(Iron ray|{RAY})'"),
    ],
)
def test_a_name_that_may_be_of_a_class_that_was_renamed_is_refused(
    tmp_path: Path, key: str, content: dict[str, list[str]], said: str
) -> None:
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_texts(str(tmp_path / "own.json"), key, [{**CLASSES[0], "name": "Iron ray"}, *CLASSES[1:]])


def test_accents_may_be_stored_otherwise(tmp_path: Path) -> None:
    apart, together = "Moine\u0301", "Moin\u00e9"
    for folder, name, key in ((apart, "x", together), (together, "x", apart), ("y", together, apart)):
        classes = [{"class_id": class_id_of(folder), "name": name}]
        (tmp_path / "own.json").write_text(json.dumps({key: ["a"]}))
        assert read_texts(str(tmp_path / "own.json"), IMPORT, classes) == {classes[0]["class_id"]: ["a"]}


def test_what_is_no_file_holds_no_texts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.json")
    with pytest.raises(UserError, match=r"concepts\.import: .*own\.json is no file"):
        read_texts(str(tmp_path / "own.json"), IMPORT, CLASSES)
    (tmp_path / "own").mkdir()
    os.mkfifo(tmp_path / "own/Iron ray.txt")
    with pytest.raises(UserError, match=r"Iron ray\.txt: is no file"):
        read_texts(str(tmp_path / "own"), IMPORT, CLASSES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"Iron rai": ["x"]}, r"'Iron rai': is no folder, class_id or name of a class; did you mean 'Iron ray'\?$"),
        ({"~~~": ["x"], "++": [], "Twin": []}, r"'~~~': is no .* \(these are Iron ray, .*\); .* \(and 1 more\)$"),
        ({"Twin": ["x"]}, "'Twin': is the name of twin-a, twin-b; put a class_id"),
        ({RAY: ["x"], "Iron ray": ["x"]}, f"'Iron ray': stands for the class of '{RAY}' too"),
        ('{"Iron ray": ["x"], "Iron ray": ["y"]}', "'Iron ray': stands for the class of 'Iron ray' too"),
        ({"Iron ray": "x"}, "'Iron ray': is not a list of texts"),
        ({"Iron ray": {"x": ["y"]}}, "'Iron ray': is not a list of texts"),
        ({"Iron ray": ["x", 1], "Blue tang": None}, r"'Iron ray': is not a list of texts.* \(and 1 more\)$"),
        ({"Iron ray": []}, "'Iron ray': has no text"),
        ({"Iron ray": ["", " \n"]}, "'Iron ray': has no text"),
        ({}, "holds no class"),
        (["Iron ray"], "holds no class"),
        ("[" * 10_000, "is not JSON in UTF-8"),
        ('{"Iron ray": ["x"]', r"is not JSON in UTF-8 \(Expecting"),
        ("\n", r"is not JSON in UTF-8 \(Expecting"),
        ('{"Iron ray": ["é"]}'.encode("latin-1"), r"is not JSON in UTF-8 \('utf-8' codec"),
        ('{"Iron ray": ["\\ud800"]}', r"is not JSON in UTF-8 \(.*surrogates"),
        ('{"\\ud800": ["x"]}', r"is not JSON in UTF-8 \(.*surrogates"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_one_line(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "own.json"
    with pytest.raises(UserError, match=said) as caught:
        read(path, content)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("Iron rai.txt", b"x", "'Iron rai': is no folder, class_id or name of a class; did you mean 'Iron ray'"),
        ("Iron ray.txt", b"\n \n", "'Iron ray': has no text"),
        ("Iron ray.txt", b"caf\xe9", r"Iron ray\.txt: cannot be read as UTF-8"),
        ("Iron ray.md", b"x", r"Iron ray\.md: is not named CLASS\.txt"),
        (".hidden.txt", b"x", r"holds no CLASS\.txt"),
        (os.fsdecode(b"caf\xe9.txt"), b"x", "cannot be read as UTF-8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_texts(str(tmp_path), IMPORT, CLASSES)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_two_files_for_one_class_and_a_missing_source_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "Iron ray.txt").write_text("x")
    (tmp_path / f"{RAY}.txt").write_text("y")
    with pytest.raises(UserError, match=f"stands for the class of '({RAY}|Iron ray)' too"):
        read_texts(str(tmp_path), IMPORT, CLASSES)
    with pytest.raises(UserError, match=r"^params\.yaml: concepts\.edits: .*gone\.json cannot be read .*data/none$"):
        read_texts(str(tmp_path / "gone.json"), EDITS, CLASSES)


def test_an_edit_goes_before_an_import(tmp_path: Path) -> None:
    edits, own = tmp_path / "edits.json", tmp_path / "own.json"
    edits.write_text('{"Iron ray": ["edited"]}')
    own.write_text('{"001.Iron_ray": ["imported"], "Blue Tang": ["imported"]}')
    edited, imported = read_own(Concepts.model_validate({"import": str(own), "edits": str(edits)}), CLASSES)
    assert (edited.texts, edited.source) == ({RAY: ["edited"]}, "edited")
    assert (imported.texts, imported.source) == ({TANG: ["imported"]}, "import")
    assert str(edited) == f"{edits} (concepts.edits)"
    assert row_of("a", ["x"], "edited")["item_key"] != row_of("a", ["x"])["item_key"]


def test_an_edit_is_put_beside_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "edits.json"
    assert start_edit(str(path), RAY, ["a fish\nwith é"], CLASSES) == path
    path.write_text(path.read_text().replace("with é", "without é"))
    start_edit(str(path), TANG, ["b"], CLASSES)
    assert read_texts(str(path), EDITS, CLASSES) == {RAY: ["a fish without é"], TANG: ["b"]}
    assert path.read_text().count("\n") == 8
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"edits\.json: holds {TANG} already"):
        start_edit(str(path), TANG, ["c"], CLASSES)
    assert path.read_bytes() == before
    path.write_text("{")
    with pytest.raises(UserError, match=r"is not JSON.*concepts\.edits takes"):
        start_edit(str(path), TANG, ["c"], CLASSES)
    assert [each.name for each in path.parent.iterdir()] == ["edits.json"]


def test_a_folder_takes_an_edit_as_a_file(tmp_path: Path) -> None:
    assert start_edit(str(tmp_path), RAY, ["a", "b"], CLASSES) == tmp_path / f"{RAY}.txt"
    assert read_texts(str(tmp_path), EDITS, CLASSES) == {RAY: ["a", "b"]}


@given(st.lists(st.text(), min_size=1))
def test_a_row_is_a_function_of_class_and_texts_and_fits_the_prompt(texts: list[str]) -> None:
    row = row_of("a", texts)
    answer = json.loads(row["response_json"])
    assert answer == {"concepts": [{"text": text, "kind": "visual", "part": None} for text in texts]}
    assert problem(answer, load_prompt(ROOT / "prompts/concepts.md").schema) is None
    assert make_table("llm.answers/1", [row]).to_pylist() == [row] == [row_of("a", list(texts))]
    assert (row["source"], row["status"], row["sample"], row["created_at"]) == ("import", "ok", 0, "")
    assert row["prompt_sha"] == sha256(canonical_json(texts)) == row_of("b", texts)["prompt_sha"]
    assert len({row["item_key"], row_of("b", texts)["item_key"], row_of("a", [*texts, ""])["item_key"]}) == 3


@pytest.mark.skipif(not CUB.is_dir(), reason="needs ../shared/data/cub100, which is not here")
def test_texts_of_cub_match_its_class_folders() -> None:
    folders = [line.split()[1] for line in (CUB / "CUB_200_2011/classes.txt").read_text().splitlines()]
    classes = [{"class_id": class_id_of(folder), "name": folder.partition(".")[2]} for folder in folders]
    texts = read_texts(str(CUB / "concepts_gpt4.json"), IMPORT, classes)
    assert len(texts) == len(folders) == 100
    assert sum(map(len, texts.values())) == 2395
    albatross = texts[class_id_of("001.Black_footed_Albatross")]
    assert albatross[3] == "A bird with a white ring around the base of its bill."
    with pytest.raises(UserError, match=r"'001\.Black_footed_Albatross': is no .* \(and 49 more\)$"):
        read_texts(str(CUB / "concepts_gpt4.json"), IMPORT, classes[50:])
