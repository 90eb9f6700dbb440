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

    logits = the sum of `streams`: global Linear(g), local Linear(LN(r_1)), relation MLP([g; LN(r_1)]), fused
             Linear(LN(r)), concept s * standardised g . a_c, with s learned. [global, local] is Linear([g; r_1])

An image without a text in G2 has gamma 1 (or nothing to attend to): it is judged by its patches. The gains of rings
around the densest place enter by `rings` * at the readout, r_1 += MLP([r_1; gains]), or as a node linked to the global
one; or as what r_1 has to predict (`loss_weights.rings`).

The global stream starts as the tuned linear probe, the graph's at zero. `loss_weights` weighs, beside cross entropy of
the sum: that of the global stream alone and of the graph's streams alone, so that neither starves because the other has
already explained the training images; and, off at first, layers.losses: `contrast` pulls the densest node to the
concepts of the class, `bottleneck` is the KL of CATE, `recovery` pulls nodes to proxies of the class (after TRD),
in a space of its own. A weight of 0 costs nothing.

Where this differs from CATE: the bottleneck is in the width of the graph, not of the encoder; interference reads the
encoder's vectors against the concepts of all classes, which no gradient reaches either, standardised by training images
and not by the image itself.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache, Part
from training.data.bank import Bank
from training.data.descriptions import Descriptions
from training.data.labels import Labels
from training.layers.blocks import Dropout, GatedAttention, Standardise
from training.layers.graphs import GraphNetwork, Kind, nearest_edges
from training.layers.losses import concept_contrast, densest_node, kl_from_normal, presence, recovery
from training.loop import EVALUATION_BATCH, NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, Output
from training.start import starting_point

SEEDED = True
READS = frozenset({"nodes", "concepts", "owners", "labels", "edges", "descriptions"})
ALSO = frozenset({"nodes"})  # what it reads of other encoders
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
    hidden: Count = 128  # width of the graph stream
    dropout: Fraction = 0.3  # share of activations dropped in training
    texts: Whole = 5  # concepts that make a node's text; 0: none
    nodes: Literal["all", "selected"] = "all"  # all, or selected: the patches that label_patches selected
    heads: Count = 8  # of graph: gat, and of description: attention
    graph: Kind = "gcn"  # gcn, gat, sage, or mlp: no edges
    layers: Count = 2  # of the graph network
    description: Literal["none", "gate", "attention"] = "none"  # graph of texts, read by fused: none, gate, attention
    neighbours: Count = 5  # nearest texts that each is linked to in the second graph
    streams: list[Stream] = Field(default=["global", "local"], min_length=1)  # logits that are summed
    bottleneck: Whole = 0  # dimensions of the information bottleneck on nodes; 0: none
    interference: Whole = 0  # dimensions of nodes against the concepts of all classes; 0: none
    rings: Literal["none", "readout", "node"] = "none"  # gains of rings: none, at the readout, or a node of their own
    recovery_epoch: Count = 1  # the first epoch with loss_weights.recovery
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the sum, weight 1; 0 switches one off

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
    weights, graph, second = settings.loss_weights, has_graph(settings), has_second_graph(settings)
    anchored = bool((graph and settings.interference) or "concept" in settings.streams or weights.contrast)
    labelled = bool(settings.texts) or settings.nodes == "selected" or settings.rings != "none" or bool(weights.rings)
    wanted = {
        "nodes": True,
        "concepts": (graph and bool(settings.texts)) or second or anchored,
        "owners": anchored,
        "labels": (graph and labelled) or second or bool(weights.contrast),
        "edges": graph and settings.graph != "mlp",
        "descriptions": second,
    }
    return frozenset(name for name, is_read in wanted.items() if is_read)


def class_anchors(bank: Bank) -> Tensor:
    """(C, D): the mean of the concepts that a class owns; 0 where it owns none."""
    own = (bank.own & bank.kept[:, None]).float()
    return own.T @ bank.K / own.sum(0).clamp(min=1)[:, None]


def silent(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that says nothing at first."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Bottleneck(nn.Module):
    """z ~ N(mu, s), [mu; log s^2] = Linear(GELU(x)); z = mu at evaluation. Then back to the width of x."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__()
        self.distribution, self.widen = nn.Linear(width, 2 * dimensions), nn.Linear(dimensions, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, n, width) -> the same shape; mu and log s^2 (B, n, dimensions)."""
        mean, log_variance = self.distribution(F.gelu(x)).chunk(2, dim=-1)
        sample = mean
        if self.training:
            noise = torch.randn_like(mean, dtype=torch.float32).to(mean.dtype)  # narrow noise is drawn more slowly
            sample = torch.addcmul(mean, noise, (0.5 * log_variance).exp())
        return self.widen(sample), mean, log_variance


class Interference(nn.Module):
    """How a node's vector meets the concepts of every class: U ELU(Linear(standardised v . a_c)), no gradient to v."""

    anchors: Tensor

    def __init__(self, anchors: Tensor, sample: Tensor, dimensions: int, width: int, dropout: float) -> None:
        """anchors (C, D); sample (n, D): nodes of training images, which say what is standard."""
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.standardise = Standardise(sample @ anchors.T)
        self.narrow, self.widen = nn.Linear(len(anchors), dimensions), nn.Linear(dimensions, width)
        self.dropout = Dropout(dropout, by_image=True)

    def forward(self, v: Tensor) -> Tensor:
        """v (B, n, D) -> (B, n, width)."""
        # narrow(standardise(v A^T)) with its linear maps multiplied first: nothing as wide as the classes are many.
        weight = self.narrow.weight / self.standardise.scale
        bias = self.narrow.bias - (weight * self.standardise.mean).sum(-1)
        out: Tensor = self.widen(self.dropout(F.elu(F.linear(v, weight @ self.anchors, bias))))
        return out


class Projection(nn.Module):
    """LN(V v + b) of another encoder's vectors, standardised by training images."""

    def __init__(self, sample: Tensor, width: int) -> None:
        """sample (n, D): nodes of training images."""
        super().__init__()
        self.standardise = Standardise(sample)
        self.linear, self.norm = nn.Linear(sample.shape[1], width), nn.LayerNorm(width)

    def forward(self, v: Tensor) -> Tensor:
        """v (B, n, D) -> (B, n, width)."""
        out: Tensor = self.norm(self.linear(self.standardise(v)))
        return out


class DescriptionGraph(nn.Module):
    """G2: unit vectors of texts, linked to their nearest, under graph layers."""

    def __init__(self, dimension: int, width: int, settings: Settings) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(dimension, width), nn.LayerNorm(width)
        self.network = GraphNetwork(settings.graph, settings.layers, width, settings.heads, 1, settings.dropout)

    def forward(self, K: Tensor, concepts: Tensor, sentences: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        """K (M, D), concepts (B, Mc) rows of it, sentences (B, S, D), edges and mask (B, Mc+S) -> (B, Mc+S, width)."""
        # A concept stands in many images: it is projected once.
        x = gather_texts(self.project(K), concepts, self.project(sentences))
        out: Tensor = self.network(self.norm(x), edges, mask)
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


@dataclass(frozen=True)
class TextEdges(Part):
    """The edges of G2, found once: a part that this method adds to its cache."""

    text_edges: Tensor  # (n V, Mc+S, Mc+S, 1) float16


@functools.lru_cache(maxsize=1)  # the seeds of a run share it
def link_texts(cache: Cache, neighbours: int) -> Cache:
    """The cache with the edges of G2: no update changes them, and to find them takes a sixteenth of an epoch."""
    bank, shown, said = cache.part(Bank), cache.part(Labels).selected_concepts, cache.part(Descriptions)
    edges = []
    for rows in torch.arange(len(shown)).split(EVALUATION_BATCH):  # not by batches: vectors may lie on the disk
        images, concepts = rows // cache.views, shown[rows].to(cache.device).long()
        mask, sentences = text_mask(concepts, said.dm[images].to(cache.device)), said.d[images].to(cache.device)
        edges.append(text_edges(bank.K, concepts, sentences.float(), mask, neighbours).half().to(shown.device))
    return cache.with_part(TextEdges(torch.cat(edges)))


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
    """s times the mean cosine of g and a class's own concepts, standardised by training images; s starts at 1."""

    anchors: Tensor

    def __init__(self, anchors: Tensor, sample: Tensor) -> None:
        """anchors (C, D), class_anchors; sample (n, D): global vectors of training images."""
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.standardise = Standardise(sample @ anchors.T)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, g: Tensor) -> Tensor:
        """g (B, D) -> (B, C)."""
        out: Tensor = self.scale * self.standardise(F.linear(g, self.anchors).float())
        return out


class ConceptGraph(nn.Module):
    K: Tensor
    K_narrow: Tensor
    own: Tensor
    anchors: Tensor

    def __init__(self, cache: Cache, settings: Settings) -> None:
        """Starts as the tuned linear probe. Raises UserError where labels lack the rings that settings ask for."""
        super().__init__()
        start, weights = starting_point(cache, settings.start_l2), settings.loss_weights
        dimension, hidden, classes = start.probe.in_features, settings.hidden, len(cache.classes)
        self.settings, self.has_graph, self.has_second_graph = settings, has_graph(settings), has_second_graph(settings)
        self.epoch = 0  # training's; see train()
        self.standardise_global, self.standardise_nodes = start.standardise_global, start.standardise_nodes
        self.dropout = Dropout(settings.dropout)
        train, wanted = cache.images("train"), reads(settings)
        anchors = class_anchors(cache.part(Bank)) if "owners" in wanted else torch.zeros(classes, dimension)
        if "concepts" in wanted:
            self.register_buffer("K", cache.part(Bank).K)
            self.register_buffer("K_narrow", self.K.bfloat16(), persistent=False)
        if self.has_graph:
            self.build_graph(cache, anchors)

        if weights.contrast:  # what only training reads is not saved
            bank = cache.part(Bank)
            self.to_concepts = nn.Linear(hidden, dimension)
            self.register_buffer("own", bank.own & bank.kept[:, None], persistent=False)
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
                    streams[stream] = ConceptStream(anchors, cache.globals(train))
        self.streams = streams

    def build_graph(self, cache: Cache, anchors: Tensor) -> None:
        """The parts of G1 and of G2."""
        settings, dimension, hidden = self.settings, anchors.shape[1], self.settings.hidden
        self.in_vector, self.norm_vector = nn.Linear(dimension, hidden), nn.LayerNorm(hidden)
        if settings.texts:
            self.in_text, self.norm_text = nn.Linear(dimension, hidden, bias=False), nn.LayerNorm(hidden)
        self.network = GraphNetwork(settings.graph, settings.layers, hidden, settings.heads, 2, settings.dropout)
        train = cache.images("train")
        sample = cache.batch(train[:: math.ceil(len(train) / EVALUATION_BATCH)])
        self.in_others = nn.ModuleList(Projection(other.nodes[sample.mask], hidden) for other in sample.also)
        self.attention = GatedAttention(hidden, hidden // 2)
        if settings.bottleneck:
            self.bottleneck = Bottleneck(hidden, settings.bottleneck)
        if settings.interference:
            nodes = sample.nodes[sample.mask]
            self.interference = Interference(anchors, nodes, settings.interference, hidden, settings.dropout)
        if self.has_second_graph:
            self.description = DescriptionGraph(dimension, hidden // 2, settings)
            self.fusion = (
                Gate(hidden, hidden // 2)
                if settings.description == "gate"
                else CrossAttention(hidden, hidden // 2, settings.heads)
            )
        if settings.rings != "none" or settings.loss_weights.rings:
            labels = cache.part(Labels)
            gains = labels.ring_gains.shape[1]
            if not gains:
                raise UserError(f"{labels.path}: hold no ring gains (column ring_gains); run label_patches again")
            self.standardise_rings = Standardise(sample.ring_gains)
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
        """c_n (B, N+1, D), a weighted mean of concepts; 0 for a node without any."""
        nodes, k = batch.concept_weight.shape[:2], min(self.settings.texts, batch.concept_weight.shape[-1])
        if not k:
            return self.K.new_zeros(*nodes, self.K.shape[1])
        weight, place = batch.concept_weight.float().topk(k, sorted=False)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
        concept = batch.concept_idx.gather(-1, place).flatten(0, 1)
        K = self.texts()
        mixed = F.embedding_bag(concept, K, per_sample_weights=weight.flatten(0, 1).to(K.dtype), mode="sum")
        return mixed.unflatten(0, nodes)

    def propagate(self, x: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """The layers of G1 (B, N+1, h); the node of the rings is there only meanwhile."""
        by_edges = self.settings.graph != "mlp"
        edges = batch.adjacency.clone() if by_edges else torch.zeros(*mask.shape, mask.shape[1], 2, device=x.device)
        # An image without an edge has no graph: its nodes are not linked by way of the whole image either.
        linked = edges.flatten(1).any(1)[:, None, None].to(edges.dtype)
        edges[:, 0, 1:] = edges[:, 1:, 0] = linked
        if self.settings.rings == "node":
            x = torch.cat([x, self.in_rings(self.standardise_rings(batch.ring_gains))[:, None].to(x.dtype)], dim=1)
            edges, mask = F.pad(edges, (0, 0, 0, 1, 0, 1)), F.pad(mask, (0, 1), value=True)
            edges[:, 0, -1] = edges[:, -1, 0] = linked[:, 0]
        out: Tensor = self.network(x, edges, mask)
        return out[:, : batch.mask.shape[1]]

    def describe(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The nodes of G2 (B, S, h/2) and their mask (B, S): the image's concepts, then its sentences."""
        concepts, K = batch.selected_concepts, self.texts()
        mask = text_mask(concepts, batch.dm)
        if batch.has("text_edges"):
            edges = batch.text_edges
        else:
            edges = text_edges(self.K, concepts, batch.d, mask, self.settings.neighbours)
        return self.description(K, concepts.clamp(min=0), batch.d.to(K.dtype), edges, mask), mask

    def forward(self, batch: Batch) -> Output:
        losses: dict[str, Tensor] = {}
        g = batch.g.float()
        centred = self.dropout(self.standardise_global(g))
        x = attention = patches = fused = None
        mask = batch.mask
        if self.has_graph:
            if self.settings.nodes == "selected":
                mask = mask & batch.selected
                mask[:, 0] = True
            x, losses = self.read_nodes(batch, mask)
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
        logits = torch.stack([value.float() for value in by_stream.values()]).sum(0)
        if self.training:
            losses |= self.stream_losses(batch, by_stream)
            if x is not None and patches is not None:
                losses |= self.graph_losses(batch, mask, x, patches, logits)
        return Output(logits, losses, attention)

    def read_nodes(self, batch: Batch, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The nodes of G1 (B, N+1, h) behind its layers, and in training the loss of the bottleneck."""
        settings, losses = self.settings, {}
        device = batch.nodes.device
        nodes = batch.nodes.to(torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32)
        # in_vector(standardise_nodes(nodes)), standardised in the weights and not in a copy of all nodes.
        weight = self.in_vector.weight / self.standardise_nodes.scale
        bias = self.in_vector.bias - (weight * self.standardise_nodes.mean).sum(-1)
        x = self.norm_vector(F.linear(nodes, weight, bias))
        if settings.texts:
            x = x + self.norm_text(self.in_text(self.node_text(batch)))
        for project, other in zip(self.in_others, batch.also, strict=True):
            x = x + project(other.nodes)
        if settings.bottleneck:
            x, mean, log_variance = self.bottleneck(x)
            if self.training and settings.loss_weights.bottleneck:
                losses["bottleneck"] = kl_from_normal(mean, log_variance, mask)
        if settings.interference:
            x = x + self.interference(nodes)
        return self.propagate(x, batch, mask), losses

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

    def stream_losses(self, batch: Batch, by_stream: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropy of the global stream alone and of the graph's streams alone, where they have a weight."""
        weights, losses = self.settings.loss_weights, {}
        if weights.image and "global" in by_stream:
            losses["image"] = F.cross_entropy(by_stream["global"].float(), batch.target)
        of_graph = [by_stream[name].float() for name in GRAPH_STREAMS if name in by_stream]
        if weights.graph and of_graph:
            losses["graph"] = F.cross_entropy(torch.stack(of_graph).sum(0), batch.target)
        return losses

    def graph_losses(
        self, batch: Batch, mask: Tensor, x: Tensor, patches: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """Contrast, recovery and rings, where they have a weight."""
        weights, losses = self.settings.loss_weights, {}
        if weights.contrast:
            densest = x[torch.arange(len(x), device=x.device), densest_node(batch.density, mask)]
            query = F.normalize(self.to_concepts(densest).float(), dim=-1)
            present = presence(batch.selected_concepts, len(self.K))
            losses["contrast"] = concept_contrast(query, self.K, self.own, self.anchors, present, batch.target)
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
    if has_second_graph(settings):
        cache = link_texts(cache, settings.neighbours)
    # Before the seed is set: what it draws must not depend on whether it is remembered.
    start, weights = starting_point(cache, settings.start_l2), settings.loss_weights.model_dump()
    fitted = fit_epochs(lambda: ConceptGraph(cache, settings), cache, settings, seed, weights)
    return replace(fitted, chosen={**fitted.chosen, "start_l2": start.l2})
