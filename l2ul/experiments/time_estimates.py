"""How long runs take, estimated from the records of finished runs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
import statistics

from l2ul.common.progress import format_duration
from l2ul.experiments import records

COMPARABLE = ("dataset", "model", "method")  # runs that agree in these take similar time, apart from k

Record = Mapping[str, object]


class TimeEstimates:
    """Estimates of the seconds of a run, from records that agree with it in data set, model and method."""

    def __init__(self, finished: Iterable[Record]):
        self._seconds: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in finished:
            if record["status"] != records.FAILED:
                total = sum(value for key, value in record.items() if key.startswith("seconds_") and value)
                self._seconds[_kind(record)][record["k"]].append(total)

    def seconds(self, settings: Record) -> float | None:
        """Return the estimate for a run with these settings, None if there is no comparable record.

        This is the median of the runs with the same k. If there are none, it is the median of the nearest k, scaled in
        proportion to k.
        """
        by_k, k = self._seconds.get(_kind(settings)), settings["k"]
        if not by_k:
            return None
        nearest = min(by_k, key=lambda other: abs(other - k))
        return statistics.median(by_k[nearest]) * k / nearest

    def total(self, pending: Iterable[Record]) -> tuple[float, int]:
        """Return the seconds of all runs with these settings together, and how many of them have no estimate."""
        each = [self.seconds(settings) for settings in pending]
        return sum(filter(None, each)), each.count(None)


def sentence(pending: list[Record], finished: Iterable[Record], at_once: int = 1, source: str = "records") -> str:
    """Return a sentence about the time of runs with these settings.

    pending  settings of the runs to do
    at_once  how many of them run at the same time
    source   where the records come from, for the reader
    """
    seconds, unknown = TimeEstimates(finished).total(pending)
    if len(pending) == unknown:
        return f"no estimate of the time: {source} has no comparable run"
    text = f"estimated time: {format_duration(seconds)}"
    if at_once > 1:
        text += f" one after the other, {format_duration(seconds / at_once)} with {at_once} at once"
    text += f", by the records in {source}"
    return text + (f"; {unknown} of {len(pending)} runs have no comparable record" if unknown else "")


def _kind(settings: Record) -> tuple[object, ...]:
    return tuple(settings[name] for name in COMPARABLE)
