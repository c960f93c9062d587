"""The two ways a run ends early: input the user can mend, and numbers that are no longer finite."""


class InputError(ValueError):
    """Bad input, said in one sentence: which value, what was expected, how to mend it. Scripts exit with 2."""


class Diverged(ArithmeticError):
    """A model gave logits that are not finite: no accuracy can be stated for it."""
