"""Weights in files: read without ever running code from them, fitted to a net, and written so that others can."""

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
PREFIXES = ("module.", "1.", "net.")  # data parallel, the released Sequential(normalise, model), our Classifier
Statistics = tuple[float, ...]


def candidates(dataset: str, model: str, data_dir: Path) -> list[Path]:
    """Where weights for a data set and a model are looked for, first to last; pretraining saves at the first.

    Then the folder of this checkout, where the committed digits weights are, and the released scripts' layout.
    """
    here = Path(__file__).resolve().parent.parent
    file = Path("weights") / f"{dataset}_{model.replace(':', '_').replace('/', '_')}.safetensors"
    released = Path(f"{dataset}_pretrained_models") / f"{model.removesuffix('_cifar100')}.pt"
    return [Path(data_dir) / file, here / "data" / file, Path(data_dir) / released, here / released]


def find(dataset: str, model: str, data_dir: Path) -> Path | None:
    """The first of `candidates` that exists."""
    return next((path for path in candidates(dataset, model, data_dir) if path.is_file()), None)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and metadata, of a safetensors file or of a pickle that holds nothing but plain data.

    A pickle may hold the tensors themselves or under `state_dict`, `model_state_dict`, `model` or `net`.
    Raises InputError for a file that is missing, damaged, not weights, or that would have to run code to be read.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; name an existing file with --checkpoint")
    content, metadata = _content(path)
    return (content, metadata) if metadata is not None else (_tensors(content, path), {})


def _content(path: Path) -> tuple[object, dict[str, str] | None]:
    """All that a file holds, and the metadata of a safetensors file; None for a pickle."""
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
        if _first_bytes(path) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # a whole pickle
            raise InputError(
                f"{path} holds more than tensors and could run code when read, so it was not read; "
                f"save its state_dict() again, best as safetensors"
            ) from None
        raise InputError(f"{path} is damaged or is no checkpoint; fetch it again") from None
    except Exception as error:  # zipfile, pickle, torch and safetensors each raise much of their own for damaged bytes
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or is no checkpoint ({first[:120]}); fetch it again") from None


def reject_program(path: Path) -> None:
    """Raise InputError for a TorchScript or torch.export file: to read one is to run what it holds."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [Path(name) for name in archive.namelist()]
    kinds = {"TorchScript": "code", "torch.export": "models"}
    kind = next((kind for kind, folder in kinds.items() if any(name.parts[1:2] == (folder,) for name in names)), None)
    if kind:
        raise InputError(
            f"{path} is a {kind} program, which can run code when it is read and cannot be put back in the form it "
            f"came in; give the weights of the module that it was made from (its state_dict(), best as safetensors)"
        )


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name that a pickle holds, themselves and not copies of them."""
    content = _weights(content)
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise InputError(f"{path} holds no state dict (layer names and tensors, plain or under {', '.join(WRAPPERS)})")
    return dict(content)


def _wrapper(content: object) -> str | None:
    """The name under which another dictionary holds the weights; None where this one does, or none is there."""
    if not isinstance(content, dict):
        return None
    return next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)


def split_statistics(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Statistics | None, Statistics | None]:
    """The weights without a normalisation layer's mean and std, and these two where the file has them."""
    found = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if kind in ("mean", "std") and tensor.numel() == 3 and {f"{layer}.mean", f"{layer}.std"} <= state.keys():
            found[kind] = key
    rest = {key: tensor for key, tensor in state.items() if key not in found.values()}
    read_out = {kind: tuple(state[key].flatten().tolist()) for kind, key in found.items()}
    return rest, read_out.get("mean"), read_out.get("std")


def wrapping_prefix(keys: Collection[str], expected: set[str]) -> str:
    """What wrappers put before all layer names of a file, as long as the net does not use them itself."""
    prefix = ""
    while keys and not expected & {key.removeprefix(prefix) for key in keys}:
        more = next((p for p in PREFIXES if all(key.startswith(prefix + p) for key in keys)), None)
        if more is None:
            break
        prefix += more
    return prefix


def load_into(net: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Give the net the weights of a file, whatever is put before their names; returns in words why they do not fit."""
    prefix = wrapping_prefix(state, set(net.state_dict()))
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    wrong = mismatch(state, net)
    if wrong is None:
        net.load_state_dict(state, strict=False)  # strict but for batch-norm's step counters: see mismatch
    return wrong


def num_classes(state: dict[str, Tensor], build: Callable[[int], nn.Module]) -> int | None:
    """How many classes a file's net tells apart; None where it is not of the kind that `build` gives for a number.

    By name, as a file need not keep the layers in order: the rows of weights whose shape depends on that number.
    """
    with torch.device("meta"):
        few, more = (shapes(build(number).state_dict()) for number in (2, 3))
    prefix = wrapping_prefix(state, set(few))
    heads = (f"{prefix}{name}" for name in few if few[name] != more[name])
    return next((len(state[name]) for name in heads if name in state and state[name].ndim), None)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without batch-norm's step counters, which old files lack."""
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def mismatch(state: dict[str, Tensor], net: nn.Module) -> str | None:
    """The first names and shapes in which a file and a net differ, in words; None where they fit."""
    file, own = shapes(state), shapes(net.state_dict())
    differing = [f"{key} is {file[key]}, not {own[key]}" for key in own if key in file and file[key] != own[key]]
    missing = [f"{key} {own[key]} is missing" for key in own if key not in file]
    extra = [f"{key} {file[key]} is too much" for key in file if key not in own]
    total = len(differing) + len(missing) + len(extra)
    first = (differing[:2] + missing[:2] + extra[:2])[:4]
    return f"{'; '.join(first)}{f' (of {total} differences)' if total > len(first) else ''}" if total else None


def write(path: Path, net: nn.Module, metadata: dict[str, object]) -> None:
    """The net's weights as safetensors under its own layer names, whole or not at all; metadata as JSON values."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in net.state_dict().items()}
    with atomic(path) as part:
        part.write_bytes(serialize(state, {key: json.dumps(value) for key, value in metadata.items()}))


def metadata_value(metadata: dict[str, str], key: str) -> object:
    """A value that `write` put into a file's metadata; None where it is missing or other software wrote it."""
    with contextlib.suppress(KeyError, json.JSONDecodeError):
        return json.loads(metadata[key])
    return None


def rewrite(source: Path, net: nn.Module, target: Path) -> list[str]:
    """Write a net's weights in the form of the file they came from: wrappers, names, types and all else it told.

    Entries beside the weights that hold tensors (an optimizer's, averaged weights) are left out, since these still hold
    what the weights were: returns their names.
    """
    content, metadata = _content(source)
    inner = content if metadata is not None else _weights(content)
    own = net.state_dict()
    prefix = wrapping_prefix(inner, set(own))
    with torch.no_grad():  # some files hold parameters
        for key, tensor in inner.items():
            if key.removeprefix(prefix) in own:  # else the file's own mean and std
                tensor.copy_(own[key.removeprefix(prefix)])
    if metadata is not None:
        target.write_bytes(serialize(content, metadata))
        return []
    left_out = _strip_other_tensors(content)
    torch.save(content, target)
    return left_out


def _weights(content: object) -> object:
    """What of a pickle's content should be the weights: the dictionary within its wrappers."""
    while (key := _wrapper(content)) is not None:
        content = content[key]
    return content


def _strip_other_tensors(content: dict) -> list[str]:
    """Take out of a pickle's content all that holds tensors and is not where the weights are; returns the names."""
    way = _wrapper(content)
    if way is None:
        return []
    others = [key for key, value in content.items() if key != way and _holds_tensors(value)]
    for key in others:
        del content[key]
    return [str(key) for key in others] + _strip_other_tensors(content[way])


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)
