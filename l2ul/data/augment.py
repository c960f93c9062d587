"""Data augmentation: random crops and horizontal flips of batches, on the device of the images."""

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.errors import InputError


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Return a random crop of each image, flipped horizontally with probability ½ if `flip`.

    images     (n, 3, H, W)
    padding    pixels of black border that are added on each side before the crop
    generator  a CPU generator; the draws do not depend on the device
    size       side of the square crop; None: the crop has the size of the images
    """
    return crop(images, padding, *crop_positions(len(images), images.shape[2:], padding, flip, generator, size))


def crop_positions(
    count: int, shape: tuple[int, int], padding: int, flip: bool, generator: torch.Generator, size: int | None
) -> tuple[Tensor, Tensor]:
    """Draw `count` random crops of images of `shape` (H, W) with a border of `padding` pixels.

    Returns the rows (count, height) and columns (count, width) of each crop in the padded image. The columns of a
    flipped crop are in descending order. Raises InputError if the padded images are smaller than the crop.
    """
    height, width = (size, size) if size else shape
    choices = [side - cut + 2 * padding + 1 for side, cut in zip(shape, (height, width), strict=True)]
    if min(choices) < 1:
        raise InputError(f"images of {shape[0]} x {shape[1]} pixels are too small for crops of {height} x {width}")
    top, left = (torch.randint(positions, (count, 1), generator=generator) for positions in choices)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    return rows, columns


def crop(images: Tensor, padding: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the crop (n, 3, height, width) of each padded image at its rows and columns from `crop_positions`."""
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (n, H + 2p, W + 2p, 3)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
