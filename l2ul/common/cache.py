"""A cache on disk: tensors that are expensive to compute, under a key of everything that decides them."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
import sys
import types

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
import torch
from torch import Tensor, nn
import torchvision

from l2ul import METHOD_VERSION
from l2ul.common.files import atomic, own_code_sha256, source_code, tensors_sha256

GIB = 2**30
PREFIX, SUFFIX = "l2ul-", ".safetensors"  # of the cache's files; other files in the folder are left alone
WELL_KNOWN = ("torch.", "torchvision.", "transformers.")  # libraries whose layers are identified by name and settings
LARGEST_SETTING = 1024  # values of a tensor that counts as a setting
DEEPEST = 8  # nested settings of a layer
COMPLETE = ("torch.", "torchvision.", "l2ul.")  # libraries whose layers show all settings in their repr


class Cache:
    """Tensors by key, one file each in `folder`. Without a folder, nothing is cached.

    The total size is limited to `limit` bytes: `trim` deletes the least recently used files. Several processes may
    share a folder. The last GiB of a disk is left free.
    """

    def __init__(self, folder: Path | None = None, limit: int = 10 * GIB):
        self.folder, self.limit = folder, limit

    def get(self, key: dict[str, object]) -> dict[str, Tensor] | None:
        """Return the tensors under a key; None if there are none or their file is damaged.

        key  plain values, which JSON can represent
        """
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            return None
        with contextlib.suppress(OSError):  # deleted meanwhile, or a file of another user
            os.utime(path)  # marks the file as recently used
        return tensors

    def put(self, key: dict[str, object], tensors: dict[str, Tensor]) -> None:
        """Store contiguous tensors under a key. Does nothing if they do not fit or cannot be written."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.folder is None or size > self.limit:
            return
        with contextlib.suppress(OSError):
            if shutil.disk_usage(self.folder).free - size < GIB:
                return
            with atomic(self._path(key)) as part:
                part.write_bytes(save({name: tensor.cpu() for name, tensor in tensors.items()}))

    @contextlib.contextmanager
    def lock(self, key: dict[str, object]) -> Iterator[None]:
        """Let one process at a time run the block for a key, so that the others find what the first one computed.

        The lock of a killed process is released. Where the folder allows no locks, processes run the block in parallel.
        """
        with contextlib.ExitStack() as stack:
            if self.folder is not None and self.folder.is_dir():
                name = f"{PREFIX}{self._path(key).stem[-2:]}.lock"  # at most 256 lock files, for any number of keys
                with contextlib.suppress(OSError, NotImplementedError):
                    stack.enter_context(FileLock(self.folder / name))
            yield

    def trim(self) -> None:
        """Delete the least recently used files until the total size is at most the limit."""
        if self.folder is None:
            return
        files = []
        for path in self.folder.glob(f"{PREFIX}*{SUFFIX}"):
            with contextlib.suppress(OSError):  # deleted by another process
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                total -= size

    def _path(self, key: dict[str, object]) -> Path:
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        return self.folder / f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:32]}{SUFFIX}"


def environment(device: torch.device) -> dict[str, object]:
    """Return the part of a key that decides rounding: hardware, versions of the libraries and of the method."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "method_version": METHOD_VERSION,
    }


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of a model: its layers, its parameters and buffers, source code and settings of custom layers.

    Settings are attributes with plain values, such as the number of heads, which a layer may not show in its repr, and
    small tensors that are no buffers, such as a mean. Layers of other libraries depend on the version of the library.
    """
    kinds = {type(module) for module in model.modules()}
    custom = sorted(source_code(kind) for kind in kinds if not f"{kind.__module__}.".startswith(WELL_KNOWN))
    settings = [_settings(module) for module in model.modules()]
    more = [code_of_model(model), *sorted(_versions(kinds))]
    layers = hashlib.sha256("\n".join([repr(model), *custom, *filter(None, settings + more)]).encode()).hexdigest()
    return layers[:32] + tensors_sha256(dict(model.named_parameters()) | dict(model.named_buffers()))


def code_of_model(model: nn.Module, *others: object) -> str | None:
    """Return a hash of the user's files that a model, its layers and hooks, and other functions are from, or None."""
    things = list(others)
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        things += [type(module), *hooks, *filter(callable, vars(module).values())]
    return own_code_sha256(things)


def _versions(kinds: Iterable[type]) -> set[str]:
    """Return names and versions of the libraries that layers are from, but for those that `environment` has."""
    names = {kind.__module__.partition(".")[0] for kind in kinds} - {"torch", "torchvision", "l2ul"}
    known = ((name, getattr(sys.modules.get(name), "__version__", None)) for name in names)
    return {f"{name} {version}" for name, version in known if version}


def _settings(module: nn.Module) -> str:
    """Return the settings of a layer of the user or of another library; empty for ours."""
    if f"{type(module).__module__}.".startswith(COMPLETE):
        return ""
    public = sorted(key for key in vars(module) if key != "training" and not key.startswith("_"))
    values = {key: _plain(vars(module)[key]) for key in public}
    return " ".join(f"{key}={value!r}" for key, value in values.items() if value is not None)


def _plain(value: object, depth: int = 0) -> object:
    """Return a setting as plain values, None for what is none, such as a large tensor, which may be an activation.

    What is nested more than DEEPEST times is left out: it may contain itself.
    """
    if depth > DEEPEST:
        return None
    if isinstance(value, tuple | list):
        several = [_plain(part, depth + 1) for part in value]
        return None if None in several else tuple(several) if isinstance(value, tuple) else several
    if isinstance(value, dict):
        several = {str(key): _plain(part, depth + 1) for key, part in value.items()}
        return {key: part for key, part in sorted(several.items()) if part is not None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value), depth + 1)
    if isinstance(value, Tensor) and value.numel() <= LARGEST_SETTING:
        return None if value.is_meta or value.is_quantized else value.to_dense().tolist()
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "__dict__") and not isinstance(value, Tensor) and not callable(value):
        # a namespace, or an object of a class of configurations; at most two deep, as they often refer to each other
        public = {key: part for key, part in vars(value).items() if not key.startswith("_")}
        return _plain(public, depth + DEEPEST // 2)
    return None
