import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fieldmark import store
from fieldmark.labels.labelling import (
    Reference,
    entropy_of,
    label_images,
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
from fieldmark.labels.splits import read_split
from fieldmark.params import Labels
from tests.project import image_id, unit, write_index, write_nodes


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


@pytest.mark.parametrize("mode", ["softmax", "splice"])
@pytest.mark.parametrize("rule", ["neg_entropy", "entropy", "product", "gaga", "pixel"])
def test_without_a_concept_no_density_of_concepts_is_above_zero(mode: str, rule: str) -> None:
    nodes, none = random_units(8, 4), torch.zeros(0, 4)
    told = torch.rand(8, generator=torch.Generator().manual_seed(0))
    settings = Labels.model_validate({"mode": mode, "density": rule, "select_locals": 2, "redundancy": 0.5})
    reference = Reference(means=torch.zeros(2, 4), centres=nodes[:2])
    places = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0))
    [(rows, labelled)] = label_images(
        nodes.view(2, 4, 4), places, none, 7.0, settings, reference, pixels=told.view(2, 4)
    )
    assert rows.start == 0
    assert labelled.idx.shape == labelled.weight.shape == (2, 4, 0)
    assert labelled.shown.shape == (2, 0)
    assert labelled.entropy.abs().max() == labelled.gains.abs().max() == 0
    assert labelled.gains.shape == (2, settings.rings)
    # These two ask no concept.
    expected = {"gaga": 1 / (1 + torch.cdist(nodes, nodes[:2]).amin(dim=1)), "pixel": told}
    torch.testing.assert_close(
        labelled.density.flatten(), expected.get(rule, torch.zeros(8)), atol=1e-3, rtol=1e-3
    )
    for image, vectors in enumerate(nodes.view(2, 4, 4)):
        chosen = set(labelled.selected[image].nonzero().flatten().tolist())
        assert chosen == greedy(vectors, labelled.density[image], 2, 0.5)


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


def test_training_images_alone_are_learnt_from(project: Path) -> None:
    folder, index = Path("data/embed/conv/images"), Path("data/index/images.parquet")
    images = {image_id(n): unit(np.random.default_rng(n).standard_normal((4, 3))) for n in (0, 1, 2)}
    write_nodes(folder, images, buckets=16)
    write_index({image_id(0): ("a", "train"), image_id(1): ("a", "test"), image_id(2): ("b", "train")})
    seen = [
        unit(np.random.default_rng(n).standard_normal((4, 3))).astype(np.float16).astype(np.float32) for n in (0, 2)
    ]
    means = node_means(folder, 16, dict.fromkeys([image_id(0), image_id(2)], "a"))
    torch.testing.assert_close(means[0], torch.from_numpy(np.mean([each[0] for each in seen], axis=0)))
    torch.testing.assert_close(means[1], torch.from_numpy(np.concatenate([each[1:] for each in seen]).mean(axis=0)))
    train = read_split(index, "train")
    assert read_reference(folder, train, 16, Labels()) == Reference()
    reference = read_reference(folder, train, 16, Labels(mode="splice", density="product"))
    assert reference.means is not None
    assert torch.equal(reference.means, means)
    assert reference.centres is not None
    torch.testing.assert_close(reference.centres, means[1:])  # six nodes: one centre
