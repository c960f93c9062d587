"""A layer that resizes pixels as the transforms of other libraries do, and a check that layers agree with them."""

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
import torchvision.transforms.v2.functional as transforms

from l2ul.common.image_sizes import check_resize

LEVELS = 4  # of 255 by which layers may differ from transforms, which round to 8 bits after each pass of a resize


class Resize(nn.Module):
    """Resize pixels (N, C, H, W), differentiably.

    size  [height, width], or the length of the short side
    """

    def __init__(self, size: list[int] | int, interpolation: InterpolationMode):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def extra_repr(self) -> str:
        return f"{self.size}, {self.interpolation.value}"

    def forward(self, pixels: Tensor) -> Tensor:
        if isinstance(self.size, int):
            check_resize(pixels.shape[3], pixels.shape[2], self.size)
        resized = transforms.resize(pixels, self.size, self.interpolation, antialias=True)
        return resized.clamp(0, 1)  # bicubic interpolation overshoots; the 8-bit pixels of a transform cannot


def smooth_image(channels: int, height: int = 64, width: int = 64) -> Tensor:
    """Return an image (channels, height, width) uint8 of at most three ramps, which no resize distorts much."""
    down, right = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    image = torch.stack([ramp.expand(height, width) for ramp in (right, down, 1 - right)])
    return (image[:channels] * 255).round().to(torch.uint8)


def agree(layers: nn.Sequential, pixels: Tensor, expected: Tensor) -> bool:
    """Return whether layers that end with a Normalize agree with the transform of another library.

    pixels    (C, H, W) uint8
    expected  (1, C, H, W), what the transform returns for them
    """
    actual = layers(pixels[None] / 255)
    if actual.shape != expected.shape:
        return False
    return bool(((actual - expected).abs() * layers[-1].std * 255).max() <= LEVELS)
