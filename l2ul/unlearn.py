"""The loop: step until every image is forgotten, the cap is reached or the numbers are no longer finite."""

from collections.abc import Callable, Iterator, Mapping
import copy
from dataclasses import dataclass, field
import itertools
import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from l2ul import attack, objective
from l2ul.common import seeds
from l2ul.data.images import Split, as_pixels
from l2ul.importance import held_weights, mas_importance
from l2ul.methods import distill, fixed_length, paper, registry
from l2ul.methods.monitor import Look


@dataclass(frozen=True)
class Settings:
    """The settings of the loop; the defaults are the paper's released run scripts'."""

    unlearn_lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 32  # images of D_f a step
    adv_batch_size: int = 256  # images of D_adv (oracle: of D_r) a step
    reg_lamb: float = 1.0  # λ
    max_passes: int = 1000  # times through D_adv (oracle: D_r; neggrad: D_f) before giving up; of rawp: draws
    noise_growth: float = 0.01  # of rawp: σ of the noise a step, in parts of a tensor's root mean square
    bn: str = "train"  # as released; or "eval": running statistics kept, dropout off
    distill_lr: float = 3e-4  # of `distill`: the highest of a cycle, of Adam
    distill_steps: int = 300  # of a cycle
    distill_cycles: int = 3  # before giving up
    distill_forget: int = 64  # images of D_f a step
    distill_mixes: int = 192  # mixes of D_f a step
    distill_logits: float = 10.0  # weight of the divergence from the logits of θ⁰
    distill_features: float = 1000.0  # weight of the gap to the features of θ⁰
    distill_growth: float = 10.0  # of the forget loss over a cycle, while an image is not forgotten
    distill_margin: float = 0.3  # by which another logit must lead before an image counts as forgotten
    course: Mapping[str, float] = field(default_factory=dict)  # of methods of fixed length, in place of their own
    seed: int = 0  # of the order of the batches, of dropout and of noise
    first_position: int = 0  # of D_f among all images of a continual run: each step draws what no other drew


@dataclass
class Outcome:
    """An unlearned model and how it came about. status: forgotten, cap, diverged, stopped, or done (`before`)."""

    model: nn.Module
    status: str
    steps: int
    curve: list[dict[str, float]] = field(default_factory=list)  # a row a step: terms, percent of D_f


def unlearn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str,
    *,
    num_classes: int | None = None,
    new_labels: Tensor | None = None,
    adv: tuple[Tensor, Tensor] | None = None,
    importance: dict[str, Tensor] | None = None,
    retain: Split | None = None,
    num_adv_images: int = 20,
    eps: float = 4.0,
    alpha: float = 0.1,
    attack_steps: int = 100,
    settings: Settings | None = None,
    workers: int = 0,
    on_step: Callable[[dict[str, float]], object] | None = None,
    go_on: Callable[[], bool] | None = None,
) -> Outcome:
    """The whole of a method on tensors: attack and importance where the method needs them, then the loop.

    model       pixels in [0,1] in, logits out; left as it is, a copy is unlearned
    images      D_f: (k, 3, H, W), uint8 or float in [0,1]; labels (k,) int64, the true classes
    method      a name of `methods.METHODS`
    new_labels  (k,) the classes to be called instead; without them, any class but the true one
    adv         D_adv, made here from num_adv_images, eps, alpha, attack_steps and the seed if needed and not given
    importance  Ω by parameter name, likewise
    retain      D_r, for the methods that need it
    num_classes needed where D_adv is made here
    workers     processes that decode images of D_r that are on disk
    on_step     called with each row of the curve
    go_on       asked after each row; the loop ends where it says no, with what there is by then

    Raises ValueError where something needed is missing, InputError where the method is not for the goal.
    """
    goal = "misclassify" if new_labels is None else "relabel"
    chosen, settings = registry.get(method, goal), settings or Settings()
    if "retain" in chosen.needs and retain is None:
        raise ValueError(f"method {method!r} trains on the remaining training set; give it as retain")
    if "adv" in chosen.needs and adv is None:
        if num_classes is None:
            raise ValueError(f"method {method!r} makes adversarial examples; give num_classes, or adv")
        size = {"num_adv_images": num_adv_images, "eps": eps, "alpha": alpha, "steps": attack_steps}
        adv = attack.adversarial_set(model, images, labels, num_classes, seed=settings.seed, **size)
    if "importance" in chosen.needs and importance is None:
        importance = mas_importance(model, images)
    unlearned = copy.deepcopy(model)
    if chosen.terms is None:
        return Outcome(unlearned, "done", 0)
    keep = Split(*adv) if "adv" in chosen.needs else retain if "retain" in chosen.needs else None
    held = held_weights(importance) if "importance" in chosen.needs else None
    forget = objective.Forget(as_pixels(images), labels, new_labels)
    look = Look(unlearned, forget)
    with seeds.fork_rng(labels.device, settings.seed, "dropout", settings.first_position):
        plan = _plan(unlearned, forget, keep, held, chosen, settings, workers, look)
        return _loop(unlearned, look, plan, on_step or (lambda row: None), go_on or (lambda: True))


def _loop(
    model: nn.Module,
    look: Look,
    plan: "_Plan",
    on_step: Callable[[dict[str, float]], object],
    go_on: Callable[[], bool],
) -> Outcome:
    outcome = Outcome(model, plan.status, 0)

    def ends(terms: registry.Terms) -> bool:
        """Add a row to the curve; whether there is nothing left to do."""
        row, finite = look(outcome.steps, terms)
        outcome.curve.append(row)
        on_step(row)
        if not finite:
            outcome.status = "diverged"
        elif plan.end_every and row["forgotten"] == 100 and not outcome.steps % plan.end_every:
            outcome.status = "forgotten"
        elif not go_on():
            outcome.status = "stopped"
        return outcome.status != plan.status

    for terms in plan.steps:
        if terms:  # else the method has moved the weights itself
            plan.optimizer.zero_grad()
            sum(terms.values()).backward()
            plan.optimizer.step()
            plan.scheduler.step()
        outcome.steps += 1
        if not outcome.steps % plan.look_every and ends(terms):
            break
    else:
        if outcome.steps % plan.look_every:
            ends(terms)
    model.eval()
    return outcome


@dataclass(frozen=True)
class _Plan:
    """How the loop goes: the terms of one step after the other, and what follows them.

    look_every  steps between two looks at D_f
    end_every   steps between two at which the loop may end, if D_f is forgotten; None: it goes to the end
    status      of the outcome at the end of all steps
    """

    steps: Iterator[registry.Terms]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    look_every: int = 1
    end_every: int | None = 1
    status: str = "cap"


def _plan(
    model: nn.Module,
    forget: objective.Forget,
    keep: Split | None,
    held: dict[str, Tensor] | None,
    method: registry.Method,
    settings: Settings,
    workers: int,
    look: Look,
) -> _Plan:
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train(settings.bn == "train" and "teacher" not in method.needs)
    if method.settings:
        own = fixed_length.overridden(method.settings, settings.course)
        given = fixed_length.Course(model, forget, own, keep, settings.seed, settings.first_position, workers)
        optimizer = fixed_length.optimizer(parameters, own)
        return _Plan(method.terms(given), optimizer, _constant(optimizer), fixed_length.LOOK_EVERY, None, "done")
    limit = max_steps(method, len(forget), len(keep) if keep else 0, settings)
    if "teacher" in method.needs:
        steps, end_every = _distilling(model, forget, look, settings), settings.distill_steps
        optimizer, scheduler = distill.optimizer(parameters, settings.distill_lr, settings.distill_steps)
    else:
        steps, end_every = _steps(model, forget, keep, held, method, settings, workers), 1
        optimizer = torch.optim.SGD(
            parameters, settings.unlearn_lr, settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        scheduler = _constant(optimizer)
    return _Plan(map(method.terms, itertools.islice(steps, limit)), optimizer, scheduler, 1, end_every)


def _constant(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return ConstantLR(optimizer, factor=1.0)


def max_steps(method: registry.Method, num_forget: int, num_keep: int, settings: Settings) -> int:
    """The cap in steps: max_passes times through the keep set, or through D_f where there is none (num_keep = 0).

    A draw of noise is looked at on the whole of D_f, so is a pass by itself.
    """
    if "noise" in method.needs:
        return settings.max_passes
    if "teacher" in method.needs:
        return settings.distill_cycles * settings.distill_steps
    size, batch = (num_keep, settings.adv_batch_size) if num_keep else (num_forget, settings.batch_size)
    return settings.max_passes * math.ceil(size / batch)


def _steps(
    model: nn.Module,
    forget: objective.Forget,
    keep: Split | None,
    held: dict[str, Tensor] | None,
    method: registry.Method,
    settings: Settings,
    workers: int,
) -> Iterator[registry.Step]:
    """Endless steps: the next batch of D_f with the next one of the set that the method keeps hold of."""
    wanted = Split(forget.images, forget.wanted)
    forget_batches = _batches(wanted, settings.batch_size, _order(settings, "forget batches"), 0)
    keep_batches = itertools.repeat(None)
    if keep:
        keep_batches = _batches(keep, settings.adv_batch_size, _order(settings, "keep batches"), workers)
    keep_name = "adv" if "adv" in method.needs else "retain"
    penalty = _penalty(model, held) if held else None
    perturb = _perturbation(model, settings) if "noise" in method.needs else None
    for first, second in zip(forget_batches, keep_batches, strict=False):
        yield registry.Step(
            model,
            forget.goal,
            first,
            **{keep_name: second},
            penalty=penalty,
            reg_lamb=settings.reg_lamb,
            perturb=perturb,
        )


def _distilling(model: nn.Module, forget: objective.Forget, look: Look, settings: Settings) -> Iterator[registry.Step]:
    return distill.steps(
        model,
        forget,
        lambda: look.logits,
        batch_size=settings.distill_forget,
        num_mixes=settings.distill_mixes,
        margin=settings.distill_margin,
        weights=(settings.distill_logits, settings.distill_features),
        growth=settings.distill_growth ** (1 / settings.distill_steps),
        seed=settings.seed,
        first_position=settings.first_position,
    )


def _order(settings: Settings, purpose: str) -> torch.Generator:
    return seeds.generator(settings.seed, purpose, settings.first_position)


def _batches(split: Split, batch_size: int, generator: torch.Generator, workers: int) -> Iterator[paper.Batch]:
    """Endless batches of a set, newly shuffled each time through it."""
    while True:
        yield from fixed_length.shuffled(split, batch_size, generator, workers)


def _penalty(model: nn.Module, held: dict[str, Tensor]) -> Callable[[], Tensor]:
    parameters = [(parameter, held[name]) for name, parameter in model.named_parameters() if name in held]
    now, weights = zip(*parameters, strict=True)
    before = [parameter.detach().clone() for parameter in now]
    return lambda: objective.importance_penalty(now, before, weights)


def _perturbation(model: nn.Module, settings: Settings) -> Callable[[], None]:
    """Sets the weights to θ⁰ + fresh Gaussian noise, σ = noise_growth · rms(θ⁰ of the tensor) · number of calls."""
    generator = _order(settings, "noise")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    scales = [weights.square().mean().sqrt() for weights in before]
    calls = itertools.count(1)

    @torch.no_grad()
    def perturb() -> None:
        sigma = settings.noise_growth * next(calls)
        for parameter, weights, scale in zip(parameters, before, scales, strict=True):
            noise = torch.randn(weights.shape, generator=generator).to(weights.device)
            parameter.copy_(weights + sigma * scale * noise)

    return perturb
