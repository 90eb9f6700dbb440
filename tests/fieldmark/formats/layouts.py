"""Small data sets laid out as their publishers ship them, of drawn pictures of 80 x 60 pixels, and their indexes.

Each `make_NAME(root, train, test)` writes three classes with so many pictures a class; boxes, where the layout has
them, are BOX.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from fieldmark import store
from fieldmark.formats import read_listing
from fieldmark.listing import Listing
from fieldmark.params import Dataset
from tests.project import ROOT, draw

EXCERPTS = ROOT.parent / "shared/data/layouts"
# Sides of every box in pixels, and in shares of 80 x 60.
BOX, SHARES = [8, 6, 40, 30], [0.1, 0.1, 0.5, 0.5]
CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"]
VARIANTS = {"F-16A/B": ("Lockheed Martin", "F-16"), "737-200": ("Boeing", "Boeing 737"), "MD-11": ("Boeing", "MD-11")}
BREEDS = ["n02085620-Chihuahua", "n02105855-Shetland_sheepdog", "n02106550-black-and-tan_hound"]
PETS = ["Abyssinian", "american_bulldog", "Bengal"]
SIDES = ("xmin", "ymin", "xmax", "ymax")
BIRDS = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]


def read(name: str, root: Path) -> Listing:
    return read_listing(Dataset(format=name, root=str(root)))


def excerpt(name: str) -> Path:
    """The excerpt of a layout's own files, which is no part of the project; the test is skipped without it."""
    if not (EXCERPTS / name).is_dir():
        pytest.skip(f"../shared/data/layouts/{name} is not on this machine")
    return EXCERPTS / name


def listed(listing: Listing) -> list[tuple[Any, ...]]:
    return [(row["path"], row["name"], row["split"], row.get("box")) for row in listing.images]


def index(
    name: str, root: Path, set_params: Callable[..., Any], run_stage: Callable[..., None]
) -> tuple[list[tuple[Any, ...]], dict[str, tuple[Any, ...]], list[dict[str, Any]]]:
    """What index_images makes of a data set: its images by path with class, split and box, its classes, its parts.

    Where validation images were drawn, they count as train: which they are hangs on the bytes of the pictures.
    """
    drawn = all(row["split"] != "val" for row in read(name, root).images)
    set_params(dataset={"format": name, "root": str(root), "val_fraction": 0.5})
    run_stage("index_images")
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    classes = store.read_table("data/index/classes.parquet", "index.classes/2").to_pylist()
    names = {row["class_id"]: row["name"] for row in classes}
    assert {row["status"] for row in rows} == {"ok"}
    images = [
        (
            row["path"],
            names[row["class_id"]],
            "train" if drawn and row["split"] == "val" else row["split"],
            row["box"] and np.round(row["box"], 4).tolist(),
        )
        for row in sorted(rows, key=lambda row: row["path"])
    ]
    ranks = {row["name"]: (row["superclass"], row["lineage"]) for row in classes}
    return images, ranks, store.read_table("data/index/parts.parquet", "index.parts/1").to_pylist()


def pictures(classes: int, train: int, test: int) -> Iterator[tuple[int, str, int]]:
    """A number from 1, the split and the class, from 0, of each picture: as many a class as are asked for."""
    splits = [(split, kind) for kind in range(classes) for split in ["train"] * train + ["test"] * test]
    for number, (split, kind) in enumerate(splits, start=1):
        yield number, split, kind


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def save_mat(path: Path, **variables: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def cells(texts: list[str], shape: tuple[int, int]) -> np.ndarray:
    """A cell array of texts."""
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(shape)


def structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A structure array of shape (1, N), its numbers as small as MATLAB keeps them."""
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in rows[0]])
    for place, row in enumerate(rows):
        for field, value in row.items():
            kind = np.uint8 if isinstance(value, int) and value < 256 else np.uint16
            array[field][0, place] = value if isinstance(value, str) else np.array([[value]], dtype=kind)
    return array


def voc(*objects: tuple[str, list[int]]) -> str:
    """An XML of Pascal VOC's form, whose file name is the placeholder that many have."""

    def boxed(box: list[int]) -> str:
        return "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, box, strict=True))

    things = "".join(f"<object><name>{name}</name><bndbox>{boxed(box)}</bndbox></object>" for name, box in objects)
    return f"<annotation><folder>%s</folder><filename>%s</filename>{things}</annotation>"


def make_cars(root: Path, train: int = 2, test: int = 1) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    sides = {"bbox_x1": BOX[0] + 1, "bbox_y1": BOX[1] + 1, "bbox_x2": BOX[2], "bbox_y2": BOX[3]}
    for seed, split, kind in pictures(3, train, test):
        name = f"{len(rows[split]) + 1:05d}.jpg"  # the same names in train and test
        draw(root / f"cars_{split}" / name, seed)
        rows[split].append({**sides, "class": kind + 1, "fname": name})
    save_mat(root / "devkit/cars_meta.mat", class_names=cells(CARS, (1, 3)))
    save_mat(root / "devkit/cars_train_annos.mat", annotations=structs(rows["train"]))
    save_mat(root / "cars_test_annos_withlabels.mat", annotations=structs(rows["test"]))
    without = [{key: value for key, value in row.items() if key != "class"} for row in rows["test"]]
    save_mat(root / "devkit/cars_test_annos.mat", annotations=structs(without))


def make_aircraft(root: Path, train: int = 2, test: int = 1) -> None:
    """One of the training pictures of each class is for validation, as the data set has it."""
    lists: dict[str, list[str]] = {}
    boxes = []
    for number, split, kind in pictures(3, train, test):
        name, (manufacturer, family) = list(VARIANTS.items())[kind]
        place = "val" if split == "train" and number % (train + test) == 1 else split
        image = f"{number:07d}"
        draw(root / f"data/images/{image}.jpg", number)
        for rank, label in (("variant", name), ("family", family), ("manufacturer", manufacturer)):
            lists.setdefault(f"images_{rank}_{place}.txt", []).append(f"{image} {label}")
        boxes.append(f"{image} {BOX[0] + 1} {BOX[1] + 1} {BOX[2]} {BOX[3]}")
    boxes[0] = f"0000001 0 {BOX[1] + 1} {BOX[2]} {BOX[3]}"  # the file counts from 1, and has zeros
    for name, lines in {**lists, "images_box.txt": boxes}.items():
        write(root / "data" / name, *lines)


def make_dogs(root: Path, train: int = 2, test: int = 1) -> None:
    files: dict[str, list[str]] = {"train": [], "test": []}
    for number, split, kind in pictures(3, train, test):
        stem = f"{BREEDS[kind]}/{BREEDS[kind].split('-')[0]}_{number}"
        draw(root / f"Images/{stem}.jpg", number)
        write(root / "Annotation" / stem, voc(("dog", [0, 0, 20, 20]), ("dog", BOX)))
        files[split].append(f"{stem}.jpg")
    for split, names in files.items():
        column = cells(names, (len(names), 1))
        save_mat(root / f"{split}_list.mat", file_list=column, labels=np.ones((len(names), 1)))


def make_nabirds(root: Path, train: int = 2, test: int = 1) -> None:
    """Leaves 295, 296 and 700; node 100 has the name of one of them, and Birds are the root."""
    write(root / "classes.txt", "0 Birds", "1 Ducks, Geese, and Swans", "100 Snow Goose", "295 Snow Goose",
          "296 Common Eider (Adult male)", "700 Common Eider (Female/juvenile)")  # fmt: skip
    write(root / "hierarchy.txt", "1 0", "100 1", "295 100", "296 1", "700 1")
    tables: dict[str, list[str]] = {}
    for number, split, kind in pictures(3, train, test):
        leaf = (295, 296, 700)[kind]
        image = f"0000139e-21dc-4d0c-bfe1-{number:012d}"
        path = f"{leaf:04d}/{image.replace('-', '')}.jpg"
        draw(root / "images" / path, number)
        box = f"{BOX[0]} {BOX[1]} {BOX[2] - BOX[0]} {BOX[3] - BOX[1]}"
        for name, rest in (("images", path), ("image_class_labels", leaf), ("train_test_split", int(split == "train")),
                           ("bounding_boxes", box), ("sizes", "80 60"), ("parts/part_locs", "0 40 30 1")):  # fmt: skip
            tables.setdefault(name, []).append(f"{image} {rest}")
    for name, lines in tables.items():
        write(root / f"{name}.txt", *lines)
    write(root / "parts/parts.txt", "0 bill", "1 left eye")


def make_web(root: Path, train: int = 2, test: int = 1) -> None:
    for number, split, kind in pictures(3, train, test):
        draw(root / {"train": "train", "test": "val"}[split] / BIRDS[kind] / f"{BIRDS[kind]}_{number:05d}.jpg", number)


def make_flowers(root: Path, train: int = 2, test: int = 1) -> None:
    sets: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    labels = []
    for number, split, kind in pictures(3, train, test):
        draw(root / f"jpg/image_{number:05d}.jpg", number)
        labels.append((1, 60, 102)[kind])
        held = split == "train" and number % (train + test) == 1
        sets["valid" if held else {"train": "trnid", "test": "tstid"}[split]].append(number)
    save_mat(root / "imagelabels.mat", labels=np.array([labels], dtype=np.uint8))
    save_mat(root / "setid.mat", **{name: np.array([ids], dtype=np.uint16) for name, ids in sets.items()})


def make_pets(root: Path, train: int = 2, test: int = 1) -> None:
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, split, kind in pictures(3, train, test):
        stem = f"{PETS[kind]}_{number}"
        draw(root / f"images/{stem}.jpg", number)
        lists[{"train": "trainval", "test": "test"}[split]].append(f"{stem} {kind + 1} {2 if kind == 1 else 1} 1")
        if split == "train" and number > 1:  # of some there is none
            write(root / f"annotations/xmls/{stem}.xml", voc(("cat", BOX)))
    write(root / "annotations/xmls/._Abyssinian_1.xml", "\0")
    for name, lines in lists.items():
        write(root / f"annotations/{name}.txt", *lines)


def make_cultivars(root: Path, train: int = 2, test: int = 1) -> None:
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for number, split, kind in pictures(3, train, test):
        name = f"{kind + 1:03d}/leaf_{number}.png"
        draw(root / "images" / name, number)
        lists[split].append(f"{name} {kind + 9}")
    for split, lines in lists.items():
        write(root / f"anno/{split}.txt", *lines)


def make_hugging(root: Path, train: int = 2, test: int = 1) -> None:
    """train has a CSV, test JSON lines."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number, split, kind in pictures(3, train, test):
        draw(root / split / f"{number:04d}.png", number)
        rows[split].append({"file_name": f"{number:04d}.png", "label": f"kind {kind}"})
    write(root / "train/metadata.csv", "file_name,label", *(",".join(row.values()) for row in rows["train"]))
    write(root / "test/metadata.jsonl", *map(json.dumps, rows["test"]))


# By the format of each: what makes it, and the profiles that read it.
LAYOUTS: dict[str, tuple[Callable[..., None], list[str]]] = {
    "stanford_cars": (make_cars, ["cars"]),
    "fgvc_aircraft": (make_aircraft, ["aircraft"]),
    "stanford_dogs": (make_dogs, ["dogs"]),
    "nabirds": (make_nabirds, ["nabirds"]),
    "webfg496": (make_web, ["web-bird", "web-aircraft", "web-car"]),
    "flowers102": (make_flowers, ["flowers102"]),
    "oxford_pets": (make_pets, ["pets"]),
    "ultra_fgvc": (make_cultivars, ["cotton80", "soybean200"]),
    "hf_imagefolder": (make_hugging, ["hf-imagefolder"]),
}
