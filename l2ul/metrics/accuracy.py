"""Predictions of a model for a data set in one pass, and accuracies."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from l2ul import Progress
from l2ul.common import distributed
from l2ul.common.bn_folding import folded
from l2ul.common.device import plain_defaults
from l2ul.common.errors import Diverged
from l2ul.common.memory import smaller_batch
from l2ul.common.modes import eval_mode
from l2ul.common.precision import exactly
from l2ul.data.folder import FolderImages
from l2ul.data.images import LARGE, as_pixels, batches, input_side
from l2ul.objective import Forget

BATCH_SIZE = {"cpu": (256, 64), "mps": (512, 64), "cuda": (2048, 256)}  # images per batch; of images above LARGE


def default_batch_size(device: torch.device, side: int) -> int:
    """Return the default number of images per batch, for square images with sides of `side` pixels."""
    return BATCH_SIZE[device.type][side > LARGE]


@plain_defaults()
def predict(
    model: nn.Module,
    images: Tensor | FolderImages,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    fold: bool = True,
    shared: bool = False,
    progress: Progress | None = None,
    strict: bool = True,
) -> Tensor:
    """Return the model's predictions (N,) int64 for the images, on the CPU. The model is in eval mode.

    images      (N, 3, H, W), uint8 or float in [0,1]
    batch_size  images per batch, by default `default_batch_size`
    workers     processes that decode images on disk
    fold        whether batch-norm is folded into convolutions; for a few images the search takes longer than it saves
    shared      under torchrun: all processes call this with the same model and images. Each computes some of the
                batches, and all get the predictions that a single process would compute.
    progress    called with the number of images done since the last call
    strict      raise Diverged if a logit is not finite, as argmax would still return a class; otherwise the prediction
                for the image is -1
    """
    parts = [torch.empty(0, dtype=torch.int64, device=next(model.parameters()).device)]
    options = {"batch_size": batch_size, "workers": workers, "fold": fold, "shared": shared, "on_device": True}
    for part in logits(model, images, **options):
        parts.append(torch.where(part.isfinite().all(1), part.argmax(1), -1))
        if progress:
            progress(len(part) * (distributed.size() if shared else 1))
    predictions = torch.cat(parts)
    predictions = distributed.all_gather(predictions) if shared else predictions.cpu()
    if strict and (predictions < 0).any():
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
