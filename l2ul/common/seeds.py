"""Independent random streams: one for each purpose of a run, all derived from its seed."""

from collections.abc import Iterator
import contextlib
import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return the NumPy generator for (seed, purpose, counters).

    Equal arguments give equal numbers on every machine, in any order of work.
    """
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters])
    return np.random.Generator(np.random.Philox(key))


def generator(seed: int, purpose: str, *counters: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the torch generator for (seed, purpose, counters), by default on the CPU.

    A CUDA GPU draws other numbers than the CPU, but always the same.
    """
    return torch.Generator(device).manual_seed(_torch_seed(seed, purpose, *counters))


@contextlib.contextmanager
def fork_rng(device: torch.device, seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Seed torch's global generators for (seed, purpose, counters) inside the block, and restore them afterwards.

    For code that takes no generator, such as weight initialisation and dropout.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_torch_seed(seed, purpose, *counters))
        yield


def _torch_seed(seed: int, purpose: str, *counters: int) -> int:
    return int(stream(seed, purpose, *counters).integers(2**63))
