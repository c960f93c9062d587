"""What a worker of a sweep does: the runs of a command line of main_unlearn.py, with data and model kept in memory."""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from l2ul.cli import options, unlearn_command, unlearn_options
from l2ul.common import device as devices
from l2ul.common import precision
from l2ul.common.cache import Cache
from l2ul.common.choices import HUB_OPTIONS
from l2ul.common.tracking import Trackers
from l2ul.data import folder
from l2ul.data.images import Images
from l2ul.experiments import records
from l2ul.experiments.execution import Experiment
from l2ul.experiments.runs import Run, Setup
from l2ul.sweeps import trials
from l2ul.sweeps.trials import Arguments, Record

DATA_OPTIONS = (  # what decides the data set
    *("dataset", "data_dir", "image_size", "age_grouping", "split_seed"),
    *(*HUB_OPTIONS, "exif_orientation", "white_level"),
)
MODEL_OPTIONS = (*DATA_OPTIONS, "model", "checkpoint", "weights_key", "mean", "std", "single_label", "surrogate")
TRACKER_FAILURES = Path("tracking", "failures.txt")  # in --result-dir: sentences, one per line
DataSets = dict[tuple[str, ...], Images]  # by the values of DATA_OPTIONS


@dataclass
class Workbench:
    """Data sets, and the model used last, that a process keeps from one trial to the next.

    changes  ids of planned runs that are finished, by what has changed since, see `Experiment.changes`
    """

    data_sets: DataSets = field(default_factory=dict)
    changes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _model: tuple[str, ...] | None = None  # the values of MODEL_OPTIONS of `_setup`
    _setup: Setup | None = None

    def open(
        self,
        opts: argparse.Namespace,
        device: torch.device,
        cache: Cache | None = None,
        trackers: Trackers | None = None,
    ) -> tuple[Experiment, list[Run]]:
        """Return the runs of a command and the experiment that carries them out."""
        opts.precision = precision.resolve(opts.precision, device)
        setup = self._load(opts, device)
        runs = unlearn_command.plan_runs(opts, setup)
        return unlearn_command.make_experiment(opts, setup, runs, device, cache or Cache(), trackers), runs

    def _load(self, opts: argparse.Namespace, device: torch.device) -> Setup:
        model, data_set = (tuple(str(getattr(opts, name)) for name in names) for names in (MODEL_OPTIONS, DATA_OPTIONS))
        if self._model != model:
            self._setup = unlearn_command.load_setup(opts, device, lambda opts: self._load_data(opts, data_set))
            self._model = model
        loaded = self._setup
        weights = loaded.described["checkpoint"]
        return unlearn_command.make_setup(opts, loaded.images, loaded.classifier, weights, loaded.surrogate)

    def _load_data(self, opts: argparse.Namespace, data_set: tuple[str, ...]) -> Images:
        """Return a data set as it was read: a setup has it in the colours of its model and without surrogate images."""
        if data_set not in self.data_sets:
            self.data_sets[data_set] = options.load_data(opts)
        return self.data_sets[data_set]

    def plan(
        self, arguments: Arguments, trial_arguments: Arguments, chosen: Mapping[str, object]
    ) -> tuple[list[trials.Trial], set[str]]:
        """Return the trials of a command and the ids of its runs that are not finished.

        arguments        of the command
        trial_arguments  the same without methods, k and seeds, of which each trial has its own
        chosen           see `trials.Trial`
        """
        opts = unlearn_options.parse(arguments)
        experiment, runs = self.open(opts, torch.device("cpu"))
        unfinished = {run.files.identity for part in experiment.pending(runs, opts.rerun) for run in part}
        finished = [run for run in runs if run.files.identity not in unfinished]
        for key, identities in experiment.changes(finished).items():
            self.changes[key].update(identities)
        return trials.make_trials(runs, trial_arguments, chosen), unfinished

    def record_failure(self, arguments: Arguments, error: str) -> None:
        """Record the runs of a command as failed, but for those that have a result."""
        opts = unlearn_options.parse(arguments)
        experiment, runs = self.open(opts, torch.device("cpu"))
        for run in runs:
            if run.files.read() is None:
                settings = run.settings | experiment.setup.described
                run.files.rewrite(records.failure(settings, experiment.evaluator.metrics, error))


WORKBENCH = Workbench()  # of a worker process


def run_trial(arguments: Arguments, shared_data_sets: Callable[[], DataSets]) -> list[Record]:
    """Do the runs of a command that are not finished, and return the records of all.

    shared_data_sets  returns the data sets that the process of the sweep has loaded
    """
    opts = unlearn_options.parse(arguments)
    device = devices.choose_device(opts.device, opts.no_cuda, opts.threads)
    unlearn_command.use_precision(opts, device)
    folder.check_decoder(opts.decoder, device)
    unlearn_command.open_result_folders(opts)
    if not WORKBENCH.data_sets:
        WORKBENCH.data_sets.update(shared_data_sets())

    def note_failure(sentence: str) -> None:
        with open(opts.result_dir / TRACKER_FAILURES, "a") as file:
            file.write(f"{sentence}\n")

    trackers = unlearn_command.open_trackers(opts, note_failure)
    experiment, runs = WORKBENCH.open(opts, device, unlearn_command.open_cache(opts), trackers)
    to_do, to_measure = experiment.pending(runs, opts.rerun)
    unlearn_command.check_writable(experiment, to_do)
    experiment.add_metrics(to_measure)
    experiment.carry_out(to_do)
    return [run.files.read() for run in runs]


def score_trial(arguments: Arguments, shared_data_sets: Callable[[], DataSets], retained: str) -> float:
    """Do the runs of a command and return the score of its settings, see `trials.score`."""
    return trials.score(run_trial(arguments, shared_data_sets), retained)
