"""Search for the settings that keep most of D_r while all of D_f is forgotten: Ray Tune with Optuna.

What was tried before is in the records: it is told to Optuna first, and only what is missing is run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
import tempfile

from l2ul.cli.ranges import Interval
from l2ul.sweeps.cluster import RETRIES, Cluster, work
from l2ul.sweeps.trials import Words, last_lines

Settings = dict[str, object]  # a value for each axis
Axes = dict[str, list[object]]  # the values of each, or one Interval
Ended = Callable[[Settings, float | None, str | None], None]  # told some settings' score, or why they failed


@dataclass(frozen=True)
class Search:
    """What is searched.

    axes   of the space
    words  what the function of `Place` is given for some settings; it returns their score, higher is better
    known  settings whose runs are all recorded, and their score
    begun  settings of which some run is recorded: these are finished first
    """

    axes: Axes
    words: Callable[[Settings], Words]
    known: list[tuple[Settings, float]]
    begun: list[Settings]


def encoded(axes: Axes, settings: Settings) -> Settings:
    """Settings as Optuna sees them: of listed values their places, which have an order where categories have none."""
    return {name: value if _interval(axes[name]) else axes[name].index(value) for name, value in settings.items()}


def decoded(axes: Axes, point: Settings) -> Settings:
    return {name: value if _interval(axes[name]) else axes[name][value] for name, value in point.items()}


def within(axes: Axes, settings: Settings) -> bool:
    """Whether each value is one that the search could choose."""
    return all(
        value in (interval if (interval := _interval(axes[name])) else axes[name]) for name, value in settings.items()
    )


def _interval(values: list[object]) -> Interval | None:
    return values[0] if isinstance(values[0], Interval) else None


def tried(axes: Axes, found: Iterable[dict[str, object]]) -> list[Settings]:
    """The settings within the space that some record has, each once."""
    seen = {}
    for record in found:
        settings = {name: record.get(name) for name in axes}
        if within(axes, settings):
            seen[tuple(settings.values())] = settings
    return list(seen.values())


def run(cluster: Cluster, search: Search, count: int, ended: Ended, look: Callable[[int], None]) -> None:
    """Try `count` settings; of each, as it ends, `ended` is told. `look` is told how many run, again and again.

    The choice of settings depends on what ended before, so on how many run at once; what a run gives does not.
    """
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter

    place, words, axes, shared = cluster.place, search.words, search.axes, cluster.shared

    def trainable(point: Settings) -> None:
        tune.report({"score": work(place, words(decoded(axes, point)), shared)})

    needed = {"cpu": cluster.needed["num_cpus"], "gpu": cluster.needed["num_gpus"]}
    algorithm = ConcurrencyLimiter(_optuna(search), max_concurrent=cluster.slots())
    with tempfile.TemporaryDirectory() as folder:  # what Tune itself would keep: records are enough
        tuner = tune.Tuner(
            tune.with_resources(trainable, needed),
            tune_config=tune.TuneConfig(search_alg=algorithm, num_samples=count, metric="score", mode="max"),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[_callback(axes, ended, look)],
            ),
        )
        tuner.fit()


def _optuna(search: Search):
    """Optuna's sampler, told what is known; its seed moves on with that, so as not to draw the same again."""
    from optuna import distributions
    from ray.tune.search.optuna import OptunaSearch

    space = {}
    for name, values in search.axes.items():
        interval = _interval(values)
        if interval is None:
            space[name] = distributions.IntDistribution(0, len(values) - 1)
        elif interval.whole:
            space[name] = distributions.IntDistribution(interval.low, interval.high, log=interval.log)
        else:
            space[name] = distributions.FloatDistribution(interval.low, interval.high, log=interval.log)
    begun = [encoded(search.axes, settings) for settings in search.begun]
    found = OptunaSearch(
        space=space, metric="score", mode="max", seed=len(search.known), points_to_evaluate=begun or None
    )
    for settings, score in search.known:
        found.add_evaluated_point(encoded(search.axes, settings), score)
    return found


def _callback(axes: Axes, ended: Ended, look: Callable[[int], None]):
    from ray import tune

    class Told(tune.Callback):
        def on_step_end(self, iteration, trials, **info) -> None:
            look(sum(trial.status == "RUNNING" for trial in trials))

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            ended(decoded(axes, trial.config), trial.last_result.get("score"), None)

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            ended(decoded(axes, trial.config), None, last_lines(trial.get_error() or "the process ended"))

    return Told()
