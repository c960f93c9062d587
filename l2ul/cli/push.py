"""The flags --push and --push-public: upload an unlearned model to the Hugging Face Hub."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
import shlex
import tempfile
from typing import TYPE_CHECKING

from l2ul.cli import exit_codes
from l2ul.cli.parser import Group
from l2ul.common.errors import InputError
from l2ul.common.installation import command

if TYPE_CHECKING:
    from torch import dtype

    from l2ul.models.classifier import Classifier
    from l2ul.models.hub import Repository


def add_push(group: Group, when: str) -> None:
    """Add the flags. `when` is the condition for --push, in words."""
    text = (
        f"upload the unlearned model, its configuration and its model card to this repository on the Hugging Face Hub, "
        f"{when}; a new repository is private. Never uploaded: images, lists of them, reports and records"
    )
    group.add_argument("--push", metavar="NAME", help=text)
    text = "allow a public repository for --push; a new one is created as public"
    group.add_argument("--push-public", action="store_true", help=text)


def open_repository(options: argparse.Namespace) -> "Repository | None":
    """Check the name of --push and the login before any long work; return the repository, None without --push.

    Raises InputError if the model cannot be uploaded there.
    """
    if options.push is None:
        if options.push_public:
            raise InputError("--push-public is for --push", "leave it out", "name a repository with --push NAME")
        return None
    from l2ul.models import hub  # imports torch

    return hub.open_repository(options.push, options.push_public)


def command_line(program: str, words: Sequence[str]) -> str:
    """Return the command line of a script with these arguments, for messages."""
    return shlex.join([*command(program), *words])


def push(
    program: str,
    model: Path,
    classifier: "Classifier",
    card: str,
    repository: "Repository",
    again: str,
    dtypes: "Mapping[str, dtype] | None" = None,
) -> None:
    """Upload a model and print its address. Exit with 1 if that fails, and print the command that tries again.

    program             name of the script, which begins the messages
    model               the file or folder that the classifier was opened from
    card                text of the model card
    again               command line that uploads the model again
    classifier, dtypes  as for `hub.write_files`
    """
    from l2ul.models import hub

    here = f"the model is in {model}; upload it again with: {again}"
    try:
        with (
            exit_codes.clean_exit(program, here, shared=True, less_memory="free some memory"),
            tempfile.TemporaryDirectory() as folder,
        ):
            files = hub.write_files(Path(folder), classifier, card, model.is_dir(), dtypes)
            address = hub.upload(files, repository)
    except hub.UploadFailed as error:
        raise SystemExit(f"{program}: the upload to {repository.name} failed ({error}); {here}") from None
    print(f"uploaded {', '.join(files)} to {address}", flush=True)
    others = sorted(set(repository.files or ()) - {*files, ".gitattributes"})
    if others:
        print(f"{repository.name} also has {', '.join(others)}, which this command did not write", flush=True)
    if repository.files is not None:
        print(f"earlier commits of {repository.name} keep the files that were there before", flush=True)
