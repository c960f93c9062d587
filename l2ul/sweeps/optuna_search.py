"""Search for settings with Ray Tune and Optuna: all of D_f forgotten, and D_r retained as far as possible.

The records are the memory of a search: Optuna first receives the scores of the settings that are on record.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
import tempfile

from l2ul.sweeps.ranges import Interval
from l2ul.sweeps.ray_cluster import RETRIES, Cluster, call_worker
from l2ul.sweeps.trials import Arguments, last_lines

Settings = dict[str, object]  # a value for each axis
Axes = dict[str, list[object] | Interval]  # the values of each axis, or an Interval
OnResult = Callable[[Settings, float | None, str | None], None]  # receives settings with their score or an error


@dataclass(frozen=True)
class Search:
    """A search over settings.

    axes       the search space
    arguments  returns the arguments of the worker function for settings; the function returns their score
    known      settings whose runs are all on record, with their score; a higher score is better
    started    settings of which some run is on record: the search finishes these first
    """

    axes: Axes
    arguments: Callable[[Settings], Arguments]
    known: list[tuple[Settings, float]]
    started: list[Settings]


def encode(axes: Axes, settings: Settings) -> Settings:
    """Return settings as Optuna sees them: a listed value is its index, because indices have an order."""
    return {
        name: value if isinstance(axes[name], Interval) else axes[name].index(value) for name, value in settings.items()
    }


def decode(axes: Axes, point: Settings) -> Settings:
    """Return the settings of which `encode` made the point."""
    return {name: value if isinstance(axes[name], Interval) else axes[name][value] for name, value in point.items()}


def settings_on_record(axes: Axes, records: Iterable[dict[str, object]]) -> list[Settings]:
    """Return the settings in the search space that some record has, without duplicates."""
    distinct = {}
    for record in records:
        settings = {name: record.get(name) for name in axes}
        if all(value in axes[name] for name, value in settings.items()):
            distinct[tuple(settings.values())] = settings
    return list(distinct.values())


def run(cluster: Cluster, search: Search, count: int, on_result: OnResult, on_step: Callable[[int], None]) -> None:
    """Try `count` settings.

    Which settings are tried depends on the results so far, and so on how many trials run at once. The result of a run
    does not.

    on_result  called when the trial of some settings has ended
    on_step    called repeatedly with the number of trials that run
    """
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter

    worker_function, arguments, axes, shared = cluster.worker_function, search.arguments, search.axes, cluster.shared

    def trainable(point: Settings) -> None:
        tune.report({"score": call_worker(worker_function, arguments(decode(axes, point)), shared)})

    per_trial = {"cpu": cluster.per_trial["num_cpus"], "gpu": cluster.per_trial["num_gpus"]}
    algorithm = ConcurrencyLimiter(_optuna(search), max_concurrent=cluster.slots())
    with tempfile.TemporaryDirectory() as folder:  # for files of Tune, which are not needed: the records are enough
        tuner = tune.Tuner(
            tune.with_resources(trainable, per_trial),
            tune_config=tune.TuneConfig(search_alg=algorithm, num_samples=count, metric="score", mode="max"),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[_callback(axes, on_result, on_step)],
            ),
        )
        tuner.fit()


def _optuna(search: Search):
    """Return Optuna's sampler with the known scores. Its seed changes with their number, so it draws new settings."""
    from optuna import distributions
    from ray.tune.search.optuna import OptunaSearch

    space = {}
    for name, axis in search.axes.items():
        if not isinstance(axis, Interval):
            space[name] = distributions.IntDistribution(0, len(axis) - 1)
        else:
            kind = distributions.IntDistribution if axis.whole else distributions.FloatDistribution
            space[name] = kind(axis.low, axis.high, log=axis.log)
    started = [encode(search.axes, settings) for settings in search.started]
    sampler = OptunaSearch(
        space=space, metric="score", mode="max", seed=len(search.known), points_to_evaluate=started or None
    )
    for settings, score in search.known:
        sampler.add_evaluated_point(encode(search.axes, settings), score)
    return sampler


def _callback(axes: Axes, on_result: OnResult, on_step: Callable[[int], None]):
    from ray import tune

    class Callback(tune.Callback):
        def on_step_end(self, iteration, trials, **info) -> None:
            on_step(sum(trial.status == "RUNNING" for trial in trials))

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            on_result(decode(axes, trial.config), trial.last_result.get("score"), None)

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            on_result(decode(axes, trial.config), None, last_lines(trial.get_error() or "the process ended"))

    return Callback()
