"""How a script runs: on which device, with what progress shown, and how it ends when something is wrong."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import sys
import time

import torch
from tqdm import tqdm

from l2ul import Progress, distributed
from l2ul.errors import Diverged, InputError, is_out_of_memory


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


@contextlib.contextmanager
def progress(what: str, total: int | None, estimate: bool = False) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere nothing, or one line with an estimate of the time where that was asked for."""
    bar = tqdm(desc=what, total=total, unit_scale=True, leave=False, disable=None if distributed.is_first() else True)
    started, done, rest, told = None, 0, 0, not (estimate and bar.disable)

    def advance(count: int) -> None:
        nonlocal started, done, rest, told
        bar.update(count)
        if started is None:  # what came before, and the first units, tell nothing about the rest
            started, rest = time.perf_counter(), (total or 0) - count
            return
        done += count
        elapsed = time.perf_counter() - started
        if not told and elapsed > 2:
            print(f"{what}: about {elapsed / done * rest:.0f} s", flush=True)
            told = True

    with bar:
        yield advance


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar of things that end, on a terminal, with counts beside it; elsewhere nothing. Told how many have ended."""
    with tqdm(desc=what, total=total, leave=False, disable=None) as bar:

        def tell(ended: int, **counts: int) -> None:
            bar.set_postfix(counts, refresh=False)
            bar.update(ended - bar.n)

        yield tell


def say(text: str) -> None:
    """Print a text without harm to a bar that is shown."""
    with tqdm.external_write_mode():
        print(text, flush=True)


@contextlib.contextmanager
def ending(
    program: str, stopped: str = "finished runs are kept and the same command goes on from there", shared: bool = False
) -> Iterator[None]:
    """How a script ends: bad input exits with 2, Ctrl-C with 130, memory or disk used up or numbers lost with 1.

    stopped  what to say to who pressed Ctrl-C
    shared   whether torchrun may start it in many processes, which are then one group inside the block; the first to
             end early says why, once, and torchrun ends the others
    """
    try:
        with distributed.joined(shared):
            yield
    except InputError as error:
        # a loader's worker hands its error on with a traceback before it
        _exit(2, f"{program}: {str(error).strip().splitlines()[-1].removeprefix('l2ul.errors.InputError: ')}")
    except Diverged as error:
        _exit(1, f"{program}: {error}")
    except KeyboardInterrupt:
        _exit(130, f"\n{program}: stopped; {stopped}")
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        _exit(
            2,
            f"{program}: batch-norm in train mode cannot learn from a single value a channel, which a batch of one "
            f"image gives this net; take a --batch-size that leaves no image alone (or --bn eval to unlearn)",
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) and distributed.is_loss_of_another(error):
            _exit(1, f"{program}: another process of this run was lost; {stopped}")
        if not is_out_of_memory(error):
            raise
        _exit(1, f"{program}: out of memory ({_first_line(error)}); take smaller batches, finished runs are kept")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _exit(1, f"{program}: the disk is full ({error.filename}); make room, finished runs are kept")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _exit(code: int, sentence: str) -> None:
    if distributed.says_it():
        print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(code)
