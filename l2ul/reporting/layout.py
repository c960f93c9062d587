"""The tables as text: Markdown and LaTeX from the same cells, with the notes that explain their marks."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from l2ul.experiments import records
from l2ul.reporting import published
from l2ul.reporting.rows import Block
from l2ul.reporting.summary import METRICS, SHORT, row_order

TABLE = ["goal", "continual"]


@dataclass(frozen=True)
class Style:
    """How a way of writing marks things up."""

    text: Callable[[str], str]  # plain words, whatever characters they hold
    bold: str
    spread: str = " ± "
    capped: str = "†"
    none: str = "–"
    source: str = "¹"
    metrics: tuple[str, ...] = tuple(METRICS.values())  # what columns are called, by rank


LATEX_CHARACTERS = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "¹": r"\textsuperscript{1}",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _latex(text: str) -> str:
    return "".join(LATEX_CHARACTERS.get(char, char) for char in text)


MARKDOWN = Style(lambda text: text.replace("|", "\\|").replace("*", "\\*"), "**{}**")
LATEX = Style(
    _latex,
    r"\textbf{{{}}}",
    r" $\pm$ ",
    r"$^\dagger$",
    "--",
    r"\textsuperscript{1}",
    ("$D_f$", "relabelled", "earlier $D_f$", "$D_r$", r"$D_\mathrm{test}$"),
)


def markdown(frame: pd.DataFrame, blocks: list[Block]) -> str:
    """Every table with its notes; a table's first line names data set, net and k, its second the metric."""
    if not len(frame):
        return "No table: there is no record of what was asked for.\n"
    parts = []
    for (goal, continual), rows in frame.groupby(TABLE, sort=True):
        cells = cells_of(rows, MARKDOWN)
        groups = [f"{data}, {group}" for data, group, _ in cells.columns]
        heads = [name if name not in groups[:at] else "" for at, name in enumerate(groups)]
        metrics = pd.DataFrame([[metric for *_, metric in cells.columns]], index=[""], columns=cells.columns)
        body = pd.concat([metrics, cells]).to_markdown(headers=["method", *heads], disable_numparse=True)
        notes = "\n".join(f"- {note}" for note in _notes(rows, blocks))
        parts.append(f"## {_title(goal, continual)}\n\n{body}\n\n{notes}\n")
    return "\n".join(parts)


def latex(frame: pd.DataFrame, blocks: list[Block]) -> str:
    """Every table as a float for a document that loads booktabs."""
    parts = [r"% needs \usepackage{booktabs}; wide tables may want \resizebox of graphicx or a landscape page"]
    if not len(frame):
        return "% no record\n"
    for (goal, continual), rows in frame.groupby(TABLE, sort=True):
        cells = cells_of(rows, LATEX)
        parts.append(latex_float(_title(goal, continual), cells, _notes(rows, blocks)))
    return "\n\n".join(parts) + "\n"


def latex_float(title: str, cells: pd.DataFrame, notes: list[str]) -> str:
    """A table of cells with a caption and notes, whose text is as for Markdown."""
    columns = "l" + "r" * len(cells.columns)
    body = cells.to_latex(escape=False, multicolumn=True, multicolumn_format="c", column_format=columns).strip()
    below = r" \\".join(f"\n{_latex(note.replace('**', '').replace('`', ''))}" for note in notes)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(title)}}}\n{body}\n"
        f"\\par\\smallskip\n\\begin{{minipage}}{{\\linewidth}}\\footnotesize{below}\n\\end{{minipage}}\n"
        f"\\end{{table}}"
    )


def _title(goal: str, continual: bool) -> str:
    return f"Goal {goal}{', in several steps' if continual else ''}: accuracy in %"


def cells_of(rows: pd.DataFrame, style: Style) -> pd.DataFrame:
    """One table's cells as text: a line a method (and step), columns by data set and net, k, metric."""
    usual, cells = usual_n(rows), {}
    for row in rows.to_dict("records"):
        size = 0 if pd.isna(row["continual_size"]) else int(row["continual_size"])
        group, k = (f"{size} a step", size) if row["continual"] else (f"k = {row['k']}", row["k"])
        column = (row["data"], k, row["rank"]), (style.text(row["data"]), group, style.metrics[row["rank"]])
        label = style.text(_line(row))
        if row["runs"]:
            cells[(*_place(row), False, label), column] = _cell(row, usual, style)
        if pd.notna(row["published"]):
            theirs = f"{row['published']:.2f}{' (derived)' if row['derived'] is True else ''}"
            cells[(*_place(row), True, f"{label}, published{style.source}"), column] = theirs
    lines, columns = (sorted({key[at] for key in cells}) for at in (0, 1))
    blank = {line: "" if line[-2] else style.none for line in lines}  # nothing is expected of published rows
    table = [[cells.get((line, column), blank[line]) for column in columns] for line in lines]
    return pd.DataFrame(
        table,
        index=[line[-1] for line in lines],
        columns=pd.MultiIndex.from_tuples([column[1] for column in columns]),
    )


def _place(row: dict[str, object]) -> tuple:
    step = (row["continual_step"], row["k"]) if row["continual"] else (0, 0)
    return (*row_order(row), *step)


def _line(row: dict[str, object]) -> str:
    return row["row"] + (f", step {int(row['continual_step'])} (k = {row['k']})" if row["continual"] else "")


def _cell(row: dict[str, object], usual: int, style: Style) -> str:
    """A mean with how many runs it is of, where that is not what the notes say; or how all of them ended."""
    bad = {name: row[name] for name in SHORT.values() if row[name]}
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
    return ", ".join(f"{name} ({count})" for name, count in bad.items())


def _mean(row: dict[str, object], of: str, style: Style) -> str:
    mean, std, digits = row[f"mean{of}"], row[f"std{of}"], row.get("digits", 2)
    return f"{mean:.{digits}f}" + (f"{style.spread}{std:.{digits}f}" if pd.notna(std) else "")


def usual_n(rows: pd.DataFrame) -> int:
    """The number of runs that most cells of plain rows are of, of several the largest."""
    counts = rows.loc[(rows["n"] > 0) & (rows["row"] == rows["method"]), "n"].value_counts()
    return max(counts.index, key=lambda n: (counts[n], n), default=1)


def _notes(rows: pd.DataFrame, blocks: list[Block]) -> list[str]:
    """What a reader needs to know to read this table, and no more."""
    usual, relabel = usual_n(rows), rows["goal"].iloc[0] == "relabel"
    seeds = f"mean ± standard deviation over {usual} seeds" if usual > 1 else "of one seed"
    goal = "relabelled: called the new label, 100 is the goal" if relabel else "0 is the goal"
    continual = "; at each step D_f are the images of that step" if rows["continual"].iloc[0] else ""
    notes = [
        f"D_f: images to forget ({goal}); D_r: the remaining training images; D_test: test images{continual}. "
        f"Each figure is {seeds} unless it says another n."
    ]
    notes += _notes_on_marks(rows) + _notes_on_caps(rows, blocks) + _notes_on_samples(rows, blocks)
    if any("–" in line for line in cells_of(rows, MARKDOWN).to_numpy().ravel()):
        notes.append("–: no record; where one is expected it is listed under Missing.")
    if (rows["row"] != rows["method"]).any():
        notes.append("Rows with brackets: the same method with other settings, which the brackets name.")
    if rows["published"].notna().any():
        derived = rows.get("derived", pd.Series(dtype=object)).eq(True).any()
        also = "; (derived): not printed there as such, but derived from its figures" if derived else ""
        notes.append(f"¹ Published figures, not ours: {published.SOURCE}{also}.")
    return notes


def _notes_on_marks(rows: pd.DataFrame) -> list[str]:
    notes = []
    if rows["bold"].any():
        notes.append(
            "**Bold**: the best D_r and D_test of a column, among rows that forgot D_f in all their runs without "
            "training on D_r; `before` and published figures do not compete."
        )
    trained = sorted(set(rows.loc[rows["needs_retain"], "method"]))
    if trained:
        notes.append(f"Trained on D_r, which the others do without: {', '.join(f'`{name}`' for name in trained)}.")
    if ((rows["n"] > 0) & (rows["n"] < rows["runs"])).any():
        notes.append("(2 of 3; 1 cap): the mean is of the 2 runs that ended well, of 3; the others are counted.")
    if rows["diverged"].any():
        notes.append("diverged: the numbers of the model were no longer finite, so it has no accuracy.")
    if rows["failed"].any():
        notes.append("failed: the run did not come to an end.")
    return notes


def _notes_on_caps(rows: pd.DataFrame, blocks: list[Block]) -> list[str]:
    if not rows["cap"].any():
        return []
    capped = [run for block in _of(rows, blocks) for run in block.records if run["status"] == records.CAP]
    passes = sorted({run["max_passes"] for run in capped if run.get("max_passes") is not None})
    cap = f" (max_passes = {', '.join(map(str, passes))})" if passes else ""
    return [f"cap, †: stopped at the cap{cap} before all of D_f was forgotten; †: the mean is of such runs only."]


def _notes_on_samples(rows: pd.DataFrame, blocks: list[Block]) -> list[str]:
    notes = []
    for block in _of(rows, blocks):
        runs = [run for run in block.records if run["retain_sample"] is not None]
        sizes = ", ".join(map(str, sorted({run["retain_sample"] for run in runs})))
        widths = [
            run["acc_retain_high"] - run["acc_retain_low"] for run in runs if run.get("acc_retain_low") is not None
        ]
        within = f", known to ± {max(widths) / 2:.2f} with 95 % confidence" if widths else ""
        if sizes:
            notes.append(f"{block.label}: D_r was measured on a random sample of {sizes} of its images{within}.")
    return notes


def _of(rows: pd.DataFrame, blocks: list[Block]) -> list[Block]:
    goal, continual = rows["goal"].iloc[0], rows["continual"].iloc[0]
    return [block for block in blocks if (block.goal, block.continual) == (goal, bool(continual))]
