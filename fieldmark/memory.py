"""How this process hands memory back to the system: not at all, where batches follow each other."""

import ctypes
import platform


def keep_memory() -> None:
    """Have glibc keep the memory of a batch for the next one: giving it back takes as long as half of its work.

    One arena for all threads: those of decoding grow with the images, by some 20 MB a thousand.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8
        for option, value in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1), (arena_max, 1)):
            libc.mallopt(option, value)
