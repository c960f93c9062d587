"""The progress of a sweep: a bar on a terminal, and every minute a table of the runs that have finished."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
from pathlib import Path
import time

from tqdm import tqdm

from l2ul.common.progress import format_duration
from l2ul.reporting import read_records, render, rows, summary

PAUSE = 60.0  # seconds between two tables, or more: at most a twentieth of the time is spent on tables


class SweepMonitor:
    """Counts the trials that ended, and shows counts and tables.

    total        number of trials
    show_counts  called with the number of trials that ended, and with done, failed and running by keyword
    report       called with a text of several lines: counts and a table
    """

    def __init__(self, total: int, show_counts: Callable[..., None], report: Callable[[str], object]):
        self.total, self.done, self.failed = total, 0, 0
        self._show_counts, self._report = show_counts, report
        self._started = self._last_table = time.monotonic()
        self._pause = PAUSE
        self._new_files: list[Path] = []
        self._records: list[dict[str, object]] = []

    def trial_ended(self, files: Iterable[Path], failed: bool) -> None:
        """Count a trial that ended. `files` are its records."""
        self.failed += failed
        self.done += not failed
        self._new_files += files

    def update(self, running: int) -> None:
        """Show the counts, and a table if it is time for one. To be called at least every few seconds."""
        self._show_counts(self.done + self.failed, done=self.done, failed=self.failed, running=running)
        now = time.monotonic()
        if self._new_files and now - self._last_table >= self._pause:
            self._report(f"{self.counts(running)}\n\n{self.table()}")
            self._last_table = time.monotonic()
            self._pause = max(PAUSE, 20 * (self._last_table - now))

    def counts(self, running: int) -> str:
        """Return a line with counts and the time left."""
        ended = self.done + self.failed
        left = (time.monotonic() - self._started) / max(1, ended) * (self.total - ended)
        return (
            f"{self.done} of {self.total} trials done, {self.failed} failed, {running} running, about "
            f"{format_duration(left)} left"
        )

    def table(self) -> str:
        """Return the table of all runs that have finished. Each record is read once."""
        self._records += read_records.read_files(self._new_files)[0]
        self._new_files = []
        blocks = rows.blocks(self._records)
        return render.markdown(summary.summarise(blocks, summary.Selection()), blocks)


@contextlib.contextmanager
def sweep_monitor(total: int, report: Callable[[str], object]) -> Iterator[SweepMonitor]:
    """Return a monitor that shows a bar of trials on a terminal and passes tables to `report`."""
    with tqdm(desc="trials", total=total, leave=False, disable=None) as bar:

        def show_counts(ended: int, **counts: int) -> None:
            bar.set_postfix(counts, refresh=False)
            bar.update(ended - bar.n)

        def report_beside_bar(text: str) -> None:
            with tqdm.external_write_mode():
                report(text)

        yield SweepMonitor(total, show_counts, report_beside_bar)
