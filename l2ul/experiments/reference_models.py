"""Models that were trained without D_f, with which an unlearned model is compared."""

from dataclasses import dataclass
import hashlib

import torch
from torch import Tensor, nn

from l2ul.common.errors import InputError
from l2ul.common.files import tensors_sha256
from l2ul.experiments.runs import Run
from l2ul.metrics.registry import REFERENCES_SHA256, RETRAINED_SHA256

RELATIVE, ABSOLUTE = 2**-8, 1e-7  # differences of weights up to these may be the rounding of a file


@dataclass(frozen=True, eq=False)
class ReferenceModel:
    """A model with the architecture of the original one that was trained without D_f.

    sha256    of its weights
    source    the file that they were read from
    excluded  indices (n,) of the training images that it was trained without; None if the file does not state them
    """

    model: nn.Module
    sha256: str
    source: str
    excluded: Tensor | None = None


@dataclass(frozen=True)
class ReferenceModels:
    """The retrained model of --retrained, and the models of --references, which calibrate an attack."""

    retrained: ReferenceModel | None = None
    references: tuple[ReferenceModel, ...] = ()

    @property
    def sha256(self) -> dict[str, str]:
        """Keys of a record: the hash of the retrained model, and one hash of all others, whatever their order."""
        hashes = {RETRAINED_SHA256: self.retrained.sha256} if self.retrained else {}
        if self.references:
            text = "\n".join(sorted(reference.sha256 for reference in self.references))
            hashes[REFERENCES_SHA256] = hashlib.sha256(text.encode()).hexdigest()
        return hashes

    def check(self, original: nn.Module, runs: list[Run]) -> None:
        """Check that every model can serve as a reference for these runs.

        Raises InputError if one has the weights of the original model or of another reference, weights that are not
        finite, or was trained on an image that a run forgets.
        """
        named = [("--retrained", self.retrained)] if self.retrained else []
        for flag, reference in (*named, *(("--references", reference) for reference in self.references)):
            name = f"{flag} {reference.source}"
            if _have_equal_weights(reference.model, original):
                raise InputError(
                    f"{name} is the original model, which was trained on D_f", "name one trained without it"
                )
            if not all(value.isfinite().all() for value in reference.model.state_dict().values()):
                raise InputError(f"{name} has weights that are not finite", "train it again")
            for run in runs if reference.excluded is not None else ():
                _check_excluded(name, reference.excluded, run)
        sources: dict[str, str] = {}
        for reference in self.references:
            digest = tensors_sha256(dict(reference.model.named_parameters()))
            if digest in sources:
                raise InputError(
                    f"--references {reference.source} has the same weights as {sources[digest]}", "name each model once"
                )
            sources[digest] = reference.source


def _have_equal_weights(first: nn.Module, second: nn.Module) -> bool:
    """Return whether the parameters of two models are equal but for the rounding of a file to float16 or bfloat16."""
    ours, theirs = (dict(model.named_parameters()) for model in (first, second))
    return ours.keys() == theirs.keys() and all(
        one.shape == theirs[name].shape and bool(((one - theirs[name]).abs() <= RELATIVE * one.abs() + ABSOLUTE).all())
        for name, one in ours.items()
    )


def _check_excluded(name: str, excluded: Tensor, run: Run) -> None:
    indices = run.indices
    seen = indices[~torch.isin(indices, excluded)]
    if len(seen):
        raise InputError(
            f"{name} was trained on {len(seen)} of the {len(indices)} images of D_f (k {run.k}, seed {run.seed}), "
            f"such as image {seen[0]}",
            "name a model trained with --exclude of all of them",
        )
