"""Verify a report: hashes, signature, the chain of earlier requests, whether the images are still forgotten.

`check_again` repeats the request and compares the result with the report.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
import shutil

import torch
from torch import Tensor, nn

from l2ul.common.choices import DIVERGED, MAX_IMAGE_PIXELS
from l2ul.common.errors import Diverged, InputError, first_line, is_out_of_memory
from l2ul.common.files import file_sha256, tensors_sha256
from l2ul.common.text import first_three, normal_form
from l2ul.data.image_files import ImageReader
from l2ul.deletion import deployed_model, signature, states
from l2ul.deletion.candidates import Unlearner
from l2ul.deletion.deployed_model import DeployedModel
from l2ul.deletion.report import digest, digest_in_page, forget_list
from l2ul.deletion.report_schema import (
    EARLIER,
    FORGET_LIST,
    PAGE,
    REPORT,
    EarlierRow,
    Report,
    WrittenModelHashes,
    read_report,
)
from l2ul.deletion.request import ImageFile, ImageFolder, Request, logits, read_images, reading_of
from l2ul.objective import is_forgotten
from l2ul.unlearn import Settings

SAME_PROBABILITY = 0.01  # largest difference of probabilities that counts as equal; threads and GPUs round differently


@dataclass(frozen=True)
class Check:
    """The result of a check: its name, whether it passed (None: this cannot be decided), and what was found."""

    name: str
    passed: bool | None
    finding: str


def verify(
    path: Path,
    *,
    model: Path | None = None,
    build: str | None = None,
    image_folders: Sequence[Path] = (),
    key: object = None,
    device: torch.device,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> list[Check]:
    """Check a report and what belongs to it.

    path           of the report
    model          the model, if it is not beside the report
    build          function that builds the model, if it was given in the request
    image_folders  the images of this request and of earlier ones; empty: images are not checked
    key            public key that the signature must be by
    max_pixels     images with more pixels are not read

    Raises InputError if the file is not a report or an image folder or a model is missing.
    """
    report, folder = read_report(path), path.parent
    written = deployed_model.written_models(folder)
    if model is None and len(written) > 1:
        names = ", ".join(one.name for one in written)
        raise InputError(f"there are {len(written)} models beside {path} ({names})", "give the one in use as --model")
    model = model or next(iter(written), None)
    if model is None or not model.exists():
        raise InputError(f"there is no model {model or f'beside {path}'}", "give its path as --model")
    checks = check_files(report, folder, deployed_model.files_sha256(model))
    files_match = checks[0].passed
    earlier, chain_checks = check_chain(report, folder)
    checks += chain_checks
    opened = None
    if _needs_build(report) and not (build or image_folders):
        checks.append(Check("weights", None, "not checked: give the function that builds the model as --build"))
    else:
        try:
            opened = deployed_model.reopen(report["model"]["opened_by"], report["model"]["classes"], model, build)
            checks.append(check_weights(report, opened.hashes()["weights_sha256"]))
        except InputError as error:
            if files_match:  # the files are those of the report, so an argument is wrong
                raise
            checks.append(Check("weights", False, f"cannot be read: {error.problem}"))
    checks.append(check_signature(path, key))
    if image_folders and opened:
        checks += _check_folders([*earlier, report], opened, image_folders, device, max_pixels)
    return checks


def _check_folders(
    chain: Sequence[Report], model: DeployedModel, folders: Sequence[Path], device: torch.device, max_pixels: int
) -> list[Check]:
    """Check the predictions of the last report of a chain, and for each request whether its images are forgotten.

    The images of each request are read as it read them.
    """
    classifier, required = model.classifier.to(device), requirements(chain)
    outputs: dict[tuple[object, ...], list[tuple[ImageFile, Tensor]]] = {}
    unreadable: dict[str, None] = {}
    for reading in map(reading_of, chain):
        if tuple(reading.values()) in outputs:
            continue
        images = _read_folders(folders, model, ImageReader(**reading, max_pixels=max_pixels))
        try:
            outputs[tuple(reading.values())] = _probabilities(classifier, images, device)
        except Exception as error:  # the module may be the user's own and raise anything
            if is_out_of_memory(error):
                raise
            why = "" if isinstance(error, Diverged) else "the model does not accept the images: "
            return [Check("predictions", False, f"{why}{first_line(error)}")]
        unreadable |= dict.fromkeys(f"{file.file}: {file.why}" for folder in images for file in folder.unreadable)
    of_request = [outputs[tuple(reading_of(report).values())] for report in chain]
    checks = check_predictions(chain[-1], of_request[-1])
    for number, own in enumerate(of_request, start=1):
        predictions = [(image, int(each.argmax())) for image, each in own]
        checks += check_images([one for one in required if one.request == number], predictions)
    if unreadable:
        checks.append(Check("files that cannot be read", None, f"{len(unreadable)} ({first_three(list(unreadable))})"))
    return checks


def _needs_build(report: Report) -> bool:
    return report["model"]["opened_by"]["model"] == deployed_model.BUILT


def _read_folders(folders: Iterable[Path], model: DeployedModel, reader: ImageReader) -> list[ImageFolder]:
    return [read_images(folder, model.to_pixels, skip_bad=True, reader=reader, with_labels=False) for folder in folders]


def _probabilities(
    classifier: nn.Module, folders: Iterable[ImageFolder], device: torch.device
) -> list[tuple[ImageFile, Tensor]]:
    """Return the images of all folders with the probabilities (C,) that the model gives their classes.

    Raises Diverged if a logit is not finite.
    """
    outputs = []
    for folder in folders:
        current = logits(classifier, folder.images.to(device))
        if not current.isfinite().all():
            raise Diverged("the logits of an image are not finite")
        outputs += zip(folder.files, current.double().softmax(1), strict=True)
    return outputs


def check_predictions(report: Report, outputs: Iterable[tuple[ImageFile, Tensor]]) -> list[Check]:
    """Compare the predictions of a model with those of the report, which other code for the same weights changes.

    outputs  images with their probabilities (C,); those that the report does not contain are ignored

    Empty for reports without predictions.
    """
    probabilities = {image.pixels_sha256: each for image, each in outputs}
    rows = [row for row in report["images"] if row["pixels_sha256"] in probabilities and "confidence_after" in row]
    different = []
    for row in rows:
        current, classes = probabilities[row["pixels_sha256"]], len(report["model"]["classes"])
        named = (row["label"], row["called_after"], row["new_label"] or 0)
        same = len(current) == classes > max(named)
        same = same and abs(float(current[row["called_after"]]) - row["confidence_after"]) <= SAME_PROBABILITY
        different += [] if same else [row["file"]]
    finding = f"{len(rows) - len(different)} of {states.images(len(rows))} as in the report"
    finding += f"; others: {first_three(different)}" if different else ""
    return [Check("predictions", not different, finding)] if rows else []


def check_files(report: Report, folder: Path, model_files: Mapping[str, str]) -> list[Check]:
    """Compare the hashes of the model's files, of the page and of the list with the report; the model comes first.

    model_files  hex sha256 of the model's files now, by name; a single file may have any name
    """
    expected = report["model"]["after"]["files"]
    if len(model_files) == 1 and [*model_files.values()] == [*expected.values()]:
        model_files = expected
    different = sorted(
        name for name in expected.keys() | model_files.keys() if expected.get(name) != model_files.get(name)
    )
    finding = f"not the model of the report: {', '.join(different)}" if different else "unchanged"
    checks = [Check("model", not different, finding), *_check_text(report, folder / PAGE)]
    for name in (PAGE, FORGET_LIST):
        check = _check_file(name, folder / name, report["files"][name])
        if name == FORGET_LIST and check.passed and (folder / name).read_bytes() != forget_list(report).encode():
            check = Check(name, False, "contradicts the report")
        checks.append(check)
    return checks


def _check_text(report: Report, page: Path) -> list[Check]:
    """Compare the outcome of a report with its images, and its digest with the one in its page.

    Empty for reports of earlier versions, which have no digest.
    """
    counted = states.count(report["images"]).outcome
    if report.get("outcome", counted) != counted:
        finding = f"its outcome is {report['outcome']!r}, but by the states of its images it is {counted!r}"
        return [Check(REPORT, False, finding)]
    expected = digest_in_page(page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else None
    if expected is None:
        return []
    same = digest(report) == expected
    return [Check(REPORT, same, f"agrees with {PAGE}" if same else f"contradicts {PAGE}: it was changed")]


def _check_file(name: str, path: Path, sha256: str) -> Check:
    if not path.is_file():
        return Check(name, False, "missing")
    unchanged = file_sha256(path) == sha256
    return Check(name, unchanged, "unchanged" if unchanged else "changed")


def check_weights(report: Report, weights_sha256: str) -> Check:
    """Compare the hash of the weights with the report."""
    same = weights_sha256 == report["model"]["after"]["weights_sha256"]
    return Check("weights", same, "those of the report" if same else "not those of the report")


def check_signature(path: Path, key: object = None) -> Check:
    """Check the signature beside a report; if a public key is given, it must be by this key."""
    beside, name = signature.signature_path(path), f"signature of {path.name}"
    if not beside.is_file():
        if key:
            return Check(name, False, "missing")
        return Check(name, None, "none: the author of the report is unknown, and a change of it cannot be detected")
    fingerprint = signature.signed_by(path.read_bytes(), beside.read_bytes(), key)
    if fingerprint is None:
        return Check(name, False, "invalid: the report was changed, or it was signed with another key")
    whose = "the given key" if key else "the key stored with it, whose owner is unknown"
    return Check(name, True, f"valid, by {whose} (sha256 {fingerprint})")


def read_chain(folder: str | Path | None, weights_sha256: str) -> list[Report]:
    """Return the reports of all requests that led to the model in an output folder, first to last.

    folder          None, or a name that is no folder: of another model
    weights_sha256  of the model as opened from there

    Empty if the folder is not the output of a request. Raises InputError if a report is missing or was changed, or if
    the model is not that of the last one: a further report could not refer to it.
    """
    if folder is None or not deployed_model.is_output(Path(folder)):
        return []
    folder = Path(folder)
    last = read_report(folder / REPORT)
    earlier, checks = check_chain(last, folder)
    failed = next((check for check in checks if check.passed is False), None)
    if failed:
        raise InputError(
            f"the chain of requests in {folder} is broken ({failed.name}: {failed.finding})",
            "restore the files",
            "start a new chain with the model in another folder",
        )
    if not check_weights(last, weights_sha256).passed:
        raise InputError(
            f"the model in {folder} is not the one of the report there: it was replaced or changed",
            "restore it",
            "start a new chain with the model in another folder",
        )
    return [*earlier, last]


def check_no_chain(model: Path, weights_sha256: str) -> None:
    """Raise InputError for the model of an earlier request, given by its own path and not by the output folder.

    Its images would lose their labels: another request for one of them might lead the model back to its class.
    """
    folder = model.parent
    if not deployed_model.is_output(folder):
        return
    try:
        report = read_report(folder / REPORT)
    except InputError:  # of other software
        return
    if check_weights(report, weights_sha256).passed:
        raise InputError(
            f"{model} is the model of the request in {folder.resolve()}",
            f"give --model {folder}, so that the new report refers to this request",
            "start a new chain with the model in another folder",
        )


def earlier_rows(chain: Sequence[Report], folder: Path | None) -> list[EarlierRow]:
    """Return the rows of the next report about the reports of an output folder, given its chain."""
    if not chain:
        return []
    last = chain[-1]
    row: EarlierRow = {
        "file": f"{EARLIER}/{len(chain)}.json",
        "sha256": file_sha256(folder / REPORT),
        "made": last["made"],
        "images": len(last["images"]),
        "forgotten": states.count(last["images"]).forgotten,
    }
    return [*last["earlier"], row]


def copy_chain(folder: Path, last: Path) -> None:
    """Copy the report of an output folder to `last`, and its earlier reports beside that, with their signatures."""
    last.parent.mkdir()
    for path in (folder / EARLIER).glob("*.json*"):
        shutil.copy(path, last.parent)
    for path in folder.glob(f"{REPORT}*"):
        shutil.copy(path, last.parent / path.name.replace(REPORT, last.name))


def check_chain(report: Report, folder: Path) -> tuple[list[Report], list[Check]]:
    """Return the unchanged reports of earlier requests, first to last, and the checks of all of them.

    Each request must start from the weights with which the previous one ended. Earlier reports may be signed with
    other keys, because the last report contains their hashes.
    """
    reports, checks = [], []
    for row in report["earlier"]:
        path = folder / row["file"]
        checks.append(_check_file(row["file"], path, row["sha256"]))
        if checks[-1].passed:
            reports.append(read_report(path))
        if signature.signature_path(path).is_file() and path.is_file():
            checks.append(check_signature(path))
    chain = [*reports, report]
    for number, (first, second) in enumerate(zip(chain, chain[1:], strict=False), start=1):
        if first["model"]["after"]["weights_sha256"] != second["model"]["before"]["weights_sha256"]:
            finding = f"does not start from the model of request {number}"
            checks.append(Check(f"request {number + 1}", False, finding))
    return reports, checks


def check_original(report: Report, hashes: WrittenModelHashes) -> Check:
    """Compare the files and weights of the original model with the report."""
    expected = report["model"]["before"]
    files = expected.get("files", {})
    different = [name for name, sha256 in files.items() if hashes["files"].get(name, sha256) != sha256]
    same = hashes["weights_sha256"] == expected["weights_sha256"] and not different
    return Check("original model", same, "that of the report" if same else "not the original model of the report")


def check_files_exist(report: Report, folder: Path) -> Check:
    """Check that a folder has all images of a report, in any Unicode normal form of their names."""
    present = {normal_form(path.relative_to(folder).as_posix()) for path in [*folder.glob("*"), *folder.glob("*/*")]}
    missing = [row["file"] for row in report["images"] if normal_form(row["file"]) not in present]
    finding = f"missing in {folder}: {first_three(missing)}" if missing else f"all in {folder}"
    return Check("original images", not missing, finding)


def check_request(report: Report, files: Sequence[ImageFile], labels: Sequence[int]) -> Check:
    """Compare the images of a request, their order and their labels with the report."""
    rows, names = {row["file"]: row for row in report["images"]}, _names_in(report, files)
    present = dict(zip(names, files, strict=True))
    others = [name for name in present if name not in rows]
    changed = [
        name for name, row in rows.items() if name in present and present[name].pixels_sha256 != row["pixels_sha256"]
    ]
    labels_of = dict(zip(names, labels, strict=True))
    relabelled = [name for name, row in rows.items() if labels_of.get(name, row["label"]) != row["label"]]
    parts = ((others, "not in the report"), (changed, "changed"), (relabelled, "another label"))
    findings = [f"{what}: {first_three(names)}" for names, what in parts if names]
    finding = "; ".join(findings) or "those of the report"
    return Check("request", not findings, f"images and labels: {finding}")


def _names_in(report: Report, files: Sequence[ImageFile]) -> list[str]:
    """Return the name of each file in a report, where it may have another Unicode normal form."""
    names = {row["file"] for row in report["images"]}
    other_forms = {normal_form(name): name for name in names}
    return [
        image.file if image.file in names else other_forms.get(normal_form(image.file), image.file) for image in files
    ]


def check_again(
    report: Report, model: DeployedModel, request: Request, unlearner: Unlearner, settings: Settings
) -> list[Check]:
    """Repeat a request and compare weights and predictions with the report.

    model, request, unlearner  opened and read from the original model and images, see `check_original`
    settings                   with which the written model was made; not used if the model was left unchanged

    The weights must be equal bit by bit, which they are on the same machine with the same versions and threads.
    """
    unlearned = model.classifier
    if report.get("chosen"):
        with unlearner.show_progress("repeating the request", None) as advance:
            outcome = unlearner.unlearn(settings, on_step=lambda row: advance(1, f"{row['forgotten']:.0f} % of D_f"))
        if outcome.status == DIVERGED:
            return [Check("weights again", False, "the run diverged")]
        unlearned = model.as_written(outcome.model)
    expected = report["model"]["after"]["weights_sha256"]
    sha256 = tensors_sha256(unlearned.net.state_dict())
    finding = f"sha256 {sha256}, " + ("as in the report" if sha256 == expected else f"but {expected} in the report")
    return [Check("weights again", sha256 == expected, finding), _check_rows(report, request, unlearner, unlearned)]


def _check_rows(report: Report, request: Request, unlearner: Unlearner, unlearned: nn.Module) -> Check:
    """Compare states and predictions of the images in a report with those of the repeated request."""
    met, recognised = unlearner.forgotten(unlearned).tolist(), unlearner.recognised.tolist()
    probabilities = [each.double().softmax(1) for each in (request.logits_before, logits(unlearned, request.images))]
    different = []
    names = _names_in(report, request.folder.files)
    for index, (name, label) in enumerate(zip(names, request.forget.labels.tolist(), strict=True)):
        row = next(row for row in report["images"] if row["file"] == name)
        same = states.state(row) == states.state_of(met[index], recognised[index])
        for when, of_all in zip(("before", "after"), probabilities, strict=True):
            predicted = int(of_all[index].argmax())
            values = {
                "called": predicted,
                "confidence": of_all[index, predicted],
                "label_confidence": of_all[index, label],
            }
            for name, value in values.items():
                tolerance = SAME_PROBABILITY if name != "called" else 0
                same &= abs(float(value) - row.get(f"{name}_{when}", float(value))) <= tolerance
        if not same:
            different.append(name)
    total = len(request)
    finding = f"{total - len(different)} of {states.images(total)} as in the report"
    finding += f"; others: {first_three(different)}" if different else ""
    return Check("predictions again", not different, finding)


@dataclass(frozen=True)
class Requirement:
    """What a report requires of an image: that the model misclassifies it, or classifies it as `new_label`.

    request     number of the request, from 1
    superseded  a later request requires a class that contradicts this
    recognised  whether the model predicted the label before this request or an earlier one
    fulfilled   whether the model of this request met the requirement, as its report states
    """

    request: int
    file: str
    sha256: str
    pixels_sha256: str
    label: int
    new_label: int | None
    superseded: bool = False
    recognised: bool = True
    fulfilled: bool = True

    def is_met(self, predictions: Tensor) -> Tensor:
        """Return which predicted classes (n,) int64 meet the requirement, (n,) bool."""
        if self.new_label is None:
            return is_forgotten(predictions, torch.tensor(self.label), "misclassify")
        return is_forgotten(predictions, torch.tensor(self.new_label), "relabel")


def requirements(reports: Sequence[Report]) -> list[Requirement]:
    """Return what a chain of reports requires, the last report's requirements first.

    An earlier requirement is superseded if no class is left that meets it and all later ones for the same image.
    """
    required: list[Requirement] = []
    allowed: dict[str, Tensor] = {}  # classes that an image may still have
    keys = ("file", "sha256", "pixels_sha256", "label", "new_label")
    for number, report in reversed(list(enumerate(reports, start=1))):
        for row in report["images"]:
            recognised = states.was_recognised(row) or row.get("forgotten_earlier", False)
            one = Requirement(number, *(row[key] for key in keys), recognised=recognised)
            if "called_after" in row:
                one = replace(one, fulfilled=bool(one.is_met(torch.tensor(row["called_after"]))))
            classes = allowed.get(one.pixels_sha256, torch.arange(len(report["model"]["classes"])))
            left = classes[one.is_met(classes)]
            required.append(replace(one, superseded=not len(left)))
            allowed[one.pixels_sha256] = left if len(left) else classes
    return required


def check_images(required: Iterable[Requirement], predictions: Iterable[tuple[ImageFile, int]]) -> list[Check]:
    """Check for each request whether its images are still forgotten.

    predictions  images with the class that the model predicts; images that no request contains are ignored

    Images are identified by their pixels, or by their files where this machine decodes them differently.
    """
    predicted: dict[str, int] = {}
    for image, prediction in predictions:
        predicted |= {image.pixels_sha256: prediction, image.sha256: prediction}
    by_request: dict[int, list[Requirement]] = {}
    for one in required:
        by_request.setdefault(one.request, []).append(one)
    return [_check_request(number, by_request[number], predicted) for number in sorted(by_request)]


def _check_request(number: int, required: list[Requirement], predicted: Mapping[str, int]) -> Check:
    current = [one for one in required if not one.superseded]
    missing, failed, unfulfilled = [], [], []
    for one in current:
        prediction = predicted.get(one.pixels_sha256, predicted.get(one.sha256))
        if prediction is None:
            missing.append(one.file)
        elif not one.is_met(torch.tensor(prediction)):
            (failed if one.fulfilled else unfulfilled).append(one.file)
    unrecognised = [one.file for one in current if not one.recognised]
    done = [one.file for one in current if one.recognised and one.file not in {*failed, *unfulfilled, *missing}]
    finding = f"{len(done)} of {len(current) - len(unrecognised)} images forgotten as stored"
    finding += f"; {len(unrecognised)} not recognised before: {first_three(unrecognised)}" if unrecognised else ""
    stated = f"the request was not fulfilled for {first_three(unfulfilled)}, as its report states"
    finding += f"; {stated}" if unfulfilled else ""
    finding += f"; forgotten in the report, but not now: {first_three(failed)}" if failed else ""
    finding += f"; not in the given folders: {first_three(missing)}" if missing else ""
    superseded = len(required) - len(current)
    finding += f"; {superseded} superseded by a later request" if superseded else ""
    passed = not (failed or unfulfilled or missing)
    # Nothing can be confirmed if no image was recognised before, or if later requests contradict all of this one.
    unclaimed = passed and len(unrecognised) == len(current)
    return Check(f"images of request {number}", None if unclaimed else passed, finding)
