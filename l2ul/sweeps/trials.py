"""Many runs as trials: which there are, in which order they start, how long they take, which settings are best."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
import statistics

from l2ul.experiments import records
from l2ul.experiments.runs import ATTACK_FLAGS, Run

Words = tuple[str, ...]  # of a command line
Record = dict[str, object]
SHARED = ("checkpoint_sha256", "dataset", *ATTACK_FLAGS, "adv_dtype", "precision")  # what D_adv is of
ALIKE = ("dataset", "model", "method")  # runs whose times are compared


@dataclass(frozen=True)
class Trial:
    """What one process does at a time: a run, or the steps of a continual one.

    words   what main_unlearn.py would be given for it
    label   of the run, for people
    files   where the runs are recorded, in their order
    about   what tells how long a run takes: data set, net, method, and k
    shares  the same for trials that need the same D_adv; None where it needs none
    """

    words: Words
    label: str
    files: tuple[records.RunFiles, ...]
    about: tuple[object, ...]
    shares: tuple[object, ...] | None = None

    @property
    def identity(self) -> str:
        """Of its run; of several, of the last, which those before lead to."""
        return self.files[-1].identity

    @property
    def was_begun(self) -> bool:
        return any(file.record.exists() for file in self.files)

    @property
    def failed(self) -> bool:
        """Whether a run of it failed when it was last tried."""
        found = (records.read(file.record) for file in self.files)
        return any(record and record.get("status") == records.FAILED for record in found)


def trials(runs: Iterable[Run], words: Words, told: str = "") -> list[Trial]:
    """The trials of a command's runs; `words` are the command's, `told` is what sets it apart from the others."""
    chains: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        chains[run.method.name, run.seed, None if run.is_step else run.k].append(run)
    return [_trial(chain, words, told) for chain in chains.values()]


def _trial(chain: list[Run], words: Words, told: str) -> Trial:
    last, given = chain[-1], chain[-1].settings
    own = ("--method", last.method.name, "--unlearn-k", str(last.k), "--seed", str(last.seed))
    label = f"{last.method.name:10} k = {last.k:<4} seed = {last.seed}{told}"
    shares = None
    if "adv" in last.method.needs:
        shares = (*(given.get(name) for name in SHARED), last.seed, last.forget.in_train)
    about = (*(given[name] for name in ALIKE), last.k)
    return Trial((*words, *own), label, tuple(run.files for run in chain), about, shares)


def in_order(found: Iterable[Trial], width: int) -> Iterator[Trial]:
    """Trials such that the first `width` of them need different sets D_adv: who comes later finds these made.

    Of those that share a set, the one of most images comes first. Sets are gone through `width` at a time, so that few
    are wanted at once.
    """
    groups: dict[object, list[Trial]] = defaultdict(list)
    for trial in found:
        groups[trial.shares].append(trial)
    alone = groups.pop(None, [])
    for group in groups.values():
        group.sort(key=lambda trial: -trial.about[-1])
    sets, width = list(groups.values()), max(1, width)
    for start in range(0, len(sets), width):
        some = sets[start : start + width]
        yield from (group[0] for group in some)
        yield from (trial for group in some for trial in group[1:])
    yield from alone


class Times:
    """How long runs take, from the records of finished ones."""

    def __init__(self, found: Iterable[Record]):
        self.seconds: dict[tuple, list[float]] = defaultdict(list)
        for record in found:
            if record["status"] != records.FAILED:
                total = sum(value for key, value in record.items() if key.startswith("seconds_") and value)
                self.seconds[*(record[name] for name in ALIKE), record["k"]].append(total)

    def of(self, about: tuple[object, ...]) -> float | None:
        """The median of runs alike, or, from those of the nearest k, in proportion; None where there are none."""
        if about in self.seconds:
            return statistics.median(self.seconds[about])
        sizes = [key[-1] for key in self.seconds if key[:-1] == about[:-1]]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda k: abs(k - about[-1]))
        return statistics.median(self.seconds[*about[:-1], nearest]) * about[-1] / nearest

    def total(self, pending: Iterable[Trial]) -> tuple[float, int]:
        """Seconds that these take one after the other, and for how many of them that is not known."""
        each = [self.of(trial.about) for trial in pending]
        return sum(filter(None, each)), each.count(None)


def score(found: Iterable[Record], kept: str = "acc_retain") -> float:
    """How good settings are, from the records of their runs: the mean of `kept` in percent where all forgot all of D_f.

    Else below 0: minus the mean percent of D_f that is left in runs where some is, -100 for a run without a net. What
    a net makes of D_test is never looked at.
    """
    left = [_left(record) for record in found]
    if any(left):
        return -statistics.fmean(filter(None, left))
    return statistics.fmean(record[kept] for record in found)


def _left(record: Record) -> float:
    if record["status"] in (records.DIVERGED, records.FAILED):
        return 100.0
    return 100 - record["acc_relabel"] if record["goal"] == "relabel" else record["acc_forget"]


def last_lines(error: BaseException | str, most: int = 8) -> str:
    """The end of what an error says, which is where a traceback has its reason."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[-most:])
