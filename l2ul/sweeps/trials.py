"""The trials of a sweep: which there are, in which order they start, and how good settings are."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
import statistics

from l2ul.experiments import records
from l2ul.experiments.runs import Run
from l2ul.methods.settings import ATTACK

Arguments = tuple[str, ...]  # of a command line
Record = dict[str, object]
ADV_SETTINGS = ("checkpoint_sha256", "dataset", *ATTACK)  # what decides D_adv


@dataclass(frozen=True)
class Trial:
    """What a worker does at a time: one run, or all steps of a continual run.

    arguments  the command line of main_unlearn.py for it
    label      text that tells people which run it is
    files      where the runs are recorded, in their order
    settings   settings of the run, or of the last step
    chosen     of the settings that differ between the trials of a sweep, the values of this one
    adv_set    equal for trials that need the same D_adv; None if the method needs none
    """

    arguments: Arguments
    label: str
    files: tuple[records.RunFiles, ...]
    settings: Record
    chosen: Mapping[str, object] = field(default_factory=dict)
    adv_set: tuple[object, ...] | None = None

    @property
    def identity(self) -> str:
        """Id of the run, or of the last step."""
        return self.files[-1].identity

    @property
    def has_records(self) -> bool:
        """Whether some run of the trial has a record."""
        return any(file.record.exists() for file in self.files)

    @property
    def has_failed(self) -> bool:
        """Whether some run of the trial is on record as failed."""
        kept = (records.read(file.record) for file in self.files)
        return any(record and record.get("status") == records.FAILED for record in kept)


def make_trials(runs: Iterable[Run], arguments: Arguments, chosen: Mapping[str, object]) -> list[Trial]:
    """Return a trial for each run, or for all steps of each continual run.

    arguments  of the command line, without methods, k and seeds
    chosen     see Trial
    """
    chains: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        chains[run.method.name, run.seed, None if run.is_step else run.k].append(run)
    return [_make_trial(chain, arguments, chosen) for chain in chains.values()]


def _make_trial(chain: list[Run], arguments: Arguments, chosen: Mapping[str, object]) -> Trial:
    last = chain[-1]
    own = ("--method", last.method.name, "--unlearn-k", str(last.k), "--seed", str(last.seed))
    label = f"{last.method.name:10} k = {last.k:<4} seed = {last.seed}"
    label += "".join(f", {name} = {value}" for name, value in chosen.items())
    adv_set = None
    if "adv" in last.method.needs:
        adv_set = (*(last.settings.get(name) for name in ADV_SETTINGS), last.seed, last.forget.in_train)
    return Trial((*arguments, *own), label, tuple(run.files for run in chain), last.settings, chosen, adv_set)


def start_order(trials: Iterable[Trial], at_once: int) -> Iterator[Trial]:
    """Yield the trials in an order in which few adversarial sets are computed twice or wait for each other.

    Of the trials that share a D_adv, the one with the largest k comes first: its D_adv contains those of the others,
    which then find it in the cache. The first `at_once` trials need different sets. Sets are taken `at_once` at a time.
    Trials without D_adv come last.
    """
    by_set: dict[object, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_set[trial.adv_set].append(trial)
    without_adv = by_set.pop(None, [])
    for group in by_set.values():
        group.sort(key=lambda trial: -trial.settings["k"])
    groups, at_once = list(by_set.values()), max(1, at_once)
    for start in range(0, len(groups), at_once):
        some = groups[start : start + at_once]
        yield from (group[0] for group in some)
        yield from (trial for group in some for trial in group[1:])
    yield from without_adv


def score(runs: Iterable[Record], retained: str = "acc_retain") -> float:
    """Return how good settings are, from the records of their runs. Higher is better.

    If all runs forgot all of D_f, this is the mean of the key `retained`, in percent. Otherwise it is below 0: minus
    the mean percentage of D_f that is not forgotten, over the runs that did not forget all. A run without a model
    counts as 100 %. The score does not depend on D_test.
    """
    runs = list(runs)
    not_forgotten = [percentage for percentage in map(_not_forgotten, runs) if percentage]
    if not_forgotten:
        return -statistics.fmean(not_forgotten)
    return statistics.fmean(record[retained] for record in runs)


def _not_forgotten(record: Record) -> float:
    """Return the percentage of D_f that a run did not forget."""
    if record["status"] in (records.DIVERGED, records.FAILED):
        return 100.0
    return 100 - record["acc_relabel"] if record["goal"] == "relabel" else record["acc_forget"]


def last_lines(error: BaseException | str, most: int = 8) -> str:
    """Return the last lines of an error's text: a traceback has its reason at the end."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[-most:])
