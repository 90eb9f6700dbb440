"""Which pictures runs are asked about, and what stands on the page of what they say."""

from pathlib import Path

import pytest
import torch

from evaluation import decisions
from evaluation.decisions import to_explain
from evaluation.report import report
from fieldmark.store import bucket_path, read_table
from tests.evaluation.reported import PLAN, RUNS, Page, make_params
from tests.training.cache import ENCODER
from training.data import read_cache
from training.explain import pairs, texts
from training.restore import restore
from training.train import train


def test_mistakes_come_first_and_the_surest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = {"d": (0, 0, 900), "b": (1, 0, 600), "a": (0, 0, 300), "c": (1, 0, 700)}
    pictures = [(image_id, {"y": y, "top": [[guess, sure]]}) for image_id, (y, guess, sure) in answered.items()]
    for count, expected in ((1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])):
        monkeypatch.setattr(decisions, "EXPLAINED", count)
        assert to_explain(pictures) == expected


def test_a_text_says_whose_it_is(data: Path) -> None:
    rows = read_table(data / f"bank/{ENCODER}.parquet", "bank/1").to_pylist()
    classes = sorted({class_id for row in rows for class_id in row["class_ids"]})
    said = decisions.bank_texts(data, ENCODER, classes)
    assert len(said) == len(rows)
    for row in rows:
        assert [classes[label] for label in said[row["concept_idx"]]["owners"]] == row["class_ids"]
        assert row["text"] is None or said[row["concept_idx"]]["text"] == row["text"]
    missing = decisions.bank_texts(data, ENCODER, classes[1:])  # of a class that a run does not know
    assert all(len(missing[at]["owners"]) <= len(one["owners"]) for at, one in said.items())


@pytest.mark.slow
def test_a_run_that_reads_patches_says_what_each_adds_and_where_it_lies(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "EXPLAINED", 5)
    params = make_params(shown="attention_pool", runs={**RUNS, "attention_pool": ENCODER})
    settings = {"epochs": 5, "lr": [0.003], "weight_decay": [0.01], "stop": 5}
    params.train.runs["attention_pool"].settings.update(settings)
    train(params, "params.yaml", "attention_pool", data)
    report(params, data)
    page = Page((data / "report/index.html").read_text()).data
    assert page["explained"] == [{"run": 2, "texts": [], "pairs": False}]  # the others read whole pictures
    explained = [picture for picture in page["pictures"] if "decisions" in picture]
    assert len(explained) == 5
    index = {row["path"]: row for row in read_table(data / "index/images.parquet", "index.images/1").to_pylist()}
    for picture in explained:
        image_id = index[picture["path"]]["image_id"]
        path = bucket_path(data / f"embed/{ENCODER}/images", int(image_id[:8], 16) % PLAN.buckets)
        rows = read_table(path, "embed.nodes/1", ["image_id", "view", "node", "x0", "y0", "x1", "y1"]).to_pylist()
        own = [row for row in rows if (row["image_id"], row["view"]) == (image_id, 0) and row["node"]]
        boxes = [[round(1000 * row[side]) for side in ("x0", "y0", "x1", "y1")] for row in own]
        decision = picture["decisions"]["2"]
        assert picture["boxes"][ENCODER] == boxes
        assert len(decision["fall"]) == len(decision["scores"]) == len(boxes)
        first, second = picture["top"][0][0], picture["top"][1][0]
        assert decision["pair"] == [first, second if picture["y"] == first else picture["y"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["concept_bottleneck", "pair_bottleneck"])
def test_a_run_of_concepts_names_those_that_decide_and_has_no_patch(data: Path, method: str) -> None:
    params = make_params(shown=method, runs={**RUNS, method: ENCODER})
    train(params, "params.yaml", method, data)
    report(params, data)
    page = Page((data / "report/index.html").read_text()).data
    [asked] = page["explained"]
    assert (asked["run"], asked["pairs"]) == (2, method == "pair_bottleneck")
    bank = [row["text"] for row in read_table(data / f"bank/{ENCODER}.parquet", "bank/1").to_pylist()]
    named = [text["text"] for text in asked["texts"]]
    assert len(named) == len(set(named)) > 1
    assert all(any(text in name for text in bank) for name in named)
    if method == "pair_bottleneck":
        assert all(" than on other pictures" in name for name in named)
    restored = restore(params, "params.yaml", method, data)
    cache = read_cache(data, ENCODER, PLAN.buckets, restored.reads)
    for picture in [one for one in page["pictures"] if "decisions" in one]:
        decision = picture["decisions"]["2"]
        assert decision["fall"] is decision["scores"] is None
        assert picture["boxes"] == {}
        image = torch.tensor([cache.paths.index(picture["path"])])
        say = pairs if method == "pair_bottleneck" else texts
        found = say(restored, cache, image, torch.tensor([decision["pair"]]), decisions.TEXTS)
        assert found is not None
        adds = [value for value in found.adds[0].tolist() if abs(value) > decisions.LEAST]
        assert [value for _, value in decision["texts"]] == pytest.approx(adds, abs=1e-3)
