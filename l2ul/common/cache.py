"""What was computed once and would come out the same again, kept in a folder under a hash of all that decides it."""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
from pathlib import Path
import shutil

from safetensors import SafetensorError
from safetensors.torch import load_file, save
import torch
from torch import Tensor, nn
import torchvision

from l2ul import METHOD_VERSION
from l2ul.common.files import atomic, source_code, tensors_sha256

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

GIB = 2**30
PREFIX, SUFFIX = "l2ul-", ".safetensors"  # of the files: whatever else is in the folder is somebody else's
WELL_KNOWN = ("torch.", "torchvision.", "transformers.")  # whose layers are told by their names and settings


class Cache:
    """Tensors by key, a file each. Beyond `limit` bytes, those not asked for for the longest time are deleted.

    Several processes may share a folder: files are whole or absent, and one that another deletes is only missed. The
    last GiB of a disk is left to others. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, limit: int = 10 * GIB):
        self.folder, self.limit = folder, limit

    def get(self, key: dict[str, object]) -> dict[str, Tensor] | None:
        """What was put under a key (plain values); None where it is not there, or damaged."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            found = load_file(path)
        except (OSError, SafetensorError):
            return None
        with contextlib.suppress(OSError):  # gone by now, or another user's: it will only seem older than it is
            os.utime(path)
        return found

    def put(self, key: dict[str, object], tensors: dict[str, Tensor]) -> None:
        """Keep contiguous tensors under a key, if there is room; it is no error if there is none."""
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
        """Of several processes that want what is under a key one makes it in this block; others wait, then find it.

        A process that is killed lets the next one in. Where there are no locks on files, each makes it for itself.
        """
        with contextlib.ExitStack() as stack:
            if self.folder is not None and fcntl is not None:
                name = f"{PREFIX}{self._path(key).stem[-2:]}.lock"  # a few files that stay, for any number of keys
                with contextlib.suppress(OSError):
                    file = stack.enter_context(open(self.folder / name, "w"))
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def trim(self) -> None:
        """Delete what is beyond the limit, least recently used first."""
        if self.folder is None:
            return
        files = []
        for path in self.folder.glob(f"{PREFIX}*{SUFFIX}"):
            with contextlib.suppress(OSError):  # another process was faster
                told = path.stat()
                files.append((told.st_mtime_ns, told.st_size, path))
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
    """What else decides how numbers are rounded, as part of a key: code, libraries and hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "method_version": METHOD_VERSION,
    }


def fingerprint(model: nn.Module) -> str:
    """Hex hash of a model: its layers as it prints them, the code of those that are not well known, all its tensors."""
    kinds = {type(module) for module in model.modules()}
    own = sorted(source_code(kind) for kind in kinds if not f"{kind.__module__}.".startswith(WELL_KNOWN))
    layers = hashlib.sha256("\n".join([repr(model), *own]).encode()).hexdigest()
    return layers[:32] + tensors_sha256(dict(model.named_parameters()) | dict(model.named_buffers()))
