"""What a bank that is selected anew is told, where a regime tells wrong classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fieldmark.concepts import gate
from fieldmark.params import Select
from tests.training.cache import ENCODER, Plan, write_cache
from training import reselection
from training.controls import Control, Request
from training.data import read_cache
from training.regimes import Noise


def test_the_gate_is_told_what_training_and_the_half_that_chooses_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = Plan(classes=6, train=6, val=6, test=2), {}

    def judge(train: gate.Vectors, val: gate.Vectors, *_: Any) -> dict[str, Any]:
        asked.update(train=train, choose=val)
        return {"verdict": "signal"}

    write_cache(tmp_path, plan)
    monkeypatch.setattr(gate, "judge", judge)
    monkeypatch.setattr(reselection, "read_selection", lambda *_: Select(fallback="auto"))
    cache = read_cache(tmp_path, ENCODER, plan.buckets, {*reselection.NEEDS, "globals"})
    noisy = Noise(wrong="symmetric", share=0.5, val="noisy").apply(cache, 0)
    request = Request(Control(), tmp_path, ENCODER, plan.buckets, generator=None)  # type: ignore[arg-type]  # draws nothing
    reselection.select(noisy, request)
    classes = np.array(cache.classes, dtype=object)
    for split, (vectors, class_ids) in asked.items():
        images = cache.images(split)
        np.testing.assert_array_equal(vectors, cache.globals(images).numpy())
        assert class_ids.tolist() == classes[noisy.target[images].numpy()].tolist()
        assert class_ids.tolist() != classes[cache.y[images].numpy()].tolist()
