"""Write files atomically; hash files, tensors and source code."""

from collections.abc import Callable, Collection, Iterable, Iterator
import contextlib
import csv
import functools
import hashlib
import inspect
import os
from pathlib import Path
import shutil
import sys
import sysconfig
import types
from typing import TYPE_CHECKING, TextIO
import uuid

from l2ul.common.errors import InputError
from l2ul.common.installation import SCRIPTS

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to `path` when the block ends without an error.

    replace  whether a folder replaces an existing one; if not, OSError is raised for a folder that is not empty. A file
             never replaces a folder

    A process that is killed inside the block leaves `.<name>.<random>.part`, which `remove_parts` deletes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(_temporary_name(path.name))
    try:
        yield part
        if replace and path.is_dir() and part.is_dir():  # a rename cannot replace a folder: move the old one aside
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


def _temporary_name(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex[:12]}.part"


def csv_writer(file: TextIO, names: Iterable[str]) -> Callable[[dict[str, float]], object]:
    """Write the header of a curve; return a function that writes a row of it, with an empty cell for nan."""
    writer = csv.DictWriter(file, list(names), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    return lambda row: writer.writerow({name: "" if value != value else value for name, value in row.items()})


def remove_parts(folder: Path, older_than: float, prefix: str = "") -> None:
    """Delete the partial files in `folder` that killed processes left.

    older_than  seconds since the epoch; files that changed later are kept, as another process may be writing them
    prefix      only delete partial files of files whose names begin with it
    """
    for part in Path(folder).glob(f".{prefix}*.part"):
        with contextlib.suppress(OSError):  # deleted by another process
            if part.stat().st_mtime < older_than:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def other_files(folder: Path, names: Collection[str]) -> list[str]:
    """Return the names of all files and subfolders (with a final /) in a folder but `names`, sorted."""
    others = [path for path in folder.iterdir() if path.name not in names]
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def tensors_sha256(tensors: "dict[str, Tensor]") -> str:
    """Return the SHA-256 of named tensors, in hexadecimal: of their names, types, shapes and values."""
    import torch  # here, as parsers use this module and start without torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def source_code(thing: Callable) -> str:
    """Return the source code of a function or class; its compiled code if there is no source file."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        functions = vars(thing).values() if isinstance(thing, type) else [thing]
        codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
        return repr([(code.co_code, code.co_consts, code.co_names) for code in codes])


def own_code_sha256(things: Iterable[object]) -> str | None:
    """Return a hash of the user's files that define functions and classes, and of the user's files that these import.

    Base classes count. None if all are of L2UL or of installed packages. A file counts as it was when this function
    first read it, which `models.register` and the registry of methods see to: it may be edited while the process runs.
    """
    bases = (base for thing in things for base in (thing.__mro__ if isinstance(thing, type) else [thing]))
    found: dict[str, str] = {}  # source code by name of the module
    names = [getattr(base, "__module__", None) for base in bases]
    while names:
        name = names.pop()
        module = sys.modules.get(name) if isinstance(name, str) else None
        if module is None or name in found or not _is_own(module):
            continue
        found[name] = _source_of_module(module)
        for value in list(vars(module).values()):
            if isinstance(value, types.ModuleType):
                names.append(value.__name__)
            elif isinstance(value, type | types.FunctionType):
                names.append(value.__module__)
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest() if found else None


_source_of_module = functools.cache(source_code)


@functools.cache
def _is_own(module: types.ModuleType) -> bool:
    """Return whether a module is a file of the user, not one of L2UL or of an installed package."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__.partition(".")[0] in ("l2ul", "torch", "torchvision"):
        return False
    if Path(file).resolve().parent == SCRIPTS and module.__name__.startswith("main_"):
        return False
    if {"site-packages", "dist-packages"} & set(Path(file).parts):  # also those that PYTHONPATH names
        return False
    return not any(Path(file).is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def require_writable(folder: Path, *names: str) -> None:
    """Create `folder` if necessary; raise InputError if `atomic` cannot write files there.

    names  of the files that will be written; a folder with such a name is an error too
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names or ("trial",):
            part = folder / _temporary_name(name)
            part.touch()
            part.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror})", "choose a folder with write permission"
        ) from None
    for path in (folder / name for name in names):
        if path.is_dir():
            raise InputError(f"{path} is a folder", "a file is written there, so rename it or choose another place")
