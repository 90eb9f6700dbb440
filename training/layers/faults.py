"""Known defects of public reference code, to be switched on by name: what they cost is a question to measure."""

from torch import Tensor


def scramble(local: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Local views (B, N, D) and mask (B, N) where the reference code of RP, of TRD and of the notes has them [code].

    The crops are concatenated view by view, (N B, D), and read as (B, N, D): but for a batch of one image, row b holds
    crops of other images of the batch.
    """
    return local.transpose(0, 1).reshape(local.shape), mask.transpose(0, 1).reshape(mask.shape)
