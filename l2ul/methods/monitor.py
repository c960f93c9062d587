"""The forget-set monitor: predictions on D_f after a step, as a row of the curve."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
import itertools
import math

import torch
from torch import Tensor, nn

from l2ul.common.memory import smaller_batch
from l2ul.common.modes import eval_mode
from l2ul.common.precision import exactly
from l2ul.data.images import LARGE
from l2ul.objective import Forget, Terms

BATCH_SIZE, LARGE_BATCH = 512, 64  # images of D_f per forward pass, small and large ones, if memory is sufficient


class ForgetMonitor:
    """Measure a model on D_f in eval mode while it is being unlearned.

    predict  returns the predicted classes (k,) of D_f of a model, as they are measured after the loop

    `logits` (k, C) are those of the last measurement, or of the model before the first step. They and the labels of
    `forget` are on the CPU, so that what is decided by them needs no transfer of its own.
    """

    def __init__(self, model: nn.Module, forget: Forget, predict: Callable[[nn.Module], Tensor]):
        new = None if forget.new_labels is None else forget.new_labels.cpu()
        self.forget = replace(forget, labels=forget.labels.cpu(), new_labels=new)
        self.model, self.predict = model, predict
        self.batch_size = LARGE_BATCH if forget.images.shape[-1] > LARGE else BATCH_SIZE
        self.graphed: Callable[[], Tensor] | None = None  # `numbers` as a CUDA graph

    @cached_property
    def logits(self) -> Tensor:
        return self._predict().cpu()

    def measure(self, step: int, terms: Terms) -> tuple[dict[str, float], bool]:
        """Measure D_f after a step; return a row of the curve and whether all numbers are finite.

        The row holds `step`, the terms of the loss, `acc_forget` (percent of D_f predicted as the true class) and
        `forgotten` (percent of D_f that is forgotten). Both percentages are nan if the logits of D_f are not finite.
        Checked are the row, the weights and the buffers. All numbers move from the device in one transfer.
        """
        parts = [*(value.detach().reshape(1) for value in terms.values()), (self.graphed or self.numbers)()]
        numbers, count = torch.cat(parts).cpu(), len(terms) + 1
        *values, finite_model = numbers[:count].tolist()
        self.logits = numbers[count:].view(len(self.forget), -1)
        row = {"step": step, **dict(zip(terms, values, strict=True)), **self._percentages(self.logits.argmax(1))}
        if not self.logits.isfinite().all():
            row |= {"acc_forget": math.nan, "forgotten": math.nan}
        return row, bool(finite_model) and math.isfinite(sum(row.values()))

    def numbers(self) -> Tensor:
        """Return 1.0 if weights and buffers are finite, else 0.0, and then the logits of D_f."""
        return torch.cat([_all_finite(self.model).float().reshape(1), self._predict().flatten()])

    @exactly()
    def confirm(self) -> dict[str, float]:
        """Return `acc_forget` and `forgotten` as measured after the loop: in fp32, and with other rounding.

        Raises Diverged if a logit is not finite.
        """
        return self._percentages(self.predict(self.model).cpu())

    def _percentages(self, predictions: Tensor) -> dict[str, float]:
        correct, forgotten = predictions == self.forget.labels, self.forget.is_forgotten(predictions)
        counts = {"acc_forget": correct, "forgotten": forgotten}
        return {name: 100 * int(images.sum()) / len(self.forget) for name, images in counts.items()}

    @torch.no_grad()
    def _predict(self) -> Tensor:
        with eval_mode(self.model):  # batch-norms stay unfolded: folding at each step costs more than it saves
            while True:
                try:
                    return torch.cat([self.model(part) for part in self.forget.images.split(self.batch_size)])
                except (RuntimeError, MemoryError) as error:
                    self.batch_size = smaller_batch(min(self.batch_size, len(self.forget)), error)


@torch.no_grad()
def _all_finite(model: nn.Module) -> Tensor:
    tensors = [t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).isfinite().all()
