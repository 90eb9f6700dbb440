"""The concept graph: patches and the words that fit them, linked by place and likeness, under graph convolutions.

A design of this project [design] out of parts of several papers, faithful to none of them (docs/methods.md). For an
image with nodes 0 (global) and 1..N (patches):

    c_n   = sum of w_nk K_k over the node's `texts` heaviest concepts, w summing to 1     text of a node (D)
    x_n   = LN(V v_n + b) + LN(T c_n)                                 (h); LN makes the length of c_n idle
    x_n  += LN(V_e v_en + b_e)      for each other encoder e that the run reads (a run's `also`)
    W     = spatial and semantic edges; global linked to all with 1; self loops 1
            (an image without an edge has self loops alone: no message passes)
    x     = x + dropout(GELU(layer(LN(x), W))), `layers` times        `graph`: gcn, gat, sage, or mlp without edges
    r     = sum of a_n x_n, a = gated attention over the nodes        (h); a is `node_scores`
    r     = gamma r + (1 - gamma) r_2, gamma = sigmoid(MLP[r; r_2])   under `description` alone; r_2 is read from
            the sentences of the image's description, linked to their nearest, under layers of their own; with
            `cell_texts` those of its cells are among them
    logits = z + Linear(g) + Linear(LN(r))                            `streams`: global and local

The global stream starts as the tuned linear probe, the local one at zero, and z is 0. Under `with_probe` both start at
zero, and z is what that probe says of the vectors that its `features` name, moments among them (training/offset.py).
`loss_weights` weighs, beside cross entropy of the sum: that of z + the global stream alone and of z + the local one
alone, so that neither starves because the other has already explained the training images. A weight of 0 costs nothing.

`nodes: tokens` takes raw tokens of a `layer`, before the encoder's projection, for the patches. They have no texts,
labels or stored edges: W is 1 between cells of the grid that touch, and every image has the same graph [design].

A class without training images is never said: all that training tells is to say others. Under `unseen` its logit is a
sum over classes with images, logit_u = sum of m_us logit_s, rows of m summing to 1: as its prototype is predicted from
theirs by its text (training/class_texts.py) [design]. Logits that are linear in prototypes say just what the predicted
one would. Training is told nothing of it. A mix is hardly ever the largest logit: it tells these classes from each
other.

What no update changes is found once, before training (`prepare`): the graph as its layers need it, and the heaviest
concepts of each node.
"""

import functools
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.class_texts import Texts, class_mix, text_reads
from training.data import Batch, Cache, Part
from training.data.bank import Bank
from training.data.edges import Edges
from training.data.labels import Labels
from training.data.nodes import Nodes
from training.layers.blocks import Dropout, GatedAttention, Standardise, silent
from training.layers.gather import sum_rows
from training.layers.graphs import GraphNetwork, Kind, grid_edges, nearest_edges, prepare_edges
from training.layers.nodes import NodeInput, NodeKind, NodeScales, Projection, selected_of, training_sample
from training.layers.states import State, within
from training.loop import EVALUATION_BATCH, NotNegative, Positive, Schedule, fit_epochs, margin
from training.methods import Fitted, Output
from training.offset import PROBE_WORDS, ProbeBeside, probe_also_reads, reduce, with_reads
from training.start import StartingPoint, starting_point
from training.token_heads import Layer, tokens_word

SEEDED = True
OWN = frozenset({"nodes", "tokens", "names", "concepts", "owners", "labels", "edges"})
READS = OWN | {"descriptions", "cell_descriptions"} | PROBE_WORDS
ALSO = frozenset({"nodes"}) | PROBE_WORDS  # what it reads of other encoders
Whole = Annotated[int, Field(ge=0)]
NEIGHBOURS = 5  # nearest sentences that each is linked to


class LossWeights(Block):
    """Cross entropies of each stream alone, beside that of their sum; 0 switches one off."""

    image: NotNegative = 0.5  # cross entropy of the global stream alone
    graph: NotNegative = 0.5  # cross entropy of the local stream alone


class Settings(Schedule):
    batch_size: Count = 256  # images a step
    start_l2: Positive | None = None  # strength of the probe that it starts from; null: val chooses
    with_probe: ProbeBeside = None  # {method, settings}: the probe whose logits it adds to; true: probes; null: none
    hidden: Count = 128  # width of the graph stream
    dropout: Fraction = 0.3  # share of activations dropped in training
    nodes: NodeKind = "all"  # all, selected (the patches that label_patches selected), or tokens, with texts: 0
    layer: Layer = None  # of tokens, by its number; null: the deepest stored
    texts: Whole = Field(default=5, validate_default=True)  # concepts that make a node's text; 0: none
    heads: Count = 8  # of graph: gat
    graph: Kind = "gcn"  # gcn, gat, sage, or mlp: no edges
    layers: Count = 2  # of the graph network
    description: bool = False  # whether a graph of the image's sentences joins the patches
    cell_texts: bool = False  # whether what was said of the image's cells is in that graph too (describe.nodes)
    streams: list[Literal["global", "local"]] = Field(default=["global", "local"], min_length=1)  # summed logits
    unseen: Texts | None = None  # by what classes without images are told: names, concepts, both; null: never said
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy of the sum, weight 1; 0 switches one off

    @field_validator("texts")
    @classmethod
    def _tokens_have_no_labels(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("nodes") == "tokens" and value:
            raise ValueError("nodes: tokens have neither texts nor labels; it should be 0")
        return value

    @field_validator("graph")
    @classmethod
    def _heads_divide_the_width(cls, value: str, info: ValidationInfo) -> str:
        hidden, heads = (info.data.get(name, 0) for name in ("hidden", "heads"))
        if value == "gat" and heads and hidden % (2 * heads):
            raise ValueError(f"hidden, {hidden}, has to be a multiple of twice the heads, {2 * heads}")
        return value

    @property
    def has_graph(self) -> bool:
        """Whether the logits depend on the nodes; without it neither edges nor texts of nodes are looked at."""
        return "local" in self.streams


def reads(settings: Settings) -> frozenset[str]:
    """What of READS the logits depend on, exactly: a control that changes nothing of it changes no bit.

    With `unseen` that holds where a class has no image.
    """
    return with_reads(own_reads(settings), settings.with_probe)


def own_reads(settings: Settings) -> frozenset[str]:
    """The same without what the probe of `with_probe` reads."""
    graph, tokens = settings.has_graph, settings.nodes == "tokens"
    wanted = {
        "nodes": not tokens,
        "globals": tokens,
        tokens_word(settings): graph and tokens,
        "concepts": graph and bool(settings.texts),
        "labels": graph and (bool(settings.texts) or settings.nodes == "selected"),
        "edges": graph and settings.graph != "mlp" and not tokens,
        "descriptions": graph and settings.description,
        "cell_descriptions": graph and settings.description and settings.cell_texts,
    }
    of_classes = frozenset() if settings.unseen is None else text_reads(settings.unseen)
    return of_classes.union(name for name, is_read in wanted.items() if is_read)


def also_reads(settings: Settings) -> frozenset[str]:
    return own_also_reads(settings) | probe_also_reads(settings.with_probe)


def own_also_reads(settings: Settings) -> frozenset[str]:
    """What it reads of other encoders itself: their nodes, which are not at the places of tokens."""
    return frozenset({"nodes"} if settings.nodes != "tokens" else ())


def node_graph(settings: Settings, adjacency: Tensor, mask: Tensor) -> Tensor:
    """The edges of an image's nodes as the layers need them, from adjacency (B, n, n, F) and mask (B, n)."""
    edges = adjacency.clone()
    # An image without an edge has no graph: its nodes are not linked by way of the whole image either.
    edges[:, 0, 1:] = edges[:, 1:, 0] = edges.flatten(1).any(1)[:, None, None].to(edges.dtype)
    return prepare_edges(settings.graph, edges, mask)


def heaviest(concept_idx: Tensor, concept_weight: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """The `texts` heaviest of each node's concepts (..., k), and their weights, float32, which sum to 1."""
    weight, place = concept_weight.float().topk(min(texts, concept_weight.shape[-1]), sorted=False)
    return concept_idx.gather(-1, place), weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class Ready(Part):
    """What no update changes, found once: a part that this method adds to its cache. None where it is not read."""

    node_graph: Tensor | None  # (n V, n, n[, F]) float16
    text_idx: Tensor | None  # (n V, N+1, texts) int32, rows of the bank
    text_weight: Tensor | None  # (n V, N+1, texts) float32


@functools.lru_cache(maxsize=1)  # the seeds of a run share it
def prepare(cache: Cache, settings_json: str) -> Cache:
    """The cache as training reads it under these settings: with what no update changes, and without what that took."""
    settings = Settings.model_validate_json(settings_json)
    start, wanted = starting_point(cache, settings.start_l2, settings.with_probe), own_reads(settings)
    told = cache if start.rival is None else start.rival.told(cache)
    found: dict[str, list[Tensor]] = {"node_graph": [], "text_idx": [], "text_weight": []}
    for rows in torch.arange(len(cache.split) * cache.views).split(EVALUATION_BATCH):
        # Not by batches: vectors may lie on the disk.
        images = rows // cache.views
        if "edges" in wanted:
            adjacency, mask = cache.part(Edges).cut(images, rows)["adjacency"], cache.part(Nodes).mask[rows]
            if settings.nodes == "selected":
                mask = selected_of(mask, cache.part(Labels).selected[rows].to(mask.device))
            found["node_graph"].append(node_graph(settings, adjacency, mask.to(adjacency.device)).half())
        if settings.has_graph and settings.texts:
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


class DescriptionGraph(nn.Module):
    """r = gamma r + (1 - gamma) r_2: patches joined by sentences; gamma is 1 where the image has none."""

    def __init__(self, dimension: int, settings: Settings) -> None:
        super().__init__()
        hidden, width, self.kind = settings.hidden, settings.hidden // 2, settings.graph
        self.project, self.norm = nn.Linear(dimension, width), nn.LayerNorm(width)
        self.network = GraphNetwork(settings.graph, settings.layers, width, settings.heads, 1, settings.dropout)
        self.attention, self.widen = GatedAttention(width, width // 2), nn.Linear(width, hidden)
        self.gamma = nn.Sequential(nn.Linear(2 * hidden, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, patches: Tensor, d: Tensor, mask: Tensor) -> Tensor:
        """r (B, hidden), sentences d (B, S, D) of unit length and their mask (B, S) -> r (B, hidden)."""
        with torch.autocast(d.device.type, enabled=False):  # edges do not depend on the precision of the layers
            graph = prepare_edges(self.kind, nearest_edges(d.float(), mask, NEIGHBOURS), mask)
        x = self.network(self.norm(self.project(d.float())), graph)
        described = mask.any(1, keepdim=True)
        # Attention over nothing is no number: such an image attends to its padding, and gamma leaves that out.
        summary = self.widen(pool(x, self.attention(x, mask | ~described)))
        gamma = self.gamma(torch.cat([patches, summary], dim=-1)).sigmoid().where(described, 1.0)
        return gamma * patches + (1 - gamma) * summary.masked_fill(~described, 0.0)


def pool(x: Tensor, attention: Tensor) -> Tensor:
    """(B, h): nodes (B, n, h) weighed by attention (B, n)."""
    return (attention[:, None].to(x.dtype) @ x).squeeze(1)


@dataclass(frozen=True)
class Given:
    """What a model takes of the training images and of the bank before it learns; None where it does not read it."""

    start: StartingPoint
    K: Tensor | None  # (M, D): the bank
    nodes: NodeScales | None
    others: tuple[Standardise, ...]  # of the nodes of each other encoder
    mix: Tensor | None  # (C, C): class_mix

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        """Raises NotPossible where `unseen` asks for texts of classes and has too few classes to learn from."""
        start = starting_point(cache, settings.start_l2, settings.with_probe)
        K = cache.part(Bank).K if settings.has_graph and settings.texts else None
        mix = None if settings.unseen is None else class_mix(cache, settings.unseen)
        if not settings.has_graph:
            return cls(start, K, None, (), mix)
        others: tuple[Standardise, ...] = ()
        if settings.nodes != "tokens":  # at whose places nodes of other encoders are not
            sample = training_sample(cache)
            others = tuple(Standardise(other.nodes[sample.mask]) for other in sample.also)
        return cls(start, K, NodeScales.measure(cache, settings.nodes, tokens_word(settings)), others, mix)

    @classmethod
    def from_state(cls, state: State, settings: Settings, classes: int) -> Self:
        """From that of a ConceptGraph."""
        nodes, others = within(state, "in_nodes"), within(state, "in_others")
        count = len({name.split(".")[0] for name in others})
        return cls(
            start=StartingPoint.from_state(state, settings.with_probe, classes),
            K=state.get("K"),
            nodes=NodeScales.from_state(nodes) if nodes else None,
            others=tuple(Standardise.from_state(within(others, f"{place}.standardise")) for place in range(count)),
            mix=state.get("mix"),
        )


class ConceptGraph(nn.Module):
    K: Tensor
    K_narrow: Tensor
    mix: Tensor | None

    def __init__(self, given: Given, settings: Settings) -> None:
        """Starts as the tuned linear probe, or as `with_probe`."""
        super().__init__()
        start, dimension = given.start, given.start.probe.in_features
        self.settings, self.offset, self.standardise_global = settings, start.offset, start.standardise_global
        self.dropout = Dropout(settings.dropout)
        self.register_buffer("mix", given.mix)
        if given.K is not None:
            self.register_buffer("K", given.K)
            self.register_buffer("K_narrow", self.K.bfloat16(), persistent=False)
        if given.nodes is not None:
            self.build_graph(given, given.nodes)
        self.streams = nn.ModuleDict()
        for stream in settings.streams:
            if stream == "global":
                self.streams[stream] = nn.Linear(dimension, start.probe.out_features)
                self.streams[stream].load_state_dict(start.probe.state_dict())
            else:
                classify = silent(settings.hidden, start.probe.out_features)
                self.streams[stream] = nn.Sequential(
                    nn.LayerNorm(settings.hidden), Dropout(settings.dropout), classify
                )

    def build_graph(self, given: Given, nodes: NodeScales) -> None:
        settings, dimension, hidden = self.settings, given.start.probe.in_features, self.settings.hidden
        self.in_nodes = NodeInput(nodes, settings.nodes, hidden, tokens_word(settings))
        if settings.texts:
            self.in_text, self.norm_text = nn.Linear(dimension, hidden, bias=False), nn.LayerNorm(hidden)
        weights = 1 if settings.nodes == "tokens" else 2  # of an edge
        self.network = GraphNetwork(settings.graph, settings.layers, hidden, settings.heads, weights, settings.dropout)
        self.in_others = nn.ModuleList(Projection(standardise, hidden) for standardise in given.others)
        self.attention = GatedAttention(hidden, hidden // 2)
        if settings.description:
            self.description = DescriptionGraph(dimension, settings)

    def node_text(self, batch: Batch) -> Tensor:
        """T c_n (B, N+1, h), c_n a weighted mean of concepts; 0 for a node without any."""
        if batch.has("text_idx"):
            concept, weight = batch.text_idx, batch.text_weight
        else:
            concept, weight = heaviest(batch.concept_idx, batch.concept_weight, self.settings.texts)
        nodes = concept.shape[:2]
        # A concept stands at many nodes: it is projected once, and what is gathered is narrow. In the precision of the
        # products: to gather wide and narrow later takes several times as long.
        K = self.K_narrow if torch.is_autocast_enabled(self.K.device.type) else self.K
        projected = self.in_text(K).float()
        if not concept.shape[-1]:
            return projected.new_zeros(*nodes, projected.shape[1])
        return sum_rows(projected, concept.flatten(0, 1), weight.flatten(0, 1)).unflatten(0, nodes)

    def propagate(self, x: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """The layers over nodes x (B, N+1, h)."""
        settings = self.settings
        if settings.graph == "mlp":
            graph = mask
        elif batch.has("node_graph"):
            graph = batch.node_graph
        elif settings.nodes == "tokens":
            cells = F.pad(grid_edges(*batch.grid_of(tokens_word(settings))), (0, 0, 1, 0, 1, 0)).to(x.device)
            graph = node_graph(settings, cells, mask[:1])
        else:
            graph = node_graph(settings, batch.adjacency, mask)
        out: Tensor = self.network(x, graph)
        return out

    def sentences(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What was said of each picture, and with `cell_texts` of its cells: (B, S, D), and their mask (B, S)."""
        if not self.settings.cell_texts:
            return batch.d, batch.dm
        return torch.cat([batch.d, batch.cd], dim=1), torch.cat([batch.dm, batch.cdm], dim=1)

    def read_nodes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """r (B, h), and how much each node counts in it (B, n)."""
        x, mask = self.in_nodes(batch)
        if self.settings.texts:
            x = x + self.norm_text(self.node_text(batch).to(x.dtype))
        for project, other in zip(self.in_others, batch.also, strict=False):
            x = x + project(other.nodes)
        x = self.propagate(x, batch, mask)
        attention = self.attention(x, mask)
        readout = pool(x, attention)
        if self.settings.description:
            readout = self.description(readout, *self.sentences(batch))
        return readout, attention

    def forward(self, batch: Batch) -> Output:
        centred = self.dropout(self.standardise_global(batch.g.float()))
        seen, attention = {"global": centred}, None
        if self.settings.has_graph:
            seen["local"], attention = self.read_nodes(batch)
        said = {name: stream(seen[name]) for name, stream in self.streams.items()}
        z = [] if self.offset is None else [self.offset(batch)]
        logits, losses = torch.stack([*z, *(value.float() for value in said.values())]).sum(0), {}
        if self.training:
            weights = self.settings.loss_weights
            for loss, weight, name in (("image", weights.image, "global"), ("graph", weights.graph, "local")):
                if weight and name in said:
                    losses[loss] = F.cross_entropy(torch.stack([*z, said[name].float()]).sum(0), batch.target)
        elif self.mix is not None:
            logits = logits @ self.mix.T
        # Boxes are those of stored nodes: tokens have none to be scored at.
        return Output(logits, losses, None if self.settings.nodes == "tokens" else attention)


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
    """How far logit a - logit b falls where the image's labels lack a text, at every node.

    What is left of a node's text is a mean as before; selected patches stay, and so do sentences of a description,
    which are none of the bank. None where no text of a node is read.
    """
    if not settings.has_graph or not settings.texts:
        return None
    model.eval()
    found = torch.zeros(len(images), len(model.K), device=cache.device)
    for chunk in torch.arange(len(images)).split(EVALUATION_BATCH):
        batch = cache.batch(images[chunk])
        whole, held = margin(model(batch).logits, classes[chunk]), torch.zeros_like(found[chunk], dtype=torch.bool)
        weighs = (batch.concept_weight > 0) & batch.mask[..., None]
        image = torch.arange(len(chunk), device=held.device)[:, None, None].expand_as(weighs)
        held[image[weighs], batch.concept_idx[weighs]] = True
        for rows in held.nonzero().split(EVALUATION_BATCH):
            image, text = rows.T
            lacking = cache.batch(images[chunk[image.cpu()]])
            gone = lacking.concept_idx == text[:, None, None]
            lacking = lacking.changed(concept_weight=lacking.concept_weight.masked_fill(gone, 0.0))
            found[chunk[image.cpu()], text] = whole[image] - margin(model(lacking).logits, classes[chunk][image])
    return found


def build(state: State, settings: Settings, classes: int) -> ConceptGraph:
    return ConceptGraph(Given.from_state(state, settings, classes), settings)
