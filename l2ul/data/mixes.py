"""Images made of D_f, which `distill` uses in place of D_r: blends, copies, patches, crops and mixed spectra.

Each function takes `images` (k, 3, H, W) float in [0,1] and returns `count` new images (count, 3, H, W). The draws come
from a CPU generator and do not depend on the device.
"""

import math

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.device import upload
from l2ul.data.augment import augment

MIXED = (0.3, 0.7)  # range of the weight of the first image in a blend
PATCH = (0.4, 0.75)  # range of the side of a patch, as a share of the image's side
CROP = (0.5, 0.8)  # range of the side of a crop, likewise
ROTATION = 15.0  # largest angle of a crop, in degrees
HUE = (45.0, 315.0)  # range of the rotation of hues, in degrees
CONTRAST = (0.6, 1.4)  # range of the factor of differences from the mean of an image
GAIN = (0.75, 1.25)  # range of the factor of each colour channel of a crop
AMPLITUDE = (0.3, 0.9)  # range of the weight of the second image's amplitude in a mixed spectrum


def mixes(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Blend two different images with weights from MIXED, and shift and mirror the result at random.

    If k = 1, the image is blended with itself rotated by 180 degrees.
    """
    first, second = _pairs(images, count, generator)
    weight = upload(_uniform(MIXED, (count, 1, 1, 1), generator), images.device)
    return _shifted(weight * first + (1 - weight) * second, generator)


def triples(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Blend three images with weights that are uniform over all triples of sum 1, shifted and mirrored at random."""
    chosen = _drawn(images, (3, count), generator)
    weights = -torch.rand((3, count, 1, 1, 1), generator=generator).clamp_min(1e-6).log()
    return _shifted((upload(weights / weights.sum(0), images.device) * chosen).sum(0), generator)


def copies(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Shift and mirror images at random."""
    return _shifted(_drawn(images, (count,), generator), generator)


def recoloured(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rotate the hue of an image by an angle from HUE and change its contrast, and shift and mirror it at random.

    The rotation is about the grey axis of the colour space. Grey images (k, 1, H, W) only change their contrast.
    """
    chosen = _drawn(images, (count,), generator)
    angle = torch.deg2rad(_uniform(HUE, (count,), generator))
    contrast = _uniform(CONTRAST, (count, 1, 1, 1), generator)
    if images.shape[1] == 3:
        across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        rotation = cosine * torch.eye(3) + sine * across + (1 - cosine) / 3
        chosen = torch.einsum("nij,njhw->nihw", upload(rotation, images.device), chosen)
    mean = chosen.mean((1, 2, 3), keepdim=True)
    return _shifted((mean + upload(contrast, images.device) * (chosen - mean)).clamp(0, 1), generator)


def patches(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Paste a square of one image into another at the same place, and shift and mirror the result at random.

    Yun et al., CutMix (ICCV 2019, arXiv 1905.04899).
    """
    first, second = _pairs(images, count, generator)
    side = _uniform(PATCH, (count, 1), generator)
    inside = []
    for length in images.shape[2:]:
        start = torch.rand((count, 1), generator=generator) * (1 - side)
        place = (torch.arange(length) + 0.5) / length
        inside.append((place >= start) & (place < start + side))
    mask = upload(inside[0][:, None, :, None] & inside[1][:, None, None, :], images.device)
    return _shifted(torch.where(mask, second, first), generator)


def crops(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Enlarge a random part of an image, rotate and mirror it, and change the gain of each colour channel.

    The part is a square with a side from CROP, rotated by at most ROTATION degrees.
    """
    chosen = _drawn(images, (count,), generator)
    scale = _uniform(CROP, (count,), generator)
    angle = _uniform((-math.radians(ROTATION), math.radians(ROTATION)), (count,), generator)
    centre = _uniform((-1, 1), (count, 2), generator) * (1 - scale[:, None])
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([mirror * cosine, -sine, centre[:, 0], mirror * sine, cosine, centre[:, 1]], 1)
    grid = F.affine_grid(upload(rows.view(count, 2, 3), images.device), list(chosen.shape), align_corners=False)
    part = F.grid_sample(chosen, grid, padding_mode="reflection", align_corners=False)
    gain = upload(_uniform(GAIN, (count, images.shape[1], 1, 1), generator), images.device)
    return (gain * part).clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def spectra(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Combine the phase of one image's spectrum with a blend of the amplitudes of two, shifted and mirrored at random.

    Xu et al., A Fourier-based Framework for Domain Generalization (CVPR 2021, arXiv 2105.11120).
    """
    first, second = (torch.fft.rfft2(part.contiguous()) for part in _pairs(images, count, generator))
    weight = upload(_uniform(AMPLITUDE, (count, 1, 1, 1), generator), images.device)
    amplitude = (1 - weight) * first.abs() + weight * second.abs()
    mixed = torch.fft.irfft2(torch.polar(amplitude, first.angle()), s=images.shape[2:])
    return _shifted(mixed.clamp(0, 1), generator)


def _drawn(images: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw images (*shape, C, H, W), each with the same probability."""
    return images[upload(torch.randint(len(images), shape, generator=generator), images.device)]


def _pairs(images: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` pairs of different images; if k = 1, the second is the first rotated by 180 degrees."""
    first = torch.randint(len(images), (count,), generator=generator)
    if len(images) > 1:
        other = (first + torch.randint(1, len(images), (count,), generator=generator)) % len(images)
        second = images[upload(other, images.device)]
    else:
        second = images.rot90(2, (2, 3)).expand(count, -1, -1, -1)
    return images[upload(first, images.device)], second


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    return augment(images, images.shape[-1] // 8, True, generator).contiguous(memory_format=torch.channels_last)
