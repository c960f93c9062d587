"""Ranges of values on a command line, and combinations of values as words of a command line."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import itertools
import math

from l2ul.common.choices import InvalidValue

MAX_POINTS = 10_000  # of a range


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, for a search to choose from.

    log    whether the search samples their logarithm uniformly
    whole  whether it samples whole numbers only
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


def values(text: str, kind: Callable[[str], object]) -> list[object]:
    """Return the values that a text stands for.

    A value stands for itself. `lo:hi:n` stands for n evenly spaced values, both ends included, and `lo:hi:logn` for
    values with evenly spaced logarithms. `lo:hi` and `lo:hi:log` stand for an Interval, which only a search can use.

    kind  reads a value from text and raises InvalidValue if it is not allowed. If it returns whole numbers, the values
          of a range are rounded and returned once each. Other values of a range have six significant digits.

    Raises InvalidValue if the text is not a range.
    """
    if ":" not in text:
        return [kind(text)]
    words = text.split(":")
    low, high = kind(words[0]), kind(words[1])
    rest = words[2] if len(words) == 3 else ""
    log = rest.startswith("log")
    count = rest.removeprefix("log")
    _check(text, words, low, high, log, count)
    whole = isinstance(low, int)
    if not count:
        return [Interval(low, high, log, whole)]
    return list(dict.fromkeys(kind(word) for word in _points(low, high, int(count), log, whole)))


def _check(text: str, words: list[str], low: object, high: object, log: bool, count: str) -> None:
    """Raise InvalidValue if a text is not a range."""
    if len(words) > 3 or not (isinstance(low, int | float) and isinstance(high, int | float)):
        raise InvalidValue(
            f"{text!r} is not a range", "expected lo:hi:n or lo:hi:logn, such as 1:5:9 or 1e-4:1e-3:log5"
        )
    if len(words) == 3 and not (log and not count) and not (count.isdecimal() and 2 <= int(count) <= MAX_POINTS):
        raise InvalidValue(
            f"{text!r} ends in {words[2]!r}", f"expected a number from 2 to {MAX_POINTS}, or log and a number"
        )
    if not low < high:
        raise InvalidValue(f"{text!r} goes from {words[0]} to {words[1]}", "expected a second number above the first")
    if log and low <= 0:
        raise InvalidValue(f"{text!r} is logarithmic and begins at {words[0]}", "expected a range that begins above 0")


def _points(low: float, high: float, count: int, log: bool, whole: bool) -> Iterator[str]:
    yield str(low)
    for step in range(1, count - 1):
        share = step / (count - 1)
        point = math.exp(math.log(low) + share * math.log(high / low)) if log else low + share * (high - low)
        yield str(round(point)) if whole else f"{point:.6g}"
    yield str(high)


def words_of(flag: str, value: object) -> tuple[str, ...]:
    """Return a flag and its value, or values, as words of a command line; numbers keep all digits."""
    if value is True:
        return (flag,)
    several = value if isinstance(value, list | tuple) else [value]
    return (flag, *(str(one) for one in several))


def product(axes: dict[str, list[object]]) -> Iterator[dict[str, object]]:
    """Yield every combination of a value of each axis. The last axis changes fastest. No axes give one empty one."""
    for chosen in itertools.product(*axes.values()):
        yield dict(zip(axes, chosen, strict=True))
