"""Predictions of a model for a data set in one pass, accuracies, and checks that model and data set fit."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from l2ul import Progress
from l2ul.common import distributed
from l2ul.common.bn_folding import folded
from l2ul.common.errors import Diverged, InputError
from l2ul.common.memory import smaller_batch
from l2ul.common.modes import eval_mode
from l2ul.common.precision import exactly
from l2ul.data import images as image_sets
from l2ul.data.folder import FolderImages
from l2ul.data.image_files import ImageReader
from l2ul.data.images import Images, as_pixels, batches, input_side
from l2ul.objective import Forget

BATCH_SIZE = {"cpu": (256, 64), "mps": (512, 64), "cuda": (2048, 256)}  # images per batch; of large images


def default_batch_size(device: torch.device, side: int) -> int:
    """Return the default number of images per batch, for square images with sides of `side` pixels."""
    return image_sets.default_batch_size(BATCH_SIZE, device, side)


def predict(
    model: nn.Module,
    images: Tensor | FolderImages,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    fold: bool = True,
    shared: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Return the model's predictions (N,) int64 for the images, on the CPU. The model is in eval mode.

    images      (N, 3, H, W), uint8 or float in [0,1]
    batch_size  images per batch, by default `default_batch_size`
    workers     processes that decode images on disk
    fold        whether batch-norm is folded into convolutions; for a few images the search takes longer than it saves
    shared      under torchrun: all processes call this with the same model and images. Each computes some of the
                batches, and all get the predictions that a single process would compute.
    progress    called with the number of images done since the last call

    Raises Diverged if a logit is not finite, as argmax would still return a class.
    """
    parts = [torch.empty(0, dtype=torch.int64, device=next(model.parameters()).device)]
    options = {"batch_size": batch_size, "workers": workers, "fold": fold, "shared": shared, "on_device": True}
    for part in logits(model, images, **options):
        parts.append(torch.where(part.isfinite().all(1), part.argmax(1), -1))
        if progress:
            progress(len(part) * (distributed.size() if shared else 1))
    predictions = torch.cat(parts)
    predictions = distributed.all_gather(predictions) if shared else predictions.cpu()
    if (predictions < 0).any():
        raise Diverged(f"the logits of {int((predictions < 0).sum())} of {len(predictions)} images are not finite")
    return predictions


@torch.inference_mode()
def logits(
    model: nn.Module,
    images: Tensor | FolderImages,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    fold: bool = True,
    shared: bool = False,
    on_device: bool = False,
) -> Iterator[Tensor]:
    """Yield the model's logits (n, C) for one batch of the images after the other.

    on_device  whether the logits stay on the model's device; by default they are on the CPU

    The other arguments are those of `predict`. With `shared`, only the batches of this process are computed. The model
    is in eval mode and folded until the iterator is exhausted or closed. When memory runs out, batches are computed in
    halves from then on.
    """
    device = next(model.parameters()).device
    sample = as_pixels(images[torch.tensor([0])])
    if batch_size is None:
        batch_size = default_batch_size(device, input_side(model, sample.shape[-1]))
    size = batch_size
    with folded(model, sample) if fold else eval_mode(model):
        for batch in batches(images, batch_size, device, workers, shared):
            output = None
            while output is None:
                try:
                    output = torch.cat([model(part) for part in batch.split(size)])
                except (RuntimeError, MemoryError) as error:
                    size = smaller_batch(min(size, len(batch)), error)
            yield output if on_device else output.cpu()


@exactly()
def forgotten(model: nn.Module, images: Tensor, forget: Forget) -> Tensor:
    """Return which images of D_f (k,) bool are forgotten, on the device of `forget`.

    images  (k, 3, H, W), the images of D_f or changed versions of them

    The passes are in fp32. Raises Diverged if a logit is not finite.
    """
    return forget.is_forgotten(predict(model, images, fold=False).to(forget.labels.device))


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the percentage of predictions (n,) that equal the labels (n,)."""
    return 100 * int((predictions == labels.to(predictions.device)).sum()) / len(labels)


def interval(predictions: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the 95 % Wilson interval, in percent, of the accuracy on the set from which these (n,) were drawn."""
    from scipy.stats import binomtest

    bounds = binomtest(int((predictions == labels).sum()), len(labels)).proportion_ci(0.95, method="wilson")
    return 100 * bounds.low, 100 * bounds.high


def complement(indices: Tensor, num_images: int) -> Tensor:
    """Return the indices of D_r in ascending order: those of 0 … num_images - 1 that are not in D_f's `indices`."""
    kept = torch.ones(num_images, dtype=torch.bool)
    kept[indices.cpu()] = False
    return kept.nonzero().flatten()


def check_trained_on(images: Images, metadata: dict[str, object], source: str) -> None:
    """Raise InputError if weights were trained on other images than `images`, as far as their file says.

    metadata  of the file of the weights. Compared are the options of the reader of image files and, for data sets that
              we split ourselves, train_sha256 and the keys of `images.settings` that it has
    source    name of the file
    """
    # a file of a main_pretrain script names each option that is not the default
    is_ours = "epochs" in metadata and metadata.get("dataset") == images.name
    for name, default in ImageReader().options.items():
        here = images.settings.get(name, default)
        trained = metadata.get(name, default if is_ours else here)
        if trained != here:
            flag = f"--{name.replace('_', '-')}"
            trained, here = (f"{flag} {value}" if value else f"no {flag}" for value in (trained, here))
            raise InputError(
                f"{source} was trained with {trained}, not {here}; use the same option, or train a classifier for it"
            )
    if not images.train_sha256:
        return
    for name, value in images.settings.items():
        if metadata.get(name) not in (None, value):
            raise InputError(
                f"{source} was trained with --{name.replace('_', '-')} {metadata[name]}, not {value}; use that value, "
                f"or train a classifier for {value}"
            )
    if metadata.get("train_sha256") not in (None, images.train_sha256):
        raise InputError(
            f"{source} was trained on other images of {images.name}, which may be among the test images here; "
            f"use the folder of images on which it was trained"
        )
