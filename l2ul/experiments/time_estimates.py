"""How long runs take, estimated from the records of finished runs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
import statistics

from l2ul.common.progress import format_duration
from l2ul.experiments import records

COMPARABLE = ("dataset", "model", "method")  # runs that agree in these take similar time, apart from their images
SECONDS = [name for name in records.SCHEMA if name.startswith("seconds_")]

Record = Mapping[str, object]


class TimeEstimates:
    """Estimates of the seconds of a run, from records that agree with it in data set, model and method."""

    def __init__(self, finished: Iterable[Record]):
        self._seconds: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in finished:
            if record["status"] != records.FAILED:
                total = sum(record[name] or 0 for name in SECONDS)
                self._seconds[_kind(record)][_images(record)].append(total)

    def seconds(self, settings: Record) -> float | None:
        """Return the estimate for a run with these settings, None if there is no comparable record.

        This is the median of the runs that forget as many images. If there are none, it is the median of those with the
        nearest number of images, scaled in proportion to it.
        """
        by_images, images = self._seconds.get(_kind(settings)), _images(settings)
        if not by_images:
            return None
        nearest = min(by_images, key=lambda other: abs(other - images))
        return statistics.median(by_images[nearest]) * images / nearest


def sentence(pending: list[Record], finished: Iterable[Record], at_once: int = 1, source: str = "records") -> str:
    """Return a sentence about the time of runs with these settings.

    pending  settings of the runs to do
    at_once  how many of them run at the same time
    source   where the records come from, for the reader
    """
    estimates = TimeEstimates(finished)
    known = [seconds for settings in pending if (seconds := estimates.seconds(settings)) is not None]
    if not known:
        return f"no estimate of the time: {source} has no comparable run"
    text = f"estimated time: {format_duration(sum(known))}"
    at_once = min(at_once, len(pending))
    if at_once > 1:
        least = max(sum(known) / at_once, *known)  # the longest run does not end earlier
        text += f" one after the other, {format_duration(least)} with {at_once} at once"
    text += f", by the records in {source}"
    unknown = len(pending) - len(known)
    return text + (f"; {unknown} of {len(pending)} runs have no comparable record" if unknown else "")


def _images(settings: Record) -> int:
    """Return how many images a run forgets: in a continual run, those of the step, while k counts all so far."""
    return settings.get("continual_size") or settings["k"]


def _kind(settings: Record) -> tuple[object, ...]:
    return tuple(settings[name] for name in COMPARABLE)
