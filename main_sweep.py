"""Many runs at once, on this machine or a Ray cluster: every combination of settings, or a search for the best.

    uv run --extra sweep main_sweep.py --method adv adv_imp --seed 0 1 --pgd-eps 1:4:3 --unlearn-lr 0.003 0.01
    uv run --extra sweep main_sweep.py --method adv_imp --search 20 --pgd-eps 1:5 --unlearn-lr 1e-4:1e-2:log

Takes the flags of main_unlearn.py, each with several values or a range, and records what that would. What is recorded
is not done again: a command that was stopped goes on, on another machine too. What it gave: docs/scaling.md.
"""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import argparse
from collections.abc import Iterable, Iterator
import contextlib
from dataclasses import dataclass
import itertools
import os
from pathlib import Path
import shlex
import sys

from l2ul.cli import exit_codes, options, ranges
from l2ul.cli import parser as parsing
from l2ul.cli.ranges import Interval
from l2ul.common.errors import InputError
from l2ul.common.progress import format_duration
from l2ul.experiments import records
from l2ul.sweeps import cluster, monitor, slurm
from l2ul.sweeps import search as searching
from l2ul.sweeps import trials as sweep
from l2ul.sweeps.search import Settings
from l2ul.sweeps.trials import Trial, Words
from l2ul.sweeps.worker import Bench
import main_tables
import main_unlearn

PROGRAM = "main_sweep.py"
# Flags of main_unlearn.py that decide no result, or where things are: one value each.
ONE = (
    *("data_dir", "result_dir", "cache_dir", "cache_gib", "workers", "device", "threads"),
    *("test_batch_size", "attack_batch_size", "retrained"),
)
LISTS = ("method", "unlearn_k", "seed", "evaluate", "references")  # all of them in one command of main_unlearn.py
SPLIT = ("method", "unlearn_k", "seed")  # of these, what a trial does one of
OWN = ("search", "source_free", "address", "gpus_per_trial", "cpus_per_trial", "parallel", "slurm", "dry_run")
SEARCH_SAMPLE = 5000  # training images that stand for D_r in a search, where --retain-sample does not say


@dataclass(frozen=True)
class Asked:
    """What a command asks for: the words that all runs share, those of methods, k and seeds, and what differs."""

    opts: argparse.Namespace
    shared: Words
    split: Words
    axes: dict[str, list[object]]

    def common(self, settings: dict[str, object]) -> Words:
        """The words of main_unlearn.py for a value of each axis, but for methods, k and seeds."""
        return (*self.shared, *itertools.chain.from_iterable(words(name, value) for name, value in settings.items()))

    def command(self, settings: dict[str, object]) -> Words:
        return (*self.common(settings), *self.split)


@exit_codes.clean_exit(PROGRAM)
def main() -> None:
    asked = parse()
    opts, bench = asked.opts, Bench()
    if opts.slurm:
        print(slurm.script(PROGRAM, without_slurm(sys.argv[1:]), opts.slurm, opts.gpus_per_trial != 0), end="")
        return
    if not opts.dry_run:
        cluster.require()
    result_dir = main_unlearn.parse(list(asked.shared)).result_dir
    failed = (search if opts.search else everything)(asked, bench, result_dir)
    if opts.dry_run:
        return
    main_tables.make(main_tables.parse(["--result-dir", str(result_dir), "--figures", "1", "6"]))
    if failed:
        raise SystemExit(f"{PROGRAM}: {failed} trials failed, their records say why; the same command tries them again")


def parse(argv: list[str] | None = None) -> Asked:
    """What is asked for; whatever main_unlearn.py would refuse without data or weights is refused here."""
    parser = options.Parser(__doc__.split("\n")[0], prog=PROGRAM)
    for add in (*options.RUN_GROUPS, options.add_weights, options.add_machine):
        add(parser)
    parsing.take_several(parser, ONE)
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    opts = argparse.Namespace(**{name: given.pop(name, None) for name in OWN})
    shared, split, axes = [], [], {}
    for name, value in given.items():
        found = flattened(name, value)
        if name in SPLIT:
            split += words(name, found)
        elif name in LISTS or not isinstance(found, list) or name in ("mean", "std"):
            shared += words(name, found)
        elif len(found) == 1 and not isinstance(found[0], Interval):
            shared += words(name, found[0])
        else:
            axes[name] = found
    if "threads" not in given:  # as many runs at once as there may be, each computes as one alone does
        shared += words("threads", max(1, int(opts.cpus_per_trial)))
    if opts.search and "retain_sample" not in given:
        shared += words("retain_sample", SEARCH_SAMPLE)
    if opts.source_free:
        shared += words("evaluate", list(dict.fromkeys([*given.get("evaluate", ()), "agreement"])))
    asked = Asked(opts, tuple(shared), tuple(split), axes)
    check(asked)
    return asked


def add_flags(parser: options.Parser) -> None:
    group = parser.add_argument_group("sweep")
    add = options.add
    settings = "try so many settings in place of all combinations: those that keep most of D_r at D_f = 0"
    add(group, "--search", settings, type=parsing.positive_int)
    held_out = "the search goes by answers on held-out adversarial examples of D_f, not by a sample of D_r"
    add(group, "--source-free", held_out, action="store_true")
    cpus = "of a trial, and its threads where --threads does not say"
    add(group, "--cpus-per-trial", cpus, type=parsing.positive_float, default=1.0)
    gpus = "of a trial; 0.25: four on a GPU (default: 1 where there are any)"
    add(group, "--gpus-per-trial", gpus, type=parsing.nonnegative_float)
    add(group, "--parallel", "trials at once at most (default: as many as fit)", type=parsing.positive_int)
    joined = "of a Ray cluster that runs, auto: the one of this machine (default: one is started here)"
    add(group, "--address", joined, metavar="HOST:PORT")
    job = "print a job script that starts a cluster on so many nodes under SLURM, and this on it"
    add(group, "--slurm", job, nargs="?", const=1, type=parsing.positive_int)


def flattened(name: str, value: object) -> object:
    """The values of a flag as they are; of those of a range, each. Of --course, every combination of its settings."""
    if not isinstance(value, list):
        return value
    flat = [one for part in value for one in (part if isinstance(part, list) else [part])]
    if name != "course":
        return flat
    settings: dict[str, list] = {}
    for key, number in flat:
        settings.setdefault(key, []).append(number)
    return [tuple(f"{key}={number}" for key, number in chosen.items()) for chosen in ranges.product(settings)]


def words(name: str, value: object) -> Words:
    return ranges.words_of(f"--{name.replace('_', '-')}", value)


def check(asked: Asked) -> None:
    """Raise InputError where flags contradict each other; each combination of a few is read by main_unlearn.py too."""
    opts, open_axes = asked.opts, [name for name, found in asked.axes.items() if isinstance(found[0], Interval)]
    if any(isinstance(one, Interval) for found in asked.axes.values() for one in found[1:]):
        raise InputError("a range without a number of points stands alone; give one range, or values")
    if open_axes and not opts.search:
        flag = open_axes[0].replace("_", "-")
        raise InputError(f"--{flag} is a range without a number of points; add it, as lo:hi:n, or --search N")
    if opts.source_free and not opts.search:
        raise InputError("--source-free says what a search goes by; add --search N")
    if opts.search and not asked.axes:
        raise InputError("--search has nothing to choose; give a flag several values or a range, as --pgd-eps 1:5")
    if opts.search and "course" in asked.axes:
        raise InputError("--search does not vary --course; give one value of each setting")
    first = {name: found[0].low if isinstance(found[0], Interval) else found[0] for name, found in asked.axes.items()}
    given = main_unlearn.parse(list(asked.command(first)))
    if opts.search and len(given.method) > 1:
        raise InputError(f"--search is for one method, not {' '.join(given.method)}; name one with --method")


def without_slurm(argv: list[str]) -> list[str]:
    """The words of the command that the job is to give."""
    place = argv.index("--slurm")
    number = place + 1 < len(argv) and argv[place + 1].isdecimal()
    return argv[:place] + argv[place + 1 + number :]


def plan(asked: Asked, bench: Bench, chosen: Iterable[Settings]) -> tuple[list[Trial], list[Trial]]:
    """The trials of some settings, each once (a method may not use what differs), and those that are still to do."""
    found: dict[str, Trial] = {}
    pending = []
    for settings in chosen:
        told = "".join(f", {name} = {value}" for name, value in settings.items())
        trials, to_do = bench.plan(asked.command(settings), asked.common(settings), told)
        new = [trial for trial in trials if trial.identity not in found]
        found |= {trial.identity: trial for trial in new}
        pending += [trial for trial in new if any(file.identity in to_do for file in trial.files)]
    return list(found.values()), pending


def everything(asked: Asked, bench: Bench, result_dir: Path) -> int:
    """Every combination; returns how many trials failed."""
    trials, pending = plan(asked, bench, ranges.product(asked.axes))
    announce(asked, trials, pending, result_dir)
    if asked.opts.dry_run or not pending:
        return 0
    with connected(asked, bench, "main_trials:work") as there, monitor.watch(len(pending)) as watch:
        for ended in there.carry_out(sweep.in_order(pending, there.slots())):
            for trial, fault in ended:
                if fault:
                    bench.record_failure(trial.words, fault)
                watch.end([file.record for file in trial.files], failed=bool(fault))
            watch.look(there.running)
    return watch.failed


def search(asked: Asked, bench: Bench, result_dir: Path) -> int:
    """A search for the best settings, with what is on record of it; returns how many failed."""
    known, begun = recall(asked, bench, result_dir)
    left = max(0, asked.opts.search - len(known))
    print(f"{len(known)} of {asked.opts.search} settings are on record, {left} to try, {len(begun)} of them begun")
    if not asked.opts.dry_run and left:
        function = "main_trials:attempt_source_free" if asked.opts.source_free else "main_trials:attempt"
        asking = searching.Search(asked.axes, asked.command, known, begun)
        with connected(asked, bench, function) as there, monitor.watch(left) as watch:

            def ended(settings: Settings, score: float | None, fault: str | None) -> None:
                if fault:
                    bench.record_failure(asked.command(settings), fault)
                else:
                    known.append((settings, score))
                trials, _ = plan(asked, bench, [settings])
                watch.end([file.record for trial in trials for file in trial.files], failed=bool(fault))

            searching.run(there, asking, left, ended, watch.look)
        left = watch.failed
    if known:
        best, score = max(known, key=lambda pair: pair[1])
        told = f"keeps {score:.2f} %" if score >= 0 else "does not forget all of D_f"
        print(f"best of {len(known)}, {told}: {shlex.join(['python', main_unlearn.PROGRAM, *asked.command(best)])}")
    return 0 if asked.opts.dry_run else left


def recall(asked: Asked, bench: Bench, result_dir: Path) -> tuple[list[tuple[Settings, float]], list[Settings]]:
    """Settings of the search whose runs are all on record, with their score, and those of which some are."""
    known, begun = [], []
    for settings in searching.tried(asked.axes, on_record(result_dir)):
        trials, pending = plan(asked, bench, [settings])
        found = [file.read() for trial in trials for file in trial.files]
        if not pending:
            known.append(
                (settings, sweep.score(found, "metric_answers_kept" if asked.opts.source_free else "acc_retain"))
            )
        elif any(trial.was_begun for trial in trials):
            begun.append(settings)
    return known, begun[: max(0, asked.opts.search - len(known))]


def on_record(result_dir: Path) -> Iterator[sweep.Record]:
    return filter(None, map(records.read, sorted((result_dir / "runs").glob("*.json"))))


def announce(asked: Asked, trials: list[Trial], pending: list[Trial], result_dir: Path) -> None:
    """What will run, and how long that will take; for a dry run, the trials."""
    to_do, failed = {trial.identity for trial in pending}, sum(trial.failed for trial in pending)
    print(f"{len(trials)} trials: {len(pending)} to do, {len(trials) - len(pending)} done, {failed} failed before")
    if asked.opts.dry_run:
        for trial in trials:
            state = "done" if trial.identity not in to_do else "failed" if trial.failed else "to do"
            print(f"{state:7} {trial.identity} {trial.label}")
    seconds, unknown = sweep.Times(on_record(result_dir)).total(pending)
    if len(pending) > unknown:
        at_once = asked.opts.parallel or max(1, int((os.cpu_count() or 1) / asked.opts.cpus_per_trial))
        others = f", and {unknown} trials of which no record tells" if unknown else ""
        print(
            f"about {format_duration(seconds)} one after the other, {format_duration(seconds / at_once)} with "
            f"{at_once} at once, by the records of {result_dir}{others}"
        )
    elif pending:
        print(f"how long they take cannot be told: no record in {result_dir} is of such a run")


@contextlib.contextmanager
def connected(asked: Asked, bench: Bench, function: str) -> Iterator[cluster.Cluster]:
    """A cluster whose workers do `function` for the words of a trial, with the data sets that were loaded here."""
    main = sys.modules["__main__"]
    own = Path(main.__file__) if vars(main).get("main_sweep") is sys.modules.get("main_sweep") else None
    place = cluster.Place(function, Path(__file__).resolve().parent, Path.cwd(), own and own.resolve())
    resources = cluster.Resources(asked.opts.cpus_per_trial, asked.opts.gpus_per_trial, asked.opts.parallel)
    with cluster.connected(place, resources, asked.opts.address) as there:
        there.share(bench.images)
        yield there


if __name__ == "__main__":
    main()
