"""The training loop: train a classifier from scratch, and resume training after an interruption.

It trains the classifiers that are unlearned, and the retrained models, which never saw D_f, to compare with.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
from pathlib import Path
import pickle
import time

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import Progress
from l2ul.common import distributed, precision, seeds
from l2ul.common.cuda_graphs import Graphed
from l2ul.common.errors import Diverged, InputError, is_out_of_memory
from l2ul.common.files import atomic
from l2ul.common.fused_optimizers import fused
from l2ul.data.augment import crop, draw_crops, erase
from l2ul.data.images import Split, as_pixels
from l2ul.metrics import accuracy
from l2ul.training.recipe import Recipe

SAVING = 1 / 20  # share of the time that is spent on saving the state, at most: epochs on a GPU may take a second


def fit(
    model: nn.Module,
    train: Split,
    held_out: Split,
    recipe: Recipe,
    *,
    seed: int,
    state_file: Path,
    identity: dict[str, object] | None = None,
    resume: bool = False,
    test_batch_size: int | None = None,
    workers: int = 0,
    graph: bool = False,
    report: Callable[[str], object] = lambda sentence: None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    on_resume: Callable[[list[dict[str, float]]], object] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train the model in place and leave it in eval mode. Return one row per epoch.

    Each row has the keys `epoch` (from 1), `loss` (mean over the training images), `acc` (accuracy on the held-out
    images, in percent) and `lr` (learning rate of the first step).

    model       takes pixels in [0,1], returns logits; on the device of the labels
    train       training images; crops have the size of the held-out images, which may be smaller
    held_out    images whose accuracy is measured after each epoch
    seed        of the order of the images, augmentation and dropout
    state_file  where the state of the training is saved, atomically: after each epoch, or after some of them if saving
                takes more than a twentieth of the time
    identity    what else decides the result (model, data set, excluded images), as plain values; stored in the state
    resume      continue from `state_file` if it exists; the final weights equal those of an uninterrupted run
    workers     processes that decode FolderImages
    graph       run forward and backward passes as CUDA graphs, in one process on a CUDA GPU
    report      called with a sentence if the model cannot be captured as a CUDA graph
    on_epoch    called with the row of each epoch
    on_resume   called with the rows of the epochs before if `resume`, with none if `state_file` does not exist
    progress    called with the number of images of each step

    Under torchrun, each process trains on its share of the same batches with the same augmentation, and all end with
    equal weights. Dropout differs between processes.

    Raises InputError if the state belongs to another training or the device does not support the precision,
    Diverged if the loss is not finite.
    """
    device = train.labels.device
    precision.use(device, recipe.precision)
    model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, recipe)
    scheduler = _scheduler(optimizer, recipe, len(train))
    settings = dataclasses.asdict(recipe) | {"seed": seed} | (identity or {})
    state = distributed.broadcast(lambda: _state_to_resume(state_file, settings)) if resume else None
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history, best = [], None  # rows of the epochs before, and the best weights so far
    if state:
        history, best = state["history"], state["best"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if resume and on_resume:
        on_resume(history)
    gradients = functools.partial(_gradients, distributed.data_parallel(model), recipe)
    if graph and device.type == "cuda" and distributed.size() == 1:
        gradients = Graphed(gradients, device, report)
    started, saving = time.monotonic(), 0.0
    for epoch in range(len(history), recipe.epochs):
        generator = seeds.generator(seed, "pretrain", epoch)
        own_rank = (distributed.rank(),) if distributed.rank() else ()
        with seeds.fork_rng(device, seed, "dropout", epoch, *own_rank), distributed.shared_statistics(model):
            steps = _steps(train, held_out.side, recipe, generator, workers)
            model.train()
            lr = float(scheduler.get_last_lr()[0])
            loss = _train_epoch(gradients, steps, recipe, optimizer, scheduler, progress) / len(train)
        if not math.isfinite(loss):
            raise Diverged("the training loss is not finite; use a smaller learning rate")
        predictions = accuracy.predict(model, held_out.images, batch_size=test_batch_size, workers=workers, shared=True)
        acc = accuracy.accuracy(predictions, held_out.labels)
        history.append({"epoch": epoch + 1, "loss": loss, "acc": acc, "lr": lr})
        if recipe.keep_best and history[-1]["acc"] > max((row["acc"] for row in history[:-1]), default=-1):
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        before = time.monotonic()
        if distributed.is_first() and saving <= SAVING * (before - started):
            states = {name: part.state_dict() for name, part in parts.items()}
            with atomic(state_file) as file:
                torch.save(states | {"settings": settings, "history": history, "best": best}, file)
            saving += time.monotonic() - before
        if on_epoch:
            on_epoch(history[-1])
    if recipe.keep_best:
        model.load_state_dict(best)
    model.eval()
    return history


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    weights, options = list(model.parameters()), {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    if recipe.optimizer == "sgd":
        options["momentum"] = recipe.momentum
    return fused(kind, weights, **options) if weights[0].device.type == "cuda" else kind(weights, **options)


def _scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, num_images: int
) -> torch.optim.lr_scheduler.LRScheduler:
    steps = recipe.epochs * math.ceil(num_images / recipe.batch_size)
    if recipe.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@dataclasses.dataclass(frozen=True)
class _Step:
    """This process's share of a batch.

    images      (n, 3, H, W) uint8, cropped
    labels      (n,)
    batch_size  size of the batch, over all processes
    share       size of this process's share. If it is 0, the step has one image of another process, whose loss is
                multiplied by 0: every process has to take part in a backward pass.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    share: int


def _steps(train: Split, crop_size: int, recipe: Recipe, generator: torch.Generator, workers: int) -> Iterator[_Step]:
    """Yield the steps of one epoch. The random numbers for an image do not depend on the number of processes.

    They are drawn on the CPU and copied to the device once, so that no step waits for a copy.
    """
    device = train.labels.device
    order = torch.randperm(len(train), generator=generator).split(recipe.batch_size)
    parts = [distributed.shard(len(batch)) for batch in order]
    shares = [part.stop - part.start for part in parts]
    parts = [part if share else slice(0, 1) for part, share in zip(parts, shares, strict=True)]

    def draw(count: int) -> Tensor:
        crops = draw_crops(count, train.images.shape[2:], recipe.crop_padding, recipe.flip, generator, crop_size)
        return torch.cat([crops, torch.randint(crop_size, (2, count), generator=generator)]) if recipe.erase else crops

    draws = [draw(len(batch)) for batch in order]
    own = [batch[part] for batch, part in zip(order, parts, strict=True)]
    sizes = [len(indices) for indices in own]
    indices = torch.cat(own).to(device)
    crops = torch.cat([drawn[:, part] for drawn, part in zip(draws, parts, strict=True)], 1).to(device)
    if train.on_disk:
        loaded = train.images.loader(own, device, workers, torch.Generator())
    else:
        loaded = (train.images[some] for some in indices.split(sizes))
    labels = train.labels[indices].split(sizes)
    for batch, share, images, some, place in zip(order, shares, loaded, labels, crops.split(sizes, 1), strict=True):
        cropped = crop(images, recipe.crop_padding, place[:3], crop_size)
        yield _Step(erase(cropped, recipe.erase, place[3:]) if recipe.erase else cropped, some, len(batch), share)


def _gradients(
    model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, weight: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the mean loss () and the gradients of that loss times `weight`."""
    with precision.autocast(images.device, recipe.precision):
        logits = model(as_pixels(images))
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    model.zero_grad()
    (loss * weight).backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def _train_epoch(
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor | None]]],
    steps: Iterator[_Step],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress | None,
) -> float:
    """Take the steps; return the sum of the losses of all images. Nothing is read from the device before the end."""
    weights = optimizer.param_groups[0]["params"]
    total = torch.zeros((), device=weights[0].device)
    for step in steps:
        # data-parallel training averages over processes; with this factor, the result is the mean over the batch
        factor = torch.tensor(step.share * distributed.size() / step.batch_size)
        loss, new = gradients(step.images, step.labels, factor)
        for weight, gradient in zip(weights, new, strict=True):
            weight.grad = gradient
        if recipe.clip_value is not None:
            nn.utils.clip_grad_value_(weights, recipe.clip_value)
        optimizer.step()
        scheduler.step()
        total += loss * step.share
        if progress:
            progress(step.batch_size)
    return distributed.all_reduce(total).item()


def _state_to_resume(state_file: Path, settings: dict[str, object]) -> dict[str, object] | None:
    """Return the state of a training with these settings; None if there is no file."""
    state = read_state(state_file)
    if state and state.get("settings") != settings:
        raise InputError(
            f"{state_file} is from another recipe, model or data set", "use the same settings", "leave out --resume"
        )
    return state


def read_state(state_file: Path) -> dict[str, object] | None:
    """Return the state of a training in a file; None if there is no file. Raises InputError if it is damaged."""
    if not state_file.exists():
        return None
    try:
        return torch.load(state_file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{state_file} is damaged ({type(error).__name__})", "delete it to train from scratch"
        ) from None
