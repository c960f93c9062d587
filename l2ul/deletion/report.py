"""What a request to forget did, as data and as one page that opens offline."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
import datetime
from io import BytesIO
import json
import platform

import jinja2
import torch
from torch import Tensor
import torchvision
from torchvision.transforms import InterpolationMode
import torchvision.transforms.v2.functional as transforms

import l2ul
from l2ul.deletion.request import Request
from l2ul.deletion.search import Trial
from l2ul.objective import Forget
from l2ul.unlearn import Settings

Report = dict[str, object]
PAGE, FORGET_LIST = "report.html", "forget_list.csv"  # beside a report
THUMBNAIL = 96  # pixels of the longer side
NOT_CLAIMED = (
    "That the images no longer influence the weights. What is shown is how the model classifies them. A model trained "
    "without them would still call most of them what they are, and whoever sees the outputs may well tell that these "
    "images were singled out.",
    "That unlearning can be read off the weights. It can be audited as a procedure, by the model before, the images, "
    "the settings and the seed in this report, and not by looking at the model after.",
    "That other photographs of the same things are forgotten, or changes of the images beyond those tested below.",
    "That the damage to the model is known. It is estimated without the training set.",
)


def images(
    request: Request,
    forget: Forget,
    before: Tensor,
    after: Tensor,
    gone: Sequence[bool],
    survives: Mapping[str, Tensor | None],
    back: Sequence[int | None],
) -> list[dict[str, object]]:
    """A row an image: what it was and is called, how surely, whether it is forgotten, and for how long that lasts.

    before    logits (k, C) on the CPU; after likewise
    gone      whether an image is forgotten as it was asked for: as it is, and changed so
    survives  (k,) bool by change: whether it is still forgotten under it; None: the model cannot run so
    back      steps of fine-tuning after which it is called by its label again; None: not within those taken
    """
    new = [None] * len(request) if forget.new_labels is None else forget.new_labels.tolist()
    rows = []
    for place, item in enumerate(request.items):
        label = int(forget.labels[place])
        row = asdict(item) | {"label": label, "new_label": new[place]}
        for when, of_all in (("before", before), ("after", after)):
            shares = of_all[place].double().softmax(0)
            called = int(shares.argmax())
            row |= {f"called_{when}": called, f"confidence_{when}": float(shares[called])}
            row |= {f"label_confidence_{when}": float(shares[label])}
        row |= {"was_called": row["called_before"] == label, "forgotten": gone[place], "back_after": back[place]}
        rows.append(
            row | {"survives": {change: bool(found[place]) for change, found in survives.items() if found is not None}}
        )
    return rows


def of_trials(trials: Sequence[Trial], taken: Trial | None) -> dict[str, object]:
    """What a report says of the settings that were tried, the taken ones first."""
    return {"trials": [_trial(one) for one in trials], "chosen": _settings(taken.settings) if taken else None}


def _trial(one: Trial) -> dict[str, object]:
    return {
        "changed": dict(one.changed),
        "status": one.status,
        "steps": one.steps,
        "seconds": round(one.seconds, 1),
        "forgotten": int(one.forgotten.sum()),
        "kept": [asdict(kept) for kept in one.kept],
    }


def _settings(settings: Settings) -> dict[str, object]:
    return {name: value for name, value in asdict(settings).items() if name not in ("course", "first_position")}


def tool() -> dict[str, object]:
    """The versions of what did it."""
    return {
        "name": "L2UL",
        "version": l2ul.VERSION,
        "method_version": l2ul.METHOD_VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def now() -> str:
    """The time in UTC as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def forget_list(report: Report) -> str:
    """The images that were asked for, a line each, by hash: no names of files, no pictures."""
    lines = ["sha256,pixels_sha256,label,new_label,forgotten"]
    for row in report["images"]:
        new = "" if row["new_label"] is None else row["new_label"]
        lines.append(f"{row['sha256']},{row['pixels_sha256']},{row['label']},{new},{int(row['forgotten'])}")
    return "\n".join(lines) + "\n"


def text(report: Report) -> str:
    """A report as JSON."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def thumbnail(image: Tensor) -> str:
    """An image (3, H, W) uint8 as a data URL: small enough for a page, whole pixels enlarged where it is smaller."""
    longer = max(image.shape[1:])
    size = [max(1, round(side * THUMBNAIL / longer)) for side in image.shape[1:]]
    mode = InterpolationMode.NEAREST if longer < THUMBNAIL else InterpolationMode.BILINEAR
    resized = transforms.resize(image.cpu(), size, mode, antialias=True)
    coded = BytesIO()
    transforms.to_pil_image(resized).save(coded, "png")
    return "data:image/png;base64," + base64.b64encode(coded.getvalue()).decode()


def page(report: Report, pictures: Sequence[str] | None = None) -> str:
    """A report as one HTML page that needs nothing else: pictures are data URLs, in the order of the images."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("l2ul.deletion", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(report=report, pictures=pictures)
