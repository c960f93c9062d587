"""Model cards of unlearned models: what was forgotten in numbers, never which images."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
import json
from pathlib import Path

from l2ul import VERSION, models
from l2ul.common import pages
from l2ul.common.choices import CAP, DIVERGED
from l2ul.common.markup import markdown_code
from l2ul.data.datasets import LOADERS
from l2ul.methods.settings import SHARED
from l2ul.models import timm_models

UNIFORM = "in float32, by names, types, shapes and values"  # how weights are hashed apart from their file
LIBRARIES = {"hf": "transformers", "timm": "timm"}  # that open a folder, by the prefix of the model's name
CHANGED = "also in changed copies, with rounded weights and with recalibrated batch-norm"
LIMITS = (
    "That the images no longer influence the weights. A model that was trained without them would still classify most "
    "of them correctly, and the outputs of this one may reveal that these images were unlearned.",
    "That changed copies of the images, or other images of the same objects, are forgotten.",
    "That the unlearning cannot be detected. Anyone who has the model before and after can find the images, because "
    "their predictions differ.",
)


@dataclass(frozen=True)
class Table:
    """A table of a card: its headings and rows of cells."""

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Card:
    """The content of a model card. Texts are plain, but `method` and `opening` are Markdown.

    library       name of the library that opens the model, as the hub knows it; None for a file of weights
    introduction  sentences that describe the model
    outcome       the result in a few words
    tables        counts and accuracies
    method        the method and its settings, in a sentence
    hashes        SHA-256 of weights in hexadecimal, by a description of the weights
    opening       how the model is opened
    limits        sentences that say what is not claimed
    """

    title: str
    introduction: str
    outcome: str
    tables: Sequence[Table]
    method: str
    hashes: Mapping[str, str]
    limits: Sequence[str]
    opening: str = ""
    library: str | None = None

    def text(self) -> str:
        """Return the card in Markdown."""
        return pages.render("l2ul.experiments", "model_card.md.j2", card=self)


def method_sentence(method: str, seed: int, settings: Mapping[str, object]) -> str:
    """Return the sentence on a method, its seed and the values of its settings, in Markdown."""
    values = ", ".join(markdown_code(f"{name}={value}") for name, value in settings.items())
    return f"{markdown_code(method)} with seed {seed}{f': {values}' if values else ''}."


def opening(model: str, num_classes: int, file: str, mean: object = None, std: object = None) -> str:
    """Return how to open a file of weights of a network of this project, of torchvision or of the user."""
    statistics = "".join(f", {name}={list(values)}" for name, values in (("mean", mean), ("std", std)) if values)
    registered = f"# first import the file that registers {json.dumps(model)}\n" if models.is_of_user(model) else ""
    return (
        f"```python\nfrom l2ul import models\n\n{registered}"
        f'model = models.load({json.dumps(model)}, {num_classes}, "{file}"{statistics})\n```\n\n'
        "It takes pixels (n, channels, height, width) in [0,1] and returns logits."
    )


def library_of(model: str) -> str | None:
    """Return the library that opens the folder of a model with this name."""
    return LIBRARIES.get(model.partition(":")[0])


def of_record(
    record: Mapping[str, object],
    num_classes: int,
    weights_sha256: str,
    is_folder: bool = False,
    file: str = "model.safetensors",
) -> Card:
    """Return the card of the model of a run.

    weights_sha256  of the unlearned weights, `UNIFORM`
    is_folder       whether the model is a folder of another library, not a file of weights
    file            name of the file of weights beside the card
    """
    training = "training images" if record.get("forget_dir") else "other training images"  # D_f is from elsewhere
    relabel = record["goal"] == "relabel"
    number = record.get("continual_size") or record["k"]  # accuracies of a step of a continual run are those of its D_f
    rows = [("to relabel" if relabel else "to forget", number)]
    if number != record["k"]:
        rows.append(("of earlier steps", record["k"] - number))
    done = "relabelled" if relabel else "forgotten"
    for text, key in (
        ("predicted as their label by the original model", "acc_forget_before"),
        ("predicted as their label by this model", "acc_forget"),
        ("predicted as their new label by this model", "acc_relabel"),
        (f"{done} as used, {CHANGED}", "metric_forgotten_as_used"),
    ):
        if record.get(key) is not None:
            rows.append((text, round(number * record[key] / 100)))
    if record.get("acc_forget_earlier") is not None:
        earlier = round((record["k"] - number) * record["acc_forget_earlier"] / 100)
        rows.append(("of earlier steps, predicted as their label by this model", earlier))
    accuracies = [
        (text, *(_percent(record[key]) for key in (f"{name}_before", name)))
        for text, name in ((training, "acc_retain"), ("test images", "acc_test"))
    ]
    name, dataset = _public(record["model"], "model"), _public(record["dataset"], "data set", LOADERS)
    settings = {key: record[key] for key in SHARED if record.get(key) is not None}
    settings |= {key: record[key] for key in (record.get("method_settings") or "").split()}
    settings |= dict(pair.split("=") for pair in (record.get("course") or "").split())
    return Card(
        title=f"Classifier after unlearning: {name}, {dataset}",
        introduction=f"This classifier, {name}, was trained on {dataset} and had to "
        f"{'relabel' if relabel else 'forget'} {number} "
        f"{'images of a folder' if record.get('forget_dir') else 'of its training images'}. It is the result of a run "
        f"with L2UL {VERSION}, which compares methods.",
        outcome=outcome(record, number),
        tables=[
            Table(("images", "number"), rows),
            Table(("accuracy", "original model", "this model"), accuracies),
        ],
        method=method_sentence(record["method"], record["seed"], settings),
        hashes={"original, as main_unlearn.py records them": record["checkpoint_sha256"]}
        | {f"this model, {UNIFORM}": weights_sha256},
        limits=LIMITS,
        opening="" if is_folder else opening(name, num_classes, file),
        library=library_of(record["model"]) if is_folder else None,
    )


def outcome(record: Mapping[str, object], number: int) -> str:
    """Return the result of a run in a sentence: how many of its `number` images are forgotten as stored and as used.

    As used, a run with robust=1 checks changed copies alone, of which 5 % may be recognised. It claims no more.
    """
    if record["status"] == DIVERGED:
        return "the run diverged"
    relabel, is_capped = record["goal"] == "relabel", record["status"] == CAP
    stored = round(number * (record["acc_relabel"] if relabel else 100 - record["acc_forget"]) / 100)
    text = f"{stored} of {number} images are {'relabelled' if relabel else 'forgotten'} as stored"
    used, before = record.get("metric_forgotten_as_used"), record.get("acc_forget_before")
    if used is not None:
        text += f", {round(number * used / 100)} as used"
    elif record.get("robust"):
        is_checked = not is_capped and stored == number
        text += ", at least 95 % of them also in changed copies" if is_checked else ", not all of them as used"
    text += "; the limit of steps was reached" if is_capped else ""
    if used is None and record.get("robust"):
        text += "; how many are as used was not measured"
    if before is not None and before < 100:
        text += f"; the original model misclassified {number - round(number * before / 100)} of them already"
    earlier, again = record["k"] - number, record.get("acc_forget_earlier")
    if earlier and again is not None:
        text += f"; {round(earlier * again / 100)} of {earlier} images of earlier steps are predicted as their label"
    return text


def _public(name: str, what: str, known: Collection[str] | None = None) -> str:
    """Return the name of a model or data set, without the name or path of a folder of this machine.

    known  names that stand for no folder; None: all without a colon. A data set of Hugging Face without the name of its
           owner may be a local folder, of which records hold the last part
    """
    prefix, colon, place = name.partition(":")
    folder = place.removeprefix(timm_models.FOLDER)
    is_local = folder != place or place.startswith(("/", ".", "~")) or place.count("/") > 1 or "\\" in place
    if colon and (is_local or Path(place).is_dir()):
        return f"a {what} in a local folder ({prefix})"
    if colon and known is not None and "/" not in place:
        return f"a {what} ({prefix})"
    return name if colon or known is None or name in known else f"a {what} in a local folder"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"
