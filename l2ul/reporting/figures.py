"""Draw figures from tables and arrays, and save them as PNG, PDF and CSV. Nothing is loaded here."""

from collections import Counter
from collections.abc import Callable, Iterable
import contextlib
import functools
from pathlib import Path
import re
import textwrap
import unicodedata
import warnings

from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
import numpy as np
import pandas as pd

from l2ul.common.files import atomic
from l2ul.common.markup import SYMBOLS
from l2ul.common.text import one_line, shortened
from l2ul.methods import registry
from l2ul.metrics import columns
from l2ul.reporting import figure_data
from l2ul.reporting.figure_data import MEASURED, OTHER, SWEPT
from l2ul.reporting.rows import method_order

WIDTH = 6.75  # inches: the text width of a page with two columns, for which the font sizes below are chosen
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # TrueType fonts: text can be selected and edited
}
# Okabe and Ito's colours for colour-blind readers; yellow is too pale for lines and comes last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
CLASS_COLOURS = (*COLOURS[:6], "#F0E442", "#999999", "#7A4419", "#332288")  # without black, the edge colour of D_f
MARKERS = "os^DvPX<>p"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
DISTINCT = ("adv_imp", "adv", "oracle", "neggrad")  # methods with the first colours, markers and dashes
MOST_POINTS = 1000  # of a line in figure 7
MOST_CHARACTERS = 400  # of a title
LINE = 0.15  # inches: height of a line of text
FORMULA = re.compile(
    "|".join(
        [
            *map(re.escape, [*SYMBOLS.values(), "$N_{adv}$"]),
            r"\$\\mathdefault\{-?(?:[\d.]+\\times)?[\d.]+(?:\^\{-?\d+\})?\}\$",
        ]
    )
)
SPLITS = ("forget", "retain", "test")


def _styled(draw: Callable) -> Callable:
    """Draw with the style above, whatever the user's settings of matplotlib, and leave those unchanged."""

    @functools.wraps(draw)
    def drawn(*positional, **keywords):
        with style.context(["default", STYLE]):
            return draw(*positional, **keywords)

    return drawn


@_styled
def save(
    figure: Figure, numbers: pd.DataFrame, stem: Path, report: Callable[[str], object] = lambda sentence: None
) -> list[Path]:
    """Write <stem>.png, <stem>.pdf and the numbers as <stem>.csv. The same figure gives the same bytes.

    report  called with a sentence if no installed font has a character of the figure
    """
    if absent := _show_texts(figure):
        report(
            f"{stem.name}: the figure shows boxes in place of {shortened(absent, 20)}, which no installed font has; "
            f"install a font that has them, such as one of the Noto fonts"
        )
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf", "csv")]
    for path, metadata in zip(paths[:2], (None, {"CreationDate": None}), strict=True):
        with atomic(path) as part, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # reported above
            figure.savefig(part, format=path.suffix[1:], dpi=200, metadata=metadata)
    with atomic(paths[2]) as part:
        numbers.to_csv(part, index=False)
    return paths


def _show_texts(figure: Figure) -> str:
    """Let matplotlib show all texts as they are: without formulas but FORMULA, and in fonts that have their characters.

    Returns the characters that no installed font has.
    """
    texts = figure.findobj(Text)
    fonts, absent = _fonts("".join(sorted({character for text in texts for character in text.get_text()})))
    for text in texts:
        text.set_parse_math("$" not in FORMULA.sub("", text.get_text()))
        text.set_family(["sans-serif", *fonts])
    return absent


@functools.cache
def _fonts(characters: str) -> tuple[list[str], str]:
    """Return installed fonts with characters that the usual font lacks, and the characters that none of them has."""
    usual, fonts = font_manager.findfont(font_manager.FontProperties()), {}
    absent = set(map(ord, characters)) - FT2Font(usual).get_charmap().keys() - {ord("\n")}
    for font in font_manager.fontManager.ttflist if absent else ():
        if (font.style, font.weight) == ("normal", 400) and "Last Resort" not in font.name:  # a font of boxes
            with contextlib.suppress(RuntimeError, OSError):  # FreeType cannot read it, or it was removed
                fonts.setdefault(font.name, absent & FT2Font(font.fname).get_charmap().keys())
    chosen = []
    while any(covered & absent for covered in fonts.values()):
        chosen.append(max(fonts, key=lambda name: (len(fonts[name] & absent), "Sans" in name, name)))
        absent -= fonts[chosen[-1]]
    return chosen, "".join(map(chr, sorted(absent)))


def _figure(width: float, height: float, title: str) -> Figure:
    """Return a figure with a title, in lines that fit its width. Further lines make it higher."""
    lines = textwrap.wrap(shortened(title, MOST_CHARACTERS), int(15 * width))
    figure = Figure((width, height + LINE * (len(lines) - 1)), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=8)
    return figure


def _heading(measure: str) -> str:
    heading = columns.get(measure).heading
    return SYMBOLS.get(heading, heading)


def _line_style(method: str) -> dict[str, object]:
    """Return colour, marker and dashes of a method, the same in every figure."""
    names = list(dict.fromkeys((*DISTINCT, *registry.METHODS)))
    names.remove("before")
    place = names.index(method) if method in names else len(names)
    return {"color": COLOURS[place % 7], "marker": MARKERS[place % 10], "linestyle": DASHES[place % 5]}


def ordered(names: Iterable[str]) -> list[str]:
    """Return the methods, each once, in the order of the registry; unknown ones last."""
    return sorted(set(names), key=method_order)


def _lines(axes: Axes, table: pd.DataFrame, x: str, measure: str) -> None:
    """Draw a line with a band of one standard deviation for each method. Open markers: stopped at the cap."""
    before = table[table["method"] == "before"]
    if len(before):
        axes.axhline(before[measure].mean(), color="0.5", linestyle=(0, (4, 3)), linewidth=1)
    for method in ordered(set(table["method"]) - {"before"}):
        line, rows = _line_style(method), table[table["method"] == method].sort_values(x)
        met, capped = rows[~rows["capped"]], rows[rows["capped"]]
        spread = met[f"{measure}_std"].fillna(0)
        low, high = met[measure] - spread, met[measure] + spread
        axes.fill_between(met[x], low, high, color=line["color"], alpha=0.15, linewidth=0)
        axes.errorbar(met[x], met[measure], met[f"{measure}_std"], capsize=2, elinewidth=0.7, **line)
        axes.plot(capped[x], capped[measure], **line | {"linestyle": ""}, markerfacecolor="white", zorder=3)


def _values_axis(axes: Axes, values, logarithmic: bool) -> None:
    """Set the scale and, for up to eight values, a tick at each. A logarithmic axis can show zero."""
    values = sorted(set(values))
    if logarithmic and values[0] > 0:
        axes.set_xscale("log", base=2 if values[0] >= 1 else 10)
    elif logarithmic and values[-1] > 0:
        axes.set_xscale("symlog", linthresh=min(value for value in values if value > 0), linscale=0.5)
    if len(values) <= 8:
        axes.set_xticks(values, labels=[_short(value) for value in values])
        axes.minorticks_off()


def _short(value: float) -> str:
    small = 0 < value < 0.01
    return np.format_float_scientific(value, precision=3, trim="-", exp_digits=1) if small else f"{value:g}"


def _legend(figure: Figure, table: pd.DataFrame) -> None:
    names = ordered(set(table["method"]) - {"before"})
    handles = [Line2D([], [], **_line_style(name), label=name) for name in names]
    if (table["method"] == "before").any():
        handles.append(Line2D([], [], color="0.5", linestyle=(0, (4, 3)), linewidth=1, label="before"))
    if "capped" in table and table["capped"].any():
        open_marker = {"marker": "o", "linestyle": "", "color": "0.3", "markerfacecolor": "white"}
        handles.append(Line2D([], [], **open_marker, label="open: not all images forgotten"))
    _add_legend(figure, handles)


def _add_legend(figure: Figure, handles: list[Line2D]) -> None:
    """Add a legend below the panels, in rows of about the same length: at most six entries, as many as fit.

    Long labels are shortened, and more than three rows make the figure higher.
    """
    width = figure.get_figwidth()
    labels = [shortened(handle.get_label(), int(12 * width)) for handle in handles]
    for most in range(6, 0, -1):
        rows = -(-len(labels) // most)
        if sum(max(map(len, labels[place : place + rows])) + 8 for place in range(0, len(labels), rows)) <= 16 * width:
            break
    figure.set_figheight(figure.get_figheight() + LINE * max(rows - 3, 0))
    numbers = list(map(str, range(len(labels))))  # matplotlib before 3.10 leaves out labels that begin with _
    legend = figure.legend(handles, numbers, loc="outside lower center", ncols=-(-len(labels) // rows))
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


@_styled
def accuracy_against_k(table: pd.DataFrame, title: str) -> Figure:
    """Draw figure 1 from `figure_data.accuracies`: accuracies on D_r and D_test after forgetting k images."""
    figure = _figure(WIDTH, 2.9, title)
    for axes, measure in zip(figure.subplots(1, len(MEASURED), sharey=True), MEASURED, strict=True):
        _lines(axes, _side_by_side(table), "k", measure)
        _values_axis(axes, table["k"].dropna(), True)
        axes.set(title=_heading(measure), xlabel="images to forget, k")
        if table["k"].nunique() == 1:
            axes.set_xlim(table["k"].min() / 2, table["k"].min() * 2)
    figure.axes[0].set_ylabel("accuracy (%)")
    _legend(figure, table)
    return figure


def _side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """Move points of a single k apart, so that they do not hide each other."""
    names = ["before", *ordered(set(table["method"]) - {"before"})]
    aside = table["method"].map(names.index) - len(names) / 2
    return table.assign(k=table["k"] * 2 ** (0.1 * aside)) if table["k"].nunique() == 1 else table


@_styled
def ablations(table: pd.DataFrame, title: str) -> Figure:
    """Draw figure 6 from `figure_data.ablations`: a column for each setting, a row for each metric."""
    settings = list(dict.fromkeys(table["setting"]))
    figure = _figure(max(WIDTH * len(settings) / 4, 3.4), 4.2, title)
    grid = figure.subplots(len(MEASURED), len(settings), sharey="row", squeeze=False)
    for column, setting in zip(grid.T, settings, strict=True):
        rows, (label, logarithmic) = table[table["setting"] == setting], SWEPT.get(setting, (setting, False))
        for axes, measure in zip(column, MEASURED, strict=True):
            _lines(axes, rows, "value", measure)
            _values_axis(axes, rows["value"].dropna(), logarithmic)
            axes.set(ylabel=f"accuracy on {_heading(measure)} (%)" if axes in grid[:, 0] else "")
        column[-1].set_xlabel(label)
    _legend(figure, table)
    return figure


@_styled
def curves(table: pd.DataFrame, title: str) -> Figure:
    """Draw figure 7 from `figure_data.curves`: a panel for D_f and for each term of the loss, a line for each run."""
    shown = figure_data.measured(table)
    figure, panels, _ = _grid(len(shown), 2.1, title)
    runs, lines, used = dict(list(table.groupby("run", sort=False))), {}, Counter()
    for name, run in runs.items():
        method = run["method"].iloc[0]
        line = _line_style(method)
        dash = DASHES[(DASHES.index(line["linestyle"]) + used[method]) % len(DASHES)]  # others for further runs
        used[method] += 1
        lines[name] = {"color": line["color"], "linestyle": dash, "linewidth": 0.9, "label": run["label"].iloc[0]}
    steps = table.groupby("run")["step"].max()
    for axes, column in zip(panels, shown, strict=True):
        for name, run in runs.items():
            drawn = figure_data.thinned(run[run[column].notna()], MOST_POINTS)
            axes.plot(drawn["step"], drawn[column], **lines[name])
        axes.set_xlabel("step")
        if steps.max() > 10 * steps.min():
            axes.set_xscale("log")
        if column in figure_data.PERCENTAGES:
            title = "accuracy on $D_f$" if column == "acc_forget" else column
            axes.set(title=title, ylabel="accuracy (%)" if column == "acc_forget" else "images (%)", ylim=(-3, 103))
        else:
            axes.set_title(f"loss term: {shorten(column, 20)}")
            _term_axis(axes, table[column])
    _add_legend(figure, [Line2D([], [], **line) for line in lines.values()])
    return figure


def _term_axis(axes: Axes, values: pd.Series) -> None:
    """Set a logarithmic scale for a term whose size changes by more than two orders of magnitude."""
    sizes = values[values != 0].abs()
    if not len(sizes) or sizes.max() <= 100 * sizes.median():
        axes.axhline(0, color="0.85", linewidth=0.6, zorder=0)
    elif values.min() >= 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=float(sizes.median()), linscale=0.5)


@_styled
def adversarial_examples(images: np.ndarray, examples: np.ndarray, table: pd.DataFrame, title: str) -> Figure:
    """Draw figure 2: a row for each image, with its adversarial examples and their perturbations.

    A perturbation is scaled so that its largest value is black or white, around grey. The factor is its title, and
    becomes the column `enlarged` of the table.

    images    (n, H, W, 3) floats in [0,1]
    examples  (n · m, H, W, 3) floats in [0,1], those of the first image first
    table     a row for each example, with the columns label and target
    title     title of the figure
    """
    draws = len(examples) // len(images)
    figure = _figure(WIDTH, len(images) * (WIDTH / (1 + 2 * draws) + 0.16) + 0.2, title)
    grid = figure.subplots(len(images), 1 + 2 * draws, squeeze=False)
    factors = []
    for place, row in enumerate(table.itertuples()):
        line, draw = divmod(place, draws)
        delta = examples[place] - images[line]
        factors.append(0.5 / max(float(np.abs(delta).max()), 1e-12))
        _picture(grid[line, 0], images[line], shorten(row.label))
        _picture(grid[line, 1 + 2 * draw], examples[place], f"\u200e→ {shorten(row.target)}")  # from left to right
        _picture(grid[line, 2 + 2 * draw], 0.5 + delta * factors[-1], f"δ × {factors[-1]:.3g}")
    table["enlarged"] = factors
    return figure


def shorten(name: str, most: int = 13) -> str:
    """Shorten a name to fit above a picture, by default a small one. Wide characters count twice."""
    sizes = np.cumsum([1 + (unicodedata.east_asian_width(character) in "FW") for character in name])
    fitting = name if sizes.max(initial=0) <= most else name[: int(np.searchsorted(sizes, most))] + "…"
    return one_line(fitting, "\ufffd")


def _picture(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels.clip(0, 1), interpolation="nearest")
    axes.set_title(title, fontsize=7, pad=2)
    axes.axis("off")


def _grid(count: int, height: float, title: str, most: int = 3) -> tuple[Figure, list[Axes], int]:
    """Return a figure, its panels and the number of columns: at most `most`, and two for four panels."""
    columns = 2 if count in (2, 4) else min(count, most)
    rows = -(-count // columns)
    figure = _figure(WIDTH * 2 / 3 if count < most else WIDTH, height * rows, title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.axis("off")
    return figure, panels[:count], columns


@_styled
def confusions(matrices: dict[str, pd.DataFrame], title: str) -> Figure:
    """Draw figure 3 from `figure_data.confusion_matrices`: a panel for each matrix, true by predicted classes.

    Small matrices show their numbers, large ones a colour scale. In a large matrix the cells of merged classes stay
    grey, since their high counts would make the others pale.
    """
    large = max(next(iter(matrices.values())).shape) > 12
    figure, panels, columns = _grid(len(matrices), 3.4, title, 2) if large else _grid(len(matrices), 2.75, title)
    for place, (axes, (name, matrix)) in enumerate(zip(panels, matrices.items(), strict=True)):
        counts = matrix.to_numpy()
        other = (matrix.index == OTHER)[:, None] | (matrix.columns == OTHER)[None]
        most = max(counts[~other].max(initial=0), 1)
        shades = axes.imshow(np.ma.array(counts, mask=other & large), cmap="Blues", vmin=0, vmax=1.15 * most)
        axes.set(aspect="auto", facecolor="0.85")
        if large:
            figure.colorbar(shades, ax=axes, shrink=0.6, ticks=MaxNLocator(4, integer=True))
        else:
            _numbers(axes, counts)
        axes.set_xticks(range(counts.shape[1]), [shorten(name) for name in matrix.columns], rotation=90)
        axes.set_yticks(range(counts.shape[0]), [shorten(name) for name in matrix.index])
        if place % columns:
            axes.set_yticklabels([])
        axes.set(title=shorten(name, 40), ylabel="" if place % columns else "true class")
        axes.set_xlabel("predicted class" if name.startswith("predictions") else "target class")
        axes.spines[:].set_visible(True)
    return figure


def _numbers(axes: Axes, counts: np.ndarray) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count:
            shade = "white" if count > 0.6 * counts.max() else "black"
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color=shade)


@_styled
def similarity(table: pd.DataFrame, title: str) -> Figure:
    """Draw figure 4: linear CKA with the original model for each layer, a panel for each split.

    The table has the columns method, split, images, position, layer and cka.
    """
    figure = _figure(WIDTH, 2.6, title)
    grid = figure.subplots(1, len(SPLITS), sharey=True)
    for axes, split in zip(grid, SPLITS, strict=True):
        shown = table[table["split"] == split]
        for method in ordered(shown["method"]):
            rows, every = shown[shown["method"] == method], max(1, len(shown["position"].unique()) // 10)
            axes.plot(rows["position"], rows["cka"], **_line_style(method), markersize=3.5, markevery=every)
        axes.set(
            title=f"{_heading(f'acc_{split}')}, {shown['images'].iloc[0]} images",
            xlabel="layer, first to last",
            ylim=(0, 1.03),
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].set_ylabel("linear CKA with the original model")
    _legend(figure, table)
    return figure


@_styled
def maps(table: pd.DataFrame, classes: list[str], title: str) -> Figure:
    """Draw figure 5: a t-SNE map of features for each panel.

    table    columns panel, split (forget or test), class ("" for classes without a colour), x and y
    classes  names of all classes, in the order of the legend
    title    title of the figure
    """
    names = [name for name in classes if (table["class"] == name).any()]
    panels = list(dict.fromkeys(table["panel"]))
    figure, grid, _ = _grid(len(panels), 2.4, title)
    for axes, panel in zip(grid, panels, strict=True):
        rows = table[table["panel"] == panel]
        for place, name in [(None, ""), *enumerate(names)]:
            point = {"color": "0.8", "marker": "."} if place is None else _class_style(place)
            test = rows[(rows["class"] == name) & (rows["split"] == "test")]
            axes.scatter(test["x"], test["y"], s=7, linewidths=0, alpha=0.85, **point)
            forget = rows[(rows["class"] == name) & (rows["split"] == "forget")]
            star = {"marker": "*", "edgecolors": "black", "linewidths": 0.6, "zorder": 3}
            axes.scatter(forget["x"], forget["y"], s=48, **star, color=point["color"])
        axes.set(title=shorten(panel, 30), xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    handles = [Line2D([], [], **_class_style(place), linestyle="", label=name) for place, name in enumerate(names)]
    if (table["class"] == "").any():
        handles.append(Line2D([], [], color="0.8", marker="o", linestyle="", label="other classes"))
    star = {"marker": "*", "markersize": 8, "markerfacecolor": "white", "color": "black", "linestyle": ""}
    handles.append(Line2D([], [], **star, label="$D_f$, by true class"))
    _add_legend(figure, handles)
    return figure


def _class_style(place: int) -> dict[str, str]:
    return {"color": CLASS_COLOURS[place % 10], "marker": MARKERS[place % 10]}
