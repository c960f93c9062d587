"""Set the mode or hooks of a model for a block and restore it; frozen copies, trained weights, batch-norm layers."""

from collections.abc import Iterable, Iterator
import contextlib
import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block. Each module gets its own mode back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def in_eval_mode(model: nn.Module) -> nn.Module:
    """Put the model in eval mode and return it. Its own `eval` or `train` may return nothing."""
    model.eval()
    return model


@contextlib.contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks after the block."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextlib.contextmanager
def counters_on_cpu(model: nn.Module) -> Iterator[None]:
    """Keep the batch counters of batch-norms on the CPU inside the block, where counting starts no kernel of a GPU."""
    counting = [module for module in model.modules() if getattr(module, "num_batches_tracked", None) is not None]
    devices = [module.num_batches_tracked.device for module in counting]
    for module in counting:
        module.num_batches_tracked = module.num_batches_tracked.cpu()
    try:
        yield
    finally:
        for module, device in zip(counting, devices, strict=True):
            module.num_batches_tracked = module.num_batches_tracked.to(device)


@contextlib.contextmanager
def same_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of each parameter after the block."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, required in requires_grad.items():
            parameter.requires_grad_(required)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and turn off gradients of its parameters inside the block.

    A backward pass inside the block then computes gradients of the inputs only.
    """
    with same_requires_grad(model), eval_mode(model):
        model.requires_grad_(False)
        yield


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return the batch-norm layers that have running statistics and update them in train mode, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model in eval mode whose parameters require no gradient, to serve as a teacher."""
    return in_eval_mode(copy.deepcopy(model)).requires_grad_(False)
