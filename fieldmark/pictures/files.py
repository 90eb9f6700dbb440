"""Files of pictures, opened so that none can block, or fill the memory."""

import os
import stat
from pathlib import Path
from typing import IO

# Of a picture of decode.MAX_PIXELS, no format stores more. A larger file is refused before it is read.
MAX_BYTES = 2**30
# What a name may stand for that is not opened.
KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class BadImage(Exception):
    """A picture that cannot be used; the message says why."""


def open_plain(path: str | Path, most: float = MAX_BYTES) -> IO[bytes]:
    """A file, opened to be read. Raises BadImage with the reason where it is no file, or holds over `most` bytes.

    A pipe or a device is not opened: a read from it may wait for ever, or never end.
    """
    try:
        found = os.stat(path)
        kind = KINDS.get(stat.S_IFMT(found.st_mode))
        if kind is not None:
            raise BadImage(f"is {kind}, not a file")
        if found.st_size > most:
            raise BadImage(f"{found.st_size} bytes, more than {most:.0f}")
        return open(path, "rb")
    # No message names the path: the table that they are written to is the same on every machine.
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise BadImage("cannot be read: there is a NUL in its name") from None
