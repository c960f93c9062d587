"""Random changed copies of images, as images reach a deployed model: cropped, resized, compressed and so on.

A copy is the image after some of these changes. `Changes.draw` draws which changes a copy has and how strong they are,
on the CPU from a generator, so that they do not depend on the device. `Changes.make` computes all copies at once on the
device of the images.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
import math
from typing import ClassVar, NamedTuple

from PIL import Image
import torch
from torch import Tensor
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

from l2ul.common.device import upload
from l2ul.common.nested import Nested

TESTED = ("mirrored", "shifted", "cropped", "resized", "brightness", "noise", "jpeg")  # of images in use
TESTED_ONLY = ("blurred", "distorted")  # kinds on which no method trains
TURNED = "turned"  # the kind on which methods train only
TRAINED = (*TESTED, TURNED)
KINDS = (*TESTED, *TESTED_ONLY)
PROBABILITY = 1 / 3  # of each kind to be in a copy
AT_ONCE = 2**24  # values of pixels that are changed at once, which limits the memory

SHIFT, CROP = 0.15, 0.15  # largest shift, and largest part of a side that a crop removes, relative to the side
SCALES = (0.625, 0.75, 0.875, 1.25, 1.5, 2.0)  # sides to which images are resized and back, relative to the side
ANGLE = 10.0  # largest turn, in degrees
BRIGHTNESS, CONTRAST = 0.1, 0.1  # largest relative change
NOISE = 0.03  # largest standard deviation, for pixels in [0,1]
QUALITY = (40, 95)  # of JPEG
BLUR = (0.3, 0.7)  # standard deviation of the Gaussian, in pixels of an image with a side of 32
DISTORTION, KNOTS = 0.04, 4  # largest displacement of the KNOTS x KNOTS points of the grid, relative to the side

Codec = Callable[[Tensor, Tensor], Tensor]  # takes images (n, C, H, W) in [0,1] and qualities (n,) int64


class Changes:
    """Makes a changed copy of each image.

    kinds        names of KINDS, or TURNED
    probability  of each kind to be in a copy, independently of the others
    strength     factor of the largest shift, crop, turn, change of brightness and noise
    codec        compresses and decompresses as JPEG; by default `jpeg_on_device`
    """

    def __init__(
        self,
        kinds: Sequence[str] = TRAINED,
        *,
        probability: float = PROBABILITY,
        strength: float = 1.0,
        codec: Codec | None = None,
    ):
        stages = (Moved, Blurred, Resized, Recoloured, Noisy, Rounded, Compressed)
        options = kinds, probability, strength, codec or jpeg_on_device
        self._stages = [stage(*options) for stage in stages if stage.needed_for & set(kinds)]

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[list[Tensor]]:
        """Draw the random numbers of copies of images of a shape (n, C, H, W).

        generator  a CPU generator
        device     where noise is drawn; all other numbers are on the CPU
        """
        return [stage.draw(shape, generator, device) for stage in self._stages]

    @torch.no_grad()
    def make(self, images: Tensor, numbers: Nested) -> Tensor:
        """Return a copy of each image, (n, C, H, W) float in [0,1] with 256 levels, with numbers of `draw`.

        images   (n, C, H, W) float in [0,1], C is 1 or 3
        numbers  of `draw`. On a GPU, if they are there too, the CPU does not wait, so that a CUDA graph can capture
                 the computation. If they are on the CPU, changes are computed for the copies that have them alone.
        """
        if not len(images):  # which grid_sample does not accept
            return images
        size = max(1, AT_ONCE // images[0].numel())
        parts = [[one.split(size) for one in own] for own in numbers]
        made = [
            self._make(part, [[one[place] for one in own] for own in parts])
            for place, part in enumerate(images.split(size))
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _make(self, images: Tensor, numbers: Nested) -> Tensor:
        for stage, own in zip(self._stages, numbers, strict=True):
            images = stage.make(images, *own)
        return images.contiguous(memory_format=torch.channels_last)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a changed copy of each image, see `make`."""
        return self.make(images, self.draw(images.shape, generator, images.device))


@dataclass(frozen=True)
class Stage(ABC):
    """A change of images: numbers are drawn first, and the images are changed with them. Fields as in `Changes`."""

    kinds: Sequence[str]
    probability: float
    strength: float
    codec: Codec
    needed_for: ClassVar[set[str]]  # the kinds that need this stage

    @abstractmethod
    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        """Draw the numbers of images of a shape."""

    @abstractmethod
    def make(self, images: Tensor, *numbers: Tensor) -> Tensor:
        """Return the changed images."""

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw which of the copies (count,) bool a kind is in, on the CPU."""
        return torch.rand(count, generator=generator) < self.probability


def _replaced(images: Tensor, chosen: Tensor, compute: Callable[[Tensor, Tensor], Tensor], own: Tensor) -> Tensor:
    """Replace the chosen images.

    chosen   (n,) bool
    compute  returns the new images of some images and their part of `own`
    own      (n,), on the device of `chosen`

    If `chosen` is on a GPU, all images are computed, as their number would have to be read on the CPU.
    """
    if chosen.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], compute(images, own), images)
    place = chosen.nonzero().flatten()
    if not len(place):
        return images
    on_device = upload(place, images.device)
    return images.index_copy(0, on_device, compute(images[on_device], own[place]))


class Moved(Stage):
    """Mirror, turn, shift, crop and distort, by one interpolation. What is uncovered is black."""

    needed_for = {"mirrored", "cropped", "shifted", "distorted", TURNED}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        count, kinds, strength = shape[0], self.kinds, self.strength
        scale, shift = torch.ones(count), torch.zeros(count, 2)  # of the window cut out, in units of half a side
        sign = torch.ones(count)
        if "mirrored" in kinds:
            sign = 1 - 2 * self.drawn(count, generator).float()
        if "cropped" in kinds:
            part = strength * CROP * torch.rand(count, generator=generator) * self.drawn(count, generator)
            scale = 1 - part
            shift = shift + part[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
        if "shifted" in kinds:
            drawn = self.drawn(count, generator)[:, None]
            shift = shift + drawn * 2 * strength * SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)
        angle = torch.zeros(count)
        if TURNED in kinds:
            drawn = self.drawn(count, generator)
            angle = drawn * strength * math.radians(ANGLE) * (2 * torch.rand(count, generator=generator) - 1)
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        rows = torch.stack([sign * cosine, -sine, shift[:, 0], sign * sine, cosine, shift[:, 1]], 1)
        numbers = [rows.view(count, 2, 3)]
        if "distorted" in kinds:
            drawn = self.drawn(count, generator)[:, None, None, None]
            numbers.append(drawn * 2 * DISTORTION * (2 * torch.rand(count, 2, KNOTS, KNOTS, generator=generator) - 1))
        return numbers

    def make(self, images: Tensor, *numbers: Tensor) -> Tensor:
        rows, *points = (upload(one, images.device) for one in numbers)
        grid = F.affine_grid(rows, list(images.shape), align_corners=False)  # (n, H, W, 2)
        for knots in points:
            field = F.interpolate(knots, images.shape[2:], mode="bicubic", align_corners=True)
            grid = grid + field.permute(0, 2, 3, 1)
        return F.grid_sample(images.contiguous(), grid, mode="bilinear", align_corners=False)


class Blurred(Stage):
    """Blur by a Gaussian of a random width, as two one-dimensional convolutions with a kernel for each image."""

    needed_for = {"blurred"}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        count, _, height, width = shape
        chosen = self.drawn(count, generator)
        low, high = (bound * max(1.0, width / 32) for bound in BLUR)
        sigma = low + (high - low) * torch.rand(count, generator=generator)
        radius = math.ceil(3 * high)
        offsets = torch.arange(-radius, radius + 1.0)
        kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
        pad = min(radius, height - 1, width - 1)
        kernel, offsets = (one[..., radius - pad : radius + pad + 1] for one in (kernel, offsets))
        return [torch.where(chosen[:, None], kernel / kernel.sum(1, keepdim=True), (offsets == 0).float())]

    def make(self, images: Tensor, kernel: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        pad = kernel.shape[1] // 2
        kernel = upload(kernel, images.device).repeat_interleave(channels, 0)[:, None]  # (n C, 1, 2 pad + 1)
        flat = F.pad(images, [pad] * 4, mode="reflect").reshape(1, count * channels, height + 2 * pad, width + 2 * pad)
        flat = F.conv2d(flat, kernel[:, :, :, None], groups=count * channels)
        flat = F.conv2d(flat, kernel[:, :, None, :], groups=count * channels)
        return flat.reshape(images.shape)


class Resized(Stage):
    """Resize to one of SCALES and back."""

    needed_for = {"resized"}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        chosen = self.drawn(shape[0], generator)
        scale = torch.randint(len(SCALES), (shape[0],), generator=generator)
        return [torch.where(chosen, scale, len(SCALES))]

    def make(self, images: Tensor, scale: Tensor) -> Tensor:
        sides = images.shape[2:]
        for index, factor in enumerate(SCALES):
            size = [max(1, round(factor * side)) for side in sides]

            def resized(some: Tensor, _: Tensor, size: list[int] = size) -> Tensor:
                other = F.interpolate(some, size, mode="bilinear", antialias=True)
                return F.interpolate(other, list(sides), mode="bilinear", antialias=True)

            images = _replaced(images, scale == index, resized, scale)
        return images


class Recoloured(Stage):
    """Change brightness, then contrast about the mean of the image."""

    needed_for = {"brightness"}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        chosen = self.drawn(shape[0], generator)[:, None]
        size = self.strength * torch.tensor([BRIGHTNESS, CONTRAST])
        return [1 + chosen * size * (2 * torch.rand(shape[0], 2, generator=generator) - 1)]

    def make(self, images: Tensor, factors: Tensor) -> Tensor:
        brightness, contrast = upload(factors, images.device)[:, :, None, None, None].unbind(1)
        images = images * brightness
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + contrast * (images - mean)


class Noisy(Stage):
    """Add Gaussian noise."""

    needed_for = {"noise"}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        sigma = self.strength * NOISE * torch.rand(shape[0], generator=generator)
        sigma = sigma * self.drawn(shape[0], generator)
        source = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return [sigma[:, None, None, None], torch.randn(shape, generator=source, device=device)]

    def make(self, images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        return images + upload(sigma, images.device) * noise


class Rounded(Stage):
    """Round to 256 levels in [0,1], as images are stored."""

    needed_for = {*TRAINED, *KINDS}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        return []

    def make(self, images: Tensor) -> Tensor:
        return _rounded(images)


class Compressed(Stage):
    """Compress as JPEG and decompress."""

    needed_for = {"jpeg"}

    def draw(self, shape: torch.Size, generator: torch.Generator, device: torch.device) -> list[Tensor]:
        low, high = QUALITY
        quality = torch.randint(low, high + 1, (shape[0],), generator=generator)
        return [self.drawn(shape[0], generator), quality]

    def make(self, images: Tensor, chosen: Tensor, quality: Tensor) -> Tensor:
        return _replaced(images, chosen, self.codec, quality)


def _rounded(images: Tensor) -> Tensor:
    return images.clamp(0, 1).mul(255).round().div(255)


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
