"""Concept files as others publish them: which texts stand there for which class, whatever lays them out.

    lists    JSON, {class: [text, ...]}: LaBo's class2concepts.json, CuPL's image prompts, the lists of GPT-3 in
             Label-free CBM, VLG-CBM's *_per_class.json, what concepts.import takes [code]
    table    a spreadsheet saved as CSV: a line of heads with `class` and `text`, then a text a row; separated by
             commas, semicolons or tabs
    folder   CLASS.txt, one text a line

What a file holds says which it is, never its name. All is UTF-8. A class is called by its folder, class_id or name, as
in concepts.import; where that fits none, by what is its name but for case, hyphens, underscores and a number before a
word (001.Black_footed_Albatross; the numbers of 737-400 are its name). A class may have no text; a key that is no class
is an error.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fieldmark.command import UserError
from fieldmark.llm.imported import Row, Texts, closest, comparable, read_folder, read_json, refuse
from fieldmark.store import class_id_of, nfc

Pairs = list[tuple[str, Any]]  # class and texts, as they stand there
WHERE = "a concept file"  # in place of the key of params.yaml that concepts.import names
FORMS = "JSON {class: [text, ...]}, CSV with the columns class and text, or a folder of CLASS.txt"
NUMBER = re.compile(r"^\d+[ ._-]+(?=[^\W\d_])")


def read_concept_file(path: Path, classes: list[Row]) -> Texts:
    """The texts of each class_id that a file names; `classes` are rows of index.classes/2.

    Raises UserError, naming file and key: a layout that is none of these, a class that stands there twice or is none,
    texts that are none.
    """
    return match(path, reader_of(path)(path), classes)


def reader_of(path: Path) -> Callable[[Path], Pairs]:
    """The reader of a layout, by the first character of a file that is no space. Raises UserError."""
    if path.is_dir():
        return lambda folder: list(read_folder(folder, WHERE))
    try:
        start = path.read_text(encoding="utf-8-sig").lstrip()[:1]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name {FORMS}") from None
    except UnicodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as that") from None
    if start == "[":
        raise UserError(f"{path}: is a JSON list, which says of no text which class it is of; write {FORMS}")
    return (lambda file: read_json(file, WHERE)) if start == "{" else read_csv


def read_csv(path: Path) -> Pairs:
    """The texts of each class of a table, in the order of its rows. Raises UserError."""
    text = path.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    heads = {(head or "").strip().casefold(): head for head in rows.fieldnames or []}
    if not {"class", "text"} <= heads.keys():
        said = first.strip()[:60]
        raise UserError(f"{path}: line 1: {said!r} is no head with the columns class and text; write {FORMS}")
    found: dict[str, list[str]] = defaultdict(list)
    try:
        for row in rows:
            name, said = ((row[heads[head]] or "").strip() for head in ("class", "text"))
            if not name and said:
                raise UserError(f"{path}: line {rows.line_num}: a text has no class; name it in the column class")
            if name:
                found[name] += [said] if said else []
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num}: is no CSV ({error}); save the sheet as CSV again") from None
    return list(found.items())


def match(path: Path, pairs: Pairs, classes: list[Row]) -> Texts:
    """The texts by class_id. Raises UserError for the first key that something is wrong with."""
    if not pairs:
        raise UserError(f"{path}: holds no class; write {FORMS}")
    ids, exact, alike = {row["class_id"] for row in classes}, defaultdict(list), defaultdict(list)
    for row in classes:
        exact[nfc(row["name"])].append(row["class_id"])
        for name in {plain(row["name"]), plain(row["class_id"])}:
            alike[name].append(row["class_id"])
    texts: Texts = {}
    first: dict[str, str] = {}
    wrong = []
    for key, value in pairs:
        own = class_id_of(key)
        found = [own] if own in ids else exact.get(nfc(key)) or alike.get(plain(key), [])
        if not found:
            like = closest(key, classes, 0.6)
            hint = f"did you mean {like!r}?" if like else "take it out, or correct it"
            wrong.append((key, f"is no folder, class_id or name of a class of this data set; {hint}"))
        elif len(found) > 1:
            wrong.append((key, f"is the name of {', '.join(found)}; put a class_id in its place"))
        elif found[0] in texts:
            wrong.append((key, f"stands for the class of {first[found[0]]!r} too, {found[0]}; keep one of them"))
        elif not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            wrong.append((key, 'is not a list of texts; write it as ["...", "..."]'))
        else:
            texts[found[0]], first[found[0]] = value, key
    refuse(path, wrong)
    return texts


def plain(name: str) -> str:
    """A name without what files write differently: case, hyphens, underscores, a number before a word."""
    return comparable(NUMBER.sub("", name.strip()))
