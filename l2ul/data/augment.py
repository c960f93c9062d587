"""Data augmentation: random crops, flips and erased squares of batches, on the device of the images."""

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.errors import InputError
from l2ul.common.nested import upload_together


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Return a random crop of each image, flipped horizontally with probability ½ if `flip`.

    images     (n, 3, H, W)
    padding    pixels of black border that are added on each side before the crop
    generator  a CPU generator; the draws do not depend on the device
    size       side of the square crop; None: the crop has the size of the images
    """
    return crop(images, padding, draw_crops(len(images), images.shape[2:], padding, flip, generator, size), size)


def draw_crops(
    count: int, shape: tuple[int, int], padding: int, flip: bool, generator: torch.Generator, size: int | None = None
) -> Tensor:
    """Draw `count` random crops of images of `shape` (H, W) with a border of `padding` pixels.

    Returns int64 (3, count): the first row and the first column of each crop in the padded image, and 1 if it is
    flipped, else 0. Raises InputError if the padded images are smaller than the crop.
    """
    height, width = (size, size) if size else shape
    choices = [side - cut + 2 * padding + 1 for side, cut in zip(shape, (height, width), strict=True)]
    if min(choices) < 1:
        raise InputError(f"images of {shape[0]} x {shape[1]} pixels are too small for crops of {height} x {width}")
    top, left = (torch.randint(positions, (count,), generator=generator) for positions in choices)
    flipped = (torch.rand(count, generator=generator) < 0.5).long() if flip else torch.zeros_like(top)
    return torch.stack([top, left, flipped])


def crop(images: Tensor, padding: int, crops: Tensor, size: int | None = None) -> Tensor:
    """Return the crop (n, 3, height, width) of each padded image (n, 3, H, W) at its place from `draw_crops` (3, n)."""
    places = pixel_places(crops, *((size, size) if size else images.shape[2:]))
    return pixels_at(images, padding, *upload_together(places, images.device))


def pixel_places(crops: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows (n, height) and columns (n, width) of the pixels of crops (3, n) in the padded images.

    They are computed where `crops` are: on the CPU, a GPU has fewer kernels to launch.
    """
    top, left, flipped = crops[:, :, None]
    forward = torch.arange(width, device=crops.device)
    rows = top + torch.arange(height, device=crops.device)
    return rows, left + torch.where(flipped > 0, width - 1 - forward, forward)


def pixels_at(images: Tensor, padding: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the pixels of each padded image (n, 3, H, W) at its rows (n, height) and columns (n, width)."""
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (n, H + 2p, W + 2p, 3)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def erase(images: Tensor, side: int, centers: Tensor) -> Tensor:
    """Return the images (n, 3, H, W) with a square of `side` pixels of each set to black, as in Cutout.

    centers  (2, n), row and column of the centre of each square, which may be partly outside the image

    All tensors are on one device.
    """
    offsets = [
        torch.arange(length, device=images.device) - center[:, None] + side // 2
        for length, center in zip(images.shape[2:], centers, strict=True)
    ]
    rows, columns = ((offset >= 0) & (offset < side) for offset in offsets)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
