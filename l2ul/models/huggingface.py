"""Image classifiers of Hugging Face, by hub name or local folder, with their processor as differentiable layers."""

from collections.abc import Callable
import contextlib
import json
from pathlib import Path
import re
import sys

from PIL.Image import Image
from safetensors import safe_open
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

from l2ul.common.errors import InputError, rejected
from l2ul.common.files import other_files
from l2ul.common.image_sizes import checked
from l2ul.common.text import one_line, read_json
from l2ul.models.classifier import Normalize, check_weights, statistics
from l2ul.models.preprocessing import LEVELS, Resize, agree, smooth_image

PREFIX = "hf:"
ADAPTER = "adapter_config.json"  # of peft
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
PROCESSOR_KEYS = {
    *("image_processor_type", "do_convert_rgb", "do_resize", "size", "default_to_square", "resample", "crop_pct"),
    *("do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
}
OWN_CODE = ("AutoModelForImageClassification", "AutoImageProcessor", "AutoFeatureExtractor")  # keys of auto_map
LABELS = ("id2label", "label2id")  # keys of a configuration that have the names of classes
WEIGHTS = (  # transformers reads the first of these that exists; an index names the files of its parts
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
OTHER_LIBRARIES = {  # by a file that only their models have
    "open_clip_config.json": "open_clip",
    "model_index.json": "diffusers",
    "modules.json": "sentence-transformers",
    "saved_model.pb": "TensorFlow",
    "model.keras": "Keras",
    "hyperparams.yaml": "SpeechBrain",
}
BILINEAR = 2
INTERPOLATION = {  # PIL's filter numbers, as processors store them
    0: InterpolationMode.NEAREST_EXACT,
    1: InterpolationMode.LANCZOS,
    BILINEAR: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


def configuration(name: str):
    """Return the configuration in the folder or on the hub, with `num_labels`, `id2label` and `dtype`."""
    from transformers import AutoConfig

    config = _read(name, AutoConfig.from_pretrained)
    if config.model_type == "timm_wrapper":
        raise _timm_error(name)
    config.dtype = config.dtype or _stored_dtype(Path(name.removeprefix(PREFIX)))
    return config


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the type of the first weight in a folder, which transformers takes if config.json names none.

    None if there are no safetensors, or they cannot be read.
    """
    file = next((name for name in _weights_files(folder) if name.endswith(".safetensors")), "")
    with contextlib.suppress(Exception), safe_open(folder / file, framework="pt") as weights:  # transformers reports it
        types = (weights.get_tensor(name).dtype for name in weights.keys())  # noqa: SIM118
        return next(one for one in types if one.is_floating_point)
    return None


def channels(config) -> int:
    """Return the channels of the images that the model of a configuration takes."""
    parts = (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None))
    return next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)


def transform(name: str, image_size: int | None = None) -> Callable[[Image], Tensor]:
    """Return the processor's resize and crop as a function from RGB images to uint8 pixels (3, H, W).

    image_size  see `_processor`
    """
    return resize_and_crop(_processor(name, image_size))


def _processor(name: str, image_size: int | None = None):
    """Return the processor of a model.

    image_size  to which the short side is resized and the central square cropped; None: as the processor defines

    Raises InputError if the processor cannot resize to this size.
    """
    from transformers import AutoImageProcessor

    processor = _read(name, AutoImageProcessor.from_pretrained)
    if not image_size:
        return processor
    processor.do_resize = processor.do_center_crop = True
    processor.size = {"shortest_edge": image_size}
    processor.crop_size = {"height": image_size, "width": image_size}
    processor.resample = BILINEAR
    if getattr(processor, "crop_pct", None):
        processor.crop_pct = 1.0
    image = to_pil_image(smooth_image(3, 80, 64))
    try:
        pixels = resize_and_crop(processor)(image)
        expected = pil_to_tensor(center_crop(resize(image, image_size), image_size))
        is_right = (pixels.int() - expected.int()).abs().max() <= LEVELS
    except (TypeError, ValueError, RuntimeError):  # such as that of other shapes
        is_right = False
    if not is_right:
        raise InputError(
            f"the processor of {name} ({type(processor).__name__}) cannot resize images to --image-size {image_size}",
            "set the size in its preprocessor_config.json and leave out --image-size",
        )
    return processor


def resize_and_crop(processor) -> Callable[[Image | Tensor], Tensor]:
    """Return a processor's resize and crop as a function from RGB images to uint8 pixels (3, H, W)."""

    def pixels_of(image: Image | Tensor) -> Tensor:
        pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return pixels.round().clamp(0, 255).to(torch.uint8)

    size, _ = _resize_and_crop_sizes(processor)
    return checked(pixels_of, size if isinstance(size, int) else None)


def build(name: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the untrained network and its preprocessing, from the configuration in the folder or on the hub."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = _read(name, AutoConfig.from_pretrained, num_labels=num_classes)
    return AutoModelForImageClassification.from_config(config).float(), _preprocess(name, channels(config))


def load(name: str, num_classes: int) -> tuple[nn.Module, nn.Module, list[str]]:
    """Return the trained network, its preprocessing layers, and what was not read: see `Classifier.not_read`.

    Raises InputError for a network that is not a classifier of images with one class each.
    """
    from transformers import AutoModelForImageClassification

    config = configuration(name)
    _check_hub_adapter(name)
    check_problem_type(config, name)
    net, report = _read(
        name, AutoModelForImageClassification.from_pretrained, output_loading_info=True, dtype=torch.float32
    )
    check_weights(net, name)
    unused = sorted(map(str, report["unexpected_keys"]))
    adapter = next((key for key in unused if re.search(r"lora_|adapter|base_layer|modules_to_save", key)), None)
    if adapter:
        raise InputError(
            f"{name} has weights of an adapter ({adapter}), without which the model is another one",
            "merge the adapter with merge_and_unload() of peft and save the model again with save_pretrained",
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{name} lacks weights of its own network ({', '.join(missing[:3])})", "name a trained classifier"
        )
    if net.config.num_labels != num_classes:
        raise InputError(
            f"{name} has {net.config.num_labels} classes, but the data set has {num_classes}",
            "name a classifier that was trained on this data set",
        )
    files = unread_files(Path(name.removeprefix(PREFIX)))
    return net, _preprocess(name, channels(config)), [*files, *(f"{key} (weights)" for key in unused)]


def check_problem_type(config, name: str) -> None:
    """Raise InputError if a configuration says that its network was trained for several labels, or for numbers."""
    problem = config.problem_type
    if problem in (None, "single_label_classification"):
        return
    what = "a multi-label model" if problem == "multi_label_classification" else "a regression model"
    raise InputError(
        f"{name} is {what} (problem_type {problem} in its config.json), for which the largest logit is not the "
        f"prediction",
        "give a classifier of images with one label each",
    )


def _read(name: str, from_pretrained, **options):
    """Call `from_pretrained` for the folder or hub name. Code in the repository is never run.

    Raises InputError for a model or processor that such code defines: transformers would open another one in its place.
    """
    place = name.removeprefix(PREFIX)
    _quiet()
    hint = "there is no such folder, and it could not be downloaded from the hub"
    if Path(place).is_dir():
        _check_folder(Path(place))
        hint = "expected what save_pretrained writes: config.json, weights, preprocessor_config.json"
    with rejected(f"cannot load {name}: {hint}"):
        content = from_pretrained(place, trust_remote_code=False, **options)
    own_code = getattr(content, "auto_map", None)
    key = next((key for key in OWN_CODE if isinstance(own_code, dict) and key in own_code), None)
    if key:
        raise InputError(
            f"{place} has code of its own ({one_line(str(own_code[key]))}), which is not run, and without which the "
            f"model is another one",
            "remove auto_map from its configuration if it is used without this code; main_forget.py also takes a "
            "function that builds the classifier and a file of its weights",
        )
    return content


def _check_folder(folder: Path) -> None:
    """Raise InputError for a folder with an adapter, which would be ignored, or of another library."""
    if (folder / ADAPTER).is_file():
        raise _adapter_error(str(folder), read_json(folder / ADAPTER))
    config = read_json(folder / "config.json")
    if "model_type" in config:
        return
    if isinstance(config.get("architecture"), str):
        raise _timm_error(str(folder))
    for file, library in OTHER_LIBRARIES.items():
        if (folder / file).exists():
            raise InputError(
                f"{folder} is a model folder of {library} ({file})",
                "expected one of transformers; main_forget.py also takes a function that builds the classifier and a "
                "file of its weights",
            )


def _check_hub_adapter(name: str) -> None:
    """Raise InputError if a repository of the hub has an adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    place = name.removeprefix(PREFIX)
    if Path(place).is_dir():
        return
    file = None
    with contextlib.suppress(Exception):  # the repository was read before, so this means that there is no such file
        file = find_adapter_config_file(place)
    if file:
        raise _adapter_error(place, read_json(Path(file)))


def _adapter_error(place: str, adapter: dict) -> InputError:
    """Return the error for an adapter, with the command that merges it into its base model."""
    base = _plain(adapter.get("base_model_name_or_path")) or "BASE_MODEL"
    code = (
        f"from transformers import AutoImageProcessor as P, AutoModelForImageClassification as M; "
        f"from peft import PeftModel; "
        f"PeftModel.from_pretrained(M.from_pretrained('{base}'), '{place}').merge_and_unload()"
        f".save_pretrained('merged'); "
        f"P.from_pretrained('{base}').save_pretrained('merged')"
    )
    return InputError(
        f"{place} has an adapter of peft ({ADAPTER}), without which the model is another one",
        f'merge it into its base model and give --model merged: python -c "{code}"',
    )


def _timm_error(name: str) -> InputError:
    """Return the error for a model of timm, with the name under which it opens."""
    place = name.removeprefix(PREFIX)
    source = "" if Path(place).is_dir() else "hf_hub:"
    return InputError(f"{place} is a model of timm, not of transformers", f"give --model timm:{source}{place}")


def _plain(value: object) -> str | None:
    """Return a name or path from a file if it can stand in a command as it is; else None."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w./][\w./-]*", value) else None


def unread_files(folder: Path) -> list[str]:
    """Return the files and subfolders (with a final /) of a model folder that opening the model does not read.

    Empty if there is no such folder.
    """
    if not folder.is_dir():
        return []
    return other_files(folder, {"config.json", *PROCESSORS, *_weights_files(folder)})


def _weights_files(folder: Path) -> list[str]:
    """Return the names of the files of weights in a folder that transformers reads: one, or an index and its parts."""
    weights = next((name for name in WEIGHTS if (folder / name).is_file()), "")
    parts = read_json(folder / weights).get("weight_map", {}) if weights.endswith(".index.json") else {}
    return [weights, *(str(part) for part in (parts.values() if isinstance(parts, dict) else ()))]


def _quiet() -> None:
    """Turn off the progress bars of transformers if standard error is not a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _preprocess(name: str, channels: int = 3) -> nn.Sequential:
    """Return the processor's layers, see `processor_layers`."""
    from transformers import AutoImageProcessor

    return processor_layers(_read(name, AutoImageProcessor.from_pretrained), name, channels)


def processor_layers(processor, name: str, channels: int = 3) -> nn.Sequential:
    """Return a processor's resize, crop and normalisation as layers that take pixels in [0,1] of any size.

    name  of the model, for messages

    Raises InputError if the processor does more.
    """
    layers: list[nn.Module] = []
    size, crop = _resize_and_crop_sizes(processor)
    if size is not None:
        layers.append(Resize(size, INTERPOLATION.get(processor.resample, InterpolationMode.BILINEAR)))
    if crop is not None:
        layers.append(v2.CenterCrop(crop))
    if getattr(processor, "do_normalize", False):
        sources = {"image_mean": processor.image_mean, "image_std": processor.image_std}
        for key, values in sources.items():
            values = [values] * channels if isinstance(values, int | float) else list(values)
            values = values[:1] * channels if len(set(values)) == 1 else values
            setattr(processor, key, list(statistics(channels, (), (f"{key} of its processor", values), what=name)))
        layers.append(Normalize(processor.image_mean, processor.image_std))
    else:
        layers.append(Normalize((0.0,) * channels, (1.0,) * channels))
    preprocess = nn.Sequential(*layers)
    _check_layers(name, processor, preprocess, channels)
    return preprocess


def _resize_and_crop_sizes(processor) -> tuple[list[int] | int | None, list[int] | int | None]:
    """Return to what a processor resizes and crops: [height, width], the length of the short side, or None."""
    size = _sides(processor, "size") if getattr(processor, "do_resize", False) else None
    crop = _sides(processor, "crop_size") if getattr(processor, "do_center_crop", False) else None
    part = getattr(processor, "crop_pct", None)
    if part and isinstance(size, int):  # the convention of ConvNeXt: small sizes are cropped from a larger image
        size, crop = (int(size / part), [size, size]) if size < 384 else ([size, size], None)
    return size, crop


def _check_layers(name: str, processor, preprocess: nn.Sequential, channels: int) -> None:
    """Raise InputError unless layers and processor agree on a smooth image: some processors have further steps."""
    pixels = smooth_image(channels)
    try:
        if agree(preprocess, pixels, processor(pixels, return_tensors="pt")["pixel_values"]):
            return
    except InputError:  # such as TooLarge, which is a ValueError too
        raise
    except (NotImplementedError, ValueError):  # of torch
        raise InputError(
            f"the processor of {name} ({type(processor).__name__}) resizes with the filter {processor.resample}, which "
            f"torch does not have",
            "name a model with resample 2 (bilinear) or 3 (bicubic)",
        ) from None
    raise InputError(
        f"the processor of {name} ({type(processor).__name__}) does more than resize, centre crop and normalise, so "
        f"its model cannot be used with pixels in [0,1]",
        "name a model with a plain processor",
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
    raise InputError(f"the processor's {attribute} is {size}", "expected height and width, or shortest_edge")


def save(
    net: nn.Module, name: str, folder: Path, mean: list[float], std: list[float], image_size: int | None = None
) -> None:
    """Write the network and its processor with `save_pretrained`, so that plain transformers code loads them.

    mean, std   normalisation with which the network was used; the saved processor gets them
    image_size  likewise, see `_processor`
    """
    net.save_pretrained(folder)
    processor = _processor(name, image_size)
    if processor.do_normalize or (set(mean), set(std)) != ({0.0}, {1.0}):
        processor.do_normalize, processor.image_mean, processor.image_std = True, mean, std
    processor.save_pretrained(folder)


def save_known(net: nn.Module, name: str, folder: Path, mean: list[float], std: list[float]) -> None:
    """Write the network and its processor as `save`, but only settings that their classes define.

    transformers keeps all other entries of the files from which they were read, such as paths and notes.
    """
    save(net, name, folder, mean, std)
    config = read_json(folder / "config.json")
    kept = {"config.json": _defined(config, net.config) | {key: config[key] for key in LABELS if key in config}}
    for file in PROCESSORS:  # dictionaries in them have the keys of sizes alone, which transformers checks
        kept[file] = {key: value for key, value in read_json(folder / file).items() if key in PROCESSOR_KEYS}
    for file, content in kept.items():
        if content:
            (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _defined(content: dict, config) -> dict:
    """Return the entries of a configuration file that its class defines, also in configurations and dictionaries in it.

    Names of classes are left out.
    """
    default = type(config)().to_dict()
    kept = {}
    for key in sorted(content.keys() & {*default, "model_type"} - {"_name_or_path", *LABELS}):
        value, inner = content[key], getattr(config, key, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            value = _defined(value, inner)
        elif isinstance(value, dict):
            value = {name: one for name, one in value.items() if name in (default.get(key) or ())}
        kept[key] = value
    return kept
