"""Layers over padded batches: standardisation, normalised adjacency, dropout, attention. Padded nodes stay inert."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.states import State


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
        sample = sample.double()  # so that sums over chunks of it (layers/features.py) say the same
        self.register_buffer("mean", sample.mean(0).float())
        self.register_buffer("scale", scale_of(sample.var(0, correction=0).mean()))

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor) -> Self:
        """By the mean (D,) of training vectors and their variance, the mean over dimensions, both float64."""
        made = cls(mean[None])
        made.scale = scale_of(variance)
        return made

    @classmethod
    def from_state(cls, state: State) -> Self:
        made = cls(state["mean"][None])
        made.scale = state["scale"]
        return made

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def scale_of(variance: Tensor) -> Tensor:
    """float32. Vectors that are all alike have no scale; they become zeros and not infinities."""
    return variance.clamp(min=1e-12).sqrt().float()


class Span:
    """The space that rows span, where it is smaller than the one they lie in; otherwise that one.

    Axes are orthonormal, so that lengths and penalties stay what they are: what is fitted to rows within it, by any
    loss with a penalty on |W|^2, is what would be fitted to the rows as they came.
    """

    def __init__(self, x: Tensor | None) -> None:
        """Of rows x (m, F): at most min(m, F) axes. None stands for rows of which there are more than dimensions."""
        self.axes: Tensor | None = None
        if x is not None and x.shape[1] > len(x):
            # Householder's: axes are orthonormal to the last digits even where rows nearly depend on each other.
            self.axes = torch.linalg.qr(x.double().T)[0].to(x.dtype)

    def into(self, x: Tensor) -> Tensor:
        """Rows x (n, F) by their coordinates (n, r)."""
        return x if self.axes is None else x @ self.axes

    def back(self, weight: Tensor) -> Tensor:
        """Weights (C, r) as weights (C, F)."""
        return weight if self.axes is None else weight @ self.axes.T


def linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """x -> weight x + bias in float32, from what was found in closed form: weight (C, F), bias (C,)."""
    layer = nn.Linear(weight.shape[1], len(weight), device=weight.device)
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return layer


def linear_from_state(state: State) -> nn.Linear:
    return linear_layer(state["weight"], state["bias"])


def silent(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer that says nothing at first."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
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


def draw_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A draw of N(mean, variance), with gradients to both."""
    noise = torch.randn_like(mean, dtype=torch.float32).to(mean.dtype)  # narrow noise is drawn more slowly
    return torch.addcmul(mean, noise, (0.5 * log_variance).exp())


class GatedAttention(nn.Module):
    """Weights over the nodes of a sample: softmax of w . (tanh(V x) * sigmoid(U x)) (Ilse et al., ICML 2018 [mem])."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, hidden)
        self.gate = nn.Linear(inputs, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, n, inputs), mask (B, n) with a true in every row -> (B, n) float32, sum 1, 0 where padded."""
        # One product for both, of which x has one gradient.
        weight = torch.cat([self.value.weight, self.gate.weight])
        value, gate = F.linear(x, weight, torch.cat([self.value.bias, self.gate.bias])).chunk(2, dim=-1)
        score = self.score(torch.tanh(value) * torch.sigmoid(gate)).squeeze(-1)
        return score.float().masked_fill(~mask, float("-inf")).softmax(-1)
