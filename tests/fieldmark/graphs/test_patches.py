import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.graphs.patches import link, semantic_weights, spatial_weights
from fieldmark.params import Graphs
from tests.project import unit


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
