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

from stages import label_patches, store
from stages.command import UserError
from stages.label_patches import concept_weights, entropy_of, label, score_concepts, select_nodes
from stages.params import Labels, Params
from tests.stages.project import image_id, snapshot, unit, write_nodes, write_texts


def random_units(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(unit(np.random.default_rng(seed).standard_normal(shape)))


def test_weights_are_a_softmax() -> None:
    nodes, concepts = random_units(3, 4), random_units(5, 4, seed=1)
    found = concept_weights(nodes, concepts, 7.0)
    for n in range(3):
        powers = [math.exp(7.0 * float(nodes[n] @ concepts[k])) for k in range(5)]
        assert found[n].tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-4)


def test_a_node_of_nothing_but_zeros_shows_every_concept_alike() -> None:
    weights = concept_weights(torch.zeros(1, 4), random_units(5, 4), 7.0)
    assert weights[0].tolist() == pytest.approx([0.2] * 5)
    assert entropy_of(weights).item() == pytest.approx(math.log(5))


def test_entropy() -> None:
    assert entropy_of(torch.full((1, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy_of(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0
    assert entropy_of(torch.tensor([[0.5, 0.5, 0.0]])).item() == pytest.approx(math.log(2))


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
            "vector": store.vector_column(vectors.reshape(-1, dimension)),
        }
    )


@pytest.mark.parametrize("chunk", [1, 8192])
def test_rows_of_a_bucket(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_patches, "CHUNK", chunk)
    vectors = unit(np.random.default_rng(0).standard_normal((5, 4, 6))).astype(np.float16)
    concepts = random_units(7, 6, seed=3)
    numbers = np.arange(10, 17)
    settings = Labels(temperature=2.0, top=3, select_locals=2, select_concepts=4)
    rows = label(nodes_table(vectors), concepts, numbers, 20.0, settings).to_pylist()
    assert len(rows) == 20
    p = torch.softmax(10.0 * torch.from_numpy(vectors.astype(np.float32)) @ concepts.T, dim=2).numpy()
    for i, row in enumerate(rows):
        here = p[i // 4, i % 4]
        best = np.argsort(-here, kind="stable")[:3]
        assert row["concept_idx"] == (best + 10).tolist()
        np.testing.assert_allclose(np.array(row["concept_weight"], dtype=np.float32), here[best], atol=1e-3)
        entropy = -(here * np.log(here)).sum()
        assert row["entropy"] == pytest.approx(entropy, rel=1e-3, abs=1e-5)
        assert row["density"] == pytest.approx(1 - entropy / math.log(7), abs=1e-3)
        assert row["ring_gains"] is None
        if i % 4:
            assert row["selected_concepts"] is None
        else:
            assert row["selected"]
            view = rows[i : i + 4]
            assert sum(each["selected"] for each in view) == 3
            score = here + sum(
                each["density"] * p[i // 4, n] for n, each in enumerate(view) if n and each["selected"]
            )
            assert row["selected_concepts"] == (np.argsort(-score, kind="stable")[:4] + 10).tolist()


def test_one_concept_explains_everything() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((2, 3, 4)))
    rows = label(nodes_table(vectors), random_units(1, 4), np.array([5]), 10.0, Labels()).to_pylist()
    assert {row["density"] for row in rows} == {1}
    assert {row["entropy"] for row in rows} == {0}
    assert all(row["concept_idx"] == [5] for row in rows)


def test_views_of_unequal_length_are_told() -> None:
    table = nodes_table(unit(np.random.default_rng(0).standard_normal((3, 4, 5))))
    with pytest.raises(UserError, match="views of one encoder differ"):
        label(table.slice(0, 11), random_units(2, 5), np.arange(2), 1.0, Labels())


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
