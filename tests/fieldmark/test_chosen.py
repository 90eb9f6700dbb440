"""Which classes and images a stage may learn from."""

from pathlib import Path

import pytest

from fieldmark import store
from fieldmark.chosen import choose_classes, hold_out, of_classes, read_images
from fieldmark.command import UserError

KNOWN = {"ant", "bee", store.class_id_of("Black Cat"), "dog", "eel"}


def test_images_are_usable_ones_of_a_split(project: Path) -> None:
    rows = [
        {"path": f"{number}.png", "image_id": str(number), "class_id": "ant", "split": split, "status": status}
        for number, (split, status) in enumerate([("train", "ok"), ("train", "duplicate"), ("test", "ok")])
    ]
    table = store.make_table("index.images/1", rows)
    store.write_table(table, "data/index/images.parquet", "index.images/1", {}, "index")
    assert {image_id: image.path for image_id, image in read_images().items()} == {"0": "0.png", "2": "2.png"}
    assert list(read_images("train")) == ["0"]
    assert of_classes(read_images(), ["bee"]) == {}


def test_classes_are_named_by_folder_or_class_id(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("Black Cat\n\nant\n")
    assert choose_classes(str(file), KNOWN, "key") == ["ant", store.class_id_of("Black Cat")]
    assert choose_classes("data/none", KNOWN, "key") == sorted(KNOWN)
    file.write_text("ant\nwolf\n")
    with pytest.raises(UserError, match=r"^key: .*classes\.txt, line 2: 'wolf' has no training image; "):
        choose_classes(str(file), KNOWN, "key")


def test_classes_held_out_are_drawn_by_hash_and_one_more_moves_one() -> None:
    classes = [f"class {number}" for number in range(50)]
    learned, held = hold_out(classes, 0.2, 0, "key")
    assert len(held) == 10
    assert sorted(learned + held) == sorted(classes)
    assert held != hold_out(classes, 0.2, 1, "key")[1]
    more = hold_out([*classes, "another"], 0.2, 0, "key")[1]
    assert len(set(held) - set(more)) <= 1
    assert [len(each) for each in hold_out(classes[:4], 0.9, 0, "key")] == [2, 2]
    with pytest.raises(UserError, match=r"^key: 3 classes are too few"):
        hold_out(classes[:3], 0.2, 0, "key")
