"""Tell what a file of weights is by its content, and read it without running code from it."""

import argparse
import contextlib
import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
import pickle
import re
import warnings
import zipfile

import numpy as np
from safetensors import safe_open
import torch

from l2ul.common.errors import InputError, first_line, is_out_of_memory

SAFETENSORS, TORCH, TORCH_LEGACY = "safetensors", "torch", "torch, without zip"
USE_WEIGHTS = "use the PyTorch weights that it was made from (a state_dict() of torch.save, or safetensors)"
RESAVE = (
    "save the weights alone where the file was made: torch.save(model.state_dict(), FILE), or for a Lightning file "
    "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
)
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # after the two bytes of the pickle's protocol
MAGIC = {  # offset and first bytes of other formats
    (0, b"\x89HDF\r\n\x1a\n"): "an HDF5 file, as Keras writes it",
    (0, b"GGUF"): "a GGUF file",
    (4, b"TFL3"): "a TFLite model",
    (0, b"\x93NUMPY"): "a NumPy array",
    (257, b"ustar"): "a tar archive",
    (0, b"\x1f\x8b"): "a gzip archive",
    (0, b"BZh"): "a bzip2 archive",
    (0, b"\xfd7zXZ\x00"): "an xz archive",
    (0, b"\x28\xb5\x2f\xfd"): "a Zstandard archive",
    (0, b"7z\xbc\xaf\x27\x1c"): "a 7z archive",
    (0, b"Rar!"): "a RAR archive",
    (0, b"\x08\x01\x12"): "a TensorFlow SavedModel",
    (0, b"version https://git-lfs"): "a Git LFS pointer, not the file itself",
}
SUFFIXES = {".onnx": "an ONNX model", ".pb": "a TensorFlow graph", ".mlmodel": "a Core ML model", ".engine": "TensorRT"}
ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42"  # tags of the fields that may follow the version of an ONNX model


def kind(path: Path) -> str:
    """Return SAFETENSORS, TORCH or TORCH_LEGACY, from the content of a file and not from its suffix.

    Raises InputError for anything else, with the name of its format if it is known.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "make it readable or name another file") from None
    if _is_safetensors(head, path.stat().st_size):
        return SAFETENSORS
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    if head[:1] == b"\x80" and head[2:14] == LEGACY_MAGIC:
        return TORCH_LEGACY
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1:
        raise InputError(f"{path} is a plain pickle, which could run code when read, so it was not read", RESAVE)
    other = next((name for (at, magic), name in MAGIC.items() if head[at : at + len(magic)] == magic), None)
    if other is None and head[:1] == b"\x08" and 3 <= head[1] < 32 and head[2:3] and head[2] in ONNX_FIELDS:
        other = "an ONNX model"
    if other is None and (head.lstrip()[:2] in (b'{"', b"{\n") or path.suffix.lower() == ".json"):
        raise InputError(
            f"{path} is a JSON file, which holds no weights", "name the file of weights that belongs to it"
        )
    if other is None and head.lstrip()[:1] == b"<":
        other = "a web page or XML, perhaps in place of a file that could not be downloaded"
    other = other or SUFFIXES.get(path.suffix.lower())
    if other:
        raise InputError(f"{path} is {other}, from which no weights are read", USE_WEIGHTS)
    raise InputError(f"{path} is damaged or is no checkpoint", "download it again")


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _kind_of_zip(path: Path) -> str:
    """Return TORCH for what torch.save writes. Reading TorchScript or torch.export files could run their code."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name) for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is damaged or is no checkpoint ({error})", "download it again") from None
    programs = {"TorchScript": "code", "torch.export": "models"}
    program = next((one for one, folder in programs.items() if any(n.parts[1:2] == (folder,) for n in names)), None)
    if program:
        raise InputError(
            f"{path} is a {program} program, which can run code when it is read, and cannot take unlearned weights",
            "use the weights of the module that it was made from (its state_dict(), best as safetensors)",
        )
    if any(name.name == "data.pkl" for name in names):
        return TORCH
    if any(name.suffix == ".h5" for name in names):
        raise InputError(f"{path} is a Keras model, from which no weights are read", USE_WEIGHTS)
    if names and all(name.suffix == ".npy" for name in names):
        raise InputError(f"{path} is an archive of NumPy arrays, from which no weights are read", USE_WEIGHTS)
    raise InputError(f"{path} is a zip archive that torch.save did not write", "unpack it and name the file in it")


def read(path: Path) -> tuple[object, dict[str, str] | None, str]:
    """Return the content of a file, the metadata of a safetensors file or None for a pickle, and its `kind`.

    Raises InputError for a file that is damaged, of another format, or would run code when it is read.
    """
    try:
        form = kind(path)
        if form == SAFETENSORS:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}, form  # noqa: SIM118
        with (
            torch.serialization.safe_globals(_harmless()),
            warnings.catch_warnings(action="ignore"),
            open(path, "rb") as file,  # given a path, torch would choose the format by its suffix
        ):
            return torch.load(file, map_location="cpu", weights_only=True), None, form
    except InputError:
        raise
    except Exception as error:  # zipfile, pickle, torch and safetensors each raise their own for damaged files
        if is_out_of_memory(error):
            raise
        blocked = _blocked_type(error)
        if blocked:
            raise InputError(
                f"{path} holds more than tensors ({blocked}) and could run code when read, so it was not read", RESAVE
            ) from None
        raise InputError(
            f"{path} is damaged or is no checkpoint ({first_line(error)[:120]})", "download it again"
        ) from None


def _blocked_type(error: Exception) -> str | None:
    """Return the name of the type that torch refuses to read; None for another error."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    patterns = (r"GLOBAL (\S+) (?:was not|whose)", r"but got <class '(\S+)'>", r"unrecognized function (\S+)")
    matches = (re.search(pattern, str(error)) for pattern in patterns)
    return next((match[1] for match in matches if match), None)


class _Dtype:
    """Stands for numpy.dtype in a pickle: plain numbers and text only."""

    def __init__(self, name: str, *_: object):
        if not re.fullmatch(r"[fiubcSU]\d{1,5}", name):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r}) was not read")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order if order in ("<", ">") else "="

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class _Array(np.ndarray):
    """Stands for numpy.ndarray in a pickle: the same, but with a `_Dtype`; written again as a numpy.ndarray."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        super().__setstate__((1, tuple(map(int, shape)), dtype.dtype, bool(is_fortran), bytes(data)))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.dtype, 1)[0]


def _array(*_: object) -> _Array:
    return np.empty(0, np.int8).view(_Array)


def _harmless() -> list:
    """Return the types, beside those that torch allows, whose construction runs no code of the file.

    numpy's own functions are replaced, because they trust the file.
    """
    posix, windows = (PurePosixPath, Path) if isinstance(Path(), PureWindowsPath) else (Path, PureWindowsPath)
    paths = {"PosixPath": posix, "WindowsPath": windows}
    paths |= {"PurePosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath}
    allowed = [(kind, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name, kind in paths.items()]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(_scalar, f"{module}.scalar"), (_array, f"{module}._reconstruct")]
    allowed += [(_Dtype, "numpy.dtype"), (_Array, "numpy.ndarray"), argparse.Namespace, frozenset, complex, slice]
    allowed += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    with contextlib.suppress(AttributeError):
        allowed.append(torch.torch_version.TorchVersion)
    return allowed
