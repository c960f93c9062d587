"""Distance between an unlearned model and a model that was retrained without D_f: accuracies, outputs and features."""

import math

import torch
from torch import Tensor, nn

from l2ul.common import seeds
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split
from l2ul.metrics import features
from l2ul.metrics.membership import ROWS

MAX_IMAGES = 512  # of each part, for the comparison of features


def tug_of_war(gaps: list[float]) -> float:
    """Compute Π (1 - gap / 100) over absolute accuracy gaps in percentage points on D_f, D_r and D_test.

    0 to 1, and 1 for the retrained model itself. Zhao et al. 2024 (arXiv 2406.01257).
    """
    return math.prod(1 - gap / 100 for gap in gaps)


def js_divergence(first: Tensor, second: Tensor) -> float:
    """Compute the Jensen-Shannon divergence between the predicted distributions of two models, in bits.

    first, second  logits (N, C) for the same images
    returns        mean over images, 0 for equal distributions to 1 for disjoint ones

    ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2 (Lin 1991), summed over classes, in double precision. The default
    reduction of torch's losses also divides by the number of classes.
    """
    divergence = torch.cat([_js_divergence(*part) for part in zip(first.split(ROWS), second.split(ROWS), strict=True)])
    return float(divergence.mean().clamp_min(0)) / math.log(2)


def _js_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the divergence (n,) of each image, in nats."""
    log_p, log_q = (logits.double().log_softmax(1) for logits in (first, second))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum((log.exp() * (log - log_m)).sum(1) for log in (log_p, log_q)) / 2


def feature_similarity(
    retrained: nn.Module, model: nn.Module, splits: dict[str, Tensor | FolderImages]
) -> dict[str, float]:
    """Compute the linear CKA of two models' features on the images of each split, averaged over layers.

    0 to 1, and 1 for equal features. See `features.cka`. Layers whose features are the same for all images are left
    out. The result is nan if no layer remains, as for a single image.
    """
    table = features.similarity(retrained, [("", model)], splits)
    return table.groupby("split")["cka"].mean().to_dict()


def comparison_images(forget: Split, test: Split) -> dict[str, Tensor | FolderImages]:
    """Choose the images on which features are compared: equally many of D_f and D_test, at most MAX_IMAGES of each.

    The numbers are equal because CKA on few images with many features is high for any two models. The choice depends
    on the sizes of the splits alone.
    """
    count = min(len(forget), len(test), MAX_IMAGES)
    return {name: _sample(split, count, name).images for name, split in (("forget", forget), ("test", test))}


def _sample(split: Split, count: int, purpose: str) -> Split:
    if count == len(split):
        return split
    order = torch.randperm(len(split), generator=seeds.generator(0, f"compared {purpose}"))
    return split.subset(order[:count].sort().values)
