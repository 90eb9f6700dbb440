"""How an encoder's head projects the pooled vector into the space of texts, where it does so by a matrix."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fieldmark.command import UserError
from training.data.part import Part
from training.data.rows import EncoderFiles


@dataclass(frozen=True)
class Projection(Part):
    """The vector of an image in that space, before it is made of unit length, is weight @ pooled + bias.

    A batch has nothing of it: a method keeps the part.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"projection"})

    weight: Tensor  # (D, d) float32
    bias: Tensor  # (D,) float32, zero where the head has none

    @classmethod
    def files(cls, encoder: str, words: Collection[str]) -> dict[str, str]:
        return {f"embed/{encoder}/projection.safetensors": "safetensors"}

    @classmethod
    def read(cls, source: EncoderFiles) -> Self:
        path = source.folder / f"embed/{source.encoder}/projection.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: is not readable ({error}); remove it, and run pool_tokens again") from None
        if "weight" not in tensors:
            raise UserError(
                f"{path}: holds no matrix: the head of {source.encoder} projects by more than one, or not at all;"
                " choose another encoder, or a method that does not read `projection`"
            )
        weight = tensors["weight"].float()
        return cls(weight, tensors["bias"].float() if "bias" in tensors else torch.zeros(len(weight)))

    def cut(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def take(self, images: Tensor, rows: Tensor) -> Self:
        return self
