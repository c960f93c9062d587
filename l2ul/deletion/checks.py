"""Measure what a deletion request achieved: predictions, robustness, relearning, membership inference, damage."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from l2ul import ProgressBar
from l2ul.common.modes import batch_norms
from l2ul.data.images import Split
from l2ul.deletion import states
from l2ul.deletion.candidates import TimeBudget, Unlearner
from l2ul.deletion.report_schema import FORGOTTEN, ImageRow
from l2ul.deletion.request import Request, logits
from l2ul.metrics import agreement, membership, relearn, robustness

CHECKS_SHARE = 0.95  # of the time: relearning stops then


@dataclass(frozen=True)
class Verdict:
    """How an unlearned model fulfils a request. Tensors (k,) bool are on the CPU.

    used        how the images are forgotten as used
    stored      whether the request is fulfilled for each image as it is stored and for its copies of --also
    met         whether it is fulfilled for each image as the request counts, see `Unlearner.forgotten`
    recognised  whether the original model recognised each image or one of these copies
    """

    used: robustness.AsUsed
    stored: Tensor
    met: Tensor
    recognised: Tensor

    @property
    def forgotten(self) -> Tensor:
        """Return which images (k,) bool count as forgotten: only those that the original model recognised."""
        return self.met & self.recognised


def judge(unlearner: Unlearner, after: nn.Module, *, in_full: bool = True) -> Verdict:
    """Measure how an unlearned model fulfils a request; `in_full` as in `robustness.as_used`.

    A recalibration counts as a change of models with batch-norm only: it leaves others as they are.
    """
    used = robustness.as_used(after, unlearner.forget, in_full=in_full)
    if not batch_norms(after):
        models = {change: kept for change, kept in used.models.items() if change != robustness.RECALIBRATED}
        used = replace(used, models=models)
    stored = unlearner.forgotten_as_stored(after)
    return Verdict(used, stored, unlearner.forgotten(after, used, stored), unlearner.recognised)


def measure(
    unlearner: Unlearner,
    request: Request,
    after: nn.Module,
    references: Split | None,
    budget: TimeBudget,
    progress: ProgressBar,
    others: tuple[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the measured parts of a report: images, damage, robustness, recalibration, relearning, membership.

    unlearner   has the original model, and the probes of agreement
    after       the model as it will be written
    references  images that the model was not trained on, on its device, for membership inference
    budget      of the whole command; relearning stops at CHECKS_SHARE of it
    others      images that are not in D_f, with a name, on which batch-norm is recalibrated; by default mixes of D_f
    """
    labels, after_logits = request.forget.labels, logits(after, request.images)
    verdict = judge(unlearner, after)
    deadline = budget.part(CHECKS_SHARE)
    with progress("relearning", relearn.MAX_STEPS) as advance:

        def go_on() -> bool:
            advance(1)
            return deadline.left > 0

        back, steps = relearn.steps_to_relearn_each(after, request.images, labels, go_on)
    relearning = {"steps": steps, "lr": relearn.LEARNING_RATE}
    forgotten = verdict.forgotten
    relearning["back"] = sum(step is not None for step, one in zip(back, forgotten.tolist(), strict=True) if one)
    return {
        "images": image_rows(request, after_logits, verdict, back),
        "damage": [asdict(agreement.measure(after, probe)) for probe in unlearner.probes],
        "robustness": {
            change: None if kept is None else int((kept & forgotten).sum())
            for change, kept in verdict.used.survives().items()
        },
        "recalibration": _recalibration(unlearner.model, after, request, others),
        "relearning": relearning if steps or None not in back else None,
        "membership": _membership(unlearner.model, request, after, after_logits, references) if references else None,
    }


def image_rows(request: Request, logits_after: Tensor, verdict: Verdict, back: Sequence[int | None]) -> list[ImageRow]:
    """Return the row of each image in a report.

    logits_after  (k, C) on the CPU
    back          fine-tuning steps until each image is predicted as its label again; None: it was not
    """
    labels, new_labels = request.forget.labels.tolist(), request.forget.new_labels
    new = [None] * len(request) if new_labels is None else new_labels.tolist()
    rows, used, survives = [], verdict.used, verdict.used.survives()
    for index, image in enumerate(request.folder.files):
        row = asdict(image) | {"label": labels[index], "new_label": new[index]}
        for when, of_all in (("before", request.logits_before), ("after", logits_after)):
            probabilities = of_all[index].double().softmax(0)
            predicted = int(probabilities.argmax())
            row[f"called_{when}"] = predicted
            row[f"confidence_{when}"] = float(probabilities[predicted])
            row[f"label_confidence_{when}"] = float(probabilities[labels[index]])
        row["was_called"] = row["called_before"] == labels[index]
        row["state"] = states.state_of(bool(verdict.met[index]), bool(verdict.recognised[index]))
        row["forgotten"], row["back_after"] = row["state"] == FORGOTTEN, back[index]
        row["forgotten_as_stored"] = bool(verdict.stored[index])
        row["forgotten_as_used"] = bool(verdict.stored[index] & used.forgotten[index])
        row["copies_forgotten"] = float(used.copies[index])
        row["forgotten_earlier"] = index in request.forgotten_earlier
        row["survives"] = {change: bool(kept[index]) for change, kept in survives.items() if kept is not None}
        rows.append(row)
    return rows


def _recalibration(
    original: nn.Module, after: nn.Module, request: Request, others: tuple[str, Tensor] | None
) -> dict[str, Any] | None:
    """Measure whether D_f is recognised after batch-norm is recalibrated on images; None for a model without it."""
    if not batch_norms(after):
        return None
    name, images = others or ("mixes of the images of the request", robustness.stand_ins(request.forget.images))
    models = {
        "before": after,
        "after": robustness.recalibrated(after, images),
        "original_after": robustness.recalibrated(original, images),
    }
    labels, shares = request.forget.labels.cpu(), {}
    for key, model in models.items():
        outputs = logits(model, request.images)  # which may not be finite after the recalibration
        predicted = (outputs.argmax(1) == labels) & outputs.isfinite().all(1)
        shares[key] = 100 * float(predicted.double().mean())
    return {"images": name, "count": len(images), **shares}


def _membership(
    before: nn.Module, request: Request, after: nn.Module, after_logits: Tensor, references: Split
) -> dict[str, Any]:
    """Measure how well attacks on the outputs separate D_f from the references, for the model before and after."""
    labels, others = request.forget.labels.cpu(), references.labels.cpu()
    return {
        "references": len(others),
        "before": membership.inference((request.logits_before, labels), (logits(before, references.images), others)),
        "after": membership.inference((after_logits, labels), (logits(after, references.images), others)),
    }
