"""One run on the processes that torchrun started: which part is whose, and how parts become a whole.

Without torchrun there is one process, whose part is everything: each function then does next to nothing.
"""

from collections.abc import Callable, Iterator
import contextlib
from datetime import timedelta
import os
import warnings

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from l2ul.common.errors import InputError

PATIENCE = timedelta(days=30)  # the others wait while the first unlearns; torchrun itself sees which of them die
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

_store: list[dist.Store] = []  # what all processes can write to, however they end


@contextlib.contextmanager
def process_group(shared: bool = True) -> Iterator[None]:
    """Inside the block the processes that torchrun started are one group, of which only the first prints.

    NCCL between CUDA GPUs, gloo between CPUs, and for what is no tensor on a GPU. Raises InputError in all of several
    processes where what they do cannot be `shared`.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    options = {"rank": rank, "world_size": size, "timeout": PATIENCE}
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), **options)
    _store[:] = [dist.PrefixStore("l2ul", store)]
    if size > 1 and not shared:
        raise InputError("torchrun started it in several processes, but it is for one; start it without torchrun")
    with contextlib.ExitStack() as stack:
        if rank:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield
        dist.destroy_process_group()  # not where something went wrong: the others may never answer


def size() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, 0 being the first."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that prints, and writes records, caches and checkpoints."""
    return rank() == 0


def local_rank() -> int:
    """Which of the processes on this machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def shard(count: int) -> slice:
    """This process's part of `count` things in a row: every thing is in one part, whose lengths differ by 1 at most."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def all_reduce(values: Tensor) -> Tensor:
    """The sum over the processes, in place; `values` is alike in shape everywhere."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(part: Tensor) -> Tensor:
    """The parts of all processes, one after the other, on the CPU; a part may be empty."""
    if size() == 1:
        return part.cpu()
    parts = [None] * size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts)


def gather(thing: object) -> list:
    """What each process has, at the first; elsewhere nothing."""
    if size() == 1:
        return [thing]
    things = [None] * size() if is_first() else None
    dist.gather_object(thing, things)
    return things or []


def broadcast(decide: Callable[[], object]) -> object:
    """What the first process decides, everywhere: of files that others may see later, or not at all."""
    box = [decide() if is_first() else None]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def local_first() -> Iterator[None]:
    """The first process of each machine goes through the block before its others, which find what it has fetched."""
    if size() > 1 and local_rank():
        dist.barrier()
    yield
    if size() > 1 and not local_rank():
        dist.barrier()


def call_others(name: str | None, *arguments: object) -> None:
    """The others, in `serve`, call what they know by this name; None sets them free. Does nothing in the others."""
    if size() > 1 and is_first():
        dist.broadcast_object_list([(name, arguments)])


def serve(known: dict[str, Callable[..., object]]) -> None:
    """Of the others: do what the first process calls for, until it sets them free."""
    while True:
        box = [None]
        dist.broadcast_object_list(box)
        name, arguments = box[0]
        if name is None:
            return
        known[name](*arguments)


def state(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors on the CPU, to be sent; nothing where there is no other process."""
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()} if size() > 1 else {}


def data_parallel(model: nn.Module) -> nn.Module:
    """The model as it is trained: each backward pass leaves the mean of all processes' gradients in each of them."""
    if size() == 1:
        return model
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name for broadcast_buffers, which older torch lacks
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )


@contextlib.contextmanager
def shared_statistics(model: nn.Module) -> Iterator[None]:
    """Batch-norm inside the block, a time through the training set, has one set of running statistics in the end.

    On GPUs batches are normalised by the statistics of all processes' images (SyncBatchNorm). That exists for no other
    device: there each process takes its own images', and the running statistics are averaged when the block ends.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if size() == 1 or not norms:
        yield
        return
    on_gpu = next(model.parameters()).device.type == "cuda"
    try:
        for name, module in norms.items() if on_gpu else ():  # which share weights and statistics with these
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
        yield
    finally:
        for name, module in norms.items() if on_gpu else ():
            model.set_submodule(name, module)
    for module in norms.values():
        if module.track_running_stats:
            for statistic in (module.running_mean, module.running_var):
                all_reduce(statistic).div_(size())


def is_first_to_report() -> bool:
    """Whether this is the first process to say why the run ends: one sentence is enough."""
    if size() == 1:
        return True
    try:
        return _store[0].add("ended", 1) == 1
    except (IndexError, RuntimeError):  # the store went with the process that held it
        return is_first()


def is_lost_process(error: BaseException) -> bool:
    """Whether an error only tells that another process has ended."""
    if size() == 1:
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)
