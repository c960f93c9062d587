"""`distill` with `robust=1`: forget D_f as it is used, in random changed copies of each image.

The loss is that of `l2ul.methods.distill` with another B, w and s, and one more term:

- A pool of `robust_pool` images is drawn at each step: copies of D_f with random changes (`l2ul.data.changes`), and one
  in STORED without. B is the `distill_forget` images of the pool with the largest margin loss: the worst copies. Images
  that are forgotten by the margin have no loss. s is 1.
- Half of B is moved by a step of length `robust_adversarial` toward its own label, as copies of unknown kinds.
- The margin grows from `distill_margin` to `robust_margin` in the first half of a cycle.
- w · `robust_int4` · |B'| / |B| times the mean margin loss on B' is added: `distill_forget` / QUANTISED images of D_f
  as stored, with weights that are quantised to BITS bits, and gradients as if they were not.
- w grows at each step at which more than `robust_tolerance` of the pool is not forgotten.
- w · `robust_targets` · KL(q ‖ p) on B is added, with q = p⁰ without the label: the class that p⁰ finds likely next
  takes its place. It is left out to relabel.
- The stand-ins are made of `robust_images` images in place of D_f, which are synthesised with the weight
  `robust_classes` of the classes: these images (`copies`) and the kinds in `distill_stand_ins`. Blends of D_f are too
  similar to the copies that have to be forgotten, so that what is kept and what is forgotten would conflict. With
  robust_images=0, and for a model without batch-norm, they are the kinds that are made of D_f but NEAR, which are whole
  images of D_f. A surrogate set stands in as without robust=1.
- a and b are `robust_keep` times as large, and w grows GROWTH times as much over a cycle, unless stand-ins are made of
  D_f.
- The share `robust_mixes` of the stand-ins is changed like the copies, so that the model learns the images and not the
  changes.

A cycle has `robust_cycle` · max(300, 7 k) steps for k images, and a step has MORE_STAND_INS times as many stand-ins.
The loop stops at the end of a cycle if at least REQUIRED of the images are forgotten in at least REQUIRED of CHECKED
other copies, and gives up after `distill_cycles` cycles.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import attack, objective
from l2ul.common import seeds
from l2ul.common.device import upload
from l2ul.common.modes import batch_norms
from l2ul.common.nested import Nested, upload_together
from l2ul.common.precision import quantised
from l2ul.data.changes import TESTED, Changes
from l2ul.methods.distill import DistillProcedure
from l2ul.methods.registry import Step, Terms
from l2ul.methods.settings import Settings
from l2ul.methods.stand_ins import Synthesis
from l2ul.objective import Batch

STRENGTH = 1.2  # of the changes in training, relative to those in use
STORED = 8
QUANTISED, BITS = 4, 4
REQUIRED, CHECKED = 0.95, 32
CHUNK = 512  # copies that are checked at once
MORE_STAND_INS = 2
NEAR = ("copies", "recoloured")
GROWTH = 3
ITERATIONS = 100  # of the synthesis


def synthesised_images(settings: Settings, model: nn.Module, surrogate: Tensor | None) -> int:
    """Return the number of images that are synthesised for a run.

    It is `robust_images`, or 0 for a model without batch-norm and where a surrogate set stands in alone.
    """
    return settings.robust_images if batch_norms(model) and not _alone(settings, surrogate) else 0


def _alone(settings: Settings, surrogate: Tensor | None) -> bool:
    """Return whether all stand-ins are surrogate images."""
    return surrogate is not None and settings.distill_surrogate == 1


class Numbers(NamedTuple):
    """The random numbers of a step, and what changes from step to step.

    pool              indices in D_f of the images of the pool; the first `stored` stay as they are
    changes           numbers of the changes of the others
    stand_ins         numbers of the stand-ins
    order             of the stand-ins, of which the first `changed` are changed; empty if none is
    stand_in_changes  numbers of these changes
    weight            w before the step
    margin            of the step
    quantised         indices in D_f of B'; empty without it

    All are on the CPU but the noise of changes and the weight.
    """

    pool: Tensor
    changes: Nested
    stand_ins: Nested
    order: Nested
    stand_in_changes: Nested
    weight: Tensor
    margin: Tensor
    quantised: Nested


class RobustProcedure(DistillProcedure):
    """The steps of `distill`, or of another method that needs a teacher, on changed copies of D_f."""

    steps = 0  # taken so far
    changes = Changes(strength=STRENGTH)

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.weight = torch.tensor(self.weight, device=self.forget.images.device)  # set in place, as graphs replay it
        self.batch_size = max(self.batch_size, self.settings.robust_pool)

    @property
    def stored(self) -> int:
        """Images of the pool without changes."""
        return max(1, self.settings.robust_pool // STORED)

    @property
    def changed(self) -> int:
        """Stand-ins with changes."""
        return round(self.settings.robust_mixes * self.settings.distill_mixes)

    @property
    def quantised(self) -> int:
        """Images of B'."""
        return max(1, self.settings.distill_forget // QUANTISED) if self.settings.robust_int4 else 0

    def adapted(self, settings: Settings, model: nn.Module, surrogate: Tensor | None) -> Settings:
        """Return the settings with the values that the steps use: `robust_images` is 0 if none are synthesised."""
        kinds = [kind for kind in settings.distill_stand_ins.split("+") if kind != "synthesised"]
        images = synthesised_images(settings, model, surrogate)
        kinds = ["copies", *kinds] if images else [kind for kind in kinds if kind not in NEAR] or ["mixes"]
        keep, growth = (settings.robust_keep, GROWTH) if images or _alone(settings, surrogate) else (1, 1)
        return replace(
            settings,
            distill_stand_ins="+".join(dict.fromkeys(kinds)),
            distill_mixes=MORE_STAND_INS * settings.distill_mixes,
            distill_logits=keep * settings.distill_logits,
            distill_features=keep * settings.distill_features,
            distill_growth=growth * settings.distill_growth,
            robust_images=images,
        )

    def sources(self, synthesis: Synthesis) -> Tensor:
        """Return the synthesised images, or D_f if none are synthesised."""
        settings, images = self.settings, self.forget.images
        if not (count := settings.robust_images):
            return images
        return synthesis.images(self.model, images, settings, count, ITERATIONS, settings.robust_classes)

    def draw(self) -> Numbers:
        """Return the numbers of the next step."""
        settings, generator, images = self.settings, self.generator, self.forget.images
        place = self.steps % self.stop_every / self.stop_every
        margin = settings.distill_margin + min(1.0, 2 * place) * (settings.robust_margin - settings.distill_margin)
        self.steps += 1

        def changes(count: int) -> Nested:
            return self.changes.draw(torch.Size([count, *images.shape[1:]]), generator, images.device)

        size, count = settings.robust_pool, settings.distill_mixes
        passes = -(-size // len(images))
        pool = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)])[:size]
        return Numbers(  # drawn in this order
            pool=pool,
            changes=changes(size - self.stored),
            stand_ins=self.stand_ins.draw(generator),
            order=torch.randperm(count, generator=generator) if self.changed else [],
            stand_in_changes=changes(self.changed) if self.changed else [],
            weight=self.weight.clone(),
            margin=torch.tensor(margin),
            quantised=torch.randperm(len(images), generator=generator)[: self.quantised] if self.quantised else [],
        )

    def _step(self, *inputs: Nested) -> Step:
        """Return a step on what `draw` returned, and set the weight."""
        settings, goal, device = self.settings, self.forget.goal, self.forget.images.device
        numbers = Numbers(*upload_together(inputs, device))
        images, labels = self.forget.images[numbers.pool], self.forget.target_labels[numbers.pool]
        images = torch.cat([images[: self.stored], self.changes.make(images[self.stored :], numbers.changes)])
        with torch.no_grad():
            logits = self.in_parts()(images)
        losses = objective.margin_loss(logits, labels, goal, numbers.margin)
        recognised = ~objective.is_forgotten(logits.argmax(1), labels, goal)
        grows = recognised.float().mean() > settings.robust_tolerance
        self.weight.copy_(torch.where(grows, self.growth * numbers.weight, numbers.weight))
        worst = losses.topk(min(settings.distill_forget, len(losses))).indices
        images, labels = images[worst], labels[worst]
        if settings.robust_adversarial:
            half = len(labels) // 2
            images = torch.cat([images[:half], self._toward_label(images[half:], labels[half:])])
        others = self.stand_ins.make(numbers.stand_ins)
        if self.changed:
            others = others[numbers.order]
            changed = self.changes.make(others[: self.changed], numbers.stand_in_changes)
            others = torch.cat([changed, others[self.changed :]])
        return replace(self._step_on(Batch(images, labels), others, self.weight.clone()), margin=numbers.margin)

    def terms(self, *inputs: Nested) -> Terms:
        """Return the terms of the loss of a step."""
        step, settings = self._step(*inputs), self.settings
        has_targets = settings.robust_targets and step.goal == "misclassify"
        terms = self._with_targets(step) if has_targets else self.method.terms(step)
        if self.quantised:
            chosen = upload(Numbers(*inputs).quantised, self.forget.images.device)
            logits = self.in_parts(_Quantised(self.model))(self.forget.images[chosen])
            losses = objective.margin_loss(logits, self.forget.target_labels[chosen], step.goal, step.margin)
            weight = settings.robust_int4 / len(step.forget.labels)
            terms["forget"] = terms["forget"] + weight * step.forget_weight * losses.sum()
        return terms

    def _with_targets(self, step: Step) -> Terms:
        images, labels = step.forget.images, step.forget.labels
        logits = step.model(images)
        with torch.no_grad():
            targets = self.teacher.model(images).scatter(1, labels[:, None], -30.0).log_softmax(1)
        divergence = F.kl_div(logits.log_softmax(1), targets, log_target=True, reduction="batchmean")
        losses = objective.margin_loss(logits, labels, step.goal, step.margin)
        logits_gap, features_gap = step.teacher_gaps()
        forget = step.forget_weight * (losses.mean() + self.settings.robust_targets * divergence)
        return {"forget": forget, "logits": logits_gap, "features": features_gap}

    def _toward_label(self, images: Tensor, labels: Tensor) -> Tensor:
        """Move images by a step up the gradient of the margin loss, whose L2 norm is `robust_adversarial`."""
        start = images.detach().requires_grad_()
        losses = objective.margin_loss(self.in_parts()(start), labels, self.forget.goal, 100.0)  # above 0 for all
        (gradient,) = torch.autograd.grad(losses.sum(), start)
        length = self.settings.robust_adversarial * images.shape[-1] / 32  # so that the change of a pixel is the same
        return attack.l2_step(images, gradient, length)

    @torch.no_grad()
    def may_stop(self) -> bool:
        """Return whether D_f is forgotten in copies that are drawn for this check."""
        generator = seeds.generator(self.settings.seed, "robust check", self.settings.first_position, self.steps)
        order = torch.arange(len(self.forget)).repeat(CHECKED)
        changes, forgotten = Changes(TESTED), []
        for part in order.split(CHUNK):
            part = upload(part, self.forget.images.device)
            predictions = self.model(changes(self.forget.images[part], generator)).argmax(1)
            labels = self.forget.target_labels[part]
            forgotten.append(objective.is_forgotten(predictions, labels, self.forget.goal))
        share = torch.cat(forgotten).view(CHECKED, -1).float().mean(0)
        return float((share >= REQUIRED).float().mean()) >= REQUIRED

    def state_dict(self) -> dict[str, object]:
        """Return the state of `distill` and the number of steps taken."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue after this number of steps."""
        weight = self.weight
        super().load_state_dict(state)
        self.weight = weight.copy_(state["weight"])
        self.steps = state["steps"]


class _Quantised(nn.Module):
    """A model with weights of BITS bits, which passes their gradients to the weights before rounding.

    This is the straight-through estimator of Bengio et al. (2013, arXiv 1308.3432).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        weights = {
            name: weight + (quantised(weight, BITS) - weight).detach() for name, weight in self.model.named_parameters()
        }
        return torch.func.functional_call(self.model, weights, (images,))
