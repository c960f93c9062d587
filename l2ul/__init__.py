"""Learning to unlearn: the method on tensors and modules. Knows neither command lines nor model families.

Environment that must be set before torch is first imported is set here, so scripts import this package first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
import os

Progress = Callable[[int], object]  # told how many units of work were done since it was last called
ProgressBar = Callable[[str, int], AbstractContextManager[Progress]]  # what is done, how many units: shows them

# Two OpenMP threads that wait actively beside another busy process slow each other down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

METHOD_VERSION = 1  # part of every record's id: raise it when the same settings give another result
