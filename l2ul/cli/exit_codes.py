"""How a script runs: on which device, with what progress shown, and how it ends when something is wrong."""

from collections.abc import Iterator
import contextlib
import errno
import sys

from l2ul.common import distributed
from l2ul.common.errors import Diverged, InputError, is_out_of_memory


@contextlib.contextmanager
def ending(
    program: str, stopped: str = "finished runs are kept and the same command goes on from there", shared: bool = False
) -> Iterator[None]:
    """How a script ends: bad input exits with 2, Ctrl-C with 130, memory or disk used up or numbers lost with 1.

    stopped  what to say to who pressed Ctrl-C
    shared   whether torchrun may start it in many processes, which are then one group inside the block; the first to
             end early says why, once, and torchrun ends the others
    """
    try:
        with distributed.joined(shared):
            yield
    except InputError as error:
        # a loader's worker hands its error on with a traceback before it
        _exit(2, f"{program}: {str(error).strip().splitlines()[-1].removeprefix('l2ul.common.errors.InputError: ')}")
    except Diverged as error:
        _exit(1, f"{program}: {error}")
    except KeyboardInterrupt:
        _exit(130, f"\n{program}: stopped; {stopped}")
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        _exit(
            2,
            f"{program}: batch-norm in train mode cannot learn from a single value a channel, which a batch of one "
            f"image gives this net; take a --batch-size that leaves no image alone (or --bn eval to unlearn)",
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) and distributed.is_loss_of_another(error):
            _exit(1, f"{program}: another process of this run was lost; {stopped}")
        if not is_out_of_memory(error):
            raise
        _exit(1, f"{program}: out of memory ({_first_line(error)}); take smaller batches, finished runs are kept")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _exit(1, f"{program}: the disk is full ({error.filename}); make room, finished runs are kept")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _exit(code: int, sentence: str) -> None:
    if distributed.says_it():
        print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(code)
