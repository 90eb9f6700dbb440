"""Format `hf_parquet`: Parquet files with the pictures in them, as Hugging Face's hub and `to_parquet` have them.

`dataset.root` is the folder of a data set: every .parquet in it and below is read. The split is the first of the words
train, validation, test (and what else Hugging Face knows: hf_imagefolder.py) at the start of a file's name
(train-00000-of-00012.parquet) or a folder on the way to it; files without one are split here. Pictures are the column
of type Image (fieldmark/pictures/shards.py), and the path of one is `FILE.parquet/ROW`: other stages, tools.predict and
exports open it as if the file were a folder. image_id is the sha256 of the bytes, the same as of the unpacked file.

The class is the column `label`, else `fine_label`, else the only one of type ClassLabel, whose names are those of the
schema; of a column of texts they are the texts, of bare numbers the numbers (names by classes.csv). Rows without a
label, or with -1, are left out and counted. Read where a file has them: group, box, captured_at, latitude, longitude,
depth_m and licence, as in a manifest. Other columns are named on stderr. No picture is read to list them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fieldmark.command import UserError
from fieldmark.formats.hf_imagefolder import SPLIT, visible_files
from fieldmark.formats.manifest import OPTIONAL, image_of
from fieldmark.listing import Listing, check_columns, read_class_table
from fieldmark.params import Dataset
from fieldmark.pictures.files import BadImage
from fieldmark.pictures.shards import SUFFIX, count_rows, features_of, picture_column

LABELS = ("label", "fine_label")
READ = [name for name in OPTIONAL if name != "split"]
# So many rows without a label are named.
NAMED = 10
UNLABELLED = -1


class Label(NamedTuple):
    """The column that says the class, and the names of its numbers, where it has some."""

    column: str
    names: list[str] | None


def read(dataset: Dataset) -> Listing:
    """List the rows of every file. Raises UserError naming the file that cannot stand."""
    root = Path(dataset.root)
    files = [path for path in visible_files(root) if path.suffix.lower() == SUFFIX] if root.is_dir() else []
    if not files:
        said = "holds no .parquet" if root.is_dir() else "is not a folder"
        raise UserError(f"params.yaml: dataset.root: {root} {said}; name the folder of the data set's Parquet files")
    listing = Listing([], read_class_table(root))
    bare, unlabelled = 0, list[str]()
    for path in files:
        inside = path.relative_to(root).as_posix()
        label, rows = open_shard(path, said_before=path != files[0])
        split = split_of(inside)
        for number, row in enumerate(rows):
            place, value = f"{inside}/{number}", row.pop(label.column)
            if value is None or value == UNLABELLED or value == "":
                bare += 1
                unlabelled += [place] if bare <= NAMED else []
                continue
            where = f"{path}: row {number}"
            if label.names is not None and not 0 <= value < len(label.names):
                raise UserError(f"{where}: {label.column} is {value}, and {len(label.names)} names are in the schema")
            name = str(value) if label.names is None else label.names[value]
            listing.images.append(image_of({**row, "path": place, "class": name, "split": split}, where))
    if not listing.images:
        raise UserError(f"{root}: no row has a label; take the files of a split that is labelled")
    if bare:
        more = f" and {bare - NAMED} more" if bare > NAMED else ""
        said = f"{bare} rows have no label and are left out: {', '.join(unlabelled)}{more}"
        listing.warnings.append(f"{root}: {said}")
    listing.images.sort(key=lambda row: row["path"])
    return listing


def split_of(path: str) -> str | None:
    """The split that a file's name or its folders say: train-00000-of-00012, validation/0000."""
    *folders, name = path.lower().split("/")
    words = [name.replace("_", "-").replace(".", "-").partition("-")[0], *reversed(folders)]
    return next((SPLIT[word] for word in words if word in SPLIT), None)


def open_shard(path: Path, said_before: bool) -> tuple[Label, Iterator[dict[str, Any]]]:
    """What says the class in a file, and its rows without their pictures. `said_before`: do not name columns again."""
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        count_rows(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(unreadable(path, error)) from None
    except BadImage as error:
        raise UserError(f"{path}: {error}; take it out of the folder") from None
    several = [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]
    if several:
        raise UserError(f"{path}: several columns are called {several[0]!r}; rename or remove one (rename_column)")
    column = picture_column(schema)
    if column is None:
        remedy = "Parquet of a manifest is format manifest, beside pictures hf_imagefolder"
        raise UserError(f"{path}: no column holds pictures (type Image, or a struct of bytes and path); {remedy}")
    label = label_of(path, schema)
    if not said_before:
        check_columns(path, [label.column], [column, *READ], schema.names)
    wanted = [label.column, *(name for name in READ if name in schema.names)]
    return label, rows_of(path, file, wanted)


def rows_of(path: Path, file: pq.ParquetFile, wanted: list[str]) -> Iterator[dict[str, Any]]:
    try:
        with file:
            for batch in file.iter_batches(batch_size=10_000, columns=wanted):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    return f"{path}: is not readable Parquet ({' '.join(str(error).split())[:160]}); download it again"


def label_of(path: Path, schema: pa.Schema) -> Label:
    """The column of classes. Raises UserError where it is not clear which that is, or it holds no names or numbers."""
    features = features_of(schema)
    stated = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    found = [name for name in LABELS if name in schema.names][:1] or stated
    if len(found) != 1:
        said = f"several columns are labels ({', '.join(found)})" if found else "there is no column `label`"
        raise UserError(f"{path}: {said}; call the one that says the class `label` (datasets: rename_column)")
    kind = schema.field(found[0]).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: {found[0]} is of type {kind}; a label is one name or number a row")
    names = features.get(found[0], {}).get("names")
    if not (pa.types.is_integer(kind) and isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return Label(found[0], None)
    return Label(found[0], names)
