"""The device, its number types, and bits that are the same each time."""

import os

import pytest
import torch

from fieldmark.command import UserError
from fieldmark.devices import choose_device, keep_float32, set_up_torch

CPU = torch.device("cpu")


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto") == (torch.device("cuda", 0) if torch.cuda.is_available() else CPU)
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=rf"^--device {name}: cannot be used here \([^\n]+\); write auto or cpu$"):
            choose_device(name)


def test_auto_is_the_gpu_where_pytorch_says_that_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu = torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cpu") == CPU
    if has_gpu:
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    else:
        with pytest.raises(UserError, match=r"^--device cuda: cannot be used here"):
            choose_device("auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error_that_names_its_key() -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: train\.device: cuda: cannot be used here"):
        choose_device("cuda", "params.yaml: train.device:")


def test_products_are_as_wide_and_as_repeatable_as_pytorch_can() -> None:
    set_up_torch()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_float32_is_no_tf32_whatever_was_asked_before() -> None:
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=True):
        torch.set_float32_matmul_precision("high")
        keep_float32()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not cudnn.allow_tf32
