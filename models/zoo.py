"""torchvision's classification nets by their torchvision name, with torchvision's own weights or a file's."""

from urllib.error import URLError

from torch import Tensor, nn
import torchvision
from torchvision.transforms import v2

from l2ul.common.errors import InputError

PREFIX = "torchvision:"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
COMMON = [  # whose weights people have lying about: a file that does not fit is compared with these
    PREFIX + name
    for name in (
        *("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_0"),
        *("squeezenet1_1", "densenet121", "vgg16", "vgg16_bn", "efficientnet_b0", "vit_b_16"),
    )
]


def names() -> list[str]:
    return [PREFIX + name for name in torchvision.models.list_models(module=torchvision.models)]


def build(name: str, num_classes: int) -> nn.Module:
    return torchvision.models.get_model(name.removeprefix(PREFIX), weights=None, num_classes=num_classes)


def pretrained_state(name: str, num_classes: int, choice: str | None) -> tuple[dict[str, Tensor], str, tuple, tuple]:
    """State, description, mean and std of torchvision's own weights: those called `choice`, or the first set of them.

    `choice` is one that `has_weights` knows.
    The first set (IMAGENET1K_V1 for most nets) is what papers report on; newer ones are asked for by name.
    """
    chosen = pretrained_weights(name, choice)
    classes = len(chosen.meta["categories"])
    if classes != num_classes:
        raise InputError(
            f"torchvision's own weights of {name} tell {classes} classes apart, the data set has {num_classes}; "
            f"name weights for it with --checkpoint"
        )
    try:
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError) as error:
        raise InputError(
            f"{chosen.url} could not be downloaded ({error}); fetch it elsewhere and name the file with --checkpoint"
        ) from None
    mean, std = tuple(chosen.transforms().mean), tuple(chosen.transforms().std)
    if name.removeprefix(PREFIX) in ("googlenet", "inception_v3"):
        mean = std = (0.5, 0.5, 0.5)  # trained on pixels in [-1,1], whatever their transforms say
    return state, f"torchvision {chosen}", mean, std


def has_weights(name: str, choice: str) -> bool:
    """Whether `choice` is the name of one of torchvision's own sets of weights for this net."""
    return choice in torchvision.models.get_model_weights(name.removeprefix(PREFIX)).__members__


def pretrained_weights(name: str, choice: str | None = None) -> torchvision.models.WeightsEnum:
    """torchvision's own set of weights of a net: the one called `choice`, or the first."""
    weights = torchvision.models.get_model_weights(name.removeprefix(PREFIX))
    return weights[choice] if choice else next(iter(weights))


def transform(name: str, choice: str | None = None) -> v2.Compose:
    """From an RGB image to uint8 pixels (3, H, W), resized and cropped as for torchvision's own weights of a net."""
    preset = pretrained_weights(name, choice).transforms()
    resize = v2.Resize(preset.resize_size, preset.interpolation, antialias=preset.antialias)
    return v2.Compose([resize, v2.CenterCrop(preset.crop_size), v2.PILToTensor()])
