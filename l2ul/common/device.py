"""The device that a script computes on: choice, clock, peak memory and name; PyTorch's defaults for new tensors."""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path
import sys
import time

import torch
from torch import Tensor

from l2ul.common import distributed
from l2ul.common.errors import InputError

SAMPLES, SAMPLE_SECONDS = 3, 0.05  # of the number of running processes


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Make new tensors and layers float32 inside the block, whatever `torch.set_default_dtype` has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Make new tensors float32, and on the CPU unless their device is named, as PyTorch does without other defaults.

    Public functions have this as a decorator, as a caller may have set a default type or device.
    """
    is_cpu = torch.get_default_device().type == "cpu"  # torch.device as a context costs time at each call of torch
    with float32_by_default(), contextlib.nullcontext() if is_cpu else torch.device("cpu"):
        yield


def choose_device(
    name: str | None,
    no_cuda: bool = False,
    threads: int | None = None,
    report: Callable[[str], object] | None = None,
) -> torch.device:
    """Return the device that --device names, or without it the first available of CUDA, MPS and CPU.

    Under torchrun each process has its own GPU, or all processes use the CPU.

    name     value of --device
    no_cuda  whether --no-cuda excludes CUDA GPUs
    threads  number of CPU threads to set; None keeps torch's default
    report   called with a sentence if the CPU is busy. Without `threads` this process then uses fewer threads than
             there are cores: threads that wait for a core make a step slower than one thread. None: threads stay

    Raises InputError if the device is not available.
    """
    mps = torch.backends.mps.is_available() and distributed.size() == 1
    is_available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if no_cuda:
        if name == "cuda":
            raise InputError("--device cuda and --no-cuda contradict each other", "give one of them")
        is_available["cuda"] = False
    available = [device for device, there in is_available.items() if there]
    if name and name not in available:
        raise InputError(f"--device {name} is not available on this machine", f"expected one of {', '.join(available)}")
    if threads:
        torch.set_num_threads(threads)
    if (name or available[0]) == "cuda" and distributed.size() > 1:
        return _own_gpu()
    device = torch.device(name or available[0])
    if report and not threads and device.type == "cpu":
        _leave_busy_cores(report)
    return device


def _leave_busy_cores(report: Callable[[str], object]) -> None:
    """Use one thread for each core that no other process uses, and at least one, unless the user has chosen."""
    if "OMP_NUM_THREADS" in os.environ or distributed.size() > 1:  # torchrun sets it
        return
    busy, usual = round(other_processes()), torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if busy else usual
    threads = max(1, cores - busy)
    if threads < usual:
        torch.set_num_threads(threads)
        report(
            f"the machine is busy: about {busy} other processes compute on {cores} cores; using {threads} of "
            f"{usual} threads (--threads chooses their number)"
        )


def other_processes() -> float:
    """Return how many other processes compute, on Linux; 0 on other systems.

    It is the load average of the last minute, but at most the number of processes that are running at present: the load
    average also counts processes that have ended.
    """
    present = 0
    for _ in range(SAMPLES):
        try:
            running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
        except OSError:  # not Linux
            return 0.0
        present = max(present, int(running) - 1)  # without this process
        time.sleep(SAMPLE_SECONDS)
    return min(os.getloadavg()[0], present)


def _own_gpu() -> torch.device:
    number, count = distributed.local_rank(), torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"torchrun started more than {count} processes on a machine with {count} GPUs",
            f"give it --nproc-per-node {count}",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device. A copy from the CPU to a CUDA GPU uses pinned memory, so that the CPU goes on."""
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda")


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the CPU in pinned memory if the device is a CUDA GPU. Other tensors are returned as they are.

    The CPU does not wait for a copy from there to the GPU with `non_blocking`.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def clock(device: torch.device) -> float:
    """Return a time in seconds, after the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the peak memory on a CUDA GPU. That of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB, None on Windows.

    On a CUDA GPU that of torch since `reset_peak_memory`, otherwise that of the process so far.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def device_name(device: torch.device) -> str:
    """Return the name of the device in a record: that of the GPU or `cpu (4 threads)`, and ` x 8` for 8 processes."""
    name, threads = device.type, torch.get_num_threads()
    if device.type == "cpu":
        name = f"cpu ({threads} thread{'' if threads == 1 else 's'})"
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name} x {distributed.size()}" if distributed.size() > 1 else name
