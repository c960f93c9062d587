"""What is measured of a run: accuracies on D_f, D_r and D_test before and after, and the classes they come from."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from l2ul.data import images as image_sets
from l2ul.metrics import columns

Value = TypeVar("Value")


@dataclass(frozen=True)
class Seen:
    """What such a net makes of the images of a run, computed when asked for, on the CPU.

    classes  gives (N,) of forget, retain or test
    logits   gives (N, C) of forget or test
    """

    model: nn.Module
    classes: Callable[[str], Tensor]
    logits: Callable[[str], Tensor]


@dataclass(frozen=True)
class Measured:
    """What a metric is computed from: an unlearned model and, by part, true labels and classes before and after.

    The parts are forget, retain, test and, in a continual run, forget_earlier; tensors (N,) on the CPU.

    original    the model before any run
    logits      gives the unlearned model's (N, C), on the CPU, of forget or test
    split       gives images and labels of forget, retain (all of D_r) or test, on the device or on disk
    once        gives what a function does, called once for all runs on this D_f; the name says what it is
    retrained   a net that never saw D_f, where one was given
    references  several such, likewise
    workers     processes that decode images on disk
    """

    model: nn.Module
    labels: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    original: nn.Module
    logits: Callable[[str], Tensor]
    split: Callable[[str], image_sets.Split]
    once: Callable[[str, Callable[[], Value]], Value]
    retrained: Seen | None = None
    references: tuple[Seen, ...] = ()
    workers: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Metrics computed together: their names in a record, and the function that gives all or some of them.

    against  of those that need other nets, the key of a record that tells these (see `Peers.described`)
    """

    names: tuple[str, ...]
    compute: Callable[[Measured], dict[str, float]]
    summary: str
    against: dict[str, str] = field(default_factory=dict)


Metric = Callable[[Measured], float]
METRICS: dict[str, Metric] = {}  # beside the accuracies, under their names in every record


def metric(name: str, **column: object) -> Callable[[Metric], Metric]:
    """Register the function below as the metric `name`: acc_… for a percentage, metric_… for any other number.

    The record has null for it where a run diverged or the number is not finite. `column` takes fields of
    `columns.Column`, such as heading, legend, digits and better: how the tables show the metric.
    """
    columns.register(replace(columns.default(name), **column))

    def register(function: Metric) -> Metric:
        METRICS[name] = function
        return function

    return register
