"""Nested tensors: lists and tuples of tensors on the CPU or a GPU, and their copy to a GPU in one piece."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from l2ul.common.device import upload

ALIGNMENT = 16  # bytes; the parts of a packed tensor start at multiples of it

Nested = Tensor | Sequence["Nested"]


def upload_together(values: Nested, device: torch.device) -> Nested:
    """Copy nested tensors to the device. Those on the CPU reach a CUDA GPU in one copy, as parts of one tensor."""
    if device.type == "cuda":
        return spread([upload(one, device) for one in gather(values)], values)
    return values.to(device) if isinstance(values, Tensor) else [upload_together(one, device) for one in values]


def flat(values: Nested) -> list[Tensor]:
    """Return nested tensors as a list."""
    return [values] if isinstance(values, Tensor) else [tensor for one in values for tensor in flat(one)]


def gather(values: Nested) -> list[Tensor]:
    """Return nested tensors as few tensors: those on the CPU packed into one (bytes,) uint8, then the others."""
    tensors = flat(values)
    on_cpu = _on_cpu(tensors)
    others = [one for one in tensors if one.device.type != "cpu"]
    if not on_cpu:
        return others
    packed = torch.empty(sum(map(_space, on_cpu)), dtype=torch.uint8)
    for part, one in zip(_unpacked(packed, on_cpu), on_cpu, strict=True):
        part.copy_(one)
    return [packed, *others]


def spread(gathered: Sequence[Tensor], like: Nested) -> Nested:
    """Return tensors that are nested like `like`: views of what `gather` returns for it, on any device."""
    on_cpu, others = _on_cpu(flat(like)), iter(gathered)
    unpacked = iter(_unpacked(next(others), on_cpu)) if on_cpu else others

    def nested(values: Nested) -> Nested:
        if isinstance(values, Tensor):
            return next(unpacked if values.device.type == "cpu" else others)
        return [nested(one) for one in values]

    return nested(like)


def _on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    return [one for one in tensors if one.device.type == "cpu"]


def _space(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in a packed one."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _unpacked(packed: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """Yield the parts of a packed tensor, with the types and shapes of `like`."""
    start = 0
    for one in like:
        yield packed[start : start + one.nbytes].view(one.dtype).view(one.shape)
        start += _space(one)
