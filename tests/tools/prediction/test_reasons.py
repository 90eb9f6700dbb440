"""What is a reason, and how pairs of texts are named where a run decides by them."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tools.prediction.reasons import Reasons, best_patches
from training.explain import LEAST_MOVE, name_pair


def test_a_pair_is_named_by_both_texts_and_the_classes_that_own_either() -> None:
    reasons = Reasons(cast(Any, None), cast(Any, None), Path(), {}, torch.device("cpu"))
    reasons.__dict__["bank"] = [
        {"concept_idx": 0, "text": "a red crown", "class_ids": ["b"]},
        {"concept_idx": 1, "text": "a long bill", "class_ids": ["c", "a"]},
    ]
    said = reasons.best_pairs([[0, 1], [1, 1], [0, 0]], [2.0, -0.5, 0.0], [True, False, True])
    named = "more of a red crown with a long bill at the same place than on other pictures"
    assert said == [
        {"text": named, "class_ids": ["a", "b", "c"], "gain": 2.0},
        {"text": name_pair("a long bill", "a long bill", False), "class_ids": ["a", "c"], "gain": -0.5},
    ]
    assert said[1]["text"] == "a long bill, setting places apart less than on other pictures"


def test_a_pair_that_speaks_by_being_missing_is_not_said_to_show() -> None:
    """A gain above 0 may come of less of the pair (below the mean, a weight against the class), one under 0 of more."""
    reasons = Reasons(cast(Any, None), cast(Any, None), Path(), {}, torch.device("cpu"))
    reasons.__dict__["bank"] = [{"text": text, "class_ids": []} for text in ("a red crown", "a long bill")]
    said = reasons.best_pairs([[0, 1], [1, 0]], [2.0, -1.0], [False, True])
    assert [row["text"].split()[0] for row in said] == ["less", "more"]


def test_what_hardly_moves_a_decision_is_no_reason() -> None:
    boxes = torch.eye(4)
    found = best_patches(torch.tensor([LEAST_MOVE / 2, 0.3, -2.0, LEAST_MOVE * 1.01]), boxes)
    assert [row["gain"] for row in found] == pytest.approx([0.3, LEAST_MOVE * 1.01])
    assert best_patches(torch.tensor([0.0, 1e-9]), boxes[:2]) == []
    reasons = Reasons(cast(Any, None), cast(Any, None), Path(), {}, torch.device("cpu"))
    reasons.__dict__["bank"] = [{"text": text, "class_ids": []} for text in ("fins", "tail", "eyes")]
    assert [row["text"] for row in reasons.best_concepts([0, 1, 2], [0.006, -0.004, 0.0])] == ["fins"]
    assert [row["gain"] for row in reasons.best_pairs([[0, 1], [1, 2]], [-0.004, -0.006], [True, True])] == [-0.006]
