"""TRD: crops linked by how they complement each other, recovered from class proxies (NeurIPS 2023 [code]).

    x_v     = LN(V v + b)                               v: picture g, object o and crops l_n, standardised      (h)
    S       = l l^T;  t_i = sum of S_ij over j != i / (N - 1)
    W_ij    = 1 where S_ij < t_i or S_ij < t_j          `edges: complementary`; similar: above
    h_n     = GCN(dropout(ReLU(GraphNorm(GCN(x_l, W)))), W),  a = mean_n h_n
    whole   = M_whole(x_g);  global = M_whole(x_o) + whole
    sem     = M_sem([x_o; a]) + whole;  local = M_local(a) + whole
    H_k     = P_k B_k(h_n), k = 1 .. K                  proxy heads; B_k: a mapper without its last layer
    G_c     = {P_1c, .., P_Kc}                          the proxy graph of class c: rows of the heads' last layers
    assign  = max_k max_n H_k(h_n)
    losses  CE(sem + w local + global) + w (mean_k CE(max_n H_k(h_n)) + distance({h_n}, G_y)), w = `local_weight`
    answer  sem + w local + global + assign

M, a mapper, is Linear(d, 2d) - LN - LeakyReLU - Linear(2d, h) - LeakyReLU - Linear(h, C). `distance` is Chamfer, its
form with a cost of deletion, or the true Hausdorff (the largest of all distances to the nearest): training/layers/
losses.py. w counts from `recovery_epoch` on.

As the public code, but: LayerNorm stands for BatchNorm, and GraphNorm is of each image, so that an answer depends on no
batch-mate; heads are trained, and by their answer to an image, not to each crop; the projection, which makes all of
them narrow, and last layers that begin at zero are ours [design]. Edges have no weights there either, and join similar
crops; the paper speaks of complementary ones, inverse to mutual information [mem]. An image without crops has one that
shows nothing.

`faults` switches on known defects of that code, each by its name, to measure what they cost:

    scrambled_crops          an image's graph holds crops of other images of the batch, in training and at evaluation
    untrained_proxies        the heads stay as they are drawn, normalised by the batch at evaluation too, and their
                             answer is added all the same. There a checkpoint that is read has fresh ones; here the
                             model keeps those that it was fitted with
    recovery_once            w counts in the epoch `recovery_epoch` alone, and at evaluation
    threshold_precedence     t_i = sum of S_ij / N - 1: all crops are linked (none, if complementary)
    shared_batch_norm        BatchNorm in the projection, which pictures, objects and crops share, and in mappers
    misordered_assignments   the heads' answers lie head by head, and their labels image by image
    constant_rate            the learning rate never falls
    untrained_gcn            the graph's layers stay as they are drawn
    single_minimum           the distance is the smallest number there is, be it of a node, a proxy or a feature
"""

from typing import Annotated, Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache
from training.layers import faults
from training.layers.blocks import Standardise, silent
from training.layers.graphs import GCN, NormedNetwork, masked_mean, threshold_edges
from training.layers.losses import (
    assignment_logits,
    capped_chamfer,
    chamfer,
    hausdorff,
    likeliest_class,
)
from training.layers.mapper import Mapper
from training.layers.nodes import Projection, training_sample
from training.layers.states import State, within
from training.loop import NotNegative
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS
from training.region_heads import OWN, Regions, RegionSettings
from training.token_heads import Beside, fit_head, head_also_reads, head_reads

SEEDED = True
READS = OWN | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads

Fault = Literal[
    "scrambled_crops", "untrained_proxies", "recovery_once", "threshold_precedence", "shared_batch_norm",
    "misordered_assignments", "constant_rate", "untrained_gcn", "single_minimum",
]  # fmt: skip
DISTANCES = {"chamfer": chamfer, "capped": capped_chamfer, "hausdorff": hausdorff}


class Settings(RegionSettings):
    hidden: Count = 128  # width of everything behind the projection
    dropout: Fraction = 0.5  # share of what the graph's first layer says dropped in training
    edges: Literal["similar", "complementary"] = "complementary"  # crops that are linked: similar, complementary
    proxies: Count = 8  # heads, and so nodes of each class's proxy graph
    distance: Literal["chamfer", "capped", "hausdorff"] = "chamfer"  # to the proxy graph: chamfer, capped, hausdorff
    local_weight: NotNegative = 1e-4  # of the local stream, in training of proxies too
    recovery_epoch: Count = 1  # the first epoch in which local_weight counts
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()  # known defects of the public code to switch on

    @field_validator("faults")
    @classmethod
    def _have_something_to_spoil(cls, faults: tuple[Fault, ...], info: ValidationInfo) -> tuple[Fault, ...]:
        if "threshold_precedence" in faults and info.data.get("edges") == "complementary":
            raise ValueError("threshold_precedence is a defect of edges: similar; set that too")
        return faults

    @property
    def decays(self) -> bool:
        return "constant_rate" not in self.faults


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, OWN)


class TRD(nn.Module):
    def __init__(self, scale: Standardise, regions: Regions, beside: Beside, classes: int, settings: Settings) -> None:
        super().__init__()
        hidden, has = settings.hidden, settings.faults
        self.settings, self.epoch = settings, 0  # of training; see train()
        self.regions, self.beside = regions, beside
        shared = "shared_batch_norm" in has
        self.project = Projection(scale, hidden, faults.BatchNorm(hidden) if shared else nn.LayerNorm(hidden))
        self.graph = NormedNetwork("gcn", 2, hidden, hidden, heads=1, weights=1, dropout=settings.dropout)

        def mapper(inputs: int) -> Mapper:
            return Mapper(inputs, hidden, classes, shared)

        self.whole, self.semantic, self.local = mapper(hidden), mapper(2 * hidden), mapper(hidden)
        heads = [mapper(hidden) for _ in range(settings.proxies)]
        for head in heads:
            head.classify = silent(hidden, classes, bias=False)
            if "untrained_proxies" in has:
                head.norm = faults.BatchNorm(2 * hidden, always=True)
                head.classify = nn.Linear(hidden, classes, bias=False)
                head.requires_grad_(False)
        self.heads = nn.ModuleList(heads)
        if "untrained_gcn" in has:
            self.graph.requires_grad_(False)

    def train(self, mode: bool = True) -> "TRD":
        """Training mode or not. The loop asks for training once an epoch: so epochs are counted for recovery_epoch."""
        self.epoch += mode
        return super().train(mode)

    @property
    def recovers(self) -> bool:
        """Whether local_weight counts in this epoch of training."""
        first = self.settings.recovery_epoch
        return self.epoch == first if "recovery_once" in self.settings.faults else self.epoch >= first

    def forward(self, batch: Batch) -> Output:
        whole, of_object, local, mask = self.regions(batch)
        if "scrambled_crops" in self.settings.faults:
            local, mask = faults.scramble(local, mask)
        local, mask = one_at_least(local, mask)
        graph = GCN.prepare(self.link(local, mask), mask)
        h = self.graph(self.project(local), graph, mask).float() * mask[..., None]
        a = masked_mean(h, mask)
        o, by_whole = self.project(of_object), self.whole(self.project(whole))
        weight = self.settings.local_weight if not self.training or self.recovers else 0.0
        logits = self.whole(o) + self.semantic(torch.cat([o.float(), a], 1)) + (2 + weight) * by_whole
        logits = logits.float() + weight * self.local(a).float()
        if not self.training:
            return Output(self.beside(batch, logits + self.answers(h, mask).amax(0)), {}, None)
        said, losses = self.beside(batch, logits), {}
        if weight:
            losses = {
                "assignment": self.assignment(self.beside(batch, self.answers(h, mask)), batch.target),
                "distance": self.distance(h, mask, likeliest_class(batch.target, said)),
            }
        return Output(said, losses, None)

    @property
    def mappers(self) -> list[Mapper]:
        """The proxy heads."""
        return cast(list[Mapper], list(self.heads))

    def link(self, local: Tensor, mask: Tensor) -> Tensor:
        """Edges (B, n, n, 1) between the crops (B, n, D)."""
        rule = faults.misplaced_edges if "threshold_precedence" in self.settings.faults else threshold_edges
        return rule(local, mask, self.settings.edges)

    def answers(self, h: Tensor, mask: Tensor) -> Tensor:
        """(K, B, C): what each head says of an image, by the node that it finds likeliest, class by class."""
        said = [assignment_logits(head.features(h), mask, head.classify.weight) for head in self.mappers]
        return torch.stack(said)

    def assignment(self, answers: Tensor, target: Tensor) -> Tensor:
        """The mean cross entropy of the heads' answers (K, B, C)."""
        if "misordered_assignments" in self.settings.faults:
            labels = target.repeat_interleave(len(answers), dim=0)
        else:
            labels = torch.cat([target] * len(answers))
        return F.cross_entropy(answers.flatten(0, 1), labels)

    def distance(self, h: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        """Of the images' graphs (B, n, h) from the proxy graphs of classes y (B,), in the mean."""
        proxies = torch.stack([head.classify.weight for head in self.mappers], 1).index_select(0, y)
        single = "single_minimum" in self.settings.faults
        measure = faults.single_minimum if single else DISTANCES[self.settings.distance]
        return measure(h, mask, proxies).mean()


def one_at_least(local: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Crops (B, n, D) and mask (B, n), but that an image without any crop has a first one, of zeros."""
    missing = int(not local.shape[1])
    local, mask = F.pad(local, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return local, mask | (first & ~mask.any(1, keepdim=True))


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    regions, classes = Regions.measure(cache, settings), len(cache.classes)
    sample = training_sample(cache)
    scale, weight = Standardise(sample.nodes[sample.mask].float()), settings.local_weight
    return fit_head(
        cache,
        settings,
        seed,
        OWN,
        lambda beside: TRD(scale, regions, beside, classes, settings),
        {"assignment": weight, "distance": weight},
    )


def build(state: State, settings: Settings, classes: int) -> TRD:
    regions = Regions.from_state(within(state, "regions"), settings)
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return TRD(Standardise.from_state(within(state, "project.standardise")), regions, beside, classes, settings)
