"""The classifier of three layers that TRD and the notes put behind a vector."""

from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.blocks import silent
from training.layers.faults import BatchNorm


class Mapper(nn.Module):
    """Linear(d, 2d) - norm - LeakyReLU - Linear(2d, h) - LeakyReLU, and then Linear(h, C), which begins at zero [code].

    The norm is LayerNorm, where their code has BatchNorm: with that an image is judged by its batch in training, and
    by running means, which no batch had, at evaluation.
    """

    def __init__(self, inputs: int, width: int, classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(inputs, 2 * inputs), nn.Linear(2 * inputs, width)
        self.norm = BatchNorm(2 * inputs) if batch_norm else nn.LayerNorm(2 * inputs)
        self.classify = silent(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., h)."""
        return F.leaky_relu(self.narrow(F.leaky_relu(self.norm(self.widen(x)))))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., C)."""
        out: Tensor = self.classify(self.features(x))
        return out
