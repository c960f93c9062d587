"""`l2ul.forget`: carry out a deletion request on a module and images in memory, as `main_forget.py` does on files."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, field, replace
import hashlib
import inspect
import itertools
from pathlib import Path
import time
from typing import Any
import warnings

from PIL import Image
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from l2ul.common import precision
from l2ul.common.choices import Number, did_you_mean
from l2ul.common.device import plain_defaults
from l2ul.common.errors import InputError, flags_in, in_python, option, rejected
from l2ul.common.image_sizes import TooLarge
from l2ul.common.progress import progress_bar
from l2ul.data.image_files import ImageReader, UnreadableImage, unreadable
from l2ul.deletion import checks, states
from l2ul.deletion.candidates import Candidate, TimeBudget, Unlearner, damage_note
from l2ul.deletion.deployed_model import BUILT, DeployedModel, check_module, unwrapped
from l2ul.deletion.flow import Deletion
from l2ul.deletion.report_schema import AS_STORED, AS_USED, REMOVED
from l2ul.deletion.request import ImageFile, ImageFolder, Request, check_others, logits, make_request
from l2ul.methods import registry
from l2ul.methods.settings import Value
from l2ul.metrics import agreement
from l2ul.metrics.preflight import are_equal, check_alone, copied
from l2ul.models import huggingface
from l2ul.models.classifier import Classifier, Normalize, input_channels, statistics
from l2ul.models.outputs import LOGITS

TOLERANCE = 1e-6  # of the range of pixels: rounding
DARK = 1.01 / 255  # pixels up to this are those of images that were divided by 255 once too often
ImageSource = Tensor | Sequence[Image.Image | str | Path]
# Libraries whose classifiers take normalised pixels, and where to find the normalisation.
NORMALISED = {
    "torchvision": "torchvision's own weights have mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)",
    "timm": "see its pretrained_cfg",
    "l2ul": "or pass the classifier that l2ul.models.load returns, which contains them",
    "transformers": "or pass processor=AutoImageProcessor.from_pretrained(…)",
    "peft": "or pass processor=AutoImageProcessor.from_pretrained(…)",
}


class ForgetWarning(UserWarning):
    """A warning about a result. `result` is what `forget` returns, also if the warning is raised."""

    def __init__(self, result: "Forgotten") -> None:
        super().__init__(result)  # for copies and pickles
        self.result = result

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.result.summary, self.result.note)))


class NotForgotten(ForgetWarning):
    """The warning that an image is not forgotten."""


class Damaged(ForgetWarning):
    """The warning that all images are forgotten, but agreement with the original model is below 50 %."""


@dataclass(frozen=True)
class Forgotten:
    """An unlearned model and what was checked on it. Tensors are on the CPU, one entry for each of the k images.

    model                the unlearned model: a copy of the original one, with its device, modes and memory format
    outcome              "removed from predictions", "partly removed from predictions", "not removed from predictions"
                         or "nothing to remove"
    summary              outcome, numbers of images and agreement in one sentence
    note                 for a result with a warning, why the search ended before the time limit or what damage it did,
                         and what to do; else ""
    labels               (k,) int64: the labels that were passed, or the original model's predictions
    recognised           (k,) bool: the original model predicts the label. Only these images can count as forgotten
    forgotten            (k,) bool: forgotten as the settings demand, by default as used
    forgotten_as_stored  (k,) bool: the unlearned model no longer predicts the label (or predicts the new label)
    forgotten_as_used    (k,) bool: also in 95 % of 64 changed copies, with rounded weights and with recalibrated
                         batch-norm, see `metrics.robustness.as_used`
    predictions_before   (k,) int64, of the original model
    predictions_after    (k,) int64, of the unlearned model
    agreement            percent of other images, made of the images to forget or synthesised, that both models classify
                         alike
    method, settings     what was run; no settings if the model is unchanged
    steps, seconds       steps of the run that was chosen, and seconds of the whole call
    unreached            weights that no gradient of the predictions reaches, such as averaged weights. They may be
                         unchanged, and still contain information about the images
    """

    model: nn.Module = field(repr=False)
    outcome: str
    summary: str
    labels: Tensor
    recognised: Tensor
    forgotten: Tensor
    forgotten_as_stored: Tensor
    forgotten_as_used: Tensor
    predictions_before: Tensor
    predictions_after: Tensor
    agreement: float
    method: str
    settings: Mapping[str, Value]
    steps: int
    seconds: float
    note: str = ""
    unreached: Sequence[str] = ()

    @property
    def successful(self) -> bool:
        """Whether every image that was recognised is forgotten, and at least one was recognised."""
        return self.outcome == REMOVED

    def __str__(self) -> str:
        return self.summary


def forget(
    model: nn.Module,
    images: ImageSource,
    labels: Sequence[int] | Tensor | None = None,
    *,
    new_labels: Sequence[int] | Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    processor: Any = None,
    method: str = "distill",
    minutes: float = 10.0,
    keep_images: ImageSource | None = None,
    surrogate: ImageSource | None = None,
    min_known: float | None = None,
    single_label: bool = False,
    seed: int = 0,
    progress: bool = False,
    **settings: Value | bool,
) -> Forgotten:
    """Make an image classifier forget images, and check the result.

    model         maps pixels (n, C, H, W) in [0,1] to logits (n, classes), in float32; stays as it is. Weights with
                  requires_grad=False are not trained
    images        (k, C, H, W) uint8 or float in [0,1], C is 3 or 1; or a list of PIL images or file names of one size
    labels        (k,) the classes to forget; None: the model's predictions, so the class of an image that it
                  misclassifies is not removed. With labels, wrong preprocessing is noticed
    new_labels    (k,) the classes to predict instead; None: any other class
    mean, std     of the input normalisation, per channel, for a model that takes normalised pixels
    processor     of a Hugging Face model, in place of mean and std: resizes, crops and normalises the images
    method        one that needs no retain set, such as distill, adv or adv_imp
    minutes       time limit: within it, settings with the least damage are searched
    keep_images   images that must keep their predictions; the search takes agreement on them into account
    surrogate     unlabelled images that stand for the training images, for distill: of the same kind, or public ones
    min_known     share of the images that the model must predict as their labels; default: 0.5; of up to 4 all but one
    single_label  do not check whether the model is a multi-label one
    progress      show progress on standard error
    settings      of the method, such as distill_lr=1e-3, in place of a search. robust=0: images count as forgotten as
                  they are stored, which costs less accuracy; by default they must be forgotten as used

    Warns with NotForgotten if an image is not forgotten, and with Damaged if all are but agreement is below 50 %. Where
    warnings are errors, the exception has the result.
    Raises InputError for anything that cannot be unlearned as it is.

    Example: `result = l2ul.forget(model, images, labels)`; then `print(result)` and use `result.model`.
    """
    started = time.perf_counter()
    with _arguments_in_messages():
        check_module(model, "model")
        with _plain_torch(_device_of(model)):
            budget = TimeBudget(60 * _in_range("minutes", minutes, Number(float, 0, open=True)), started)
            if min_known is not None:
                _in_range("min_known", min_known, Number(float, 0, maximum=1), "a number from 0 to 1")
            deletion = _deletion(method, settings, seed, surrogate is not None, progress)

            # The original model and the request.
            opened, reader = _open(model, images, mean, std, processor)
            request = make_request(_read_folder("images", images, reader, labels, new_labels), opened)
            if opened.classifier.outputs != LOGITS:
                raise InputError(
                    "the model returns probabilities, which sum to 1 over the classes",
                    "return logits, the output of its last linear layer, without the Softmax at the end",
                )
            deletion.check(opened, request, min_known, single_label)
            keep = _read_others("keep_images", keep_images, reader, request)
            prepared = deletion.prepare(opened, request, _read_others("surrogate", surrogate, reader, request))

            # Search settings, and judge the model that is returned.
            found = prepared.carry_out(budget, keep)
            unlearned = unwrapped(copied(model))
            _copy_weights(found.model if isinstance(unlearned, Classifier) else found.model.net, unlearned)
            result = _result(prepared.unlearner, request, unlearned, found.best, time.perf_counter() - started)
            result = replace(result, unreached=tuple(opened.unreached))
    if not result.successful:
        result = replace(result, note=in_python(found.early_end or ""))
        warnings.warn(NotForgotten(result), stacklevel=2)
    elif damage := damage_note(result.agreement):
        result = replace(result, note="; ".join(map(in_python, filter(None, [damage, found.early_end]))))
        warnings.warn(Damaged(result), stacklevel=2)
    return result


def _result(
    unlearner: Unlearner, request: Request, unlearned: nn.Module, best: Candidate | None, seconds: float
) -> Forgotten:
    """Judge an unlearned module."""
    after = _with_preprocessing_of(unlearner.model, unlearned)
    verdict = checks.judge(unlearner, after, in_full=False)
    after_logits = logits(after, request.images)
    check_alone(after, request.images, after_logits)
    rows = checks.image_rows(request, after_logits, verdict, [None] * len(request))
    kept = agreement.overall([agreement.measure(after, one) for one in unlearner.probes]) if best else 100.0
    summary = states.headline(rows, request.forget.goal, counted=AS_USED if unlearner.as_used else AS_STORED)
    used = verdict.stored & verdict.used.forgotten
    return Forgotten(
        model=unlearned,
        outcome=states.count(rows).outcome,
        summary=f"{summary}; agreement with the original model {kept:.1f} %",
        labels=request.forget.labels.cpu(),
        recognised=verdict.recognised,
        forgotten=verdict.forgotten,
        forgotten_as_stored=verdict.stored & verdict.recognised,
        forgotten_as_used=used & verdict.recognised,
        predictions_before=request.logits_before.argmax(1),
        predictions_after=after_logits.argmax(1),
        agreement=kept,
        method=unlearner.method,
        settings=registry.loop_settings(unlearner.method, best.values) if best else {},
        steps=best.steps if best else 0,
        seconds=round(seconds, 1),
    )


# The model.


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model. Raise InputError unless it is one, and all weights are in float32."""
    devices = {tensor.device for tensor in _tensors(model)}
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        names = " and ".join(sorted(map(str, devices)))
        raise InputError(f"the model has weights on {names}", "move it to one device with model.to(device)")
    types = {tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point()} - {torch.float32}
    if types:
        name = str(types.pop()).removeprefix("torch.")
        raise InputError(f"the model has weights in {name}", "pass model.float(), and convert the unlearned model back")
    return devices.pop()


@contextlib.contextmanager
def _plain_torch(device: torch.device) -> Iterator[None]:
    """Compute with gradients, in fp32, without autocast and with `plain_defaults`, whatever surrounds the block."""
    with (
        plain_defaults(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        precision.temporarily(device, "fp32"),
    ):
        yield


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for new, own in zip(_tensors(source), _tensors(target), strict=True):
            own.copy_(new)


def _open(
    model: nn.Module, images: object, mean: object, std: object, processor: Any
) -> tuple[DeployedModel, "_PixelReader"]:
    """Return a copy of the model behind its normalisation, and what reads images for it."""
    net = unwrapped(copied(model))
    with rejected("the model cannot be put in eval mode"):
        net.eval()
    if not _are_equal(list(_tensors(net)), list(_tensors(model))):
        raise InputError(
            "the model changes its weights in eval(), as adapters that are merged do",
            "call model.eval() first",
            "pass it with the weights merged for good",
        )
    if (mean is None) != (std is None):
        raise InputError(f"{'std' if mean is None else 'mean'} is given alone", "pass both mean and std")
    if processor is not None and mean is not None:
        raise InputError("processor and mean both define the normalisation", "leave out mean and std")
    if isinstance(net, Classifier):
        if mean is not None or processor is not None:
            raise InputError(
                "a classifier of l2ul.models contains its normalisation",
                "leave out mean, std and processor",
                "build it with another mean and std",
            )
        return _deployed(net, fixed_input=True), _PixelReader(net.channels, has_normalisation=True)
    config = getattr(net, "config", None)
    if hasattr(config, "problem_type"):
        huggingface.check_problem_type(config, "the model")
    name, resize = type(net).__name__, None
    if processor is not None:
        if not hasattr(processor, "image_mean"):
            raise InputError(
                f"processor is a {type(processor).__name__}", "expected an image processor of transformers"
            )
        channels = huggingface.channels(config)
        normalize = next(
            layer for layer in huggingface.processor_layers(processor, name, channels) if isinstance(layer, Normalize)
        )
        resize = huggingface.resize_and_crop(processor)
    else:
        _check_normalised(net, mean)
        values = [_numbers("mean", mean), _numbers("std", std)]
        if isinstance(images, Tensor):
            _check_values(images, "images")
        channels = images.shape[1] if isinstance(images, Tensor) and images.ndim == 4 else None
        channels = channels or (len(values[0]) if mean is not None else input_channels(net))
        pairs = zip(("mean", "std"), ((0.0,), (1.0,)), values, strict=True)
        normalize = Normalize(*(statistics(channels, default, (key, own)) for key, default, own in pairs))
    classifier = Classifier(name, 0, net.to(memory_format=torch.channels_last), nn.Sequential(normalize))
    deployed = _deployed(classifier.to(_device_of(model)), fixed_input=processor is not None)
    return deployed, _PixelReader(channels, resize, has_normalisation=processor is not None)


def _deployed(classifier: Classifier, fixed_input: bool) -> DeployedModel:
    opened_by = {"model": BUILT, "image_size": None, "mean": None, "std": None}
    return DeployedModel(classifier.eval(), lambda image: image, [], opened_by, fixed_input=fixed_input)


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether two models have tensors of the same shapes and values."""
    return len(first) == len(second) and all(itertools.starmap(are_equal, zip(first, second, strict=True)))


def _with_preprocessing_of(original: Classifier, net: nn.Module) -> Classifier:
    """Return a module behind the normalisation of the original model; the module itself if it is a Classifier."""
    if isinstance(net, Classifier):
        return net
    return Classifier(original.name, 0, net, original.preprocess)


def _check_normalised(net: nn.Module, mean: object) -> None:
    """Raise InputError for a classifier of a library whose normalisation is not known."""
    libraries = (base.__module__.partition(".")[0] for base in type(net).__mro__)
    library = next((name for name in libraries if name in NORMALISED), None)
    if mean is None and library:
        raise InputError(
            f"model is a {type(net).__name__} of {library}, which usually takes normalised pixels",
            f"pass the mean and std of its training ({NORMALISED[library]}), or mean=(0, 0, 0), std=(1, 1, 1) if it "
            f"takes pixels in [0,1]",
        )


def _numbers(name: str, values: object) -> list[float] | None:
    """Return finite numbers, of std above 0."""
    if values is None:
        return None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{name} is {values!r}", "expected one number per channel, such as (0.5, 0.5, 0.5)") from None
    if not all(abs(value) < float("inf") and (value > 0 or name == "mean") for value in numbers):
        kind = "finite numbers" if name == "mean" else "numbers above 0"
        raise InputError(f"{name} is {values!r}", f"expected {kind}")
    return numbers


# Images and labels.


@dataclass(frozen=True)
class _PixelReader:
    """Read images as pixels of a model.

    channels           of the images, 1 or 3
    resize             from an RGB image to the uint8 pixels (C, H, W) that the model takes; None: images have its size
    has_normalisation  whether the model or its processor contains it, so that no mean and std can be passed
    """

    channels: int
    resize: Any = None
    has_normalisation: bool = False

    def read(self, images: ImageSource, what: str) -> tuple[list[str], Tensor]:
        """Return the name of each image and the pixels (n, C, H, W), uint8 or float32 in [0,1]; `what` is their name.

        Raises InputError for everything else.
        """
        if isinstance(images, Tensor):
            pixels = _checked_pixels(images, what, self.has_normalisation)
            if self.resize and pixels.dtype != torch.uint8:
                raise InputError(f"{what} has float pixels", "the processor takes 8-bit images: pass uint8")
            names = [f"image {index} of {what}" for index in range(len(pixels))]
            if self.resize:
                pixels = torch.stack([self._resized(one, name) for one, name in zip(pixels, names, strict=True)])
        elif isinstance(images, list | tuple) and all(isinstance(one, Image.Image | str | Path) for one in images):
            if not images:
                raise InputError(f"{what} contains no image", "pass at least one")
            names = [
                f"image {index} of {what}" if isinstance(one, Image.Image) else str(one)
                for index, one in enumerate(images)
            ]
            parts = [self._pixels(one, name) for one, name in zip(images, names, strict=True)]
            odd = next((index for index, one in enumerate(parts) if one.shape != parts[0].shape), None)
            if odd is not None:
                sizes = [" x ".join(map(str, reversed(one.shape[1:]))) for one in (parts[0], parts[odd])]
                raise InputError(
                    f"{names[0]} has {sizes[0]} pixels, {names[odd]} has {sizes[1]}",
                    "resize all images to the size that the model takes",
                )
            pixels = torch.stack(parts)
        else:
            raise InputError(
                f"{what} is a {_type_of(images)}",
                "expected a tensor (k, C, H, W), or a list of PIL images or file names",
            )
        if pixels.shape[1] != self.channels:
            raise InputError(f"{what} has {_channels(pixels.shape[1])}, but the model takes {_channels(self.channels)}")
        return names, pixels

    def _pixels(self, image: Image.Image | str | Path, name: str) -> Tensor:
        """Return the uint8 pixels (C, H, W) of an image or of an image file."""
        if not isinstance(image, Image.Image):
            try:
                image = ImageReader().read(image)
            except UnreadableImage as error:
                raise unreadable(image, error) from None
        try:
            image.load()
        except Exception as error:  # the decoders raise many types
            raise InputError(f"{name} cannot be decoded ({str(error).split(chr(10))[0]})", "leave it out") from None
        if image.mode.startswith(("I", "F")):
            raise InputError(f"{name} has more than 8 bits (mode {image.mode})", "pass its file name", "convert it")
        image = image.convert("RGB" if self.channels == 3 else "L")
        return self._resized(image, name) if self.resize else transforms.pil_to_tensor(image)

    def _resized(self, image: Image.Image | Tensor, name: str) -> Tensor:
        try:
            return self.resize(image)
        except TooLarge as error:
            raise InputError(f"{name} has {error.problem}", *error.advice) from None


def _channels(count: int) -> str:
    return f"{count} channel{'s' * (count != 1)}"


def _type_of(value: object) -> str:
    first = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return f"{type(value).__name__}{first}"


def _checked_pixels(images: Tensor, what: str, has_normalisation: bool) -> Tensor:
    """Return a copy of images on the CPU, uint8 or float32. Raise InputError unless they are pixels (k, C, H, W)."""
    _check_values(images, what)
    shape = " x ".join(map(str, images.shape)) or "of a number"
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        hint = ""
        if images.ndim == 3 and images.shape[0] in (1, 3):
            hint = f": pass one image as {what}[None]"
        elif images.ndim == 4 and images.shape[3] in (1, 3):
            hint = f": pass {what}.permute(0, 3, 1, 2)"
        raise InputError(
            f"{what} has the shape {shape}", f"expected (k, C, H, W) with C of 3 or 1 and k of at least 1{hint}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        name = str(images.dtype).removeprefix("torch.")
        raise InputError(f"{what} has the type {name}", "expected uint8, or float in [0,1]")
    pixels = images.detach().cpu().clone()
    if pixels.dtype == torch.uint8:
        if pixels.max() <= 1:
            raise InputError(
                f"{what} is uint8 with no value above 1, where white is 255", "pass pixels in [0,1] as float"
            )
        return pixels
    pixels = pixels.float()
    if not pixels.isfinite().all():
        index = int((~pixels.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"image {index} of {what} has values that are not finite", "pass pixels in [0,1]")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        normalisation = "which the model contains" if has_normalisation else "and pass it as mean and std"
        if low >= 0 and high > 2:
            hint = "divide them by 255"
        elif high - low > 2:
            hint = f"leave out the normalisation, {normalisation}"
        else:
            hint = f"clamp them, or leave out the normalisation, {normalisation}"
        raise InputError(f"{what} has values from {low:.3g} to {high:.3g}", f"expected pixels in [0,1]: {hint}")
    if high <= DARK:
        raise InputError(f"{what} has no value above {high:.2g}, so all are black", "divide by 255 only once")
    return pixels.clamp(0, 1)


def _check_values(tensor: Tensor, what: str) -> None:
    """Raise InputError unless a tensor is dense and has values."""
    if tensor.is_nested:
        raise InputError(f"{what} is a nested tensor", "pass images of one size, as torch.stack returns them")
    if tensor.layout != torch.strided:
        raise InputError(f"{what} is a sparse tensor", f"pass {what}.to_dense()")
    if tensor.is_meta:
        raise InputError(f"{what} is on the device meta, where tensors have no values", "load it on another one")


def _digest(image: Tensor) -> str:
    """Return the hex sha256 of an image (C, H, W) with 8 bits, so that it is the same for uint8 and float pixels."""
    image = image if image.dtype == torch.uint8 else (255 * image).round().byte()
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def _read_folder(
    what: str, images: ImageSource, reader: _PixelReader, labels: object = None, new_labels: object = None
) -> ImageFolder:
    """Return images of the argument `what` in the form of those of a folder, with their labels as text."""
    names, pixels = reader.read(images, what)
    texts = [
        _class_texts(what, values, len(names)) for what, values in (("labels", labels), ("new_labels", new_labels))
    ]
    files, first = [], {}
    for name, image, *own in zip(names, pixels, *texts, strict=True):
        digest = _digest(image)
        other = first.setdefault(digest, (name, own))
        if other[1] != own:
            raise InputError(f"{other[0]} and {name} are the same image with different labels", "correct one of them")
        files.append(ImageFile(name, digest, digest, *own))
    return ImageFolder(Path(), files, pixels)


def _class_texts(what: str, values: object, count: int) -> list[str | None]:
    """Return class numbers as text; None for each image if there are none."""
    if values is None:
        return [None] * count
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{what} is a {_type_of(values)}", f"expected {count} whole numbers") from None
    _check_values(numbers, what)
    if numbers.ndim == 2 and len(numbers) == count:
        hint = f"{what}.squeeze(1)" if numbers.shape[1] == 1 else f"{what}.argmax(1) of one score per class"
        raise InputError(f"{what} has a row for each image", f"expected class numbers: pass {hint}")
    if numbers.shape != (count,):
        shape = " x ".join(map(str, numbers.shape)) or "of one number"
        raise InputError(f"{what} has the shape {shape}", f"expected one class number for each of {count} images")
    if numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex():
        name = str(numbers.dtype).removeprefix("torch.")
        raise InputError(f"{what} has the type {name}", "expected whole numbers, the classes from 0")
    return [str(number) for number in numbers.tolist()]


def _read_others(what: str, images: ImageSource | None, reader: _PixelReader, request: Request) -> Tensor | None:
    """Return images that are not to be forgotten, on the model's device; None if there are none."""
    return None if images is None else check_others(_read_folder(what, images, reader), option(what), request)


# Settings and messages.


def _in_range(name: str, value: object, allowed: Number, expected: str = "") -> int | float:
    """Return a number within a range, which `expected` describes in words."""
    try:
        return allowed.check(value)
    except InputError:
        raise InputError(f"{name} is {value!r}", f"expected {expected or allowed.expected}") from None


def _deletion(
    method: str, settings: Mapping[str, object], seed: object, has_surrogate: bool, progress: bool
) -> Deletion:
    """Return how the request is carried out. Raise InputError for a setting or seed that does not exist."""
    known = registry.get(method).all_settings
    for name in settings.keys() - known.keys():
        arguments = [one for one in inspect.signature(forget).parameters if one != "settings"]
        hint = did_you_mean(name, [*arguments, *known]).removeprefix("; ") or f"its settings are {', '.join(known)}"
        raise InputError(f"{name} is no argument of forget and no setting of method {method}", hint)
    if not isinstance(seed, int):
        raise InputError(f"seed is {seed!r}", "expected a whole number of at least 0")
    _in_range("seed", seed, Number(int, 0))
    values = [(name, str(int(value) if isinstance(value, bool) else value)) for name, value in settings.items()]
    return Deletion(method, values, seed, has_surrogate, progress=progress_bar if progress else None)


@contextlib.contextmanager
def _arguments_in_messages() -> Iterator[None]:
    """Name arguments instead of flags in InputErrors inside the block; leave out advice with flags that are no such."""
    try:
        yield
    except InputError as error:
        own = InputError(*map(in_python, error.args))
        raise own.without(flags_in(str(own))) from None
