"""Image classifiers of timm, by name, hub name or local folder, with their data config as differentiable layers."""

import ast
from collections.abc import Callable
import copy
from dataclasses import dataclass, field
import difflib
import json
import math
from pathlib import Path
from types import ModuleType

from PIL.Image import Image
from safetensors.torch import save_file
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import to_pil_image

from l2ul.common.errors import InputError, rejected
from l2ul.common.files import other_files
from l2ul.common.image_sizes import checked
from l2ul.common.installation import require
from l2ul.common.modes import eval_mode
from l2ul.common.text import read_json, read_text
from l2ul.models.classifier import Normalize, check_weights, logits_of
from l2ul.models.preprocessing import Resize, agree, smooth_image

PREFIX = "timm:"
HUB, FOLDER = "hf-hub:", "local-dir:"  # before the names that timm.create_model takes
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # timm reads the first
LARGEST = 4096  # pixels of a side
INTERPOLATION = {mode.value: mode for mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)}
CROP_MODES = ("center", "squash", "border")
DATA_ARGUMENTS = {  # arguments after a name that belong to the data config, not to the network
    "img_size": ("a whole number of pixels", lambda value: type(value) is int and 0 < value <= LARGEST),
    "crop_pct": ("a number above 0", lambda value: isinstance(value, int | float) and 0 < value <= 2),
    "crop_mode": (f"one of {', '.join(CROP_MODES)}", lambda value: value in CROP_MODES),
    "interpolation": (f"one of {', '.join(INTERPOLATION)}", lambda value: value in INTERPOLATION),
}
RESERVED = {  # arguments of timm.create_model that are set here
    *("num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("features_only", "scriptable", "exportable", "no_jit", "device", "dtype", "model_name", "pretrained_model_args"),
}

PUBLIC = {  # keys of config.json without which a model opens differently
    *("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg", "label_names"),
    *("input_size", "min_input_size", "fixed_input_size", "pool_size", "mean", "std", "interpolation", "crop_pct"),
    *("crop_mode", "test_input_size", "test_crop_pct", "first_conv", "classifier"),
}
NESTED = {"pretrained_cfg", "model_args", "label_names"}  # of these, those whose value may be an object


@dataclass(frozen=True)
class Source:
    """What a name `timm:…` stands for.

    model      as timm.create_model takes it: an architecture with or without a tag, or with HUB or FOLDER before it
    arguments  for the network
    data       for the data config
    """

    model: str
    arguments: dict[str, object] = field(default_factory=dict)
    data: dict[str, object] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The local folder; None for another source."""
        return Path(self.model.removeprefix(FOLDER)) if self.model.startswith(FOLDER) else None


def is_folder(path: Path) -> bool:
    """Return whether a folder has a config.json as timm writes it. timm need not be installed."""
    return isinstance(read_json(path / CONFIG).get("architecture"), str)


def source(name: str) -> Source:
    """Return what a name stands for. Raises InputError if timm has no such model, or is not installed.

    name  timm:NAME, timm:hf_hub:NAME or timm:FOLDER. After a NAME there may be arguments: timm:NAME,KEY=VALUE,…
    """
    timm = _timm()
    text = name.removeprefix(PREFIX)
    folder = text.removeprefix(FOLDER)
    if folder != text or (text and Path(text).is_dir() and not timm.is_model(text)):
        _check_folder(timm, Path(folder))
        return Source(FOLDER + folder)
    model, *pairs = text.split(",")
    if model.startswith((HUB, "hf_hub:")):
        model = HUB + model.partition(":")[2]
    else:
        _check_architecture(timm, model)
    arguments = dict(_argument(name, pair) for pair in pairs)
    data = {key: value for key, value in arguments.items() if key in DATA_ARGUMENTS}
    return Source(model, {key: value for key, value in arguments.items() if key not in data}, data)


def _timm() -> ModuleType:
    """Return the package. Raises InputError if it is not installed."""
    return require("timm", "a model of timm")


def _check_architecture(timm: ModuleType, model: str) -> None:
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 1)
        hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
        raise InputError(
            f"unknown model {PREFIX + model!r}: {hint}expected the name of a model of timm, hf_hub:NAME or a folder "
            f"that timm wrote"
        )
    tags = timm.models.get_arch_pretrained_cfgs(architecture)
    if tag and model not in tags:
        known = ", ".join(one.partition(".")[2] for one in tags) or "none"
        raise InputError(f"unknown weights {tag!r} of {PREFIX}{architecture}", f"timm has: {known}")


def _argument(name: str, pair: str) -> tuple[str, object]:
    """Return key and value of KEY=VALUE; the value is a number, True, False or a word."""
    key, equals, text = pair.partition("=")
    if not (key.isidentifier() and equals and text):
        raise InputError(f"{pair!r} in {name} is not valid", "expected KEY=VALUE, such as img_size=32")
    if key in RESERVED:
        raise InputError(f"{key} in {name} cannot be set", "leave it out")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    value = value if isinstance(value, bool | int | float) else text
    expected, is_valid = DATA_ARGUMENTS.get(key, ("", lambda value: True))
    if not is_valid(value):
        raise InputError(f"{key}={text} in {name} is not valid", f"expected {expected}")
    return key, value


def _check_folder(timm: ModuleType, folder: Path) -> None:
    """Raise InputError unless a folder has a config.json that names an architecture of timm."""
    try:
        config = json.loads(read_text(folder / CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is no JSON" if isinstance(error, ValueError | RecursionError) else error.strerror
        raise InputError(
            f"cannot read {folder / CONFIG} ({reason})",
            "expected a folder that save_for_hf or push_to_hf_hub of timm wrote",
        ) from None
    if isinstance(config, dict) and config.get("model_type"):
        raise InputError(
            f"{folder} is a model of timm that transformers wrote, which timm does not open",
            "write it again with timm.models.save_for_hf(model.timm_model, FOLDER, safe_serialization=True)",
        )
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        what = f"the architecture {architecture!r}, which timm {timm.__version__} does not have"
        raise InputError(
            f"{folder / CONFIG} names {what if architecture else 'no architecture'}",
            "expected a folder that save_for_hf or push_to_hf_hub of timm wrote",
        )


def weights_file(folder: Path) -> Path:
    """Return the file of weights in a folder that timm reads. Raises InputError if there is none."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder} has no file of weights", f"expected one of {', '.join(WEIGHTS)}")
    return path


def unread_files(folder: Path) -> list[str]:
    """Return the files and subfolders (with a final /) of a folder that opening the model does not read."""
    return other_files(folder, {CONFIG, weights_file(folder).name})


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """Return the untrained network. `num_classes`: None for those of the name, as `net.num_classes` says."""
    return _create(name, num_classes, pretrained=False)


def num_classes(name: str) -> int:
    """Return the number of classes of the trained model, without building it.

    Raises InputError if it has no classifier, or more weights than its file has bytes.
    """
    with torch.device("meta"):
        net = build(name)
    folder = source(name).folder
    size = sum(parameter.numel() for parameter in net.parameters())
    if folder and size > weights_file(folder).stat().st_size:
        raise InputError(f"{weights_file(folder)} does not fit {name}: it is too small for {size:,} weights")
    number = getattr(net, "num_classes", 0)
    if not number:
        raise InputError(
            f"{name} has no classifier (0 classes)", "name another model", "a file of weights with --checkpoint"
        )
    return number


def check_num_classes(name: str, expected: int) -> None:
    """Raise InputError unless the trained model has the expected number of classes."""
    number = num_classes(name)
    if number != expected:
        raise InputError(
            f"{name} has {number} classes, but the data set has {expected}",
            "name a file of weights for it with --checkpoint",
        )


def load(name: str, num_classes: int) -> nn.Module:
    """Return the network with timm's pretrained weights, or those of the hub."""
    check_num_classes(name, num_classes)
    model = source(name).model
    if not model.startswith(HUB) and not _timm().models.is_model_pretrained(model):
        raise InputError(f"timm has no weights for {name}", "name a file of weights for it with --checkpoint")
    return _create(name, num_classes, pretrained=True)


def _create(name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    """Call timm.create_model, which reads pickles of weights as tensors only."""
    timm, chosen = _timm(), source(name)
    problem, advice = f"timm does not accept its {CONFIG if chosen.folder else 'arguments'}", ()
    if chosen.model.startswith(HUB):
        problem = f"it could not be downloaded, or timm does not accept its {CONFIG}"
    elif pretrained:
        problem = "its weights could not be downloaded"
        advice = ("download them elsewhere and name the file with --checkpoint",)
    with rejected(f"cannot load {name}: {problem}", *advice):
        size = {"img_size": chosen.data.get("img_size")}
        arguments = timm.models.resolve_model_input_args(chosen.model, size, **chosen.arguments)
        _check_config(name, arguments)
        arguments |= {} if num_classes is None else {"num_classes": num_classes}
        net = timm.create_model(**arguments, pretrained=pretrained)
    check_weights(net, name)
    changes = {key: value for key, value in chosen.data.items() if key != "img_size"}
    if "img_size" in chosen.data:
        changes["input_size"] = (net.pretrained_cfg["input_size"][0], *[chosen.data["img_size"]] * 2)
    net.pretrained_cfg = net.default_cfg = {**net.pretrained_cfg, **changes}
    return net.float()


def _check_config(name: str, arguments: dict) -> None:
    """Raise InputError for what no image can have, and for arguments in a config.json that are set here."""
    own = RESERVED.intersection(arguments.get("pretrained_model_args") or ()) - {"num_classes"}
    if own:
        raise InputError(f"{name} sets {min(own)} in model_args of its {CONFIG}, which is not allowed", "leave it out")
    config = arguments["pretrained_cfg"]
    size = _list(config.get("input_size", (3, 224, 224)))
    _, is_side = DATA_ARGUMENTS["img_size"]
    if len(size) != 3 or not all(map(is_side, [*size, *_list(arguments.get("img_size") or ())])):
        raise InputError(
            f"{name} has images of size {arguments.get('img_size') or size} in its {CONFIG}",
            f"expected channels, height and width, from 1 to {LARGEST}",
        )
    for key, is_valid in (("mean", math.isfinite), ("std", lambda value: math.isfinite(value) and value > 0)):
        values = config.get(key)
        if values is not None and not _are_statistics(values, size[0], is_valid):
            raise InputError(f"{name} has {key} {values} in its {CONFIG}", "expected one number per channel")
    for key, (expected, is_valid) in DATA_ARGUMENTS.items():
        if key in config and not is_valid(config[key]):
            raise InputError(f"{name} has {key} {config[key]!r}", f"expected {expected}")


def _are_statistics(values: object, channels: int, is_valid: Callable[[float], bool]) -> bool:
    """Return whether values are one number per channel; three of a colour model also fit a grey one."""
    is_list = isinstance(values, list | tuple) and len(values) in (1, 3, channels)
    return is_list and all(isinstance(one, int | float) and is_valid(one) for one in values)


def _list(values: object) -> list:
    return list(values) if isinstance(values, list | tuple) else [values]


def data_layers(name: str, net: nn.Module) -> tuple[list[nn.Module], tuple[float, ...], tuple[float, ...]]:
    """Return timm's resize and crop as layers that take pixels in [0,1] of any size, and its mean and std.

    Raises InputError if layers cannot express timm's transform, or if the network does not classify its images.
    """
    config = _data_config(net)
    channels, size, scaled = _sizes(config)
    if channels not in (1, 3):
        raise InputError(f"{name} takes images of {channels} channels", "expected 1 (grey) or 3 (colour)")
    resize = Resize(scaled, INTERPOLATION[config["interpolation"]])
    statistics = [tuple(config[key]) for key in ("mean", "std")]
    preprocess = nn.Sequential(resize, v2.CenterCrop(size), Normalize(*statistics))
    pixels = smooth_image(channels, 80, 64)
    expected = _timm().data.create_transform(**config)(to_pil_image(pixels))
    if not agree(preprocess, pixels, expected[None]):
        raise InputError(
            f"the transform of {name} does more than resize, centre crop and normalise (crop_mode "
            f"{config['crop_mode']}, input_size {size[0]}x{size[1]}), so its model cannot be used with pixels in [0,1]",
            "choose a model with crop_mode center or squash and square images",
        )
    _check_logits(name, net, preprocess(pixels[None] / 255))
    return list(preprocess[:-1]), *statistics


def _sizes(config: dict) -> tuple[int, list[int], list[int] | int]:
    """Return channels, [height, width] of the crop, and the size before it: [height, width], or the short side."""
    (channels, *size), part = config["input_size"], config["crop_pct"]
    scaled = [math.floor(side / part) for side in size]
    return channels, size, scaled if config["crop_mode"] == "squash" else scaled[0]


def _data_config(net: nn.Module) -> dict:
    """Return timm's data config of a network, and store it in the network, which timm then takes it from."""
    config = _timm().data.resolve_input_data_config(net)
    net.pretrained_cfg = net.default_cfg = {**net.pretrained_cfg, **config}
    return config


def _check_logits(name: str, net: nn.Module, inputs: Tensor) -> None:
    """Raise InputError unless the network returns logits for inputs (1, C, H, W)."""
    problem = f"{name} cannot classify images of {'x'.join(map(str, inputs.shape[1:]))}"
    with rejected(problem, "name a classifier that takes images"), torch.inference_mode(), eval_mode(net):
        shape = tuple(logits_of(net(inputs)).shape)
    if shape != (1, net.num_classes):
        raise InputError(f"{name} returns {shape} for an image, not {net.num_classes} logits", "name a classifier")


def set_image_size(net: nn.Module, size: int) -> None:
    """Let timm's transform of a network resize the short side of images to `size` and crop the central square."""
    config = _data_config(net)
    net.pretrained_cfg = net.default_cfg = {**net.pretrained_cfg, **_sized(size, config["input_size"][0])}


def _sized(size: int, channels: int) -> dict[str, object]:
    square = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
    return {"input_size": (channels, size, size), **square}


def transform(net: nn.Module) -> Callable[[Image], Tensor]:
    """Return timm's resize and crop as a function from images to uint8 pixels (C, H, W)."""
    config = _data_config(net)
    _, _, size = _sizes(config)
    return checked(_timm().data.create_transform(**config, normalize=False), size if isinstance(size, int) else None)


def class_names(name: str, net: nn.Module) -> list[str]:
    """Return the names of the classes: those in the config, or ImageNet's of timm's own weights; else empty."""
    names = net.pretrained_cfg.get("label_names")
    if isinstance(names, dict):
        names = [names.get(str(index), names.get(index)) for index in range(net.num_classes)]
    if names is None and not source(name).model.startswith((HUB, FOLDER)):
        data = _timm().data
        subset = data.infer_imagenet_subset(net)
        names = data.ImageNetInfo(subset).label_names() if subset else None
    is_complete = isinstance(names, list | tuple) and len(names) == net.num_classes
    return list(names) if is_complete and all(isinstance(one, str) for one in names) else []


def save(net: nn.Module, name: str, folder: Path, mean: list[float], std: list[float]) -> None:
    """Write the network as timm's save_for_hf does, so that plain timm code loads it.

    mean, std  normalisation with which the network was used; the config gets them

    A model that came from a folder keeps the config.json of that folder.
    """
    original = source(name).folder
    net = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)
    folder.mkdir(exist_ok=True)
    if original:
        save_config(net, original, folder, mean, std)
        save_file(net.state_dict(), folder / WEIGHTS[0], {"format": "pt"})
    else:
        net.pretrained_cfg = {**net.pretrained_cfg, "mean": mean, "std": std}
        _timm().models.save_for_hf(net, folder, safe_serialization=True)


def write_config(net: nn.Module, original: Path, folder: Path, mean: list[float], std: list[float]) -> None:
    """Write config.json as `save_config`, but only what timm defines: no notes, addresses or paths of its author."""
    save_config(net, original, folder, mean, std)
    config = _known(json.loads(read_text(folder / CONFIG)))
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _known(config: dict[str, object]) -> dict[str, object]:
    kept = {key: value for key, value in config.items() if key in PUBLIC}
    kept = {key: value for key, value in kept.items() if key in NESTED or not isinstance(value, dict)}
    if isinstance(kept.get("pretrained_cfg"), dict):
        kept["pretrained_cfg"] = _known(kept["pretrained_cfg"])
    if isinstance(kept.get("model_args"), dict):
        kept["model_args"] = {key: value for key, value in kept["model_args"].items() if key not in RESERVED}
    return kept


def save_config(
    net: nn.Module, original: Path, folder: Path, mean: list[float], std: list[float], image_size: int | None = None
) -> None:
    """Copy config.json from the folder of a model, with the normalisation and size if it was used with others.

    image_size  see `set_image_size`
    """
    own = _data_config(net)
    text = (original / CONFIG).read_bytes()
    pairs = (("mean", mean), ("std", std))
    used = {} if all(torch.equal(torch.tensor(own[key]), torch.tensor(used)) for key, used in pairs) else dict(pairs)
    used |= _sized(image_size, len(mean)) if image_size else {}
    if used:
        config = json.loads(read_text(original / CONFIG))
        config.get("pretrained_cfg", config).update(used)
        text = json.dumps(config, indent=2).encode()
    (folder / CONFIG).write_bytes(text)
