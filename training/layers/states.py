"""The state of a model, as model.safetensors holds it: tensors by the names of the modules that hold them.

From it, and from a method's settings, its module is made again without the images that it was fitted to (`build` of a
method, training/restore.py).
"""

from collections.abc import Mapping

from torch import Tensor, nn

State = Mapping[str, Tensor]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """As a file takes it: on the CPU, contiguous, and no two tensors of one memory."""
    return {name: value.cpu().contiguous().clone() for name, value in model.state_dict().items()}


def within(state: State, name: str) -> dict[str, Tensor]:
    """The state of one module of the model, by the name that it has there; empty where there is none."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
