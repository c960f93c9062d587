"""How a run ends early: input the user can mend, numbers that are no longer finite, memory used up."""

OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)  # of a CPU, of MPS and CUDA, of cuBLAS


class InputError(ValueError):
    """Bad input, said in one sentence: which value, what was expected, how to mend it. Scripts exit with 2."""


class Diverged(ArithmeticError):
    """A model gave logits that are not finite: no accuracy can be stated for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's and Python's own have a type; others of torch and of CUDA's libraries are told by their text alone."""
    import torch  # here, as parsers raise InputError and start without torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
