"""LA-TAG: a graph network over links that also learns from synthetic nodes of classes with few (M23 [web]).

    x_s     a synthetic node of the class of image i (training/synthesis.py), between i and a near one of its class
    s_sj    = sigmoid(MLP([x_s; x_j]))          a link predictor, learnt from the links of training images
    x_s     hears the `neighbours` training images j of the highest s_sj > 1/2, weighed by these
    loss    = mean_i CE(logits_i, y_i) + weight m/n mean_s CE(logits_s, y_s)

logits are those of link_gnn: layers of GCN, GAT or GraphSAGE over links (training/layers/convolutions.py). A synthetic
node hears and is not heard [design]: it is one more example, laid out as an image that is judged would be, and what a
judged image hears is real. So nothing of them is left in the fitted model. The n training images are those of the fit;
m/n drawn synthetic nodes go with each image of a step. The method is inductive: links and neighbours of training images
alone, never of val or test. The paper (arXiv 2410.16882) was not at hand: from a summary, and not claimed to be it.
"""

import math
from dataclasses import replace
from typing import Literal, NamedTuple, Self, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache, feature_words
from training.data.cache import Fields
from training.data.links import WORD
from training.layers.blocks import Dropout, silent
from training.layers.convolutions import Conv, LinkNetwork, require_heads
from training.layers.features import Features, feature_also_reads
from training.layers.gather import spans
from training.layers.hops import starts
from training.layers.link_predictor import fit_links
from training.layers.states import State, within
from training.link_heads import OverLinks
from training.links import LinkSettings, Memory, links_word, owners, senders, weight_word
from training.loop import Schedule, fit_epochs
from training.methods import Fitted, NotPossible, Output
from training.synthesis import SynthesisSettings, synthesis_reads, synthesise

SEEDED = True
READS = feature_words() | {WORD}
ALSO = feature_words()
also_reads = feature_also_reads


class Settings(LinkSettings, SynthesisSettings, Schedule):
    sources: Literal["train"] = "train"  # inductive: synthetic nodes hear training images alone
    conv: Conv = "sage"  # gcn, gat or sage (GraphSAGE, of the mean)
    layers: Count = 2  # steps that a message goes
    hidden: Count = 256  # width
    heads: Count = 4  # of gat; they divide the width
    dropout: Fraction = 0.3  # share of activations dropped in training
    predictor: Count = 64  # width of the link predictor

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        require_heads(self.conv, self.hidden, self.heads)
        return self


def reads(settings: Settings) -> frozenset[str]:
    return synthesis_reads(settings) | {links_word(settings)}


class Nodes(NamedTuple):
    """Synthetic nodes, and the edges into them, those into one node beside each other."""

    x: Tensor  # (m, F)
    told: Tensor  # (m, C)
    start: Tensor  # (m + 1,) int64: edges start[s] .. start[s + 1] enter node s
    source: Tensor  # (E,) int64: keys of training images
    score: Tensor  # (E,) float32
    share: float  # m/n

    def draw(self, images: int) -> Tensor:
        """Which of them go with a step of so many images: m/n of these, with putting back."""
        device = self.x.device
        return torch.randint(len(self.x), (math.ceil(images * self.share),)).to(device)


class LaTag(nn.Module):
    def __init__(
        self, features: Features, memory: Memory, vectors: Tensor, classes: int, settings: Settings, made: Nodes | None
    ) -> None:
        """vectors (M, F): of the memory's images, as `features` gives them; `made` is looked at in training alone."""
        super().__init__()
        self.features, self.settings, self.made = features, settings, made
        network = LinkNetwork(settings.conv, settings.layers, settings.hidden, settings.heads, settings.dropout)
        self.over_links = OverLinks(memory, vectors, network, settings.hidden, None)
        self.norm = nn.LayerNorm(settings.hidden)
        self.dropout, self.classify = Dropout(settings.dropout), silent(settings.hidden, classes)

    def forward(self, batch: Batch) -> Output:
        logits = self.logits(batch, self.features(batch))
        losses = {}
        if self.training and self.made is not None:
            drawn = self.made.draw(len(batch.y))
            said = self.logits(self.laid_out(drawn), self.made.x[drawn])
            losses["synthetic"] = self.made.share * F.cross_entropy(said, self.made.told[drawn])
        return Output(logits, losses, None)

    def logits(self, fields: Fields, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.dropout(self.norm(self.over_links(fields, x))))
        return logits.float()

    def laid_out(self, drawn: Tensor) -> Fields:
        """These synthetic nodes (b,) as images of a batch that are linked."""
        assert self.made is not None
        edge, row = spans(self.made.start, drawn)
        return Fields(
            {
                "key": -1 - torch.arange(len(drawn), device=drawn.device),  # no image's
                links_word(self.settings): torch.stack([self.made.source[edge], row]),
                weight_word(self.settings): self.made.score[edge],
            }
        )


def make_nodes(
    cache: Cache, settings: Settings, features: Features, memory: Memory, vectors: Tensor, seed: int
) -> tuple[Nodes | None, float]:
    """The synthetic nodes, None where no class lacks any; and the AUC of what joins them, on links held out.

    Raises NotPossible where no training image is linked to another.
    """
    x = features.of_training(cache)
    made = synthesise(cache, features, x, settings, seed)
    if not len(made.x):
        return None, math.nan
    if not len(memory.source):
        raise NotPossible(f"{links_word(settings)}: links no two training images, so nothing says what would be linked")
    predictor, auc = fit_links(vectors, memory.source, owners(memory.start), settings.predictor, seed)
    sender, node, score = predictor.nearest(made.x, vectors, settings.neighbours)
    start = starts(node, len(made.x))
    return Nodes(made.x, made.told, start, memory.key[sender], score, len(made.x) / len(x)), auc


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features, memory = Features.measure(cache, settings), Memory.of(cache, settings)
    vectors = features.of(cache, senders(cache, settings))
    made, auc = make_nodes(cache, settings, features, memory, vectors, seed)
    fitted = fit_epochs(
        lambda: LaTag(features, memory, vectors, len(cache.classes), settings, made),
        cache,
        settings,
        seed,
        {"synthetic": settings.weight},
    )
    cast(LaTag, fitted.model).made = None
    said: dict[str, float | str] = {} if math.isnan(auc) else {"link_auc": auc}
    return replace(fitted, chosen={**fitted.chosen, **said})


def build(state: State, settings: Settings, classes: int) -> LaTag:
    features = Features.from_state(within(state, "features"), settings)
    over = within(state, "over_links")
    memory = Memory.from_state(within(over, "memory"), settings)
    return LaTag(features, memory, over["vectors"], classes, settings, None)
