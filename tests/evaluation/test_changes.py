"""What an edit did, on tables of a few rows: by hand, and against loops on drawn ones."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.changes import STATES, State, compare, dump, last_state, parse, remember, take_state
from evaluation.page import FOLDER, environment
from evaluation.runs import Run, read_run
from evaluation.words import percent, points
from fieldmark.command import UserError
from fieldmark.store import read_table
from tests.evaluation.reported import rewrite, write_answers, write_run
from tests.training.cache import ENCODER
from tools.changes import read_state, say

NOTHING = State(names={}, images=[], labels=[], seeds={}, right={}, concepts={}, costs={})


def state_of(data: Path, *names: str) -> State:
    runs = [read_run(data, name, ENCODER) for name in names]
    return take_state(data, [run for run in runs if isinstance(run, Run)], [ENCODER])


def test_a_state_holds_the_half_of_val_that_chose_nothing_and_no_test_image(data: Path) -> None:
    wrong = "val/class-01/0002.png"
    write_run(data, "linear_probe", [{wrong: "class-00", "test/class-00/0000.png": "class-01"}, {}])
    state = state_of(data, "linear_probe")
    assert state.images == [f"val/class-{label:02d}/{number:04d}.png" for label in range(3) for number in range(4)]
    assert state.labels == [image.split("/")[1] for image in state.images]
    assert state.seeds == {"linear_probe": 2}
    assert dict(zip(state.images, state.right["linear_probe"], strict=True)) == dict.fromkeys(state.images, 2) | {
        wrong: 1
    }
    assert state.names["class-01"] == "Class-01"
    assert "test/" not in dump(state)
    assert parse(dump(state)) == state


def test_a_concept_is_lost_with_its_reason_and_gained_by_its_class(data: Path) -> None:
    before = state_of(data, "linear_probe")
    path, schema = data / f"bank/{ENCODER}.parquet", "bank/1"
    rows = read_table(path, schema).to_pylist()
    kept = [number for number, row in enumerate(rows) if row["kept"] and row["class_ids"]]
    dropped, renamed = kept[:2]
    new = {"text": "a fish with a new mark"}
    rewrite(path, schema, {dropped: {"kept": False, "drop_reason": "near duplicate of: x"}, renamed: new})
    found = compare(before, state_of(data, "linear_probe")).concepts[ENCODER]
    owners, gone, changed = rows[dropped]["class_ids"], rows[dropped]["text"], rows[renamed]["text"]
    assert owners == rows[renamed]["class_ids"]
    assert list(found) == owners
    assert found[owners[0]].gained == [new["text"]]
    assert found[owners[0]].lost == {gone: "near duplicate of: x", changed: "is not written any more"}
    assert compare(before, before).concepts == {}


def test_images_change_sides_by_the_majority_of_seeds() -> None:
    rng = np.random.default_rng(0)
    images, classes = [f"{number:02d}.png" for number in range(40)], ["a", "b", "c"]
    labels = rng.choice(classes, 40).tolist()
    before, after = (
        replace(
            NOTHING,
            images=images,
            labels=labels,
            seeds={"run": seeds},
            right={"run": rng.integers(0, seeds + 1, 40).tolist()},
        )
        for seeds in (4, 3)
    )
    change = compare(before, after).runs["run"]
    right = {
        name: {image: count / state.seeds["run"] for image, count in zip(images, state.right["run"], strict=True)}
        for name, state in (("before", before), ("after", after))
    }
    for moved, then, now in ((change.now_right, "before", "after"), (change.now_wrong, "after", "before")):
        assert moved == [image for image in images if right[then][image] <= 0.5 < right[now][image]]
        assert moved
    assert change.accuracy == pytest.approx([sum(rates.values()) / 40 for rates in right.values()])
    for class_id, (then, now, count) in change.classes.items():
        own = [image for image, label in zip(images, labels, strict=True) if label == class_id]
        assert count == len(own)
        assert (then, now) == pytest.approx([sum(rates[image] for image in own) / count for rates in right.values()])


def test_only_images_and_runs_of_both_are_compared() -> None:
    before = replace(NOTHING, images=["1", "2", "3"], labels=["a", "a", "b"], seeds={"old": 1, "both": 1})
    before = replace(before, right={"old": [1, 1, 1], "both": [0, 1, 1]})
    after = replace(NOTHING, images=["0", "1", "2"], labels=["a", "a", "a"], seeds={"both": 1, "new": 1})
    after = replace(after, right={"both": [0, 1, 1], "new": [1, 1, 1]})
    found = compare(before, after)
    assert (found.added_runs, found.removed_runs) == (["new"], ["old"])
    assert (found.images, found.added_images, found.removed_images) == (2, 1, 1)
    assert list(found.runs) == ["both"]
    assert found.runs["both"].now_right == ["1"]
    assert found.runs["both"].accuracy == (0.5, 1.0)
    # Nothing in common: another data set.
    assert compare(replace(before, images=["7", "8", "9"]), after).runs == {}
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize(
    ("then", "now", "label"),
    [
        ([], [], "run"),
        (["run"], ["run"], "run (transductive)"),
        ([], ["run"], "run (transductive now)"),
        (["run"], [], "run (transductive before)"),
    ],
)
def test_what_is_transductive_is_said_beside_what_changed(then: list[str], now: list[str], label: str) -> None:
    state = replace(NOTHING, images=["1", "2"], labels=["a", "a"], seeds={"run": 1})
    before = replace(state, right={"run": [0, 1]}, transductive=then)
    found = compare(before, replace(state, right={"run": [1, 1]}, transductive=now))
    text = say(found, {}, whole=True)
    assert re.search(rf"^ *{re.escape(label)}  +50\.0", text, re.M)
    template = environment(FOLDER, percent=percent, points=points).get_template("changes.html.jinja")
    html = template.render(changes=found, changed_names={"a": "A"}, generic="*")
    assert f"<summary>{label}: 1 class changed" in html
    assert parse(dump(before)) == before


def test_the_page_names_the_first_images_and_counts_the_rest() -> None:
    # An encoder that is new may change thousands.
    images = [f"{number:04d}.png" for number in range(3021)]
    before = replace(NOTHING, names={"a": "A"}, images=images, labels=["a"] * 3021, seeds={"run": 1})
    before = replace(before, right={"run": [0] * 3000 + [1] * 20 + [0]})
    after = replace(before, right={"run": [1] * 3000 + [0] * 20 + [0]})
    template = environment(FOLDER, percent=percent, points=points).get_template("changes.html.jinja")
    html = template.render(changes=compare(before, after), changed_names=before.names, generic="*")
    assert html.count("<code>0") == 20
    assert "<code>0019.png</code> and 2980 more (<code>python -m tools.changes --all</code> names them).</p>" in html
    assert html.count("<code>30") == 20  # of twenty all are named
    assert "<code>3019.png</code>.</p>" in html


def test_money_is_that_of_answers_that_came_since(data: Path) -> None:
    times = [f"2026-01-0{day}T00:00:00Z" for day in range(1, 6)]
    path = data / "concepts/answers.parquet"
    write_answers(path, dict(zip(times[:2], (0.25, None), strict=True)))
    first = state_of(data, "linear_probe")
    assert (first.costs[times[0]], first.costs[times[1]]) == ((1, 0, 0.25), (1, 1, 0.0))
    write_answers(path, dict(zip(times[:4], (0.25, None, 0.5, None), strict=True)))
    write_answers(data / "descriptions/answers.parquet", {times[2]: 1.0, times[4]: 2.0})
    second = state_of(data, "linear_probe")
    found = compare(first, second)
    assert (found.answers, found.unpriced, found.usd) == (4, 1, 3.5)
    # Undone: what comes back from the journal was paid before.
    assert (compare(second, first).answers, compare(second, first).usd) == (0, 0.0)
    # Questions of one's own are paid like others.
    write_answers(data / "asked/guess/answers.parquet", {"2026-01-09T00:00:00Z": 4.0})
    third = compare(second, state_of(data, "linear_probe"))
    assert (third.answers, third.usd) == (1, 4.0)
    write_answers(path, {times[4]: 9.0}, source="replay")
    assert times[4] not in replace(state_of(data, "linear_probe"), costs={}).costs
    assert state_of(data, "linear_probe").costs[times[4]] == (1, 0, 2.0)


def test_a_state_that_is_not_there_is_one_line_with_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^state: is not there; run it$"):
        read_state(tmp_path / "state.json", "state", "run it")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"^state: cannot be read \(.+\); run it$"):
        read_state(tmp_path / "state.json", "state", "run it")


def test_the_last_state_is_the_newest_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    a, b, c = (replace(NOTHING, names={name: name}) for name in "abc")
    assert last_state(a, data) is None
    remember(a, data)
    assert last_state(a, data) is None
    assert last_state(b, data) == a
    for _ in range(2):
        remember(b, data)
        assert last_state(b, data) == a
    # An edit that is undone, and comes back without any stage, is compared with the edit.
    assert last_state(a, data) == b
    remember(a, data)
    remember(c, data)
    assert (last_state(c, data), last_state(a, data)) == (a, c)
    # Where it lies is not read by an experiment's copy that has its own, and is by one that has none.
    copy = tmp_path / ".dvc/tmp/exps/1/data"
    copy.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert last_state(b, copy) == c
    remember(b, copy)
    assert last_state(b, copy) is None
    assert last_state(b, data) == c
    # Spoilt, or of another version: as if nothing had been seen.
    (tmp_path / STATES / "now.json").write_text("{")
    (tmp_path / STATES / "before.json").write_text('{"schema": "report.state/0"}')
    assert last_state(b, data) is None
