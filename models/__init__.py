"""The classifiers: `build` an untrained one, `load` a trained one, `save` it. All take pixels in [0,1], give logits."""

from collections.abc import Callable, Sequence
import functools
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from l2ul.common.errors import InputError
from l2ul.common.files import atomic, file_sha256, tensors_sha256
from models import checkpoint as checkpoints
from models import huggingface, resnet, resnet_cifar100, resnet_small, stems, zoo
from models.classifier import Classifier, Normalize

OWN = {name: family for family in (resnet, resnet_cifar100, resnet_small, stems) for name in family.NAMES}

__all__ = ["OWN", "Classifier", "build", "check_name", "load", "load_saved", "register", "save", "saved_suffix"]


def register(
    name: str, build: Callable[[int], nn.Module], mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> None:
    """Make `name` a model: `build` gets the number of classes and gives a net that takes normalised images."""
    OWN[name] = SimpleNamespace(MEAN=mean, STD=std, build=lambda name, num_classes: build(num_classes))


def check_name(name: str) -> None:
    """Raise InputError unless `name` is one of ours, torchvision:NAME or hf:NAME_OR_FOLDER."""
    if name in OWN or name in zoo.names() or (name.startswith(huggingface.PREFIX) and name != huggingface.PREFIX):
        return
    near = zoo.PREFIX + name
    hint = f"did you mean {near}? " if near in zoo.names() else ""
    raise InputError(
        f"unknown model {name!r}: {hint}expected one of {', '.join(OWN)}, torchvision:NAME or hf:NAME_OR_FOLDER"
    )


def build(
    name: str, num_classes: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Classifier:
    """An untrained classifier.

    name      one of ours (`OWN`), `torchvision:NAME`, `hf:NAME_OR_FOLDER`
    mean, std of the input normalisation, a channel; by default the family's own
    """
    check_name(name)
    if name.startswith(huggingface.PREFIX):
        return _with_statistics(Classifier(name, num_classes, *huggingface.build(name, num_classes)), mean, std)
    family = OWN.get(name, zoo)
    preprocess = nn.Sequential(Normalize(mean or family.MEAN, std or family.STD))
    return Classifier(name, num_classes, family.build(name, num_classes), preprocess)


def load(
    name: str,
    num_classes: int,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A trained classifier in eval mode, channels last, with `source` and `sha256` of its weights.

    checkpoint  a file of weights (safetensors, or a pickle of tensors); for torchvision also the name of one of its
                own sets of weights, its first by default; `hf:` needs none
    mean, std   override what the file tells, which overrides the family's own

    Raises InputError where the weights are missing, damaged, unsafe to read or of another net.
    """
    check_name(name)
    if checkpoint is None or (name.startswith(zoo.PREFIX) and zoo.has_weights(name, str(checkpoint))):
        classifier = _published(name, num_classes, checkpoint)
    else:
        classifier = _from_file(name, num_classes, Path(checkpoint))
    classifier = _with_statistics(classifier, mean, std)
    return classifier.eval().to(memory_format=torch.channels_last)


def _published(name: str, num_classes: int, choice: str | None) -> Classifier:
    if name in OWN:
        raise InputError(f"no weights given for {name}; name a file with --checkpoint")
    if name.startswith(huggingface.PREFIX):
        classifier = Classifier(name, num_classes, *huggingface.load(name, num_classes))
        classifier.source = name
    else:
        state, source, mean, std = zoo.pretrained_state(name, num_classes, choice)
        classifier = build(name, num_classes, mean, std)
        _fill(classifier, state, source)
        classifier.source = source
    classifier.sha256 = tensors_sha256(classifier.net.state_dict())
    return classifier


def _from_file(name: str, num_classes: int, path: Path) -> Classifier:
    state, metadata = checkpoints.read(path)
    classifier = build(name, num_classes)
    state, mean, std = checkpoints.split_statistics(state)
    _fill(classifier, state, str(path))
    told = [checkpoints.metadata_value(metadata, key) for key in ("mean", "std")]
    classifier.source, classifier.sha256, classifier.metadata = str(path), file_sha256(path), metadata
    return _with_statistics(classifier, mean or told[0], std or told[1])


def _fill(classifier: Classifier, state: dict[str, Tensor], source: str) -> None:
    wrong = checkpoints.load_into(classifier.net, state)
    if wrong:
        what = f"{classifier.name} of {classifier.num_classes} classes"
        raise InputError(f"{source} does not fit {what}: {wrong}{_looks_like(state)}")


def infer_num_classes(name: str, state: dict[str, Tensor], source: str) -> int:
    """How many classes a file's weights tell apart, as those of the net `name`; InputError where they are of another.

    name  one of ours or torchvision:NAME
    """
    found = _num_classes(name, state)
    if found is None:
        raise InputError(f"{source} does not fit {name}: no weights in it tell classes apart{_looks_like(state)}")
    return found


def _num_classes(name: str, state: dict[str, Tensor]) -> int | None:
    return checkpoints.num_classes(state, functools.partial(OWN.get(name, zoo).build, name))


def _looks_like(state: dict[str, Tensor]) -> str:
    """In words the known net, and its number of classes, whose names and shapes are most of a file's; or nothing."""
    file = set(checkpoints.shapes(state).items())

    def overlap(name: str) -> float:
        with torch.device("meta"):
            own = set(checkpoints.shapes(OWN.get(name, zoo).build(name, 2).state_dict()).items())
        return len(file & own) / len(file | own)

    share, best = max((overlap(name), name) for name in (*OWN, *zoo.COMMON))
    return f"; it looks like {best} of {_num_classes(best, state)} classes" if share > 0.5 else ""


def _with_statistics(classifier: Classifier, mean: Sequence[float] | None, std: Sequence[float] | None) -> Classifier:
    for buffer, values in ((classifier.normalize.mean, mean), (classifier.normalize.std, std)):
        if values is not None:
            buffer.copy_(torch.tensor(values).view_as(buffer))
    return classifier


def save(classifier: Classifier, path: Path, settings: dict[str, object]) -> None:
    """Write the classifier: one safetensors file with its settings as metadata; a Hugging Face one as a folder.

    The file holds the net's own layer names, so other software loads it too; mean and std are in the metadata.
    """
    if classifier.name.startswith(huggingface.PREFIX):
        with atomic(path) as part:
            statistics = decimals(classifier.normalize.mean), decimals(classifier.normalize.std)
            huggingface.save(classifier.net, classifier.name, part, *statistics)
        return
    described = {
        "model": classifier.name,
        "num_classes": classifier.num_classes,
        "mean": decimals(classifier.normalize.mean),
        "std": decimals(classifier.normalize.std),
    }
    checkpoints.write(path, classifier.net, settings | described)


def load_saved(path: Path, like: Classifier) -> Classifier:
    """What `save` wrote of a classifier of the same kind as `like`."""
    is_folder = like.name.startswith(huggingface.PREFIX)
    name, file = (f"{huggingface.PREFIX}{path}", None) if is_folder else (like.name, path)
    loaded = load(name, like.num_classes, file)
    loaded.name = like.name  # its own, not that of this copy
    for ours, theirs in zip(loaded.normalize.buffers(), like.normalize.buffers(), strict=True):
        ours.copy_(theirs)
    return loaded


def saved_suffix(classifier: Classifier) -> str:
    """How the name of what `save` writes ends: a file's, or a folder's, which is nothing."""
    return "" if classifier.name.startswith(huggingface.PREFIX) else ".safetensors"


def decimals(statistics: Tensor) -> list[float]:
    """A few float32 numbers as the shortest decimals that read back as them."""
    return [float(str(value)) for value in statistics.flatten().cpu().numpy()]
