"""The steps of `distill`: images still to be forgotten, and mixes of D_f on which θ⁰ is the teacher."""

from collections.abc import Callable, Iterator
import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from l2ul import objective
from l2ul.common import activations, seeds
from l2ul.common.bn_folding import folded
from l2ul.common.modes import frozen_copy
from l2ul.data.mixes import mixes
from l2ul.methods import paper, registry

SPREAD_OVER = 256  # images


class Teacher:
    """θ⁰, frozen, and what of it is held: its logits, what each weighted layer but the first is given, the last map.

    model   in eval mode; copied
    images  (n, 3, H, W) float in [0,1]; how far features spread over these is what gaps to them are measured in
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.net = frozen_copy(model)
        self.layers = list(activations.layers(self.net, images[:1]))[1:]
        self.last = activations.last_spatial_module(self.net, images[:1])
        _, found = self.given(images[:SPREAD_OVER])
        self.spreads = [layer.var(correction=0).item() or math.inf for layer in found]  # constant: not held

    @torch.no_grad()
    def given(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and features of θ⁰."""
        with folded(self.net, images):  # changes the inputs of batch-norms, of no weighted layer
            return activations.logits_and_inputs(self.net, images, self.layers, self.last)

    def gaps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """How far the model's logits and features of the images are from those of θ⁰."""
        then_logits, then = self.given(images)
        now_logits, now = activations.logits_and_inputs(model, images, self.layers, self.last)
        return objective.divergence(now_logits, then_logits), objective.feature_gap(now, then, self.spreads)


def steps(
    model: nn.Module,
    forget: objective.Forget,
    logits: Callable[[], Tensor],
    *,
    batch_size: int,
    num_mixes: int,
    margin: float,
    weights: tuple[float, float],
    growth: float,
    seed: int,
    first_position: int = 0,
) -> Iterator[registry.Step]:
    """Endless steps: images of D_f that are not yet forgotten by the margin, and mixes of all of D_f.

    model    θ⁰ as yet
    logits   gives those of D_f (k, C) as they are by now
    weights  of the gaps of logits and features
    growth   what the forget loss is multiplied by, again, at each step before which some image is not forgotten

    The forget loss is the mean over a batch of the images left, times their number over `batch_size` where fewer are
    left than that: an image weighs no more alone than among many, and many weigh no more than a batch. It grows, as in
    a penalty method, because no one weight suits every net: how far apart logits are differs between them.
    """
    teacher = Teacher(model, forget.images)
    generator = seeds.generator(seed, "distill", first_position)

    def compare(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight * gap for weight, gap in zip(weights, teacher.gaps(model, images), strict=True))

    pull = 1.0
    while True:
        pull *= 1.0 if forget.done(logits().argmax(1)).all() else growth
        left = objective.margin_loss(logits(), forget.wanted, forget.goal, margin).nonzero().flatten()
        chosen = left[torch.randperm(len(left), generator=generator)[:batch_size].to(left.device)]
        stand_ins = mixes(forget.images, num_mixes, generator)
        yield registry.Step(
            model,
            forget.goal,
            paper.Batch(forget.images[chosen], forget.wanted[chosen]),
            compare=lambda images=stand_ins: compare(images),
            margin=margin,
            share=pull * min(1.0, len(left) / batch_size),
        )


def optimizer(parameters: list[Tensor], lr: float, cycle: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Adam at a rate that rises to `lr` and falls to nearly 0 in every cycle of so many steps."""
    adam = torch.optim.Adam(parameters, lr, fused=True)
    return adam, LambdaLR(adam, lambda step: one_cycle(step, cycle))


def one_cycle(step: int, length: int) -> float:
    """Part of the highest learning rate at a step: up in the first 30 % of each cycle and down again, by cosines."""
    place, rise = (step % length + 0.5) / length, 0.3
    return 0.5 - 0.5 * math.cos(math.pi * (place / rise if place < rise else (1 - place) / (1 - rise)))
