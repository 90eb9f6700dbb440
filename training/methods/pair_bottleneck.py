"""A bottleneck of pairs of concepts at the same place: "red with crown" (second-order, readable) [design].

    z_tk   = (x_t - mu) . d_k / s_k                   x_t the tokens that the projection takes (T, d), k a direction
    x_jk   = sign(A_jk) sqrt|A_jk|, A_jk = mean over t of z_tj z_tk       j <= k: bilinear moments, fieldmark/moments.py
    logits = W x + b                                  x standardised

mu is the mean of training tokens and s_k the deviation along d_k there: z_tk says by how much a place shows concept k
more than places do, and x_jk is great where the places that show j are those that show k. Two concepts that are both
less there than anywhere count as well. The signed root keeps each entry by itself, where that of iSQRT mixes them.

d_k = P^T e_k for the vector e_k of a concept and the projection P: what a place adds to its likeness to the concept,
before the picture's vector is made of unit length. The concepts are those of the bank that differ most among each
other (`farthest_first`): of it nothing is read but vectors, and what an edited prompt moves is computed here, from
cached tokens. Beside them stand as controls `pca`, leading directions of the tokens; `span`, random ones of what P
sees; `random` ones of all d. None of these three has words.

`nec` keeps so many pairs a class, as concept_bottleneck does: an explanation of a few entries, and not of thousands.
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.moments import Basis, TokenSums, bilinear
from fieldmark.params import Count
from training.data import Batch, Cache
from training.data.bank import Bank
from training.data.projection import Projection
from training.layers.blocks import Span, Standardise, linear_from_state, linear_layer
from training.layers.logistic import Chosen, ProbeSettings, fit_logistic
from training.layers.nodes import training_sample
from training.layers.sparse import fit_sparse
from training.layers.states import State, within
from training.loop import EVALUATION_BATCH
from training.methods import Fitted, NotPossible, Output
from training.methods.concept_bottleneck import concepts, farthest_first, is_concept

SEEDED = True  # for `span` and `random`; the directions of concepts and of pca are the same under every seed
READS = frozenset({"tokens", "projection", "concepts"})
SAMPLE = 512  # training images whose tokens say where the mean is, how far they spread, and what leads
Kind = Literal["concepts", "pca", "span", "random"]


class Settings(ProbeSettings):
    basis: Kind = "concepts"  # directions of concepts; pca of tokens; span: random within the projection's; random
    directions: Count = 64  # at most: k of them make k (k + 1) / 2 pairs
    nec: Annotated[float, Field(ge=1)] | None = 10.0  # pairs a class, on average, that have a weight; null: all


def reads(settings: Settings) -> frozenset[str]:
    return {
        "concepts": READS,
        "span": frozenset({"tokens", "projection"}),
    }.get(settings.basis, frozenset({"tokens"}))


class Directions(NamedTuple):
    basis: Basis  # mu (d,), and d_k / s_k as columns (d, k)
    row: Tensor  # (k,) int64: which text of the bank each is; (0,) where they have no words


class PairBottleneck(nn.Module):
    mean: Tensor
    directions: Tensor
    row: Tensor

    def __init__(self, directions: Directions, standardise: Standardise, linear: nn.Linear) -> None:
        """`linear` (k (k + 1) / 2 -> C)."""
        super().__init__()
        self.register_buffer("mean", directions.basis.mean)
        self.register_buffer("directions", directions.basis.directions)
        self.register_buffer("row", directions.row)
        self.standardise, self.linear = standardise, linear

    def forward(self, batch: Batch) -> Output:
        return Output(self.linear(self.standardise(self.pairs(batch.tokens))), {}, None)

    def pairs(self, tokens: Tensor) -> Tensor:
        """Of tokens (B, T, d) the entries (B, k (k + 1) / 2) of the upper triangle, row by row."""
        return bilinear(tokens.float(), Basis(self.mean, self.directions))


def find_directions(cache: Cache, settings: Settings, seed: int) -> Directions:
    """Of deviation 1 over the tokens of training images."""
    tokens = training_sample(cache, SAMPLE).tokens.flatten(0, 1)
    mean, row = tokens.double().mean(0).float(), torch.zeros(0, dtype=torch.long, device=tokens.device)
    if settings.basis == "pca":
        sums = TokenSums(tokens.shape[1])
        sums.add(tokens.cpu())
        found = sums.basis(min(settings.directions, tokens.shape[1])).directions.to(tokens.device)
    elif settings.basis == "random":
        found = draw(tokens.shape[1], settings.directions, seed).to(tokens.device)
    else:
        projection = cache.part(Projection).weight  # (D, d)
        if projection.shape[1] != tokens.shape[1]:
            raise NotPossible(
                f"the projection takes {projection.shape[1]} numbers, and the deepest stored tokens have"
                f" {tokens.shape[1]}: add `head` to the layers under `tokens` in params.yaml"
            )
        if settings.basis == "span":
            lift = draw(len(projection), settings.directions, seed).to(tokens.device)
        else:
            bank = cache.part(Bank)
            chosen = farthest_first(concepts(bank), settings.directions)
            row = is_concept(bank).nonzero()[:, 0][chosen]
            lift = bank.K[row].T
        found = projection.T @ lift
    spread = ((tokens - mean) @ found).double().std(0, correction=0).clamp(min=1e-6).float()
    return Directions(Basis(mean, found / spread), row)


def draw(width: int, count: int, seed: int) -> Tensor:
    """(width, count), on the CPU."""
    return torch.randn(width, count, generator=torch.Generator().manual_seed(seed))


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    directions = find_directions(cache, settings, seed)
    size = len(directions.basis.directions.T)
    empty = PairBottleneck(directions, Standardise(cache.y.new_zeros(1, 1)), nn.Linear(1, 1))
    train, val = cache.images("train"), cache.images("val")

    def pairs(images: Tensor, view: int) -> Tensor:
        """Read a batch at a time: tokens are far longer than what is made of them."""
        views = torch.full((len(images),), view)
        chunks = zip(images.split(EVALUATION_BATCH), views.split(EVALUATION_BATCH), strict=True)
        made = [empty.pairs(cache.batch(some, of).tokens) for some, of in chunks]
        return torch.cat(made) if len(images) else directions.basis.mean.new_zeros(0, size * (size + 1) // 2)

    x = torch.cat([pairs(train, view) for view in range(cache.views)])
    standardise = Standardise(x)
    told = torch.cat([cache.target[train]] * cache.views)
    given = standardise(x), told, standardise(pairs(val, 0)), cache.y[val], len(cache.classes)
    knobs = settings.l2, settings.max_iterations
    chosen = fit_dense(*given, *knobs) if settings.nec is None else fit_sparse(*given, settings.nec, *knobs)
    model = PairBottleneck(directions, standardise, chosen.linear)
    return Fitted(model, chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)


def fit_dense(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, classes: int, strengths: list[float], max_iterations: int
) -> Chosen:
    """Logistic regression on all pairs, within the space that the rows span."""
    span = Span(x)
    chosen = fit_logistic(span.into(x), y, span.into(x_val), y_val, classes, strengths, max_iterations)
    weight, bias = span.back(chosen.linear.weight.detach()), chosen.linear.bias.detach()
    return chosen._replace(linear=linear_layer(weight, bias))


def pairs_add(
    model: PairBottleneck, settings: Settings, cache: Cache, images: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What each pair adds to logit a - logit b, (B, P), exactly but for the biases; its two texts in the bank, (P, 2).

    And whether the image has more of the pair than training images on average, (B, P) bool: what a pair adds may be due
    to having less of it. None where directions have no words.
    """
    if not len(model.row):
        return None
    x = model.standardise(model.pairs(cache.batch(images).tokens))
    a, b = model.linear.weight[classes].unbind(1)
    size = len(model.row)
    places = torch.triu_indices(size, size, device=x.device).T
    return (a - b) * x, model.row[places], x > 0


def build(state: State, settings: Settings, classes: int) -> PairBottleneck:
    directions = Directions(Basis(state["mean"], state["directions"]), state["row"])
    standardise = Standardise.from_state(within(state, "standardise"))
    return PairBottleneck(directions, standardise, linear_from_state(within(state, "linear")))
