"""The terms of the loss (arXiv 2301.11578; Aljundi et al. 2018 for the penalty; those of `distill` are ours)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
import torch.nn.functional as F


@dataclass(frozen=True)
class Batch:
    """Images (n, 3, H, W) float in [0,1] and labels (n,) int64: true ones, new ones or adversarial targets."""

    images: Tensor
    labels: Tensor


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


def margin_loss(logits: Tensor, labels: Tensor, goal: str, margin: float) -> Tensor:
    """How far each image (n,) is from being forgotten by a margin; 0 where it is, so that nothing is left to gain.

    logits (n, C), labels (n,) int64: the true or the new ones. With z the logit of the label and z' the largest other
    one: max(0, z - z' + margin) to misclassify, max(0, z' - z + margin) to relabel. Bounded below, unlike -CE.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    ahead = own - other if goal == "misclassify" else other - own
    return F.relu(ahead + margin)


def divergence(logits: Tensor, original: Tensor) -> Tensor:
    """KL(p⁰ ‖ p), the mean over images of the sum over classes: logits of the model and of θ⁰, both (n, C)."""
    return F.kl_div(logits.log_softmax(1), original.log_softmax(1), log_target=True, reduction="batchmean")


def feature_gap(features: list[Tensor], original: list[Tensor], spreads: list[float]) -> Tensor:
    """Mean over layers of mean((f - f⁰)²) / spread: with the variance of f⁰ as the spread, what part of it is lost.

    features, original  of each layer, the model's and those of θ⁰ for the same images; spreads of each layer, above 0
    """
    layers = zip(features, original, spreads, strict=True)
    return torch.stack([F.mse_loss(now, then) / spread for now, then, spread in layers]).mean()


def importance_penalty(parameters: list[Tensor], reference: list[Tensor], held: list[Tensor]) -> Tensor:
    """½ Σ_i Ω̄_i (θ_i - θ⁰_i)² over all weights: parameters θ, reference θ⁰ and held Ω̄ of the same shapes."""
    return _Penalty.apply(reference, held, *parameters)


class _Penalty(torch.autograd.Function):
    """The penalty with its gradient Ω̄ (θ - θ⁰) written down: a few calls for all tensors, where autograd takes many."""

    @staticmethod
    def forward(context, reference: list[Tensor], held: list[Tensor], *parameters: Tensor) -> Tensor:
        moved = torch._foreach_sub(parameters, reference)
        pull = torch._foreach_mul(moved, held)
        context.save_for_backward(*pull)
        return 0.5 * torch.stack([torch.sum(part) for part in torch._foreach_mul(moved, pull)]).sum()

    @staticmethod
    @once_differentiable
    def backward(context, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(context.saved_tensors, scale)
