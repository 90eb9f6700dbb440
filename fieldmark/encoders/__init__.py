"""Encoders of images and texts: loading them, what their maps hold, and how pictures pass through them.

torchvision and timm are imported here, before any module of this package can: each of them loads PyTorch's compiler as
it is imported, which takes a second or two. torchvision only wants to ask it something later, and timm to keep it from
some methods of a family of ViTs. What --compile compiles are blocks (passes.py), of which these are none.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo.utils"


class Later(ModuleType):
    """Stands where torchvision looks for the compiler's one function that it takes; what else is asked loads it."""

    @staticmethod
    def is_compile_supported(device: str) -> Any:
        return import_module(COMPILER).is_compile_supported(device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks for __file__ of every module
            raise AttributeError(name)
        sys.modules.pop(self.__name__, None)
        return getattr(import_module(self.__name__), name)


def unchanged(fn: Any = None, recursive: Any = True, *, reason: Any = None) -> Any:
    """In the place of torch.compiler.disable."""
    return unchanged if fn is None else fn


@contextmanager
def without_compiler() -> Iterator[None]:
    """While torchvision and timm are imported; where the compiler is loaded already, nothing is to be saved."""
    if COMPILER in sys.modules:
        yield
        return
    disable, later = torch.compiler.disable, Later(COMPILER)
    sys.modules[COMPILER], torch.compiler.disable = later, unchanged
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(COMPILER) is later:
            del sys.modules[COMPILER]


with without_compiler():
    import timm  # noqa: F401
    import torchvision  # noqa: F401
