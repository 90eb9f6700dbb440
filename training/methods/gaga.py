"""GAGA: a graph network whose images are aligned with texts of a few of them, the most informative (M25 [web]).

    S       the training images whose texts are looked at: `share` of those that have one, by density within clusters,
            each cluster its part (fieldmark/informative.py)
    e_v     the text of image v in S, the mean with its `annotation_neighbours` nearest in S by cosine: one step over
            the graph of annotations
    h_v     the network over links (training/link_heads.py): what `layers` steps around v come to
    nodes       = InfoNCE(A h_v, e_v) over the images of a batch that are in S; those of the same text are no negatives
    prototypes  = InfoNCE(mean of A h_v of a batch's images of cluster k, mean of e_v in cluster k) over clusters k
    loss    = CE(W LN(h) + w) + nodes + lambda prototypes

InfoNCE is symmetric, of cosines over `temperature`, in float32. The paper (Xie et al., arXiv 2506.07168) was known by a
review alone: selection by density is its own; both alignments are reconstructed, and its two steps, alignment and then
classification, are one here, so that val chooses among all of it. Not claimed to be it.

`annotations: descriptions` are sentences of a model about single images (describe_images; `describe.share` chooses by
the same rule whom it is asked about); `names`, where nobody was asked, the name of the class that training is told.
Judging an image takes its vectors and links, and no text of it.
"""

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.informative import budget, cluster_count, most_informative
from fieldmark.labels.kmeans import find_centres, nearest_centres
from fieldmark.params import Block, Count, Fraction
from training.class_texts import class_texts, text_reads
from training.data import Batch, Cache, feature_words
from training.data.descriptions import mean_sentence
from training.data.links import WORD, Links
from training.layers.blocks import Dropout, silent
from training.layers.convolutions import Conv, LinkNetwork, require_heads
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.logistic import as_probabilities
from training.layers.losses import contrast_views
from training.layers.states import State, within
from training.link_heads import OverLinks
from training.links import LinkSettings, Memory, links_word, senders
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, Output

SEEDED = True
READS = feature_words() | {WORD, "names", "owners", "descriptions"}
ALSO = feature_words()
also_reads = feature_also_reads
CHUNK = 2048  # images whose sentences are read at a time


class LossWeights(Block):
    """Of each loss beside the cross entropy."""

    nodes: NotNegative = 1.0  # of images with their texts
    prototypes: NotNegative = 0.5  # of clusters of images with those of their texts: lambda


class Settings(LinkSettings, FeatureSettings, Schedule):
    annotations: Literal["descriptions", "names"] = "names"  # texts of images: descriptions, or names of their classes
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training images with a text: the most informative ones
    clusters: Count | None = None  # of training images; null: about the root of their number
    annotation_neighbours: Annotated[int, Field(ge=0)] = 5  # nearest texts that a text is averaged with; 0: none
    temperature: Positive = 0.2  # of cosines with texts
    conv: Conv = "sage"  # gcn, gat or sage (GraphSAGE, of the mean)
    layers: Count = 1  # steps that a message goes
    hidden: Count = 256  # width
    heads: Count = 4  # of gat; they divide the width
    dropout: Fraction = 0.3  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy, weight 1; 0 switches one off

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        require_heads(self.conv, self.hidden, self.heads)
        return self


def reads(settings: Settings) -> frozenset[str]:
    texts = text_reads("names") if settings.annotations == "names" else frozenset({"descriptions"})
    return feature_reads(settings) | {links_word(settings)} | texts


class Annotations(NamedTuple):
    """The training images, and the texts of those that are annotated. Rows are in the order of keys."""

    key: Tensor  # (n,) int64, ascending
    text: Tensor  # (n, D): e_v, 0 where an image is not annotated
    source: Tensor  # (n,) int64: which text it is; images of one text are no negatives of each other
    cluster: Tensor  # (n,) int64
    prototypes: Tensor  # (K, D): the mean of e_v of each cluster, 0 where none of it is annotated

    def rows(self, batch: Batch) -> Tensor:
        """(B,): of a batch of training images."""
        return torch.searchsorted(self.key, batch.key)


class GAGA(nn.Module):
    def __init__(
        self,
        features: Features,
        memory: Memory,
        vectors: Tensor,
        size: tuple[int, int],
        settings: Settings,
        annotations: Annotations | None,
    ) -> None:
        """vectors (M, F): of the memory's images; size: of a text, and how many classes there are.

        `annotations` are looked at in training alone.
        """
        super().__init__()
        self.features, self.annotations, self.temperature = features, annotations, settings.temperature
        network = LinkNetwork(settings.conv, settings.layers, settings.hidden, settings.heads, settings.dropout)
        self.over_links = OverLinks(memory, vectors, network, settings.hidden, None)
        self.norm, self.dropout = nn.LayerNorm(settings.hidden), Dropout(settings.dropout)
        text, classes = size
        self.align, self.classify = nn.Linear(settings.hidden, text), silent(settings.hidden, classes)

    def forward(self, batch: Batch) -> Output:
        h = self.norm(self.over_links(batch, self.features(batch)))
        losses = {}
        if self.training and self.annotations is not None:
            losses = alignment(self.align(h), self.annotations.rows(batch), self.annotations, self.temperature)
        return Output(self.classify(self.dropout(h)).float(), losses, None)


def alignment(aligned: Tensor, rows: Tensor, annotations: Annotations, temperature: float) -> dict[str, Tensor]:
    """The two losses, of A h (B, D) of the images with these rows (B,)."""
    aligned, text, source = aligned.float(), annotations.text[rows], annotations.source[rows]
    there = text.any(1)
    same = source[there, None] == source[there]
    cluster, count = annotations.cluster[rows], len(annotations.prototypes)
    members = torch.bincount(cluster, minlength=count)
    sums = aligned.new_zeros(count, aligned.shape[1]).index_add(0, cluster, aligned)
    known = (members > 0) & annotations.prototypes.any(1)
    means = sums[known] / members[known, None]
    return {
        "nodes": mean_contrast(aligned[there], text[there], temperature, same),
        "prototypes": mean_contrast(means, annotations.prototypes[known], temperature),
    }


def mean_contrast(a: Tensor, b: Tensor, temperature: float, alike: Tensor | None = None) -> Tensor:
    """contrast_views, and 0 where there is nothing to tell apart; a, b (n, D)."""
    return contrast_views(a, b, temperature, alike) if len(a) > 1 else 0 * a.sum()


def annotate(cache: Cache, settings: Settings, x: Tensor) -> Annotations:
    """Of the training images, by their vectors x (n, F) in view 0, in the order of `cache.images`.

    Raises UserError where none of them has a text.
    """
    train = cache.images("train")
    text, source = texts_of(cache, settings, train)
    having = text.any(1).nonzero().flatten()
    if not len(having):
        raise UserError(
            "no training image has a description, which annotations: descriptions aligns with; set describe.enabled:"
            " true and run describe_images (dvc repro), or take annotations: names"
        )
    names = [cache.image_ids[image] for image in train[having.cpu()].tolist()]
    clusters = settings.clusters or cluster_count(len(train))
    vectors = x.cpu()
    chosen = having[
        most_informative(vectors[having.cpu()], names, budget(len(having), settings.share), clusters).to(having.device)
    ]
    kept = torch.zeros_like(text)
    kept[chosen] = smooth(text[chosen], settings.annotation_neighbours)
    ordered = torch.tensor(sorted(range(len(train)), key=lambda row: cache.image_ids[train[row]]))
    cluster = nearest_centres(vectors, find_centres(vectors[ordered], clusters)).to(text.device)
    count = int(cluster.max()) + 1
    prototypes = F.normalize(text.new_zeros(count, text.shape[1]).index_add(0, cluster, kept), dim=-1)
    part = cache.part(Links).key
    key = part[train.to(part.device)].to(text.device)
    order = key.argsort()
    return Annotations(key[order], kept[order], source[order], cluster[order], prototypes)


def texts_of(cache: Cache, settings: Settings, train: Tensor) -> tuple[Tensor, Tensor]:
    """The text (n, D) of each training image, of unit length or 0, and a number (n,) for each text."""
    if settings.annotations == "names":
        told = as_probabilities(cache.target[train], len(cache.classes))
        return F.normalize(told @ class_texts(cache, "names"), dim=-1), told.argmax(1)
    read = [cache.batch(some) for some in train.split(CHUNK)]
    text = torch.cat([mean_sentence(batch.d, batch.dm) for batch in read])
    return text, torch.unique(text, dim=0, return_inverse=True)[1]


def smooth(text: Tensor, neighbours: int) -> Tensor:
    """Unit vectors (s, D), each the mean with its `neighbours` nearest by cosine."""
    count, found = min(neighbours, len(text) - 1), []
    for rows in torch.arange(len(text), device=text.device).split(CHUNK):
        cosine = text[rows] @ text.T
        cosine[torch.arange(len(rows), device=text.device), rows] = -torch.inf
        found.append(text[rows] + text[cosine.topk(count, 1).indices].sum(1))
    return F.normalize(torch.cat(found), dim=-1)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features, memory = Features.measure(cache, settings), Memory.of(cache, settings)
    vectors = features.of(cache, senders(cache, settings))
    annotations = annotate(cache, settings, features.of(cache, cache.images("train")))
    size = annotations.text.shape[1], len(cache.classes)
    return fit_epochs(
        lambda: GAGA(features, memory, vectors, size, settings, annotations),
        cache,
        settings,
        seed,
        settings.loss_weights.model_dump(),
    )


def build(state: State, settings: Settings, classes: int) -> GAGA:
    features = Features.from_state(within(state, "features"), settings)
    over = within(state, "over_links")
    memory = Memory.from_state(within(over, "memory"), settings)
    size = len(state["align.bias"]), classes
    return GAGA(features, memory, over["vectors"], size, settings, None)
