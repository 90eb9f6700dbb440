import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import class_id_of
from tests.training.cache import Plan, tensors
from training.data import Cache
from training.data.bank import Bank
from training.data.nodes import Nodes
from training.data.parts import ObjectParts
from training.layers.logistic import fit_logistic
from training.loop import predict
from training.methods import description_zero_shot, zero_shot
from training.regimes import (
    Full,
    LongTail,
    Noise,
    Partial,
    Regime,
    Shots,
    Unseen,
    cross_fitted,
    harmonic_mean,
    hide_test,
    label_spaces,
    read_classes,
    restrict_classes,
)

PLAN = Plan(classes=6, train=20, val=4, test=5, nodes=4, dimension=16, noise=1.5)
REGIMES: list[Regime] = [
    Full(),
    Shots(shots=4),
    LongTail(exponent=1.0),
    LongTail(imbalance=10),
    Partial(wrong="random", q=0.5),
    Partial(wrong="instance", q=0.5),
    Noise(wrong="symmetric", share=0.4),
    Noise(wrong="confused", share=0.4),
    Noise(wrong="nearest", share=0.4),
    Noise(wrong="instance", share=0.4, val="noisy"),
    Unseen(seen=0.5),
]
draws = st.integers(0, 19)


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(PLAN)


def paths(cache: Cache, split: str) -> set[str]:
    return {cache.paths[image] for image in cache.images(split).tolist()}


def train_counts(cache: Cache) -> list[int]:
    return torch.bincount(cache.y[cache.images("train")], minlength=len(cache.classes)).tolist()


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.label)
@given(draw=draws)
@settings(max_examples=8)
def test_only_split_and_target_change_and_a_draw_can_be_repeated(cache: Cache, regime: Regime, draw: int) -> None:
    made, again = regime.apply(cache, draw), regime.apply(cache, draw)
    assert made.split.tolist() == again.split.tolist()
    assert torch.equal(made.target, again.target)
    before = tensors(cache)
    for name, value in tensors(made).items():
        assert name == "target" or value.data_ptr() == before[name].data_ptr()
    assert made.paths is cache.paths
    assert made.part(Bank) is cache.part(Bank)
    # Nothing that is evaluated was trained on, and nothing of test is chosen on.
    assert paths(made, "train") <= paths(cache, "train")
    assert paths(made, "test") <= paths(cache, "test")
    for half in ("choose", "val"):
        assert not paths(made, half) & (paths(cache, "test") | paths(made, "train"))
    assert set(made.split) <= {"train", "choose", "val", "test", "unused"}
    told = made.target if made.target.ndim == 1 else made.target.argmax(1)
    wrong_too = ("train", "choose") if isinstance(regime, Noise) and regime.val == "noisy" else ("train",)
    judged = ~np.isin(made.split, wrong_too)
    assert torch.equal(told[judged], cache.y[judged])


@pytest.mark.parametrize("regime", REGIMES[1:], ids=lambda regime: regime.label)
def test_another_draw_is_another_one(cache: Cache, regime: Regime) -> None:
    one, two = (regime.apply(cache, draw) for draw in (0, 1))
    # Which class is taken for which is no draw, but which images are told so is.
    assert one.split.tolist() != two.split.tolist() or not torch.equal(one.target, two.target)


def test_a_regime_is_read_by_its_kind() -> None:
    read = TypeAdapter(Regime).validate_python
    assert read({"kind": "shots", "shots": 4}) == Shots(shots=4)
    assert read({"kind": "unseen", "seen": "seen.txt"}) == Unseen(seen="seen.txt")
    assert [regime.label for regime in REGIMES] == [
        *("full", "4-shot", "long-tail-1", "imbalance-10", "partial-random-0.5", "partial-instance-0.5"),
        *("noise-symmetric-0.4", "noise-confused-0.4", "noise-nearest-0.4", "noise-instance-0.4-val"),
        "unseen-0.5",
    ]
    assert Unseen(seen="lists/seen.txt").label == "unseen-seen"
    for wrong in ({"kind": "shots", "shots": 3}, {"kind": "shot"}, {"kind": "full", "shots": 1}):
        with pytest.raises(ValidationError):
            read(wrong)


def test_a_long_tail_has_one_profile_and_the_power_law_is_known_as_before() -> None:
    for wrong in ({}, {"exponent": 1.0, "imbalance": 10.0}, {"imbalance": 1.0}):
        with pytest.raises(ValidationError):
            LongTail(**wrong)
    # What identifies a run: results from before there was `imbalance` still count.
    assert LongTail(exponent=0.5).model_dump() == {"kind": "long_tail", "exponent": 0.5}
    assert LongTail(imbalance=50).model_dump() == {"kind": "long_tail", "imbalance": 50.0}


@given(draw=draws)
@settings(max_examples=10)
def test_shots_are_nested_and_balanced(cache: Cache, draw: int) -> None:
    smaller: set[str] = set()
    for shots in (1, 2, 4, 8, 16):
        made = Shots(shots=shots).apply(cache, draw)
        assert train_counts(made) == [shots] * 6
        assert smaller < paths(made, "train")
        assert not paths(made, "choose") | paths(made, "val")
        assert paths(made, "test") == paths(cache, "test")
        smaller = paths(made, "train")


def test_a_class_with_fewer_images_gives_all(cache: Cache) -> None:
    few = dataclasses.replace(cache, split=np.where(np.arange(len(cache.split)) % 3 == 0, cache.split, "unused"))
    assert train_counts(Shots(shots=8).apply(few, 0)) == [min(8, count) for count in train_counts(few)]


def test_one_image_more_moves_no_other(cache: Cache) -> None:
    without = dataclasses.replace(cache, split=cache.split.copy())
    taken = Shots(shots=4).apply(cache, 0)
    spare = next(image for image in cache.images("train").tolist() if taken.split[image] == "unused")
    without.split[spare] = "unused"
    assert paths(Shots(shots=4).apply(without, 0), "train") == paths(taken, "train")


@given(draw=draws, exponent=st.floats(0.1, 3))
@settings(max_examples=20)
def test_long_tail_sizes_follow_the_power_law(cache: Cache, draw: int, exponent: float) -> None:
    made = LongTail(exponent=exponent).apply(cache, draw)
    expected = [max(1, round(20 * rank**-exponent)) for rank in range(1, 7)]
    assert sorted(train_counts(made), reverse=True) == expected
    assert paths(made, "val") == paths(cache, "val")


@given(draw=draws, imbalance=st.sampled_from([2.0, 10.0, 20.0, 50.0]))
@settings(max_examples=20)
def test_imbalanced_sizes_fall_by_the_same_factor(cache: Cache, draw: int, imbalance: float) -> None:
    made = LongTail(imbalance=imbalance).apply(cache, draw)
    sizes = sorted(train_counts(made), reverse=True)
    factor = imbalance ** (-1 / 5)
    assert sizes == [max(1, round(20 * factor**step)) for step in range(6)]
    assert (sizes[0], sizes[-1]) == (20, max(1, round(20 / imbalance)))
    assert paths(made, "val") == paths(cache, "val")
    power = LongTail(exponent=1.0).apply(cache, draw)
    order = [sorted(range(6), key=lambda c: -train_counts(one)[c])[0] for one in (made, power)]
    assert order[0] == order[1]  # the same class comes first in a draw


@pytest.mark.parametrize("wrong", ["random", "instance"])
@given(draw=draws)
@settings(max_examples=10)
def test_candidates_hold_the_truth_and_grow_with_q(cache: Cache, wrong: str, draw: int) -> None:
    train = cache.images("train")
    smaller = torch.zeros(len(train), 6, dtype=torch.bool)
    for q in (0.0, 0.3, 0.7):
        target = Partial(wrong=wrong, q=q).apply(cache, draw).target[train]
        torch.testing.assert_close(target.sum(1), torch.ones(len(train)))
        candidates = target > 0
        assert candidates.gather(1, cache.y[train][:, None]).all()
        torch.testing.assert_close(target, candidates / candidates.sum(1, keepdim=True))
        assert not (smaller & ~candidates).any()
        smaller = candidates
        if q == 0:
            assert torch.equal(candidates.sum(1), torch.ones(len(train), dtype=torch.int64))


def candidate_rates(cache: Cache, wrong: str, q: float) -> Tensor:
    """(n_train, C): how often each class is a candidate, over 200 draws."""
    train = cache.images("train")
    found = [Partial(wrong=wrong, q=q).apply(cache, draw).target[train] > 0 for draw in range(200)]
    return torch.stack(found).float().mean(0)


def test_wrong_classes_enter_as_often_as_said(cache: Cache) -> None:
    truth = torch.nn.functional.one_hot(cache.y[cache.images("train")], 6).bool()
    rates = candidate_rates(cache, "random", 0.3)
    assert rates[~truth].mean() == pytest.approx(0.3, abs=0.01)
    p = cross_fitted(cache).masked_fill(truth, 0)
    expected = (0.6 * p / p.amax(1, keepdim=True)).masked_fill(truth, 1)
    assert (candidate_rates(cache, "instance", 0.6) - expected).abs().max() < 0.2  # 5 deviations of 200 draws


def test_the_cross_fitted_probe_has_not_seen_what_it_judges(cache: Cache) -> None:
    train = cache.images("train")
    shuffled = cache.y[train][torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    y = cache.y.clone()
    y[train] = shuffled
    p = cross_fitted(dataclasses.replace(cache, y=y, target=y))
    torch.testing.assert_close(p.sum(1), torch.ones(len(train)))
    # With labels at random, a probe that had seen them would be right more often than chance.
    assert (p.argmax(1) == shuffled).float().mean() < 1 / 6 + 0.12
    assert (cross_fitted(cache).argmax(1) == cache.y[train]).float().mean() > 0.5


@pytest.mark.parametrize("wrong", ["symmetric", "confused", "nearest", "instance"])
@given(draw=draws)
@settings(max_examples=10)
def test_the_stated_share_is_told_a_wrong_class(cache: Cache, wrong: str, draw: int) -> None:
    before: set[int] = set()
    for share in (0.0, 0.25, 0.6):
        target = Noise(wrong=wrong, share=share).apply(cache, draw).target
        changed = set((target != cache.y).nonzero().flatten().tolist())
        assert len(changed) == round(share * 120)
        assert before <= changed
        before = changed


def test_symmetric_noise_spares_no_class_and_confused_noise_has_one(cache: Cache) -> None:
    pairs: dict[str, set[tuple[int, int]]] = {"symmetric": set(), "confused": set()}
    for wrong, seen in pairs.items():
        for draw in range(10):
            target = Noise(wrong=wrong, share=0.8).apply(cache, draw).target
            changed = target != cache.y
            seen |= set(zip(cache.y[changed].tolist(), target[changed].tolist(), strict=True))
    assert len(pairs["symmetric"]) == 6 * 5
    train = cache.images("train")
    p = cross_fitted(cache)
    for label, told in pairs["confused"]:
        mean = p[cache.y[train] == label].mean(0)
        mean[label] = 0
        assert told == mean.argmax()
    assert len(pairs["confused"]) == 6


def test_nearest_noise_goes_to_the_nearest_mean(cache: Cache) -> None:
    train = cache.images("train")
    x, y = cache.globals(train).numpy(), cache.y[train].numpy()
    means = [x[y == label].mean(0) for label in range(6)]
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in means] for a in means])
    np.fill_diagonal(cosine, -1)
    target = Noise(wrong="nearest", share=0.7).apply(cache, 0).target
    changed = (target != cache.y).nonzero().flatten()
    assert target[changed].tolist() == cosine.argmax(1)[cache.y[changed]].tolist()


def test_who_is_told_wrong_by_instance_is_who_looks_wrong(cache: Cache) -> None:
    """Over many draws: images whose largest wrong p is large, and they are told the class that it is of."""
    train = cache.images("train")
    wrong = cross_fitted(cache).scatter(1, cache.y[train][:, None], 0.0)
    weight, told = wrong.max(1)
    often = torch.zeros(len(train))
    for draw in range(60):
        target = Noise(wrong="instance", share=0.1).apply(cache, draw).target[train]
        changed = target != cache.y[train]
        assert torch.equal(target[changed], told[changed])
        often += changed
    # The first of 12 drawn from 120 is drawn by weight: the heavier half has nearly all of it here.
    heavy = weight >= weight.median()
    assert often[heavy].sum() > 0.8 * often.sum()
    assert (often > 0).sum() > 20  # and it is a draw: not the same twelve each time


def test_val_is_as_noisy_as_training_where_it_is_said_and_test_never(cache: Cache) -> None:
    for wrong in ("symmetric", "confused", "nearest", "instance"):
        clean = Noise(wrong=wrong, share=0.5).apply(cache, 3)
        noisy = Noise(wrong=wrong, share=0.5, val="noisy").apply(cache, 3)
        rows = {split: cache.images(split) for split in ("train", "choose", "val", "test")}
        assert torch.equal(clean.target[rows["train"]], noisy.target[rows["train"]])
        for split in ("val", "test"):
            assert torch.equal(noisy.target[rows[split]], cache.y[rows[split]])
        chosen = rows["choose"]
        assert (noisy.target[chosen] != cache.y[chosen]).sum() == round(0.5 * len(chosen))
        assert torch.equal(hide_test(noisy).y[chosen], noisy.target[chosen])
        assert torch.equal(hide_test(clean).y[chosen], cache.y[chosen])
        train = rows["train"]
        assert torch.equal(hide_test(noisy).y[train], noisy.target[train])  # the truth is nowhere
    # What identified a run before there was `val` still does.
    assert Noise(wrong="symmetric", share=0.5).model_dump() == {"kind": "noise", "wrong": "symmetric", "share": 0.5}


@pytest.mark.parametrize("wrong", ["confused", "nearest"])
def test_who_has_nobody_to_be_taken_for_keeps_the_class(cache: Cache, wrong: str) -> None:
    """Images that choose, of a class without a training image: and the share is of the others."""
    gone = (cache.y.numpy() == 0) & (cache.split == "train")
    few = dataclasses.replace(cache, split=np.where(gone, "unused", cache.split))
    target, chosen = Noise(wrong=wrong, share=0.99, val="noisy").apply(few, 0).target, few.images("choose")
    others = few.y[chosen] != 0
    assert torch.equal(target[chosen[~others]], few.y[chosen[~others]])
    assert (~others).any()
    assert (target != few.y)[chosen].sum() == round(0.99 * int(others.sum()))


@given(draw=draws, share=st.floats(0.01, 0.99), development=st.floats(0.01, 0.99))
@settings(max_examples=30)
def test_unseen_classes_are_disjoint_and_none_is_empty(
    cache: Cache, draw: int, share: float, development: float
) -> None:
    if round(share * 6) > 4:  # one class left: it cannot be both
        return
    made = Unseen(seen=share, development=development).apply(cache, draw)
    classes = {split: set(made.y[made.images(split)].tolist()) for split in ("train", "val", "test")}
    seen, others = classes["train"], classes["test"] - classes["train"]
    chosen_on = classes["val"] - seen
    assert len(seen) == max(1, round(share * 6))
    assert others
    assert chosen_on
    assert not chosen_on & classes["test"]
    assert seen | chosen_on | others == set(range(6))
    assert seen <= classes["val"]
    spaces = label_spaces(made)
    assert set(spaces["seen"][0].nonzero().flatten().tolist()) == seen
    assert set(spaces["unseen"][0].nonzero().flatten().tolist()) == others
    assert torch.equal(spaces["joint"][0], spaces["seen"][0] | spaces["unseen"][0])
    assert set(made.y[spaces["unseen"][1]].tolist()) == others
    images = torch.cat([spaces["seen"][1], spaces["unseen"][1]]).sort().values
    assert torch.equal(images, spaces["joint"][1])
    assert torch.equal(images, made.images("test"))
    assert set(label_spaces(made, "val")["unseen"][0].nonzero().flatten().tolist()) == chosen_on


def test_classes_come_from_files_too(cache: Cache, tmp_path: Path) -> None:
    seen, development = tmp_path / "seen.txt", tmp_path / "dev.txt"
    seen.write_text("class-00\n\nclass-03\n")
    development.write_text("class-05\n")
    regime = Unseen(seen=str(seen), development=str(development))
    made = regime.apply(cache, 0)
    assert made.split.tolist() == regime.apply(cache, 1).split.tolist()
    assert set(made.y[made.images("train")].tolist()) == {0, 3}
    assert set(made.y[made.images("val")].tolist()) == {0, 3, 5}
    assert set(made.y[made.images("test")].tolist()) == {0, 1, 2, 3, 4}
    folder = tmp_path / "folders.txt"
    folder.write_text("004.Groove_billed_Ani\n")
    class_id = class_id_of("004.Groove_billed_Ani")
    assert read_classes(folder, [class_id, "x"]) == [class_id]
    development.write_text("class-03\n")
    with pytest.raises(UserError, match=r"dev\.txt: class class-03 is in .*seen\.txt too"):
        regime.apply(cache, 0)
    development.write_text("".join(f"class-0{label}\n" for label in (1, 2, 4, 5)))
    with pytest.raises(UserError, match="regime unseen-seen: leaves no unseen class"):
        regime.apply(cache, 0)
    seen.write_text("class-00\nclass-99\n")
    with pytest.raises(UserError, match=r"seen\.txt: line 2: there is no class 'class-99'"):
        regime.apply(cache, 0)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        Unseen(seen=str(tmp_path / "none.txt")).apply(cache, 0)


ACCURACY = st.integers(0, 10_000).map(lambda right: right / 10_000)


@given(a=ACCURACY, b=ACCURACY)
def test_the_harmonic_mean_lies_between_and_is_0_where_one_is(a: float, b: float) -> None:
    mean = harmonic_mean(a, b)
    assert mean == harmonic_mean(b, a)
    assert mean == 0 if not a * b else min(a, b) * (1 - 1e-9) <= mean <= max(a, b) * (1 + 1e-9)
    assert harmonic_mean(0.6, 0.3) == pytest.approx(0.4)


def test_a_restricted_cache_predicts_as_the_whole_one_among_its_classes(cache: Cache) -> None:
    chosen = ["class-04", "class-01", "class-02"]
    small = restrict_classes(cache, chosen)
    assert small.classes == sorted(chosen)
    assert small.part(Bank).K.data_ptr() == cache.part(Bank).K.data_ptr()
    for split in ("train", "val", "test"):
        wanted = {path for path in paths(cache, split) if path.split("/")[1] in chosen}
        assert paths(small, split) == wanted
    for image, path in enumerate(small.paths):
        assert small.classes[int(small.y[image])] == path.split("/")[1]
    here = [cache.paths.index(path) for path in small.paths]
    for method in (zero_shot, description_zero_shot):
        whole = predict(method.fit(cache, method.Settings(), 0).model, cache, torch.tensor(here))
        part = predict(method.fit(small, method.Settings(), 0).model, small, torch.arange(len(here)))
        torch.testing.assert_close(part, whole[:, [1, 2, 4]])
    assert torch.equal(small.batch(torch.arange(len(here))).adjacency, cache.batch(torch.tensor(here)).adjacency)


def test_concepts_of_nobody_are_dropped_from_bank_and_labels(cache: Cache) -> None:
    small = restrict_classes(cache, ["class-01", "class-02"])
    generic = torch.tensor([kind == "generic" for kind in cache.part(Bank).kind])
    owned = cache.part(Bank).own[:, [1, 2]].any(1)
    assert torch.equal(small.part(Bank).kept, cache.part(Bank).kept & (owned | generic))
    assert small.part(Bank).kept[generic].all()
    batch = small.batch(torch.arange(len(small.paths)))
    heavy = batch.concept_weight > 0
    assert heavy.any()
    assert small.part(Bank).kept[batch.concept_idx[heavy]].all()
    assert (batch.concept_idx[~heavy] == 0).all()
    whole = cache.batch(torch.tensor([cache.paths.index(path) for path in small.paths])).selected_concepts.tolist()
    for before, after in zip(whole, batch.selected_concepts.tolist(), strict=True):
        left = [concept for concept in before if concept >= 0 and small.part(Bank).kept[concept]]
        assert after == left + [-1] * (len(before) - len(left))


def test_restricting_to_all_is_nothing_and_comes_before_a_regime(cache: Cache) -> None:
    assert restrict_classes(cache, cache.classes) is cache
    with pytest.raises(ValueError, match="unknown classes"):
        restrict_classes(cache, ["class-77"])
    with pytest.raises(ValueError, match="before a regime"):
        restrict_classes(Noise(wrong="symmetric", share=0.5).apply(cache, 0), ["class-01"])


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.label)
def test_a_planted_leak_is_closed(cache: Cache, regime: Regime) -> None:
    made = regime.apply(cache, 0)
    hidden = hide_test(made)

    def cheat(given: Cache) -> list[Tensor]:
        """What a method that looks up labels finds of the test images: in the classes, the targets, the paths."""
        target = given.target
        by_target = target if target.ndim == 1 else target.argmax(1).where(target.sum(1) > 0, -1)
        folder = [path.split("/")[1] for path in given.paths]
        by_path = torch.tensor([given.classes.index(name) if name in given.classes else -1 for name in folder])
        return [given.y, by_target, by_path]

    evaluated = torch.from_numpy(~np.isin(made.split, ("train", "choose")))
    for found in cheat(made):
        assert torch.equal(found[evaluated], made.y[evaluated])
    for found in cheat(hidden):
        assert (found[evaluated] == -1).all()
    assert not paths(hidden, "test")
    assert len(hidden.images("hidden")) == len(made.images("test")) + len(made.images("val"))
    assert not set(hidden.groups) & {made.groups[image] for image in evaluated.nonzero().flatten().tolist()}
    assert hidden.part(Nodes).nodes.data_ptr() == made.part(Nodes).nodes.data_ptr()
    # What people marked in pictures is hidden as labels are.
    marks = hidden.part(ObjectParts).part_seen
    assert not marks[evaluated].any()
    assert torch.equal(marks[~evaluated], made.part(ObjectParts).part_seen[~evaluated])
    assert made.part(ObjectParts).part_seen[evaluated].any()
    for split, told in (("train", "train"), ("choose", "val")):
        images = made.images(split)
        assert torch.equal(hidden.images(told), images)
        assert torch.equal(hidden.target[images], made.target[images])
        told_class = made.target[images] if made.target.ndim == 1 else made.target[images].argmax(1)
        assert torch.equal(hidden.y[images], told_class)


def test_a_method_that_trains_on_test_labels_gains_nothing(cache: Cache) -> None:
    def cheat(given: Cache) -> float:
        """Accuracy on test of a probe fitted to every image that has a label but is not for training or choosing."""
        images = torch.from_numpy(np.flatnonzero(~np.isin(given.split, ("train", "choose", "val"))))
        images = images[given.y[images] >= 0]
        if not len(images):
            return 0.0
        x, test = given.globals(images), cache.images("test")
        probe = fit_logistic(x, given.y[images], x, given.y[images], 6, (1e-5,)).linear
        return (probe(cache.globals(test)).argmax(1) == cache.y[test]).float().mean().item()

    assert cheat(cache) > 0.95
    assert cheat(hide_test(cache)) == 0
    assert cheat(hide_test(Shots(shots=1).apply(cache, 0))) == 0
