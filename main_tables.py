"""Tables from the records of finished runs: Markdown, CSV and LaTeX, and what no record is of yet.

    python main_tables.py                                                       # of result_data
    python main_tables.py --result-dir result_data/reference --output tables
    python main_tables.py --method adv adv_imp --unlearn-k 16 64 --seed 0 1 2   # these; says what is missing of them

Rows are methods, columns data set and net × k × D_f, D_r, D_test; then other metrics. Nothing is measured here.
"""

import argparse
from pathlib import Path

import pandas as pd

from l2ul.cli import exit_codes, options
from l2ul.common.errors import InputError
from l2ul.common.files import atomic, require_writable
from l2ul.methods import registry
from l2ul.reporting import collect, layout, metric_tables, missing, rows, summary
from l2ul.reporting import figure_set as main_figures
import models
from models import checkpoint, zoo

PROGRAM = "main_tables.py"


@exit_codes.clean_exit(PROGRAM)
def main() -> None:
    make(parse())


def make(opts: argparse.Namespace) -> None:
    """Write the tables, and the figures asked for, and print what the Markdown one says."""
    records, problems = collect.read(opts.result_dir)
    wanted = summary.Wanted(opts.method, opts.unlearn_k, opts.seed)
    blocks = choose(rows.blocks(records), opts.dataset, wanted)
    frame = summary.summarise(blocks, wanted)
    beside = metric_tables.summary(blocks, wanted)
    sections = (
        layout.markdown(frame, blocks),
        metric_tables.markdown(beside),
        missing_section(blocks, wanted),
        problem_section(problems),
    )
    text = {
        "md": "\n".join(filter(None, sections)),
        "csv": summary.to_csv(pd.concat([frame, beside]) if len(beside) else frame),
        "tex": layout.latex(frame, blocks) + metric_tables.latex(beside),
    }
    print(text["md"])
    output = opts.output or opts.result_dir[0] / "tables"
    paths = write(text, output)
    if opts.figures is not None:
        drawn = [record for block in blocks for record in block.records if wanted.has(record)]
        paths += main_figures.draw(opts, drawn, output)
    print("files:", *paths)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(__doc__.split("\n")[0], prog=PROGRAM)
    parser.add_argument(
        "--result-dir",
        help="folders with runs in them, or else in their subfolders (default: result_data)",
        type=Path,
        nargs="+",
        default=[Path(missing.DEFAULT_RESULT_DIR)],
        metavar="PATH",
    )
    parser.add_argument(
        "--output",
        help="where table.md, table.csv and table.tex go (default: tables in the first --result-dir)",
        type=Path,
        metavar="PATH",
    )
    group = parser.add_argument_group("of which runs (default: all); what is given is expected to be there")
    group.add_argument("--dataset", help="data sets", nargs="+", metavar="NAME")
    group.add_argument("--method", help="methods", nargs="+", metavar="NAME")
    group.add_argument("--unlearn-k", help="images to forget", type=options.positive_int, nargs="+", metavar="K")
    group.add_argument("--seed", help="seeds", type=options.nonnegative_int, nargs="+", metavar="N")
    main_figures.add_flags(parser)
    return parser.parse_args(argv)


def choose(blocks: list[rows.Block], datasets: list[str] | None, wanted: summary.Wanted) -> list[rows.Block]:
    """The blocks of the data sets asked for; InputError for a data set or a method that is not there at all."""
    there = sorted({block.dataset for block in blocks})
    for name in datasets or ():
        if name not in there:
            raise InputError(f"there is no record of data set {name!r}; expected one of {', '.join(there) or 'none'}")
    recorded = {record["method"] for block in blocks for record in block.records}
    for name in wanted.method or ():
        if name not in recorded:
            registry.get(name)
    return [block for block in blocks if not datasets or block.dataset in datasets]


def implied(block: rows.Block) -> dict[str, set]:
    """What main_unlearn.py takes without a flag: weights that it finds itself, the family's statistics, a size."""
    family = models.OWN.get(block.model, zoo)
    statistics = {name: {" ".join(f"{value:g}" for value in getattr(family, name.upper()))} for name in ("mean", "std")}
    label = f"{block.dataset}_{block.age_grouping}" if block.age_grouping else block.dataset
    found = {path.name for path in checkpoint.candidates(label, block.model, Path())}
    return statistics | {"checkpoint": found, "image_size": {128 if block.age_grouping else 224}}


def missing_section(blocks: list[rows.Block], wanted: summary.Wanted) -> str:
    """Every run that no record is of, and the commands that would do these."""
    cells, lines, files = [], [], []
    for block in blocks:
        absent = missing.find(block, wanted)
        cells += missing.describe(block, absent)
        needed = missing.commands(block, absent, implied)
        lines += needed
        files += filter(None, [missing.weights_note(block, needed)])
    if not cells:
        return ""
    listed = "\n".join(f"- {line}" for line in cells)
    notes = "".join(f"\n{note}\n" for note in dict.fromkeys(files))
    commands = "\n".join(lines)
    return f"## Missing: no record yet\n\n{listed}\n\nTo fill them:\n\n```bash\n{commands}\n```\n{notes}"


def problem_section(problems: list[str]) -> str:
    listed = "\n".join(f"- {line}" for line in problems)
    return f"## Problems: files that are not in the tables\n\n{listed}\n" if problems else ""


def write(text: dict[str, str], folder: Path) -> list[Path]:
    """The tables as files, each whole."""
    require_writable(folder)
    paths = [folder / f"table.{kind}" for kind in text]
    for path, content in zip(paths, text.values(), strict=True):
        with atomic(path) as part:
            part.write_text(content, encoding="utf-8")
    return paths


if __name__ == "__main__":
    main()
