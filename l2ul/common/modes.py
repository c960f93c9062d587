"""Which mode a model is in while a piece of the method runs on it; put back afterwards."""

from collections.abc import Iterator
import contextlib
import copy

from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode (running statistics used and kept, dropout off) inside the block."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights ask for no gradient: a teacher."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no weight asks for a gradient, so that a backward pass computes input gradients alone."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter, was in asked.items():
            parameter.requires_grad_(was)
