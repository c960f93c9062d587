"""Images made of D_f, which `distill` uses in place of D_r: blends, copies, patches, crops and mixed spectra.

Each kind first draws its random numbers on the CPU, and then computes the images from D_f and these numbers on the
device. The draws do not depend on the device, and a CUDA graph can replay the computation with other numbers.
"""

from abc import ABC, abstractmethod
import math

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.nested import upload_together
from l2ul.data.augment import draw_crops, pixel_places, pixels_at

MIXED = (0.3, 0.7)  # range of the weight of the first image in a blend
PATCH = (0.4, 0.75)  # range of the side of a patch, as a share of the image's side
CROP = (0.5, 0.8)  # range of the side of a crop, likewise
ROTATION = 15.0  # largest angle of a crop, in degrees
HUE = (45.0, 315.0)  # range of the rotation of hues, in degrees
CONTRAST = (0.6, 1.4)  # range of the factor of differences from the mean of an image
GAIN = (0.75, 1.25)  # range of the factor of each colour channel of a crop
AMPLITUDE = (0.3, 0.9)  # range of the weight of the second image's amplitude in a mixed spectrum


class Kind(ABC):
    """A kind of images made of others."""

    @abstractmethod
    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw the random numbers of `count` images from a CPU generator, for images of `shape` (k, C, H, W)."""

    @abstractmethod
    def make(self, images: Tensor, *numbers: Tensor) -> Tensor:
        """Return the images (count, C, H, W) made of `images` (k, C, H, W) float in [0,1] with numbers of `draw`.

        All tensors are on one device. The CPU does not wait for it, so that a CUDA graph can capture the computation.
        """

    def __call__(self, images: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` images made of `images`."""
        return self.make(images, *upload_together(self.draw(images.shape, count, generator), images.device))


class Shifted(Kind):
    """Images of another kind, each shifted and mirrored at random."""

    def __init__(self, kind: Kind):
        self.kind = kind

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        numbers = self.kind.draw(shape, count, generator)
        crops = draw_crops(count, shape[2:], _shift(shape), True, generator)
        return *numbers, *pixel_places(crops, *shape[2:])

    def make(self, images: Tensor, *numbers: Tensor) -> Tensor:
        *own, rows, columns = numbers
        shifted = pixels_at(self.kind.make(images, *own), _shift(images.shape), rows, columns)
        return shifted.contiguous(memory_format=torch.channels_last)


class Mixes(Kind):
    """Blends of two different images with weights from MIXED.

    If k = 1, the image is blended with itself rotated by 180 degrees.
    """

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return *_draw_pairs(shape, count, generator), _uniform(MIXED, (count, 1, 1, 1), generator)

    def make(self, images: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        first, second = _pairs(images, first, second)
        return weight * first + (1 - weight) * second


class Triples(Kind):
    """Blends of three images with weights that are uniform over all triples of sum 1."""

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        chosen = _draw_indices(shape, (3, count), generator)
        weights = -torch.rand((3, count, 1, 1, 1), generator=generator).clamp_min(1e-6).log()
        return chosen, weights / weights.sum(0)

    def make(self, images: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (weights * images[chosen]).sum(0)


class Copies(Kind):
    """Images as they are."""

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_draw_indices(shape, (count,), generator),)

    def make(self, images: Tensor, chosen: Tensor) -> Tensor:
        return images[chosen]


class Recoloured(Kind):
    """Images with hues rotated by an angle from HUE, and with another contrast.

    The rotation is about the grey axis of the colour space. Grey images (k, 1, H, W) only change their contrast.
    """

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        chosen = _draw_indices(shape, (count,), generator)
        angle = torch.deg2rad(_uniform(HUE, (count,), generator))
        contrast = _uniform(CONTRAST, (count, 1, 1, 1), generator)
        across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        rotation = cosine * torch.eye(3) + sine * across + (1 - cosine) / 3
        return chosen, rotation, contrast

    def make(self, images: Tensor, chosen: Tensor, rotation: Tensor, contrast: Tensor) -> Tensor:
        recoloured = images[chosen]
        if images.shape[1] == 3:
            recoloured = torch.einsum("nij,njhw->nihw", rotation, recoloured)
        mean = recoloured.mean((1, 2, 3), keepdim=True)
        return (mean + contrast * (recoloured - mean)).clamp(0, 1)


class Patches(Kind):
    """Images with a square of another one at the same place.

    Yun et al., CutMix (ICCV 2019, arXiv 1905.04899).
    """

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        pairs = _draw_pairs(shape, count, generator)
        side = _uniform(PATCH, (count, 1), generator)
        inside = []
        for length in shape[2:]:
            start = torch.rand((count, 1), generator=generator) * (1 - side)
            place = (torch.arange(length) + 0.5) / length
            inside.append((place >= start) & (place < start + side))
        return *pairs, *inside

    def make(self, images: Tensor, first: Tensor, second: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        first, second = _pairs(images, first, second)
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], second, first)


class Crops(Kind):
    """Enlarged random parts of images, rotated and mirrored, with another gain of each colour channel.

    The part is a square with a side from CROP, rotated by at most ROTATION degrees.
    """

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        chosen = _draw_indices(shape, (count,), generator)
        scale = _uniform(CROP, (count,), generator)
        angle = _uniform((-math.radians(ROTATION), math.radians(ROTATION)), (count,), generator)
        centre = _uniform((-1, 1), (count, 2), generator) * (1 - scale[:, None])
        mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        rows = torch.stack([mirror * cosine, -sine, centre[:, 0], mirror * sine, cosine, centre[:, 1]], 1)
        return chosen, rows.view(count, 2, 3), _uniform(GAIN, (count, shape[1], 1, 1), generator)

    def make(self, images: Tensor, chosen: Tensor, affine: Tensor, gain: Tensor) -> Tensor:
        whole = images[chosen]
        grid = F.affine_grid(affine, list(whole.shape), align_corners=False)
        part = F.grid_sample(whole, grid, padding_mode="reflection", align_corners=False)
        return (gain * part).clamp_(0, 1).contiguous(memory_format=torch.channels_last)


class Spectra(Kind):
    """Images with the phase of one image's spectrum and a blend of the amplitudes of two.

    Xu et al., A Fourier-based Framework for Domain Generalization (CVPR 2021, arXiv 2105.11120).
    """

    def draw(self, shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return *_draw_pairs(shape, count, generator), _uniform(AMPLITUDE, (count, 1, 1, 1), generator)

    def make(self, images: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        first, second = (torch.fft.rfft2(part.contiguous()) for part in _pairs(images, first, second))
        amplitude = (1 - weight) * first.abs() + weight * second.abs()
        return torch.fft.irfft2(torch.polar(amplitude, first.angle()), s=images.shape[2:]).clamp(0, 1)


KINDS: dict[str, Kind] = {
    "mixes": Shifted(Mixes()),
    "triples": Shifted(Triples()),
    "copies": Shifted(Copies()),
    "recoloured": Shifted(Recoloured()),
    "patches": Shifted(Patches()),
    "crops": Crops(),
    "spectra": Shifted(Spectra()),
}


def _draw_indices(shape: torch.Size, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw indices of images, each with the same probability."""
    return torch.randint(shape[0], size, generator=generator)


def _draw_pairs(shape: torch.Size, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` pairs of indices of different images; if k = 1, both are 0."""
    first = _draw_indices(shape, (count,), generator)
    if shape[0] == 1:
        return first, first
    return first, (first + torch.randint(1, shape[0], (count,), generator=generator)) % shape[0]


def _pairs(images: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of images; if k = 1, the second is the first rotated by 180 degrees."""
    return images[first], images[second] if len(images) > 1 else images[first].rot90(2, (2, 3))


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)


def _shift(shape: torch.Size) -> int:
    """Return the largest shift of images of a shape, in pixels."""
    return shape[-1] // 8
