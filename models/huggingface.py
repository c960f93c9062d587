"""Image classifiers of Hugging Face, by hub name or local folder, with their processor as differentiable layers."""

from collections.abc import Callable
from pathlib import Path
import sys

from PIL.Image import Image
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
import torchvision.transforms.v2.functional as transforms

from l2ul.common.errors import InputError
from models.classifier import Normalize, check_weights

PREFIX = "hf:"
INTERPOLATION = {  # PIL's filter numbers, as processors store them
    0: InterpolationMode.NEAREST,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


class Resize(nn.Module):
    """Resize pixels (N, 3, H, W), differentiably.

    size  [height, width], or the length of the short side
    """

    def __init__(self, size: list[int] | int, interpolation: InterpolationMode):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def extra_repr(self) -> str:
        return f"{self.size}, {self.interpolation.value}"

    def forward(self, pixels: Tensor) -> Tensor:
        resized = transforms.resize(pixels, self.size, self.interpolation, antialias=True)
        return resized.clamp(0, 1)  # bicubic interpolation overshoots; the processor's 8-bit pixels cannot


class CenterCrop(nn.Module):
    """Return the centre `size` = [height, width] of pixels (N, 3, H, W)."""

    def __init__(self, size: list[int]):
        super().__init__()
        self.size = size

    def extra_repr(self) -> str:
        return str(self.size)

    def forward(self, pixels: Tensor) -> Tensor:
        return transforms.center_crop(pixels, self.size)


def configuration(name: str):
    """Return the configuration in the folder or on the hub, with `num_labels`, `id2label` and `dtype`."""
    from transformers import AutoConfig

    return _read(name, AutoConfig.from_pretrained)


def transform(name: str) -> Callable[[Image], Tensor]:
    """Return the processor's resize and crop as a function from RGB images to uint8 pixels (3, H, W)."""
    from transformers import AutoImageProcessor

    processor = _read(name, AutoImageProcessor.from_pretrained)

    def resize_and_crop(image: Image) -> Tensor:
        pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return pixels.round().clamp(0, 255).to(torch.uint8)

    return resize_and_crop


def build(name: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the untrained network and its preprocessing, from the configuration in the folder or on the hub."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = _read(name, AutoConfig.from_pretrained, num_labels=num_classes)
    return AutoModelForImageClassification.from_config(config).float(), _preprocess(name)


def load(name: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the trained network and its preprocessing layers."""
    from transformers import AutoModelForImageClassification

    net, report = _read(
        name, AutoModelForImageClassification.from_pretrained, output_loading_info=True, dtype=torch.float32
    )
    check_weights(net, name)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{name} lacks weights of its own network ({', '.join(missing[:3])}); name a trained classifier"
        )
    if net.config.num_labels != num_classes:
        raise InputError(
            f"{name} has {net.config.num_labels} classes, but the data set has {num_classes}; "
            f"name a classifier that was trained on this data set"
        )
    return net, _preprocess(name)


def _read(name: str, from_pretrained, **options):
    """Call `from_pretrained` for the folder or hub name. Code in the repository is never run."""
    place = name.removeprefix(PREFIX)
    _quiet()
    try:
        return from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # transformers, huggingface_hub and safetensors each raise their own exceptions
        if Path(place).is_dir():
            hint = "expected what save_pretrained writes: config.json, weights, preprocessor_config.json"
        else:
            hint = "there is no such folder, and it could not be downloaded from the hub"
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load {name}: {hint} ({first.strip()[:160]})") from None


def _quiet() -> None:
    """Turn off the progress bars of transformers if standard error is not a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _preprocess(name: str) -> nn.Sequential:
    """Return the processor's resize, crop and normalisation as layers that take pixels in [0,1] of any size."""
    from transformers import AutoImageProcessor

    processor = _read(name, AutoImageProcessor.from_pretrained)
    layers: list[nn.Module] = []
    size = _sides(processor, "size") if getattr(processor, "do_resize", False) else None
    crop = _sides(processor, "crop_size") if getattr(processor, "do_center_crop", False) else None
    part = getattr(processor, "crop_pct", None)
    if part and isinstance(size, int):  # the convention of ConvNeXt: small sizes are cropped from a larger image
        size, crop = (int(size / part), [size, size]) if size < 384 else ([size, size], None)
    if size is not None:
        layers.append(Resize(size, INTERPOLATION.get(processor.resample, InterpolationMode.BILINEAR)))
    if crop is not None:
        layers.append(CenterCrop(crop))
    if getattr(processor, "do_normalize", False):
        layers.append(Normalize(processor.image_mean, processor.image_std))
    else:
        layers.append(Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    preprocess = nn.Sequential(*layers)
    _check_layers(name, processor, preprocess)
    return preprocess


def _check_layers(name: str, processor, preprocess: nn.Sequential) -> None:
    """Raise InputError unless layers and processor agree on a smooth image: some processors have further steps."""
    ramp = torch.linspace(0, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, (1 - ramp).expand(64, 64)])
    pixels = (image * 255).round().to(torch.uint8)
    expected = processor(pixels, return_tensors="pt")["pixel_values"]
    actual = preprocess(pixels[None] / 255)
    if actual.shape == expected.shape:
        levels = (actual - expected).abs() * preprocess[-1].std * 255
        if levels.max() <= 4:  # the processor rounds to 8 bits after each pass of its resize
            return
    raise InputError(
        f"the processor of {name} ({type(processor).__name__}) does more than resize, centre crop and normalise, "
        f"so its model cannot be used with pixels in [0,1]; name a model with a plain processor"
    )


def _sides(processor, attribute: str) -> list[int] | int | None:
    """Return a size of the processor: [height, width], or the length of the short side; None if it has none."""
    size = getattr(processor, attribute, None)
    if size is None:
        return None
    size = dict(size) if not isinstance(size, int) else {"shortest_edge": size}
    if size.get("height") and size.get("width"):
        return [size["height"], size["width"]]
    if size.get("shortest_edge"):
        return size["shortest_edge"]
    raise InputError(f"the processor's {attribute} is {size}; expected height and width, or shortest_edge")


def save(net: nn.Module, name: str, folder: Path, mean: list[float], std: list[float]) -> None:
    """Write the network and its processor with `save_pretrained`, so that plain transformers code loads them.

    mean, std  normalisation with which the network was used; the saved processor gets them
    """
    from transformers import AutoImageProcessor

    net.save_pretrained(folder)
    processor = _read(name, AutoImageProcessor.from_pretrained)
    if processor.do_normalize or (mean, std) != ([0.0] * 3, [1.0] * 3):
        processor.do_normalize, processor.image_mean, processor.image_std = True, mean, std
    processor.save_pretrained(folder)
