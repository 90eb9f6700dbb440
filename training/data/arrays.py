"""What was read from Parquet, kept as memory-mapped arrays: a run's inputs are decoded once, for all that read them.

They lie in `.cache/arrays/` (fieldmark/checkout.py says where `.cache` is), one folder a reading, named by the sha256
of what the arrays are, of every byte that they were read from, and of the code that reads. So an array of a source
that changed is never found again. Runs, seeds and the processes of a study share them; two that write the same at once
end with one of them. A mapped file stays whole after it is removed, so all may be deleted at any time: `make clean`
does. Beyond LIMIT bytes those go that were not used for longest, none that this process uses.

A source is hashed again only where its signature changed (training/hashes.py); sums.json has the hashes that are known.
Where the folder cannot be written to, or its disk is full, runs read Parquet as if there were none, and say so once.
"""

import json
import math
import mmap
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from fieldmark.checkout import cache_folder
from fieldmark.command import UserError
from fieldmark.store import canonical_json, sha256, sync, write_text
from training.hashes import Signature, hash_file, is_settled, signature_of

LIMIT = 32 * 2**30  # bytes that all arrays take at most
LOOK_S = 60  # so often at most a process goes through all arrays; what others write in between may exceed LIMIT
MEMORY_SHARE = 0.5  # of the machine's memory, for an array that is not kept
ABANDONED_S = 24 * 3600  # a folder that nobody has finished for so long is what a killed process left
# MAP_NORESERVE, which Python's mmap does not name: no memory is set aside for pages that are never written, so that an
# array may be larger than memory.
NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
CONTENTS = "arrays.json"  # names the arrays beside it
SUMS = "sums.json"

in_use: set[str] = set()  # the folders whose arrays this process has
said: set[Path] = set()  # the folders of which it has said that they keep none
# When it last went through a folder, and the bytes that it found there and has asked for since.
looked: dict[Path, tuple[float, int]] = {}


class Zeros(Protocol):
    """Room for an array, all 0."""

    def __call__(self, shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray: ...


Arrays = dict[str, np.ndarray]
Make = Callable[[Zeros], Arrays]


def arrays_folder() -> Path:
    return cache_folder() / "arrays"


def keep(what: Any, files: Sequence[Path], make: Make) -> Arrays:
    """What `make` reads from these files: mapped from an earlier time, or made now and kept.

    `what` (JSON) says which arrays they are, and all that decides them beside the files and the code. `make` is given
    `zeros`, for arrays that are large, and returns arrays by name. What is changed in an array stays in this process.
    """
    folder, spare = arrays_folder(), files[0].parents[1]
    try:
        signatures = [signature_of(file) for file in files]
    except OSError:  # whoever reads it says what is missing
        return make(partial(make_room, spare))
    key = sha256(canonical_json([what, code(), hashes_of(folder, files, signatures)]))
    found = load(folder / key)
    if found is not None:
        return found
    shelf = Shelf(folder, spare)
    try:
        arrays = make(shelf.zeros)
        # What was replaced while it was read is not what was hashed.
        if signatures == [signature_of(file) for file in files]:
            arrays = shelf.put(key, arrays)
        return arrays
    finally:
        shelf.remove()


@cache
def code() -> str:
    """The sha256 of the code of this package: what reads otherwise makes other arrays."""
    return sha256(canonical_json([sha256(file.read_bytes()) for file in sorted(Path(__file__).parent.glob("*.py"))]))


class Shelf:
    """A folder that is being filled under a temporary name."""

    def __init__(self, folder: Path, spare: Path) -> None:
        """`spare` is a folder for arrays that exceed memory where they cannot lie in `folder`."""
        self.folder, self.spare = folder, spare
        self.partial: Path | None = folder / f".{uuid.uuid4().hex}.partial"
        self.made: dict[Any, Path] = {}  # the file of each array that `zeros` gave
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            self.give_up(error)

    def zeros(self, shape: tuple[int, ...], dtype: Any = np.float16) -> np.ndarray:
        if self.partial is not None and 0 not in shape:
            path = self.partial / f"{len(self.made)}.npy"
            try:
                array = self.open(path, shape, dtype)
            except OSError as error:
                self.give_up(error)
            else:
                self.made[place_of(array)] = path
                return array
        return make_room(self.spare, shape, dtype)

    def open(self, path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A new .npy file, mapped."""
        make_way(self.folder, bytes_of(shape, dtype))
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "r+b") as file:
            reserve(file, path.stat().st_size)
        return array

    def put(self, key: str, arrays: Arrays) -> Arrays:
        """The arrays, mapped from what is now the folder `key`; as they are where they cannot be kept."""
        if self.partial is None:
            return arrays
        try:
            for name, array in arrays.items():
                path = self.partial / f"{name}.npy"
                if place_of(array) in self.made:
                    self.made[place_of(array)].rename(path)
                else:
                    make_way(self.folder, array.nbytes)
                    np.save(path, np.ascontiguousarray(array), allow_pickle=False)
                sync(path)
            write_text(self.partial / CONTENTS, json.dumps(sorted(arrays)))
            rename(self.partial, self.folder / key)
        except OSError as error:
            self.give_up(error)
            return arrays
        return load(self.folder / key) or arrays

    def give_up(self, error: OSError) -> None:
        if self.folder not in said:
            print(f"{self.folder}: keeps no arrays ({error.strerror or error}); Parquet is read anew", file=sys.stderr)
            said.add(self.folder)
        self.remove()

    def remove(self) -> None:
        """Nothing is left of what is not finished; arrays that are mapped stay as they are."""
        if self.partial is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial = None


def place_of(array: np.ndarray) -> Any:
    """Where an array lies in memory, and how."""
    return array.ctypes.data, array.shape, array.dtype.str


def rename(partial: Path, target: Path) -> None:
    """Give a finished folder its name, unless another process has finished the same."""
    try:
        partial.rename(target)
    except OSError:
        if (target / CONTENTS).exists():
            return
        shutil.rmtree(target, ignore_errors=True)  # what a killed process has not removed
        partial.rename(target)
    sync(target.parent)


def load(folder: Path) -> Arrays | None:
    """The arrays of a folder; None where it is not there, or not whole."""
    try:
        names = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        found = {name: map_array(folder / f"{name}.npy") for name in names}
    except (OSError, ValueError):
        return None
    in_use.add(folder.name)
    with suppress(OSError):
        os.utime(folder / CONTENTS)  # when it was used last
    return found


def map_array(path: Path) -> np.ndarray:
    """An .npy file as an array: read when looked at, writable, and what is written stays in this process."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        count, offset = math.prod(shape), file.tell()
        if not count:
            return np.zeros(shape, dtype)
        flags, protection = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    return np.frombuffer(mapped, dtype, count, offset).reshape(shape)


def make_room(
    folder: Path, shape: tuple[int, ...], dtype: Any = np.float16, held: float | None = None
) -> np.ndarray:
    """Zeros; what is more than `held` bytes lies in a file in `folder`, gone with the array.

    By default that is MEMORY_SHARE of the machine's memory. Raises UserError where the disk has no room for it.
    """
    memory, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), bytes_of(shape, dtype)
    if needed <= (MEMORY_SHARE * memory if held is None else held):
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            reserve(file, needed)
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        problem = f"{needed / 1e9:.1f} GB of arrays fit neither into memory nor on this disk ({error.strerror})"
        raise UserError(f"{folder}: {problem}; free some, or let FIELDMARK_CACHE name a folder with room") from None


def bytes_of(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def reserve(file: IO[bytes], size: int) -> None:
    """Take the room for a file on its disk: a page of a mapped one that finds none there kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def make_way(folder: Path, needed: int) -> None:
    """Where `needed` bytes more may exceed LIMIT, remove what was not used for longest.

    Raises OSError where that leaves too little.
    """
    when, taken = looked.get(folder, (-math.inf, 0))
    if taken + needed > LIMIT or time.monotonic() - when > LOOK_S:
        when, taken = time.monotonic(), clear(folder, needed)
    if taken + needed > LIMIT:
        raise OSError(f"{needed / 1e9:.1f} GB more would exceed {LIMIT / 1e9:.0f} GB")
    looked[folder] = when, taken + needed


def clear(folder: Path, needed: int) -> int:
    """Remove what was abandoned, and of the rest what must go for `needed` bytes more; return the bytes that stay."""
    entries = []
    for entry in folder.iterdir():
        with suppress(OSError):  # another process removes too
            if entry.is_dir():
                finished = not entry.name.startswith(".") and (entry / CONTENTS).exists()
                used = (entry / CONTENTS if finished else entry).stat().st_mtime
                entries.append((used, sum(file.stat().st_size for file in entry.iterdir()), entry, finished))
    taken = sum(size for _, size, *_ in entries)
    for used, size, entry, finished in sorted(entries):
        free = finished and entry.name not in in_use
        if (free and taken + needed > LIMIT) or (not finished and used < time.time() - ABANDONED_S):
            (entry / CONTENTS).unlink(missing_ok=True)  # for a reader it is gone at once
            shutil.rmtree(entry, ignore_errors=True)
            taken -= size
    return taken


def hashes_of(folder: Path, files: Sequence[Path], signatures: Sequence[Signature]) -> list[str]:
    """The sha256 of each file, read only where its signature is new."""
    known, found, new = known_sums(folder), [], {}
    for file, signature in zip(files, signatures, strict=True):
        path = str(file.absolute())
        held, value = known.get(path, (None, ""))
        if held != list(signature):
            value = hash_file(file)
            if is_settled(signature):
                new[path] = list(signature), value
        found.append(value)
    if new:
        sums = {path: held for path, held in (known_sums(folder) | new).items() if Path(path).exists()}
        with suppress(OSError):
            write_text(folder / SUMS, json.dumps(sums))
    return found


def known_sums(folder: Path) -> dict[str, Any]:
    """By path, the signature and the sha256 of files that were hashed before."""
    try:
        found = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
