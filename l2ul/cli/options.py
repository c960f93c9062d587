"""The flags that scripts share, in groups. This module does not import torch, so that `--help` is quick."""

import argparse
from collections.abc import Iterable
import os
from pathlib import Path
import textwrap
from typing import TYPE_CHECKING

from l2ul.cli.parser import (
    Group,
    Parser,
    finite_float,
    nonnegative_int,
    positive_float,
    positive_int,
    setting,
    whole_number,
)
from l2ul.common import choices, tracking
from l2ul.common.choices import Number, OneOf
from l2ul.common.errors import InputError, option
from l2ul.experiments import defaults
from l2ul.experiments.defaults import COMMON_DEFAULTS, DEFAULTS, default
from l2ul.methods import registry
from l2ul.methods.settings import ATTACK, SHARED, Setting, to_text
from l2ul.metrics.registry import EVALUATIONS

if TYPE_CHECKING:
    from l2ul.data.image_files import ImageReader
    from l2ul.data.images import Images
    from l2ul.data.surrogate import Surrogate


def add_data(parser: Parser, dataset: str = "digits", model: str | None = None) -> None:
    group = parser.add_argument_group("data and model")
    add(
        group,
        "--dataset",
        "digits, cifar10, cifar100, mnist, fashion_mnist, utkface, imagenet, hf:NAME_OR_FOLDER, or a folder in "
        "--data-dir that contains train and val. hf:NAME is a data set of the Hugging Face Hub, hf:NAME:CONFIGURATION "
        "one of its configurations, hf:FOLDER a folder that save_to_disk of the package datasets wrote",
        default=dataset,
        metavar="NAME",
    )
    add(
        group,
        "--data-dir",
        "folder with cifar-10-batches-py, cifar-100-python, MNIST, FashionMNIST, utkface, imagenet/train and "
        "imagenet/val, and weights",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
    )
    add(
        group,
        "--image-size",
        "side of the square crop of images in a folder, in pixels (default: 224, or that of images which are smaller "
        "squares of one size; for hf: only if the images are not squares of one size); for utkface the side before "
        "cropping to 15/16 of it (default: 128)",
        type=positive_int,
    )
    for flag, text, kind in (
        ("--image-column", "column of the images in a data set hf: (default: the only image column, or image)", "NAME"),
        ("--label-column", "column of the labels in a data set hf: (default: the only label column, or label)", "NAME"),
        ("--train-split", "training split of a data set hf:, or a part such as train[:80%] (default: train)", "SPLIT"),
        ("--test-split", "test split of a data set hf:, or a part (default: test, else validation)", "SPLIT"),
    ):
        add(group, flag, text, metavar=kind)
    add(group, "--age-grouping", "classes of utkface", choices=tuple(choices.AGE_GROUPINGS), default="TNN")
    add(group, "--split-seed", "seed of the split of utkface", type=nonnegative_int, default=0)
    text = "processes that decode images of a folder (default: the number of cores, at most 16)"
    add(group, "--workers", text, type=nonnegative_int, default=default_workers())
    add(group, "--prefetch", "batches that each worker decodes ahead", type=positive_int, default=choices.PREFETCH)
    add(
        group,
        "--decoder",
        "where images of a folder are decoded; gpu uses nvJPEG on a CUDA GPU",
        choices=choices.DECODERS,
        default="cpu",
    )
    add_image_files(group)
    add(
        group,
        "--model",
        "resnet18|34|50, the same with _nopool or _cifar100, resnet20|32|44|56, mobilenet_v2, squeezenet1_1, "
        "densenet121, lenet, torchvision:NAME, timm:NAME_OR_FOLDER or hf:NAME_OR_FOLDER",
        metavar="NAME",
        **({"default": model} if model else {}),
    )
    mean = (
        "mean of each input channel (3, or 1 for grey images), for pixels in [0,1] (default: that of the weights, else "
        "of the model)"
    )
    add(group, "--mean", mean, type=finite_float, nargs="+")
    add(
        group,
        "--std",
        "standard deviation of each input channel (default: as for --mean)",
        type=positive_float,
        nargs="+",
    )


def default_workers() -> int:
    """Return the default of --workers: the cores of this process, at most 16; under torchrun, its share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def add_image_files(group: Group, default: str = "") -> None:
    """Add the flags of `image_reader`. `default` describes --exif-orientation where it is None without the flag."""
    orientation = None if default else choices.EXIF_ORIENTATIONS[0]
    text = (
        "read the pixels of image files as stored, as torchvision's ImageFolder does, or turn the images upright as "
        "their EXIF orientation says"
    )
    text += f" (default: {default})" if default else ""
    add(group, "--exif-orientation", text, choices=choices.EXIF_ORIENTATIONS, default=orientation)
    add(
        group,
        "--white-level",
        "value of white in grey image files of more than 8 bits, such as 4095 for 12-bit images in files of 16 bits "
        "(default: the largest value of the type of the file, for example 65535)",
        type=positive_float,
    )
    add(
        group,
        "--max-image-pixels",
        "refuse image files with more than N pixels",
        type=positive_int,
        default=choices.MAX_IMAGE_PIXELS,
    )


def image_reader(options: argparse.Namespace) -> "ImageReader":
    """Return the reader of image files that the flags of `add_image_files` describe."""
    from l2ul.data.image_files import ImageReader  # imports Pillow

    return ImageReader(options.exif_orientation, options.white_level, options.max_image_pixels)


def add_weights(parser: Parser) -> None:
    group = parser.add_argument_group("weights")
    add(
        group,
        "--checkpoint",
        "file with the weights of the model, or for torchvision:NAME the name of one of its pretrained weights "
        "(default: <data-dir>/weights/<dataset>_<model>.safetensors, else the path of the released scripts)",
        metavar="FILE",
    )
    add(
        group,
        "--weights-key",
        "which weights of a checkpoint with several, such as model_ema (default: the only ones that fit)",
        metavar="KEY",
    )
    add_single_label(group)


def add_single_label(group: Group) -> None:
    """Add --single-label, which all scripts that open a classifier share."""
    text = "accept a model whose outputs look like those of a multi-label model; the largest logit is its prediction"
    add(group, "--single-label", text, action="store_true")


def add_machine(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    add(group, "--device", "device to compute on (default: the best available one)", choices=choices.DEVICES)
    add(group, "--no-cuda", "do not use a CUDA GPU", action="store_true")
    text = "number of CPU threads (default: that of torch, or fewer if other processes use the CPU at the start)"
    add(group, "--threads", text, type=positive_int)


def add_speed(parser: Parser) -> None:
    group = parser.add_argument_group("speed")
    add(
        group,
        "--precision",
        f"{SHARED['precision'].help}. auto: bf16 on a CUDA GPU; on a CPU the faster of bf16 and fp32, measured at the "
        f"start (default: tf32 on a CUDA GPU, else fp32)",
        choices=(choices.AUTO, *choices.PRECISIONS),
        default=None,
    )
    add(
        group,
        "--loop-precision",
        f"{SHARED['loop_precision'].help}. auto: bf16 where it is the faster, as with --precision auto",
        choices=(choices.AUTO, *choices.LOOP_PRECISIONS),
    )
    add(
        group,
        "--cache-dir",
        "folder in which adversarial examples, synthesised images and predictions of the original model are stored for "
        "later runs",
        type=Path,
        default=defaults.CACHE_DIR,
    )
    add(
        group,
        "--cache-gib",
        "largest size of that folder in GiB; the least recently used files are deleted",
        type=positive_float,
        default=10,
    )
    add(group, "--no-cache", "do not read or write that folder", action="store_true")


def add_attack(parser: Parser) -> None:
    group = parser.add_argument_group("adversarial examples of D_f (methods adv and adv_imp)")
    add_settings(group, [name for name in ATTACK if name != "precision"])
    add(
        group,
        "--attack-batch-size",
        "examples per batch, halved when memory runs out (default: CPU 128, MPS 512, CUDA 2048; an eighth for large "
        "images)",
        type=positive_int,
    )


def add_distill(parser: Parser) -> None:
    group = parser.add_argument_group("method distill")
    add(
        group,
        "--surrogate",
        "unlabelled images of the same kind as D_r, or public ones of other classes, used in its place: a folder; test "
        "or validation of the data set, or a range of its images such as test:0-5000; or the name of another data set. "
        "D_test is measured on the test images that are not among them (default: stand-ins made of D_f)",
        metavar="NAME",
    )
    add_settings(group, [name for name, one in SHARED.items() if "teacher" in one.used_by])


def add_own_settings(parser: Parser) -> None:
    """Add --setting, and a flag for each setting that a user's method declares."""
    group = parser.add_argument_group("settings of a single method")
    add(
        group,
        "--setting",
        "settings of the chosen methods. A setting with a flag has the name of the flag with underscores, such as "
        "unlearn_lr=0.01. The others are listed with the methods below, such as epochs=3 (default: none)",
        nargs="+",
        action="extend",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
    )
    parser.add_argument(
        "--course", nargs="+", action="extend", type=setting, dest="setting", default=[], help=argparse.SUPPRESS
    )
    for name, one in registry.own_flags().items():
        users = [method.name for method in registry.METHODS.values() if one in method.settings]
        text = f"{one.help}, for method {' '.join(users)}".lstrip(", ")
        add(group, one.flag, f"{_with_unit(text, one)} (default: {one.default})", type=one.type, dest=name)


def add_unlearning(parser: Parser) -> None:
    group = parser.add_argument_group("unlearning")
    usual = "default: the methods of the paper and distill, as far as they support the goal"
    add(group, "--method", f"one or more methods, listed below ({usual})", type=method_name, nargs="+", metavar="NAME")
    goal = "misclassify: the model must not predict the true classes of D_f; relabel: it must predict new labels"
    add(group, "--goal", goal, choices=choices.GOALS, default="misclassify")
    add(
        group,
        "--unlearn-k",
        "number of images to forget, one or more; with --forget-file or --forget-dir by default all",
        type=whole_number,
        nargs="+",
    )
    seeds = "seed of the choice of D_f, the attack and the loop, one or more"
    add(group, "--seed", seeds, type=nonnegative_int, nargs="+", default=[0])
    add(
        group,
        "--forget-file",
        "file that lists D_f, one training image per line (default: a random choice). A line is an index in the "
        "training set, from 0, or for a data set in a folder also the name of a file, such as cat/7.png. With "
        "--unlearn-k K, the first K lines are used",
        type=Path,
    )
    add(
        group,
        "--forget-dir",
        "folder with the images of D_f in a subfolder per class, in place of training images. With --goal relabel, D_f "
        "are the images that the model misclassifies, and their new labels are the names of their folders",
        type=Path,
        metavar="FOLDER",
    )
    add(
        group,
        "--continual-step",
        "continual unlearning: D_f arrives N images at a time, and each step starts from the model of the step before",
        type=positive_int,
    )
    add(
        group,
        "--relabel-file",
        "file with the new labels for --goal relabel, one per line in the order of D_f (default: random other classes)",
        type=Path,
    )
    elsewhere = {*ATTACK, "loop_precision"}
    loop = [name for name, one in SHARED.items() if name not in elsewhere and "teacher" not in one.used_by]
    add_settings(group, loop)
    add_cuda_graph(group, "the steps of neggrad, correct, oracle, adv, adv_imp and distill")
    parser.sections["methods"] = _methods_text()
    parser.sections["defaults"] = DEFAULTS_NOTE


def add_tracker(group: Group, place: str) -> None:
    """Add --tracker. `place` says where its files are written."""
    text = f"follow the curve, settings and result of each run with these trackers, in {place} (default: none)"
    add(group, "--tracker", text, choices=tuple(tracking.TRACKERS), nargs="+", default=[])


def add_output(parser: Parser) -> None:
    group = parser.add_argument_group("results")
    records = "folder for results; records are written to its subfolder runs"
    add(group, "--result-dir", records, type=Path, default=Path("result_data"))
    add_test_batch_size(group)
    add(
        group,
        "--retain-sample",
        "measure accuracy on a fixed sample of N images of D_r, with a 95 % interval (default: on all)",
        type=positive_int,
    )
    add(
        group,
        "--evaluate",
        "further metrics, in groups that are listed below (default: accuracies only)",
        nargs="+",
        choices=tuple(EVALUATIONS),
        default=[],
        metavar="NAME",
    )
    parser.sections["metrics"] = _list((name, group.summary) for name, group in EVALUATIONS.items())
    weights = "weights of a model that was trained without D_f, for --evaluate retrained and relearn"
    add(group, "--retrained", weights, type=Path, metavar="FILE")
    weights = "weights of several such models, for --evaluate rmia"
    add(group, "--references", weights, type=Path, nargs="+", metavar="FILE")
    add_tracker(group, "the subfolder tracking")
    add(group, "--save-model", "save each unlearned model in the subfolder models", action="store_true")
    add(group, "--rerun", "repeat runs that have a record", action="store_true")
    add(group, "--dry-run", "check everything and list the runs, but do not start them", action="store_true")


def add_cuda_graph(group: Group, what: str) -> None:
    text = f"auto: on a CUDA GPU, run {what} as CUDA graphs, so that small networks do not wait for the launch of each "
    add(group, "--cuda-graph", f"{text}kernel (default: auto)", choices=("auto", "off"), default="auto")


def add_test_batch_size(group: Group) -> None:
    text = "images per batch when measuring (default: CPU 256, MPS 512, CUDA 2048; for large images 64, 64 and 256)"
    add(group, "--test-batch-size", text, type=positive_int)


DEFAULTS_NOTE = """\
Some defaults depend on the data set. (default: 0.001; digits: 0.01) means 0.01 for the data set digits and 0.001 for
all others."""


def add_settings(group: Group, names: Iterable[str]) -> None:
    """Add the flags of shared settings. Their value is None if they are not given, see `fill_defaults`."""
    for name in names:
        one = SHARED[name]
        add(group, one.flag, _with_unit(one.help, one), type=one.type)


def _with_unit(text: str, one: Setting) -> str:
    return f"{text}, in {one.unit}" if one.unit else text


def add(group: Group | Parser, flag: str, text: str, required: bool = False, **keywords) -> argparse.Action:
    """Add a flag to a group. Its help ends in its default: that of each data set if there is one, else `default`.

    Keywords are those of argparse; `choices` are checked with a suggestion for a mistyped value.
    """
    name = flag.removeprefix("--").replace("-", "_")
    if "choices" in keywords:
        keywords["type"] = OneOf(tuple(keywords.pop("choices")))
    kind = keywords.get("type")
    if isinstance(kind, OneOf) and not kind.several:
        keywords.setdefault("metavar", f"{{{','.join(kind.names)}}}")
    elif isinstance(kind, Number):
        keywords.setdefault("metavar", "N" if kind.kind is int else "X")
    elif kind is Path:
        keywords.setdefault("metavar", "PATH")
    elif "action" not in keywords:
        keywords.setdefault("metavar", "X")
    if required:
        text += " (required)"
    elif name in COMMON_DEFAULTS and "default" not in keywords:
        text += f" {_by_dataset(name)}"
    elif keywords.get("default") not in (None, []) and "(default" not in text:
        text += f" (default: {_shown(keywords['default'])})"
    text = text.replace("%%", "%").replace("%", "%%")  # which argparse formats
    return group.add_argument(flag, help=text, required=required, **keywords)


def _by_dataset(flag: str) -> str:
    others = "".join(f"; {name}: {_shown(row[flag])}" for name, row in DEFAULTS.items() if flag in row)
    return f"(default: {_shown(COMMON_DEFAULTS[flag])}{others})"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _methods_text() -> str:
    """Return the list of methods for --help: those that run by default, then those of other papers."""
    rows = {False: [], True: []}
    for method in registry.METHODS.values():
        text = f"{method.summary}; needs D_r" if "retain" in method.needs else method.summary
        if method.is_fixed_length:
            text += f". Settings: {to_text({one.name: one.default for one in method.settings})}"
        elif len(method.goals) == 1:
            text += f"; for the goal {method.goals[0]}"
        rows[method.is_fixed_length].append((method.name, text))
    title = "methods of other papers, with a fixed number of steps, for the goal misclassify; they run only when named:"
    return f"{_list(rows[False])}\n\n{title}\n{_list(rows[True])}"


def _list(rows: Iterable[tuple[str, str]]) -> str:
    indent = " " * 18
    return "\n".join(textwrap.fill(f"{name:17} {text}", 106, subsequent_indent=indent) for name, text in rows)


def method_name(text: str) -> str:
    """Return the name of a method. Raises InvalidValue for another text."""
    try:
        return registry.get(text).name
    except InputError as error:
        raise choices.InvalidValue(error.problem, *error.advice) from None


def load_data(options: argparse.Namespace, whole_train: bool = False) -> "Images":
    """Load the data set that the flags of `add_data` name."""
    from l2ul.common.progress import progress_bar  # imports torch
    from l2ul.data import datasets

    names = "image_size", "age_grouping", "split_seed", "workers", "prefetch", "decoder", *choices.HUB_OPTIONS
    return datasets.load(
        options.dataset,
        options.data_dir,
        whole_train=whole_train,
        reader=image_reader(options),
        progress=progress_bar,
        **{name: getattr(options, name) for name in names},
    )


def load_surrogate(options: argparse.Namespace, images: "Images") -> "tuple[Surrogate, Images]":
    """Return the set that --surrogate names, and the data set without it."""
    from l2ul.data import surrogate  # imports torch

    def load(name: str) -> "Images":
        others = {"dataset": name, "image_size": images.side} | dict.fromkeys(choices.HUB_OPTIONS)
        return load_data(argparse.Namespace(**vars(options) | others))

    return surrogate.read(options.surrogate, images, load, image_reader(options))


def data_label(options: argparse.Namespace) -> str:
    """Return the name of the data set in the name of a file of weights: for utkface with its grouping."""
    if options.dataset.startswith("hf:"):
        from l2ul.data import huggingface  # imports torch

        return huggingface.record_name(options.dataset, options.data_dir)
    return f"{options.dataset}_{options.age_grouping}" if options.dataset == "utkface" else options.dataset


def fill_defaults(options: argparse.Namespace) -> None:
    """Complete parsed options in place.

    `method` and `seed` lose repeated values. Values of --setting move to the flags of the same name; `setting` becomes
    a dictionary of the settings that single methods declare. Flags that were not given get the data set's defaults.

    Raises InputError if a method is unknown or does not support the goal, if none of the methods has a setting, or if a
    flag and --setting differ.
    """
    options.method = list(dict.fromkeys(options.method or registry.usual(options.goal)))
    for name in options.method:
        registry.get(name, options.goal)
    options.seed = list(dict.fromkeys(options.seed))
    own = {name: getattr(options, name) for name in registry.own_flags()}
    own = {name: value for name, value in own.items() if value is not None}
    for name in own:
        registry.find_settings(name, options.method)
    for name, value in registry.parse_settings(options.setting, options.method).items():
        by_flag = own.get(name) if name not in SHARED else getattr(options, name)
        if by_flag not in (None, value):
            flag = option(name)
            raise InputError(f"{flag} {by_flag} and --setting {name}={value} contradict each other", "give one of them")
        if name in SHARED:
            setattr(options, name, value)
        else:
            own[name] = value
    options.setting = own
    for flag in COMMON_DEFAULTS.keys() - {"precision"}:  # whose default depends on the device
        listed = flag == "unlearn_k" and (options.forget_file or options.forget_dir)
        if getattr(options, flag, ...) is None and not listed:
            setattr(options, flag, default(options.dataset, flag))


def hyper_parameters(options: argparse.Namespace) -> dict[str, object]:
    """Return the values of all settings, as `experiments.runs.Setup` takes them, from options with their defaults."""
    return {name: getattr(options, name) for name in SHARED} | {"method_settings": options.setting}
