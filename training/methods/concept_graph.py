"""The concept graph: patches and the words that fit them, linked by place and likeness, under graph convolutions.

A design of this project [design] out of parts of several papers, faithful to none of them (docs/methods.md). Each part
below has a switch in `Settings`; those marked * are off unless it says otherwise. For an image with nodes 0 (global)
and 1..N (patches):

    c_n   = sum of w_nk K_k over the node's `texts` heaviest concepts, w summing to 1     text of a node (D)
    x_n   = LN(V v_n + b) + LN(T c_n)                                 (h); LN makes the length of c_n idle
    x_n  += LN(V_e v_en + b_e)      for each other encoder e that the run reads (a run's `also`)
    x_n   = U z_n, z_n ~ N(mu_n, s_n), [mu; log s^2] = Linear(GELU(x_n))    `bottleneck` *; z is mu at evaluation
    x_n  += U' ELU(Linear(standardised v_n . a_c over classes c))     `interference` *; a_c: mean of c's concepts
    W     = spatial and semantic edges; global linked to all with 1; self loops 1             G1
            (an image without an edge has self loops alone: no message passes)
    x     = x + dropout(GELU(layer(LN(x), W))), `layers` times        `graph`: gcn, gat, sage, mlp
    r_1   = sum of a_n x_n, a = gated attention over the nodes        (h); a is `node_scores`

    G2    = the image's concepts and the sentences of its description, linked by the `neighbours` highest cosines;
            its own layers, half as wide, and attention over its nodes give r_2               `description` *
    r     = gamma r_1 + (1 - gamma) r_2, gamma = sigmoid(MLP[r_1; r_2])                       gate; or
            the attention over x_n + attention of n over the nodes of G2                      attention

    logits = z + the sum of `streams`: global Linear(g), local Linear(LN(r_1)), relation MLP([g; LN(r_1)]), fused
             Linear(LN(r)), concept s * standardised g . a_c, with s learned. [global, local] is Linear([g; r_1])

An image without a text in G2 has gamma 1 (or nothing to attend to): it is judged by its patches. The gains of rings
around the densest place enter by `rings` * at the readout, r_1 += MLP([r_1; gains]), or as a node linked to the global
one; or as what r_1 has to predict (`loss_weights.rings`).

The global stream starts as the tuned linear probe, the graph's at zero, and z is 0. Under `with_probe` every stream
starts at zero, and z is what that probe says (training/offset.py). `loss_weights` weighs, beside cross entropy of the
sum: that of z + the global stream alone and of z + the graph's streams alone, so that neither starves because the other
has already explained the training images; and, off at first, layers.losses: `contrast` pulls the densest node to the
concepts of the class, `bottleneck` is the KL of CATE, `recovery` pulls nodes to proxies of the class (after TRD), in a
space of its own. A weight of 0 costs nothing.

`nodes: tokens` takes raw tokens, before the encoder's projection, for the patches. They have no texts, labels or stored
edges: W is 1 between cells of the grid that touch, and every image has the same graph [design].

What no update changes is found once, before training (`prepare`): the graph as its layers need it, the heaviest
concepts of each node, the edges of G2.

Where this differs from CATE: the bottleneck is in the width of the graph, not of the encoder; interference reads the
encoder's vectors against the concepts of all classes, which no gradient reaches either, standardised by training images
and not by the image itself.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache, Part
from training.data.bank import Bank
from training.data.cell_descriptions import CellDescriptions
from training.data.descriptions import Descriptions
from training.data.edges import Edges
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.layers.blocks import Dropout, GatedAttention, Standardise, draw_normal, silent
from training.layers.gather import sum_rows
from training.layers.graphs import GraphNetwork, Kind, grid_edges, nearest_edges, prepare_edges
from training.layers.losses import concept_contrast, densest_node, kl_from_normal, recovery
from training.layers.nodes import (
    NodeInput,
    NodeKind,
    NodeScales,
    Projection,
    in_precision,
    selected_of,
    training_sample,
)
from training.layers.states import State, within
from training.loop import EVALUATION_BATCH, NotNegative, Positive, Schedule, fit_epochs, margin
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS, ProbeBeside, probe_also_reads, reduce, with_reads
from training.start import StartingPoint, starting_point

SEEDED = True
OWN = frozenset({"nodes", "tokens", "concepts", "owners", "labels", "edges", "descriptions", "cell_descriptions"})
READS = OWN | PROBE_WORDS
ALSO = frozenset({"nodes"}) | PROBE_WORDS  # what it reads of other encoders
Whole = Annotated[int, Field(ge=0)]
Stream = Literal["global", "local", "relation", "fused", "concept"]
GRAPH_STREAMS = ("local", "relation", "fused")
PROXIES, PROXY_WIDTH = 4, 64  # of a class, for recovery


class LossWeights(Block):
    """Of each loss beside the cross entropy of all streams' sum; 0 switches it off."""

    image: NotNegative = 0.5  # cross entropy of the global stream alone
    graph: NotNegative = 0.5  # cross entropy of the graph's streams alone
    contrast: NotNegative = 0.0  # concept contrastive loss at the densest node
    bottleneck: NotNegative = 0.0  # divergence of the bottleneck
    recovery: NotNegative = 0.0  # nodes recovered from the class's proxies
    rings: NotNegative = 0.0  # gains of rings told from the readout


class Settings(Schedule):
    batch_size: Count = 256  # images a step
    start_l2: Positive | None = None  # strength of the probe that it starts from; null: val chooses
    with_probe: ProbeBeside = None  # {method, settings}: the probe whose logits it adds to; null: none
    hidden: Count = 128  # width of the graph stream
    dropout: Fraction = 0.3  # share of activations dropped in training
    nodes: NodeKind = "all"  # all, selected (the patches that label_patches selected), or tokens, with texts: 0
    texts: Whole = Field(default=5, validate_default=True)  # concepts that make a node's text; 0: none
    heads: Count = 8  # of graph: gat, and of description: attention
    graph: Kind = "gcn"  # gcn, gat, sage, or mlp: no edges
    layers: Count = 2  # of the graph network
    description: Literal["none", "gate", "attention"] = "none"  # graph of texts, read by fused: none, gate, attention
    cell_texts: bool = False  # what was said of the picture's cells too, as texts of the second graph (describe.nodes)
    neighbours: Count = 5  # nearest texts that each is linked to in the second graph
    streams: list[Stream] = Field(default=["global", "local"], min_length=1)  # logits that are summed
    bottleneck: Whole = 0  # dimensions of the information bottleneck on nodes; 0: none
    interference: Whole = 0  # dimensions of nodes against the concepts of all classes; 0: none
    rings: Literal["none", "readout", "node"] = "none"  # gains of rings: none, at the readout, or a node of their own
    recovery_epoch: Count = 1  # the first epoch with loss_weights.recovery
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the sum, weight 1; 0 switches one off

    @field_validator("texts", "description", "interference", "rings", "loss_weights")
    @classmethod
    def _tokens_have_no_labels(cls, value: Any, info: ValidationInfo) -> Any:
        silence = {"description": "none", "rings": "none"}.get(str(info.field_name), 0)
        if info.field_name == "loss_weights":
            of_labels = [name for name in ("contrast", "rings") if getattr(value, name)]
            silence = f"{of_labels[0]}: 0" if of_labels else value
        if info.data.get("nodes") == "tokens" and value != silence:
            raise ValueError(f"nodes: tokens have neither texts nor labels; it should be {silence}")
        return value

    @field_validator("graph", "description")
    @classmethod
    def _heads_divide_the_width(cls, value: str, info: ValidationInfo) -> str:
        hidden, heads = (info.data.get(name, 0) for name in ("hidden", "heads"))
        if value in ("gat", "attention") and heads and hidden % (2 * heads):
            raise ValueError(f"hidden, {hidden}, has to be a multiple of twice the heads, {2 * heads}")
        return value


def has_graph(settings: Settings) -> bool:
    """Whether the logits, or a loss, depend on G1; without it neither edges nor texts of nodes are looked at."""
    weights = settings.loss_weights
    by_loss = weights.contrast or weights.recovery or weights.rings or (settings.bottleneck and weights.bottleneck)
    return bool(by_loss) or not set(GRAPH_STREAMS).isdisjoint(settings.streams)


def has_second_graph(settings: Settings) -> bool:
    """Whether the logits depend on G2: the stream `fused` alone reads it."""
    return settings.description != "none" and "fused" in settings.streams


def reads(settings: Settings) -> frozenset[str]:
    """What of READS the logits depend on, exactly: a control that changes nothing of it changes no bit."""
    return with_reads(own_reads(settings), settings.with_probe)


def own_reads(settings: Settings) -> frozenset[str]:
    """The same without what the probe of `with_probe` reads."""
    weights, graph, second = settings.loss_weights, has_graph(settings), has_second_graph(settings)
    anchored = bool((graph and settings.interference) or "concept" in settings.streams or weights.contrast)
    labelled = bool(settings.texts) or settings.nodes == "selected" or settings.rings != "none" or bool(weights.rings)
    tokens = settings.nodes == "tokens"
    wanted = {
        "nodes": not tokens,
        "globals": tokens,
        "tokens": graph and tokens,
        "concepts": (graph and bool(settings.texts)) or second or anchored,
        "owners": anchored,
        "labels": (graph and labelled) or second or bool(weights.contrast),
        "edges": graph and settings.graph != "mlp" and not tokens,
        "descriptions": second,
        "cell_descriptions": second and settings.cell_texts,
    }
    return frozenset(name for name, is_read in wanted.items() if is_read)


def also_reads(settings: Settings) -> frozenset[str]:
    return own_also_reads(settings) | probe_also_reads(settings.with_probe)


def own_also_reads(settings: Settings) -> frozenset[str]:
    """What it reads of other encoders itself: their nodes, which are not at the places of tokens."""
    return frozenset({"nodes"} if settings.nodes != "tokens" else ())


def class_anchors(bank: Bank) -> Tensor:
    """(C, D): the mean of the concepts that a class owns; 0 where it owns none."""
    own = (bank.own & bank.kept[:, None]).float()
    return own.T @ bank.K / own.sum(0).clamp(min=1)[:, None]


class Anchored(NamedTuple):
    """Vectors are met by the anchors of classes, and the products standardised as those of training images are."""

    anchors: Tensor  # (C, D): class_anchors
    standardise: Standardise

    @classmethod
    def measure(cls, anchors: Tensor, sample: Tensor) -> Self:
        """sample (n, D): vectors of training images."""
        return cls(anchors, Standardise(sample @ anchors.T))

    @classmethod
    def from_state(cls, state: State) -> Self:
        """From that of a module that holds both."""
        return cls(state["anchors"], Standardise.from_state(within(state, "standardise")))


class Bottleneck(nn.Module):
    """z ~ N(mu, s), [mu; log s^2] = Linear(GELU(x)); z = mu at evaluation. Then back to the width of x."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__()
        self.distribution, self.widen = nn.Linear(width, 2 * dimensions), nn.Linear(dimensions, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, width) -> the same shape; mu and log s^2 (B, n, dimensions)."""
        mean, log_variance = self.distribution(F.gelu(x)).chunk(2, dim=-1)
        sample = draw_normal(mean, log_variance) if self.training else mean
        return self.widen(sample), mean, log_variance


class Interference(nn.Module):
    """How a node's vector meets the concepts of every class: U ELU(Linear(standardised v . a_c)), no gradient to v."""

    anchors: Tensor

    def __init__(self, of_nodes: Anchored, dimensions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("anchors", of_nodes.anchors)
        self.standardise = of_nodes.standardise
        self.narrow, self.widen = nn.Linear(len(self.anchors), dimensions), nn.Linear(dimensions, width)
        self.dropout = Dropout(dropout, by_image=True)

    def forward(self, v: Tensor) -> Tensor:
        """v (B, n, D) -> (B, n, width)."""
        # narrow(standardise(v A^T)) with its linear maps multiplied first: nothing as wide as the classes are many.
        weight = self.narrow.weight / self.standardise.scale
        bias = self.narrow.bias - (weight * self.standardise.mean).sum(-1)
        out: Tensor = self.widen(self.dropout(F.elu(F.linear(v, weight @ self.anchors, bias))))
        return out


class DescriptionGraph(nn.Module):
    """G2: unit vectors of texts, linked to their nearest, under graph layers."""

    def __init__(self, dimension: int, width: int, settings: Settings) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(dimension, width), nn.LayerNorm(width)
        self.network = GraphNetwork(settings.graph, settings.layers, width, settings.heads, 1, settings.dropout)

    def forward(self, K: Tensor, concepts: Tensor, sentences: Tensor, graph: Tensor) -> Tensor:
        """K (M, D), concepts (B, Mc) rows of it, sentences (B, S, D), prepared edges -> (B, Mc+S, width)."""
        # A concept stands in many images: it is projected once.
        x = gather_texts(self.project(K), concepts, self.project(sentences))
        out: Tensor = self.network(self.norm(x), graph)
        return out


def gather_texts(of_concepts: Tensor, concepts: Tensor, of_sentences: Tensor) -> Tensor:
    """(B, Mc+S, h): rows of of_concepts (M, h) for concepts (B, Mc), then of_sentences (B, S, h)."""
    rows = of_concepts.index_select(0, concepts.flatten()).unflatten(0, concepts.shape)
    return torch.cat([rows, of_sentences], dim=1)


def text_mask(concepts: Tensor, sentence_mask: Tensor) -> Tensor:
    """(B, Mc+S) bool: which concepts (B, Mc), -1 where there is none, and sentences (B, S) an image has."""
    return torch.cat([concepts >= 0, sentence_mask], dim=1)


def text_edges(K: Tensor, concepts: Tensor, sentences: Tensor, mask: Tensor, neighbours: int) -> Tensor:
    """Edges of G2 (B, Mc+S, Mc+S, 1), by cosines in float32 whatever the precision of the layers."""
    with torch.autocast(K.device.type, enabled=False):
        return nearest_edges(gather_texts(K, concepts.clamp(min=0), sentences), mask, neighbours)


def text_graph(
    settings: Settings, K: Tensor, concepts: Tensor, sentences: Tensor, sentence_mask: Tensor
) -> Tensor:
    """The edges of G2 as its layers need them."""
    mask = text_mask(concepts, sentence_mask)
    return prepare_edges(settings.graph, text_edges(K, concepts, sentences, mask, settings.neighbours), mask)


def node_graph(settings: Settings, adjacency: Tensor, mask: Tensor) -> Tensor:
    """The edges of G1 as its layers need them, from adjacency (B, n, n, F) and mask (B, n)."""
    edges = adjacency.clone()
    # An image without an edge has no graph: its nodes are not linked by way of the whole image either.
    linked = edges.flatten(1).any(1)[:, None, None].to(edges.dtype)
    edges[:, 0, 1:] = edges[:, 1:, 0] = linked
    if settings.rings == "node":  # linked to the whole image
        edges, mask = F.pad(edges, (0, 0, 0, 1, 0, 1)), F.pad(mask, (0, 1), value=True)
        edges[:, 0, -1] = edges[:, -1, 0] = linked[:, 0]
    return prepare_edges(settings.graph, edges, mask)


def heaviest(concept_idx: Tensor, concept_weight: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """The `texts` heaviest of each node's concepts (..., k), and their weights, float32, which sum to 1."""
    weight, place = concept_weight.float().topk(min(texts, concept_weight.shape[-1]), sorted=False)
    return concept_idx.gather(-1, place), weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class Ready(Part):
    """What no update changes, found once: a part that this method adds to its cache. None where it is not read."""

    node_graph: Tensor | None  # (n V, n, n[, F]) float16
    text_graph: Tensor | None  # (n V, Mc+S, Mc+S[, F]) float16
    text_idx: Tensor | None  # (n V, N+1, texts) int32, rows of the bank
    text_weight: Tensor | None  # (n V, N+1, texts) float32


@functools.lru_cache(maxsize=1)  # the seeds of a run share it
def prepare(cache: Cache, settings_json: str) -> Cache:
    """The cache as training reads it under these settings: with what no update changes, and without what that took."""
    settings = Settings.model_validate_json(settings_json)
    start, wanted = starting_point(cache, settings.start_l2, settings.with_probe), own_reads(settings)
    told = cache if start.rival is None else start.rival.told(cache)
    has_texts = has_graph(settings) and bool(settings.texts)
    found: dict[str, list[Tensor]] = {"node_graph": [], "text_graph": [], "text_idx": [], "text_weight": []}
    for rows in torch.arange(len(cache.split) * cache.views).split(EVALUATION_BATCH):
        # Not by batches: vectors may lie on the disk.
        images = rows // cache.views
        if "edges" in wanted:
            adjacency, mask = cache.part(Edges).cut(images, rows)["adjacency"], cache.part(Nodes).mask[rows]
            if settings.nodes == "selected":
                mask = selected_of(mask, cache.part(Labels).selected[rows].to(mask.device))
            found["node_graph"].append(node_graph(settings, adjacency, mask.to(adjacency.device)).half())
        if has_second_graph(settings) and settings.graph != "mlp":
            K, shown, said = cache.part(Bank).K, cache.part(Labels).selected_concepts[rows], cache.part(Descriptions)
            d, dm = said.d[images], said.dm[images]
            if settings.cell_texts:
                cells = cache.part(CellDescriptions)
                d, dm = torch.cat([d, cells.cd[images]], dim=1), torch.cat([dm, cells.cdm[images]], dim=1)
            texts = (each.to(K.device) for each in (shown.long(), d.float(), dm))
            found["text_graph"].append(text_graph(settings, K, *texts).half().to(shown.device))
        if has_texts:
            labels = cache.part(Labels)
            idx, weight = heaviest(labels.concept_idx[rows], labels.concept_weight[rows], settings.texts)
            found["text_idx"].append(idx)
            found["text_weight"].append(weight)
    ready = Ready(**{name: torch.cat(chunks) if chunks else None for name, chunks in found.items()})
    if cache.has(Labels):
        labels = cache.part(Labels)
        few = labels.concept_idx[..., :0], labels.concept_weight[..., :0]
        told = told.with_part(replace(labels, concept_idx=few[0], concept_weight=few[1]))
    return reduce(told, wanted - {"edges"}, own_also_reads(settings)).with_part(ready)


class Gate(nn.Module):
    """gamma r_1 + (1 - gamma) r_2 with gamma = sigmoid(MLP[r_1; r_2]); 1 where the image has no text."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.attention, self.widen = GatedAttention(text_width, text_width // 2), nn.Linear(text_width, width)
        self.gamma = nn.Sequential(nn.Linear(2 * width, text_width), nn.GELU(), nn.Linear(text_width, 1))

    def forward(self, patches: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        """r_1 (B, width), nodes of G2 (B, S, text_width) and their mask -> r (B, width)."""
        described = mask.any(1, keepdim=True)
        # Attention over nothing is no number: such an image attends to its padding, and gamma leaves that out.
        attention = self.attention(texts, mask | ~described)
        summary = self.widen((attention[:, None].to(texts.dtype) @ texts).squeeze(1))
        gamma = self.gamma(torch.cat([patches, summary], dim=-1)).sigmoid().where(described, 1.0)
        return gamma * patches + (1 - gamma) * summary.masked_fill(~described, 0.0)


class CrossAttention(nn.Module):
    """What each node of G1 finds in G2 (B, n, width): attention with `heads`; 0 where the image has no text."""

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.query = nn.Linear(width, text_width)
        self.key, self.value = nn.Linear(text_width, text_width), nn.Linear(text_width, text_width)
        self.widen = nn.Linear(text_width, width, bias=False)

    def forward(self, x: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        described = mask.any(1)[:, None, None]
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(self.norm(x)), self.key(texts), self.value(texts))
        )
        seen = (mask[:, None, None, :] | ~described[:, None]).expand(-1, 1, x.shape[1], -1)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out: Tensor = self.widen(found.transpose(1, 2).flatten(2)).masked_fill(~described, 0.0)
        return out


class Relation(nn.Module):
    """MLP[g; LN(r)]."""

    def __init__(self, dimension: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.both = nn.LayerNorm(width), nn.Linear(dimension + width, width)
        self.dropout, self.classify = Dropout(dropout), silent(width, classes)

    def forward(self, g: Tensor, r: Tensor) -> Tensor:
        both = torch.cat([g, self.norm(r).to(g.dtype)], dim=-1)
        out: Tensor = self.classify(self.dropout(F.gelu(self.both(both))))
        return out


class ConceptStream(nn.Module):
    """s times the mean cosine of g and a class's own concepts, standardised by training images."""

    anchors: Tensor

    def __init__(self, of_images: Anchored, scale: float) -> None:
        """s starts at `scale`."""
        super().__init__()
        self.register_buffer("anchors", of_images.anchors)
        self.standardise = of_images.standardise
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, g: Tensor) -> Tensor:
        """g (B, D) -> (B, C)."""
        out: Tensor = self.scale * self.standardise(F.linear(g, self.anchors).float())
        return out


@dataclass(frozen=True)
class Given:
    """What a model takes of the training images and of the bank before it learns; None where it does not read it."""

    start: StartingPoint
    K: Tensor | None  # (M, D): the bank
    contrast: tuple[Tensor, Tensor] | None  # (M, C) bool: the kept texts that a class owns; (C, D): class_anchors
    nodes: NodeScales | None
    others: tuple[Standardise, ...]  # of the nodes of each other encoder
    interference: Anchored | None
    concept: Anchored | None
    rings: Standardise | None

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        """Raises UserError where labels lack the rings that settings ask for."""
        start, wanted = starting_point(cache, settings.start_l2, settings.with_probe), own_reads(settings)
        K = contrast = nodes = interference = concept = rings = None
        others: tuple[Standardise, ...] = ()
        if "concepts" in wanted:
            K = cache.part(Bank).K
        if "owners" in wanted:
            bank = cache.part(Bank)
            contrast = bank.own & bank.kept[:, None], class_anchors(bank)
        if contrast is not None and "concept" in settings.streams:
            concept = Anchored.measure(contrast[1], cache.globals(cache.images("train")))
        if has_graph(settings):
            sample, nodes = training_sample(cache), NodeScales.measure(cache, settings.nodes)
            if settings.nodes != "tokens":  # at whose places nodes of other encoders are not
                others = tuple(Standardise(other.nodes[sample.mask]) for other in sample.also)
            if contrast is not None and settings.interference:
                interference = Anchored.measure(contrast[1], sample.nodes[sample.mask])
            if settings.rings != "none" or settings.loss_weights.rings:
                labels = cache.part(Labels)
                if not labels.ring_gains.shape[1]:
                    raise UserError(f"{labels.path}: hold no ring gains (column ring_gains); run label_patches again")
                rings = Standardise(sample.ring_gains)
        return cls(start, K, contrast, nodes, others, interference, concept, rings)

    @classmethod
    def from_state(cls, state: State, settings: Settings, classes: int) -> Self:
        """From that of a ConceptGraph: all but what training alone reads."""
        parts = {name: within(state, name) for name in ("in_nodes", "in_others", "interference", "streams.concept")}
        rings, count = within(state, "standardise_rings"), len({name.split(".")[0] for name in parts["in_others"]})
        others = (within(parts["in_others"], f"{place}.standardise") for place in range(count))
        return cls(
            start=StartingPoint.from_state(state, settings.with_probe, classes),
            K=state.get("K"),
            contrast=None,
            nodes=NodeScales.from_state(parts["in_nodes"]) if parts["in_nodes"] else None,
            others=tuple(map(Standardise.from_state, others)),
            interference=Anchored.from_state(parts["interference"]) if parts["interference"] else None,
            concept=Anchored.from_state(parts["streams.concept"]) if parts["streams.concept"] else None,
            rings=Standardise.from_state(rings) if rings else None,
        )


class ConceptGraph(nn.Module):
    K: Tensor
    K_narrow: Tensor
    own: Tensor
    anchors: Tensor

    def __init__(self, given: Given, settings: Settings) -> None:
        """Starts as the tuned linear probe, or as `with_probe`."""
        super().__init__()
        start, weights = given.start, settings.loss_weights
        dimension, hidden, classes = start.probe.in_features, settings.hidden, start.probe.out_features
        self.settings, self.has_graph, self.has_second_graph = settings, has_graph(settings), has_second_graph(settings)
        self.epoch = 0  # training's; see train()
        self.offset, self.standardise_global = start.offset, start.standardise_global
        self.dropout = Dropout(settings.dropout)
        if given.K is not None:
            self.register_buffer("K", given.K)
            self.register_buffer("K_narrow", self.K.bfloat16(), persistent=False)
        if given.nodes is not None:
            self.build_graph(given, given.nodes)

        if weights.contrast:
            self.to_concepts = nn.Linear(hidden, dimension)
            own, anchors = given.contrast or (None, None)
            self.register_buffer("own", own, persistent=False)  # what only training reads is not saved
            self.register_buffer("anchors", anchors, persistent=False)
        if weights.recovery:
            self.to_proxies = nn.Linear(hidden, PROXY_WIDTH)
            self.proxies = nn.Parameter(torch.randn(classes, PROXIES, PROXY_WIDTH) / math.sqrt(PROXY_WIDTH))

        streams = nn.ModuleDict()
        for stream in settings.streams:
            match stream:
                case "global":
                    streams[stream] = nn.Linear(dimension, classes)
                    streams[stream].load_state_dict(start.probe.state_dict())
                case "local" | "fused":
                    streams[stream] = nn.Sequential(
                        nn.LayerNorm(hidden), Dropout(settings.dropout), silent(hidden, classes)
                    )
                case "relation":
                    streams[stream] = Relation(dimension, hidden, classes, settings.dropout)
                case "concept":
                    assert given.concept is not None
                    streams[stream] = ConceptStream(given.concept, 1.0 if self.offset is None else 0.0)
        self.streams = streams

    def build_graph(self, given: Given, nodes: NodeScales) -> None:
        """The parts of G1 and of G2."""
        settings, dimension, hidden = self.settings, given.start.probe.in_features, self.settings.hidden
        self.in_nodes = NodeInput(nodes, settings.nodes, hidden)
        if settings.texts:
            self.in_text, self.norm_text = nn.Linear(dimension, hidden, bias=False), nn.LayerNorm(hidden)
        weights = 1 if settings.nodes == "tokens" else 2  # of an edge
        self.network = GraphNetwork(settings.graph, settings.layers, hidden, settings.heads, weights, settings.dropout)
        self.in_others = nn.ModuleList(Projection(standardise, hidden) for standardise in given.others)
        self.attention = GatedAttention(hidden, hidden // 2)
        if settings.bottleneck:
            self.bottleneck = Bottleneck(hidden, settings.bottleneck)
        if given.interference is not None:
            self.interference = Interference(given.interference, settings.interference, hidden, settings.dropout)
        if self.has_second_graph:
            self.description = DescriptionGraph(dimension, hidden // 2, settings)
            self.fusion = (
                Gate(hidden, hidden // 2)
                if settings.description == "gate"
                else CrossAttention(hidden, hidden // 2, settings.heads)
            )
        if given.rings is not None:
            self.standardise_rings, gains = given.rings, len(given.rings.mean)
            if settings.rings == "readout":
                self.with_rings = nn.Sequential(nn.Linear(hidden + gains, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            if settings.rings == "node":
                self.in_rings = nn.Linear(gains, hidden)
            if settings.loss_weights.rings:
                narrow = nn.Linear(hidden, hidden // 2)
                self.predict_rings = nn.Sequential(narrow, nn.GELU(), nn.Linear(hidden // 2, gains))

    def train(self, mode: bool = True) -> "ConceptGraph":
        """Training mode or not. The loop asks for training once an epoch: so epochs are counted for recovery_epoch."""
        self.epoch += mode
        return super().train(mode)

    def texts(self) -> Tensor:
        """K in the precision of the products: to gather wide and narrow later takes several times as long."""
        return self.K_narrow if torch.is_autocast_enabled(self.K.device.type) else self.K

    def node_text(self, batch: Batch) -> Tensor:
        """T c_n (B, N+1, h), c_n a weighted mean of concepts; 0 for a node without any."""
        if batch.has("text_idx"):
            concept, weight = batch.text_idx, batch.text_weight
        else:
            concept, weight = heaviest(batch.concept_idx, batch.concept_weight, self.settings.texts)
        nodes = concept.shape[:2]
        # A concept stands at many nodes: it is projected once, and what is gathered is narrow.
        projected = self.in_text(self.texts()).float()
        if not concept.shape[-1]:
            return projected.new_zeros(*nodes, projected.shape[1])
        return sum_rows(projected, concept.flatten(0, 1), weight.flatten(0, 1)).unflatten(0, nodes)

    def propagate(self, x: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """The layers of G1 (B, N+1, h); the node of the rings is there only meanwhile."""
        settings, nodes = self.settings, x.shape[1]
        if settings.rings == "node":
            x = torch.cat([x, self.in_rings(self.standardise_rings(batch.ring_gains))[:, None].to(x.dtype)], dim=1)
        if settings.graph == "mlp":
            graph = mask
        elif batch.has("node_graph"):
            graph = batch.node_graph
        elif settings.nodes == "tokens":
            cells = F.pad(grid_edges(*batch.token_grid), (0, 0, 1, 0, 1, 0)).to(x.device)
            graph = node_graph(settings, cells, mask[:1])
        else:
            graph = node_graph(settings, batch.adjacency, mask)
        out: Tensor = self.network(x, graph)
        return out[:, :nodes]

    def describe(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The nodes of G2 (B, S, h/2) and their mask (B, S): concepts of the image, its sentences, its cells'."""
        concepts, K, d, dm = batch.selected_concepts, self.texts(), batch.d, batch.dm
        if self.settings.cell_texts:
            d, dm = torch.cat([d, batch.cd], dim=1), torch.cat([dm, batch.cdm], dim=1)
        mask = text_mask(concepts, dm)
        graph = batch.text_graph if batch.has("text_graph") else text_graph(self.settings, self.K, concepts, d, dm)
        return self.description(K, concepts.clamp(min=0), d.to(K.dtype), graph), mask

    def forward(self, batch: Batch) -> Output:
        losses: dict[str, Tensor] = {}
        g = batch.g.float()
        centred = self.dropout(self.standardise_global(g))
        x = mask = attention = patches = fused = None
        if self.has_graph:
            x, mask, losses = self.read_nodes(batch)
            attention = self.attention(x, mask)
            patches, fused = self.read_out(batch, x, attention)

        by_stream: dict[str, Tensor] = {}
        for name, stream in self.streams.items():
            match name:
                case "global":
                    by_stream[name] = stream(centred)
                case "local":
                    by_stream[name] = stream(patches)
                case "fused":
                    by_stream[name] = stream(fused)
                case "relation":
                    by_stream[name] = stream(centred, patches)
                case "concept":
                    by_stream[name] = stream(g)
        offset = [] if self.offset is None else [self.offset(batch)]
        logits = torch.stack([*offset, *(value.float() for value in by_stream.values())]).sum(0)
        if self.training:
            losses |= self.stream_losses(batch, by_stream, offset)
            if x is not None and mask is not None and patches is not None:
                losses |= self.graph_losses(batch, mask, x, patches, logits)
        # Boxes are those of stored nodes: tokens have none to be scored at.
        return Output(logits, losses, None if self.settings.nodes == "tokens" else attention)

    def read_nodes(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The nodes of G1 (B, n, h) behind its layers, which of them count (B, n), and the loss of the bottleneck."""
        settings, losses = self.settings, {}
        if settings.interference:  # reads them too: to make them narrow takes a while
            batch = batch.changed(nodes=in_precision(batch.nodes))
        x, mask = self.in_nodes(batch)
        if settings.texts:
            x = x + self.norm_text(self.node_text(batch).to(x.dtype))
        for project, other in zip(self.in_others, batch.also, strict=False):
            x = x + project(other.nodes)
        if settings.bottleneck:
            x, mean, log_variance = self.bottleneck(x)
            if self.training and settings.loss_weights.bottleneck:
                losses["bottleneck"] = kl_from_normal(mean, log_variance, mask)
        if settings.interference:
            x = x + self.interference(batch.nodes)
        return self.propagate(x, batch, mask), mask, losses

    def read_out(self, batch: Batch, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """r_1 and r (B, h)."""
        patches = pool(x, attention)
        if self.settings.rings == "readout":
            gains = self.standardise_rings(batch.ring_gains)
            patches = patches + self.with_rings(torch.cat([patches, gains.to(patches.dtype)], dim=-1))
        if not self.has_second_graph:
            return patches, patches
        texts, text_mask = self.describe(batch)
        if self.settings.description == "gate":
            return patches, self.fusion(patches, texts, text_mask)
        return patches, patches + pool(self.fusion(x, texts, text_mask), attention)

    def stream_losses(self, batch: Batch, by_stream: dict[str, Tensor], offset: list[Tensor]) -> dict[str, Tensor]:
        """Cross entropy of the global stream alone and of the graph's streams alone, where they have a weight.

        `offset` holds z (B, C), or nothing: each stream is to learn what z leaves.
        """
        weights, losses = self.settings.loss_weights, {}
        if weights.image and "global" in by_stream:
            said = torch.stack([*offset, by_stream["global"].float()]).sum(0)
            losses["image"] = F.cross_entropy(said, batch.target)
        of_graph = [by_stream[name].float() for name in GRAPH_STREAMS if name in by_stream]
        if weights.graph and of_graph:
            losses["graph"] = F.cross_entropy(torch.stack([*offset, *of_graph]).sum(0), batch.target)
        return losses

    def graph_losses(
        self, batch: Batch, mask: Tensor, x: Tensor, patches: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """Contrast, recovery and rings, where they have a weight."""
        weights, losses = self.settings.loss_weights, {}
        if weights.contrast:
            densest = x[torch.arange(len(x), device=x.device), densest_node(batch.density, mask)]
            query = F.normalize(self.to_concepts(densest).float(), dim=-1)
            shown = batch.selected_concepts
            losses["contrast"] = concept_contrast(query, self.K, self.own, self.anchors, shown, batch.target)
        if weights.recovery and self.epoch >= self.settings.recovery_epoch:
            losses["recovery"] = recovery(self.to_proxies(x), mask, self.proxies, batch.target, logits)
        if weights.rings:
            predicted = self.predict_rings(patches).float()
            losses["rings"] = F.mse_loss(predicted, self.standardise_rings(batch.ring_gains))
        return losses


def pool(x: Tensor, attention: Tensor) -> Tensor:
    """(B, h): nodes (B, n, h) weighed by attention (B, n)."""
    return (attention[:, None].to(x.dtype) @ x).squeeze(1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    # Before the seed is set: what these draw must not depend on whether they are remembered.
    start = starting_point(cache, settings.start_l2, settings.with_probe)
    told, weights = prepare(cache, settings.model_dump_json()), settings.loss_weights.model_dump()
    given = Given.measure(cache, settings)
    fitted = fit_epochs(lambda: ConceptGraph(given, settings), told, settings, seed, weights)
    return replace(fitted, chosen={**fitted.chosen, **start.chosen})


def texts_add(
    model: ConceptGraph, settings: Settings, cache: Cache, images: Tensor, classes: Tensor
) -> Tensor | None:
    """How far logit a - logit b falls where the image's labels lack a text, at every node and among its concepts.

    What is left of a node's text is a mean as before; density, selected patches and rings stay, and so do interference
    and the stream `concept`, which read the concepts of classes and not of the image. None where no text of an image is
    read.
    """
    by_node = has_graph(settings) and bool(settings.texts)
    if not by_node and not has_second_graph(settings):
        return None
    model.eval()
    found = torch.zeros(len(images), len(model.K), device=cache.device)
    for chunk in torch.arange(len(images)).split(EVALUATION_BATCH):
        batch = cache.batch(images[chunk])
        whole, held = margin(model(batch).logits, classes[chunk]), torch.zeros_like(found[chunk], dtype=torch.bool)
        if by_node:
            weighs = (batch.concept_weight > 0) & batch.mask[..., None]
            image = torch.arange(len(chunk), device=held.device)[:, None, None].expand_as(weighs)
            held[image[weighs], batch.concept_idx[weighs]] = True
        if has_second_graph(settings):
            image, place = (batch.selected_concepts >= 0).nonzero(as_tuple=True)
            held[image, batch.selected_concepts[image, place]] = True
        for rows in held.nonzero().split(EVALUATION_BATCH):
            image, text = rows.T
            lacking = without_texts(cache.batch(images[chunk[image.cpu()]]), text)
            found[chunk[image.cpu()], text] = whole[image] - margin(model(lacking).logits, classes[chunk][image])
    return found


def without_texts(batch: Batch, text: Tensor) -> Batch:
    """The batch as if no label of an image named one text of the bank: text (B,)."""
    gone, shown = batch.concept_idx == text[:, None, None], batch.selected_concepts
    return batch.changed(
        concept_weight=batch.concept_weight.masked_fill(gone, 0.0),
        selected_concepts=shown.masked_fill(shown == text[:, None], -1),
    )


def build(state: State, settings: Settings, classes: int) -> ConceptGraph:
    return ConceptGraph(Given.from_state(state, settings, classes), settings)
