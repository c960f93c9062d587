"""The flags that the scripts share, in groups."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from l2ul.cli.parser import (
    Parser,
    finite_float,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    setting,
)
from l2ul.common import choices
from l2ul.common.errors import InputError
from l2ul.experiments import defaults
from l2ul.experiments.defaults import COMMON_DEFAULTS, DEFAULTS, default
from l2ul.methods import fixed_length, registry

if TYPE_CHECKING:
    from l2ul.data.images import Images


def add_data(parser: Parser, dataset: str = "digits", model: str | None = None) -> None:
    group = parser.add_argument_group("data and classifier")
    add(
        group,
        "--dataset",
        "digits, cifar10, cifar100, utkface, imagenet, or any folder below --data-dir that holds train and val",
        default=dataset,
        metavar="NAME",
    )
    add(
        group,
        "--data-dir",
        "holds cifar-10-batches-py, cifar-100-python, utkface, imagenet/train and imagenet/val, weights",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
    )
    add(
        group,
        "--image-size",
        "side of the square cut from images of a folder (default: 224); of utkface, of the images before 15/16 of a "
        "side are cut out (default: 128)",
        type=positive_int,
    )
    add(group, "--age-grouping", "classes of utkface", choices=tuple(choices.AGE_GROUPINGS), default="TNN")
    add(group, "--split-seed", "of the split of utkface", type=nonnegative_int, default=0)
    add(group, "--workers", "processes that decode images of a folder", type=nonnegative_int, default=2)
    add(group, "--prefetch", "batches that each of them decodes ahead", type=positive_int, default=choices.PREFETCH)
    add(group, "--decoder", "of such images; gpu: nvJPEG, on a CUDA GPU", choices=choices.DECODERS, default="cpu")
    add(
        group,
        "--model",
        "resnet18|34|50, resnet18|34|50_cifar100, resnet20|32|44|56, mobilenet_v2, squeezenet1_1, densenet121, "
        "torchvision:NAME or hf:NAME_OR_FOLDER",
        metavar="NAME",
        **({"default": model} if model else {}),
    )
    add(group, "--mean", "input means a channel (default: the weights' or the model's)", type=finite_float, nargs=3)
    add(group, "--std", "input standard deviations a channel, likewise", type=positive_float, nargs=3)


def add_weights(parser: Parser) -> None:
    group = parser.add_argument_group("weights")
    add(
        group,
        "--checkpoint",
        "weights of the model, a file; for torchvision:NAME also the name of one of its own sets of weights "
        "(default: <data-dir>/weights/<dataset>_<model>.safetensors, then the released scripts' layout)",
        metavar="FILE",
    )


def add_machine(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    add(group, "--device", "where to compute (default: the best there is)", choices=choices.DEVICES)
    add(group, "--no-cuda", "do not use a CUDA GPU", action="store_true")
    add(group, "--threads", "CPU threads (default: torch's choice)", type=positive_int)


def add_speed(parser: Parser) -> None:
    group = parser.add_argument_group("speed")
    add(
        group,
        "--precision",
        "fp32; on a CUDA GPU: tf32, faster, in all passes; there or on a CPU with AMX: bf16, fastest, in the attack",
        choices=choices.PRECISIONS,
    )
    add(
        group,
        "--cache-dir",
        "adversarial examples, and what the classifier calls all images, are kept there and not computed again",
        type=Path,
        default=defaults.CACHE_DIR,
    )
    add(group, "--cache-gib", "how large it may grow; the longest unused is deleted", type=positive_float, default=10)
    add(group, "--no-cache", "keep nothing there, and take nothing from there", action="store_true")


def add_attack(parser: Parser) -> None:
    group = parser.add_argument_group("adversarial examples (methods adv and adv_imp)")
    add(group, "--num-adv-images", "examples of each image of D_f", type=positive_int)
    add(group, "--pgd-eps", "radius ε, an L2 norm over pixels in [0,1]", type=nonnegative_float)
    add(group, "--pgd-alpha", "length of a step, likewise", type=nonnegative_float)
    add(group, "--pgd-iter", "steps", type=positive_int)
    add(group, "--adv-dtype", "as which they are kept; uint8: rounded to valid 8-bit images", choices=choices.DTYPES)
    add(
        group,
        "--attack-batch-size",
        "pairs of image and target attacked at once, halved where memory runs out (default: CPU 128, MPS 512, CUDA "
        "2048, of large images an eighth)",
        type=positive_int,
    )


def add_distill(parser: Parser) -> None:
    group = parser.add_argument_group("method distill")
    add(group, "--distill-lr", "highest learning rate of a cycle, of Adam", type=positive_float)
    add(group, "--distill-steps", "of a cycle, which ends at a rate of nearly 0", type=positive_int)
    add(group, "--distill-cycles", "at most: another begins while D_f is not forgotten", type=positive_int)
    add(group, "--distill-forget", "images of D_f a step, of those that are not forgotten yet", type=positive_int)
    add(group, "--distill-mixes", "mixes of D_f a step, which stand for D_r", type=positive_int)
    add(group, "--distill-logits", "weight of keeping the logits on the mixes", type=nonnegative_float)
    add(group, "--distill-features", "weight of keeping the features there", type=nonnegative_float)
    add(group, "--distill-growth", "of the forget loss over a cycle, while an image is left", type=positive_float)
    add(group, "--distill-margin", "by which another logit must lead on D_f", type=nonnegative_float)


def add_course(parser: Parser) -> None:
    group = parser.add_argument_group("methods of fixed length, which others have published")
    settings = {name: method.settings for name, method in registry.METHODS.items() if method.settings}
    shown = "; ".join(f"{name}: {fixed_length.told(own)}" for name, own in settings.items())
    add(
        group,
        "--course",
        f"settings in place of theirs, for those of the methods that have them (theirs: {shown}; default: none)",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
    )


def add_unlearning(parser: Parser) -> None:
    group = parser.add_argument_group("unlearning")
    summaries = "; ".join(f"{name}: {method.summary}" for name, method in registry.METHODS.items())
    usual = "all that are for the goal and not of fixed length"
    add(group, "--method", f"one or more of {summaries} (default: {usual})", nargs="+")
    add(group, "--goal", "what forgetting means", choices=choices.GOALS, default="misclassify")
    add(group, "--unlearn-k", "images to forget, one number or more", type=int, nargs="+")
    add(group, "--seed", "of forget set, attack and loop, one or more", type=nonnegative_int, nargs="+", default=[0])
    add(
        group,
        "--forget-file",
        "indices of D_f in the training set, one a line, in place of a random choice; the first K, by default all",
        type=Path,
    )
    add(
        group,
        "--forget-dir",
        "images of D_f in a folder that holds a folder a class, in place of training images. To relabel: those of them "
        "that the model gets wrong, which are to be called their folder's class",
        type=Path,
        metavar="FOLDER",
    )
    add(
        group,
        "--continual-step",
        "D_f arrives so many images at a time; each step starts from the net of the last and sees its own images alone",
        type=positive_int,
    )
    add(
        group,
        "--relabel-file",
        "new labels for --goal relabel, one a line in the order of D_f (default: random other classes)",
        type=Path,
    )
    add(group, "--unlearn-lr", "learning rate of SGD", type=positive_float)
    add(group, "--momentum", "of SGD", type=nonnegative_float)
    add(group, "--weight-decay", "of SGD", type=nonnegative_float)
    add(group, "--batch-size", "images of D_f a step", type=positive_int)
    add(group, "--adv-batch-size", "images of D_adv (oracle: of D_r) a step", type=positive_int)
    add(group, "--reg-lamb", "weight λ of the importance penalty", type=nonnegative_float)
    add(
        group,
        "--max-passes",
        "times through D_adv (oracle: D_r; neggrad, correct: D_f; rawp: draws of noise) before giving up",
        type=positive_int,
    )
    add(
        group,
        "--noise-growth",
        "what σ of rawp's noise grows by a draw, in parts of a tensor's root mean square",
        type=positive_float,
    )
    add(
        group,
        "--bn",
        "train: batch-norm learns and updates its statistics, as the released scripts do; eval: they are kept, and "
        "dropout is off",
        choices=choices.BN_MODES,
    )


def add_output(parser: Parser) -> None:
    group = parser.add_argument_group("results")
    add(group, "--result-dir", "records are written to runs in it", type=Path, default=Path("result_data"))
    add(
        group,
        "--test-batch-size",
        "images a batch when measuring (default: CPU 256; CUDA 2048, MPS 512, of large images an eighth)",
        type=positive_int,
    )
    add(
        group,
        "--retain-sample",
        "measure D_r on so many training images, always the same ones, with a 95 %% interval (default: on all)",
        type=positive_int,
    )
    add(group, "--evaluate", _evaluations(), nargs="+", choices=tuple(choices.EVALUATIONS), default=[])
    add(group, "--retrained", "weights of a net trained without D_f, to evaluate against", type=Path, metavar="FILE")
    add(group, "--references", "of several such, for the attack rmia", type=Path, nargs="+", metavar="FILE")
    add(group, "--save-model", "keep each unlearned net, in models beside runs", action="store_true")
    add(group, "--rerun", "do runs again whose record exists", action="store_true")
    add(group, "--dry-run", "check everything, list the runs and which are done, run none", action="store_true")


RUN_GROUPS = (
    add_data,
    add_unlearning,
    add_attack,
    add_distill,
    add_course,
    add_output,
    add_speed,
)  # what decides a run, or where it goes


def add(group: argparse._ArgumentGroup, flag: str, text: str, **keywords) -> argparse.Action:
    """Add a flag; its help ends in its default: the data set's where it has one, else the one given here."""
    name = flag.removeprefix("--").replace("-", "_")
    if keywords.get("type") in (positive_int, nonnegative_int, int):
        keywords.setdefault("metavar", "N")
    elif keywords.get("type") is Path:
        keywords.setdefault("metavar", "PATH")
    elif "choices" not in keywords and "action" not in keywords:
        keywords.setdefault("metavar", "X")
    if name in COMMON_DEFAULTS and "default" not in keywords:
        text += f" {_by_dataset(name)}"
    elif keywords.get("default") not in (None, []) and "(default" not in text:
        text += f" (default: {_shown(keywords['default'])})"
    return group.add_argument(flag, help=text, **keywords)


def _by_dataset(flag: str) -> str:
    rows = {
        name: row[flag]
        for name, row in DEFAULTS.items()
        if row.get(flag, COMMON_DEFAULTS[flag]) != COMMON_DEFAULTS[flag]
    }
    others = "".join(f"; {name}: {_shown(value)}" for name, value in rows.items())
    return f"(default: {_shown(COMMON_DEFAULTS[flag])}{others})"


def _evaluations() -> str:
    groups = "; ".join(f"{name}: {summary}" for name, summary in choices.EVALUATIONS.items())
    return f"measure more: {groups} (default: accuracies alone)".replace("%", "%%")


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def load_data(options: argparse.Namespace, whole_train: bool = False) -> "Images":
    """Load the data set that the flags of `add_data` name."""
    from l2ul.common.progress import progress_bar  # imports torch
    from l2ul.data import datasets

    return datasets.load(
        options.dataset,
        options.data_dir,
        image_size=options.image_size,
        age_grouping=options.age_grouping,
        split_seed=options.split_seed,
        whole_train=whole_train,
        workers=options.workers,
        prefetch=options.prefetch,
        decoder=options.decoder,
        progress=progress_bar,
    )


def data_label(options: argparse.Namespace) -> str:
    """What the weights of a data set are named after: the data set, and which of its groupings."""
    return f"{options.dataset}_{options.age_grouping}" if options.dataset == "utkface" else options.dataset


def fill_defaults(options: argparse.Namespace) -> None:
    """Give every flag that was not given its data set's default; no method and no seed twice."""
    for flag in COMMON_DEFAULTS:
        listed = flag == "unlearn_k" and (options.forget_file or options.forget_dir)
        if getattr(options, flag, ...) is None and not listed:
            setattr(options, flag, default(options.dataset, flag))
    options.method = list(dict.fromkeys(options.method or registry.usual(options.goal)))
    options.seed = list(dict.fromkeys(options.seed))
    options.course = dict(options.course)
    known = {name for chosen in options.method for name in registry.get(chosen).settings or ()}
    for name in sorted(options.course.keys() - known):
        raise InputError(
            f"--course sets {name}, which none of the methods {' '.join(options.method)} has; "
            f"expected {', '.join(sorted(known)) or 'a method of fixed length'}"
        )
