import itertools
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, SAGEConv
from torch_geometric.nn import GraphNorm as PyGGraphNorm

from training.layers.faults import misplaced_edges
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
    threshold_edges,
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
    x = F.normalize(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]]), dim=-1)
    edges = nearest_edges(x, torch.tensor([[True, True, True, False]]), 1)[0, ..., 0]
    near, far = float(x[0, 0] @ x[0, 1]), float(x[0, 1] @ x[0, 2])
    expected = torch.tensor([[0, near, 0, 0], [near, 0, far, 0], [0, far, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(edges, expected)
    assert nearest_edges(x[:, :1], torch.ones(1, 1, dtype=torch.bool), 5).tolist() == [[[[0.0]]]]
    assert nearest_edges(x[:, :0], torch.ones(1, 0, dtype=torch.bool), 5).shape == (1, 0, 0, 1)


def test_edges_over_a_threshold_make_two_cliques_of_two_clusters() -> None:
    """Nodes 0 to 2 and 3 to 6; and of the complementary ones the graph between them."""
    centres = torch.eye(8)[[0, 0, 0, 1, 1, 1, 1]]
    x = F.normalize(centres + 0.05 * torch.randn(7, 8, generator=torch.Generator().manual_seed(0)))
    one = torch.tensor([True] * 3 + [False] * 4)
    apart, loops = one[:, None] != one, torch.eye(7, dtype=torch.bool)
    x, mask = F.pad(x, (0, 0, 0, 1), value=9.0)[None], torch.tensor([[True] * 7 + [False]])
    similar, complementary = (threshold_edges(x, mask, kind)[0, ..., 0].bool() for kind in ("similar", "complementary"))
    assert torch.equal(similar[:7, :7], ~apart & ~loops)
    assert torch.equal(complementary[:7, :7], apart)
    assert not similar[7].any() | similar[:, 7].any() | complementary[7].any() | complementary[:, 7].any()


@pytest.mark.parametrize("kind", ["similar", "complementary"])
def test_threshold_edges_equal_a_loop_and_are_symmetric(kind: Literal["similar", "complementary"]) -> None:
    x = F.normalize(torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1)), dim=-1)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    edges = threshold_edges(x, mask, kind)[..., 0]
    assert torch.equal(edges, edges.transpose(1, 2))
    for image, size in enumerate((6, 4)):
        alike = [[float(x[image, i] @ x[image, j]) for j in range(size)] for i in range(size)]
        mean = [sum(alike[i][j] for j in range(size) if j != i) / (size - 1) for i in range(size)]
        sign = 1 if kind == "similar" else -1
        for i, j in itertools.product(range(6), repeat=2):
            real = i != j and max(i, j) < size
            expected = real and any(sign * (alike[i][j] - mean[end]) > 0 for end in (i, j))
            assert bool(edges[image, i, j]) == expected


def test_graphs_that_are_all_alike_have_no_edge_of_rounding() -> None:
    x = F.normalize(torch.ones(1, 5, 7), dim=-1)
    for kind in ("similar", "complementary"):
        assert not threshold_edges(x, torch.ones(1, 5, dtype=torch.bool), kind).any()


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


def test_thresholds_of_vectors_of_any_length_and_with_the_fault() -> None:
    x, _, mask = ragged_graphs(6)
    for rule, fault in ((threshold_edges, False), (misplaced_edges, True)):
        edges = rule(x, mask, "similar")[..., 0]
        assert torch.equal(edges, edges.transpose(1, 2))
        for place, size in enumerate(SIZES):
            product = x[place, :size] @ x[place, :size].T
            product.fill_diagonal_(0)
            mean = [row.sum() / size - 1 if fault else row.sum() / max(size - 1, 1) for row in product]
            for i, j in itertools.product(range(max(SIZES)), range(max(SIZES))):
                linked = i != j and max(i, j) < size and (product[i, j] > mean[i] or product[i, j] > mean[j])
                assert edges[place, i, j] == linked, (place, i, j)


def test_the_precedence_fault_links_unit_vectors_with_all_others() -> None:
    x = F.normalize(torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert misplaced_edges(x, torch.ones(1, 8, dtype=torch.bool), "similar").sum() == 8 * 7


def test_of_equals_none_is_linked_whatever_rounding_says() -> None:
    x = F.normalize(torch.randn(20, 1, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert not threshold_edges(x.expand(-1, 6, -1), torch.ones(20, 6, dtype=torch.bool), "similar").any()


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
