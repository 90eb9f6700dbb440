"""What tests of adapt_encoder and finetune share: pictures of six classes that colours tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image

from fieldmark import store

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]
COLOURS = ["red", "green", "blue", "yellow", "pink", "grey"]
RGB = [(220, 30, 30), (30, 200, 40), (30, 40, 220), (220, 210, 30), (230, 120, 200), (120, 120, 120)]
EACH = 6  # training pictures a class


def draw_classes(root: Path, split: str = "train", each: int = EACH) -> None:
    """Blocks of noise about one colour a class, in images/SPLIT/CLASS."""
    for number, (name, colour) in enumerate(zip(CLASSES, RGB, strict=True)):
        for place in range(each):
            chance = np.random.default_rng([number, place, len(split)])
            noise = chance.normal(0, 30, (6, 6, 3)) + colour
            path = root / "images" / split / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
            picture.resize((48, 48), Image.Resampling.NEAREST).save(path)


def write_index(moved: dict[str, tuple[str, str]] | None = None) -> None:
    """The index of what draw_classes drew; `moved` gives some paths another class_id and split."""
    rows = []
    for path in sorted(Path("images").rglob("*.png")):
        place = path.relative_to("images").as_posix()
        split, name, _ = place.split("/")
        class_id, split = (moved or {}).get(place, (name, split))
        rows.append({
            "path": place, "image_id": store.sha256(path.read_bytes()), "class_id": class_id, "split": split,
            "status": "ok", "width": 48, "height": 48,
        })  # fmt: skip
    table = store.make_table("index.images/1", rows)
    store.write_table(table, "data/index/images.parquet", "index.images/1", {}, "index")


def sentences(word: str = "a {} animal") -> list[tuple[str, str | None, str]]:
    """Two sentences of each class, its name, and one sentence that was dropped."""
    found: list[tuple[str, str | None, str]] = []
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        found += [(word.format(colour), name, "visual"), (f"an animal in {colour}", name, "visual")]
        found += [(f"a photo of a {name}", name, "name"), (f"the song of the {name}", name, "dropped")]
    return found
