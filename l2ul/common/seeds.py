"""Random streams: each choice of a run has its own, named by its purpose, from the one seed in the options."""

from collections.abc import Iterator
import contextlib
import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A counter-based stream for one (seed, purpose, counters): the same on every machine and in any order of work."""
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters])
    return np.random.Generator(np.random.Philox(key))


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """The same for torch's own functions: a CPU generator for one (seed, purpose, counters)."""
    return torch.Generator().manual_seed(_torch_seed(seed, purpose, *counters))


@contextlib.contextmanager
def fork_rng(device: torch.device, seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """What draws from torch's own generators inside the block (first weights, dropout) does so from one stream."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_torch_seed(seed, purpose, *counters))
        yield


def _torch_seed(seed: int, purpose: str, *counters: int) -> int:
    return int(stream(seed, purpose, *counters).integers(2**63))
