"""How a script runs: on which device, with what progress shown, and how it ends when something is wrong."""

import sys
import time

import torch

from l2ul.common import distributed
from l2ul.common.errors import InputError


def choose_device(asked: str | None, no_cuda: bool = False, threads: int | None = None) -> torch.device:
    """The device asked for, or the best there is, with so many CPU threads; InputError where it is not there.

    Under torchrun each process has a GPU of its own, or all are on the CPU.
    """
    mps = torch.backends.mps.is_available() and distributed.size() == 1
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if no_cuda:
        if asked == "cuda":
            raise InputError("--device cuda and --no-cuda contradict each other; give one of them")
        there["cuda"] = False
    found = [name for name, is_there in there.items() if is_there]
    if asked and asked not in found:
        raise InputError(f"--device {asked} is not there on this machine; expected one of {', '.join(found)}")
    if threads:
        torch.set_num_threads(threads)
    if (asked or found[0]) == "cuda" and distributed.size() > 1:
        return _own_gpu()
    return torch.device(asked or found[0])


def _own_gpu() -> torch.device:
    number, count = distributed.local_rank(), torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"torchrun started more than {count} processes on a machine with {count} GPUs; give it "
            f"--nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def clock(device: torch.device) -> float:
    """A clock in seconds, read once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory held so far, MiB: of the GPU by torch, else of this process; None where it is not told."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def device_name(device: torch.device) -> str:
    """What a record calls the device: the GPU's own name, or the kind and number of threads; and how many of them."""
    name = f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name} x {distributed.size()}" if distributed.size() > 1 else name
