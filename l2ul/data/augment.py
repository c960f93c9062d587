"""Training a classifier from scratch: what there is to unlearn, and the retrained reference that never saw D_f."""

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.errors import InputError


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Each of the images (n, 3, H, W) cropped at a place of its own from itself with a border, and mirrored or not.

    The crop is (size, size), by default the images' own size.
    """
    return _cut(images, padding, *_places(len(images), images.shape[2:], padding, flip, generator, size))


def _places(
    count: int, shape: tuple[int, int], padding: int, flip: bool, generator: torch.Generator, size: int | None
) -> tuple[Tensor, Tensor]:
    """Rows (count, high) and columns (count, wide) that are cut from so many images of a shape, with their border."""
    high, wide = (size, size) if size else shape
    places = [side - cut + 2 * padding + 1 for side, cut in zip(shape, (high, wide), strict=True)]
    if min(places) < 1:
        raise InputError(f"images of {shape[0]} x {shape[1]} pixels are too small for crops of {high} x {wide}")
    top, left = (torch.randint(count_of, (count, 1), generator=generator) for count_of in places)
    rows, columns = top + torch.arange(high), left + torch.arange(wide)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return rows, columns


def _cut(images: Tensor, padding: int, rows: Tensor, columns: Tensor) -> Tensor:
    rows, columns = rows.to(images.device), columns.to(images.device)
    picked = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (n, H + 2p, W + 2p, 3)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return picked[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
