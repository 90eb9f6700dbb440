"""A network over links: what training lays out around a batch, and what evaluation remembers, are one function."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.layers.convolutions import Conv, LinkNetwork
from training.link_heads import OverLinks
from training.links import Around, LinkSettings, Memory, senders

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import GATConv, GCNConv

Planted = Callable[[Plan], Cache]
CONVOLUTIONS: list[Conv] = ["gcn", "gat", "sage"]


@pytest.fixture
def cache(planted: Planted) -> Cache:
    return planted(Plan(classes=3, train=6, val=4, test=3))


def over_links(cache: Cache, conv: Conv, sources: str = "train", **knobs: int) -> OverLinks:
    settings = LinkSettings(sources=sources)
    torch.manual_seed(0)
    network = LinkNetwork(conv, knobs.get("layers", 2), 8, 2, 0.0)
    vectors = cache.globals(senders(cache, settings))
    return OverLinks(Memory.of(cache, settings), vectors, network, 8, knobs.get("fanout"))


def said(model: OverLinks, cache: Cache, images: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return model.train(training)(cache.batch(images), cache.globals(images))


@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("sources", ["train", "all"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_evaluation_says_what_training_lays_out(cache: Cache, conv: Conv, sources: str, layers: int) -> None:
    model = over_links(cache, conv, sources, layers=layers)
    images = torch.tensor([20, 33, 2, 7])
    laid_out = said(model, cache, images, training=True)
    torch.testing.assert_close(said(model, cache, images, training=False), laid_out, atol=1e-5, rtol=1e-5)
    alone = torch.cat([said(model, cache, image[None], training=True) for image in images])
    torch.testing.assert_close(alone, laid_out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_a_full_fanout_equals_the_full_batch_bit_for_bit(cache: Cache, conv: Conv) -> None:
    train = cache.images("train")
    whole, drawn = (said(over_links(cache, conv, **knobs), cache, train, True) for knobs in ({}, {"fanout": 10}))
    assert torch.equal(whole, drawn)
    assert not torch.equal(whole, said(over_links(cache, conv, fanout=1), cache, train, True))


@pytest.mark.parametrize("conv", ["gcn", "gat"])
def test_full_batch_training_equals_pyg_on_the_whole_graph(cache: Cache, conv: Conv) -> None:
    """Values, and the gradient of each weight."""
    model, settings = over_links(cache, conv).train(), LinkSettings()
    memory, order = model.memory, senders(cache, settings)
    edges = torch.stack([memory.source, memory.whole().receiver])
    theirs = [GCNConv(8, 8) if conv == "gcn" else GATConv(8, 4, 2, edge_dim=1, fill_value="mean") for _ in range(2)]
    x = model.enter(cache.globals(order))
    for own, layer, norm in zip(theirs, model.network.layers, model.network.norms, strict=True):
        own.load_state_dict(layer.state_dict())
        weight = memory.weight if conv == "gcn" else memory.weight[:, None]
        x = x + F.gelu(own(norm(x), edges, weight))
    ours = model(cache.batch(order), cache.globals(order))
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
    told = torch.randn(x.shape)
    mine = torch.autograd.grad(ours, list(model.network.layers.parameters()), told)
    expected = torch.autograd.grad(x, [each for own in theirs for each in own.parameters()], told)
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_is_remembered_is_found_anew_when_weights_change(cache: Cache) -> None:
    model, images = over_links(cache, "sage"), cache.images("test")
    before = said(model, cache, images, training=False)
    assert len(model.found.values) == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    after = said(model, cache, images, training=False)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, said(model, cache, images, training=True), atol=1e-5, rtol=1e-5)


def test_what_is_remembered_is_found_anew_when_weights_are_loaded(cache: Cache) -> None:
    model, other, images = over_links(cache, "sage"), over_links(cache, "sage"), cache.images("test")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    before, wanted = (said(each, cache, images, training=False) for each in (model, other))
    assert not torch.equal(before, wanted)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.eval()(cache.batch(images), cache.globals(images)), wanted)


def test_attention_reads_the_weights_that_links_have_where_they_are_drawn(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, whole = cache.images("train"), Memory.around
    laid_out: list[Around] = []

    def around(*given: Any, **knobs: Any) -> Around:
        laid_out.append(whole(*given, **knobs))
        return laid_out[-1]

    monkeypatch.setattr(Memory, "around", around)
    for conv in CONVOLUTIONS:
        said(over_links(cache, conv, fanout=1), cache, train, training=True)
    most = Memory.of(cache, LinkSettings()).weight.max()
    assert [bool((each.weight <= most).all()) for each in laid_out] == [conv == "gat" for conv in CONVOLUTIONS]


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_inductive_answers_depend_on_no_other_image_that_is_judged(cache: Cache, conv: Conv) -> None:
    images = cache.images("test")
    few = cache.take(torch.cat([cache.images("train"), images[:1]]))
    alone = said(over_links(few, conv), few, few.images("test"), training=False)
    among = said(over_links(cache, conv), cache, images, training=False)[:1]
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)
    others = over_links(cache, conv, "all")
    without = over_links(few, conv, "all")
    transductive = said(others, cache, images, training=False)[:1]
    assert not torch.allclose(transductive, said(without, few, few.images("test"), training=False), atol=1e-4)
