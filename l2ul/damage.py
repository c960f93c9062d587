"""What forgetting cost, estimated without the training set: how far the old model's answers are kept elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from l2ul import attack, evaluate

SEED = 7_919  # of held-out examples is that of the request plus this, so that no method was trained on them
# Of the attack: L2 over pixels in [0,1] of images of 32 x 32, and iterations. Examples only just over the boundary tell
# models apart; at ε = 1 and more the old net was so sure of them that no answer changed whatever the damage.
EPS, STEPS = 0.3, 20


@dataclass(frozen=True)
class Probe:
    """Images on which answers should stay as they were.

    images   (n, 3, H, W) uint8 or float in [0,1]; answers (n,) int64, the classes that the old model gave them
    groups   (n,) int64: images of one group were made from one image, so they tell less than as many others
    """

    name: str
    images: Tensor
    answers: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Kept:
    """Percent of a probe's answers that are kept, with a 95 % interval, and of how many."""

    name: str
    percent: float
    low: float
    high: float
    count: int


def held_out(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int, *, count: int, seed: int) -> Probe:
    """Adversarial examples of D_f that no method is shown: what the old model calls something else than D_f.

    images  (k, 3, H, W) uint8 or float in [0,1] of any size; labels (k,) int64, what they are called
    count   of examples in all, rounded to as many of each image

    The radius grows with the side of the image, so that a pixel changes as much.
    """
    eps = EPS * images.shape[-1] / 32
    draws = max(1, round(count / len(images)))
    size = {"num_adv_images": draws, "eps": eps, "alpha": eps / 5, "steps": STEPS, "seed": seed + SEED}
    examples, _ = attack.adversarial_set(model, images, labels, num_classes, **size)
    return probe("adversarial examples", model, examples, torch.arange(len(images)).repeat_interleave(draws))


def probe(name: str, model: nn.Module, images: Tensor, groups: Tensor | None = None) -> Probe:
    """Images with the old model's answers to them; each by itself unless they were made in groups."""
    answers = evaluate.predict(model, images, pairs=[])  # few: to look what can be folded would take longer
    return Probe(name, images, answers, torch.arange(len(answers)) if groups is None else groups)


def kept(model: nn.Module, probe: Probe, seed: int = 0) -> Kept:
    """How many of a probe's answers a model keeps.

    The interval is the wider one, at either end, of Wilson's for as many images and of a bootstrap over groups.
    Raises Diverged where the model's logits are not finite.
    """
    same = evaluate.predict(model, probe.images, pairs=[]) == probe.answers
    low, high = evaluate.interval(same, torch.ones_like(same))
    shares = np.array([same[probe.groups == group].double().mean().item() for group in probe.groups.unique()])
    drawn = np.random.default_rng(seed).integers(len(shares), size=(2000, len(shares)))
    ends = np.percentile(100 * shares[drawn].mean(1), [2.5, 97.5])
    percent = 100 * float(same.double().mean())
    return Kept(probe.name, percent, min(low, float(ends[0])), max(high, float(ends[1])), len(same))


def overall(found: Sequence[Kept]) -> float:
    """Percent of answers kept over several probes, each of the same weight."""
    return float(np.mean([one.percent for one in found]))
