"""Which mode a model is in while a piece of the method runs on it; put back afterwards."""

from collections.abc import Iterator
import contextlib

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (running statistics used and kept, dropout off) inside the block."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no weight asks for a gradient, so that a backward pass computes input gradients alone."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, was in asked.items():
            parameter.requires_grad_(was)
