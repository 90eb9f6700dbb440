"""What patches and texts add to a decision, against loops, planted answers and exact sums."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block
from tests.training.cache import Plan
from tests.training.methods.test_universal import quick, quick_settings, shake
from training import explain
from training.data import Batch, Cache, Parts
from training.data.bank import Bank
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.explain import Texts, gradients, keep_nodes, node_scores, occlude, pairs, texts, top_two
from training.loop import margin, predict
from training.methods import Output, load_method
from training.restore import Restored

PATCHES = 5


def planted_patch(count: int = 240, dimension: int = 32) -> tuple[Cache, Tensor]:
    """Four classes that one patch alone tells, its place (n,) drawn; a third of the images lack the last patch."""
    generator = torch.Generator().manual_seed(0)
    y, names = torch.arange(count) % 4, [str(image) for image in range(count)]
    split = np.array(["train", "train", "val", "test"])[(torch.arange(count) // 4 % 4).numpy()]
    place = torch.randint(PATCHES - 1, (count,), generator=generator)
    nodes = torch.randn(count, PATCHES + 1, dimension, generator=generator) / dimension**0.5
    nodes[torch.arange(count), 1 + place] += 4 * F.normalize(torch.randn(4, dimension, generator=generator), dim=-1)[y]
    mask = torch.ones(count, PATCHES + 1, dtype=torch.bool)
    mask[::3, -1] = False
    vectors = (F.normalize(nodes, dim=-1) * mask[..., None]).half()
    parts = Parts([Nodes(vectors, mask)])
    return Cache([f"c{label}" for label in range(4)], names, names, names, split, y, y, 1, parts, {}), place


class Linear(nn.Module):
    """Logits are linear in the nodes."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, 4)

    def forward(self, batch: Batch) -> Output:
        found = self.linear(batch.nodes.sum(1))
        for other in batch.also:
            found = found + self.linear(other.nodes.sum(1))
        return Output(found, {}, None)


@pytest.mark.parametrize("group", [512, 7])
def test_of_a_linear_model_occlusion_and_gradients_are_its_terms(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(explain, "EVALUATION_BATCH", group)  # so many rows a pass change nothing
    cache, _ = planted_patch()
    cache, model = replace(cache, also=(Parts([cache.part(Nodes)]),)), Linear(32)
    images, classes = cache.images("test"), torch.tensor([[2, 0]]).expand(60, 2)
    a, b = model.linear.weight[[2, 0]]
    batch = cache.batch(images)
    expected = 2 * (batch.l @ (a - b)).detach()  # of both encoders
    mean = expected.sum(1, keepdim=True) / batch.lm.sum(1, keepdim=True)
    fall, slope = occlude(model, cache, images, classes), gradients(model, cache, images, classes)
    torch.testing.assert_close(fall, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slope, (expected - mean) * batch.lm, atol=1e-5, rtol=1e-4)
    assert node_scores(model, cache, images) is None


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("attention_pool", {"epochs": 20, "lr": [3e-3]}),
        ("concept_graph", {"epochs": 20, "lr": [3e-3], "texts": 0, "graph": "mlp"}),
        ("linear_probe", {"features": ["nodes"], "l2": [0.01]}),
    ],
)
def test_the_planted_patch_is_found(method: str, knobs: dict[str, Any]) -> None:
    cache, place = planted_patch()
    model, images = quick(method, cache, **knobs).model, cache.images("test")
    classes = top_two(model, cache, images)
    right = classes[:, 0] == cache.y[images]
    assert right.float().mean() > 0.9
    for found in (occlude, gradients):
        said = found(model, cache, images, classes)
        assert said is not None
        assert (said.argmax(1) == place[images])[right].float().mean() > 0.95
        assert not said[~cache.batch(images).lm].any()
    scores = node_scores(model, cache, images)
    assert (scores is None) == (method == "linear_probe")


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan(train=12, noise=1.0, sentences=2))


WHOLE = {"streams": ["local"], "description": True}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "knobs"), [("attention_pool", {}), ("concept_graph", WHOLE)])
def test_occlusion_by_a_loop_and_gradients_by_their_sum(
    cache: Cache, method: str, knobs: dict[str, Any]
) -> None:
    model, images = quick(method, cache, epochs=1, **knobs).model, cache.images("test")[:6]
    shake(model)
    classes, batch = top_two(model, cache, images), cache.batch(images)
    fall, slope = occlude(model, cache, images, classes), gradients(model, cache, images, classes)
    assert fall is not None
    assert slope is not None
    logits = predict(model, cache, images)
    assert torch.equal(classes, logits.argsort(1, descending=True)[:, :2])
    mean = batch.l.sum(1, keepdim=True) / batch.lm.sum(1)[:, None, None]
    alike = torch.cat([batch.nodes[:, :1], mean * batch.lm[..., None]], dim=1)
    with torch.no_grad():
        lost = margin(logits, classes) - margin(model(batch.changed(nodes=alike)).logits, classes)
    torch.testing.assert_close(slope.sum(1), lost, atol=2e-3, rtol=1e-2)
    for node in range(batch.lm.shape[1]):
        keep = torch.arange(batch.lm.shape[1]).expand(6, -1) != node
        with torch.no_grad():
            without = model(keep_nodes(batch, keep)).logits
            torch.testing.assert_close(
                fall[:, node], margin(logits, classes) - margin(without, classes), atol=1e-4, rtol=1e-4
            )


def test_a_method_that_reads_no_node_has_nothing_to_say_of_patches(cache: Cache) -> None:
    blind = cache.only({"globals", "names", "owners"})
    model, images = quick("zero_shot", cache).model, cache.images("test")
    classes = torch.tensor([[0, 1]]).expand(len(images), 2)
    assert occlude(model, blind, images, classes) is gradients(model, blind, images, classes) is None


def restored(method: str, settings: Block, model: nn.Module) -> Restored:
    return Restored("run", method, settings, "tiny", (), [], frozenset(), frozenset(), 0, model, {})


def added(cache: Cache, method: str, most: int, **knobs: object) -> tuple[Tensor, Tensor, Texts, nn.Module]:
    """Of test images: what a model says of two classes, the classes, and what texts add."""
    fitted, settings = quick(method, cache, epochs=1, **knobs), quick_settings(method, epochs=1, **knobs)
    shake(fitted.model)
    images = cache.images("test")
    classes = top_two(fitted.model, cache, images)
    found = texts(restored(method, settings, fitted.model), cache, images, classes, most)
    assert found is not None
    return margin(predict(fitted.model, cache, images), classes), classes, found, fitted.model


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("zero_shot", {}),
        ("description_zero_shot", {}),
        ("description_zero_shot", {"class_names": True}),
        ("description_zero_shot", {"average": "embeddings"}),
        ("description_zero_shot", {"class_names": True, "average": "embeddings", "keep": 2}),
    ],
)
def test_texts_that_are_all_there_is_add_up_to_the_difference(
    cache: Cache, method: str, knobs: dict[str, Any]
) -> None:
    bank = cache.part(Bank)
    twice = torch.cat([torch.arange(len(bank.K)), torch.tensor([2])])  # a text of the first class stands there twice
    doubled = replace(
        bank, K=bank.K[twice], kind=(*bank.kind, bank.kind[2]), kept=bank.kept[twice], owners=bank.own[twice]
    )
    said, classes, found, _ = added(cache.with_part(doubled), method, 100, **knobs)
    torch.testing.assert_close(found.adds.sum(1), said, atol=1e-4, rtol=1e-4)
    assert (found.adds.abs().diff(dim=1) <= 0).all()
    assert torch.equal(found.text < 0, found.adds == 0)
    owned = doubled.own[found.text].gather(2, classes[:, None].expand(-1, found.text.shape[1], -1)).any(2)
    assert owned[found.adds != 0].all()


def test_concepts_of_the_bottleneck_and_the_bias_add_up_to_the_difference(cache: Cache) -> None:
    said, classes, found, model = added(cache, "concept_bottleneck", 100)
    bias: Tensor = model.linear.bias  # type: ignore[union-attr, assignment]
    a, b = bias.detach()[classes].T
    torch.testing.assert_close(found.adds.sum(1) + a - b, said, atol=1e-4, rtol=1e-4)
    bank = cache.part(Bank)
    assert (bank.kept & ~bank.of_kind("name", "proto"))[found.text[found.adds != 0]].all()


@pytest.mark.parametrize("method", ["lpp", "tip_adapter"])
def test_without_the_texts_the_rest_is_left(cache: Cache, method: str) -> None:
    """What texts add is the difference less that of the same model whose texts are zero."""
    said, classes, found, model = added(cache, method, 100)
    held: Any = model.linear if method == "lpp" else model
    (held.text if method == "lpp" else held.class_text).zero_()
    rest = margin(predict(model, cache, cache.images("test")), classes)
    torch.testing.assert_close(found.adds.sum(1), said - rest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("knobs", [{"texts": 2}, WHOLE])
def test_a_text_of_the_graph_adds_what_is_lost_without_its_labels(cache: Cache, knobs: dict[str, Any]) -> None:
    said, classes, found, model = added(cache, "concept_graph", 6, **knobs)
    images, labels = cache.images("test"), cache.part(Labels)
    for image, place in [(0, 0), (1, 0), (4, 1), (9, 2)]:
        lost = torch.zeros(len(cache.part(Bank).K), dtype=torch.bool)
        lost[found.text[image, place]] = True
        less = predict(model, cache.with_part(labels.without(lost)), images[image : image + 1])
        expected = said[image] - margin(less, classes[image : image + 1])[0]
        assert found.adds[image, place].item() == pytest.approx(expected.item(), abs=1e-4)
    assert found.adds[:, 0].abs().max() > 1e-3


def test_a_method_without_texts_says_so(cache: Cache) -> None:
    images, classes = cache.images("test")[:2], torch.tensor([[0, 1], [0, 1]])
    for method, knobs in (("knn", {}), ("lpp", {"text_scale": [0.0]}), ("concept_graph", {"texts": 0, "epochs": 0})):
        settings = quick_settings(method, **knobs)
        assert texts(restored(method, settings, nn.Module()), cache, images, classes) is None


def test_pairs_and_the_biases_add_up_to_the_difference(cache: Cache) -> None:
    settings, images = quick_settings("pair_bottleneck", directions=4, nec=None), cache.images("test")
    fitted = load_method("pair_bottleneck").fit(cache, settings, 0)
    classes = torch.tensor([[2, 0]]).expand(len(images), 2)
    found = pairs(restored("pair_bottleneck", settings, fitted.model), cache, images, classes)
    assert found is not None
    bias: Tensor = fitted.model.linear.bias  # type: ignore[union-attr, assignment]
    said = margin(predict(fitted.model, cache, images), classes)
    torch.testing.assert_close(found.adds.sum(1) + (bias[2] - bias[0]).detach(), said, atol=1e-3, rtol=1e-3)
    assert found.text.shape == (len(images), 10, 2)
    told = load_method("pair_bottleneck").pairs_add(fitted.model, settings, cache, images, classes)  # type: ignore[attr-defined]
    for image in range(len(images)):
        order = told[0][image].abs().argsort(descending=True)
        assert torch.equal(found.more[image], told[2][image][order])
    assert (found.adds.abs().diff(dim=1) <= 0).all()
    assert pairs(restored("knn", quick_settings("knn"), nn.Module()), cache, images, classes) is None
