"""Answers to questions of one's own, as a part of the cache."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fieldmark.command import UserError, say_once
from fieldmark.params import NONE, Ask
from fieldmark.store import make_table, read_table, write_table
from tests.training.cache import ENCODER, Plan, write_cache
from training.controls import Control
from training.data import feature_blocks, read_cache, words_behind
from training.data.asked import MOST, Asked, classes_guessed, texts_said
from training.inputs import Reading, check_questions, check_told, reading_of
from training.methods import load_method
from training.offset import WithProbe
from training.regimes import (
    Folds,
    Full,
    LongTail,
    Noise,
    Partial,
    Regime,
    Shots,
    hide_test,
    restrict_classes,
)

PLAN = Plan(classes=4, train=4, val=2, test=2, dimension=8, views=2, told=True)
READS = frozenset({"globals", "asked/guess"})


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    write_cache(folder, PLAN)
    return folder


@pytest.fixture
def folder(planted_folder: Path, tmp_path: Path) -> Path:
    say_once.cache_clear()
    return Path(shutil.copytree(planted_folder, tmp_path / "data"))


def rewrite(folder: Path, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], **made_by: Any) -> None:
    path = folder / "asked/guess/texts.parquet"
    rows = edit(read_table(path, "asked/1").to_pylist())
    params = {"subject": "image", "guesses": "guesses", "mask": True, "told": False, **made_by}
    write_table(make_table("asked/1", rows), path, "asked/1", params, "edited")


def test_texts_and_guesses_arrive_at_their_images_in_the_order_of_their_rank(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    rows = read_table(folder / "asked/guess/texts.parquet", "asked/1").to_pylist()
    texts = read_table(folder / f"asked/guess/vectors/{ENCODER}.parquet", "embed.text/1").to_pylist()
    vector_of = {row["text"]: np.array(row["vector"], np.float32) for row in texts}
    images = torch.arange(len(cache.paths))
    batch = cache.batch(images, torch.ones_like(images))
    vectors, mask = texts_said(batch, "guess", "reasons")
    guesses = classes_guessed(batch, "guess", "guesses")
    assert (vectors.dtype, mask.dtype, guesses.dtype) == (torch.float32, torch.bool, torch.int64)
    assert vectors.shape == (len(images), 2, PLAN.dimension)
    assert guesses.shape == (len(images), 3)
    wrong = 0
    for place, image_id in enumerate(cache.image_ids):
        of_image = [(row["field"], row["text"]) for row in rows if row["subject_id"] == image_id]
        reasons, named = ([text for field, text in of_image if field == each] for each in ("reasons", "guesses"))
        assert mask[place].tolist() == [True] * len(reasons) + [False] * (2 - len(reasons))
        for number, text in enumerate(reasons):
            np.testing.assert_array_equal(vectors[place, number].numpy(), vector_of[text])
        assert vectors[place, len(reasons) :].abs().sum() == 0
        expected = [cache.classes.index(text.lower()) + 1 if text != "a shoe" else 0 for text in named]
        assert guesses[place].tolist() == expected + [0] * (3 - len(named))
        wrong += named.count("a shoe")
    count = sum(row["field"] == "guesses" for row in rows)
    assert wrong > 0
    said = capsys.readouterr().err
    assert f"asked/guess/texts.parquet: of {count} guesses in 'guesses' {wrong} name no class, and count as no" in said
    # Kept as arrays, it says the same, once in a process.
    read_cache(folder, ENCODER, PLAN.buckets, READS)
    assert capsys.readouterr().err == ""
    say_once.cache_clear()
    again = read_cache(folder, ENCODER, PLAN.buckets, READS)
    assert capsys.readouterr().err == said
    assert torch.equal(classes_guessed(again.batch(images), "guess", "guesses"), guesses)
    assert {"asked/guess/texts.parquet", f"asked/guess/vectors/{ENCODER}.parquet"} <= again.fingerprints.keys()
    few = cache.take(torch.tensor([5, 2])).batch(torch.tensor([1, 0]))
    assert torch.equal(texts_said(few, "guess", "reasons")[0], vectors[[2, 5]])
    assert torch.equal(classes_guessed(few, "guess", "guesses"), guesses[[2, 5]])


def test_samples_follow_each_other_and_a_loop_is_cut(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    first, second = cache.image_ids[:2]

    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = [row["text"] for row in rows if row["field"] == "reasons"][:2]
        rows = [row for row in rows if row["field"] == "guesses" or row["subject_id"] not in (first, second)]
        of = {"field": "reasons", "rank": 0}
        rows += [{**of, "subject_id": first, "sample": sample, "text": text} for sample, text in enumerate(texts)]
        repeated = [{"field": "reasons", "sample": 0, "subject_id": second, "text": texts[0]} for _ in range(MOST + 9)]
        return rows + [{**row, "rank": rank} for rank, row in enumerate(repeated)]

    rewrite(folder, edit)
    batch = read_cache(folder, ENCODER, PLAN.buckets, READS).batch(torch.arange(2))
    vectors, mask = texts_said(batch, "guess", "reasons")
    assert mask.sum(1).tolist() == [2, MOST]
    assert not torch.equal(vectors[0, 0], vectors[0, 1])
    assert torch.equal(vectors[0, 0], vectors[1, MOST - 1])


def test_where_classes_are_left_out_guesses_of_them_are_none(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    kept = ["class-00", "class-02", "class-03"]
    few = restrict_classes(cache, kept)
    places = [cache.paths.index(path) for path in few.paths]
    before = classes_guessed(cache.batch(torch.tensor(places)), "guess", "guesses")
    after = classes_guessed(few.batch(torch.arange(len(places))), "guess", "guesses")
    moved = {0: 0, 1: 1, 2: 0, 3: 2, 4: 3}
    assert after.tolist() == [[moved[guess] for guess in row] for row in before.tolist()]
    assert (before == 2).any()


def test_a_field_or_question_that_is_not_there_is_one_clear_line(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    batch = cache.batch(torch.arange(2))
    with pytest.raises(UserError, match=r"has no texts in a field 'reason'; its fields: guesses, reasons"):
        texts_said(batch, "guess", "reason")
    with pytest.raises(UserError, match=r"has no texts in a field 'guesses'"):
        texts_said(batch, "guess", "guesses")
    with pytest.raises(UserError, match=r"has no guesses of classes in a field 'reasons'"):
        classes_guessed(batch, "guess", "reasons")
    blind = cache.only({"globals"}).batch(torch.arange(2))
    for look in (lambda: texts_said(blind, "guess", "reasons"), lambda: classes_guessed(blind, "guess", "guesses")):
        with pytest.raises(UserError, match=r"asked/guess: is a part that the method's READS does not name; add it"):
            look()
    assert cache.only({"asked"}).part(Asked).said.keys() == {"guess/reasons"}
    assert cache.only({"asked/other"}).part(Asked).tensors() == {}
    with pytest.raises(UserError, match=r"data/asked/other/texts\.parquet: is missing"):
        read_cache(folder, ENCODER, PLAN.buckets, {"globals", "asked/other"})
    with pytest.raises(UserError, match=r"READS: `asked` alone names no question; say asked/NAME"):
        read_cache(folder, ENCODER, PLAN.buckets, {"globals", "asked"})


def test_a_question_about_classes_and_texts_without_vectors_are_refused(folder: Path) -> None:
    def more(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        [first, *_] = [row for row in rows if row["field"] == "reasons"]
        return [*rows, {**first, "rank": 5, "text": "never embedded"}]

    rewrite(folder, more)
    with pytest.raises(UserError, match=r"vectors/tiny\.parquet: lacks 1 texts of .*; run embed_asked again"):
        read_cache(folder, ENCODER, PLAN.buckets, READS)
    rewrite(folder, lambda rows: rows, subject="class")
    with pytest.raises(UserError, match=r"is of a question about each class, and a run reads what was asked of images"):
        read_cache(folder, ENCODER, PLAN.buckets, READS)


def test_texts_that_know_the_class_are_no_feature(folder: Path) -> None:
    rewrite(folder, lambda rows: rows, told=True)
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    batch = cache.batch(cache.images("train"))
    assert texts_said(batch, "guess", "reasons")[1].any()  # what a method may learn from
    assert batch.of("asked_told/guess").all()
    with pytest.raises(UserError, match=r"asked/guess/reasons: the prompt of this question is told the class"):
        feature_blocks("asked/guess/reasons", batch)


@pytest.mark.parametrize("told", [True, False])
def test_a_fit_sees_nothing_that_knows_the_class_of_images_that_are_judged(folder: Path, told: bool) -> None:
    rewrite(folder, lambda rows: rows, told=told)
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    fit, images = hide_test(cache), torch.arange(len(cache.paths))
    whole, seen = cache.batch(images), fit.batch(images)
    hidden = torch.from_numpy(fit.split == "hidden")
    assert 0 < hidden.sum() < len(hidden)
    for name in ("asked/guess/reasons", "asked_mask/guess/reasons", "asked/guess/guesses"):
        assert torch.equal(seen.of(name)[~hidden], whole.of(name)[~hidden])
        assert whole.of(name)[hidden].any()
        assert seen.of(name)[hidden].any() != told


@pytest.fixture
def reading() -> Reading:
    settings = load_method("linear_probe").Settings(features=["global", "asked/guess/reasons"])
    return reading_of("linear_probe", settings, ENCODER, (), Control(), Full())


ONE = Ask(prompt="prompts/guess.md", links=NONE)


def test_a_run_that_reads_what_nobody_asks_is_one_line(reading: Reading) -> None:
    check_questions("params.yaml", "train.runs.one", {"guess": ONE}, reading, Folds())
    with pytest.raises(UserError, match=r"^params\.yaml: train\.runs\.one\.settings: reads asked/guess, which is no"):
        check_questions("params.yaml", "train.runs.one", {"other": ONE}, reading, Full())


NOISE = Noise(wrong="symmetric", share=0.2)


@pytest.mark.parametrize("regime", [Folds(), Shots(shots=1), LongTail(exponent=1.0), NOISE])
def test_texts_of_neighbours_are_read_where_no_image_is_hidden(reading: Reading, regime: Regime) -> None:
    of_two = {"guess": Ask(prompt="prompts/mixup.md", links="data/links/near.parquet")}
    check_questions("params.yaml", "train.runs.one", of_two, reading, Full())
    with pytest.raises(UserError, match=rf"one\.settings: reads asked/guess, texts .* {regime.label} .*oversample\.md"):
        check_questions("params.yaml", "train.runs.one", of_two, reading, regime)


def test_a_text_that_knows_the_class_is_not_read_where_training_is_told_another(folder: Path, reading: Reading) -> None:
    partial = Partial(wrong="random", q=0.1)
    for regime in (Full(), Shots(shots=1), NOISE, partial):
        check_told("params.yaml", "train.runs.one", folder, reading, regime)
    rewrite(folder, lambda rows: rows, told=True)
    for allowed in (Full(), Shots(shots=1)):
        check_told("params.yaml", "train.runs.one", folder, reading, allowed)
    for refused in (NOISE, partial):
        with pytest.raises(UserError, match=rf"one\.settings: reads asked/guess, .* {refused.label} hides; take"):
            check_told("params.yaml", "train.runs.one", folder, reading, refused)


def test_the_mean_of_a_field_is_a_feature_of_probes(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, READS)
    batch = cache.batch(torch.arange(len(cache.paths)))
    assert words_behind("asked/guess/reasons") == words_behind("asked/guess/a/b c") == {"asked/guess"}
    [mean] = feature_blocks("asked/guess/reasons", batch)
    vectors, mask = texts_said(batch, "guess", "reasons")
    for place in range(len(mean)):
        own = vectors[place][mask[place]]
        expected = F.normalize(own.sum(0), dim=0) if len(own) else torch.zeros(PLAN.dimension)
        torch.testing.assert_close(mean[place], expected)
    for wrong in ("asked/guess", "asked/guess/", "asked//reasons"):
        with pytest.raises(ValueError, match=r"should be asked/NAME/FIELD, NAME a key under ask"):
            words_behind(wrong)
    with pytest.raises(ValueError, match=r"asked/guess cannot be among them: a probe beside a method reads what"):
        WithProbe(method="linear_probe", settings={"features": ["global", "asked/guess/reasons"]})
