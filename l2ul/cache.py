"""What was computed once and would come out the same again, kept in a folder under a hash of all that decides it."""

import contextlib
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from l2ul.files import atomic, tensors_sha256

GIB = 2**30


class Cache:
    """Tensors by key, a file each. Beyond `limit` bytes, those not asked for for the longest time are deleted.

    Several processes may share a folder: files are whole or absent, and one that another deletes is only missed.
    Without a folder nothing is kept.
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
            path.touch()
        except (OSError, SafetensorError):
            return None
        return found

    def put(self, key: dict[str, object], tensors: dict[str, Tensor]) -> None:
        """Keep contiguous tensors under a key. A disk that takes no more is no error: nothing is lost by it."""
        if self.folder is None or sum(tensor.nbytes for tensor in tensors.values()) > self.limit:
            return
        with contextlib.suppress(OSError), atomic(self._path(key)) as part:
            part.write_bytes(save({name: tensor.cpu() for name, tensor in tensors.items()}))

    def trim(self) -> None:
        """Delete what is beyond the limit, least recently used first."""
        if self.folder is None:
            return
        files = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another process was faster
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: dict[str, object]) -> Path:
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def fingerprint(model: nn.Module) -> str:
    """Hex hash of a model's layers, as it prints them, and of its weights and buffers."""
    return hashlib.sha256(repr(model).encode()).hexdigest()[:16] + tensors_sha256(model.state_dict())
