"""A linear concept bottleneck: classes from an image's likeness to concepts and nothing else (after LaBo, Yang et al.,
CVPR 2023).

    s_k = x . K_k over the M kept concepts (class names and picture prototypes apart)        logits = Linear(s)

with x the standardised global vector. Not LaBo's training [design]: its class-concept weights start at the concepts'
owners, are a softmax, and are learned by Adam; here they are the tuned logistic regression of linear_probe. So nothing
of the bank is read but the vectors: put other vectors in their place, and what changes is due to the texts.

The scores of M concepts span at most D dimensions. With K^T = U diag(e) V^T they are s = (x U diag(e)) V^T, and since V
only rotates, the weights of least length that fit s are those that fit x U diag(e), times V^T: the fit takes min(M, D)
dimensions however many concepts there are, and gives the same answer.

`nec` makes the last layer sparse: so many concepts a class on average, as many as one can read. An L1 path over the
scores, standardised one by one, chooses them, and the logistic regression is fitted on those alone (layers/sparse.py).
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.params import Count
from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.blocks import Standardise, linear_from_state, linear_layer
from training.layers.logistic import Chosen, ProbeSettings, fit_probe, training_globals
from training.layers.sparse import fit_sparse
from training.layers.states import State, within
from training.methods import Fitted, NotPossible, Output

SEEDED = False
READS = frozenset({"globals", "concepts"})


class Settings(ProbeSettings):
    concepts: Count | None = None  # how many are read, those that differ most among each other; null: all that are kept
    nec: Annotated[float, Field(ge=1)] | None = None  # concepts a class, on average, that have a weight; null: all


class ConceptBottleneck(nn.Module):
    K: Tensor
    row: Tensor

    def __init__(self, standardise: Standardise, K: Tensor, row: Tensor, linear: nn.Linear) -> None:
        """K (M, D): the concepts' vectors, and their rows (M,) int64 in the bank; `linear` (M -> C)."""
        super().__init__()
        self.standardise, self.linear = standardise, linear
        self.register_buffer("K", K)
        self.register_buffer("row", row)

    def forward(self, batch: Batch) -> Output:
        return Output(self.linear(self.standardise(batch.g.float()) @ self.K.T), {}, None)


def is_concept(bank: Bank) -> Tensor:
    """(M,) bool: the texts of the bank that are read."""
    return bank.kept & ~bank.of_kind("name", "proto")


def concepts(bank: Bank) -> Tensor:
    """(M, D): the kept concepts. Raises NotPossible where there is none."""
    kept = bank.K[is_concept(bank)]
    if not len(kept):
        raise NotPossible(
            f"{bank.path}: holds no kept concept; write texts (concepts.import) or have a model asked (llm.mode live);"
            " where there are texts, drop_reason in data/concepts/concepts.parquet says why none was kept"
        )
    return kept


def farthest_first(K: Tensor, count: int) -> Tensor:
    """(count,) int64: rows of K (M, D), unit length, each the least like those before it; all of them if M is less.

    The first is the least like the mean (Gonzalez, 1985 [mem], who starts anywhere).
    """
    chosen = [int((K @ K.mean(0)).argmin())]
    nearest = K @ K[chosen[0]]
    for _ in range(min(count, len(K)) - 1):
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, K @ K[chosen[-1]])
    return torch.tensor(chosen, device=K.device)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    bank = cache.part(Bank)
    vectors, told = training_globals(cache)
    standardise, K, row = Standardise(vectors), concepts(bank), is_concept(bank).nonzero()[:, 0]
    if settings.concepts is not None:
        some = farthest_first(K, settings.concepts)
        K, row = K[some], row[some]
    if settings.nec is None:
        chosen = fit_dense(cache, settings, standardise, K)
    else:
        chosen = fit_at_nec(cache, settings, standardise(vectors) @ K.T, told, standardise, K)
    model = ConceptBottleneck(standardise, K, row, chosen.linear)
    return Fitted(model, chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)


def fit_dense(cache: Cache, settings: Settings, standardise: Standardise, K: Tensor) -> Chosen:
    """The last layer with a weight for every concept."""
    axes, extent, turn = torch.linalg.svd(K.T, full_matrices=False)
    projection = axes * extent
    chosen = fit_probe(cache, settings, lambda images, view: standardise(cache.globals(images, view)) @ projection)
    return chosen._replace(linear=linear_layer((chosen.linear.weight @ turn).detach(), chosen.linear.bias.detach()))


def fit_at_nec(
    cache: Cache, settings: Settings, said: Tensor, told: Tensor, standardise: Standardise, K: Tensor
) -> Chosen:
    """The last layer with `nec` weights a class, of the scores (n V, M) of training images and what is told of each."""
    assert settings.nec is not None
    val = cache.images("val")
    return fit_sparse(
        said,
        told,
        standardise(cache.globals(val)) @ K.T,
        cache.y[val],
        len(cache.classes),
        settings.nec,
        settings.l2,
        settings.max_iterations,
    )


def texts_add(model: ConceptBottleneck, settings: Settings, cache: Cache, images: Tensor, classes: Tensor) -> Tensor:
    """(w_a - w_b) s_k, exactly: with the difference of the biases they make logit a - logit b."""
    bank = cache.part(Bank)
    said = model.standardise(cache.globals(images)) @ model.K.T
    a, b = model.linear.weight[classes].unbind(1)  # (B, M) each
    found = said.new_zeros(len(images), len(bank.K))
    found[:, model.row] = (a - b) * said
    return found


def build(state: State, settings: Settings, classes: int) -> ConceptBottleneck:
    standardise = Standardise.from_state(within(state, "standardise"))
    return ConceptBottleneck(standardise, state["K"], state["row"], linear_from_state(within(state, "linear")))
