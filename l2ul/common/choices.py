"""The values that options accept: lists of names, each defined once, and ranges of numbers.

This module does not import torch, so that command lines are parsed and `--help` is printed without it.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
import difflib
import math
import sys

from l2ul.common.errors import InputError

GOALS = ("misclassify", "relabel")  # what forgetting means
LOOP_STATUSES = FORGOTTEN, CAP, DONE, DIVERGED, STOPPED = (  # how the unlearning loop ends
    "forgotten",  # all of D_f is forgotten
    "cap",  # the limit of steps was reached before
    "done",  # the fixed number of steps of the method is over, or the method does not train
    "diverged",  # a loss, a weight or a logit is not finite
    "stopped",  # the caller ended the loop
)
BN_MODES = ("train", "eval")  # mode of batch-norm and dropout while a method trains
PRECISIONS = ("fp32", "tf32", "bf16")  # of forward and backward passes, see `common.precision`
LOOP_PRECISIONS = FULL, BF16 = "full", "bf16"  # of passes in the unlearning loop, see `common.precision.passes_in`
AUTO = "auto"  # value of --precision and --loop-precision: the fastest on the device, see `common.precision`
DTYPES = ("float32", "float16", "uint8")  # in which adversarial examples are stored; names of torch dtypes
DEVICES = ("cuda", "mps", "cpu")
DECODERS = ("cpu", "gpu")  # of images on disk
EXIF_ORIENTATIONS = ("ignore", "obey")  # of image files; the first is the default
MAX_IMAGE_PIXELS = 89_478_485  # largest image that is decoded by default: Pillow's limit
PREFETCH = 2  # default number of batches that a worker decodes ahead
HUB_OPTIONS = ("image_column", "label_column", "train_split", "test_split")  # of a data set hf:
OPTIMIZERS = ("sgd", "adam", "adamw")  # of training
SCHEDULES = ("cosine", "onecycle")  # of the learning rate in training
CHANGES = ("flipped", "cropped", "jpeg")  # kinds of changed copies that a deletion request can forget as well
CLASS_ORDERS = ("string", "numeric")  # of the class names of a deletion request
STAND_INS = (  # kinds of images that `distill` uses in place of D_r, see `methods.stand_ins`
    *("mixes", "triples", "copies", "recoloured", "patches", "crops", "spectra", "synthesised"),
)
AGE_GROUPINGS = {  # of UTKFace: upper bounds in years; the class of an age is the first bound above it
    "TNN": (10, 15, 20, 25, 30, 40, 50, 60, 120),
    "MFD": (20, 41, 120),
    "balanced": (20, 30, 45, 120),
    "groups": (4, 13, 20, 31, 46, 61, 120),
    "tens": (11, 21, 31, 41, 51, 61, 71, 81, 91, 101, 111, 120),
}


class InvalidValue(InputError, argparse.ArgumentTypeError):
    """A value that an option does not accept. argparse and the scripts both print its message as one sentence."""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return `; did you mean NAME?` with the name most similar to a word, or an empty string."""
    similar = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


@dataclass(frozen=True)
class Number:
    """A range of numbers. Calling it reads a number from text and checks it.

    kind     int or float
    minimum  smallest number allowed, or with `open` the bound that a number has to exceed
    """

    kind: type = float
    minimum: float = -math.inf
    open: bool = False
    maximum: float = math.inf

    def __call__(self, text: str) -> int | float:
        """Read a number. Raises InvalidValue if the text is not a number within the range."""
        try:
            return self.check(self.kind(text))
        except ValueError:  # InvalidValue is one too
            raise InvalidValue(f"{text!r} is not allowed", f"expected {self.expected}") from None

    def check(self, value: object) -> int | float:
        """Return a value as a number of this kind. Raises InvalidValue if it is not one, or outside the range."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        number = number and abs(value) <= sys.float_info.max  # larger whole numbers cannot be converted to float
        if not number or (self.kind is int and (value != int(value) or abs(value) >= 2**63)):
            raise InvalidValue(f"{value!r} is not allowed", f"expected {self.expected}")
        if not (value > self.minimum if self.open else value >= self.minimum) or value > self.maximum:
            raise InvalidValue(f"{value!r} is not allowed", f"expected {self.expected}")
        return self.kind(value)

    @property
    def expected(self) -> str:
        """Describe the range in words, as in "a number above 0"."""
        name = "a whole number" if self.kind is int else "a number"
        low = "" if self.minimum == -math.inf else f"{'above' if self.open else 'of at least'} {self.minimum:g}"
        if self.maximum == math.inf:
            return f"{name} {low}".rstrip()
        return f"{name} {low} and at most {self.maximum:g}" if low else f"{name} of at most {self.maximum:g}"


@dataclass(frozen=True)
class OneOf:
    """A list of names. Calling it checks a text.

    several  whether a value has one or more of the names, joined by +, in place of one
    """

    names: tuple[str, ...]
    several: bool = False

    def __call__(self, text: str) -> str:
        """Return the text. Raises InvalidValue if it is not one of the names."""
        return self.check(text)

    def check(self, value: object) -> str:
        """Return a value. Raises InvalidValue if it is not one of the names."""
        for part in str(value).split("+") if self.several else [value]:
            if part not in self.names:
                hint = did_you_mean(str(part), self.names)
                raise InvalidValue(f"{value!r} is not allowed", f"expected {self.expected}{hint}")
        return value

    @property
    def expected(self) -> str:
        """List the names in words, as in "one of train, eval"."""
        if self.several:
            return f"some of {', '.join(self.names)}, joined by +"
        return f"one of {', '.join(self.names)}" if len(self.names) > 1 else self.names[0]
