"""A method that adds its streams to a probe, or reads tokens: it is held to what every method is held to."""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from tests.training.methods.test_universal import assert_saved, pad, quick, shake
from training import offset
from training.data import Cache, Parts
from training.data.edges import Edges
from training.data.nodes import Globals, Nodes
from training.data.tokens import Cells, Tokens
from training.folds import refit, settle
from training.loop import assess_split, decayed_groups, predict, total_loss
from training.methods import NotPossible, load_method, methods_of, read_settings, reads_of, ridge
from training.methods.concept_graph import prepare
from training.offset import WithProbe, deal_training, fit_rival, out_of_fold
from training.regimes import Shots, hide_test
from training.start import starting_point

METHODS = pytest.mark.parametrize("method", ["attention_pool", "concept_graph"])
RIDGE = {"method": "ridge", "settings": {"features": ["pooled", "isqrt"]}}
ON_NODES = {"method": "ridge", "settings": {"features": ["global", "nodes"], "penalty": [1.0]}}
PROBES: list[dict[str, Any]] = [
    RIDGE,
    {"method": "linear_probe", "settings": {"l2": [0.1, 0.01]}},
    {"method": "lda", "settings": {"shrinkage": [0.5]}},
    {"method": "rbf_ridge", "settings": {"features": ["nodes"], "penalty": [0.1]}},
    {"method": "probes", "settings": {"candidates": [{"method": "ridge"}, {"method": "lda"}]}},
]
EACH_PROBE = pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe["method"])


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    """Two views, and two images a group."""
    cache = planted(Plan(train=12, views=2, noise=2.0))
    return replace(cache, groups=[f"{cache.y[image]} {image // 2}" for image in range(len(cache.paths))])


def settings_of(method: str, **knobs: object) -> Any:
    small = {"epochs": 1, "batch_size": 16, "hidden": 16, "weight_decay": [0.01], "precision": "fp32", "dropout": 0.0}
    return load_method(method).Settings.model_validate({**small, **knobs})


def told(cache: Cache, method: str, **knobs: object) -> Cache:
    """The cache of a training step."""
    settings = settings_of(method, **knobs)
    if method == "concept_graph":
        return prepare(cache, settings.model_dump_json())
    return starting_point(cache, None, settings.with_probe).rival.told(cache)  # type: ignore[union-attr]


@METHODS
@EACH_PROBE
def test_epoch_0_is_the_rival(cache: Cache, method: str, probe: dict[str, Any]) -> None:
    shown, images = hide_test(cache), torch.arange(len(cache.paths))
    settings = settings_of(method, with_probe=probe, epochs=0)
    fitted = load_method(method).fit(shown.only(reads_of(method, settings)), settings, 0)
    rival = load_method(probe["method"]).fit(shown, settings.with_probe.block, 0)
    temperature = fitted.chosen["with_probe.temperature"]
    assert 0 < float(temperature) < 10
    expected = predict(rival.model, cache, images) / temperature
    torch.testing.assert_close(predict(fitted.model, cache, images), expected, atol=1e-5, rtol=1e-4)
    assert {name: fitted.chosen[f"with_probe.{name}"] for name in rival.chosen} == rival.chosen
    assert "start_l2" not in fitted.chosen


def test_the_logits_of_a_training_image_are_of_a_fit_without_its_group(cache: Cache) -> None:
    settings, fold, train = ridge.Settings(penalty=[0.1]), deal_training(cache), cache.images("train")
    said = out_of_fold(cache, "ridge", settings, fold)
    for number in range(offset.FOLDS):
        held = train[fold == number]
        others = np.isin(np.arange(len(cache.paths)), train[fold != number].numpy())
        model = ridge.fit(replace(cache, split=np.where(others, "train", "none")), settings, 0).model
        for view in (0, 1):
            with torch.no_grad():
                expected = model(cache.batch(held, torch.full_like(held, view))).logits
            torch.testing.assert_close(said[held * 2 + view], expected)
    rest = np.repeat(cache.split != "train", 2)
    assert said[torch.from_numpy(rest)].isnan().all()


def test_folds_keep_groups_whole_and_take_a_like_share_of_every_class(cache: Cache) -> None:
    train, fold = cache.images("train"), deal_training(cache)
    groups = np.array(cache.groups)[train]
    assert all(len(set(fold[torch.from_numpy(groups == group)].tolist())) == 1 for group in set(groups))
    for label in range(4):
        shares = torch.bincount(fold[cache.y[train] == label], minlength=offset.FOLDS)
        assert shares.tolist() == [4, 2, 2, 2, 2]  # six groups of two images
    order = torch.arange(len(cache.paths)).flip(0)
    again = deal_training(cache.take(order))
    assert torch.equal(again, fold.flip(0))


@METHODS
def test_a_label_that_is_held_out_changes_no_logit(cache: Cache, method: str) -> None:
    """Of val and test in all; of a fold, in its own answers."""
    fold, train, settings = deal_training(cache), cache.images("train"), ridge.Settings(penalty=[0.1])
    y = cache.y.clone()
    rest = torch.from_numpy(cache.split != "train")
    y[rest] = (y[rest] + 1) % 4
    other, knobs = replace(cache, y=y, target=y), settings_of(method, with_probe=RIDGE, epochs=0)
    images = torch.arange(len(cache.paths))
    before, after = (load_method(method).fit(one, knobs, 0).model for one in (cache, other))
    assert torch.equal(predict(before, cache, images), predict(after, cache, images))
    before, after = (fit_rival(one, knobs.with_probe).out_of_fold for one in (cache, other))
    assert torch.equal(before[~before.isnan()], after[~after.isnan()])
    held = train[fold == 1]
    y = cache.y.clone()
    y[held] = (y[held] + 1) % 4
    before, after = (out_of_fold(replace(cache, target=one), "ridge", settings, fold) for one in (cache.y, y))
    rows = held * 2
    assert torch.equal(before[rows], after[rows])
    assert not torch.equal(before[train[fold == 2] * 2], after[train[fold == 2] * 2])


def residual(train: int = 30, val: int = 15, test: int = 50, dimension: int = 192, patches: int = 5) -> Cache:
    """Four classes, images a class: the picture shows which two they are among, one of its patches which of the two.

    There are more dimensions than training images.
    """
    generator = torch.Generator().manual_seed(0)
    split = np.concatenate(
        [np.repeat(name, 4 * count) for name, count in (("train", train), ("val", val), ("test", test))]
    )
    images, names = len(split), [str(image) for image in range(len(split))]
    y = torch.arange(images) % 4
    pairs, cues = F.normalize(torch.randn(2, 2, dimension, generator=generator), dim=-1)
    nodes = torch.randn(images, patches + 1, dimension, generator=generator) / dimension**0.5
    nodes[:, 0] += pairs[y // 2]
    nodes[torch.arange(images), 1 + torch.randint(patches, (images,), generator=generator)] += 1.5 * cues[y % 2]
    vectors, mask = F.normalize(nodes, dim=-1).half(), torch.ones(images, patches + 1, dtype=torch.bool)
    tokens = Tokens.of({"tokens": Cells(vectors[:, 1:], (1, patches))})
    parts = Parts([Nodes(vectors, mask), Globals(vectors[:, 0]), tokens])
    return Cache([f"c{label}" for label in range(4)], names, names, names, split, y, y, 1, parts, {})


def in_sample(cache: Cache, method: str, settings: Any, fold: Tensor) -> Tensor:
    """What out_of_fold must not be: the answers of a fit to its own images."""
    model, train = load_method(method).fit(cache, settings, 0).model, cache.images("train")
    said = torch.full((len(cache.paths), 4), torch.nan)
    said[train] = predict(model, cache, train)
    return said


@METHODS
def test_what_a_probe_leaves_is_learned_beside_its_answers_out_of_fold_and_not_in_sample(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = residual()
    probe = {"method": "ridge", "settings": {"features": ["global"], "penalty": [1e-3]}}
    own = {"texts": 0, "graph": "mlp"} if method == "concept_graph" else {}
    knobs = {"with_probe": probe, "epochs": 10, "batch_size": 30, "lr": [3e-3], "hidden": 32, "dropout": 0.3, **own}
    settings = settings_of(method, **knobs)
    rival = ridge.fit(cache, settings.with_probe.block, 0).model
    assert assess_split(rival, cache, "train")[0] == 1.0
    alone = assess_split(rival, cache, "test")[0]
    assert 0.3 < alone < 0.6
    beside = assess_split(load_method(method).fit(cache, settings, 0).model, cache, "test")[0]
    assert beside > 0.85
    monkeypatch.setattr(offset, "out_of_fold", in_sample)
    monkeypatch.setattr(offset, "remembered", [])
    forgotten = replace(cache)  # its starting point is remembered too
    assert assess_split(load_method(method).fit(forgotten, settings, 0).model, cache, "test")[0] < alone + 0.05


@METHODS
@pytest.mark.parametrize("nodes", ["all", "tokens"])
def test_nodes_and_tokens_tell_the_cue_that_a_probe_does_not(method: str, nodes: str) -> None:
    cache = residual()
    own = {"texts": 0, "graph": "gcn" if nodes == "tokens" else "mlp"} if method == "concept_graph" else {}
    knobs = {"epochs": 10, "batch_size": 30, "lr": [3e-3], "hidden": 32, "dropout": 0.3, "nodes": nodes, **own}
    settings = settings_of(method, **knobs)
    reads = reads_of(method, settings)
    assert ("nodes" in reads) != ("tokens" in reads)
    fitted = quick(method, cache, **{**knobs, "start_l2": 1.0})
    assert assess_split(fitted.model, cache, "test")[0] > 0.8


@METHODS
@pytest.mark.parametrize("knobs", [{"with_probe": ON_NODES}, {"nodes": "tokens"}], ids=["with_probe", "tokens"])
def test_the_universal_tests(
    planted: Callable[[Plan], Cache], method: str, knobs: dict[str, Any], tmp_path: Path
) -> None:
    cache = planted(Plan(noise=2.0))
    cache = cache.with_part(Globals(cache.part(Nodes).nodes[:, 0].clone())) if "nodes" in knobs else cache
    knobs = {**knobs, "texts": 0} if method == "concept_graph" and "nodes" in knobs else knobs
    settings = settings_of(method, **knobs)
    fitted = load_method(method).fit(cache.only(reads_of(method, settings)), settings, 0)
    model = fitted.model.eval()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("offset.")}
    shake(model)
    images, batch = cache.images("test"), cache.batch(cache.images("test"))
    with torch.no_grad():
        output, said = model(batch), model(batch).logits
        alone = torch.cat([model(cache.batch(image[None])).logits for image in images[:8]])
        torch.testing.assert_close(alone, said[:8], atol=1e-4, rtol=1e-4)
        blind = batch.changed(y=torch.zeros_like(batch.y), target=torch.zeros_like(batch.target))
        assert torch.equal(model(blind).logits, said)
        if "nodes" in knobs:
            assert output.node_scores is None
            order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
            moved = model(batch.changed(tokens=batch.tokens[:, order])).logits
            # A grid is a graph: attention_pool alone does not look where tokens are.
            assert torch.allclose(moved, said, atol=1e-4) == (method == "attention_pool")
        else:
            torch.testing.assert_close(model(pad(batch, 3)).logits, said, atol=1e-4, rtol=1e-4)
    assert_saved(model, method, settle(settings, fitted.chosen), cache, tmp_path)

    training = cache.batch(cache.images("train")[:20])
    if "with_probe" in knobs:
        training = told(cache, method, **knobs).batch(cache.images("train")[:20])
        with pytest.raises(AttributeError, match="out_of_fold"):  # and nothing stands in for it
            model.train()(batch)
    output = model.train()(training)
    assert set(output.losses) == {"image", "graph" if method == "concept_graph" else "pooled"}
    model.zero_grad()
    total_loss(output, training.target, dict.fromkeys(output.losses, 1.0)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert sum(len(group["params"]) for group in decayed_groups(model, 0.1)) == len(trained)


@METHODS
def test_a_step_reads_nothing_that_the_probe_alone_reads(cache: Cache, method: str) -> None:
    batch = told(cache, method, with_probe=RIDGE)
    settings = settings_of(method, with_probe=RIDGE)
    seen = offset.reduce(batch, load_method(method).own_reads(settings), frozenset()).batch(torch.arange(4))  # type: ignore[attr-defined]
    assert not [name for name in seen.values if name.startswith("moments")]
    model = load_method(method).fit(cache, settings, 0).model
    plain = cache.batch(torch.arange(4))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(seen).logits, model(plain).logits, atol=1e-3, rtol=1e-3)


def test_seeds_share_a_rival_that_no_model_can_change(cache: Cache) -> None:
    probe = WithProbe.model_validate(RIDGE)
    rival = fit_rival(cache, probe)
    assert fit_rival(cache, WithProbe.model_validate(copy.deepcopy(RIDGE))) is rival
    before = rival.probe.layer.weight.clone()
    shake(rival.offset())
    assert torch.equal(rival.probe.layer.weight, before)


def test_runs_share_a_rival_where_nothing_differs_that_it_reads(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offset, "remembered", [])
    probe = WithProbe.model_validate(ON_NODES)
    rival = fit_rival(cache, probe)
    same = replace(cache, split=cache.split.copy(), target=cache.target.clone())
    assert fit_rival(same.change(Edges, weight=cache.part(Edges).weight / 2), probe) is rival
    split, target, vectors = cache.split.copy(), cache.target.clone(), cache.part(Nodes).nodes.clone()
    train = cache.images("train")
    split[train[0]], target[train[1]] = "unused", (target[train[1]] + 1) % len(cache.classes)
    others = [
        (replace(cache, split=split), probe), (replace(cache, target=target), probe),
        (replace(cache, groups=cache.image_ids), probe),
        (cache.change(Nodes, nodes=vectors), probe),  # of the same numbers, but nobody has compared them
        (cache, WithProbe.model_validate({"method": "ridge", "settings": {"penalty": [7.0]}})),
    ]  # fmt: skip
    for one, by in others:
        assert fit_rival(one, by) is not rival
    assert fit_rival(cache, probe) is rival
    del others, one, vectors
    gc.collect()
    assert fit_rival(cache, probe) is rival
    assert len(offset.remembered) == 5
    monkeypatch.setattr(offset, "REMEMBERED", 0)
    assert fit_rival(cache, probe) is rival
    assert len(offset.remembered) == 2


@METHODS
@EACH_PROBE
def test_folds_are_fitted_again_with_what_was_chosen(cache: Cache, method: str, probe: dict[str, Any]) -> None:
    choosing = replace(cache, split=np.where(np.arange(len(cache.paths)) % 5 == 0, "choose", cache.split))
    settings = settings_of(method, with_probe=probe)
    fitted = load_method(method).fit(hide_test(choosing), settings, 0)
    settled = settle(settings, fitted.chosen)
    again = load_method(method).fit(hide_test(refit(choosing)), settled, 0)  # which has no val
    names = {name for name in fitted.chosen if name.startswith("with_probe.")} - {"with_probe.temperature"}
    assert names
    assert {again.chosen[name] for name in names} == {fitted.chosen[name] for name in names}
    assert settle(settled, again.chosen) == settled


@METHODS
def test_few_images(cache: Cache, method: str) -> None:
    alone = replace(cache, groups=cache.image_ids)
    few = Shots(shots=2).apply(alone, 0)
    settings = settings_of(method, with_probe={"method": "ridge", "settings": {"penalty": [1.0]}})
    model = load_method(method).fit(hide_test(few), settings, 0).model
    assert torch.isfinite(predict(model, cache, cache.images("test"))).all()
    with pytest.raises(NotPossible, match="with_probe: no class has training images in two groups"):
        load_method(method).fit(hide_test(Shots(shots=1).apply(alone, 0)), settings, 0)
    # A class with one image: the streams learn nothing of it, and the probe does.
    train = few.images("train")
    [first, second] = train[few.y[train] == 0].tolist()
    lone = replace(few, split=np.where(np.arange(len(few.paths)) == second, "unused", few.split))
    rival = fit_rival(lone, settings.with_probe)
    assert not rival.trains[first]
    assert rival.trains.sum() == 6
    assert rival.told(lone).split[first] == "unused"


@METHODS
def test_what_cannot_be_is_one_line_with_its_key(method: str) -> None:
    def refused(**knobs: object) -> str:
        with pytest.raises(UserError) as error:
            read_settings("params.yaml", "train.runs.x", method, knobs)
        return str(error.value)

    key = "params.yaml: train.runs.x.settings.with_probe"
    what = f"{key}.method: value error, input should be a probe: balanced_probe, label_smoothing, lda,"
    assert refused(with_probe={"method": "mlp"}).startswith(what)
    assert "concept_graph" not in refused(with_probe={"method": "concept_graph"}).split("but it is")[0]
    assert refused(with_probe={"metod": "ridge"}).startswith(f"{key}.metod: unknown key; did you mean `method`?")
    unknown = refused(with_probe={"method": "ridge", "settings": {"penalti": [1.0]}})
    assert unknown == f"{key}.settings.penalti: unknown key; remove it"
    wrong = refused(with_probe={"method": "ridge", "settings": {"penalty": 3}})
    assert wrong.startswith(f"{key}.settings.penalty: input should be a valid list")
    said = refused(with_probe={"method": "ridge", "settings": {"features": ["global", "descriptions"]}})
    assert said.startswith(f"{key}.settings: value error, descriptions cannot be among them")


def test_tokens_have_no_texts() -> None:
    with pytest.raises(UserError, match=r"settings\.texts: value error, nodes: tokens have neither texts nor labels"):
        read_settings("params.yaml", "train.runs.x", "concept_graph", {"nodes": "tokens"})
    settings = read_settings("params.yaml", "train.runs.x", "concept_graph", {"nodes": "tokens", "texts": 0})
    assert reads_of("concept_graph", settings) == {"globals", "tokens"}


@METHODS
def test_the_parts_and_the_code_of_the_probe_are_the_run_s(method: str) -> None:
    alone, settings = settings_of(method), settings_of(method, with_probe=RIDGE)
    assert reads_of(method, settings) == reads_of(method, alone) | {"pooled", "moments/isqrt"}
    assert methods_of(method, settings) == (method, "ridge")
    assert methods_of(method, alone) == (method,)
