"""LATEX-GCL: a network over links learned by contrast between what was said and the same in other words.

(Yang et al., 2024 [web]: of the paper an abstract was read. All of this is a reconstruction [design].)

    f(X)   = LN(network(V X + v, links))              the network of link_gnn
    v1 = P(f(X)),  v2 = P(f(X'))                      X' in other words: shortened, rewritten or expanded
    loss   = 1/2 [NCE(v1 -> v2) + NCE(v2 -> v1)]      over the images of a step (contrast_views in layers/losses.py)
    logits = W f(X) + w                               afterwards: logistic regression; f stays as it is

P is a small network that is thrown away behind it. With `same_class` images of one class are no negatives of each
other: texts of one class say nearly the same, and what is pushed apart would be the class. That looks at labels of
training images; f is told nothing else of them.

`augment: words` takes `descriptions` among the features, and X' has in their place what `words` names: answers to
questions about the descriptions (asked/NAME/FIELD), one of them drawn for each step. Who was not answered sends its own
words, and is in no pair. `augment: features` is the rival that asks no model, after GRACE (Zhu et al., 2020 [mem]): on
either side some dimensions, the same ones for all images of a step, are set to their mean, and some links are left out;
negatives are those of the other side alone. `augment: none` contrasts X with itself: images are spread out, and no
more.

f is learned from the images that may send, `sources`: training images, or, transductively, all; of those that are
judged no label is looked at either.
"""

import math
from collections.abc import Iterator
from time import perf_counter
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fieldmark.params import Count, Fraction
from training.data import Batch, Cache, feature_words
from training.data.asked import asked_word, texts_said
from training.data.links import WORD
from training.layers.blocks import Span, Standardise, linear_from_state, linear_layer
from training.layers.convolutions import Conv, LinkNetwork, require_heads
from training.layers.features import CHUNK, Features, FeatureSettings, parts_of, view_of
from training.layers.logistic import Chosen, ProbeSettings, as_probabilities, fit_probe, require_val
from training.layers.losses import contrast_views
from training.layers.nodes import in_precision
from training.layers.states import State, within
from training.link_heads import OverLinks
from training.links import Around, LinkSettings, Memory, links_word, senders
from training.loop import Positive, decayed_groups
from training.methods import Fitted, NotPossible, Output, search_points

SEEDED = True
READS = feature_words() | {WORD}
DECAY = 0.01  # of weights, while f is learned
SAID = "descriptions"


def require_words(name: str) -> str:
    """Raises ValueError for what is no field of an answer."""
    asked_word(name)
    return name


class Settings(LinkSettings, FeatureSettings, ProbeSettings):
    augment: Literal["words", "features", "none"] = "features"  # how X' differs; none: not at all
    words: list[Annotated[str, AfterValidator(require_words)]] = Field(
        default=["asked/shorten/text", "asked/rewrite/text", "asked/expand/text"], min_length=1
    )  # what stands in the place of descriptions, with augment: words
    conv: Conv = "sage"  # gcn, gat or sage (GraphSAGE, of the mean)
    layers: Count = 2  # steps that a message goes
    hidden: Count = 256  # width of f
    heads: Count = 4  # of gat; they divide the width
    epochs: Annotated[int, Field(ge=0)] = 30  # over the images that may send; 0 leaves f as it starts
    batch_size: Count = 512  # images a step, which are negatives of each other
    lr: list[Positive] = Field(default=[1e-3], min_length=1)  # learning rates that val chooses from
    temperature: Positive = 0.5  # of cosines
    same_class: bool = True  # whether images of one class are no negatives of each other
    mask: Fraction = 0.3  # share of dimensions that a side lacks, with augment: features
    drop: Fraction = 0.3  # share of links that a side lacks, with augment: features
    beside: bool = False  # whether logistic regression reads the features too

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.augment == "words" and SAID not in self.features:
            raise ValueError(f"augment: words puts other words in the place of {SAID}; add these to features")
        require_heads(self.conv, self.hidden, self.heads)
        return self

    def in_words(self, name: str) -> FeatureSettings:
        """The features with others in the place of descriptions."""
        return FeatureSettings(features=[name if each == SAID else each for each in self.features],
                               transform=self.transform)  # fmt: skip


def reads(settings: Settings) -> frozenset[str]:
    words = map(asked_word, settings.words if settings.augment == "words" else [])
    return frozenset({*parts_of(settings.features), *words, links_word(settings)})


class Encoder(nn.Module):
    """f."""

    def __init__(self, memory: Memory, vectors: Tensor, settings: Settings) -> None:
        """vectors (M, F): X of the memory's images."""
        super().__init__()
        network = LinkNetwork(settings.conv, settings.layers, settings.hidden, settings.heads, 0.0)
        self.over_links = OverLinks(memory, vectors, network, settings.hidden, None)
        self.norm = nn.LayerNorm(settings.hidden)

    def forward(self, batch: Batch, x: Tensor) -> Tensor:
        """(B, hidden) of a batch, of its X (B, F)."""
        out: Tensor = self.norm(self.over_links(batch, x))
        return out

    def around(self, batch: Batch) -> Around:
        return self.over_links.memory.around(batch, len(self.over_links.network.layers))

    def along(self, x: Tensor, around: Around) -> Tensor:
        """(B, hidden), of X of all nodes around a batch."""
        h = self.over_links.enter(in_precision(x))
        out: Tensor = self.norm(self.over_links.network(h, around.hops()))
        return out


class LatexGCL(nn.Module):
    def __init__(
        self, features: Features, encoder: Encoder, scale: Standardise, linear: nn.Linear, beside: bool
    ) -> None:
        """scale: of what the encoder makes of training images; `beside`: whether `linear` reads the features too."""
        super().__init__()
        self.features, self.encoder, self.scale, self.linear = features, encoder, scale, linear
        self.beside = beside

    def forward(self, batch: Batch) -> Output:
        x = self.features(batch)
        return Output(self.linear(last_input(self.scale(self.encoder(batch, x)), x, self.beside)), {}, None)


def last_input(f: Tensor, x: Tensor, beside: bool) -> Tensor:
    """What the last layer reads: f (B, hidden), and X (B, F) beside it, if set, with as much variance."""
    if not beside:
        return f
    size = (f.shape[1] + x.shape[1]) / 2
    return torch.cat([f * math.sqrt(size / f.shape[1]), x * math.sqrt(size / x.shape[1])], dim=1)


def thin(around: Around, share: float, grow: bool = True) -> Around:
    """Without this share of the links, drawn anew; if set, the others `grow`, so that sums are right in the mean."""
    kept = torch.rand(len(around.weight), device=around.weight.device) >= share
    before = F.pad(kept.cumsum(0), (1, 0)).tolist()
    return around._replace(
        edges_in=around.edges_in[:, kept],
        weight=around.weight[kept] / (max(1 - share, 1e-12) if grow else 1),
        edges=[before[count] for count in around.edges],
    )


def told_of(target: Tensor, trains: Tensor, classes: int) -> Tensor:
    """(B, C): what training is told of the images (B,) that train; 0 for others, whose target is none where hidden."""
    told = torch.zeros(len(target), classes, device=target.device)
    told[trains] = as_probabilities(target[trains], classes)
    return told


def may_be_alike(told: Tensor) -> Tensor:
    """(n, n) bool: which images may be of one class, by what is told of each, (n, C); rows of zeros tell nothing."""
    return told @ told.T > 0


class Words(NamedTuple):
    """What else may stand for an image."""

    features: Features
    name: str  # asked/NAME/FIELD
    vectors: Tensor  # (M, F) of the images that send; their own X where nothing was answered

    @classmethod
    def of(cls, cache: Cache, features: Features, name: str, vectors: Tensor, settings: Settings) -> Self:
        """Raises NotPossible where no image that may send was answered."""
        other = Features.from_state(features.state_dict(), settings.in_words(name))
        made, found = cls(other, name, vectors), []
        for chunk in senders(cache, settings).split(features.chunk):
            found.append(made.say(cache.batch(chunk)))
        x, has = (torch.cat(each) for each in zip(*found, strict=True))
        if not has.any():
            what = f"{name}: says nothing of an image that may send; ask about these (ask.{name.split('/')[1]}.splits)"
            raise NotPossible(f"{what}, or take augment: features")
        return made._replace(vectors=torch.where(has[:, None], x, vectors))

    def say(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """X' (B, F), and which images (B,) have one."""
        _, name, field = self.name.split("/", 2)
        return self.features(batch), texts_said(batch, name, field)[1].any(1)


class Sides:
    """The two sides of a step: f of X and of X'."""

    def __init__(self, cache: Cache, features: Features, vectors: Tensor, settings: Settings) -> None:
        """vectors (M, F): X of the images that send."""
        self.features, self.vectors, self.settings = features, vectors, settings
        names = settings.words if settings.augment == "words" else []
        self.words = [Words.of(cache, features, name, vectors, settings) for name in names]

    def of(self, batch: Batch, encoder: Encoder, drawn: int) -> tuple[Tensor, Tensor, Tensor]:
        """f of X and of X' (B', hidden), and the places (B',) in the batch that have both; `drawn`: which words."""
        x, around = self.features(batch), encoder.around(batch)
        whole = torch.cat([x, self.vectors[around.rows]])
        every = torch.arange(len(x), device=x.device)
        if self.settings.augment == "none":
            f = encoder.along(whole, around)
            return f, f, every
        if self.settings.augment == "features":
            masks = torch.rand(2, whole.shape[1], device=x.device) >= self.settings.mask
            grow = not encoder.over_links.network.attends
            one, two = (encoder.along(whole * mask, thin(around, self.settings.drop, grow)) for mask in masks)
            return one, two, every
        words = self.words[drawn]
        said, has = words.say(batch)
        other = torch.cat([torch.where(has[:, None], said, x), words.vectors[around.rows]])
        places = every[has]
        return encoder.along(whole, around)[places], encoder.along(other, around)[places], places


def learn(cache: Cache, sides: Sides, lr: float, seed: int) -> tuple[Encoder, float]:
    """f by contrast, and the seconds of an epoch."""
    settings, device = sides.settings, cache.device
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    width = settings.hidden
    encoder = Encoder(Memory.of(cache, settings), sides.vectors, settings)
    project = nn.Sequential(nn.Linear(width, width), nn.ELU(), nn.Linear(width, width))
    both = nn.ModuleList([encoder, project]).to(device)
    optimiser = torch.optim.AdamW(decayed_groups(both, DECAY), lr=lr, fused=True)
    trains = torch.from_numpy(cache.split == "train")
    started = perf_counter()
    for _ in tqdm(range(settings.epochs), desc=f"contrast, lr {lr:g}", leave=False, disable=None):
        for images, views, drawn in steps(cache, settings, generator):
            batch = cache.batch(images, views)
            one, two, places = sides.of(batch, encoder, drawn)
            told = told_of(batch.target, trains[images].to(device), len(cache.classes))
            alike = may_be_alike(told[places]) if settings.same_class else None
            loss = contrast_views(project(one), project(two), settings.temperature, alike)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return encoder.eval(), (perf_counter() - started) / max(settings.epochs, 1)


def steps(cache: Cache, settings: Settings, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    """An epoch over the images that may send: positions and views (B,) of each step, and which words it draws."""
    images = senders(cache, settings)
    order = images[torch.randperm(len(images), generator=generator)]
    views = torch.randint(cache.views, (len(images),), generator=generator)
    for some, view in zip(order.split(settings.batch_size), views.split(settings.batch_size), strict=True):
        yield some, view, int(torch.randint(len(settings.words), (), generator=generator))


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    require_val(len(cache.images("val")), search_points(settings), "lr, l2")
    features = Features.measure(cache, settings)
    sides = Sides(cache, features, features.of(cache, senders(cache, settings)), settings)
    best: tuple[tuple[float, float], Fitted] | None = None
    history: list[dict[str, float]] = []
    for lr in settings.lr:
        encoder, seconds = learn(cache, sides, lr, seed)
        model, chosen = classify(cache, features, encoder, settings)
        history += [{**row, "epoch": len(history) + step, "lr": lr} for step, row in enumerate(chosen.history, start=1)]
        score = max((row["val_accuracy"], -row["val_loss"]) for row in chosen.history)
        if best is None or score > best[0]:
            best = score, Fitted(model, history, {"lr": lr, "l2": chosen.l2}, seconds)
    assert best is not None
    return best[1]


def classify(cache: Cache, features: Features, encoder: Encoder, settings: Settings) -> tuple[LatexGCL, Chosen]:
    """Logistic regression on what f makes of an image."""

    @torch.no_grad()
    def encoded(images: Tensor, view: int) -> tuple[Tensor, Tensor]:
        found = []
        for chunk in images.split(CHUNK):
            batch = view_of(cache, chunk, view)
            x = features(batch)
            found.append((encoder(batch, x), x))
        f, x = (torch.cat(each) for each in zip(*found, strict=True))
        return f, x

    scale = Standardise(torch.cat([encoded(cache.images("train"), view)[0] for view in range(cache.views)]))

    def vectors(images: Tensor, view: int) -> Tensor:
        f, x = encoded(images, view)
        return last_input(scale(f), x, settings.beside)

    span = Span(torch.cat([vectors(cache.images("train"), view) for view in range(cache.views)]))
    chosen = fit_probe(cache, settings, lambda images, view: span.into(vectors(images, view)))
    linear = linear_layer(span.back(chosen.linear.weight.detach()), chosen.linear.bias.detach())
    return LatexGCL(features, encoder, scale, linear, settings.beside), chosen


def build(state: State, settings: Settings, classes: int) -> LatexGCL:
    features, over = Features.from_state(within(state, "features"), settings), within(state, "encoder.over_links")
    encoder = Encoder(Memory.from_state(within(over, "memory"), settings), over["vectors"], settings)
    scale, linear = Standardise.from_state(within(state, "scale")), linear_from_state(within(state, "linear"))
    return LatexGCL(features, encoder, scale, linear, settings.beside)
