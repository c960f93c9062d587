"""Nets of the classifier's kind that never saw D_f, which an unlearned net is measured against."""

from dataclasses import dataclass
import hashlib

import torch
from torch import Tensor, nn

from l2ul.common.errors import InputError
from l2ul.experiments.runs import Run


@dataclass(frozen=True, eq=False)
class Peer:
    """Such a net, where its weights (of that hash) were read from, and what it was trained without.

    excluded  indices (n,) in the training set; None where the file does not tell
    """

    model: nn.Module
    sha256: str
    source: str
    excluded: Tensor | None = None


@dataclass(frozen=True)
class Peers:
    """The net that was retrained without D_f, and those that an attack is calibrated with; none of them by default."""

    retrained: Peer | None = None
    references: tuple[Peer, ...] = ()

    @property
    def described(self) -> dict[str, str]:
        """Keys of a record: the hash of the retrained net's file, and one of all references' hashes, in any order."""
        found = {"retrained_sha256": self.retrained.sha256} if self.retrained else {}
        if self.references:
            hashes = "\n".join(sorted(peer.sha256 for peer in self.references))
            found["references_sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
        return found

    def check(self, classifier: nn.Module, runs: list[Run]) -> None:
        """Raise InputError where a net is the classifier itself, is damaged, or is told to have seen some of a D_f."""
        named = [("--retrained", self.retrained)] if self.retrained else []
        for flag, peer in (*named, *(("--references", peer) for peer in self.references)):
            what = f"{flag} {peer.source}"
            if peer.sha256 == classifier.sha256:
                raise InputError(f"{what} is the classifier itself, which saw D_f; name a net trained without it")
            if not all(value.isfinite().all() for value in peer.model.state_dict().values()):
                raise InputError(f"{what} has weights that are not finite; train it again")
            for run in runs if peer.excluded is not None else ():
                _check_unseen(what, peer.excluded, run)


def gone(run: Run) -> Tensor:
    """Indices in the training set of what this and earlier steps forget, which D_r is without."""
    return torch.cat([part.indices for part in (run.forget, run.earlier) if part is not None])


def _check_unseen(what: str, excluded: Tensor, run: Run) -> None:
    forgotten = gone(run)
    seen = forgotten[~torch.isin(forgotten, excluded)]
    if len(seen):
        raise InputError(
            f"{what} was trained on {len(seen)} of the {len(forgotten)} images of D_f (k {run.k}, seed {run.seed}), "
            f"such as image {seen[0]}; name a net trained with --exclude of all of them"
        )
