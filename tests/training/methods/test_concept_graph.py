import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import pad, quick, shake
from training.class_texts import class_mix
from training.data import Batch, Cache, Parts
from training.data.bank import Bank
from training.data.cell_descriptions import CellDescriptions
from training.data.nodes import Nodes
from training.data.tokens import Cells, Tokens
from training.layers.graphs import nearest_edges
from training.loop import assess_split, decayed_groups, predict, total_loss
from training.methods import NotPossible
from training.methods.concept_graph import ConceptGraph, Given, Settings, build, fit, prepare
from training.methods.concept_graph import reads as reads_under
from training.start import starting_point

ALL: dict[str, Any] = {"description": True, "loss_weights": {"image": 0.1, "graph": 0.1}}
PARTS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "gat": {**ALL, "graph": "gat"},
    "sage": {"graph": "sage", "description": True, "streams": ["local"], "heads": 2},
    "mlp": {"graph": "mlp", "layers": 1, "texts": 0},
}
EACH = pytest.mark.parametrize("knobs", PARTS.values(), ids=PARTS)


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    """With the nodes of two other encoders."""
    cache = planted(Plan(sentences=2))
    mask = cache.part(Nodes).mask
    others = (F.normalize(torch.randn(*mask.shape, size), dim=-1) * mask[..., None] for size in (6, 40))
    return replace(cache, also=tuple(Parts([Nodes(vectors.half(), mask)]) for vectors in others))


def made(cache: Cache, **knobs: object) -> ConceptGraph:
    """A model whose every part says something."""
    settings = Settings.model_validate({"hidden": 32, "dropout": 0.0, **knobs})
    given = Given.measure(cache, settings)
    torch.manual_seed(0)
    model = ConceptGraph(given, settings)
    shake(model)
    return model.eval()


def test_node_text_equals_a_loop_over_the_heaviest_concepts(cache: Cache) -> None:
    batch, model = cache.batch(cache.images("test")[:5]), made(cache, texts=2)
    texts = model.node_text(batch)
    for image, node in [(0, 0), (2, 3), (4, 1)]:
        weights = batch.concept_weight[image, node]
        heaviest = sorted(range(len(weights)), key=lambda k: -weights[k])[:2]
        K = cache.part(Bank).K
        mixed = sum((weights[k] * K[batch.concept_idx[image, node, k]] for k in heaviest), torch.zeros(32))
        torch.testing.assert_close(texts[image, node], model.in_text(mixed / weights[heaviest].sum()))
    assert texts[~batch.mask].abs().sum() == 0


def test_it_starts_as_the_linear_probe(cache: Cache) -> None:
    settings, batch = Settings(description=True), cache.batch(cache.images("test"))
    model = ConceptGraph(Given.measure(cache, settings), settings).eval()
    start = starting_point(cache)
    torch.testing.assert_close(model(batch).logits, start.probe(start.standardise_global(batch.g)))


def test_edges_and_texts_reach_the_decision(cache: Cache) -> None:
    model, batch = made(cache), cache.batch(cache.images("test"))
    said = model(batch).logits
    assert not torch.allclose(
        model(batch.changed(adjacency=torch.zeros_like(batch.adjacency))).logits, said, atol=1e-3
    )
    assert not torch.allclose(model(batch.changed(concept_idx=batch.concept_idx.flip(0))).logits, said, atol=1e-3)


def test_selected_reads_no_other_patch(cache: Cache) -> None:
    model, batch = made(cache, **ALL, nodes="selected"), cache.batch(cache.images("test"))
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
    model, images = made(cache, **knobs), cache.images("test")
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
    model, batch = made(cache, **knobs).train(), cache.batch(cache.images("train"))
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
        output = made(cache, **knobs).train(mode)(batch)
        loss = total_loss(output, batch.y, dict.fromkeys(output.losses, 1.0))
        assert torch.isfinite(loss)
    assert torch.isfinite(output.logits).all()


def test_a_weight_of_zero_computes_no_loss(cache: Cache) -> None:
    batch = cache.batch(cache.images("train")[:8])
    assert set(made(cache).train()(batch).losses) == {"image", "graph"}
    assert set(made(cache, loss_weights={"image": 0.0}).train()(batch).losses) == {"graph"}


def test_an_image_without_sentences_is_judged_by_its_patches(cache: Cache) -> None:
    batch = cache.batch(cache.images("test"))
    model, patches = made(cache, description=True), made(cache)
    patches.load_state_dict({name: value for name, value in model.state_dict().items() if name in patches.state_dict()})
    assert not batch.dm.any()
    torch.testing.assert_close(model(batch).logits, patches(batch).logits)
    said = described(cache, batch)
    torch.testing.assert_close(model(said.changed(dm=said.dm & False)).logits, patches(batch).logits)
    assert not torch.allclose(model(said).logits, patches(batch).logits, atol=1e-3)


def described(cache: Cache, batch: Batch) -> Batch:
    """Four sentences an image, of which some images have fewer."""
    d = F.normalize(torch.randn(len(batch.y), 4, cache.part(Bank).K.shape[1]), dim=-1)
    dm = torch.arange(4) < 1 + torch.arange(len(batch.y))[:, None] % 4
    return batch.changed(d=d * dm[..., None], dm=dm)


def test_sentences_about_cells_are_nodes_where_they_are_asked_for(cache: Cache) -> None:
    described = cache.part(CellDescriptions).cdm.any(1)
    model = made(cache, description=True, cell_texts=True)
    batch = cache.batch(described.nonzero().flatten())
    mute = batch.changed(cdm=batch.cdm & False)
    assert not torch.allclose(model(batch).logits, model(mute).logits, atol=1e-4)
    # A node that is not there changes nothing: without cells it is the graph that has none.
    plain = made(cache, description=True)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(mute).logits, plain(batch).logits)
    assert torch.equal(plain(batch).logits, plain(mute).logits)


def test_sentences_are_a_graph_in_no_order_and_padding_is_none(cache: Cache) -> None:
    model, batch = made(cache, description=True), described(cache, cache.batch(cache.images("test")))
    said = model(batch).logits
    order = torch.randperm(4)
    torch.testing.assert_close(
        model(batch.changed(d=batch.d[:, order], dm=batch.dm[:, order])).logits, said, atol=1e-4, rtol=1e-4
    )
    noise = batch.d.where(batch.dm[..., None], torch.full_like(batch.d, 3.0))
    torch.testing.assert_close(model(batch.changed(d=noise)).logits, said, atol=1e-4, rtol=1e-4)


def test_edges_between_sentences_do_not_depend_on_the_precision(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(nearest_edges(*arguments))
        return seen[-1]

    monkeypatch.setattr("training.methods.concept_graph.nearest_edges", watched)
    model, batch = made(cache, description=True), described(cache, cache.batch(cache.images("test")))
    model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    assert torch.equal(*seen)
    assert seen[0].any()


@EACH
@pytest.mark.parametrize("nodes", ["all", "selected"])
def test_what_is_found_before_training_is_what_a_batch_would_find(
    planted: Callable[[Plan], Cache], knobs: dict[str, Any], nodes: str
) -> None:
    cache = planted(Plan(sentences=2, views=2))
    model = made(cache, **knobs, nodes=nodes)
    told, images = prepare(cache, model.settings.model_dump_json()), torch.arange(len(cache.paths))
    batch, ready = (some.batch(images, images % 2) for some in (cache, told))
    assert not ready.has("adjacency")
    assert ready.has("node_graph") == (model.settings.graph != "mlp")
    with torch.no_grad():
        said = model(batch).logits
        # Edges are kept in half precision.
        torch.testing.assert_close(model(ready).logits, said, atol=1e-2, rtol=0)
        for name in ("node_graph", "text_idx"):
            if ready.has(name):
                moved = ready.changed(**{name: ready.values[name].flip(0)})
                assert not torch.allclose(model(moved).logits, said, atol=1e-2)


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="hidden, 24, has to be a multiple of twice the heads, 16"):
        Settings(hidden=24, graph="gat")
    assert Settings(hidden=24).hidden == 24


def test_tokens_of_the_layer_that_it_names_are_its_nodes(cache: Cache) -> None:
    images, count = cache.images("test"), len(cache.paths)
    layers = {f"tokens/{layer}": Cells(torch.randn(count, 2 * rows, 6 + rows).half(), (rows, 2))
              for layer, rows in ((1, 4), (2, 3))}  # fmt: skip
    cache, by_layer = cache.with_part(Tokens.of(layers)), {}
    for layer in (1, 2):
        settings = Settings.model_validate({"nodes": "tokens", "layer": layer, "texts": 0, "hidden": 32})
        assert reads_under(settings) == {"globals", f"tokens/{layer}"}
        torch.manual_seed(0)
        model = ConceptGraph(Given.measure(cache, settings), settings)
        shake(model)
        batch = cache.batch(images)
        said = by_layer[layer] = model.eval()(batch).logits
        for other in (1, 2):
            moved = batch.changed(**{f"tokens/{other}": batch.of(f"tokens/{other}").flip(0)})
            assert torch.equal(model(moved).logits, said) == (other != layer)
    assert not torch.allclose(*by_layer.values(), atol=1e-3)


@pytest.mark.slow
def test_all_parts_together_learn_a_local_cue(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(cue="local", train=40, val=15, test=40))
    schedule = {"epochs": 40, "batch_size": 32, "weight_decay": [0.01], "lr": [3e-3], "precision": "bf16"}
    settings = Settings.model_validate({**ALL, **schedule, "hidden": 32})
    assert assess_split(fit(cache, settings, 0).model, cache, "test")[0] > 0.8


@pytest.fixture(scope="module")
def lacking(planted: Callable[[Plan], Cache]) -> Cache:
    """Of 24 classes six have no training image; their texts lie where their images do."""
    cache = planted(Plan(classes=24, train=8, nodes=2, noise=0.8, ragged=False, dimension=16))
    split = cache.split.copy()
    split[(cache.split == "train") & (cache.y < 6).numpy()] = "unused"
    return replace(cache, split=split)


def accuracy_on_lacking(cache: Cache, **knobs: Any) -> tuple[float, float]:
    """On images of the classes without training images: among all classes, and among these."""
    images = cache.images("test")
    images = images[cache.y[images] < 6]
    logits = predict(quick("concept_graph", cache, **knobs).model, cache, images)
    y = cache.y[images]
    return ((logits.argmax(1) == y).float().mean().item(), (logits[:, :6].argmax(1) == y).float().mean().item())


@pytest.mark.slow
def test_a_class_without_images_is_never_said_and_by_its_texts_it_is_told_from_its_like(lacking: Cache) -> None:
    images = torch.arange(len(lacking.paths))
    fitted = quick("concept_graph", lacking)
    assert (predict(fitted.model, lacking, images).argmax(1) >= 6).all()
    assert accuracy_on_lacking(lacking)[0] == 0
    for knobs in ({}, {"with_probe": {"method": "ridge", "settings": {"features": ["global"]}}}):
        for unseen in ("names", "concepts", "both"):
            assert accuracy_on_lacking(lacking, unseen=unseen, **knobs)[1] > 0.6, unseen


@pytest.mark.parametrize("with_probe", [None, {"method": "ridge", "settings": {"features": ["global"]}}])
def test_its_logit_is_the_mix_of_the_others_and_theirs_stay(lacking: Cache, with_probe: Any) -> None:
    knobs = {"hidden": 16, "with_probe": with_probe}
    settings = Settings.model_validate({**knobs, "unseen": "both"})
    plain, mixed = made(lacking, **knobs), made(lacking, **knobs, unseen="both")
    batch, mix = lacking.batch(lacking.images("test")), class_mix(lacking, "both")
    assert mix is not None
    said, expected = mixed(batch).logits, plain(batch).logits
    assert torch.equal(said[:, 6:], expected[:, 6:])
    for unseen in range(6):
        by_hand = sum((mix[unseen, label] * expected[:, label] for label in range(6, 24)), torch.zeros(len(said)))
        torch.testing.assert_close(said[:, unseen], by_hand, atol=1e-4, rtol=1e-4)
    restored = build(mixed.state_dict(), settings, 24)
    restored.load_state_dict(mixed.state_dict())
    assert torch.equal(restored.eval()(batch).logits, said)
    if with_probe is None:  # training is told nothing of it
        assert torch.equal(mixed.train()(batch).logits, plain.train()(batch).logits)


def test_where_every_class_has_images_unseen_changes_nothing(cache: Cache) -> None:
    images = torch.arange(len(cache.paths))
    plain, told = (predict(quick("concept_graph", cache, **knobs).model, cache, images)
                   for knobs in ({}, {"unseen": "both"}))  # fmt: skip
    assert torch.equal(plain, told)


def test_two_classes_with_images_say_too_little_of_a_third(cache: Cache) -> None:
    split = cache.split.copy()
    split[(cache.split == "train") & (cache.y < 2).numpy()] = "unused"
    with pytest.raises(NotPossible, match=r"fewer than 3 classes have images to learn from .*unseen: null"):
        Given.measure(replace(cache, split=split), Settings(unseen="names"))
