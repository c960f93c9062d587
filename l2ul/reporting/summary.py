"""What the tables say, in numbers: for each method and column mean and standard deviation, and how runs ended."""

from collections.abc import Iterable
from dataclasses import dataclass
import json

import pandas as pd

from l2ul.experiments import records
from l2ul.reporting import published
from l2ul.reporting.rows import BLOCK, Block, Record, place

METRICS = {  # of a column, in this order; the others where the runs have them
    "acc_forget": "D_f",
    "acc_relabel": "relabelled",
    "acc_forget_earlier": "earlier D_f",
    "acc_retain": "D_r",
    "acc_test": "D_test",
}
COLUMN = (*BLOCK, "continual", "k", "continual_step")
COMPARED = ("acc_retain", "acc_test")  # the best of these is in bold
SHORT = {records.CAP: "cap", records.DIVERGED: "diverged", records.FAILED: "failed"}


@dataclass(frozen=True)
class Wanted:
    """What a table is about; None: all that there is. What is given is expected too."""

    method: list[str] | None = None
    k: list[int] | None = None
    seed: list[int] | None = None

    def has(self, record: Record) -> bool:
        pairs = ((self.method, record["method"]), (self.seed, record["seed"]))
        sizes = self.k is None or record["k"] in self.sizes(record["continual_size"])
        return sizes and all(names is None or value in names for names, value in pairs)

    def sizes(self, step: int | None) -> list[int]:
        """Every k asked for; in a continual run the sums after each of its steps."""
        sums = [n for k in self.k for n in (*range(step, k, step), k)] if step else self.k
        return sorted(set(sums))


def summarise(blocks: Iterable[Block], wanted: Wanted, metrics: Iterable[str] = tuple(METRICS)) -> pd.DataFrame:
    """A row for each row, column and metric of the tables: numbers only, of runs that did what they should.

    `mean` and `std` are over the n runs that forgot (or were as long as they should be); those that hit the cap are
    in `mean_cap` and `std_cap`, and every kind is counted. `std` is null for one run.
    """
    rows = []
    for block in blocks:
        chosen = pd.DataFrame([record for record in block.records if wanted.has(record)])
        if not len(chosen):
            continue
        for _, runs in chosen.groupby(["method", "row", "k", "continual_step"], dropna=False):
            rows += _rows(block, runs.to_dict("records"), metrics)
        rows += _published(block, rows)
    frame = pd.DataFrame(rows)
    if not len(frame):
        return frame
    frame["bold"] = _best(frame)
    order = frame.apply(lambda row: (*_order(row[name] for name in COLUMN), *row_order(row), row["rank"]), axis=1)
    return frame.loc[order.sort_values().index].reset_index(drop=True)


def row_order(row: pd.Series | Record) -> tuple:
    """Methods as in the registry; of each the plain row first."""
    return (*place(row["method"]), row["row"] != row["method"], row["row"])


def _order(values: Iterable) -> tuple:
    return tuple((not pd.isna(value), "" if pd.isna(value) else value) for value in values)


def _rows(block: Block, runs: list[Record], metrics: Iterable[str]) -> list[Record]:
    first = runs[0]
    step = None if pd.isna(first["continual_step"]) else int(first["continual_step"])
    shared = {name: getattr(block, name) for name in (*BLOCK, "continual")}
    shared |= {
        "data": block.label,
        "k": int(first["k"]),
        "continual_step": step,
        "method": first["method"],
        "row": first["row"],
    }
    counts = {name: sum(run["status"] == status for run in runs) for status, name in SHORT.items()}
    shared |= {"settings": json.dumps(first["differs"], sort_keys=True), "runs": len(runs)} | counts
    shared |= {"needs_retain": bool(first["needs_retain"]), "forgot": all(_forgot(run) for run in runs)}
    made = []
    for rank, metric in enumerate(metrics):
        if metric in ("acc_relabel", "acc_forget_earlier") and not _applies(metric, block):
            continue
        values = pd.Series([run.get(metric) for run in runs], dtype=float)
        status = pd.Series([run["status"] for run in runs])
        made.append(shared | {"metric": metric, "rank": rank} | _statistics(values, status))
    return made


def _applies(metric: str, block: Block) -> bool:
    return block.goal == "relabel" if metric == "acc_relabel" else block.continual


def _statistics(values: pd.Series, status: pd.Series) -> Record:
    good = values[status.isin([records.FORGOTTEN, records.DONE])].dropna()
    capped = values[status == records.CAP].dropna()
    means = {"mean": good.mean(), "std": good.std(), "n": len(good)}
    return means | {"mean_cap": capped.mean(), "std_cap": capped.std(), "published": None}


def _forgot(run: Record) -> bool:
    """Whether all of D_f was forgotten; a method of fixed length does not say so by its status."""
    if run["status"] != records.DONE:
        return run["status"] == records.FORGOTTEN
    return run.get("acc_relabel") == 100 if run["goal"] == "relabel" else run["acc_forget"] == 0


def _best(frame: pd.DataFrame) -> pd.Series:
    """Where the highest mean of a column stands, as it is printed, among rows that forgot and did not train on D_r."""
    rival = frame["forgot"] & ~frame["needs_retain"] & (frame["method"] != "before") & frame["metric"].isin(COMPARED)
    printed = frame["mean"].round(2).where(rival)
    highest = printed.groupby([frame[name] for name in (*COLUMN, "metric")], dropna=False).transform("max")
    return printed.notna() & (printed == highest)


def _published(block: Block, rows: list[Record]) -> list[Record]:
    """Set published figures beside the plain rows of a block; returns rows for those that have no row of ours."""
    if block.goal != "misclassify" or block.continual or block.age_grouping:
        return []
    ours = [row for row in rows if all(row[name] == getattr(block, name) for name in BLOCK)]
    added = []
    for k in sorted({row["k"] for row in ours}):
        tested = {row["row"]: row for row in ours if row["k"] == k and row["metric"] == "acc_test"}
        for figure in published.figures(block.dataset, block.model, k):
            if not tested:  # of other metrics, nothing is published
                continue
            if figure.method not in tested:
                added.append(_without_runs(next(iter(tested.values())), figure.method))
            row = tested.get(figure.method) or added[-1]
            row |= {"published": figure.acc_test, "derived": figure.derived, "published_source": published.SOURCE}
    return added


def _without_runs(like: Record, method: str) -> Record:
    none = dict.fromkeys(("runs", *SHORT.values(), "n"), 0) | dict.fromkeys(("mean", "std", "mean_cap", "std_cap"))
    return like | none | {"method": method, "row": method, "settings": "{}", "needs_retain": False, "forgot": False}


def to_csv(frame: pd.DataFrame) -> str:
    """The numbers, a line for each; what is not known is empty."""
    columns = [
        *BLOCK,
        *("continual_step", "k", "method", "row", "settings", "metric", "mean", "std", "n", "runs"),
        *SHORT.values(),
        *("mean_cap", "std_cap", "bold", "published", "published_source"),
    ]
    whole = ["continual_size", "continual_step"]
    return frame.reindex(columns=columns).astype(dict.fromkeys(whole, "Int64")).to_csv(index=False)
