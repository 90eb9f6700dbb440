"""Labels of training images spread over links, and nothing is looked at: what the links alone tell.

    F <- alpha P F + (1 - alpha) Y      `steps` - 1 times, from F = Y, over the images that send
    p_i = alpha (P F)_i                 of a judged image: it hears, and has no label of its own
    logits = log(p_i / sum p_i + FLOOR prior)

Y is what training is told of an image, 0 for one that does not train; P F the mean of what a node hears, weighed by its
links. It is the iteration of Zhou et al. (NeurIPS 2003 [mem]) with D^-1 W for S, since links have directions: a node
that hears nobody would send nothing under D^-1/2 W D^-1/2. One step is a vote of the neighbours (there it is Zhu and
Ghahramani's, 2002 [mem], too, which holds what training images say fixed). Val chooses alpha and the steps. An image
that hears nobody is told by how frequent classes are, and FLOOR keeps logits finite [design].

Under `sources: train` the images that send are those with labels; under `all` labels pass through the others as well,
those that are judged among them, as the papers have it. A judged image's label is in neither. A training image hears
its own back from its neighbours, from two steps on: its accuracy says nothing.
"""

from pydantic import Field
from torch import Tensor, nn

from fieldmark.params import Count
from training.data import Batch, Cache
from training.data.links import WORD
from training.layers.states import State, within
from training.links import Alpha, Heard, LinkSettings, Memory, labels_of_senders, links_word, spread
from training.methods import Fitted, Output, search

SEEDED = False
READS = frozenset({WORD})
FLOOR = 1e-3  # of the prior, added to every class's share


class Settings(LinkSettings):
    alpha: list[Alpha] = Field(
        default=[0.5, 0.8, 0.95, 0.99], min_length=1
    )  # shares of what a node hears, beside its own label, that val chooses from
    steps: list[Count] = Field(default=[1, 3, 10, 30], min_length=1)  # how far labels go, that val chooses from


def reads(settings: Settings) -> frozenset[str]:
    return frozenset({links_word(settings)})


class LabelPropagation(nn.Module):
    held: Tensor
    prior: Tensor

    def __init__(self, memory: Memory, held: Tensor, prior: Tensor) -> None:
        """held (M, C): F of the images that send; prior (C,)."""
        super().__init__()
        self.memory = memory
        self.register_buffer("held", held)
        self.register_buffer("prior", prior)

    def forward(self, batch: Batch) -> Output:
        return Output(as_logits(Heard(self.memory, batch).mean(self.held), self.prior), {}, None)


def as_logits(share: Tensor, prior: Tensor) -> Tensor:
    """From what an image hears (B, C), 0 or more, to logits."""
    return (share / share.sum(1, keepdim=True).clamp(min=1e-12) + FLOOR * prior).log()


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    told, memory = labels_of_senders(cache, settings), Memory.of(cache, settings)
    count = told.sum(0) + 1  # a class without images has a share of its own, the smallest
    prior, whole = count / count.sum(), memory.whole()
    heard = Heard(memory, cache.only({links_word(settings)}).batch(cache.images("val")))

    def held(alpha: float, steps: int) -> Tensor:
        return spread(whole, told, alpha, steps - 1)

    point, history = search(
        cache, settings, lambda alpha, steps: as_logits(heard.mean(held(alpha, steps)), prior)
    )
    return Fitted(LabelPropagation(memory, held(point["alpha"], int(point["steps"])), prior), history, dict(point))


def build(state: State, settings: Settings, classes: int) -> LabelPropagation:
    return LabelPropagation(Memory.from_state(within(state, "memory"), settings), state["held"], state["prior"])
