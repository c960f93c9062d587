"""Weights in files: read without ever running code from them, fitted to a net, and written so that others can."""

import contextlib
import json
from pathlib import Path
import pickle

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
import torch
from torch import Tensor, nn

from l2ul.errors import InputError
from l2ul.files import atomic

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
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if _first_bytes(path) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # a whole pickle
            raise InputError(
                f"{path} holds more than tensors and could run code when read, so it was not read; "
                f"save its state_dict() again, best as safetensors"
            ) from None
        raise InputError(f"{path} is damaged or is no checkpoint; fetch it again") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or is no checkpoint ({first[:120]}); fetch it again") from None
    return _tensors(content, path), {}


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise InputError(f"{path} holds no state dict (layer names and tensors, plain or under {', '.join(WRAPPERS)})")
    return dict(content)


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


def strip_prefixes(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Layer names without the prefixes that wrappers put before them, as long as the net does not use them itself."""
    while not expected & state.keys():
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


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
