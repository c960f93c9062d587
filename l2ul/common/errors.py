"""Exceptions that end a run with one sentence, the options that it names, and how to recognise that memory ran out."""

from collections.abc import Container, Iterator
import contextlib
import re
from typing import Self

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
OUT_OF_MEMORY = (  # in messages, in lower case
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # torch on a CPU, on Windows
    "cannot allocate memory",  # the operating system, for shared memory
    "bad_alloc",  # C++
    "out of memory",  # torch on MPS and CUDA
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "cublas_status_not_initialized",  # no memory for the workspace of cuBLAS
    "cudnn_status_not_initialized",
    "unable to find an engine",  # of cuDNN, none of whose kernels fits into memory
)


class Wording(str):
    """A text that names options as flags of the scripts, and in `in_python` as arguments of a function."""

    in_python: str

    def __new__(cls, text: str, in_python: str = "") -> Self:
        new = super().__new__(cls, text)
        new.in_python = in_python
        return new


def option(name: str, value: object = None) -> Wording:
    """Return an option, with a value unless that is None: --std 0.5 0.2 of a script, std=(0.5, 0.2) of a function."""
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    flag = " ".join([f"--{name.replace('_', '-')}", *map(str, values)])
    return Wording(flag, name if value is None else f"{name}={value!r}")


def worded(template: str, *parts: object) -> Wording:
    """Return a text with parts in place of each {}, some of them a `Wording`."""
    return Wording(template.format(*parts), template.format(*map(in_python, parts)))


def in_python(text: object) -> object:
    """Return a text for callers of a function; it differs from that for users of the scripts if it is a `Wording`."""
    return text.in_python if isinstance(text, Wording) else text


class InputError(ValueError):
    """Bad input. Scripts print the message, which is one sentence, and exit with code 2.

    problem  names the value and what is wrong with it
    advice   alternatives, each of which corrects it or says what was expected; may be empty

    They are a `Wording` if they name options that a function has as well.

    The message is "PROBLEM; ADVICE, or ADVICE".
    """

    mark = "; "  # between the problem and the advice

    def __init__(self, problem: str, *advice: str):
        super().__init__(problem, *advice)  # all of them, for copies and pickles
        self.problem, self.advice = problem, advice

    def __str__(self) -> str:
        return self.mark.join([self.problem, ", or ".join(self.advice)]) if self.advice else self.problem

    def without(self, flags: Container[str], instead: str = "") -> Self:
        """Return the error for a command that lacks some flags: without the advice that names one of them.

        instead  advice in place of all others if one was left out, or if the problem names such a flag
        """

        def fits(text: str) -> bool:
            return not any(flag in flags for flag in flags_in(text))

        advice = tuple(filter(fits, self.advice))
        if instead and not (advice == self.advice and fits(self.problem)):
            advice = (instead,)
        return type(self)(self.problem, *advice)


class Reason(InputError):
    """Why something cannot be used, in words for the inside of a sentence: "PROBLEM: ADVICE, or ADVICE".

    A sentence about one or several things with such reasons has their problems inside, and their advice at its end.
    """

    mark = ": "


class Diverged(ArithmeticError):
    """The model's logits or the loss are not finite. Scripts exit with code 1."""


def flags_in(text: str) -> list[str]:
    """Return the flags that a text names, such as --skip-bad."""
    return FLAG.findall(text)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error that has text, or else the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


@contextlib.contextmanager
def rejected(problem: str, *advice: str) -> Iterator[None]:
    """Turn an exception of other software in the block into an InputError, whose message has its first line.

    For code that may raise anything: libraries that read files, and models of the user.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{problem} ({first_line(error)[:200]})", *advice) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    Python and torch's CUDA allocator raise exceptions of their own for this; other parts of torch and the CUDA
    libraries raise a RuntimeError, which only its message tells apart.
    """
    import torch  # here, as parsers raise InputError and start without torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in message for words in OUT_OF_MEMORY)
