"""In how many bits a processor multiplies: as exactly as it can, or faster."""

import torch

from l2ul.common.choices import PRECISIONS
from l2ul.common.errors import InputError


def use(device: torch.device, precision: str) -> None:
    """Set this process up for a precision: factors have 24 bits in fp32, 11 in tf32, 8 in bf16.

    bf16 is for the passes inside `autocast`; what is outside it is then tf32 on a GPU and fp32 on a CPU. Raises
    InputError where the device has no units for it: a CPU without them is ten times slower with bf16 than without.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    on_cpu = precision == "bf16" and device.type == "cpu" and has_amx()
    if precision != "fp32" and device.type != "cuda" and not on_cpu:
        where = "a CUDA GPU, or a CPU with AMX" if precision == "bf16" else "a CUDA GPU"
        raise InputError(f"--precision {precision} needs {where} (others are slower with it, or no faster); use fp32")
    # the older of torch's two ways to say it: with the newer one, whoever asks in the older way gets an error
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def has_amx() -> bool:
    """Whether this CPU has tile units for bf16 (on x86, since Sapphire Rapids)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # a newer torch only
    return bool(capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Passes through a model inside this block are in bf16 if that is the precision, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
