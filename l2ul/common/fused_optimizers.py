"""Optimizers of torch that update all weights in one kernel."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


def fused(kind: type[Optimizer], parameters: Iterable[nn.Parameter], **options: object) -> Optimizer:
    """Return a fused optimizer of a kind, such as `torch.optim.SGD`, for the parameters.

    On CUDA its kernel needs gradients with the strides of the weights. Autograd may give other strides to dimensions of
    size 1, as of a convolution of 1 x 1 pixels whose weights are contiguous and whose inputs are channels-last.
    """
    optimizer = kind(parameters, fused=True, **options)
    optimizer.register_step_pre_hook(_match_strides)
    return optimizer


def _match_strides(optimizer: Optimizer, *_: object) -> None:
    """Give the gradients the strides of their weights; their memory stays, as only dimensions of size 1 differ."""
    for group in optimizer.param_groups:
        for weights in group["params"]:
            if weights.grad is not None and weights.grad.stride() != weights.stride():
                weights.grad = weights.grad.as_strided(weights.shape, weights.stride())
