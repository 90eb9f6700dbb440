"""What PyTorch computes on: the device, its number types, and bits that are the same each time."""

import os

import torch

from fieldmark.command import UserError


def choose_device(name: str, key: str = "--device") -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none.

    Raises UserError, which says `key`, for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key} {name}: cannot be used here ({reason}); write auto or cpu") from None


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices itself; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def keep_float32() -> None:
    """Have a GPU take float32 for what it is: products and convolutions may be rounded to TF32, of 10 bits, else."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # convolutions have a switch of their own, which is on by default


def set_up_torch() -> None:
    """For a process that trains: the same bits each time on one machine with one thread count, and no TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not promise the same bits
    keep_float32()
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    # The first optimizer would load PyTorch's compiler, which takes a second or two, to have these methods left alone.
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(torch.optim.Optimizer, name).__wrapped__
        setattr(method, "__dynamo_disable", method)
