"""Exceptions that end a run with one sentence, and how to recognise that memory ran out."""

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


class InputError(ValueError):
    """Bad input. The message is one sentence: the value, what was expected, how to fix it. Scripts exit with code 2."""


class Diverged(ArithmeticError):
    """The model's logits or the loss are not finite. Scripts exit with code 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error that has text, or else the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


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
