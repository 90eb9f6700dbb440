"""What a share of descriptions is worth, on a tiny cache whose sentences and links say the class."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from fieldmark.command import UserError
from tests.training.cache import Plan, write_cache
from tools import describe_share
from training.data import read_cache
from training.data.descriptions import Descriptions

PLAN = Plan(classes=4, train=20, val=8, test=4, sentences=2, described="all", links=8, noise=2.5)
READS = {"globals", "descriptions", "links/near"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_cache(Path("data"), PLAN)
    content = {
        "domain": {"noun": "fish", "group": "fish"},
        "dataset": {"root": "data/photos", "buckets": PLAN.buckets},
        "llm": {"mode": "replay", "model": "tiny"},
        "encoders": {"tiny": {"model": "tiny"}},
        "train": {"runs": {"zero_shot": {"method": "zero_shot", "encoder": "tiny"}}},
        "report": {"reference": "zero_shot"},
    }
    with open("params.yaml", "w") as file:
        YAML(typ="safe").dump(content, file)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["describe_share", *arguments])
    describe_share.main()


def test_a_table_of_shares(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--encoder", "tiny", "--draws", "2", "--shares", "0.1", "1.0")
    said = capsys.readouterr().out
    assert said.startswith("112 development pictures of 4 classes, ridge, 5 folds, 2 draws")
    rows = re.findall(r"^ *(0\.1|1) +(\d+)  (text alone|picture and text) +([\d.]+)(.*)$", said, re.MULTILINE)
    arms, counted = ("text alone", "picture and text"), (("0.1", "13"), ("1", "128"))
    assert [row[:3] for row in rows] == [(share, calls, arm) for share, calls in counted for arm in arms]
    assert all(re.search(r"\[[+-][\d.]+, [+-][\d.]+\]", row[4]) for row in rows[:2])
    assert [row[4] for row in rows[2:]] == ["", ""]


def test_as_many_pictures_are_chosen_either_way_and_others_lose_their_sentences(project: Path) -> None:
    cache = read_cache("data", "tiny", PLAN.buckets, READS)
    chosen = describe_share.choose(cache, 0.1, draws=3)
    assert [len(images) for each in chosen.values() for images in each] == [13] * 4
    assert len({tuple(sorted(images.tolist())) for images in chosen["chance"]}) == 3
    few = describe_share.described_only(cache, chosen["informative"][0]).part(Descriptions).dm
    assert set(few.any(1).nonzero().flatten().tolist()) == set(chosen["informative"][0].tolist())
    assert torch.equal(few[chosen["informative"][0]], cache.part(Descriptions).dm[chosen["informative"][0]])


def test_development_pictures_alone_are_judged_out_of_fold(project: Path) -> None:
    cache = read_cache("data", "tiny", PLAN.buckets, READS)
    right = describe_share.out_of_fold(cache, ["global"])
    assert np.array_equal(np.isnan(right), cache.split == "test")
    assert np.nanmean(right) > 0.5
    low, high = describe_share.interval(right[~np.isnan(right)])
    assert low < np.nanmean(right) < high


def test_without_descriptions_it_says_what_to_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(Path("data"), Plan(classes=4, train=20, val=8, test=4))
    with pytest.raises(UserError, match=r"descriptions\.parquet: holds nothing; run describe_images with share 1\.0"):
        run(monkeypatch, "--encoder", "tiny")
