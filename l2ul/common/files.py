"""Files that are either whole or absent, and what hashes of files, tensors and code are made from."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import inspect
import os
from pathlib import Path
import shutil
import tempfile
from typing import TYPE_CHECKING
import uuid

from l2ul.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

REPORT = "report.json"  # of a request to forget, beside the model that it ended with


@contextlib.contextmanager
def atomic(path: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or a folder to; renamed to `path` if the block ends well.

    replace  a folder that is there already; otherwise OSError where one is by then that holds anything

    A process killed in the block leaves a hidden `.<name>.<random>.part`, which `remove_parts` clears away.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield part
        if replace and path.is_dir():  # one name cannot replace a folder: it is moved aside, never half deleted
            old = part.with_suffix(".old.part")
            os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old)
        else:
            os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def remove_parts(folder: Path, older_than: float, prefix: str = "") -> None:
    """Delete what killed processes left half-written in `folder` before `older_than` (seconds since the epoch).

    Only of files whose names begin with `prefix`.
    """
    for part in Path(folder).glob(f".{prefix}*.part"):
        with contextlib.suppress(OSError):  # another process may be clearing up too
            if part.stat().st_mtime < older_than:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: "dict[str, Tensor]") -> str:
    """Hex sha256 of tensors by name: names, types, shapes and bytes."""
    import torch  # here, as parsers use this module and start without torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def source_code(thing: Callable) -> str:
    """The source of a function or class; of one typed at a prompt, its compiled code."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        functions = vars(thing).values() if isinstance(thing, type) else [thing]
        codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
        return repr([(code.co_code, code.co_consts, code.co_names) for code in codes])


def require_writable(folder: Path) -> None:
    """Create `folder` and raise InputError if no file can be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); choose a folder that you may write to"
        ) from None
