"""What heads over regions share: a picture, its object, and local views of it, as the nodes of an encoder hold them.

Such a head is a system of the field over vectors that were computed once: g of the picture, g_obj of the object's crop
and l_n of N local views. They are the nodes of embed_images: `embed.regions` makes an `object` and `crop`s of it, each
with a forward pass of its own; cells of the dense map (`grid`, `token`) cost none.
"""

from bisect import bisect_left
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from training.data import Batch, Cache
from training.data.kinds import KINDS, Kinds
from training.layers.states import State
from training.methods import NotPossible
from training.token_heads import BesideSettings

OWN = frozenset({"nodes", "kinds"})
LOCAL = ("token", "grid", "crop")


class RegionSettings(BesideSettings):
    """The knobs that heads over regions share."""

    object: Literal["node", "global"] = "node"  # the object's crop: a node of that kind, or the whole picture instead
    regions: Literal["crop", "grid", "token", "all"] = "all"  # nodes that are local views: of one kind, or all

    @property
    def local_kinds(self) -> tuple[str, ...]:
        return LOCAL if self.regions == "all" else (self.regions,)


class Views(NamedTuple):
    """What a batch shows of each image: unit vectors, as the encoder gave them."""

    whole: Tensor  # (B, D): g
    object: Tensor  # (B, D): g_obj
    local: Tensor  # (B, N, D): l, zero where there is none
    mask: Tensor  # (B, N) bool: the local views that an image has


class Regions(nn.Module):
    """Which nodes are the object and the local views."""

    at: Tensor
    local: Tensor
    codes: Tensor

    def __init__(self, at: int, local: Tensor, kinds: tuple[str, ...]) -> None:
        """`at`: the object's node, 0 for the picture; `local` (N,): the nodes that are local views in any image."""
        super().__init__()
        self.register_buffer("at", torch.tensor(at))
        self.register_buffer("local", local)
        self.order = local.tolist()  # a list: to read it from a GPU would wait for that
        self.register_buffer("codes", torch.tensor([KINDS.index(kind) for kind in kinds]))

    @classmethod
    def measure(cls, cache: Cache, settings: RegionSettings) -> Self:
        """Of the cache's nodes. Raises NotPossible where it has no object, or no local view, of the kind asked for."""
        kinds = cache.part(Kinds).kinds.cpu()
        at = int(settings.object == "node")
        if at and not (kinds[:, 1:2] == KINDS.index("object")).any(1).all():
            raise NotPossible("the pictures have no object nodes: set embed.regions, or settings.object: global")
        codes = torch.tensor([KINDS.index(kind) for kind in settings.local_kinds])
        local = torch.isin(kinds.long(), codes).any(0).nonzero().flatten()
        if not len(local):
            raise NotPossible(
                f"the pictures have no nodes of kind {' or '.join(settings.local_kinds)}: set embed.regions,"
                " embed.grids or embed.crops, or settings.regions"
            )
        return cls(at, local, settings.local_kinds)

    @classmethod
    def from_state(cls, state: State, settings: RegionSettings) -> Self:
        """From that of the module."""
        return cls(int(state["at"]), state["local"], settings.local_kinds)

    def forward(self, batch: Batch) -> Views:
        """A batch whose images have fewer nodes than those that were measured has fewer local views."""
        count = batch.nodes.shape[1]
        at, places = self.at.clamp(max=count - 1), self.places(count)
        local = batch.nodes.index_select(1, places)
        mask = torch.isin(batch.kinds.index_select(1, places), self.codes)
        return Views(batch.nodes[:, 0], batch.nodes.index_select(1, at[None])[:, 0], local * mask[..., None], mask)

    def places(self, count: int) -> Tensor:
        """Which of `count` nodes may be local views; the nodes are in order."""
        return self.local[: bisect_left(self.order, count)]

    def boxes(self, batch: Batch) -> Tensor:
        """(B, N, 4): where the local views lie, of a batch that has `boxes`."""
        found: Tensor = batch.box.index_select(1, self.places(batch.nodes.shape[1]) - 1)
        return found
