"""Several values of a setting, listed or as a range, and every combination of them as words of a command line."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import itertools
import math

from l2ul.common.errors import InputError

MOST = 10_000  # points of a range


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, for a search to choose from; evenly by their logarithm with `log`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


def values(text: str, kind: Callable[[str], object]) -> list[object]:
    """What a word stands for: `3`; `lo:hi:n` or `lo:hi:logn`, n values with both ends; `lo:hi` or `lo:hi:log`.

    The last two are an Interval, and only a search can do with one. `kind` makes a value of a text and refuses those
    that are not allowed; where it makes whole numbers, points are rounded to such. Points have six significant digits,
    as one would type them.
    """
    if ":" not in text:
        return [kind(text)]
    words = text.split(":")
    low, high = kind(words[0]), kind(words[1])
    rest = words[2] if len(words) == 3 else ""
    log = rest.startswith("log")
    count = rest.removeprefix("log")
    fault = _fault(text, words, low, high, log, count)
    if fault:
        raise InputError(fault)
    whole = isinstance(low, int)
    if not count:
        return [Interval(low, high, log, whole)]
    return list(dict.fromkeys(kind(word) for word in _points(low, high, int(count), log, whole)))


def _fault(text: str, words: list[str], low: object, high: object, log: bool, count: str) -> str | None:
    """Why a range is none, in a sentence."""
    if len(words) > 3 or not (isinstance(low, int | float) and isinstance(high, int | float)):
        return f"{text!r} is not a range; expected lo:hi:n, or lo:hi:logn, such as 1:5:9 or 1e-4:1e-3:log5"
    if len(words) == 3 and not (log and not count) and not (count.isdecimal() and 2 <= int(count) <= MOST):
        return f"{text!r} ends in {words[2]!r}; expected a number of points, 2 to {MOST}, or log and such a number"
    if not low < high:
        return f"{text!r} goes from {words[0]} to {words[1]}; expected a range that ends higher than it begins"
    if log and low <= 0:
        return f"{text!r} is logarithmic and begins at {words[0]}; expected a number above 0"
    return None


def _points(low: float, high: float, count: int, log: bool, whole: bool) -> Iterator[str]:
    yield str(low)
    for step in range(1, count - 1):
        share = step / (count - 1)
        point = math.exp(math.log(low) + share * math.log(high / low)) if log else low + share * (high - low)
        yield str(round(point)) if whole else f"{point:.6g}"
    yield str(high)


def words_of(flag: str, value: object) -> tuple[str, ...]:
    """A flag with a value, or several, as a command line has them; numbers to their last digit."""
    if value is True:
        return (flag,)
    several = value if isinstance(value, list | tuple) else [value]
    return (flag, *(str(one) for one in several))


def product(axes: dict[str, list[object]]) -> Iterator[dict[str, object]]:
    """Every combination of a value of each axis, the last one changing fastest; one, empty, of no axes."""
    for chosen in itertools.product(*axes.values()):
        yield dict(zip(axes, chosen, strict=True))
