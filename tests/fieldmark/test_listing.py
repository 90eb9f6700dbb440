"""Tables beside the images: names that are the same but for their spelling, and rows that only group others."""

import unicodedata
from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.formats import read_listing
from fieldmark.listing import Listing, Spelling, list_classes, read_csv
from fieldmark.params import Dataset
from fieldmark.store import class_id_of
from tests.project import ROOT

TOGETHER = unicodedata.normalize("NFC", "Macareux moiné")
APART = unicodedata.normalize("NFD", TOGETHER)
NABIRDS = ROOT.parent / "shared/data/layouts/nabirds/nabirds"


def lay_out(root: Path, *images: str, **tables: str) -> Dataset:
    """A data set in folders, with these tables beside them."""
    for path in images:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    for name, content in tables.items():
        (root / f"{name}.csv").write_text(content, encoding="utf-8")
    return Dataset(root=str(root))


def lay_out_manifest(root: Path, classes: list[str], table: str) -> Listing:
    lines = "".join(f"{number}.jpg,{name}\n" for number, name in enumerate(classes))
    (root / "manifest.csv").write_text(f"path,class\n{lines}")
    (root / "classes.csv").write_text(table)
    return read_listing(Dataset(format="manifest", root=str(root)))


def test_accents_that_are_stored_otherwise_are_the_same_name(tmp_path: Path) -> None:
    """A folder from a Mac, and tables that were written elsewhere."""
    listing = read_listing(
        lay_out(
            tmp_path, f"{APART}/{APART}.jpg", "b/1.jpg",
            classes=f"class_id,name,superclass\n{TOGETHER},Puffin,auks\n",
            attributes=f"class_id,attribute,value\n{TOGETHER},bill,high\n",
            parts=f"path,part,x0,y0,x1,y1,visible\n{TOGETHER}/{TOGETHER}.jpg,bill,0,0,1,1,1\n",
        )
    )  # fmt: skip
    rows = list_classes(listing)
    assert [(row["class_id"], row["name"], row["from_images"]) for row in rows if row["class_id"] != "b"] == [
        (class_id_of(TOGETHER), "Puffin", True)
    ]
    assert class_id_of(listing.attributes[0]["class_id"]) == class_id_of(APART) == class_id_of(TOGETHER)
    assert listing.parts[0]["path"] == f"{APART}/{APART}.jpg"
    assert listing.warnings == []


def test_a_path_finds_the_file_whose_accents_are_stored_otherwise(tmp_path: Path) -> None:
    lay_out(tmp_path, f"x/{APART}/{APART}.jpg", f"{TOGETHER}.jpg")
    spelling = Spelling(tmp_path)
    for path, found in {
        f"x/{TOGETHER}/{TOGETHER}.jpg": f"x/{APART}/{APART}.jpg",
        f"{APART}.jpg": f"{TOGETHER}.jpg",
        f"{TOGETHER}.jpg": f"{TOGETHER}.jpg",
        f"gone/{APART}.jpg": f"gone/{APART}.jpg",
        "é\0.jpg": "é\0.jpg",
    }.items():
        assert spelling.on_disk(path) == found
    (tmp_path / "manifest.csv").write_text(f"path,class\nx/{TOGETHER}/{TOGETHER}.jpg,a\n", encoding="utf-8")
    listing = read_listing(Dataset(format="manifest", root=str(tmp_path)))
    assert (tmp_path / listing.images[0]["path"]).is_file()


@pytest.mark.parametrize(
    ("images", "tables", "words"),
    [
        (["Auk/1.jpg", "auk/2.jpg"], {}, r"the classes 'Auk' and 'auk' differ only in upper and lower case"),
        (
            [f"{APART}/1.jpg", f"{TOGETHER}/2.jpg"],
            {},
            r"the classes 'Macareux moine\\u0301' and 'Macareux moin\\xe9' differ only in how accents",
        ),
        (
            [f"a/{APART}.jpg", f"a/{TOGETHER}.jpg"],
            {},
            r"the images 'a/Macareux moine\\u0301\.jpg' and 'a/Macareux moin\\xe9\.jpg' differ only in how accents",
        ),
        (["Auk/1.jpg"], {"classes": "class_id,name\nauk,Great auk\n"}, "classes 'Auk' and 'auk' differ only"),
        (["Auk/1.jpg"], {"classes": "class_id\nAuk \n"}, "classes 'Auk' and 'Auk ' differ only in spaces"),
        (["a/1.jpg"], {"classes": "class_id\nDodo\ndodo\n"}, r"classes\.csv: the classes 'Dodo' and 'dodo' differ"),
        (["a/1.jpg"], {"classes": f"class_id\n{APART}\n{TOGETHER}\n"}, r"classes\.csv: names the class .* twice"),
        (["a/1.jpg"], {"classes": "class_id,Name\na,Auk\n"}, r"has a column 'Name'; did you mean 'name'\? Rename it"),
        (["a/1.jpg"], {"classes": "class_id,superclas\na,\n"}, "a column 'superclas'; did you mean 'superclass'"),
        (
            ["Auk/1.jpg"],
            {"attributes": "class_id,attribute,value\nauk,bill,high\n"},
            r"attributes\.csv: class_id 'auk' is no class; did you mean 'Auk'\?",
        ),
        (
            ["a/1.jpg"],
            {"attributes": "class_id,attribute,value\nzebra,bill,high\n"},
            r"attributes\.csv: class_id 'zebra' is no class; correct it, or name the class in classes\.csv too",
        ),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(tmp_path: Path, images: list[str], tables: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_listing(lay_out(tmp_path, *images, **tables))
    assert "\n" not in str(error.value)


def test_a_field_may_be_a_whole_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'word ' * 30_000}\n")
    [row] = read_csv(tmp_path / "a.csv", ["text"])
    assert len(row["text"]) == 150_000


def test_a_column_that_nothing_reads_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_listing(lay_out(tmp_path, "a/1.jpg", attributes="class_id,attribute,value,photographer\na,bill,high,me\n"))
    assert "attributes.csv: columns that are not read: photographer" in capsys.readouterr().err


HEAD = "path,part,x0,y0,x1,y1,visible\n"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a/1.jpg,eye,10,20,30,40,1\n", r"part 'eye' of a/1\.jpg: x0, .* are 10, 20, 30, 40; .*divide pixels"),
        ("a/1.jpg,eye,0,0,-0.1,1,1\n", "x1, y1 are 0, 0, -0.1, 1"),
        ("a/1.jpg,eye,0.5,0,0.4,1,1\n", "x0 <= x1"),
        ("a/1.jpg,eye,0,0,nan,1,1\n", "x1, y1 are 0, 0, nan, 1"),
        ("a/1.jpg,eye,0,0,1,1,maybe\n", r"visible is 'maybe'; write 1 or 0"),
        ("a/1.jpg,eye,0,0,1,1,\n", r"visible is ''; write 1 or 0"),
        ("a/2.jpg,eye,0,0,1,1,1\n", r"1 of 1 parts are of no image, .* 'a/2\.jpg'; .*did you mean 'a/1\.jpg'\?"),
        ("./x.jpg,eye,0,0,1,1,1\n" * 3, r"3 of 3 parts are of no image.*paths start from the folder"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path: Path, rows: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_listing(lay_out(tmp_path, "a/1.jpg", parts=HEAD + rows))
    assert str(error.value).startswith(f"{tmp_path}/parts.csv: ")
    assert "\n" not in str(error.value)


def test_a_part_of_no_image_among_others_is_a_warning_and_words_say_yes(tmp_path: Path) -> None:
    rows = "".join(f"a/1.jpg,{word},0,0,1,1,{word}\n" for word in ("1", "True", "yes", "0", "FALSE", "no"))
    listing = read_listing(lay_out(tmp_path, "a/1.jpg", parts=HEAD + rows + "a/gone.jpg,eye,0,0,1,1,1\n"))
    assert [part["visible"] for part in listing.parts] == [True, True, True, False, False, False]
    [said] = listing.warnings
    assert "parts.csv: 1 of 7 parts are of no image, the first of 'a/gone.jpg'; they are left out" in said


GROUPS = {
    "by id": "class_id,name,superclass\n1,Birds,\n2,Auks,1\n3,Puffin,2\n4,Dodo,1\n",
    "by name": "class_id,name,superclass\n1,Birds,\n2,Auks,Birds\n3,Puffin,Auks\n4,Dodo,Birds\n",
    "by lineage": "class_id,name,lineage\n1,Birds,\n2,Auks,Birds\n3,Puffin,Birds > Auks\n4,Dodo,Birds\n",
    "with itself": "class_id,name,lineage\n1,Birds,Birds\n2,Auks,Birds>Auks\n3,Puffin,Birds>Auks>Puffin\n4,Dodo,\n",
}  # fmt: skip


@pytest.mark.parametrize("table", GROUPS)
def test_a_row_that_groups_others_is_no_class(tmp_path: Path, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    """4 has no image either, and no class in it: it may be meant to be recognised by its texts."""
    rows = {row["class_id"]: row for row in list_classes(lay_out_manifest(tmp_path, ["3"], GROUPS[table]))}
    assert set(rows) == {"3", "4"}
    assert rows["3"]["lineage"][:2] == ["Birds", "Auks"]
    if table.startswith("by ") and table != "by lineage":
        assert (rows["3"]["superclass"], rows["4"]["superclass"]) == ("Auks", "Birds")
    assert "classes.csv: 2 rows without images group others" in capsys.readouterr().err


def test_a_group_with_images_is_a_class_and_one_name_may_stand_in_the_other(tmp_path: Path) -> None:
    table = "class_id,name,superclass\n1,Eider,\n2,Eider,Eider\n3,Eider (female),Eider\n"
    rows = list_classes(lay_out_manifest(tmp_path, ["3"], table))
    assert [row["class_id"] for row in rows] == ["2", "3"]
    rows = list_classes(lay_out_manifest(tmp_path, ["1", "3"], table))
    assert [row["class_id"] for row in rows] == ["1", "2", "3"]
    with pytest.raises(UserError, match=r"classes\.csv: '1' lies in itself, by the column superclass"):
        lay_out_manifest(tmp_path, ["3", "1"], "class_id,superclass\n1,2\n2,1\n3,1\n")


@pytest.mark.skipif(not NABIRDS.is_dir(), reason="needs ../shared/data/layouts, which is not here")
def test_nabirds_has_555_classes() -> None:
    """Its list of classes names 456 groups as well, 268 of them by the name of a class in them."""
    listing = read_listing(Dataset(format="cub", root=str(NABIRDS)))
    rows = {row["name"]: row for row in list_classes(listing)}
    assert len(rows) == 555
    assert len(listing.images) == 30
    junco = rows["Dark-eyed Junco (Oregon)"]
    assert junco["superclass"] == "Dark-eyed Junco"
    assert junco["lineage"] == ["Birds", "Perching Birds", "New World Sparrows and Allies", "Dark-eyed Junco"]
    assert rows["Verdin"]["superclass"] != "Verdin"


@pytest.mark.skipif(not NABIRDS.is_dir(), reason="needs ../shared/data/layouts, which is not here")
@pytest.mark.parametrize("style", ["id", "name", "lineage"])
def test_so_it_has_as_a_manifest_with_a_class_table(tmp_path: Path, style: str) -> None:
    names = dict(line.split(maxsplit=1) for line in (NABIRDS / "classes.txt").read_text().splitlines())
    above = dict(line.split() for line in (NABIRDS / "hierarchy.txt").read_text().splitlines())
    leaves = set(names) - set(above.values())
    lines = []
    for number, name in names.items():
        chain = []
        group = number
        while group in above:
            group = above[group]
            chain.append(names[group])
        lineage = " > ".join(chain[::-1]) if style == "lineage" else ""
        superclass = {"id": above.get(number, ""), "name": chain[0] if chain else ""}.get(style, "")
        lines.append(f'{number},"{name}","{superclass}","{lineage}"\n')
    listing = lay_out_manifest(tmp_path, sorted(leaves), "class_id,name,superclass,lineage\n" + "".join(lines))
    rows = {row["class_id"]: row for row in list_classes(listing)}
    assert set(rows) == leaves
    assert rows["817"]["lineage"][0] == "Birds"
