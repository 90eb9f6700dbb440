"""Layers over padded batches: standardisation, normalised adjacency, dropout, attention. Padded nodes stay inert."""

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """(x - mean) / scale: the mean (D,) of training vectors, and one scale for all dimensions.

    Unit vectors of an encoder lie in a narrow cone; centring opens it. One common scale, the root of the
    mean variance, keeps the angles between them and makes one grid of regularisation strengths fit every encoder.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, sample: Tensor) -> None:
        """From a sample (n, D) of training vectors."""
        super().__init__()
        self.register_buffer("mean", sample.mean(0))
        # Vectors that are all alike have no scale; they become zeros and not infinities.
        self.register_buffer("scale", sample.var(0, correction=0).mean().sqrt().clamp(min=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """x -> weight x + bias in float32, from what was found in closed form: weight (C, F), bias (C,)."""
    layer = nn.Linear(weight.shape[1], len(weight))
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return layer


def silent(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that says nothing at first."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def normalise_adjacency(weight: Tensor, mask: Tensor) -> Tensor:
    """D^-1/2 (W + I) D^-1/2 for symmetric weights (B, n, n) without self loops; rows and columns of padding are 0.

    The self loops count 1, as in Kipf and Welling, ICLR 2017.
    """
    real = mask.to(weight.dtype)
    looped = (
        (weight + torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device))
        * real[:, :, None]
        * real[:, None, :]
    )
    scale = looped.sum(-1).clamp(min=1e-12).rsqrt() * real
    return scale[:, :, None] * looped * scale[:, None, :]


class Dropout(nn.Module):
    """What nn.Dropout does, in under half of its time: PyTorch draws uniform numbers faster than coins."""

    def __init__(self, p: float, by_image: bool = False) -> None:
        """`by_image`: all nodes of an image in x (B, n, h) share a mask; one for each would take far longer."""
        super().__init__()
        self.p, self.by_image = p, by_image

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        shape = (len(x), 1, x.shape[-1]) if self.by_image else x.shape
        kept = torch.rand(shape, device=x.device) >= self.p
        return x * (kept / (1 - self.p)).to(x.dtype)


class GatedAttention(nn.Module):
    """Weights over the nodes of a sample: softmax of w . (tanh(V x) * sigmoid(U x)) (Ilse et al., ICML 2018 [mem])."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, hidden)
        self.gate = nn.Linear(inputs, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, n, inputs), mask (B, n) with a true in every row -> (B, n) float32, sum 1, 0 where padded."""
        score = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))).squeeze(-1)
        return score.float().masked_fill(~mask, float("-inf")).softmax(-1)
