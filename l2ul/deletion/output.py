"""The output folder of a request: check that it is free, and write the model with its report there."""

from collections.abc import Iterable
import errno
import itertools
import os
from pathlib import Path
import time
from typing import Any

from PIL import Image
import torch

from l2ul.common.errors import InputError
from l2ul.common.files import atomic, file_sha256, remove_parts, require_writable, tensors_sha256
from l2ul.deletion import deployed_model, report, signature, verify
from l2ul.deletion.deployed_model import DeployedModel
from l2ul.deletion.model_card import of_report
from l2ul.deletion.report_schema import FORGET_LIST, PAGE, REPORT
from l2ul.deletion.request import Request
from l2ul.experiments.records import CARD
from l2ul.metrics import preflight
from l2ul.metrics.preflight import check_same_model
from l2ul.models import hub, huggingface, timm_models
from l2ul.models.classifier import Classifier

PROBE_SIZE = 300, 280  # pixels of the image on which resizing is compared
INTERRUPTED_AGE = 3600  # seconds after which an unfinished folder is taken for that of a killed process


def check_output(output: Path, inputs: Iterable[Path | str | None]) -> None:
    """Raise InputError unless `output`, an absolute path, can become a new folder outside the `inputs`.

    inputs  paths or names of models that are only read; None is ignored

    Nothing is created. An empty folder counts as new.
    """
    try:
        if not _is_free(output) or output == Path.cwd():
            raise InputError(f"--output {output} exists already", "give a new folder, nothing is overwritten")
        output.with_name(f".{output.name}.{'0' * 12}.part").exists()  # as `atomic` names it
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot write to --output {output} ({error.strerror})", "give another folder") from None
    for path in inputs:
        place = str(path or "").removeprefix(huggingface.PREFIX).removeprefix(timm_models.PREFIX)
        if place and output.is_relative_to(os.path.realpath(place.removeprefix(timm_models.FOLDER))):
            raise InputError(f"--output {output} is inside {path}, which must stay unchanged", "give another folder")
    require_writable(_existing_parent(output))


def check_writable(
    output: Path, model: DeployedModel, request: Request, build: str | None = None, uploads: bool = False
) -> None:
    """Raise InputError unless the original model can be written in its form and opened again, which is tried.

    uploads  whether the files of an upload are tried as well
    """
    original = model.as_written(model.classifier)
    with preflight.trial_write(model.classifier.name, _existing_parent(output) / output.name) as folder:
        path, _, reopened = _write_model(folder, model, original, request, build)
        if uploads:
            (folder / "upload").mkdir()
            hub.write_files(folder / "upload", reopened.classifier, "", path.is_dir(), reopened.dtypes)


def remove_interrupted(output: Path) -> None:
    """Delete the unfinished output of the same command if it was killed earlier."""
    remove_parts(output.parent, older_than=time.time() - INTERRUPTED_AGE, prefix=f"{output.name}.")


def write(
    output: Path,
    model: DeployedModel,
    unlearned: Classifier,
    request: Request,
    contents: dict[str, Any],
    *,
    build: str | None = None,
    earlier_folder: Path | None = None,
    with_thumbnails: bool = True,
    key: object = None,
) -> Path:
    """Write model, model card, report, page, list of images and signature into one new folder; return the folder.

    output          the folder, or its name with a number if other software has created it by now
    unlearned       the model as written: see `DeployedModel.as_written`
    contents        the report without the keys `model.after`, `model.left_out` and `files`, which are added here
    build           function that builds the model, if the user's code is needed to open it
    earlier_folder  output folder of the earlier request, whose reports are copied
    key             private key for the signature

    The model is opened again from its files and compared before the folder appears. The folder appears complete or not
    at all.
    """
    numbered = (f"{output.name}-{number}" for number in itertools.count(2))
    for path in filter(_is_free, map(output.with_name, itertools.chain([output.name], numbered))):
        try:
            with atomic(path, replace=False) as part:
                _write(part, model, unlearned, request, contents, build, earlier_folder, with_thumbnails, key)
            return path
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise  # else other software has created it meanwhile


def _write(
    part: Path,
    model: DeployedModel,
    unlearned: Classifier,
    request: Request,
    contents: dict[str, Any],
    build: str | None,
    earlier_folder: Path | None,
    with_thumbnails: bool,
    key: object,
) -> None:
    """Do what `write` does, to the new folder `part`."""
    part.mkdir()
    path, left_out, reopened = _write_model(part, model, unlearned, request, build)
    card = of_report(contents, tensors_sha256(unlearned.net.state_dict()), None if path.is_dir() else path.name)
    ((path if path.is_dir() else part) / CARD).write_text(card.text(), encoding="utf-8")
    contents = contents | {"model": contents["model"] | {"left_out": left_out, "after": reopened.hashes()}}
    if earlier_folder:
        verify.copy_chain(earlier_folder, part / contents["earlier"][-1]["file"])
    thumbnails = [report.thumbnail(image) for image in request.images] if with_thumbnails else None
    (part / PAGE).write_text(report.page(contents, thumbnails), encoding="utf-8")
    (part / FORGET_LIST).write_text(report.forget_list(contents), encoding="utf-8")
    contents["files"] = {name: file_sha256(part / name) for name in (PAGE, FORGET_LIST)}
    (part / REPORT).write_text(report.as_json(contents), encoding="utf-8")
    if key:
        signature.write_signature(part / REPORT, key)


def _write_model(
    folder: Path, model: DeployedModel, classifier: Classifier, request: Request, build: str | None
) -> tuple[Path, list[str], DeployedModel]:
    """Write a classifier in the form of `model`, open it again and compare both, and how they resize an image.

    Returns the path, the entries that were left out, and the model as opened again.
    """
    left_out = model.write(classifier, folder, len(request.class_names))
    path = deployed_model.written_models(folder)[0]
    reopened = deployed_model.reopen(model.opened_by, request.class_names, path, build)
    check_same_model(classifier, reopened.classifier.to(request.images.device), request.images)
    image = Image.effect_noise(PROBE_SIZE, 60).convert("RGB")
    if not torch.equal(model.to_pixels(image), reopened.to_pixels(image)):
        raise InputError(
            "the model opened again from the written files resizes images in another way, so nothing was written",
            "give the size that it takes with --image-size",
        )
    return path, left_out, reopened


def _existing_parent(output: Path) -> Path:
    return next(parent for parent in output.parents if parent.exists())


def _is_free(path: Path) -> bool:
    """Return whether a path does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
