"""Check before any work that a model can be unlearned and fits the data set: outputs, gradients, classes, training."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import copy
from pathlib import Path
import tempfile

import torch
from torch import Tensor, nn

from l2ul.common import distributed
from l2ul.common import precision as precisions
from l2ul.common.errors import InputError, Wording, first_line, is_out_of_memory, option, rejected
from l2ul.common.modes import eval_mode, in_eval_mode, trainable
from l2ul.common.precision import autocast, exactly
from l2ul.data import images as image_sets
from l2ul.data.folder import FolderImages
from l2ul.data.image_files import ImageReader
from l2ul.data.images import Images, as_pixels
from l2ul.metrics import accuracy
from l2ul.models.classifier import logits_of

REPEATS = 6  # further passes of a model that draws random numbers in eval mode
REPEATED = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 1e-2}  # relative difference of logits between equal passes
MEASURED, MEASURED_LARGE = 16, 4  # images on which speed is measured; of inputs larger than `image_sets.LARGE`
# Relative difference of the logits of an image alone and in a batch; kernels differ between batch sizes.
ALONE = {"fp32": 1e-2, "tf32": 0.05, "bf16": 0.05}
MOST_ALONE = 16  # images that `check_alone` classifies alone
NOT_DIFFERENTIABLE = "the backward pass of the model fails", "its forward must be differentiable"


def check_model(model: nn.Module, images: Tensor | FolderImages, precision: str = "fp32") -> int:
    """Return the number of classes of a model that can be unlearned.

    images     (N, C, H, W), uint8 or float in [0,1], N ≥ 1; the first two are used
    precision  of the passes, one of `choices.PRECISIONS`

    The model is in eval mode. It classifies two images twice, then one of them alone, and computes the gradient of the
    logits with respect to pixels and weights. Raises InputError unless

    - the model accepts the images and returns finite or infinite logits (n, classes) with at least two classes,
    - equal passes return equal logits, and the logits of an image do not depend on the other images of the batch,
    - passes change no buffer that is stored with the weights,
    - gradients reach the pixels and at least one weight of a copy, and are finite,
    - the model can be copied, also after a pass with gradients, and the copy has weights of its own.
    """
    images = images[torch.arange(min(2, len(images)))]
    images = torch.cat([images, images.flip(3)]) if len(images) == 1 else images
    device = next(model.parameters()).device
    pixels = as_pixels(images.to(device))
    stored = model.state_dict().keys()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in stored}
    with eval_mode(model), autocast(device, precision):
        logits = _check_outputs(model, pixels)
        _check_buffers(model, buffers)
        trained = copied(model)
        if logits.isfinite().all():  # otherwise later code names the image
            _check_repeatable(model, pixels, logits, REPEATED[precision])
            check_alone(model, pixels[:1], logits[:1], precision)
            _check_gradients(trained, pixels)
            with torch.no_grad():
                trained(pixels)
            copied(trained)  # which fails if a module keeps a tensor of the pass with gradients
    return logits.shape[1]


def check_trained_on(images: Images, metadata: dict[str, object], source: str) -> None:
    """Raise InputError if weights were trained on other images than `images`, as far as their file says.

    metadata  of the file of the weights. Compared are the options of the reader of image files, splits of Hugging Face
              and, for data sets that we split ourselves, train_sha256 and the keys of `images.settings` that it has
    source    name of the file
    """
    # a file of a main_pretrain script names each option that is not the default
    is_ours = "epochs" in metadata and metadata.get("dataset") == images.name
    for name, default in ImageReader().options.items():
        here = images.settings.get(name, default)
        trained = metadata.get(name, default if is_ours else here)
        if trained != here:
            flag = option(name)
            trained, here = (f"{flag} {value}" if value else f"no {flag}" for value in (trained, here))
            raise InputError(
                f"{source} was trained with {trained}, not {here}", "use the same option", "train a classifier for it"
            )
    trained, here, test = (metadata.get("train_split"), *map(images.settings.get, ("train_split", "test_split")))
    if is_ours and trained not in (None, here) and _split(trained) == _split(test):
        raise InputError(
            f"{source} was trained on --train-split {trained}, which may hold images of --test-split {test}",
            f"use --train-split {trained} and a test split beside it",
        )
    if not images.train_sha256:
        return
    for name, value in images.settings.items():
        if metadata.get(name) not in (None, value):
            raise InputError(
                f"{source} was trained with {option(name)} {metadata[name]}, not {value}",
                "use that value",
                f"train a classifier for {value}",
            )
    if metadata.get("train_sha256") not in (None, images.train_sha256):
        raise InputError(
            f"{source} was trained on other images of {images.name}, which may be among the test images here",
            "use the folder of images on which it was trained",
        )


def _split(part: object) -> str:
    """Return the split of a part of it, such as train of train[:80%]."""
    return str(part).partition("[")[0]


def check_fit(model: nn.Module, images: Tensor | FolderImages, num_classes: int, precision: str = "fp32") -> None:
    """Raise InputError unless `check_model` accepts the model and it returns `num_classes` logits per image."""
    classes = check_model(model, images, precision)
    if classes != num_classes:
        raise InputError(
            f"the model has {classes} classes, but the data set has {num_classes}",
            "use weights trained on this data set",
        )


def fastest_precision(model: nn.Module, images: Tensor | FolderImages, *, trains: bool) -> tuple[str, str]:
    """Return fp32 or bf16, whichever is faster for a model on a CPU, and a sentence about it, see `precision.fastest`.

    images  (N, C, H, W), uint8 or float in [0,1], N ≥ 1; the first few are used

    It is fp32 if `check_model` does not accept the model in bf16. Under torchrun the first process decides.
    """

    def measure() -> tuple[str, str]:
        try:
            check_model(model, images, "bf16")
        except InputError as error:
            return "fp32", f"fp32; in bf16 {error}"
        few = images[torch.arange(MEASURED) % len(images)]
        few = few if image_sets.input_side(model, few.shape[-1]) <= image_sets.LARGE else few[:MEASURED_LARGE]
        chosen, seconds = precisions.fastest(model, as_pixels(few), trains=trains)
        rates = ", ".join(f"{name} {len(few) / value:,.0f}" for name, value in seconds.items())
        return chosen, f"{chosen}; images a second, forward and backward: {rates}"

    return distributed.broadcast(measure)


def _check_outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits (n, classes) of one pass."""
    outputs: list[object] = []
    hook = getattr(model, "net", model).register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        with hook, torch.no_grad():
            result = model(pixels)
    except Exception as error:  # the module may be the user's own and raise anything
        if is_out_of_memory(error):
            raise
        # A net may return something from which Classifier cannot take logits.
        refused = _output_error(outputs[0], len(pixels)) if outputs else None
        raise refused or _failed(pixels, error) from None
    error = _output_error(outputs[0] if outputs else result, len(pixels))
    if error:
        raise error
    return logits_of(result).float()


def _failed(pixels: Tensor, error: Exception) -> InputError:
    """Return the error for a forward pass that raised an exception."""
    size, channels = " x ".join(map(str, pixels.shape[2:])), pixels.shape[1]
    why = first_line(error)[:200]
    if any(word in why for word in ("Half", "BFloat16", "Double", "dtype", "ByteTensor", "LongTensor")):
        advice = ("the passes are in float32, so forward must not convert to other types",)
    elif "same device" in why:
        on_cpu = Wording("use --device cpu", "move the model to the CPU")
        advice = "keep every tensor that forward uses as a parameter or buffer of the model", on_cpu
    else:
        advice = ()
    return InputError(
        f"the model does not accept images of {size} pixels and {channels} channel{'s' * (channels > 1)}, or returns "
        f"no logits ({why})",
        *advice,
    )


def _output_error(output: object, count: int) -> InputError | None:
    """Return an error if no logits (count, classes) can be taken from the output of a net; None if they can."""
    try:
        logits = logits_of(output)
    except TypeError:
        return InputError(
            f"the model returns {_describe(output)}, from which no logits can be taken",
            "expected one tensor of logits, or an output with an entry `logits`: return only the logits in its forward",
        )
    if isinstance(output, list | tuple) and not hasattr(output, "logits"):
        others = [entry for entry in output[1:] if isinstance(entry, Tensor) and entry.ndim == 2]
        if others:
            return InputError(
                f"the model returns {_describe(output)}, where several entries may be the logits",
                "return only the logits in its forward, for example in a subclass",
            )
    if not logits.is_floating_point():
        return InputError(
            f"the model returns {_describe(logits)}, which are class numbers or decisions",
            "expected one logit per class: return the values before argmax or rounding",
        )
    is_single = logits.ndim < 2 or (logits.ndim == 2 and logits.shape[1] == 1)
    if is_single and logits.numel() == count:
        return InputError(
            "the model returns one logit per image",
            "expected one logit per class, at least 2: for a binary classifier return "
            "torch.cat([torch.zeros_like(z), z], 1) in its forward, where z is its logit",
        )
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        return InputError(
            f"the model returns {_describe(logits)} for {count} images",
            f"expected one logit per class, a tensor of shape {count} x classes: {_shape_hint(logits, count)}",
        )
    return None


def _shape_hint(logits: Tensor, count: int) -> str:
    if logits.ndim > 2 and len(logits) == count and logits[0].numel() == logits.shape[1]:
        return "return output.flatten(1) in its forward"
    return "use a classifier, or return its logits per image in its forward"


def _describe(output: object) -> str:
    """Return type and shape of an output in words."""
    if isinstance(output, Tensor):
        shape = " x ".join(map(str, output.shape)) or "1"
        return f"a tensor of type {str(output.dtype).removeprefix('torch.')} and shape {shape}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, list(output)[:4])) or 'no entries'}"
    if isinstance(output, list | tuple):
        shapes = [
            " x ".join(map(str, entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__ for entry in output
        ]
        return f"a {type(output).__name__} of {', '.join(shapes[:4]) or 'no entries'}"
    return f"a {type(output).__name__}"


@torch.no_grad()
def _check_repeatable(model: nn.Module, pixels: Tensor, logits: Tensor, tolerance: float) -> None:
    before = _random_state(pixels.device)
    passes = [logits_of(model(pixels)).float()]
    if not torch.equal(before, _random_state(pixels.device)):
        passes += [logits_of(model(pixels)).float() for _ in range(REPEATS)]
    difference = max(_difference(logits, other) for other in passes)
    if not difference <= tolerance:
        raise InputError(
            f"the model is random in eval mode: two passes of the same images return logits that differ by "
            f"{_percent(difference)}",
            "turn dropout off in eval mode (F.dropout needs training=self.training)",
        )


def _random_state(device: torch.device) -> Tensor:
    """Return the states of torch's generators that a pass on the device can use."""
    states = [torch.get_rng_state()]
    return torch.cat([*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states)


@torch.no_grad()
def check_alone(model: nn.Module, images: Tensor, logits: Tensor, precision: str = "fp32") -> None:
    """Raise InputError unless single images have the logits that they have in a batch, and at any time.

    images  (n, C, H, W), uint8 or float in [0,1], on the model's device; of more than MOST_ALONE as many, evenly spread
    logits  (n, classes) of the batch

    The model is in eval mode.
    """
    with eval_mode(model), rejected("the model does not accept a batch of one image"):
        for index in sorted({place * len(images) // MOST_ALONE for place in range(MOST_ALONE)}):
            image, expected = as_pixels(images[index : index + 1]), logits[index : index + 1]
            alone = logits_of(model(image))
            if alone.shape != expected.shape:
                raise InputError(
                    f"the model returns {_describe(alone)} for a batch of one image",
                    f"expected a tensor of shape 1 x {logits.shape[1]}: leave the batch dimension when it squeezes "
                    f"its output",
                )
            difference = _difference(expected, alone.float().to(expected.device))
            if not difference <= ALONE[precision]:
                raise InputError(
                    f"the logits of an image depend on the other images of its batch, on earlier passes or on chance: "
                    f"they differ by {_percent(difference)} from those of the image alone",
                    "in eval mode, batch-norm needs running statistics (track_running_stats=True), and a module must "
                    "not keep values of passes",
                )


def _check_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = dict(model.named_buffers())
    changed = next((name for name in before if not are_equal(before[name], now[name])), None)
    if changed:
        raise InputError(
            f"a pass in eval mode changes {changed.removeprefix('net.')}, a buffer that is stored with the weights, "
            f"so predictions may depend on earlier images",
            "update it in train mode only (observers of quantisation: "
            "model.apply(torch.ao.quantization.disable_observer))",
        )


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have one shape and the same values. Values that are not numbers are equal."""
    if first.shape != second.shape:
        return False
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of logits relative to the largest logit."""
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-6))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 10 else "more than ten times"


def _check_gradients(model: nn.Module, pixels: Tensor) -> None:
    pixels = pixels.detach().clone().requires_grad_()
    weights = trainable(model)
    if not weights:
        raise InputError("no weight of the model requires a gradient, so none can be unlearned", "use requires_grad_()")
    with rejected(*NOT_DIFFERENTIABLE), torch.enable_grad():
        logits = logits_of(model(pixels)).float()
        if not logits.requires_grad:
            raise InputError(
                "the logits of the model have no gradient",
                "remove torch.no_grad, torch.inference_mode and .detach() from its forward",
            )
        # Different factors, so that the gradients of the logits do not cancel.
        factors = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits)
        loss = (logits * factors).sum()
        of_pixels, *of_weights = torch.autograd.grad(loss, [pixels, *weights], allow_unused=True)
    if of_pixels is None or not of_pixels.any():
        raise InputError(
            "the gradient of the logits with respect to the pixels is zero, so no adversarial examples can be made",
            "remove .detach(), rounding and conversion to integers or NumPy from the forward of the model",
        )
    reached = [gradient for gradient in of_weights if gradient is not None]
    if not reached:
        raise InputError(
            "no gradient reaches a weight of the model, so none can be unlearned",
            "its forward must use its parameters without torch.no_grad, .detach() or .data, and by self, as a "
            "function that refers to the module by name uses its weights in copies too",
        )
    if not all(gradient.isfinite().all() for gradient in (of_pixels, *reached)):
        raise InputError(
            "the gradients of the model are not finite, so it cannot be unlearned",
            "check its forward for a root or logarithm of zero, and its weights for values beyond the range of their "
            "type",
        )


def unreached_weights(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the weights that no gradient of the logits of images reaches, such as averaged weights.

    images  (n, C, H, W), uint8 or float in [0,1], on the model's device; the first few are used

    They include matrices among the buffers that are stored with the weights, such as features of training images. If no
    weight of a module is reached, its name with `.*` stands for all of them. `check_model` must accept the model, which
    is in eval mode. Weights with requires_grad=False count as reached if its forward fails with requires_grad=True.
    """
    is_large = image_sets.input_side(model, images.shape[-1]) > image_sets.LARGE
    few = as_pixels(images[: MEASURED_LARGE if is_large else MEASURED])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with rejected(*NOT_DIFFERENTIABLE):
        try:
            reached = _reached_weights(copied(model).requires_grad_(True), few)
        except Exception as error:  # such as a weight that the forward changes in place
            if not frozen or is_out_of_memory(error):
                raise
            reached = frozen | _reached_weights(copied(model), few)
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    matrices = [name for name, one in buffers.items() if one.is_floating_point() and sum(n > 1 for n in one.shape) > 1]
    unreached = [name for name, _ in model.named_parameters() if name not in reached] + matrices
    unreached, reached = ([name.removeprefix("net.") for name in names] for names in (unreached, reached))
    return list(dict.fromkeys(_largest_part(name, reached) for name in unreached))


def _reached_weights(model: nn.Module, images: Tensor) -> set[str]:
    """Return the names of the weights that require a gradient and have one of the logits, in eval mode."""
    model = in_eval_mode(model)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        logits = logits_of(model(images))
        gradients = torch.autograd.grad(logits.sum(), list(weights.values()), allow_unused=True)
    return {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}


def _largest_part(name: str, others: Collection[str]) -> str:
    """Return the name of the largest module that contains a weight and none of the others, with `.*`; else `name`."""
    parts = name.split(".")
    modules = (".".join([*parts[:end], ""]) for end in range(1, len(parts)))
    return next((f"{one}*" for one in modules if not any(other.startswith(one) for other in others)), name)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model. Raise InputError if it cannot be copied."""
    failure = (
        "the model cannot be copied with copy.deepcopy",
        "keep no tensors with a history in its attributes (of weight_norm, spectral_norm and pruning: run a pass under "
        "torch.no_grad() first)",
    )
    with rejected(*failure):
        copy_of_model = copy.deepcopy(model)
    shared = {one.data_ptr() for one in model.parameters()} & {one.data_ptr() for one in copy_of_model.parameters()}
    if shared - {0}:
        raise InputError(
            "copy.deepcopy of the model returns a model with the same weights, so the original could not be kept",
            "remove its __deepcopy__, or let that copy the parameters",
        )
    return copy_of_model


@contextlib.contextmanager
def trial_write(name: str, path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` for a trial: to write a model in its form and open it again.

    name  of the model, for the message

    Some libraries refuse a model only when they write it. Raises InputError for what they raise in the block.
    """
    with tempfile.TemporaryDirectory(".part", f".{path.name}.", path.parent) as folder:
        try:
            yield Path(folder)
        except InputError:
            raise
        except Exception as error:  # of the libraries and of the user's code
            if is_out_of_memory(error) or getattr(error, "errno", None):
                raise
            cause = error.__cause__ or error
            raise InputError(
                f"{name} cannot be written again in its form ({type(cause).__name__}: {first_line(cause)})",
                "correct the model, so that its own library can save and open it",
            ) from None


@exactly()
def check_same_model(written: nn.Module, read: nn.Module, images: Tensor) -> None:
    """Raise InputError unless a model read from its files equals the one that was written.

    Weights must be equal bit by bit. Logits may differ by 1 % of the largest, because a GPU may choose other kernels
    for another memory layout, and with TF32 these round to about 0.1 %. They must be the same for single images.
    """
    expected, state = written.state_dict(), read.state_dict()
    different = [
        name for name, tensor in expected.items() if name not in state or not are_equal(tensor.cpu(), state[name].cpu())
    ]
    before, after = (torch.cat(list(accuracy.logits(model, images, fold=False))) for model in (written, read))
    difference = float((before - after).abs().max() / before.abs().max().clamp_min(1e-9))
    if different or not difference <= 0.01:
        what = (
            f"differs in {', '.join(different[:3])}" if different else f"returns logits that differ by {difference:.1%}"
        )
        raise InputError(
            f"the model read from the written files {what}, so nothing was written",
            "a module must give back the weights that it loads, and must not keep values of earlier passes",
        )
    check_alone(read, images, before)
