import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import image_id, snapshot, unit, write_nodes

IMAGES = Path("data/embed/conv/images")
FOLDER = Path("data/graphs/conv")
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


def test_a_corrected_box_links_its_image_anew_under_the_same_mark(
    set_params: Callable[..., Params], build: Callable[[], int]
) -> None:
    def write(vectors: dict[str, np.ndarray]) -> None:
        write_nodes(IMAGES, vectors, boxes=BOXES, kinds=KINDS)
        for path in IMAGES.glob("b*.parquet"):
            table, header = store.read_table(path, "embed.nodes/1"), store.read_header(path, "embed.nodes/1")
            params = {**header.params, "regions": {"object": "box"}}
            store.write_table(table, path, "embed.nodes/1", params, header.fingerprint)

    set_params()
    vectors = vectors_of(range(12))
    write(vectors)
    assert build() == 12
    before = snapshot(FOLDER)
    assert build() == 0
    assert snapshot(FOLDER) == before
    write({**vectors, image_id(3): vectors_of([30])[image_id(30)]})
    place = store.bucket_of(image_id(3), 4)
    assert build() == sum(store.bucket_of(one, 4) == place for one in vectors)
    after = snapshot(FOLDER)
    assert [name for name in after if after[name] != before[name]] == [store.bucket_path("", place).name]
    write(vectors)
    build()
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
