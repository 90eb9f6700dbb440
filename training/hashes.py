"""The sha256 of files: what is read is known by its bytes."""

import functools
import hashlib
import time
from collections.abc import Collection
from pathlib import Path

from fieldmark.store import bucket_path, canonical_json, sha256

Signature = tuple[int, ...]  # of a file: what the file system says of it; no write leaves it as it was
SETTLED_NS = 2 * 10**9  # two writes within one tick of a file system's clock could leave one signature


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
    signature = signature_of(path)
    return hash_known(path, signature) if is_settled(signature) else hash_bytes(path)


@functools.cache  # many runs read the same files
def hash_known(path: Path, signature: Signature) -> str:
    return hash_bytes(path)


def hash_bytes(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signature_of(path: Path) -> Signature:
    """Device, inode, size, and when content and inode changed last, which no program can set."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_settled(signature: Signature) -> bool:
    """Whether the file is old enough that a later write would show in its signature."""
    return max(signature[3:]) < time.time_ns() - SETTLED_NS
