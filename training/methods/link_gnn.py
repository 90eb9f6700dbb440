"""A graph network over links between images: GCN, GAT or GraphSAGE; an image is told with those that it hears.

    h_i    = V x_i + v                                  x_i the vectors that `features` names, standardised side by side
    h_i   <- h_i + dropout(GELU(conv(LN(h))_i))         `layers` times, over the links into i
    logits = W LN(h_i) + w

Equations of the convolutions and their papers stand in training/layers/convolutions.py; the residual form is that of
this project's other graph networks [design]. W begins at zero. Alone the network answers; with `with_probe` its logits
are added to the probe's (training/token_heads.py), so that at epoch 0 it is the probe.

Who may send is `sources` (training/links.py). Under `train`, the default, messages come from training images of this
fit alone, in view 0: no other image that is judged sends anything. Labels are no input: they enter by
the loss alone, and where the probe stands beside, a training image has the probe's answer out of fold.

A batch is laid out with everything that reaches it in `layers` steps. One larger than the training images is full-batch
training; `fanout` bounds what a step takes where the graph is too large for that.
"""


from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache, feature_words
from training.data.links import WORD
from training.layers.blocks import Dropout, silent
from training.layers.convolutions import Conv, LinkNetwork, Norm, require_heads
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.states import State, within
from training.link_heads import OverLinks
from training.links import LinkSettings, Memory, links_word, senders
from training.loop import Positive
from training.methods import Fitted, Output
from training.offset import probe_also_reads, with_reads
from training.token_heads import Beside, BesideSettings, fit_head

SEEDED = True
READS = feature_words() | {WORD}
ALSO = feature_words()


class Settings(LinkSettings, FeatureSettings, BesideSettings):
    conv: Conv = "sage"  # gcn, gat or sage (GraphSAGE, of the mean)
    layers: Count = 2  # steps that a message goes
    hidden: Count = 256  # width
    heads: Count = 4  # of gat; they divide the width
    dropout: Fraction = 0.3  # share of activations dropped in training
    norm: Norm = "layer"  # of what a layer is given: layer, none
    fanout: Count | None = None  # links into a node that a step of training draws; null: all of them
    batch_size: Count = 256  # images a step
    lr: list[Positive] = Field(default=[3e-3], min_length=1)  # learning rates that val chooses from

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        require_heads(self.conv, self.hidden, self.heads)
        return self


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    return feature_reads(settings) | {links_word(settings)}


def reads(settings: Settings) -> frozenset[str]:
    return with_reads(own_reads(settings), settings.with_probe)


def also_reads(settings: Settings) -> frozenset[str]:
    return feature_also_reads(settings) | probe_also_reads(settings.with_probe)


class LinkGNN(nn.Module):
    def __init__(
        self, features: Features, memory: Memory, vectors: Tensor, beside: Beside, classes: int, settings: Settings
    ) -> None:
        """vectors (M, F): of the memory's images, as `features` gives them."""
        super().__init__()
        self.features, self.beside = features, beside
        network = LinkNetwork(
            settings.conv, settings.layers, settings.hidden, settings.heads, settings.dropout, settings.norm
        )
        self.over_links = OverLinks(memory, vectors, network, settings.hidden, settings.fanout)
        self.norm = nn.LayerNorm(settings.hidden) if settings.norm == "layer" else nn.Identity()
        self.dropout, self.classify = Dropout(settings.dropout), silent(settings.hidden, classes)

    def forward(self, batch: Batch) -> Output:
        h = self.over_links(batch, self.features(batch))
        return Output(self.beside(batch, self.classify(self.dropout(self.norm(h)))), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features, memory = Features.measure(cache, settings), Memory.of(cache, settings)
    vectors = features.of(cache, senders(cache, settings))
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: LinkGNN(features, memory, vectors, beside, len(cache.classes), settings),
        own_also=feature_also_reads(settings),
    )


def build(state: State, settings: Settings, classes: int) -> LinkGNN:
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    features = Features.from_state(within(state, "features"), settings)
    over = within(state, "over_links")
    return LinkGNN(
        features, Memory.from_state(within(over, "memory"), settings), over["vectors"], beside, classes, settings
    )
