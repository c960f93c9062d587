"""How far a sweep is: one line on a terminal, and every minute the table of what has ended so far."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
from pathlib import Path
import time

from tqdm import tqdm

from l2ul.common.progress import format_duration
from l2ul.reporting import read_records, render, rows, summary

EVERY = 60.0  # seconds from one table to the next, or longer: a twentieth of the time goes into tables at most


class Watch:
    """Counts trials as they end. `tell` shows the counts, `say` a text beside them."""

    def __init__(self, total: int, tell: Callable[..., None], say: Callable[[str], None]):
        self.total, self.done, self.failed = total, 0, 0
        self._tell, self._say = tell, say
        self._started = self._shown = time.monotonic()
        self._pause = EVERY
        self._new: list[Path] = []
        self._found: list[dict[str, object]] = []

    def end(self, files: Iterable[Path], failed: bool) -> None:
        """A trial ended, and these are its records."""
        self.failed += failed
        self.done += not failed
        self._new += files

    def look(self, running: int) -> None:
        """To be called often: shows the counts, and now and then the table."""
        self._tell(self.done + self.failed, done=self.done, failed=self.failed, running=running)
        started = time.monotonic()
        if self._new and started - self._shown >= self._pause:
            self._say(f"{self.counts(running)}\n\n{self.table()}")
            self._shown = time.monotonic()
            self._pause = max(EVERY, 20 * (self._shown - started))

    def counts(self, running: int) -> str:
        ended = self.done + self.failed
        left = (time.monotonic() - self._started) / max(1, ended) * (self.total - ended)
        return (
            f"{self.done} of {self.total} trials done, {self.failed} failed, {running} running, about "
            f"{format_duration(left)} left"
        )

    def table(self) -> str:
        """Of all that has ended; records are read once."""
        self._found += read_records.read_files(self._new)[0]
        self._new = []
        blocks = rows.blocks(self._found)
        return render.markdown(summary.summarise(blocks, summary.Selection()), blocks)


@contextlib.contextmanager
def watch(total: int) -> Iterator[Watch]:
    """Show a bar of trials on a terminal, with counts beside it; elsewhere only what `Watch` prints."""
    with tqdm(desc="trials", total=total, leave=False, disable=None) as bar:

        def show_counts(ended: int, **counts: int) -> None:
            bar.set_postfix(counts, refresh=False)
            bar.update(ended - bar.n)

        def print_beside_bar(text: str) -> None:
            with tqdm.external_write_mode():
                print(text, flush=True)

        yield Watch(total, show_counts, print_beside_bar)
