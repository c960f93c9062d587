"""Robustness: whether images stay forgotten after small changes to the images or to the model's weights."""

from collections.abc import Iterator, Sequence
import copy
from io import BytesIO

from PIL import Image
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from l2ul.common.errors import Diverged
from l2ul.data.images import as_pixels
from l2ul.metrics import accuracy
from l2ul.objective import Forget

CROP = 7 / 8  # side of the crops, relative to the image
QUALITIES = (75, 50)  # of JPEG


def changed_images(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each change and the images (k, 3, H, W) uint8 after it: flip, five crops, JPEG compression."""
    yield "flipped", images.flip(3)
    height, width = images.shape[2:]
    high, wide = round(CROP * height), round(CROP * width)
    tops = {"top": 0, "middle": (height - high) // 2, "bottom": height - high}
    lefts = {"left": 0, "middle": (width - wide) // 2, "right": width - wide}
    for top, left in (("top", "left"), ("top", "right"), ("middle", "middle"), ("bottom", "left"), ("bottom", "right")):
        name = "cropped to the middle" if top == "middle" else f"cropped to the {top} {left}"
        yield name, transforms.resized_crop(images, tops[top], lefts[left], high, wide, [height, width], antialias=True)
    for quality in QUALITIES:
        coded = torch.stack([_as_jpeg(image, quality) for image in images.cpu()])
        yield f"JPEG of quality {quality}", coded.to(images.device)


def _as_jpeg(image: Tensor, quality: int) -> Tensor:
    coded = BytesIO()
    transforms.to_pil_image(image).save(coded, "jpeg", quality=quality)
    return transforms.pil_to_tensor(Image.open(coded))


def with_changed_images(images: Tensor, forget: Forget, kinds: Sequence[str]) -> Forget:
    """Return D_f extended by its images after all changes of the given kinds, with the same labels.

    images  D_f (k, 3, H, W) uint8, on the device of `forget`
    kinds   some of `choices.CHANGES`; without any, `forget` is returned as it is
    """
    if not kinds:
        return forget
    changed = [after for name, after in changed_images(images) if name.lower().startswith(tuple(kinds))]
    times = 1 + len(changed)
    new = forget.new_labels.repeat(times) if forget.new_labels is not None else None
    return Forget(torch.cat([forget.images, *map(as_pixels, changed)]), forget.labels.repeat(times), new)


def in_half(model: nn.Module) -> nn.Module:
    """Return a copy that stores weights and computes in half precision, as is common in deployment."""
    return _Half(copy.deepcopy(model).half())


class _Half(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels.half()).float()


@torch.no_grad()
def in_int8(model: nn.Module) -> nn.Module:
    """Return a copy whose weight matrices are rounded to int8: 255 levels per row, which is an output channel."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        if parameter.ndim > 1:
            scale = parameter.flatten(1).abs().amax(1).clamp_min(1e-12) / 127  # (out,)
            scale = scale.view(-1, *[1] * (parameter.ndim - 1))
            parameter.copy_((parameter / scale).round() * scale)
    return rounded


def still_forgotten(model: nn.Module, images: Tensor, forget: Forget) -> dict[str, Tensor | None]:
    """Return which images (k,) bool are still forgotten after each change, by its name.

    images  D_f (k, 3, H, W) uint8, on the model's device; `forget` has their labels

    The changes are those of `changed_images`, half precision and int8 weights. The value is None if the model cannot
    run in half precision or its logits are not finite.
    """
    result = {name: accuracy.forgotten(model, changed, forget) for name, changed in changed_images(images)}
    for name, other in (("half precision", in_half(model)), ("int8 weights", in_int8(model))):
        try:
            result[name] = accuracy.forgotten(other, images, forget)
        except (Diverged, RuntimeError):  # overflow in 16 bits, or 32-bit tensors that the forward pass creates
            result[name] = None
    return result
