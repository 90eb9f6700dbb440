"""New pictures as exports take them: a Parquet file of tools.predict, and a manifest that says more of them.

Columns of the file that are read: path, image_id, class_id, p and, where they are there, error and none_of_these. What
has an error (no picture, a broken one), what the run takes for none of its classes, and rows of whole groups, which
have no path, are left out and counted. A manifest is as fieldmark/formats/manifest.py has it, but needs no class: of
its rows box, group, captured_at, latitude, longitude, depth_m and licence are joined by path.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.command import UserError
from fieldmark.formats.manifest import NUMBERS, TEXTS, box_of, number, numbered, text
from fieldmark.formats.manifest import read_rows as manifest_rows
from fieldmark.listing import check_columns
from fieldmark.pictures.decode import BadImage, open_reduced
from tools.exports.index import Row
from tools.exports.predictions import Said

NEEDED = ("path", "image_id", "class_id", "p")
KNOWN = (*TEXTS, *NUMBERS, "box")


def read_new(path: Path, manifest: Path | None, classes: Sequence[str]) -> tuple[list[Said], dict[str, int]]:
    """What the file says of each picture, in its order, and how many rows are left out, by why.

    Raises UserError where the file is no such Parquet, or names a class that the run does not have.
    """
    rows = read_rows(path)
    more = read_manifest(manifest) if manifest else {}
    left_out: Counter[str] = Counter()
    said: list[Said] = []
    for row in rows:
        if row["path"] is None:
            left_out["of a group"] += 1
        elif row["class_id"] is None or row["image_id"] is None:
            left_out["without an answer"] += 1
        elif row.get("none_of_these"):
            left_out["none of the classes"] += 1
        elif row["class_id"] not in classes:
            raise UserError(f"{path}: names the class {row['class_id']!r}, which the run does not have; name its run")
        else:
            known = dict.fromkeys(KNOWN) | more.get(row["path"], {})
            image = {"path": row["path"], "image_id": row["image_id"], "class_id": None, **known}
            said.append(Said(len(said) + 1, image, None, row["class_id"], row["p"], None))
    return said, left_out


def read_rows(path: Path) -> list[Row]:
    """The rows of a Parquet file of tools.predict, of the columns that are read here."""
    try:
        names = pq.read_schema(path).names
        check_columns(path, NEEDED, names, names)
        wanted = [name for name in (*NEEDED, "none_of_these") if name in names]
        rows: list[Row] = pq.read_table(path, columns=wanted, partitioning=None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: is no Parquet of tools.predict ({reason}); write one (--format parquet)") from None
    return rows


def read_manifest(path: Path) -> dict[str, Row]:
    """By path, what a manifest says of pictures. Raises UserError naming the row that cannot stand."""
    found = {}
    for _, where, row in numbered(path, manifest_rows(path, ["path"], "--manifest")):
        found[str(row["path"])] = {
            "box": box_of(row.get("box"), where),
            **{column: text(row.get(column)) for column in TEXTS},
            **{column: number(row.get(column), column, where) for column in NUMBERS},
        }
    return found


def with_size(said: Said, folder: Path) -> Said:
    """The same with the width and height of the picture, upright. Raises UserError where the file is not there."""
    path = folder / said.image["path"]
    try:
        width, height = open_reduced(path, 1)[1]
    except BadImage as error:
        raise UserError(f"{path}: {error}; run this where tools.predict was run, with its pictures") from None
    return said._replace(image={**said.image, "width": width, "height": height})
