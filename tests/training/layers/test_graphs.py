import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import GATConv, GCNConv, SAGEConv
from torch_geometric.nn import GraphNorm as PyGGraphNorm

from training.layers.graphs import (
    GAT,
    GCN,
    SAGE,
    GraphNetwork,
    GraphNorm,
    Kind,
    NormedNetwork,
    grid_edges,
    make_layer,
    nearest_edges,
    prepare_edges,
    similar_edges,
)

SIZES = [7, 1, 4, 9, 2]
KINDS = get_args(Kind)


def ragged_graphs(seed: int, isolated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, n, 6), edges (B, n, n, 2) of which some are absent, and the mask (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    shape = (len(SIZES), max(SIZES), max(SIZES))
    linked = (torch.rand(shape, generator=generator) > 0.4).triu(1)
    if isolated:
        linked[:, 0] = False
    upper = torch.rand(*shape, 2, generator=generator) * (linked & mask[:, :, None] & mask[:, None, :])[..., None]
    x = torch.randn(*mask.shape, 6, generator=generator)
    return x, upper + upper.transpose(1, 2), mask


def each_alone(edges: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
    """Every graph's place, size, edge list (2, E) and edge weights (E, 2)."""
    lists = []
    for place, size in enumerate(SIZES):
        pairs = edges[place].any(-1).nonzero().T
        lists.append((place, size, pairs, edges[place][pairs[0], pairs[1]]))
    return lists


@pytest.mark.parametrize("isolated", [False, True])
def test_gcn_equals_pyg_on_ragged_weighted_graphs(isolated: bool) -> None:
    x, edges, mask = ragged_graphs(0, isolated)
    ours, theirs = GCN(6, 5), GCNConv(6, 5)
    theirs.lin.weight, theirs.bias = ours.linear.weight, torch.nn.init.normal_(ours.bias)
    dense = ours(x, ours.prepare(edges, mask))
    for place, size, pairs, weights in each_alone(edges):
        expected = theirs(x[place, :size], pairs, weights.mean(-1))
        torch.testing.assert_close(dense[place, :size], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("isolated", [False, True])
def test_sage_equals_pyg_where_weights_are_equal(isolated: bool) -> None:
    x, edges, mask = ragged_graphs(1, isolated)
    ours, theirs = SAGE(6, 5), SAGEConv(6, 5)
    theirs.lin_l.weight, theirs.lin_l.bias = ours.neighbours.weight, ours.neighbours.bias
    theirs.lin_r.weight = ours.own.weight
    dense = ours(x, ours.prepare(0.3 * (edges > 0), mask))
    for place, size, pairs, _ in each_alone(edges):
        torch.testing.assert_close(dense[place, :size], theirs(x[place, :size], pairs), atol=1e-5, rtol=0)


def test_sage_weighs_its_neighbours() -> None:
    layer = SAGE(1, 1)
    for parameter, value in zip(layer.parameters(), (1.0, 0.0, 0.0), strict=True):
        torch.nn.init.constant_(parameter, value)
    edges = torch.zeros(1, 3, 3, 2)
    edges[0, 0, 1], edges[0, 0, 2] = 0.9, 0.1
    said = layer(torch.tensor([[[0.0], [1.0], [2.0]]]), layer.prepare(edges, torch.ones(1, 3, dtype=torch.bool)))
    torch.testing.assert_close(said[0, 0, 0], torch.tensor(0.9 * 1 + 0.1 * 2))


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
def test_gat_with_edge_weights_equals_pyg(heads: int, isolated: bool) -> None:
    x, edges, mask = ragged_graphs(2, isolated)
    ours, theirs = GAT(6, 16, heads, 2), GATConv(6, 16 // heads, heads, edge_dim=2)
    theirs.lin.weight, theirs.bias = ours.linear.weight, torch.nn.init.normal_(ours.bias)
    theirs.att_dst.data, theirs.att_src.data = ours.by_target.data[None], ours.by_source.data[None]
    # PyG multiplies two matrices where one will do.
    folded = (theirs.lin_edge.weight.unflatten(0, (heads, -1)) * theirs.att_edge[0][..., None]).sum(1)
    ours.by_edge.weight.data = folded.detach()
    dense = ours(x, ours.prepare(edges, mask))
    for place, size, pairs, weights in each_alone(edges):
        expected = theirs(x[place, :size], pairs, weights)
        torch.testing.assert_close(dense[place, :size], expected, atol=1e-5, rtol=0)


def test_gat_refuses_heads_that_do_not_divide_its_width() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        GAT(6, 16, 3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_nodes_does_not_matter(kind: Kind) -> None:
    torch.manual_seed(0)
    x, edges, mask = ragged_graphs(3)
    layer, order = make_layer(kind, 6, 16, 8, 2), torch.randperm(x.shape[1])
    said = layer(x, layer.prepare(edges, mask))
    permuted = layer(x[:, order], layer.prepare(edges[:, order][:, :, order], mask[:, order]))
    torch.testing.assert_close(permuted[mask[:, order]], said[:, order][mask[:, order]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_isolated_nodes_are_inert(kind: Kind) -> None:
    torch.manual_seed(0)
    x, edges, mask = ragged_graphs(4, isolated=True)
    network = GraphNetwork(kind, 2, 16, 8, 2, 0.5).eval()
    wide = torch.nn.functional.pad(x, (0, 10))
    said = network(wide, prepare_edges(kind, edges, mask))
    noisy = wide.clone()
    noisy[~mask] = 100.0
    noisy[:, 0] = 7.0  # linked to nobody
    padded = edges.clone()
    padded[~mask] = 1.0
    padded.transpose(1, 2)[~mask] = 1.0
    others = mask.clone()
    others[:, 0] = False
    again = network(noisy, prepare_edges(kind, padded, mask))
    torch.testing.assert_close(again[others], said[others], atol=1e-5, rtol=0)
    assert torch.isfinite(again).all()


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
def test_an_edge_carries_something(kind: Kind) -> None:
    torch.manual_seed(0)
    x, edges, mask = ragged_graphs(5)
    layer = make_layer(kind, 6, 16, 8, 2)
    alone = layer(x, layer.prepare(torch.zeros_like(edges), mask))
    assert not torch.allclose(layer(x, layer.prepare(edges, mask)), alone, atol=1e-2)


def test_cells_of_a_grid_are_linked_where_they_touch() -> None:
    edges = grid_edges(3, 4)[0, ..., 0]
    for cell, other in itertools.product(range(12), range(12)):
        apart = max(abs(cell // 4 - other // 4), abs(cell % 4 - other % 4))
        assert edges[cell, other] == (apart == 1)
    assert grid_edges(1, 1).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_images_share_comes_once(kind: Kind) -> None:
    torch.manual_seed(0)
    x, edges, mask = torch.randn(5, 6, 16), grid_edges(2, 3), torch.ones(5, 6, dtype=torch.bool)
    network = GraphNetwork(kind, 2, 16, 8, 1, 0.5).eval()
    shared = network(x, prepare_edges(kind, edges, mask[:1]))
    torch.testing.assert_close(shared, network(x, prepare_edges(kind, edges.expand(5, -1, -1, -1), mask)))


def test_nearest_edges_of_three_vectors() -> None:
    x = torch.nn.functional.normalize(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]]), dim=-1)
    edges = nearest_edges(x, torch.tensor([[True, True, True, False]]), 1)[0, ..., 0]
    near, far = float(x[0, 0] @ x[0, 1]), float(x[0, 1] @ x[0, 2])
    expected = torch.tensor([[0, near, 0, 0], [near, 0, far, 0], [0, far, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(edges, expected)
    assert nearest_edges(x[:, :1], torch.ones(1, 1, dtype=torch.bool), 5).tolist() == [[[[0.0]]]]
    assert nearest_edges(x[:, :0], torch.ones(1, 0, dtype=torch.bool), 5).shape == (1, 0, 0, 1)


def test_graph_norm_equals_pyg_on_each_graph_alone() -> None:
    x, _, mask = ragged_graphs(5)
    ours, theirs = GraphNorm(6), PyGGraphNorm(6)
    for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias), (ours.mean_scale, theirs.mean_scale)):
        torch.nn.init.normal_(mine)
        with torch.no_grad():
            other.copy_(mine)
    padded = ours(x.masked_fill(~mask[..., None], 9.0), mask)
    for place, size in enumerate(SIZES):
        torch.testing.assert_close(padded[place, :size], theirs(x[place, :size]), atol=1e-5, rtol=1e-5)


def two_clusters() -> tuple[Tensor, list[int], Tensor]:
    """Unit vectors (1, 9, 4) of two directions, the cluster of each, and a mask without the last, which is of none."""
    clusters = [0, 1, 1, 0, 1, 0, 0, 1]
    centres, generator = torch.eye(4)[:2], torch.Generator().manual_seed(0)
    x = torch.cat([centres[clusters], torch.ones(1, 4)]) + 0.05 * torch.randn(9, 4, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1)[None], clusters, torch.arange(9)[None] < 8


def test_similar_edges_of_two_clusters_are_two_cliques() -> None:
    x, clusters, mask = two_clusters()
    edges = similar_edges(x, mask)[0, :, :, 0]
    for i, j in itertools.product(range(9), range(9)):
        assert edges[i, j] == (i != j and max(i, j) < 8 and clusters[i] == clusters[j]), (i, j)


def test_similar_edges_are_those_above_the_mean_of_one_end() -> None:
    x, _, mask = ragged_graphs(6)
    for fault in (False, True):
        edges = similar_edges(x, mask, fault)[..., 0]
        assert torch.equal(edges, edges.transpose(1, 2))
        for place, size in enumerate(SIZES):
            product = x[place, :size] @ x[place, :size].T
            product.fill_diagonal_(0)
            mean = [row.sum() / size - 1 if fault else row.sum() / max(size - 1, 1) for row in product]
            for i, j in itertools.product(range(max(SIZES)), range(max(SIZES))):
                linked = i != j and max(i, j) < size and (product[i, j] > mean[i] or product[i, j] > mean[j])
                assert edges[place, i, j] == linked, (place, i, j)


def test_the_precedence_fault_links_unit_vectors_with_all_others() -> None:
    x, _, mask = two_clusters()
    assert similar_edges(x, mask, precedence_fault=True)[0, :8, :8, 0].sum() == 8 * 7


def test_of_equals_none_is_linked_whatever_rounding_says() -> None:
    x = torch.nn.functional.normalize(torch.randn(20, 1, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert not similar_edges(x.expand(-1, 6, -1), torch.ones(20, 6, dtype=torch.bool)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_normed_network_does_not_see_padding(kind: Kind) -> None:
    x, edges, mask = ragged_graphs(7)
    network = NormedNetwork(kind, 3, 6, 8, heads=2, weights=2, dropout=0.5).eval()
    padded = network(x.masked_fill(~mask[..., None], 9.0), prepare_edges(kind, edges, mask), mask)
    for place, size in enumerate(SIZES):
        alone = mask[place : place + 1, :size]
        prepared = prepare_edges(kind, edges[place : place + 1, :size, :size], alone)
        expected = network(x[place : place + 1, :size], prepared, alone)[0]
        torch.testing.assert_close(padded[place, :size], expected, atol=1e-4, rtol=1e-4)
