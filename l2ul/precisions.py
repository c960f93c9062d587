"""In how many bits a GPU multiplies: as exactly as it can, or faster."""

import torch

from l2ul.errors import InputError

PRECISIONS = ("fp32", "tf32", "bf16")


def use(device: torch.device, precision: str) -> None:
    """Set this process up for a precision: factors have 24 bits in fp32, 11 in tf32, 8 in bf16.

    bf16 is for the passes inside `autocast`; whatever is outside it is then tf32. Raises InputError where there is no
    CUDA GPU: a CPU without the instructions is ten times slower with bf16 than without.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if precision != "fp32" and device.type != "cuda":
        raise InputError(f"--precision {precision} needs a CUDA GPU (a CPU is slower with it, or no faster); use fp32")
    # the older of torch's two ways to say it: with the newer one, whoever asks in the older way gets an error
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Passes through a model inside this block are in bf16 if that is the precision, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
