"""List what lies on disk for each encoder and tower, and remove what is left of one that params.yaml does not name.

Reads   params.yaml, data/index/images.parquet, and all that lies under data/embed, data/bank, data/labels and
        data/graphs; of data/runs the runs that params.yaml no longer names.
Writes  to stdout, one line a folder of buckets or file: whether params.yaml names its encoder, the fingerprint's
        beginning, images, rows, size, and what is wrong with it if anything is. --remove NAME deletes the shards of an
        encoder that params.yaml does not name, and nothing else.
Costs   seconds: one column of each file.

A folder is complete where it holds all `dataset.buckets`, of one fingerprint, with every usable image of the index and
no other.

    python -m tools.shards
    python -m tools.shards --remove NAME
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import Params, load_params

DATA = Path("data")
INDEX = DATA / "index/images.parquet"
RUNS = DATA / "runs"
MB = 1_000_000


class Stored(NamedTuple):
    """One line of the list: a folder of buckets, or a file."""

    path: Path
    named: bool  # by params.yaml
    fingerprint: str  # the first 8 digits, - where there is none
    images: int | None
    rows: int
    size: int  # bytes
    state: str


def shards_of(encoder: str) -> list[Path]:
    """What lies on disk for an encoder: folders of buckets and single files, in the order they are made."""
    embed = DATA / "embed" / encoder
    places = [
        *sorted(path for path in embed.glob("*") if path.name != "moments"),
        *sorted(embed.glob("moments/*")),
        DATA / "bank" / f"{encoder}.parquet",
        DATA / "labels" / encoder,
        DATA / "graphs" / encoder,
    ]
    return [path for path in places if path.is_dir() or (path.suffix == ".parquet" and path.exists())]


def find_encoders() -> list[str]:
    """The encoders of which anything lies on disk."""
    folders = [path for name in ("embed", "labels", "graphs") for path in (DATA / name).glob("*/")]
    return sorted({path.name for path in folders} | {path.stem for path in (DATA / "bank").glob("*.parquet")})


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def usable_images() -> set[str] | None:
    """The image_ids that every folder of buckets should hold; None without an index."""
    if not INDEX.exists():
        return None
    index = store.read_table(INDEX, "index.images/1", ["image_id", "status"])
    return set(index.filter(pc.equal(index.column("status"), "ok")).column("image_id").to_pylist())


def inspect(path: Path, *, named: bool, buckets: int, usable: set[str] | None) -> Stored:
    """Look at a folder of buckets or a file; what is wrong is a state, never an error."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    marks, images, rows, faults = set(), set(), 0, []
    has_images = False
    for file in files:
        try:
            content = pq.ParquetFile(file)
            marks.add((content.schema_arrow.metadata or {}).get(b"fingerprint", b"-").decode()[:8])
            rows += content.metadata.num_rows
            if "image_id" in content.schema_arrow.names:
                has_images = True
                images.update(pc.unique(content.read(["image_id"]).column("image_id")).to_pylist())
        except (OSError, pa.ArrowException):
            faults.append(f"{file.name} is not readable")
    if path.is_dir():
        faults += compare(path, {file.name for file in files}, buckets, images, usable)
    if len(marks) > 1:
        faults.append(f"of {len(marks)} fingerprints")
    return Stored(
        path, named, min(marks, default="-"), len(images) if has_images else None, rows, size_of(path),
        ", ".join(faults) or "complete",
    )  # fmt: skip


def compare(path: Path, names: set[str], buckets: int, images: set[str], usable: set[str] | None) -> list[str]:
    """What a folder has too little or too much of."""
    wanted = {store.bucket_path(path, bucket).name for bucket in range(buckets)}
    faults = [f"{len(wanted & names)} of {buckets} buckets"] if wanted - names else []
    if names - wanted:
        faults.append(f"{len(names - wanted)} files more than dataset.buckets = {buckets}")
    if usable is not None and usable - images:
        faults.append(f"lacks {len(usable - images)} images of the index")
    if usable is not None and images - usable:
        faults.append(f"{len(images - usable)} images that the index does not have")
    return faults


def list_parts(params: Params) -> Iterator[Stored]:
    """Every part of every encoder, then the runs that params.yaml no longer names."""
    buckets, usable = params.dataset.buckets, usable_images()
    for encoder in find_encoders():
        for path in shards_of(encoder):
            yield inspect(path, named=encoder in params.image_encoders, buckets=buckets, usable=usable)
    for folder in sorted(RUNS.glob("*/")):
        if folder.name not in params.train.runs:
            predictions = inspect(folder / "predictions.parquet", named=False, buckets=buckets, usable=usable)
            yield predictions._replace(path=folder, size=size_of(folder))


def table(parts: Iterable[Stored]) -> str:
    """The list as aligned text."""
    head = ("path", "in params.yaml", "made by", "images", "rows", "MB", "state")
    lines = [head]
    for part in parts:
        images = "-" if part.images is None else f"{part.images:,}"
        named = "yes" if part.named else "no"
        size = f"{part.size / MB:,.1f}"
        lines.append((str(part.path), named, part.fingerprint, images, f"{part.rows:,}", size, part.state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(head.index("images"), head.index("MB") + 1)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def remove(encoder: str, params: Params) -> int:
    """Delete an encoder's shards; return their bytes. Raises UserError for one that params.yaml names, or unknown."""
    if encoder in params.encoders:
        raise UserError(f"params.yaml: encoders.{encoder}: is in use; take it out first, with the runs that name it")
    if encoder in params.towers:
        raise UserError(f"params.yaml: towers.{encoder}: is in use; take it out first")
    found = find_encoders()
    if encoder not in found:
        there = ", ".join(found) or "no encoder"
        raise UserError(f"--remove {encoder}: nothing of it lies under {DATA}; there is: {there}")
    freed = 0
    for path in (DATA / "embed" / encoder, *shards_of(encoder)):
        if path.is_symlink() or path.is_file():
            freed += size_of(path)
            path.unlink()
        elif path.is_dir():
            freed += size_of(path)
            shutil.rmtree(path)
    return freed


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--remove", metavar="NAME", help="an encoder that params.yaml does not name")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    if arguments.remove is not None:
        freed = remove(arguments.remove, params)
        kept = "DVC's cache keeps its copies until `dvc gc --workspace`"
        print(f"{arguments.remove}: {freed / MB:,.1f} MB removed from {DATA}; {kept}")
        return
    parts = list(list_parts(params))
    print(table(parts))
    for encoder in find_encoders():
        if encoder not in params.image_encoders:
            freed = sum(size_of(path) for path in shards_of(encoder))
            print(f"\n{encoder} is not in params.yaml: --remove {encoder} frees {freed / MB:,.1f} MB")


if __name__ == "__main__":
    run(main)
