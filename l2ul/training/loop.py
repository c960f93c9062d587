"""Training a classifier from scratch: what there is to unlearn, and the retrained reference that never saw D_f."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from pathlib import Path
import pickle

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import Progress
from l2ul.common import distributed, seeds
from l2ul.common import precision as precisions
from l2ul.common.errors import Diverged, InputError
from l2ul.common.files import atomic
from l2ul.data.augment import crop, crop_positions
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split, as_pixels
from l2ul.metrics import accuracy


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a net is trained: on randomly cropped, and perhaps mirrored, images."""

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    optimizer: str = "sgd"  # or "adam", which has no momentum
    schedule: str = "cosine"  # to 0 over all steps; or "onecycle": up to lr and down again
    clip_value: float | None = None  # that no component of a gradient exceeds
    crop_padding: int = 4  # pixels of black border around the image that a crop is cut from
    flip: bool = True
    label_smoothing: float = 0.0
    keep_best: bool = False  # end with the weights of the epoch that was best on the images held out
    precision: str = "fp32"  # or "tf32", or "bf16" (autocast): see `precisions`


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
    test_batch_size: int = 256,
    workers: int = 0,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train the model in place; returns a row an epoch: epoch, loss (mean), acc (percent of the images held out).

    Crops have the size of the images held out, which may be smaller than the training images.
    `identity` is what else decides the result (net, data set, images left out): plain values, kept with the state.
    `workers` decode images that are on disk. After each epoch all state is in `state_file`, whole or the epoch
    before's; `resume` goes on from there and ends with the same weights as a run that was never stopped.
    Under torchrun each process takes its part of the same batches, cropped in the same way, and all end with the same
    weights; dropout is drawn by each for itself.
    Raises InputError where the file belongs to another recipe or the device lacks the precision, Diverged where the
    loss is no longer finite.
    """
    device = train.labels.device
    precisions.use(device, recipe.precision)
    model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, recipe)
    scheduler = _scheduler(optimizer, recipe, len(train))
    settings = dataclasses.asdict(recipe) | {"seed": seed} | (identity or {})
    state = distributed.broadcast(lambda: _read(state_file, settings)) if resume else None
    history, best = _restore(state, model, optimizer, scheduler) if state else ([], None)
    net = distributed.data_parallel(model)
    for epoch in range(len(history), recipe.epochs):
        generator = seeds.generator(seed, "pretrain", epoch)
        own = (distributed.rank(),) if distributed.rank() else ()
        with seeds.fork_rng(device, seed, "dropout", epoch, *own), distributed.shared_statistics(model):
            steps = _steps(train, held_out.side, recipe, generator, workers)
            loss = _epoch(net, steps, recipe, optimizer, scheduler, progress) / len(train)
        if not math.isfinite(loss):
            raise Diverged("the loss is no longer finite; take a smaller learning rate")
        found = accuracy.predict(model, held_out.images, batch_size=test_batch_size, workers=workers, shared=True)
        history.append({"epoch": epoch + 1, "loss": loss, "acc": accuracy.accuracy(found, held_out.labels)})
        if recipe.keep_best and history[-1]["acc"] > max((row["acc"] for row in history[:-1]), default=-1):
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if distributed.is_first():
            _keep(state_file, settings, model, optimizer, scheduler, history, best)
        if on_epoch:
            on_epoch(history[-1])
    if recipe.keep_best:
        model.load_state_dict(best)
    model.eval()
    return history


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), momentum=recipe.momentum, **options)


def _scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, num_images: int
) -> torch.optim.lr_scheduler.LRScheduler:
    steps = recipe.epochs * -(-num_images // recipe.batch_size)
    if recipe.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@dataclasses.dataclass(frozen=True)
class _Step:
    """This process's part of the images of a step, cropped, uint8 (n, 3, H, W), and their labels (n,).

    count  images of the step, in all processes
    share  of these, the ones that are here; 0: an image of another process stands in, and is not to count
    """

    images: Tensor
    labels: Tensor
    count: int
    share: int


def _steps(train: Split, crop_size: int, recipe: Recipe, generator: torch.Generator, workers: int) -> Iterator[_Step]:
    """One time through the training set. What is drawn for an image does not depend on the number of processes."""
    device = train.labels.device
    order = torch.randperm(len(train), generator=generator).split(recipe.batch_size)
    parts = [distributed.shard(len(indices)) for indices in order]
    shares = [part.stop - part.start for part in parts]
    parts = [part if share else slice(0, 1) for part, share in zip(parts, shares, strict=True)]
    own = [indices[part] for indices, part in zip(order, parts, strict=True)]
    if isinstance(train.images, FolderImages):
        loaded = train.images.loader(own, device, workers, torch.Generator())
    else:
        loaded = (train.images[indices].to(device) for indices in own)
    for every, part, share, indices, images in zip(order, parts, shares, own, loaded, strict=True):
        places = crop_positions(len(every), images.shape[2:], recipe.crop_padding, recipe.flip, generator, crop_size)
        cropped = crop(images, recipe.crop_padding, *(place[part] for place in places))
        yield _Step(cropped, train.labels[indices], len(every), share)


def _epoch(
    net: nn.Module,
    steps: Iterator[_Step],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress | None,
) -> float:
    """Take the steps; returns the sum of the losses of all images."""
    total = torch.zeros((), device=next(net.parameters()).device)
    net.train()
    for step in steps:
        with precisions.autocast(total.device, recipe.precision):
            logits = net(as_pixels(step.images))
        loss = F.cross_entropy(logits.float(), step.labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        (loss * (step.share * distributed.size() / step.count)).backward()  # the mean over processes is that of images
        if recipe.clip_value is not None:
            nn.utils.clip_grad_value_(net.parameters(), recipe.clip_value)
        optimizer.step()
        scheduler.step()
        total += loss.detach() * step.share
        if progress:
            progress(step.count)
    return distributed.all_reduce(total).item()


def _keep(state_file: Path, settings: dict[str, object], model, optimizer, scheduler, history, best) -> None:
    state = {
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "history": history,
        "best": best,
    }
    with atomic(state_file) as part:
        torch.save(state, part)


def _read(state_file: Path, settings: dict[str, object]) -> dict[str, object] | None:
    """What `_keep` wrote; None where there is nothing to go on from."""
    if not state_file.exists():
        return None
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{state_file} is damaged ({type(error).__name__}); delete it to train anew") from None
    if state.get("settings") != settings:
        raise InputError(f"{state_file} is from another recipe, net or data set; give its settings, or no --resume")
    return state


def _restore(state: dict[str, object], model, optimizer, scheduler) -> tuple[list, dict | None]:
    """Load what `_read` gave; returns history and best weights so far."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["history"], state["best"]
