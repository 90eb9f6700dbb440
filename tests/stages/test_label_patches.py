import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.labels import labelling
from fieldmark.labels.labelling import Reference, object_share
from fieldmark.labels.pixels import pixel_density
from fieldmark.labels.rings import ring_gains
from fieldmark.params import Labels, Params
from stages.label_patches import label
from tests.project import (
    image_id,
    snapshot,
    unit,
    webp_of,
    write_index,
    write_nodes,
    write_texts,
    write_thumbs,
)


def random_units(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(unit(np.random.default_rng(seed).standard_normal(shape)))


def nodes_table(vectors: np.ndarray) -> pa.Table:
    images, nodes, dimension = vectors.shape
    return pa.table(
        {
            "image_id": [image_id(n) for n in range(images) for _ in range(nodes)],
            "view": pa.array([0] * images * nodes, pa.int16()),
            "node": pa.array(list(range(nodes)) * images, pa.int16()),
            **boxes_of(images, nodes),
            "vector": store.vector_column(vectors.reshape(-1, dimension)),
        }
    )


def boxes_of(images: int, nodes: int) -> dict[str, np.ndarray]:
    """A box each of side 0.2, drawn; the same for every image."""
    corner = np.random.default_rng(9).random((nodes, 2)).astype(np.float32) * 0.8
    x, y = np.tile(corner, (images, 1)).T
    return {"x0": x, "y0": y, "x1": x + np.float32(0.2), "y1": y + np.float32(0.2)}


@pytest.mark.parametrize("chunk", [1, 8192])
def test_rows_of_a_bucket(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "CHUNK", chunk)
    vectors = unit(np.random.default_rng(0).standard_normal((5, 4, 6))).astype(np.float16)
    concepts = random_units(7, 6, seed=3)
    numbers = np.arange(10, 17)
    settings = Labels(temperature=2.0, top=3, select_locals=2, select_concepts=4)
    rows = label(nodes_table(vectors), concepts, numbers, 20.0, settings, Reference()).to_pylist()
    assert len(rows) == 20
    box = boxes_of(1, 4)
    places = torch.from_numpy(np.stack([box["x0"] + box["x1"], box["y0"] + box["y1"]], axis=1) / 2)
    p = torch.softmax(10.0 * torch.from_numpy(vectors.astype(np.float32)) @ concepts.T, dim=2).numpy()
    for i, row in enumerate(rows):
        here = p[i // 4, i % 4]
        best = np.argsort(-here, kind="stable")[:3]
        assert row["concept_idx"] == (best + 10).tolist()
        np.testing.assert_allclose(np.array(row["concept_weight"], dtype=np.float32), here[best], atol=1e-3)
        entropy = -(here * np.log(here)).sum()
        assert row["entropy"] == pytest.approx(entropy, rel=1e-3, abs=1e-5)
        assert row["density"] == pytest.approx(1 - entropy / math.log(7), abs=1e-3)
        if i % 4:
            assert row["selected_concepts"] is None
            assert row["ring_gains"] is None
        else:
            assert row["selected"]
            view = rows[i : i + 4]
            density = torch.tensor([[each["density"] for each in view[1:]]])
            gains = ring_gains(torch.from_numpy(p[i // 4][None, 1:]), density, places[None, 1:], settings)
            assert len(row["ring_gains"]) == settings.rings
            assert row["ring_gains"] == pytest.approx(gains[0].tolist(), abs=1e-4)
            assert sum(each["selected"] for each in view) == 3
            score = here + sum(
                each["density"] * p[i // 4, n] for n, each in enumerate(view) if n and each["selected"]
            )
            assert row["selected_concepts"] == (np.argsort(-score, kind="stable")[:4] + 10).tolist()


def test_one_concept_explains_everything() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((2, 3, 4)))
    table = nodes_table(vectors)
    rows = label(table, random_units(1, 4), np.array([5]), 10.0, Labels(), Reference()).to_pylist()
    assert {row["density"] for row in rows} == {1}
    assert {row["entropy"] for row in rows} == {0}
    assert all(row["concept_idx"] == [5] for row in rows)


def test_views_of_unequal_length_are_told() -> None:
    table = nodes_table(unit(np.random.default_rng(0).standard_normal((3, 4, 5))))
    with pytest.raises(UserError, match="views of one encoder differ"):
        label(table.slice(0, 11), random_units(2, 5), np.arange(2), 1.0, Labels(), Reference())


def test_an_image_of_one_node_has_no_rings() -> None:
    table = nodes_table(unit(np.random.default_rng(0).standard_normal((2, 1, 4))))
    rows = label(table, random_units(3, 4), np.arange(3), 10.0, Labels(rings=3), Reference()).to_pylist()
    assert [row["ring_gains"] for row in rows] == [[0, 0, 0]] * 2


def test_only_what_is_inside_the_object_counts() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((2, 4, 5)))
    table, concepts, settings = nodes_table(vectors), random_units(6, 5), Labels(inside_object=True)
    index = pa.table({
        "image_id": [image_id(1)],
        "box": pa.array([[0.3, 0.2, 0.6, 0.9]], store.items(store.FLOAT)),
    })  # fmt: skip
    plain = label(table, concepts, np.arange(6), 10.0, settings, Reference()).column("density").to_numpy()
    found = label(table, concepts, np.arange(6), 10.0, settings, Reference(), index).column("density").to_numpy()
    np.testing.assert_allclose(found[:4], plain[:4])
    corners = np.stack([table.column(name).to_numpy()[4:] for name in ("x0", "y0", "x1", "y1")], axis=1)
    share = object_share(corners, np.tile(np.array([0.3, 0.2, 0.6, 0.9], dtype=np.float32), (4, 1)))
    assert 0 < share.max() <= 1
    assert share.min() < 1
    np.testing.assert_allclose(found[4:], plain[4:] * share)


@pytest.mark.parametrize("chunk", [1, 8192])
def test_density_of_pixels_is_of_each_view_of_its_own_picture(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    table, concepts = nodes_table(unit(rng.standard_normal((3, 4, 5)))), random_units(6, 5)
    pictures = {image_id(n): rng.integers(0, 2 << n, (12, 15), dtype=np.uint8) for n in range(3)}
    thumbs = store.make_table("thumbs/1", [{"image_id": each, "webp": webp_of(pictures[each])} for each in pictures])
    settings = Labels(density="pixel", select_locals=1, redundancy=0.0)
    made = label(table, concepts, np.arange(6), 10.0, settings, Reference(), thumbs=thumbs)
    corners = np.stack([table.column(name).to_numpy() for name in ("x0", "y0", "x1", "y1")], axis=1)
    expected = pixel_density(thumbs, list(pictures), corners.reshape(3, 4, 4))
    assert np.unique(expected).size > 6
    found = made.column("density").to_numpy().reshape(3, 4)
    np.testing.assert_array_equal(found, expected)
    selected = made.column("selected").to_numpy().reshape(3, 4)
    assert selected[:, 1:].argmax(axis=1).tolist() == expected[:, 1:].argmax(axis=1).tolist()
    plain = label(table, concepts, np.arange(6), 10.0, Labels(), Reference())
    for same in ("concept_idx", "concept_weight", "entropy"):
        assert made.column(same) == plain.column(same)


@pytest.fixture
def tables(set_params: Callable[..., Params]) -> Params:
    images = {image_id(n): unit(np.random.default_rng(n).standard_normal((4, 3))) for n in (0, 1, 2)}
    write_nodes(Path("data/embed/conv/images"), images, buckets=16)
    write_texts(Path("data/embed/conv/text.parquet"), {"x": unit([1, 0, 0])})
    write_bank("embed")
    return set_params(dataset={"buckets": 16})


def write_bank(embed: str, kept: bool = True) -> None:
    rows = [
        {
            "concept_idx": n,
            "text": f"{n}",
            "class_ids": ["a"],
            "kind": "visual" if n else "name",
            "kept": kept and n > 0,
            "vector": vector.astype(np.float16),
        }
        for n, vector in enumerate(unit(np.eye(3)))
    ]
    table = pa.Table.from_pylist(rows, schema=store.arrow_schema("bank/1", 3))
    store.write_table(table, "data/bank/conv.parquet", "bank/1", {"embed": embed}, "bank")


def test_the_stage(tables: Params, run_stage: Callable[..., None]) -> None:
    run_stage("label_patches", "--encoder", "conv")
    folder = Path("data/labels/conv")
    first = snapshot(folder)
    assert len(first) == 16
    rows = store.read_buckets(folder, "labels/1", 16).to_pylist()
    assert len(rows) == 12
    # Class names stand in the bank, and label nothing.
    assert {idx for row in rows for idx in row["concept_idx"]} == {1, 2}
    assert all(row["concept_weight"] == sorted(row["concept_weight"], reverse=True) for row in rows)
    run_stage("label_patches", "--encoder", "conv")
    assert {name: content for name, (content, _) in snapshot(folder).items()} == {
        name: content for name, (content, _) in first.items()
    }


@pytest.mark.parametrize("mode", ["softmax", "splice"])
def test_a_bank_of_names_alone(
    mode: str, tables: Params, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    write_bank("embed", kept=False)
    write_index({image_id(n): ("a", "train") for n in (0, 1, 2)})
    set_params(dataset={"buckets": 16}, labels={"mode": mode, "select_locals": 2})
    run_stage("label_patches", "--encoder", "conv")
    rows = store.read_buckets(Path("data/labels/conv"), "labels/1", 16).to_pylist()
    assert len(rows) == 12
    for row in rows:
        assert (row["concept_idx"], row["concept_weight"], row["entropy"], row["density"]) == ([], [], 0, 0)
        assert row["ring_gains"] == (None if row["node"] else [0.0] * 4)
        assert row["selected_concepts"] == (None if row["node"] else [])
    assert all(row["selected"] for row in rows if row["node"] == 0)
    assert sum(row["selected"] for row in rows) == 3 * 3


def test_a_bank_of_other_embeddings_is_refused(tables: Params, run_stage: Callable[..., None]) -> None:
    write_bank("another")
    with pytest.raises(UserError, match=r"data/bank/conv\.parquet: was selected on other embeddings"):
        run_stage("label_patches", "--encoder", "conv")
    Path("data/bank/conv.parquet").unlink()
    with pytest.raises(UserError, match="is missing"):
        run_stage("label_patches", "--encoder", "conv")
    assert not Path("data/labels").exists()


def test_the_stage_by_splice(tables: Params, set_params: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    set_params(dataset={"buckets": 16}, labels={"mode": "splice", "density": "gaga"})
    with pytest.raises(UserError, match=r"data/index/images\.parquet: is missing"):
        run_stage("label_patches", "--encoder", "conv")
    write_index({image_id(n): ("a", "test") for n in (0, 1, 2)})
    with pytest.raises(UserError, match=r"holds no training image; labels\.mode"):
        run_stage("label_patches", "--encoder", "conv")
    write_index({image_id(n): ("a", "train") for n in (0, 1, 2)})
    run_stage("label_patches", "--encoder", "conv")
    folder = Path("data/labels/conv")
    header = store.read_folder_header(folder, "labels/1", 16)
    assert header.params["index"] == "index"
    assert header.params["mode"] == "splice"
    rows = store.read_buckets(folder, "labels/1", 16).to_pylist()
    sums = {round(sum(row["concept_weight"]), 2) for row in rows}
    assert sums <= {0, 1}
    first = snapshot(folder)
    run_stage("label_patches", "--encoder", "conv")
    assert [content for content, _ in snapshot(folder).values()] == [content for content, _ in first.values()]


def test_the_stage_by_pixels(tables: Params, set_params: Callable[..., Params], run_stage: Callable[..., None]) -> None:
    folder = Path("data/labels/conv")
    run_stage("label_patches", "--encoder", "conv")
    assert "thumbs" not in store.read_folder_header(folder, "labels/1", 16).params
    set_params(dataset={"buckets": 16}, labels={"density": "pixel"})
    with pytest.raises(UserError, match=r"data/thumbs/b000\.parquet: is missing"):
        run_stage("label_patches", "--encoder", "conv")
    even = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures = {image_id(0): even, image_id(1): even // 128, image_id(2): np.zeros_like(even)}
    write_thumbs({each: pictures[each] for each in (image_id(0), image_id(2))}, buckets=16)
    with pytest.raises(UserError, match=rf"data/thumbs: lacks image {image_id(1)}; run index_images again"):
        run_stage("label_patches", "--encoder", "conv")
    write_thumbs(pictures, buckets=16)
    run_stage("label_patches", "--encoder", "conv")
    header = store.read_folder_header(folder, "labels/1", 16)
    assert header.params["thumbs"] == "thumbs"
    assert header.params["density"] == "pixel"
    rows = store.read_buckets(folder, "labels/1", 16).to_pylist()
    # Every box is the whole picture.
    assert {(row["image_id"], row["density"]) for row in rows} == {
        (image_id(0), 1), (image_id(1), 1 / 8), (image_id(2), 0)
    }  # fmt: skip
