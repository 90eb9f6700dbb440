"""Pictures that lie in another file, the frames of a film and the rows of a Parquet shard: unpacked once, then files.

To all that opens a picture, such a file is a folder: `dive.mp4/1fps/000012.jpg` (clips.py), `train-00000.parquet/12`
(shards.py). When the first picture of it is asked for, all of them are written to `pictures/` in the cache (.cache/ of
the original checkout, or $FIELDMARK_CACHE): a film once for each rate, single moments of it one by one. That takes as
much disk as unpacking by hand would, and one pass over the file. A file that has changed (its size or its time) is
unpacked anew, and what was made of it before goes. `make clean` deletes them all; they come back when they are needed.
"""

import errno
import fcntl
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fieldmark.checkout import cache_folder
from fieldmark.command import CROWDED, FORBIDDEN, FULL, UserError
from fieldmark.pictures import clips, shards
from fieldmark.pictures.files import BadImage, open_plain
from fieldmark.store import sha256, sync

HOLDER = re.compile(rf"(?:{'|'.join(map(re.escape, (*clips.SUFFIXES, shards.SUFFIX)))})/", re.IGNORECASE)
AT_RATE = re.compile(r"(\d{1,4}(?:\.\d{1,9})?(?:e-\d\d)?)fps/(\d{6}\.jpg)")
MOMENT = re.compile(r"at/(\d{1,7}\.\d{3})\.jpg")
# Beside the pictures that were made: what ended them.
ENDED = "ended.txt"
# What a system says of the folder that is written to. Any other error is of the file that is unpacked.
OF_CACHE = {*FULL, *FORBIDDEN, *CROWDED, errno.ENOENT, errno.ESTALE, errno.EFBIG}


class Held(NamedTuple):
    """A picture that lies in another file."""

    holder: Path
    inside: str  # its path in there


def find_held(path: str | Path) -> Held | None:
    """What file a picture lies in; None where it is a file itself, or there is none such."""
    name = os.fspath(path)
    for found in HOLDER.finditer(name):
        # A folder may be named as a film is.
        if os.path.isfile(name[: found.end() - 1]):
            return Held(Path(name[: found.end() - 1]), name[found.end() :])
    return None


def unpack(held: Held) -> Path:
    """The file in the cache that a picture was written to; now, if it was not.

    Raises BadImage with the reason where the file does not hold it, UserError where the cache cannot be written.
    """
    # What cannot be opened now may be so later: it is not noted in the cache.
    with open_plain(held.holder, math.inf) as file:
        state = os.fstat(file.fileno())
    shard = held.holder.suffix.lower() == shards.SUFFIX
    own = cache_folder() / "pictures" / sha256(os.path.realpath(held.holder))[:32]
    rules = shards.RULES if shard else clips.RULES
    folder = own / sha256(f"{rules} {state.st_size} {state.st_mtime_ns}")[:16]
    rate, moment = rate_of(held.inside), moment_of(held.inside)
    try:
        if shard:
            made = folder / "rows"
            fill(own, made, lambda empty: shards.write_rows(held.holder, empty))
            return picture_in(made, held.inside, "its row holds no bytes of a picture")
        if rate is not None:
            made = folder / f"{rate:g}fps"
            fill(own, made, lambda empty: clips.write_frames(held.holder, rate, empty))
            return picture_in(made, held.inside.partition("/")[2], "the film is shorter than that")
        if moment is not None:
            made = folder / held.inside.removesuffix(".jpg")
            fill(own, made, lambda empty: clips.write_moment(held.holder, moment, empty / "frame.jpg"))
            return picture_in(made, "frame.jpg", "the film is shorter than that")
    except OSError as error:
        raise UserError(f"{own}: pictures cannot be unpacked ({error.strerror}); {remedy_of(error)}") from None
    raise BadImage("is no path of a frame")


def rate_of(inside: str) -> float | None:
    """The frames a second of a path in a film; None where it is another. Each rate has one spelling (frame_path)."""
    found = AT_RATE.fullmatch(inside)
    rate = float(found[1]) if found is not None else 0.0
    return rate if found is not None and 0 < rate <= clips.MAX_RATE and found[1] == f"{rate:g}" else None


def moment_of(inside: str) -> float | None:
    """The seconds that a path in a film names; None where it is another."""
    found = MOMENT.fullmatch(inside)
    at = float(found[1]) if found is not None else math.inf
    return at if at <= clips.MAX_SECONDS else None


def remedy_of(error: OSError) -> str:
    """What to do about a cache that cannot be written."""
    if error.errno in FULL:
        return "free some room there, or let FIELDMARK_CACHE name another folder"
    if error.errno in CROWDED:
        return "allow the process more open files (ulimit -n)"
    return "let FIELDMARK_CACHE name a folder that you may write to"


def fill(own: Path, made: Path, write: Callable[[Path], str | None]) -> None:
    """Make the folder `made` of pictures by `write`, unless it is there; `own` is where all of the same file lie.

    One process and thread at a time: what is half made there when the lock is free was left by one that died. What
    `write` raises is noted as what ends the pictures, since the file is broken, unless the cache or the memory is at
    fault. Raises OSError where the cache cannot be written.
    """
    if made.exists():
        return
    own.mkdir(parents=True, exist_ok=True)
    with open(own / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return
        half, current = own / "half", own / made.relative_to(own).parts[0]
        for each in own.iterdir():
            if each.is_dir() and each != current:
                shutil.rmtree(each)
        half.mkdir()
        try:
            ended = write(half)
        except BadImage as error:
            ended = str(error)
        except (UserError, MemoryError):
            raise
        # Decoders raise many types on broken bytes.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_CACHE:
                raise
            ended = f"cannot be unpacked: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if ended is not None:
            (half / ENDED).write_text(ended, encoding="utf-8")
        sync_all(half)
        made.parent.mkdir(parents=True, exist_ok=True)
        half.rename(made)
        sync(made.parent)


def sync_all(folder: Path) -> None:
    """Have the system write the files of a folder to the disk, and their names; a file of several names once."""
    files = {file.stat().st_ino: file for file in folder.iterdir()}
    for file in files.values():
        sync(file)
    sync(folder)


def picture_in(folder: Path, name: str, otherwise: str) -> Path:
    """A picture that was unpacked. Raises BadImage with why it was not: what ended them, or `otherwise`."""
    path = folder / name
    if "/" not in name and name != ENDED and path.is_file():
        return path
    ended = folder / ENDED
    raise BadImage(ended.read_text(encoding="utf-8") if ended.is_file() else otherwise)
