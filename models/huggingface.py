"""Any Hugging Face image classifier, by hub name or local folder, its processor's steps as differentiable layers."""

from collections.abc import Callable
from pathlib import Path
import sys

from PIL.Image import Image
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
import torchvision.transforms.v2.functional as transforms

from l2ul.common.errors import InputError
from models.classifier import Normalize

PREFIX = "hf:"
INTERPOLATION = {  # PIL's filter numbers, as processors store them
    0: InterpolationMode.NEAREST,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


class Resize(nn.Module):
    """Differentiable resize of (N, 3, H, W) pixels: to `size` (height, width), or the short side to a number."""

    def __init__(self, size: list[int] | int, interpolation: InterpolationMode):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def extra_repr(self) -> str:
        return f"{self.size}, {self.interpolation.value}"

    def forward(self, pixels: Tensor) -> Tensor:
        resized = transforms.resize(pixels, self.size, self.interpolation, antialias=True)
        return resized.clamp(0, 1)  # bicubic overshoots; the processor's 8-bit pixels cannot


class CenterCrop(nn.Module):
    """The middle (height, width) of (N, 3, H, W) pixels."""

    def __init__(self, size: list[int]):
        super().__init__()
        self.size = size

    def extra_repr(self) -> str:
        return str(self.size)

    def forward(self, pixels: Tensor) -> Tensor:
        return transforms.center_crop(pixels, self.size)


def configuration(name: str):
    """The configuration in the folder or on the hub: `num_labels`, `id2label`, `dtype` of the weights."""
    from transformers import AutoConfig

    return _read(name, AutoConfig.from_pretrained)


def transform(name: str) -> Callable[[Image], Tensor]:
    """From an RGB image to uint8 pixels (3, H, W) as the processor resizes and crops it."""
    from transformers import AutoImageProcessor

    processor = _read(name, AutoImageProcessor.from_pretrained)

    def shaped(image: Image) -> Tensor:
        found = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return found.round().clamp(0, 255).to(torch.uint8)

    return shaped


def build(name: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """The net, untrained, and its input layers, from the configuration in the folder or on the hub."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = _read(name, AutoConfig.from_pretrained, num_labels=num_classes)
    return AutoModelForImageClassification.from_config(config).float(), _preprocess(name)


def load(name: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """The trained net and its input layers."""
    from transformers import AutoModelForImageClassification

    net, report = _read(
        name, AutoModelForImageClassification.from_pretrained, output_loading_info=True, dtype=torch.float32
    )
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise InputError(f"{name} lacks weights of its own net ({', '.join(lacking[:3])}); name a trained classifier")
    if net.config.num_labels != num_classes:
        raise InputError(
            f"{name} tells {net.config.num_labels} classes apart, the data set has {num_classes}; "
            f"name a classifier trained on this data set"
        )
    return net, _preprocess(name)


def _read(name: str, from_pretrained, **options):
    """What `from_pretrained` gives for the folder or hub name; code in the repository is never run."""
    place = name.removeprefix(PREFIX)
    _quiet()
    try:
        return from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # transformers, huggingface_hub and safetensors each raise their own for a bad folder
        if Path(place).is_dir():
            hint = "expected what save_pretrained writes: config.json, weights, preprocessor_config.json"
        else:
            hint = "there is no such folder and it could not be had from the hub"
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load {name}: {hint} ({first.strip()[:160]})") from None


def _quiet() -> None:
    """No progress bars of the library's own where nobody watches them."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _preprocess(name: str) -> nn.Sequential:
    """The processor's resize, crop and normalisation as layers, for pixels in [0,1] of any size."""
    from transformers import AutoImageProcessor

    processor = _read(name, AutoImageProcessor.from_pretrained)
    layers: list[nn.Module] = []
    size = _sides(processor, "size") if getattr(processor, "do_resize", False) else None
    crop = _sides(processor, "crop_size") if getattr(processor, "do_center_crop", False) else None
    part = getattr(processor, "crop_pct", None)
    if part and isinstance(size, int):  # ConvNeXt's convention: small sizes are cut out of a larger image
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
    """Raise InputError unless the layers do to a smooth image what the processor does: some have steps of their own."""
    ramp = torch.linspace(0, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, (1 - ramp).expand(64, 64)])
    pixels = (image * 255).round().to(torch.uint8)
    expected = processor(pixels, return_tensors="pt")["pixel_values"]
    found = preprocess(pixels[None] / 255)
    if found.shape == expected.shape:
        levels = (found - expected).abs() * preprocess[-1].std * 255
        if levels.max() <= 4:  # the processor rounds to 8 bits after each pass of its resize
            return
    raise InputError(
        f"the processor of {name} ({type(processor).__name__}) does more than resize, centre crop and normalise, "
        f"so its model cannot take pixels in [0,1] here; name a model with a plain processor"
    )


def _sides(processor, attribute: str) -> list[int] | int | None:
    """[height, width], or the length of the short side, from a processor's size; None where it has none."""
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
    """The net and its processor with `save_pretrained`, so that plain transformers code loads them.

    mean, std  that the net was used with: the processor's own, or those given in their place
    """
    from transformers import AutoImageProcessor

    net.save_pretrained(folder)
    processor = _read(name, AutoImageProcessor.from_pretrained)
    if processor.do_normalize or (mean, std) != ([0.0] * 3, [1.0] * 3):
        processor.do_normalize, processor.image_mean, processor.image_std = True, mean, std
    processor.save_pretrained(folder)
