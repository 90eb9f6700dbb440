"""ENGINE: a ladder of small graph networks beside the layers of a frozen encoder (Zhu et al., IJCAI 2024 [web][code]).

    p_l    = Linear(relu(LN(Linear(x_l))))                 x_l the standardised state of layer l, l = 0 .. L
    u_0    = p_0,   u_l = a_l p_l + (1 - a_l) h_l-1        a_l = sigmoid(alpha_l / T)
    h_l    = conv(drop(relu(conv(u_l, links))), links)     k -> k / 2 -> k
    s_l    = Linear([h_l of the image; mean of h_l over it and its senders])
    logits = z + s_L                                       z the rival's, or 0 (training/offset.py)

The encoder is not run: states of its layers come from the cache. With `early_exit` every rung has a Linear of its own,
all are trained (loss = sum over l of CE(z + s_l)), and an image is answered by the first rung that names the same class
as the one below it, or by the last.

What differs: nodes are images (or documents) and links those of the data set, where the paper walks at random through
the graph and pools what it met; ours is all that reaches an image, and the mean over those that it hears itself
[design]. In the authors' code an image that has left is overwritten where a later rung of it disagrees with its
neighbour; here what answers is found from all rungs at once. Early exit decides who answers and saves no time: the
states are there, and the rungs of an image's neighbours are needed whether or not it has left.
"""

import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache, feature_blocks, feature_words, word_behind
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.convolutions import Conv, make_convolution
from training.layers.hops import Hop
from training.layers.nodes import training_sample
from training.layers.states import State, within
from training.links import LinkSettings, Memory, links_word, senders
from training.loop import EVALUATION_BATCH, Positive
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS
from training.token_heads import Beside, BesideSettings, fit_head, head_also_reads, head_reads

SEEDED = True
READS = feature_words() | {"cls", "links"}
ALSO = PROBE_WORDS
also_reads = head_also_reads
CLS = re.compile(r"cls(/\d+|/rollout)?")


def require_state(name: str) -> str:
    """Raises ValueError for what is no state of an image."""
    if not CLS.fullmatch(name):
        try:
            word_behind(name)
        except ValueError as error:
            raise ValueError(f"{error}, or cls/LAYER") from None
    return name


class Settings(LinkSettings, BesideSettings):
    states: list[Annotated[str, AfterValidator(require_state)]] = Field(
        default=["pooled", "global"], min_length=1
    )  # of layers, the first one lowest: what `features` of probes may name, a NAME of moments, say; or cls/LAYER
    conv: Conv = "sage"  # of each rung: gcn, gat, sage
    heads: Count = 4  # of gat, which divide half of `hidden`
    hidden: Count = 128  # width of a rung, k
    temperature: Positive = 0.1  # T: how sharply a gate turns
    dropout: Fraction = 0.5  # share of activations dropped in training
    early_exit: bool = False  # whether a rung that agrees with the one below it answers

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.hidden % 2:
            raise ValueError(f"hidden: {self.hidden} is odd, and a rung is half as wide inside")
        if self.conv == "gat" and self.hidden // 2 % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide half of hidden, {self.hidden // 2}")
        return self


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    words = {name if CLS.fullmatch(name) else word_behind(name) for name in settings.states}
    words -= {"globals"} if "nodes" in words else set()  # node 0 is the global vector
    return frozenset({*words, links_word(settings)})


def states_of(batch: Batch, settings: Settings) -> list[Tensor]:
    """The states (B, d_l) of each layer, float32."""
    return [
        batch.of(name) if CLS.fullmatch(name) else torch.cat(feature_blocks(name, batch), dim=-1)
        for name in settings.states
    ]


class Known(NamedTuple):
    """What a model keeps of the images that send: M of them."""

    memory: Memory
    states: list[Tensor]  # (M, d_l) of each layer

    @classmethod
    def of(cls, cache: Cache, settings: Settings) -> Self:
        chunks = senders(cache, settings).split(EVALUATION_BATCH)
        found = [states_of(cache.batch(images), settings) for images in chunks]
        return cls(Memory.of(cache, settings), [torch.cat(layer) for layer in zip(*found, strict=True)])

    @classmethod
    def from_state(cls, state: State, settings: Settings) -> Self:
        states = [state[f"rungs.{rung}.sent"] for rung in range(len(settings.states))]
        return cls(Memory.from_state(within(state, "memory"), settings), states)


class Rung(nn.Module):
    """One step of the ladder: what a layer's states add, passed along links."""

    sent: Tensor

    def __init__(self, scale: Standardise, sent: Tensor, settings: Settings, first: bool) -> None:
        """sent (M, d): the states of the images that send."""
        super().__init__()
        width, inner = settings.hidden, settings.hidden // 2
        self.register_buffer("sent", sent)
        self.scale, self.temperature = scale, settings.temperature
        self.project = nn.Sequential(
            nn.Linear(len(scale.mean), width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.alpha = None if first else nn.Parameter(torch.zeros(()))
        self.narrow = make_convolution(settings.conv, width, inner, settings.heads)
        self.widen = make_convolution(settings.conv, inner, width, settings.heads)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor, below: Tensor | None, rows: Tensor, hops: Sequence[Hop]) -> Tensor:
        """(hops[1].count, k), of the batch and whoever is near enough to be asked for by the next rung.

        x (B, d) are the states of the batch, rows (m,) whose states come behind them, and below (B + m, k) what the
        rung below made of all of these.
        """
        u = self.project(self.scale(torch.cat([x, self.sent[rows]])))
        if self.alpha is not None and below is not None:
            gate = torch.sigmoid(self.alpha / self.temperature)
            u = gate * u + (1 - gate) * below
        first, second = hops
        passed: Tensor = self.widen(self.dropout(F.relu(self.narrow(u, first))), second)
        return passed


def first_to_agree(said: Tensor) -> Tensor:
    """(B,): of the rungs' classes (L, B), the first rung that says what the one below it said; else the last."""
    agree = torch.ones_like(said, dtype=torch.bool)  # the last answers where none agrees
    agree[:-1] = said[:-1] == said.roll(1, dims=0)[:-1]
    agree[0] = len(said) == 1
    return agree.int().argmax(0)


def mean_around(h: Tensor, hop: Hop) -> Tensor:
    """(hop.count, k): the mean of h (n, k) over each node and those that it hears, each as much as any."""
    count = 1 + hop.start.diff()
    return (h[: hop.count] + hop.sum(h, torch.ones_like(hop.weight))) / count[:, None]


class Engine(nn.Module):
    def __init__(
        self, scales: Sequence[Standardise], known: Known, beside: Beside, classes: int, settings: Settings
    ) -> None:
        super().__init__()
        self.settings, self.memory, self.beside = settings, known.memory, beside
        self.rungs = nn.ModuleList(
            Rung(scale, sent, settings, first=number == 0)
            for number, (scale, sent) in enumerate(zip(scales, known.states, strict=True))
        )
        exits = len(self.rungs) if settings.early_exit else 1
        self.dropout = Dropout(settings.dropout)
        self.classify = nn.ModuleList(silent(2 * settings.hidden, classes) for _ in range(exits))

    def forward(self, batch: Batch) -> Output:
        logits = self.beside(batch, self.climb(batch))  # (exits, B, C)
        if self.training:
            lower = [F.cross_entropy(each, batch.target) for each in logits[:-1]]
            return Output(logits[-1], {"exits": torch.stack(lower).sum()} if lower else {}, None)
        leave = first_to_agree(logits.argmax(-1))
        return Output(logits[leave, torch.arange(len(leave), device=leave.device)], {}, None)

    def climb(self, batch: Batch) -> Tensor:
        """(exits, B, C): what each rung says that has a Linear, the lowest first."""
        around = self.memory.around(batch, 2 * len(self.rungs) + 1)
        *hops, last = around.hops()
        said, h = [], None
        silent_rungs = len(self.rungs) - len(self.classify)
        for number, (rung, x) in enumerate(zip(self.rungs, states_of(batch, self.settings), strict=True)):
            needed = len(hops[2 * number].degree) - len(x)
            h = rung(x, h, around.rows[:needed], hops[2 * number : 2 * number + 2])
            if number >= silent_rungs:
                whole = torch.cat([h[: last.count], mean_around(h[: len(last.degree)], last)], dim=-1)
                said.append(self.classify[number - silent_rungs](self.dropout(whole)))
        return torch.stack(said)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    known, classes = Known.of(cache, settings), len(cache.classes)
    scales = [Standardise(each) for each in states_of(training_sample(cache), settings)]
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: Engine(scales, known, beside, classes, settings),
        {"exits": 1.0},
    )


def build(state: State, settings: Settings, classes: int) -> Engine:
    scales = [Standardise.from_state(within(state, f"rungs.{rung}.scale")) for rung in range(len(settings.states))]
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return Engine(scales, Known.from_state(state, settings), beside, classes, settings)
