"""The columns of every table: one list, from which Markdown, CSV, LaTeX and the table on the screen are made.

To show another value of the records, add a `Column` below. For a metric of your own, pass the fields of its column to
`l2ul.metrics.registry.metric`. The order here is the order in the tables. This module does not import torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MEMBERSHIP_ATTACKS = ("confidence", "loss", "entropy", "modified_entropy", "logistic")
CHANGES = {  # of images and of the model, by name: what is counted under each, see `robustness.AsUsed.rates`
    "mirrored": "mirrored copies of D_f",
    "shifted": "copies of D_f shifted by up to 15 %",
    "cropped": "copies of D_f cropped by up to 15 %",
    "resized": "copies of D_f resized and back",
    "brightness": "copies of D_f with brightness and contrast changed by up to 10 %",
    "noise": "copies of D_f with Gaussian noise of up to 0.03",
    "jpeg": "copies of D_f compressed as JPEG of quality 40 to 95",
    "blurred": "blurred copies of D_f",
    "distorted": "copies of D_f distorted by a random grid",
    "float16": "D_f with the model in float16",
    "bfloat16": "D_f with the model in bfloat16",
    "int8": "D_f with weights of 8 bits and a scale for each output channel",
    "int4": "D_f with weights of 4 bits and a scale for each output channel",
    "recalibrated": "D_f after a batch-norm recalibration on images of D_r",
}


@dataclass(frozen=True)
class Column:
    """How the values under one key of the records are shown in a table.

    key        key of the record, `acc_…` for a percentage or `metric_…` for any other number
    heading    heading in Markdown and on the screen. `markup.latex_text` makes it LaTeX unless `latex` is given
    legend     what the value is, for the notes below a table. Notes end with the better direction
    digits     digits after the decimal point
    better     "up", "down", or None where neither is better in general (then the legend names the target, if any)
    latex      heading as LaTeX code
    table      "accuracy" for the main table, "other" for the tables of further metrics
    compared   whether the best value of a column is bold
    goal       the only goal that the column is shown for, or None for both
    continual  whether the column is shown for continual runs only
    """

    key: str
    heading: str
    legend: str
    digits: int = 2
    better: Literal["up", "down"] | None = None
    latex: str | None = None
    table: Literal["accuracy", "other"] = "other"
    compared: bool = False
    goal: str | None = None
    continual: bool = False

    @property
    def note(self) -> str:
        """The legend with the better direction, as it stands below a table."""
        direction = {"up": "; higher is better", "down": "; lower is better"}.get(self.better, "")
        return f"{self.legend}{direction}"

    def is_shown_for(self, goal: str, continual: bool) -> bool:
        return self.goal in (None, goal) and (continual or not self.continual)


_ATTACK = "membership inference from the model's outputs, D_f against D_test"
_AUC, _TPR = "AUC in percent; 50 is chance", "true positives at 1 % false positives, in percent; 1 is chance"


def _of_attack(name: str) -> tuple[Column, Column]:
    heading = name.replace("_", " ")
    return (
        Column(f"metric_mia_{name}_auc", f"{heading} AUC", f"{_ATTACK}: {_AUC}"),
        Column(f"metric_mia_{name}_tpr", f"{heading} TPR", f"{_ATTACK}: {_TPR}"),
    )


_RMIA = "the attack RMIA, calibrated with reference models that were not trained on D_f"
_GAP = "absolute difference from the retrained model in percentage points"
_JS = "Jensen-Shannon divergence from the retrained model's outputs, in bits, 0 to 1"
_CKA = "linear CKA with the retrained model's features, mean over layers, 0 to 1"
_TABLE = (
    Column("acc_forget", "D_f", "accuracy on the forget set, the images to forget", better="down", table="accuracy"),
    Column(
        "acc_relabel",
        "relabelled",
        "share of the forget set that the model predicts as the new label",
        better="up",
        table="accuracy",
        goal="relabel",
    ),
    Column(
        "acc_forget_earlier",
        "earlier D_f",
        "accuracy on the forget sets of earlier steps",
        better="down",
        table="accuracy",
        continual=True,
    ),
    Column(
        "acc_retain",
        "D_r",
        "accuracy on the retain set, the other training images",
        better="up",
        table="accuracy",
        compared=True,
    ),
    Column("acc_test", "D_test", "accuracy on the test set", better="up", table="accuracy", compared=True),
    *(column for attack in MEMBERSHIP_ATTACKS for column in _of_attack(attack)),
    Column("metric_rmia_auc", "RMIA AUC", f"{_RMIA}: {_AUC}"),
    Column("metric_rmia_tpr", "RMIA TPR", f"{_RMIA}: {_TPR}"),
    Column("metric_gap_forget", "gap D_f", f"accuracy: {_GAP}", better="down"),
    Column("metric_gap_retain", "gap D_r", f"accuracy: {_GAP}", better="down"),
    Column("metric_gap_test", "gap D_test", f"accuracy: {_GAP}", better="down"),
    Column("metric_gap_mia", "gap MIA", f"AUC of the logistic attack: {_GAP}", better="down"),
    Column("metric_average_gap", "mean gap", "mean of the four gaps", better="down"),
    Column(
        "metric_tow", "ToW", "tug of war, the product of 1 - gap / 100 on D_f, D_r and D_test", digits=4, better="up"
    ),
    Column("metric_js_forget", "JS D_f", _JS, digits=4, better="down"),
    Column("metric_js_test", "JS D_test", _JS, digits=4, better="down"),
    Column("metric_cka_forget", "CKA D_f", _CKA, digits=4, better="up"),
    Column("metric_cka_test", "CKA D_test", _CKA, digits=4, better="up"),
    Column(
        "metric_distance_retrained",
        "distance to retrained",
        "relative L2 distance of the weights from those of the retrained model",
        digits=4,
    ),
    Column(
        "metric_distance",
        "distance to original",
        "relative L2 distance of the weights from those of the original model",
        digits=4,
    ),
    Column(
        "metric_relearn_steps",
        "relearning steps",
        "steps of fine-tuning on D_f until its accuracy is that of the original model; 500 means 500 or more, and the "
        "steps of the retrained model are the target",
        digits=1,
    ),
    Column(
        "metric_relearn_steps_retrained",
        "relearning steps, retrained",
        "the same number of steps for the retrained model",
        digits=1,
    ),
    Column(
        "metric_answers_kept",
        "agreement",
        "share of held-out adversarial examples, made from mixes of D_f, for which the predictions of unlearned and "
        "original model agree, in percent",
        better="up",
    ),
    Column("metric_near_duplicates", "near-duplicates", "images of D_r that nearly equal an image of D_f", digits=1),
    Column(
        "metric_forgotten_as_used",
        "forgotten as used",
        "share of D_f, in percent, that is forgotten as stored, in at least 95 % of 64 random changed copies, with "
        "weights of 16, 8 and 4 bits, and after a batch-norm recalibration on images of D_r",
        better="up",
    ),
    *(
        Column(f"metric_forgotten_{change}", change, f"forgotten share of {what}, in percent", better="up")
        for change, what in CHANGES.items()
    ),
    Column(
        "metric_recalibrated_forget",
        "D_f, recalibrated",
        "accuracy on D_f after a batch-norm recalibration on 1,024 images of D_r, in percent",
        better="down",
    ),
    Column(
        "metric_recalibrated_mixes",
        "D_f, recalibrated on mixes",
        "accuracy on D_f after a batch-norm recalibration on mixes of D_f, in percent",
        better="down",
    ),
    Column(
        "metric_recalibrated_test",
        "D_test, recalibrated",
        "accuracy on D_test after the same recalibration, in percent",
        better="up",
    ),
    Column(
        "metric_near_test",
        "agreement near D_f",
        "share of the test images nearest to D_f, of the same classes, for which the predictions of unlearned and "
        "original model agree, in percent",
        better="up",
    ),
    Column(
        "metric_near_noise",
        "agreement on noisy D_f",
        "share of copies of D_f with Gaussian noise of 0.05 for which the predictions of unlearned and original model "
        "agree, in percent",
    ),
    Column(
        "metric_tuned_forget",
        "D_f, fine-tuned",
        "accuracy on D_f after 100 steps of fine-tuning on images of D_r, in percent",
        better="down",
    ),
)
COLUMNS: dict[str, Column] = {column.key: column for column in _TABLE}
RESERVED = {  # keys that a metric of your own cannot have
    *COLUMNS,
    *("acc_forget_before", "acc_retain_before", "acc_test_before", "acc_forget_earlier_before"),
    *("acc_retain_low", "acc_retain_high"),
}


def register(column: Column) -> Column:
    """Add a column of your own after the others, and return it. An earlier column with the same key is replaced.

    Raises ValueError if the key is one of RESERVED, or begins with neither `acc_` nor `metric_`.
    """
    if column.key in RESERVED or not column.key.startswith(("acc_", "metric_")):
        raise ValueError(f"a metric has the name {column.key!r}; expected a new name that begins with acc_ or metric_")
    COLUMNS[column.key] = column
    return column


def get(key: str) -> Column:
    """Return the column of a key, or a plain one for a metric without a column."""
    return COLUMNS.get(key) or default(key)


def default(key: str) -> Column:
    """Return a column with a heading made from the key: accuracies have two digits, other metrics four."""
    heading = key.removeprefix("metric_").removeprefix("acc_").replace("_", " ")
    unit = ", accuracy in percent" if key.startswith("acc_") else ""
    return Column(key, heading, f"your own metric{unit}", digits=2 if key.startswith("acc_") else 4)


def of_table(table: Literal["accuracy", "other"]) -> list[Column]:
    return [column for column in COLUMNS.values() if column.table == table]


def ordered(keys: Iterable[str]) -> list[str]:
    """Return the keys, each once, in the order of COLUMNS; others follow in alphabetical order."""
    keys = set(keys)
    return [*(key for key in COLUMNS if key in keys), *sorted(keys - COLUMNS.keys())]
