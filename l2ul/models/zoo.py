"""torchvision's classification networks, with torchvision's pretrained weights or those of a file."""

from collections.abc import Callable
from urllib.error import URLError

from PIL.Image import Image
from torch import Tensor, nn
import torchvision
from torchvision.transforms import v2

from l2ul.common.errors import InputError
from l2ul.common.image_sizes import checked

PREFIX = "torchvision:"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
COMMON = [  # common networks; a file that does not fit the chosen model is compared with these
    PREFIX + name
    for name in (
        *("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_0"),
        *("squeezenet1_1", "densenet121", "vgg16", "vgg16_bn", "efficientnet_b0", "vit_b_16"),
    )
]


def names() -> list[str]:
    """Return the names of all networks."""
    return [PREFIX + name for name in torchvision.models.list_models(module=torchvision.models)]


def build(name: str, num_classes: int) -> nn.Module:
    """Return the network `name`, untrained."""
    return torchvision.models.get_model(name.removeprefix(PREFIX), weights=None, num_classes=num_classes)


def pretrained_state(name: str, num_classes: int, choice: str | None) -> tuple[dict[str, Tensor], str, tuple, tuple]:
    """Return state dict, description, mean and std of pretrained weights.

    choice  the name of a set of weights, such as IMAGENET1K_V2; None: the first set, which is IMAGENET1K_V1 for most
            networks and the one that papers report

    Raises InputError if they have another number of classes or cannot be downloaded.
    """
    chosen = pretrained_weights(name, choice)
    classes = len(chosen.meta["categories"])
    if classes != num_classes:
        raise InputError(
            f"torchvision's weights of {name} are for {classes} classes, but the data set has {num_classes}",
            "name a file of weights for it with --checkpoint",
        )
    try:
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError) as error:
        raise InputError(
            f"{chosen.url} could not be downloaded ({error})",
            "download it elsewhere and name the file with --checkpoint",
        ) from None
    mean, std = tuple(chosen.transforms().mean), tuple(chosen.transforms().std)
    if name.removeprefix(PREFIX) in ("googlenet", "inception_v3"):
        mean = std = (0.5, 0.5, 0.5)  # trained on pixels in [-1,1], although their transforms say otherwise
    return state, f"torchvision {chosen}", mean, std


def has_weights(name: str, choice: str) -> bool:
    """Return whether `choice` is the name of a set of pretrained weights of the network."""
    return choice in torchvision.models.get_model_weights(name.removeprefix(PREFIX)).__members__


def pretrained_weights(name: str, choice: str | None = None) -> torchvision.models.WeightsEnum:
    """Return the set of pretrained weights `choice`, or the first set."""
    weights = torchvision.models.get_model_weights(name.removeprefix(PREFIX))
    return weights[choice] if choice else next(iter(weights))


def transform(name: str, choice: str | None = None) -> Callable[[Image], Tensor]:
    """Return the transform from RGB images to uint8 pixels (3, H, W) that belongs to the pretrained weights."""
    preset = pretrained_weights(name, choice).transforms()
    resize = v2.Resize(preset.resize_size, preset.interpolation, antialias=preset.antialias)
    short_side = preset.resize_size[0] if len(preset.resize_size) == 1 else None
    return checked(v2.Compose([resize, v2.CenterCrop(preset.crop_size), v2.PILToTensor()]), short_side)
