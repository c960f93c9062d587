"""The command of the main_pretrain_*.py scripts: parse the options of a recipe, train, save the weights.

torch is imported after the command line is parsed, so that `--help` answers quickly.
"""

import argparse
from collections.abc import Mapping
import dataclasses
from pathlib import Path
import time
from typing import TYPE_CHECKING

from l2ul.cli import exit_codes, options
from l2ul.cli.parser import nonnegative_float, nonnegative_int, positive_float, positive_int
from l2ul.common import choices, tracking
from l2ul.common.errors import InputError
from l2ul.common.files import require_writable
from l2ul.common.progress import format_duration, progress_bar
from l2ul.training.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from l2ul.data.images import Images, Split

AFTER_STOP = "repeat the command with --resume to continue after the last saved epoch"


def main(
    program: str,
    doc: str,
    dataset: str,
    model: str,
    recipe: Recipe,
    by_grouping: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Run a pretraining script.

    program         name of the script
    doc             docstring of the script, which --help shows
    dataset, model  default values of --dataset and --model
    recipe          default values of the options of the recipe
    by_grouping     for UTKFace: values of the recipe that depend on --age-grouping
    """
    with exit_codes.clean_exit(program, AFTER_STOP, shared=True):
        parser = options.Parser(doc, prog=program, glossary=False)
        options.add_data(parser, dataset=dataset, model=model)
        add_recipe(parser, recipe, by_grouping or {})
        add_training(parser)
        options.add_machine(parser)
        opts = parser.parse_args()
        tracking.require_packages(opts.tracker)
        train(opts, chosen_recipe(opts, recipe, by_grouping or {}))


def add_recipe(parser: options.Parser, recipe: Recipe, by_grouping: Mapping[str, Mapping[str, float]]) -> None:
    """Add the options of the recipe. Their names are those of the fields of Recipe."""
    group = parser.add_argument_group("recipe")
    options.add(group, "--epochs", "passes over the training set", type=positive_int, default=recipe.epochs)
    for flag, text, kind in (
        ("--lr", "learning rate; with --schedule onecycle, the highest learning rate", positive_float),
        ("--weight-decay", "weight decay of the optimizer", nonnegative_float),
    ):
        name = flag.removeprefix("--").replace("-", "_")
        values = [f"{grouping} {row[name]}" for grouping, row in by_grouping.items()] or [str(getattr(recipe, name))]
        options.add(group, flag, f"{text} (default: {', '.join(values)})", type=kind, default=None)
    text = "sgd has a momentum of 0.9; adam adds the weight decay to the gradient, adamw subtracts it from the weights"
    options.add(group, "--optimizer", text, choices=choices.OPTIMIZERS, default=recipe.optimizer)
    options.add(group, "--batch-size", "images per step", type=positive_int, default=recipe.batch_size)
    text = "side of a square at a random place of each training image that is set to black, in pixels; 0: none"
    options.add(group, "--erase", text, type=nonnegative_int, default=recipe.erase)
    options.add(group, "--schedule", "learning-rate schedule", choices=choices.SCHEDULES, default=recipe.schedule)
    options.add(
        group,
        "--precision",
        "precision of forward and backward passes; tf32 needs a CUDA GPU, bf16 a CUDA GPU, or a CPU with AMX or "
        "AVX512-BF16. auto: bf16 on a CUDA GPU; on a CPU the faster of bf16 and fp32, measured at the start (default: "
        "that of existing weights or of the training that --resume continues, else tf32 on a CUDA GPU and fp32 on "
        "other devices)",
        choices=(choices.AUTO, *choices.PRECISIONS),
        default=None,
    )


def add_training(parser: options.Parser) -> None:
    """Add the options that are not part of the recipe."""
    group = parser.add_argument_group("training")
    options.add(
        group, "--seed", "seed of initial weights, order of images and augmentation", type=nonnegative_int, default=0
    )
    options.add(
        group,
        "--exclude",
        "file that lists training images to leave out, in the format of --forget-file of main_unlearn.py, to train a "
        "reference model without them",
        type=Path,
    )
    options.add(
        group,
        "--exclude-k",
        "leave out the N images that main_unlearn.py --unlearn-k N forgets",
        type=positive_int,
    )
    options.add(
        group, "--exclude-seed", "seed with which main_unlearn.py chooses these images", type=nonnegative_int, default=0
    )
    options.add_cuda_graph(group, "forward and backward passes, in one process,")
    group = parser.add_argument_group("output")
    options.add(group, "--output", "file for the weights (default: where main_unlearn.py looks for them)", type=Path)
    options.add_tracker(group, "the folder tracking next to the weights")
    options.add(group, "--resume", "continue an interrupted training after its last saved epoch", action="store_true")
    options.add(group, "--rerun", "train again if the weights exist", action="store_true")
    options.add_test_batch_size(group)


def chosen_recipe(opts: argparse.Namespace, recipe: Recipe, by_grouping: Mapping[str, Mapping[str, float]]) -> Recipe:
    """Return the recipe with the values of the age grouping, then those of the command line."""
    named = {field.name: getattr(opts, field.name, None) for field in dataclasses.fields(recipe)}
    named = {name: value for name, value in named.items() if value is not None}
    return dataclasses.replace(recipe, **dict(by_grouping.get(opts.age_grouping, {})) | named)


def train(opts: argparse.Namespace, recipe: Recipe) -> None:
    """Train and save the model that the options describe, unless its weights exist."""
    from l2ul import models
    from l2ul.common import device as devices
    from l2ul.common import distributed
    from l2ul.data import folder, forget_set
    from l2ul.experiments import records
    from l2ul.models import checkpoint
    from l2ul.training import pretrain

    models.check_name(opts.model)
    if opts.model.startswith("hf:"):
        raise InputError(f"--model is {opts.model}", "Hugging Face models are trained with transformers, not here")
    with distributed.process_group():
        device = devices.choose_device(opts.device, opts.no_cuda, opts.threads, print)
        folder.check_decoder(opts.decoder, device)
        output = opts.output or checkpoint.candidates(options.data_label(opts), opts.model, opts.data_dir)[0]
        if output.suffix != ".safetensors":
            raise InputError(f"--output is {output}", "expected a name that ends in .safetensors")
        if opts.exclude:
            forget_set.check_forget_file(opts.exclude)  # before the data set is loaded
        names = opts.tracker if distributed.is_first() else ()
        trackers = tracking.Trackers(names, output.parent / "tracking", lambda sentence: print(sentence, flush=True))
        images = options.load_data(opts, whole_train=True)
        excluded = excluded_indices(opts, images.train)
        if excluded is not None and not opts.output:
            output = pretrain.retrained_name(output, excluded)
        recipe = dataclasses.replace(recipe, precision=choose_precision(opts, images, device, output))
        settings = pretrain.saved_settings(images, opts.model, recipe, opts.seed, excluded)
        if distributed.broadcast(lambda: is_trained(opts, output, settings)):
            print(f"{output} exists; add --rerun to train it again")
            return
        for sentence in pretrain.describe_splits(images):
            print(sentence)
        num_train = len(images.train) - (len(excluded) if excluded is not None else 0)
        lines = EpochLines(recipe.epochs, num_train, "validation" if images.validation else "D_test")

        def report(row: dict[str, float]) -> None:
            trackers.log(row)
            print(lines.line(row), flush=True)

        def resume(rows: list[dict[str, float]]) -> None:
            file = pretrain.state_file(output)
            if not rows:
                print(f"there is no {file} to continue from; the training starts with epoch 1", flush=True)
                return
            print(f"continuing after epoch {len(rows)} of {recipe.epochs} from {file}", flush=True)
            for row in rows:
                trackers.log(row)
            advance(len(rows) * num_train)

        shown = settings | {"weights": output.name} | ({} if excluded is None else {"excluded": len(excluded)})
        trackers.start(records.run_id(settings | {"weights": output.name}), output.stem, shown)
        with trackers, progress_bar("train, images", recipe.epochs * num_train) as advance:
            acc_test = pretrain.pretrain(
                images,
                opts.model,
                recipe,
                output,
                device=device,
                seed=opts.seed,
                excluded=excluded,
                mean=opts.mean,
                std=opts.std,
                resume=opts.resume,
                test_batch_size=opts.test_batch_size,
                workers=opts.workers,
                graph=opts.cuda_graph == "auto",
                report=print,
                on_epoch=report,
                on_resume=resume,
                progress=advance,
            )
            trackers.finish({"acc_test": acc_test})
        for note in images.decoding_notes():
            print(note)
        print(f"D_test {acc_test:.2f} %: {output}")


def is_trained(opts: argparse.Namespace, output: Path, settings: Mapping[str, object]) -> bool:
    """Return whether the weights exist and are not to be trained again.

    Raises InputError if they were trained with other settings, or new ones cannot be written.
    """
    from l2ul.training import pretrain

    if output.exists() and not opts.rerun:
        named = {name: value for name in ("mean", "std") if (value := getattr(opts, name))}
        pretrain.check_settings(output, {**settings, **named})
        return True
    require_writable(output.parent, output.name, pretrain.state_file(output).name)
    if opts.tracker:
        require_writable(output.parent / "tracking")
    return False


def choose_precision(opts: argparse.Namespace, images: "Images", device: "torch.device", output: Path) -> str:
    """Return the precision to train in. Unless one is named, an existing training decides it."""
    from l2ul.common import distributed, precision
    from l2ul.training import pretrain

    if opts.precision in (None, choices.AUTO):
        known = distributed.broadcast(lambda: pretrain.saved_precision(output, opts.resume, opts.rerun))
        if known:
            return known
    chosen = precision.resolve(opts.precision, device)
    if chosen == choices.AUTO:
        chosen, sentence = pretrain.fastest_precision(images, opts.model, opts.mean, opts.std)
        print(f"--precision auto: {sentence}")
    precision.use(device, chosen)
    return chosen


class EpochLines:
    """Lines about finished epochs: loss, accuracy, training images per second and the time left.

    The rate is the mean since this object was made, and includes evaluation.
    """

    def __init__(self, epochs: int, num_images: int, held_out: str):
        self.epochs, self.num_images, self.held_out = epochs, num_images, held_out
        self._start, self._finished = time.monotonic(), 0

    def line(self, row: dict[str, float]) -> str:
        """Return the line for the row of an epoch, see `loop.fit`. Call it once per epoch, when the epoch ends."""
        self._finished += 1
        per_epoch = max(time.monotonic() - self._start, 1e-9) / self._finished
        text = f"epoch {row['epoch']}/{self.epochs}: loss {row['loss']:.4f}, {self.held_out} {row['acc']:.2f} %"
        text += f", {self.num_images / per_epoch:,.0f} images/s"
        left = self.epochs - row["epoch"]
        return f"{text}, about {format_duration(left * per_epoch)} left" if left else text


def excluded_indices(opts: argparse.Namespace, train: "Split") -> "Tensor | None":
    """Return the indices of the training images to leave out; None if the options name none."""
    from l2ul.data import forget_set

    if opts.exclude and opts.exclude_k:
        raise InputError("--exclude and --exclude-k both choose the images to leave out", "use one of them")
    if opts.exclude_k:
        return forget_set.choose_forget(len(train), opts.exclude_k, opts.exclude_seed)
    if not opts.exclude:
        return None
    return forget_set.read_forget(opts.exclude, len(train), forget_set.files_of(train))
