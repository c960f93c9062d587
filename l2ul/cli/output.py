"""Standard output and error of the scripts, which show names of files, classes and data sets of others."""

from collections.abc import Iterable, Iterator
import contextlib
import io
import re
import sys
import traceback
from types import TracebackType
from typing import TextIO

from l2ul.common.text import CONTROLS

MOVES = re.compile(r"(?:\x1b\[A|\n)+\Z|\r?")  # what a progress bar writes before its text, or instead of one


def shown(text: str) -> str:
    """Return a text with � in place of control characters other than tabs and line feeds."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in "\t\n" else "\ufffd", text)


class ShownText:
    """A text stream with � in place of control characters, so that no name can colour a terminal or move its cursor.

    bars  whether progress bars may move the cursor: to the start of the line before a text, and up by lines
    """

    def __init__(self, stream: TextIO, bars: bool = False):
        self.stream, self.bars = stream, bars

    def write(self, text: str) -> int:
        place = MOVES.match(text).end() if self.bars else 0
        return self.stream.write(text[:place] + shown(text[place:]))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def shown_text() -> Iterator[None]:
    """Print as `ShownText`, and characters that the encoding of standard output lacks as escapes such as \\u2192.

    A traceback that ends the process is printed likewise.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = print_traceback
    with contextlib.redirect_stdout(ShownText(sys.stdout)), contextlib.redirect_stderr(ShownText(sys.stderr, True)):
        yield


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an exception."""
    print(shown("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
