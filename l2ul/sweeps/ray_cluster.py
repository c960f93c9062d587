"""Trials as tasks on Ray: on a cluster of this machine or one that is running already.

Ray is imported in functions, so that everything else works without it.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
from dataclasses import dataclass
import importlib.util
import os
from pathlib import Path
import sys
import warnings

from l2ul.cli import exit_codes
from l2ul.common.errors import InputError
from l2ul.common.installation import is_installed
from l2ul.sweeps.trials import Arguments, Trial, last_lines

TOKEN = Path.home() / ".ray" / "auth_token"  # where Ray keeps the secret of a cluster
RETRIES = 2  # of a trial that raised an error, was killed, ran out of memory or lost its node
USER_MODULE = "__l2ul_user__"  # name under which workers import the script of the user
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # otherwise Ray copies the whole folder, with the data, to every node
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",  # all workers of a node share one copy of the data set
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # trials run at the priority of the command; Ray's default is 15
    "RAY_task_oom_retries": str(RETRIES),  # otherwise Ray retries a trial that is too large for the machine forever
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


@dataclass(frozen=True)
class WorkerFunction:
    """The function that workers call for a trial.

    function     a function of a module. Its arguments are those of the trial and a function that returns what
                 `Cluster.share` has stored
    code_folder  folder with the package l2ul, at the same path on every node
    working_dir  folder that relative paths refer to
    user_script  script of the user that registers methods, models, data sets or metrics; workers run it first
    """

    function: Callable[[Arguments, Callable[[], object]], object]
    code_folder: Path
    working_dir: Path
    user_script: Path | None = None

    def __call__(self, arguments: Arguments, shared: Callable[[], object]) -> object:
        """Call the function, in a process that may have called it before."""
        os.chdir(self.working_dir)
        if self.user_script and USER_MODULE not in sys.modules:
            spec = importlib.util.spec_from_file_location(USER_MODULE, self.user_script)
            module = sys.modules[USER_MODULE] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return self.function(arguments, shared)


def require_packages() -> None:
    """Raise InputError if Ray or Optuna is not installed."""
    for name in ("ray", "optuna"):
        if not is_installed(name):
            raise InputError(f"{name} is not installed", "run: uv run --extra sweep main_sweep.py …")


class Cluster:
    """A connection to Ray.

    worker_function  what workers call
    cpus, gpus       resources of a trial; gpus is None: one if there are GPUs
    at_most          trials at once; None: as many as fit
    per_trial        resources of a trial, as options of a Ray task
    shared           reference to what `share` has stored, in a list: Ray passes a reference in a list as it is
    num_running      trials that run now
    """

    def __init__(
        self,
        worker_function: WorkerFunction,
        cpus: float = 1,
        gpus: float | None = None,
        at_most: int | None = None,
    ):
        import ray

        self.ray, self.worker_function, self.at_most = ray, worker_function, at_most
        available = ray.cluster_resources()
        if gpus is None:
            gpus = 1 if available.get("GPU") else 0
        self.per_trial = {"num_cpus": cpus, "num_gpus": gpus}
        if not self.slots():
            raise InputError(
                f"a trial needs {cpus:g} CPUs and {gpus:g} GPUs, but the cluster has "
                f"{available.get('CPU', 0):g} and {available.get('GPU', 0):g}",
                "lower --cpus-per-trial or --gpus-per-trial",
            )
        self.shared, self.num_running = [], 0

    def slots(self) -> int:
        """Return how many trials can run at once on the nodes that are connected now."""
        available = self.ray.cluster_resources()
        needed = (("CPU", self.per_trial["num_cpus"]), ("GPU", self.per_trial["num_gpus"]))
        fitting = min(int(available.get(name, 0) / each + 1e-6) for name, each in needed if each)
        return min(fitting, self.at_most or fitting)

    def share(self, value: object) -> None:
        """Store a value for the workers, once per node."""
        with warnings.catch_warnings(action="ignore"):  # shared tensors are read-only: no worker writes to them
            self.shared = [self.ray.put(value)]

    def run_trials(self, trials: Iterable[Trial]) -> Iterator[list[tuple[Trial, str | None]]]:
        """Run the trials in about their order. Yield those that ended, each with its error or None.

        Yields at least every second, also if no trial ended. Ray retries a trial `RETRIES` times. Only a few trials
        are submitted ahead, whatever their number.

        A worker with a GPU does one trial: Ray gives each task GPUs of its own, but a process keeps those that CUDA
        found first. Without GPUs, workers keep data and model for the next trial.
        """
        options = {"max_calls": 1 if self.per_trial["num_gpus"] else 0, "max_retries": RETRIES, **self.per_trial}
        task = self.ray.remote(retry_exceptions=True, **options)(call_worker)
        submitted: dict[object, Trial] = {}
        remaining = iter(trials)
        while True:
            slots = self.slots()
            most = slots if self.at_most else 2 * slots
            while len(submitted) < max(1, most) and (trial := next(remaining, None)):
                submitted[task.remote(self.worker_function, trial.arguments, self.shared)] = trial
            if not submitted:
                return
            references, _ = self.ray.wait(list(submitted), timeout=1.0)
            ended = [(submitted.pop(reference), self._error(reference)) for reference in references]
            self.num_running = min(slots, len(submitted))
            yield ended

    def _error(self, reference: object) -> str | None:
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return last_lines(error)
        return None


def call_worker(worker_function: WorkerFunction, arguments: Arguments, shared: list[object]) -> object:
    """Call the function in a worker. `shared` is `Cluster.shared`."""
    import ray

    return worker_function(arguments, lambda: ray.get(shared[0]))


@contextlib.contextmanager
def connect(worker_function: WorkerFunction, address: str | None = None, **resources) -> Iterator[Cluster]:
    """Connect to the cluster at an address. Without one, start a cluster on this machine, which ends with the block.

    resources  of a trial, see `Cluster`
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    if address and TOKEN.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    path = os.pathsep.join(filter(None, [str(worker_function.code_folder), os.environ.get("PYTHONPATH")]))
    variables = {name: os.environ[name] for name in ENVIRONMENT} | {"PYTHONPATH": path}
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
    try:
        ray.init(**({"address": address} | options))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address or 'this machine'} ({last_lines(error, 1)})",
            "start one with `ray start --head` and name it with --address auto",
            "leave out --address",
        ) from None
    exit_codes.handle_sigterm()  # Ray has installed its own handler
    try:
        yield Cluster(worker_function, **resources)
    finally:
        with _native_messages_discarded():
            ray.shutdown()


@contextlib.contextmanager
def _native_messages_discarded() -> Iterator[None]:
    """Discard what is written to file descriptor 2, standard error, in this block.

    While Ray ends its processes, its C++ threads report there that they lost them.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
