"""The sha256 of files: what is read is known by its bytes."""

import functools
import hashlib
from collections.abc import Collection
from pathlib import Path

from fieldmark.store import bucket_path, canonical_json, sha256


def hash_data(data: Path, files: Collection[str], buckets: int) -> dict[str, str | None]:
    """The sha256 of what lies under `data`: of a file its bytes, of a folder its buckets; None for what is missing."""
    return {path: hash_path(data / path, buckets) for path in files}


def hash_path(path: Path, buckets: int) -> str | None:
    if path.suffix:
        return hash_file(path) if path.is_file() else None
    members = [bucket_path(path, bucket) for bucket in range(buckets)]
    if not all(member.is_file() for member in members):
        return None
    return sha256(canonical_json([hash_file(member) for member in members]))


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    stat = path.stat()
    return hash_known(path, stat.st_size, stat.st_mtime_ns)


@functools.cache  # many runs read the same files; another size or time is another file
def hash_known(path: Path, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
