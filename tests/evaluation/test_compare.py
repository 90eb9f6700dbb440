"""The tables of a study: verdicts in words, files in three formats, and test that is read for one list only."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation import compare as module
from evaluation.compare import MARKER, Answer, Line, Row, Table, answer, compare, judge, measure, measure_unseen
from evaluation.report import HEALTH
from evaluation.study import Cell, Plan, Question, run_study
from fieldmark.command import UserError
from fieldmark.store import make_table, read_header, read_table, write_table
from tests.evaluation.test_study import planned
from tests.training.cache import Plan as Planted
from tests.training.cache import write_cache
from training.controls import Control
from training.data import SPLITS
from training.regimes import Full

N, CLASSES = 400, 40
Y = np.repeat(np.arange(CLASSES), N // CLASSES)


def line(
    method: str, right: np.ndarray, control: str = "none", concepts: int | None = None, reads: bool = True
) -> Line:
    """Of a method that reads concepts, or does not."""
    applied = Control.model_validate({"name": control, "concepts": concepts})
    return Line(method, applied, Control(concepts=concepts if reads else None), np.atleast_2d(right), [{}])


def verdicts(*lines: Line) -> dict[str, Row]:
    rows = judge(Table("tiny", Full(), [f"{n}" for n in range(N)], Y, list(lines)), None)
    return {f"{row.line.method} {row.line.control.label}": row for row in rows}


def rate(share: float, seed: int = 0, like: np.ndarray | None = None) -> np.ndarray:
    """(n,): right on about `share` of the images; of those that `like` has wrong, where it is given."""
    drawn = np.random.default_rng(seed).random(N) < share
    return drawn if like is None else like | drawn


def swapped(right: np.ndarray, images: int) -> np.ndarray:
    """As many right, but so many of them others."""
    swapped = right.copy()
    swapped[np.flatnonzero(right)[::9][:images]] = False
    swapped[np.flatnonzero(~right)[::9][:images]] = True
    return swapped


PROBE = rate(0.6)
BETTER, SAME, WORSE = rate(0.3, 1, PROBE), swapped(PROBE, 10), PROBE & rate(0.8, 3)


def test_verdicts_against_the_probe() -> None:
    rows = verdicts(line("linear_probe", PROBE), line("a", BETTER), line("b", SAME), line("c", WORSE))
    assert [row.verdict for row in rows.values()] == [
        "the probe",
        "beats the probe",
        "no difference shown",
        "worse than the probe",
    ]
    assert [row.paired is None for row in rows.values()] == [True, False, False, False]
    assert [row.p is None for row in rows.values()] == [True, False, False, False]


def test_a_gain_that_hangs_on_a_few_classes_is_said_to_be_of_these() -> None:
    few = PROBE | (Y == 3) | (Y == 8)
    assert verdicts(line("linear_probe", PROBE), line("a", few))["a none"].verdict == "beats the probe on these classes"


def test_a_method_that_does_not_beat_its_control_is_said_so() -> None:
    rows = verdicts(
        line("linear_probe", PROBE),
        line("a", BETTER),
        line("a", swapped(BETTER, 5), "random_vectors"),
        line("a", PROBE, "edges_removed"),
    )
    assert rows["a none"].verdict == (
        "beats the probe; does not beat its control random_vectors: the texts do nothing here"
    )
    assert rows["linear_probe none"].verdict == "the probe"
    shown, not_shown = rows["a edges_removed"].verdict, rows["a random_vectors"].verdict
    assert re.fullmatch(r"control: the method is \+\d+\.\d \[\+.*\] ahead, p <?0\.\d+", shown)
    assert not_shown.endswith(": not shown to be")


def test_a_control_stands_against_as_many_concepts() -> None:
    rows = verdicts(
        line("linear_probe", PROBE),
        line("a", PROBE),
        line("a", BETTER, concepts=5),
        line("a", PROBE, "random_vectors", 5),
        line("a", PROBE, "random_vectors", 9),
        line("b", BETTER),
        line("b", PROBE, "random_vectors", 5, reads=False),
    )
    assert "ahead" in rows["a random_vectors-5"].verdict
    assert "not shown" not in rows["a random_vectors-5"].verdict
    assert rows["a none"].verdict == "no difference shown"
    assert rows["a random_vectors-9"].verdict == "control of none-9, which the study does not have"
    # What reads no concepts needs no run with fewer: its plain one is that.
    assert "ahead" in rows["b random_vectors-5"].verdict


def test_many_methods_need_a_smaller_p() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:7]] = True
    a[np.flatnonzero(PROBE)[:1]] = False
    alone = verdicts(line("linear_probe", PROBE), line("a", a))
    among = verdicts(line("linear_probe", PROBE), line("a", a), *(line(f"b{n}", SAME) for n in range(8)))
    assert alone["a none"].verdict.startswith("beats the probe")
    assert among["a none"].verdict == "no difference shown"
    assert alone["a none"].paired == among["a none"].paired or alone["a none"].paired is not None


def test_draws_are_paired_and_one_run_stands_for_all() -> None:
    draws = np.stack([rate(0.5, seed) for seed in range(20)])
    found = verdicts(line("linear_probe", draws), line("a", draws | (np.arange(N) % 20 == 0)))["a none"]
    assert found.verdict == "beats the probe"
    assert found.paired is not None
    assert found.paired.images[1] - found.paired.images[0] < 0.04  # draws differ by far more
    assert verdicts(line("linear_probe", draws), line("a", BETTER))["a none"].verdict == "beats the probe"


def answers(*lines: Line, pairs: list[tuple[str, str]]) -> list[Answer]:
    table = Table("tiny", Full(), [f"{n}" for n in range(N)], Y, list(lines))
    return answer(table, [Question(ask=f"{of}?", of=of, against=against) for of, against in pairs], None)


def test_questions_are_answered_in_plain_words() -> None:
    lines = [line("p", PROBE), line("a", BETTER), line("b", SAME), line("c", PROBE | (Y == 3) | (Y == 8))]
    lines.append(line("a", WORSE, "random_vectors"))  # no part of an answer
    better, worse, same, few = answers(*lines, pairs=[("a", "p"), ("p", "a"), ("b", "p"), ("c", "p")])
    assert better.words == "yes"
    assert worse.words == "no: the other way round"
    assert re.fullmatch(r"no difference shown: the interval holds \[-\d\.\d, \+\d\.\d\]", same.words)
    assert few.words == "yes on these classes"
    assert better.paired.difference == pytest.approx(BETTER.mean() - PROBE.mean())
    assert better.paired.difference == -worse.paired.difference


def test_many_questions_need_a_smaller_p() -> None:
    a = PROBE.copy()
    a[np.flatnonzero(~PROBE)[:7]] = True
    a[np.flatnonzero(PROBE)[:1]] = False
    lines = [line("p", PROBE), line("a", a), line("b", SAME)]
    (alone,) = answers(*lines, pairs=[("a", "p")])
    among = answers(*lines, pairs=[("a", "p"), *[("b", "p")] * 8])[0]
    assert alone.words.startswith("yes")
    assert among.words.startswith("no difference shown")
    assert among.p == pytest.approx(9 * alone.p)
    assert among.paired == alone.paired


def test_a_question_pairs_draws_and_one_run_stands_for_all() -> None:
    draws = np.stack([rate(0.5, seed) for seed in range(20)])
    lines = [line("p", draws), line("a", draws | (np.arange(N) % 20 == 0)), line("b", BETTER)]
    gain, once = answers(*lines, pairs=[("a", "p"), ("b", "p")])
    assert gain.words == once.words == "yes"
    assert gain.paired.images[1] - gain.paired.images[0] < 0.04  # draws differ by far more


def test_seen_and_unseen_label_spaces_by_hand() -> None:
    # Class 0 was trained on, 1 is unseen, 2 is in neither.
    logits = np.array([[3, 2, 9], [1, 2, 9], [2, 1, 9], [0, 5, 9], [0, 0, 0]], dtype=np.float32)
    y, splits = np.array([0, 0, 1, 1, 0]), np.array(["test", "test", "test", "test", "train"])
    joint, found = measure_unseen(logits, y, splits, "test")
    assert found == {"seen": 1.0, "unseen": 1.0, "harmonic": 0.5}
    assert np.isneginf(joint[:, 2]).all()
    assert measure(joint, y, splits, "test")["accuracy"] == 0.5


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_cache(folder / "data", Planted(classes=6, train=8, val=6, test=6, noise=1.5))
    return folder


STUDY: dict[str, Any] = {
    "methods": ["linear_probe", "zero_shot", "description_zero_shot"],
    "controls": ["none", "random_vectors"],
    "regimes": ["full", {"kind": "long_tail", "exponent": 0.5}],
}


def made(project: Path, **changes: Any) -> tuple[Plan, list[Cell]]:
    plan, grid = planned(project, **STUDY, **changes)
    run_study(plan, grid, 1)
    return plan, grid


def test_three_files_of_one_table(project: Path) -> None:
    plan, grid = made(project)
    text = compare(plan, grid)
    assert (plan.folder / "tables.txt").read_text() == text
    assert text.startswith("study small, read on val")
    assert "val also chose settings and epochs under full, long-tail-0.5" in text
    titles = [
        "tiny, full: val, 36 images of 6 classes, 2 runs",
        "tiny, long-tail-0.5: val, 36 images of 6 classes, 2 runs",
    ]
    assert [line for line in text.splitlines() if line.startswith("tiny, ")] == titles
    assert "few" in text.split(titles[1])[1].splitlines()[1]
    rows = list(csv.DictReader((plan.folder / "tables.csv").open()))
    assert len(rows) == 2 * (1 + 2 + 2)  # the probe reads nothing that random vectors change
    for row in rows:
        runs = [
            cell
            for cell in grid
            if (cell.method, cell.control.label, cell.regime.label) == (row["method"], row["control"], row["regime"])
        ]
        assert int(row["runs"]) == len(runs)
        accuracies = [
            json.loads((plan.folder / cell.run / "metrics.json").read_text())["val"]["accuracy"] for cell in runs
        ]
        assert float(row["accuracy mean"]) == pytest.approx(np.mean(accuracies))
        assert float(row["accuracy deviation"]) == pytest.approx(np.std(accuracies, ddof=1) if len(runs) > 1 else 0)
    probe, described = rows[0], rows[3]
    assert (probe["method"], described["method"], described["control"]) == (
        "linear_probe",
        "description_zero_shot",
        "none",
    )
    assert float(described["difference"]) == pytest.approx(
        float(described["accuracy mean"]) - float(probe["accuracy mean"])
    )
    latex = (plan.folder / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert r"description\_zero\_shot & random\_vectors" in latex
    widths = {line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 2  # each table has rows of one width


QUESTIONS: dict[str, Any] = {
    "variants": {"named": {"method": "description_zero_shot", "settings": {"class_names": True}}},
    "questions": [
        {"ask": "Do names | help?", "of": "named", "against": "description_zero_shot"},
        {"ask": "Do texts beat names?", "of": "description_zero_shot", "against": "zero_shot"},
    ],
    "open": [{"ask": "Are mountains high?", "because": "no picture shows one"}],
}


def test_answers_stand_on_a_page(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "describe_commit", lambda: "abc1234")
    plan, grid = made(project, **QUESTIONS)
    text = compare(plan, grid)
    assert len(re.findall(r"^named +(none|random_vectors) ", text, re.MULTILINE)) == 2 * 2
    page = (plan.folder / "answers.md").read_text()
    assert page.startswith(
        "# What study small answers\n\nRead on val, code abc1234; made by `make compare STUDY=small`."
    )
    assert "val also chose settings and epochs under full, long-tail-0.5" in page
    heads = re.findall("^## (.*)$", page, re.MULTILINE)
    titles = [f"tiny, {name}: val, 36 images of 6 classes, 2 runs" for name in ("full", "long-tail-0.5")]
    assert heads == [*titles, "Not answered"]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == ["question", "compared", "difference", "over images", "over classes", "p (Holm)", "answer"]
    assert rows[1][:2] == ["Do names &#124; help?", "named - description_zero_shot"]
    assert {len(row) for row in rows[:6]} == {7}
    assert rows[-1] == ["Are mountains high?", "no picture shows one"]
    means = {
        row["method"]: 100 * float(row["accuracy mean"])
        for row in csv.DictReader((plan.folder / "tables.csv").open())
        if (row["control"], row["regime"]) == ("none", "full")
    }
    assert float(rows[2][2]) == pytest.approx(means["description_zero_shot"] - means["zero_shot"], abs=0.051)


def test_the_commit_stands_in_the_header(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, grid = made(project)
    monkeypatch.setattr(module, "describe_commit", lambda: "abc1234-dirty")
    assert compare(plan, grid).splitlines()[0] == "study small, read on val, code abc1234-dirty"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert compare(plan, grid).splitlines()[0] == "study small, read on val"


def test_a_missing_or_stale_run_is_named(project: Path) -> None:
    plan, grid = made(project)
    edited = {name: replace(entry, source="edited") for name, entry in plan.entries.items()}
    stale = replace(plan, entries=edited)
    with pytest.raises(UserError, match=rf"lacks {len(grid)} of {len(grid)} runs \(first tiny\.linear_probe\.none"):
        compare(stale, grid)


def test_a_study_without_the_probe_cannot_be_compared(project: Path) -> None:
    plan, grid = planned(project, **STUDY | {"methods": ["zero_shot"]})
    with pytest.raises(UserError, match="lacks linear_probe or control none"):
        compare(plan, grid)


def write_health(data: Path, contaminated: int) -> None:
    """data/index/metrics.json as index_images writes it, with so many test images that train gives away."""
    health: dict[str, Any] = {}
    keys = [(line.key, line.spread) for lines in HEALTH.values() for line in lines]
    values = {"health.contaminated_test.images": contaminated, "health.contaminated_test.near_duplicates": contaminated}
    for key, spread in keys:
        place = health
        *folders, last = key.split(".")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = {"min": 1, "median": 1, "max": 1} if spread else values.get(key, 0)
    splits = read_table(data / "index/images.parquet", "index.images/1").filter(pa.compute.field("status") == "ok")[
        "split"
    ]
    health["images"] = {split: splits.to_pylist().count(split) for split in SPLITS}
    (data / "index/metrics.json").write_text(json.dumps(health))


def test_test_is_read_for_one_list_only(project: Path) -> None:
    write_health(project / "data", contaminated=2)
    plan, grid = made(project, declared_test=True)
    (plan.folder / MARKER).unlink(missing_ok=True)
    text = compare(plan, grid)
    assert text.startswith("study small, read on test")
    assert "warning: 2 of 36 test images are contaminated: 2 with a near duplicate in train or val" in text
    assert "val also chose" not in text
    assert json.loads((plan.folder / MARKER).read_text())["methods"] == STUDY["methods"]
    assert compare(plan, grid) == text
    fewer, fewer_grid = planned(project, **STUDY | {"methods": ["linear_probe", "zero_shot"]}, declared_test=True)
    with pytest.raises(
        UserError, match=r"studies\.small\.methods: test was read for \[.*\] already .*declared_test: false"
    ):
        compare(fewer, fewer_grid)
    more, more_grid = made(project, declared_test=True, questions=QUESTIONS["questions"][1:])
    with pytest.raises(UserError, match=r"studies\.small\.questions: test was read for \[\] already"):
        compare(more, more_grid)
    on_val, val_grid = planned(project, **STUDY | {"methods": ["linear_probe", "zero_shot"]})
    assert compare(on_val, val_grid).startswith("study small, read on val")


def test_groups_have_an_interval_of_their_own(tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Planted(classes=4, train=6, val=6, test=4))
    path = tmp_path / "data/index/images.parquet"
    header, rows = read_header(path, "index.images/1"), read_table(path, "index.images/1").to_pylist()
    for number, row in enumerate(rows):
        row["group"] = None if number % 5 == 0 else f"track {number // 3}"
    write_table(make_table("index.images/1", rows), path, "index.images/1", header.params, header.fingerprint)
    changes = {"methods": ["linear_probe", "zero_shot"], "controls": ["none"], "regimes": ["full"]}
    plan, grid = planned(tmp_path, **changes)
    run_study(plan, grid, 1)
    assert "over classes  over groups" in compare(plan, grid)
    rows = list(csv.DictReader((plan.folder / "tables.csv").open()))
    assert [bool(row["groups low"]) for row in rows] == [False, True]
    assert pq.read_schema(plan.folder / grid[0].run / "predictions.parquet").metadata[b"schema"] == b"run.predictions/1"
