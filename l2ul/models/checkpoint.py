"""Files of weights: find them, load the weights into a network, write them back in the same form.

A checkpoint holds one state dict or several, at its top or under keys such as `state_dict` or `ema`, and its names may
have prefixes of wrappers such as `module.`, `_orig_mod.` or `model.`. The network decides: a state dict fits if some
prefix, or none, stands before all names of the network, with the right shapes.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
from dataclasses import dataclass
import json
import math
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
from safetensors.torch import save as serialize
import torch
from torch import Tensor, nn

from l2ul.common.errors import InputError
from l2ul.common.files import atomic
from l2ul.common.installation import CLONE, SCRIPTS
from l2ul.common.text import in_file_name
from l2ul.models import weight_files

USUAL = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights")
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # inside of names
DEEPEST = 6  # levels of dictionaries and lists that are searched for state dicts
SEVERAL = 4  # names that a message lists
SMALL = 2**8  # most values of a vector that stays beside the weights, of a list, and of a NumPy array of any shape
LISTS = list | tuple | set | frozenset
ENCODED = re.compile(  # bytes in base64 or hexadecimal, in lines of which the last may be short
    r"(?:[A-Za-z0-9+/_=-]{16,}(?:\r?\n)?)+[A-Za-z0-9+/_=-]*"
)
Statistics = tuple[float, ...]
Place = tuple[object, ...]  # keys of dictionaries and positions in lists, from the top of a file to a state dict


class Names(NamedTuple):
    """How the names of a file correspond to those of a network.

    prefix    before the names of the network
    own       name in the network by name in the file, without the names that do not have the prefix
    """

    prefix: str
    own: dict[str, str]


@dataclass(frozen=True)
class Choice:
    """The weights of a file that a command uses.

    place   of their state dict
    prefix  of their names, if the state dict holds several networks; else ""
    """

    place: Place
    prefix: str = ""

    @property
    def label(self) -> str:
        """The value of --weights-key that chooses these weights."""
        return ".".join([*map(str, self.place), *([self.prefix.rstrip(".")] if self.prefix else [])])


def candidates(dataset: str, model: str, data_dir: Path) -> list[Path]:
    """Return the files in which weights for a data set and a model are looked for, in order.

    Pretraining saves to the first. The second comes with L2UL, which has the weights for the digits. The others are in
    the layout of the released scripts.
    """
    file = Path("weights") / f"{in_file_name(dataset)}_{in_file_name(model)}.safetensors"
    released = Path(f"{dataset}_pretrained_models") / f"{model.removesuffix('_cifar100')}.pt"
    places = [Path(data_dir) / file, SCRIPTS / "data" / file, Path(data_dir) / released]
    places += [CLONE / released] if CLONE else []
    different: dict[Path, Path] = {}
    for place in places:
        different.setdefault(place.resolve(), place)
    return list(different.values())


def find(dataset: str, model: str, data_dir: Path) -> Path | None:
    """Return the first of `candidates` that exists; None if there is none."""
    return next((path for path in candidates(dataset, model, data_dir) if path.is_file()), None)


def read(
    path: Path, weights_key: str | None = None, fits: Callable[[dict[str, Tensor]], list[str]] | None = None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors by name in a safetensors file or a pickle, and the metadata that `write` stored.

    A pickle has no metadata, and that of other software is left out.

    weights_key  which weights to read if the file has several: the key of a state dict, with dots between nested keys,
                 or a prefix of names
    fits         returns the prefixes with which the network fits a state dict, see `fitting_prefixes`; None: all fit

    Raises InputError for a file that is missing, damaged, has no weights, has several that fit, or would run code when
    it is read.
    """
    content, stored, _ = _content(path)
    metadata = dict(_decoded(stored or {}))
    if content == {} and stored is not None:  # safetensors without tensors: the caller describes what is missing
        return {}, metadata
    choice = _choose(content, path, weights_key, fits)
    state = _state_at(content, choice.place)
    return {key: tensor for key, tensor in state.items() if key.startswith(choice.prefix)}, metadata


def require_file(path: Path) -> None:
    """Raise InputError if there is no file of weights at this path."""
    if path.is_dir():
        raise InputError(f"there is no checkpoint {path}, which is a folder", "name the file of weights in it")
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}", "name an existing file with --checkpoint")


def _content(path: Path) -> tuple[object, dict[str, str] | None, str]:
    require_file(path)
    return weight_files.read(path)


def _at(content: object, place: Place) -> object:
    for key in place:
        content = content[key]
    return content


def _state_at(content: object, place: Place) -> dict[str, Tensor]:
    """Return the tensors by name at a place. They are not copies."""
    return {key: value for key, value in _at(content, place).items() if isinstance(value, Tensor)}


def _places(content: object, place: Place = (), seen: set[int] | None = None) -> Iterator[Place]:
    """Yield the places of all dictionaries with tensors by name, usual keys first."""
    seen = set() if seen is None else seen
    if len(place) > DEEPEST or id(content) in seen or not isinstance(content, dict | list):
        return
    seen.add(id(content))
    entries = content if isinstance(content, dict) else dict(enumerate(content))
    if isinstance(content, dict) and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield place
    usual = {key: position for position, key in enumerate(USUAL)}
    for key in sorted(entries, key=lambda key: usual.get(key, len(usual)) if isinstance(key, str) else len(usual)):
        yield from _places(entries[key], (*place, key), seen)


def _choose(
    content: object,
    path: Path,
    weights_key: str | None,
    fits: Callable[[dict[str, Tensor]], list[str]] | None,
) -> Choice:
    """Return the weights of a file that the network fits. Raises InputError if there are none, or several."""
    places = list(_places(content))
    if not places:
        keys = ", ".join(USUAL[:4])
        raise InputError(f"{path} holds no state dict (tensors by layer name), at its top or under {keys}")
    options = []
    for place in places:
        state = _state_at(content, place)
        prefixes = [""] if fits is None else fits(state)
        options += [Choice(place, prefix if len(prefixes) > 1 else "") for prefix in prefixes]
    if weights_key is not None:
        return _by_key(content, path, weights_key, places, options)
    options = _without_copies(content, options)
    if len(options) > 1 and fits is not None:
        labels = [option.label or "the top of the file" for option in options]
        raise InputError(
            f"{path} has several weights that fit: {', '.join(labels)}", "name the ones in use with --weights-key"
        )
    return options[0] if options else Choice(max(places, key=lambda place: len(_state_at(content, place))))


def _by_key(content: object, path: Path, key: str, places: list[Place], options: list[Choice]) -> Choice:
    chosen = [one for one in options if key in (one.label, one.prefix, one.prefix.rstrip(".")) and one.label]
    chosen += [Choice(place) for place in places if place and Choice(place).label == key]
    for place in places:  # a prefix with which the network does not fit is described by the caller
        prefix = key.removeprefix(Choice(place).label).lstrip(".").rstrip(".") + "."
        if any(name.startswith(prefix) for name in _state_at(content, place)):
            chosen.append(Choice(place, prefix))
    if not chosen:
        labels = dict.fromkeys(one.label for one in [*options, *map(Choice, places)] if one.label)
        known = f"expected one of {', '.join(labels)}" if labels else "leave it out"
        raise InputError(f"{path} has no weights under --weights-key {key}", known)
    return chosen[0]


def _without_copies(content: object, options: list[Choice]) -> list[Choice]:
    """Leave out weights that equal earlier ones, and initial weights if there are others."""
    trained = [one for one in options if not any(str(key).lower().startswith("init") for key in one.place)]
    kept: list[Choice] = []
    for option in trained or options:
        state = _chosen_tensors(content, option)
        if not any(_are_equal(state, _chosen_tensors(content, other)) for other in kept):
            kept.append(option)
    return kept


def _chosen_tensors(content: object, choice: Choice) -> dict[str, Tensor]:
    state = _state_at(content, choice.place)
    return {key.removeprefix(choice.prefix): value for key, value in state.items() if key.startswith(choice.prefix)}


def _are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def correspondence(keys: Collection[str], own: Collection[str]) -> list[Names]:
    """Return the prefixes of a file before names of the network, those with most names first.

    keys  names in the file
    own   names in the network

    Names of wrappers inside of a name, as in `features.module.0.weight`, are left out if more names fit without them.
    """
    plain = _with_prefixes({key: key for key in keys}, own)
    unwrapped = {key: ".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys}
    if any(key != name for key, name in unwrapped.items()) and len(set(unwrapped.values())) == len(unwrapped):
        without = _with_prefixes(unwrapped, own)
        if without and (not plain or _size(without[0], own) > _size(plain[0], own)):
            return without
    return plain or [Names("", {key: key for key in keys})]


def _with_prefixes(names: Mapping[str, str], own: Collection[str]) -> list[Names]:
    """Return a `Names` for each prefix of a name of the network. `names`: name without wrappers by name in the file."""
    own, counts = set(own), Counter()
    for name in names.values():
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts[".".join([*parts[:start], ""])] += 1
    prefixes = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))
    return [
        Names(prefix, {key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)})
        for prefix in prefixes
    ]


def _size(names: Names, own: Collection[str]) -> int:
    return sum(name in own for name in names.own.values())


def fitting_prefixes(state: dict[str, Tensor], net: nn.Module) -> list[str]:
    """Return the prefixes, as they stand in the file, with which all names and shapes of the network are in `state`.

    Statistics of an input normalisation do not count, see `split_off_statistics`.
    """
    own, (weights, _, _) = net.state_dict(), split_off_statistics(state, net)
    fitting = []
    for names in correspondence(weights, own):
        part = {name: weights[key] for key, name in names.own.items()}
        if _differences(part, own) is None:
            first = next(key for key, name in names.own.items() if name in own)
            fitting.append(first.removesuffix(names.own[first]) if first.endswith(names.own[first]) else "")
    return list(dict.fromkeys(fitting))


def split_off_statistics(
    state: dict[str, Tensor], net: nn.Module | None = None
) -> tuple[dict[str, Tensor], Statistics | None, Statistics | None]:
    """Return the weights without the mean and std of a normalisation layer, and these two, or None if absent.

    net  a network whose own normalisation layer, if it has one, belongs to the weights
    """
    keys = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if kind in ("mean", "std") and tensor.numel() in (1, 3) and {f"{layer}.mean", f"{layer}.std"} <= state.keys():
            keys[kind] = key
    if "mean" in keys and net is not None:
        own = net.state_dict()
        names = _best(state, own).own
        if any(names.get(key) in own for key in keys.values()):
            return state, None, None
    weights = {key: tensor for key, tensor in state.items() if key not in keys.values()}
    values = {kind: tuple(state[key].flatten().tolist()) for kind, key in keys.items()}
    return weights, values.get("mean"), values.get("std")


def _best(state: dict[str, Tensor], own: dict[str, Tensor]) -> Names:
    """Return the correspondence in which everything fits, else the one with most names."""
    every = correspondence(state, own)
    fits = (one for one in every if _differences({name: state[key] for key, name in one.own.items()}, own) is None)
    return next(fits, every[0])


def load_into(net: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Load the weights of a file into the network, without the prefix of wrappers.

    Returns None, or a description of the differences if the weights do not fit; the network is then unchanged.
    """
    own = net.state_dict()
    part = {name: state[key] for key, name in _best(state, own).own.items()}
    wrong = _differences(part, own)
    if wrong is None:
        net.load_state_dict(part, strict=False)  # all names have been compared except batch-norm's step counters
    return wrong


def outside(state: dict[str, Tensor], net: nn.Module) -> list[str]:
    """Return the names in the file that do not belong to the network: they do not have its prefix."""
    names = _best(state, net.state_dict()).own
    return [key for key in state if key not in names]


def dtypes(state: dict[str, Tensor], net: nn.Module) -> dict[str, torch.dtype]:
    """Return the types of a file's floating-point weights by the names of the network, where not float32."""
    own = net.state_dict()
    names = {key: name for key, name in _best(state, own).own.items() if name in own}
    types = {name: state[key].dtype for key, name in names.items() if state[key].is_floating_point()}
    return {name: dtype for name, dtype in types.items() if dtype != torch.float32}


def num_classes(state: dict[str, Tensor], build: Callable[[int], nn.Module]) -> int | None:
    """Return the number of classes of the weights; None if they are not of the network that `build` returns.

    build  returns the network for a number of classes

    The number is the length of a tensor whose shape depends on the number of classes.
    """
    with torch.device("meta"):
        few, more = (shapes(build(number).state_dict()) for number in (2, 3))
    own = {name: state[key] for key, name in correspondence(state, few)[0].own.items()}
    heads = (name for name in few if few[name] != more[name])
    return next((len(own[name]) for name in heads if name in own and own[name].ndim), None)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name, without batch-norm's step counters, which old files lack."""
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def _differences(part: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """Return a description of the first differences in names, shapes and kinds of numbers; None if there are none."""
    file, net = shapes(part), shapes(own)
    differing = [f"{key} is {file[key]}, not {net[key]}" for key in net if key in file and file[key] != net[key]]
    differing += [
        f"{key} is {_type(part[key].dtype)}, not {_type(own[key].dtype)}"
        for key in net
        if file.get(key) == net[key] and own[key].is_floating_point() and not part[key].is_floating_point()
    ]
    kinds = {key: "sparse" if part[key].layout != torch.strided else "on the device meta" for key in net if key in file}
    differing += [f"{key} is {kind}" for key, kind in kinds.items() if kind == "sparse" or part[key].is_meta]
    present = {_memory(own[key]) for key in net if key in file}
    missing = [f"{key} {net[key]} is missing" for key in net if key not in file and _memory(own[key]) not in present]
    extra = [f"{key} {file[key]} is unexpected" for key in file if key not in net]
    total = len(differing) + len(missing) + len(extra)
    first = (differing[:2] + missing[:2] + extra[:2])[:SEVERAL]
    return f"{'; '.join(first)}{f' (of {total} differences)' if total > len(first) else ''}" if total else None


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return the same value for weights that are tied: safetensors files hold only one of them."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(
    path: Path, net: nn.Module, metadata: dict[str, object], dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write the network's weights as safetensors, atomically. Values of the metadata are stored as JSON.

    dtypes  to which weights are converted, by name

    Of tied weights the first is written.
    """
    own = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    first = {_memory(tensor) if tensor.numel() else key: key for key, tensor in reversed(own.items())}
    state = {
        key: own[key].detach().cpu().to((dtypes or {}).get(key, own[key].dtype)).contiguous()
        for key in reversed(first.values())
    }
    with atomic(path) as part:
        part.write_bytes(serialize(state, {key: json.dumps(value) for key, value in metadata.items()}))


def _decoded(metadata: dict[str, str]) -> Iterator[tuple[str, object]]:
    """Yield the metadata that `write` stored, without that of other software."""
    for key, text in metadata.items():
        with contextlib.suppress(json.JSONDecodeError):
            yield key, json.loads(text)


def rewrite(
    source: Path, net: nn.Module, target: Path, weights_key: str | None = None, num_classes: int = 0
) -> list[str]:
    """Write a network's weights in the form of the file `source` that they came from: wrappers, names, types, metadata.

    weights_key  as for `read`
    num_classes  of the network, if it is known

    Other entries with tensors, such as the state of an optimizer or averaged weights, are left out, because they derive
    from the original weights. Tensors beside the network in the same state dict stay if all that share the first part
    of their name are numbers and short vectors, such as weights of classes: others may be flattened images. So do the
    statistics of an input normalisation, and short vectors and small arrays of NumPy anywhere. Longer lists of numbers
    and text that encodes bytes are left out too, also of the metadata. Returns the names of what is left out.
    """
    content, metadata, form = _content(source)
    choice = _choose(content, source, weights_key, lambda state: fitting_prefixes(state, net))
    state, own = _at(content, choice.place), net.state_dict()
    part = {key: tensor for key, tensor in _state_at(content, choice.place).items() if key.startswith(choice.prefix)}
    weights, _, _ = split_off_statistics(part, net)
    names = _best(weights, own).own
    owners: dict[int, int] = {}  # address of a weight of the network by that of the tensor in the file
    with torch.no_grad():  # some files have parameters instead of tensors
        for key, name in names.items():
            if name not in own:  # a step counter that the network has not
                continue
            state[key] = compact(state[key])
            if owners.setdefault(state[key].data_ptr(), own[name].data_ptr()) != own[name].data_ptr():
                state[key] = state[key].clone()  # equal weights that the file stores once, but that are not tied
            state[key].copy_(own[name])
    left_out = _strip_other_tensors(content, choice.place, {*names, *(part.keys() - weights.keys())}, num_classes)
    for key, tensor in _state_at(content, choice.place).items():
        state[key] = compact(tensor)
    if metadata is not None:
        encoded = [name for name, text in metadata.items() if _may_hold_images(text, num_classes)]
        left_out += [f"{name} (metadata)" for name in encoded]
        target.write_bytes(serialize(content, {name: metadata[name] for name in metadata if name not in encoded}))
    else:
        with open(target, "wb") as file:  # given a path, torch would choose the format by its suffix
            torch.save(content, file, _use_new_zipfile_serialization=form != weight_files.TORCH_LEGACY)
    return left_out


def compact(tensor: Tensor) -> Tensor:
    """Return a tensor that `torch.save` writes with its own values alone: it writes whole storages, and attributes."""
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor.detach().clone()
    return tensor.detach() if vars(tensor) else tensor


def _strip_other_tensors(content: object, place: Place, weights: set[str], num_classes: int) -> list[str]:
    """Delete all entries of a file beside the weights at `place` that may hold images; return their names."""
    left_out: list[str] = []
    for depth, key in enumerate(place):
        entries = _at(content, place[:depth])
        pairs = list(entries.items() if isinstance(entries, dict) else enumerate(entries))
        for other in [one for one, value in pairs if one != key and _may_hold_images(value, num_classes)]:
            left_out.append(str(other))
            if isinstance(entries, dict):
                del entries[other]
            else:
                entries[other] = None
    for entries in (_at(content, place[:depth]) for depth in range(len(place) + 1)):
        for name in [one for one, value in _attributes(entries).items() if _may_hold_images(value, num_classes)]:
            delattr(entries, name)
    state = _at(content, place)
    groups: dict[str, list[object]] = {}
    for key in state:
        if key not in weights and _may_hold_images(state[key], num_classes):
            groups.setdefault(str(key).split(".")[0], []).append(key)
    for group, keys in groups.items():
        if not all(isinstance(state[key], Tensor) and _is_short(state[key], num_classes) for key in keys):
            left_out.append(f"{group}.*" if len(keys) > 1 else str(keys[0]))
            for key in keys:
                del state[key]
    return left_out


def _is_short(value: Tensor | np.ndarray, num_classes: int) -> bool:
    """Return whether a tensor or array is a number, a short vector or one of the classes: no weights and no image."""
    return value.squeeze().ndim < 2 and (math.prod(value.shape) <= SMALL or math.prod(value.shape) == num_classes)


def _may_hold_images(value: object, num_classes: int, depth: int = 0) -> bool:
    """Return whether an object that a file held has values that may be weights or images.

    These are tensors, bytes and text that encodes them, and arrays and lists of numbers, but for short and small ones.
    An object nested too deeply counts as such.
    """
    if isinstance(value, Tensor) or depth > 50:
        return True
    if isinstance(value, bytes | bytearray):
        return len(value) > SMALL
    if isinstance(value, str):
        return any(_encoded_bytes(run[0]) > SMALL for run in ENCODED.finditer(value))
    if isinstance(value, np.ndarray):
        return value.size > SMALL and not _is_short(value, num_classes)
    if isinstance(value, LISTS) and _numbers(value) > SMALL and _numbers(value) != num_classes:
        return True
    inner = [*value.values()] if isinstance(value, dict) else []
    inner += value if isinstance(value, LISTS) else []
    inner += _attributes(value).values()
    return any(_may_hold_images(one, num_classes, depth + 1) for one in inner)


def _encoded_bytes(text: str) -> int:
    """Return how many bytes a text in base64 or hexadecimal encodes."""
    digits = re.sub(r"[=\r\n]", "", text)
    return len(digits) // 2 if re.fullmatch("[0-9A-Fa-f]*", digits) else len(digits) * 3 // 4


def _numbers(value: object, depth: int = 0) -> int:
    """Return how many numbers there are in a list of numbers, or of lists of numbers."""
    if isinstance(value, LISTS) and depth <= 50:
        return sum(_numbers(one, depth + 1) for one in value)
    return isinstance(value, int | float | complex | np.number)


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes of an object that are written with it."""
    return vars(value) if isinstance(value, dict | argparse.Namespace) and hasattr(value, "__dict__") else {}
