"""What all families of encoders share: their contract, numeric types, devices, preprocessing and fingerprint.

A family is a module that loads the encoders of one library (clip.py those of open_clip, towers/timm.py those of timm).
Each gives what `ImageEncoder` names; loading.py chooses between them.
"""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, Protocol

import torch
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms import Compose, PILToTensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.pictures import decode

# Raised when the embeddings that the rules of maps.py, or those below, give for the same weights and picture change.
RULES = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What open_clip, timm and torch raise for files and configurations that are broken or do not fit together.
LOADING_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, EOFError,
    StopIteration, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
# Without a network the hub tries again for a minute or so, and says so in two lines a try.
if "HF_HUB_VERBOSITY" not in os.environ:
    hub_logging.set_verbosity_error()


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an error comes of a model hub that could not be asked, for a file that is not here."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


class ImageEncoder(Protocol):
    """A loaded encoder of images on one device, of whichever family: all that the stages need of it."""

    # Halved while a run goes on where the device has not enough memory (passes.py).
    batch_size: int

    @property
    def name(self) -> str:
        """Its key in params.yaml."""
        ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """A picture to bytes (3, H, W)."""
        ...

    @property
    def normalise(self) -> Callable[[Tensor], Tensor]:
        """Bytes (n, 3, H, W) to float32."""
        ...

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The settings of `preprocess` and `normalise`, by open_clip's names of them."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dimension(self) -> int:
        """D, the length of a vector."""
        ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def dense(self) -> Any:
        """The rule for the cells of the last block (dense.Dense), None for `last`."""
        ...

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, H, W) to the global embeddings (n, D) and the dense tokens (n, h, w, D), float32 on the device.

        Pixels are bytes as `preprocess` gives them, or floats that are normalised already. n is at most `batch_size`.
        Vectors are not of unit length.
        """
        ...


def make_batch(encoder: ImageEncoder, pixels: Tensor) -> Tensor:
    """Pixels (n, 3, H, W), bytes or normalised floats, as a batch (batch_size, 3, H, W) for the encoder's model.

    The batch is padded to `batch_size`, since a batch of another shape changes the last bits of every vector in it.
    """
    pixels = pad_rows(pixels, encoder.batch_size).to(encoder.device)
    if pixels.dtype == torch.uint8:
        pixels = encoder.normalise(pixels)
    return pixels.to(encoder.dtype, memory_format=torch.channels_last)


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are `count`."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows


def check_size(size: int | None, own: int, cell: int, key: str) -> None:
    """Raises UserError for an input size whose last cells would hold less of the picture than at the model's own size.

    Sizes are in pixels a side, and `cell` is what one cell of the map takes of them. Almost every model's own size is a
    whole number of cells, and then the other has to be one too. Libraries leave out the pixels that do not fill a cell,
    or pad them, and do not say so.
    """

    def filled(pixels: int) -> float:
        return pixels / (-(-pixels // cell) * cell)

    if size is not None and filled(size) < filled(own):
        problem = f"{size} pixels are no whole number of cells, {cell} pixels each"
        raise UserError(f"{key}.image_size: {problem}; use {-(-size // cell) * cell}")


def split_transform(
    transform: Compose, device: torch.device
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor]]:
    """A library's preprocessing in two steps: a picture to bytes (3, H, W), and bytes (n, 3, H, W) to float32.

    Both together give the same bits as the library's own. The threads that decode then hand over bytes, a quarter of
    the memory of floats, and no tensor of theirs is large enough for PyTorch to start threads of its own.
    """
    *cut, _, normalize = transform.transforms
    mean, std = (torch.as_tensor(each, device=device)[:, None, None] for each in (normalize.mean, normalize.std))

    def normalise(pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).sub_(mean).div_(std)

    return Compose([*cut, PILToTensor()]), normalise


def encoder_fingerprint(
    model: nn.Module,
    architecture: dict[str, Any],
    preprocessing: dict[str, Any],
    precision: str,
    dense: dict[str, Any] | None = None,
) -> str:
    """The fingerprint of all that changes a vector: these, the rules of our own code and those of decoding.

    The device and the batch size are not in it. `dense` says which rule makes the cells, where that is not `last`.
    """
    identity = {
        "rules": RULES,
        "decoding": decode.RULES,
        "architecture": architecture,
        "weights": weights_sha(model),
        "preprocessing": preprocessing,
        "precision": precision,
    } | ({} if dense is None else {"dense": dense})
    return store.sha256(store.canonical_json(identity))


def weights_sha(model: nn.Module) -> str:
    """sha256 over every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
