"""Progress of long work: a bar on a terminal, plain lines at growing intervals in a log file."""

from collections.abc import Callable, Iterator
import contextlib
import sys
import time

from tqdm import tqdm

from l2ul.common.text import one_line

FIRST_LINE = 10.0  # seconds of work before the first line
LONGEST_PAUSE = 300.0  # seconds between two lines, at most


@contextlib.contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show the progress of the work inside the block on standard error; yield `advance(count=1, note="", limit=None)`.

    On a terminal this is a bar. Elsewhere it is a line after 10 s, after 20 s more, after 40 s more and so on, at least
    one each 5 minutes while units finish. Work of less than 10 s shows no line. Only the first process of a torchrun
    shows anything.

    description  name of the work, such as "attack"
    total        number of units, or None if it is not known: the lines then count steps

    `advance` takes the number of units that finished, an optional text about the state, such as
    "40 % of D_f forgotten", and optionally the largest number of steps of work without a total. Rate and time left do
    not count the units of its first call, which include preparation, come from a cache or finished in an earlier
    command.
    """
    from l2ul.common import distributed  # imports torch

    description = one_line(description)
    if not distributed.is_first():
        yield lambda count=1, note="", limit=None: None
        return
    with tqdm(desc=description, total=total, unit_scale=True, leave=False, disable=None) as bar:
        if bar.disable:  # standard error is not a terminal
            yield ProgressLines(description, total).advance
            return

        def advance(count: int = 1, note: str = "", limit: int | None = None) -> None:
            bar.set_postfix_str(one_line(f"at most {limit:,}, {note}" if limit else note), refresh=False)
            if bar.n:
                bar.update(count)
            elif count:
                bar.initial = bar.n = bar.last_print_n = count
                bar.last_print_t = time.time()
                bar.refresh()

        yield advance


class ProgressLines:
    """Lines about work with `total` units (None: not known), written to standard error at growing intervals."""

    def __init__(self, description: str, total: int | None = None):
        self.description, self.total = description, total
        self.done = 0
        self._pause = FIRST_LINE
        self._next_line = time.monotonic() + self._pause
        self._rate_start: tuple[float, int] | None = None  # time and units done when the first units had finished

    def advance(self, count: int = 1, note: str = "", limit: int | None = None) -> None:
        """Add `count` finished units; write a line if it is time for one."""
        self.done += count
        now = time.monotonic()
        if self._rate_start is None and count:
            self._rate_start = now, self.done
        if now >= self._next_line and self.done != self.total:
            line = one_line(f"{time.strftime('%H:%M:%S')}  {self.line(now, note, limit)}")
            print(line, file=sys.stderr, flush=True)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._next_line = now + self._pause

    def line(self, now: float, note: str = "", limit: int | None = None) -> str:
        """Return the line for the time `now`, without the time of day: units done, note, rate, time left."""
        start, done_before = self._rate_start or (now, self.done)
        rate = (self.done - done_before) / (now - start) if now > start else 0.0
        if self.total:
            parts = [f"{self.done:,} / {self.total:,} ({100 * self.done / self.total:.0f} %)"]
        else:
            parts = [f"step {self.done:,} of at most {limit:,}" if limit else f"step {self.done:,}"]
        parts += [note] if note else []
        parts += [format_rate(rate, "" if self.total else "steps")] if rate else []
        parts += [f"about {format_duration((self.total - self.done) / rate)} left"] if self.total and rate else []
        return f"{self.description}: {', '.join(parts)}"


def format_rate(per_second: float, units: str = "") -> str:
    """Return a rate per second, minute or hour, so that it is at least 1: `55 per second`, `3.2 steps per minute`."""
    factor, period = (1, "second") if per_second >= 1 else (60, "minute") if per_second >= 1 / 60 else (3600, "hour")
    rate = factor * per_second
    number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
    return f"{number} {units} per {period}" if units else f"{number} per {period}"


def format_duration(seconds: float) -> str:
    """Return a duration in its largest unit of which it has at least two: `95 s`, `9 min`, `2.5 h`, `3.0 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
