"""A trial of main_sweep.py: what main_unlearn.py does for its words, in a process that keeps what it has loaded."""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from l2ul.common import device as device_module
from l2ul.common import precision
from l2ul.common.cache import Cache
from l2ul.data.images import Images
from l2ul.experiments import records
from l2ul.experiments.execution import Experiment
from l2ul.experiments.runs import Run, Setup
from l2ul.sweeps import trials
from l2ul.sweeps.trials import Record, Words
import main_unlearn

DATA = ("dataset", "data_dir", "image_size", "age_grouping", "split_seed")  # what decides what is loaded
NET = (*DATA, "model", "checkpoint", "mean", "std")
Shared = Callable[[], dict[tuple, Images]]  # data sets that were loaded already, by the values of DATA


@dataclass
class Bench:
    """What a process keeps from one trial to the next: data sets, and the classifier used last with its own."""

    images: dict[tuple, Images] = field(default_factory=dict)
    _net: tuple | None = None
    _setup: Setup | None = None

    def load(self, opts: argparse.Namespace, device: torch.device) -> Setup:
        net, which = (tuple(str(getattr(opts, name)) for name in names) for names in (NET, DATA))
        if self._net != net:
            self._setup = main_unlearn.load(opts, device, self.images.get(which))
            self.images[which] = self._setup.images
            self._net = net
        known = self._setup
        return main_unlearn.set_up(opts, known.images, known.classifier, known.described["checkpoint"])

    def open(
        self, opts: argparse.Namespace, device: torch.device, cache: Cache | None = None
    ) -> tuple[Experiment, list[Run]]:
        """The runs of a command, and how they are carried out."""
        setup = self.load(opts, device)
        runs = main_unlearn.plan(opts, setup)
        return main_unlearn.prepare(opts, setup, runs, device, cache or Cache()), runs

    def plan(self, words: Words, common: Words, told: str = "") -> tuple[list[trials.Trial], set[str]]:
        """The trials of a command, which has `common` words beside methods, k and seeds, and the ids still to do."""
        opts = main_unlearn.parse(list(words))
        experiment, runs = self.open(opts, torch.device("cpu"))
        to_do = {run.files.identity for part in main_unlearn.to_do(opts, experiment, runs) for run in part}
        return trials.trials(runs, common, told), to_do

    def record_failure(self, words: Words, error: str) -> None:
        """Record as failed what of a command has no record, nor had one before."""
        opts = main_unlearn.parse(list(words))
        experiment, runs = self.open(opts, torch.device("cpu"))
        for run in runs:
            if run.files.read() is None:
                settings = run.settings | experiment.setup.described
                run.files.rewrite(records.failure(settings, experiment.measuring.metrics, error))


BENCH = Bench()  # of a worker


def work(words: Words, shared: Shared) -> list[Record]:
    """Do what is not done of a command's runs; returns the records of all."""
    opts = main_unlearn.parse(list(words))
    device = device_module.choose_device(opts.device, opts.no_cuda, opts.threads)
    precision.use(device, opts.precision)
    if not BENCH.images:
        BENCH.images.update(shared())
    experiment, runs = BENCH.open(opts, device, main_unlearn.open_cache(opts))
    pending, to_measure = main_unlearn.to_do(opts, experiment, runs)
    experiment.measure(to_measure)
    experiment.carry_out(pending)
    return [run.files.read() for run in runs]


def attempt(words: Words, shared: Shared) -> float:
    """The same, as a trial of a search; returns how good the settings are by the sample of D_r."""
    return trials.score(work(words, shared))


def attempt_source_free(words: Words, shared: Shared) -> float:
    """The same by the answers on held-out adversarial examples: no image of D_r is asked about."""
    return trials.score(work(words, shared), kept="metric_answers_kept")
