"""Draw the pictures of the bundled demo, reef: 24 invented reef-fish species with their ground truth.

Reads    data/demo/species.yaml (the table of species) and demo.reef of params.yaml: seed, size in pixels,
         train_per_class, test_per_class.
Writes   data/reef/: train/CLASS_ID/NNN.jpg and test/CLASS_ID/NNN.jpg,
         classes.csv     class_id, name, superclass, scientific_name, note
         parts.csv       path (relative to data/reef), part, x0, y0, x1, y1 (in [0, 1]), visible (0 or 1)
         attributes.csv  class_id, attribute, value
Costs    about 20 ms a picture and core: 15 s for the default 1,560 pictures on 2 cores. No network.

Picture k of a species depends on the seed, the split, the species and k alone, never on how many others are drawn.
The folder appears whole or not at all.
"""

import csv
import functools
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import Reef, load_params
from fieldmark.reef.drawing import PartBox, draw_fish
from fieldmark.reef.species import Species, load_species

OUT = Path("data/reef")
JPEG_QUALITY = 92


class Picture(NamedTuple):
    """One picture to draw: number `k` of a species in a split."""

    split: str
    species: Species
    k: int

    @property
    def path(self) -> str:
        return f"{self.split}/{self.species.class_id}/{self.k:03d}.jpg"


def picture_seed(seed: int, picture: Picture) -> list[int]:
    """Entropy for the generator of one picture: 256 bits of the hash of what identifies it."""
    key = f"{seed}/{picture.split}/{picture.species.class_id}/{picture.k}"
    return np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32).tolist()


def plan(species: Sequence[Species], reef: Reef) -> list[Picture]:
    """Every picture, in the order of its path."""
    counts = (("test", reef.test_per_class), ("train", reef.train_per_class))
    return [Picture(split, one, k) for split, count in counts for one in species for k in range(count)]


def draw_picture(picture: Picture, root: Path, reef: Reef) -> list[PartBox]:
    """Draw one picture into `root` and return the boxes of its parts."""
    rng = np.random.default_rng(picture_seed(reef.seed, picture))
    drawing = draw_fish(picture.species.attributes, rng, reef.size)
    drawing.image.save(root / picture.path, quality=JPEG_QUALITY)
    return drawing.parts


def draw_all(pictures: Sequence[Picture], root: Path, reef: Reef) -> list[list[PartBox]]:
    """Draw every picture in one process a core, with progress on stderr."""
    for folder in {root / picture.split / picture.species.class_id for picture in pictures}:
        folder.mkdir(parents=True)
    boxes: list[list[PartBox]] = []
    start = time.monotonic()
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        draw = functools.partial(draw_picture, root=root, reef=reef)
        for parts in pool.map(draw, pictures, chunksize=20):
            boxes.append(parts)
            if len(boxes) % 200 == 0 or len(boxes) == len(pictures):
                rate = len(boxes) / (time.monotonic() - start)
                left = (len(pictures) - len(boxes)) / rate
                print(
                    f"draw_reef: {len(boxes)}/{len(pictures)} pictures, {rate:.0f}/s, {left:.0f} s left",
                    file=sys.stderr,
                )
    return boxes


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_tables(
    root: Path, species: Sequence[Species], pictures: Sequence[Picture], boxes: list[list[PartBox]]
) -> None:
    """The ground truth beside the pictures."""
    write_csv(
        root / "classes.csv",
        ("class_id", "name", "superclass", "scientific_name", "note"),
        ((one.class_id, one.name, one.superclass, one.scientific_name, one.note) for one in species),
    )
    write_csv(
        root / "attributes.csv",
        ("class_id", "attribute", "value"),
        ((one.class_id, attribute, value) for one in species for attribute, value in one.attributes.items()),
    )
    write_csv(
        root / "parts.csv",
        ("path", *PartBox._fields),
        (
            (picture.path, box.part, *(f"{edge:.4f}" for edge in box[1:5]), int(box.visible))
            for picture, parts in zip(pictures, boxes, strict=True)
            for box in parts
        ),
    )


def draw_reef(reef: Reef, out: Path) -> None:
    """Draw everything into `out`, by way of a folder beside it that is renamed when complete."""
    species = load_species()
    pictures = plan(species, reef)
    half = out.with_name(out.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    write_tables(half, species, pictures, draw_all(pictures, half, reef))
    if out.exists():
        shutil.rmtree(out)
    half.rename(out)


def main() -> None:
    args = stage_parser(__doc__).parse_args()
    demo = load_params(args.params).demo
    if "reef" not in demo:
        raise UserError(
            f"{args.params}: demo.reef is missing, so there is nothing to draw; add it or leave this stage out"
        )
    draw_reef(demo["reef"], OUT)


if __name__ == "__main__":
    run(main)
