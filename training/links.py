"""What methods over links between images share: who may send, and the edges around the images of a batch.

`sources: train` is inductive: messages come from the training images of this fit alone, so that what an image gets
depends on no other image that is judged; it is the same alone and in any batch. `sources: all` is transductive: every
image of the cache sends, those that are judged too (never their labels). Numbers of the two are not compared.

The images that send are kept with the model (`Memory`), in view 0: to answer for another image takes its own vectors
and its own links, and nothing else of the cache.
"""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.params import Block, Count
from training.data import Batch, Cache
from training.data.cache import Fields
from training.data.links import WORD, Links
from training.layers.gather import spans
from training.layers.states import State


class LinkSettings(Block):
    """The knobs that methods over links share."""

    links: str = Field(default="near", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")  # a key of `links` in params.yaml
    sources: Literal["train", "all"] = "train"  # train: inductive; all: transductive, every image of the cache sends
    neighbours: Count | None = 10  # an image hears so many of those that may send, the nearest; null: all of them


def links_word(settings: LinkSettings) -> str:
    """What READS calls these links."""
    return f"{WORD}/{settings.links}"


def is_transductive(settings: Block) -> bool:
    """Whether images that are judged send too: said wherever a number of such a run stands."""
    return isinstance(settings, LinkSettings) and settings.sources == "all"


class Around(NamedTuple):
    """The images of a batch, and those from which something reaches them in `hops` steps.

    Nodes 0 .. B-1 are the batch; then come rows of the memory, by how many steps away they are. `nodes[d]` of all
    nodes are at most d steps away, and `edges[d]` of all edges enter these: of L layers, layer l = 1 .. L has to find
    the first nodes[L - l] nodes, from the first edges[L - l] edges.
    """

    rows: Tensor  # (m,) int64: of the memory
    edges_in: Tensor  # (2, E) int64: sender and receiver, by node
    weight: Tensor  # (E,) float32
    nodes: list[int]  # by steps, 0 .. hops
    edges: list[int]  # by steps, 0 .. hops - 1


class Memory(nn.Module):
    """M images that may send, in the order of their keys, and the links among them."""

    key: Tensor  # (M,) int64, ascending
    start: Tensor  # (M + 1,) int64: edges start[i] .. start[i + 1] enter image i
    source: Tensor  # (E,) int64: rows of the memory
    weight: Tensor  # (E,) float32

    def __init__(self, settings: LinkSettings, key: Tensor, start: Tensor, source: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.settings = settings
        for name, value in {"key": key, "start": start, "source": source, "weight": weight}.items():
            self.register_buffer(name, value)

    @classmethod
    def of(cls, cache: Cache, settings: LinkSettings) -> Self:
        """Of the images that may send under these settings."""
        part = cache.part(Links)
        key = part.key[senders(cache, settings).to(part.key.device)].to(cache.device)
        memory = cls.of_keys(settings, key)
        source, row, weight = memory.entering(cache.batch(senders(cache, settings)))
        count = torch.bincount(row, minlength=len(key))
        start = torch.cat([count.new_zeros(1), count.cumsum(0)])
        return cls(settings, key, start, source, weight)

    @classmethod
    def of_keys(cls, settings: LinkSettings, key: Tensor) -> Self:
        """Of images by their ascending keys (M,), for what is heard directly: without links among them."""
        edges = key.new_zeros(0)
        return cls(settings, key, key.new_zeros(len(key) + 1), edges, edges.float())

    @classmethod
    def from_state(cls, state: State, settings: LinkSettings) -> Self:
        return cls(settings, *(state[name] for name in ("key", "start", "source", "weight")))

    def entering(self, batch: Fields) -> tuple[Tensor, Tensor, Tensor]:
        """The edges (E,) into a batch: the row of the memory that sends, the place in the batch, and the weight.

        They stand by place, the nearest first: at most `neighbours` a place, and none from an image to itself.
        """
        word = links_word(self.settings)
        source, row = batch.of(word)
        weight = batch.of(word.replace(WORD, "link_weight", 1))
        place = torch.searchsorted(self.key, source).clamp(max=max(len(self.key) - 1, 0))
        heard = (self.key[place] == source) & (source != batch.key[row]) if len(self.key) else source < 0
        place, row, weight = place[heard], row[heard], weight[heard]
        if self.settings.neighbours is not None:
            count = torch.bincount(row, minlength=len(batch.key))
            rank = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
            near = rank < self.settings.neighbours
            place, row, weight = place[near], row[near], weight[near]
        return place, row, weight

    def around(self, batch: Batch, hops: int) -> Around:
        """All that reaches the images of a batch in `hops` >= 1 steps."""
        source, row, weight = self.entering(batch)
        size = len(batch.key)
        node = torch.full_like(self.key, -1)  # of each row of the memory
        rows, senders_in, receivers, weights = [self.key.new_zeros(0)], [], [], []
        nodes, edges, receiver = [size], [], row
        for hop in range(hops):
            new = torch.unique(source[node[source] < 0])
            node[new] = torch.arange(nodes[-1], nodes[-1] + len(new), device=new.device)
            rows.append(new)
            senders_in.append(node[source])
            receivers.append(receiver)
            weights.append(weight)
            nodes.append(nodes[-1] + len(new))
            edges.append(len(source) + (edges[-1] if edges else 0))
            if hop + 1 < hops:
                edge, place = spans(self.start, new)
                source, weight, receiver = self.source[edge], self.weight[edge], node[new][place]
        ends = torch.stack([torch.cat(senders_in), torch.cat(receivers)])
        return Around(torch.cat(rows), ends, torch.cat(weights), nodes, edges)


def senders(cache: Cache, settings: LinkSettings) -> Tensor:
    """The positions (M,) of images that may send, in the order of their keys: a row of the memory each."""
    images = cache.images("train") if settings.sources == "train" else torch.arange(len(cache.paths))
    key = cache.part(Links).key.cpu()[images]
    return images[key.argsort()]
