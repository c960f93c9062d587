"""How a run ends early: input the user can mend, numbers that are no longer finite, memory used up."""

import torch


class InputError(ValueError):
    """Bad input, said in one sentence: which value, what was expected, how to mend it. Scripts exit with 2."""


class Diverged(ArithmeticError):
    """A model gave logits that are not finite: no accuracy can be stated for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's and Python's own have a type; torch's on a CPU and on MPS are told by their text alone."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "MPS backend out of memory" in text)
    )
