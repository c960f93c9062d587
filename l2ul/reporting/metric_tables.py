"""Tables of the metrics beside accuracies (`--evaluate`, or your own), from the same records and in the same style."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd

from l2ul.metrics.membership import ATTACKS
from l2ul.reporting import layout
from l2ul.reporting.rows import Block, Record
from l2ul.reporting.summary import SHORT, Wanted, summarise


@dataclass(frozen=True)
class Known:
    """How a metric is called in a column, its digits behind the point, and what a reader needs to know of it."""

    short: str
    digits: int
    legend: str


ATTACK = (
    "outputs tell D_f from D_test, to either side: AUC in %, 50 is guessing; TPR at 1 % false positives, 1 is guessing"
)
GAP = "points from a net retrained without D_f, 0 is best; MIA: in the AUC of the logistic attack; mean: of the four"
NEAR = "of outputs on D_f and D_test, Jensen-Shannon divergence from the retrained net's in bits, 0 is best, 1 the most"
ALIKE = "linear CKA with the retrained net's features, mean over layers, 1 is best"
RMIA = "the attack RMIA, calibrated on nets that never saw D_f: AUC and TPR in %, 50 and 1 are guessing"
STEPS = "steps of fine-tuning on D_f until it is known again; best as many as the retrained net takes; 500: or more"
AGREE = "percent of held-out adversarial examples of mixes of D_f that are called as by the original net, 100 is best"
METRICS = {
    **{
        f"metric_mia_{attack}_{what}": Known(f"{attack.replace('_', ' ')} {what.upper()}", 2, ATTACK)
        for attack in ATTACKS
        for what in ("auc", "tpr")
    },
    "metric_rmia_auc": Known("RMIA AUC", 2, RMIA),
    "metric_rmia_tpr": Known("RMIA TPR", 2, RMIA),
    "metric_gap_forget": Known("gap D_f", 2, GAP),
    "metric_gap_retain": Known("gap D_r", 2, GAP),
    "metric_gap_test": Known("gap D_test", 2, GAP),
    "metric_gap_mia": Known("gap MIA", 2, GAP),
    "metric_average_gap": Known("mean gap", 2, GAP),
    "metric_tow": Known("ToW", 4, "tug of war, the product of 1 - gap on D_f, D_r and D_test, 1 is best"),
    "metric_js_forget": Known("JS D_f", 4, NEAR),
    "metric_js_test": Known("JS D_test", 4, NEAR),
    "metric_cka_forget": Known("CKA D_f", 4, ALIKE),
    "metric_cka_test": Known("CKA D_test", 4, ALIKE),
    "metric_distance_retrained": Known(
        "distance, retrained", 4, "relative distance of the weights from the retrained net's"
    ),
    "metric_distance": Known("distance", 4, "relative distance of the weights from the original ones"),
    "metric_relearn_steps": Known("steps to relearn", 1, STEPS),
    "metric_relearn_steps_retrained": Known("the same, retrained", 1, STEPS),
    "metric_answers_kept": Known("answers kept", 2, AGREE),
    "metric_near_duplicates": Known("near-duplicates", 1, "images of D_r that are nearly the same as one of D_f"),
}


def summary(blocks: list[Block], wanted: Wanted) -> pd.DataFrame:
    """As `tables.summarise`, of every metric that some of the records has, known ones first; and `digits` of each."""
    having = [replace(block, records=[record for record in block.records if _metrics(record)]) for block in blocks]
    there = {name for block in having for record in block.records for name in _metrics(record)}
    names = [*(name for name in METRICS if name in there), *sorted(there - METRICS.keys())]
    frame = summarise(having, wanted, names)
    if not len(frame) or not names:
        return frame.iloc[:0]
    return frame.assign(digits=[_known(name).digits for name in frame["metric"]])


def _metrics(record: Record) -> list[str]:
    return [name for name in record if name.startswith("metric_")]


def _known(name: str) -> Known:
    return METRICS.get(name, Known(name.removeprefix("metric_").replace("_", " "), 4, "a metric of your own"))


def markdown(frame: pd.DataFrame) -> str:
    """A table for each goal, data set and net, and k; nothing where no record has such a metric."""
    parts = []
    for title, rows in _tables(frame):
        notes = "\n".join(f"- {note}" for note in _notes(rows))
        cells = _cells(rows, layout.MARKDOWN)
        body = cells.to_markdown(headers=["method", *cells.columns], disable_numparse=True)
        parts.append(f"### {title}\n\n{body}\n\n{notes}\n")
    return "\n".join(["## Beside accuracies\n", *parts]) if parts else ""


def latex(frame: pd.DataFrame) -> str:
    floats = [layout.latex_float(title, _cells(rows, layout.LATEX), _notes(rows)) for title, rows in _tables(frame)]
    return "".join(f"\n{text}\n" for text in floats)


def _tables(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and rows of each table: of the metrics that any of its runs has, without those of rows that have none."""
    for (goal, continual), rows in frame.groupby(layout.TABLE) if len(frame) else ():
        size = "continual_size" if continual else "k"
        for (data, count), some in rows.groupby(["data", size], sort=False):
            measured = some["n"].gt(0) | some["mean_cap"].notna()
            ended = some[list(SHORT.values())].sum(axis=1) > 0
            there = some[some["metric"].isin(some.loc[measured, "metric"]) & (measured | ended)]
            if len(there):
                k = f"{int(count)} images a step" if continual else f"k = {count}"
                yield f"{data}, {k}, goal {goal}", there


def _cells(rows: pd.DataFrame, style: layout.Style) -> pd.DataFrame:
    """A line a method (and step), a column a metric."""
    by_rank = dict(zip(rows["rank"], rows["metric"], strict=True))
    names = tuple(
        style.text(_known(by_rank[rank]).short) if rank in by_rank else "" for rank in range(max(by_rank) + 1)
    )
    return layout.cells_of(rows, replace(style, metrics=names)).droplevel([0, 1], axis=1)


def _notes(rows: pd.DataFrame) -> list[str]:
    """What each column is, those of one kind together."""
    legends: dict[str, list[str]] = {}
    for _, name in sorted(set(zip(rows["rank"], rows["metric"], strict=True))):
        legends.setdefault(_known(name).legend, []).append(_known(name).short)
    usual = layout.usual_n(rows)
    seeds = f"mean ± standard deviation over {usual} seeds" if usual > 1 else "of one seed"
    notes = [f"{', '.join(names)}: {legend}." for legend, names in legends.items()]
    none = "; –: not measured" if "–" in _cells(rows, layout.MARKDOWN).to_numpy() else ""
    return [*notes, f"Each figure is {seeds} unless it says another n{none}; other marks are as above."]
