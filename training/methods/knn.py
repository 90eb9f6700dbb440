"""The k nearest training images by the cosine of global vectors vote, the nearer the more.

p = sum over the k nearest of softmax(cos / temperature)_i t_i, with t_i what training is told of image i (its class, or
its probabilities); logits = log(p + FLOOR), so that a class without a vote has a low and finite one (the
weighting is DINO's, Caron et al., ICCV 2021 [mem], FLOOR is ours [design]). Every view of a training image is a
neighbour of its own. Val chooses k and the temperature. Memory does not grow with the number of training images beyond
their vectors: they are looked through in blocks.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count
from training.data import Batch, Cache
from training.layers.logistic import as_probabilities, training_globals
from training.layers.states import State
from training.loop import EVALUATION_BATCH, Positive
from training.methods import Fitted, Output, search

SEEDED = False
READS = frozenset({"globals"})
BLOCK = 16_384  # training vectors compared at a time
FLOOR = 1e-3  # added to every class's share of the votes


class Settings(Block):
    k: list[Count] = Field(default=[1, 5, 10, 20], min_length=1)  # numbers of neighbours that val chooses from
    temperature: list[Positive] = Field(default=[0.01, 0.03, 0.1, 0.3], min_length=1)  # lower: the nearest count more


class NearestNeighbours(nn.Module):
    keys: Tensor
    values: Tensor
    k: Tensor
    temperature: Tensor

    def __init__(self, keys: Tensor, values: Tensor, k: int, temperature: float) -> None:
        """keys (n, D), unit length; values (n, C), rows that sum to 1."""
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.register_buffer("k", torch.tensor(k))
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, batch: Batch) -> Output:
        near, place = nearest(batch.g.float(), self.keys, int(self.k))
        return Output(vote(near, self.values[place], float(self.temperature)), {}, None)


def nearest(g: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cosines (B, k) of g (B, D) with its k nearest keys (n, D), and their rows (B, k); fewer where n is."""
    g = F.normalize(g, dim=-1)
    near, place = g.new_zeros(len(g), 0), torch.zeros(len(g), 0, dtype=torch.long, device=g.device)
    for start in range(0, len(keys), BLOCK):
        cosine = g @ keys[start : start + BLOCK].T
        row = torch.arange(start, start + cosine.shape[1], device=g.device).expand(len(g), -1)
        near, place = torch.cat([near, cosine], 1), torch.cat([place, row], 1)
        near, kept = near.topk(min(k, near.shape[1]), 1)
        place = place.gather(1, kept)
    return near, place


def vote(near: Tensor, values: Tensor, temperature: float) -> Tensor:
    """Logits (B, C) from cosines (B, k) and what each neighbour says (B, k, C)."""
    weight = (near / temperature).softmax(-1)
    return ((weight[:, None] @ values).squeeze(1) + FLOOR).log()


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    vectors, target = training_globals(cache)
    keys, values = F.normalize(vectors, dim=-1), as_probabilities(target, len(cache.classes))
    # The search looks the neighbours up once, for the largest k.
    found = [
        nearest(chunk, keys, max(settings.k)) for chunk in cache.globals(cache.images("val")).split(EVALUATION_BATCH)
    ]
    near, place = torch.cat([near for near, _ in found]), torch.cat([place for _, place in found])

    def logits(k: int, temperature: float) -> Tensor:
        chunks = zip(near[:, :k].split(EVALUATION_BATCH), place[:, :k].split(EVALUATION_BATCH), strict=True)
        return torch.cat([vote(cosine, values[row], temperature) for cosine, row in chunks])

    point, history = search(cache, settings, logits)
    model = NearestNeighbours(keys, values, int(point["k"]), point["temperature"])
    return Fitted(model, history, dict(point))


def build(state: State, settings: Settings, classes: int) -> NearestNeighbours:
    return NearestNeighbours(state["keys"], state["values"], int(state["k"]), float(state["temperature"]))
