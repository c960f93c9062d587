"""Floating-point precision of the passes through a model: fp32, tf32 or bf16."""

import torch

from l2ul.common.choices import PRECISIONS
from l2ul.common.errors import InputError


def use(device: torch.device, precision: str) -> None:
    """Set the precision of matrix products and convolutions in this process.

    precision  one of `choices.PRECISIONS`: fp32 (24 bits of significand), tf32 (11 bits) or bf16 (8 bits)

    bf16 applies inside `autocast`; other passes then use tf32 on a GPU and fp32 on a CPU. Raises InputError if the
    device has no hardware for the precision: without it, bf16 on a CPU is ten times slower than fp32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    on_cpu = precision == "bf16" and device.type == "cpu" and has_amx()
    if precision != "fp32" and device.type != "cuda" and not on_cpu:
        needed = "a CUDA GPU, or a CPU with AMX" if precision == "bf16" else "a CUDA GPU"
        raise InputError(f"--precision {precision} needs {needed}; use --precision fp32 on this device")
    # torch has an older and a newer interface; after the newer one is used, reading the older one raises an error
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def has_amx() -> bool:
    """Return whether this CPU has AMX, the matrix units for bf16 (Intel, since Sapphire Rapids)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older versions of torch
    return bool(capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which passes through a model are in bf16 if that is the precision, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
