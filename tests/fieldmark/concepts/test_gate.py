import json

import numpy as np
import pytest

from fieldmark.concepts import gate
from fieldmark.concepts.gate import judge, nearest_mean, permuted_accuracies, say
from tests.project import unit

CLASSES, DIMENSION = 10, 24


def planted(noise: float = 1.5, seed: int = 0) -> tuple[tuple[np.ndarray, ...], ...]:
    """Training and validation images about a middle a class, and two concepts a class that point at it."""
    chance = np.random.default_rng(seed)
    middles = unit(chance.standard_normal((CLASSES, DIMENSION)))
    names = np.array([f"c{number}" for number in range(CLASSES)], dtype=object)

    def draw(each: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(CLASSES).repeat(each)
        return unit(middles[labels] + noise * unit(chance.standard_normal((len(labels), DIMENSION)))), names[labels]

    concepts = unit(middles.repeat(2, axis=0) + 0.8 * unit(chance.standard_normal((2 * CLASSES, DIMENSION))))
    return draw(20), draw(8), (concepts, names.repeat(2))


def owners_of(names: np.ndarray) -> list[set[str]]:
    return [{name} for name in names]


def test_concepts_that_name_classes_carry_signal() -> None:
    train, val, (concepts, names) = planted()
    found = judge(train, val, concepts, owners_of(names))
    assert found["verdict"] == "signal"
    assert found["accuracy"] > 0.5
    assert found["permuted"] == pytest.approx(1 / CLASSES, abs=0.02)
    assert found["p"] == pytest.approx(1 / 1001, abs=1e-4)
    assert found["images"] == 80
    assert found["classes"] == CLASSES
    assert found["concepts"] == 20
    assert found == judge(train, val, concepts, owners_of(names))
    json.dumps(found, allow_nan=False)
    assert "carry signal" in say(found)
    assert "p = 0.001" in say(found)


def test_permuted_owners_and_random_texts_do_not() -> None:
    train, val, (concepts, names) = planted()
    moved = judge(train, val, concepts, owners_of(np.roll(names, 2)))
    random = judge(train, val, unit(np.random.default_rng(1).standard_normal(concepts.shape)), owners_of(names))
    assert moved["verdict"] == "none"
    assert "NO signal" in say(moved)
    assert random["verdict"] == "none"


def test_the_verdict_follows_the_numbers() -> None:
    train, val, (concepts, names) = planted()
    noise = unit(np.random.default_rng(2).standard_normal(concepts.shape))
    faint = [judge(train, val, unit(noise + mix * concepts), owners_of(names)) for mix in np.linspace(0, 1, 21)]
    verdicts = [each["verdict"] for each in faint]
    assert verdicts[0] == "none"
    assert verdicts[-1] == "signal"
    for each in faint:
        expected = "none" if each["p"] > 0.01 else "weak" if each["share"] < 0.1 else "signal"
        assert each["verdict"] == expected


def test_what_all_images_have_in_common_names_no_class() -> None:
    train, val, (concepts, names) = planted()
    # All images lie along the first class's texts: less their mean, they are told apart as before.
    common = 3 * concepts[0]
    moved = judge((train[0] + common, train[1]), (val[0] + common, val[1]), concepts, owners_of(names))
    assert moved["accuracy"] == judge(train, val, concepts, owners_of(names))["accuracy"]


def test_what_cannot_be_told() -> None:
    train, val, (concepts, names) = planted()
    few = judge(train, val, concepts[:10], owners_of(names[:10]))
    assert few["verdict"] == "unknown"
    assert few["classes"] == 5
    nothing = (val[0][:0], val[1][:0])
    assert judge(train, nothing, concepts, owners_of(names))["verdict"] == "unknown"
    assert judge(train, val, concepts, [set() for _ in names])["verdict"] == "unknown"
    assert judge(train, val, concepts[:0], [])["verdict"] == "unknown"
    assert say(few) == (
        "what these concepts carry cannot be told: that takes 6 classes with training images that own a concept, and a"
        " validation image of them; there are 5 such classes and 40 such images"
    )


def test_classes_that_do_not_train_or_own_are_left_out() -> None:
    train, val, (concepts, names) = planted()
    seen = train[1] != "c9"
    found = judge((train[0][seen], train[1][seen]), val, concepts[2:], owners_of(names[2:]))
    assert found["classes"] == 8
    assert found["images"] == 64


def test_permutations() -> None:
    true = np.repeat(np.arange(6), 4)
    assert permuted_accuracies(true, true, 6).mean() == pytest.approx(1 / 6, abs=0.02)
    assert set(permuted_accuracies(np.zeros(4, dtype=int), np.zeros(4, dtype=int), 2)) == {0.0, 1.0}


def test_nearest_mean_by_a_loop() -> None:
    chance = np.random.default_rng(0)
    train, labels, x = chance.standard_normal((12, 3)), np.arange(12) % 4, chance.standard_normal((7, 3))
    means = [train[labels == label].mean(axis=0) for label in range(4)]
    expected = [int(np.argmin([np.linalg.norm(each - mean) for mean in means])) for each in x]
    assert nearest_mean(x, train, labels).tolist() == expected


def test_no_image_is_judged_otherwise_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val, (concepts, names) = planted()
    found, mean = judge(train, val, concepts, owners_of(names)), train[0].astype(np.float64).mean(axis=0)
    monkeypatch.setattr(gate, "ROWS", 7)
    monkeypatch.setattr(gate, "COSINES", 3 * CLASSES)
    assert judge(train, val, concepts, owners_of(names)) == found
    np.testing.assert_array_equal(gate.mean_of(train[0]), mean)  # to the last bit
    assert max(len(block) for block in gate.blocks(train[0], gate.ROWS)) == 7
