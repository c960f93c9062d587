"""D_adv where it fits: a tensor on the device, or one temporary file that is read a batch at a time."""

import copy
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
IN_MEMORY = 2**30  # bytes that may stay in the memory of a CPU; of a GPU, half of what is free


class DiskImages:
    """Images (N, 3, H, W) in a file without a name, gone with the process: written by slices, read by indices."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path):
        self.shape, self.dtype = torch.Size(shape), dtype
        self._numpy = torch.empty(0, dtype=dtype).numpy().dtype
        self._image_bytes = math.prod(shape[1:]) * self._numpy.itemsize
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as this object
        if hasattr(os, "posix_fallocate") and len(self):  # so that nothing else takes the room meanwhile
            os.posix_fallocate(self._file.fileno(), 0, len(self) * self._image_bytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, part: slice, images: Tensor) -> None:
        self._file.seek(part.start * self._image_bytes)
        self._file.write(images.contiguous(memory_format=torch.contiguous_format).cpu().numpy().tobytes())
        self._file.flush()

    def __getitem__(self, indices: Tensor | slice) -> "Tensor | DiskImages":
        """The images at `indices`; of a slice from the start, the same file with fewer images."""
        if isinstance(indices, slice):
            if indices.start or indices.step:
                raise ValueError(f"{indices} is not the head of a set")
            head = copy.copy(self)
            head.shape = torch.Size((indices.stop, *self.shape[1:]))
            return head
        found = np.empty((len(indices), *self.shape[1:]), self._numpy)
        for image, index in zip(found, indices.tolist(), strict=True):
            self._file.seek(index * self._image_bytes)
            image[...] = np.frombuffer(self._file.read(self._image_bytes), self._numpy).reshape(image.shape)
        return torch.from_numpy(found)


def empty_images(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor | DiskImages:
    """Room for images (N, 3, H, W): on the device where they fit well, else in a temporary file in `folder`.

    Raises InputError where the disk has no room for them.
    """
    wanted = math.prod(shape) * dtype.itemsize
    if wanted <= _room(device):
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    require_writable(folder)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise InputError(
            f"the adversarial examples take {wanted / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB left; "
            f"make room, or take a smaller --num-adv-images, --unlearn-k or --adv-dtype"
        )
    return DiskImages(shape, dtype, folder)


def as_stored(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Float pixels in [0,1] as they are kept: 8-bit ones rounded to 0 … 255."""
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)


def _room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else IN_MEMORY
