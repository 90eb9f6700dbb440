"""Three inputs, a network each, and their mean; guesses that are ranked, padded and made without a model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from tests.training.methods.test_universal import change, quick, shake
from training.class_texts import class_texts
from training.data import Cache
from training.data.asked import Asked
from training.loop import assess_split, predict, total_loss
from training.methods import reads_of
from training.methods.tape import Settings, Tape, fill_places, nearest_classes

Planted = Callable[[Plan], Cache]
GUESSES, REASONS = "asked/guess/guesses", "asked/guess/reasons"
ASKED = {"guesses": GUESSES, "explanation": [REASONS]}


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return planted(Plan())


def fitted(cache: Cache, **knobs: Any) -> Tape:
    """Of no epochs, with every weight moved from where it starts."""
    model = quick("tape", cache, **{"epochs": 0, **knobs}).model
    shake(model)
    assert isinstance(model, Tape)
    return model.eval()


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_what_each_network_says(cache: Cache) -> None:
    model, batch = fitted(cache, **ASKED), cache.batch(cache.images("test"))
    given, around = model.inputs(batch), model.memory.around(batch, 2)
    said = []
    for name in ("features", "explanation", "guesses"):
        x = torch.cat([given[name], model.get_buffer(f"sent_{name}")[around.rows]])
        said.append(model.answers[name](x, around.hops()))
    torch.testing.assert_close(model(batch).logits, (said[0] + said[1] + said[2]) / 3)


@torch.no_grad()
def test_networks_that_say_the_same_say_it_together(cache: Cache) -> None:
    model = fitted(cache, features=["global"], explanation=["global"], guesses=None)
    model.answers["explanation"].load_state_dict(model.answers["features"].state_dict())
    batch = cache.batch(cache.images("test"))
    one, other = model.by_input(batch)
    assert torch.equal(one, other)
    torch.testing.assert_close(model(batch).logits, one)


@torch.no_grad()
def test_who_has_no_guess_is_told_the_same_whoever_it_is(cache: Cache) -> None:
    model = fitted(cache, **ASKED, conv=None)
    none = torch.zeros(5, 5, dtype=torch.long)
    said = model.answers["guesses"](none, None)
    torch.testing.assert_close(said, said[:1].expand(5, -1))
    guessed = none.clone()
    guessed[1, 2] = 3
    assert not torch.allclose(model.answers["guesses"](guessed, None)[1], said[1])


def test_a_cache_in_another_order_is_told_in_that_order(cache: Cache) -> None:
    model, order = fitted(cache, **ASKED), torch.randperm(len(cache.paths), generator=torch.Generator().manual_seed(0))
    every = torch.arange(len(order))
    torch.testing.assert_close(predict(model, cache.take(order), every), predict(model, cache, every)[order])


def test_guesses_without_a_model_are_the_nearest_texts(cache: Cache) -> None:
    g, text = cache.globals(torch.arange(20)), class_texts(cache, "names")
    found = nearest_classes(g, text, 3)
    for image, guessed in enumerate(found.tolist()):
        cosine = [float(g[image].double() @ each.double()) for each in text]
        assert guessed == [1 + place for place in sorted(range(4), key=lambda place: -cosine[place])][:3]
    # More places than classes: the rest is none.
    assert nearest_classes(g, text, 6)[:, 4:].eq(0).all()
    assert nearest_classes(g, text, 6)[:, :3].equal(found)


def test_places_are_cut_and_filled() -> None:
    guesses = torch.tensor([[3, 1, 0], [2, 0, 0]])
    assert fill_places(guesses, 2).tolist() == [[3, 1], [2, 0]]
    assert fill_places(guesses, 4).tolist() == [[3, 1, 0, 0], [2, 0, 0, 0]]


def test_what_was_answered_reaches_the_networks(cache: Cache) -> None:
    model, batch = fitted(cache, **ASKED), cache.batch(torch.arange(30))
    given, part = model.inputs(batch), cache.part(Asked)
    assert given["guesses"].tolist() == F.pad(part.guesses["guess/guesses"][:30].long(), (0, 2)).tolist()
    d, dm = part.said["guess/reasons"]
    mean = torch.stack([F.normalize(d[i][dm[i]].float().sum(0), dim=0) for i in range(30)])
    scale = model.inputs.features["explanation"].standardise[0]
    torch.testing.assert_close(given["explanation"], (mean - scale.mean) / scale.scale, atol=1e-5, rtol=1e-5)
    unanswered = ~dm[:30].any(1)
    assert unanswered.any()
    assert (given["guesses"][unanswered] == 0).all()


def test_what_was_answered_by_a_prompt_that_knows_the_class_is_refused(cache: Cache) -> None:
    told = cache.change(Asked, told={"guess": torch.ones(len(cache.paths), dtype=torch.bool)})
    for knobs in ({"guesses": GUESSES}, {"explanation": [REASONS]}):
        with pytest.raises(UserError, match=r"asked/guess/\w+: the prompt of this question is told the class"):
            fitted(told, **knobs)


def test_each_network_has_a_cross_entropy_of_its_own(cache: Cache) -> None:
    model, batch = fitted(cache, dropout=0.0), cache.batch(cache.images("train"))
    output = model.train()(batch)
    by_input = model.by_input(batch)
    expected = F.cross_entropy(by_input.mean(0), batch.target)
    expected = expected + 0.7 * sum(F.cross_entropy(each, batch.target) for each in by_input)
    torch.testing.assert_close(total_loss(output, batch.target, {"apart": 0.7}), expected)


@pytest.mark.parametrize("conv", ["sage", None])
def test_a_batch_of_one_image_is_trained_on(cache: Cache, conv: str | None) -> None:
    model, batch = fitted(cache, **ASKED, conv=conv).train(), cache.batch(cache.images("train")[:1])
    output = model(batch)
    assert output.logits.shape == (1, 4)
    assert torch.isfinite(total_loss(output, batch.target, {"apart": 1.0}))


def test_without_convolutions_no_link_is_read(cache: Cache) -> None:
    assert reads_of("tape", Settings(conv=None)) == {"globals", "names", "owners"}
    assert reads_of("tape", Settings()) == {"globals", "names", "owners", "links/near"}
    assert reads_of("tape", Settings(**ASKED)) == {"globals", "asked/guess", "links/near"}
    model, other = fitted(cache, conv=None), change(cache, {"links"})
    images = cache.images("test")
    assert torch.equal(predict(model, other, images), predict(model, cache, images))


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{"guesses": GUESSES}, {"guesses": None, "explanation": [REASONS]}])
def test_answers_that_tell_the_class_are_found_and_others_are_not(planted: Planted, knobs: dict[str, Any]) -> None:
    """What the picture shows is noise, and its links come from any class."""
    by_told = [
        accuracy("tape", planted(Plan(cue="none", linked=0.25, train=40, val=15, test=40, told=told)), **knobs)
        for told in (False, True)
    ]
    assert by_told[0] < 0.4
    assert by_told[1] > 0.65  # of the first guesses, with one in eleven images unanswered, 0.73 are right


def test_beside_a_probe_it_learns_what_the_probe_leaves(planted: Planted) -> None:
    cache = planted(Plan(cue="none", linked=0.25, train=40, val=15, test=40, told=True))
    ridge = {"method": "ridge", "settings": {"features": ["global"], "penalty": [1.0]}}
    probe = assess_split(quick("ridge", cache, **ridge["settings"]).model, cache, "test")[0]
    assert accuracy("tape", cache, guesses=GUESSES, with_probe=ridge) > probe + 0.25


def accuracy(method: str, cache: Cache, **knobs: Any) -> float:
    fit = {"epochs": 12, "lr": [1e-2], "hidden": 32, "dropout": 0.5, **knobs}
    return assess_split(quick(method, cache, **fit).model, cache, "test")[0]


@pytest.mark.slow
def test_links_that_carry_the_class_help_and_others_do_not(planted: Planted) -> None:
    plan = Plan(cue="global", noise=2.5, train=40, val=15, test=40, links=10)
    linked, mixed, alone = (
        accuracy("tape", planted(replace(plan, linked=share)), conv=conv)
        for share, conv in ((1.0, "sage"), (0.25, "sage"), (0.25, None))
    )
    assert linked > alone + 0.1
    assert mixed < alone + 0.05


@pytest.mark.parametrize(
    "given",
    [
        {"features": None, "guesses": None},
        {"guesses": "nearest"},
        {"guesses": "asked/guess"},
        {"explanation": []},
        {"conv": "gat", "hidden": 30},
        {"conv": None, "sources": "all"},
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"switched off|asked/NAME/FIELD|at least 1|do not divide|reads none"):
        Settings(**given)

