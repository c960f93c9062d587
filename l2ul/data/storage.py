"""Memory for many images.

Adversarial examples are in a tensor in RAM or GPU memory, or in a memory-mapped file if they do not fit. Decoded images
of a folder are kept in RAM or GPU memory if they fit.
"""

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
            f"the adversarial examples need {size / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB free",
            "free some space",
            "use a smaller --num-adv-images, --unlearn-k or --adv-dtype",
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


class DecodedImages:
    """Images on disk that stay in memory on a device after they were decoded once, if all of them fit.

    They may take half as much memory as adversarial examples, so that both have room.

    count    number of images
    whole    the images of which these are a part, at `indices`; they share its memory if all of it fits
    """

    def __init__(self, count: int, whole: "DecodedImages | None" = None, indices: Tensor | None = None):
        self.count, self._whole, self._indices = count, whole, indices
        self._pixels: Tensor | None = None
        self._is_decoded = torch.zeros(count, dtype=torch.bool)

    def __getstate__(self) -> dict[str, object]:
        """Return the state for another process, which decodes for itself."""
        return vars(DecodedImages(self.count, self._whole, self._indices))

    def part(self, indices: Tensor) -> "DecodedImages":
        """Return those of a part of the images."""
        return DecodedImages(len(indices), self, indices)

    def memory(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the memory for images uint8 of `shape` (C, H, W) on the device; None if they do not fit.

        Returns the pixels (N, C, H, W), which of them are decoded (N,) bool, and the place (count,) of each image; the
        last two on the CPU.
        """
        shared = self._whole.memory(shape, device) if self._whole else None
        if shared:
            pixels, is_decoded, places = shared
            return pixels, is_decoded, places[self._indices]
        if self._pixels is None or self._pixels.device.type != device.type:
            if self.count * math.prod(shape) > _memory_limit(device) // 2:
                return None
            with torch.inference_mode(False):  # later passes write to it outside of inference mode as well
                self._pixels = torch.empty((self.count, *shape), dtype=torch.uint8, device=device)
            self._is_decoded.zero_()
        return self._pixels, self._is_decoded, torch.arange(self.count)


def _memory_limit(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else IN_MEMORY
