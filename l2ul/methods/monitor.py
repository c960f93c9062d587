"""A look at D_f after a step: what the curve tells, and whether the numbers are finite."""

from functools import cached_property
import itertools
import math

import torch
from torch import Tensor, nn

from l2ul.common.modes import eval_mode
from l2ul.methods.registry import Terms
from l2ul.objective import Forget


class Look:
    """A look at D_f after each step, in eval mode: `logits` (k, C) of the last one, or from before the first."""

    def __init__(self, model: nn.Module, forget: Forget):
        self.model, self.forget = model, forget

    @cached_property
    def logits(self) -> Tensor:
        return self._see()

    def __call__(self, step: int, terms: Terms) -> tuple[dict[str, float], bool]:
        """A row of the curve, and whether all is finite: terms, weights, and logits of D_f.

        Of D_f, the percent that is called its true class and that is forgotten; nan where its logits are not finite.
        All of it is brought from the device at once.
        """
        self.logits = self._see()
        called = self.logits.argmax(1)
        told = [(called == self.forget.labels).sum(), self.forget.done(called).sum()]
        told += [self.logits.isfinite().all(), _finite_weights(self.model)]
        *found, still, gone, finite_logits, finite_weights = torch.stack(
            [term.detach().float().reshape(()) for term in (*terms.values(), *told)]
        ).tolist()
        shares = [100 * count / len(self.forget) if finite_logits else math.nan for count in (still, gone)]
        row = dict(zip(("step", *terms, "acc_forget", "forgotten"), (step, *found, *shares), strict=True))
        return row, bool(finite_weights) and math.isfinite(sum(row.values()))

    @torch.no_grad()
    def _see(self) -> Tensor:
        with eval_mode(self.model):  # folding anew at each step would take what it saves
            return torch.cat([self.model(part) for part in self.forget.images.split(512)])


@torch.no_grad()
def _finite_weights(model: nn.Module) -> Tensor:
    tensors = [t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).isfinite().all()
