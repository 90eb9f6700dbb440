"""Texts of one's own for the classes: read from files, matched to classes, kept as answers that nobody was asked for.

`concepts.import` and `concepts.edits` are each a JSON object of class -> list of texts, or a folder of CLASS.txt, one
text a line (blank lines and hidden files are passed over). All is UTF-8, with or without a BOM. A class stands there as
its folder or given name, its class_id, or else its `name`; names are compared after NFC. The key "*" holds texts of no
class. Another key that is no class is an error, unless it is left of a class that was removed: see match_classes.

An edit is a model's answer that someone wrote over. It goes before an import and before every model, whatever becomes
of the prompt. Like an import's, its row is a function of its texts alone, so it does not name the model that wrote the
first version, and every text counts as seen on the class itself (kind visual).
"""

import difflib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from fieldmark.command import UserError, counted, name_some
from fieldmark.params import NONE, Concepts
from fieldmark.store import canonical_json, class_id_of, nfc, sha256, write_text

IMPORT, EDITS, SIBLINGS = "concepts.import", "concepts.edits", "concepts.siblings"
GENERIC = "*"  # stands in a file for a class: texts of no class
FORM = "a JSON object of class -> list of texts, or a folder of CLASS.txt"
Row = dict[str, Any]
Texts = dict[str, list[str]]


class Own(NamedTuple):
    """Texts of one's own by class_id, the key of params.yaml and its value that they come from, their rows' source."""

    texts: Texts
    key: str
    path: str
    source: str

    def __str__(self) -> str:
        return f"{self.path} ({self.key})"


def read_own(concepts: Concepts, classes: list[Row]) -> list[Own]:
    """What is edited, and of the other classes what is imported. Raises UserError as `read_texts` does."""
    edited = read_texts(concepts.edits, EDITS, classes)
    imported = read_texts(concepts.imported, IMPORT, classes)
    imported = {class_id: texts for class_id, texts in imported.items() if class_id not in edited}
    return [Own(edited, EDITS, concepts.edits, "edited"), Own(imported, IMPORT, concepts.imported, "import")]


def read_texts(path: str, key: str, classes: list[Row]) -> Texts:
    """The texts of each class_id that `path`, the value of `key`, covers; `classes` are rows of index.classes/2.

    Raises UserError: unreadable, a key that is no class or the name of several, two keys for one class, or a class
    without texts.
    """
    if path == NONE:
        return {}
    source = Path(path)
    pairs = read_pairs(source, key)
    if not pairs:
        what = "CLASS.txt" if source.is_dir() else "class"
        raise UserError(f"{path}: holds no {what}; {key} takes {FORM}, or {NONE}")
    return match_classes(source, key, pairs, classes)


def read_pairs(path: Path, key: str) -> list[tuple[str, Any]]:
    return read_folder(path, key) if path.is_dir() else read_json(path, key)


def read_json(path: Path, key: str) -> list[tuple[str, Any]]:
    """The pairs of a JSON object, a class that stands there twice as two."""
    if path.exists() and not path.is_file():
        raise UserError(f"params.yaml: {key}: {path} is no file; name {FORM}, or {NONE}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        # Objects become tuples of pairs: a dict would keep one of two equal keys.
        content = json.loads(text, object_pairs_hook=tuple)
        # A lone surrogate is JSON but no text.
        canonical_json(content).encode()
    except OSError as error:
        said = f"{path} cannot be read ({error.strerror}); name {FORM}, or {NONE}"
        raise UserError(f"params.yaml: {key}: {said}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON in UTF-8 ({error}); {key} takes {FORM}") from None
    if not isinstance(content, tuple):
        raise UserError(f"{path}: holds no class; {key} takes {FORM}")
    return list(content)


def read_folder(folder: Path, key: str) -> list[tuple[str, list[str]]]:
    """CLASS and lines of each CLASS.txt."""
    pairs = []
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix != ".txt":
            raise UserError(f"{path}: is not named CLASS.txt; rename it, or take it out of {folder} ({key})")
        if not path.is_file():
            raise UserError(f"{path}: is no file; take it out of {folder} ({key})")
        try:
            path.name.encode()
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 ({error}); save it as that") from None
        pairs.append((path.stem, [line for line in lines if line]))
    return pairs


def match_classes(path: Path, key: str, pairs: list[tuple[str, Any]], classes: list[Row]) -> Texts:
    """The texts by class_id, those of no class as "*". A folder or class_id goes before a name: no two classes share
    those.

    A name that is no class, and is not like one without texts here, may be of a class that was removed: it is passed
    over with a warning in a file of edits, which few classes have, and where every class has its texts, as long as
    most names are classes. Elsewhere it may be one that was renamed, and is an error.
    """
    ids = {row["class_id"] for row in classes}
    named: dict[str, list[str]] = defaultdict(list)
    for row in classes:
        named[nfc(row["name"])].append(row["class_id"])
    named[GENERIC] = [GENERIC]
    found = [[class_id_of(name)] if class_id_of(name) in ids else named.get(nfc(name), []) for name, _ in pairs]

    covered = {class_id for matches in found for class_id in matches}
    bare = [row for row in classes if row["class_id"] not in covered]
    unknown = [name for (name, _), matches in zip(pairs, found, strict=True) if not matches]
    if unknown:
        removed = key == EDITS or (not bare and 2 * len(unknown) < len(pairs))
        check_unknown(path, unknown, classes, bare, removed=removed)
        pairs = [pair for pair, matches in zip(pairs, found, strict=True) if matches]
        found = [matches for matches in found if matches]

    texts: Texts = {}
    keys: dict[str, str] = {}
    wrong = []
    for (name, value), (class_id, *others) in zip(pairs, found, strict=True):
        first = keys.setdefault(class_id, name)
        if others:
            wrong.append((name, f"is the name of {', '.join([class_id, *others])}; put a class_id in its place"))
        elif class_id in texts:
            wrong.append((name, f"stands for the class of {first!r} too, {class_id}; keep one of them"))
        elif not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            wrong.append((name, 'is not a list of texts; write it as ["...", "..."]'))
        elif not any(text.strip() for text in value):
            wrong.append((name, "has no text; write some, or take it out"))
        else:
            texts[class_id] = value
    refuse(path, wrong)
    return texts


def check_unknown(path: Path, unknown: list[str], classes: list[Row], bare: list[Row], *, removed: bool) -> None:
    """Warn of names that are no class, where they may be of classes that were removed. Raises UserError elsewhere."""
    # Names of alike species are alike: only what differs in a letter or two is taken for a class that was renamed.
    renamed = [(name, like) for name in unknown if (like := closest(name, bare, 0.85))]
    if removed and not renamed:
        said = counted(len(unknown), "name is of no class, and is", "names are of no class, and are")
        print(f"warning: {path}: {said} passed over: {name_some(list(map(repr, unknown)), 5)}", file=sys.stderr)
        return
    first, like = renamed[0] if renamed else (unknown[0], closest(unknown[0], classes, 0.6))
    known = name_some(list(dict.fromkeys(row["name"] for row in classes)), 8)
    hint = f"; did you mean {like!r}?" if like else f" (these are {known}); correct it"
    others = [name for name in unknown if name != first]
    refuse(path, [(name, f"is no folder, class_id or name of a class{hint}") for name in [first, *others]])


def closest(name: str, classes: list[Row], cutoff: float) -> str | None:
    """The name or class_id that is most like a name, from 0 to 1 at least `cutoff`; the hashes of ids do not count."""
    known = {comparable(each): each for row in classes for each in (row["class_id"], row["name"])}
    close = difflib.get_close_matches(comparable(name), known, n=1, cutoff=cutoff)
    return known[close[0]] if close else None


def comparable(name: str) -> str:
    """A name or a class_id in the words that both share."""
    return re.sub(r"[-_ ]+", " ", re.sub(r"-[0-9a-f]{8}$", "", nfc(name).casefold()))


def refuse(path: Path, wrong: list[tuple[str, str]]) -> None:
    """Raises UserError for the first of the keys that something is wrong with, where there is one."""
    if wrong:
        key, what = wrong[0]
        raise UserError(f"{path}: {key!r}: {what}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}")


def start_edit(path: str, class_id: str, texts: list[str], classes: list[Row]) -> Path:
    """Put texts into `path`, the value of concepts.edits, for someone to edit; make a JSON file where nothing is there.

    Returns the file to edit. Raises UserError: the class stands there already, or `path` cannot be read.
    """
    source = Path(path)
    pairs = read_pairs(source, EDITS) if source.exists() else []
    if class_id in match_classes(source, EDITS, pairs, classes):
        raise UserError(f"{path}: holds {class_id} already; edit it there, or take it out to start anew")
    target = source / f"{class_id}.txt" if source.is_dir() else source
    texts = [" ".join(text.split()) for text in texts]
    if source.is_dir():
        content = "".join(f"{text}\n" for text in texts)
    else:
        content = json.dumps({**dict(pairs), class_id: texts}, indent=2, ensure_ascii=False) + "\n"
    write_text(target, content)
    return target


def row_of(class_id: str, texts: list[str], source: str = "import") -> Row:
    """A row of llm.answers/1 with source import or edited, a function of class and texts: no time, path or prompt."""
    concepts = [{"text": text, "kind": "visual", "part": None} for text in texts]
    return {
        "item_key": sha256(canonical_json({source: [class_id, texts]})),
        "subject_id": class_id,
        "sample": 0,
        "prompt_sha": sha256(canonical_json(texts)),
        "status": "ok",
        "response_json": canonical_json({"concepts": concepts}),
        "model_requested": source,
        "model_reported": None,
        "response_id": None,
        "finish_reason": None,
        "input_tokens": None,
        "output_tokens": None,
        "cost_usd": None,
        "attempts": 0,
        "source": source,
        "created_at": "",
    }
