"""The ladder beside an encoder's layers: its gates, its exits, its rungs without links, and what it finds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import quick, quick_settings, shake
from training.data import Cache
from training.data.links import Incoming, Links
from training.data.moments import Moments
from training.layers.states import state_of
from training.loop import assess_split, predict, total_loss
from training.methods import engine
from training.methods.engine import Engine, Settings, agreed, mean_around

Planted = Callable[[Plan], Cache]
STATES = ["isqrt", "pooled", "global"]


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return planted(Plan())


def fitted(cache: Cache, **knobs: Any) -> Engine:
    """Of no epochs, with every weight moved from where it starts."""
    model = quick("engine", cache, **{"states": STATES, "epochs": 0, **knobs}).model
    shake(model)
    assert isinstance(model, Engine)
    return model.eval()


def said(model: Engine, cache: Cache) -> Tensor:
    return predict(model, cache, cache.images("test"))


def with_other(cache: Cache, *names: str) -> Cache:
    """The cache with other vectors of these NAMEs of moments."""
    vectors = dict(cache.part(Moments).vectors)
    for name in names:
        vectors[name] = vectors[name].flip(0)
    return cache.with_part(cache.part(Moments).changed({f"moments/{name}": value for name, value in vectors.items()}))


def turned(model: Engine, rung: int, alpha: float) -> Engine:
    with torch.no_grad():
        gate = model.rungs[rung].alpha
        assert gate is not None
        gate.fill_(alpha)
    return model


def resent(model: Engine, cache: Cache, settings: Settings) -> Engine:
    """The same weights over what is known of another cache."""
    known, state = engine.Known.of(cache, settings), state_of(model)
    state |= {f"rungs.{rung}.sent": value for rung, value in enumerate(known.states)}
    made = engine.build(state, settings, len(cache.classes))
    made.load_state_dict(state)
    return made.eval()


@pytest.mark.parametrize(("alpha", "seen", "unseen"), [(1e4, "isqrt", "pooled"), (-1e4, "pooled", "isqrt")])
def test_a_gate_at_its_end_lets_the_layer_through_alone_or_what_is_below(
    cache: Cache, alpha: float, seen: str, unseen: str
) -> None:
    states = ["pooled", "isqrt"]
    settings, model = quick_settings("engine", states=states), turned(fitted(cache, states=states), 1, alpha)
    for name, same in ((unseen, True), (seen, False)):
        changed = with_other(cache, name)
        assert torch.equal(said(resent(model, changed, settings), changed), said(model, cache)) is same


def test_gates_start_half_open(cache: Cache) -> None:
    model = quick("engine", cache, states=STATES, epochs=0).model
    assert model.rungs[0].alpha is None
    assert [float(rung.alpha) for rung in model.rungs[1:]] == [0.0, 0.0]


def unlinked(cache: Cache) -> Cache:
    """Nobody sends."""
    none = {
        name: Incoming(torch.zeros_like(edges.start), edges.source[:0], edges.weight[:0])
        for name, edges in cache.part(Links).incoming.items()
    }
    return cache.change(Links, incoming=none)


@pytest.mark.parametrize("conv", ["gcn", "sage"])
def test_without_links_it_is_a_network_of_each_image_alone(cache: Cache, conv: str) -> None:
    alone = unlinked(cache)
    model = fitted(alone, conv=conv)
    batch, h = alone.batch(alone.images("test")), None
    for rung, x in zip(model.rungs, (batch.moments["isqrt"], batch.pooled, batch.g), strict=True):
        u = rung.project((x - rung.scale.mean) / rung.scale.scale)
        if h is not None:
            gate = 1 / (1 + torch.exp(-rung.alpha / 0.1))
            u = gate * u + (1 - gate) * h
        inner = F.relu(of_itself(rung.narrow, u, conv))
        h = of_itself(rung.widen, inner, conv)
    assert h is not None
    expected = model.classify[0](torch.cat([h, h], dim=1))
    torch.testing.assert_close(said(model, alone), expected, atol=1e-5, rtol=1e-5)


def of_itself(layer: Any, x: Tensor, conv: str) -> Tensor:
    """What a convolution makes of a node that hears nobody."""
    if conv == "gcn":
        return x @ layer.lin.weight.T + layer.bias
    return x @ layer.lin_root.weight.T + layer.lin_rel.bias


def leave_by_loop(said: list[list[int]]) -> list[int]:
    """The class that each image is answered by: rung by rung, an image that has left stays as it left."""
    answer, left = [None] * len(said[0]), [False] * len(said[0])
    for rung, classes in enumerate(said):
        for image, now in enumerate(classes):
            if not left[image]:
                answer[image] = now
                left[image] = rung > 0 and now == said[rung - 1][image]
    return answer


def as_logits(classes: list[list[int]]) -> list[Tensor]:
    """Of rungs, logits (B, 3) that name these classes."""
    return [F.one_hot(torch.tensor(rung), 3).float() for rung in classes]


def answers(classes: list[list[int]]) -> list[int]:
    leave = agreed(as_logits(classes)).clamp(max=len(classes) - 1).tolist()
    return [classes[rung][image] for image, rung in enumerate(leave)]


def test_an_image_leaves_once_and_is_never_overwritten() -> None:
    """The third image agrees at the second rung, and again, about another class, at the last."""
    classes = [[0, 1, 2, 0], [1, 1, 2, 1], [1, 2, 0, 2], [1, 2, 0, 0]]
    assert answers(classes) == leave_by_loop(classes) == [1, 1, 2, 0]
    drawn = torch.randint(0, 3, (5, 200), generator=torch.Generator().manual_seed(0)).tolist()
    assert answers(drawn) == leave_by_loop(drawn)


def test_who_never_agrees_has_not_left() -> None:
    assert agreed(as_logits([[0, 1], [1, 1], [0, 1]])).tolist() == [3, 1]
    assert agreed(as_logits([[0, 1]])).tolist() == [1, 1]


def test_exits_answer_by_their_rungs_and_the_last_one_is_the_whole_ladder(cache: Cache) -> None:
    model, batch = fitted(cache, early_exit=True), cache.batch(cache.images("test"))
    with torch.no_grad():
        by_rung = list(model.climb(batch))
    assert len(by_rung) == len(STATES)
    leave = agreed(by_rung)
    assert len(leave.unique()) > 1
    expected = torch.stack([by_rung[min(rung, 2)][image] for image, rung in enumerate(leave.tolist())])
    assert torch.equal(said(model, cache), expected)
    # The same weights with no other exit than the last.
    state = {name: value for name, value in state_of(model).items() if not name.startswith("classify.")}
    state |= {f"classify.0.{name}": value for name, value in state_of(model.classify[-1]).items()}
    whole = engine.build(state, quick_settings("engine", states=STATES), len(cache.classes))
    whole.load_state_dict(state)
    assert torch.equal(said(whole.eval(), cache), by_rung[-1])


def test_no_rung_is_climbed_above_the_one_where_all_have_left(cache: Cache) -> None:
    model = fitted(cache, early_exit=True)
    climbed: list[int] = []
    for number, head in enumerate(model.classify):
        head.register_forward_hook(lambda *_, number=number: climbed.append(number))
    for image in cache.images("test"):
        batch = cache.batch(image[None])
        climbed.clear()
        model(batch)
        rungs = climbed.copy()
        with torch.no_grad():
            leave = int(agreed(list(model.climb(batch))))
        assert rungs == list(range(min(leave + 1, len(STATES))))


def test_what_is_looked_up_is_what_is_reached(cache: Cache) -> None:
    """Training goes all the way to whoever sends; evaluation takes what these hold as it was found once."""
    model, batch = fitted(cache, dropout=0.0, early_exit=True), cache.batch(cache.images("test"))
    with torch.no_grad():
        looked_up = torch.stack(list(model.climb(batch)))
        reached = torch.stack(list(model.train().climb(batch)))
    torch.testing.assert_close(looked_up, reached, atol=1e-4, rtol=1e-4)


def test_every_exit_is_trained(cache: Cache) -> None:
    model, batch = fitted(cache, early_exit=True, dropout=0.0), cache.batch(cache.images("train"))
    output = model.train()(batch)
    by_rung = model.climb(batch)
    expected = sum(F.cross_entropy(each, batch.target) for each in by_rung)
    torch.testing.assert_close(total_loss(output, batch.target, {"exits": 1.0}), expected)
    assert fitted(cache).train()(batch).losses == {}


def test_the_mean_around_an_image_equals_a_loop(cache: Cache) -> None:
    model, batch = fitted(cache), cache.batch(cache.images("test"))
    around = model.memory.around(batch, 1)
    h = torch.randn(around.nodes[1], 5, generator=torch.Generator().manual_seed(0))
    found = mean_around(h, around.hops()[0])
    for image in range(len(batch.y)):
        heard = [h[image]] + [h[sender] for sender, to in around.edges_in.T.tolist() if to == image]
        torch.testing.assert_close(found[image], torch.stack(heard).mean(0))


def test_states_that_are_kept_are_those_of_the_cache(cache: Cache) -> None:
    model, train = fitted(cache), cache.images("train")
    batch = cache.batch(train)
    order = batch.key.argsort()
    assert torch.equal(model.memory.key, batch.key[order])
    for rung, x in zip(model.rungs, (batch.moments["isqrt"], batch.pooled, batch.g), strict=True):
        assert torch.equal(rung.sent, x[order])


@pytest.mark.slow
def test_it_finds_the_class_in_the_layer_that_shows_it(planted: Planted) -> None:
    """Global vectors and their links say nothing; the pooled vector does, whichever rung it stands on."""
    cache = planted(Plan(cue="none", linked=0.25, train=40, val=15, test=40))
    knobs = {"epochs": 20, "lr": [1e-2], "hidden": 32}
    blind, low, high = (
        assess_split(quick("engine", cache, states=states, **knobs).model, cache, "test")[0]
        for states in (["global"], ["pooled", "global"], ["global", "pooled"])
    )
    assert blind < 0.4
    assert min(low, high) > 0.8


def test_beside_a_probe_it_learns_what_the_probe_leaves(planted: Planted) -> None:
    cache = planted(Plan(cue="none", linked=0.25, train=40, val=15, test=40))
    ridge = {"method": "ridge", "settings": {"features": ["global"], "penalty": [1.0]}}
    probe = assess_split(quick("ridge", cache, **ridge["settings"]).model, cache, "test")[0]
    knobs = {"states": ["pooled", "global"], "epochs": 20, "lr": [1e-2], "hidden": 32, "with_probe": ridge}
    assert assess_split(quick("engine", cache, **knobs).model, cache, "test")[0] > probe + 0.25


@pytest.mark.slow
def test_links_that_carry_the_class_help_and_others_do_not(planted: Planted) -> None:
    plan = Plan(cue="global", noise=2.5, train=40, val=15, test=40, links=10)
    knobs = {"states": ["global"], "epochs": 20, "lr": [1e-2], "hidden": 32}
    linked, mixed = (
        assess_split(quick("engine", cache, **knobs).model, cache, "test")[0]
        for cache in (planted(replace(plan, linked=1.0)), planted(replace(plan, linked=0.25)))
    )
    probe = assess_split(quick("linear_probe", planted(plan)).model, planted(plan), "test")[0]
    assert linked > probe + 0.1
    assert mixed < probe + 0.05


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"states": ["no such/layer"]}, "cls/LAYER"),
        ({"states": ["global", "inherited/near"]}, "inherited/near is handed on by .*, and no state of a layer"),
        ({"hidden": 33}, "half as wide"),
        ({"conv": "gat", "hidden": 12}, "do not divide"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**given)


def test_what_was_found_is_found_anew_when_weights_are_loaded(cache: Cache) -> None:
    model, other = fitted(cache), fitted(cache)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.equal(said(model, cache), said(other, cache))
    model.load_state_dict(other.state_dict())
    assert torch.equal(said(model, cache), said(other, cache))
