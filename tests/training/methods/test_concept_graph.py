import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from tests.training.methods.test_universal import pad, shake
from training.data import Batch, Cache, Parts
from training.data.bank import Bank
from training.data.cell_descriptions import CellDescriptions
from training.data.descriptions import Descriptions
from training.data.nodes import Nodes
from training.loop import assess_split, decayed_groups, total_loss
from training.methods.concept_graph import (
    Anchored,
    ConceptGraph,
    Given,
    Interference,
    Settings,
    class_anchors,
    fit,
    prepare,
    text_edges,
    text_mask,
)
from training.start import starting_point

LOSSES = ("image", "graph", "contrast", "bottleneck", "recovery", "rings")
ALL: dict[str, Any] = {
    "streams": ["global", "local", "relation", "fused", "concept"],
    "description": "gate",
    "bottleneck": 8,
    "interference": 6,
    "rings": "readout",
    "loss_weights": dict.fromkeys(LOSSES, 0.1),
}
PARTS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "gat, cross attention, a node of rings": {**ALL, "graph": "gat", "description": "attention", "rings": "node"},
    "sage": {"graph": "sage", "description": "attention", "streams": ["fused"], "heads": 2},
    "mlp": {"graph": "mlp", "layers": 1, "texts": 0, "streams": ["relation", "concept"]},
}
EACH = pytest.mark.parametrize("knobs", PARTS.values(), ids=PARTS)


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    """With the nodes of two other encoders."""
    cache = planted(Plan(rings=3, sentences=2))
    mask = cache.part(Nodes).mask
    others = (F.normalize(torch.randn(*mask.shape, size), dim=-1) * mask[..., None] for size in (6, 40))
    return replace(cache, also=tuple(Parts([Nodes(vectors.half(), mask)]) for vectors in others))


def build(cache: Cache, **knobs: object) -> ConceptGraph:
    """A model whose every part says something."""
    torch.manual_seed(0)
    settings = Settings.model_validate({"hidden": 32, "dropout": 0.0, **knobs})
    model = ConceptGraph(Given.measure(cache, settings), settings)
    shake(model)
    return model.eval()


def test_node_text_equals_a_loop_over_the_heaviest_concepts(cache: Cache) -> None:
    batch, model = cache.batch(cache.images("test")[:5]), build(cache, texts=2)
    texts = model.node_text(batch)
    for image, node in [(0, 0), (2, 3), (4, 1)]:
        weights = batch.concept_weight[image, node]
        heaviest = sorted(range(len(weights)), key=lambda k: -weights[k])[:2]
        K = cache.part(Bank).K
        mixed = sum((weights[k] * K[batch.concept_idx[image, node, k]] for k in heaviest), torch.zeros(32))
        torch.testing.assert_close(texts[image, node], model.in_text(mixed / weights[heaviest].sum()))
    assert texts[~batch.mask].abs().sum() == 0


def test_it_starts_as_the_linear_probe(cache: Cache) -> None:
    settings, batch = Settings(streams=["global", "local", "relation", "fused"]), cache.batch(cache.images("test"))
    model = ConceptGraph(Given.measure(cache, settings), settings).eval()
    start = starting_point(cache)
    torch.testing.assert_close(model(batch).logits, start.probe(start.standardise_global(batch.g)))


def test_edges_and_texts_reach_the_decision(cache: Cache) -> None:
    model, batch = build(cache), cache.batch(cache.images("test"))
    said = model(batch).logits
    assert not torch.allclose(
        model(batch.changed(adjacency=torch.zeros_like(batch.adjacency))).logits, said, atol=1e-3
    )
    assert not torch.allclose(model(batch.changed(concept_idx=batch.concept_idx.flip(0))).logits, said, atol=1e-3)


def test_selected_reads_no_other_patch(cache: Cache) -> None:
    model, batch = build(cache, **ALL, nodes="selected"), cache.batch(cache.images("test"))
    output = model(batch)
    left_out = batch.mask & ~batch.selected
    left_out[:, 0] = False
    assert output.node_scores[left_out].abs().sum() == 0
    assert (output.node_scores[:, 0] > 0).all()
    changed = batch.nodes.clone()
    changed[left_out] = F.normalize(torch.randn(int(left_out.sum()), 32), dim=-1)
    torch.testing.assert_close(model(batch.changed(nodes=changed)).logits, output.logits)


def permuted(batch: Batch) -> Batch:
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(batch.l.shape[1])])
    names = ("nodes", "mask", "concept_idx", "concept_weight", "selected", "density")
    moved = batch.changed(box=batch.box[:, order[1:] - 1], **{name: getattr(batch, name)[:, order] for name in names})
    also = tuple(other.changed(nodes=other.nodes[:, order]) for other in batch.also)
    return moved.changed(also=also, adjacency=batch.adjacency[:, order][:, :, order])


@EACH
def test_every_part_keeps_what_universal_tests_ask_for(cache: Cache, knobs: dict[str, Any]) -> None:
    model, images = build(cache, **knobs), cache.images("test")
    batch = cache.batch(images)
    before = copy.deepcopy(batch.values)
    output = model(batch)
    said = output.logits
    alone = torch.cat([model(cache.batch(image[None])).logits for image in images[:8]])
    torch.testing.assert_close(alone, said[:8], atol=1e-4, rtol=1e-4)
    padded = pad(batch, 3)
    torch.testing.assert_close(model(padded).logits, said, atol=1e-4, rtol=1e-4)
    assert model(padded).node_scores[~padded.mask].abs().sum() == 0
    assert output.node_scores.shape == batch.mask.shape
    assert 0 <= output.node_scores.min().item() <= output.node_scores.max().item() <= 1
    torch.testing.assert_close(model(permuted(batch)).logits, said, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(batch).logits, said)
    blind = batch.changed(y=torch.zeros_like(batch.y), target=torch.zeros_like(batch.target))
    assert torch.equal(model(blind).logits, said)
    assert output.losses == {}
    torch.testing.assert_close(batch.values, before, rtol=0, atol=0)


@EACH
@pytest.mark.parametrize("soft", [False, True])
def test_every_parameter_is_trained_and_every_loss_finite(cache: Cache, knobs: dict[str, Any], soft: bool) -> None:
    model, batch = build(cache, **knobs).train(), cache.batch(cache.images("train"))
    if soft:
        batch = batch.changed(target=(0.5 * F.one_hot(batch.y, 4) + 0.5 * F.one_hot((batch.y + 1) % 4, 4)).float())
    output = model(batch)
    total_loss(output, batch.target, dict.fromkeys(output.losses, 1.0)).backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []
    assert sum(len(group["params"]) for group in decayed_groups(model, 0.1)) == len(list(model.parameters()))


@EACH
@pytest.mark.parametrize("case", ["no patch", "no concepts", "no texts", "no edges"])
def test_corners_are_finite(cache: Cache, knobs: dict[str, Any], case: str) -> None:
    batch = cache.batch(cache.images("train")[:6])
    if case == "no patch":
        names = ("nodes", "mask", "concept_idx", "concept_weight", "selected", "density")
        batch = batch.changed(box=batch.box[:, :0], **{name: getattr(batch, name)[:, :1] for name in names})
        batch = batch.changed(adjacency=torch.zeros(6, 1, 1, 2))
        batch = batch.changed(also=tuple(other.changed(nodes=other.nodes[:, :1]) for other in batch.also))
    elif case == "no concepts":
        batch = batch.changed(concept_idx=batch.concept_idx[..., :0], concept_weight=batch.concept_weight[..., :0])
    elif case == "no texts":
        batch = batch.changed(selected_concepts=batch.selected_concepts[:, :0], d=batch.d[:, :0], dm=batch.dm[:, :0])
    else:
        batch = batch.changed(adjacency=torch.zeros_like(batch.adjacency))
    for mode in (True, False):
        output = build(cache, **knobs).train(mode)(batch)
        loss = total_loss(output, batch.y, dict.fromkeys(output.losses, 1.0))
        assert torch.isfinite(loss)
    assert torch.isfinite(output.logits).all()


def test_a_weight_of_zero_computes_no_loss_and_recovery_waits_for_its_epoch(cache: Cache) -> None:
    batch = cache.batch(cache.images("train")[:8])
    assert set(build(cache).train()(batch).losses) == {"image", "graph"}
    model = build(cache, **{**ALL, "recovery_epoch": 3})
    assert set(model.train()(batch).losses) == set(LOSSES) - {"recovery"}
    model.train()
    assert set(model.train()(batch).losses) == set(LOSSES)


@pytest.mark.parametrize("fusion", ["gate", "attention"])
def test_without_a_description_graph_only_patches_decide(cache: Cache, fusion: str) -> None:
    batch = cache.batch(cache.images("test"))
    model = build(cache, description=fusion, streams=["global", "fused"])
    bare = batch.changed(selected_concepts=torch.full_like(batch.selected_concepts, -1), dm=batch.dm & False)
    patches = build(cache, streams=["global", "fused"])
    patches.load_state_dict({name: value for name, value in model.state_dict().items() if name in patches.state_dict()})
    torch.testing.assert_close(model(bare).logits, patches(batch).logits)
    assert not torch.allclose(model(batch).logits, patches(batch).logits, atol=1e-3)


def test_sentences_reach_the_decision(cache: Cache) -> None:
    model, images = build(cache, **ALL), cache.images("train")
    batch = cache.batch(images[cache.part(Descriptions).dm[images].any(1)])
    assert not torch.allclose(model(batch).logits, model(batch.changed(dm=batch.dm & False)).logits, atol=1e-4)


def test_sentences_about_cells_are_nodes_where_they_are_asked_for(cache: Cache) -> None:
    described = cache.part(CellDescriptions).cdm.any(1)
    model = build(cache, **ALL, cell_texts=True)
    batch = cache.batch(described.nonzero().flatten())
    mute = batch.changed(cdm=batch.cdm & False)
    assert not torch.allclose(model(batch).logits, model(mute).logits, atol=1e-4)
    # A node that is not there changes nothing: without cells it is the graph that has none.
    plain = build(cache, **ALL)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(mute).logits, plain(batch).logits)
    assert torch.equal(plain(batch).logits, plain(mute).logits)


def test_edges_between_texts_do_not_depend_on_the_precision(cache: Cache) -> None:
    batch = cache.batch(torch.arange(len(cache.paths)))
    texts = cache.part(Bank).K, batch.selected_concepts, batch.d, text_mask(batch.selected_concepts, batch.dm)
    found = text_edges(*texts, 2)
    assert (found > 0).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text_edges(*texts, 2), found)


@EACH
@pytest.mark.parametrize("nodes", ["all", "selected"])
def test_what_is_found_before_training_is_what_a_batch_would_find(
    planted: Callable[[Plan], Cache], knobs: dict[str, Any], nodes: str
) -> None:
    cache = planted(Plan(rings=3, sentences=2, views=2))
    model = build(cache, **knobs, nodes=nodes, neighbours=2)
    told, images = prepare(cache, model.settings.model_dump_json()), torch.arange(len(cache.paths))
    batch, ready = (some.batch(images, images % 2) for some in (cache, told))
    assert not ready.has("adjacency")
    assert ready.has("node_graph") == (model.settings.graph != "mlp")
    with torch.no_grad():
        said = model(batch).logits
        # Edges are kept in half precision.
        torch.testing.assert_close(model(ready).logits, said, atol=1e-2, rtol=0)
        for name in ("node_graph", "text_graph", "text_idx"):
            if ready.has(name):
                moved = ready.changed(**{name: ready.values[name].flip(0)})
                assert not torch.allclose(model(moved).logits, said, atol=1e-2)


def test_the_concept_stream_is_the_mean_cosine_of_a_class_s_concepts(cache: Cache) -> None:
    batch, settings = cache.batch(cache.images("test")), Settings(streams=["concept"])
    said = ConceptGraph(Given.measure(cache, settings), settings).eval()(batch).logits
    own, train = cache.part(Bank).own & cache.part(Bank).kept[:, None], cache.globals(cache.images("train"))
    mean, expected = (
        torch.stack([(g @ cache.part(Bank).K[own[:, label]].T).mean(1) for label in range(4)], dim=1)
        for g in (train, batch.g)
    )
    scale = mean.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(said, (expected - mean.mean(0)) / scale, atol=1e-4, rtol=1e-4)


def test_interference_is_the_standardised_product_and_reads_no_other_image(cache: Cache) -> None:
    anchors, v = class_anchors(cache.part(Bank)), cache.batch(cache.images("train")).nodes
    part = Interference(Anchored.measure(anchors, v.flatten(0, 1)), 6, 16, 0.0)
    met = part.standardise(v @ anchors.T)
    torch.testing.assert_close(part(v), part.widen(F.elu(part.narrow(met))), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part(v[:1]), part(v)[:1])


def test_noise_of_the_bottleneck_is_for_training_alone(cache: Cache) -> None:
    model, x = build(cache, bottleneck=8).bottleneck, torch.randn(2, 3, 32)
    widened, mean, _ = model(x)
    assert torch.equal(widened, model.widen(mean))
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    with torch.no_grad():
        model.distribution.weight[8:], model.distribution.bias[8:] = 0.0, -60.0
    torch.testing.assert_close(model(x)[0], widened)


@pytest.mark.parametrize("entry", ["readout", "node"])
def test_rings_reach_the_decision(cache: Cache, entry: str) -> None:
    model, batch = build(cache, rings=entry), cache.batch(cache.images("test"))
    moved = batch.changed(ring_gains=batch.ring_gains.flip(0))
    assert not torch.allclose(model(moved).logits, model(batch).logits, atol=1e-3)


@pytest.mark.parametrize("knobs", [{"rings": "node"}, {"loss_weights": {"rings": 0.1}}])
def test_rings_that_labels_lack_are_refused(planted: Callable[[Plan], Cache], knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"labels/tiny: hold no ring gains .*run label_patches"):
        Given.measure(planted(Plan()), Settings.model_validate(knobs))


@pytest.mark.parametrize("knobs", [{"graph": "gat"}, {"description": "attention"}])
def test_heads_have_to_divide_the_width(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="hidden, 24, has to be a multiple of twice the heads, 16"):
        Settings.model_validate({"hidden": 24, **knobs})


def test_all_parts_together_learn_a_local_cue(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(rings=3, cue="local", train=40, val=15, test=40))
    schedule = {"epochs": 40, "batch_size": 32, "weight_decay": [0.01], "lr": [3e-3], "precision": "bf16"}
    settings = Settings.model_validate({**ALL, **schedule, "hidden": 32})
    assert assess_split(fit(cache, settings, 0).model, cache, "test")[0] > 0.8
