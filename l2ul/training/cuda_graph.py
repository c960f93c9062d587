"""A forward and backward pass as a CUDA graph: one launch for all its kernels."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2ul.common import distributed
from l2ul.common.errors import InputError

WARM_UP = 3  # passes of each batch size that run without a graph first, in which libraries allocate what they need

Pass = Callable[[Tensor, Tensor, float], Tensor]  # images, labels, weight of the loss → loss (); sets the gradients


def require_support(device: torch.device) -> None:
    """Raise InputError if passes cannot be captured: on a device without CUDA graphs, or under torchrun."""
    if device.type != "cuda":
        raise InputError("--cuda-graph needs a CUDA GPU; leave it out on this device")
    if distributed.size() > 1:
        raise InputError("--cuda-graph is for one GPU; leave it out under torchrun")


@dataclass(frozen=True)
class _Captured:
    """A captured pass: `replay` reads `images` and `labels`, and writes `loss` and `gradients`."""

    images: Tensor
    labels: Tensor
    loss: Tensor
    gradients: list[Tensor | None]
    replay: Callable[[], object]


class GraphedPass:
    """Calls a pass, from the fourth time for a batch size on as the replay of a CUDA graph.

    The results are those of the pass: a replay runs the same kernels. The loss is overwritten by the next call.

    compute     the pass; it must neither read from the device nor depend on anything but its arguments and the weights.
                The weight of the loss is the same in all calls with a batch size
    parameters  those whose gradients it sets
    """

    def __init__(self, compute: Pass, parameters: Iterable[nn.Parameter]):
        self._compute, self._parameters = compute, list(parameters)
        self._captured: dict[int, _Captured] = {}  # by batch size
        self._calls: Counter[int] = Counter()

    def __call__(self, images: Tensor, labels: Tensor, weight: float) -> Tensor:
        size = len(images)
        if size not in self._captured:
            self._calls[size] += 1
            if self._calls[size] <= WARM_UP:
                return _beside(lambda: self._compute(images, labels, weight))
            self._captured[size] = self._capture(images, labels, weight)
        captured = self._captured[size]
        captured.images.copy_(images)
        captured.labels.copy_(labels)
        captured.replay()
        for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss

    def _capture(self, images: Tensor, labels: Tensor, weight: float) -> _Captured:
        images, labels = images.clone(), labels.clone()
        try:
            replay, loss = _record(lambda: self._compute(images, labels, weight))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--cuda-graph cannot capture this model ({reason}); leave it out") from None
        return _Captured(images, labels, loss, [parameter.grad for parameter in self._parameters], replay)


def _beside(compute: Callable[[], Tensor]) -> Tensor:
    """Run a pass on another stream than the default one, as torch requires before a capture."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        loss = compute()
    current.wait_stream(stream)
    return loss


def _record(compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Capture a pass without running it; return the function that runs it, and the loss that it will write."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads load images meanwhile
        loss = compute()
    return graph.replay, loss
