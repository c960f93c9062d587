"""Small pictures of images, as data URLs for pages that open offline."""

import base64
from io import BytesIO
from typing import Literal

from torch import Tensor
from torchvision.transforms import InterpolationMode
import torchvision.transforms.v2.functional as transforms


def data_url(image: Tensor, longer_side: int, kind: Literal["png", "webp"] = "png") -> str:
    """Return an image (C, H, W), uint8 or float in [0,1] with 1 or 3 channels, as a data URL.

    longer_side  pixels; smaller images are enlarged without interpolation
    kind         png, or webp, which takes less space and is not exact
    """
    longer = max(image.shape[1:])
    size = [max(1, round(side * longer_side / longer)) for side in image.shape[1:]]
    mode = InterpolationMode.NEAREST if longer < longer_side else InterpolationMode.BILINEAR
    resized = image.cpu() if longer == longer_side else transforms.resize(image.cpu(), size, mode, antialias=True)
    encoded = BytesIO()
    transforms.to_pil_image(resized).save(encoded, kind)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
