"""Standard output of the scripts, which shows names of files, classes and data sets of others."""

from collections.abc import Iterable, Iterator
import contextlib
import io
import sys
from typing import TextIO

from l2ul.common.text import CONTROLS


class ShownText:
    """A text stream with � in place of control characters, so that no name can colour a terminal or move its cursor."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(CONTROLS.sub(lambda found: found[0] if found[0] in "\t\n" else "\ufffd", text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def shown_text() -> Iterator[None]:
    """Print to standard output as `ShownText`, and characters that its encoding lacks as escapes such as \\u2192."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(ShownText(sys.stdout)):
        yield
