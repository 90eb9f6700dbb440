"""Which nodes would be linked, on a graph of two blocks."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from training.layers import link_predictor
from training.layers.link_predictor import LinkPredictor, draw_strangers, fit_links, held_out_auc


def two_blocks(nodes: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors of two kinds, and links drawn within them ten times as often as between: x, block, sender, receiver."""
    generator = torch.Generator().manual_seed(0)
    block = torch.arange(nodes) % 2
    x = torch.randn(2, 16, generator=generator)[block] + 0.5 * torch.randn(nodes, 16, generator=generator)
    chance = torch.where(block[:, None] == block, 0.1, 0.01)
    linked = (torch.rand(nodes, nodes, generator=generator) < chance).fill_diagonal_(False)
    receiver, sender = linked.nonzero().T
    return x, block, sender, receiver


def test_links_of_two_blocks_are_told_from_others() -> None:
    x, block, sender, receiver = two_blocks()
    model, auc = fit_links(x, sender, receiver, 16, seed=0)
    new = two_blocks(400)[0]  # what it never saw, of the same two kinds
    kind = torch.arange(400) % 2
    with torch.no_grad():
        score = model(new[:200, None], new[None, 200:])
    same = (kind[:200, None] == kind[None, 200:]).flatten()
    assert roc_auc_score(same, score.flatten()) > 0.98
    # A tenth of the links lies between blocks, where most of what is no link lies too: the truth has some 0.83.
    truth = roc_auc_score(
        torch.cat([torch.ones(len(sender)), torch.zeros(200 * 200)]),
        torch.cat([(block[sender] == block[receiver]).float(), (block[:, None] == block).float().flatten()]),
    )
    assert auc > truth - 0.08


def test_the_auc_of_separate_blocks_is_nearly_1() -> None:
    x, block, sender, receiver = two_blocks()
    within = block[sender] == block[receiver]
    strangers = (block[:, None] != block).nonzero().T[:, :2000]
    model, _ = fit_links(x, sender[within], receiver[within], 16, seed=0)
    auc = held_out_auc(model, x, torch.stack([sender, receiver])[:, within], strangers)
    assert auc > 0.9
    with torch.no_grad():
        score = torch.cat([model(x[receiver[within]], x[sender[within]]), model(x[strangers[1]], x[strangers[0]])])
    truth = torch.cat([torch.ones(int(within.sum())), torch.zeros(2000)])
    assert auc == pytest.approx(roc_auc_score(truth, score))


def test_a_node_is_joined_to_the_likeliest_that_are_likelier_than_not() -> None:
    torch.manual_seed(0)
    model, nodes, new = LinkPredictor(5, 8), torch.randn(30, 5), torch.randn(7, 5)
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad():
        score = model(new[:, None], nodes[None]).sigmoid()
    for most in (1, 4, None):
        sender, node, value = model.nearest(new, nodes, most)
        for row in range(7):
            wanted = [j for j in score[row].argsort(descending=True).tolist() if score[row, j] > 0.5][:most]
            assert sender[node == row].tolist() == wanted
            torch.testing.assert_close(value[node == row], score[row, wanted])
        assert torch.equal(node, node.sort().values)
    assert len(model.nearest(new, nodes, None)[0]) < 7 * 30  # some pairs are less likely


def test_a_link_that_is_held_out_is_learnt_in_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links both ways among vectors that say nothing: none can be told from a pair that is none."""
    generator = torch.Generator().manual_seed(0)
    x, one = torch.randn(40, 16, generator=generator), torch.randint(40, (2, 150), generator=generator)
    one = one[:, one[0] != one[1]].unique(dim=1)
    sender, receiver = torch.cat([one, one.flip(0)], dim=1).unique(dim=1)
    learnt, judged, seen = set[frozenset[int]](), list[Tensor](), LinkPredictor.forward

    def forward(model: LinkPredictor, to: Tensor, of: Tensor) -> Tensor:
        places = [torch.cdist(each, x).argmin(1).tolist() for each in (of, to)]
        learnt.update(map(frozenset, zip(*places, strict=True)))
        return seen(model, to, of)

    def auc(model: LinkPredictor, x: Tensor, held: Tensor, strangers: Tensor) -> float:
        judged.append(held)
        return 0.5

    monkeypatch.setattr(LinkPredictor, "forward", forward)
    monkeypatch.setattr(link_predictor, "held_out_auc", auc)
    fit_links(x, sender, receiver, 16, seed=0)
    held = set(map(frozenset, judged[0].T.tolist()))
    assert held
    assert not held & learnt


def test_strangers_are_no_links() -> None:
    generator = torch.Generator().manual_seed(0)
    sender, receiver = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    pairs = draw_strangers((receiver * 5 + sender).sort().values, 5, 500, generator)
    found = {(of, to) for of, to in pairs.T.tolist()}
    every = {(of, to) for of in range(5) for to in range(5) if of != to}
    assert found == every - {(0, 1), (1, 2), (2, 3), (3, 0)}
