"""Moments: vectors of a whole image that are made of one layer's tokens, by closed forms, and the basis for them.

Tokens x_t are the T cells of a layer, d numbers each, before any projection (encoders/layers.py). The kinds:

- `isqrt`, iSQRT-COV (Li et al., CVPR 2018 [mem]): the square root of the tokens' covariance, by five Newton-Schulz
  steps. With z_t = V^T (x_t - mu), less its mean over t, A = z^T z / T, tr = trace A + 1e-12, Y = A / tr, Z = I:

      5 times: M = (3 I - Z Y) / 2; Y <- Y M; Z <- M Z          so that Y -> (A / tr)^1/2
      vector = upper triangle of Y sqrt(tr), off-diagonals times sqrt 2

  With T <= p, A has no full rank and five steps are not yet the root: that is the method. The length of the vector is
  that of the matrix, and a product of two vectors the product of two matrices.
- `bilinear` (Lin, RoyChowdhury and Maji, ICCV 2015 [mem]): the mean of x_t x_t^T over t, the tokens as they are, or of
  z_t = V^T (x_t - mu) where `directions` are asked for. Its upper triangle, signed square root, then off-diagonals
  times sqrt 2. The paper's last step, the division by the length, is left to the reader: what is stored keeps its own.
- `mean` and `max` of each number over the tokens.

The basis is mu (d) and V (d, p): mean of training tokens, and leading eigenvectors of their covariance.

Tokens count in float16, as embed_tokens stores them, so that moments of stored tokens and of tokens that an encoder has
just made have the same bits; all arithmetic is in float32, and that of the basis in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fieldmark import store

# Raised when what this module gives for the same tokens changes.
RULES = 1
STEPS = 5
SMALLEST_TRACE = 1e-12
# Images whose moments are made at a time, always as many: in another shape the last bits of a product differ.
CHUNK = 16
# Numbers in 64 bytes: where no row is a multiple of it, the last bits of a product differ by where an image lies.
LANES = 16


class Basis(NamedTuple):
    """Where tokens are measured from, and along what; float32."""

    mean: Tensor  # (d,)
    directions: Tensor  # (d, p), orthonormal columns

    @classmethod
    def stand_in(cls, width: int, directions: int) -> "Basis":
        """One of the same shape that was fitted on nothing, to measure time and bytes with."""
        return cls(torch.zeros(width), torch.eye(width)[:, :directions])

    @property
    def sha256(self) -> str:
        """Of its numbers."""
        return store.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in self))


def length_of(kind: str, width: int, directions: int | None) -> int:
    """The length of a vector that is made of tokens, or of a pooled vector, of `width` numbers."""
    if kind not in ("isqrt", "bilinear"):
        return width
    side = directions or width
    return side * (side + 1) // 2


def pool(kind: str, tokens: Tensor, basis: Basis | None) -> Tensor:
    """Tokens (n, T, d) to one vector an image (n, D), float32 on their device; an image is the same in any company."""
    made = []
    for chunk in tokens.split(CHUNK):
        full = torch.cat([chunk, chunk[-1:].expand(CHUNK - len(chunk), -1, -1)])
        made.append(POOLS[kind](full.half().float(), basis)[: len(chunk)])
    return torch.cat(made)


def isqrt(tokens: Tensor, basis: Basis | None) -> Tensor:
    # mu falls out with the mean of z. Measured from the image's first token, copies of one token are exactly 0.
    z = project(tokens - tokens[:, :1], basis)
    z = z - z.mean(dim=1, keepdim=True)
    covariance = z.transpose(1, 2) @ z / z.shape[1]
    trace = (covariance.diagonal(dim1=1, dim2=2).sum(dim=1) + SMALLEST_TRACE)[:, None, None]
    y = covariance / trace
    identity = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    inverse = identity.expand_as(y)
    for _ in range(STEPS):
        step = torch.baddbmm(1.5 * identity, inverse, y, alpha=-0.5)
        y, inverse = y @ step, step @ inverse
    return upper_triangle(y * trace.sqrt(), side_of(tokens, basis))


def bilinear(tokens: Tensor, basis: Basis | None) -> Tensor:
    z = project(tokens if basis is None else tokens - basis.mean, basis)
    second = z.transpose(1, 2) @ z / z.shape[1]
    return upper_triangle(second.sign() * second.abs().sqrt(), side_of(tokens, basis))


def mean(tokens: Tensor, basis: Basis | None) -> Tensor:
    return tokens.mean(dim=1)


def largest(tokens: Tensor, basis: Basis | None) -> Tensor:
    return tokens.amax(dim=1)


POOLS = {"isqrt": isqrt, "bilinear": bilinear, "mean": mean, "max": largest}


def side_of(tokens: Tensor, basis: Basis | None) -> int:
    return tokens.shape[-1] if basis is None else basis.directions.shape[1]


def project(tokens: Tensor, basis: Basis | None) -> Tensor:
    """Tokens (n, T, d) along the directions: (n, T, p), zeros behind up to a multiple of LANES."""
    tokens = functional.pad(tokens, (0, -tokens.shape[-1] % LANES))
    if basis is None:
        return tokens
    width, directions = basis.directions.shape
    return tokens @ functional.pad(basis.directions, (0, -directions % LANES, 0, -width % LANES))


def upper_triangle(matrices: Tensor, side: int) -> Tensor:
    """Symmetric matrices (n, p, p), of which side x side count, as vectors of the same products with each other."""
    rows, columns = torch.triu_indices(side, side, device=matrices.device)
    weights = matrices.new_full((len(rows),), 2**0.5).masked_fill(rows == columns, 1)
    return matrices[:, rows, columns] * weights


class TokenSums:
    """What a basis is made of, added up in float64 over any number of tokens."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Tokens of any shape (..., d), on the CPU."""
        rows = tokens.half().double().flatten(0, -2)
        self.count += len(rows)
        self.sum += rows.sum(dim=0)
        self.products += rows.T @ rows

    def basis(self, directions: int) -> Basis:
        """The mean, and the leading eigenvectors of the covariance, each with its largest entry positive."""
        mean = self.sum / self.count
        _, vectors = torch.linalg.eigh(self.products / self.count - mean.outer(mean))
        leading = vectors.flip(dims=(1,))[:, :directions]
        signs = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True)).sign()
        return Basis(mean.float(), (leading * signs).float().contiguous())
