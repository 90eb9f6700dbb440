from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fieldmark import links as module
from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import image_id, unit, write_index, write_nodes, write_texts

IMAGES = Path("data/embed/conv/images")
MOMENTS = Path("data/embed/conv/moments")
LINKS = Path("data/links/near.parquet")
KNN = {"kind": "knn", "vectors": str(IMAGES), "texts": "data/none", "k": 3}
SPLITS = ("train", "val", "test")


def vectors_of(numbers: range) -> dict[str, np.ndarray]:
    """Two nodes an image: the whole, and one that is never looked at."""
    return {image_id(n): unit(np.random.default_rng(n).standard_normal((2, 8))) for n in numbers}


def index_of(numbers: range) -> None:
    write_index({image_id(n): ("a", SPLITS[n % 3]) for n in numbers})


@pytest.fixture
def link(run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Run the stage; return what it says."""

    def run() -> str:
        capsys.readouterr()
        run_stage("link_images", "--links", "near")
        return capsys.readouterr().out

    return run


def rows() -> dict[str, list[tuple[str, float]]]:
    """Who sends to each image, and the weight."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in store.read_table(LINKS, "links/1").to_pylist():
        found.setdefault(row["dst"], []).append((row["src"], row["weight"]))
    return found


def test_the_nearest_of_all_images(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    set_params(links={"near": KNN})
    images = vectors_of(range(20))
    write_nodes(IMAGES, images)
    index_of(range(20))
    said = link()
    assert f"{LINKS}: 60 links to 20 of 20 images" in said
    assert {part.rsplit(" ", 1)[0] for part in said.splitlines()[1].partition(": ")[2].split(", ")} == {
        f"{one} -> {other}" for one in SPLITS for other in SPLITS
    }
    stored = {name: nodes[0].astype(np.float16).astype(np.float64) for name, nodes in images.items()}
    found = rows()
    for name, mine in stored.items():
        cosine = {
            other: float(mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs))
            for other, theirs in stored.items()
            if other != name
        }
        best = sorted(cosine, key=lambda other: -cosine[other])[:3]
        assert {other for other, _ in found[name]} == set(best)
        assert dict(found[name]) == pytest.approx({other: cosine[other] for other in best}, abs=1e-6)


def test_an_image_more_changes_the_rows_of_those_it_is_near_to(
    set_params: Callable[..., Params], link: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params(links={"near": KNN})
    images = vectors_of(range(40))
    one_less = {name: nodes for name, nodes in images.items() if name != image_id(39)}
    write_nodes(IMAGES, one_less)
    index_of(range(39))
    link()
    before, bytes_before = rows(), LINKS.read_bytes()
    write_nodes(IMAGES, images)
    index_of(range(40))
    searched: list[tuple[int, int]] = []
    search = module.nearest

    def counting(vectors: Any, rows: Any, among: Any, *rest: Any) -> Any:
        searched.append((len(rows), len(among)))
        return search(vectors, rows, among, *rest)

    monkeypatch.setattr(module, "nearest", counting)
    link()
    after, incremental = rows(), LINKS.read_bytes()
    # The new image is held against all, and all against the new image: nobody else against anybody else.
    assert searched == [(39, 1), (1, 40)]
    changed = {name for name in before if before[name] != after[name]}
    near_to = {name for name in before if image_id(39) in dict(after[name])}
    assert changed == near_to
    assert 0 < len(changed) < 12
    assert all(len({*before[name]} - {*after[name]}) == 1 for name in changed)
    LINKS.unlink()
    link()
    assert LINKS.read_bytes() == incremental
    # And away again: the old bytes.
    write_nodes(IMAGES, one_less)
    index_of(range(39))
    link()
    assert LINKS.read_bytes() == bytes_before


def test_another_split_leaves_the_bytes(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    set_params(links={"near": KNN})
    write_nodes(IMAGES, vectors_of(range(12)))
    index_of(range(12))
    first = link()
    before = LINKS.read_bytes()
    write_index({image_id(n): ("a", "train" if n < 6 else "test") for n in range(12)})
    assert link() != first
    assert LINKS.read_bytes() == before


def test_vectors_made_anew_are_linked_anew(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    set_params(links={"near": KNN})
    write_nodes(IMAGES, vectors_of(range(12)))
    index_of(range(12))
    link()
    before, mark = rows(), store.read_header(LINKS, "links/1").fingerprint
    turned = {name: vectors[::-1] for name, vectors in vectors_of(range(12)).items()}
    write_nodes(IMAGES, turned, mark="another")
    link()
    assert store.read_header(LINKS, "links/1").fingerprint != mark
    assert rows() != before


def write_moments(name: str, vectors: dict[str, np.ndarray]) -> None:
    dimension = next(iter(vectors.values())).shape[0]
    for bucket, ids in enumerate(store.split_buckets(list(vectors), 4)):
        table = pa.table({
            "image_id": pa.array(ids, pa.string()),
            "view": pa.array([0] * len(ids), pa.int16()),
            "layer": pa.array([None] * len(ids), pa.int16()),
            "kind": pa.array(["pooled"] * len(ids), pa.string()),
            "vector": store.vector_column(np.array([vectors[each] for each in ids]).reshape(len(ids), dimension)),
        })
        path = store.bucket_path(MOMENTS / name, bucket)
        store.write_table(table, path, "embed.moments/1", {"encoder": "one"}, "moments")


def test_vectors_side_by_side(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    names = ["pooled", "isqrt"]
    set_params(
        moments={"conv": {"pooled": {"kind": "pooled"}, "isqrt": {"kind": "isqrt"}}},
        links={"near": {**KNN, "vectors": str(MOMENTS), "names": names}},
    )
    draw = np.random.default_rng(0)
    given = {
        name: {image_id(n): (scale * draw.standard_normal(size)).astype(np.float16) for n in range(9)}
        for name, scale, size in (("pooled", 10, 4), ("isqrt", 0.1, 6))
    }
    for name, vectors in given.items():
        write_moments(name, vectors)
    index_of(range(9))
    link()
    weights = {(dst, src): weight for dst, near in rows().items() for src, weight in near}
    assert len(weights) == 27
    for (dst, src), weight in weights.items():
        cosines = []
        for name in names:
            one, other = (given[name][each].astype(np.float64) for each in (dst, src))
            cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        assert weight == pytest.approx(np.mean(cosines), abs=1e-6)
    assert sorted(store.read_header(LINKS, "links/1").params["sources"]) == [
        "embed/conv/moments/isqrt", "embed/conv/moments/pooled",
    ]  # fmt: skip


def test_links_by_what_is_said_of_images(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    texts = Path("data/embed/conv/text.parquet")
    described = Path("data/descriptions/descriptions.parquet")
    set_params(links={"near": {"kind": "text", "vectors": str(texts), "texts": str(described), "k": 1}})
    said = {0: ["red", "long"], 1: ["red", "short"], 2: ["blue", "short"], 3: ["blue", "long"], 4: []}
    words = {"red": [1, 0, 0, 0], "blue": [0, 1, 0, 0], "long": [0, 0, 0.5, 0], "short": [0, 0, 0, 1]}
    write_texts(texts, {word: np.array(vector, dtype=np.float32) for word, vector in words.items()})
    table = store.make_table("descriptions/1", [
        {"image_id": image_id(n), "rank": rank, "text": text}
        for n, sentences in said.items()
        for rank, text in enumerate(sentences)
    ])
    store.write_table(table, described, "descriptions/1", {}, "said")
    index_of(range(5))
    assert "1 has no vector, and no link" in link()
    found = rows()
    mean = {n: np.sum([words[word] for word in each], axis=0) for n, each in said.items() if each}
    for n, mine in mean.items():
        cosine = {
            image_id(m): mine @ other / np.linalg.norm(mine) / np.linalg.norm(other)
            for m, other in mean.items()
            if m != n
        }
        best = max(cosine, key=lambda each: cosine[each])
        assert found.pop(image_id(n)) == [(best, pytest.approx(cosine[best], abs=1e-6))]
    assert not found
    assert {row["kind"] for row in store.read_table(LINKS, "links/1").to_pylist()} == {"text"}


def test_a_sentence_without_a_vector_is_an_error(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    texts, described = Path("data/embed/conv/text.parquet"), Path("data/descriptions/descriptions.parquet")
    set_params(links={"near": {"kind": "text", "vectors": str(texts), "texts": str(described)}})
    write_texts(texts, {"red": np.ones(4, dtype=np.float32)})
    table = store.make_table("descriptions/1", [{"image_id": image_id(0), "rank": 0, "text": "blue"}])
    store.write_table(table, described, "descriptions/1", {}, "said")
    index_of(range(2))
    with pytest.raises(UserError, match=r"text.parquet: lacks 1 sentences of .*; run embed_text"):
        link()


def test_links_of_groups_and_of_data_without_any(
    set_params: Callable[..., Params], link: Callable[[], str]
) -> None:
    set_params(links={"near": {"kind": "group", "vectors": "data/none", "texts": "data/none", "k": 2}})
    index_of(range(6))
    with pytest.raises(UserError, match=r"images.parquet: no two usable images are of one group; take the links out"):
        link()
    path = Path("data/index/images.parquet")
    table = store.read_table(path, "index.images/1")
    groups = {image_id(n): "track 1" if n < 4 else None for n in range(6)}
    column = pa.array([groups[each] for each in table["image_id"].to_pylist()], pa.string())
    table = table.set_column(table.schema.get_field_index("group"), "group", column)
    store.write_table(table, path, "index.images/1", {}, "index")
    assert "1 group is of more than 3 images, of which each is linked to the 2 next to it" in link()
    assert {dst: len(near) for dst, near in rows().items()} == {image_id(n): 2 for n in range(4)}


def test_an_image_without_a_vector_is_an_error(set_params: Callable[..., Params], link: Callable[[], str]) -> None:
    set_params(links={"near": KNN})
    write_nodes(IMAGES, vectors_of(range(5)))
    index_of(range(6))
    with pytest.raises(UserError, match=rf"{IMAGES}: has no row of image {image_id(5)}; run embed_images"):
        link()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": "data/embed/none/images"}, "links.near.vectors: 'data/embed/none/images' is nothing that "),
        ({"texts": "data/descriptions/descriptions.parquet"}, "links.near.texts: .* kind knn reads; write data/none"),
        ({"names": ["pooled"]}, "links.near.names: 'pooled' is none of the vectors in data/embed/conv/images; take it"),
        ({"both_ways": True}, "links.near.both_ways: is of given edges, and this is kind knn; take it out"),
        ({"kind": "given"}, "links.near.vectors: .* kind given reads, or that a stage makes; choose one of: data/none"),
        ({"vectors": "data/embed/conv/moments"}, "links.near.names: is empty; name vectors of `moments`, some of: p"),
        ({"vectors": "data/embed/conv/moments", "names": ["p", "q"]}, "names: 'q' .* choose from: p, each once"),
    ],
    ids=str,
)
def test_settings_that_cannot_stand(set_params: Callable[..., Params], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_params(moments={"conv": {"p": {"kind": "pooled"}}}, links={"near": {**KNN, **change}})
