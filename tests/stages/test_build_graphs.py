import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Graphs, Params
from stages.build_graphs import link, semantic_weights, spatial_weights
from tests.project import image_id, snapshot, unit, write_nodes

IMAGES = Path("data/embed/conv/images")
FOLDER = Path("data/graphs/conv")


def test_spatial_weights_at_known_centres() -> None:
    centres = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.75, 0.75]]])
    weights = spatial_weights(centres, 0.5, 0.1)[0]
    assert weights[0, 1].item() == pytest.approx(math.exp(-0.5))
    assert weights[0, 2].item() == pytest.approx(math.exp(-1))
    assert spatial_weights(centres, 0.5, 0.4)[0, 0, 2] == 0
    assert spatial_weights(centres, 0.25, 0.1)[0, 0].tolist() == pytest.approx([1, math.exp(-2), 0])


def test_semantic_neighbours_are_a_union() -> None:
    # On a line of angles: 0 and 10 are each other's nearest, 25 looks to 10, 60 to 25.
    angles = torch.tensor([0.0, 10.0, 25.0, 60.0]) * math.pi / 180
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    weights = semantic_weights(vectors, 1)[0]
    linked = {(0, 1): 10, (1, 2): 15, (2, 3): 35}
    for i in range(4):
        for j in range(4):
            degrees = linked.get((min(i, j), max(i, j)))
            assert weights[i, j].item() == pytest.approx(
                0 if degrees is None else math.cos(math.radians(degrees)), abs=1e-6
            )


def test_a_negative_likeness_is_none() -> None:
    vectors = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert semantic_weights(vectors, 5).abs().sum() == 0
    assert semantic_weights(vectors[:, :1], 5).shape == (1, 1, 1)


def test_a_cell_of_nothing_but_zeros_is_like_no_other() -> None:
    """A tower that ends in ReLU gives some."""
    vectors = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.6, 0.8]]])
    weights = semantic_weights(vectors, 1)[0]
    assert weights[0].abs().sum() == weights[:, 0].abs().sum() == 0
    assert weights[1, 2] == pytest.approx(0.6)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 999))
def test_graphs_are_symmetric_and_the_whole_is_linked_to_all(nodes: int, neighbours: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    vectors = torch.from_numpy(unit(chance.standard_normal((2, nodes, 3))))
    centres = torch.from_numpy(chance.uniform(size=(2, nodes, 2)).astype(np.float32))
    spatial, semantic = link(vectors, centres, Graphs(neighbours=neighbours))
    for weights in (spatial, semantic):
        assert torch.equal(weights, weights.transpose(1, 2))
        assert weights.diagonal(dim1=1, dim2=2).abs().sum() == 0
        assert (weights[:, 0, 1:] == 1).all()
        assert weights.min() >= 0
        assert weights.max() <= 1
    if nodes > 2:
        cosine = vectors @ vectors.transpose(1, 2)
        for image in range(2):
            for i in range(1, nodes):
                others = [j for j in range(1, nodes) if j != i]
                nearest = sorted(others, key=lambda j: -float(cosine[image, i, j]))[:neighbours]
                for j in nearest:
                    assert float(semantic[image, i, j]) == pytest.approx(
                        max(0.0, float(cosine[image, i, j])), abs=1e-5
                    )


BOXES = [(0, 0, 1, 1), (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
KINDS = ["global", "token", "grid", "grid", "crop"]


def vectors_of(numbers: range | list[int], nodes: int = 5) -> dict[str, np.ndarray]:
    return {image_id(n): unit(np.random.default_rng(n).uniform(0.1, 1, (nodes, 8))) for n in numbers}


@pytest.fixture
def build(run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[[], int]:
    """Run the stage; return how many images were linked."""

    def run() -> int:
        capsys.readouterr()
        run_stage("build_graphs", "--encoder", "conv")
        return int(capsys.readouterr().out.split(": ")[1].split()[0])

    return run


def test_rows_of_a_graph(set_params: Callable[..., Params], build: Callable[[], int]) -> None:
    set_params(graphs={"sigma": 0.25, "spatial_threshold": 0.1, "neighbours": 1})
    images = vectors_of(range(3))
    write_nodes(IMAGES, images, boxes=BOXES, kinds=KINDS)
    assert build() == 3
    rows = store.read_buckets(FOLDER, "graphs/1", 4).to_pylist()
    assert sorted(row["image_id"] for row in rows) == sorted(images)
    for row in rows:
        edges = list(zip(row["src"], row["dst"], strict=True))
        assert edges == sorted(edges)
        assert len(set(edges)) == len(edges) == len(row["spatial"]) == len(row["semantic"])
        spatial, semantic = (
            dict(zip(edges, map(float, row[name]), strict=True)) for name in ("spatial", "semantic")
        )
        stored = images[row["image_id"]].astype(np.float16).astype(np.float32)
        cosine = stored @ stored.T
        np.fill_diagonal(cosine, -1)
        nearest = {(i, 1 + int(cosine[i, 1:].argmax())) for i in range(1, 5)}
        for i in range(5):
            for j in range(5):
                side_by_side = bool(i and j and i != j and {i, j} not in ({1, 4}, {2, 3}))
                alike = (i, j) in nearest or (j, i) in nearest
                whole = (i == 0) != (j == 0)
                # Side by side: half the picture apart, exp(-2); across a corner exp(-4) is under the threshold.
                near = 1.0 if whole else math.exp(-2) if side_by_side else 0.0
                like = 1.0 if whole else float(cosine[i, j]) if alike else 0.0
                assert ((i, j) in spatial) == (near > 0 or like > 0)
                assert spatial.get((i, j), 0.0) == pytest.approx(near, abs=1e-3)
                assert semantic.get((i, j), 0.0) == pytest.approx(like, abs=1e-3)


def test_only_nodes_of_the_kinds_asked_for(
    set_params: Callable[..., Params], build: Callable[[], int]
) -> None:
    set_params(graphs={"nodes": ["global", "grid"]})
    write_nodes(IMAGES, vectors_of(range(2)), boxes=BOXES, kinds=KINDS)
    assert build() == 2
    for row in store.read_buckets(FOLDER, "graphs/1", 4).to_pylist():
        assert {*row["src"], *row["dst"]} == {0, 2, 3}
    set_params(graphs={"nodes": ["global"]})
    assert build() == 2
    assert [row["src"] for row in store.read_buckets(FOLDER, "graphs/1", 4).to_pylist()] == [[], []]


def test_an_image_more_touches_one_bucket(
    set_params: Callable[..., Params], build: Callable[[], int]
) -> None:
    set_params()
    write_nodes(IMAGES, vectors_of(range(12)), boxes=BOXES, kinds=KINDS)
    assert build() == 12
    before = snapshot(FOLDER)
    assert build() == 0
    assert snapshot(FOLDER) == before
    write_nodes(IMAGES, vectors_of(range(13)), boxes=BOXES, kinds=KINDS)
    assert build() == 1
    after = snapshot(FOLDER)
    bucket = store.bucket_path("", store.bucket_of(image_id(12), 4)).name
    assert [name for name in after if after[name] != before[name]] == [bucket]
    for path in FOLDER.iterdir():
        path.unlink()
    assert build() == 13
    assert {name: content for name, (content, _) in snapshot(FOLDER).items()} == {
        name: content for name, (content, _) in after.items()
    }
    write_nodes(IMAGES, vectors_of(range(12)), boxes=BOXES, kinds=KINDS)
    assert build() == 0
    assert {name: content for name, (content, _) in snapshot(FOLDER).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_other_embeddings_or_settings_link_all_anew(
    set_params: Callable[..., Params], build: Callable[[], int]
) -> None:
    set_params()
    write_nodes(IMAGES, vectors_of(range(3)), boxes=BOXES, kinds=KINDS)
    assert build() == 3
    set_params(graphs={"neighbours": 2})
    assert build() == 3
    write_nodes(IMAGES, vectors_of(range(3)), boxes=BOXES, kinds=KINDS, mark="another")
    assert build() == 3


def test_an_empty_bucket_is_a_file(set_params: Callable[..., Params], build: Callable[[], int]) -> None:
    set_params()
    write_nodes(IMAGES, vectors_of([0]), boxes=BOXES, kinds=KINDS)
    assert build() == 1
    assert len(snapshot(FOLDER)) == 4
    assert len(store.read_buckets(FOLDER, "graphs/1", 4)) == 1


@pytest.mark.parametrize(("nodes", "good"), [(64, True), (65, False)])
def test_a_graph_has_64_nodes_at_most(
    nodes: int, good: bool, set_params: Callable[..., Params], build: Callable[[], int]
) -> None:
    set_params()
    write_nodes(IMAGES, vectors_of([0], nodes))
    if good:
        assert build() == 1
    else:
        with pytest.raises(UserError, match=r"params\.yaml: graphs\.nodes: 65 nodes an image") as error:
            build()
        assert "\n" not in str(error.value)
        assert store.bucket_path(FOLDER, store.bucket_of(image_id(0), 4)).exists() is False


def test_a_corrupt_bucket_is_told(set_params: Callable[..., Params], build: Callable[[], int]) -> None:
    set_params()
    write_nodes(IMAGES, vectors_of(range(4)), boxes=BOXES, kinds=KINDS)
    build()
    for folder in (FOLDER, IMAGES):
        path = store.bucket_path(folder, 1)
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        with pytest.raises(UserError, match=rf"{folder}/b001\.parquet: is not readable"):
            build()
        path.write_bytes(whole)


def test_a_weight_that_rounds_to_nothing_is_no_edge(
    set_params: Callable[..., Params], build: Callable[[], int]
) -> None:
    set_params(graphs={"sigma": 0.1, "spatial_threshold": 0.0, "neighbours": 1})
    # Nothing alike; neighbours weigh exp(-12.5), corners exp(-25), which half precision does not hold.
    write_nodes(IMAGES, {image_id(0): np.eye(5, 8, dtype=np.float32)}, boxes=BOXES, kinds=KINDS)
    build()
    row = store.read_buckets(FOLDER, "graphs/1", 4).to_pylist()[0]
    assert all(max(pair) > 0 for pair in zip(row["spatial"], row["semantic"], strict=True))
