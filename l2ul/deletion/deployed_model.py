"""Open a classifier in the form in which it is deployed, and write it in the same form."""

from collections.abc import Callable, Sequence
import contextlib
import copy
from dataclasses import dataclass, field
import functools
import importlib
import os
from pathlib import Path
import sys

from PIL.Image import Image
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from l2ul import models
from l2ul.common.errors import InputError, is_out_of_memory, rejected
from l2ul.common.files import file_sha256, tensors_sha256
from l2ul.common.image_sizes import checked
from l2ul.common.text import read_text
from l2ul.data.images import as_pixels
from l2ul.deletion.report_schema import REPORT, OpenedBy, WrittenModelHashes, read_report
from l2ul.models import checkpoint as checkpoints
from l2ul.models import huggingface, outputs, timm_models, weight_files, zoo
from l2ul.models.classifier import Classifier, Normalize, check_weights, input_channels, statistics

BUILT = "build"  # `model` of OpenedBy for a module that --build names


@dataclass(frozen=True)
class InputFormat:
    """The size and normalisation of input images. None: as the model defines it.

    image_size  resize the short side to this many pixels and crop the central square
    mean, std   per channel, of the input normalisation, for pixels in [0,1]
    """

    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    @property
    def flags(self) -> dict[str, object]:
        """The values by the names of their flags."""
        return {"--image-size": self.image_size, "--mean": self.mean, "--std": self.std}


@dataclass
class DeployedModel:
    """A classifier, the resizing of its input images, and all that is needed to open it again.

    classifier     takes pixels (N, C, H, W) in [0,1] as `to_pixels` returns them, divided by 255; in eval mode. C is 3,
                   or 1 for a model that takes grey images
    to_pixels      convert an RGB image to uint8 pixels (C, H, W) of the size that the model takes
    class_names    empty if neither the model nor the user gives names
    opened_by      arguments that open it again, without file paths
    path           the file or folder with the weights; None for weights from a hub or from code
    dtypes         of the weights in the file, by name, where not float32
    not_read       files of the model's folder and entries of its weights that were not read
    weights_key    which weights of a file with several
    fixed_input    whether size and normalisation of its inputs cannot be given with it, as it defines them
    notes          sentences on what was read from the file beside the weights
    unreached      weights that no gradient of the predictions for a request reaches, see `preflight.unreached_weights`
    """

    classifier: Classifier
    to_pixels: Callable[[Image], Tensor]
    class_names: list[str]
    opened_by: OpenedBy
    path: Path | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)
    weights_key: str | None = None
    notes: list[str] = field(default_factory=list)
    fixed_input: bool = False
    unreached: list[str] = field(default_factory=list)

    def hashes(self) -> WrittenModelHashes:
        """Return the hex sha256 of the weights, independent of the file format, and of each file by name."""
        weights = tensors_sha256(self.classifier.net.state_dict())
        return {"weights_sha256": weights, "files": files_sha256(self.path) if self.path else {}}

    def detect_outputs(self, images: Tensor) -> None:
        """Find out from images (n, C, H, W) uint8 whether the model returns logits: see `models.outputs.adapt`."""
        if outputs.adapt(self.classifier, as_pixels(images[: outputs.BATCH])) != outputs.LOGITS:
            self.opened_by["outputs"] = self.classifier.outputs

    def as_written(self, classifier: Classifier) -> Classifier:
        """Return the classifier with its weights rounded to the dtypes of the file."""
        if not self.dtypes:
            return classifier
        rounded = copy.deepcopy(classifier)
        state = rounded.net.state_dict()
        for name, dtype in self.dtypes.items():
            state[name].copy_(state[name].to(dtype))
        return rounded

    def write(self, classifier: Classifier, folder: Path, num_classes: int = 0) -> list[str]:
        """Write a classifier to `folder` in the form of this model: `model.*`, or a folder `model` of its library.

        num_classes  see `checkpoint.rewrite`

        Returns the names of the entries of a checkpoint that were left out: see `checkpoint.rewrite`.
        """
        normalize, size = classifier.normalize, self.opened_by["image_size"]
        statistics = models.decimals(normalize.mean), models.decimals(normalize.std)
        if self.opened_by["model"] == huggingface.PREFIX:
            net = copy.deepcopy(classifier.net).cpu().to(next(iter(self.dtypes.values()), torch.float32))
            huggingface.save(net, classifier.name, folder / "model", *statistics, size)
            return []
        if self.opened_by["model"] == timm_models.PREFIX:
            if self.path is None:
                timm_models.save(classifier.net, classifier.name, folder / "model", *statistics)
                return []
            (folder / "model").mkdir()
            timm_models.save_config(classifier.net, self.path, folder / "model", *statistics, size)
            weights = timm_models.weights_file(self.path)
            target = folder / "model" / weights.name
            return checkpoints.rewrite(weights, classifier.net, target, self.weights_key, num_classes)
        if self.path:
            suffix = ".pth.tar" if self.path.name.endswith(".pth.tar") else self.path.suffix
            target = folder / f"model{suffix}"
            return checkpoints.rewrite(self.path, classifier.net, target, self.weights_key, num_classes)
        state = classifier.net.state_dict()
        torch.save({name: checkpoints.compact(tensor.cpu()) for name, tensor in state.items()}, folder / "model.pt")
        return []


def files_sha256(path: Path) -> dict[str, str]:
    """Return the hex sha256 of a file, or of each file in a folder, by name.

    Files whose names begin with a dot are left out: no library reads them, and file managers write some.
    """
    visible = [path] if path.is_file() else (one for one in path.iterdir() if not one.name.startswith("."))
    files = sorted(file for file in visible if file.is_file())
    return {file.name: file_sha256(file) for file in files}


def open_model(
    model: str | None,
    checkpoint: str | Path | None = None,
    build: str | None = None,
    input_format: InputFormat | None = None,
    class_names: Path | None = None,
    weights_key: str | None = None,
) -> DeployedModel:
    """Open a deployed classifier.

    model         a name of this package's models or `torchvision:NAME`; `hf:NAME` or a folder that `save_pretrained`
                  wrote; or the output folder of an earlier request
    checkpoint    file of weights; for torchvision also the name of one of its pretrained weights
    build         `package.module:function` that returns a module, in place of `model`; its code is run
    class_names   text file with one class name per line
    weights_key   which weights of a checkpoint with several, such as model_ema

    Raises InputError if something is missing, damaged, unsafe to read or does not fit.
    """
    opened = _open(model, checkpoint, build, input_format or InputFormat(), weights_key)
    if class_names:
        try:
            opened.class_names = read_text(class_names).splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(
                f"cannot read --class-names {class_names}", "give a UTF-8 text file with one class name per line"
            ) from None
    channels = opened.classifier.channels
    if channels not in (1, 3):
        raise InputError(f"the model takes images of {channels} channels", "expected 1 (grey) or 3 (colour)")
    return opened


def _open(
    model: str | None,
    checkpoint: str | Path | None,
    build: str | None,
    input_format: InputFormat,
    weights_key: str | None,
) -> DeployedModel:
    if build and (model is None or not is_output(Path(model))):
        if model:
            raise InputError(f"--model {model} and --build {build} both name a classifier", "give one of them")
        return _open_built(build, checkpoint, input_format, weights_key)
    if model is None:
        raise InputError("no classifier is named", "give --model, or --build for a module of your own")
    path = Path(model)
    if path.is_file():
        weight_files.kind(path)
        raise InputError(
            f"--model {model} is a file", "give the architecture as --model and the file of weights as --checkpoint"
        )
    if is_output(path):
        unused = {"--checkpoint": checkpoint, "--weights-key": weights_key} | input_format.flags
        _refuse_flags(unused, f"{model}, the output of an earlier request, which defines it")
        return open_output(path, build)
    if path.is_dir():
        is_timm = timm_models.is_folder(path)
        model = f"{timm_models.PREFIX + timm_models.FOLDER if is_timm else huggingface.PREFIX}{model}"
    models.check_name(model, "name a folder that exists", "name a module of your own with --build")
    if model.startswith(timm_models.PREFIX):
        if timm_models.source(model).folder:
            _refuse_flags({"--checkpoint": checkpoint}, f"{model}, which contains its weights")
        if not checkpoint:
            return _open_timm(model, input_format, weights_key)
    if model.startswith(huggingface.PREFIX):
        _refuse_flags({"--weights-key": weights_key}, f"{model}, which contains its weights")
        return _open_huggingface(model, checkpoint, input_format)
    return _open_named(model, checkpoint, input_format, weights_key)


def _refuse_flags(values: dict[str, object], what: str) -> None:
    """Raise InputError for the first flag that has a value."""
    flag = next((flag for flag, value in values.items() if value), None)
    if flag:
        raise InputError(f"{flag} cannot be used with {what}", "leave it out")


def is_output(folder: Path) -> bool:
    """Return whether a folder is the output of a request."""
    return (folder / REPORT).is_file()


def open_output(folder: Path, build: str | None = None) -> DeployedModel:
    """Open the model in the output folder of a request; one that was built by `--build` needs `build` again."""
    report, written = read_report(folder / REPORT)["model"], written_models(folder)
    if len(written) != 1:
        raise InputError(f"{folder} contains {len(written)} models", "expected the one that its report describes")
    opened = reopen(report["opened_by"], report["classes"], written[0], build)
    opened.fixed_input = True
    return opened


def written_models(folder: Path) -> list[Path]:
    """Return the models in the output folder of a request: exactly one unless somebody changed the folder."""
    return sorted(folder.glob("model*"))


def reopen(opened_by: OpenedBy, class_names: list[str], path: Path, build: str | None = None) -> DeployedModel:
    """Open what `DeployedModel.write` wrote to `path`, given `opened_by` and the class names of the report."""
    model = opened_by["model"]
    input_format = InputFormat(opened_by["image_size"], opened_by["mean"], opened_by["std"])
    if model != BUILT:
        _refuse_flags({"--build": build}, f"the model {path}, a {model}")
    if model.startswith(huggingface.PREFIX):
        opened = _open_huggingface(f"{huggingface.PREFIX}{path}", None, input_format)
    elif model == timm_models.PREFIX:
        opened = _open_timm(f"{model}{path}", input_format)
    elif model == BUILT:
        if build is None:
            raise InputError(f"the model {path} needs code of your own", "give the function that builds it as --build")
        opened = _open_built(build, path, input_format)
    else:
        models.check_name(model)
        opened = _open_named(model, path, input_format, preset=opened_by.get("preset"))
    opened.class_names = class_names or opened.class_names  # those of the request, which may have named or ordered them
    if opened_by.get("outputs"):
        opened.opened_by["outputs"] = opened.classifier.outputs = opened_by["outputs"]
    return opened


def _open_huggingface(model: str, checkpoint: str | Path | None, input_format: InputFormat) -> DeployedModel:
    _refuse_flags({"--checkpoint": checkpoint}, f"{model}, which contains its weights")
    configuration = huggingface.configuration(model)
    loaded = models.load(model, configuration.num_labels, None, input_format.mean, input_format.std)
    path = Path(model.removeprefix(huggingface.PREFIX))
    dtype = configuration.dtype or torch.float32
    floating = [name for name, tensor in loaded.net.state_dict().items() if tensor.is_floating_point()]
    return DeployedModel(
        _without_resizing(loaded),
        _in_channels(huggingface.transform(model, input_format.image_size), loaded),
        [str(configuration.id2label.get(index, index)) for index in range(configuration.num_labels)],
        _opened_by(huggingface.PREFIX, input_format),
        path if path.is_dir() else None,
        dict.fromkeys(floating, dtype) if dtype != torch.float32 else {},
        loaded.not_read,
    )


def _open_timm(model: str, input_format: InputFormat, weights_key: str | None = None) -> DeployedModel:
    """Open a model of timm with its own weights: those of a folder, of the hub or that timm downloads."""
    path, dtypes = timm_models.source(model).folder, {}
    if path is None:
        _refuse_flags({"--weights-key": weights_key}, f"the published weights of {model}")
    num_classes = timm_models.num_classes(model)
    loaded = models.load(model, num_classes, None, input_format.mean, input_format.std, weights_key)
    if path:
        fits = functools.partial(checkpoints.fitting_prefixes, net=loaded.net)
        state, _ = checkpoints.read(timm_models.weights_file(path), weights_key, fits)
        dtypes = checkpoints.dtypes(state, loaded.net)
    if input_format.image_size:
        timm_models.set_image_size(loaded.net, input_format.image_size)
    to_pixels = _in_channels(timm_models.transform(loaded.net), loaded)
    class_names, opened_by = timm_models.class_names(model, loaded.net), _opened_by(timm_models.PREFIX, input_format)
    opened = DeployedModel(_without_resizing(loaded), to_pixels, class_names, opened_by, path, dtypes)
    opened.not_read, opened.weights_key = loaded.not_read, weights_key
    return opened


def _open_named(
    model: str,
    checkpoint: str | Path | None,
    input_format: InputFormat,
    weights_key: str | None = None,
    preset: str | None = None,
) -> DeployedModel:
    """Open one of our architectures, of torchvision's, or of timm's with a file of weights.

    preset  the name of torchvision's weights whose resizing is used for a file of weights; None: the first ones
    """
    is_zoo = model.startswith(zoo.PREFIX)
    choice = str(checkpoint) if checkpoint and is_zoo and zoo.has_weights(model, str(checkpoint)) else None
    preset = choice or (preset if is_zoo and preset and zoo.has_weights(model, preset) else None)
    pretrained = zoo.pretrained_weights(model, choice) if is_zoo and (choice or checkpoint is None) else None
    if pretrained:
        path, state, class_names = None, {}, list(pretrained.meta["categories"])
        num_classes = len(class_names)
        _refuse_flags({"--weights-key": weights_key}, f"the published weights of {model}")
    elif checkpoint is None:
        raise InputError(f"no weights are given for {model}", "give their file as --checkpoint")
    else:
        path, class_names = Path(checkpoint), []
        state, _ = checkpoints.read(path, weights_key, functools.partial(models.fitting_prefixes, model))
        num_classes = models.infer_num_classes(model, state, str(path))
    loaded = models.load(model, num_classes, checkpoint, input_format.mean, input_format.std, weights_key)
    if is_zoo and not input_format.image_size:
        to_pixels = zoo.transform(model, preset)
    elif model.startswith(timm_models.PREFIX) and not input_format.image_size:
        to_pixels = timm_models.transform(loaded.net)
    else:
        to_pixels = _central_square(input_format.image_size)
    to_pixels = _in_channels(to_pixels, loaded)
    mean, std = models.decimals(loaded.normalize.mean), models.decimals(loaded.normalize.std)
    opened_by = _opened_by(model, InputFormat(input_format.image_size, mean, std))
    opened_by |= {"preset": preset} if preset else {}
    dtypes = checkpoints.dtypes(checkpoints.split_off_statistics(state, loaded.net)[0], loaded.net)
    opened = DeployedModel(_without_resizing(loaded), to_pixels, class_names, opened_by, path, dtypes)
    opened.notes, opened.not_read, opened.weights_key = loaded.notes, loaded.not_read, weights_key
    return opened


def _open_built(
    build: str, checkpoint: str | Path | None, input_format: InputFormat, weights_key: str | None = None
) -> DeployedModel:
    net = unwrapped(_build(build))
    extra = next((name for name, value in net.state_dict().items() if not isinstance(value, Tensor)), None)
    if extra:
        raise InputError(
            f"the module that {build} returns stores {extra} in its state dict, which is no tensor",
            "remove its get_extra_state",
        )
    path = Path(checkpoint) if checkpoint else None
    state, mean, std = {}, None, None
    _refuse_flags({"--weights-key": weights_key if path is None else None}, f"--build {build} without --checkpoint")
    if path:
        everything, _ = checkpoints.read(path, weights_key, functools.partial(checkpoints.fitting_prefixes, net=net))
        state, mean, std = checkpoints.split_off_statistics(everything, net)
        difference = checkpoints.load_into(net, state)
        if difference:
            raise InputError(f"{path} does not fit the module that {build} returns: {difference}")
        mean, std = None if input_format.mean else mean, None if input_format.std else std
    notes = models.statistics_note(path, mean, std) if path else []
    not_read = checkpoints.outside(state, net)
    normalize = normalization(
        net, input_format.mean or mean, input_format.std or std, f"the module that {build} returns"
    )
    dtypes = checkpoints.dtypes(state, net) or checkpoints.dtypes(net.state_dict(), net)
    net = net.float().requires_grad_(True)  # unlearning trains all weights
    weights = tensors_sha256(net.state_dict())
    with rejected(f"the module that {build} returns cannot be put in eval mode"):
        net.eval()
    if tensors_sha256(net.state_dict()) != weights:
        raise InputError(
            f"the module that {build} returns changes its weights in eval(), as adapters that are merged do",
            "return it with the weights merged for good",
        )
    net = net.to(memory_format=torch.channels_last)
    classifier = Classifier(build, 0, net, nn.Sequential(normalize))
    to_pixels = _in_channels(_central_square(input_format.image_size), classifier)
    opened = DeployedModel(classifier, to_pixels, [], _opened_by(BUILT, input_format), path, dtypes)
    opened.notes, opened.not_read, opened.weights_key = notes, not_read, weights_key
    return opened


def normalization(net: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, what: str) -> Normalize:
    """Return the normalisation of a module of the user; by default 0 and 1. Their number of values decides its input.

    what  names the module in messages
    """
    numbers = mean or std
    if numbers and len(numbers) not in (1, 3):
        raise InputError(
            f"--{'mean' if mean else 'std'} has {len(numbers)} values", "expected 1 for grey or 3 for colour"
        )
    channels = len(numbers) if numbers else input_channels(net)
    pairs = (((0.0,), "--mean", mean), ((1.0,), "--std", std))
    return Normalize(*(statistics(channels, default, (flag, values), what=what) for default, flag, values in pairs))


def unwrapped(net: nn.Module) -> nn.Module:
    """Return the module inside of torch.compile and DataParallel, also where they wrap layers of it."""
    while True:
        children = dict(net.named_children())
        if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
            net = net.module
        elif list(children) == ["_orig_mod"]:  # the class is in torch._dynamo, which is slow to import
            net = children["_orig_mod"]
        else:
            break
    for name, child in children.items():
        inner = unwrapped(child)
        if inner is not child:
            setattr(net, name, inner)
    if net._compiled_call_impl is not None:  # of module.compile()
        net._compiled_call_impl = None
    return net


def _build(build: str) -> nn.Module:
    """Return the module of `package.module:function`. Modules in the working folder are found, as with `python -m`."""
    module, colon, function = build.partition(":")
    if not (module and colon and function):
        raise InputError(f"--build {build} is not valid", "expected package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        net = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--build {build} cannot be imported ({error})", "run the command in the folder that contains it"
        ) from None
    except Exception as error:  # the user's code may raise anything
        if is_out_of_memory(error):
            raise
        raise InputError(f"--build {build} failed ({type(error).__name__}: {error})", "correct the function") from None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())
    check_module(net, f"the module that --build {build} returns")
    return net


def check_module(net: object, what: str) -> None:
    """Raise InputError unless an object of the user's is a module whose weights can be unlearned.

    what  names it, as the start of messages
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"{what} is a {type(net).__name__}", "expected a torch.nn.Module")
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise InputError(
            f"{what} is scripted or traced by torch.jit, or a module in it is, which cannot be copied and trained",
            "expected the torch.nn.Module that it was made from",
        )
    if next(net.parameters(), None) is None and next(net.buffers(), None) is None:
        raise InputError(f"{what} has no weights", "expected a classifier")
    check_weights(net, what)
    if next(net.parameters(), None) is None:
        raise InputError(f"{what} has weights that are no parameters", "expected nn.Parameter")


def _without_resizing(loaded: Classifier) -> Classifier:
    """Return the classifier for images that `to_pixels` has already resized and cropped."""
    classifier = Classifier(loaded.name, loaded.num_classes, loaded.net, nn.Sequential(loaded.normalize))
    classifier.metadata = loaded.metadata
    return classifier.eval()


def _central_square(size: int | None) -> Callable[[Image], Tensor]:
    """Return a function from an RGB image to the pixels of its central square, or of all of it for None."""
    steps = [v2.Resize(size), v2.CenterCrop(size)] if size else []
    return checked(v2.Compose([*steps, v2.PILToTensor()]), size)


def _in_channels(to_pixels: Callable[[Image], Tensor], classifier: Classifier) -> Callable[[Image], Tensor]:
    """Return the function for RGB images to the pixels of a classifier: for a grey one, as Pillow's mode L.

    Grey levels of grey images stay the same in RGB and back.
    """
    return to_pixels if classifier.channels != 1 else lambda image: to_pixels(image.convert("L"))


def _opened_by(model: str, input_format: InputFormat) -> OpenedBy:
    return {
        "model": model,
        "image_size": input_format.image_size,
        "mean": input_format.mean,
        "std": input_format.std,
    }
