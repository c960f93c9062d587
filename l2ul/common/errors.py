"""Exceptions that end a run with one sentence, and how to recognise that memory ran out."""

OUT_OF_MEMORY = (  # in the messages of torch on a CPU; of torch on MPS and CUDA; of cuBLAS
    "can't allocate memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)


class InputError(ValueError):
    """Bad input. The message is one sentence: the value, what was expected, how to fix it. Scripts exit with code 2."""


class Diverged(ArithmeticError):
    """The model's logits or the loss are not finite. Scripts exit with code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    Python and torch's CUDA allocator raise exceptions of their own for this; other parts of torch and the CUDA
    libraries raise a RuntimeError, which only its message tells apart.
    """
    import torch  # here, as parsers raise InputError and start without torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
