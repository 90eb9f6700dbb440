"""How answers are written: for people a table, a text and a page, for programs JSON lines, CSV and Parquet.

All have the same columns. In JSON lines what was not asked, or is not known, is left out; in CSV lists are JSON.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.calibration import ALPHA
from evaluation.words import percent
from fieldmark import store
from fieldmark.command import UserError, counted, name_some
from fieldmark.store import FLOAT, INT, TEXT, items
from training.explain import LEAST_MOVE, PROTOTYPE

Row = dict[str, Any]
Said = TypeVar("Said")
FORMATS = ("table", "text", "jsonl", "csv", "parquet")
WIDEST = 40  # of a column of names in a table
DIGITS = 2  # of a logit behind the point, where it is printed
OWNERS = 3  # of a text that are named
# What a run knows a picture as.
SPLITS = {
    "train": "a training picture, so that this says little",
    "choose": "of the half of val that chose",
    "val": "of the half of val that chose nothing",
    "test": "a test picture",
}


def struct(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", pa.struct(list(fields.items()))))


COLUMNS = pa.schema([
    ("path", TEXT),  # of the picture, as it was asked about; null of a group
    ("group", TEXT),  # of the manifest
    ("pictures", INT),  # of a group, those that have votes
    ("image_id", TEXT),  # sha256 of the file
    ("split", TEXT),  # of a picture that the run knows: train, choose, val, test
    ("error", TEXT),  # why there is no answer
    ("class_id", TEXT),  # the most probable class, its name and its probability
    ("name", TEXT),
    ("p", pa.float64()),
    ("top", struct(class_id=TEXT, name=TEXT, p=pa.float64())),  # the most probable classes
    ("set", items(TEXT)),  # class_ids that hold the true one but for ALPHA of pictures; null: too few images to say
    ("sure_rank", INT),  # of the most exact answer that keeps to ERROR: 0 a class, 1 the group that it lies in, ...
    ("sure_name", TEXT),
    ("sure_p", pa.float64()),
    ("none_of_these", pa.bool_()),  # farther from training pictures than all but ALPHA of known pictures are
    ("nearest", struct(path=TEXT, image_id=TEXT, class_id=TEXT, cosine=FLOAT)),  # training pictures most like it
    # What speaks for the first class against the second, in logits: patches in [0,1] of the picture, and concepts.
    ("patches", struct(x0=FLOAT, y0=FLOAT, x1=FLOAT, y1=FLOAT, gain=FLOAT)),
    ("concepts", struct(text=TEXT, class_ids=items(TEXT), gain=FLOAT)),
])


def empty_row() -> Row:
    """A row of which nothing is known."""
    return dict.fromkeys(COLUMNS.names) | {"top": []}


class Writer(Protocol):
    def write(self, rows: Sequence[Row]) -> None: ...


class JsonLines:
    def __init__(self, sink: IO[str]) -> None:
        self.sink = sink

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            known = {name: row[name] for name in COLUMNS.names if row[name] is not None or name in ("path", "top")}
            self.sink.write(json.dumps(known, ensure_ascii=False) + "\n")


class Csv:
    def __init__(self, sink: IO[str]) -> None:
        self.writer = csv.writer(sink, lineterminator="\n")
        self.writer.writerow(COLUMNS.names)

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.writer.writerow([
                json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell
                for cell in map(row.__getitem__, COLUMNS.names)
            ])


class Parquet:
    """One row group a chunk."""

    def __init__(self, file: pq.ParquetWriter) -> None:
        self.file = file

    def write(self, rows: Sequence[Row]) -> None:
        self.file.write_table(pa.Table.from_pylist(list(rows), schema=COLUMNS))


class Table:
    """A line a picture. Columns are as wide as the longest name of a class, so that no line waits for another."""

    def __init__(self, sink: IO[str], names: Mapping[str, str]) -> None:
        self.sink, self.width = sink, min(max(map(len, names.values())), WIDEST)
        self.line("%", "first", "%", "second", "none?", "picture")

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row["error"] is not None:
                self.line("-", "", "", "", "", f"{title(row)}: {row['error']}")
                continue
            first, second = (*row["top"], None)[:2]
            q, other = ("", "") if second is None else (percent(second["p"]), second["name"])
            none = "maybe" if row["none_of_these"] else ""
            self.line(percent(first["p"]), first["name"], q, other, none, title(row))

    def line(self, p: str, first: str, q: str, second: str, none: str, where: str) -> None:
        """What has no set width, a path and an error, stands last."""
        width = self.width
        print(f"{p:>5s}  {first:{width}s}  {q:>5s}  {second:{width}s}  {none:5s}  {where}", file=self.sink)


class Text:
    """All that is said of a picture, a paragraph each."""

    def __init__(self, sink: IO[str], names: Mapping[str, str]) -> None:
        self.sink, self.names = sink, names

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            print("\n".join([title(row), *(f"  {line}" for line in lines_of(row, self.names))]), file=self.sink)


def title(row: Row) -> str:
    """A picture's path, or a group and how many pictures it has."""
    return row["path"] or f"{row['group']} ({counted(row['pictures'], 'picture', 'pictures')})"


def logit(gain: float) -> str:
    return f"{gain:+.{DIGITS}f}"


def nothing_moves(row: Row) -> str:
    """What is said of a run that was asked why where no patch, or no text, is a reason; else nothing."""
    missing = [what for what, found in (("patch", row["patches"]), ("text", row["concepts"])) if found == []]
    if not missing:
        return ""
    told = row["patches"] or any(abs(each["gain"]) >= LEAST_MOVE for each in row["concepts"] or [])
    rest = "" if told else "; it rests on the whole picture"
    return f"no {' and no '.join(missing)} moves this decision towards {row['top'][0]['name']}{rest}"


def written_for(concept: Row, row: Row, names: Mapping[str, str]) -> str:
    """Whose text a reason is, where it is of neither class that is compared; else nothing."""
    owners, compared = concept["class_ids"], {each["class_id"] for each in row["top"][:2]}
    if not owners or compared & set(owners) or PROTOTYPE in concept["text"]:
        return ""
    return f" (written for {name_some([names.get(each, each) for each in owners], OWNERS)})"


def limits_of(row: Row, names: Mapping[str, str]) -> list[str]:
    """What is promised of a picture: its set, and the answer that is sure enough; none of those that are not known."""
    said = []
    if row["set"] is not None:
        said.append(f"{percent(1 - ALPHA)} % set: {', '.join(names.get(each, each) for each in row['set'])}")
    if row["sure_name"] is not None:
        said.append(f"sure enough: {row['sure_name']} ({percent(row['sure_p'])} %)")
    return said


def lines_of(row: Row, names: Mapping[str, str]) -> Iterator[str]:
    """What Text says of a picture below its path."""
    if row["error"] is not None:
        yield row["error"]
        return
    for each in row["top"]:
        yield f"{percent(each['p']):>5s} %  {each['name']}"
    yield from limits_of(row, names)
    if row["none_of_these"]:
        yield "maybe none of these: it is far from all training pictures"
    if row["split"] is not None:
        yield f"in the data set: {SPLITS[row['split']]}"
    if row["patches"] or row["concepts"]:
        where = " (a patch is x0 y0 x1 y1 of the picture's width and height)" if row["patches"] else ""
        yield f"{row['top'][0]['name']} rather than {row['top'][1]['name']}, in logits{where}:"
        for patch in row["patches"] or []:
            corners = " ".join(f"{patch[side]:.2f}" for side in ("x0", "y0", "x1", "y1"))
            yield f"  {logit(patch['gain'])}  patch {corners}"
        for concept in row["concepts"] or []:
            yield f"  {logit(concept['gain'])}  {concept['text']}{written_for(concept, row, names)}"
    if nothing_moves(row):
        yield nothing_moves(row)
    if row["nearest"]:
        yield "training pictures most like it, by cosine:"
        for each in row["nearest"]:
            yield f"  {each['cosine']:.3f}  {each['path']}"


def write_rows(form: str, out: Path | None, names: Mapping[str, str], answer: Callable[[Writer], Said]) -> Said:
    """Have `answer` write in a format: to stdout, or to a file that is whole or not there; what it returns.

    `names` are those of classes, by class_id. Raises UserError for Parquet on stdout.
    """
    if out is None:
        if form == "parquet":
            raise UserError("--format parquet: goes to a file; name it with --out FILE.parquet")
        return answer(text_writer(form, sys.stdout, names))
    found: list[Said] = []

    def write(path: Path) -> None:
        if form == "parquet":
            with pq.ParquetWriter(path, COLUMNS, compression="zstd", write_page_checksum=True) as file:
                found.append(answer(Parquet(file)))
        else:
            with open(path, "w", encoding="utf-8", newline="") as sink:
                found.append(answer(text_writer(form, sink, names)))

    store.write_atomic(out, write)
    return found[0]


def text_writer(form: str, sink: IO[str], names: Mapping[str, str]) -> Writer:
    writers: dict[str, Callable[[], Writer]] = {
        "jsonl": lambda: JsonLines(sink),
        "csv": lambda: Csv(sink),
        "table": lambda: Table(sink, names),
        "text": lambda: Text(sink, names),
    }
    return writers[form]()
