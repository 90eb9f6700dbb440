"""What methods over links between images share: who may send, and the edges around the images of a batch.

`sources: train` is inductive: messages come from the training images of this fit alone, so that no other image that is
judged sends anything, and what an image gets is the same alone and in any batch. Which of these it hears is found in a
list of its nearest among **all** images: others take places in it, and where few images train, few are left
(`say_who_hears_few`). `sources: all` is transductive: every image of the cache sends, those that are judged too (never
their labels). Numbers of the two are not compared.

The images that send are kept with the model (`Memory`), in view 0: to answer for another image takes its own vectors
and its own links, and nothing else of the cache.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fieldmark.command import UserError, say_once
from fieldmark.params import Block, Count
from training.data import Cache
from training.data.cache import Fields
from training.data.links import WEIGHT, WORD, Incoming, Links, names_in
from training.layers.gather import spans
from training.layers.hops import Hop, starts
from training.layers.logistic import as_probabilities
from training.layers.states import State

T = TypeVar("T")
Alpha = Annotated[float, Field(ge=0, lt=1)]  # the share of what a node hears, beside what it was told itself


class LinkSettings(Block):
    """The knobs that methods over links share."""

    links: str = Field(default="near", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")  # a key of `links` in params.yaml
    sources: Literal["train", "all"] = "train"  # train: inductive; all: transductive, every image of the cache sends
    neighbours: Count | None = 10  # an image hears so many of those that may send, the nearest; null: all of them


def links_word(settings: LinkSettings) -> str:
    """What READS calls these links."""
    return f"{WORD}/{settings.links}"


def weight_word(settings: LinkSettings) -> str:
    """The field of a batch that has their weights."""
    return f"{WEIGHT}/{settings.links}"


TRANSDUCTIVE = "transductive"


def is_transductive(settings: Block) -> bool:
    """Whether images that are judged send too: said wherever a number of such a run stands."""
    return isinstance(settings, LinkSettings) and settings.sources == "all"


def check_links(path: str, key: str, links: Collection[str], reads: Collection[str]) -> None:
    """Raise UserError where a run that stands under `key` reads links that params.yaml does not make."""
    for name in names_in(reads):
        if name not in links:
            known = f"choose one of: {', '.join(links)}, or add it" if links else "add it"
            what = f"reads links/{name}, and `links` of params.yaml has no {name}"
            raise UserError(f"{path}: {key}.settings: {what}; {known} (docs/own-data.md#links-between-images)")


def named(name: str, transductive: bool) -> str:
    """The name of a run, or of a row, as it stands beside a number."""
    return f"{name} ({TRANSDUCTIVE})" if transductive else name


class Around(NamedTuple):
    """The images of a batch, and those from which something reaches them in `len(edges)` steps.

    Nodes 0 .. B-1 are the batch; then come rows of the memory, by how many steps away they are. `nodes[d]` of all
    nodes are at most d steps away, and `edges[d]` of all edges enter these: of L layers, layer l = 1 .. L has to find
    the first nodes[L - l] nodes, from the first edges[L - l] edges (`hops`).
    """

    rows: Tensor  # (m,) int64: of the memory
    edges_in: Tensor  # (2, E) int64: sender and receiver, by node
    weight: Tensor  # (E,) float32, 0 or more
    degree: Tensor  # (B + m,) float32: the sum of the weights of all that a node hears, whatever is sampled of it
    nodes: list[int]  # by steps, 0 .. hops
    edges: list[int]  # by steps, 0 .. hops - 1

    def hops(self) -> list[Hop]:
        """What each layer passes, the first layer first; layers that pass the same share one."""
        found: dict[tuple[int, int, int], Hop] = {}
        layers = [(self.nodes[d + 1], self.nodes[d], self.edges[d]) for d in reversed(range(len(self.edges)))]
        for key in layers:
            nodes, count, edges = key
            (sender, receiver), weight = self.edges_in[:, :edges], self.weight[:edges]
            found.setdefault(key, Hop(sender, receiver, weight, self.degree[:nodes], count))
        return [found[key] for key in layers]


class Memory(nn.Module):
    """M images that may send, in the order of their keys, and the links among them."""

    key: Tensor  # (M,) int64, ascending
    start: Tensor  # (M + 1,) int64: edges start[i] .. start[i + 1] enter image i
    source: Tensor  # (E,) int64: rows of the memory
    weight: Tensor  # (E,) float32
    degree: Tensor  # (M,) float32: the sum of the weights of the edges into each
    views: Tensor  # (): of the cache that it is of

    def __init__(
        self, settings: LinkSettings, key: Tensor, start: Tensor, source: Tensor, weight: Tensor, views: int
    ) -> None:
        super().__init__()
        self.settings, self.one_view = settings, views == 1
        for name, value in {"key": key, "start": start, "source": source, "weight": weight}.items():
            self.register_buffer(name, value)
        self.register_buffer("views", torch.tensor(views))
        self.register_buffer("degree", summed(weight, owners(start), len(key)), persistent=False)

    @classmethod
    def of(cls, cache: Cache, settings: LinkSettings) -> Self:
        """Of the images that may send under these settings."""
        part = cache.part(Links)
        sending = senders(cache, settings)
        key = part.key[sending.to(part.key.device)].to(cache.device)
        memory = cls.of_keys(settings, key, cache.views)
        source, row, weight = memory.entering(cache.only({links_word(settings)}).batch(sending))
        say_who_hears_few(part.incoming[settings.links], memory)
        return cls(settings, key, starts(row, len(key)), source, weight, cache.views)

    @classmethod
    def of_keys(cls, settings: LinkSettings, key: Tensor, views: int) -> Self:
        """Of images by their ascending keys (M,), for what is heard directly: without links among them."""
        edges = key.new_zeros(0)
        return cls(settings, key, key.new_zeros(len(key) + 1), edges, edges.float(), views)

    @classmethod
    def from_state(cls, state: State, settings: LinkSettings) -> Self:
        key, start, source, weight = (state[name] for name in ("key", "start", "source", "weight"))
        return cls(settings, key, start, source, weight, int(state["views"]))

    def entering(self, batch: Fields) -> tuple[Tensor, Tensor, Tensor]:
        """The edges (E,) into a batch: the row of the memory that sends, the place in the batch, and the weight.

        They stand by place, the nearest first: at most `neighbours` a place, and none from an image to itself. A weight
        below 0 (a cosine of what is not alike) is 0.
        """
        source, row = batch.of(links_word(self.settings))
        weight = batch.of(weight_word(self.settings)).clamp(min=0)
        place = torch.searchsorted(self.key, source).clamp(max=max(len(self.key) - 1, 0))
        heard = (self.key[place] == source) & (source != batch.key[row]) if len(self.key) else source < 0
        place, row, weight = place[heard], row[heard], weight[heard]
        if self.settings.neighbours is not None:
            near = ranks(row, len(batch.key)) < self.settings.neighbours
            place, row, weight = place[near], row[near], weight[near]
        return place, row, weight

    def rows_of(self, batch: Fields) -> Tensor | None:
        """The rows (B,) of a batch's images; None where one is not of the memory."""
        row = torch.searchsorted(self.key, batch.key).clamp(max=max(len(self.key) - 1, 0))
        inside = len(self.key) > 0 and bool((self.key[row] == batch.key).all())
        return row if inside else None

    def around(
        self, batch: Fields, hops: int, fanout: int | None = None, own: bool = False, grow: bool = True
    ) -> Around:
        """All that reaches the images of a batch in `hops` >= 1 steps.

        Of the links into each node at most `fanout` are drawn anew, where it is given; unless `grow` is false, the
        weights of these grow, so that the sum over them is right in the mean. `own`: where all images of the batch are
        of the memory, they send as they stand in the batch and are not found a second time; their vectors have to be
        those of the memory.
        """
        size = len(batch.key)
        node = torch.full_like(self.key, -1)  # of each row of the memory
        inside = self.rows_of(batch) if own else None
        if inside is not None:
            node[inside] = torch.arange(size, device=inside.device)
            edge, receiver = spans(self.start, inside)
            source, weight, degree = self.source[edge], self.weight[edge], [self.degree[inside]]
        else:
            source, receiver, weight = self.entering(batch)
            degree = [summed(weight, receiver, size)]
        rows, senders_in, receivers, weights = [self.key.new_zeros(0)], [], [], []
        nodes, edges = [size], [0]
        for hop in range(hops):
            if fanout is not None:
                source, receiver, weight = sample(source, receiver, weight, fanout, nodes[-1], grow)
            new = torch.unique(source[node[source] < 0])
            node[new] = torch.arange(nodes[-1], nodes[-1] + len(new), device=new.device)
            rows.append(new)
            senders_in.append(node[source])
            receivers.append(receiver)
            weights.append(weight)
            degree.append(self.degree[new])
            nodes.append(nodes[-1] + len(new))
            edges.append(edges[-1] + len(source))
            if hop + 1 < hops:
                edge, place = spans(self.start, new)
                source, weight, receiver = self.source[edge], self.weight[edge], node[new][place]
        ends = torch.stack([torch.cat(senders_in), torch.cat(receivers)])
        return Around(torch.cat(rows), ends, torch.cat(weights), torch.cat(degree), nodes, edges[1:])

    def whole(self) -> Hop:
        """All links among the images that send: one step, from and to all of them."""
        return Hop(self.source, owners(self.start), self.weight, self.degree, len(self.key))


class Found(nn.Module, Generic[T]):
    """What weights gave at evaluation, kept until they may have changed: a part of the module that finds it.

    Whoever trains, loads or moves that module reaches its parts as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[T] = []

    def train(self, mode: bool = True) -> Self:
        self.values = []
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.values = []
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *given: Any) -> None:
        self.values = []
        super()._load_from_state_dict(*given)


class Heard:
    """What the images of a batch hear from those that send, one step away."""

    def __init__(self, memory: Memory, batch: Fields) -> None:
        around = memory.around(batch, 1)
        [self.hop] = around.hops()
        self.rows = around.rows

    def beside(self, own: Tensor, held: Tensor) -> Tensor:
        """(n, h): own (B, h) of the batch, then what those that it hears hold, of held (M, h): the hop's nodes."""
        return torch.cat([own, held[self.rows]])

    def mean(self, held: Tensor) -> Tensor:
        """(B, h) float32: the weighted mean of what they hold, held (M, h); 0 for an image that hears nobody."""
        own = held.new_zeros(self.hop.count, held.shape[1])
        return self.hop.sum(self.beside(own, held), self.hop.mean())


def spread(hop: Hop, start: Tensor, alpha: float, steps: int) -> Tensor:
    """x (M, h) after `steps` of x <- alpha P x + (1 - alpha) start, from start (M, h); P x: the mean that is heard."""
    x, weight = start, hop.mean()
    for _ in range(steps):
        x = alpha * hop.sum(x, weight) + (1 - alpha) * start
    return x


def owners(start: Tensor) -> Tensor:
    """(E,): which node each edge enters, of start (n + 1,)."""
    return torch.repeat_interleave(start[1:] - start[:-1])


def summed(weight: Tensor, owner: Tensor, count: int) -> Tensor:
    """(count,): the sum of the weights (E,) of each owner."""
    return weight.new_zeros(count).index_add_(0, owner, weight)


def ranks(owner: Tensor, count: int) -> Tensor:
    """(E,): how many edges of the same owner stand before each; those of one owner, 0 .. count-1, stand together."""
    return torch.arange(len(owner), device=owner.device) - starts(owner, count)[owner]


def sample(
    source: Tensor, receiver: Tensor, weight: Tensor, fanout: int, nodes: int, grow: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """At most `fanout` of the edges into each of `nodes` receivers, drawn without putting back, in their order.

    Of k edges each weighs k / fanout of what it did, or as much as before, where none is to `grow`.
    """
    count = torch.bincount(receiver, minlength=nodes)
    if not len(receiver) or int(count.max()) <= fanout:
        return source, receiver, weight
    drawn = torch.rand(len(receiver), dtype=torch.float64, device=receiver.device)
    order = (receiver + drawn).argsort()
    kept = torch.empty_like(receiver, dtype=torch.bool)
    kept[order] = ranks(receiver, nodes) < fanout  # receivers stand together, so that their order is that of `order`
    if grow:
        weight = weight * (count / fanout).clamp(min=1).to(weight.dtype)[receiver]
    return source[kept], receiver[kept], weight[kept]


def say_who_hears_few(edges: Incoming, memory: Memory) -> None:
    """Say on stderr where half of the images, or more, hear fewer than `neighbours` of those that may send."""
    name, wanted = memory.settings.links, memory.settings.neighbours
    images = len(edges.start) - 1
    if wanted is None or not images:
        return
    edge, row = edges.of(torch.arange(images))
    heard = torch.isin(edges.source[edge], memory.key.to(edges.source.device)).long()
    count = heard.new_zeros(images).index_add_(0, row, heard)
    median, none = int(count.median()), int((count == 0).sum())
    if median < min(wanted, len(memory.key) - 1):
        say_once(
            f"links/{name}: half of {images} images hear {median} or fewer of the {len(memory.key)} that may send, not"
            f" {wanted}, and {none} hear nobody: links are the nearest of all images; raise links.{name}.k"
        )


def labels_of_senders(cache: Cache, settings: LinkSettings) -> Tensor:
    """(M, C) float32: what training is told of those that send; 0 for all that do not train."""
    sending = senders(cache, settings)
    trains = torch.from_numpy(cache.split[sending.numpy()] == "train")
    told = torch.zeros(len(sending), len(cache.classes), device=cache.device)
    told[trains.to(told.device)] = as_probabilities(cache.target[sending[trains]], len(cache.classes))
    return told


def senders(cache: Cache, settings: LinkSettings) -> Tensor:
    """The positions (M,) of images that may send, in the order of their keys: a row of the memory each."""
    images = cache.images("train") if settings.sources == "train" else torch.arange(len(cache.paths))
    key = cache.part(Links).key.cpu()[images]
    return images[key.argsort()]
