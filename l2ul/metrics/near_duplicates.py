"""Count the images of D_r that are near-duplicates of an image of D_f.

A model that trained on a near-duplicate of an image has learned that image twice.
"""

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.precision import exactly
from l2ul.data.folder import FolderImages
from l2ul.data.images import as_pixels, batches

SIDE = 32  # pixels; larger images are averaged down to this size
THRESHOLD = 0.95  # pixel correlation from which on two images count as near-duplicates


@torch.inference_mode()
@exactly()
def count_near_duplicates(
    forget: Tensor, retain: Tensor | FolderImages, device: torch.device, batch_size: int = 1024, workers: int = 0
) -> int:
    """Return how many images of D_r are near-duplicates of at least one image of D_f or of its mirror image.

    forget      D_f (k, 3, H, W), uint8 or float in [0,1]
    retain      D_r (N, 3, H, W), likewise, of the same size
    batch_size  images of D_r that are compared at once
    workers     processes that decode FolderImages

    Two images are near-duplicates if the correlation of their pixels, over all positions and channels, is at least
    THRESHOLD. Correlation ignores differences in brightness and contrast. An image of one colour has no correlation and
    is no near-duplicate of any image. Correlations are in fp32 on every device: TF32 would move them across THRESHOLD.
    """
    originals = torch.cat([_standardised(as_pixels(part.to(device))) for part in forget.split(batch_size)])
    mirrored = torch.cat([_standardised(as_pixels(part.to(device)).flip(3)) for part in forget.split(batch_size)])
    references = torch.cat([originals, mirrored])  # (2k, D)
    count = 0
    for batch in batches(retain, batch_size, device, workers):
        correlations = _standardised(batch) @ references.T  # (n, 2k)
        count += int((correlations.amax(1) >= THRESHOLD).sum())
    return count


def _standardised(pixels: Tensor) -> Tensor:
    """Return images (n, 3, H, W) as rows (n, D) of mean 0 and norm 1, whose dot products are correlations.

    The row of an image of one colour is 0.
    """
    small = F.adaptive_avg_pool2d(pixels, [min(SIDE, side) for side in pixels.shape[2:]]).flatten(1)
    centred = small - small.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-4, centred / length.clamp_min(1e-4), 0)
