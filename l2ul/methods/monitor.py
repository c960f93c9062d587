"""The forget-set monitor: predictions on D_f after a step, as a row of the curve."""

from functools import cached_property
import itertools
import math

import torch
from torch import Tensor, nn

from l2ul.common.modes import eval_mode
from l2ul.objective import Forget, Terms

BATCH_SIZE = 512  # images of D_f per forward pass


class ForgetMonitor:
    """Measure a model on D_f in eval mode while it is being unlearned.

    `logits` (k, C) are those of the last measurement, or of the model before the first step.
    """

    def __init__(self, model: nn.Module, forget: Forget):
        self.model, self.forget = model, forget

    @cached_property
    def logits(self) -> Tensor:
        return self._predict()

    @property
    def is_forgotten(self) -> Tensor:
        """Which images (k,) bool were forgotten at the last measurement."""
        return self.forget.is_forgotten(self.logits.argmax(1))

    def measure(self, step: int, terms: Terms) -> tuple[dict[str, float], bool]:
        """Measure D_f after a step; return a row of the curve and whether all numbers are finite.

        The row holds `step`, the terms of the loss, `acc_forget` (percent of D_f predicted as the true class) and
        `forgotten` (percent of D_f that is forgotten). Both percentages are nan if the logits of D_f are not finite.
        Checked are the row, the weights and the buffers. All numbers move from the device in one transfer.
        """
        self.logits = self._predict()
        correct = (self.logits.argmax(1) == self.forget.labels).sum()
        measured = [correct, self.is_forgotten.sum(), self.logits.isfinite().all(), _all_finite(self.model)]
        *values, num_correct, num_forgotten, finite_logits, finite_model = torch.stack(
            [value.detach().float().reshape(()) for value in (*terms.values(), *measured)]
        ).tolist()
        counts = {"acc_forget": num_correct, "forgotten": num_forgotten}
        percent = {
            name: 100 * count / len(self.forget) if finite_logits else math.nan for name, count in counts.items()
        }
        row = {"step": step, **dict(zip(terms, values, strict=True)), **percent}
        return row, bool(finite_model) and math.isfinite(sum(row.values()))

    @torch.no_grad()
    def _predict(self) -> Tensor:
        with eval_mode(self.model):  # batch-norms stay unfolded: folding at each step costs more than it saves
            return torch.cat([self.model(part) for part in self.forget.images.split(BATCH_SIZE)])


@torch.no_grad()
def _all_finite(model: nn.Module) -> Tensor:
    tensors = [t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).isfinite().all()
