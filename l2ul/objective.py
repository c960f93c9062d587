"""The terms of the loss and the definition of "forgotten".

Misclassification, relabelling and the importance penalty are those of Cha et al., Learning to Unlearn (AAAI 2024,
arXiv 2301.11578). The penalty itself is from Aljundi et al., Memory Aware Synapses (ECCV 2018, arXiv 1711.09601). The
margin loss and the feature gap belong to this project's method `distill` (see `l2ul.methods.distill`).

Shapes: n images of a batch, k images of D_f, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
import torch.nn.functional as F

Terms = dict[str, Tensor]  # of the loss, which is their sum; each term is a column of the curve


@dataclass(frozen=True)
class Batch:
    """A mini-batch: images (n, 3, H, W) float in [0,1] and labels (n,) int64.

    The labels are true classes, new classes of D_f or targets of adversarial examples.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Forget:
    """The forget set D_f.

    images      (k, 3, H, W) float in [0,1]; many large ones as StoredImages, which are indexed like a tensor
    labels      (k,) int64, the true classes
    new_labels  (k,) int64, the classes to relabel the images with; None to have them misclassified
    """

    images: Tensor
    labels: Tensor
    new_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def goal(self) -> str:
        """The goal, "misclassify" or "relabel"."""
        return "misclassify" if self.new_labels is None else "relabel"

    @property
    def target_labels(self) -> Tensor:
        """The labels (k,) in L_forget: the true classes to misclassify, the new classes to relabel."""
        return self.labels if self.new_labels is None else self.new_labels

    def is_forgotten(self, predictions: Tensor) -> Tensor:
        """Return which images (k,) bool are forgotten, from the predicted classes (k,) of all of D_f."""
        return is_forgotten(predictions, self.target_labels, self.goal)


def is_forgotten(predictions: Tensor, labels: Tensor, goal: str) -> Tensor:
    """Return which images (n,) bool are forgotten. This function is the only definition of "forgotten".

    predictions  (n,) int64, the predicted classes
    labels       (n,) int64: the true classes with the goal "misclassify", the new classes with the goal "relabel"

    An image is forgotten if the prediction differs from its true class, or equals its new class.
    """
    equal = predictions == labels
    return ~equal if goal == "misclassify" else equal


def forget_loss(logits: Tensor, labels: Tensor, goal: str) -> Tensor:
    """Compute L_forget, a scalar: the mean over a batch of -CE (gradient ascent) to misclassify or of CE to relabel.

    logits (n, C), labels (n,) int64: the true classes to misclassify, the new classes to relabel. Not bounded below
    with the goal "misclassify".
    """
    loss = F.cross_entropy(logits, labels)
    return -loss if goal == "misclassify" else loss


def margin_loss(logits: Tensor, labels: Tensor, goal: str, margin: float | Tensor) -> Tensor:
    """Compute for each image (n,) how far its logits are from forgetting it by a margin; 0 beyond the margin.

    logits (n, C), labels (n,) int64: the true classes to misclassify, the new classes to relabel. With z the logit of
    the label and z' the largest of the other logits,

        max(0, z - z' + margin) to misclassify,    max(0, z' - z + margin) to relabel.

    Unlike -CE, this loss is bounded below by 0.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    ahead = own - other if goal == "misclassify" else other - own
    return F.relu(ahead + margin)


def kl_divergence(logits: Tensor, original: Tensor) -> Tensor:
    """Compute KL(p⁰ ‖ p) = Σ_c p⁰_c (log p⁰_c - log p_c), a scalar: the mean over images, in nats.

    logits, original  (n, C), the logits of p (the model) and of p⁰ (the original model)
    """
    return F.kl_div(logits.log_softmax(1), original.log_softmax(1), log_target=True, reduction="batchmean")


def feature_gap(features: list[Tensor], original: list[Tensor], variances: list[float]) -> Tensor:
    """Compute the mean over layers of mean((f - f⁰)²) / variance, a scalar.

    features, original  of each layer, any shape: f of the model and f⁰ of the original model on the same images
    variances           of f⁰ of each layer, above 0; infinity leaves a layer out

    The gap is the part of the variance of the original features that is lost, whatever their scale.
    """
    return _FeatureGap.apply(original, variances, *features)


class _FeatureGap(torch.autograd.Function):
    """The gap of features with its gradient in closed form, which needs a few calls for all layers together."""

    @staticmethod
    def forward(context, original: list[Tensor], variances: list[float], *features: Tensor) -> Tensor:
        difference = torch._foreach_sub(features, original)
        context.variances = variances
        context.save_for_backward(*difference)
        roots = [(one.numel() * variance) ** -0.5 for one, variance in zip(features, variances, strict=True)]
        norms = torch._foreach_norm(difference, dtype=torch.float32)  # differences may be in bf16
        return torch.stack(torch._foreach_mul(norms, roots)).square().mean()

    @staticmethod
    @once_differentiable
    def backward(context, scale: Tensor) -> tuple[Tensor | None, ...]:
        difference, count = context.saved_tensors, len(context.variances)
        gradients = torch._foreach_mul(difference, [2 / one.numel() for one in difference])
        torch._foreach_mul_(gradients, torch._foreach_div([scale / count] * count, context.variances))
        return None, None, *gradients


def importance_penalty(parameters: list[Tensor], reference: list[Tensor], held: list[Tensor]) -> Tensor:
    """Compute ½ Σ_i Ω̄_i (θ_i - θ⁰_i)² over all weights, a scalar.

    parameters θ, reference θ⁰ and held Ω̄ in [0,1]: tensors of the same shapes in the same order (see
    `importance.held_weights`)
    """
    return _ImportancePenalty.apply(reference, held, *parameters)


class _ImportancePenalty(torch.autograd.Function):
    """The penalty with its gradient Ω̄ (θ - θ⁰) in closed form, which needs a few calls for all tensors together."""

    @staticmethod
    def forward(context, reference: list[Tensor], held: list[Tensor], *parameters: Tensor) -> Tensor:
        difference = torch._foreach_sub(parameters, reference)
        gradient = torch._foreach_mul(difference, held)
        context.save_for_backward(*gradient)
        squares = torch._foreach_mul(difference, gradient)  # at least 0, so that the 1-norm is the sum
        return 0.5 * torch.stack(torch._foreach_norm(squares, 1)).sum()

    @staticmethod
    @once_differentiable
    def backward(context, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(context.saved_tensors, scale)
