"""Methods of fixed length: what each of them works with, and the passes through D_r and D_f that they share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from l2ul.common import seeds
from l2ul.common.errors import InputError
from l2ul.data.augment import augment
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split, as_pixels
from l2ul.objective import Batch, Forget

Value = int | float  # of a setting
POSITIVE = ("epochs", "batch", "copies", "iterations", "temperature", "sigma", "eps")  # settings that may not be 0
LOOK_EVERY = 10  # steps, of which each is a batch of D_r, between two looks at the whole of D_f


@dataclass(frozen=True)
class Course:
    """What a method of fixed length works with.

    model    θ⁰ as yet, in the mode that it is trained in
    settings the method's own, by name: see `methods.fixed_length`
    retain   D_r, for the methods that need it
    seed     of every order and draw; first_position: see `unlearn.Settings`
    workers  processes that decode images of D_r that are on disk
    """

    model: nn.Module
    forget: Forget
    settings: Mapping[str, Value]
    retain: Split | None = None
    seed: int = 0
    first_position: int = 0
    workers: int = 0

    @property
    def epochs(self) -> range:
        return range(self.settings["epochs"])

    @cached_property
    def generator(self) -> torch.Generator:
        """What the course draws from, in the order of its steps."""
        return seeds.generator(self.seed, "course", self.first_position)

    def batches(self, split: Split, size: int | None = None) -> Iterator[Batch]:
        """One time through a set in a new order; `size` images at once, by default as the settings say.

        The images are as they are, or cropped as in training, and mirrored too: `augment` of the settings is 0, 1, 2.
        """
        how = self.settings.get("augment", 0)
        for batch in shuffled(split, size or self.settings["batch"], self.generator, self.workers):
            images = batch.images
            if how:
                images = augment(images, images.shape[-1] // 8, how > 1, self.generator)
            yield Batch(images.to(memory_format=torch.channels_last), batch.labels)

    def spread(self, kept: Split, forgotten: Split) -> Iterator[tuple[Batch, Batch]]:
        """One time through both sets, the second spread evenly over the batches of the first.

        So that a step sees what it would of one shuffled set of both; a step may have no image of the second.
        """
        steps = -(-len(kept) // self.settings["batch"])
        shares = torch.arange(steps + 1) * len(forgotten) // steps  # after each step, so many have been seen
        every = next(self.batches(forgotten, len(forgotten)))
        for kept_batch, low, high in zip(self.batches(kept), shares[:-1], shares[1:], strict=True):
            yield kept_batch, Batch(every.images[low:high], every.labels[low:high])

    def endless(self, split: Split) -> Iterator[Batch]:
        """Batches of a set, over and over."""
        while True:
            yield from self.batches(split)

    @property
    def forgotten(self) -> Split:
        """D_f with its true labels."""
        return Split(self.forget.images, self.forget.labels)


def shuffled(split: Split, batch_size: int, generator: torch.Generator, workers: int) -> Iterator[Batch]:
    """Batches of a set, once through it in a new order; images on disk are decoded by so many workers."""
    order = torch.randperm(len(split), generator=generator).split(batch_size)
    if isinstance(split.images, FolderImages):
        found = split.images.loader(order, split.labels.device, workers)
    else:
        found = (split.images[part] for part in order)
    for indices, images in zip(order, found, strict=True):
        yield Batch(as_pixels(images.to(split.labels.device)), split.labels[indices])


def optimizer(parameters: list[Tensor], settings: Mapping[str, Value]) -> torch.optim.Optimizer:
    """What follows the losses of a course: SGD with momentum 0.9 and weight decay 5e-4, or Adam, at a constant rate."""
    rate = settings.get("lr", 0.0)  # a course that moves the weights itself has none
    if settings.get("adam"):
        return torch.optim.Adam(parameters, rate)
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)


def overridden(settings: Mapping[str, Value], given: Mapping[str, float]) -> dict[str, Value]:
    """A method's settings with the given values in place of its own; those that it does not have are passed over.

    Raises InputError for a value that is negative, 0 where it must not be, or not whole where a number is meant.
    """
    found = dict(settings)
    for name, value in given.items():
        if name not in settings:
            continue
        whole = isinstance(settings[name], int)
        if value < 0 or (value == 0 and name in POSITIVE) or (whole and value != int(value)):
            raise InputError(f"--course has {name}={value:g}; expected a value like {settings[name]:g}")
        found[name] = type(settings[name])(value)
    return found


def told(settings: Mapping[str, Value]) -> str:
    """Settings as `--course` takes them, in alphabetical order and to the last digit: they are part of a run's id."""
    return " ".join(f"{name}={settings[name]}" for name in sorted(settings))


def read(text: str) -> dict[str, Value]:
    """What `told` wrote."""
    pairs = (word.split("=", 1) for word in text.split())
    return {name: float(value) for name, value in pairs}
