"""Are my numbers right? Records beside reference records of the same runs with other seeds, and what lies outside."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
import json
import math
import statistics

from scipy.stats import t as student

from l2ul.common.markup import markdown_text
from l2ul.common.text import shortened
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.experiments.runs import LATER
from l2ul.methods.settings import has_effect
from l2ul.metrics import columns
from l2ul.reporting import rows
from l2ul.reporting.rows import Block
from l2ul.reporting.summary import Selection

CONFIDENCE = 0.95
ROUNDING = 0.1  # percentage points by which rounding on other hardware may change any accuracy
SUBJECT = (*rows.BLOCK, "continual_step", "method", "k")
COLUMNS = ("acc_forget", "acc_relabel", "acc_retain", "acc_test")


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in their seed only, and the reference runs that are most similar to them.

    runs, references  their records; `references` is empty if there is none of this method, data set, model and k
    differs           settings with other values in the reference runs: the values here and there
    """

    runs: list[Record]
    references: list[Record]
    differs: dict[str, tuple[object, object]]

    @property
    def endings(self) -> str:
        """How runs ended that did not end as each reference run; "" if there is none."""
        expected = {record["status"] for record in self.references}
        other = Counter(record["status"] for record in self.runs if record["status"] not in expected)
        return ", ".join(f"{count} of {len(self.runs)} {status}" for status, count in other.items())

    def values(self, key: str) -> tuple[list[float], list[float]]:
        """Return the values of a key in the runs and in the reference runs, in those that ended as each other did.

        Runs that stopped at the cap are left out where any run of both sides was finished, as in the tables.
        """
        finished = [[record for record in some if records.counts(record)] for some in (self.runs, self.references)]
        chosen = finished if all(finished) else (self.runs, self.references)
        ours, theirs = ([record[key] for record in some if record.get(key) is not None] for some in chosen)
        return ours, theirs

    @property
    def is_judged(self) -> bool:
        """Whether the reference runs have a spread, or no run has an accuracy, so that their endings are compared."""
        pairs = [self.values(key) for key in COLUMNS]
        has_spread = any(interval(theirs, len(ours)) for ours, theirs in pairs)
        return len(self.references) > 1 and (has_spread or not any(ours for ours, _ in pairs))

    @property
    def outside(self) -> list[str]:
        """The columns in which the mean lies outside the interval, and how runs ended if not as expected."""
        names = []
        for key in COLUMNS:
            ours, theirs = self.values(key)
            between = interval(theirs, len(ours))
            if between and not between[0] <= statistics.fmean(ours) <= between[1]:
                names.append(columns.get(key).heading)
        return names + ([self.endings] if self.endings else [])


def interval(values: list[float], count: int) -> tuple[float, float] | None:
    """Return the interval in which the mean of `count` further values lies with a probability of 95 %.

    The values are accuracies in percent, taken as normally distributed. None for fewer than two, which have no spread.
    """
    if len(values) < 2 or not count:
        return None
    quantile = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    width = max(ROUNDING, quantile * statistics.stdev(values) * math.sqrt(1 / count + 1 / len(values)))
    mean = statistics.fmean(values)
    return max(0.0, mean - width), min(100.0, mean + width)


def compare(blocks: Iterable[Block], references: Iterable[Record], selection: Selection) -> list[Comparison]:
    """Return a comparison for each row of the blocks and each k, with the reference runs that are most similar.

    The reference runs have the same goal, data set, model, method and k. Of these, the runs with the fewest other
    settings are compared.
    """
    known = _by(references, lambda record: [record[name] for name in SUBJECT])
    runs = [run for block in blocks for run in block.records if selection.has(run)]
    made = []
    for some in _by(runs, lambda run: [*(run[name] for name in SUBJECT), run["row"]]).values():
        candidates = known.get(json.dumps([some[0][name] for name in SUBJECT]), [])
        differences = [_differences(some[0], record) for record in candidates]
        least = min(differences, key=len, default={})
        made.append(
            Comparison(some, [one for one, other in zip(candidates, differences, strict=True) if other == least], least)
        )
    return sorted(made, key=_order)


def section(comparisons: list[Comparison]) -> str:
    """Return a Markdown section with the comparisons."""
    heads, lines = table(comparisons)
    rows = [heads, [":--"] * len(heads), *lines] if lines else []
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows) + ("\n" if rows else "")
    listed = "".join(f"- {note}\n" for note in notes(comparisons))
    return f"## Expected: these runs beside the reference runs\n\n{text}{listed}"


def table(comparisons: list[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines, in Markdown, of the runs that have reference runs."""
    compared = [one for one in comparisons if one.references]
    shown = [key for key in COLUMNS if any(one.values(key)[0] for one in compared)]
    heads = ["data, k", "method", *(columns.get(key).heading for key in shown), "runs, reference runs", ""]
    return heads, [_cells(one, shown) for one in compared]


def notes(comparisons: list[Comparison]) -> list[str]:
    """Return the notes below the table, in Markdown."""
    compared = [one for one in comparisons if one.references]
    unknown = [one for one in comparisons if not one.references]
    judged = [one for one in compared if one.is_judged]
    inside = sum(not one.outside for one in judged)
    made = []
    if compared:
        made = [
            f"{inside} of {len(judged)} rows with several reference runs are within their spread.",
            "Each cell: mean of the runs, then the interval in which the mean of as many runs with other seeds lies "
            f"with {100 * CONFIDENCE:.0f} % probability by the reference runs, at least ± {ROUNDING} for rounding. "
            "**Bold**: outside.",
        ]
    if len(judged) < len(compared):
        made.append("One reference run has no spread: the cell has its value in place of the interval.")
    if unknown:
        made.append(f"No reference run: {'; '.join(f'{_place(one)}, {_row(one)}' for one in unknown)}.")
    return made


def _by(some: Iterable[Record], key: Callable[[Record], list]) -> dict[str, list[Record]]:
    groups = defaultdict(list)
    for record in some:
        groups[json.dumps(key(record))].append(record)
    return groups


def _settings(record: Record) -> Record:
    """Return the settings of a run that have an effect.

    For a key that an older record lacks, this is the value that applied before the key existed: null for `runs.LATER`.
    Where there is none, the setting is not known and left out.
    """
    values, dataset = rows.settings(record), record["dataset"]
    for key in (key for key in records.SCHEMA.values() if key.role == records.SETTING):
        if key.name not in values:
            absent = key.absent_for(dataset)
            if absent is not None or key.name in LATER:
                values[key.name] = absent
        elif values[key.name] is None:
            values[key.name] = key.default_for(dataset)
    images = {name: record[name] for name in ("k", "continual_size")}
    return {name: value for name, value in values.items() if has_effect(name, {**values, **images})}


def _differences(run: Record, reference: Record) -> dict[str, tuple[object, object]]:
    """Return the settings that are known in both records and differ."""
    ours, theirs = _settings(run), _settings(reference)
    return {name: (ours[name], theirs[name]) for name in sorted(ours) if ours[name] != theirs.get(name, ours[name])}


def _order(one: Comparison) -> tuple:
    run = one.runs[0]
    place = (run["dataset"], run["age_grouping"] or "", run["model"], run["goal"], run["continual_size"] or 0)
    return (*place, run["k"], run["continual_step"] or 0, rows.method_order(run["method"]), run["row"])


def _place(one: Comparison) -> str:
    run = one.runs[0]
    names = [f"{run['dataset']} {run['age_grouping'] or ''}".strip(), run["model"], f"k = {run['k']}"]
    names += [f"step {run['continual_step']}"] if run["continual_step"] is not None else []
    return markdown_text(", ".join(names + (["relabel"] if run["goal"] == "relabel" else [])))


def _row(one: Comparison) -> str:
    return markdown_text(one.runs[0]["row"])


def _cells(one: Comparison, shown: list[str]) -> list[str]:
    """Return the cells of a line of the table."""
    verdict = [f"**outside: {', '.join(one.outside)}**"] if one.outside else []
    if not verdict and one.is_judged:
        verdict = ["within"]
    if not one.outside and not one.values(COLUMNS[0])[0]:
        verdict.append(", ".join(sorted({run["status"] for run in one.runs})))
    differs = ", ".join(_difference(name, *values) for name, values in one.differs.items())
    verdict += [f"reference runs differ: {differs}"] if differs else []
    counts = f"{len(one.runs)}, {len(one.references)}"
    return [_place(one), _row(one), *(_cell(one, key) for key in shown), counts, "; ".join(verdict)]


def _cell(one: Comparison, key: str) -> str:
    ours, theirs = one.values(key)
    if not ours or not theirs:
        return "" if not ours else f"{statistics.fmean(ours):.2f}"
    mean, between = f"{statistics.fmean(ours):.2f}", interval(theirs, len(ours))
    if between is None:
        return f"{mean} ({theirs[0]:.2f})"
    text = f"{mean} ({between[0]:.2f} – {between[1]:.2f})"
    return f"**{text}**" if columns.get(key).heading in one.outside else text


def _difference(name: str, ours: object, theirs: object) -> str:
    if name == "checkpoint_sha256":
        return "weights"
    if name == "listed":
        return "choice of D_f"
    ours, theirs = ("none" if value is None else shortened(str(value)) for value in (ours, theirs))
    text = f"{name.rpartition('.')[2]} {theirs}, here {ours}"
    return markdown_text(text)
