"""A classifier as it is deployed: opened from the form it is in, and written in that form again."""

from collections.abc import Callable, Sequence
import contextlib
import copy
from dataclasses import dataclass, field
import importlib
import os
from pathlib import Path
import sys

from PIL.Image import Image
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from l2ul.common.errors import InputError
from l2ul.common.files import REPORT, file_sha256, tensors_sha256
from l2ul.deletion import verify
import models
from models import checkpoint as checkpoints
from models import huggingface, zoo
from models.classifier import Classifier, Normalize

BUILT = "build"  # the name of a module of somebody's own


@dataclass(frozen=True)
class Sizes:
    """What images are brought to: as the model has it, where None.

    image_size  the short side is resized to it and the square in the middle cut out
    mean, std   of the input normalisation, a channel
    """

    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    @property
    def flags(self) -> dict[str, object]:
        """Each by the name of its flag."""
        return {"--image-size": self.image_size, "--mean": self.mean, "--std": self.std}


@dataclass
class Deployed:
    """A classifier, how images are brought to its size, and what it takes to open it again.

    classifier  takes pixels of the size that `shape` gives, in [0,1]; in eval mode
    shape       from an RGB image to its pixels, uint8 (3, H, W)
    classes     what the classes are called; empty where nothing tells
    opened_by   what opens it again, but for the places of files
    place       the file or folder that it was read from; None where it came from a hub or from code alone
    dtypes      of the weights by name, where they are not float32
    """

    classifier: Classifier
    shape: Callable[[Image], Tensor]
    classes: list[str]
    opened_by: dict[str, object]
    place: Path | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def hashes(self) -> dict[str, object]:
        """Hex sha256 of the files by name, and of the weights themselves, whatever form they are kept in."""
        weights = tensors_sha256(self.classifier.net.state_dict())
        return {"weights_sha256": weights, "files": files_sha256(self.place) if self.place else {}}

    def as_written(self, classifier: Classifier) -> Classifier:
        """The classifier with its weights rounded as they will be in the file: what its reader gets."""
        if not self.dtypes:
            return classifier
        rounded = copy.deepcopy(classifier)
        state = rounded.net.state_dict()
        for name, dtype in self.dtypes.items():
            state[name].copy_(state[name].to(dtype))
        return rounded

    def write(self, classifier: Classifier, folder: Path) -> list[str]:
        """Write `model…` to the folder in the form this one came in: what `save_pretrained` writes, or a file.

        Returns the names of what a file held beside its weights and was left out: see `checkpoint.rewrite`.
        """
        if self.opened_by["model"] == huggingface.PREFIX:
            kept = copy.deepcopy(classifier.net).cpu().to(next(iter(self.dtypes.values()), torch.float32))
            normalize = classifier.normalize
            statistics = [models.decimals(normalize.mean), models.decimals(normalize.std)]
            huggingface.save(kept, classifier.name, folder / "model", *statistics)
            return []
        if self.place:
            return checkpoints.rewrite(self.place, classifier.net, folder / f"model{self.place.suffix}")
        torch.save({name: tensor.cpu() for name, tensor in classifier.net.state_dict().items()}, folder / "model.pt")
        return []


def files_sha256(place: Path) -> dict[str, str]:
    """Hex sha256 of a file, or of each file in a folder, by name."""
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    return {path.name: file_sha256(path) for path in files}


def open_deployed(
    model: str | None,
    checkpoint: str | Path | None = None,
    build: str | None = None,
    sizes: Sizes | None = None,
) -> Deployed:
    """A deployed classifier.

    model       one of ours or torchvision:NAME, with a checkpoint or, of torchvision, its own weights; hf:NAME or the
                folder that `save_pretrained` wrote; the folder that an earlier request wrote
    checkpoint  a file of weights; of torchvision also the name of one of its own sets of them
    build       `package.module:function` that returns a module, in place of `model`: its code is run

    Raises InputError where something is missing, damaged, unsafe to read or of another net.
    """
    sizes = sizes or Sizes()
    if build and (model is None or not _is_output(Path(model))):
        if model:
            raise InputError(f"--model {model} and --build {build} both name the classifier; give one of them")
        return _open_built(build, checkpoint, sizes)
    if model is None:
        raise InputError("no classifier is named; give --model, or --build for a module of your own")
    place = Path(model)
    if place.is_file():
        checkpoints.reject_program(place)
        raise InputError(f"--model {model} is a file; name the net by --model and its file of weights by --checkpoint")
    if _is_output(place):
        _refuse(
            {"--checkpoint": checkpoint} | sizes.flags, f"{model}, which a request wrote and which tells them itself"
        )
        return open_output(place, build)
    if place.is_dir():
        model = f"{huggingface.PREFIX}{model}"
    models.check_name(model)
    opened = _open_huggingface if model.startswith(huggingface.PREFIX) else _open_named
    return opened(model, checkpoint, sizes)


def _refuse(given: dict[str, object], what: str) -> None:
    """Raise InputError for the first flag that has a value, where `what` the classifier is leaves no use for it."""
    flag = next((flag for flag, value in given.items() if value), None)
    if flag:
        raise InputError(f"{flag} is not for {what}; leave it out")


def _is_output(folder: Path) -> bool:
    return (folder / REPORT).is_file()


def open_output(folder: Path, build: str | None = None) -> Deployed:
    """The classifier that a request wrote to the folder.

    A module of somebody's own needs the `build` that it was named by then.
    """
    told, there = verify.read_report(folder / REPORT)["model"], written(folder)
    if len(there) != 1:
        raise InputError(f"{folder} holds no model; put the one that the report is about there")
    return reopen(told["opened_by"], told["classes"], there[0], build)


def written(folder: Path) -> list[Path]:
    """The model that a request wrote to the folder; more or less than one only where others meddled."""
    return sorted(folder.glob("model*"))


def reopen(opened_by: dict[str, object], classes: list[str], place: Path, build: str | None) -> Deployed:
    """What `Deployed.write` wrote, from the `opened_by` and `classes` of the one that wrote it."""
    model, sizes = opened_by["model"], Sizes(*(opened_by[name] for name in ("image_size", "mean", "std")))
    if model != BUILT:
        _refuse({"--build": build}, f"the model {place}, a {model}")
    if model == huggingface.PREFIX:
        deployed = _open_huggingface(f"{model}{place}", None, sizes)
    elif model == BUILT:
        if build is None:
            raise InputError(f"the model {place} is a module of your own; name by --build what builds it")
        deployed = _open_built(build, place, sizes)
    else:
        deployed = _open_named(model, place, sizes)
    deployed.classes = deployed.classes or classes
    return deployed


def _open_huggingface(model: str, checkpoint: str | Path | None, sizes: Sizes) -> Deployed:
    _refuse({"--checkpoint": checkpoint}, f"{model}, which has its weights in it")
    told = huggingface.configuration(model)
    loaded = models.load(model, told.num_labels, None, sizes.mean, sizes.std)
    place = Path(model.removeprefix(huggingface.PREFIX))
    classes = [str(told.id2label.get(index, index)) for index in range(told.num_labels)]
    kind = told.dtype or torch.float32
    return Deployed(
        _on_shaped(loaded),
        _square(sizes.image_size) if sizes.image_size else huggingface.transform(model),
        classes,
        _opened_by(huggingface.PREFIX, sizes),
        place if place.is_dir() else None,
        {name: kind for name, tensor in loaded.net.state_dict().items() if tensor.is_floating_point()}
        if kind != torch.float32
        else {},
    )


def _open_named(model: str, checkpoint: str | Path | None, sizes: Sizes) -> Deployed:
    is_zoo = model.startswith(zoo.PREFIX)
    choice = str(checkpoint) if checkpoint and is_zoo and zoo.has_weights(model, str(checkpoint)) else None
    own = zoo.pretrained_weights(model, choice) if is_zoo and (choice or checkpoint is None) else None
    if own:
        place, state, classes = None, {}, list(own.meta["categories"])
        count = len(classes)
    elif checkpoint is None:
        raise InputError(f"no weights are given for {model}; name their file with --checkpoint")
    else:
        place, classes = Path(checkpoint), []
        state, _ = checkpoints.read(place)
        count = models.infer_num_classes(model, state, str(place))
    loaded = models.load(model, count, checkpoint, sizes.mean, sizes.std)
    shape = zoo.transform(model, choice) if is_zoo and not sizes.image_size else _square(sizes.image_size)
    known = Sizes(sizes.image_size, models.decimals(loaded.normalize.mean), models.decimals(loaded.normalize.std))
    return Deployed(_on_shaped(loaded), shape, classes, _opened_by(model, known), place, _dtypes(state, loaded.net))


def _open_built(build: str, checkpoint: str | Path | None, sizes: Sizes) -> Deployed:
    net = _built(build)
    place = Path(checkpoint) if checkpoint else None
    state = checkpoints.read(place)[0] if place else {}
    wrong = checkpoints.load_into(net, state) if place else None
    if wrong:
        raise InputError(f"{place} does not fit what {build} builds: {wrong}")
    preprocess = nn.Sequential(Normalize(sizes.mean or (0.0,) * 3, sizes.std or (1.0,) * 3))
    dtypes = _dtypes(state, net) or _dtypes(net.state_dict(), net)
    net = net.float().eval().requires_grad_(True)  # for the loop; what is written are its values
    classifier = Classifier(build, 0, net, preprocess)
    return Deployed(classifier, _square(sizes.image_size), [], _opened_by(BUILT, sizes), place, dtypes)


def _built(build: str) -> nn.Module:
    """The module that `package.module:function` returns; modules in the working folder are found, as by python -m."""
    module, colon, function = build.partition(":")
    if not (module and colon and function):
        raise InputError(f"--build {build} is not allowed; expected package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        net = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"--build {build} cannot be imported ({error}); run from the folder that has it") from None
    except Exception as error:  # whatever the user's own code raises is the user's to mend
        raise InputError(f"--build {build} failed ({type(error).__name__}: {error}); mend it") from None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())
    if isinstance(net, torch.jit.ScriptModule) or not isinstance(net, nn.Module):
        raise InputError(f"--build {build} returned a {type(net).__name__}; expected a torch.nn.Module")
    if next(net.parameters(), None) is None:
        raise InputError(f"--build {build} returned a module without weights; expected a classifier")
    return net


def _on_shaped(loaded: Classifier) -> Classifier:
    """The same net for pixels that have been resized and cropped already: only normalised."""
    classifier = Classifier(loaded.name, loaded.num_classes, loaded.net, nn.Sequential(loaded.normalize))
    return classifier.eval()


def _square(size: int | None) -> Callable[[Image], Tensor]:
    """From an RGB image to its pixels: the middle of it in this size, or as it is."""
    steps = [v2.Resize(size), v2.CenterCrop(size)] if size else []
    return v2.Compose([*steps, v2.PILToTensor()])


def _opened_by(model: str, sizes: Sizes) -> dict[str, object]:
    return {"model": model, "image_size": sizes.image_size, "mean": sizes.mean, "std": sizes.std}


def _dtypes(state: dict[str, Tensor], net: nn.Module) -> dict[str, torch.dtype]:
    """Of the weights of a file, by the net's own names, where they are not float32."""
    own = set(net.state_dict())
    prefix = checkpoints.wrapping_prefix(state, own)
    found = {key.removeprefix(prefix): tensor.dtype for key, tensor in state.items() if tensor.is_floating_point()}
    return {name: dtype for name, dtype in found.items() if name in own and dtype != torch.float32}
