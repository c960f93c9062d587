"""What is installed: the folder of the scripts, and the versions that decide results. Does not import torch."""

import importlib.metadata
import importlib.util
from pathlib import Path
import platform
import subprocess
from types import ModuleType

import l2ul
from l2ul.common.errors import InputError

PACKAGE = Path(l2ul.__file__).resolve().parent
CLONE = PACKAGE.parent if (PACKAGE.parent / "main_unlearn.py").is_file() else None  # None: installed from a wheel
SCRIPTS = CLONE or PACKAGE / "scripts"  # folder of main_*.py, with the committed weights in data/weights
PACKAGES = ("torch", "torchvision", "transformers")


def command(script: str) -> list[str]:
    """Return the first words of a command line that starts a script such as main_unlearn.py."""
    return ["python", script] if CLONE else ["l2ul", script.removeprefix("main_").removesuffix(".py")]


def is_installed(package: str) -> bool:
    """Return whether a package is installed. A folder of its name without code, such as the runs of wandb, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def import_package(package: str) -> ModuleType:
    """Import an optional package. Raises ImportError if it is not installed, see `is_installed`."""
    module = importlib.import_module(package)
    if getattr(module, "__file__", None) is None:
        raise ImportError(f"{package} is a folder without code")
    return module


def require(package: str, feature: str) -> ModuleType:
    """Import the optional package that a feature needs. Raises InputError with the command that installs it."""
    try:
        return import_package(package)
    except ImportError:
        raise InputError(
            f"{feature} needs the package {package}",
            f"install it (uv run --extra {package} …, or pip install {package})",
        ) from None


def commit() -> str | None:
    """Return the commit of the clone, with `+` if files differ from it; None outside of a clone or without git."""
    if CLONE is None or not (CLONE / ".git").exists():
        return None
    identity, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if identity is None else f"{identity}{'+' if changes else ''}"


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(CLONE), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of L2UL, of Python and of `PACKAGES`, without importing them."""
    own = commit()
    known = {"L2UL": f"{l2ul.VERSION}{f' (commit {own})' if own else ''}", "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = "not installed"
    return known
