from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.training.cache import Plan
from training.data import Cache
from training.loop import starting_point
from training.methods.concept_graph import ConceptGraph, Settings


@pytest.fixture
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan())


def build(cache: Cache, **knobs: object) -> ConceptGraph:
    start = starting_point(cache)
    torch.manual_seed(0)
    settings = Settings.model_validate({"hidden": 16, **knobs})
    model = ConceptGraph(start.standardise_global, start.standardise_nodes, cache.bank.K, start.probe, settings)
    torch.nn.init.normal_(model.classify_graph.weight)
    return model.eval()


def test_node_text_equals_a_loop_over_the_heaviest_concepts(cache: Cache) -> None:
    batch = cache.batch(cache.images("test")[:5])
    model = build(cache, texts=2)
    texts = model.node_text(batch)
    for image, node in [(0, 0), (2, 3), (4, 1)]:
        weights = batch.concept_weight[image, node]
        heaviest = sorted(range(len(weights)), key=lambda k: -weights[k])[:2]
        mixed = sum((weights[k] * cache.bank.K[batch.concept_idx[image, node, k]] for k in heaviest), torch.zeros(32))
        torch.testing.assert_close(texts[image, node], mixed / mixed.norm())
    assert texts[~batch.mask].abs().sum() == 0


def test_it_starts_as_the_linear_probe(cache: Cache) -> None:
    model, batch = build(cache), cache.batch(cache.images("test"))
    torch.nn.init.zeros_(model.classify_graph.weight)
    start = starting_point(cache)
    torch.testing.assert_close(model(batch).logits, start.probe(start.standardise_global(batch.g)))


def test_edges_and_texts_reach_the_decision(cache: Cache) -> None:
    model, batch = build(cache), cache.batch(cache.images("test"))
    said = model(batch).logits
    assert not torch.allclose(
        model(replace(batch, adjacency=torch.zeros_like(batch.adjacency))).logits, said, atol=1e-3
    )
    assert not torch.allclose(model(replace(batch, concept_idx=batch.concept_idx.flip(0))).logits, said, atol=1e-3)


def test_selected_reads_no_other_patch(cache: Cache) -> None:
    model, batch = build(cache, nodes="selected"), cache.batch(cache.images("test"))
    output = model(batch)
    left_out = batch.mask & ~batch.selected
    left_out[:, 0] = False
    assert output.node_scores[left_out].abs().sum() == 0
    assert (output.node_scores[:, 0] > 0).all()
    changed = batch.nodes.clone()
    changed[left_out] = F.normalize(torch.randn(int(left_out.sum()), 32), dim=-1)
    torch.testing.assert_close(model(replace(batch, nodes=changed)).logits, output.logits)
