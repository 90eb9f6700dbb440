"""Partial labels: an image has candidate classes Y, the true one among them, and q says how likely each of them is.

q (B, C) are probabilities that are 0 outside Y, and begin as training is told them: uniform over Y. A method that
disambiguates moves them towards what it finds itself (`Retell` of training/loop.py). They stand where targets do, so
that q of an image that is evaluated is nothing that a model could see.
"""

import torch
from torch import Tensor


def among_candidates(q: Tensor, logits: Tensor) -> Tensor:
    """softmax(logits | Y), (B, C), of q (B, C) > 0 in Y and logits (B, C).

    A candidate under 1e-45 is one no longer; a row of zeros, of an image that nothing is told of, stays one.
    """
    outside = q <= 0
    # Not -inf: a row without a candidate would be nan.
    found = logits.float().masked_fill(outside, torch.finfo(torch.float32).min).softmax(1)
    return found.masked_fill(outside, 0.0)


def moved(q: Tensor, logits: Tensor, kept: float) -> Tensor:
    """kept q + (1 - kept) softmax(logits | Y)."""
    return kept * q + (1 - kept) * among_candidates(q, logits)


def plausible(p: Tensor, sure: float) -> Tensor:
    """(B, C) bool: of p (B, C) > 0, what is at least (1 - sure) / sure times as likely as the likeliest class.

    Where one class has more than `sure`, it is alone. `sure` is in [0.5, 1]; at 1 every class of p > 0 is plausible.
    """
    return (p >= (1 - sure) / sure * p.amax(1, keepdim=True)) & (p > 0)
