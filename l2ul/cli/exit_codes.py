"""How a script ends: one sentence on standard error and an exit code instead of a traceback.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | out of memory, disk full, loss not finite, another process of a torchrun was lost |
| 2 | bad input |
| 130 | stopped by Ctrl-C (SIGINT) |
| 141 | the command that reads the output has ended, such as `head` |
| 143 | stopped by SIGTERM, which SLURM and Docker send |

This module imports torch only where it needs it, so that `--help` answers at once.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import signal
import sys
import threading

from l2ul.cli.output import shown_text
from l2ul.common.errors import Diverged, InputError, first_line, is_out_of_memory
from l2ul.common.text import one_line

_sigterm_received = threading.Event()
CONTINUES = "finished runs are kept; the same command continues"  # of commands that carry out runs
LARGER_BATCHES = (
    "choose a --batch-size that leaves no batch of one image, or unlearn with --bn eval"  # with these flags
)
NOTHING_WRITTEN = "nothing was written; the same command starts again"


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Code that cleans up after Ctrl-C does the same after SIGTERM."""


@contextlib.contextmanager
def clean_exit(
    program: str,
    after_stop: str,
    shared: bool = False,
    less_memory: str = "use smaller batches",
    larger_batches: str = "choose a --batch-size that leaves no batch of one image",
) -> Iterator[None]:
    """Turn errors that a user can act on into one sentence and an exit code. Other errors keep their traceback.

    program         name of the script, which begins the sentence
    after_stop      what is kept after Ctrl-C or SIGTERM, and how to continue
    shared          whether torchrun may start the script in several processes. The script then calls
                    `distributed.process_group()` after it has parsed its command line. Only the first process to end
                    prints its sentence; torchrun ends the others
    less_memory     what to do when memory runs out, with flags that the script has
    larger_batches  what to do when batch-norm cannot train on a batch of one image, likewise
    """
    with shown_text(), sigterm_as_exception():
        try:
            if not shared:
                _require_one_process()
            yield
        except InputError as error:
            _exit(2, f"{program}: {error}")
        except SystemExit as end:
            if isinstance(end.code, str):  # which Python prints, and exits with 1
                _exit(1, end.code)
            raise
        except Diverged as error:
            _exit(1, f"{program}: {error}")
        except KeyboardInterrupt as stop:
            # compiled code such as Ray's replaces `Terminated` by a plain KeyboardInterrupt
            if isinstance(stop, Terminated) or _sigterm_received.is_set():
                _exit(143, f"{program}: stopped by SIGTERM; {after_stop}")
            _exit(130, f"{program}: stopped by Ctrl-C; {after_stop}", "\n")
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            _exit(
                2,
                f"{program}: batch-norm in train mode needs more than one value per channel, which a batch of one "
                f"image does not give this model; {larger_batches}",
            )
        except (MemoryError, RuntimeError, OSError) as error:
            if is_out_of_memory(error):
                _exit(1, f"{program}: out of memory ({first_line(error)}); {less_memory}; {after_stop}")
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                _exit(
                    1,
                    f"{program}: the disk is full ({error.filename or error.strerror}); free some space; {after_stop}",
                )
            if isinstance(error, BrokenPipeError) and _has_lost_its_reader():
                raise SystemExit(141) from None
            from l2ul.common import distributed

            if not distributed.is_lost_process(error):
                raise
            _exit(1, f"{program}: another process of this run was lost; {after_stop}")


@contextlib.contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """Raise `Terminated` in the main thread when SIGTERM arrives inside the block.

    Later SIGTERMs are ignored, so that files which are being written stay whole. Processes of a torchrun other than
    the first have nothing to save and keep the default, which ends them at once. So do threads, where Python allows
    no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread() or os.environ.get("RANK", "0") != "0":
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    _sigterm_received.clear()
    handle_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def handle_sigterm() -> None:
    """Install the handler of `sigterm_as_exception`; needed again after a library has installed its own."""
    process = os.getpid()

    def handler(number: int, frame: object) -> None:
        if os.getpid() != process:  # a forked child, such as a worker of a data loader
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)
        _sigterm_received.set()
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


def _require_one_process() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "torchrun started this script in several processes, but it uses one", "start it without torchrun"
        )


def _has_lost_its_reader() -> bool:
    """Return whether nothing reads standard output any more. If so, what is left to print is dropped."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _exit(code: int, sentence: str, start: str = "") -> None:
    if _speaks_for_all():
        print(start + one_line(sentence), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _speaks_for_all() -> bool:
    """Return whether this process of a torchrun prints why the run ends: the first one that ends."""
    if "l2ul.common.distributed" in sys.modules:
        from l2ul.common import distributed

        if distributed.size() > 1:
            return distributed.is_first_to_report()
    return os.environ.get("RANK", "0") == "0"  # the processes have not met yet, and all end for the same reason
