"""Train a classifier on a data set and save its weights where unlearning finds them."""

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from l2ul import models
from l2ul.common import distributed, seeds
from l2ul.common.errors import InputError
from l2ul.common.text import first_three
from l2ul.data import forget_set
from l2ul.data.image_files import ImageReader
from l2ul.data.images import Images
from l2ul.metrics import accuracy, preflight
from l2ul.models import checkpoint
from l2ul.training import loop
from l2ul.training.recipe import Recipe


def pretrain(
    images: Images,
    model_name: str,
    recipe: Recipe,
    output: Path,
    *,
    device: torch.device,
    seed: int,
    excluded: Tensor | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    test_batch_size: int | None = None,
    workers: int = 0,
    **fit_options,
) -> float:
    """Train a new classifier, save it to `output` and return its accuracy on the test images, in percent.

    images    the data set; accuracy after each epoch is measured on its validation images if it has any, else on its
              test images
    seed      of the initial weights and of the training
    excluded  indices (n,) of training images to leave out: the result is a retrained model, a reference for unlearning
    mean, std of the input normalisation; None: those of the model family

    The other arguments are those of `loop.fit`. The state of the training is kept in `state_file(output)` until the
    weights are saved.
    """
    settings = saved_settings(images, model_name, recipe, seed, excluded)
    if excluded is not None:
        images = dataclasses.replace(
            images, train=images.train.subset(forget_set.complement(excluded, len(images.train)))
        )
    with seeds.fork_rng(device, seed, "first weights"):
        classifier = models.build(model_name, images.num_classes, mean, std).to(device)
    images = images.with_channels(classifier.channels).to(device)
    if distributed.is_first():
        _check_writable(classifier, output, images)
    identity = {"excluded": None, "train_sha256": None} | settings
    identity |= {"statistics": [mean, std], "num_train": len(images.train)}
    loop.fit(
        classifier,
        images.train,
        images.validation or images.test,
        recipe,
        seed=seed,
        state_file=state_file(output),
        identity=identity,
        test_batch_size=test_batch_size,
        workers=workers,
        **fit_options,
    )
    predictions = accuracy.predict(
        classifier, images.test.images, batch_size=test_batch_size, workers=workers, shared=True
    )
    acc_test = accuracy.accuracy(predictions, images.test.labels.cpu())
    if distributed.is_first():
        models.save(classifier, output, settings | {"acc_test": acc_test})
        state_file(output).unlink(missing_ok=True)
    return acc_test


def _check_writable(classifier: models.Classifier, output: Path, images: Images) -> None:
    """Raise InputError unless the weights can be written beside `output` and opened again, which is tried."""
    with preflight.trial_write(classifier.name, output) as folder:
        path = folder / output.name
        models.save(classifier, path, {})
        opened = models.load(classifier.name, classifier.num_classes, path)
        sample = images.train.images[torch.arange(min(2, len(images.train)))].to(classifier.normalize.mean.device)
        preflight.check_same_model(classifier, opened.to(sample.device), sample)


def saved_settings(
    images: Images, model_name: str, recipe: Recipe, seed: int, excluded: Tensor | None
) -> dict[str, object]:
    """Return the settings of a training that are saved with its weights."""
    settings = {"dataset": images.name, "model": model_name, "seed": seed}
    settings |= images.settings | dataclasses.asdict(recipe)
    settings |= {"excluded": excluded.tolist()} if excluded is not None else {}
    settings |= {"train_sha256": images.train_sha256} if images.train_sha256 else {}
    return settings


def saved_precision(output: Path, resume: bool, rerun: bool) -> str | None:
    """Return the precision of the weights in `output` or of the training to resume; None if there is neither."""
    if output.exists() and not rerun:
        return checkpoint.read(output)[1].get("precision")
    state = loop.read_state(state_file(output)) if resume else None
    return state.get("settings", {}).get("precision") if state else None


def fastest_precision(
    images: Images, model_name: str, mean: list[float] | None, std: list[float] | None
) -> tuple[str, str]:
    """Return the faster precision to train a new classifier in on a CPU, see `preflight.fastest_precision`."""
    with torch.random.fork_rng(devices=[]):
        classifier = models.build(model_name, images.num_classes, mean, std).to(memory_format=torch.channels_last)
    return preflight.fastest_precision(classifier, images.with_channels(classifier.channels).test.images, trains=True)


def check_settings(output: Path, settings: dict[str, object]) -> None:
    """Raise InputError if the weights in `output` were trained with other settings."""
    _, metadata = checkpoint.read(output)
    remedies = "add --rerun to train it again", "choose another file with --output"
    reading = ImageReader().options  # saved where they are not these defaults
    for name, value in (reading | settings).items():
        saved = metadata.get(name, reading.get(name))
        if name != "excluded" and (saved != value if name in reading else saved not in (None, value)):
            difference = "other images" if name == "train_sha256" else f"{name} {saved}, not {value}"
            raise InputError(f"{output} was trained with {difference}", *remedies)
    before, now = (sorted(some.get("excluded") or ()) for some in (metadata, settings))
    if before != now and "epochs" in metadata:  # a file of a main_pretrain script names what it excluded
        raise InputError(f"{output} was trained on {_images(before)}, not on {_images(now)}", *remedies)


def _images(excluded: list[int]) -> str:
    """Return a name for the training images that are left when these are excluded."""
    return f"all images but {len(excluded)} ({first_three(list(map(str, excluded)))})" if excluded else "all images"


def state_file(output: Path) -> Path:
    """Return the file in which the state of a training is kept until its weights are saved to `output`."""
    return output.with_suffix(".training.pt")


def retrained_name(output: Path, excluded: Tensor) -> Path:
    """Return the default file for a model that is trained without some images, next to `output`."""
    digest = hashlib.sha256(excluded.sort().values.numpy().tobytes()).hexdigest()[:8]
    return output.with_stem(f"{output.stem}_without_{len(excluded)}_{digest}")


def describe_splits(images: Images) -> list[str]:
    """Return sentences about the data set: its notes and, if it has a validation split, the images of each class."""
    lines = list(images.notes)
    if images.validation:
        for name, split in (("train", images.train), ("validation", images.validation), ("test", images.test)):
            counts = split.labels.bincount(minlength=images.num_classes).tolist()
            classes = ", ".join(f"{label}: {count}" for label, count in zip(images.classes, counts, strict=True))
            lines.append(f"{name} {len(split)} images ({classes})")
    return lines
