"""Random changed copies of images, as images reach a deployed model: cropped, resized, compressed and so on.

A copy is the image after some of these changes. All kinds are vectorised on the device of the images. The strength of
each change is drawn on the CPU from a generator, so that it does not depend on the device.
"""

from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
import math
from typing import NamedTuple

from PIL import Image
import torch
from torch import Tensor
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

from l2ul.common.device import upload

TESTED = ("mirrored", "shifted", "cropped", "resized", "brightness", "noise", "jpeg")  # of images in use
TESTED_ONLY = ("blurred", "distorted")  # kinds on which no method trains
TURNED = "turned"  # the kind on which methods train only
TRAINED = (*TESTED, TURNED)
KINDS = (*TESTED, *TESTED_ONLY)
PROBABILITY = 1 / 3  # of each kind to be in a copy

SHIFT, CROP = 0.15, 0.15  # largest shift, and largest part of a side that a crop removes, relative to the side
SCALES = (0.625, 0.75, 0.875, 1.25, 1.5, 2.0)  # sides to which images are resized and back, relative to the side
ANGLE = 10.0  # largest turn, in degrees
BRIGHTNESS, CONTRAST = 0.1, 0.1  # largest relative change
NOISE = 0.03  # largest standard deviation, for pixels in [0,1]
QUALITY = (40, 95)  # of JPEG
BLUR = (0.3, 0.7)  # standard deviation of the Gaussian, in pixels of an image with a side of 32
DISTORTION, KNOTS = 0.04, 4  # largest displacement of the KNOTS x KNOTS points of the grid, relative to the side

Codec = Callable[[Tensor, Tensor], Tensor]  # takes images (n, C, H, W) in [0,1] and qualities (n,) int64 on the CPU


@torch.no_grad()
def changed_copies(
    images: Tensor,
    generator: torch.Generator,
    kinds: Sequence[str] = TRAINED,
    *,
    probability: float = PROBABILITY,
    strength: float = 1.0,
    codec: Codec | None = None,
) -> Tensor:
    """Return a changed copy of each image, (n, C, H, W) float in [0,1] with 256 levels.

    images       (n, C, H, W) float in [0,1], C is 1 or 3
    generator    a CPU generator; draws which changes a copy has, and how strong they are
    kinds        names of KINDS
    probability  of each kind to be in a copy, independently of the others
    strength     factor of the largest shift, crop, turn, change of brightness and noise
    codec        compresses and decompresses as JPEG; by default `jpeg_on_device`
    """
    copies = _moved(images, generator, kinds, probability, strength)
    if "blurred" in kinds:
        copies = _blurred(copies, _drawn(len(images), probability, generator), generator)
    if "resized" in kinds:
        copies = _resized(copies, _drawn(len(images), probability, generator), generator)
    if "brightness" in kinds:
        copies = _recoloured(copies, _drawn(len(images), probability, generator), generator, strength)
    if "noise" in kinds:
        sigma = strength * NOISE * torch.rand(len(images), generator=generator)
        sigma = upload(sigma * _drawn(len(images), probability, generator), images.device)[:, None, None, None]
        source = torch.Generator(images.device).manual_seed(_seed(generator))
        copies = copies + sigma * torch.randn(copies.shape, generator=source, device=images.device)
    copies = _rounded(copies)
    if "jpeg" in kinds:
        low, high = QUALITY
        quality = torch.randint(low, high + 1, (len(images),), generator=generator)
        chosen = _drawn(len(images), probability, generator).nonzero().flatten()
        if len(chosen):
            place = upload(chosen, images.device)
            coded = (codec or jpeg_on_device)(copies[place], quality[chosen])
            copies = copies.index_copy(0, place, coded)
    return copies.contiguous(memory_format=torch.channels_last)


def _drawn(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Return which of the copies (count,) bool a kind is in, on the CPU."""
    return torch.rand(count, generator=generator) < probability


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _rounded(images: Tensor) -> Tensor:
    return images.clamp(0, 1).mul(255).round().div(255)


def _moved(
    images: Tensor, generator: torch.Generator, kinds: Sequence[str], probability: float, strength: float
) -> Tensor:
    """Mirror, turn, shift, crop and distort, by one interpolation. What is uncovered is black."""
    count, device = len(images), images.device
    scale, shift = torch.ones(count), torch.zeros(count, 2)  # of the window that is cut out, in units of half a side
    sign = torch.ones(count)
    if "mirrored" in kinds:
        sign = 1 - 2 * _drawn(count, probability, generator).float()
    if "cropped" in kinds:
        part = strength * CROP * torch.rand(count, generator=generator) * _drawn(count, probability, generator)
        scale = 1 - part
        shift = shift + part[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
    if "shifted" in kinds:
        drawn = _drawn(count, probability, generator)[:, None]
        shift = shift + drawn * 2 * strength * SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)
    angle = torch.zeros(count)
    if TURNED in kinds:
        drawn = _drawn(count, probability, generator)
        angle = drawn * strength * math.radians(ANGLE) * (2 * torch.rand(count, generator=generator) - 1)
    points = None
    if "distorted" in kinds:
        drawn = _drawn(count, probability, generator)[:, None, None, None]
        points = drawn * 2 * DISTORTION * (2 * torch.rand(count, 2, KNOTS, KNOTS, generator=generator) - 1)
    if points is None and not {"mirrored", "cropped", "shifted", TURNED} & set(kinds):
        return images
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    entries = [sign * cosine, -sine, shift[:, 0], sign * sine, cosine, shift[:, 1]]
    rows = torch.stack(entries, 1).view(count, 2, 3)
    grid = F.affine_grid(upload(rows, device), list(images.shape), align_corners=False)  # (n, H, W, 2)
    if points is not None:
        field = F.interpolate(upload(points, device), images.shape[2:], mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1)
    return F.grid_sample(images.contiguous(), grid, mode="bilinear", align_corners=False)


def _blurred(images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a Gaussian of a random width, as two one-dimensional convolutions with a kernel for each image."""
    low, high = (bound * max(1.0, images.shape[-1] / 32) for bound in BLUR)
    sigma = low + (high - low) * torch.rand(len(images), generator=generator)
    radius = math.ceil(3 * high)
    offsets = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = torch.where(chosen[:, None], kernel / kernel.sum(1, keepdim=True), (offsets == 0).float())
    count, channels, height, width = images.shape
    kernel = upload(kernel, images.device).repeat_interleave(channels, 0)[:, None]  # (n C, 1, 2 radius + 1)
    pad = min(radius, height - 1, width - 1)
    trimmed = kernel[..., radius - pad : radius + pad + 1]
    flat = F.pad(images, [pad] * 4, mode="reflect").reshape(1, count * channels, height + 2 * pad, width + 2 * pad)
    flat = F.conv2d(flat, trimmed[:, :, :, None], groups=count * channels)
    flat = F.conv2d(flat, trimmed[:, :, None, :], groups=count * channels)
    return flat.reshape(images.shape)


def _resized(images: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Resize to one of SCALES and back."""
    scale = torch.randint(len(SCALES), (len(images),), generator=generator)
    height, width = images.shape[2:]
    for index, factor in enumerate(SCALES):
        place = upload((chosen & (scale == index)).nonzero().flatten(), images.device)
        if len(place):
            size = [max(1, round(factor * side)) for side in (height, width)]
            other = F.interpolate(images[place], size, mode="bilinear", antialias=True)
            back = F.interpolate(other, (height, width), mode="bilinear", antialias=True)
            images = images.index_copy(0, place, back)
    return images


def _recoloured(images: Tensor, chosen: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Change brightness, then contrast about the mean of the image."""
    factors = 1 + chosen[:, None] * strength * torch.tensor([BRIGHTNESS, CONTRAST]) * (
        2 * torch.rand(len(images), 2, generator=generator) - 1
    )
    brightness, contrast = upload(factors, images.device)[:, :, None, None, None].unbind(1)
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + contrast * (images - mean)


def jpeg_file(images: Tensor, quality: Tensor) -> Tensor:
    """Compress each image as a JPEG file and decompress it, with Pillow: the codec that images in use go through."""
    coded = [
        _through_file(image, one)
        for image, one in zip(images.mul(255).round().byte().cpu(), quality.tolist(), strict=True)
    ]
    return torch.stack(coded).to(images.device).div(255)


def _through_file(image: Tensor, quality: int) -> Tensor:
    coded = BytesIO()
    transforms.to_pil_image(image).save(coded, "jpeg", quality=quality)
    return transforms.pil_to_tensor(Image.open(coded))


LUMA = (  # quantisation tables of ITU-T T.81, annex K, which libjpeg scales by the quality
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg_on_device(images: Tensor, quality: Tensor) -> Tensor:
    """Compute what compression as JPEG does to images, on their device and without a file.

    The steps are those of the codec: YCbCr, chroma at half the resolution, the cosine transform of blocks of 8 x 8,
    rounding to multiples of the quantisation tables. Results differ from those of `jpeg_file` by rounding and by how
    chroma is interpolated.
    """
    height, width = images.shape[2:]
    unit, tables = 16, _tables(images.device)
    padded = F.pad(images * 255, (0, -width % unit, 0, -height % unit), mode="replicate") - 128
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    scale = upload(scale, images.device)[:, None, None, None, None]
    if images.shape[1] == 1:
        result = _quantised(padded[:, 0], tables.luma * scale, tables.cosines)[:, None]
    else:
        ycc = torch.einsum("ij,njhw->nihw", tables.to_ycc, padded)
        luma = _quantised(ycc[:, 0], tables.luma * scale, tables.cosines)
        half = F.avg_pool2d(ycc[:, 1:], 2)
        steps = (tables.chroma * scale).repeat_interleave(2, 0)
        half = _quantised(half.flatten(0, 1), steps, tables.cosines).view_as(half)
        chroma = F.interpolate(half, padded.shape[2:], mode="bilinear")
        result = torch.einsum("ij,njhw->nihw", tables.to_rgb, torch.cat([luma[:, None], chroma], 1))
    return _rounded((result[:, :, :height, :width] + 128) / 255)


class _Tables(NamedTuple):
    luma: Tensor
    chroma: Tensor
    to_ycc: Tensor
    to_rgb: Tensor
    cosines: Tensor


@cache
def _tables(device: torch.device) -> _Tables:
    """Return the constants of the codec on a device, and the matrix (8, 8) of the cosine transform."""
    k = torch.arange(8.0)
    cosines = torch.cos(math.pi / 8 * k[:, None] * (k + 0.5)) * 0.5
    cosines[0] *= math.sqrt(0.5)
    constants = (torch.tensor(table) for table in (LUMA, CHROMA, TO_YCC, TO_RGB))
    return _Tables(*(one.to(device) for one in (*constants, cosines)))


def _quantised(planes: Tensor, steps: Tensor, cosines: Tensor) -> Tensor:
    """Round the cosine transform of each block of 8 x 8 to multiples of steps.

    planes   (n, H, W) with sides that are multiples of 8
    steps    (n, 1, 1, 8, 8) in percent
    cosines  the matrix (8, 8) of the transform
    """
    count, height, width = planes.shape
    steps = ((steps + 50) / 100).floor().clamp(1, 255)
    blocks = planes.view(count, height // 8, 8, width // 8, 8).transpose(2, 3)
    coefficients = cosines @ blocks @ cosines.T
    coefficients = (coefficients / steps).round() * steps
    return (cosines.T @ coefficients @ cosines).transpose(2, 3).reshape(count, height, width)
