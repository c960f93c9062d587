"""Floating-point precision of the passes through a model: fp32, tf32 or bf16."""

from collections.abc import Iterator
import contextlib
import copy
import time
import warnings

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul.common.bn_folding import folded
from l2ul.common.choices import AUTO, BF16, FULL, PRECISIONS
from l2ul.common.errors import InputError
from l2ul.common.modes import frozen

GAIN = 1.1  # bf16 has to be faster than fp32 by this factor
MEASURED_SECONDS = 0.7  # at least, of steps in both precisions
_exact = False  # whether code inside `exactly` runs


def resolve(precision: str | None, device: torch.device) -> str:
    """Return the precision that --precision names on a device: one of `choices.PRECISIONS`, or "auto".

    None, the default, is tf32 on a CUDA GPU and fp32 on other devices. "auto" is bf16 on a GPU with hardware for it,
    and fp32 on devices without. It stays "auto" on a CPU with instructions for bf16, where `fastest` has to measure.
    """
    if precision is None:
        return "tf32" if device.type == "cuda" else "fp32"
    if precision != AUTO:
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return AUTO if device.type == "cpu" and has_bf16() else "fp32"


def resolve_loop(precision: str, device: torch.device) -> str:
    """Return the precision that --loop-precision names on a device: one of `choices.LOOP_PRECISIONS`, or "auto".

    "auto" is resolved as by `resolve`. Raises InputError if the device has no hardware for bf16.
    """
    if precision == AUTO:
        chosen = resolve(AUTO, device)
        return FULL if chosen == "fp32" else chosen
    if precision == BF16:
        require(device, BF16, "use --loop-precision full on this device")
    return precision


def use(device: torch.device, precision: str) -> None:
    """Set the precision of matrix products and convolutions in this process.

    precision  one of `choices.PRECISIONS`: fp32 (24 bits of significand), tf32 (11 bits) or bf16 (8 bits)

    bf16 applies inside `autocast`; other passes then use tf32 on a GPU and fp32 on a CPU. Raises InputError if the
    device has no hardware for the precision: without it, bf16 on a CPU is ten times slower than fp32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    require(device, precision, "use --precision fp32 on this device")
    _set_flags(["ieee" if precision == "fp32" else "tf32"] * 3)


def require(device: torch.device, precision: str, remedy: str) -> None:
    """Raise InputError, which ends with the remedy, if the device has no hardware for the precision."""
    if not is_supported(device, precision):
        needed = "a CUDA GPU" + (", or a CPU with AMX or AVX512-BF16" if precision == BF16 else "")
        raise InputError(f"{precision} needs {needed}", remedy)


def is_supported(device: torch.device, precision: str) -> bool:
    """Return whether the device has hardware for the precision; see `use`."""
    on_cpu = precision == "bf16" and device.type == "cpu" and has_bf16()
    return precision == "fp32" or device.type == "cuda" or on_cpu


@contextlib.contextmanager
def temporarily(device: torch.device, precision: str) -> Iterator[None]:
    """Use a precision inside the block, and the previous one afterwards; see `use`."""
    before = [operation.fp32_precision for operation in _operations()]
    use(device, precision)
    try:
        yield
    finally:
        _set_flags(before)


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Compute all passes in fp32 inside the block: for verdicts, which must not depend on the chosen precision."""
    global _exact
    before, _exact = _exact, True
    try:
        with temporarily(torch.device("cpu"), "fp32"):
            yield
    finally:
        _exact = before


def _operations() -> tuple[object, object, object]:
    """Return the switches of torch for matrix products, convolutions and recurrent layers on a GPU."""
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def _set_flags(values: list[str]) -> None:
    # torch has an older and a newer interface, and reading the older one raises an error where the two disagree
    with warnings.catch_warnings(action="ignore"):  # torch recommends the newer one
        torch.backends.cuda.matmul.allow_tf32 = values[0] == "tf32"
        torch.backends.cudnn.allow_tf32 = values[1] == "tf32"
    for operation, value in zip(_operations(), values, strict=True):
        operation.fp32_precision = value


def has_bf16() -> bool:
    """Return whether this CPU has AMX or AVX512-BF16, as Intel's since Cooper Lake and AMD's since Zen 4."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older versions of torch
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which passes through a model are in bf16 if that is the precision, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def passes_in(model: nn.Module, precision: str) -> Iterator[None]:
    """Compute forward and backward passes of a model in bf16 inside the block, if that is the precision.

    precision  one of `choices.LOOP_PRECISIONS`

    The weights, their gradients and the logits stay in float32. A copy of the model that is made inside the block, such
    as a teacher, computes as the model does. Inside `exactly`, the passes are in fp32.
    """
    if precision != BF16:
        yield
        return
    entered: list[torch.autocast] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # without the cache of casts: inside an autocast of the caller it would keep the weights of the first step
        context = torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=not _exact, cache_enabled=False)
        context.__enter__()
        entered.append(context)

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], logits: object) -> Tensor | None:
        entered.pop().__exit__(None, None, None)
        if isinstance(logits, Tensor) and logits.dtype == torch.bfloat16:  # it is None if the pass failed
            return logits.float()
        return None

    with model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True):
        yield


def fastest(model: nn.Module, images: Tensor, *, trains: bool) -> tuple[str, dict[str, float]]:
    """Measure a step of a model on a CPU in fp32 and in bf16; return the faster precision and the seconds of both.

    images  (n, C, H, W) float in [0,1], a few inputs of the model, n ≥ 2
    trains  whether a step computes the gradients of the weights in train mode, as in training; otherwise those of the
            pixels, as in the attack

    bf16 is faster where a network has many channels, and slower where it has few, on the same CPU. It has to be faster
    by GAIN. The model itself is not changed.
    """
    net = copy.deepcopy(model).train(trains).requires_grad_(True)
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # dropout
        if not trains:
            stack.enter_context(folded(net, images))
            stack.enter_context(frozen(net))
        now = time.perf_counter()
        while len(times["bf16"]) < 3 or sum(map(sum, times.values())) < MEASURED_SECONDS:
            for precision, values in times.items():
                _step(net, images, precision)
                before, now = now, time.perf_counter()
                values.append(now - before)
    seconds = {precision: min(values) for precision, values in times.items()}  # the first step prepares kernels
    return ("bf16" if seconds["fp32"] > GAIN * seconds["bf16"] else "fp32"), seconds


def _step(net: nn.Module, images: Tensor, precision: str) -> None:
    pixels = images.detach().requires_grad_(not net.training)
    with autocast(images.device, precision):
        logits = net(pixels)
    loss = F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64))
    torch.autograd.grad(loss, list(net.parameters()) if net.training else [pixels], allow_unused=True)


def quantised(weights: Tensor, bits: int) -> Tensor:
    """Return weights after symmetric quantisation to integers of this many bits, with a scale for each row.

    weights  of any shape; a row is an output channel. Those of one dimension (biases, scales) are returned as they are
    bits     at least 2; the integers are those from -2^(bits-1) + 1 to 2^(bits-1) - 1
    """
    if weights.ndim < 2:
        return weights
    largest = 2 ** (bits - 1) - 1
    scale = weights.abs().amax(tuple(range(1, weights.ndim)), keepdim=True).clamp_min(1e-12) / largest
    return (weights / scale).round() * scale
