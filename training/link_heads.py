"""What networks over links share: vectors of the images that send, and how a network reaches an image of a batch.

In training a batch is laid out with all that reaches it (`Memory.around`), so that gradients go all the way, and links
may be sampled. At evaluation no link is, and what an image that sends holds before each layer does not depend on the
batch: it is found once for all batches, and an image costs its own links of one step, however deep the network is. Both
ways a node has the same value.
"""


import torch
from torch import Tensor, nn

from training.data.cache import Fields
from training.layers.convolutions import LinkNetwork
from training.layers.nodes import in_precision
from training.links import Found, Heard, Memory


class OverLinks(nn.Module):
    """From vectors x (B, F) of a batch to what a network over links makes of them, (B, width)."""

    vectors: Tensor

    def __init__(self, memory: Memory, vectors: Tensor, network: LinkNetwork, width: int, fanout: int | None) -> None:
        """vectors (M, F): of the memory's images; `fanout`: links into a node that training draws, null for all."""
        super().__init__()
        self.memory, self.network, self.fanout = memory, network, fanout
        self.enter = nn.Linear(vectors.shape[1], width)
        self.register_buffer("vectors", vectors)
        self.found = Found[Tensor]()  # what the memory's images hold before each layer, at evaluation

    def forward(self, batch: Fields, x: Tensor) -> Tensor:
        if self.training:
            layers, grow = len(self.network.layers), not self.network.attends
            around = self.memory.around(batch, layers, self.fanout, own=self.memory.one_view, grow=grow)
            reached = torch.cat([x, self.vectors[around.rows]]) if len(around.rows) else x
            return self.network(self.enter(in_precision(reached)), around.hops())
        heard, x = Heard(self.memory, batch), self.enter(in_precision(x))
        for number, held in enumerate(self.held()):
            x = self.network.step(number, heard.beside(x, held), heard.hop)
        return x

    @torch.no_grad()
    def held(self) -> list[Tensor]:
        """What the images that send hold before each layer, (M, width) each."""
        if not self.found.values:
            whole = self.memory.whole()
            self.found.values = [self.enter(in_precision(self.vectors))]
            for number in range(len(self.network.layers) - 1):
                self.found.values.append(self.network.step(number, self.found.values[-1], whole))
        return self.found.values
