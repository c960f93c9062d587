"""Agreement with the original model: an estimate of the damage to other images that needs no image of D_r."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from l2ul import Progress, attack
from l2ul.common import seeds
from l2ul.common.precision import exactly
from l2ul.data.images import pixels_of
from l2ul.data.mixes import KINDS
from l2ul.metrics import accuracy

SEED_OFFSET = 7_919  # added to the seed of a run, so that no method trains on the held-out examples
# ε of the attack (L2 over pixels in [0,1], for images of 32 x 32) and its iterations. So weak an attack moves examples
# only just across a decision boundary, where predictions change first. Of examples that the original model was certain
# of (ε = 1, or 20 iterations) hardly any prediction changed, however large the damage to test images was.
EPS, STEPS = 0.1, 3


@dataclass(frozen=True)
class Probe:
    """Images on which agreement is measured.

    images       (n, 3, H, W), uint8 or float in [0,1]
    predictions  (n,) int64, the original model's, on the CPU
    """

    name: str
    images: Tensor
    predictions: Tensor


@dataclass(frozen=True)
class Agreement:
    """Percent of the images of a probe that a model classifies as the original model does.

    low, high  95 % Wilson interval in percent, for images drawn like those of the probe
    count      images of the probe
    """

    name: str
    percent: float
    low: float
    high: float
    count: int


def held_out(
    model: nn.Module,
    images: Tensor,
    num_classes: int,
    *,
    count: int,
    seed: int,
    progress: Progress | None = None,
) -> Probe:
    """Make a probe of adversarial examples, with random targets, of mixes of images that no method trains on.

    model     the original model
    images    D_f or other images (k, 3, H, W), uint8 or float in [0,1], on the model's device
    count     number of examples
    progress  called with the number of examples times steps (STEPS) done since the last call

    The examples start from mixes because an example of an image of D_f depends on that image more than on others. The
    radius of the attack grows with the side of the images, so that the change of a pixel stays the same.
    """
    mixed = KINDS["mixes"](pixels_of(images), count, seeds.generator(seed + SEED_OFFSET, "held out"))
    eps = EPS * images.shape[-1] / 32
    settings = {"num_adv_images": 1, "eps": eps, "alpha": eps, "steps": STEPS, "seed": seed + SEED_OFFSET}
    predictions = accuracy.predict(model, mixed, fold=False).to(images.device)
    examples, _ = attack.adversarial_set(
        model, mixed, predictions, num_classes, fold=False, progress=progress, **settings
    )
    return make_probe("adversarial examples", model, examples)


@exactly()
def make_probe(name: str, model: nn.Module, images: Tensor) -> Probe:
    """Return a probe of these images with the predictions of the original model."""
    return Probe(name, images, accuracy.predict(model, images, fold=False))


@exactly()
def measure(model: nn.Module, probe: Probe) -> Agreement:
    """Measure a model's agreement with the original model on a probe: 100 percent for the original model itself.

    Raises Diverged if a logit is not finite.
    """
    same = accuracy.predict(model, probe.images, fold=False) == probe.predictions
    low, high = accuracy.interval(same, torch.ones_like(same))
    return Agreement(probe.name, 100 * float(same.double().mean()), low, high, len(same))


def overall(agreements: Sequence[Agreement]) -> float:
    """Return the mean agreement over probes in percent; every probe has the same weight."""
    return float(np.mean([each.percent for each in agreements]))
