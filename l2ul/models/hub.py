"""Write the weights, configuration and card of a model for the Hugging Face Hub, and upload them.

No file of this machine is uploaded as it is: a checkpoint, a config.json or a README.md may hold names and paths.
"""

from collections.abc import Mapping
import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from l2ul.common.errors import InputError, first_line
from l2ul.models import checkpoint, decimals, huggingface, timm_models
from l2ul.models.classifier import Classifier

CARD = "README.md"  # name of the model card on the hub
WEIGHTS = "model.safetensors"  # name on the hub of a model that is a file
LOGIN = "run `hf auth login`", "set HF_TOKEN to a token with write permission"


class UploadFailed(Exception):
    """An upload failed. Nothing on this machine has changed."""


@dataclass(frozen=True)
class Repository:
    """A repository of models on the hub that this user may write to.

    name    owner and name
    public  whether a new repository is public; an existing one is not changed
    files   names of the files in it; None if it does not exist yet
    """

    name: str
    public: bool = False
    files: tuple[str, ...] | None = None


def open_repository(name: str, public: bool = False) -> Repository:
    """Check name and login, and return the repository. Nothing is created.

    name    NAME or OWNER/NAME
    public  whether the repository may be public

    Raises InputError if the user is not logged in or may not write, the name is not valid, or the repository is public
    against `public`.
    """
    from huggingface_hub import HfApi, errors, get_token, utils

    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        raise InputError(
            f"--push {name!r} is not a name on the Hugging Face Hub",
            "expected NAME or OWNER/NAME with letters, digits, '-', '_' and '.'",
        ) from None
    if get_token() is None:
        raise InputError("--push needs a login on the Hugging Face Hub", *LOGIN)
    api = HfApi()
    try:
        user = api.whoami()
    except Exception as error:  # of huggingface_hub and of its HTTP client
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        how = "does not accept the login" if refused else "cannot be reached"
        advice = LOGIN if refused else ("leave out --push or try later",)
        raise InputError(f"the Hugging Face Hub {how} ({_described(error)})", *advice) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError("the token of the login on the Hugging Face Hub may only read", *LOGIN)
    owners = [user["name"], *(group["name"] for group in user.get("orgs", ()))]
    owner, slash, _ = name.partition("/")
    full = name if slash else f"{user['name']}/{name}"
    if slash and owner not in owners:
        raise InputError(
            f"--push {name}: {user['name']} may not write to {owner}", f"expected one of {', '.join(owners)}"
        )
    try:
        info = api.repo_info(full)
    except errors.RepositoryNotFoundError:
        return Repository(full, public)
    except Exception as error:
        raise InputError(f"the Hugging Face Hub does not show {full} ({_described(error)})", "try later") from None
    if not info.private and not public:
        raise InputError(
            f"--push {full}: this repository exists and is public", "choose another name", "add --push-public"
        )
    return Repository(full, public, tuple(file.rfilename for file in info.siblings or ()))


def write_files(
    folder: Path, classifier: Classifier, card: str, is_folder: bool, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, Path]:
    """Write what is uploaded into an empty folder; return the files by their names on the hub.

    is_folder  whether the model is a folder of another library, not a file of weights
    dtypes     of weights in the file, by name, where not float32

    The weights are those of the network, by its names. Of a configuration, what its library defines is kept.
    """
    net, dtypes = classifier.net, dtypes or {}
    mean, std = decimals(classifier.normalize.mean), decimals(classifier.normalize.std)
    if not is_folder:
        checkpoint.write(folder / WEIGHTS, net, {"mean": mean, "std": std}, dtypes)
    elif classifier.name.startswith(timm_models.PREFIX):
        timm_models.write_config(net, timm_models.source(classifier.name).folder, folder, mean, std)
        checkpoint.write(folder / WEIGHTS, net, {}, dtypes)
    else:
        net = copy.deepcopy(net).cpu().to(next(iter(dtypes.values()), torch.float32))
        huggingface.save_known(net, classifier.name, folder, mean, std)
    (folder / CARD).write_text(card, encoding="utf-8")
    return {path.name: path for path in sorted(folder.iterdir())}


def upload(files: Mapping[str, Path], repository: Repository) -> str:
    """Upload files by their names on the hub as one commit, and return the address of the repository.

    A repository that does not exist is created, private unless `repository.public`. Raises UploadFailed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository.name, private=not repository.public, exist_ok=True)
        additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(repository.name, additions, commit_message="Upload an unlearned model with L2UL")
    except Exception as error:  # of huggingface_hub, of its HTTP client and of the file system
        raise UploadFailed(_described(error)) from None
    return str(address)


def _described(error: Exception) -> str:
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line[:160]}"
