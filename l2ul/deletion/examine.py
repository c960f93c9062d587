"""What a request to forget came to: each image before and after, how lasting it is, what it cost, who can tell."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from l2ul.data.images import Split
from l2ul.deletion import report
from l2ul.deletion.request import Request
from l2ul.deletion.search import Job
from l2ul.metrics import accuracy, agreement, membership, relearn, robustness
from l2ul.objective import Forget


@dataclass(frozen=True)
class Asked:
    """What a request asks for: images (k, 3, H, W) uint8 and D_f made of them, on the device; logits (k, C) before."""

    request: Request
    images: Tensor
    forget: Forget
    before: Tensor
    then: list[int | None]  # the class that an earlier request had an image as

    @property
    def labels_from(self) -> str:
        """What tells what the images are called."""
        both = zip(self.request.items, self.then, strict=True)
        again = sum(item.label is None and label is not None for item, label in both)
        return self.request.labels_from + (f", of {again} before an earlier request" if again else "")

    def __len__(self) -> int:
        return len(self.request)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, C) on the CPU, in eval mode, as they come from the layers one by one."""
    return torch.cat(list(accuracy.logits(model, images, fold=False))).clone()  # a tensor that autograd takes too


def examine(
    job: Job, asked: Asked, after: nn.Module, references: Split | None, go_on: Callable[[], bool]
) -> dict[str, object]:
    """The parts of a report that are measured.

    job         has the model before, and the probes of damage
    after       the model as it will be written
    references  images that the model never saw, on its device
    go_on       asked before each step of fine-tuning, which may take long
    """
    now = logits(after, asked.images)
    survives = robustness.still_forgotten(after, asked.images, asked.forget)
    back, steps = relearn.steps_until_back(after, asked.images, asked.forget.labels, go_on)
    gone = job.forgotten(after).tolist()
    relearning = {"steps": steps, "back": sum(step is not None for step in back), "lr": relearn.LEARNING_RATE}
    return {
        "images": report.images(asked.request, asked.forget, asked.before, now, gone, survives, back),
        "damage": [asdict(agreement.kept(after, probe)) for probe in job.probes],
        "robustness": {change: None if found is None else int(found.sum()) for change, found in survives.items()},
        "relearning": relearning if steps or None not in back else None,
        "membership": _membership(job.model, asked, after, now, references) if references else None,
    }


def _membership(before: nn.Module, asked: Asked, after: nn.Module, now: Tensor, references: Split) -> dict[str, object]:
    """How well attacks tell D_f from the references, by the outputs of the model before and after."""
    labels, others = asked.forget.labels.cpu(), references.labels.cpu()
    return {
        "references": len(others),
        "before": membership.inference((asked.before, labels), (logits(before, references.images), others)),
        "after": membership.inference((now, labels), (logits(after, references.images), others)),
    }


def check_same(written: nn.Module, read: nn.Module, images: Tensor) -> None:
    """Raise RuntimeError unless the weights as read from the files are those that were written, and answer like them.

    Weights are compared bit by bit. Logits may differ by a hundredth of the largest: where the memory is laid out
    otherwise, a GPU may take other kernels, and with TF32 these round by a thousandth.
    """
    told, found = written.state_dict(), read.state_dict()
    wrong = [
        name for name, tensor in told.items() if name not in found or not torch.equal(tensor.cpu(), found[name].cpu())
    ]
    before, after = logits(written, images), logits(read, images)
    difference = float((before - after).abs().max() / before.abs().max().clamp_min(1e-9))
    if wrong or not difference <= 0.01:
        what = (
            f"differs in {', '.join(wrong[:3])}" if wrong else f"gives logits that differ by {100 * difference:.1f} %"
        )
        raise RuntimeError(f"the model as read from its files {what}; do not use it")
