"""The numbers of all tables: mean and standard deviation of each row and column, and how the runs ended."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
import json

import pandas as pd

from l2ul.common.errors import InputError
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.methods import registry
from l2ul.metrics import columns
from l2ul.metrics.columns import Column
from l2ul.reporting import published
from l2ul.reporting.rows import BLOCK, Block, has_usual_data, method_order

CELL = (*BLOCK, "continual", "k", "continual_step")  # with a metric, the values that are compared


@dataclass(frozen=True)
class Selection:
    """Which methods, k and seeds a table shows, None for all. Runs that are selected but absent count as missing."""

    method: list[str] | None = None
    k: list[int] | None = None
    seed: list[int] | None = None

    def has(self, record: Record) -> bool:
        chosen = ((self.method, record["method"]), (self.seed, record["seed"]))
        sizes = self.k is None or record["k"] in self.sizes(record["continual_size"])
        return sizes and all(values is None or value in values for values, value in chosen)

    def sizes(self, step: int | None) -> list[int]:
        """Return every selected k. For a continual run, these are the sums after each of its steps."""
        sums = [n for k in self.k for n in range(step, k + 1, step)] if step else self.k
        return sorted(set(sums))


def select(blocks: Iterable[Block], datasets: list[str] | None, selection: Selection) -> list[Block]:
    """Return the blocks of the data sets, None for all.

    Raises InputError if a data set has no record, or a selected method has none and is not known either.
    """
    blocks = list(blocks)
    recorded = sorted({block.dataset for block in blocks})
    for name in datasets or ():
        if name not in recorded:
            raise InputError(
                f"there is no record of data set {name!r}", f"expected one of {', '.join(recorded) or 'none'}"
            )
    methods = {record["method"] for block in blocks for record in block.records}
    for name in selection.method or ():
        if name not in methods:
            registry.get(name)
    return [block for block in blocks if not datasets or block.dataset in datasets]


def selected(blocks: Iterable[Block], selection: Selection) -> list[Block]:
    """Return the blocks with their selected records alone, for notes on what tables show."""
    return [replace(block, records=[run for run in block.records if selection.has(run)]) for block in blocks]


def summarise(blocks: Iterable[Block], selection: Selection) -> pd.DataFrame:
    """Compute the numbers of all tables.

    Returns a row for each row of a table and metric. `mean` and `std` are over the `n` runs with status forgotten or
    done, `mean_cap` and `std_cap` over those that stopped at the cap. `cap`, `diverged` and `failed` count runs. `std`
    is null for a single run. The rows stand in the order of the tables.
    """
    numbers = []
    for block in blocks:
        runs = [record for record in block.records if selection.has(record)]
        numbers += _of_block(block, runs)
        numbers += _published(block, numbers)
    if not numbers:
        return pd.DataFrame()
    frame = pd.DataFrame(numbers)
    frame["bold"] = _best(frame)
    places = {name: at for at, name in enumerate(columns.ordered(frame["metric"]))}

    def order(row: pd.Series) -> tuple:
        cell = ((not pd.isna(row[name]), "" if pd.isna(row[name]) else row[name]) for name in CELL)
        return (columns.get(row["metric"]).table, *cell, *row_order(row), places[row["metric"]])

    return frame.loc[frame.apply(order, axis=1).sort_values().index].reset_index(drop=True)


def row_order(row: pd.Series | Record) -> tuple:
    """Return a sort key: methods as in the registry, of each the row with usual settings first."""
    return (*method_order(row["method"]), row["row"] != row["method"], row["row"])


def _of_block(block: Block, runs: list[Record]) -> list[Record]:
    """Return the numbers of a block. A run counts for a further metric only if it has any further metric."""
    shown = [column for column in columns.of_table("accuracy") if column.is_shown_for(block.goal, block.continual)]
    numbers = _of_table(block, runs, shown)
    measured = [run for run in runs if _other_metrics(run)]
    names = columns.ordered(name for run in measured for name in _other_metrics(run))
    return numbers + _of_table(block, measured, [columns.get(name) for name in names])


def _other_metrics(run: Record) -> list[str]:
    """Return the keys of a record that the tables of further metrics show: known columns and your own metrics."""
    return [
        name
        for name in run
        if (name in columns.COLUMNS or name not in records.SCHEMA)
        and name.startswith(("acc_", "metric_"))
        and columns.get(name).table == "other"
    ]


def _of_table(block: Block, runs: list[Record], shown: list[Column]) -> list[Record]:
    of_rows = defaultdict(list)
    for run in runs:
        of_rows[run["row"], run["k"], run["continual_step"]].append(run)
    return [
        _about(block, same) | {"metric": column.key} | _statistics(same, column.key)
        for same in of_rows.values()
        for column in shown
    ]


def _about(block: Block, runs: list[Record]) -> Record:
    """Return the values that all numbers of a row share."""
    first = runs[0]
    return {
        **{name: getattr(block, name) for name in (*BLOCK, "continual")},
        "data": block.label,
        **{name: first[name] for name in ("k", "continual_step", "method", "row")},
        "settings": json.dumps(first["differs"], sort_keys=True),
        "runs": len(runs),
        **{status: sum(run["status"] == status for run in runs) for status in records.NOT_FORGOTTEN},
        records.CAP: sum(map(records.gave_up, runs)),
        "needs": needs(first),
        "forgot": all(_forgot(run) for run in runs),
        "usual_data": has_usual_data(first),
    }


def needs(run: Record) -> str:
    """Return which images a method was run with."""
    if run["method"] == "before":
        return "none"
    return "D_f, D_r" if run["needs_retain"] else "D_f, surrogate" if run.get("surrogate") else "D_f"


def _statistics(runs: list[Record], metric: str) -> Record:
    values = pd.Series([run.get(metric) for run in runs], dtype=float)
    good = values[[records.counts(run) for run in runs]].dropna()
    capped = values[[records.gave_up(run) for run in runs]].dropna()
    means = {"mean": good.mean(), "std": good.std(), "n": len(good)}
    return means | {"mean_cap": capped.mean(), "std_cap": capped.std(), "published": None}


def _forgot(run: Record) -> bool:
    """Return whether all of D_f was forgotten as stored. If the loop did not measure this, the accuracy decides."""
    return records.counts(run) and (run["status"] != records.DONE or records.forgets_all(run))


def _best(frame: pd.DataFrame) -> pd.Series:
    """Return which means are the best of their column.

    Compared are rows that forgot with the images of D_f alone, from the usual weights and on the usual images.
    """
    shown = {name: columns.get(name) for name in frame["metric"].unique()}
    compared = frame["metric"].map(lambda name: shown[name].compared)
    rival = compared & frame["forgot"] & frame["usual_data"] & (frame["needs"] == "D_f")
    sign = frame["metric"].map(lambda name: -1 if shown[name].better == "down" else 1)
    digits = frame["metric"].map(lambda name: shown[name].digits)
    printed = pd.Series([round(mean, n) for mean, n in zip(frame["mean"], digits, strict=True)], frame.index)
    score = (sign * printed).where(rival)
    best = score.groupby([frame[name] for name in (*CELL, "metric")], dropna=False).transform("max")
    return score.notna() & (score == best)


def _published(block: Block, numbers: list[Record]) -> list[Record]:
    """Add published accuracies to the rows with usual settings; return new rows for methods that have none."""
    if block.goal != "misclassify" or block.continual or block.age_grouping:
        return []
    ours = [row for row in numbers if row["metric"] == "acc_test" and all(row[n] == getattr(block, n) for n in BLOCK)]
    added = []
    for k in sorted({row["k"] for row in ours}):
        tested = {row["row"]: row for row in ours if row["k"] == k}
        for figure in published.figures(block.dataset, block.model, k):
            if figure.method not in tested:
                added.append(_without_runs(next(iter(tested.values())), figure.method))
            row = tested.get(figure.method) or added[-1]
            row |= {"published": figure.acc_test, "derived": figure.derived, "published_source": published.SOURCE}
    return added


def _without_runs(like: Record, method: str) -> Record:
    counts = dict.fromkeys(("runs", *records.NOT_FORGOTTEN, "n"), 0)
    values = dict.fromkeys(("mean", "std", "mean_cap", "std_cap"))
    return like | counts | values | {"method": method, "row": method, "settings": "{}", "needs": "D_f", "forgot": False}


def to_csv(frame: pd.DataFrame) -> str:
    """Return the numbers as CSV. Unknown values are empty."""
    names = [
        *BLOCK,
        *("continual_step", "k", "method", "row", "settings", "needs", "metric", "mean", "std", "n", "runs"),
        *records.NOT_FORGOTTEN,
        *("mean_cap", "std_cap", "bold", "published", "published_source"),
    ]
    integers = ["continual_size", "continual_step"]
    return frame.reindex(columns=names).astype(dict.fromkeys(integers, "Int64")).to_csv(index=False)


def brief(results: list[Record]) -> pd.DataFrame:
    """Return the table that main_unlearn.py prints: for each method and k the mean (± standard deviation) of metrics.

    Means leave out runs without accuracies, which diverged or failed. The column `runs` counts the runs, and those
    among them that did not forget all of D_f. The column `seeds` names the seeds.
    """
    rows, frame = [], pd.DataFrame(results)
    shown = [
        column
        for column in columns.of_table("accuracy")
        if column.key in frame and (column.key in records.ACCURACIES or frame[column.key].notna().any())
    ]
    for (method, k), runs in frame.groupby(["method", "k"], sort=False):
        row = {"method": method, "k": k} | {_heading(column): _mean(runs[column.key]) for column in shown}
        row["steps"] = _mean(runs["steps"]) if len(runs) > 1 else str(runs["steps"].iloc[0])
        row["seconds"] = _mean(runs.filter(regex="^seconds_").sum(axis=1))
        counts = Counter(ending for run in runs.to_dict("records") if (ending := _ending(run)))
        others = ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
        row["seeds"] = " ".join(map(str, runs["seed"].unique()))
        rows.append(row | {"runs": f"{len(runs)} ({others})" if others else f"{len(runs)}"})
    return pd.DataFrame(rows)


def brief_text(table: pd.DataFrame) -> str:
    """Return the table of `brief` as text: numbers aligned on the right, columns two or more spaces apart."""
    left = {"method", "seeds", "runs"}
    align = ["left" if name in left else "right" for name in table]
    return table.to_markdown(index=False, tablefmt="plain", disable_numparse=True, colalign=align)


def _ending(run: Record) -> str:
    """Return how a run ended that did not forget all of D_f, "" for another."""
    if run["status"] != records.CAP:
        return run["status"] if run["status"] in records.NOT_FORGOTTEN else ""
    return "not forgotten" if records.gave_up(run) else "not forgotten as used"


def _heading(column: Column) -> str:
    return f"{column.heading} %" if column.key.startswith("acc_") else column.heading


def _mean(values: pd.Series) -> str:
    measured = values.dropna().astype(float)
    if not len(measured):
        return "-"
    spread = f" ± {measured.std():.2f}" if len(measured) > 1 else ""
    return f"{measured.mean():.2f}{spread}"
