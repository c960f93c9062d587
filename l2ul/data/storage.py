"""Memory for adversarial examples: a tensor in RAM or GPU memory, or a memory-mapped file if they do not fit."""

import math
import os
from pathlib import Path
import shutil
import tempfile

import numpy as np
import torch
from torch import Tensor

from l2ul.common import choices
from l2ul.common.errors import InputError
from l2ul.common.files import require_writable

DTYPES = {name: getattr(torch, name) for name in choices.DTYPES}
IN_MEMORY = 2**30  # bytes that are kept in RAM on a CPU; on a GPU, the limit is half of its free memory


def empty_images(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
    """Return an uninitialised tensor for images (N, 3, H, W): on the device if it fits, else on disk.

    A tensor on disk is a CPU tensor whose memory is a temporary file in `folder`. The operating system reads and writes
    the file as needed, so the tensor can be larger than RAM. The file is deleted when the tensor is.

    Raises InputError if `folder` is not writable or the disk has too little space.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= _memory_limit(device):
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    require_writable(folder)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"the adversarial examples need {size / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB free; "
            f"free some space, or use a smaller --num-adv-images, --unlearn-k or --adv-dtype"
        )
    return _memory_mapped(shape, dtype, size, folder)


def _memory_mapped(shape: tuple[int, ...], dtype: torch.dtype, size: int, folder: Path) -> Tensor:
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps the file until the tensor is deleted
        if hasattr(os, "posix_fallocate"):  # reserve the disk space: writing to a mapped file cannot report a full disk
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, torch.empty(0, dtype=dtype).numpy().dtype, mode="r+", shape=shape))


def as_stored(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert float pixels in [0,1] to `dtype`; for uint8, round them to 0 … 255."""
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)


def _memory_limit(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else IN_MEMORY
