"""Known defects of public reference code, to be switched on by name: what they cost is a question to measure."""

import torch
from torch import Tensor, nn


def scramble(local: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Local views (B, N, D) and mask (B, N) where the reference code of RP, of TRD and of the notes has them [code].

    The crops are concatenated view by view, (N B, D), and read as (B, N, D): but for a batch of one image, row b holds
    crops of other images of the batch.
    """
    return local.transpose(0, 1).reshape(local.shape), mask.transpose(0, 1).reshape(mask.shape)


class BatchNorm(nn.Module):
    """Batch normalisation over all rows that it is called with, where the heads here have LayerNorm.

    Called for pictures, objects and crops in turn it is the shared one of RP and TRD: each is normalised by its own
    statistics in training and by a mixture of all at evaluation. `always`: by those of the batch at evaluation too, as
    a module does that nobody puts into evaluation mode. Of one row in training it makes zeros, where PyTorch's refuses.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, always: bool = False) -> None:
        super().__init__()
        self.always = always
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape, in float32."""
        x, mean, variance = x.float(), self.mean, self.variance
        if self.training or self.always:
            rows = x.flatten(0, -2)
            mean, variance = rows.mean(0), rows.var(0, correction=0)
        if self.training:
            with torch.no_grad():  # PyTorch's momentum
                unbiased = variance * len(rows) / max(len(rows) - 1, 1)
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(unbiased, 0.1)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.weight + self.bias
