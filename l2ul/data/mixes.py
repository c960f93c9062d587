"""Mixes: blends of images of D_f, which `distill` uses in place of D_r."""

import torch
from torch import Tensor

from l2ul.common.device import upload
from l2ul.data.augment import augment

MIXED = (0.3, 0.7)  # range of the weight of the first image in a blend


def mixes(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` mixes (count, 3, H, W): each a blend of two different images, randomly shifted and mirrored.

    images  (k, 3, H, W) float in [0,1]; if k = 1, the image is blended with itself rotated by 180 degrees
    """
    first = torch.randint(len(images), (count,), generator=generator)
    if len(images) > 1:
        other = (first + torch.randint(1, len(images), (count,), generator=generator)) % len(images)
        second = images[upload(other, images.device)]
    else:
        second = images.rot90(2, (2, 3)).expand(count, -1, -1, -1)
    low, high = MIXED
    weight = low + (high - low) * upload(torch.rand((count, 1, 1, 1), generator=generator), images.device)
    blended = weight * images[upload(first, images.device)] + (1 - weight) * second
    return augment(blended, images.shape[-1] // 8, True, generator).to(memory_format=torch.channels_last)
