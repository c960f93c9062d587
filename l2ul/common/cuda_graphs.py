"""Functions of tensors as CUDA graphs: one launch for all their kernels."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
import warnings

import torch
from torch import Tensor

from l2ul.common.device import pinned, upload
from l2ul.common.errors import first_line
from l2ul.common.nested import Nested, flat, gather, spread, upload_together

WARM_UP = 3  # calls with inputs of the same shapes that run without a graph, in which libraries allocate what they need
LARGEST = 8  # graphs of a function; each holds the memory of its results

Output = TypeVar("Output")


@dataclass(frozen=True)
class _Captured:
    """A graph that reads `inputs`, gathered tensors on the GPU, and writes `outputs` when it is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: object


class Graphed:
    """Call a function of tensors, from the fourth time for the same shapes on by the replay of a CUDA graph.

    A replay runs the kernels that the function would run. Calls before the fourth run them too, so that a step that is
    such a call is never lost or repeated. The tensors of the result are overwritten by a later call.

    compute  takes tensors on the GPU, nested or not, and returns a structure of tensors. It must not wait for the GPU
             nor read on the CPU what changes between two calls
    device   a CUDA GPU
    report   called with a sentence if the function cannot be captured; all calls then run without a graph

    Inputs on the CPU reach the GPU in one copy.
    """

    def __init__(self, compute: Callable[..., Output], device: torch.device, report: Callable[[str], object]):
        self.compute, self.device, self.report = compute, device, report
        self.is_possible = True
        self._captured: dict[object, _Captured] = {}  # by the shapes of the inputs
        self._calls: Counter[object] = Counter()
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Nested) -> Output:
        shapes = tuple((one.shape, one.stride(), one.dtype, one.device) for one in flat(inputs))
        captured = self._captured.get(shapes)
        if captured is None:
            calls = self._calls[shapes]
            if calls >= WARM_UP and self.is_possible and len(self._captured) < LARGEST:
                captured = self._capture(inputs)
            if captured is None:
                own = upload_together(inputs, self.device)
                outputs = self._run_watched(own) if calls == WARM_UP - 1 else self._run(own)
                self._calls[shapes] += 1  # a call that fails is repeated
                return outputs
            self._captured[shapes] = captured
        for static, value in zip(captured.inputs, gather(inputs), strict=True):
            static.copy_(pinned(value, self.device), non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def _run(self, inputs: Sequence[Nested]) -> Output:
        """Compute on the stream of the captures, as torch requires calls before a capture to be on a side stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self.compute(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _run_watched(self, inputs: Sequence[Nested]) -> Output:
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

    def _capture(self, inputs: Sequence[Nested]) -> _Captured | None:
        """Capture the function without running it; None if that is not possible."""
        static = [upload(one, self.device).clone() for one in gather(inputs)]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **options):  # other threads may load images meanwhile
                outputs = self.compute(*spread(static, inputs))
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream current
            self._give_up(first_line(error))
            return None
        return _Captured(graph, static, outputs)
