"""Relearning speed: a model that learns D_f faster than a retrained model still contains information about it."""

from collections.abc import Callable, Iterator
import copy
import itertools

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul.common import seeds
from l2ul.common.modes import in_eval_mode, trainable
from l2ul.data.images import LARGE, StoredImages, pixels_of

LEARNING_RATE, MOMENTUM = 1e-3, 0.9  # of SGD without weight decay; small, so that the number of steps separates models
BATCH_SIZE = 64  # images of D_f per step, at most
MAX_STEPS = 500
PREDICTED, LARGE_BATCH = 512, 64  # images per forward pass, small and large ones
OTHER_STEPS = 100  # of fine-tuning on images that are not in D_f


def steps_to_relearn(model: nn.Module, images: Tensor, labels: Tensor, accuracy: float) -> int:
    """Count the steps of fine-tuning on D_f until the model's accuracy on D_f is at least `accuracy`.

    images    D_f (k, 3, H, W), uint8 or float in [0,1], on the model's device
    labels    (k,) int64, the true classes
    accuracy  of the original model on D_f, in percent

    Returns 0 if the model has that accuracy already, and MAX_STEPS, meaning "that many or more", if it is not reached
    within MAX_STEPS - 1 steps. The model itself is not changed.
    """
    for step, predictions in enumerate(itertools.islice(_fine_tuning(model, images, labels, images), MAX_STEPS)):
        if 100 * int((predictions == labels).sum()) / len(labels) >= accuracy:
            return step
    return MAX_STEPS


def steps_to_relearn_each(
    model: nn.Module, images: Tensor, labels: Tensor, go_on: Callable[[], bool] = lambda: True
) -> tuple[list[int | None], int]:
    """Count, for each image, the steps of fine-tuning on all of D_f after which it is first classified correctly.

    images, labels  as for `steps_to_relearn`
    go_on           called before each step; fine-tuning stops if it returns False

    Returns the steps of each image, None if it was misclassified throughout, and the number of steps taken, at most
    MAX_STEPS - 1.
    """
    relearned: list[int | None] = [None] * len(labels)
    for step, predictions in enumerate(itertools.islice(_fine_tuning(model, images, labels, images), MAX_STEPS)):
        for position in (predictions == labels).nonzero().flatten().tolist():
            if relearned[position] is None:
                relearned[position] = step
        if None not in relearned or not go_on():
            break
    return relearned, step


def recognised_after_tuning(model: nn.Module, images: Tensor, labels: Tensor, others: Tensor, targets: Tensor) -> float:
    """Return the percentage of D_f that is predicted as its label after OTHER_STEPS of fine-tuning on other images.

    images, labels   D_f, as for `steps_to_relearn`
    others, targets  (n, 3, H, W) images that are not in D_f, on the same device, and their labels (n,)

    Fine-tuning on other images brings back what was hidden and not removed. The model itself is not changed.
    """
    predictions = next(itertools.islice(_fine_tuning(model, others, targets, images), OTHER_STEPS, None))
    return 100 * int((predictions == labels).sum()) / len(labels)


def _fine_tuning(model: nn.Module, images: Tensor, labels: Tensor, predicted: Tensor) -> Iterator[Tensor]:
    """Fine-tune a copy of the model on images; yield its predictions of others before and after each step, endlessly.

    The model is in eval mode, so that batch-norm is frozen and dropout is off. The loss is cross-entropy on batches
    whose order depends on their number alone, so that models are compared on the same batches.
    """
    tuned, pixels, predicted = in_eval_mode(copy.deepcopy(model)), pixels_of(images), pixels_of(predicted)
    order = seeds.generator(0, "relearn")
    optimizer = torch.optim.SGD(trainable(tuned), LEARNING_RATE, MOMENTUM)
    batches: list[Tensor] = []
    yield _predict(tuned, predicted)
    while True:
        batches = batches or list(torch.randperm(len(labels), generator=order).split(BATCH_SIZE))
        batch = batches.pop(0)
        optimizer.zero_grad()
        F.cross_entropy(tuned(pixels[batch]), labels[batch]).backward()
        optimizer.step()
        yield _predict(tuned, predicted)


@torch.no_grad()
def _predict(model: nn.Module, pixels: Tensor | StoredImages) -> Tensor:
    size = LARGE_BATCH if pixels.shape[-1] > LARGE else PREDICTED
    return torch.cat([model(part).argmax(1) for part in pixels.split(size)])
