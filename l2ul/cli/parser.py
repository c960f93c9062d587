"""An argparse parser as users of these scripts expect it, and numbers that are checked as they are read."""

import argparse
from collections.abc import Callable, Container, Sequence
import math
import os
import sys

from l2ul.cli import ranges
from l2ul.common.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes `_` for `-` in every flag, and says what is wrong in one sentence."""

    def __init__(self, description: str, **options):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
            **options,
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        return super().parse_known_args([_dashed(word) for word in (sys.argv[1:] if args is None else args)], namespace)

    def exit(self, status: int = 0, message: str | None = None):
        super().exit(status, message if os.environ.get("RANK", "0") == "0" else None)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _number(kind: Callable[[str], float], low: float, strict: bool, expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if isinstance(value, int) and abs(value) > 2**63 - 1:
            value = math.nan
        if not (math.isfinite(value) and (value > low if strict else value >= low)):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected {expected}")
        return value

    return parse


finite_float = _number(float, -math.inf, False, "a number")
positive_float = _number(float, 0, True, "a number above 0")
nonnegative_float = _number(float, 0, False, "a number of at least 0")
positive_int = _number(int, 1, False, "a whole number of at least 1")
nonnegative_int = _number(int, 0, False, "a whole number of at least 0")


def setting(text: str) -> tuple[str, float]:
    """`NAME=VALUE`, a number of at least 0."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected NAME=VALUE, such as epochs=3")
    return name, nonnegative_float(value)


NUMBERS = (int, finite_float, positive_float, nonnegative_float, positive_int, nonnegative_int)


def take_several(parser: Parser, one: Container[str]) -> None:
    """Let flags take several values where they take one, and numbers also as ranges (see `ranges.values`).

    But for those whose names are in `one`. None has a default any more: what is not given is not in the result. Values
    of a range come as a list within the list.
    """
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        action.default = argparse.SUPPRESS
        if action.dest in one or action.nargs not in (None, "+"):
            continue
        action.nargs = "+"
        if action.type in NUMBERS:
            action.type = _several(action.type)
        elif action.type is setting:
            action.type = _several_settings


def _several(kind: Callable[[str], float]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        try:
            return ranges.values(text, kind)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parse.__name__ = kind.__name__  # which argparse's own message names
    return parse


def _several_settings(text: str) -> list[tuple[str, object]]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        setting(text)
    return [(name, one) for one in _several(nonnegative_float)(value)]
