"""The metrics of a run: their inputs, the groups of `--evaluate`, and a decorator that adds a metric.

This module does not import torch, so that command lines can list the groups at once. The functions of the groups are in
`groups.py`, which is imported when a group is first computed. Headings of table columns are in `columns.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
import pkgutil
from typing import TYPE_CHECKING, TypeVar

from l2ul.common.files import own_code_sha256
from l2ul.metrics import columns

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from l2ul.data.images import Split

Value = TypeVar("Value")

RETRAINED_SHA256, REFERENCES_SHA256 = "retrained_sha256", "references_sha256"  # keys of a record
METRICS_CODE = "own_metrics"  # another one
GAPS = ("metric_gap_forget", "metric_gap_retain", "metric_gap_test", "metric_gap_mia")


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of a reference model for the images of a run, computed on first use. Tensors are on the CPU.

    classes  returns the predictions (N,) int64 of a part: forget, retain or test
    logits   returns the logits (N, C) of a part: forget or test
    """

    model: nn.Module
    classes: Callable[[str], Tensor]
    logits: Callable[[str], Tensor]


@dataclass(frozen=True)
class RunOutputs:
    """What a metric is computed from: the unlearned model, and its outputs and those of the original model.

    The parts of the data are forget (D_f), retain (D_r, or the sample of it that is measured), test (D_test) and, in a
    continual run, forget_earlier (D_f of the earlier steps). Tensors are on the CPU.

    model       the unlearned model
    original    the original model (θ⁰)
    labels      true labels (N,) int64 of each part
    before      predictions (N,) int64 of the original model, of each part
    after       predictions (N,) int64 of the unlearned model, of each part
    logits      returns the unlearned model's logits (N, C) of forget or test
    split       returns images and labels of forget, retain (all of D_r) or test
    once        once(name, compute) returns compute(), which is called once for all runs with this D_f
    retrained   outputs of the retrained model, if --retrained names one
    references  outputs of the models of --references
    workers     processes that decode images on disk
    new_labels  (k,) int64, the classes that D_f is relabelled with; None if it is to be misclassified
    """

    model: nn.Module
    original: nn.Module
    labels: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    logits: Callable[[str], Tensor]
    split: Callable[[str], Split]
    once: Callable[[str, Callable[[], Value]], Value]
    retrained: ReferenceOutputs | None = None
    references: tuple[ReferenceOutputs, ...] = ()
    workers: int = 0
    new_labels: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return next(self.model.parameters()).device


Metric = Callable[[RunOutputs], float]
MetricGroup = Callable[[RunOutputs], dict[str, float]]


@dataclass(frozen=True)
class EvaluationGroup:
    """Metrics that are computed together, as named by `--evaluate`.

    summary     one line for --help
    function    returns the value of each metric by its key; or "module:name" of the function
    metrics     keys of the metrics that any run has
    retrained   keys of the metrics that compare with the model of --retrained
    references  keys of the metrics that compare with the models of --references
    """

    summary: str
    function: MetricGroup | str
    metrics: tuple[str, ...] = ()
    retrained: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of all metrics of the group."""
        return *self.metrics, *self.retrained, *self.references

    @property
    def compared_with(self) -> dict[str, str]:
        """For each metric that compares with reference models, the key of a record that identifies these models."""
        return dict.fromkeys(self.retrained, RETRAINED_SHA256) | dict.fromkeys(self.references, REFERENCES_SHA256)

    def compute(self, outputs: RunOutputs) -> dict[str, float]:
        """Return the metrics by key; those that need reference models only if `outputs` has these."""
        function = pkgutil.resolve_name(self.function) if isinstance(self.function, str) else self.function
        return function(outputs)


METRICS: dict[str, Metric] = {}  # registered with `metric`; every record has them
EVALUATIONS = {  # by the name that --evaluate takes
    "membership": EvaluationGroup(
        "membership inference: AUC and true-positive rate at 1 % false positives of five attacks",
        "l2ul.metrics.groups:membership_inference",
        tuple(f"metric_mia_{attack}_{value}" for attack in columns.MEMBERSHIP_ATTACKS for value in ("auc", "tpr")),
    ),
    "distance": EvaluationGroup(
        "relative distance of the weights from the original ones, ‖θ - θ⁰‖ / ‖θ⁰‖",
        "l2ul.metrics.groups:parameter_distance",
        ("metric_distance",),
    ),
    "retrained": EvaluationGroup(
        "differences from the --retrained model in accuracy, membership inference, outputs, features and weights",
        "l2ul.metrics.groups:retrain_gaps",
        retrained=(
            *GAPS,
            *("metric_average_gap", "metric_tow", "metric_js_forget", "metric_js_test"),
            *("metric_cka_forget", "metric_cka_test", "metric_distance_retrained"),
        ),
    ),
    "rmia": EvaluationGroup(
        "membership inference by RMIA, calibrated with the --references models",
        "l2ul.metrics.groups:relative_membership_inference",
        references=("metric_rmia_auc", "metric_rmia_tpr"),
    ),
    "relearn": EvaluationGroup(
        "steps of fine-tuning on D_f until its accuracy is that of the original model again",
        "l2ul.metrics.groups:relearning_speed",
        ("metric_relearn_steps",),
        retrained=("metric_relearn_steps_retrained",),
    ),
    "duplicates": EvaluationGroup(
        "number of near-duplicates of D_f in D_r",
        "l2ul.metrics.groups:near_duplicates",
        ("metric_near_duplicates",),
    ),
    "agreement": EvaluationGroup(
        "agreement with the original model on held-out adversarial examples",
        "l2ul.metrics.groups:agreement_with_original",
        ("metric_answers_kept",),
    ),
    "robustness": EvaluationGroup(
        "share of D_f that is forgotten as used: in changed copies, and with changed weights",
        "l2ul.metrics.groups:robustness_as_used",
        ("metric_forgotten_as_used", *(f"metric_forgotten_{change}" for change in columns.CHANGES)),
    ),
    "recalibration": EvaluationGroup(
        "accuracy on D_f and D_test after batch-norm is recalibrated on images of D_r",
        "l2ul.metrics.groups:recalibration",
        ("metric_recalibrated_forget", "metric_recalibrated_mixes", "metric_recalibrated_test"),
    ),
    "overforgetting": EvaluationGroup(
        "agreement with the original model on images near D_f: similar test images, and D_f with noise",
        "l2ul.metrics.groups:overforgetting",
        ("metric_near_test", "metric_near_noise"),
    ),
    "finetuning": EvaluationGroup(
        "accuracy on D_f after a short fine-tuning on images of D_r",
        "l2ul.metrics.groups:fine_tuning",
        ("metric_tuned_forget",),
    ),
}


def metric(key: str, **column: object) -> Callable[[Metric], Metric]:
    """Register the decorated function as a metric that every record has under `key`.

    key     a new name that begins with acc_ for a percentage and with metric_ for any other number
    column  fields of `columns.Column`, such as heading, legend, digits and better: how tables show the metric

    The function takes `RunOutputs` and returns a number. The record has null where the run diverged or the number is
    not finite. Raises ValueError for a key that is not allowed.
    """
    columns.register(replace(columns.default(key), **column))

    def register(function: Metric) -> Metric:
        own_code_sha256([function])  # reads the user's files now, as they may be edited while this process runs
        METRICS[key] = function
        return function

    return register


def own_code() -> dict[str, str]:
    """Return the start of a hash of the user's files that compute a metric, for each metric of the user by its key."""
    hashes = {key: own_code_sha256([function]) for key, function in METRICS.items()}
    return {key: digest[:16] for key, digest in sorted(hashes.items()) if digest}


def recorded_code(record: dict[str, object]) -> dict[str, str]:
    """Return what `own_code` was for the metrics of a record; empty for a record that is older than its key."""
    return dict(word.partition("=")[::2] for word in (record.get(METRICS_CODE) or "").split())


def code_in_record(hashes: dict[str, str]) -> dict[str, str]:
    """Return the key of a record from which `recorded_code` reads these hashes; nothing if there are none."""
    return {METRICS_CODE: " ".join(f"{key}={digest}" for key, digest in hashes.items())} if hashes else {}


def changed_code(record: dict[str, object]) -> set[str]:
    """Return the keys of the user's metrics in a record that were computed by other files than the present ones."""
    recorded = recorded_code(record)
    present = own_code() if recorded else {}
    return {key for key, digest in recorded.items() if present.get(key, digest) != digest}


def outdated(record: dict[str, object], models: dict[str, str]) -> set[str]:
    """Return the keys of the metrics of a record that compare with other reference models than `models`.

    models  hashes of the present reference models under their keys of a record
    """
    changed = {key for key, value in models.items() if record.get(key) != value}
    return {name for group in EVALUATIONS.values() for name, key in group.compared_with.items() if key in changed}
