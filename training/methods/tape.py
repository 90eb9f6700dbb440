"""TAPE: what an item is, why a model says so, and which classes it guesses, a network over links each, averaged.

(He et al., ICLR 2024 [code].)

    x_TA   = the vectors that `features` names          of a document its text, of a picture what it shows
    x_E    = the vectors that `explanation` names       reasons that a model gave: asked/NAME/FIELD
    x_P    = [e(p_1); ...; e(p_k)]                      p the ranked guesses, class + 1, or 0 where there is none
    h_j    = V_j x_j + v_j;   h_j <- h_j + dropout(GELU(conv(LN(h_j))))         `layers` times, over the links into it
    s_j    = W_j LN(h_j) + w_j                          j of those that are given: TA, E, P
    logits = z + mean_j s_j                             z the rival's, or 0 (training/offset.py)
    loss   = CE(logits) + apart * sum_j CE(z + s_j)

e are C + 1 learned vectors, that of 0 is zero. Guesses and reasons are of a model that was asked without the label
(stages/ask.py). With `guesses: zero_shot` they are the k classes whose texts are nearest to the picture, which takes no
model's answer [design]. `conv: null` leaves links out: a layer of weights in the place of each convolution.

What differs: the authors tune a language model on texts and explanations and take its vectors, here vectors stay as the
encoder made them. Their networks have batch normalisation and no residual; ours are those of link_gnn, so that what
guesses and reasons add to it is one difference [design]. They train each by itself and keep its own best epoch; here
all are trained side by side, each by a cross entropy of its own and all by that of their mean, so that val is looked at
as often as for any method [design]. An image or a document that was not answered has zeros, as one that has no guess.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple, Self, cast

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.params import Count, Fraction
from training.class_texts import Texts, class_texts, text_reads
from training.data import Batch, Cache, feature_words, words_behind
from training.data.asked import TOLD, asked_word, classes_guessed, is_asked
from training.data.links import WORD
from training.layers.blocks import Dropout, silent
from training.layers.convolutions import Conv, LinkNetwork, require_heads
from training.layers.features import Features, FeatureSettings, Transform, parts_of, require_feature
from training.layers.hops import Hop
from training.layers.nodes import in_precision
from training.layers.states import State, within
from training.links import LinkSettings, Memory, links_word, senders
from training.loop import EVALUATION_BATCH, NotNegative
from training.methods import Fitted, Output
from training.offset import probe_also_reads, with_reads
from training.token_heads import Beside, BesideSettings, fit_head

SEEDED = True
READS = feature_words() | {"names", "concepts", "owners", WORD}
ALSO = feature_words()
ZERO_SHOT = "zero_shot"


def require_guesses(given: str) -> str:
    """Raises ValueError for what holds no guesses."""
    if given != ZERO_SHOT:
        if not is_asked(given):
            raise ValueError(f"input should be {ZERO_SHOT}, or asked/NAME/FIELD with a key under ask in params.yaml")
        asked_word(given)
    return given


Guesses = Annotated[str, AfterValidator(require_guesses)]
Vectors = Annotated[list[Annotated[str, AfterValidator(require_feature)]], Field(min_length=1)]


class Settings(LinkSettings, BesideSettings):
    features: Vectors | None = Field(default=["global"])  # TA: vectors as probes have them; null: no such network
    explanation: Vectors | None = None  # E: asked/NAME/FIELD, say; null: no such network
    guesses: Guesses | None = ZERO_SHOT  # P: asked/NAME/FIELD; zero_shot: the nearest of `texts`; null: no such network
    transform: Transform = "none"  # of each vector before: none, signed_sqrt (sign(x) sqrt|x|, then unit length)
    texts: Texts = "names"  # what zero_shot goes by: names, concepts, or the middle of both
    places: Count = 5  # ranked guesses that count, k
    conv: Conv | None = "sage"  # gcn, gat or sage (GraphSAGE, of the mean); null: no link is read
    layers: Count = 2  # steps that a message goes
    hidden: Count = 128  # width of each network, and of a guess
    heads: Count = 4  # of gat; they divide the width
    dropout: Fraction = 0.3  # share of activations dropped in training
    apart: NotNegative = 1.0  # weight of the cross entropy of each network alone

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not self.names:
            raise ValueError("features, explanation and guesses are all switched off; leave one of them")
        if self.conv is None and self.sources == "all":
            raise ValueError("sources: who may send over links, and conv: null reads none; leave sources out")
        require_heads(self.conv, self.hidden, self.heads)
        return self

    @property
    def names(self) -> list[str]:
        """The inputs that have a network."""
        given = {"features": self.features, "explanation": self.explanation, "guesses": self.guesses}
        return [name for name, value in given.items() if value is not None]

    @property
    def vectors(self) -> list[str]:
        """All that TA and E are made of."""
        return [*(self.features or []), *(self.explanation or [])]

    def of(self, name: str) -> FeatureSettings:
        """The vectors of an input, `features` or `explanation`."""
        return FeatureSettings(features=getattr(self, name), transform=self.transform)


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    words = parts_of(settings.vectors)
    if settings.guesses == ZERO_SHOT:
        words |= text_reads(settings.texts) | ({"globals"} if "nodes" not in words else set())
    elif settings.guesses is not None:
        words |= {asked_word(settings.guesses)}
    return words if settings.conv is None else words | {links_word(settings)}


def reads(settings: Settings) -> frozenset[str]:
    return with_reads(own_reads(settings), settings.with_probe)


def own_also(settings: Settings) -> frozenset[str]:
    """Of other encoders TA alone is read: reasons and guesses are said once, in the space of the run's own."""
    return frozenset[str]().union(*map(words_behind, settings.features or []))


def also_reads(settings: Settings) -> frozenset[str]:
    return own_also(settings) | probe_also_reads(settings.with_probe)


def nearest_classes(g: Tensor, class_text: Tensor, places: int) -> Tensor:
    """(B, places) int64: the classes whose texts (C, D) are nearest to g (B, D), class + 1, the nearest first.

    In float64, so that no guess depends on the batch that it is made in, or on the precision of training.
    """
    found = (g.double() @ class_text.double().T).topk(min(places, len(class_text)), dim=1).indices + 1
    return fill_places(found, places)


def fill_places(guesses: Tensor, places: int) -> Tensor:
    """(B, places): the first guesses of each image (B, k), and 0 where there are fewer."""
    kept = guesses[:, :places]
    return F.pad(kept, (0, places - kept.shape[1]))


class Inputs(nn.Module):
    """From a batch to what each network is given, by the name of the input."""

    class_text: Tensor | None

    def __init__(self, settings: Settings, features: dict[str, Features], class_text: Tensor | None) -> None:
        """`features` by the inputs that are vectors; class_text (C, D), unit length, where guesses are made by it."""
        super().__init__()
        self.settings, self.features = settings, nn.ModuleDict(features)
        self.register_buffer("class_text", class_text)

    @classmethod
    def measure(cls, cache: Cache, settings: Settings) -> Self:
        """By the training images."""
        alone = {"features": cache, "explanation": replace(cache, also=())}
        vectors = {
            name: Features.measure(alone[name], settings.of(name)) for name in settings.names if name != "guesses"
        }
        by_text = settings.guesses == ZERO_SHOT
        return cls(settings, vectors, class_texts(cache, settings.texts) if by_text else None)

    @classmethod
    def from_state(cls, state: State, settings: Settings) -> Self:
        vectors = {
            name: Features.from_state(within(state, f"features.{name}"), settings.of(name))
            for name in settings.names
            if name != "guesses"
        }
        return cls(settings, vectors, state.get("class_text"))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Vectors (B, F) float32, and of guesses classes (B, places) int64, 0 where there is none."""
        alone = {"features": batch, "explanation": batch.changed(also=())}
        found: dict[str, Tensor] = {name: features(alone[name]) for name, features in self.features.items()}
        if self.settings.guesses is not None:
            found["guesses"] = self.guesses(batch, self.settings.guesses)
        return found

    def guesses(self, batch: Batch, given: str) -> Tensor:
        if self.class_text is not None:
            return nearest_classes(batch.g, self.class_text, self.settings.places)
        _, name, field = given.split("/", 2)
        if batch.has(f"{TOLD}/{name}"):
            what = f"{given}: the prompt of this question is told the class, and so are its guesses"
            raise UserError(f"{what}; take a question that is not (settings.guesses of tape)")
        return fill_places(classes_guessed(batch, name, field), self.settings.places)


class Known(NamedTuple):
    """What a model keeps of the images that send: M of them."""

    memory: Memory
    inputs: dict[str, Tensor]  # what each network is given of them, M rows each

    @classmethod
    def of(cls, cache: Cache, inputs: Inputs, settings: Settings) -> Self:
        found = [inputs(cache.batch(images)) for images in senders(cache, settings).split(EVALUATION_BATCH)]
        return cls(Memory.of(cache, settings), {name: torch.cat([each[name] for each in found]) for name in found[0]})

    @classmethod
    def from_state(cls, state: State, settings: Settings) -> Self:
        inputs = {name: state[f"sent_{name}"] for name in settings.names}
        return cls(Memory.from_state(within(state, "memory"), settings), inputs)


class OwnNetwork(nn.Module):
    """A LinkNetwork without links: x = x + dropout(GELU(Linear(LN(x)))), a few times."""

    def __init__(self, layers: int, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, width) -> the same."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.dropout(F.gelu(layer(norm(x))))
        return x


class Answer(nn.Module):
    """What one input says of each class; nothing at first."""

    def __init__(self, width: int, classes: int, guesses: bool, settings: Settings) -> None:
        """width: of the input; `guesses`: its numbers are classes, and each has a vector."""
        super().__init__()
        hidden = settings.hidden
        self.embed = nn.Embedding(classes + 1, hidden, padding_idx=0) if guesses else None
        self.enter = nn.Linear(width * hidden if guesses else width, hidden)
        self.network = (
            OwnNetwork(settings.layers, hidden, settings.dropout)
            if settings.conv is None
            else LinkNetwork(settings.conv, settings.layers, hidden, settings.heads, settings.dropout)
        )
        self.norm, self.dropout = nn.LayerNorm(hidden), Dropout(settings.dropout)
        self.classify = silent(hidden, classes)

    def forward(self, x: Tensor, hops: Sequence[Hop] | None) -> Tensor:
        """(B, C) float32 of the batch, of the input x of all nodes that the first hop has."""
        x = x if self.embed is None else self.embed(x).flatten(1)
        h = self.enter(in_precision(x))
        h = self.network(h) if hops is None else self.network(h, hops)
        said: Tensor = self.classify(self.dropout(self.norm(h)))
        return said.float()


class Tape(nn.Module):
    def __init__(
        self, inputs: Inputs, known: Known | None, widths: dict[str, int], beside: Beside, classes: int,
        settings: Settings,
    ) -> None:  # fmt: skip
        """`known`: what is kept of the images that send, where links are read; widths of what networks are given."""
        super().__init__()
        self.inputs, self.beside, self.layers = inputs, beside, settings.layers
        self.memory = None if known is None else known.memory
        for name, value in ({} if known is None else known.inputs).items():
            self.register_buffer(f"sent_{name}", value)
        self.answers = nn.ModuleDict(
            {name: Answer(width, classes, name == "guesses", settings) for name, width in widths.items()}
        )

    def forward(self, batch: Batch) -> Output:
        apart = self.beside(batch, self.by_input(batch))  # (inputs, B, C)
        if not self.training:
            return Output(apart.mean(0), {}, None)
        each = torch.stack([F.cross_entropy(logits, batch.target) for logits in apart])
        return Output(apart.mean(0), {"apart": each.sum()}, None)

    def by_input(self, batch: Batch) -> Tensor:
        """(inputs, B, C): what each network says."""
        given: dict[str, Tensor] = self.inputs(batch)
        hops = None
        if self.memory is not None:
            around = self.memory.around(batch, self.layers, own=self.training and self.memory.one_view)
            given = {name: torch.cat([x, self.get_buffer(f"sent_{name}")[around.rows]]) for name, x in given.items()}
            hops = around.hops()
        return torch.stack([answer(given[name], hops) for name, answer in self.answers.items()])


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    inputs, classes = Inputs.measure(cache, settings).to(cache.device), len(cache.classes)
    known = None if settings.conv is None else Known.of(cache, inputs, settings)
    widths = {name: x.shape[1] for name, x in inputs(cache.batch(cache.images("train")[:1])).items()}
    return fit_head(
        cache,
        settings,
        seed,
        own_reads(settings),
        lambda beside: Tape(inputs, known, widths, beside, classes, settings),
        {"apart": settings.apart},
        own_also=own_also(settings),
    )


def build(state: State, settings: Settings, classes: int) -> Tape:
    inputs = Inputs.from_state(within(state, "inputs"), settings)
    known = None if settings.conv is None else Known.from_state(state, settings)
    widths = {name: cast(Features, features).size for name, features in inputs.features.items()}
    widths |= {"guesses": settings.places} if settings.guesses is not None else {}
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return Tape(inputs, known, widths, beside, classes, settings)
