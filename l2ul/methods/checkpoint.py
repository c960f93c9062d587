"""The state of an unfinished loop in a file, from which the same call continues after an interruption.

Everything that decides the steps to come is in the state: weights and buffers, optimizer, schedule, positions in the
passes through D_f and D_adv or D_r, random generators, the curve and the number of the step.
"""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
import signal
import threading
import time

import torch
from torch import Tensor

from l2ul.common.errors import is_out_of_memory
from l2ul.common.files import atomic
from l2ul.data.images import Split

FORMAT = 2  # of the file; raise it when the keys of a state change
SAMPLE = 256  # images of a large set that its fingerprint or summary covers
TOLERANCE = 1e-3  # relative, of the summary of inputs that a GPU does not compute alike twice
State = dict[str, object]  # tensors, numbers, strings, lists and dicts: what torch.load reads with weights_only=True


class Checkpoint:
    """A file that holds the state of a loop.

    path     written atomically, with torch.save
    every    seconds between two writes
    report   called with a sentence when a state is continued, ignored or could not be written
    """

    def __init__(self, path: Path, every: float = 180.0, report: Callable[[str], object] = lambda sentence: None):
        self.path, self.every, self.report = Path(path), every, report
        self.identity, self.computed = "", torch.empty(0)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the seconds to the next write from now."""
        self._written = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether `every` seconds have passed since the last write, or since the beginning."""
        return time.monotonic() - self._written >= self.every

    def load(self, identity: str, computed: Tensor) -> State | None:
        """Return the state in the file, on the CPU; None if there is none or it belongs to another run.

        identity  of this run, see `fingerprint`
        computed  numbers (n,) that summarise the computed inputs, see `summary`; compared with a tolerance

        `save` writes both to the file.
        """
        self.identity, self.computed = identity, computed
        self.restart_clock()
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            is_same = (state["format"], state["identity"]) == (FORMAT, identity)
            is_same = is_same and state["computed"].shape == computed.shape
            is_same = is_same and torch.allclose(state["computed"], computed, rtol=TOLERANCE, atol=1e-9)
        except Exception as error:  # torch.load raises many types for a damaged file
            if is_out_of_memory(error):
                raise
            self.report(f"{self.path} is damaged; the run starts from its beginning")
            return None
        if not is_same:
            self.report(f"{self.path} belongs to other settings or inputs; the run starts from its beginning")
            return None
        self.report(f"continuing after step {state['step']} from {self.path}")
        return state

    def save(self, state: State) -> None:
        """Write the state. A failure is reported and does not end the run."""
        try:
            with atomic(self.path) as part:
                header = {"format": FORMAT, "identity": self.identity, "computed": self.computed}
                torch.save(header | state, part)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
            self.report(f"cannot write {self.path} ({error}); the run goes on without it")
        self.restart_clock()

    def delete(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


class Guard:
    """Keep the checkpoint of a loop up to date, and consistent when the loop is interrupted.

    checkpoint  None: the guard does nothing
    state_dict  returns the state after the last complete step

    Inside the `with` block SIGINT and SIGTERM wait until the current step is complete. Then the state is written and
    the signal goes to its previous handler. A second Ctrl-C does not wait; the file then holds the state of the last
    write. The state is also written if an exception leaves the block between two steps. Outside the main thread, where
    Python does not allow signal handlers, signals do not wait.
    """

    def __init__(self, checkpoint: Checkpoint | None, state_dict: Callable[[], State]):
        self.checkpoint, self.state_dict = checkpoint, state_dict
        self._handlers: dict[int, object] = {}
        self._pending: int | None = None
        self._process = os.getpid()
        self._is_complete = self._is_saved = False

    def __enter__(self) -> "Guard":
        if self.checkpoint and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:  # None: not set by Python
                    self._handlers[number] = handler
                    signal.signal(number, self._wait)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._wait:  # otherwise the previous handler has replaced it
                signal.signal(number, handler)
        is_interrupted = kind is not None or self._pending is not None
        if is_interrupted and self._is_complete and not self._is_saved:
            self._save()
        self._deliver_pending()

    def step_begins(self) -> None:
        """From here on the state is not consistent."""
        self._is_complete = self._is_saved = False

    def step_ends(self) -> None:
        """From here on the state is consistent: write it if that is due, and deliver a signal that waits."""
        self._is_complete = True
        if self.checkpoint and (self._pending is not None or self.checkpoint.is_due):
            self._save()
        self._deliver_pending()

    def _save(self) -> None:
        if self.checkpoint:
            self.checkpoint.save(self.state_dict())
            self._is_saved = True

    def _wait(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked child, such as a worker of a data loader
            self._deliver(number)
        elif self._pending is None:
            self._pending = number
        elif number == signal.SIGINT:
            self._deliver_pending()

    def _deliver_pending(self) -> None:
        number, self._pending = self._pending, None
        if number is not None:
            self._deliver(number)

    def _deliver(self, number: int) -> None:
        handler = self._handlers[number]
        if callable(handler):
            handler(number, None)
        else:  # the default of the operating system ends the process
            signal.signal(number, handler)
            signal.raise_signal(number)


def fingerprint(*parts: object) -> str:
    """Return a hex sha256 of settings and inputs, which identifies a run.

    parts  tensors, dicts of tensors, Splits, and values whose repr is the same in every process. Of a Split, labels and
           256 images are hashed, as it may be too large to hash whole; of files their names, sizes and times
    """
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(part, dict):
            for key, value in part.items():
                digest.update(f"{key}:".encode())
                add(value)
        elif isinstance(part, Split):
            add(part.labels)
            add(part.sha256() if part.on_disk else _sample(part.images))
        else:
            digest.update(repr(part).encode())
        digest.update(b"\n")

    for part in parts:
        add(part)
    return digest.hexdigest()


def summary(adv: tuple[Tensor, Tensor] | None, importance: dict[str, Tensor] | None) -> Tensor:
    """Return the means (n,) float64 of 256 images of D_adv and of each tensor of Ω, on the CPU.

    They are compared with a tolerance, unlike a hash as in `fingerprint`: a GPU may round D_adv and Ω differently each
    time.
    """
    means = [] if adv is None else list(_sample(adv[0]).cpu().double().mean((1, 2, 3)))
    means += [] if importance is None else [omega.cpu().double().mean() for omega in importance.values()]
    return torch.stack(means) if means else torch.empty(0, dtype=torch.float64)


def _sample(images: Tensor) -> Tensor:
    """Return at most 256 images, evenly spaced."""
    places = torch.linspace(0, len(images) - 1, min(len(images), SAMPLE), dtype=torch.float64)
    return images[places.long()]
