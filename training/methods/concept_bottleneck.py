"""A linear concept bottleneck: classes from an image's likeness to concepts and nothing else (after LaBo, Yang et al.,
CVPR 2023).

    s_k = x . K_k over the M kept concepts (class names and picture prototypes apart)        logits = Linear(s)

with x the standardised global vector. Not LaBo's training [design]: its class-concept weights start at the concepts'
owners, are a softmax, and are learned by Adam; here they are the tuned logistic regression of linear_probe. So nothing
of the bank is read but the vectors: put other vectors in their place, and what changes is due to the texts.

The scores of M concepts span at most D dimensions. With K^T = U diag(e) V^T they are s = (x U diag(e)) V^T, and since V
only rotates, the weights of least length that fit s are those that fit x U diag(e), times V^T: the fit takes min(M, D)
dimensions however many concepts there are, and gives the same answer.
"""

import torch
from torch import Tensor, nn

from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.blocks import Standardise, linear_from_state
from training.layers.logistic import ProbeSettings, fit_probe, training_globals
from training.layers.states import State, within
from training.methods import Fitted, NotPossible, Output

SEEDED = False
READS = frozenset({"globals", "concepts"})


class Settings(ProbeSettings):
    pass


class ConceptBottleneck(nn.Module):
    K: Tensor

    def __init__(self, standardise: Standardise, K: Tensor, linear: nn.Linear) -> None:
        """K (M, D): the concepts' vectors; `linear` (M -> C)."""
        super().__init__()
        self.standardise, self.linear = standardise, linear
        self.register_buffer("K", K)

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


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    standardise, K = Standardise(training_globals(cache)[0]), concepts(cache.part(Bank))
    axes, extent, turn = torch.linalg.svd(K.T, full_matrices=False)
    projection = axes * extent
    chosen = fit_probe(cache, settings, lambda images, view: standardise(cache.globals(images, view)) @ projection)
    linear = nn.Linear(len(K), len(cache.classes), device=K.device)
    with torch.no_grad():
        linear.weight.copy_(chosen.linear.weight @ turn)
        linear.bias.copy_(chosen.linear.bias)
    return Fitted(ConceptBottleneck(standardise, K, linear), chosen.history, {"l2": chosen.l2}, chosen.pass_seconds)


def texts_add(model: ConceptBottleneck, settings: Settings, cache: Cache, images: Tensor, classes: Tensor) -> Tensor:
    """(w_a - w_b) s_k, exactly: with the difference of the biases they make logit a - logit b."""
    bank = cache.part(Bank)
    said = model.standardise(cache.globals(images)) @ model.K.T
    a, b = model.linear.weight[classes].unbind(1)  # (B, M) each
    found = said.new_zeros(len(images), len(bank.K))
    found[:, is_concept(bank)] = (a - b) * said
    return found


def build(state: State, settings: Settings, classes: int) -> ConceptBottleneck:
    standardise = Standardise.from_state(within(state, "standardise"))
    return ConceptBottleneck(standardise, state["K"], linear_from_state(within(state, "linear")))
