"""Write a copy of FGVC-Aircraft without the last rows of pixels of each picture, which name its photographer.

Reads   every picture in the folder ROOT/data/images.
Writes  it without its last `--pixels` rows to FOLDER/data/images (JPEG of quality 95, no metadata), ROOT's other files
        in data/ as they are, and FOLDER/banner_px.txt, which says how much is cut. A picture that is there already is
        kept: a command that was interrupted goes on.
Costs   one decode and one encode a picture: 10,000 of 1,000 pixels take some minutes a core.

Boxes count from the top and stay valid. A picture that cannot be decoded, or is no higher than what is to be cut, is
named and not written.

    python -m tools.cut_banner data/fgvc-aircraft-2013b data/aircraft --pixels 20
"""

import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError, name_some, run
from fieldmark.formats.fgvc_aircraft import BANNER
from fieldmark.pictures.decode import IMAGE_SUFFIXES, BadImage, map_ahead, open_rgb

IMAGES = "data/images"


def cut(source: Path, target: Path, pixels: int) -> bool:
    """Write a picture without its last rows; whether it could be."""
    try:
        image = open_rgb(source)
    except BadImage:
        return False
    if image.height <= pixels:
        return False
    kept = image.crop((0, 0, image.width, image.height - pixels))
    store.write_atomic(target, lambda path: kept.save(path, "JPEG", quality=95, subsampling=0))
    return True


def cut_all(root: Path, out: Path, pixels: int) -> list[str]:
    """Fill `out`; the names of pictures that could not be written. Raises UserError before anything is written."""
    if not (root / IMAGES).is_dir():
        raise UserError(f"{root}: has no folder {IMAGES}; name the folder that the archive unpacks to")
    if out.resolve() == root.resolve() or (root / "data").resolve() in [out.resolve(), *out.resolve().parents]:
        raise UserError(f"{out}: lies in {root}, which is to stay as it is; name another folder")
    if (root / BANNER).is_file():
        raise UserError(f"{root / BANNER}: says that {root} has its banner cut off already; name the one as it came")
    said = out / BANNER
    before = said.read_text().strip() if said.is_file() else str(pixels)
    if before != str(pixels):
        raise UserError(f"{said}: {before} pixels were cut there; remove {out}, or name another folder")
    store.write_text(said, f"{pixels}\n")
    for path in sorted((root / "data").glob("*")):
        if path.is_file():
            store.write_atomic(out / "data" / path.name, partial(shutil.copyfile, path))
    names = sorted(path.name for path in (root / IMAGES).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    waiting = [name for name in names if not (out / IMAGES / name).exists()]
    work = map_ahead(
        lambda name: cut(root / IMAGES / name, out / IMAGES / name, pixels), waiting, os.cpu_count() or 1, ahead=64
    )
    done = list(tqdm(work, total=len(waiting), desc="cut", unit="img"))
    return [name for name, written in zip(waiting, done, strict=True) if not written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", type=Path, help="the data set as it came, fgvc-aircraft-2013b")
    parser.add_argument("out", metavar="FOLDER", type=Path, help="where the copy is written")
    parser.add_argument("--pixels", type=int, default=20, help="rows to cut off the bottom (default: 20)")
    arguments = parser.parse_args()
    if arguments.pixels < 1:
        parser.error("--pixels must be 1 at least")
    failed = cut_all(arguments.root, arguments.out, arguments.pixels)
    if failed:
        said = f"{len(failed)} pictures could not be decoded, or are too small, and are not there: {name_some(failed)}"
        print(f"warning: {arguments.out}: {said}", file=sys.stderr)
    print(f"{arguments.out}: pictures without their last {arguments.pixels} rows; name it as dataset.root")


if __name__ == "__main__":
    run(main)
