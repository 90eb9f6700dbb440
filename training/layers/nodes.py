"""What a head makes of an image's nodes first: the local vectors of the encoder, or its raw tokens."""

import math
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Batch, Cache
from training.layers.blocks import Standardise
from training.layers.states import State, within

# all; selected: the patches that label_patches selected; tokens: raw tokens, before the encoder's projection.
NodeKind = Literal["all", "selected", "tokens"]
SAMPLE, TOKEN_SAMPLE = 512, 64  # training images whose nodes, or tokens, say what is standard


def training_sample(cache: Cache, images: int = SAMPLE) -> Batch:
    """At most so many training images in view 0, evenly taken: to say what is standard among them."""
    train = cache.images("train")
    return cache.batch(train[:: math.ceil(len(train) / images)])


def token_scale(cache: Cache, word: str) -> Standardise:
    """What is standard among the tokens of training images; `word` is what READS calls these."""
    return Standardise(training_sample(cache, TOKEN_SAMPLE).of(word).flatten(0, 1).float())


class Projection(nn.Module):
    """LN(V v + b), v standardised by training images."""

    def __init__(self, standardise: Standardise, width: int, norm: nn.Module | None = None) -> None:
        """`norm` is LN where none is given."""
        super().__init__()
        self.standardise = standardise
        self.linear = nn.Linear(len(standardise.mean), width)
        self.norm = nn.LayerNorm(width) if norm is None else norm

    def forward(self, v: Tensor) -> Tensor:
        """v (..., D) -> (..., width)."""
        # Standardised in the weights and not in a copy of all vectors; narrow before the product, if it will be.
        weight = self.linear.weight / self.standardise.scale
        bias = self.linear.bias - (weight * self.standardise.mean).sum(-1)
        out: Tensor = self.norm(F.linear(in_precision(v), weight, bias))
        return out


class NodeScales(NamedTuple):
    """What is standard among the nodes of training images."""

    local: Standardise
    whole: Standardise | None  # of pictures, where they do not stand among the nodes: beside tokens

    @classmethod
    def measure(cls, cache: Cache, kind: NodeKind, word: str) -> Self:
        """`word` is what READS calls the tokens that a NodeInput of that kind takes."""
        if kind == "tokens":
            return cls(token_scale(cache, word), Standardise(cache.globals(cache.images("train"))))
        sample = training_sample(cache)
        return cls(Standardise(sample.nodes[sample.mask]), None)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """From that of a NodeInput."""
        local, whole = (within(state, f"{name}.standardise") for name in cls._fields)
        return cls(Standardise.from_state(local), Standardise.from_state(whole) if whole else None)


class NodeInput(nn.Module):
    """LN(V v_n + b) of an image's nodes, node 0 the whole picture; tokens and the picture have a V each."""

    def __init__(self, scales: NodeScales, kind: NodeKind, width: int, word: str) -> None:
        """`word` as in NodeScales.measure."""
        super().__init__()
        self.kind, self.word = kind, word
        self.local = Projection(scales.local, width)
        if scales.whole is not None:
            self.whole = Projection(scales.whole, width)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, n, width), and which nodes count (B, n) bool."""
        if self.kind == "tokens":
            x = torch.cat([self.whole(batch.g)[:, None], self.local(batch.of(self.word))], dim=1)
            return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        mask = selected_of(batch.mask, batch.selected) if self.kind == "selected" else batch.mask
        return self.local(batch.nodes), mask


def selected_of(mask: Tensor, selected: Tensor) -> Tensor:
    """(B, n) bool: of the nodes that exist the selected ones, and the whole picture."""
    mask = mask & selected
    mask[:, 0] = True
    return mask


def in_precision(v: Tensor) -> Tensor:
    """v in the precision that products have here: bfloat16 under autocast, else float32."""
    return v.to(torch.bfloat16 if torch.is_autocast_enabled(v.device.type) else torch.float32)
