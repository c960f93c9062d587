"""`distill` with `robust=1`: forget D_f as it is used, in random changed copies of each image.

The loss is that of `l2ul.methods.distill` with another B and w:

- A pool of `robust_pool` images is drawn at each step: copies of D_f with random changes (`l2ul.data.changes`), and one
  in STORED without. B is the `distill_forget` images of the pool with the largest margin loss: the worst copies. Images
  that are forgotten by the margin have no loss.
- The margin grows from `distill_margin` to `robust_margin` in the first half of a cycle.
- w grows at each step at which more than TOLERATED of the pool is not forgotten.
- The share `robust_mixes` of the stand-ins is changed like the copies, so that the model learns the images and not the
  changes.
- `robust_adversarial`: half of B is moved by a step of this length toward its own label, as a copy of unknown kind.
- `robust_bits`, `robust_norm=1`: B passes, in turn, through the model as it is, through weights that are rounded to so
  many bits, with the gradients of the exact weights, and through the model with batch-norm statistics of B and of mixes
  of D_f, as after a recalibration.
- `robust_targets`: weight of KL(q ‖ p) on B, with q = p⁰ without the label. A class that p⁰ finds likely takes its
  place.

The loop stops at the end of a cycle if at least REQUIRED of the images are forgotten in at least REQUIRED of CHECKED
other copies, and gives up after `distill_cycles` cycles.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from l2ul import objective
from l2ul.common import seeds
from l2ul.common.device import upload
from l2ul.data.changes import TESTED, TRAINED, changed_copies
from l2ul.data.mixes import mixes
from l2ul.methods.distill import DistillProcedure
from l2ul.methods.registry import Step, Terms
from l2ul.objective import Batch

STORED = 8
TOLERATED = 0.02
REQUIRED, CHECKED = 0.95, 32
CHUNK = 512  # copies that are checked at once


class RobustProcedure(DistillProcedure):
    """The steps of `distill`, or of another method that needs a teacher, on changed copies of D_f."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self.growth_when_recognised, self.growth = self.growth, 1.0
        self.steps = 0

    def __next__(self) -> Terms:
        step = self.next_step()
        if not self.settings.robust_targets:
            return self.method.terms(step)
        logits_gap, features_gap = step.teacher_gaps()
        images, labels = step.forget.images, step.forget.labels
        logits = step.model(images)
        losses = objective.margin_loss(logits, labels, step.goal, step.margin)
        with torch.no_grad():
            targets = self.teacher.model(images).scatter(1, labels[:, None], -30.0).log_softmax(1)
        divergence = F.kl_div(logits.log_softmax(1), targets, log_target=True, reduction="batchmean")
        forget = step.forget_weight * (losses.mean() + self.settings.robust_targets * divergence)
        return {"forget": forget, "logits": logits_gap, "features": features_gap}

    def next_step(self) -> Step:
        """Draw the copies of D_f and the stand-ins of the next step."""
        step, settings, goal = super().next_step(), self.settings, self.forget.goal
        place = self.steps % self.stop_every / self.stop_every
        margin = settings.distill_margin + min(1.0, 2 * place) * (settings.robust_margin - settings.distill_margin)
        self.steps += 1
        images, labels = self._pool()
        with torch.no_grad():
            logits = self.model(images)
        losses = objective.margin_loss(logits, labels, goal, margin)
        recognised = ~objective.is_forgotten(logits.argmax(1), labels, goal)
        self.weight = self.weight * torch.where(recognised.float().mean() > TOLERATED, self.growth_when_recognised, 1.0)
        worst = losses.topk(min(settings.distill_forget, len(losses))).indices
        batch = Batch(images[worst], labels[worst])
        if settings.robust_adversarial:
            batch = replace(batch, images=self._toward_label(batch))
        forms = [lambda: self.model]  # of the model that B passes through, in turn
        if settings.robust_bits:
            forms.append(lambda: _Rounded(self.model, settings.robust_bits))
        if settings.robust_norm:
            forms.append(lambda: _WithBatchStatistics(self.model, self._companions()))
        model = forms[self.steps % len(forms)]()
        return replace(step, model=model, forget=batch, margin=margin, forget_weight=self.weight)

    def _pool(self) -> tuple[Tensor, Tensor]:
        """Draw `robust_pool` images of D_f, each as often as the others: copies, and a few as they are stored."""
        size, generator, device = self.settings.robust_pool, self.generator, self.forget.images.device
        passes = -(-size // len(self.forget))
        order = torch.cat([torch.randperm(len(self.forget), generator=generator) for _ in range(passes)])[:size]
        order = upload(order, device)
        images, stored = self.forget.images[order], max(1, size // STORED)
        copies = self._changed(images[stored:], generator)
        return torch.cat([images[:stored], copies]), self.forget.target_labels[order]

    def _changed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        settings = self.settings
        kinds = TRAINED if settings.robust_turns else TESTED
        options = {"probability": settings.robust_probability, "strength": settings.robust_strength}
        return changed_copies(images, generator, kinds, **options)

    def _companions(self) -> Tensor:
        """Draw mixes of D_f that share the statistics of batch-norm with B."""
        return mixes(self.forget.images, self.settings.distill_mixes, self.generator)

    def _toward_label(self, batch: Batch) -> Tensor:
        """Move the second half of a batch by a step up the gradient of its margin loss."""
        half = len(batch.labels) // 2
        start = batch.images[half:].detach().requires_grad_()
        losses = objective.margin_loss(self.model(start), batch.labels[half:], self.forget.goal, 100.0)
        (gradient,) = torch.autograd.grad(losses.sum(), start)
        norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        moved = (start.detach() + self.settings.robust_adversarial * gradient / norm).clamp(0, 1)
        return torch.cat([batch.images[:half], moved])

    def _weighted_gaps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        changed = round(self.settings.robust_mixes * len(images))
        if changed:
            images = torch.cat([self._changed(images[:changed], self.generator), images[changed:]])
        return super()._weighted_gaps(images)

    @torch.no_grad()
    def may_stop(self) -> bool:
        """Return whether D_f is forgotten in copies that are drawn for this check."""
        generator = seeds.generator(self.settings.seed, "robust check", self.settings.first_position, self.steps)
        order = torch.arange(len(self.forget)).repeat(CHECKED)
        forgotten = []
        for part in order.split(CHUNK):
            part = upload(part, self.forget.images.device)
            predictions = self.model(changed_copies(self.forget.images[part], generator, TESTED)).argmax(1)
            labels = self.forget.target_labels[part]
            forgotten.append(objective.is_forgotten(predictions, labels, self.forget.goal))
        share = torch.cat(forgotten).view(CHECKED, -1).float().mean(0)
        return float((share >= REQUIRED).float().mean()) >= REQUIRED

    def state_dict(self) -> dict[str, object]:
        """Return the state of `distill` and the number of steps taken."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue after this number of steps."""
        super().load_state_dict(state)
        self.steps = state["steps"]


class _WithBatchStatistics:
    """Call a model on images whose batch-norm takes the statistics of a batch of these and of other images.

    The running statistics stay as they are.
    """

    def __init__(self, model: nn.Module, others: Tensor):
        self.model, self.others = model, others
        self.norms = [one for one in model.modules() if isinstance(one, BatchNorm) and one.track_running_stats]

    def __call__(self, images: Tensor) -> Tensor:
        for norm in self.norms:
            norm.training, norm.track_running_stats = True, False
        try:
            return self.model(torch.cat([self.others, images]))[len(self.others) :]
        finally:
            for norm in self.norms:
                norm.training, norm.track_running_stats = False, True


class _Rounded:
    """Call a model with its weight matrices rounded to integers of some bits, with a scale for each row.

    Gradients are those with respect to the exact weights, as if rounding were the identity.
    """

    def __init__(self, model: nn.Module, bits: int):
        self.model, self.largest = model, 2 ** (bits - 1) - 1

    def __call__(self, images: Tensor) -> Tensor:
        weights = {name: one for name, one in self.model.named_parameters() if one.ndim > 1}
        return functional_call(self.model, {name: self._rounded(one) for name, one in weights.items()}, (images,))

    def _rounded(self, weights: Tensor) -> Tensor:
        exact = weights.detach()
        scale = exact.abs().amax(tuple(range(1, exact.ndim)), keepdim=True).clamp_min(1e-12) / self.largest
        return weights + ((exact / scale).round() * scale - exact)
