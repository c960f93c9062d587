"""The steps of `distill`: images still to be forgotten, and mixes of D_f on which θ⁰ is the teacher."""

import torch
from torch import Tensor

from l2ul.data.augment import augment

MIXED = (0.3, 0.7)  # part of one of two images in a mix


def mixes(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Stand-ins (count, 3, H, W) for the retain set: each a blend of two of the images, shifted and mirrored.

    images  (k, 3, H, W) float in [0,1]. With k = 1, the image is blended with itself turned upside down.
    """
    first = torch.randint(len(images), (count,), generator=generator)
    if len(images) > 1:
        second = images[(first + torch.randint(1, len(images), (count,), generator=generator)) % len(images)]
    else:
        second = images.rot90(2, (2, 3)).expand(count, -1, -1, -1)
    low, high = MIXED
    part = low + (high - low) * torch.rand((count, 1, 1, 1), generator=generator).to(images.device)
    blended = part * images[first] + (1 - part) * second
    return augment(blended, images.shape[-1] // 8, True, generator).to(memory_format=torch.channels_last)
