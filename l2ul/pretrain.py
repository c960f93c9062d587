"""Training a classifier from scratch: what there is to unlearn, and the retrained reference that never saw D_f."""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import pickle

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import Progress, evaluate, seeds
from l2ul.data import Split, as_pixels
from l2ul.errors import Diverged, InputError
from l2ul.files import atomic

SCHEDULES = ("cosine", "onecycle")
PRECISIONS = ("fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a net is trained: SGD with momentum on randomly cropped, and perhaps mirrored, images."""

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    schedule: str = "cosine"  # to 0 over all steps; or "onecycle": up to lr and down again
    crop_padding: int = 4  # pixels of black border that a crop of the image's own size is cut from
    flip: bool = True
    label_smoothing: float = 0.0
    precision: str = "fp32"  # or "bf16": autocast, on a GPU


def fit(
    model: nn.Module,
    train: Split,
    test: Split,
    recipe: Recipe,
    *,
    seed: int,
    state_file: Path,
    identity: dict[str, object] | None = None,
    resume: bool = False,
    test_batch_size: int = 256,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train the model in place; returns a row an epoch: epoch, loss (mean), acc_test (percent).

    `identity` is what else decides the result (net, data set, images left out): plain values, kept with the state.
    After each epoch all state is in `state_file`, whole or the epoch before's; `resume` goes on from there and ends
    with the same weights as a run that was never stopped. Raises InputError where the file belongs to another recipe
    or bf16 has no GPU, Diverged where the loss is no longer finite.
    """
    device = train.labels.device
    if recipe.precision == "bf16" and device.type != "cuda":
        raise InputError("--precision bf16 needs a CUDA GPU (a CPU without its instructions is far slower); use fp32")
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    scheduler = _scheduler(optimizer, recipe, len(train))
    settings = dataclasses.asdict(recipe) | {"seed": seed} | (identity or {})
    history = _restore(state_file, settings, model, optimizer, scheduler) if resume else []
    for epoch in range(len(history), recipe.epochs):
        generator = seeds.generator(seed, "pretrain", epoch)
        with seeds.drawing(device, seed, "dropout", epoch):
            loss = _epoch(model, train, recipe, optimizer, scheduler, generator, progress)
        found = evaluate.predict(model, test.images, batch_size=test_batch_size)
        history.append({"epoch": epoch + 1, "loss": loss, "acc_test": evaluate.accuracy(found, test.labels)})
        _keep(state_file, settings, model, optimizer, scheduler, history)
        if on_epoch:
            on_epoch(history[-1])
    model.eval()
    return history


def _scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, num_images: int
) -> torch.optim.lr_scheduler.LRScheduler:
    steps = recipe.epochs * -(-num_images // recipe.batch_size)
    if recipe.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _epoch(
    model: nn.Module,
    train: Split,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    progress: Progress | None,
) -> float:
    """One time through the training set; returns the mean loss."""
    device = train.labels.device
    total = torch.zeros((), device=device)
    model.train()
    for indices in torch.randperm(len(train), generator=generator).split(recipe.batch_size):
        images = augment(train.images[indices].to(device), recipe.crop_padding, recipe.flip, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = model(as_pixels(images))
        loss = F.cross_entropy(logits.float(), train.labels[indices], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.detach() * len(indices)
        if progress:
            progress(len(indices))
    mean = total.item() / len(train)
    if not math.isfinite(mean):
        raise Diverged("the loss is no longer finite; take a smaller learning rate")
    return mean


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each of the images (n, 3, H, W) cropped at a place of its own from itself with a border, and mirrored or not."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (n, H), (n, W)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    picked = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # (n, H + 2p, W + 2p, 3)
    which = torch.arange(count, device=images.device)[:, None, None]
    return picked[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _keep(state_file: Path, settings: dict[str, object], model, optimizer, scheduler, history) -> None:
    state = {
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "history": history,
    }
    with atomic(state_file) as part:
        torch.save(state, part)


def _restore(state_file: Path, settings: dict[str, object], model, optimizer, scheduler) -> list[dict[str, float]]:
    """Load what `_keep` wrote; returns the history so far, empty where there is nothing to go on from."""
    if not state_file.exists():
        return []
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{state_file} is damaged ({type(error).__name__}); delete it to train anew") from None
    if state.get("settings") != settings:
        raise InputError(f"{state_file} is from another recipe, net or data set; give its settings, or no --resume")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["history"]
