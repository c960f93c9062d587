"""Functions of tensors as CUDA graphs: one launch for all their kernels."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
import warnings

import torch
from torch import Tensor

from l2ul.common.errors import first_line

WARM_UP = 3  # calls with inputs of the same shapes that run without a graph, in which libraries allocate what they need
LARGEST = 8  # graphs of a function; each holds the memory of its results

Output = TypeVar("Output")


@dataclass(frozen=True)
class _Captured:
    """A graph that reads `inputs` and writes `outputs` when it is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: object


class Graphed:
    """Call a function of tensors, from the fourth time for the same shapes on by the replay of a CUDA graph.

    A replay runs the kernels that the function would run. Calls before the fourth run them too, so that a step that is
    such a call is never lost or repeated. The tensors of the result are overwritten by a later call.

    compute  takes tensors on the GPU and numbers, and returns a structure of tensors. It must not wait for the GPU nor
             read on the CPU what changes between two calls, other than its arguments
    report   called with a sentence if the function cannot be captured; all calls then run without a graph
    """

    def __init__(self, compute: Callable[..., Output], report: Callable[[str], object]):
        self.compute, self.report = compute, report
        self.is_possible = True
        self._captured: dict[object, _Captured] = {}  # by the shapes of the inputs
        self._calls: Counter[object] = Counter()
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor | float) -> Output:
        shapes = tuple((one.shape, one.stride(), one.dtype) if isinstance(one, Tensor) else None for one in inputs)
        captured = self._captured.get(shapes)
        if captured is None:
            calls = self._calls[shapes]
            if calls >= WARM_UP and self.is_possible and len(self._captured) < LARGEST:
                captured = self._capture(inputs)
            if captured is None:
                outputs = self._run_watched(inputs) if calls == WARM_UP - 1 else self._run(inputs)
                self._calls[shapes] += 1  # a call that fails is repeated
                return outputs
            self._captured[shapes] = captured
        for static, value in zip(captured.inputs, inputs, strict=True):
            static.copy_(value) if isinstance(value, Tensor) else static.fill_(value)
        captured.graph.replay()
        return captured.outputs

    def _run(self, inputs: tuple[Tensor | float, ...]) -> Output:
        """Compute on the stream of the captures, as torch requires calls before a capture to be on a side stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self.compute(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _run_watched(self, inputs: tuple[Tensor | float, ...]) -> Output:
        """Run, and capture nothing later if the function waits for the GPU.

        A capture of such a function would fail, and leave torch's allocator in a state of capturing.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                outputs = self._run(inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if self.is_possible and any("called a synchronizing CUDA operation" in str(one.message) for one in caught):
            self._give_up("it waits for the GPU")
        return outputs

    def _give_up(self, reason: str) -> None:
        self.is_possible = False
        self.report(f"steps run without CUDA graphs, as this model cannot be captured ({reason})")

    def _capture(self, inputs: tuple[Tensor | float, ...]) -> _Captured | None:
        """Capture the function without running it; None if that is not possible."""
        device = next(one.device for one in inputs if isinstance(one, Tensor)) if inputs else "cuda"
        copies = [one.clone() if isinstance(one, Tensor) else torch.tensor(one, device=device) for one in inputs]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **options):  # other threads may load images meanwhile
                outputs = self.compute(*copies)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream current
            self._give_up(first_line(error))
            return None
        return _Captured(graph, copies, outputs)
