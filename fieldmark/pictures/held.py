"""Pictures that lie in another file, the frames of a film and the rows of a Parquet shard: unpacked once, then files.

To all that opens a picture, such a file is a folder: `dive.mp4/1fps/000012.jpg` (clips.py), `train-00000.parquet/12`
(shards.py). When the first picture of it is asked for, all of them are written to `pictures/` in the cache (.cache/ of
the original checkout, or $FIELDMARK_CACHE): a film once for each rate, single moments of it one by one. That takes as
much disk as unpacking by hand would, and one pass over the file. A file that has changed (its size or its time) is
unpacked anew, and what was made of it before goes. `make clean` deletes them all; they come back when they are needed.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fieldmark.checkout import cache_folder
from fieldmark.command import UserError
from fieldmark.pictures import clips, shards
from fieldmark.pictures.files import BadImage
from fieldmark.store import sha256

HOLDER = re.compile(
    rf"(.*?(?:{'|'.join(map(re.escape, (*clips.SUFFIXES, shards.SUFFIX)))}))/(.+)", re.IGNORECASE | re.DOTALL
)
AT_RATE = re.compile(r"(\d+(?:\.\d+)?(?:e-?\d+)?)fps/\d{6}\.jpg")
MOMENT = re.compile(r"at/(\d+\.\d{3})\.jpg")
# Beside the pictures that were made: what ended them.
ENDED = "ended.txt"


class Held(NamedTuple):
    """A picture that lies in another file."""

    holder: Path
    inside: str  # its path in there


def find_held(path: str | Path) -> Held | None:
    """What file a picture lies in; None where it is a file itself, or there is none such."""
    found = HOLDER.fullmatch(os.fspath(path))
    return Held(Path(found[1]), found[2]) if found is not None and os.path.isfile(found[1]) else None


def unpack(held: Held) -> Path:
    """The file in the cache that a picture was written to; now, if it was not.

    Raises BadImage with the reason where the file does not hold it, UserError where the cache cannot be written.
    """
    try:
        state = os.stat(held.holder)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    own = cache_folder() / "pictures" / sha256(os.path.realpath(held.holder))[:32]
    folder = own / sha256(f"{clips.RULES} {state.st_size} {state.st_mtime_ns}")[:16]
    at_rate, moment = AT_RATE.fullmatch(held.inside), MOMENT.fullmatch(held.inside)
    try:
        if held.holder.suffix.lower() == shards.SUFFIX:
            made = folder / "rows"
            fill(own, made, lambda empty: shards.write_rows(held.holder, empty))
            return picture_in(made, held.inside, "its row holds no bytes of a picture")
        if at_rate is not None and float(at_rate[1]) > 0:
            made = folder / f"{at_rate[1]}fps"
            fill(own, made, lambda empty: clips.write_frames(held.holder, float(at_rate[1]), empty))
            return picture_in(made, held.inside.partition("/")[2], "the film is shorter than that")
        if moment is not None:
            made = folder / held.inside.removesuffix(".jpg")
            fill(own, made, lambda empty: clips.write_moment(held.holder, float(moment[1]), empty / "frame.jpg"))
            return picture_in(made, "frame.jpg", "the film is shorter than that")
    except OSError as error:
        remedy = "free some room there, or let FIELDMARK_CACHE name another folder"
        raise UserError(f"{own}: pictures cannot be unpacked ({error.strerror}); {remedy}") from None
    raise BadImage("is no path of a frame")


def fill(own: Path, made: Path, write: Callable[[Path], str | None]) -> None:
    """Make the folder `made` of pictures by `write`, unless it is there; `own` is where all of the same file lie.

    One process and thread at a time: what is half made there when the lock is free was left by one that died.
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
        if ended is not None:
            (half / ENDED).write_text(ended, encoding="utf-8")
        made.parent.mkdir(parents=True, exist_ok=True)
        half.rename(made)


def picture_in(folder: Path, name: str, otherwise: str) -> Path:
    """A picture that was unpacked. Raises BadImage with why it was not: what ended them, or `otherwise`."""
    path = folder / name
    if "/" not in name and name != ENDED and path.is_file():
        return path
    ended = folder / ENDED
    raise BadImage(ended.read_text(encoding="utf-8") if ended.is_file() else otherwise)
