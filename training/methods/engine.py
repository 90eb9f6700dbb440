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
[design]. In the authors' code an image that has left is overwritten where a later rung disagrees with the one
below it; here the first agreement answers. What images that send hold on each rung is found once for all that are
judged, so that an image costs its own states and links, rung by rung, and no more rungs are climbed once all images of
a batch have left.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple, Self, cast

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache, feature_blocks, feature_words, words_behind
from training.data.features import inherited_name
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.convolutions import Conv, make_convolution
from training.layers.features import parts_of
from training.layers.hops import Hop
from training.layers.nodes import training_sample
from training.layers.states import State, within
from training.links import Found, Heard, LinkSettings, Memory, links_word, senders
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
    """Raises ValueError for what is no state of a layer for an image."""
    if inherited_name(name) is not None:
        raise ValueError(f"{name} is handed on by training images, and no state of a layer; name what a layer holds")
    if not CLS.fullmatch(name):
        try:
            words_behind(name)
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
    cls = frozenset(name for name in settings.states if CLS.fullmatch(name))
    return cls | parts_of(frozenset(settings.states) - cls) | {links_word(settings)}


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

    def enter(self, x: Tensor, below: Tensor | None) -> Tensor:
        """u (n, k), of states x (n, d) and what the rung below made of these nodes, (n, k)."""
        u: Tensor = self.project(self.scale(x))
        if self.alpha is None or below is None:
            return u
        gate = torch.sigmoid(self.alpha / self.temperature)
        return gate * u + (1 - gate) * below

    def pass_on(self, u: Tensor, hop: Hop) -> Tensor:
        """(hop.count, k / 2): the first of the two convolutions."""
        return self.dropout(F.relu(self.narrow(u, hop)))


def agreed(said: Sequence[Tensor]) -> Tensor:
    """(B,): of rungs' logits (B, C), the first rung that names the class that the one below it named; else how many."""
    classes = torch.stack([logits.argmax(-1) for logits in said])
    agree = torch.ones(len(said) + 1, classes.shape[1], dtype=torch.int, device=classes.device)
    agree[0], agree[1:-1] = 0, classes[1:] == classes[:-1]
    return agree.argmax(0)


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
        self.found = Found[tuple[Tensor, Tensor, Tensor]]()  # of each rung, what those that send hold (`held`)

    def forward(self, batch: Batch) -> Output:
        if self.training:
            *lower, last = self.beside(batch, torch.stack(list(self.climb(batch))))
            each = [F.cross_entropy(logits, batch.target) for logits in lower]
            return Output(last, {"exits": torch.stack(each).sum()} if each else {}, None)
        said, z = [], None
        for logits in self.climb(batch):
            z = self.beside(batch, torch.zeros_like(logits)) if z is None else z
            said.append(z + logits)
            if (agreed(said) < len(said)).all():
                break
        leave = agreed(said).clamp(max=len(said) - 1)
        return Output(torch.stack(said)[leave, torch.arange(len(leave), device=leave.device)], {}, None)

    def climb(self, batch: Batch) -> Iterator[Tensor]:
        """What each rung says (B, C) that has a Linear, the lowest first."""
        first = len(self.rungs) - len(self.classify)
        for number, (h, hop) in enumerate(self.reach(batch) if self.training else self.look_up(batch)):
            if number >= first:
                whole = torch.cat([h[: hop.count], mean_around(h, hop)], dim=-1)
                yield self.classify[number - first](self.dropout(whole)).float()

    @property
    def ladder(self) -> list[Rung]:
        return [cast(Rung, rung) for rung in self.rungs]

    def reach(self, batch: Batch) -> Iterator[tuple[Tensor, Hop]]:
        """Of each rung h of the batch and of all that it hears, and the hop between; with gradients all the way."""
        around = self.memory.around(batch, 2 * len(self.rungs) + 1, own=self.memory.one_view)
        *hops, last = around.hops()
        h = None
        for number, (rung, x) in enumerate(zip(self.ladder, states_of(batch, self.settings), strict=True)):
            first, second = hops[2 * number : 2 * number + 2]
            rows = around.rows[: len(first.degree) - len(x)]
            u = rung.enter(torch.cat([x, rung.sent[rows]]), h)
            h = rung.widen(rung.pass_on(u, first), second)
            yield h[: len(last.degree)], last

    def look_up(self, batch: Batch) -> Iterator[tuple[Tensor, Hop]]:
        """The same at evaluation, where what those that send hold is found once for all batches."""
        heard, h = Heard(self.memory, batch), None
        for rung, x, (u, inner, sent) in zip(self.ladder, states_of(batch, self.settings), self.held(), strict=True):
            own = rung.enter(x, h)
            own = rung.pass_on(heard.beside(own, u), heard.hop)
            h = rung.widen(heard.beside(own, inner), heard.hop)
            yield heard.beside(h, sent), heard.hop

    @torch.no_grad()
    def held(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each rung u, what the first convolution makes of it, and h of the images that send, M rows each."""
        if not self.found.values:
            whole, h = self.memory.whole(), None
            for rung in self.ladder:
                u = rung.enter(rung.sent, h)
                inner = rung.pass_on(u, whole)
                h = rung.widen(inner, whole)
                self.found.values.append((u, inner, h))
        return self.found.values


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
