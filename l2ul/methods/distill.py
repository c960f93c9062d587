"""`distill`: forget D_f by a margin and keep the outputs and features of the original model on stand-ins for D_r.

Our method; it needs no images but D_f. With θ the weights, θ⁰ the original weights, z logits, f features,
p = softmax(z) and x̃ stand-ins for D_r, a step minimises

    L(θ) = w · s · mean_{x ∈ B} max(0, z_y(x) - max_{c≠y} z_c(x) + m)           "forget": margin loss on D_f
           + a · mean_x̃ KL(p⁰(x̃) ‖ p(x̃))                                        "logits"
           + b · mean_l mean_x̃ (f_l(x̃) - f⁰_l(x̃))² / Var(f⁰_l)                  "features"

- B holds at most `distill_forget` images, drawn from the images R that are not yet forgotten by the margin m
  (`distill_margin`). The sign of the difference of logits is reversed to relabel, with y the new class.
- s = min(1, |R| / distill_forget): a single remaining image weighs no more alone than in a full batch.
- w starts at 1 and is multiplied by `distill_growth` ^ (1 / steps of a cycle) at each step before which an image is
  not forgotten, as in a penalty method. No fixed weight suits every model, as scales of logits differ.
- The x̃ are `distill_mixes` images of the kinds in `distill_stand_ins`, in equal parts (see `l2ul.methods.stand_ins`):
  by default blends of two and of three images of D_f, images with a patch of another or with the amplitudes of
  another, in other hues, and enlarged parts. Varied images close to the classes of the model keep it in place on all
  others: with blends of two images alone, a ResNet-18 lost five times as much (docs/trials.md). With a surrogate set,
  the part `distill_surrogate` of the x̃ are its images. With `distill_ascent` = r > 0, each x̃ is first moved by r along
  the gradient of KL(p⁰(x̃) ‖ p(x̃)), to where θ and θ⁰ differ more.
- a = `distill_logits`, b = `distill_features`. The features f_l are the inputs of every convolution and linear layer
  but the first, and the last feature map before pooling. Var(f⁰_l) is taken over D_f.
- The part `distill_frozen` of these layers, from the input, keeps its weights, as do the batch-norms between them. A
  step then needs no backward pass through them, and f_l are the features behind them.
- The model is in eval mode, so running statistics of batch-norm stay and dropout is off.

Adam follows a learning rate that rises to `distill_lr` and falls to nearly 0 in each cycle. A cycle has 120 steps, plus
0.75 for each image of D_f, plus `distill_further_steps` for each after the 64th, or `distill_steps`: the more images,
the more steps to forget them gently.
The loop stops at the end of a cycle if all of D_f is forgotten, and gives up after `distill_cycles` cycles.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from l2ul import attack, objective
from l2ul.common import activations, seeds
from l2ul.common.bn_folding import fold
from l2ul.common.errors import InputError
from l2ul.common.fused_optimizers import fused
from l2ul.common.modes import frozen_copy, in_eval_mode, trainable
from l2ul.common.nested import Nested, upload_together
from l2ul.methods.monitor import ForgetMonitor
from l2ul.methods.procedure import Procedure
from l2ul.methods.registry import BUILT_IN, Method, Step, Terms
from l2ul.methods.settings import SMALL_SET, Settings, override
from l2ul.methods.stand_ins import StandIns, Synthesis
from l2ul.objective import Batch, Forget

LONGEST = 10**15  # steps of a cycle; products of settings can be infinite
VARIANCE_IMAGES = 256  # images of D_f, at most, that variances of features are computed on


def distill(step: Step) -> Terms:
    """Minimise a margin loss on D_f + distillation of θ⁰ on images made of D_f (ours)."""
    logits_gap, features_gap = step.teacher_gaps()
    terms = {"forget": logits_gap.new_zeros(()), "logits": logits_gap, "features": features_gap}
    if len(step.forget.labels):
        logits = step.model(step.forget.images)
        losses = objective.margin_loss(logits, step.forget.labels, step.goal, step.margin)
        terms["forget"] = step.forget_weight * losses.mean()
    return terms


class DistillProcedure(Procedure):
    """The steps, optimizer and schedule of `distill`, and of other methods that need a teacher.

    model     θ⁰; moved in place
    settings  values of all settings
    monitor   gives the logits of D_f after the previous step
    synthesis makes the images that are synthesised
    surrogate (n, 3, H, W) uint8 or float in [0,1], unlabelled images that stand for D_r; None: there are none
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        forget: Forget,
        settings: Settings,
        monitor: ForgetMonitor,
        synthesis: Synthesis,
        surrogate: Tensor | None = None,
    ):
        settings = self.adapted(settings, model, surrogate)
        self.method, self.model, self.forget, self.settings = method, in_eval_mode(model), forget, settings
        self.own_values, self.monitor = override(method.settings, settings.method_settings), monitor
        self.teacher = Teacher(model, forget.images, settings.distill_frozen)
        frozen = self.teacher.frozen_parameters(model, forget.images)
        for parameter in frozen:
            parameter.requires_grad_(False)
        if frozen and not trainable(model):
            raise InputError(
                f"with distill_frozen {settings.distill_frozen:g} no weight of the model changes, as its other "
                f"weights do not require a gradient",
                "use a smaller distill_frozen",
            )
        self.generator = seeds.generator(settings.seed, "distill", settings.first_position)
        self.stand_ins = StandIns(self.model, self.sources(synthesis), settings, synthesis, surrogate)
        self.batch_size = max(settings.distill_mixes, settings.distill_forget)
        self.weight = 1.0  # w of the module's docstring
        length = cycle_length(settings, len(forget))
        self.growth = settings.distill_growth ** (1 / length)
        self.optimizer = fused(torch.optim.Adam, trainable(model), lr=settings.distill_lr)
        self.scheduler = LambdaLR(self.optimizer, lambda step: one_cycle(step, length))
        self.max_steps = settings.distill_cycles * length
        self.stop_every = length
        self.separate = frozenset({"forget"} if method in BUILT_IN else ())
        self.has_draws = method in BUILT_IN

    def adapted(self, settings: Settings, model: nn.Module, surrogate: Tensor | None) -> Settings:
        """Return the settings with the values that the steps use."""
        return settings

    def sources(self, synthesis: Synthesis) -> Tensor:
        """Return the images (n, 3, H, W) of which stand-ins are made."""
        return self.forget.images

    def __next__(self) -> Terms:
        return self.method.terms(self.next_step())

    def next_step(self) -> Step:
        """Draw the images of D_f and the stand-ins of the next step."""
        return self._step(*self.draw())

    def terms(self, *inputs: Nested) -> Terms:
        """Return the terms of the loss of a step."""
        return self.method.terms(self._step(*inputs))

    def draw(self) -> tuple[Nested, ...]:
        """Return the numbers of the next step on the CPU.

        They are the indices of its images of D_f, the weight of the forget loss, and the random numbers of stand-ins.
        """
        forget, settings = self.forget, self.settings
        measured, logits = self.monitor.forget, self.monitor.logits  # on the CPU
        if not measured.is_forgotten(logits.argmax(1)).all():
            self.weight *= self.growth
        losses = objective.margin_loss(logits, measured.target_labels, forget.goal, settings.distill_margin)
        remaining = losses.nonzero().flatten()
        drawn = torch.randperm(len(remaining), generator=self.generator)[: settings.distill_forget]
        weight = self.weight * min(1.0, len(remaining) / settings.distill_forget)
        chosen, size = remaining[drawn], min(settings.distill_forget, len(forget))
        if self.pads:  # with images beyond the margin, whose loss is 0, so that only the mean has to be corrected
            chosen = torch.cat([chosen, (losses == 0).nonzero().flatten()[: size - len(drawn)]])
            weight *= size / max(1, len(drawn))
        return chosen, torch.tensor(weight), self.stand_ins.draw(self.generator)

    def _step(self, *inputs: Nested) -> Step:
        """Return a step on what `draw` returned."""
        forget = self.forget
        chosen, weight, numbers = upload_together(inputs, forget.labels.device)
        batch = Batch(forget.images[chosen], forget.target_labels[chosen])
        return self._step_on(batch, self.stand_ins.make(numbers), weight)

    def _step_on(self, forget: Batch, stand_ins: Tensor, weight: Tensor) -> Step:
        return Step(
            self.in_parts(),
            self.forget.goal,
            forget,
            teacher_gaps=lambda: self._weighted_gaps(stand_ins),
            margin=self.settings.distill_margin,
            settings=self.own_values,
            forget_weight=weight,
        )

    def _weighted_gaps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        settings, parts = self.settings, images.split(self.part_size or len(images))
        if settings.distill_ascent:
            parts = [self.teacher.farther(self.model, part, settings.distill_ascent) for part in parts]
        if len(parts) == 1:
            logits_gap, features_gap = self.teacher.gaps(self.model, *parts)
        else:
            logits_gap = features_gap = 0.0
            for part in parts:
                of_logits, of_features = checkpoint(self.teacher.gaps, self.model, part, use_reentrant=False)
                share = len(part) / len(images)
                logits_gap, features_gap = logits_gap + share * of_logits, features_gap + share * of_features
        return settings.distill_logits * logits_gap, settings.distill_features * features_gap

    def state_dict(self) -> dict[str, object]:
        """Return the weight of the forget loss and the state of the generator."""
        return {"weight": self.weight, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue with this weight and generator."""
        self.weight = state["weight"]
        self.generator.set_state(state["generator"].cpu())


class Teacher:
    """The frozen original model, with the logits and features that `distill` keeps.

    model   in eval mode; copied
    images  (k, 3, H, W) float in [0,1], D_f: the variances of features are computed on them
    frozen  share of the convolutions and linear layers that do not change, from the input, rounded down to a whole
            number of layers; the last two always change

    Features are the inputs of each of these layers after the first one that changes, and the last feature map before
    pooling. A layer whose features are constant on D_f has an infinite variance, so that its gap is 0.
    """

    def __init__(self, model: nn.Module, images: Tensor, frozen: float = 0.0):
        self.model = frozen_copy(model)
        layers = list(activations.layers(self.model, images[:1]))
        first = max(0, min(int(frozen * len(layers)), len(layers) - 2))
        self.first_changed, self.layers = layers[first] if first else None, layers[first + 1 :]
        self.last = activations.last_spatial_module(self.model, images[:1])
        fold(self.model, images[:1])  # leaves the inputs of convolutions and linear layers as they are
        _, features = self.outputs(images[:VARIANCE_IMAGES])
        variances = [layer.float().var(correction=0) for layer in features]  # none in a model of a single layer
        self.variances = [variance or math.inf for variance in torch.stack(variances).tolist()] if variances else []

    def frozen_parameters(self, model: nn.Module, images: Tensor) -> list[nn.Parameter]:
        """Return the parameters of a model of this architecture that do not change; `images` as in the constructor."""
        return activations.parameters_before(model, self.first_changed, images) if self.first_changed else []

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits (n, C) and the features of each layer of the original model."""
        return activations.logits_and_inputs(self.model, images, self.layers, self.last)

    def gaps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the KL divergence of logits and the feature gap between a model and the original, two scalars."""
        original_logits, original_features = self.outputs(images)
        logits, features = activations.logits_and_inputs(model, images, self.layers, self.last)
        gap = objective.feature_gap(features, original_features, self.variances) if features else logits.new_zeros(())
        return objective.kl_divergence(logits, original_logits), gap

    def farther(self, model: nn.Module, images: Tensor, length: float) -> Tensor:
        """Move images by a step up the gradient of KL(p⁰ ‖ p), whose L2 norm is `length`."""
        start = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective.kl_divergence(model(start), self.model(start)), start)
        return attack.l2_step(images, gradient, length)


def cycle_length(settings: Settings, k: int) -> int:
    """Return the steps of a cycle for k images."""
    further = settings.distill_further_steps * max(0, k - SMALL_SET)
    usual = settings.robust_cycle * max(300, 7 * k) if settings.robust else 120 + 0.75 * k + further
    usual = min(usual, LONGEST)
    more = min(settings.distill_image_steps * k, LONGEST)
    return max(1, (settings.distill_steps or round(usual)) + round(more))


def one_cycle(step: int, length: int) -> float:
    """Return the part of the highest learning rate at a step: up in 30 % of each cycle, then down, by cosines.

    step    from 0; cycles repeat
    length  of a cycle, in steps
    """
    place, rise = (step % length + 0.5) / length, 0.3
    return 0.5 - 0.5 * math.cos(math.pi * (place / rise if place < rise else (1 - place) / (1 - rise)))
