"""The loss of AdaptCLIPZS against loops, and which sentence stands beside which picture."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fieldmark.encoders.alignment import alignment_loss, class_probabilities, deal_texts, draw_text, own_texts

SENTENCES = {"a": ["red", "both"], "b": ["both", "blue", "long"], "c": ["short"]}


def loss_by_loops(logits: list[list[float]], positives: list[list[bool]]) -> float:
    """Pictures to sentences and back, one term after the other."""
    count, total = len(logits), 0.0
    for flip in (False, True):
        for i in range(count):
            row = [logits[j][i] if flip else logits[i][j] for j in range(count)]
            of_row = [positives[j][i] if flip else positives[i][j] for j in range(count)]
            norm = math.log(sum(math.exp(each) for each in row))
            terms = [norm - each for each, mine in zip(row, of_row, strict=True) if mine]
            total += sum(terms) / len(terms) / count / 2
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_that_of_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    positives = (torch.rand(9, 9, generator=generator) < 0.3) | torch.eye(9, dtype=torch.bool)
    expected = loss_by_loops(logits.tolist(), positives.tolist())
    assert alignment_loss(logits, positives).item() == pytest.approx(expected, rel=1e-9)


def test_with_all_classes_distinct_it_is_symmetric_infonce() -> None:
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    own = torch.arange(7)
    infonce = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(alignment_loss(logits, torch.eye(7, dtype=torch.bool)), infonce)


def test_a_sentence_that_two_classes_own_is_theirs_both() -> None:
    texts = own_texts(SENTENCES)
    assert texts.sentences == ["blue", "both", "long", "red", "short"]
    assert texts.owners[1].tolist() == [True, True, False]
    assert [[texts.sentences[row] for row in rows] for rows in texts.of_class] == [
        ["both", "red"], ["blue", "both", "long"], ["short"],
    ]  # fmt: skip
    # A picture of b beside the sentence that was drawn for one of a.
    drawn, owners = [1, 0], [0, 1]
    assert texts.owners[drawn][:, owners].T.tolist() == [[True, False], [True, True]]


def test_a_class_is_told_by_the_mean_over_its_sentences() -> None:
    """As test_AdaptZS of the public code does it, on a toy of three classes."""
    texts = own_texts(SENTENCES)
    logits = torch.tensor([[0.3, 1.0, -0.5, 0.2, 0.9], [2.0, 0.0, 0.1, -1.0, 1.5]], dtype=torch.float64)
    found = class_probabilities(logits, texts.owners)
    for row, given in enumerate(logits.tolist()):
        p = np.exp(given) / np.exp(given).sum()
        expected = [(p[1] + p[3]) / 2, (p[0] + p[1] + p[2]) / 3, p[4]]
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-12)


def test_sentences_are_drawn_by_seed_epoch_and_picture() -> None:
    images = [f"image {number}" for number in range(300)]
    first = [draw_text(each, 0, 0, [3, 5, 8]) for each in images]
    assert first == [draw_text(each, 0, 0, [3, 5, 8]) for each in images]
    assert first != [draw_text(each, 1, 0, [3, 5, 8]) for each in images]
    assert first != [draw_text(each, 0, 1, [3, 5, 8]) for each in images]
    counts = Counter(first)
    assert set(counts) == {3, 5, 8}
    assert min(counts.values()) > 60  # 100 is expected, and the deviation is 8


def test_dealt_anew_every_class_has_as_many_and_nothing_is_lost() -> None:
    many = {name: [f"{name} {number}" for number in range(20)] for name in "abcd"}
    dealt = deal_texts(many, 0)
    assert {name: len(texts) for name, texts in dealt.items()} == dict.fromkeys("abcd", 20)
    assert sorted(chain(*dealt.values())) == sorted(chain(*many.values()))
    kept = sum(text.startswith(name) for name, texts in dealt.items() for text in texts)
    assert kept < 40  # 20 by chance
    assert deal_texts(many, 0) == dealt != deal_texts(many, 1)
