"""An emulated CUDA GPU: tensors that say they are on `cuda:0` and keep their values in CPU memory.

`pytest -p emulated_cuda tests/test_cuda.py` runs the tests marked `cuda` on it. Importing the module replaces parts of
torch for the rest of the process, so it belongs in a process of its own, and before any import of the project.

The device refuses what CUDA refuses: tensors of two devices in one operation (except CPU scalars and CPU indices),
NumPy arrays of its tensors, and CPU generators for its tensors. With `as_mps()` it says `mps` and refuses float64.
`counting()` counts kernels and host synchronisations, by the line of the project that causes them. A CUDA graph repeats
operations on the memory of its capture, in which the host must not wait. Not emulated are pinned memory, streams,
autocast, limits of memory and several GPUs.

How it works: torch knows the device as PrivateUse1. `Emulated` is a tensor subclass whose `__torch_dispatch__` computes
each operation on the values, and whose `device` is the CUDA device. `Devices` translates the name `cuda` in the
arguments of torch's functions.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
import contextlib
from dataclasses import dataclass, field
import functools
from pathlib import Path
import sys
import warnings

import torch
from torch import Tensor
import torch._dynamo  # before `_install`: it reads attributes of functions that are replaced
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = f"{Path(__file__).resolve().parent.parent}/"
NAME = "emulated"  # of the device inside torch
aten = torch.ops.aten


@dataclass
class Counts:
    """Numbers of kernels and of host synchronisations, by the operation and line that cause them."""

    kernels: Counter = field(default_factory=Counter)
    synchronisations: Counter = field(default_factory=Counter)

    def copy(self) -> "Counts":
        return Counts(self.kernels.copy(), self.synchronisations.copy())

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(self.kernels - earlier.kernels, self.synchronisations - earlier.synchronisations)


_visible = torch.device("cuda", 0)  # the device that its tensors say they are on
_counts: list[Counts] = []  # those of the `counting` blocks that are open
_capture: "CUDAGraph | None" = None  # the graph that is being captured
_sync_debug_mode = "default"  # "warn": warn of each synchronisation


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count kernels and synchronisations inside the block."""
    _counts.append(Counts())
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


@contextlib.contextmanager
def as_mps() -> Iterator[None]:
    """Let the device be `mps` inside the block, without float64. Create all its tensors in the block."""
    global _visible
    _visible = torch.device("mps", 0)
    try:
        yield
    finally:
        _visible = torch.device("cuda", 0)


def _place() -> str:
    """Return the line of the project, outside the tests, that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(f"{ROOT}tests/"):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _count_kernels(operation: object, number: int = 1) -> None:
    for counts in _counts:
        counts.kernels[f"{operation} {_place()}"] += number


def _count_synchronisation(operation: object) -> None:
    if _sync_debug_mode == "warn":
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
    if _capture:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation} at {_place()})")
    for counts in _counts:
        counts.synchronisations[f"{operation} {_place()}"] += 1


class Emulated(Tensor):
    """A tensor on the emulated device. `values` is a tensor on the CPU of the same shape and strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "Emulated":
        new = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
            layout=values.layout,
        )
        new.values = values
        return new

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})

    device = property(lambda self: _visible)
    is_cuda = property(lambda self: _visible.type == "cuda")
    is_mps = property(lambda self: _visible.type == "mps")

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{self.values!r} on {_visible}"

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {_visible} device type tensor to numpy. Use Tensor.cpu() first")
        return self.cpu().numpy()

    def __array__(self, dtype=None):
        return self.numpy()

    def tolist(self):
        _count_synchronisation("tolist")
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def pin_memory(self, device=None):
        raise RuntimeError("cannot pin a tensor of the device; only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone(memory_format=torch.preserve_format)
            is_parameter = getattr(self, "_is_param", False)
            copied = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int):
        _count_synchronisation("save")
        return self.values.detach().__reduce_ex__(protocol)  # files have CPU tensors


INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
DATA_DEPENDENT = {  # the host waits for a value or a shape
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
NO_KERNEL = {aten.detach.default, aten._unsafe_view.default, aten._local_scalar_dense.default, aten.alias.default}


def _is_internal(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME


def _values(value: object) -> object:
    """Return an argument with the values of its emulated tensors."""
    if isinstance(value, list | tuple):
        return [_values(one) for one in value]
    return value.values if isinstance(value, Emulated) else value


def _wrapped(result: object) -> object:
    """Return a result with emulated tensors."""
    if isinstance(result, list | tuple):
        return type(result)(map(_wrapped, result))
    return Emulated(result) if isinstance(result, Tensor) and not isinstance(result, Emulated) else result


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """Return the tensors among values and in the lists and tuples among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@dataclass
class Operation:
    """What the name and the schema of an operation say about it."""

    written: list[tuple[int, str]]  # places and names of the arguments that it changes in place
    returns_written: bool
    returns_nothing: bool
    has_kernel: bool
    is_fused: bool
    takes_lists: bool
    is_batch_norm: bool


@functools.cache
def _operation(function) -> Operation:
    name, schema = str(function), function._schema
    changes = [one.alias_info is not None and one.alias_info.is_write for one in schema.arguments]
    is_view = any(
        one.alias_info is not None and not changed for one, changed in zip(schema.arguments, changes, strict=True)
    )
    return Operation(
        written=[(place, one.name) for place, one in enumerate(schema.arguments) if changes[place]],
        returns_written=len(schema.returns) <= 1 and all(one.alias_info is not None for one in schema.returns),
        returns_nothing=not schema.returns,
        has_kernel=not (is_view or function in NO_KERNEL or ".empty" in name or "new_empty" in name),
        is_fused="fused" in name,
        takes_lists="foreach" in name or "fused" in name,
        is_batch_norm="batch_norm" in name,
    )


def _compute(function, args: tuple, kwargs: dict[str, object]) -> object:
    """Compute an operation with at least one emulated tensor."""
    if function is aten.as_strided_.default and tuple(args[0].shape) == tuple(args[1]):
        return args[0]  # adaptive pooling to 1 x 1 changes strides only
    if function in COPIES:
        return _copy(function, args, dict(kwargs))
    _check_devices(function, args, kwargs)
    if function in DATA_DEPENDENT:
        _count_synchronisation(function)
    operation = _operation(function)
    plain_args = [_values(one) for one in args]
    plain_kwargs = {name: _values(one) for name, one in kwargs.items()}
    if plain_kwargs.get("device") is not None:
        if not _is_internal(plain_kwargs["device"]):  # such as new_zeros of an emulated tensor on the CPU
            return function(*plain_args, **plain_kwargs)
        plain_kwargs["device"] = torch.device("cpu")
    if operation.has_kernel:  # the gradient of a convolution takes two: of inputs, and of weights
        _count_kernels(function, 2 if function is aten.convolution_backward.default and sum(args[-1]) > 1 else 1)
    written = [args[place] if place < len(args) else kwargs.get(name) for place, name in operation.written]
    if _capture:
        _capture.keep(_tensors(map(_values, [*written, *(plain_args[3:5] if operation.is_batch_norm else ())])))
    result = function(*plain_args, **plain_kwargs)
    if function is aten.convolution_backward.default and result[1] is not None:
        result = (result[0], _as_cudnn(result[1], plain_args[1]), result[2])
    if _capture:
        _capture.record(function, plain_args, plain_kwargs, result)
    for tensor in _tensors(written):
        if isinstance(tensor, Emulated) and tensor.shape != tensor.values.shape:
            raise NotImplementedError(f"{function} changes the shape of a tensor, which is not emulated")
    if written and operation.returns_written:
        return None if operation.returns_nothing else written[0]
    return _wrapped(result)


def _as_cudnn(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Return the gradient of weights with the strides that cuDNN gives it: those of the format of the inputs."""
    is_channels_last = inputs.ndim == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(gradient.shape, dtype=gradient.dtype, memory_format=memory_format).copy_(gradient)


def _check_devices(function, args: tuple, kwargs: dict[str, object]) -> None:
    """Raise RuntimeError for what CUDA refuses, and count what CUDA copies to the device for an operation."""
    operation, tensors = _operation(function), _tensors((*args, *kwargs.values()))
    if _visible.type == "mps" and any(tensor.dtype == torch.float64 for tensor in tensors):
        raise TypeError("the MPS framework doesn't support float64")
    if function in INDEXING:
        if not isinstance(args[0], Emulated):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        indices = [index for index in args[1] if index is not None]
        for index in indices:
            if not isinstance(index, Emulated):
                _count_synchronisation("copy of indices")
            if index.dtype in (torch.bool, torch.uint8):
                _count_synchronisation("index by a mask")
        tensors = args[2:3]
    if operation.is_fused:
        for tensors_of_weight in zip(*(some for some in args[:3] if some), strict=True):  # weights, gradients, moments
            if len({tensor.stride() for tensor in tensors_of_weight}) > 1:
                raise RuntimeError(f"params and grads must have the same layout in {function}")
    strangers = [tensor for tensor in tensors if isinstance(tensor, Tensor) and not isinstance(tensor, Emulated)]
    if any(tensor.ndim or operation.takes_lists for tensor in strangers):
        shapes = ", ".join(f"{tuple(one.shape)} on {one.device}" for one in tensors[:8])
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} has {shapes}")


def _copy(function, args: tuple, kwargs: dict[str, object]) -> object:
    """Copy a tensor within a device or between the device and the CPU; only the latter synchronises."""
    if function is aten._to_copy.default:
        source, is_blocking = args[0], not kwargs.pop("non_blocking", False)
        device = kwargs.pop("device", None)
        to_device = isinstance(source, Emulated) if device is None else _is_internal(device)
        result = function(_values(source), **kwargs)
        if _capture:
            _capture.record(function, (_values(source),), kwargs, result)
        result = _wrapped(result) if to_device else result
    else:
        target, source = args[:2] if function is aten.copy_.default else args[1::-1]
        to_device, is_blocking = isinstance(target, Emulated), not (args[2] if len(args) > 2 else False)
        if _capture:
            _capture.keep([_values(target)])
            _capture.record(aten.copy_.default, (_values(target), _values(source)), {}, _values(target))
        _values(target).copy_(_values(source))
        result = target
    if _visible.type == "mps" and to_device and result.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    if to_device != isinstance(source, Emulated) and is_blocking:
        _count_synchronisation("copy to the device" if to_device else "copy to the host")
    _count_kernels(function)
    return result


def _on_device(values: Tensor) -> Tensor:
    if _visible.type == "mps" and values.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return Emulated(values.detach()).requires_grad_(values.requires_grad)


class Devices(TorchFunctionMode):
    """Translate the visible name of the device in arguments of torch's functions; create tensors on it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        names_device = function is not torch.device and any(map(_is_visible, (*args, *kwargs.values())))
        if names_device:
            args = tuple(torch.device(NAME, 0) if _is_visible(one) else one for one in args)
            kwargs = {key: torch.device(NAME, 0) if _is_visible(one) else one for key, one in kwargs.items()}
        has_tensors = (generator or names_device) and any(isinstance(one, Tensor) for one in args)
        if generator is not None:
            on_device = any(isinstance(one, Emulated) for one in args) if has_tensors else names_device
            expected = _visible.type if on_device else "cpu"
            if generator.device.type != expected:
                raise RuntimeError(
                    f"Expected a '{expected}' device type for generator but found '{generator.device.type}'"
                )
        if names_device and "device" in kwargs and not has_tensors:
            return self._create(function, args, kwargs)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Emulated):
            index = args[1]
            index = tuple(map(_as_index, index)) if isinstance(index, tuple) else _as_index(index)
            args = (args[0], index, *args[2:])
        return function(*args, **kwargs)

    def _create(self, function, args: tuple, kwargs: dict[str, object]) -> Tensor:
        """Create a tensor on the device: by a kernel, or from numbers of the host."""
        if function in (torch.tensor, torch.as_tensor):
            _count_synchronisation("copy to the device")
        if not function.__name__.startswith("empty"):
            _count_kernels(function.__name__)
        kwargs = kwargs | {"device": "cpu"}
        values = function(*args, **kwargs)
        if _capture:
            _capture.record(function, args, kwargs, values)
        return _on_device(values)


def _as_index(index: object) -> object:
    return torch.tensor(index) if isinstance(index, list) else index


def _is_visible(value: object) -> bool:
    """Return whether a value names the emulated device."""
    return isinstance(value, str | torch.device) and str(value).split(":")[0] == _visible.type


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    return _on_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    return _on_device(torch.empty_strided(size, stride, dtype=dtype))


class CUDAGraph:
    """The operations of a capture, which change nothing until `replay` repeats them on the same memory."""

    def __init__(self):
        self._operations: list[tuple] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # tensors that operations change, and their values

    def keep(self, tensors: list[Tensor]) -> None:
        """Remember the values of tensors that the next operation changes."""
        self._before += [(tensor, tensor.clone()) for tensor in tensors]

    def record(self, function, args: Sequence[object], kwargs: dict[str, object], result: object) -> None:
        """Add an operation."""
        self._operations.append((function, args, kwargs, _tensors([result])))

    @contextlib.contextmanager
    def capture(self, **options: object) -> Iterator[None]:
        global _capture
        _capture = self
        try:
            yield
        finally:
            _capture = None
            for tensor, values in reversed(self._before):
                tensor.copy_(values)
            self._before.clear()

    def replay(self) -> None:
        _count_kernels("graph")
        for function, args, kwargs, results in self._operations:
            new = _tensors([function(*args, **kwargs)])
            for target, values in zip(results, new, strict=True):
                if target.data_ptr() != values.data_ptr():  # not a view or in place
                    target.copy_(values)


def _set_sync_debug_mode(mode: str) -> None:
    global _sync_debug_mode
    _sync_debug_mode = mode


class _Stream:
    def wait_stream(self, stream: "_Stream") -> None: ...


class Generator(torch.Generator):
    """A generator of random numbers that knows for which device it is."""

    def __new__(cls, device: object = "cpu") -> "Generator":
        new = super().__new__(cls)
        new.is_on_device = _is_visible(device)
        return new

    device = property(lambda self: _visible if self.is_on_device else torch.device("cpu"))


class _Backend(_DummyBackendModule):
    """Tells torch about the device; the CPU's generator draws its random numbers."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: None)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _inference_mode(mode: object = True) -> object:
    """Turn gradients off: in inference mode itself, tensor subclasses do not support views."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


def _install() -> torch.library.Library:
    """Register the device and replace what asks for a GPU; return the library, which must stay alive."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    torch.autograd.set_multithreading_enabled(False)  # so that the line of a kernel of a backward pass is known
    torch.__future__.set_swap_module_params_on_conversion(True)  # model.to(device) keeps the parameters, as on CUDA
    torch.inference_mode = _inference_mode
    Tensor.pin_memory = lambda self, device=None: self
    nothing = lambda *_: None  # noqa: E731
    replacements = {
        "is_available": lambda: _visible.type == "cuda",
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "emulated GPU",
        "mem_get_info": lambda device=None: (2**33, 2**33),
        "max_memory_allocated": lambda device=None: 2**30,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "synchronize": nothing,
        "get_rng_state": _Backend.get_rng_state,
        "set_rng_state": _Backend.set_rng_state,
        "CUDAGraph": CUDAGraph,
        "graph": CUDAGraph.capture,
        "graph_pool_handle": lambda: (0, 0),
        "Stream": _Stream,
        "current_stream": _Stream,
        "set_stream": nothing,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "get_sync_debug_mode": lambda: _sync_debug_mode,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "is_bf16_supported": lambda **_: True,
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    torch.Generator = Generator
    torch.backends.mps.is_available = lambda: _visible.type == "mps"
    torch.mps.synchronize = nothing
    Devices().__enter__()
    return library


_library = _install()
