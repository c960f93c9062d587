"""Make tables and figures from the records of finished runs, and list the runs that are missing.

    # of all records in result_data
    python main_tables.py
    # of the committed records
    python main_tables.py --result-dir result_data/reference --output tables
    # of these runs, with a list of those that are missing
    python main_tables.py --method adv adv_imp --unlearn-k 16 64 --seed 0 1 2
    # beside the committed records: are these numbers right?
    python main_tables.py --expected
    # with two figures
    python main_tables.py --figures 1 6
    # with the curves of two runs
    python main_tables.py --figures 7 --figure-runs 01cab948 191262d6
    # all results on one page that opens offline in a browser
    python main_tables.py --html

The tables are written as Markdown, CSV and LaTeX, and with --html as a page. Rows are methods; columns are data set and
model, k, and metric.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from l2ul.cli import exit_codes
from l2ul.cli.parser import Parser, nonnegative_int, positive_int
from l2ul.common.choices import DEVICES
from l2ul.common.errors import InputError
from l2ul.reporting import FIGURES

if TYPE_CHECKING:
    import pandas as pd

    from l2ul.reporting.results_page import Sections
    from l2ul.reporting.rows import Block
    from l2ul.reporting.summary import Selection

PROGRAM = "main_tables.py"
LESS_MEMORY = "make fewer --figures at once, or use --device cpu"
TABLES = ("table.md", "table.csv", "table.tex")
PAGE = "results.html"
PAGE_FIGURES = (1, 3, 6, 7)  # those that need no model
REFERENCE = Path(__file__).resolve().parent / "result_data" / "reference"  # the committed records


@exit_codes.clean_exit(PROGRAM, "finished files are kept; the same command writes all files", less_memory=LESS_MEMORY)
def main() -> None:
    make(parse())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, prog=PROGRAM)
    add = parser.add_argument
    folders = "folders with a folder runs, in them or in their subfolders (default: result_data)"
    add("--result-dir", type=Path, nargs="+", default=[Path("result_data")], metavar="PATH", help=folders)
    output = f"folder for table.md, table.csv, table.tex and {PAGE} (default: tables in the first --result-dir)"
    add("--output", type=Path, metavar="PATH", help=output)
    expected = (
        "compare with reference records of the same runs, and mark what lies outside their spread (without a folder: "
        "with the committed records)"
    )
    add("--expected", type=Path, nargs="?", const=REFERENCE, metavar="FOLDER", help=expected)
    page = (
        f"write {PAGE} too: tables that can be sorted and filtered, figures, and each run's curve, settings and images "
        f"(without --figures: figures {', '.join(map(str, PAGE_FIGURES))})"
    )
    add("--html", action="store_true", help=page)
    add("--no-thumbnails", action="store_true", help="leave the images of D_f out of the page")
    group = parser.add_argument_group("selection (default: all runs); selected runs without a record count as missing")
    add = group.add_argument
    add("--dataset", nargs="+", metavar="NAME", help="data sets")
    add("--method", nargs="+", metavar="NAME", help="methods")
    add("--unlearn-k", type=positive_int, nargs="+", metavar="K", help="numbers of images to forget")
    add("--seed", type=nonnegative_int, nargs="+", metavar="N", help="seeds")
    group = parser.add_argument_group("figures (--figures: all of them, or the given numbers)")
    add = group.add_argument
    names = "; ".join(f"{number}: {name.replace('_', ' ')}" for number, name in FIGURES.items())
    add("--figures", type=int, choices=sorted(FIGURES), nargs="*", metavar="N", help=names)
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="data and weights for figures 2 to 5 and --html",
    )
    downloads = "download the data sets and weights that records name, where figures 2 to 5 and --html need them"
    add("--download", action="store_true", help=downloads)
    weights = "original weights for figures 2, 4 and 5 (default: the file that main_unlearn.py finds)"
    add("--checkpoint", metavar="FILE", help=weights)
    add("--device", choices=DEVICES, help="device for figures 2, 4 and 5 (default: the best available one)")
    add(
        "--figure-k",
        type=positive_int,
        metavar="K",
        help="size of the D_f shown (default: the largest; figure 7: the smallest)",
    )
    add("--figure-seed", type=nonnegative_int, metavar="N", help="seed of the D_f shown (default: the smallest)")
    methods = "methods of figures 3 to 5 (default: up to four that have the inputs) and 7 (default: all)"
    add("--figure-method", nargs="+", metavar="NAME", help=methods)
    runs = (
        "runs of figure 7: names of record files without .json, or their beginnings (default: of each method the first "
        "seed)"
    )
    add("--figure-runs", nargs="+", metavar="ID", help=runs)
    samples = "images of D_r and of D_test in figures 4 and 5 (default: 500)"
    add("--figure-samples", type=positive_int, default=500, metavar="N", help=samples)
    return parser.parse_args(argv)


def make(opts: argparse.Namespace) -> list[Path]:
    """Write the tables and the selected figures, and print the tables as Markdown. Return the files."""
    # imported here because these modules import torch, which takes longer than --help may
    from l2ul.reporting import expected, missing, read_records, render, rows, summary

    if opts.expected and not opts.expected.is_dir():
        raise InputError(
            f"there is no folder {opts.expected}",
            "name one with reference records with --expected FOLDER, such as result_data/reference of a clone",
        )
    records, problems = read_records.read(opts.result_dir)
    output = open_output(opts)
    selection = summary.Selection(opts.method, opts.unlearn_k, opts.seed)
    blocks = summary.select(rows.blocks(records), opts.dataset, selection)
    numbers = summary.summarise(blocks, selection)
    comparisons = None
    if opts.expected:
        references, _ = read_records.read([opts.expected])
        comparisons = expected.compare(blocks, references, selection)
    absent, shown = missing.parts(blocks, selection), summary.selected(blocks, selection)
    sections = [
        render.markdown(numbers, shown),
        expected.section(comparisons) if comparisons is not None else "",
        missing.section(*absent),
        read_records.problem_section(problems),
    ]
    texts = ("\n".join(filter(None, sections)), summary.to_csv(numbers), render.latex(numbers, shown))
    print(texts[0])
    paths = write(dict(zip(TABLES, texts, strict=True)), output)
    if opts.figures is not None or opts.html:
        print(f"drawing figures to {output}", flush=True)
        paths += draw(opts, [record for block in shown for record in block.records], output)
    if opts.html:
        from l2ul.reporting.results_page import Sections

        print(f"writing {output / PAGE}", flush=True)
        parts = Sections(comparisons, absent, problems)
        paths += write({PAGE: make_page(opts, numbers, shown, selection, parts, paths)}, output)
    print(f"written to {output}:", *_names(paths), sep="\n  ")
    return paths


def _names(paths: Iterable[Path]) -> list[str]:
    """Return the names of files, those that differ in the suffix as one: `table.md .csv .tex`."""
    suffixes = defaultdict(list)
    for path in paths:
        suffixes[path.stem].append(path.suffix)
    return [stem + " ".join(kinds) for stem, kinds in suffixes.items()]


def open_output(opts: argparse.Namespace) -> Path:
    """Return the folder for tables and figures, created if necessary. Raises InputError if they cannot be written."""
    from l2ul.common.files import require_writable

    folder = opts.output or opts.result_dir[0] / "tables"
    require_writable(folder, *TABLES, *([PAGE] if opts.html else ()))
    return folder


def make_page(
    opts: argparse.Namespace,
    numbers: "pd.DataFrame",
    blocks: "list[Block]",
    selection: "Selection",
    sections: "Sections",
    paths: list[Path],
) -> str:
    """Return the page of all results, with the figures that are among the files."""
    from l2ul.common.progress import progress_bar
    from l2ul.reporting import results_page, run_details

    shown = results_page.runs(blocks, selection)
    with progress_bar("page: runs", len(shown)) as advance:
        details = run_details.details(shown, opts.data_dir, not opts.no_thumbnails, opts.download, progress=advance)
    return results_page.page(numbers, blocks, shown, details, results_page.pictures(blocks, paths), sections)


def write(text: dict[str, str], folder: Path) -> list[Path]:
    """Write texts to files of a folder."""
    from l2ul.common.files import atomic

    paths = [folder / name for name in text]
    for path, content in zip(paths, text.values(), strict=True):
        with atomic(path) as part:
            part.write_text(content, encoding="utf-8")
    return paths


def draw(opts: argparse.Namespace, records: list[dict[str, object]], folder: Path) -> list[Path]:
    """Draw the figures that the options select."""
    from l2ul.reporting import figure_set

    inputs = figure_set.FigureOptions(
        data_dir=opts.data_dir,
        download=opts.download,
        checkpoint=opts.checkpoint,
        device=opts.device,
        k=opts.figure_k,
        seed=opts.figure_seed,
        methods=opts.figure_method,
        samples=opts.figure_samples,
        runs=opts.figure_runs,
    )
    usual = PAGE_FIGURES if opts.figures is None else FIGURES
    return figure_set.draw(records, opts.figures or usual, folder, inputs)


if __name__ == "__main__":
    main()
