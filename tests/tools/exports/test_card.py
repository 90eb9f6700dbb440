"""A model card as huggingface_hub reads it; each figure on it, computed again from predictions.parquet."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, log_loss

from tools.exports.card import interval
from tools.exports.markdown import cell

Row = dict[str, Any]
Export = Callable[..., str]
Kept = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def card(made: list[Row], export: Export, tmp_path: Path) -> str:
    export("card", tmp_path / "README.md", "--run", "zero_shot")
    return (tmp_path / "README.md").read_text()


def test_every_figure_is_that_of_the_predictions(card: str, kept: Kept) -> None:
    split, y, probabilities = kept
    results = ModelCard(card).data.eval_results
    assert {(row.dataset_split, row.metric_type) for row in results} == {
        (part, kind) for part in ("val", "test") for kind in ("accuracy", "log_loss")
    }
    for part in ("val", "test"):
        p, of = probabilities[split == part], y[split == part]
        right = p.argmax(1) == of
        claimed = {row.metric_type: row.metric_value for row in results if row.dataset_split == part}
        assert claimed["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
        assert claimed["log_loss"] == pytest.approx(log_loss(of, p, labels=range(3)), abs=1e-6)
        [line] = re.findall(rf"^\| {part} \|(.*)\|$", card, re.MULTILINE)
        images, over, by_class, top5, loss, error, _ = line.split("|")
        accuracy, low, high = map(float, re.findall(r"[\d.]+", over))
        assert int(images) == len(of)
        assert accuracy == pytest.approx(100 * right.mean(), abs=0.05)
        assert low <= accuracy <= high
        assert float(by_class) == pytest.approx(100 * balanced_accuracy_score(of, p.argmax(1)), abs=0.05)
        assert float(top5) == 100
        assert float(loss) == pytest.approx(claimed["log_loss"], abs=5e-4)
        bins = np.ceil(p.max(1) * 15)
        gaps = [(bins == each).mean() * abs((right - p.max(1))[bins == each].mean()) for each in np.unique(bins)]
        assert float(error) == pytest.approx(100 * sum(gaps), abs=0.05)
    train = (probabilities.argmax(1) == y)[split == "train"].mean()
    assert f"Accuracy on train: {100 * train:.1f} %" in card
    assert "9 to train on (3 of the rarest class)" in card
    assert f"{(split == 'choose').sum()} of val to choose with" in card


@pytest.mark.parametrize(("right", "n"), [(0, 9), (7, 9), (9, 9), (530, 600)])
def test_the_interval_is_wilson_s(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert interval(np.arange(n) < right, None) == pytest.approx((expected.low, expected.high))


def test_images_of_a_group_are_worth_one() -> None:
    """Each image four times: as sure as of one copy. Nothing makes surer than as many single images."""
    right = np.random.default_rng(0).random(200) < 0.7
    once, groups = interval(right, None), np.repeat(np.arange(200), 4)
    assert interval(np.repeat(right, 4), groups) == pytest.approx(once, abs=1e-3)
    assert interval(right, np.arange(200)) == pytest.approx(once, abs=1e-3)
    assert interval(np.ones(40, dtype=bool), np.arange(40) // 4) == interval(np.ones(10, dtype=bool), None)
    spread = np.arange(400) % 2 == 0  # each group half right: as if drawn on purpose
    assert interval(spread, np.arange(400) // 4) == interval(spread, None)


def test_its_errors_are_those_of_val(card: str, kept: Kept) -> None:
    split, y, probabilities = kept
    of, said = y[split == "val"], probabilities.argmax(1)[split == "val"]
    names = [cell(name) for name in ("Blue tang", "Blue tang", "Wrasse | <b>")]
    [worst] = re.findall(r"^On val it does worst on (.*)\.$", card, re.MULTILINE)
    claimed = re.findall(r"(\S.*?) \((\d+) of (\d+) right\)(?:, )?", worst)
    expected = [(names[each], (said[of == each] == each).sum(), (of == each).sum()) for each in range(3)]
    assert sorted((name, int(right), int(count)) for name, right, count in claimed) == sorted(
        row for row in expected if row[1] < row[2]
    )
    [taken] = re.findall(r"^It most often takes (.*)\.$", card, re.MULTILINE)
    counts = [int(count) for count in re.findall(r"\((\d+)\)", taken)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == (of != said).sum()


def test_it_says_what_the_run_stands_on(card: str) -> None:
    assert "local-dir:tiny" in card
    assert "somebody" not in card  # a folder of this machine names people
    assert r"concepts | 1 answers, by some-model-2024 (live)" in card
    assert "concepts | 1 answers, imported or written by people (import)" in card
    assert "CC-BY-4.0 (" in card
    assert "none stated (" in card
    assert "a single reading that no correction was made for" in card
    assert "python -m tools.predict --run zero_shot" in card
    assert ModelCard(card).data.license is None
    assert r"Wrasse \| \<b\>" in card
    assert "<b>" not in card.replace(r"\<b\>", "")
    assert "The data set names no groups" in card


def test_it_says_that_a_run_is_transductive_and_who_answered_its_questions(
    exported_from: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported_from, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Path("data/asked/why").mkdir(parents=True)
    shutil.copy("data/concepts/answers.parquet", "data/asked/why")
    file = Path("data/runs/zero_shot/config.json")
    config = json.loads(file.read_text()) | {"transductive": True}
    config["fingerprints"] = {"asked/why/texts.parquet": "0", "asked/why/vectors/conv.parquet": "0"}
    file.write_text(json.dumps(config))
    export("card", tmp_path / "README.md", "--run", "zero_shot")
    card = (tmp_path / "README.md").read_text()
    assert re.search(r"^# zero.?_shot \(transductive\): 3 classes", card, re.MULTILINE)
    assert "- **Transductive**: images that are judged send to each other" in card
    assert ModelCard(card).data.model_name == "zero_shot (transductive)"
    assert re.findall(r"^\| (asked/why|concepts|texts) \| (.*?) \(", card, re.MULTILINE) == [
        ("asked/why", "1 answers, imported or written by people"),
        ("asked/why", "1 answers, by some-model-2024"),
    ]


def test_texts_of_others_are_no_markup() -> None:
    assert cell("a|b\n# *c*") == r"a\|b \# \*c\*"
    assert cell("x\u202ey") == r"x\\u202ey"
