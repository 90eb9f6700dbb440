"""Documents of a text graph: nodes.csv and edges.csv of a folder, and the sentences of a text.

nodes.csv has a document a row: `id`, `text` and `label`, and, where known, `title`, `split` (train, val, test or empty)
and `group`. edges.csv has an edge a row: `src` and `dst`, ids, and, where known, `weight` (1 where there is none) and
`kind` (`given` where there is none). A message flows from src to dst: of a citation, src may be who cites.
"""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fieldmark.command import UserError
from fieldmark.listing import SPLITS, Row, hint, read_csv
from fieldmark.store import canonical_json, nfc, sha256

NODES, EDGES = "nodes.csv", "edges.csv"
# How texts fall into sentences; counts up when the same text comes out otherwise.
RULES = 1
# A text tower of CLIP reads 77 tokens; a longer sentence goes in pieces, so that nothing of it is lost.
LONGEST = 40
# What ends a sentence: a full stop and its like, maybe closing something, before a space and a new beginning.
END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][)\"'\u2019\u201d]))\s+(?=[\"'(\u2018\u201c]*[A-Z0-9])")
# A full stop behind these ends no sentence, nor does one behind a single letter: J. Smith, e.g.
SHORTENED = re.compile(r"\b(?:al|approx|cf|dr|eqs?|etc|figs?|mrs?|no|prof|refs?|resp|sec|vs|[a-z])\.$", re.IGNORECASE)


class Document(NamedTuple):
    """A node of a text graph. Of documents of one text, one is used: as of images of the same bytes."""

    name: str  # its id in nodes.csv
    title: str
    text: str
    label: str
    split: str | None
    group: str | None

    @property
    def image_id(self) -> str | None:
        """The sha256 of title and text; None where there is neither."""
        # As JSON: joined by a line break, a title would be as good as a first line without one.
        return sha256(canonical_json([self.title, self.text])) if self.title or self.text else None

    @property
    def sentences(self) -> list[tuple[int, str]]:
        """Texts by their rank: 0 is the title, where there is one, and the sentences follow from 1 on."""
        title = [(0, self.title)] if self.title else []
        return title + list(enumerate(split_sentences(self.text), start=1))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each a line, and none of more than LONGEST words: those go in pieces of even length."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        waiting = ""
        for piece in END.split(line):
            waiting = f"{waiting} {piece}" if waiting else piece
            if not SHORTENED.search(waiting):
                found += cut(waiting)
                waiting = ""
        found += cut(waiting)
    return found


def cut(sentence: str) -> list[str]:
    """A sentence, or as few pieces of it as have LONGEST words at most, of even length; none of an empty one."""
    words = sentence.split()
    if not words:
        return []
    pieces = math.ceil(len(words) / LONGEST)
    ends = [round(len(words) * place / pieces) for place in range(pieces + 1)]
    return [" ".join(words[start:end]) for start, end in pairwise(ends)]


def read_documents(root: Path) -> list[Document]:
    """The rows of nodes.csv, sorted by id. Raises UserError for one that cannot stand, or for none."""
    path = root / NODES
    documents: dict[str, Document] = {}
    for line, row in enumerate(read_csv(path, ["id", "text", "label"], ["title", "split", "group"]), start=1):
        where = f"{path}: row {line}"
        name, label, split = (nfc((row.get(key) or "").strip()) for key in ("id", "label", "split"))
        if not name or not label:
            raise UserError(f"{where}: {'label' if name else 'id'} is empty; fill it in, or remove the row")
        if name in documents:
            raise UserError(f"{where}: id {name!r} stands in a row before it too; remove one, or rename it")
        if split and split not in SPLITS:
            raise UserError(f"{where}: split is {split!r}; use train, val, test, or nothing")
        title, text = (nfc(row.get(key) or "").strip() for key in ("title", "text"))
        group = nfc((row.get("group") or "").strip())
        documents[name] = Document(name, " ".join(title.split()), text, label, split or None, group or None)
    if not documents:
        raise UserError(f"{path}: names no document")
    return [documents[name] for name in sorted(documents)]


def read_edges(root: Path, names: set[str]) -> tuple[list[Row], list[str]]:
    """The rows of edges.csv whose ends are among the `names` of documents, and what a person should know of others.

    Raises UserError where most ends are of no document, and for a weight that is none.
    """
    path = root / EDGES
    edges: list[Row] = []
    unknown: list[str] = []
    table = read_csv(path, ["src", "dst"], ["weight", "kind"])
    for line, row in enumerate(table, start=1):
        ends = [nfc(row[end].strip()) for end in ("src", "dst")]
        strange = [name for name in ends if name not in names]
        if strange:
            unknown.append(strange[0])
            continue
        weight = weight_of(row.get("weight") or "1", f"{path}: row {line}")
        kind = nfc((row.get("kind") or "").strip()) or "given"
        edges.append({"src": ends[0], "dst": ends[1], "weight": weight, "kind": kind})
    if not unknown:
        return edges, []
    what = f"{len(unknown)} of {len(table)} edges have an end that is no id of {NODES}"
    said = f"{path}: {what}, the first {unknown[0]!r}"
    if 2 * len(unknown) > len(table):
        raise UserError(f"{said}; {hint(unknown[0], sorted(names), 'the two files do not belong together', 0.8)}")
    return edges, [f"{said}; they are left out"]


def weight_of(cell: str, where: str) -> float:
    try:
        weight = float(cell)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"{where}: weight is {cell!r}; write a number above 0, or leave it empty for 1")
    return weight
