"""Files of weights: find them, read them without running code from them, load them into a network, write them."""

from collections.abc import Callable, Collection
import contextlib
import json
from pathlib import Path
import pickle
import zipfile

from safetensors import safe_open
from safetensors.torch import save as serialize
import torch
from torch import Tensor, nn

from l2ul.common.errors import InputError
from l2ul.common.files import atomic

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "1.", "net.")  # of DataParallel, the released Sequential(normalise, model), our Classifier
Statistics = tuple[float, ...]


def candidates(dataset: str, model: str, data_dir: Path) -> list[Path]:
    """Return the files in which weights for a data set and a model are looked for, in order.

    Pretraining saves to the first. The second is in this repository, which has the weights for the digits. The others
    are in the layout of the released scripts.
    """
    here = Path(__file__).resolve().parent.parent
    file = Path("weights") / f"{dataset}_{model.replace(':', '_').replace('/', '_')}.safetensors"
    released = Path(f"{dataset}_pretrained_models") / f"{model.removesuffix('_cifar100')}.pt"
    return [Path(data_dir) / file, here / "data" / file, Path(data_dir) / released, here / released]


def find(dataset: str, model: str, data_dir: Path) -> Path | None:
    """Return the first of `candidates` that exists; None if there is none."""
    return next((path for path in candidates(dataset, model, data_dir) if path.is_file()), None)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name and the metadata of a safetensors file or a pickle.

    A pickle holds a state dict, or a dictionary with a state dict under `state_dict`, `model_state_dict`, `model` or
    `net`; it has no metadata. Raises InputError for a file that is missing, damaged, has no weights, or would run code
    when it is read.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; name an existing file with --checkpoint")
    content, metadata = _content(path)
    return (content, metadata) if metadata is not None else (_tensors(content, path), {})


def _content(path: Path) -> tuple[object, dict[str, str] | None]:
    """Return the content of a file, and the metadata of a safetensors file or None for a pickle."""
    try:
        reject_program(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        return torch.load(path, map_location="cpu", weights_only=True), None
    except InputError:
        raise
    except pickle.UnpicklingError:
        if _first_bytes(path) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # the file is complete
            raise InputError(
                f"{path} holds more than tensors and could run code when read, so it was not read; "
                f"save its state_dict() instead, preferably as safetensors"
            ) from None
        raise InputError(f"{path} is damaged or is no checkpoint; download it again") from None
    except Exception as error:  # zipfile, pickle, torch and safetensors each raise their own for damaged files
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or is no checkpoint ({first[:120]}); download it again") from None


def reject_program(path: Path) -> None:
    """Raise InputError for a TorchScript or torch.export file, because reading it may run its code."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [Path(name) for name in archive.namelist()]
    kinds = {"TorchScript": "code", "torch.export": "models"}
    kind = next((kind for kind, folder in kinds.items() if any(name.parts[1:2] == (folder,) for name in names)), None)
    if kind:
        raise InputError(
            f"{path} is a {kind} program, which can run code when it is read, and cannot take unlearned weights; "
            f"use the weights of the module that it was made from (its state_dict(), best as safetensors)"
        )


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name of a pickle's content. They are not copies."""
    content = _weights(content)
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise InputError(
            f"{path} holds no state dict (tensors by layer name), at its top or under {', '.join(WRAPPERS)}"
        )
    return dict(content)


def _wrapper(content: object) -> str | None:
    """Return the key under which a dictionary holds another one with the weights; None if there is none."""
    if not isinstance(content, dict):
        return None
    return next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)


def split_statistics(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Statistics | None, Statistics | None]:
    """Return the weights without the mean and std of a normalisation layer, and these two, or None if absent."""
    keys = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if kind in ("mean", "std") and tensor.numel() == 3 and {f"{layer}.mean", f"{layer}.std"} <= state.keys():
            keys[kind] = key
    weights = {key: tensor for key, tensor in state.items() if key not in keys.values()}
    values = {kind: tuple(state[key].flatten().tolist()) for kind, key in keys.items()}
    return weights, values.get("mean"), values.get("std")


def wrapping_prefix(keys: Collection[str], expected: set[str]) -> str:
    """Return the prefix that wrappers have put before all layer names of a file."""
    prefix = ""
    while keys and not expected & {key.removeprefix(prefix) for key in keys}:
        more = next((p for p in PREFIXES if all(key.startswith(prefix + p) for key in keys)), None)
        if more is None:
            break
        prefix += more
    return prefix


def load_into(net: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Load the weights of a file into the network, without the prefix of wrappers.

    Returns None, or a description of the differences if the weights do not fit; the network is then unchanged.
    """
    prefix = wrapping_prefix(state, set(net.state_dict()))
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    wrong = mismatch(state, net)
    if wrong is None:
        net.load_state_dict(state, strict=False)  # `mismatch` has compared all names except batch-norm's step counters
    return wrong


def num_classes(state: dict[str, Tensor], build: Callable[[int], nn.Module]) -> int | None:
    """Return the number of classes of the weights; None if they are not of the network that `build` returns.

    build  returns the network for a number of classes

    The number is the length of a tensor whose shape depends on the number of classes.
    """
    with torch.device("meta"):
        few, more = (shapes(build(number).state_dict()) for number in (2, 3))
    prefix = wrapping_prefix(state, set(few))
    heads = (f"{prefix}{name}" for name in few if few[name] != more[name])
    return next((len(state[name]) for name in heads if name in state and state[name].ndim), None)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name, without batch-norm's step counters, which old files lack."""
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def mismatch(state: dict[str, Tensor], net: nn.Module) -> str | None:
    """Return a description of the first differences between file and network; None if they fit.

    Compared are names and shapes, and that weights which are floating-point in the network are so in the file.
    """
    file, own = shapes(state), shapes(net.state_dict())
    differing = [f"{key} is {file[key]}, not {own[key]}" for key in own if key in file and file[key] != own[key]]
    kinds = {key: tensor.dtype for key, tensor in net.state_dict().items() if tensor.is_floating_point()}
    differing += [
        f"{key} is {_type(state[key].dtype)}, not {_type(kinds[key])}"
        for key in kinds
        if file.get(key) == own.get(key) and key in file and not state[key].is_floating_point()
    ]
    missing = [f"{key} {own[key]} is missing" for key in own if key not in file]
    extra = [f"{key} {file[key]} is unexpected" for key in file if key not in own]
    total = len(differing) + len(missing) + len(extra)
    first = (differing[:2] + missing[:2] + extra[:2])[:4]
    return f"{'; '.join(first)}{f' (of {total} differences)' if total > len(first) else ''}" if total else None


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(path: Path, net: nn.Module, metadata: dict[str, object]) -> None:
    """Write the network's weights as safetensors, atomically. Values of the metadata are stored as JSON."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in net.state_dict().items()}
    with atomic(path) as part:
        part.write_bytes(serialize(state, {key: json.dumps(value) for key, value in metadata.items()}))


def metadata_value(metadata: dict[str, str], key: str) -> object:
    """Return a metadata value that `write` stored; None if it is missing or was written by other software."""
    with contextlib.suppress(KeyError, json.JSONDecodeError):
        return json.loads(metadata[key])
    return None


def rewrite(source: Path, net: nn.Module, target: Path) -> list[str]:
    """Write a network's weights in the form of the file `source` that they came from: wrappers, names, types, metadata.

    Other entries with tensors, such as the state of an optimizer or averaged weights, are left out, because they derive
    from the original weights. Returns the names of these entries.
    """
    content, metadata = _content(source)
    inner = content if metadata is not None else _weights(content)
    own = net.state_dict()
    prefix = wrapping_prefix(inner, set(own))
    with torch.no_grad():  # some files have parameters instead of tensors
        for key, tensor in inner.items():
            if key.removeprefix(prefix) in own:  # otherwise it is the mean or std of the file
                tensor.copy_(own[key.removeprefix(prefix)])
    if metadata is not None:
        target.write_bytes(serialize(content, metadata))
        return []
    left_out = _strip_other_tensors(content)
    torch.save(content, target)
    return left_out


def _weights(content: object) -> object:
    """Return the part of a pickle's content that should be the weights: the innermost wrapped dictionary."""
    while (key := _wrapper(content)) is not None:
        content = content[key]
    return content


def _strip_other_tensors(content: dict) -> list[str]:
    """Delete all entries with tensors from a pickle's content, except the weights; return their names."""
    wrapper = _wrapper(content)
    if wrapper is None:
        return []
    others = [key for key, value in content.items() if key != wrapper and _holds_tensors(value)]
    for key in others:
        del content[key]
    return [str(key) for key in others] + _strip_other_tensors(content[wrapper])


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)
