"""How fast a net learns D_f again: one that is faster than a net that never saw D_f still holds some of it."""

from collections.abc import Callable, Iterator
import copy

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul.common import seeds
from l2ul.data.images import as_pixels

LEARNING_RATE, MOMENTUM = 1e-3, 0.9  # of SGD, without weight decay: small, so that steps tell nets apart
BATCH_SIZE = 64  # images of D_f a step, at most
MOST_STEPS = 500


def steps_to_relearn(model: nn.Module, images: Tensor, labels: Tensor, accuracy: float) -> int:
    """Steps of fine-tuning on D_f until that many percent of it are called by their labels again.

    images    D_f, (k, 3, H, W), uint8 or float in [0,1]; labels (k,) int64, the true classes; on the model's device
    accuracy  of the original model on D_f, 0 to 100

    0 where the accuracy is there already; MOST_STEPS where it is not reached by then, so read that as "or more".
    """
    for step, called in enumerate(_relearning(model, images, labels)):
        if 100 * int((called == labels).sum()) / len(labels) >= accuracy:
            return step
    return MOST_STEPS


def steps_until_back(
    model: nn.Module, images: Tensor, labels: Tensor, go_on: Callable[[], bool] = lambda: True
) -> tuple[list[int | None], int]:
    """For each image, the steps of fine-tuning on all of them after which it is first called by its label again.

    images, labels  as of `steps_to_relearn`
    go_on           asked before each step

    None for an image that is not called so by then; and the steps that were taken, MOST_STEPS at most.
    """
    back: list[int | None] = [None] * len(labels)
    for step, called in enumerate(_relearning(model, images, labels)):  # noqa: B007  # told at the end
        for place in (called == labels).nonzero().flatten().tolist():
            back[place] = step if back[place] is None else back[place]
        if None not in back or not go_on():
            break
    return back, step


def _relearning(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """The classes (k,) that a copy of the model gives D_f, before and after each of MOST_STEPS steps of fine-tuning.

    In eval mode, so that batch-norm is frozen and dropout off. Cross-entropy on batches whose order depends on k
    alone: two nets on one D_f see the same ones.
    """
    tuned, pixels = copy.deepcopy(model).eval(), as_pixels(images)
    order = seeds.generator(0, "relearn")
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM)
    batches: list[Tensor] = []
    for _ in range(MOST_STEPS):
        yield _called(tuned, pixels)
        batches = batches or list(torch.randperm(len(labels), generator=order).split(BATCH_SIZE))
        batch = batches.pop(0)
        optimizer.zero_grad()
        F.cross_entropy(tuned(pixels[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def _called(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in pixels.split(512)])
