"""What the main_pretrain_*.py scripts share: a recipe → a trained classifier, saved where main_unlearn.py looks."""

import l2ul  # noqa: F401  # isort: skip  # first: it sets the environment before torch is imported

import dataclasses
import hashlib
from pathlib import Path

from torch import Tensor, nn

from l2ul.cli import exit_codes, options
from l2ul.cli.parser import nonnegative_float, nonnegative_int, positive_float, positive_int
from l2ul.common import device as device_module
from l2ul.common import distributed, seeds
from l2ul.common.choices import PRECISIONS, SCHEDULES, TRACKERS
from l2ul.common.errors import InputError
from l2ul.common.files import require_writable
from l2ul.common.progress import progress_bar
from l2ul.data import folder, forget_set
from l2ul.data import images as image_sets
from l2ul.metrics import accuracy as evaluate
from l2ul.training import loop
from l2ul.training import tracker as tracking
import models
from models import checkpoint


def main(
    program: str,
    description: str,
    dataset: str,
    model: str,
    recipe: loop.Recipe,
    by_grouping: dict[str, dict[str, float]] | None = None,
) -> None:
    """Parse the command line over the recipe, train, save; a sentence and an exit code where that cannot be.

    `by_grouping` has the values of the recipe that depend on the age grouping, of UTKFace.
    """
    again = "give the same command with --resume to go on after the last finished epoch"
    with exit_codes.clean_exit(program, again, shared=True):
        parser = options.Parser(description, prog=program)
        options.add_data(parser, dataset=dataset, model=model)
        add_flags(parser, recipe, by_grouping or {})
        options.add_machine(parser)
        opts = parser.parse_args()
        models.check_name(opts.model)
        if opts.model.startswith("hf:"):
            raise InputError(f"--model is {opts.model}; Hugging Face models are trained with transformers, not here")
        asked = {field.name: getattr(opts, field.name, None) for field in dataclasses.fields(recipe)}
        asked = {name: value for name, value in asked.items() if value is not None}
        with distributed.process_group():
            train(opts, dataclasses.replace(recipe, **(by_grouping or {}).get(opts.age_grouping, {}) | asked))


def add_flags(parser: options.Parser, recipe: loop.Recipe, by_grouping: dict[str, dict[str, float]]) -> None:
    group = parser.add_argument_group("recipe")
    options.add(group, "--epochs", "times through the training set", type=positive_int, default=recipe.epochs)
    for flag, text, kind in (
        ("--lr", "learning rate, of onecycle the highest", positive_float),
        ("--weight-decay", "of the optimizer", nonnegative_float),
    ):
        name = flag.removeprefix("--").replace("-", "_")
        values = [f"{grouping} {row[name]}" for grouping, row in by_grouping.items()] or [str(getattr(recipe, name))]
        options.add(group, flag, f"{text} (default: {', '.join(values)})", type=kind, default=None)
    options.add(group, "--batch-size", "images a step", type=positive_int, default=recipe.batch_size)
    options.add(group, "--schedule", "of the learning rate", choices=SCHEDULES, default=recipe.schedule)
    options.add(
        group,
        "--precision",
        "of forward and backward pass; tf32 needs a CUDA GPU, bf16 one or a CPU with AMX",
        choices=PRECISIONS,
        default="fp32",
    )
    options.add(group, "--seed", "of first weights, order and augmentation", type=nonnegative_int, default=0)
    options.add(group, "--tracker", "also write the curve for it, beside the weights (default: none)", choices=TRACKERS)
    options.add(
        group, "--exclude", "indices of training images to leave out, one a line (a retrained reference)", type=Path
    )
    options.add(
        group, "--exclude-k", "leave out the images that main_unlearn.py forgets with --unlearn-k N", type=positive_int
    )
    options.add(group, "--exclude-seed", "and with this --seed", type=nonnegative_int, default=0)
    group = parser.add_argument_group("output")
    options.add(group, "--output", "file of the weights (default: where main_unlearn.py looks for them)", type=Path)
    options.add(group, "--resume", "go on from the last finished epoch of a run that was stopped", action="store_true")
    options.add(group, "--rerun", "train again where the weights exist", action="store_true")
    options.add(group, "--test-batch-size", "images a batch when measuring", type=positive_int, default=256)


def train(opts, recipe: loop.Recipe) -> None:
    device = device_module.choose_device(opts.device, opts.no_cuda, opts.threads)
    folder.check_decoder(opts.decoder, device)
    output = opts.output or checkpoint.candidates(options.data_label(opts), opts.model, opts.data_dir)[0]
    if output.suffix != ".safetensors":
        raise InputError(f"--output is {output}; expected a name that ends in .safetensors")
    images = options.load_data(opts, whole_train=True)
    excluded = left_out(opts, len(images.train))
    if excluded is not None and not opts.output:
        output = without(output, excluded)
    described = {"dataset": opts.dataset, "model": opts.model, "seed": opts.seed}
    described |= images.settings | dataclasses.asdict(recipe)
    described |= {"excluded": excluded.tolist()} if excluded is not None else {}
    described |= {"train_sha256": images.train_sha256} if images.train_sha256 else {}
    if distributed.broadcast(lambda: is_there(output, described, opts.rerun)):
        print(f"{output} exists already; --rerun trains it again")
        return
    describe(images)
    if excluded is not None:
        kept = evaluate.complement(excluded, len(images.train))
        images = dataclasses.replace(images, train=images.train.subset(kept))
    images = images.to(device)
    classifier = fit(opts, recipe, images, excluded, output)
    how = {"batch_size": opts.test_batch_size, "workers": opts.workers, "shared": True}
    found = evaluate.predict(classifier, images.test.images, **how)
    accuracy = evaluate.accuracy(found, images.test.labels.cpu())
    if distributed.is_first():
        models.save(classifier, output, described | {"acc_test": accuracy})
        state_file(output).unlink(missing_ok=True)
    print(f"D_test {accuracy:.2f} %: {output}")


def is_there(output: Path, described: dict[str, object], rerun: bool) -> bool:
    """Whether there is nothing to do; InputError where other weights are in the way, or none can be written."""
    if output.exists() and not rerun:
        refuse_others(output, described)
        return True
    require_writable(output.parent)
    return False


def fit(opts, recipe: loop.Recipe, images: image_sets.Images, excluded: Tensor | None, output: Path) -> nn.Module:
    """A net of its first weights, trained; what is needed to go on is beside the output."""
    device = images.train.labels.device
    with seeds.fork_rng(device, opts.seed, "first weights"):
        classifier = models.build(opts.model, images.num_classes, opts.mean, opts.std).to(device)
    identity = {
        "model": opts.model,
        "dataset": opts.dataset,
        "statistics": [opts.mean, opts.std],
        "excluded": excluded.tolist() if excluded is not None else None,
        "train_sha256": images.train_sha256,
        "num_train": len(images.train),
    } | images.settings
    tracker = tracking.open_tracker(opts.tracker if distributed.is_first() else None, output.with_suffix(""))
    held_out = "validation" if images.validation else "D_test"

    def report(row: dict[str, float]) -> None:
        tracker(row)
        print(f"epoch {row['epoch']}: loss {row['loss']:.4f}, {held_out} {row['acc']:.2f} %", flush=True)

    with progress_bar("train", recipe.epochs * len(images.train)) as advance:
        loop.fit(
            classifier,
            images.train,
            images.validation or images.test,
            recipe,
            seed=opts.seed,
            state_file=state_file(output),
            identity=identity,
            resume=opts.resume,
            test_batch_size=opts.test_batch_size,
            workers=opts.workers,
            on_epoch=report,
            progress=advance,
        )
    return classifier


def state_file(output: Path) -> Path:
    """Where the state of a training is kept until it ends."""
    return output.with_suffix(".training.pt")


def left_out(opts, num_images: int) -> Tensor | None:
    """Indices of the training images that are left out, if any are."""
    if opts.exclude and opts.exclude_k:
        raise InputError("--exclude and --exclude-k both name images to leave out; give one of them")
    if opts.exclude_k:
        return forget_set.choose_forget(num_images, opts.exclude_k, opts.exclude_seed)
    return forget_set.read_forget(opts.exclude, num_images) if opts.exclude else None


def refuse_others(output: Path, wanted: dict[str, object]) -> None:
    """Raise InputError where the weights that are there tell of another training than the one wanted."""
    _, metadata = checkpoint.read(output)
    for name, value in wanted.items():
        told = checkpoint.metadata_value(metadata, name)
        if told not in (None, value):
            shown = "other images" if name == "train_sha256" else f"{name} {told}, not {value}"
            raise InputError(
                f"{output} was trained with {shown}; add --rerun to train it anew, or name another file with --output"
            )


def describe(images: image_sets.Images) -> None:
    """What the data set holds, where its split or its classes are made here."""
    for note in images.notes:
        print(note)
    if images.validation:
        for name, split in (("train", images.train), ("validation", images.validation), ("test", images.test)):
            counts = split.labels.bincount(minlength=images.num_classes).tolist()
            shown = ", ".join(f"{label}: {count}" for label, count in zip(images.classes, counts, strict=True))
            print(f"{name} {len(split)} images ({shown})")


def without(usual: Path, excluded: Tensor) -> Path:
    """A name of its own, beside the usual one, for a net trained without some images."""
    digest = hashlib.sha256(excluded.sort().values.numpy().tobytes()).hexdigest()[:8]
    return usual.with_stem(f"{usual.stem}_without_{len(excluded)}_{digest}")
