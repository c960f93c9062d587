"""The output folder of a request: check that it is free, and write the model with its report there."""

from collections.abc import Iterable
import errno
import itertools
from pathlib import Path
import time
from typing import Any

from torch import nn

from l2ul.common.errors import InputError
from l2ul.common.files import atomic, file_sha256, remove_parts, require_writable, tensors_sha256
from l2ul.deletion import deployed_model, report, signature, verify
from l2ul.deletion.checks import check_same_model
from l2ul.deletion.deployed_model import DeployedModel
from l2ul.deletion.model_card import of_report
from l2ul.deletion.report_schema import FORGET_LIST, PAGE, REPORT
from l2ul.deletion.request import Request
from l2ul.experiments.records import CARD
from l2ul.models import huggingface, timm_models

INTERRUPTED_AGE = 3600  # seconds after which an unfinished folder is taken for that of a killed process


def check_output(output: Path, inputs: Iterable[Path | str | None]) -> None:
    """Raise InputError unless `output`, an absolute path, can become a new folder outside the `inputs`.

    inputs  paths or names of models that are only read; None is ignored

    Nothing is created. An empty folder counts as new.
    """
    try:
        if not _is_free(output) or output == Path.cwd():
            raise InputError(f"--output {output} exists already; give a new folder, nothing is overwritten")
        output.with_name(f".{output.name}.{'0' * 12}.part").exists()  # as `atomic` names it
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot write to --output {output} ({error.strerror}); give another folder") from None
    for path in inputs:
        place = str(path or "").removeprefix(huggingface.PREFIX).removeprefix(timm_models.PREFIX)
        if place and output.is_relative_to(Path(place.removeprefix(timm_models.FOLDER)).resolve()):
            raise InputError(f"--output {output} is inside {path}, which must stay unchanged; give another folder")
    require_writable(next(parent for parent in output.parents if parent.exists()))


def remove_interrupted(output: Path) -> None:
    """Delete the unfinished output of the same command if it was killed earlier."""
    remove_parts(output.parent, older_than=time.time() - INTERRUPTED_AGE, prefix=f"{output.name}.")


def write(
    output: Path,
    model: DeployedModel,
    unlearned: nn.Module,
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
    unlearned: nn.Module,
    request: Request,
    contents: dict[str, Any],
    build: str | None,
    earlier_folder: Path | None,
    with_thumbnails: bool,
    key: object,
) -> None:
    """Do what `write` does, to the new folder `part`."""
    part.mkdir()
    left_out = model.write(unlearned, part)
    path = deployed_model.written_models(part)[0]
    card = of_report(contents, tensors_sha256(unlearned.net.state_dict()), None if path.is_dir() else path.name)
    ((path if path.is_dir() else part) / CARD).write_text(card.text(), encoding="utf-8")
    reopened = deployed_model.reopen(model.opened_by, request.class_names, path, build)
    contents = contents | {"model": contents["model"] | {"left_out": left_out, "after": reopened.hashes()}}
    check_same_model(unlearned, reopened.classifier.to(request.images.device), request.images)
    if earlier_folder:
        verify.copy_chain(earlier_folder, part / contents["earlier"][-1]["file"])
    thumbnails = [report.thumbnail(image) for image in request.images] if with_thumbnails else None
    (part / PAGE).write_text(report.page(contents, thumbnails), encoding="utf-8")
    (part / FORGET_LIST).write_text(report.forget_list(contents), encoding="utf-8")
    contents["files"] = {name: file_sha256(part / name) for name in (PAGE, FORGET_LIST)}
    (part / REPORT).write_text(report.as_json(contents), encoding="utf-8")
    if key:
        signature.write_signature(part / REPORT, key)


def _is_free(path: Path) -> bool:
    """Return whether a path does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
