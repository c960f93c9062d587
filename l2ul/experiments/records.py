"""Records: one JSON file for each finished run, with the schema of its keys.

`SCHEMA` is the only place that says what a key of a record means, which type it has, and whether it is a setting, a
result or a fact about the machine. Checking, the rows of the tables, the commands for missing runs and the page
docs/records-and-tables.md are derived from it. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2ul.common.choices import CAP, DIVERGED, DONE, EXIF_ORIENTATIONS, FORGOTTEN, GOALS
from l2ul.common.files import atomic, csv_writer
from l2ul.common.text import read_text, shortened
from l2ul.experiments import defaults
from l2ul.methods.settings import SHARED
from l2ul.metrics import columns

if TYPE_CHECKING:
    from torch import Tensor

Record = dict[str, object]

CARD = "README.md"  # the model card in the folder of a model, where the Hugging Face Hub looks for it
FAILED = "failed"  # the run ended with an error
STATUSES = (FORGOTTEN, CAP, DONE, DIVERGED, FAILED)

ROLES = {
    "subject": "what the run is about: data set, model, method, forget set",
    "setting": "how the run was done; runs of a method with different settings are different rows of a table",
    "result": "how the run ended, and metrics",
    "cost": "time and memory",
    "machine": "hardware, versions of software, and batch sizes that do not decide the result",
    "provenance": "names and hashes of files that the run used",
}
SUBJECT, SETTING, RESULT, COST, MACHINE, PROVENANCE = ROLES

MOST_BYTES = 2**22  # of a record
LARGEST = 2**63 - 1  # integer that tables and generators of random numbers take
LONGEST = 255  # characters of a name
TYPES = {  # type of a value: how messages name it, and how a value is checked
    "text": ("text", lambda value: isinstance(value, str)),
    "name": (
        f"a name of 1 to {LONGEST} characters, none a control character",
        lambda value: isinstance(value, str) and 0 < len(value) <= LONGEST and not any(c < " " for c in value),
    ),
    "integer": ("an integer", lambda value: type(value) is int and _is_number(value)),
    "number": ("a number", lambda value: type(value) is not bool and _is_number(value)),
    "percent": ("a percentage from 0 to 100", lambda value: TYPES["number"][1](value) and 0 <= value <= 100),
    "boolean": ("true or false", lambda value: type(value) is bool),
    "numbers": ("text that holds numbers separated by spaces", lambda value: _are_numbers(value)),
    "any": ("a single value", lambda value: isinstance(value, str) or _is_number(value)),
}


def _is_number(value: object) -> bool:
    largest = LARGEST if isinstance(value, int) else 1e100  # matplotlib fails at numbers near the largest of a float
    return isinstance(value, int | float) and abs(value) <= largest  # which nan is not


def _are_numbers(value: object) -> bool:
    try:
        return all(math.isfinite(float(word)) for word in value.split())
    except (AttributeError, ValueError):
        return False


@dataclass(frozen=True)
class Key:
    """One key of a record.

    name      the key
    role      one of ROLES, or None for a key that the schema does not know
    type      one of TYPES
    doc       one line of documentation
    null      whether the value may be null
    required  whether every record has the key
    least     smallest value allowed
    choices   all values allowed
    default   value that applies to commands without the flag, and to records without the key
    flag      whether main_unlearn.py has a flag with the name of the key
    """

    name: str
    role: str | None
    type: str
    doc: str
    null: bool = True
    required: bool = False
    least: float | None = None
    choices: tuple[str, ...] | None = None
    default: object = None
    flag: bool = False

    def accepts(self, value: object) -> bool:
        if value is None:
            return self.null
        if not TYPES[self.type][1](value):
            return False
        return (self.choices is None or value in self.choices) and (self.least is None or value >= self.least)

    @property
    def expected(self) -> str:
        """The values that `accepts` accepts, in words."""
        text = f"one of {', '.join(self.choices)}" if self.choices else TYPES[self.type][0]
        return f"{text}{'' if self.least is None else f' of at least {self.least:g}'}{' or null' if self.null else ''}"

    def absent_for(self, dataset: str) -> object:
        """Return the value that applies to records without the key, None where there is none."""
        absent = SHARED[self.name].absent if self.name in SHARED else None
        return self.default_for(dataset) if absent is None else absent

    def default_for(self, dataset: str) -> object:
        """Return the default for a data set, None where there is none."""
        return defaults.default(dataset, self.name) if self.name in defaults.COMMON_DEFAULTS else self.default


def _hyper_parameters() -> Iterator[Key]:
    for setting in SHARED.values():
        kind = {int: "integer", float: "number", str: "text"}[type(setting.default)]
        unit = f"; unit: {setting.unit}" if setting.unit else ""
        yield Key(setting.name, SETTING, kind, f"{setting.help}{unit}", flag=True)


def _results() -> Iterator[Key]:
    for column in columns.COLUMNS.values():
        if column.key not in ("acc_forget", "acc_retain", "acc_test"):  # which are required and stand above
            kind = "percent" if column.key.startswith("acc_") else "number"
            yield Key(column.key, RESULT, kind, column.legend)


_HASH = "hex SHA-256"
SCHEMA: dict[str, Key] = {
    key.name: key
    for key in (
        Key("dataset", SUBJECT, "name", "data set", required=True, null=False),
        Key("model", SUBJECT, "name", "model, the value of `--model`", required=True, null=False),
        Key("checkpoint_sha256", SETTING, "text", f"{_HASH} of the original weights", required=True),
        Key("method", SUBJECT, "name", "unlearning method", required=True, null=False),
        Key("needs_retain", SUBJECT, "boolean", "whether the method trains on D_r", required=True),
        Key("goal", SUBJECT, "text", "what forgetting means", required=True, choices=GOALS, null=False),
        Key("k", SUBJECT, "integer", "images forgotten once the run is done", required=True, least=1, null=False),
        Key(
            "seed",
            SUBJECT,
            "integer",
            "seed of the choice of D_f, the attack and the loop",
            required=True,
            least=0,
            null=False,
        ),
        Key(
            "continual_step",
            SUBJECT,
            "integer",
            "number of the step in a continual run, null in other runs",
            required=True,
            least=1,
        ),
        Key("status", RESULT, "text", "how the run ended", required=True, choices=STATUSES, null=False),
        Key("steps", RESULT, "integer", "optimizer steps taken", required=True, least=0, null=False),
        *(
            Key(name, RESULT, "percent", columns.get(name).legend, required=True)
            for name in ("acc_forget", "acc_retain", "acc_test")
        ),
        *(
            Key(f"{name}_before", RESULT, "percent", f"{name} of the original model", required=True)
            for name in ("acc_forget", "acc_retain", "acc_test")
        ),
        *(
            Key(f"seconds_{phase}", COST, "number", f"seconds for {doc}", required=True, least=0)
            for phase, doc in {
                "attack": "the adversarial examples",
                "importance": "the weight importance",
                "unlearn": "the unlearning loop",
                "evaluate": "the accuracies",
            }.items()
        ),
        Key(
            "peak_memory_mib",
            COST,
            "number",
            "peak memory in MiB: on a GPU since the loop began, on a CPU of the process so far",
            required=True,
            least=0,
        ),
        Key("device", MACHINE, "text", "device", required=True),
        *_hyper_parameters(),
        Key("course", SETTING, "text", "settings of a method of fixed length, as NAME=VALUE"),
        Key("mean", SETTING, "numbers", "mean of each input channel", flag=True),
        Key("std", SETTING, "numbers", "standard deviation of each input channel", flag=True),
        Key("num_train", SETTING, "integer", "images in the training set", least=1),
        Key("num_test", SETTING, "integer", "images in the test set", least=1),
        Key("train_sha256", SETTING, "text", f"{_HASH} of the training images, if they are known"),
        Key("image_size", SETTING, "integer", "side of the input images in pixels", least=1, flag=True),
        Key("age_grouping", SUBJECT, "name", "age groups of UTKFace"),
        Key("split_seed", SETTING, "integer", "seed of the split of UTKFace", least=0, default=0, flag=True),
        *(
            Key(name, SETTING, "text", f"{doc} of a data set `hf:…`", flag=True)
            for name, doc in {
                "image_column": "column of images",
                "label_column": "column of labels",
                "train_split": "split of training images",
                "test_split": "split of test images",
            }.items()
        ),
        Key("decoder", SETTING, "text", "decoder of images on disk", default="cpu", flag=True, null=False),
        Key(
            "exif_orientation",
            SETTING,
            "text",
            "how image files with an EXIF orientation are read",
            choices=EXIF_ORIENTATIONS,
            default="ignore",
            flag=True,
            null=False,
        ),
        Key("white_level", SETTING, "number", "value of white in grey files of more than 8 bits", flag=True),
        Key("forget_dir", SETTING, "text", "name of the folder of `--forget-dir`", flag=True),
        Key("relabel_file", PROVENANCE, "text", "name of the file of `--relabel-file`"),
        Key("forget_sha256", SUBJECT, "text", f"{_HASH} of D_f: images, labels and new labels"),
        Key("continual_size", SUBJECT, "integer", "images per step of a continual run", least=1),
        Key(
            "retain_sample",
            SETTING,
            "integer",
            "training images that acc_retain is measured on, null for all",
            least=1,
            flag=True,
        ),
        Key(
            "surrogate",
            SETTING,
            "text",
            "unlabelled images that stand for D_r, as `--surrogate` names them; of a folder, its name",
            flag=True,
        ),
        Key("surrogate_sha256", PROVENANCE, "text", f"{_HASH} of these images"),
        Key(
            "test_without",
            SETTING,
            "text",
            "part of the test set that `--surrogate` names and acc_test leaves out, for a method that does not use it",
        ),
        Key("method_version", SETTING, "integer", "version of the built-in methods"),
        Key(
            "method_revision",
            SETTING,
            "integer",
            "version of this built-in method if it is above 1, null for version 1",
        ),
        Key("method_code", SETTING, "text", f"{_HASH} of the source code of your own method"),
        Key("own_code", PROVENANCE, "text", f"{_HASH} of the files of your own model and method"),
        Key(
            "own_metrics",
            PROVENANCE,
            "text",
            "keys of your own metrics, each with the start of a hash of the files that compute it, as KEY=HASH",
        ),
        Key(
            "data_sha256",
            PROVENANCE,
            "text",
            f"{_HASH} of the images and labels of D_test and of D_r, or of the part of D_r that is measured",
        ),
        Key("method_settings", PROVENANCE, "text", "names of the keys that are settings of your own method"),
        *_results(),
        Key("acc_forget_earlier_before", RESULT, "percent", "acc_forget_earlier of the original model"),
        Key("acc_retain_low", RESULT, "percent", "lower end of the 95 % interval of a sampled acc_retain"),
        Key("acc_retain_high", RESULT, "percent", "upper end of the 95 % interval of a sampled acc_retain"),
        Key("retain_measured", RESULT, "integer", "images of D_r that acc_retain is measured on", least=0),
        Key("adv_success", RESULT, "percent", "adversarial examples predicted as their target"),
        Key(
            "adv_success_exact",
            RESULT,
            "percent",
            "adv_success before rounding to the stored data type, in older records",
        ),
        Key("error", RESULT, "text", "last lines of the error message of a failed run"),
        Key("attack_batch_size", MACHINE, "integer", "adversarial examples computed at once", least=1),
        Key("decoded_by_cpu", MACHINE, "integer", "JPEGs that `--decoder gpu` left to the CPU so far", least=1),
        Key("test_batch_size", MACHINE, "integer", "images per batch when measuring", least=1),
        Key("python", MACHINE, "text", "version of Python"),
        Key("torch", MACHINE, "text", "version of PyTorch"),
        Key("torchvision", MACHINE, "text", "version of torchvision"),
        Key("checkpoint", PROVENANCE, "text", "name of the file of the original weights"),
        Key("retrained_sha256", PROVENANCE, "text", f"{_HASH} of the weights of the retrained model"),
        Key("references_sha256", PROVENANCE, "text", f"{_HASH} of the hashes of the reference models"),
    )
}
KEYS = tuple(key.name for key in SCHEMA.values() if key.required)  # first in every record, in this order
IDENTITY = tuple(key.name for key in SCHEMA.values() if key.role == SUBJECT)
NOT_FORGOTTEN = (CAP, DIVERGED, FAILED)
ACCURACIES = ("acc_forget", "acc_retain", "acc_test")  # null only where a run diverged or failed


def gave_up(record: Record) -> bool:
    """Return whether a run stopped at the cap before D_f was forgotten as stored.

    With robust=1, the status is also cap if D_f is forgotten as stored, but too few changed copies of it are.
    """
    return record["status"] == CAP and not (record.get("robust") == 1 and forgets_all(record))


def counts(record: Record) -> bool:
    """Return whether a run is part of the means of tables: it has ended, and did not give up."""
    return record["status"] not in (DIVERGED, FAILED) and not gave_up(record)


def forgets_all(record: Record) -> bool:
    """Return whether all of D_f is misclassified, or relabelled, as stored."""
    return record.get("acc_relabel") == 100 if record["goal"] == "relabel" else record["acc_forget"] == 0


def lookup(name: str) -> Key:
    """Return the schema of a key. A key that SCHEMA does not have is a result if its name says so, else role None."""
    if name in SCHEMA:
        return SCHEMA[name]
    if name.startswith("acc_"):
        return Key(name, RESULT, "percent", "your own metric, in percent")
    if name.startswith("metric_"):
        return Key(name, RESULT, "number", "your own metric")
    return Key(name, None, "any", "")


def settings(record: Record) -> Record:
    """Return the settings of a record. A key that neither SCHEMA nor the record's method declares is not a setting."""
    own = (record.get("method_settings") or "").split()
    return {name: value for name, value in record.items() if lookup(name).role == SETTING or name in own}


def stated(values: Record, dataset: str) -> Record:
    """Return the settings that are neither null nor what applies to a record without their key.

    They are the same for two records of equal runs, of which one is older than a key.
    """
    return {name: value for name, value in values.items() if value not in (None, lookup(name).absent_for(dataset))}


def problems(record: object) -> Iterator[str]:
    """Yield a sentence for each way in which parsed JSON breaks the schema; nothing for a valid record."""
    if not isinstance(record, dict):
        yield "is not a record, which is a JSON object"
        return
    absent = [name for name in KEYS if name not in record]
    if absent:
        yield f"is incomplete: it lacks {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}"
        return
    for name, value in record.items():
        if not TYPES["name"][1](name):
            yield f"a key is {shortened(name)!r}; expected {TYPES['name'][0]}"
        elif not lookup(name).accepts(value):
            yield f"{name} is {shortened(json.dumps(value, ensure_ascii=False))}; expected {lookup(name).expected}"
    for name in ACCURACIES:
        if record[name] is None and record["status"] not in (DIVERGED, FAILED):
            yield f"{name} is null but status is {record['status']}; expected a percentage"


def schema_table() -> str:
    """Return the schema in Markdown, for docs/records-and-tables.md."""
    lines = [f"- **{role}**: {doc}" for role, doc in ROLES.items()]
    lines += [
        "",
        "Records can have further keys. They separate rows of a table only if `method_settings` of the record names "
        "them.",
    ]
    lines += ["", "| Key | Role | Type | Meaning |", "|:--|:--|:--|:--|"]
    for each in SCHEMA.values():
        kind = f"{each.type}{' or null' if each.null else ''}"
        choices = f"; one of {', '.join(f'`{choice}`' for choice in each.choices)}" if each.choices else ""
        lines.append(f"| `{each.name}` | {each.role} | {kind} | {each.doc}{choices} |")
    return "\n".join(lines) + "\n"


def run_id(settings: Record) -> str:
    """Return 16 hex digits that depend on every setting of a run, not on the order of the keys."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunFiles:
    """The files of a run: `runs/<id>.json`, `.txt`, `.npz` and `.csv`, and `models/<id>…`, in `result_dir`.

    The `.json` is the record, the `.txt` names the images of D_f, the `.npz` holds predicted classes before and after,
    and the `.csv` holds the loss terms of each step. A model that is kept has a model card: `models/<id>.md`, or
    README.md in its folder.
    """

    def __init__(self, result_dir: Path, identity: str, model_suffix: str = ".safetensors"):
        self.identity = identity
        self.record = Path(result_dir) / "runs" / f"{identity}.json"
        self.state = self.record.with_suffix(".state.pt")  # of an unfinished loop
        self.model = Path(result_dir) / "models" / f"{identity}{model_suffix}"
        self.card = self.model.with_suffix(".md") if model_suffix else self.model / CARD

    def read(self) -> Record | None:
        """Return the record of the finished run, or None if it is absent, damaged, or of a run that failed."""
        record = read(self.record)
        return None if record is None or record.get("status") == FAILED else record

    def write(
        self,
        record: Record,
        forget: list[str],
        predictions: dict[str, Tensor],
        curve: list[dict[str, float]],
    ) -> None:
        """Write all files of a finished run. The record is written last: where it exists, the others do too.

        record       the record. It must not hold NaN or infinity
        forget       a name or index for each image of D_f
        predictions  classes, or indices, as integer tensors (N,)
        curve        the loss terms of each step

        Raises ValueError if the record holds a number that is not finite.
        """
        with atomic(self.record.with_suffix(".txt")) as part:
            text = "".join(f"{name}\n" for name in forget)
            part.write_text(text, encoding="utf-8", errors="surrogateescape")  # of file names, the same bytes
        with atomic(self.record.with_suffix(".npz")) as part, open(part, "wb") as file:
            np.savez_compressed(file, **{name: _small(classes) for name, classes in predictions.items()})
        with atomic(self.record.with_suffix(".csv")) as part, open(part, "w", newline="") as file:
            write = csv_writer(file, curve[0] if curve else ["step"])
            for row in curve:
                write(row)
        self.rewrite(record)

    def rewrite(self, record: Record) -> None:
        """Write the record and keep the other files."""
        ordered = {name: record[name] for name in KEYS} | record
        with atomic(self.record) as part:
            part.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n")


def failure(settings: Record, metrics: list[str], error: str) -> Record:
    """Return the record of a run that ended with an error: no metrics, and the message under `error`."""
    unknown = dict.fromkeys((*KEYS, *metrics))
    phases = {name: 0.0 for name in KEYS if name.startswith("seconds_")}
    return unknown | settings | phases | {"status": FAILED, "steps": 0, "error": error}


def _small(classes: Tensor) -> np.ndarray:
    """Return nonnegative integers as an array of the smallest type that holds them."""
    values = classes.cpu().numpy()
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def read(path: Path) -> Record | None:
    """Read a record without checking its values; return None if the file is absent or holds something else."""
    try:
        record = json.loads(read_text(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.keys() >= set(KEYS) else None


def read_folder(result_dir: Path) -> Iterator[Record]:
    """Yield all records in a result folder that do not break the schema, in the order of their ids."""
    found = filter(None, map(read, sorted((result_dir / "runs").glob("*.json"))))
    return (record for record in found if not any(problems(record)))
