"""Runs that the tables lack, and the commands of main_unlearn.py that make them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
import shlex

from l2ul import models
from l2ul.common.installation import command
from l2ul.common.markup import markdown_code, markdown_text
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.methods.registry import get, of_goal
from l2ul.methods.settings import override, to_text
from l2ul.models import checkpoint, zoo
from l2ul.reporting.rows import Block, main_row
from l2ul.reporting.summary import Selection

MOST_CHARACTERS = 2**15  # of a command; longer ones have a value that no command can have
RESULT_DIR = "result_data"  # default of --result-dir


@dataclass(frozen=True, order=True)
class Missing:
    """A run without a record. For a continual run, k counts the images of all steps up to this one."""

    k: int
    method: str
    seed: int


def section(cells: list[str], lines: list[str], notes: list[str]) -> str:
    """Return a Markdown section with the result of `parts`; "" if no run is missing."""
    if not cells:
        return ""
    listed = "".join(f"- {line}\n" for line in cells)
    below = "".join(f"\n{note}\n" for note in notes)
    script = "".join(f"{line}\n" for line in lines)
    return f"## Missing: no record yet\n\n{listed}\nThese commands make them:\n\n```bash\n{script}```\n{below}"


def parts(blocks: Iterable[Block], selection: Selection) -> tuple[list[str], list[str], list[str]]:
    """Return the lines that describe the missing runs, the commands for them, and notes on the commands."""
    cells, lines, notes = [], [], []
    for block in blocks:
        absent = find(block, selection)
        every = commands(block, absent)
        needed = [line for line in every if len(line) <= MOST_CHARACTERS]
        notes += [f"Commands of more than {MOST_CHARACTERS:,} characters are left out."] * (len(needed) < len(every))
        cells += describe(block, absent)
        lines += needed
        notes += [*_notes_on_files(block, absent), *_notes_on_code(block, absent)] if needed else []
    return cells, lines, list(dict.fromkeys(notes))


def find(block: Block, selection: Selection) -> list[Missing]:
    """Return the missing runs of a block, out of all its methods × k × seeds or the selected ones.

    A method has a run if the method's main row has it, see `rows.main_row`. Rows with other settings are extras.
    Methods that are unknown or not for the goal of the block are skipped.
    """
    names = {name: {record[name] for record in block.records} for name in ("method", "k", "seed")}
    chosen = [name for name in of_goal(block.goal) if name in (selection.method or names["method"])]
    sizes = selection.sizes(block.continual_size) if selection.k else names["k"]
    seeds = selection.seed or names["seed"]
    main = {method: main_row(block.records, method) for method in chosen}
    recorded = {(record["k"], record["row"], record["seed"]) for record in block.records}
    expected = ((k, method, seed) for k in sorted(set(sizes)) for method in chosen for seed in sorted(set(seeds)))
    return [Missing(k, method, seed) for k, method, seed in expected if (k, main[method], seed) not in recorded]


def describe(block: Block, missing: list[Missing]) -> list[str]:
    """Return a line for each k that says which methods lack which seeds."""
    lines = []
    for k in sorted({run.k for run in missing}):
        seeds = defaultdict(list)
        for run in missing:
            if run.k == k:
                seeds[run.method].append(str(run.seed))
        each = "; ".join(f"{markdown_code(method)} seed {' '.join(lacking)}" for method, lacking in seeds.items())
        steps = f" ({block.continual_size} per step)" if block.continual else ""
        lines.append(f"{markdown_text(block.label)}, goal {block.goal}, k = {k}{steps}: {each}")
    return lines


def commands(block: Block, missing: Iterable[Missing]) -> list[str]:
    """Return command lines that do exactly these runs, as few as possible.

    A command does all combinations of its methods, k and seeds.
    """
    if block.continual:  # a command does all steps up to its last, except those with a record
        missing = {(run.method, run.seed): run for run in sorted(missing)}.values()
    by_seed = defaultdict(list)
    for run in missing:
        by_seed[_flags(block, run), run.k, run.seed].append(run.method)
    by_methods = defaultdict(list)
    for (flags, k, seed), methods in by_seed.items():
        by_methods[flags, tuple(methods), k].append(seed)
    by_size = defaultdict(list)
    for (flags, methods, k), seeds in by_methods.items():
        by_size[flags, methods, tuple(seeds)].append(k)
    made = []
    for (flags, methods, seeds), sizes in by_size.items():
        words = [*command("main_unlearn.py"), "--dataset", block.dataset, "--model", block.model, *flags]
        words += ["--unlearn-k", *map(str, sizes), "--seed", *map(str, seeds), "--method", *methods]
        made.append(shlex.join(words))
    return made


def _notes_on_files(block: Block, missing: Iterable[Missing]) -> list[str]:
    """Return notes that identify files and folders of the commands: a record holds a name at most, not its folder."""
    notes = []
    for run in missing:
        words, digest = _flags(block, run), str(_like(block, run)[1].get("checkpoint_sha256"))[:12]
        meanings = {
            "--checkpoint": f"the file with the weights of {markdown_text(block.model)} whose SHA-256 begins with "
            f"{digest}",
            "--forget-dir": "the folder of the images of D_f",
            "--relabel-file": "the file of the new labels, one for each image of D_f in its order",
        }
        for flag, meaning in meanings.items():
            if flag in words:
                name = words[words.index(flag) + 1]
                folder = "" if name == "FILE" else " Add its folder if it is not in the current one."
                notes.append(f"{markdown_code(name)} is {meaning}.{folder}")
    return notes


def _notes_on_code(block: Block, missing: Iterable[Missing]) -> list[str]:
    """Return a note on the model and the methods that the user registers: main_unlearn.py lacks them."""
    names = [block.model] if models.is_of_user(block.model) else []
    names += sorted({run.method for run in missing if get(run.method).code_sha256()})
    if not names:
        return []
    listed = ", ".join(map(markdown_code, names))
    return [f"In place of main_unlearn.py, start the file of yours that registers {listed}."]


def _like(block: Block, run: Missing) -> tuple[list[Record], Record]:
    """Return the runs that a missing run is like but for k and seed, and its settings."""
    row = main_row(block.records, run.method)
    runs = [record for record in block.records if record["row"] == row]
    return runs, block.usual | (runs[0]["differs"] if runs else {})


def _flags(block: Block, run: Missing) -> tuple[str, ...]:
    """Return the flags of a run other than data set, model, k, seed and method."""
    runs, values = _like(block, run)
    if "teacher" not in get(run.method).needs:
        values["surrogate"] = (runs[0] if runs else values).get("test_without")
    # file of weights and result folder come from runs with the same weights, if there are any
    weights = values.get("checkpoint_sha256")
    alike = [record for record in block.records if record["checkpoint_sha256"] == weights] or block.records
    words = _weights(block, alike)
    words += ["--goal", block.goal] if block.goal != "misclassify" else []
    words += ["--continual-step", str(block.continual_size)] if block.continual_size else []
    words += ["--age-grouping", block.age_grouping] if block.age_grouping else []
    words += [*_setting_flags(block, values, runs or block.records), *_method_settings(run.method, values)]
    if values.get("listed"):
        listed = [record for record in runs or block.records if record["listed"]]
        words += ["--forget-file", _closest(listed, run)["forget_file"]]
    if relabelled := [record for record in runs or block.records if record.get("relabel_file")]:
        words += ["--relabel-file", _closest(relabelled, run)["relabel_file"]]
    folder = min(record["result_dir"] for record in alike)
    return tuple(words + (["--result-dir", folder] if folder != RESULT_DIR else []))


def _implied(block: Block) -> dict[str, set]:
    """Return the values that main_unlearn.py uses without a flag, other than the defaults of the schema."""
    family = models.OWN.get(block.model, zoo)
    statistics = {name: {" ".join(f"{value:g}" for value in getattr(family, name.upper()))} for name in ("mean", "std")}
    places = checkpoint.candidates(block.data_label, block.model, Path())
    files = {path.name for path in (places[:1] if models.is_of_user(block.model) else places)}
    # the default of other data sets depends on their images
    sides = {128} if block.age_grouping else {224} if block.dataset == "imagenet" else set()
    return statistics | {"checkpoint": files, "image_size": sides}


def _weights(block: Block, runs: list[Record]) -> list[str]:
    names = {record["checkpoint"] for record in runs if record["checkpoint"]}
    if names & _implied(block)["checkpoint"] or (not names and (block.dataset == "digits" or ":" in block.model)):
        return []
    return ["--checkpoint", min(names, default="FILE")]


def _setting_flags(block: Block, values: Record, runs: list[Record]) -> Iterator[str]:
    """Yield a flag for each setting that differs from the one that a command without the flag would use."""
    implied = _implied(block)
    on_cuda = any(not (run["device"] or "cpu").startswith(("cpu", "mps")) for run in runs)
    for key in records.SCHEMA.values():
        value = values.get(key.name)
        is_default = value == key.default_for(block.dataset) and not (key.name == "precision" and on_cuda)
        if not key.flag or value is None or is_default or value in implied.get(key.name, ()):
            continue
        yield f"--{key.name.replace('_', '-')}"
        yield from value.split() if key.type == "numbers" else [str(value)]


def _method_settings(method: str, values: Record) -> list[str]:
    """Return the flag for settings that the method declares itself and that differ from its defaults."""
    declared, prefix = get(method).settings, f"{method}." if get(method).is_fixed_length else ""
    recorded = {one.name: values[prefix + one.name] for one in declared if prefix + one.name in values}
    used = override(declared, recorded)
    changed = {one.name: used[one.name] for one in declared if used[one.name] != one.default}
    return ["--setting", *to_text(changed).split()] if changed else []


def _closest(runs: list[Record], run: Missing) -> Record:
    """Return the run whose D_f has at least as many images as that of a missing run and its seed, if there is one."""
    long = [record for record in runs if record["k"] >= run.k] or runs
    same = [record for record in long if record["seed"] == run.seed] or long
    return min(same, key=lambda record: (record["k"], record["forget_file"]))
