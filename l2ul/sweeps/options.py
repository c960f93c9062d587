"""The command line of main_sweep.py: the flags of main_unlearn.py, each with several values. Does not import torch."""

import argparse
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
import functools
import itertools
from pathlib import Path

from l2ul.cli import options, unlearn_options
from l2ul.cli.parser import Parser, nonnegative_float, positive_float, positive_int
from l2ul.common import choices
from l2ul.common.choices import Number
from l2ul.common.errors import InputError, option
from l2ul.methods import registry
from l2ul.methods.settings import SHARED, has_effect
from l2ul.sweeps import ranges
from l2ul.sweeps.ranges import Interval

PROGRAM = "main_sweep.py"
SINGLE = (  # flags of main_unlearn.py that are no part of the id of a run: one value each
    *("data_dir", "result_dir", "cache_dir", "cache_gib", "workers", "prefetch", "decoder", "device", "threads"),
    *("test_batch_size", "attack_batch_size", "cuda_graph", "retrained", "max_image_pixels"),
)
SPLIT = ("method", "unlearn_k", "seed")  # flags with several values, of which each trial has one
LISTS = (*SPLIT, "evaluate", "references", "mean", "std", "tracker")  # flags whose values belong to one command
OWN = ("search", "source_free", "address", "gpus_per_trial", "cpus_per_trial", "parallel", "slurm", "dry_run")
VALUES = """\
A flag with [... ...] takes one value, several values or, for numbers, a range. All combinations of the values are run.
1:5:9         9 values from 1 to 5, evenly spaced: 1 1.5 2 2.5 3 3.5 4 4.5 5
1e-4:1:log5   5 values from 1e-4 to 1 with evenly spaced logarithms: 0.0001 0.001 0.01 0.1 1
1:5           any number from 1 to 5, for --search to choose
1e-4:1:log    any number from 1e-4 to 1, for --search to choose with an evenly distributed logarithm"""
SEARCH_SAMPLE = 5000  # default of --retain-sample in a search

Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for.

    opts    the flags of OWN
    shared  arguments of main_unlearn.py that all trials have
    split   arguments of methods, k and seeds
    axes    values, or an Interval, of each flag that differs between trials
    """

    opts: argparse.Namespace
    shared: Arguments
    split: Arguments
    axes: dict[str, list[object] | Interval]

    @property
    def first(self) -> dict[str, object]:
        """The first value of each axis, or the lowest of an Interval."""
        return {name: axis.low if isinstance(axis, Interval) else axis[0] for name, axis in self.axes.items()}

    @property
    def first_options(self) -> argparse.Namespace:
        """The options of main_unlearn.py for these values. Flags without an axis have their value for all trials."""
        return unlearn_options.parse(self.arguments(self.first))

    @property
    def result_dir(self) -> Path:
        return self.first_options.result_dir

    def arguments(self, settings: dict[str, object]) -> Arguments:
        """Return the command line of main_unlearn.py for a value of each axis."""
        return (*self.trial_arguments(settings), *self.split)

    def trial_arguments(self, settings: dict[str, object]) -> Arguments:
        """Return the same without methods, k and seeds."""
        return (*self.shared, *itertools.chain.from_iterable(_arguments(*pair) for pair in settings.items()))


def parse(argv: Sequence[str] | None = None, description: str = "") -> Sweep:
    """Return the sweep that a command line asks for.

    argv  by default the command line of this process

    Raises InputError for what main_unlearn.py would refuse without data and weights.
    """
    parser = Parser(description, prog=PROGRAM)
    for add in unlearn_options.FLAG_GROUPS:
        add(parser)
    take_several(parser, SINGLE)
    _add_flags(parser)
    flags = settings_as_flags(vars(parser.parse_args(argv)))
    opts = argparse.Namespace(**{name: flags.pop(name, None) for name in OWN})
    for name, known in (("precision", choices.PRECISIONS), ("loop_precision", choices.LOOP_PRECISIONS)):
        if choices.AUTO in flags.get(name, ()):
            raise InputError(
                f"{option(name)} auto measures one model on one machine",
                f"a sweep takes one of {', '.join(known)}",
            )
    for name in ("threads", "workers"):  # the same for any number of trials at once, for the same results
        flags.setdefault(name, max(1, int(opts.cpus_per_trial)))
    if opts.search:
        flags.setdefault("retain_sample", SEARCH_SAMPLE)
    if opts.source_free:
        flags["evaluate"] = list(dict.fromkeys([*flags.get("evaluate", ()), "agreement"]))
    shared, split, axes = [], [], {}
    for name, value in flags.items():
        values = _flatten(name, value)
        if name in SPLIT:
            split += _arguments(name, values)
        elif name in LISTS or not isinstance(values, list):
            shared += _arguments(name, values)
        elif len(values) > 1:
            axes[name] = values
        elif isinstance(values[0], Interval):
            axes[name] = values[0]
        else:
            shared += _arguments(name, values[0])
    sweep = Sweep(opts, tuple(shared), tuple(split), axes)
    _check(sweep)
    return sweep


def _add_flags(parser: Parser) -> None:
    parser.sections["values and ranges"] = VALUES
    group = parser.add_argument_group("sweep")

    def add(flag: str, text: str, **keywords) -> None:
        options.add(group, flag, text, **keywords)

    add(
        "--search",
        "try N settings in place of all combinations; the best forget all of D_f and have the highest accuracy on D_r",
        type=positive_int,
    )
    add(
        "--source-free",
        "rank the settings of a search by the agreement with the original model on adversarial examples of mixes of "
        "D_f (metric_answers_kept); D_r is then not needed",
        action="store_true",
    )
    add(
        "--cpus-per-trial",
        "CPUs of a trial, and its threads unless --threads is given",
        type=positive_float,
        default=1.0,
    )
    add(
        "--gpus-per-trial",
        "GPUs of a trial; 0.25: four trials on a GPU (default: 1 if there are GPUs)",
        type=nonnegative_float,
    )
    add("--parallel", "maximum number of trials at once (default: as many as fit)", type=positive_int)
    add(
        "--address",
        "use the Ray cluster at this address; auto: the one of this machine (default: start one here)",
        metavar="HOST:PORT",
    )
    add(
        "--slurm",
        "print a SLURM job script that runs this command on a Ray cluster of N nodes (without a number: 1)",
        nargs="?",
        const=1,
        type=positive_int,
    )


def take_several(parser: Parser, single: Container[str]) -> None:
    """Let the flags of a parser take several values, and numbers also ranges (see `ranges.values`).

    Flags named in `single` keep taking one value. Flags lose their defaults: the result of `parse_args` lacks flags
    that are not given. The values of a range come as a list within the list.
    """
    for action in parser.flags:
        action.default = argparse.SUPPRESS
        if action.dest in single or action.nargs not in (None, "+"):
            continue
        action.nargs = "+"
        if isinstance(action.type, Number):
            action.type = functools.partial(ranges.values, kind=action.type)


def settings_as_flags(flags: dict[str, object]) -> dict[str, object]:
    """Return the flags given to a sweep with those of --setting that have a flag of their own moved to it.

    Raises InputError if one is given by its flag as well.
    """
    pairs, moved, own = [], {}, registry.own_flags()
    for name, text in flags.get("setting", []):
        if name not in SHARED and name not in own:
            pairs.append((name, text))
        elif name in flags:
            raise InputError(f"{option(name)} and --setting {name}={text} are both given", "give one")
        else:
            moved.setdefault(name, []).append(_values(name, text))
    others = {name: value for name, value in flags.items() if name != "setting"}
    return others | moved | ({"setting": pairs} if pairs else {})


def several_settings(pairs: Iterable[tuple[str, str]]) -> dict[str, list[object]]:
    """Return the values of each setting of --setting, ranges expanded. Raises InputError for a wrong one."""
    values: dict[str, list[object]] = {}
    for name, text in pairs:
        values.setdefault(name, []).extend(_values(name, text))
    return values


def _values(name: str, text: str) -> list[object]:
    kinds = [setting.type for setting in registry.find_settings(name)]
    kind = next((kind for kind in kinds if not (isinstance(kind, Number) and kind.kind is int)), kinds[0])
    return ranges.values(text, kind)


def _flatten(name: str, value: object) -> object:
    """Return the values of a flag in one list. The values of --setting are all combinations of its settings."""
    if not isinstance(value, list):
        return value
    if name == "setting":
        combinations = ranges.product(several_settings(value))
        return [tuple(f"{key}={one}" for key, one in chosen.items()) for chosen in combinations]
    return [one for part in value for one in (part if isinstance(part, list) else [part])]


def _arguments(name: str, value: object) -> Arguments:
    return ranges.words_of(f"--{name.replace('_', '-')}", value)


def _check(sweep: Sweep) -> None:
    """Raise InputError if flags contradict each other, or main_unlearn.py refuses the first of their values."""
    opts = sweep.opts
    intervals = [name for name, axis in sweep.axes.items() if isinstance(axis, Interval)]
    if any(isinstance(value, Interval) for name in sweep.axes.keys() - intervals for value in sweep.axes[name]):
        raise InputError("a range without a number of points must be the only value of its flag")
    if intervals and not opts.search:
        problem = f"{option(intervals[0])} is a range without a number of points"
        raise InputError(problem, "give it as lo:hi:n", "add --search N")
    if opts.source_free and not opts.search:
        raise InputError("--source-free only applies to a search", "add --search N")
    if opts.search and not sweep.axes:
        raise InputError("--search has nothing to choose", "give a flag several values or a range, as in --pgd-eps 1:5")
    if opts.search and "setting" in sweep.axes:
        raise InputError("--search cannot vary settings without a flag", "give one value of each in --setting")
    unlearn_opts = sweep.first_options
    if opts.search and len(unlearn_opts.method) > 1:
        raise InputError(f"--search is for one method, not {' '.join(unlearn_opts.method)}", "name one with --method")
    step, method = unlearn_opts.continual_step, unlearn_opts.method[0]
    axes = sweep.axes | {"k": [step] if step else unlearn_opts.unlearn_k or [None]}
    for name in sweep.axes.keys() & SHARED.keys() if opts.search else ():
        if not _has_effect(name, method, axes, options.hyper_parameters(unlearn_opts)):
            raise no_effect(name, f"has no effect with method {method} and the other settings")


def _has_effect(name: str, method: str, axes: dict[str, list[object] | Interval], others: dict[str, object]) -> bool:
    """Return whether the method uses a setting, and the setting has an effect for some values of the others.

    axes    values of the flags that the search varies, and of k
    others  values of all other settings
    """
    if name not in registry.get(method).all_settings:
        return False
    deciding = {"k", SHARED[name].only_with, *SHARED[name].without} & axes.keys()
    chosen = ranges.product({one: _ends(axes[one]) for one in deciding})
    return any(has_effect(name, others | values) for values in chosen)


def _ends(axis: list[object] | Interval) -> list[object]:
    return [axis.low, axis.high] if isinstance(axis, Interval) else axis


def no_effect(name: str, why: str) -> InputError:
    """Return the error for a flag that a search cannot vary, whose records would not tell its values apart."""
    return InputError(f"--search cannot vary {option(name)}, which {why}", "leave it out", "give one value")
