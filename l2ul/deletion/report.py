"""Write the report of a deletion request: as data, as a page that opens offline, and as a list of the images."""

from collections.abc import Sequence
from dataclasses import asdict
import datetime
import hashlib
import json
from pathlib import Path
import platform
import re
import shlex
from typing import Any

import torch
from torch import Tensor
import torchvision

import l2ul
from l2ul.common import pages
from l2ul.common.files import tensors_sha256
from l2ul.common.installation import command
from l2ul.deletion import states
from l2ul.deletion.candidates import Candidate
from l2ul.deletion.deployed_model import BUILT
from l2ul.deletion.flow import Deletion, Result
from l2ul.deletion.report_schema import AS_STORED, AS_USED, Report
from l2ul.deletion.request import Request
from l2ul.methods import registry
from l2ul.methods.settings import Value, has_effect
from l2ul.models import huggingface, timm_models

OPENED_AS = {  # what the page says of a model that has no name of its own
    huggingface.PREFIX: "a folder of transformers",
    timm_models.PREFIX: "a folder of timm",
    BUILT: "a module of your own",
}
THUMBNAIL = 96  # pixels of the longer side
NOT_CLAIMED = (
    "That the images no longer influence the weights. The report shows how the model classifies these images. A model "
    "that was trained without them would still classify most of them correctly, and its outputs may reveal that these "
    "images were unlearned.",
    "That the weights themselves prove the unlearning. The procedure can be audited: repeat it with the original "
    "model, the images, the settings and the seed in the report.",
    "That other photographs of the same objects are forgotten, or that the images stay forgotten under changes that "
    "the report does not test.",
    "That the damage to the model is known exactly. It is estimated without the training set.",
    "That the request cannot be detected. Anyone who has the model before and after can find the images, because their "
    "predictions differ. Delete the original model, its backups and the models derived from it, or restrict access to "
    "them.",
)
THREATS = {  # by test
    "predictions": "Somebody shows the model exactly these files.",
    "changed images": "The same photographs reach the model mirrored, cropped or compressed, as websites store them.",
    "lower precision": "The model is deployed with rounded weights, which can undo small changes of weights.",
    "recalibration": "Somebody recomputes the statistics of batch-norm from images that are not part of the request. "
    "This can undo an unlearning that relies on the old statistics.",
    "relearning": "Somebody fine-tunes the model. A model that learns the images again within a few steps still "
    "contains information about them.",
    "membership": "Somebody who sees only the outputs of the model wants to know whether an image was in the training "
    "set.",
    "agreement": "The model no longer serves its users, who expect the same predictions for other images.",
}
INVENTORY = {  # titles of the tables of an inventory
    "original_models": "original model",
    "backups": "backups",
    "derived_models": "derived models",
    "quantised_models": "quantised models",
    "recipients": "recipients of the model",
}
DIGEST = re.compile('<meta name="report-sha256" content="([0-9a-f]{64})">')  # in the page


def describe_request(
    request: Request,
    deletion: Deletion,
    *,
    minutes: float,
    request_id: str | None = None,
    controller: str | None = None,
    requested_on: str | None = None,
    label_notes: Sequence[str] = (),
    surrogate: tuple[Path, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the part of a report about the request and its settings; `surrogate`: folder and images of --surrogate."""
    return {
        "request_id": request_id,
        "controller": controller,
        "requested_on": requested_on,
        "images": request.folder.path.resolve().name,
        "goal": request.forget.goal,
        "labels": request.label_source,
        "label_notes": list(label_notes),
        "left_out": [asdict(file) for file in request.folder.unreadable],
        "method": deletion.method,
        "minutes": minutes,
        "seed": deletion.seed,
        "also": list(deletion.also),
        "counted": AS_USED if deletion.settings.robust else AS_STORED,
        "surrogate": describe_surrogate(*surrogate) if surrogate else None,
        **request.folder.reader.options,
        "image_notes": request.folder.notes,
    }


def describe_surrogate(folder: Path, images: Tensor) -> dict[str, Any]:
    """Return the part of a report about the images (n, 3, H, W) of --surrogate."""
    digest = tensors_sha256({"images": images})
    return {"folder": folder.resolve().name, "images": len(images), "sha256": digest}


def describe_result(result: Result, recognised: Tensor) -> dict[str, Any]:
    """Return the parts of a report about the search.

    recognised  (k,) bool, which images the original model recognised: only these count as forgotten
    """
    rows = [_candidate_row(candidate, recognised) for candidate in result.candidates]
    return {"trials": rows, "chosen": result.best.values if result.best else None, "search_end": result.early_end}


def _candidate_row(candidate: Candidate, recognised: Tensor) -> dict[str, Any]:
    return {
        "changed": dict(candidate.changed),
        "status": candidate.status,
        "steps": candidate.steps,
        "seconds": round(candidate.seconds, 1),
        "forgotten": int((candidate.forgotten & recognised).sum()),
        "kept": [asdict(kept) for kept in candidate.kept],
    }


def describe_run() -> dict[str, Any]:
    """Return the parts of a report about the software, the time of the request and what is not claimed."""
    tool = {
        "name": "L2UL",
        "version": l2ul.VERSION,
        "method_version": l2ul.METHOD_VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"tool": tool, "made": made, "not_claimed": NOT_CLAIMED, "threats": THREATS}


def forget_list(report: Report) -> str:
    """Return the images of a request as CSV, by their hashes: without file names and pictures."""
    has_states = all("state" in row for row in report["images"])  # not in reports of earlier versions
    lines = ["sha256,pixels_sha256,label,new_label,forgotten" + ",state" * has_states]
    for row in report["images"]:
        new = "" if row["new_label"] is None else row["new_label"]
        lines.append(f"{row['sha256']},{row['pixels_sha256']},{row['label']},{new},{int(row['forgotten'])}")
        lines[-1] += f",{row['state']}" if has_states else ""
    return "\n".join(lines) + "\n"


def digest(report: Report) -> str:
    """Return the hex sha256 of all of a report but the hashes of the files beside it, one of which contains it."""
    return hashlib.sha256(as_json({key: report[key] for key in report if key != "files"}).encode()).hexdigest()


def digest_in_page(page: str) -> str | None:
    """Return the digest of the report in its page; None for pages of earlier versions."""
    match = DIGEST.search(page)
    return match[1] if match else None


def as_json(report: Report) -> str:
    """Return a report as JSON text."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def thumbnail(image: Tensor) -> str:
    """Return a small version of an image (3, H, W) uint8 as a data URL."""
    return pages.thumbnail(image, THUMBNAIL)


def _used_settings(report: Report) -> dict[str, Value]:
    """Return the settings of the chosen candidate that have an effect on it."""
    chosen = report["chosen"] or {}
    values = registry.loop_settings(report["asked"]["method"], chosen)
    return {name: value for name, value in values.items() if has_effect(name, {**chosen, "k": len(report["images"])})}


def page(report: Report, pictures: Sequence[str] | None = None) -> str:
    """Return a report as one HTML page without external files. `pictures` are data URLs, one per image."""
    rows, request, model = report["images"], report["asked"], report["model"]["opened_by"]["model"]
    left_out = len(request.get("left_out", ()))
    sentence = states.headline(rows, request["goal"], request.get("also", ()), request.get("counted"), left_out)
    return pages.render(
        "l2ul.deletion",
        "report.html.j2",
        report=report,
        digest=digest(report),
        thumbnails=pictures,
        counts=states.count(rows),
        headline=sentence[0].upper() + sentence[1:],
        opened_as=OPENED_AS.get(model, model),
        used_settings=_used_settings(report),
        inventory_titles=INVENTORY,
        program=shlex.join(command("main_forget.py")),
        readable_time=states.readable_time,
        command=[shlex.quote(word) for word in (*command("main_forget.py"), *report["again"]["command"])],
    )
