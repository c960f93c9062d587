"""The paper's methods: Cha et al., Learning to Unlearn (AAAI 2024, arXiv 2301.11578).

Each minimises a loss with SGD from the original weights θ⁰ until all of D_f is forgotten or `max_passes` is reached.
A step takes n_f images of D_f and n_a adversarial examples (x', ȳ), or n_r images of D_r:

    neggrad, correct   L = L_forget
    oracle             L = L_forget + CE(g(x_r), y_r)
    adv                L = n_f / (n_f + n_a) · L_forget + n_a / (n_f + n_a) · CE(g(x'), ȳ)
    adv_imp            L = adv's + λ · ½ Σ_i Ω̄_i (θ_i - θ⁰_i)²
    rawp               no loss: θ = θ⁰ + σ_t · rms(θ⁰) · ε with ε ~ N(0, 1) and σ_t = noise_growth · t at step t

with L_forget = -CE(g(x_f), y_f) to misclassify (neggrad) and CE(g(x_f), y*_f) to relabel (correct), and rms taken over
each parameter tensor. `before` is the original model.
"""

from collections.abc import Callable
import functools

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import ConstantLR

from l2ul import objective
from l2ul.common import seeds
from l2ul.common.device import upload
from l2ul.common.fused_optimizers import fused
from l2ul.common.modes import trainable
from l2ul.data.images import Split
from l2ul.importance import held_weights
from l2ul.methods.procedure import EndlessBatches, Procedure
from l2ul.methods.registry import BUILT_IN, Method, Step, Terms
from l2ul.methods.settings import Settings, override
from l2ul.objective import Batch, Forget, forget_loss


def neggrad(step: Step) -> Terms:
    """Minimise L_forget alone: gradient ascent on D_f."""
    return {"forget": forget_loss(step.model(step.forget.images), step.forget.labels, step.goal)}


def correct(step: Step) -> Terms:
    """Minimise L_forget alone: fine-tuning on the new labels of D_f."""
    return {"forget": forget_loss(step.model(step.forget.images), step.forget.labels, step.goal)}


def rawp(step: Step) -> Terms:
    """Perturb the weights at random, with noise that grows until D_f is forgotten."""
    step.perturb()
    return {}


def oracle(step: Step) -> Terms:
    """Minimise L_forget + CE on D_r."""
    forget, retain = _joint_logits(step.model, step.forget, step.retain)
    return {
        "forget": forget_loss(forget, step.forget.labels, step.goal),
        "retain": F.cross_entropy(retain, step.retain.labels),
    }


def adv(step: Step) -> Terms:
    """Minimise L_forget + CE on D_adv, each weighted by its part of the joint batch (arXiv 2301.11578)."""
    forget, retained = _joint_logits(step.model, step.forget, step.adv)
    share = len(forget) / (len(forget) + len(retained))  # n_f / (n_f + n_a)
    return {
        "forget": share * forget_loss(forget, step.forget.labels, step.goal),
        "adv": (1 - share) * F.cross_entropy(retained, step.adv.labels),
    }


def adv_imp(step: Step) -> Terms:
    """Minimise the loss of adv + λ · the importance penalty (arXiv 2301.11578)."""
    return adv(step) | {"importance": step.reg_lamb * step.penalty()}


def _joint_logits(model: nn.Module, forget: Batch, retained: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the two batches of a step.

    In eval mode both come from one forward pass. In train mode batch-norm would mix the statistics of the batches, so
    each has its own pass, as in the released scripts: first the batch of D_adv or D_r.
    """
    if model.training:
        retained_logits = model(retained.images)
        return model(forget.images), retained_logits
    logits = model(torch.cat([forget.images, retained.images]))
    return logits[: len(forget.labels)], logits[len(forget.labels) :]


class PaperProcedure(Procedure):
    """SGD on the loss of a method that is a function of a `Step`.

    model       θ⁰; moved in place
    settings    values of all settings
    retained    D_adv or D_r, whichever the method needs
    importance  Ω by parameter name
    workers     processes that decode images of D_r that stay on disk

    With `bn` "train" (as released) batch-norm uses batch statistics and dropout is active in training steps.
    `max_passes` counts passes through `retained`, or through D_f without it. For rawp it counts draws, as each is
    followed by a pass through D_f.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        forget: Forget,
        settings: Settings,
        retained: Split | None,
        importance: dict[str, Tensor] | None,
        workers: int,
    ):
        self.method, self.model, self.goal = method, model.train(settings.bn == "train"), forget.goal
        self.settings, self.own_values = settings, override(method.settings, settings.method_settings)
        parameters = trainable(model)
        options = {"lr": settings.unlearn_lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
        self.optimizer = fused(torch.optim.SGD, parameters, **options)
        self.scheduler = ConstantLR(self.optimizer, factor=1.0)
        if method in BUILT_IN:
            self.has_draws = "noise" not in method.needs
            # in train mode each batch has a forward pass of its own
            self.separate = frozenset({"forget", "importance"} if settings.bn == "train" else {"importance"})
        self.batch_size = max(
            min(settings.batch_size, len(forget)), min(settings.adv_batch_size, len(retained)) if retained else 0
        )
        labelled = Split(forget.images, forget.target_labels)
        self.forget_batches = EndlessBatches(labelled, settings.batch_size, self._generator("forget batches"))
        self.retained_batches = None
        if retained is not None:
            generator = self._generator("keep batches")  # the name decides the order of the images
            self.retained_batches = EndlessBatches(retained, settings.adv_batch_size, generator, workers)
        self.noise = None
        if "noise" in method.needs:
            # on a CUDA GPU its own generator draws other numbers, in a fraction of the time
            source = "cuda" if parameters[0].is_cuda else "cpu"
            self.noise = WeightNoise(parameters, settings.noise_growth, self._generator("noise", source))
        self.penalty = penalty(model, held_weights(importance)) if importance is not None else None
        batches_of_a_pass = 1 if self.noise else len(self.retained_batches or self.forget_batches)
        self.max_steps = settings.max_passes * batches_of_a_pass

    def _generator(self, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
        return seeds.generator(self.settings.seed, purpose, self.settings.first_position, device=device)

    def __next__(self) -> Terms:
        return self.terms(*self.draw())

    def draw(self) -> tuple[Tensor, ...]:
        """Return images and labels of the next batch of D_f, and of that of D_adv or D_r if the method needs one."""
        forget = next(self.forget_batches)
        retained = next(self.retained_batches) if self.retained_batches else None
        return forget.images, forget.labels, *((retained.images, retained.labels) if retained else ())

    def terms(self, images: Tensor, labels: Tensor, *retained: Tensor) -> Terms:
        """Return the terms of the loss of a step on these batches."""
        retained = Batch(*retained) if retained else None
        step = Step(
            self.in_parts(),
            self.goal,
            Batch(images, labels),
            adv=retained if "adv" in self.method.needs else None,
            retain=retained if "retain" in self.method.needs else None,
            penalty=self.penalty,
            reg_lamb=self.settings.reg_lamb,
            perturb=self.noise,
            settings=self.own_values,
        )
        return self.method.terms(step)

    def state_dict(self) -> dict[str, object]:
        """Return the states of the batches and of the noise."""
        parts = {name: getattr(self, name) for name in ("forget_batches", "retained_batches", "noise")}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue with the batches and the noise of this state."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def penalty(model: nn.Module, held: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a function that computes ½ Σ_i Ω̄_i (θ_i - θ⁰_i)², with θ⁰ the weights of the model at this moment."""
    named = [(parameter, held[name]) for name, parameter in model.named_parameters() if name in held]
    parameters, strengths = zip(*named, strict=True)
    reference = [parameter.detach().clone() for parameter in parameters]
    return functools.partial(objective.importance_penalty, parameters, reference, strengths)


class WeightNoise:
    """Gaussian noise on the original weights, with a standard deviation that grows by `growth` at each draw.

    growth     in parts of the root mean square of a parameter tensor
    generator  on the CPU or on the device of the weights
    """

    def __init__(self, parameters: list[Tensor], growth: float, generator: torch.Generator):
        self.parameters, self.growth, self.generator = parameters, growth, generator
        self.reference = [parameter.detach().clone() for parameter in parameters]
        self.rms = torch.stack([weights.square().mean().sqrt() for weights in self.reference]).cpu()
        self.draws = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Set the weights to θ⁰ + growth · number of draws · rms(θ⁰) · fresh noise."""
        self.draws += 1
        source = self.generator.device
        draws = [torch.randn(weights.shape, generator=self.generator, device=source) for weights in self.reference]
        noise = [upload(draw, weights.device) for draw, weights in zip(draws, self.reference, strict=True)]
        torch._foreach_mul_(noise, (self.growth * self.draws * self.rms).tolist())
        torch._foreach_add_(noise, self.reference)
        torch._foreach_copy_(self.parameters, noise)

    def state_dict(self) -> dict[str, object]:
        """Return the number of draws and the state of the generator."""
        return {"draws": self.draws, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue after these draws."""
        self.draws = state["draws"]
        self.generator.set_state(state["generator"].cpu())
