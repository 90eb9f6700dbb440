"""Against torch-geometric's own layers on whole graphs: ragged, with directions, with nodes that hear nobody."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from training.layers.convolutions import GAT, GCN, SAGE, LinkNetwork
from training.layers.hops import Hop

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import GATConv, GCNConv, SAGEConv

Pair = tuple[nn.Module, Callable[[Tensor, Tensor, Tensor], Tensor]]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As a run trains: what has no deterministic form is an error."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def random_graph(nodes: int, seed: int = 0, equal: bool = False) -> tuple[Tensor, Tensor]:
    """Edges (2, E) with directions, of 0 to 6 into a node and none from it to itself, and weights (E,)."""
    generator = torch.Generator().manual_seed(seed)
    linked = torch.rand(nodes, nodes, generator=generator) < 0.4 * torch.rand(nodes, 1, generator=generator)
    linked.fill_diagonal_(False)
    linked[3] = linked[:, 5] = False  # node 3 hears nobody, node 5 is heard by none
    receiver, sender = linked.nonzero().T
    weight = torch.rand(len(sender), generator=generator) + 0.1
    return torch.stack([sender, receiver]), torch.ones_like(weight) if equal else weight


def hop_of(edges: Tensor, weight: Tensor, nodes: int, count: int | None = None) -> Hop:
    """The first `count` nodes and what they hear, in a graph of so many nodes."""
    count = nodes if count is None else count
    degree = torch.zeros(nodes).index_add_(0, edges[1], weight)
    heard = edges[1] < count
    return Hop(edges[0, heard], edges[1, heard], weight[heard], degree, count)


def pair(kind: str) -> Pair:
    """Our layer, and PyG's with the same weights, as a function of x, edges and their weights."""
    torch.manual_seed(1)
    if kind == "gcn":
        ours, theirs = GCN(5, 6), GCNConv(5, 6)
        theirs.load_state_dict(ours.state_dict())
        return ours, lambda x, edges, weight: theirs(x, edges, weight)
    if kind == "gat":
        own, of_pyg = GAT(5, 6, 3), GATConv(5, 2, 3, edge_dim=1, fill_value="mean")
        nn.init.normal_(own.bias)
        of_pyg.load_state_dict(own.state_dict())
        return own, lambda x, edges, weight: of_pyg(x, edges, weight[:, None])
    mean, of_mean = SAGE(5, 6), SAGEConv(5, 6)
    names = {"lin_rel.weight": "lin_l.weight", "lin_rel.bias": "lin_l.bias", "lin_root.weight": "lin_r.weight"}
    of_mean.load_state_dict({names[name]: value for name, value in mean.state_dict().items()})
    return mean, lambda x, edges, weight: of_mean(x, edges)


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_and_its_gradients_equal_pyg(kind: str, seed: int) -> None:
    ours, theirs = pair(kind)
    edges, weight = random_graph(12, seed, equal=kind == "sage")
    x, told = torch.randn(12, 5), torch.randn(12, 6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    said, expected = ours(inputs[0], hop_of(edges, weight, 12)), theirs(inputs[1], edges, weight)
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
    said.backward(told)
    expected.backward(told)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in ours.parameters())


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
def test_parameters_have_the_gradients_of_pyg(kind: str) -> None:
    ours, theirs = pair(kind)
    edges, weight = random_graph(12, equal=kind == "sage")
    x = torch.randn(12, 5)
    ours(x, hop_of(edges, weight, 12)).square().sum().backward()
    expected = theirs(x, edges, weight).square().sum()
    [of_pyg] = [cell.cell_contents for cell in theirs.__closure__ or () if isinstance(cell.cell_contents, nn.Module)]
    expected.backward()
    for mine, own in zip(ours.parameters(), of_pyg.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
def test_asked_for_some_nodes_a_layer_says_what_it_says_of_all(kind: str) -> None:
    ours, _ = pair(kind)
    edges, weight = random_graph(12)
    x = torch.randn(12, 5)
    whole = ours(x, hop_of(edges, weight, 12))
    for count in (0, 1, 4, 11):
        torch.testing.assert_close(ours(x, hop_of(edges, weight, 12, count)), whole[:count], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
def test_without_any_edge_a_node_hears_itself_alone(kind: str) -> None:
    ours, theirs = pair(kind)
    edges, weight = torch.zeros(2, 0, dtype=torch.long), torch.zeros(0)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x, hop_of(edges, weight, 4)), theirs(x, edges, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_sums_and_their_gradients_equal_plain_indexing(heads: int) -> None:
    edges, _ = random_graph(10)
    hop = hop_of(edges, torch.ones(edges.shape[1]), 10, 7)
    x, weight = torch.randn(10, 6, requires_grad=True), torch.randn(len(hop.sender), heads, requires_grad=True)
    of_heads = x.unflatten(1, (heads, -1))[hop.sender] * weight[..., None]
    plain = torch.stack([of_heads[hop.receiver == node].sum(0).flatten() for node in range(7)])
    told = torch.randn(7, 6)
    expected = torch.autograd.grad(plain, (x, weight), told)
    said = hop.sum(x, weight)
    torch.testing.assert_close(said, plain, atol=1e-5, rtol=1e-5)
    for mine, own in zip(torch.autograd.grad(said, (x, weight), told), expected, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-5)


def test_the_mean_is_weighted_by_the_edges() -> None:
    edges, weight = random_graph(12)
    ours, x, hop = SAGE(5, 6), torch.randn(12, 5), hop_of(edges, weight, 12)
    own = x @ ours.lin_root.weight.T
    for node in range(12):
        heard = edges[1] == node
        total = weight[heard].sum().clamp(min=1e-12)
        mean = (weight[heard, None] * x[edges[0, heard]]).sum(0) / total
        expected = ours.lin_rel(mean) + own[node]
        torch.testing.assert_close(ours(x, hop)[node], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conv", ["gcn", "gat", "sage"])
def test_numbers_of_nodes_do_not_matter(conv: str) -> None:
    network = LinkNetwork(conv, 2, 6, 2, 0.0)  # type: ignore[arg-type]
    edges, weight = random_graph(12)
    x, order = torch.randn(12, 6), torch.randperm(12)
    place = order.argsort()
    moved = place[edges]
    by_receiver = moved[1].argsort(stable=True)
    hop, other = hop_of(edges, weight, 12), hop_of(moved[:, by_receiver], weight[by_receiver], 12)
    torch.testing.assert_close(network(x[order], [other, other]), network(x, [hop, hop])[order], atol=1e-5, rtol=1e-5)


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ValueError, match="4 heads do not divide a width of 6"):
        GAT(5, 6, 4)
