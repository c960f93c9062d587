"""How a script runs: on which device, with what progress shown, and how it ends when something is wrong."""

from collections.abc import Callable, Iterator
import contextlib
import time

from tqdm import tqdm

from l2ul import Progress
from l2ul.common import distributed


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, estimate: bool = False) -> Iterator[Progress]:
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
