import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.labels.pixels import pixel_density
from fieldmark.labels.rings import ring_gains
from fieldmark.params import Labels, Params
from stages import label_patches
from stages.label_patches import (
    Reference,
    entropy_of,
    label,
    label_nodes,
    largest_weights,
    node_means,
    object_boxes,
    object_share,
    read_reference,
    score_concepts,
    select_nodes,
    softmax_weights,
)
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


def test_weights_are_a_softmax() -> None:
    nodes, concepts = random_units(3, 4), random_units(5, 4, seed=1)
    found, _ = softmax_weights(nodes, concepts, 7.0)
    for n in range(3):
        powers = [math.exp(7.0 * float(nodes[n] @ concepts[k])) for k in range(5)]
        assert found[n].tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-4)


def test_a_node_of_nothing_but_zeros_shows_every_concept_alike() -> None:
    weights, entropy = softmax_weights(torch.zeros(1, 4), random_units(5, 4), 7.0)
    assert weights[0].tolist() == pytest.approx([0.2] * 5)
    assert entropy.item() == pytest.approx(math.log(5))


def test_entropy() -> None:
    assert entropy_of(torch.full((1, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy_of(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0
    assert entropy_of(torch.tensor([[0.5, 0.5, 0.0]])).item() == pytest.approx(math.log(2))


@given(st.integers(1, 40), st.sampled_from([0.1, 10.0, 200.0]), st.integers(0, 1000))
def test_softmax_and_its_entropy_at_once(concepts: int, scale: float, seed: int) -> None:
    nodes, texts = random_units(5, 4, seed=seed), random_units(concepts, 4, seed=seed + 1)
    weights, entropy = softmax_weights(nodes, texts, scale)
    torch.testing.assert_close(weights, torch.softmax(scale * nodes @ texts.T, dim=1))
    torch.testing.assert_close(entropy, entropy_of(weights), atol=1e-4, rtol=1e-4)


@given(st.integers(1, 300), st.integers(1, 20), st.booleans(), st.integers(0, 1000))
def test_the_largest_weights_are_those_of_topk(columns: int, count: int, tied: bool, seed: int) -> None:
    weights = torch.rand(4, columns, generator=torch.Generator().manual_seed(seed))
    if tied:
        weights = (weights * 5).round()
    count = min(count, columns)
    values, idx = largest_weights(weights, count)
    assert torch.equal(values, weights.topk(count, dim=1).values)
    assert torch.equal(weights.gather(1, idx), values)
    assert all(len(set(row)) == count for row in idx.tolist())


def test_density_by_each_rule() -> None:
    nodes, concepts = random_units(6, 4), random_units(5, 4, seed=1)

    def density(rule: str, nodes: Tensor = nodes, centres: Tensor = nodes[:2]) -> Tensor:
        settings = Labels.model_validate({"density": rule})
        is_global = torch.zeros(len(nodes), dtype=torch.bool)
        return label_nodes(nodes, is_global, concepts, 7.0, settings, Reference(centres=centres))[2]

    entropy = entropy_of(torch.softmax(7.0 * nodes @ concepts.T, dim=1)) / math.log(5)
    torch.testing.assert_close(density("entropy"), entropy)
    torch.testing.assert_close(density("neg_entropy"), 1 - entropy)
    distance = torch.cdist(nodes, nodes[:2]).amin(dim=1)
    torch.testing.assert_close(density("gaga"), 1 / (1 + distance), atol=1e-3, rtol=1e-3)
    assert density("gaga")[:2].tolist() == pytest.approx([1, 1])  # at a centre; the farther, the less
    torch.testing.assert_close(density("product"), density("gaga") * density("neg_entropy"))
    told = torch.rand(6, generator=torch.Generator().manual_seed(0))
    pixel, is_global = Labels(density="pixel"), torch.zeros(6, dtype=torch.bool)
    assert torch.equal(label_nodes(nodes, is_global, concepts, 7.0, pixel, Reference(), told)[2], told)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    turned = density("gaga", nodes @ turn, nodes[:2] @ turn)
    torch.testing.assert_close(turned, density("gaga"), atol=1e-3, rtol=1e-3)


def test_splice_weights_sum_to_one_or_nothing() -> None:
    concepts = random_units(12, 6, seed=1)
    means = torch.zeros(2, 6)
    centred = torch.nn.functional.normalize(concepts - concepts.mean(dim=0), dim=1)
    nodes = torch.cat([centred[3:4], random_units(3, 6), torch.zeros(1, 6)])
    is_global = torch.zeros(5, dtype=torch.bool)
    settings = Labels(mode="splice", sparsity=0.1)
    weights, entropy, density = label_nodes(nodes, is_global, concepts, 1.0, settings, Reference(means))
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert weights[0, 3] == pytest.approx(1, abs=1e-3)
    assert entropy[4].item() == pytest.approx(math.log(12))
    assert density[4].item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(entropy[:4], entropy_of(weights[:4]))


def test_global_and_local_nodes_are_centred_apart() -> None:
    concepts, node = random_units(12, 6, seed=1), random_units(1, 6, seed=2)
    means = torch.stack([torch.zeros(6), 0.5 * random_units(6, seed=3)])
    settings = Labels(mode="splice", sparsity=0.1)

    def weights(is_global: bool, means: Tensor) -> Tensor:
        return label_nodes(node, torch.tensor([is_global]), concepts, 1.0, settings, Reference(means))[0]

    torch.testing.assert_close(weights(True, means), weights(True, means[[0, 0]]))
    torch.testing.assert_close(weights(False, means), weights(False, means[[1, 1]]))
    assert not torch.allclose(weights(True, means), weights(False, means))


def test_share_inside_the_object() -> None:
    corners = np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1], [0.1, 0.1, 0.2, 0.2]], dtype=np.float32)
    objects = np.array([[0.25, 0, 1, 0.25], [0, 0, 0.4, 0.4], [0, 0, 0.5, 1], [np.nan] * 4], dtype=np.float32)
    assert object_share(corners, objects).tolist() == pytest.approx([0.25, 0, 0.5, 1])


def test_boxes_are_found_by_image() -> None:
    index = pa.table({"image_id": ["a", "b"], "box": pa.array([None, [0.0, 0.1, 0.2, 0.3]], store.items(store.FLOAT))})
    boxes = object_boxes(pa.chunked_array([["b", "a", "b", "c"]]), index)
    np.testing.assert_allclose(boxes[[0, 2]], [[0, 0.1, 0.2, 0.3]] * 2)
    assert np.isnan(boxes[[1, 3]]).all()


def greedy(vectors: Tensor, density: Tensor, count: int, redundancy: float) -> set[int]:
    """Maximal marginal relevance, one node at a time."""
    taken: list[int] = []
    others = list(range(1, len(vectors)))
    while others and len(taken) < count:

        def score(n: int) -> float:
            nearest = max([0.0, *(float(vectors[n] @ vectors[m]) for m in taken)])
            return float(density[n]) - redundancy * nearest

        best = max(others, key=lambda n: (score(n), -n))
        taken.append(best)
        others.remove(best)
    return {0, *taken}


@given(st.integers(1, 8), st.integers(1, 10), st.sampled_from([0.0, 0.5, 2.0]), st.integers(0, 1000))
def test_selection_is_greedy(nodes: int, count: int, redundancy: float, seed: int) -> None:
    vectors = random_units(3, nodes, 3, seed=seed)
    density = torch.rand(3, nodes, generator=torch.Generator().manual_seed(seed))
    selected = select_nodes(vectors, density, count, redundancy)
    for image in range(3):
        expected = greedy(vectors[image], density[image], count, redundancy)
        assert set(selected[image].nonzero().flatten().tolist()) == expected
    assert selected[:, 0].all()


def test_a_copy_of_what_is_taken_loses() -> None:
    vectors = torch.from_numpy(unit([[[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]]]))
    density = torch.tensor([[0.0, 0.9, 0.8, 0.5]])
    assert select_nodes(vectors, density, 2, 0.5).tolist() == [[True, True, False, True]]
    assert select_nodes(vectors, density, 2, 0.0).tolist() == [[True, True, True, False]]


def test_concepts_score_over_selected_nodes() -> None:
    weights = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]])
    density = torch.tensor([[0.1, 0.5, 0.9]])
    selected = torch.tensor([[True, True, False]])
    assert score_concepts(weights, density, selected).tolist() == [[0.5 + 0.125, 0.5 + 0.375]]


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
    monkeypatch.setattr(label_patches, "CHUNK", chunk)
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
    monkeypatch.setattr(label_patches, "CHUNK", chunk)
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


def write_bank(embed: str) -> None:
    rows = [
        {
            "concept_idx": n,
            "text": f"{n}",
            "class_ids": ["a"],
            "kind": "visual" if n else "name",
            "kept": n > 0,
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


def test_a_bank_of_other_embeddings_is_refused(tables: Params, run_stage: Callable[..., None]) -> None:
    write_bank("another")
    with pytest.raises(UserError, match=r"data/bank/conv\.parquet: was selected on other embeddings"):
        run_stage("label_patches", "--encoder", "conv")
    Path("data/bank/conv.parquet").unlink()
    with pytest.raises(UserError, match="is missing"):
        run_stage("label_patches", "--encoder", "conv")
    assert not Path("data/labels").exists()


def test_training_images_alone_are_learnt_from(tables: Params, run_stage: Callable[..., None]) -> None:
    folder, index = Path("data/embed/conv/images"), Path("data/index/images.parquet")
    write_index({image_id(0): ("a", "train"), image_id(1): ("a", "test"), image_id(2): ("b", "train")})
    seen = [
        unit(np.random.default_rng(n).standard_normal((4, 3))).astype(np.float16).astype(np.float32) for n in (0, 2)
    ]
    means = node_means(folder, 16, dict.fromkeys([image_id(0), image_id(2)], "a"))
    torch.testing.assert_close(means[0], torch.from_numpy(np.mean([each[0] for each in seen], axis=0)))
    torch.testing.assert_close(means[1], torch.from_numpy(np.concatenate([each[1:] for each in seen]).mean(axis=0)))
    assert read_reference(folder, index, 16, Labels()) == Reference()
    reference = read_reference(folder, index, 16, Labels(mode="splice", density="product"))
    assert reference.means is not None
    assert torch.equal(reference.means, means)
    assert reference.centres is not None
    torch.testing.assert_close(reference.centres, means[1:])  # six nodes: one centre


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
