"""Images of D_r that are nearly the same as one of D_f: what a net is to forget of the one it learns from the other."""

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.data.folder import FolderImages
from l2ul.data.images import as_pixels, batches

SIDE = 32  # pixels; larger images are averaged down to it
LIKE = 0.95  # correlation of pixels from which on two images count as nearly the same


@torch.inference_mode()
def count_near_duplicates(
    forget: Tensor, retain: Tensor | FolderImages, device: torch.device, batch_size: int = 1024, workers: int = 0
) -> int:
    """How many images of D_r have a correlation of pixels of LIKE or more with an image of D_f, or its mirror image.

    forget      D_f (k, 3, H, W), retain D_r (N, 3, H, W): uint8 or float in [0,1], of the same size
    batch_size  images of D_r at once, decoded by so many workers where they are on disk

    Correlations are over all pixels and channels of an image, 1 for images that differ in brightness or contrast alone.
    An image of one colour has none, so is like no other. A near-duplicate counts once, whatever it is like.
    """
    wanted = torch.cat([_standardised(as_pixels(part.to(device))) for part in forget.split(batch_size)])
    mirrored = torch.cat([_standardised(as_pixels(part.to(device)).flip(3)) for part in forget.split(batch_size)])
    both = torch.cat([wanted, mirrored])  # (2k, D)
    found = 0
    for batch in batches(retain, batch_size, device, workers):
        alike = _standardised(batch) @ both.T  # (n, 2k)
        found += int((alike.amax(1) >= LIKE).sum())
    return found


def _standardised(pixels: Tensor) -> Tensor:
    """Images (n, 3, H, W) as rows (n, D) of mean 0 and length 1, whose products are correlations; 0 for one colour."""
    small = F.adaptive_avg_pool2d(pixels, [min(SIDE, side) for side in pixels.shape[2:]]).flatten(1)
    centred = small - small.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-4, centred / length.clamp_min(1e-4), 0)
