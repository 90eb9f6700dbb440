"""The classifier of three layers that Relational Proxies, TRD and the notes put behind a vector."""

from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.blocks import silent
from training.layers.faults import BatchNorm


class Mapper(nn.Module):
    """Linear(LeakyReLU(Linear(LeakyReLU(norm(Linear(x)))))), 2 width, width and `classes` wide [code].

    The norm is LayerNorm, where their code has BatchNorm: with that an image is judged by its batch in training, and
    by running means, which no batch had, at evaluation.
    """

    def __init__(self, inputs: int, width: int, classes: int, batch_norm: bool = False) -> None:
        """The last layer says nothing at first."""
        super().__init__()
        self.widen, self.narrow = nn.Linear(inputs, 2 * width), nn.Linear(2 * width, width)
        self.norm = BatchNorm(2 * width) if batch_norm else nn.LayerNorm(2 * width)
        self.classify = silent(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs) -> (B, classes)."""
        out: Tensor = self.classify(F.leaky_relu(self.narrow(F.leaky_relu(self.norm(self.widen(x))))))
        return out
