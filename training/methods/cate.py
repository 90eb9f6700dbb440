"""CATE: concepts guide an information bottleneck on patches, and patches meet the concepts of all classes.

After Huang et al., NeurIPS 2024 [code], a system for slides of tissue, as bags of patches, over an image's nodes:

    x_n     a node's vector, as long as a text's; the whole picture is one of the patches                  (D)
    z_n     ~ N(mu_n, s_n), [mu; log s^2] = Linear(dropout(ReLU(Linear(standardised x_n))))  mu at evaluation
    e_n     = Linear(dropout(ELU(Linear(standardised x_n . K_k over all kept concepts k))))        `interference`
    logits  = rival + Linear(sum of w_n [z_n; e_n]), w = gated attention over the patches           `node_scores`
    loss    = CE + predictive InfoNCE + superfluous KL(N(mu, s) || N(0, 1))                         `loss_weights`

a_c is the mean of the concepts that class c owns. InfoNCE (temperature 0.1) asks each of the `patches` patches of an
image that are most like the a of its class, by x_n . a_y, to be by cos(z_n, a_y) more like that than like the a of the
HARDEST other classes: so the bottleneck keeps what tells of the class's concepts (the paper's predictive information),
and the KL lets go of the rest (superfluous). Of several candidates a class's share of the target weighs its a.

The rival is what the probe of `with_probe` says, or 0 (training/token_heads.py).

Changed: the code has two classes, takes all others of a bag for negatives, and standardises e_n by the bag, so that a
patch's part in a bag depends on the others; here training images say what is standard. Its e_n reads z_n and stops the
gradient; here it reads x_n, which has none [design]. Its noise is drawn at evaluation too. Nothing of a label is looked
at in evaluation.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.class_texts import own_texts
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.blocks import Dropout, GatedAttention, Standardise, draw_normal, silent
from training.layers.gather import rows_of
from training.layers.losses import TEMPERATURE, info_nce, kl_from_normal
from training.layers.nodes import in_precision, training_sample
from training.layers.states import State, within
from training.loop import NotNegative
from training.methods import Fitted, NotPossible, Output
from training.offset import PROBE_WORDS
from training.token_heads import Beside, BesideSettings, fit_head, head_also_reads, head_reads

SEEDED = True
READS = frozenset({"nodes", "concepts", "owners"}) | PROBE_WORDS
ALSO = PROBE_WORDS  # what its probe reads of other encoders
also_reads = head_also_reads
HARDEST = 32  # classes that a patch is held against


class LossWeights(Block):
    predictive: NotNegative = 0.1  # patches told by the concepts of their class
    superfluous: NotNegative = 0.001  # divergence of the bottleneck


class Settings(BesideSettings):
    hidden: Count = 128  # width of the attention
    interference: Annotated[int, Field(ge=0)] = 64  # dimensions of patches against all concepts; 0: none
    patches: Count = 10  # of an image, those most like its class, that InfoNCE asks
    dropout: Fraction = 0.2  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy, weight 1; 0 switches one off


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    told = bool(settings.loss_weights.predictive)
    wanted = {"nodes": True, "concepts": told or bool(settings.interference), "owners": told}
    return frozenset(name for name, is_read in wanted.items() if is_read)


def class_anchors(bank: Bank) -> Tensor:
    """a (C, D): the mean of the kept concepts that a class owns; 0 where it owns none."""
    own = own_texts(bank).float()
    return own @ bank.K / own.sum(1).clamp(min=1)[:, None]


def predictive(x: Tensor, z: Tensor, mask: Tensor, anchors: Tensor, target: Tensor, patches: int) -> Tensor:
    """InfoNCE of the `patches` patches most like their class, the mean over these.

    x and z (B, n, D), mask (B, n), anchors (C, D); target as in Batch. An image whose class owns no concept asks none.
    """
    with torch.autocast(x.device.type, enabled=False):
        share = F.one_hot(target, len(anchors)).float() if target.ndim == 1 else target.float()
        mine = F.normalize(share @ anchors, dim=-1)  # (B, D)
        alike = (x.float() @ mine[..., None]).squeeze(-1).masked_fill(~mask, -torch.inf)
        found, places = alike.topk(min(patches, x.shape[1]), dim=1)
        asked = (found > -torch.inf) & mine.any(1, keepdim=True)  # (B, k)
        query = F.normalize(rows_of(z.float(), places), dim=-1)
        others = (query @ F.normalize(anchors, dim=-1).T).masked_fill(
            ((share > 0) | ~anchors.any(1))[:, None], -torch.inf
        )
        hardest = others.topk(min(HARDEST, len(anchors)), dim=-1, sorted=False).values / TEMPERATURE
        positive = (query @ mine[..., None]).squeeze(-1) / TEMPERATURE
        by_patch = info_nce(positive.flatten(), hardest.flatten(0, 1)).unflatten(0, asked.shape)
        return (by_patch * asked).sum() / asked.sum().clamp(min=1)


class Interference(nn.Module):
    """e_n: how a patch meets the concepts of every class."""

    K: Tensor

    def __init__(self, K: Tensor, standardise: Standardise, dimensions: int, dropout: float) -> None:
        """K (M, D); `standardise` is of the products (M)."""
        super().__init__()
        self.register_buffer("K", K)
        self.standardise = standardise
        self.narrow, self.widen = nn.Linear(len(K), dimensions), nn.Linear(dimensions, dimensions)
        self.dropout = Dropout(dropout, by_image=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> (B, n, dimensions)."""
        # narrow(standardise(x K^T)) with its linear maps multiplied first: nothing as wide as the concepts are many.
        weight = self.narrow.weight / self.standardise.scale
        bias = self.narrow.bias - (weight * self.standardise.mean).sum(-1)
        out: Tensor = self.widen(self.dropout(F.elu(F.linear(x, weight @ self.K, bias))))
        return out


class CATE(nn.Module):
    anchors: Tensor | None

    def __init__(
        self,
        scale: Standardise,
        anchors: Tensor | None,
        interference: Interference | None,
        beside: Beside,
        classes: int,
        settings: Settings,
    ) -> None:
        """`scale` of nodes; anchors (C, D), which training alone reads; interference is None where there is none."""
        super().__init__()
        dimension = len(scale.mean)
        self.settings, self.scale, self.beside, self.interference = settings, scale, beside, interference
        self.register_buffer("anchors", anchors, persistent=False)
        self.encode = nn.Sequential(
            nn.Linear(dimension, dimension), nn.ReLU(), Dropout(settings.dropout), nn.Linear(dimension, 2 * dimension)
        )
        width = dimension + settings.interference
        self.attention = GatedAttention(width, settings.hidden)
        self.dropout, self.classify = Dropout(settings.dropout), silent(width, classes)

    def forward(self, batch: Batch) -> Output:
        mean, log_variance = self.encode(in_precision(self.scale(batch.nodes))).chunk(2, dim=-1)
        z = draw_normal(mean, log_variance) if self.training else mean
        seen = z
        if self.interference is not None:
            seen = torch.cat([z, self.interference(in_precision(batch.nodes)).to(z.dtype)], dim=-1)
        attention = self.attention(seen, batch.mask)
        pooled = (attention[:, None].to(seen.dtype) @ seen).squeeze(1)
        losses, weights = {}, self.settings.loss_weights
        if self.training and weights.predictive and self.anchors is not None:
            told = batch.nodes, z, batch.mask, self.anchors, batch.target
            losses["predictive"] = predictive(*told, self.settings.patches)
        if self.training and weights.superfluous:
            losses["superfluous"] = kl_from_normal(mean, log_variance, batch.mask)
        return Output(self.beside(batch, self.classify(self.dropout(pooled))), losses, attention)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises NotPossible where the bank lacks the concepts, or owners of them, that the settings want."""
    sample, classes, anchors, known = training_sample(cache), len(cache.classes), None, None
    x = sample.nodes[sample.mask].float()
    if settings.interference or settings.loss_weights.predictive:
        bank = cache.part(Bank)
        found = bank.kept & ~bank.of_kind("name", "proto")
        lacks = "the bank keeps no concept" if not found.any() else ""
        if settings.loss_weights.predictive and not own_texts(bank).any():
            lacks = "no class owns a kept concept"
        if lacks:
            raise NotPossible(
                f"{bank.path}: {lacks}; write texts (concepts.import) or have a model asked (llm.mode live), or take"
                " interference: 0 and loss_weights.predictive: 0"
            )
        anchors = class_anchors(bank) if settings.loss_weights.predictive else None
        known = (bank.K[found], Standardise(x @ bank.K[found].T)) if settings.interference else None

    def make(beside: Beside) -> CATE:
        interference = None
        if known is not None:
            interference = Interference(*known, settings.interference, settings.dropout)
        return CATE(Standardise(x), anchors, interference, beside, classes, settings)

    return fit_head(cache, settings, seed, own_reads(settings), make, settings.loss_weights.model_dump())


def build(state: State, settings: Settings, classes: int) -> CATE:
    found, interference = within(state, "interference"), None
    if settings.interference:
        standardise = Standardise.from_state(within(found, "standardise"))
        interference = Interference(found["K"], standardise, settings.interference, settings.dropout)
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return CATE(Standardise.from_state(within(state, "scale")), None, interference, beside, classes, settings)
