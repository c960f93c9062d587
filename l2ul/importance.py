"""MAS importance of each weight for D_f, and the strength with which the penalty holds each weight."""

import torch
from torch import Tensor, nn

from l2ul import Progress
from l2ul.common.device import plain_defaults
from l2ul.common.modes import eval_mode
from l2ul.data.images import as_pixels


@plain_defaults()
def mas_importance(model: nn.Module, images: Tensor, progress: Progress | None = None) -> dict[str, Tensor]:
    """Compute Ω of each trainable parameter: the mean over single images of |∂‖g(x)‖₂ / ∂θ|, with g the logits.

    images    (k, 3, H, W) uint8 or float in [0,1]
    progress  called with 1 after each image
    returns   {parameter name: Ω}, each Ω of its parameter's shape and at least 0

    The model runs in eval mode with one gradient per image. A parameter that the logits do not depend on has Ω = 0.
    Source: Aljundi et al., Memory Aware Synapses (ECCV 2018, arXiv 1711.09601), as used in arXiv 2301.11578.
    """
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    with eval_mode(model):
        for image in as_pixels(images).split(1):
            norm = torch.linalg.vector_norm(model(image))
            gradients = torch.autograd.grad(norm, parameters, materialize_grads=True)
            torch._foreach_add_(total, torch._foreach_abs(gradients))
            if progress:
                progress(1)
    torch._foreach_div_(total, len(images))
    return dict(zip(names, total, strict=True))


def held_weights(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Ω̄ = 1 - Ω by parameter name, with Ω scaled min-max to [0,1] within each tensor.

    A weight with Ω̄ = 0 is free to move, one with Ω̄ = 1 is held most strongly. A tensor of constant Ω has Ω̄ = 1.
    """
    return {name: 1 - _min_max(omega) for name, omega in importance.items()}


def _min_max(omega: Tensor) -> Tensor:
    low, high = omega.aminmax()
    span = high - low
    return torch.where(span > 0, (omega - low) / span, torch.zeros_like(omega))
