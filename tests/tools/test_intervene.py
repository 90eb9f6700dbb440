"""Interventions on a bottleneck: what is taken out is gone, and a text that tells a class apart helps."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from evaluation.statistics import bootstrap, paired_difference
from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.params import Params, load_params
from tests.training.cache import ALL, ENCODER, Plan, write_cache
from tools.intervene import Effect, describe, embed, find_rows, fit_with, intervene, refit, unused, without
from training import train
from training.data import CPU, Cache, read_cache
from training.data.bank import Bank
from training.loop import assess_split, predict
from training.methods import concept_bottleneck
from training.methods.concept_bottleneck import ConceptBottleneck, Settings
from training.regimes import Shots
from training.restore import restore

PLAN = Plan(noise=1.0, concepts=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("data")
    write_cache(folder, PLAN)
    return read_cache(folder, ENCODER, PLAN.buckets, ALL)


def fit(cache: Cache, settings: Settings | None = None) -> ConceptBottleneck:
    return cast(ConceptBottleneck, concept_bottleneck.fit(cache, settings or Settings(l2=[0.01]), 0).model)


def test_without_a_concept_its_term_is_gone_and_no_other(cache: Cache) -> None:
    model, images = fit(cache), cache.images("val")
    row = int(model.row[3])
    less = predict(without(model, [row]), cache, images)
    scores = model.standardise(cache.globals(images)) @ cache.part(Bank).K[row]
    torch.testing.assert_close(
        predict(model, cache, images) - less, scores[:, None] * model.linear.weight[:, 3].detach(), atol=1e-4, rtol=1e-4
    )
    assert model.linear.weight[:, 3].any()  # the run's own model stays


def test_a_text_that_tells_a_class_apart_helps_it(cache: Cache) -> None:
    """The bank knows nothing of a direction in which class 0 lies; the text points there."""
    images = cache.images("train")
    means = torch.stack([cache.globals(images[cache.y[images] == c]).mean(0) for c in range(4)])
    telling = F.normalize(means[0] - means[1:].mean(0), dim=0)
    bank = cache.part(Bank)
    blind = cache.change(Bank, K=F.normalize(bank.K - (bank.K @ telling)[:, None] * telling, dim=1))
    before, settings = fit(blind), Settings(l2=[0.01])
    after = fit_with(blind, settings, before, telling[None], [], 0)
    assert after.row.tolist() == [*before.row.tolist(), len(bank.K)]
    assert assess_split(after, blind, "val")[1] < assess_split(before, blind, "val")[1]
    dropped = fit_with(blind, settings, before, telling[None], [int(before.row[0])], 0)
    assert int(before.row[0]) not in dropped.row.tolist()


def test_a_text_is_set_beside_the_concepts_that_were_chosen(cache: Cache) -> None:
    """It is like all others, so that by `concepts` it would be chosen last, and it moves no other's place."""
    settings, bank = Settings(l2=[0.01], concepts=3), cache.part(Bank)
    before = fit(cache, settings)
    usual = F.normalize(bank.K[concept_bottleneck.is_concept(bank)].mean(0), dim=0)
    after = fit_with(cache, settings, before, usual[None], [], 0)
    assert after.row.tolist() == [*sorted(before.row.tolist()), len(bank.K)]
    assert torch.equal(after.K[-1], usual)
    dropped = fit_with(cache, settings, before, usual[None], [int(before.row[1])], 0)
    assert sorted(dropped.row.tolist()) == sorted({*after.row.tolist()} - {int(before.row[1])})


def test_a_text_that_no_class_has_a_weight_for_is_named(cache: Cache) -> None:
    """A vector of zeros tells no class; the other is a concept that has a weight already."""
    settings = Settings(l2=[0.01], nec=2)
    before = fit(cache, settings)
    used = int(before.linear.weight.abs().sum(0).argmax())
    vectors = torch.stack([torch.zeros_like(before.K[used]), before.K[used]])
    after = fit_with(cache, settings, before, vectors, [int(before.row[used])], 0)
    assert unused(after, ["nothing", "what was there"]) == ["no class has a weight for 'nothing': nec leaves it out"]


def write_run(folder: Path, regime: dict[str, object], **settings: object) -> tuple[Params, str]:
    """A cache in `folder`/data, in whose index two pictures are a track, and a trained run `mine` under a regime."""
    write_cache(folder / "data", PLAN)
    index, schema = folder / "data/index/images.parquet", "index.images/1"
    rows = [{**row, "group": f"{row['class_id']} {number // 2}"}
            for number, row in enumerate(store.read_table(index, schema).to_pylist())]  # fmt: skip
    store.write_table(store.make_table(schema, rows), index, schema, {}, store.read_header(index, schema).fingerprint)
    run = {"method": "concept_bottleneck", "encoder": ENCODER, "settings": {"l2": [0.01], **settings}}
    content = {
        "domain": {"noun": "fish", "group": "fish"},
        "dataset": {"root": "data/raw", "buckets": PLAN.buckets},
        "llm": {"model": "none"},
        "encoders": {ENCODER: {"model": "none"}},
        "report": {"reference": "mine"},
        "train": {"seed": 3, "seeds": 1, "runs": {"mine": run}, "regime": regime},
    }
    path = folder / "params.yaml"
    path.write_text(json.dumps(content))
    params = load_params(path)
    train.train(params, str(path), "mine", folder / "data")
    return params, str(path)


def test_a_run_of_few_shots_is_fitted_anew_on_these_alone(tmp_path: Path) -> None:
    params, path = write_run(tmp_path, {"kind": "shots", "shots": 2})
    asked = restore(params, path, "mine", tmp_path / "data")
    cache = read_cache(tmp_path / "data", ENCODER, PLAN.buckets, asked.reads)
    few = Shots(shots=2).apply(cache, 3).images("train")
    assert len(few) == 8
    after = refit(params, path, asked, cache, cache.part(Bank).K[:1], [])
    torch.testing.assert_close(after.standardise.mean, cache.globals(few).mean(0))
    # A text that says nothing changes nothing: what was trained is found again.
    same = refit(params, path, asked, cache, torch.zeros(1, PLAN.dimension), [])
    images = cache.images("test")
    torch.testing.assert_close(predict(same, cache, images), predict(asked.model, cache, images), atol=1e-3, rtol=1e-3)


def test_what_is_said_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, path = write_run(tmp_path, {"kind": "full"}, nec=2)
    monkeypatch.chdir(tmp_path)
    said = intervene(params, path, "mine", ["class-00 visual 0"], [], "cpu").splitlines()
    assert re.fullmatch(r"16 pictures of val: .* \[.*\] \(95 % over \d groups\)", said[0])
    monkeypatch.setattr("tools.intervene.embed", lambda *asked: torch.zeros(1, PLAN.dimension))
    said = intervene(params, path, "mine", [], ["nothing"], "cpu").splitlines()
    assert said[0] == "no class has a weight for 'nothing': nec leaves it out"
    assert "+0.0 [" in said[1]


def write_header(name: str, encoder: str) -> None:
    """What data/embed/NAME/images says of its encoder, without a row."""
    empty = store.arrow_schema("embed.nodes/1", 8).empty_table()
    for bucket in range(4):
        path = store.bucket_path(Path(f"data/embed/{name}/images"), bucket)
        store.write_table(empty, path, "embed.nodes/1", {"encoder": encoder}, encoder)


def test_texts_are_embedded_by_the_encoder_of_the_pictures_alone(
    set_params: Callable[..., Params], models: dict[str, Path]
) -> None:
    """An encoder with a tower beside it, as the stages load it."""
    torch.save(torchvision.models.resnet18().state_dict(), "tower.pth")
    tower = {"library": "torchvision", "model": "resnet18", "pretrained": "tower.pth", "image_size": 64}
    mine = {"model": f"local-dir:{models['vit']}", "batch_size": 4, "dense": {"proxy": "cnn"}}
    params = set_params(encoders={"mine": mine}, towers={"cnn": tower})
    encoder = load_encoder("mine", params.encoder("mine"), CPU, params.towers)
    write_header("mine", encoder.fingerprint)
    vectors = embed(params, "mine", ["a fish", "a bird"], CPU)
    torch.testing.assert_close(vectors, F.normalize(encoder.embed_texts(["a fish", "a bird"]), dim=1))
    write_header("mine", "another")
    with pytest.raises(UserError, match=r"data/embed/mine/images: was made with another mine .* run embed_images"):
        embed(params, "mine", ["a fish"], CPU)


def test_texts_are_found_whatever_their_case_and_others_are_named() -> None:
    texts = ["Red", None, "a yellow tail", "a blue tail"]
    assert find_rows(texts, [1, 2, 3], ["A yellow tail"]) == [2]
    with pytest.raises(UserError, match=r"reads no concept 'a yellow tale'; it reads: a yellow tail"):
        find_rows(texts, [1, 2, 3], ["a yellow tale"])
    with pytest.raises(UserError, match=r"reads no concept 'red'"):  # in the bank, and not read
        find_rows(texts, [1, 2, 3], ["red"])


def test_the_table_has_the_class_that_loses_most_on_top() -> None:
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    before = 5 * F.one_hot(y, 4).float()
    after = before.clone()
    after[2, 1], after[2, 0] = 0, 1
    said = describe(Effect(before, after, y), ["ant", "bee", "cat", "none"]).splitlines()
    assert said[0].startswith("6 pictures of val: 100.0 % before, 83.3 % after: -16.7 [")
    assert said[0].endswith("] (95 % over 6 pictures)")
    rows = [line.split() for line in said if line.startswith(("ant", "bee", "cat", "none"))]
    assert [row[0] for row in rows] == ["bee", "ant", "cat"]  # none has no picture
    assert rows[0][1:4] == ["2", "100.0", "50.0"]
    # Of one picture of two: -5 in its own logit, and (-5 + 1) / 4 in the mean.
    assert float(rows[0][4]) == pytest.approx((-5 + 1) / 2, abs=0.006)


def judged(groups: np.ndarray | None) -> tuple[str, np.ndarray, Tensor]:
    """The first line for 60 pictures, of which the intervention costs nine and gives one; the gains; the truth."""
    y = torch.arange(60) % 3
    right = F.one_hot(y, 3).float()
    before, after = right.clone(), right.clone()
    before[50], after[:9] = right[51], right[1:10]
    gain = (after.argmax(1) == y).double() - (before.argmax(1) == y).double()
    assert gain.sum() == -8
    return describe(Effect(before, after, y, groups), list("abc")).splitlines()[0], gain.numpy(), y


def ends(line: str) -> list[float]:
    found = re.search(r"\[(\S+), (\S+)\] \(95 % over", line)
    assert found is not None
    return [float(end) for end in found.groups()]


def test_the_interval_holds_95_of_100_draws() -> None:
    line, gain, _ = judged(None)
    drawn = bootstrap(gain[None, None].astype(np.float32), np.arange(60), 10_000, 0)[:, 0]
    assert ends(line) == pytest.approx(100 * np.quantile(drawn, [0.025, 0.975]), abs=0.06)
    assert line.endswith("(95 % over 60 pictures)")


def test_groups_are_drawn_whole_where_there_are_any() -> None:
    groups = np.arange(60) // 10
    (line, gain, y), alone = judged(groups), judged(None)[0]
    found = paired_difference(gain >= 0, gain <= 0, y.numpy(), groups).groups
    assert found is not None
    assert ends(line) == pytest.approx([100 * end for end in found], abs=0.06)
    assert line.endswith("(95 % over 6 groups)")
    assert ends(line)[0] < ends(alone)[0]  # the nine are of one track
