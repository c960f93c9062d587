"""The command line of main_unlearn.py, checked as far as possible without data and weights. Does not import torch."""

import argparse
from collections.abc import Sequence

from l2ul.cli import options, push
from l2ul.common import tracking
from l2ul.common.errors import InputError
from l2ul.methods import registry
from l2ul.metrics.registry import EVALUATIONS

PROGRAM = "main_unlearn.py"
FLAG_GROUPS = (
    *(options.add_data, options.add_weights, options.add_unlearning, options.add_attack, options.add_distill),
    *(options.add_own_settings, options.add_output, options.add_speed, options.add_machine),
)


def parse(argv: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    """Return the options of a command line, with the defaults of the data set.

    argv  by default the command line of this process

    Raises InputError, or exits with 2 as argparse does, if options are not allowed or contradict each other.
    """
    parser = options.Parser(description, prog=PROGRAM)
    for add in FLAG_GROUPS:
        add(parser)
    push.add_push(parser.add_argument_group("upload"), "with --save-model and one method, k and seed")
    opts = parser.parse_args(argv)
    options.fill_defaults(opts)
    if opts.unlearn_k and min(opts.unlearn_k) < 1:
        raise InputError(f"--unlearn-k is {min(opts.unlearn_k)}", "expected 1 or more images to forget")
    _check_forget_set(opts)
    _check_evaluations(opts)
    tracking.require_packages(opts.tracker)
    _check_push(opts)
    return opts


def _check_forget_set(opts: argparse.Namespace) -> None:
    """Raise InputError if the options about D_f contradict each other."""
    if opts.relabel_file and opts.goal != "relabel":
        raise InputError("--relabel-file is given but the goal is misclassify", "add --goal relabel")
    if opts.relabel_file and not opts.forget_file and len(opts.seed) > 1:
        raise InputError("--relabel-file fits one D_f, but each of several seeds chooses another", "add --forget-file")
    if opts.forget_dir and (opts.forget_file or opts.relabel_file):
        raise InputError("--forget-dir names images and their classes", "leave out --forget-file and --relabel-file")
    step = opts.continual_step
    if step and opts.unlearn_k and (len(opts.unlearn_k) > 1 or opts.unlearn_k[0] % step):
        raise InputError(
            f"--continual-step is {step} and --unlearn-k is {' '.join(map(str, opts.unlearn_k))}",
            f"expected one multiple of the step, such as {4 * step}",
        )


def _check_push(opts: argparse.Namespace) -> None:
    """Raise InputError if --push is given for anything but the saved model of one run."""
    if opts.push is None:
        return
    if not opts.save_model:
        raise InputError(f"--push {opts.push} uploads the unlearned model, which is not saved", "add --save-model")
    several = {"method": opts.method, "unlearn-k": opts.unlearn_k or (), "seed": opts.seed}
    flag = next((flag for flag, values in several.items() if len(values) > 1), None)
    if flag:
        values = " ".join(map(str, several[flag]))
        raise InputError(f"--push {opts.push} uploads one model, but --{flag} is {values}", "give one of them")
    if opts.continual_step:
        raise InputError(f"--push {opts.push} uploads one model, but --continual-step makes several", "leave out one")
    if not registry.get(opts.method[0], opts.goal).trains:
        raise InputError(f"--push {opts.push} uploads an unlearned model, but {opts.method[0]} makes none")


def _check_evaluations(opts: argparse.Namespace) -> None:
    """Raise InputError if a group of metrics lacks the models it compares with, or models are given that none uses."""
    for flag, paths in (("retrained", opts.retrained), ("references", opts.references)):
        compared = {name: getattr(group, flag) for name, group in EVALUATIONS.items() if getattr(group, flag)}
        lacking = [name for name in opts.evaluate if compared.get(name) == EVALUATIONS[name].names and not paths]
        if lacking:
            raise InputError(
                f"--evaluate {lacking[0]} compares with models trained without D_f",
                f"train them with a main_pretrain script and --exclude, and name their weights with --{flag}",
            )
        if paths and not compared.keys() & set(opts.evaluate):
            groups = " or ".join(f"--evaluate {name}" for name in compared)
            raise InputError(f"--{flag} is given, but no metric uses it", f"add {groups}")
