"""One page with all results, which opens offline: tables, figures, and for each run its details when it is opened.

The tables are HTML. The details of the runs are JSON in the page, see `run_details`, and a script in the template
renders those of the runs that are opened, so that a page with many runs stays fast.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
import statistics

import pandas as pd

import l2ul
from l2ul.common import pages
from l2ul.common.markup import html, markdown_text
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.methods import registry
from l2ul.metrics import columns
from l2ul.reporting import FIGURES, expected, figure_set, render, summary
from l2ul.reporting.expected import Comparison
from l2ul.reporting.rows import BLOCK, Block
from l2ul.reporting.summary import Selection

FACETS = {  # what rows can be filtered by: name of the filter
    "method": "method",
    "k": "k",
    "dataset": "data set",
    "model": "model",
    "goal": "goal",
    "needs": "trains on",
}
ABOUT = ("k", "dataset", "model")  # facets whose columns stand before the numbers
ROW = (*BLOCK, "k", "continual_step", "row")  # keys of runs and numbers that decide the row of a table
PHASES = ("seconds_attack", "seconds_importance", "seconds_unlearn")
MEANS = (
    "A number is the mean ± standard deviation over the runs of the row, unless brackets name another number of runs. "
    "Seconds: median time of attack, importance and unlearning."
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the number that it is sorted by (its text where there is none), and a mark."""

    text: str
    value: float | None = None
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table.

    name     its first cell
    facets   values under the keys of FACETS, which are cells too unless they are the same on the whole page
    cells    the other cells
    place    index of its row of means, which the runs of a row share
    run      index of the run, in the table of runs
    """

    name: str
    facets: dict[str, str]
    cells: list[Cell]
    place: int
    run: int | None = None


@dataclass(frozen=True)
class Table:
    """A table with its notes in Markdown. The headings are those of the cells of its rows."""

    headings: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A figure as a data URL, with its caption, and the facets that its block has."""

    source: str
    caption: str
    facets: dict[str, str]


@dataclass(frozen=True)
class Sections:
    """Sections of the page besides tables and figures. Texts are Markdown.

    expected  comparisons with reference records, or None
    missing   descriptions of missing runs, commands for them, and notes
    problems  files that were left out
    """

    expected: list[Comparison] | None = None
    missing: tuple[list[str], list[str], list[str]] = ([], [], [])
    problems: list[str] = field(default_factory=list)


def runs(blocks: Iterable[Block], selection: Selection) -> list[Record]:
    """Return the runs that the page shows, in its order."""
    shown = (run for block in blocks for run in block.records if selection.has(run))
    return sorted(shown, key=lambda run: (*_position(run), run["k"], run["continual_step"] or 0, run["seed"]))


def page(
    frame: pd.DataFrame,
    blocks: list[Block],
    shown: list[Record],
    details: Record,
    pictures: list[Picture],
    sections: Sections,
) -> str:
    """Return the page as HTML.

    frame     numbers from `summary.summarise`
    blocks    the blocks that the numbers are from
    shown     the result of `runs`
    details   details of these runs from `run_details.details`
    pictures  the result of `pictures`
    """
    places, compared = _places(frame, shown), sections.expected
    tables = {
        "means": _means(frame, blocks, shown, places),
        "metrics": _metrics(frame, places),
        "runs": _runs(shown, places),
    }
    rows = [row for table in tables.values() for row in table.rows]
    values = {name: list(dict.fromkeys(row.facets[name] for row in rows)) for name in FACETS}
    about, beyond = (
        {name: FACETS[name] for name in names if len(values[name]) > 1} for names in (ABOUT, ("goal", "needs"))
    )
    return pages.render(
        "l2ul.reporting",
        "results_page.html.j2",
        title=f"Unlearning: {', '.join(dict.fromkeys(block.label for block in blocks)) or 'no records'}",
        summary=_summary(shown),
        common={FACETS[name]: same[0] for name, same in values.items() if len(same) == 1},
        about=about,
        beyond=beyond,
        version=l2ul.VERSION,
        tables=tables,
        pictures=pictures,
        expected=None if compared is None else (*expected.table(compared), expected.notes(compared)),
        sections=sections,
        details=details | {"facets": FACETS},
        markdown=html,
    )


def pictures(blocks: Iterable[Block], paths: Iterable[Path]) -> list[Picture]:
    """Return the figures of the blocks that are among the files."""
    files, made = {path.name: path for path in paths}, []
    for block in (block for block in blocks if not block.continual):
        for number, shown in FIGURES.items():
            if path := files.get(f"{figure_set.stem(block, number)}.png"):
                caption = f"Figure {number}: {shown.replace('_', ' ')}. {block.label}, {block.goal}"
                made.append(Picture(pages.data_url(path.read_bytes(), "png"), caption, _facets(vars(block))))
    return made


def _facets(about: Record) -> dict[str, str]:
    """Return the facets that a run, a number and a block have."""
    age = "" if pd.isna(about["age_grouping"]) else f" {about['age_grouping']}"
    return {"dataset": f"{about['dataset']}{age}", "model": about["model"], "goal": about["goal"]}


def _position(run: Record) -> tuple:
    return (run["goal"], run["continual_size"] or 0, run["dataset"], run["age_grouping"] or "", run["model"]) + (
        summary.row_order(run)
    )


def _key(row: Record) -> tuple:
    return tuple(None if pd.isna(row[name]) else row[name] for name in ROW)


def _places(frame: pd.DataFrame, shown: list[Record]) -> dict[tuple, int]:
    """Return an index for each row of the table of means."""
    keys = [_key(row) for some in (frame.to_dict("records"), shown) for row in some]
    return {key: place for place, key in enumerate(dict.fromkeys(keys))}


def _lines(frame: pd.DataFrame, table: str, places: dict[tuple, int]) -> dict[int, list[Record]]:
    """Return the numbers of a table of `columns`, by row."""
    lines = defaultdict(list)
    for row in frame.to_dict("records"):
        if columns.get(row["metric"]).table == table:
            lines[places[_key(row)]].append(row)
    return lines


def _means(frame: pd.DataFrame, blocks: list[Block], shown: list[Record], places: dict[tuple, int]) -> Table:
    lines, seconds = _lines(frame, "accuracy", places), defaultdict(list)
    for run in shown:
        if run["status"] != records.FAILED:
            seconds[places[_key(run)]].append(sum(run[phase] or 0 for phase in PHASES))
    names = columns.ordered(row["metric"] for line in lines.values() for row in line)
    published = [row for line in lines.values() for row in line if pd.notna(row["published"])]
    rows = []
    for place, line in lines.items():
        first, numbers = line[0], {row["metric"]: row for row in line}
        cells = [_cell(numbers.get(name)) for name in names]
        cells += [_published(numbers.get("acc_test"))] if published else []
        time = statistics.median(seconds[place]) if seconds[place] else None
        cells += [Cell("" if time is None else f"{time:.1f}", time)]
        cells += [Cell(str(first["runs"]) if first["runs"] else "", first["runs"])]
        rows.append(_row(first, cells, place))
    headings = [*_headings(names), *(["D_test, published ¹"] if published else []), "seconds", "runs"]
    return Table(headings, rows, _notes(frame, blocks))


def _metrics(frame: pd.DataFrame, places: dict[tuple, int]) -> Table:
    lines = _lines(frame, "other", places)
    measured = {place: [row for row in line if row["n"] or pd.notna(row["mean_cap"])] for place, line in lines.items()}
    names = columns.ordered(row["metric"] for line in measured.values() for row in line)
    rows = [
        _row(line[0], [_cell({row["metric"]: row for row in line}.get(name)) for name in names], place)
        for place, line in measured.items()
        if line
    ]
    notes = [markdown_text(f"{columns.get(name).heading}: {columns.get(name).note}.") for name in names]
    return Table(_headings(names), rows, notes)


def _runs(shown: list[Record], places: dict[tuple, int]) -> Table:
    rows = []
    for place, run in enumerate(shown):
        seconds = sum(run[phase] or 0 for phase in PHASES)
        accuracies = [Cell("" if run[name] is None else f"{run[name]:.2f}", run[name]) for name in records.ACCURACIES]
        cells = [Cell(str(run["seed"]), run["seed"]), Cell(run["status"]), Cell(str(run["steps"]), run["steps"])]
        row = _row(run, [*cells, *accuracies, Cell(f"{seconds:.1f}", seconds)], places[_key(run)], place)
        rows.append(row)
    return Table(["seed", "status", "steps", *_headings(records.ACCURACIES), "seconds"], rows)


def _row(row: Record, cells: list[Cell], place: int, run: int | None = None) -> Row:
    """Return a row of any table from a run or a number of `summary.summarise`."""
    needs = summary.needs(row) if run is not None else row["needs"] if row["runs"] else _published_needs(row["method"])
    facets = _facets(row) | {"method": row["method"], "k": str(row["k"]), "needs": needs}
    named = row if run is None else row | {"continual": row["continual_step"] is not None}
    return Row(render.line(named), facets, cells, place, run)


def _headings(names: Iterable[str]) -> list[str]:
    return [columns.get(name).heading for name in names]


def _cell(row: Record | None) -> Cell:
    if row is None or not row["runs"]:
        return Cell("")
    value = row["mean"] if row["n"] else row["mean_cap"]
    return Cell(render.cell(row, row["runs"], render.PLAIN), None if pd.isna(value) else value, bool(row["bold"]))


def _published(row: Record | None) -> Cell:
    if row is None or pd.isna(row["published"]):
        return Cell("")
    return Cell(f"{row['published']:.2f}{' (derived)' if row['derived'] is True else ''}", row["published"])


def _published_needs(method: str) -> str:
    """Return which images a method trains on of which there are published numbers alone."""
    if method not in registry.METHODS:
        return "not known"
    return "D_f, D_r" if "retain" in registry.METHODS[method].needs else "D_f"


def _notes(frame: pd.DataFrame, blocks: list[Block]) -> list[str]:
    """Return the notes of the tables of accuracies, each once."""
    if not len(frame):
        return ["There is no record of the selected runs."]
    accuracies = frame[[columns.get(name).table == "accuracy" for name in frame["metric"]]]
    groups = (rows for _, rows in accuracies.groupby(["goal", "continual"]))
    return list(dict.fromkeys(note for rows in groups for note in render.accuracy_notes(rows, blocks, MEANS)))


def _summary(shown: list[Record]) -> str:
    statuses = Counter(run["status"] for run in shown)
    counts = ", ".join(f"{statuses[status]} {status}" for status in records.STATUSES if statuses[status])
    return f"{len(shown)} run{'s' if len(shown) != 1 else ''}{f': {counts}' if counts else ''}."
