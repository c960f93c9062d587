"""Classifiers that take pixels in [0,1] and return logits: `build` an untrained one, `load` a trained one, `save` it.

A model is one of this package (`OWN`), of torchvision (`torchvision:NAME`), of timm (`timm:NAME_OR_FOLDER`), of Hugging
Face (`hf:NAME_OR_FOLDER`), or your own (`register`). This package knows nothing of unlearning.
"""

from collections.abc import Callable, Sequence
import functools
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from l2ul.common.device import float32_by_default
from l2ul.common.errors import InputError
from l2ul.common.files import atomic, file_sha256, own_code_sha256, tensors_sha256
from l2ul.models import checkpoint as checkpoints
from l2ul.models import huggingface, lenet, resnet, resnet_cifar100, resnet_small, stems, timm_models, zoo
from l2ul.models.classifier import (
    Classifier,
    Normalize,
    check_weights,
    first_colour_convolution,
    input_channels,
    make_grey,
    statistics,
)

SUFFIX = ".safetensors"
OWN = {name: family for family in (resnet, resnet_cifar100, resnet_small, stems, lenet) for name in family.NAMES}

BUILT_IN = frozenset(OWN)
TRAIN_OWN = "train them with a file that registers the network and calls a training script (docs/extending.md)"
FROM_A_FILE = "for a network of your own, start the command from the file that registers it (docs/extending.md)"

__all__ = ["OWN", "Classifier", "build", "check_name", "load", "load_saved", "register", "save", "saved_suffix"]


def register(
    name: str,
    build: Callable[[int], nn.Module],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Register a model of your own.

    build      a function from the number of classes to a network that takes normalised images
    mean, std  of the input normalisation, per channel: one value for a network that takes grey images. None: 0 and 1,
               and the network takes grey images if it does not accept colour images
    """
    own_code_sha256([build])  # reads the user's files now, as they may be edited while this process runs
    statistic = mean if mean is not None else std
    OWN[name] = SimpleNamespace(
        MEAN=mean if mean is not None else (0,) * len(statistic or "RGB"),
        STD=std if std is not None else (1,) * len(statistic or "RGB"),
        CHANNELS=len(statistic) if statistic else None,
        build=lambda name, num_classes: build(num_classes),
    )


def is_of_user(name: str) -> bool:
    """Return whether a name is of a model that the user registers, in this process or in another one."""
    return name not in BUILT_IN and ":" not in name


def check_name(name: str, *advice: str) -> None:
    """Raise InputError unless `name` is in `OWN`, or torchvision:NAME, timm:NAME_OR_FOLDER or hf:NAME_OR_FOLDER.

    advice  alternatives to these names, for the message; by default how the commands take a network of the user
    """
    if name.startswith(timm_models.PREFIX):
        timm_models.source(name)
        return
    if name in OWN or name in zoo.names() or (name.startswith(huggingface.PREFIX) and name != huggingface.PREFIX):
        return
    near = zoo.PREFIX + name
    hint = f"did you mean {near}? " if near in zoo.names() else ""
    raise InputError(
        f"unknown model {name!r}: {hint}expected one of {', '.join(OWN)}, torchvision:NAME, timm:NAME_OR_FOLDER or "
        f"hf:NAME_OR_FOLDER",
        *(advice or [FROM_A_FILE]),
    )


def has_weights(name: str, choice: str | Path) -> bool:
    """Return whether `choice` is the name of pretrained weights of the torchvision model `name`."""
    return name in zoo.names() and zoo.has_weights(name, str(choice))


@float32_by_default()
def build(
    name: str,
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """Return an untrained classifier.

    name       a name in `OWN`, `torchvision:NAME`, `timm:NAME_OR_FOLDER` or `hf:NAME_OR_FOLDER`
    mean, std  of the input normalisation, per channel; None: those of the model family
    """
    check_name(name)
    if name.startswith(huggingface.PREFIX):
        return _with_statistics(Classifier(name, num_classes, *huggingface.build(name, num_classes)), mean, std)
    return _classifier(name, num_classes, _network(name, num_classes), mean, std)


def _family(name: str):
    """Return what builds the networks of this package, of timm, of torchvision or of the user by name."""
    return OWN.get(name) or (timm_models if name.startswith(timm_models.PREFIX) else zoo)


def _network(name: str, num_classes: int) -> nn.Module:
    """Return an untrained network of this package, of timm, of torchvision or of the user."""
    net = _family(name).build(name, num_classes)
    check_weights(net, f"the model {name}")
    return net


def _classifier(
    name: str, num_classes: int, net: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Classifier:
    """Return a network behind its normalisation; None: that of the model family. timm has a resize and crop before."""
    family = _family(name)
    if family is timm_models:
        resize, default_mean, default_std = timm_models.data_layers(name, net)
    else:
        resize, default_mean, default_std = [], family.MEAN, family.STD
    channels = getattr(family, "CHANNELS", None) or input_channels(net)
    pairs = ((default_mean, "--mean", mean), (default_std, "--std", std))
    values = [statistics(channels, default, (flag, chosen), what=name) for default, flag, chosen in pairs]
    return Classifier(name, num_classes, net, nn.Sequential(*resize, Normalize(*values)))


@float32_by_default()
def load(
    name: str,
    num_classes: int,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights_key: str | None = None,
) -> Classifier:
    """Return a trained classifier in eval mode, in channels-last format, with `source` and `sha256` of its weights.

    checkpoint  a file of weights (safetensors, or a pickle of tensors). For torchvision also the name of a set of
                pretrained weights; None is the first set. `hf:` and `timm:` models need no file.
    mean, std   of the input normalisation; None: those in the file, or else those of the model family
    weights_key which weights of a file with several, such as `model_ema`, see `checkpoint.read`

    Raises InputError if the weights are missing, damaged, unsafe to read or of another network.
    """
    check_name(name)
    folder = timm_models.source(name).folder if _family(name) is timm_models and checkpoint is None else None
    if folder:
        timm_models.check_num_classes(name, num_classes)
        checkpoint = timm_models.weights_file(folder)
    if checkpoint is None or has_weights(name, checkpoint):
        classifier = _with_statistics(_published(name, num_classes, checkpoint), mean, std)
    else:
        classifier = _from_file(name, num_classes, Path(checkpoint), mean, std, weights_key)
    if folder:
        classifier.not_read = [*timm_models.unread_files(folder), *(f"{key} (weights)" for key in classifier.not_read)]
    return classifier.eval().to(memory_format=torch.channels_last)


def _published(name: str, num_classes: int, choice: str | None) -> Classifier:
    if name in OWN:
        raise InputError(f"{name} has no weights to download", "name a file with --checkpoint")
    if name.startswith(huggingface.PREFIX):
        net, preprocess, not_read = huggingface.load(name, num_classes)
        classifier = Classifier(name, num_classes, net, preprocess)
        classifier.not_read = not_read
        classifier.source = name
    elif name.startswith(timm_models.PREFIX):
        classifier = _classifier(name, num_classes, timm_models.load(name, num_classes), None, None)
        classifier.source = name
    else:
        state, source, mean, std = zoo.pretrained_state(name, num_classes, choice)
        classifier = build(name, num_classes, mean, std)
        _fill(classifier, state, source)
        classifier.source = source
    classifier.sha256 = tensors_sha256(classifier.net.state_dict())
    return classifier


def _from_file(
    name: str,
    num_classes: int,
    path: Path,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    weights_key: str | None,
) -> Classifier:
    net = _network(name, num_classes)

    def fitting(state: dict[str, Tensor]) -> list[str]:
        _adapt_channels(net, state)
        return checkpoints.fitting_prefixes(state, net)

    everything, metadata = checkpoints.read(path, weights_key, fitting)
    state, *layer = checkpoints.split_off_statistics(everything, net)
    of_file = [first or metadata.get(key) for first, key in zip(layer, ("mean", "std"), strict=True)]
    chosen = [flag if flag is not None else own for flag, own in zip((mean, std), of_file, strict=True)]
    classifier = _classifier(name, num_classes, net, *chosen)
    _fill(classifier, state, str(path))
    classifier.notes = statistics_note(path, None if mean else layer[0], None if std else layer[1])
    classifier.not_read = checkpoints.outside(state, classifier.net)
    classifier.source, classifier.sha256, classifier.metadata = str(path), file_sha256(path), metadata
    if weights_key is not None:  # the file has several weights: its hash does not tell them apart
        classifier.sha256 = tensors_sha256(classifier.net.state_dict())
    return classifier


def _adapt_channels(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Let the first convolution of a network take grey images if that of a file does."""
    layer = first_colour_convolution(net)
    if layer is None:
        return
    for names in checkpoints.correspondence(state, net.state_dict()):
        shapes = [state[key].shape for key, own in names.own.items() if own == f"{layer}.weight"]
        if any(len(shape) == 4 and shape[1] == 1 for shape in shapes):
            make_grey(net)
            return


def statistics_note(path: Path, mean: Sequence[float] | None, std: Sequence[float] | None) -> list[str]:
    """Return a sentence on the mean and std of a normalisation layer in a file that are used, if there are any."""
    used = {name: " ".join(f"{one:.4g}" for one in values) for name, values in (("mean", mean), ("std", std)) if values}
    shown = ", ".join(f"{name} {values}" for name, values in used.items())
    return [f"{path.name}: uses the input normalisation in the file ({shown})"] if used else []


def _fill(classifier: Classifier, state: dict[str, Tensor], source: str) -> None:
    differences = checkpoints.load_into(classifier.net, state)
    if differences:
        model = f"{classifier.name} with {classifier.num_classes} classes"
        raise InputError(f"{source} does not fit {model}: {differences}{_looks_like(state)}")


def infer_num_classes(name: str, state: dict[str, Tensor], source: str) -> int:
    """Return the number of classes of the weights in a file, given that they are of the model `name`.

    name    a name in `OWN`, torchvision:NAME or timm:NAME
    source  name of the file, for the message

    Raises InputError if they are of another model.
    """
    number = _num_classes(name, state)
    if number is None:
        raise InputError(f"{source} does not fit {name}: no classification layer in it{_looks_like(state)}")
    return number


def fitting_prefixes(name: str, state: dict[str, Tensor]) -> list[str]:
    """Return the prefixes with which the model, for some number of classes, fits a state dict."""
    weights, _, _ = checkpoints.split_off_statistics(state)
    number = _num_classes(name, weights)
    if number is None:
        return []
    with torch.device("meta"):
        net = _family(name).build(name, number)
        _adapt_channels(net, state)
    return checkpoints.fitting_prefixes(state, net)


def _num_classes(name: str, state: dict[str, Tensor]) -> int | None:
    return checkpoints.num_classes(state, functools.partial(_family(name).build, name))


def _looks_like(state: dict[str, Tensor]) -> str:
    """Return a hint at the known network that shares most names and shapes with the file; empty if none is close."""
    shapes = checkpoints.shapes(state)

    def overlap(name: str) -> float:
        own = _known_shapes(OWN.get(name, zoo).build, name)
        names = checkpoints.correspondence(shapes, dict(own))[0].own  # without the prefix of wrappers
        file = {(names[key], shapes[key]) for key in names}
        return len(file & own) / len(file | own)

    shares = {name: overlap(name) for name in (*OWN, *zoo.COMMON)}
    best = [name for name, share in shares.items() if share == max(shares.values()) > 0.5]
    return f"; it looks like {' or '.join(best)} with {_num_classes(best[0], state)} classes" if best else ""


@functools.cache
def _known_shapes(build: Callable[[str, int], nn.Module], name: str) -> frozenset[tuple[str, torch.Size]]:
    with torch.device("meta"):
        return frozenset(checkpoints.shapes(build(name, 2).state_dict()).items())


def _with_statistics(classifier: Classifier, mean: Sequence[float] | None, std: Sequence[float] | None) -> Classifier:
    normalize, channels = classifier.normalize, classifier.channels
    for flag, buffer, values in (("--mean", normalize.mean, mean), ("--std", normalize.std, std)):
        if values is not None:
            numbers = statistics(channels, (), (flag, values), what=classifier.name)
            buffer.copy_(torch.tensor(numbers).view_as(buffer))
    return classifier


def save(classifier: Classifier, path: Path, settings: dict[str, object]) -> None:
    """Write the classifier as a safetensors file with the settings as metadata, or as a folder of its library.

    path  ends with .safetensors for a file; `saved_suffix` is the form of each model

    The file uses the layer names of the network without its normalisation, so that other software can load it. The
    metadata has mean and std. Folders have no settings.
    """
    mean, std = decimals(classifier.normalize.mean), decimals(classifier.normalize.std)
    folder_format = _folder_format(classifier.name)
    if folder_format and Path(path).suffix != SUFFIX:
        with atomic(path) as part:
            folder_format.save(classifier.net, classifier.name, part, mean, std)
        return
    described = {"model": classifier.name, "num_classes": classifier.num_classes, "mean": mean, "std": std}
    checkpoints.write(path, classifier.net, settings | described)


@float32_by_default()
def load_saved(path: Path, like: Classifier) -> Classifier:
    """Return the classifier that `save` wrote to `path`, in the form of its `saved_suffix`.

    like  a classifier of the same model
    """
    folder_format = _folder_format(like.name)
    name, file = (f"{folder_format.PREFIX}{path}", None) if folder_format else (like.name, path)
    loaded = load(name, like.num_classes, file)
    loaded.name, loaded.outputs = like.name, like.outputs  # the name is not the path of the saved folder
    for ours, theirs in zip(loaded.normalize.buffers(), like.normalize.buffers(), strict=True):
        ours.copy_(theirs)
    return loaded


def saved_suffix(name: str) -> str:
    """Return the suffix of the file in which an unlearned model is saved; empty for a folder."""
    return "" if _folder_format(name) else SUFFIX


def _folder_format(name: str):
    """Return the library that saves a model as a folder, for models of Hugging Face and timm; else None."""
    return next((library for library in (huggingface, timm_models) if name.startswith(library.PREFIX)), None)


def decimals(statistics: Tensor) -> list[float]:
    """Return float32 numbers as the shortest decimals that convert back to them."""
    return [float(str(value)) for value in statistics.flatten().cpu().numpy()]
