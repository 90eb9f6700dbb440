"""What all families of encoders share."""

import pytest
import torch

from fieldmark.command import UserError
from fieldmark.encoders.base import choose_device

CPU = torch.device("cpu")


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}: ") as error:
            choose_device(name)
        assert "\n" not in str(error.value)
