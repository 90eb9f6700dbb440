"""PLL-FG: partial labels told apart by attributes (after Jiang, Sun, Tian, AAAI 2024 [web abstract]).

The equations are rebuilt from an abstract [design] and claim no fidelity to the paper. An image has tokens or nodes t
(T, d) and candidates Y; q (C,) says how likely each of them is. A_ck is 1 where class c has attribute k; P_k is the
attribute's prototype. x_t are the tokens standardised by training images, g' the picture's vector likewise:

    F_tk   = cos(x_t, P_k) / tau
    Y'     = the plausible ones of Y: at least (1 - theta) / theta times as likely as the likeliest
    s_k    = product of A_ck over c in Y', all have it;  s'_k = product of 1 - A_ck, none has it;  d_k = 1 - s_k - s'_k
    E      = softmax_t(sum_k w_k F_tk),  w_k = d_k conf_k / sum over k of that,  conf_k = sum over c in Y' of q_c A_ck
             (uniform where all of Y' have the same attributes)
    f      = g' + sum_t E_t (U x_t);   logits = W f + b
             under `vote`, + v sum_k a_ck cos(g', P_k) / tau, a_c at unit length what c has more than the mean class
    L      = -sum_c q_c log softmax(logits)_c + alpha L_att + beta L_easy
    L_att  = binary cross entropy of mean_t F_tk with s_k, over the attributes that all of Y' share or lack
    L_easy = cross entropy with the likeliest candidate, over the images where that has more than theta
    q      becomes rho q + (1 - rho) softmax(logits | Y) behind each step that saw the image, once an epoch;
             rho goes from 0.9 to 0.5

So attributes that all candidates share or lack teach the prototypes, and those that tell them apart say where to look.
At evaluation no candidate is told: the image is looked at evenly first, and what W f + b then finds plausible among all
classes is Y', with these probabilities for q. Where one class is sure, the second look is the first one. A training
image with one plausible candidate left is looked at likewise: Y' and q are what the first look says of all classes.

What differs from the reconstruction that was at hand: w sums to 1, so that tau alone says how sharp E is, however many
attributes there are; candidates are dropped one by one as q leaves them, and not all at once where one has theta; the
second look at evaluation; `vote`, by which prototypes learn from every class that has the attribute.
"""

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Fraction
from training.data import Batch, Cache
from training.data.attributes import Attributes
from training.data.bank import Bank
from training.layers.blocks import Standardise, silent
from training.layers.logistic import as_probabilities
from training.layers.nodes import in_precision, token_scale, training_sample
from training.layers.partial_labels import moved, plausible
from training.layers.states import State, within
from training.loop import NotNegative, Positive
from training.methods import Fitted, NotPossible, Output
from training.offset import PROBE_WORDS
from training.token_heads import Beside, BesideSettings, fit_head, head_also_reads, head_reads

SEEDED = True
OWN = frozenset({"nodes", "tokens", "globals", "concepts", "owners", "attributes"})
READS = OWN | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads
Shares = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # YAML has lists alone


class Settings(BesideSettings):
    lr: list[Positive] = Field(default=[1e-2], min_length=1)  # learning rates that val chooses from
    weight_decay: list[NotNegative] = Field(default=[0.3, 3.0], min_length=1)  # weight decays that val chooses from
    nodes: Literal["all", "tokens"] = "all"  # all, or tokens: raw ones, before the projection
    attributes: Literal["concepts", "table"] = "concepts"  # concepts of the bank by owners; table: the data set's own
    temperature: Positive = 0.1  # tau, of the cosines of tokens and prototypes
    theta: Annotated[float, Field(ge=0.5, le=1)] = 0.9  # from here on a class is sure, and its image easy
    alpha: NotNegative = 0.5  # weight of the attributes' loss
    beta: NotNegative = 1.0  # weight of the easy images' loss
    vote: bool = False  # whether attributes of the whole picture vote for the classes that have them
    rho: Shares = (0.9, 0.5)  # share of q that an epoch keeps, in the first and in the last one

    @field_validator("vote")
    @classmethod
    def _tokens_are_of_another_space(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("nodes") == "tokens":
            raise ValueError("nodes: tokens do not lie in the space of the picture's vector; it should be false")
        return value


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    places = {"nodes"} if settings.nodes == "all" else {"globals", "tokens"}
    return frozenset(places | ({"concepts", "owners"} if settings.attributes == "concepts" else {"attributes"}))


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


class Scales(NamedTuple):
    """What is standard among training images."""

    local: Standardise
    whole: Standardise

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        whole = Standardise(cache.globals(cache.images("train")))
        if settings.nodes == "tokens":
            return cls(token_scale(cache, "tokens"), whole)
        sample = training_sample(cache)
        if not sample.lm.any():
            raise NotPossible("the pictures have no local nodes: set embed.grids, or settings.nodes: tokens")
        return cls(Standardise(sample.l[sample.lm]), whole)

    @classmethod
    def from_state(cls, state: State) -> Self:
        return cls(*(Standardise.from_state(within(state, name)) for name in cls._fields))


class Known(NamedTuple):
    """The attributes that tell classes apart."""

    table: Tensor  # (C, Ka) bool: which class has which
    vectors: Tensor | None  # (Ka, D): their texts, where they are concepts

    @classmethod
    def of(cls, cache: Cache, settings: Settings) -> Self:
        """Raises NotPossible where no attribute tells classes apart."""
        if settings.attributes == "table":
            table, vectors = cache.part(Attributes).table, None
        else:
            bank = cache.part(Bank)
            table, vectors = (bank.own & bank.kept[:, None]).T, bank.K
        telling = table.any(0) & ~table.all(0)
        if not telling.any():
            what = "index/attributes.parquet names" if settings.attributes == "table" else "the bank has"
            raise NotPossible(f"{what} no attribute that some classes have and others lack; see settings.attributes")
        return cls(table[:, telling], None if vectors is None else vectors[telling])


def first_prototypes(known: Known, width: int) -> Tensor:
    """(Ka, width): centred texts where they lie in the space of the nodes, else a random linear map of them, or chance.

    Drawn on the CPU.
    """
    if known.vectors is None:
        return torch.randn(known.table.shape[1], width)
    texts = known.vectors.cpu()
    texts = texts - texts.mean(0) if len(texts) > 1 else texts
    return texts if texts.shape[1] == width else nn.Linear(texts.shape[1], width, bias=False)(texts).detach()


class Told(NamedTuple):
    """What candidates say of attributes, (B, Ka) each."""

    shared: Tensor  # bool: all of them have it
    lacked: Tensor  # bool: none has it
    weight: Tensor  # float32, of sum 1: how much each tells them apart; 0 where none does


def compare_candidates(q: Tensor, candidates: Tensor, table: Tensor) -> Told:
    """q (B, C), candidates (B, C) bool with one in every row at least, table (C, Ka) bool."""
    with torch.autocast(q.device.type, enabled=False):  # counts are whole numbers
        has = table.float()
        count = candidates.float() @ has  # of the candidates that have it; the products over them by counting
        shared, lacked = count == candidates.sum(1, keepdim=True), count == 0
        weight = ((q * candidates).float() @ has).masked_fill(shared | lacked, 0.0)
    return Told(shared, lacked, weight / weight.sum(1, keepdim=True).clamp(min=1e-12))


class AttributeAttention(nn.Module):
    table: Tensor

    def __init__(self, scales: Scales, table: Tensor, prototypes: Tensor, beside: Beside, settings: Settings) -> None:
        super().__init__()
        width, classes = len(scales.whole.mean), len(table)
        self.local, self.whole, self.beside = scales.local, scales.whole, beside
        self.register_buffer("table", table)
        self.prototypes = nn.Parameter(prototypes.clone())
        self.value, self.classify = silent(len(scales.local.mean), width), silent(width, classes)
        self.strength = nn.Parameter(torch.zeros(())) if settings.vote else None
        self.by_nodes, self.temperature, self.theta = settings.nodes == "all", settings.temperature, settings.theta

    def forward(self, batch: Batch) -> Output:
        if self.by_nodes:
            x, mask = self.local(batch.l), batch.lm
        else:
            x = self.local(batch.tokens)
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        even = mask / mask.sum(1, keepdim=True).clamp(min=1)
        unit, prototypes = F.normalize(x.float(), dim=-1), F.normalize(self.prototypes, dim=-1)
        g, values = self.whole(batch.g.float()), self.value(in_precision(x))
        votes = 0.0 if self.strength is None else self.strength * self.votes(F.normalize(g, dim=-1) @ prototypes.T)

        def judge(attention: Tensor) -> Tensor:
            seen = torch.einsum("bt,btd->bd", attention.to(values.dtype), values)
            return self.beside(batch, self.classify(g + seen).float() + votes)

        belief = judge(even).detach().softmax(1)
        if self.training:
            q = as_probabilities(batch.target, len(self.table))
            candidates = plausible(q, self.theta)
            told = compare_candidates(q, candidates, self.table)
            belief = torch.where(candidates.sum(1, keepdim=True) > 1, q, belief)
        apart = compare_candidates(belief, plausible(belief, self.theta), self.table)
        attention = self.attention(unit, mask, apart.weight @ prototypes)
        logits = judge(attention)
        losses = {}
        if self.training:
            shown = torch.einsum("bt,btd->bd", even, unit) @ prototypes.T / self.temperature  # mean_t F_tk
            losses = {"attributes": attribute_loss(shown, told), "easy": easy_loss(logits, q, self.theta)}
        return Output(logits, losses, F.pad(attention, (1, 0)) if self.by_nodes else None)

    def votes(self, cosines: Tensor) -> Tensor:
        """(B, C) by what attributes (B, Ka) the whole picture shows."""
        owned = self.table.float()
        return cosines.float() @ F.normalize(owned - owned.mean(0), dim=1).T / self.temperature

    def attention(self, unit: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """E (B, T) of unit tokens (B, T, d), mask (B, T), wanted = sum_k w_k P_k (B, d): F is linear in P."""
        scores = torch.einsum("btd,bd->bt", unit, wanted) / self.temperature
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1) * mask


def attribute_loss(shown: Tensor, told: Told) -> Tensor:
    """Binary cross entropy of shown (B, Ka) with what is certain, the mean over that."""
    certain = told.shared | told.lacked
    loss = F.binary_cross_entropy_with_logits(shown.float(), told.shared.float(), reduction="none")
    return (loss * certain).sum() / certain.sum().clamp(min=1)


def easy_loss(logits: Tensor, q: Tensor, theta: float) -> Tensor:
    """Cross entropy of logits (B, C) with the likeliest class by q (B, C), the mean over images where it has theta."""
    surest, label = q.max(1)
    easy = surest > theta
    loss = F.cross_entropy(logits.float(), label, reduction="none")
    return (loss * easy).sum() / easy.sum().clamp(min=1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    scales, known, (first, last) = Scales.measure(cache, settings), Known.of(cache, settings), settings.rho

    def build(beside: Beside) -> AttributeAttention:
        prototypes = first_prototypes(known, len(scales.local.mean))
        return AttributeAttention(scales, known.table, prototypes, beside, settings)

    def retell(q: Tensor, logits: Tensor, past: float) -> Tensor:
        return moved(q, logits, first + (last - first) * past)

    weights = {"attributes": settings.alpha, "easy": settings.beta}
    return fit_head(cache, settings, seed, own_reads(settings), build, weights, retell)


def build(state: State, settings: Settings, classes: int) -> AttributeAttention:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return AttributeAttention(Scales.from_state(state), state["table"], state["prototypes"], beside, settings)
