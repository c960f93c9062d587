"""The terms of the loss (arXiv 2301.11578; Aljundi et al. 2018 for the penalty)."""

from dataclasses import dataclass

from torch import Tensor
import torch.nn.functional as F

GOALS = ("misclassify", "relabel")


@dataclass(frozen=True)
class Forget:
    """D_f: images (k, 3, H, W) float in [0,1], true labels (k,) int64 and, to relabel, new labels (k,)."""

    images: Tensor
    labels: Tensor
    new_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def goal(self) -> str:
        return "misclassify" if self.new_labels is None else "relabel"

    @property
    def wanted(self) -> Tensor:
        """The labels (k,) that L_forget is about: true ones to get away from, or new ones to be called."""
        return self.labels if self.new_labels is None else self.new_labels

    def done(self, predictions: Tensor) -> Tensor:
        """Which images (k,) are forgotten: not called their true class, or called the new one."""
        same = predictions == self.wanted
        return ~same if self.new_labels is None else same


def forget_loss(logits: Tensor, labels: Tensor, goal: str) -> Tensor:
    """L_forget: to misclassify, -CE to the true labels, gradient ascent; to relabel, CE to the new labels.

    logits (n, C), labels (n,) int64: the true or the new ones; returns a scalar, the mean over the images.
    """
    loss = F.cross_entropy(logits, labels)
    return -loss if goal == "misclassify" else loss


def importance_penalty(parameters: list[Tensor], reference: list[Tensor], held: list[Tensor]) -> Tensor:
    """½ Σ_i Ω̄_i (θ_i - θ⁰_i)² over all weights: parameters θ, reference θ⁰ and held Ω̄ of the same shapes."""
    pairs = zip(parameters, reference, held, strict=True)
    return 0.5 * sum((weight * (now - before).square()).sum() for now, before, weight in pairs)
