"""What forgetting cost, estimated without the training set: how far the old model's answers are kept elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from l2ul import attack
from l2ul.common import seeds
from l2ul.data.images import as_pixels
from l2ul.data.mixes import mixes
from l2ul.metrics import accuracy

SEED = 7_919  # of held-out examples is that of the request plus this, so that no method was trained on them
# Of the attack: L2 over pixels in [0,1] of images of 32 x 32, and iterations. So little that examples come to lie at a
# boundary between classes, where answers change first. Of examples that the old model was sure of (ε = 1, or 20
# iterations) hardly any answer changed, whatever the damage to test images was.
EPS, STEPS = 0.1, 3


@dataclass(frozen=True)
class Probe:
    """Images (n, 3, H, W), uint8 or float in [0,1], and the classes (n,) int64 that the old model gave them."""

    name: str
    images: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Kept:
    """Percent of a probe's answers that are kept, of how many, with Wilson's 95 % interval.

    The interval is that of images drawn like these, not of what the model was trained on.
    """

    name: str
    percent: float
    low: float
    high: float
    count: int


def held_out(model: nn.Module, images: Tensor, num_classes: int, *, count: int, seed: int) -> Probe:
    """Adversarial examples of mixes of D_f, which no method is shown, each with a random target.

    images  (k, 3, H, W) uint8 or float in [0,1]
    count   of examples

    Mixes, as an example of an image to forget tells much of that image and little of others. The radius grows with the
    side of the image, so that a pixel changes as much.
    """
    mixed = mixes(as_pixels(images), count, seeds.generator(seed + SEED, "held out"))
    eps = EPS * images.shape[-1] / 32
    size = {"num_adv_images": 1, "eps": eps, "alpha": eps, "steps": STEPS, "seed": seed + SEED}
    called = accuracy.predict(model, mixed, fold=False).to(images.device)
    examples, _ = attack.adversarial_set(model, mixed, called, num_classes, fold=False, **size)
    return probe("adversarial examples", model, examples)


def probe(name: str, model: nn.Module, images: Tensor) -> Probe:
    """Images with the old model's answers to them."""
    return Probe(name, images, accuracy.predict(model, images, fold=False))  # few: to look what folds would take longer


def kept(model: nn.Module, probe: Probe) -> Kept:
    """How many of a probe's answers a model keeps; raises Diverged where its logits are not finite."""
    same = accuracy.predict(model, probe.images, fold=False) == probe.answers
    low, high = accuracy.interval(same, torch.ones_like(same))
    return Kept(probe.name, 100 * float(same.double().mean()), low, high, len(same))


def overall(found: Sequence[Kept]) -> float:
    """Percent of answers kept over several probes, each of the same weight."""
    return float(np.mean([one.percent for one in found]))
