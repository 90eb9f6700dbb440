"""Options against explicit loops; the miner among its own options is its top-1; guessing is right one time in four."""

from collections import Counter

import numpy as np
import pytest

from evaluation.multiple_choice import OPTIONS, Judge, answer, as_json, as_text, mine, mix, most_named, score
from fieldmark.command import UserError

CLASSES = [f"class-{number:02d}" for number in range(12)]


def drawn(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Logits with many ties (n, 12), labels, ids; the true class is often among the highest, and often is not."""
    rng = np.random.default_rng(seed)
    y = rng.integers(len(CLASSES), size=images)
    logits = rng.integers(0, 6, (images, len(CLASSES))).astype(np.float16)
    logits[np.arange(images), y] += rng.integers(0, 3, images).astype(np.float16)
    return logits, y, [f"{number:064x}" for number in range(images)]


def by_hand(logits: np.ndarray, own: int) -> set[int]:
    """FOCI's rule: the four highest (of equals the first in the order of classes); where the true class is not among
    them, it takes the place of the lowest."""
    ranked = sorted(range(len(logits)), key=lambda label: (-float(logits[label]), label))
    chosen = ranked[:OPTIONS]
    return set(chosen if own in chosen else [*chosen[:-1], own])


def test_options_are_those_of_the_published_rule() -> None:
    logits, y, ids = drawn(3000)  # more than are sorted at once
    options = mix(mine(logits, y), ids, CLASSES, seed=3)
    assert options.shape == (3000, OPTIONS)
    assert [set(row) for row in options.tolist()] == [
        by_hand(of_image, own) for of_image, own in zip(logits, y, strict=True)
    ]
    assert ((options == y[:, None]).sum(axis=1) == 1).all()
    assert all(len(set(row)) == OPTIONS for row in options.tolist())


def test_what_is_named_beside_a_class_by_counting() -> None:
    logits, y, ids = drawn(300)
    options = mix(mine(logits, y), ids, CLASSES, seed=3)
    named = most_named(options, y)
    assert sorted(named) == sorted(set(y.tolist()))
    for own, others in named.items():
        count = Counter(option for row in options[y == own].tolist() for option in row if option != own)
        assert others.tolist() == sorted(count, key=lambda other: (-count[other], other))


def test_the_miner_among_its_options_is_its_top_1() -> None:
    logits, y, ids = drawn(2000)
    options = mix(mine(logits, y), ids, CLASSES, seed=0)
    assert np.array_equal(answer(logits, options), logits.argmax(axis=1))
    assert 0.1 < (answer(logits, options) == y).mean() < 0.9


def test_an_answer_does_not_depend_on_the_order_of_options() -> None:
    logits, y, _ = drawn(500)
    options = mine(logits, y)
    assert np.array_equal(answer(logits, options), answer(logits, options[:, ::-1]))
    # Of equals the class that comes first in the order of classes.
    assert answer(np.zeros((1, 12)), np.array([[7, 3, 9, 5]])).tolist() == [3]


def test_any_order_is_drawn_alike_and_the_true_class_stands_anywhere() -> None:
    logits, y, ids = drawn(4000)
    options = mix(mine(logits, y), ids, CLASSES, seed=0)
    places = np.bincount((options == y[:, None]).argmax(axis=1), minlength=OPTIONS) / len(y)
    assert np.abs(places - 1 / OPTIONS).max() < 4 * np.sqrt(0.25 * 0.75 / len(y))
    few = [17, 3, 999]  # an image's order is its own, whatever else is asked
    assert np.array_equal(mix(mine(logits[few], y[few]), [ids[one] for one in few], CLASSES, seed=0), options[few])
    assert not np.array_equal(mix(mine(logits, y), ids, CLASSES, seed=1), options)


def test_guessing_gets_a_quarter_within_its_interval() -> None:
    logits, y, ids = drawn(1500)
    options = mix(mine(logits, y), ids, CLASSES, seed=0)
    guesses = np.random.default_rng(5).random((3, *logits.shape))
    right = np.stack([answer(of_seed, options) == y for of_seed in guesses])
    [guessing] = score([Judge("guess", "none", False, right, right)], y, None, None)
    low, high = guessing.over
    assert low < 1 / OPTIONS < high
    assert high - low < 0.06
    # Always the same place is no better than guessing: the true class does not stand first.
    first = (options[:, 0] == y)[None]
    [place] = score([Judge("first", "none", False, first, first)], y, None, None)
    assert place.over[0] < 1 / OPTIONS < place.over[1]


def test_whole_groups_widen_the_interval() -> None:
    right = np.repeat(np.arange(40) % 2 == 0, 10)[None]
    judge, y = Judge("a", "x", False, right, right), np.zeros(400, int)
    [images], [groups] = (score([judge], y, of, None) for of in (None, np.repeat(np.arange(40), 10)))
    assert images.accuracy == groups.accuracy == 0.5
    assert groups.over[1] - groups.over[0] > 2 * (images.over[1] - images.over[0])
    assert (groups.alone.unit, groups.alone.units) == ("groups", 40)


def test_fewer_classes_than_options_is_an_error() -> None:
    with pytest.raises(UserError, match=r"4 options, and these data have 3 classes"):
        mine(np.zeros((2, 3)), np.zeros(2, int))
    assert sorted(mine(np.zeros((1, 4)), np.array([2]))[0].tolist()) == [0, 1, 2, 3]


def test_tables_say_who_is_near_to_the_miner() -> None:
    y = np.arange(40) % 12
    right, wrong = np.ones((1, 40), bool), np.zeros((1, 40), bool)
    half = (np.arange(40) % 2 == 0)[None]
    judges = [Judge("probe", "clip", True, right, half), Judge("other", "dino", False, half, wrong)]
    [own] = score([Judge("clip by names", "", True, half, half)], y, None, None)
    scores = score(judges, y, None, "probe")
    text = as_text("title", "clip by names", own, scores, "probe", 7)
    lines = text.splitlines()
    assert lines[3].split()[:4] == ["clip", "by", "names", "*"]
    assert "50.0" in lines[3]
    assert lines[4].split()[:4] == ["probe", "*", "clip", "100.0"]
    assert lines[5].split()[:3] == ["other", "dino", "50.0"]
    assert "-50.0" in lines[5]
    assert "drawn by seed 7; guessing gets 25.0" in text
    assert "hard negatives chosen by CLIP are against CLIP" in text
    found = as_json(own, scores)
    assert [row["kin"] for row in found["judges"]] == [True, False]
    assert found["judges"][0]["paired"] is None
    assert found["judges"][1]["paired"]["difference"] == -0.5
    alone = as_text("title", "dino", own, score(judges[1:], y, None, None), None, 0)
    assert "hard negatives chosen by CLIP" not in alone
    assert "- probe" not in alone


def test_each_row_names_what_its_interval_is_over() -> None:
    y, half = np.arange(40) % 12, (np.arange(40) % 2 == 0)[None]
    [own] = score([Judge("clip by names", "", True, half, half)], y, None, None)
    judges = [Judge("unseen", "clip", True, half, half, by_class=True), Judge("probe", "clip", True, half, half)]
    lines = as_text("title", "clip by names", own, score(judges, y, None, None), None, 0).splitlines()
    assert [" ".join(line.split()[-3:-1]) for line in lines[3:6]] == ["40 images", "12 classes", "40 images"]


def test_each_encoder_has_its_own_reference() -> None:
    y, right, wrong = np.arange(40) % 12, np.ones((1, 40), bool), np.zeros((1, 40), bool)
    half = (np.arange(40) % 2 == 0)[None]
    judges = [
        Judge(f"{encoder}.{name}", encoder, False, own, own)
        for encoder, name, own in (("a", "probe", half), ("a", "x", right), ("b", "x", right), ("b", "probe", wrong))
    ]
    judges.append(Judge("c.x", "c", False, right, right))  # has none
    found = [one.reference and one.reference.difference for one in score(judges, y, None, "probe")]
    assert found == [None, 0.5, 1.0, None, None]
    assert all(one.reference is None for one in score(judges, y, None, None))
