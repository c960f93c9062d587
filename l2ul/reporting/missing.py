"""Cells of the tables that no record fills, and the commands that would fill them."""

from argparse import Action
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
import shlex

from l2ul.cli import options
from l2ul.experiments import defaults
from l2ul.methods import fixed_length
from l2ul.methods.registry import get, of_goal
from l2ul.reporting.rows import Block, Record, settings
from l2ul.reporting.summary import Wanted

DEFAULT_RESULT_DIR = "result_data"
# Values that a setting has where no flag gives it, besides the defaults that `defaults` has for each data set.
Implied = Callable[[Block], dict[str, set]]


@dataclass(frozen=True, order=True)
class Missing:
    """A run that no record is of; in a continual run k counts the images of all steps up to its own."""

    k: int
    method: str
    seed: int


def find(block: Block, wanted: Wanted) -> list[Missing]:
    """The runs of a block that are not there, of all its methods × k × seeds or of those asked for.

    A method is there where its main row is (see `Block.main_row`): rows with other settings are extras. Methods that
    are not for the goal, or that are known no more, are not expected.
    """
    names = {name: {record[name] for record in block.records} for name in ("method", "k", "seed")}
    chosen = [name for name in of_goal(block.goal) if name in (wanted.method or names["method"])]
    sizes = wanted.sizes(block.continual_size) if wanted.k else names["k"]
    seeds = wanted.seed or names["seed"]
    main = {method: block.main_row(method) for method in chosen}
    there = {(record["k"], record["row"], record["seed"]) for record in block.records}
    asked = ((k, method, seed) for k in sorted(set(sizes)) for method in chosen for seed in sorted(set(seeds)))
    return [Missing(k, method, seed) for k, method, seed in asked if (k, main[method], seed) not in there]


def describe(block: Block, missing: list[Missing]) -> list[str]:
    """A line for each k: which methods lack which seeds."""
    lines = []
    for k in sorted({run.k for run in missing}):
        seeds = defaultdict(list)
        for run in missing:
            if run.k == k:
                seeds[run.method].append(str(run.seed))
        each = "; ".join(f"`{method}` seed {' '.join(found)}" for method, found in seeds.items())
        steps = f" ({block.continual_size} a step)" if block.continual else ""
        lines.append(f"{block.label}, goal {block.goal}, k = {k}{steps}: {each}")
    return lines


def commands(block: Block, missing: Iterable[Missing], implied: Implied) -> list[str]:
    """Command lines that do exactly these runs: as few as that takes, since one does all its methods × k × seeds."""
    if block.continual:  # a command does the steps up to its last, of those what is not done
        missing = {(run.method, run.seed): run for run in sorted(missing)}.values()
    by_seed = defaultdict(list)
    for run in missing:
        by_seed[_flags(block, run, implied), run.k, run.seed].append(run.method)
    by_methods = defaultdict(list)
    for (flags, k, seed), methods in by_seed.items():
        by_methods[flags, tuple(methods), k].append(seed)
    by_size = defaultdict(list)
    for (flags, methods, k), seeds in by_methods.items():
        by_size[flags, methods, tuple(seeds)].append(k)
    made = []
    for (flags, methods, seeds), sizes in by_size.items():
        words = ["python", "main_unlearn.py", "--dataset", block.dataset, "--model", block.model, *flags]
        words += ["--unlearn-k", *map(str, sizes), "--seed", *map(str, seeds), "--method", *methods]
        made.append(shlex.join(words))
    return made


def weights_note(block: Block, lines: Iterable[str]) -> str | None:
    """Which file commands mean: records tell its name at most, never its folder."""
    words = [word for line in lines for word in shlex.split(line)]
    if "--checkpoint" not in words:
        return None
    name, digest = words[words.index("--checkpoint") + 1], str(block.usual.get("checkpoint_sha256"))[:12]
    folder = "" if name == "FILE" else ", with its folder before it where it is in another"
    return f"`{name}`: the file of weights of {block.model} whose sha256 begins with {digest}{folder}."


def _flags(block: Block, run: Missing, implied: Implied) -> tuple[str, ...]:
    """What the command of a run is given besides data set, net, k, seed and method."""
    runs = [record for record in block.records if record["row"] == block.main_row(run.method)]
    values = block.usual | (runs[0]["differs"] if runs else {})
    # the file and folder are those of runs with the same weights, if there are any
    alike = [record for record in block.records if _same_weights(record, values)] or block.records
    words = _weights(block, alike, implied)
    words += ["--goal", block.goal] if block.goal != "misclassify" else []
    words += ["--continual-step", str(block.continual_size)] if block.continual_size else []
    words += ["--age-grouping", block.age_grouping] if block.age_grouping else []
    words += [*_setting_flags(block, values, implied), *_course(run.method, values)]
    if values.get("listed"):
        words += ["--forget-file", _forget_file(runs or block.records, run)]
    folder = min(record["result_dir"] for record in alike)
    return tuple(words + (["--result-dir", folder] if folder != DEFAULT_RESULT_DIR else []))


def _same_weights(record: Record, values: Record) -> bool:
    return settings(record)["checkpoint_sha256"] == values.get("checkpoint_sha256")


def _weights(block: Block, runs: list[Record], implied: Implied) -> list[str]:
    names = {record["checkpoint"] for record in runs if record["checkpoint"]}
    if names & implied(block)["checkpoint"] or (not names and (block.dataset == "digits" or ":" in block.model)):
        return []
    return ["--checkpoint", min(names, default="FILE")]


def _setting_flags(block: Block, values: Record, implied: Implied) -> Iterator[str]:
    """A flag for each setting that is another than a command without it would take."""
    found = implied(block)
    for name, action in _actions().items():
        value = values.get(name)
        usual = defaults.default(block.dataset, name) if name in defaults.COMMON_DEFAULTS else action.default
        if value is None or value == usual or value in found.get(name, ()):
            continue
        yield action.option_strings[0]
        if value is not True:
            yield from str(value).split(" ") if action.nargs else [str(value)]


def _course(method: str, values: Record) -> list[str]:
    """The flag of a method of fixed length, where its settings are others than the method's own."""
    theirs = get(method).settings or {}
    recorded = {name: values[f"{method}.{name}"] for name in theirs if f"{method}.{name}" in values}
    own = fixed_length.overridden(theirs, recorded)
    changed = {name: value for name, value in own.items() if value != theirs[name]}
    return ["--course", *fixed_length.told(changed).split()] if changed else []


@cache
def _actions() -> dict[str, Action]:
    """Every flag of main_unlearn.py by the name that a record has it under."""
    parser = options.Parser("")
    for add in options.RUN_GROUPS:
        add(parser)
    return {action.dest: action for action in parser._actions if action.option_strings}


def _forget_file(runs: list[Record], run: Missing) -> str:
    """A file of D_f's indices that is long enough; of the same seed if there is one."""
    listed = [record for record in runs if record["listed"]]
    long = [record for record in listed if record["k"] >= run.k] or listed
    same = [record for record in long if record["seed"] == run.seed] or long
    return min(same, key=lambda record: (record["k"], record["forget_file"]))["forget_file"]
