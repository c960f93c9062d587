"""The tables as Markdown and LaTeX, from the same cells, with notes that explain their columns and marks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from l2ul.common.markup import latex_text, markdown_code, markdown_text, plain
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.methods import registry
from l2ul.metrics import columns
from l2ul.metrics.columns import Column
from l2ul.reporting import published
from l2ul.reporting.rows import Block
from l2ul.reporting.summary import row_order


@dataclass(frozen=True)
class Style:
    """The markup of one output format.

    text                                   escapes plain text
    heading                                returns the heading of a column
    bold, spread, capped, none, published  markup of a bold cell, and marks in cells and row names
    """

    text: Callable[[str], str]
    heading: Callable[[Column], str]
    bold: str
    spread: str = " ± "
    capped: str = "†"
    none: str = "–"
    published: str = "¹"


PLAIN = Style(str, lambda column: column.heading, "{}")
MARKDOWN = Style(markdown_text, lambda column: markdown_text(column.heading), "**{}**")
LATEX = Style(
    latex_text,
    lambda column: column.latex or latex_text(column.heading),
    r"\textbf{{{}}}",
    r" $\pm$ ",
    r"$^\dagger$",
    "--",
    r"\textsuperscript{1}",
)


def markdown(frame: pd.DataFrame, blocks: list[Block]) -> str:
    """Return all tables with their notes. The two header lines name data set, model and k, then the metric.

    frame   numbers from `summary.summarise`
    blocks  the blocks that the numbers are from
    """
    if not len(frame):
        return "No table: there is no record of the selected runs.\n"
    parts = []
    for title, rows in _accuracy_tables(frame):
        cells = _cells(rows, MARKDOWN)
        groups = [f"{data}, {group}" for data, group, _ in cells.columns]
        heads = [name if name not in groups[:at] else "" for at, name in enumerate(groups)]
        metrics = pd.DataFrame([[metric for *_, metric in cells.columns]], index=[""], columns=cells.columns)
        body = pd.concat([metrics, cells]).to_markdown(headers=["method", *heads], disable_numparse=True)
        parts.append(f"## {title}\n\n{body}\n\n{_bullets(accuracy_notes(rows, blocks))}")
    others = []
    for title, rows in _other_tables(frame):
        cells = _other_cells(rows, MARKDOWN)
        body = cells.to_markdown(headers=["method", *cells.columns], disable_numparse=True)
        others.append(f"### {markdown_text(title)}\n\n{body}\n\n{_bullets(_other_notes(rows))}")
    return "\n".join(parts + (["## Further metrics\n", *others] if others else []))


def latex(frame: pd.DataFrame, blocks: list[Block]) -> str:
    """Return all tables as floats for a document that loads the package booktabs."""
    if not len(frame):
        return "% no record\n"
    parts = [r"% needs \usepackage{booktabs}; wide tables may need \resizebox of graphicx or a landscape page"]
    for title, rows in _accuracy_tables(frame):
        parts.append(_float(title, _cells(rows, LATEX), accuracy_notes(rows, blocks)))
    for title, rows in _other_tables(frame):
        parts.append(_float(title, _other_cells(rows, LATEX), _other_notes(rows)))
    return "\n\n".join(parts) + "\n"


def _bullets(notes: list[str]) -> str:
    return "".join(f"- {note}\n" for note in notes)


def _float(title: str, cells: pd.DataFrame, notes: list[str]) -> str:
    """Return a LaTeX float with a caption and notes. The notes are Markdown."""
    layout = "l" + "r" * len(cells.columns)
    body = cells.to_latex(escape=False, multicolumn=True, multicolumn_format="c", column_format=layout).strip()
    below = r" \\".join(f"\n{latex_text(plain(note))}" for note in notes)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{latex_text(title)}}}\n{body}\n"
        f"\\par\\smallskip\n\\begin{{minipage}}{{\\linewidth}}\\footnotesize{below}\n\\end{{minipage}}\n"
        f"\\end{{table}}"
    )


def _accuracy_tables(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield title and rows of each table of accuracies: one for each goal, continual runs apart."""
    accuracies = frame[[columns.get(name).table == "accuracy" for name in frame["metric"]]]
    for (goal, continual), rows in accuracies.groupby(["goal", "continual"]):
        yield f"Goal {goal}{', continual' if continual else ''}: accuracy in %", rows


def _other_tables(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield title and rows of each table of further metrics: one for each goal, data set and model, and k.

    A table has the metrics that any of its runs has, and the rows that have any metric or a run that did not forget.
    """
    others = frame[[columns.get(name).table == "other" for name in frame["metric"]]]
    for (goal, continual), rows in others.groupby(["goal", "continual"]):
        size = "continual_size" if continual else "k"
        for (data, count), some in rows.groupby(["data", size], sort=False):
            measured = some["n"].gt(0) | some["mean_cap"].notna()
            ended = some[list(records.NOT_FORGOTTEN)].sum(axis=1) > 0
            shown = some[some["metric"].isin(some.loc[measured, "metric"]) & (measured | ended)]
            if len(shown):
                k = f"{int(count)} images per step" if continual else f"k = {count}"
                yield f"{data}, {k}, goal {goal}", shown


def _other_cells(rows: pd.DataFrame, style: Style) -> pd.DataFrame:
    return _cells(rows, style).droplevel([0, 1], axis=1)


def _cells(rows: pd.DataFrame, style: Style) -> pd.DataFrame:
    """Return the cells of a table as text: a line for each method (and step), columns by data set, k and metric."""
    usual, cells = _usual_n(rows), {}
    places = {name: at for at, name in enumerate(columns.ordered(rows["metric"]))}
    for row in rows.to_dict("records"):
        size = 0 if pd.isna(row["continual_size"]) else int(row["continual_size"])
        group, k = (f"{size} per step", size) if row["continual"] else (f"k = {row['k']}", row["k"])
        heading = style.heading(columns.get(row["metric"]))
        column = (row["data"], k, places[row["metric"]]), (style.text(row["data"]), group, heading)
        label = style.text(line(row))
        if row["runs"]:
            cells[(*_line_order(row), False, label), column] = cell(row, usual, style)
        if pd.notna(row["published"]):
            text = f"{row['published']:.2f}{' (derived)' if row['derived'] is True else ''}"
            cells[(*_line_order(row), True, f"{label}, published{style.published}"), column] = text
    lines, heads = (sorted({key[at] for key in cells}) for at in (0, 1))
    blank = {line: "" if line[-2] else style.none for line in lines}  # no record is expected of published rows
    return pd.DataFrame(
        [[cells.get((line, head), blank[line]) for head in heads] for line in lines],
        index=[line[-1] for line in lines],
        columns=pd.MultiIndex.from_tuples([head[1] for head in heads]),
    )


def _line_order(row: Record) -> tuple:
    step = (row["continual_step"], row["k"]) if row["continual"] else (0, 0)
    return (*row_order(row), *step)


def line(row: Record) -> str:
    """Return the name of a line of a table: its row, and the step of a continual run."""
    return row["row"] + (f", step {int(row['continual_step'])} (k = {row['k']})" if row["continual"] else "")


def cell(row: Record, usual: int, style: Style) -> str:
    """Return a mean, with the number of runs where it is not the usual one, or how runs ended without a value.

    A run that reached the limit has accuracies. A further metric without a value was not measured.
    """
    bad = {name: row[name] for name in records.NOT_FORGOTTEN if row[name]}
    counted = ", ".join(f"{count} {name}" for name, count in bad.items())
    if row["n"]:
        text = _mean(row, "", style)
        if row["bold"]:
            text = style.bold.format(text)
        if bad:
            return f"{text} ({row['n']} of {row['runs']}; {counted})"
        return text if row["n"] == usual else f"{text} (n={row['n']})"
    if pd.notna(row["mean_cap"]):
        return f"{_mean(row, '_cap', style)}{style.capped} ({counted})"
    ended = ", ".join(f"{name} ({count})" for name, count in bad.items() if name != records.CAP)
    return ended or (style.none if bad else "")


def _mean(row: Record, suffix: str, style: Style) -> str:
    mean, std, digits = row[f"mean{suffix}"], row[f"std{suffix}"], columns.get(row["metric"]).digits
    return f"{mean:.{digits}f}" + (f"{style.spread}{std:.{digits}f}" if pd.notna(std) else "")


def _usual_n(rows: pd.DataFrame) -> int:
    """Return the number of runs behind most cells of rows with usual settings; the largest if several tie."""
    counts = rows.loc[(rows["n"] > 0) & (rows["row"] == rows["method"]), "n"].value_counts()
    return max(counts.index, key=lambda n: (counts[n], n), default=1)


def _note_on_runs(rows: pd.DataFrame) -> str:
    usual = _usual_n(rows)
    if usual == 1:
        return "Each number is from one seed unless it states another n."
    return f"Each number is mean ± standard deviation over {usual} seeds unless it states another n."


def legends(rows: pd.DataFrame) -> list[str]:
    """Return a note for each column. Columns with the same note share it."""
    by_note: dict[str, list[str]] = {}
    for name in columns.ordered(rows["metric"]):
        by_note.setdefault(columns.get(name).note, []).append(columns.get(name).heading)
    return [f"{markdown_text(', '.join(headings))}: {markdown_text(note)}." for note, headings in by_note.items()]


def _has_empty_cells(rows: pd.DataFrame) -> bool:
    return bool((_cells(rows, MARKDOWN) == MARKDOWN.none).any(axis=None))


def accuracy_notes(rows: pd.DataFrame, blocks: list[Block], on_runs: str | None = None) -> list[str]:
    """Return the notes that a table of accuracies needs.

    on_runs  note on the runs behind a number, for a table in which each k has a line of its own; None: for a grid
    """
    notes = legends(rows)
    if rows["continual"].iloc[0]:
        notes.append("The forget set arrives in several steps. In each row, D_f holds the images of that step.")
    notes.append(on_runs or _note_on_runs(rows))
    notes += _notes_on_marks(rows) + _notes_on_caps(rows, blocks) + _notes_on_samples(rows, blocks)
    notes += _notes_on_versions(rows, blocks)
    if on_runs is None and _has_empty_cells(rows):
        notes.append("–: there is no record. Expected runs without a record are listed under Missing.")
    if (rows["row"] != rows["method"]).any():
        notes.append(
            "Rows with brackets: the same method with other settings, weights or images, which the brackets name."
            + _usual_settings(rows, blocks)
        )
    if rows["published"].notna().any():
        derived = rows.get("derived", pd.Series(dtype=object)).eq(True).any()
        also = " (derived): computed from other numbers of that source." if derived else ""
        notes.append(f"¹ Published by others, not measured here: {published.SOURCE}.{also}")
    return notes


def _usual_settings(rows: pd.DataFrame, blocks: list[Block]) -> str:
    """Return a sentence on the settings of rows without brackets, of those that brackets name; "" if there are none."""
    labels: dict[str, list[str]] = {}
    for block in _of(rows, blocks):
        if named := block.usual_text():
            labels.setdefault(named, []).append(block.label)
    if not labels:
        return ""
    each = list(labels) if len(labels) == 1 else [f"{', '.join(some)}: {named}" for named, some in labels.items()]
    return f" Rows without brackets: {markdown_text('; '.join(each))}."


def _other_notes(rows: pd.DataFrame) -> list[str]:
    none = " –: not measured." if _has_empty_cells(rows) else ""
    return [*legends(rows), f"{_note_on_runs(rows)}{none} Other marks are explained above.", *_note_on_bold(rows)]


def _note_on_bold(rows: pd.DataFrame) -> list[str]:
    if not rows["bold"].any():
        return []
    compared = [columns.get(name).heading for name in columns.ordered(rows["metric"]) if columns.get(name).compared]
    return [
        f"**Bold**: the best value of a column ({markdown_text(', '.join(compared))}), among rows that forgot all of "
        f"D_f in every run and do not train on D_r{_and_surrogates(rows)}. `before`{_and_other_data(rows)} and "
        f"published numbers are not compared."
    ]


def _and_other_data(rows: pd.DataFrame) -> str:
    return "" if rows["usual_data"].all() else ", rows with other weights or images"


def _and_surrogates(rows: pd.DataFrame) -> str:
    return " or surrogate images" if (rows["needs"] == "D_f, surrogate").any() else ""


def _notes_on_marks(rows: pd.DataFrame) -> list[str]:
    notes = _note_on_bold(rows)
    trained = sorted(set(rows.loc[rows["needs"] == "D_f, D_r", "method"]))
    if trained:
        notes.append(f"Methods that train on D_r: {', '.join(map(markdown_code, trained))}.")
    if _and_surrogates(rows):
        notes.append("surrogate=…: also trained on these unlabelled images, which are neither D_f nor D_r.")
    if ((rows["n"] > 0) & (rows["n"] < rows["runs"])).any():
        notes.append("(2 of 3; 1 cap): the mean is over 2 of 3 runs; the brackets count how the other runs ended.")
    if rows["diverged"].any():
        notes.append("diverged: the loss or the outputs were no longer finite, so there is no accuracy.")
    if rows["failed"].any():
        notes.append("failed: the run ended with an error.")
    return notes


def _notes_on_caps(rows: pd.DataFrame, blocks: list[Block]) -> list[str]:
    if not rows["cap"].any():
        return []
    capped = [run for block in _of(rows, blocks) for run in block.records if records.gave_up(run)]
    passes = sorted({run["max_passes"] for run in capped if run.get("max_passes") is not None})
    cap = f" (max_passes = {', '.join(map(str, passes))})" if passes else ""
    return [f"cap: the run reached the cap{cap} before all of D_f was forgotten. †: the mean is over such runs only."]


def _notes_on_samples(rows: pd.DataFrame, blocks: list[Block]) -> list[str]:
    notes = []
    for block in _of(rows, blocks):
        runs = [run for run in block.records if run["retain_sample"] is not None]
        sizes = ", ".join(map(str, sorted({run["retain_sample"] for run in runs})))
        ends = [(run.get("acc_retain_low"), run.get("acc_retain_high")) for run in runs]
        widths = [high - low for low, high in ends if low is not None and high is not None]
        within = f", within ± {max(widths) / 2:.2f} at 95 % confidence" if widths else ""
        if sizes:
            notes.append(
                f"{markdown_text(block.label)}: D_r is measured on a random sample of {sizes} of its images{within}"
                f"{'' if len(runs) == len(block.records) else ', in some of the runs'}."
            )
    return notes


def _notes_on_versions(rows: pd.DataFrame, blocks: list[Block]) -> list[str]:
    """Return a note for each method with records of an earlier version of it."""
    runs = [(run["method"], run.get("method_revision") or 1) for block in _of(rows, blocks) for run in block.records]
    known = {name: method.version for name, method in registry.METHODS.items()}
    return [
        f"{markdown_code(name)}: runs with version {version} of the method; the present code has version {known[name]} "
        f"(see the changelog)."
        for name, version in sorted(set(runs))
        if version < known.get(name, 1)
    ]


def _of(rows: pd.DataFrame, blocks: list[Block]) -> list[Block]:
    goal, continual = rows["goal"].iloc[0], rows["continual"].iloc[0]
    return [block for block in blocks if (block.goal, block.continual) == (goal, bool(continual))]
