"""How pairs of texts are named where a run decides by them."""

from pathlib import Path
from typing import Any, cast

import torch

from tools.prediction.reasons import Reasons, name_pair


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
