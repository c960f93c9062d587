"""Trials on Ray: a cluster of this machine's own or one that runs, and each trial a task that Ray tries up to thrice.

Ray is imported where it is used: everything else works without it.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
from dataclasses import dataclass
import importlib
import importlib.util
import os
from pathlib import Path
import sys
import warnings

from l2ul.common.errors import InputError
from l2ul.sweeps.trials import Trial, Words, last_lines

TOKEN = Path.home() / ".ray" / "auth_token"
RETRIES = 2  # of a trial that raised an error, was killed, ran out of memory, or whose node died
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray would copy the whole folder, data and all, to every node
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",  # the data set is once in a node's memory, for all its workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # a trial runs at the priority of the command, not at Ray's 15
    "RAY_task_oom_retries": str(RETRIES),  # else a trial too large for the machine would be tried without end
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


@dataclass(frozen=True)
class Place:
    """Where and what the workers compute.

    function  module and name, as "main_trials:work": called with a trial's words and what gives what is shared
    folder    the scripts' own, which every node has at the same place
    working   folder that relative paths are meant from
    own       a file of the user's that registers methods, nets, data sets or metrics
    """

    function: str
    folder: Path
    working: Path
    own: Path | None = None

    def call(self, words: Words, shared: Callable[[], object]) -> object:
        """Call the function, in a process that may have called it before. `shared` fetches what is shared."""
        os.chdir(self.working)
        if self.own and "__l2ul_own__" not in sys.modules:
            spec = importlib.util.spec_from_file_location("__l2ul_own__", self.own)
            module = sys.modules["__l2ul_own__"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)(words, shared)


@dataclass(frozen=True)
class Resources:
    """What a trial is given, and how many run at once at most; None: one GPU where there are any, as many as fit."""

    cpus: float = 1
    gpus: float | None = None
    parallel: int | None = None


def require() -> None:
    """Raise InputError where Ray and Optuna are not installed."""
    for name in ("ray", "optuna"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed; call this as: uv run --extra sweep main_sweep.py …")


class Cluster:
    """A connection to Ray, with what the workers share (`share`) in its object store."""

    def __init__(self, place: Place, resources: Resources):
        import ray

        self.ray, self.place, self.resources = ray, place, resources
        there = ray.cluster_resources()
        gpus = (1 if there.get("GPU") else 0) if resources.gpus is None else resources.gpus
        self.needed = {"num_cpus": resources.cpus, "num_gpus": gpus}
        if not self.slots():
            raise InputError(
                f"a trial is to have {resources.cpus:g} CPUs and {gpus:g} GPUs, and no more than "
                f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g} are there; give it fewer with --cpus-per-trial "
                f"and --gpus-per-trial"
            )
        self.shared, self.running = [], 0

    def slots(self) -> int:
        """How many trials run at once, on the nodes that are there now."""
        there = self.ray.cluster_resources()
        pairs = (("CPU", self.needed["num_cpus"]), ("GPU", self.needed["num_gpus"]))
        room = min(int(there.get(name, 0) / each + 1e-6) for name, each in pairs if each)
        return min(room, self.resources.parallel or room)

    def share(self, thing: object) -> None:
        """Put a thing where the workers find it, once a node."""
        with warnings.catch_warnings(action="ignore"):  # that nobody may write to shared tensors: nobody does
            self.shared = [self.ray.put(thing)]  # in a list a worker is given the reference, not the thing

    def carry_out(self, trials: Iterable[Trial], seconds: float = 1.0) -> Iterator[list[tuple[Trial, str | None]]]:
        """Do the trials, in about their order; every second or more often, those that ended with why they failed.

        Ray tries a trial again as RETRIES says. Few wait in its queues at a time, whatever their number.
        """
        options = self.needed | {"max_retries": RETRIES, "retry_exceptions": True}
        task = self.ray.remote(max_calls=0, **options)(work)
        waiting: dict[object, Trial] = {}
        coming = iter(trials)
        while True:
            slots = self.slots()
            most = slots if self.resources.parallel else 2 * slots
            while len(waiting) < max(1, most) and (trial := next(coming, None)):
                waiting[task.remote(self.place, trial.words, self.shared)] = trial
            if not waiting:
                return
            ended, _ = self.ray.wait(list(waiting), timeout=seconds)
            found = [(waiting.pop(reference), self._fault(reference)) for reference in ended]
            self.running = min(slots, len(waiting))
            yield found

    def _fault(self, reference: object) -> str | None:
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return last_lines(error)
        return None


def work(place: Place, words: Words, shared: list[object]) -> object:
    """What a worker does."""
    import ray

    return place.call(words, lambda: ray.get(shared[0]))


@contextlib.contextmanager
def connected(place: Place, resources: Resources, address: str | None = None) -> Iterator[Cluster]:
    """A running cluster, or with no address one of this machine, which ends with the block."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    if address and TOKEN.exists():  # where Ray keeps the secret that a cluster asks for
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    path = os.pathsep.join(filter(None, [str(place.folder), os.environ.get("PYTHONPATH")]))
    variables = {name: os.environ[name] for name in ENVIRONMENT} | {"PYTHONPATH": path}
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
    try:
        ray.init(**({"address": address} | options))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address or 'this machine'} ({last_lines(error, 1)}); start one with: ray "
            f"start --head, and name it by --address auto, or leave that out"
        ) from None
    try:
        yield Cluster(place, resources)
    finally:
        ray.shutdown()
