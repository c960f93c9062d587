"""A sweep: all combinations of settings, or a search for the best. Runs that are on record are not repeated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
from dataclasses import dataclass, field, replace
import functools
import os
from pathlib import Path
import shlex

import torch

from l2ul.cli import unlearn_command, unlearn_options
from l2ul.common import installation, precision
from l2ul.common.errors import option
from l2ul.experiments import records, time_estimates
from l2ul.methods.registry import own_flags
from l2ul.methods.settings import SHARED
from l2ul.sweeps import options, optuna_search, ranges, ray_cluster, trials
from l2ul.sweeps.monitor import sweep_monitor
from l2ul.sweeps.options import Sweep
from l2ul.sweeps.optuna_search import Settings
from l2ul.sweeps.trials import Record, Trial
from l2ul.sweeps.worker import TRACKER_FAILURES, Workbench, run_trial, score_trial

CODE_FOLDER = installation.PACKAGE.parent  # of the clone, or of installed packages


def with_precision(sweep: Sweep) -> Sweep:
    """Return the sweep with the default of --precision on its workers' device as an argument.

    The ids of runs depend on it, and this process, which plans them, may run on a machine without a GPU.
    """
    opts = sweep.first_options
    if "precision" in sweep.axes or opts.precision:
        return sweep
    gpus = torch.cuda.is_available() if sweep.opts.gpus_per_trial is None else sweep.opts.gpus_per_trial > 0
    on_gpu = opts.device == "cuda" or (opts.device is None and not opts.no_cuda and gpus)
    chosen = precision.resolve(None, torch.device("cuda" if on_gpu else "cpu"))
    return replace(sweep, shared=(*sweep.shared, "--precision", chosen))


@dataclass(frozen=True)
class SweepRunner:
    """Carries out a sweep.

    user_script  script of the user that workers run first, see `ray_cluster.WorkerFunction`
    report       called with each text for the user
    """

    sweep: Sweep
    user_script: Path | None = None
    report: Callable[[str], object] = print
    workbench: Workbench = field(default_factory=Workbench)

    @property
    def retained(self) -> str:
        """The key of records that a search maximises: accuracy on D_r, or agreement with the original model."""
        return "metric_answers_kept" if self.sweep.opts.source_free else "acc_retain"

    def run(self) -> int:
        """Do the trials that are not finished, in a dry run none. Return how many failed."""
        return self.run_search() if self.sweep.opts.search else self.run_grid()

    def run_grid(self) -> int:
        """Run every combination of settings."""
        planned, pending = self.plan(ranges.product(self.sweep.axes))
        self.announce(planned, pending)
        if self.sweep.opts.dry_run or not pending:
            return 0
        with self._cluster(run_trial) as cluster, sweep_monitor(len(pending), self.report) as monitor:
            for ended in cluster.run_trials(trials.start_order(pending, cluster.slots())):
                for trial, error in ended:
                    if error:
                        self.workbench.record_failure(trial.arguments, error)
                    monitor.trial_ended([file.record for file in trial.files], failed=bool(error))
                monitor.update(cluster.num_running)
        return monitor.failed

    def run_search(self) -> int:
        """Search for the best settings, starting from those on record, and report the best."""
        opts = self.sweep.opts
        self.check_values()
        known, started = self.recall()
        remaining = max(0, opts.search - len(known))
        self.report(
            f"{len(known)} of {opts.search} settings are on record, {remaining} to try, {len(started)} of them started"
        )
        self._report_changes()
        failed = 0
        if remaining and not opts.dry_run:
            failed = self._try_settings(remaining, known, started)
        if known:
            settings, score = max(known, key=lambda pair: pair[1])
            result = f"retains {score:.2f} %" if score >= 0 else "does not forget all of D_f"
            command = shlex.join([*installation.command(unlearn_options.PROGRAM), *self.sweep.arguments(settings)])
            self.report(f"best of {len(known)}, {result}: {command}")
        return failed

    def check_values(self) -> None:
        """Raise InputError if a model, a data set or a file of the search cannot be used, or a flag has no effect."""
        settings = SHARED.keys() | own_flags().keys()  # whose values were checked when they were read
        first = {name: [value] for name, value in self.sweep.first.items()}
        axes = {
            name: first[name] if name in settings or isinstance(values, ranges.Interval) else values
            for name, values in self.sweep.axes.items()
        }
        planned, _ = self.plan(ranges.product(axes))
        for name, values in axes.items():
            if len(values) > 1 and all(trial.chosen[name] == values[0] for trial in planned):
                raise options.no_effect(name, "gives the same runs for all values")

    def _try_settings(self, count: int, known: list[tuple[Settings, float]], started: list[Settings]) -> int:
        """Try `count` settings and add them to `known`. Return how many failed."""
        search = optuna_search.Search(self.sweep.axes, self.sweep.arguments, list(known), started)
        function = functools.partial(score_trial, retained=self.retained)
        with self._cluster(function) as cluster, sweep_monitor(count, self.report) as monitor:

            def on_result(settings: Settings, score: float | None, error: str | None) -> None:
                if error:
                    self.workbench.record_failure(self.sweep.arguments(settings), error)
                else:
                    known.append((settings, score))
                planned, _ = self.plan([settings])
                monitor.trial_ended([file.record for trial in planned for file in trial.files], failed=bool(error))

            optuna_search.run(cluster, search, count, on_result, monitor.update)
        return monitor.failed

    def track(self, figures: Sequence[Path], failed: int) -> None:
        """Add a run with the command, the number of failed trials and the figures (PNG files) to the trackers."""
        opts = self.sweep.first_options
        axes = {name: str(values) for name, values in self.sweep.axes.items()}
        settings = {"command": shlex.join([*self.sweep.shared, *self.sweep.split]), **axes}
        with unlearn_command.open_trackers(opts, self.report) as trackers:
            trackers.start(records.run_id(settings), "sweep", settings)
            trackers.finish({"failed": failed}, figures)

    def plan(self, chosen: Iterable[Settings]) -> tuple[list[Trial], list[Trial]]:
        """Return the trials of settings and those of them that are not finished.

        Settings that a method does not use give the same trial, which is returned once.
        """
        planned: dict[str, Trial] = {}
        pending = []
        for settings in chosen:
            made, unfinished = self.workbench.plan(
                self.sweep.arguments(settings), self.sweep.trial_arguments(settings), settings
            )
            new = [trial for trial in made if trial.identity not in planned]
            planned |= {trial.identity: trial for trial in new}
            pending += [trial for trial in new if any(file.identity in unfinished for file in trial.files)]
        return list(planned.values()), pending

    def recall(self) -> tuple[list[tuple[Settings, float]], list[Settings]]:
        """Return settings of the search whose runs are all on record, with their score, and those with some on record.

        Of the latter, no more than the search still has to try.
        """
        known, started = [], []
        for settings in optuna_search.settings_on_record(self.sweep.axes, self._records()):
            planned, pending = self.plan([settings])
            if not pending:
                recorded = [file.read() for trial in planned for file in trial.files]
                known.append((settings, trials.score(recorded, self.retained)))
            elif any(trial.has_records for trial in planned):
                started.append(settings)
        return known, started[: max(0, self.sweep.opts.search - len(known))]

    def announce(self, planned: list[Trial], pending: list[Trial]) -> None:
        """Report what will run and the estimated time. In a dry run, report each trial."""
        opts, unfinished = self.sweep.opts, {trial.identity for trial in pending}
        failed = sum(trial.has_failed for trial in pending)
        self.report(
            f"{len(planned)} trials: {len(pending)} to do, {len(planned) - len(pending)} done, {failed} failed before"
        )
        for name, values in self.sweep.axes.items():
            if all(trial.chosen[name] == values[0] for trial in planned):
                self.report(f"the values of {option(name)} give the same runs, which are done once")
        self._report_changes()
        if opts.dry_run:
            for trial in planned:
                state = "done" if trial.identity not in unfinished else "failed" if trial.has_failed else "to do"
                self.report(f"{state:7} {trial.identity} {trial.label}")
        if pending:
            at_once = min(len(pending), opts.parallel or max(1, int((os.cpu_count() or 1) / opts.cpus_per_trial)))
            settings = [trial.settings for trial in pending for _ in trial.files]  # steps have as many images each
            self.report(time_estimates.sentence(settings, self._records(), at_once, str(self.sweep.result_dir)))

    def _report_changes(self) -> None:
        """Report what has changed since the planned runs that are finished were recorded."""
        changes = {key: sorted(identities) for key, identities in self.workbench.changes.items()}
        for note in unlearn_command.notes_on_changes(changes):
            self.report(note)

    def _records(self) -> Iterator[Record]:
        return records.read_folder(self.sweep.result_dir)

    @contextlib.contextmanager
    def _cluster(self, function: Callable) -> Iterator[ray_cluster.Cluster]:
        """Connect to a cluster whose workers call a function for each trial, and share the data sets.

        Reports at the end which trackers failed in trials.
        """
        unlearn_command.open_result_folders(self.sweep.first_options)
        failures = self.sweep.result_dir / TRACKER_FAILURES
        failures.unlink(missing_ok=True)
        worker = ray_cluster.WorkerFunction(function, CODE_FOLDER, Path.cwd(), self.user_script)
        opts = self.sweep.opts
        resources = {"cpus": opts.cpus_per_trial, "gpus": opts.gpus_per_trial, "at_most": opts.parallel}
        with ray_cluster.connect(worker, opts.address, **resources) as cluster:
            cluster.share(self.workbench.data_sets)
            yield cluster
        if failures.exists():
            for sentence in dict.fromkeys(failures.read_text().splitlines()):
                self.report(sentence)
