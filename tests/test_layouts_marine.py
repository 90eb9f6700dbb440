"""Layouts of fish, films, camera traps and annotation files, from their files to the report, by their profiles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from tests.fieldmark.films import film
from tests.fieldmark.formats import (
    test_camtrap_dp,
    test_coco,
    test_fathomnet2025,
    test_fishnet,
    test_hf_parquet,
    test_inat2021,
    test_mammalnet,
)
from tests.openai_server import OpenAIServer
from tests.project import draw
from tests.test_layouts import run_all, small_params

SPECIES = ("Amphiprion_clarkii", "Dascyllus_reticulatus", "Zebrasoma_scopas")


def make_fishnet(root: Path) -> None:
    (root / "anns").mkdir(parents=True)
    meta = test_fishnet.META
    families = [line.split(",")[3] for line in meta]
    for split, count in (("train", 6), ("test", 2)):
        lines = [(f"{split}-{number}.jpg", family) for family in families for number in range(count)]
        rows = "".join(test_fishnet.line(image, family, "x") for image, family in lines)
        (root / f"anns/{split}.csv").write_text(test_fishnet.HEAD + rows)
        for seed, (image, family) in enumerate(lines):
            draw(root / f"Images/{family}/{image}", seed + 100 * count)
    (root / "anns/train_full_meta_new.csv").write_text(test_fishnet.META_HEAD + "".join(meta))


def make_wildfish(root: Path) -> None:
    for seed in range(24):
        draw(root / f"images/WildFish_part{seed % 4 + 1}/{SPECIES[seed % 3]}_{seed}.jpg", seed)


def make_wildfishpp(root: Path) -> None:
    for seed in range(24):
        draw(root / f"{SPECIES[seed % 3]}/{seed}.jpg", seed)


def make_fish4knowledge(root: Path) -> None:
    for seed in range(24):
        draw(root / f"fish_image/fish_0{seed % 3 + 1}/fish_{seed % 12:012d}_{seed:05d}.png", seed)


def make_inat2021(root: Path) -> None:
    root.mkdir(parents=True)
    labels = [0, 1, 2]
    train, val = (test_inat2021.table(*each) for each in (("train_mini", 0, labels * 6), ("val", 500, labels * 2)))
    test_inat2021.write(root, train_mini=train, val=val)


def make_fathomnet2025(root: Path) -> None:
    """24 regions of two taxa in 12 pictures, each of a dive of its own."""
    root.mkdir(parents=True)
    content = test_fathomnet2025.table([])
    content["images"] = [
        {"id": number, "width": 80, "height": 60, "file_name": "x", "coco_url": f"https://x.org/dives/{number}/a.png"}
        for number in range(12)
    ]
    content["annotations"] = [
        {"id": number, "image_id": number // 2, "category_id": number % 2 + 1, "bbox": [40 * (number % 2), 0, 40, 60]}
        for number in range(24)
    ]
    (root / "dataset_train.json").write_text(json.dumps(content))
    for number in range(12):
        draw(root / f"images/{number}.png", number)


def make_camtrap(root: Path) -> None:
    root.mkdir(parents=True)
    places, media, seen = "deploymentID\n", "mediaID,deploymentID,timestamp,filePath\n", test_camtrap_dp.HEAD
    for number in range(24):
        name = ("Vulpes vulpes", "Ardea", "Meles meles")[number % 3]
        places += f"d{number}\n"
        media += f"m{number},d{number},2022-04-03T05:00:00Z,{number}.png\n"
        seen += f"o{number},d{number},m{number},,,media,animal,{name},0.25,0.25,0.5,0.5,human\n"
        draw(root / f"{number}.png", number)
    for name, content in (("deployments", places), ("media", media), ("observations", seen)):
        (root / f"{name}.csv").write_text(content)
    (root / "datapackage.json").write_text(json.dumps(test_camtrap_dp.PACKAGE))


def make_coco(root: Path) -> None:
    """A file a split, of three boxes a picture."""
    root.mkdir(parents=True)
    number = 0
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for _ in range(count):
            number += 1
            images.append({"id": number, "width": 80, "height": 60, "file_name": f"{number}.png"})
            draw(root / f"{number}.png", number)
            for category in range(3):
                bbox = [25 * category, 0, 30, 60]
                boxes.append({"id": 10 * number + category, "image_id": number, "category_id": category, "bbox": bbox})
        categories = [{"id": place, "name": name} for place, name in enumerate(("copepod", "krill", "salp"))]
        content = {"images": images, "annotations": boxes, "categories": categories}
        test_coco.write(root, **{split: content})


def make_clips(root: Path) -> None:
    """Two seconds each, so that a clip is two pictures."""
    for seed in range(12):
        film(root / f"{SPECIES[seed % 3]}/{seed}.mp4", 2.0, seed)


def make_mammalnet(root: Path) -> None:
    """A picture a clip; two parts of one film of each genus in train."""
    test_mammalnet.make(root, 3, 2, 1.0)


# By profile: what makes the data set, and how many rows it has.
LAYOUTS: dict[str, tuple[Callable[[Path], None], int]] = {
    "fishnet": (make_fishnet, 24), "wildfish": (make_wildfish, 24), "wildfishpp": (make_wildfishpp, 24),
    "fish4knowledge": (make_fish4knowledge, 24), "inat2021": (make_inat2021, 24),
    "clips": (make_clips, 24), "mammalnet": (make_mammalnet, 24), "hf-parquet": (test_hf_parquet.make, 24),
    "fathomnet2025": (make_fathomnet2025, 24), "camtrap": (make_camtrap, 24), "coco": (make_coco, 33),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("profile", LAYOUTS)
def test_a_profile_goes_from_the_layout_to_the_report(
    profile: str, project: Path, run_stage: Callable[..., None], server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, count = LAYOUTS[profile]
    make(project / "data/set")
    params = small_params(profile, project / "data/set", server)
    params["dataset"].update(images=None, test_fraction=0.25)
    run_all(params, project, run_stage, monkeypatch)
    rows = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    assert (len(rows), {row["status"] for row in rows}) == (count, {"ok"})
    judged = sum(row["split"] == "test" for row in rows)
    right = json.loads(Path("data/runs/linear_probe/metrics.json").read_text())["test"]["accuracy"] * judged
    assert judged >= 4
    assert right == pytest.approx(round(right)), "each test image is judged once"
