"""How far a net is from one retrained without D_f: gaps of accuracies, of outputs and of features."""

import math

import torch
from torch import Tensor, nn

from l2ul.common import seeds
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split
from l2ul.metrics import features

MOST_IMAGES = 512  # that features are compared on


def tug_of_war(gaps: list[float]) -> float:
    """Π (1 - gap / 100) over accuracy gaps in points to the retrained net, on D_f, D_r and D_test: 0 to 1, which is it.

    Zhao et al. 2024 (arXiv 2406.01257).
    """
    return math.prod(1 - gap / 100 for gap in gaps)


def divergence(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence of two nets' class probabilities, of logits (N, C), in bits, mean over images: 0 to 1.

    ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2 (Lin 1991), each summed over classes, in double precision. A mean
    over images and classes, as torch's losses take by default, would be C times smaller.
    """
    log_p, log_q = (logits.double().log_softmax(1) for logits in (first, second))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    each = sum((log.exp() * (log - log_m)).sum(1) for log in (log_p, log_q)) / 2  # (N,), nats
    return float(each.mean().clamp_min(0)) / math.log(2)


def alikeness(retrained: nn.Module, model: nn.Module, splits: dict[str, Tensor | FolderImages]) -> dict[str, float]:
    """Linear CKA of the two nets' features on the images of each split, mean over layers: 0 to 1, which is the same.

    See `features.cka`. Layers whose features are the same for all images do not count; nan where that is all of them,
    as it is for a single image.
    """
    table = features.similarity(retrained, [("", model)], splits)
    return table.groupby("split")["cka"].mean().to_dict()


def compared(forget: Split, test: Split) -> dict[str, Tensor | FolderImages]:
    """The images that features are compared on: of D_f at most MOST_IMAGES, and as many of D_test; always the same.

    As many, because CKA on few images of many features is high whatever the nets.
    """
    count = min(len(forget), len(test), MOST_IMAGES)
    return {name: _some(split, count, name).images for name, split in (("forget", forget), ("test", test))}


def _some(split: Split, count: int, purpose: str) -> Split:
    if count == len(split):
        return split
    order = torch.randperm(len(split), generator=seeds.generator(0, f"compared {purpose}"))
    return split.subset(order[:count].sort().values)
