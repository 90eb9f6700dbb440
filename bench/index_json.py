"""Seconds and memory to list 100,000 rows of annotation files: COCO's, a row a box with its outline, and iNaturalist's.

The files are written here: COCO's has 8 boxes a picture, each with an outline of 30 points, and 80 categories;
iNaturalist's 10,000 species and their ranks. Each is read in a process of its own by fieldmark.formats, with all checks
of a listing, and no picture is opened: pictures are empty files. "json" is json.load of the same file and nothing else.
Memory is the most that the process held (VmHWM: Linux), less what it held before it read.

    python -m bench.index_json [--rows N]
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from fieldmark.formats import read_listing
from fieldmark.params import Dataset

BOXES, POINTS, SPECIES = 8, 30, 10_000
RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")


def coco(rows: int) -> tuple[str, dict[str, Any]]:
    images = [
        {"id": number, "width": 640, "height": 480, "file_name": f"{number:012d}.jpg", "license": 1,
         "date_captured": "2013-11-14 17:02:52", "flickr_url": f"http://farm.example.org/{number}.jpg"}
        for number in range(-(-rows // BOXES))
    ]  # fmt: skip
    annotations = [
        {"id": number, "image_id": number // BOXES, "category_id": number % 80 + 1, "area": 1200.5, "iscrowd": 0,
         "bbox": [number % 500 + 0.25, 10.5, 100.75, 200.25],
         "segmentation": [[float(point * number % 640) + 0.13 for point in range(2 * POINTS)]]}
        for number in range(rows)
    ]  # fmt: skip
    categories = [{"id": number, "name": f"thing {number}", "supercategory": "things"} for number in range(1, 81)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    return "train.json", content


def inat2021(rows: int) -> tuple[str, dict[str, Any]]:
    categories = [
        {"id": number, "name": f"Genus{number // 2} species{number}", "common_name": f"Common {number}",
         "supercategory": "Animalia", **{rank: f"{rank}{number // 2}" for rank in RANKS},
         "specific_epithet": f"species{number}", "image_dir_name": f"{number:05d}_Animalia"}
        for number in range(SPECIES)
    ]  # fmt: skip
    images = [
        {"id": number, "width": 500, "height": 375, "license": 1, "rights_holder": f"person {number}",
         "file_name": f"val/{number % SPECIES:05d}_Animalia/{number:032x}.jpg", "date": "2018-09-18 10:52:00+00:00",
         "latitude": 37.8651, "longitude": -119.5388, "location_uncertainty": 977}
        for number in range(rows)
    ]  # fmt: skip
    annotations = [{"id": number, "image_id": number, "category_id": number % SPECIES} for number in range(rows)]
    licences = [{"id": 1, "name": "CC BY-NC 4.0", "url": ""}]
    content = {"info": {}, "licenses": licences, "images": images, "annotations": annotations, "categories": categories}
    return "val.json", content


LAYOUTS = {"coco": coco, "inat2021": inat2021}


def write(folder: Path, layout: str, rows: int) -> Path:
    """An annotation file and empty files in the place of its pictures."""
    name, content = LAYOUTS[layout](rows)
    for image in content["images"]:
        picture = folder / image["file_name"]
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.touch()
    (folder / name).write_text(json.dumps(content))
    return folder / name


def held() -> float:
    """Most memory that this process has held so far, in MB. (What getrusage says, a child has from its parent.)"""
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def measure(layout: str, what: str, path: Path) -> None:
    """Read the file in one of two ways and print rows, seconds and MB."""
    before, start = held(), perf_counter()
    if what == "json":
        with open(path, encoding="utf-8") as file:
            rows = len(json.load(file)["annotations"])
    else:
        rows = len(read_listing(Dataset(format=layout, root=str(path.parent))).images)
    print(rows, perf_counter() - start, held() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each file (default: 100000)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        layout, what, path = arguments.measure
        measure(layout, what, Path(path))
        return
    print(f"{platform.processor() or platform.machine()}, {platform.python_version()}")
    print(f"{'file':10} {'MB':>6} {'what':8} {'rows':>8} {'s':>6} {'MB held':>8} {'kB a row':>9}")
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as name:
            path = write(Path(name), layout, arguments.rows)
            size = path.stat().st_size / 1e6
            for what in ("json", "listing"):
                command = [sys.executable, "-m", "bench.index_json", "--measure", layout, what, str(path)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                rows, seconds, memory = int(said[0]), float(said[1]), float(said[2])
                each = memory * 1024 / rows
                print(f"{layout:10} {size:6.0f} {what:8} {rows:8} {seconds:6.2f} {memory:8.0f} {each:9.2f}")


if __name__ == "__main__":
    main()
