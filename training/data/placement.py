"""Which parts of a cache lie on the device that trains, and how the others get there, a batch at a time.

An epoch of 5,994 images x 33 nodes x 512 in float16 is 200 MB: on a GPU it stays there, and a batch is cut where it is
used. What does not fit stays where it was read, in memory or on the disk; of that a batch is cut on the CPU, and moved
through pinned memory. A batch holds the same numbers either way.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SHARE = 0.5  # of a GPU's free memory, for parts; the rest is for models and batches

# What was moved, for as long as what it was moved from is there: caches of one study share most of their tensors.
moved: defaultdict[torch.device, WeakTensorKeyDictionary] = defaultdict(WeakTensorKeyDictionary)


def room(device: torch.device) -> int:
    """The bytes that parts may take on a device beside those that are there."""
    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 2**63


def bytes_to_move(tensors: Iterable[Tensor], device: torch.device) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor not in moved[device])


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device: once, whoever asks."""
    known = moved[device]
    if tensor not in known:
        known[tensor] = tensor.to(device)
    there: Tensor = known[tensor]
    return there


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """What was cut for a batch, on the device: as it is where it was cut there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
