"""Run on the processes that torchrun started: the process group, its collectives and data-parallel training.

Without torchrun there is one process, and every function works without communication.
"""

from collections.abc import Callable, Iterator
import contextlib
from datetime import timedelta
import os
import time
import warnings

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parallel import DistributedDataParallel

from l2ul.common.modes import batch_norms

TIMEOUT = timedelta(days=30)  # the other processes wait while the first unlearns; torchrun detects lost processes
JOINING = 60.0  # seconds, at most, that a process with an error waits for others that are still joining
LOST = (  # in the messages of torch about a process that ended
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)

_store: list[dist.Store] = []  # shared by all processes, also while they end; counts "joined" and "ended" processes


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started into one group inside the block. Only the first one prints.

    The backend is NCCL for tensors on CUDA GPUs and gloo for everything else.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    options = {"rank": rank, "world_size": size, "timeout": TIMEOUT}
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), **options)
    _store[:] = [dist.PrefixStore("l2ul", store)]
    _store[0].add("joined", 1)
    with contextlib.ExitStack() as stack:
        if rank:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield
        except Exception:
            _wait_for_joining(size)
            raise
        dist.destroy_process_group()  # skipped after an error, when other processes may not respond


def _wait_for_joining(size: int) -> None:
    """Wait until all processes have joined: one that is still joining would report the end of this one as its error."""
    deadline = time.monotonic() + JOINING
    with contextlib.suppress(RuntimeError):  # the process that held the store has ended
        while _store[0].add("joined", 0) < size and time.monotonic() < deadline:
            time.sleep(0.05)


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Return whether this is the first process, which prints and writes records, caches and checkpoints."""
    return rank() == 0


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def shard(count: int) -> slice:
    """Return this process's share of `count` items. Shares are disjoint, and their lengths differ by at most 1."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def all_reduce(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place. Their shape must be equal in all processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(part: Tensor) -> Tensor:
    """Return the parts of all processes, concatenated in order of rank, on the CPU. A part may be empty."""
    if size() == 1:
        return part.cpu()
    parts = [None] * size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts)


def gather(value: object) -> list:
    """Return the objects of all processes, in order of rank, in the first process; an empty list in the others."""
    if size() == 1:
        return [value]
    values = [None] * size() if is_first() else None
    dist.gather_object(value, values)
    return values or []


def broadcast(compute: Callable[[], object]) -> object:
    """Call `compute` in the first process and return its result in every process.

    For decisions that depend on files, which other processes may see later or not at all.
    """
    box = [compute() if is_first() else None]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def local_first() -> Iterator[None]:
    """Run the block in the first process of each machine before the others, which then find the files it downloaded."""
    if size() > 1 and local_rank():
        dist.barrier()
    yield
    if size() > 1 and not local_rank():
        dist.barrier()


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Copy the weights and buffers of the first process's model into the models of the other processes, in place."""
    if size() == 1:
        return
    for _, tensor in sorted((dict(model.named_parameters()) | dict(model.named_buffers())).items()):
        values = tensor.detach().contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)


def data_parallel(model: nn.Module) -> nn.Module:
    """Return the model for data-parallel training: backward passes average the gradients over all processes."""
    if size() == 1:
        return model
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch rename broadcast_buffers
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )


@contextlib.contextmanager
def shared_statistics(model: nn.Module) -> Iterator[None]:
    """Give batch-norm equal running statistics in all processes at the end of the block, an epoch of training.

    On GPUs, batches are normalised with the statistics of all processes' images (SyncBatchNorm). Other devices do not
    support that: each process normalises with its own statistics, and the running statistics are averaged at the end
    of the block.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    if size() == 1 or not norms:
        yield
        return
    on_gpu = next(model.parameters()).device.type == "cuda"
    try:
        for name, module in norms.items() if on_gpu else ():  # the replacements share weights and statistics
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
        yield
    finally:
        for name, module in norms.items() if on_gpu else ():
            model.set_submodule(name, module)
    for module in batch_norms(model).values():
        for statistic in (module.running_mean, module.running_var):
            all_reduce(statistic).div_(size())


def is_first_to_report() -> bool:
    """Return whether this is the first process to report why the run ends. Only that one prints its message."""
    if size() == 1:
        return True
    try:
        return _store[0].add("ended", 1) == 1
    except (IndexError, RuntimeError):  # the process that held the store has ended
        return is_first()


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error means that another process has ended, perhaps while this one was joining."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)
