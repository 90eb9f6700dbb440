"""Candidates and their probabilities, against explicit loops."""

import torch

from training.layers.partial_labels import among_candidates, moved, plausible

Q = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.2, 0.1, 0.3, 0.4]])
LOGITS = torch.tensor([[1.0, -1.0, 9.0, 0.0], [0.0, -5.0, 3.0, 1.0], [0.5, 0.0, -0.5, 2.0]])


def test_the_softmax_is_over_candidates_alone() -> None:
    found = among_candidates(Q, LOGITS)
    for q, logits, row in zip(Q, LOGITS, found, strict=True):
        total = sum(value.exp() for value, share in zip(logits, q, strict=True) if share > 0)
        expected = [value.exp() / total if share > 0 else 0.0 for value, share in zip(logits, q, strict=True)]
        torch.testing.assert_close(row, torch.tensor(expected))
    torch.testing.assert_close(moved(Q, LOGITS, 0.9), 0.9 * Q + 0.1 * found)


def test_q_stays_a_distribution_over_the_candidates_however_sure_logits_are() -> None:
    generator = torch.Generator().manual_seed(0)
    q = among_candidates(Q, torch.zeros(3, 4))
    for step in range(50):
        logits = 10.0 ** (step % 7 - 2) * torch.randn(3, 4, generator=generator)
        q = moved(q, logits, 0.7)
        torch.testing.assert_close(q.sum(1), torch.ones(3))
        assert q.min() >= 0
        assert not q[Q == 0].any()
        assert q[1, 1] == 1


def test_an_image_that_nothing_is_told_of_stays_so() -> None:
    assert not among_candidates(torch.zeros(2, 4), LOGITS[:2]).any()


def test_plausible_is_what_is_nearly_as_likely_as_the_likeliest() -> None:
    assert plausible(Q, 1.0).equal(Q > 0)
    p = torch.tensor([[0.89, 0.11, 0.0], [0.91, 0.08, 0.01], [0.1, 0.45, 0.45], [0.88, 0.06, 0.06]])
    found = plausible(p, 0.9)  # from a ninth on
    assert found.tolist() == [[True, True, False], [True, False, False], [True, True, True], [True, False, False]]
    for row, kept in zip(p, found, strict=True):
        assert kept.tolist() == [bool(share > 0 and share >= row.max() / 9) for share in row]


def test_a_class_that_is_sure_is_alone() -> None:
    p = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)).pow(6)
    p /= p.sum(1, keepdim=True)
    for sure in (0.5, 0.7, 0.9):
        is_sure = p.amax(1) > sure
        assert is_sure.any()
        assert (plausible(p, sure).sum(1)[is_sure] == 1).all()
