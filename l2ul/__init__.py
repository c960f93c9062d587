"""Learning to unlearn: make a trained image classifier forget single training images.

`forget` makes a classifier forget images and checks the result. `attack`, `importance`, `objective` and `unlearn` are
the paper's method on tensors and modules. The subpackages add methods, data sets, metrics, experiments, tables,
deletion requests and sweeps.

Importing this package sets environment variables that torch reads when it is imported, so scripts import it first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
import os
import time

STARTED = time.perf_counter()  # of the script, in seconds on the clock of time.perf_counter
Progress = Callable[[int], object]  # called with the number of units that have finished since the last call
ProgressBar = Callable[[str, int], AbstractContextManager[Progress]]  # shows progress: takes a description and a total

# By default, OpenMP threads that have no work spin. With other busy processes on the machine this makes all of them
# several times slower, while threads that sleep at once are slower on an idle machine. About 2,000 spins before a
# thread sleeps cost little in both cases.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

VERSION = "0.1.0"  # as in pyproject.toml
METHOD_VERSION = 1  # part of the id of every record; raise it if the same settings give another result
LAZY = {"forget": "l2ul.deletion.forget"}  # functions of this package, by the module that is imported at the first use


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(LAZY[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *LAZY])
