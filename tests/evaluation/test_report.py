"""The report on tiny tables: numbers worked out by hand, a page that parses, escapes and loads nothing."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from evaluation.accuracies import reach_of
from evaluation.report import report
from evaluation.statistics import Paired
from fieldmark.command import UserError
from fieldmark.store import read_header, read_table, sha256
from tests.evaluation.reported import NASTY, RUNS, Page, Row, make_params, rewrite, write_not_made, write_run
from tests.training.cache import ENCODER, write_other


def test_summary_says_what_a_hand_computes(data: Path) -> None:
    lines = report(make_params(), data).splitlines()
    assert lines[0].split("  ")[0] == "run"
    compared = [f"{split} - linear_probe [95 %]" for split in ("val", "test")]
    assert re.split(r"  +", lines[0]) == ["run", "val", compared[0], "test", compared[1], "train"]
    # train 1 and 11/12, val 11/12 and 1: mean 23/24, deviation sqrt(2)/24; test 9/12 and 8/12: 17/24.
    row = re.split(r"  +", lines[1])
    assert row[:2] + row[3:4] + row[5:] == ["zero_shot", "95.8 +- 5.9", "70.8 +- 5.9", "95.8 +- 5.9"]
    for field, expected in ((row[2], -4.2), (row[4], -20.8)):  # 23/24 - 1; 17/24 - 22/24
        difference, low, high = map(float, re.findall(r"[+-]\d+\.\d", field))
        assert difference == expected
        assert -60 < low < difference < high < 20
    assert re.split(r"  +", lines[2]) == [
        "linear_probe",
        "100.0 +- 0.0",
        "reference",
        "91.7 +- 0.0",
        "reference",
        "100.0 +- 0.0",
    ]
    assert "intervals over 12 images of val and 12 images of test: fewer than 20 say nothing of others" in lines[5]
    assert "val: the half of it that chose no setting and no epoch" in lines
    assert lines[7].startswith("test: a single, uncorrected reading")
    assert lines[-1] == f"report: {data}/report/index.html"
    assert (data / "report/summary.txt").read_text().splitlines() == lines


def test_tracks_are_what_the_intervals_are_over(data: Path) -> None:
    index = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    tracks = {row: {"group": f"{index[row]['split']} {row // 3}"} for row in range(len(index)) if row % 12 > 2}
    images, tracked = report(make_params(), data).splitlines(), tracks
    rewrite(data / "index/images.parquet", "index.images/1", tracked)
    groups = report(make_params(), data).splitlines()
    assert "intervals over 7 groups of val and 6 groups of test" in groups[5]
    (before, after) = (
        list(map(float, re.findall(r"[+-]\d+\.\d", re.split(r"  +", of[1])[4]))) for of in (images, groups)
    )
    assert before[0] == after[0]
    assert after[2] - after[1] > before[2] - before[1]
    text = Page((data / "report/index.html").read_text()).text
    assert "7 groups of val" in text
    assert "Votes of groups" in text
    assert not any("votes of" in line for line in images)
    # By hand: the mean logits of each track, of the seed that is kept.
    rows = read_table(data / "index/images.parquet", "index.images/1").to_pylist()
    group = {row["path"]: row["group"] or row["path"] for row in rows}
    seed = json.loads((data / "runs/linear_probe/config.json").read_text())["model_seed"]
    of_group: dict[str, list[Row]] = {}
    for row in read_table(data / "runs/linear_probe/predictions.parquet", "run.predictions/1").to_pylist():
        if row["split"] == "test" and row["seed"] == seed:
            of_group.setdefault(group[row["path"]], []).append(row)
    classes = read_header(data / "runs/linear_probe/predictions.parquet", "run.predictions/1").params["classes"]
    single = [each for each in of_group.values() if len({row["class_id"] for row in each}) == 1]
    right = [
        classes[max(range(3), key=lambda at: sum(row["logits"][at] for row in each))] == each[0]["class_id"]
        for each in single
    ]
    said = next(line for line in groups if line.startswith("votes of"))
    assert f"and {len(single)} of test (tracks, clips) that are right" in said
    assert re.search(rf"linear_probe \d+\.\d and {100 * sum(right) / len(right):.1f}", said)


def test_few_shots_are_judged_over_classes(data: Path) -> None:
    for name in RUNS:
        path = data / f"runs/{name}/config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "regime": {"kind": "shots", "shots": 1}}))
    assert "intervals over 3 classes of val and 3 classes of test" in report(make_params(), data)


def test_same_inputs_same_bytes(data: Path) -> None:
    outputs = []
    for _ in range(2):
        report(make_params(), data)
        outputs.append([path.read_bytes() for path in sorted((data / "report").iterdir())])
    assert len(outputs[0]) == 3
    assert outputs[0] == outputs[1]


def test_what_an_edit_did_stands_on_the_page_from_the_second_run_on(data: Path) -> None:
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "What changed" not in page.text  # nothing was seen before
    write_run(data, "linear_probe", [{f"val/class-00/{number:04d}.png": "class-02" for number in (1, 3)}] * 2)
    rows = read_table(data / f"bank/{ENCODER}.parquet", "bank/1").to_pylist()
    lost = next(number for number, row in enumerate(rows) if row["kept"] and row["class_ids"] and row["text"] != NASTY)
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", {lost: {"kept": False, "drop_reason": "finds nothing"}})
    report(make_params(), data)
    text = Page((data / "report/index.html").read_text()).text
    changed = text[text.index("Against the last run") : text.index("DVC brings a page back")]
    state = json.loads((data / "report/state.json").read_text())
    moved = [path for path in state["images"] if path in ("val/class-00/0001.png", "val/class-00/0003.png")]
    after = (len(state["images"]) - len(moved)) / len(state["images"])
    assert moved
    assert f"linear_probe 100.0 {100 * after:.1f} {100 * (after - 1):+.1f} 0 {len(moved)}" in changed
    assert all(path in changed for path in moved)
    assert f"lost: {rows[lost]['text']} (finds nothing)" in changed
    assert "0 gained, 1 lost" in changed
    assert "test/" not in changed


def test_a_method_that_cannot_work_is_a_row_that_says_why(data: Path) -> None:
    before = report(make_params(), data).splitlines()
    reason = f"class class-00 has no kept concept {NASTY}"
    write_not_made(data, "knn", reason)
    params = make_params(runs={"knn": ENCODER, **RUNS})
    lines = report(params, data).splitlines()
    assert f"knn: cannot work on this data: {reason}" in lines
    assert [line for line in lines if not line.startswith("knn")] == before
    html = (data / "report/index.html").read_text()
    page = Page(html)
    assert f"knn cannot work on this data: {reason}" in page.text
    assert html.count("<script") == 3
    assert not any("runs/knn" in word for word in page.words)  # there is no prediction to be made from
    params = make_params(reference="knn", runs={"knn": ENCODER, **RUNS})
    with pytest.raises(UserError, match=r"runs/knn: cannot work on this data \(class .* in report\.reference$"):
        report(params, data)


def test_page_holds_every_part_and_loads_nothing(data: Path) -> None:
    report(make_params(), data)
    html = (data / "report/index.html").read_text()
    page = Page(html)
    for expected in (
        *RUNS,
        "reef fish",
        "kinds of fish apart",
        f"encoder {ENCODER}",
        "0 of 12 val images",
        "12 pictures of the half of val that chose nothing, and 12 of the half that chose",
        "what these concepts carry cannot be told".capitalize(),
        "broken",
    ):
        assert expected in page.text
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#")), (tag, name)
        assert not any(name.startswith("on") or name == "style" for name in attrs)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in html
    assert str(data) not in html


def test_policy_names_the_one_script_and_the_one_style(data: Path) -> None:
    report(make_params(), data)
    html = (data / "report/index.html").read_text()
    page = Page(html)
    [policy] = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    script, by = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (page.scripts["script"], style)
    )
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{by}'; img-src data:; base-uri 'none';"
        " form-action 'none'"
    )
    kinds = [(attrs.get("type"), attrs.get("src")) for tag, attrs in page.tags if tag == "script"]
    assert kinds == [("application/json", None), ("application/json", None), (None, None)]


def test_confusion_is_of_val_and_of_the_kept_seed(data: Path) -> None:
    # On val, seed 1 of linear_probe takes one image of class 0 for class 2; seed 0 takes it for class 1.
    first = "val/class-00/0000.png"
    write_run(data, "linear_probe", [{first: "class-01"}, {first: "class-02"}], model_seed=1)
    write_run(data, "zero_shot", [{f"val/class-01/{number:04d}.png": "class-00" for number in range(4)}] * 2)
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "Class-00 taken for Class-02: 1 of 4" in page.text
    assert "Class-00 taken for Class-01" not in page.text
    assert "Class-00 taken for Class-00: 3 of 4" in page.text
    assert "1 of 12 val images are classified wrongly by seed 1" in page.text
    assert len(page.of_class("hit")) == 3
    assert len(page.of_class("empty")) == 9 - 4
    row = page.text[page.text.index("train images Class-00") :]  # the least accurate class stands first
    assert row.startswith("train images Class-00 75.0 1 Class-02 1")


def test_another_run_can_be_shown(data: Path) -> None:
    report(make_params(shown="zero_shot"), data)
    page = Page((data / "report/index.html").read_text())
    assert "What zero_shot confuses" in page.text
    assert "zero_shot is what report.run names" in page.text
    write_not_made(data, "knn", "no")
    with pytest.raises(UserError, match=r"runs/knn: cannot work on this data \(no\); .* report\.run, or null$"):
        report(make_params(shown="knn", runs={"knn": ENCODER, **RUNS}), data)


def test_concepts_are_counted_with_their_reasons(data: Path) -> None:
    # The bank: 6 names, 9 visual concepts, 2 generic ones, 1 dropped as a duplicate.
    report(make_params(), data)
    text = Page((data / "report/index.html").read_text()).text
    assert "Of 4 concepts, 3 stood after cleaning by text." in text.replace("concepts , ", "concepts, ")
    assert "12 candidates, of which 11 were kept" in text
    assert "clean_concepts names the class 1" in text
    assert "select_concepts duplicate 1" in text


def test_text_is_escaped(data: Path) -> None:
    rewrite(data / "index/classes.parquet", "index.classes/2", {0: {"name": NASTY}})
    rewrite(data / "index/images.parquet", "index.images/1", {12: {"error": NASTY}})
    everything = {position: {"text": f"{NASTY} {position}"} for position in range(18)}
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", everything)
    report(make_params(), data)
    html = (data / "report/index.html").read_text()
    assert html.count("<script") == html.count("</script") == 3
    page = Page(html)
    assert NASTY in page.text
    assert page.data["classes"][0]["name"] == NASTY
    assert page.data["concepts"][17]["text"] == f"{NASTY} 17"


def test_control_characters_of_data_stay_off_the_page_and_the_terminal(data: Path) -> None:
    hostile, shown = "\x1b[2J \u202etxt.\x07\u2028", r"\x1b[2J \u202etxt.\x07\u2028"
    rewrite(data / "index/classes.parquet", "index.classes/2", {0: {"name": hostile}})
    rewrite(data / "index/images.parquet", "index.images/1", {12: {"error": hostile}})
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", {position: {"text": hostile} for position in range(18)})
    summary = report(make_params(), data)
    html = (data / "report/index.html").read_text()
    assert not set(hostile) - set(shown) & set(html + summary)
    page = Page(html)
    assert page.text.count(shown) > 3
    assert page.data["classes"][0]["name"] == page.data["concepts"][17]["text"] == shown


def test_test_pictures_are_opened_on_request_and_that_is_remembered(data: Path) -> None:
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert {picture["split"] for picture in page.data["pictures"]} == {"val", "choose"}
    assert len(page.pictures) == 24
    marker = data / "studies/test_was_opened.json"
    assert not marker.exists()

    for _ in range(2):  # the same run again is no other reading
        report(make_params(), data, open_test=True)
    page = Page((data / "report/index.html").read_text())
    assert sum(picture["split"] == "test" for picture in page.data["pictures"]) == 12
    assert "Test pictures are shown on this page" in page.text
    assert "0 of 12 val images are classified wrongly" in page.text  # what is counted is of val all the same
    [opening] = json.loads(marker.read_text())
    assert opening["run"] == "linear_probe"
    assert len(opening["images"].split()) == 12

    summary = report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert len(page.data["pictures"]) == 24
    assert "Test pictures were opened before" in page.text
    assert "note: test pictures were opened (data/studies/test_was_opened.json)" in summary


def test_a_large_page_keeps_its_pictures_beside_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.page.LARGEST", 100)
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert page.pictures == {}
    files = {file.stem for file in (data / "report/pictures").iterdir()}
    assert files == {picture["id"] for picture in page.data["pictures"]}
    monkeypatch.undo()
    report(make_params(), data)
    assert not (data / "report/pictures").exists()


def test_of_many_pictures_some_are_drawn_and_all_are_counted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(make_params(), data)
    whole = Page((data / "report/index.html").read_text())
    monkeypatch.setattr("evaluation.gallery.PICTURES", 7)
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    shown = [picture["path"] for picture in page.data["pictures"]]
    every = [picture["path"] for picture in whole.data["pictures"]]
    assert shown == sorted(sorted(every, key=sha256)[:7])
    assert all(picture in whole.data["pictures"] for picture in page.data["pictures"])
    assert f"{len(every) - 7} more were left out by a draw" in page.text
    assert "more were left out" not in whole.text
    said = re.search(r"\d+ of 12 val images are classified wrongly", whole.text)
    assert said
    assert said[0] in page.text


def test_nothing_wrong(data: Path) -> None:
    report(make_params(), data)
    page = Page((data / "report/index.html").read_text())
    assert "0 of 12 val images are classified wrongly" in page.text
    assert "No pair of classes is confused." in page.text
    assert not page.of_class("miss")


def test_a_run_far_from_the_reference_does_not_press_the_others_together() -> None:
    def row(difference: float, low: float, high: float) -> Row:
        over = (low, high)
        return {"paired": {"val": Paired(difference, over, over, None, "images", 40, over, 0.5)}}

    near, far = row(0.02, -0.03, 0.06), row(-0.8, -0.9, -0.7)
    assert reach_of([{"paired": {}}, near, far]) == 0.06
    assert reach_of([{"paired": {}}, far]) == 0.9
    assert reach_of([{"paired": {}}]) == 0.01


def test_a_run_on_a_tower_is_a_row_like_any_other(data: Path) -> None:
    write_other(data, "dino", 12)
    write_run(data, "knn", [{"val/class-00/0000.png": "class-01"}], encoder="dino")
    lines = report(make_params(runs={**RUNS, "knn": "dino"}, towers=["dino"]), data).splitlines()
    name, _, on_val, _, on_test, _ = re.split(r"  +", lines[3])
    assert (name, on_val[:6], on_test[:6]) == ("knn", "-8.3 [", "+8.3 [")
    page = Page((data / "report/index.html").read_text())
    assert "knn 91.7 -8.3" in page.text
    # linear_probe is better on val: the page is about it, with its patches and concepts.
    assert page.data["pictures"][0]["patches"]
    assert "Of 4 concepts" in page.text


def test_a_tower_that_is_best_on_val_has_no_patch_and_no_concept(data: Path) -> None:
    write_other(data, "dino", 12)
    write_run(data, "knn", [{"test/class-00/0000.png": "class-01"}], encoder="dino")
    shutil.rmtree(data / "labels")  # those of the other encoder are not opened
    report(make_params(runs={"knn": "dino", **RUNS}, towers=["dino"]), data)
    page = Page((data / "report/index.html").read_text())
    assert "What knn confuses 0 of 12 val images" in page.text
    assert len(page.data["pictures"]) == 24
    assert not any("patches" in picture for picture in page.data["pictures"])
    assert page.data["concepts"] == []
    assert "concepts" not in {attrs.get("id") for _, attrs in page.tags}
    assert "embed/dino/images" in page.text
    assert "labels/" not in page.text.split("What this page was made from")[1]
