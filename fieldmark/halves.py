"""Val in two halves: one chooses settings and epochs, the other chooses nothing, is reported and calibrates.

What is best on some images is too good on them by how it was chosen. So the split `val` of the index becomes `choose`
and `val` when a cache is read; `hide_test` (training/regimes.py) tells fits the former as their val, and hides the
latter as it hides test.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from fieldmark.store import sha256


def halve(split: np.ndarray, images: np.ndarray, groups: Sequence[str], y: np.ndarray) -> np.ndarray:
    """The split (n,) str in which these images (n,) bool are `choose` or `val`; the others stay as they are.

    Of each class y (n,) half of the images choose, those whose group (n) is lowest by sha256: one image more moves one
    image. A group stays whole: it chooses where that brings the classes in it closer to their halves, and where it
    makes no odds, as for the only image of a class, another digit of its hash says. So halves are as equal as groups
    allow; one is empty only where all images are of one group.
    """
    units = defaultdict(list)
    for image in np.flatnonzero(images).tolist():
        units[sha256(f"half {groups[image]}")].append(image)
    wanted = {label: count / 2 for label, count in Counter(y[images].tolist()).items()}
    chosen = np.zeros(len(split), dtype=bool)
    for mark, unit in sorted(units.items()):
        size = Counter(y[unit].tolist())
        gain = sum(abs(wanted[label]) - abs(wanted[label] - count) for label, count in size.items())
        if gain > 0 or (gain == 0 and int(mark[-1], 16) % 2):
            chosen[unit] = True
            for label, count in size.items():
                wanted[label] -= count
    if len(units) > 1 and chosen.sum() in (0, images.sum()):  # a few images that all make no odds
        chosen[units[min(units)]] ^= True
    return np.where(chosen, "choose", np.where(images, "val", split))
