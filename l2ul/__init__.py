"""Learning to unlearn: the method on tensors and modules. Knows neither command lines nor model families.

Environment that must be set before torch is first imported is set here, so scripts import this package first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
import os
import time

STARTED = time.perf_counter()  # of a script, which imports this first
Progress = Callable[[int], object]  # told how many units of work were done since it was last called
ProgressBar = Callable[[str, int], AbstractContextManager[Progress]]  # what is done, how many units: shows them

# OpenMP threads that wait actively beside another busy process slow each other down several times over; those that
# sleep at once lose time where there is none. Some 2,000 turns of waiting are nearly free beside a busy process.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

VERSION = "0.1.0"  # of the tool, as in pyproject.toml
METHOD_VERSION = 1  # part of every record's id: raise it when the same settings give another result
