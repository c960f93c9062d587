"""What people compare with: unlearning methods of others, each of a fixed length, with the settings of their papers.

Theirs are many images, often a whole class, and most train on D_r. Where a paper gives ranges to search, the settings
are from within them; `--course` changes any. What is done otherwise than there is said of each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import attack, objective
from l2ul.common.modes import eval_mode, frozen_copy
from l2ul.data.forget_set import random_new_labels
from l2ul.data.images import Split
from l2ul.methods.fixed_length import Course
from l2ul.methods.paper import oracle
from l2ul.methods.registry import Step, Terms, fixed_length
from l2ul.objective import Batch


@fixed_length("finetune", "retain", epochs=10, lr=1e-2, batch=128, augment=1)
def finetune(course: Course) -> Iterator[Terms]:
    """CE on D_r, hoping that D_f fades (fine-tuning; Golatkar et al. 2020, arXiv 1911.04933)"""
    for _ in course.epochs:
        for kept in course.batches(course.retain):
            yield {"retain": _cross_entropy(course.model, kept)}


@fixed_length("random_labels", "retain", epochs=10, lr=1e-2, batch=128, augment=1)
def random_labels(course: Course) -> Iterator[Terms]:
    """CE on D_r and on D_f with random wrong labels (Golatkar et al. 2020; Graves et al. 2021, arXiv 2010.10981)"""
    relabelled = Split(course.forget.images, _wrong_labels(course))
    for _ in course.epochs:
        for kept, forgotten in course.spread(course.retain, relabelled):
            yield {"all": _cross_entropy(course.model, _joined(kept, forgotten))}


@fixed_length("neggrad_plus", "retain", epochs=5, lr=1e-2, batch=128, augment=1, retain=0.95)
def neggrad_plus(course: Course) -> Iterator[Terms]:
    """`retain` · CE on D_r + (1 - `retain`) · L_forget: oracle with weights (Kurmanji et al. 2023, arXiv 2302.09880)"""
    weights = {"retain": course.settings["retain"], "forget": 1 - course.settings["retain"]}
    forgotten = course.endless(course.forgotten)
    for _ in course.epochs:
        for kept in course.batches(course.retain):
            terms = oracle(Step(course.model, "misclassify", next(forgotten), retain=kept))
            yield {name: weights[name] * term for name, term in terms.items()}


@fixed_length("l1_sparse", "retain", epochs=10, lr=1e-2, batch=128, augment=1, l1=5e-4)
def l1_sparse(course: Course) -> Iterator[Terms]:
    """CE on D_r + γ ‖θ‖₁, γ falling from `l1` to 0 (Jia et al. 2023, arXiv 2304.04934)"""
    for epoch in course.epochs:
        weight = course.settings["l1"] * (1 - epoch / len(course.epochs))
        for kept in course.batches(course.retain):
            size = sum(parameter.abs().sum() for parameter in course.model.parameters())
            yield {"retain": _cross_entropy(course.model, kept), "l1": weight * size}


@fixed_length("salun", "retain", epochs=10, lr=1e-2, batch=128, augment=1, salient=0.5)
def salun(course: Course) -> Iterator[Terms]:
    """random_labels that moves the `salient` part of the weights alone (Fan et al. 2024, arXiv 2310.12508)

    Salient are those of which |∂CE(D_f)/∂θ⁰| is largest, over the whole net.
    """
    parameters = [parameter for parameter in course.model.parameters() if parameter.requires_grad]
    sizes = [gradient.abs() for gradient in _forget_gradient(course, parameters)]
    every = torch.cat([size.flatten() for size in sizes])
    least = every.sort(descending=True).values[max(0, round(course.settings["salient"] * len(every)) - 1)]
    handles = [
        parameter.register_hook(lambda gradient, mask=size >= least: gradient * mask)
        for parameter, size in zip(parameters, sizes, strict=True)
    ]
    try:
        yield from random_labels(course)
    finally:
        for handle in handles:
            handle.remove()


@fixed_length("scrub", "retain", epochs=3, lr=5e-4, batch=128, augment=1, forget_epochs=2, kl=0.001, temperature=4.0)
def scrub(course: Course) -> Iterator[Terms]:
    """away from θ⁰'s outputs on D_f, then toward them and CE on D_r, by turns (Kurmanji et al. 2023, arXiv 2302.09880)

    An epoch of D_f before each of the first `forget_epochs` epochs of D_r; there CE has the weight 0.99, KL `kl`.
    """
    teacher = frozen_copy(course.model)

    def divergence(images: Tensor) -> Tensor:
        warm = course.settings["temperature"]
        return warm**2 * objective.divergence(course.model(images) / warm, teacher(images) / warm)

    for epoch in course.epochs:
        if epoch < course.settings["forget_epochs"]:
            for forgotten in course.batches(course.forgotten):
                yield {"forget": -divergence(forgotten.images)}
        for kept in course.batches(course.retain):
            yield {
                "retain": 0.99 * _cross_entropy(course.model, kept),
                "logits": course.settings["kl"] * divergence(kept.images),
            }


@fixed_length("ssd", "retain", batch=64, select=10.0, dampen=1.0)
def ssd(course: Course) -> Iterator[Terms]:
    """no training: weights that matter far more for D_f than for D are shrunk (Foster et al. 2024, arXiv 2308.07707)

    A weight with F_f > `select` · F is multiplied by min(`dampen` · F / F_f, 1), with F the mean over batches of the
    squared gradient of CE, on D_f and on all of D.
    """
    parameters = [parameter for parameter in course.model.parameters() if parameter.requires_grad]
    on_forget, num_forget = _squared_gradients(course, parameters, course.forgotten)
    on_retain, num_retain = _squared_gradients(course, parameters, course.retain)
    with torch.no_grad():
        for parameter, forget, retain in zip(parameters, on_forget, on_retain, strict=True):
            f, d = forget / num_forget, (forget + retain) / (num_forget + num_retain)
            shrunk = (course.settings["dampen"] * d / f.clamp_min(1e-30)).clamp_max(1)
            parameter.mul_(torch.where(f > course.settings["select"] * d, shrunk, 1.0))
    yield {}


@fixed_length("bad_teaching", "retain", epochs=1, lr=1e-4, adam=1, batch=128, augment=1, part=0.3)
def bad_teaching(course: Course) -> Iterator[Terms]:
    """θ⁰ teaches on a `part` of D_r, a net of random weights on D_f (Chundawat et al. 2023, arXiv 2205.08096)"""
    good, bad = frozen_copy(course.model), frozen_copy(course.model)
    for module in bad.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    number = max(1, round(course.settings["part"] * len(course.retain)))
    chosen = course.retain.subset(torch.randperm(len(course.retain), generator=course.generator)[:number])
    for _ in course.epochs:
        for kept, forgotten in course.spread(chosen, course.forgotten):
            taught = [net(part.images) for net, part in ((good, kept), (bad, forgotten)) if len(part.labels)]
            logits = course.model(_joined(kept, forgotten).images)
            yield {"logits": objective.divergence(logits, torch.cat(taught))}


@fixed_length("boundary_shrink", epochs=10, lr=1e-5, batch=64, augment=1, bound=0.1)
def boundary_shrink(course: Course) -> Iterator[Terms]:
    """CE on D_f with the nearest wrong label (Chen et al. 2023, arXiv 2303.11570)

    Nearest: the likeliest class but the true one after a step of length `bound` in every pixel along the gradient's
    sign. In the paper that step's class is taken, be it the true one still.
    """
    with eval_mode(course.model):
        pixels = course.forget.images.detach().clone().requires_grad_()
        loss = F.cross_entropy(course.model(pixels), course.forget.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
        with torch.no_grad():
            logits = course.model((pixels + course.settings["bound"] * gradient.sign()).clamp(0, 1))
    nearest = Split(course.forget.images, logits.scatter(1, course.forget.labels[:, None], -torch.inf).argmax(1))
    for _ in course.epochs:
        for forgotten in course.batches(nearest):
            yield {"forget": _cross_entropy(course.model, forgotten)}


@fixed_length("jit", epochs=1, lr=3e-4, batch=64, sigma=0.5, copies=25)
def jit(course: Course) -> Iterator[Terms]:
    """outputs made insensitive to noise on D_f (just in time; Foster et al. 2024, arXiv 2402.01401)

    The mean over `copies` of ‖f(x) - f(x + ξ)‖ / ‖ξ‖, ξ Gaussian with `sigma` a pixel. Rate and σ differ a net there.
    In eval mode: its nets have no batch-norm, whose running statistics would become those of noise.
    """
    with eval_mode(course.model):
        for _ in course.epochs:
            for forgotten in course.batches(course.forgotten):
                logits, gaps = course.model(forgotten.images), []
                for _ in range(course.settings["copies"]):
                    noise = torch.randn(forgotten.images.shape, generator=course.generator).to(logits.device)
                    noise = course.settings["sigma"] * noise
                    moved = (logits - course.model(forgotten.images + noise)).norm(dim=1)
                    gaps.append(moved / noise.flatten(1).norm(dim=1))
                yield {"forget": torch.stack(gaps).mean()}


@fixed_length("amun", "retain", epochs=10, lr=1e-2, batch=128, augment=1, eps=0.05, iterations=50)
def amun(course: Course) -> Iterator[Terms]:
    """CE on D_r and on the nearest adversarial examples of D_f as what θ⁰ calls them (arXiv 2503.00917)

    Nearest: of L2-PGD with radius `eps`, doubled until the class changes, and steps of a tenth of it.
    """
    nearest = nearest_examples(course.model, course.forget, course.settings["eps"], course.settings["iterations"])
    for _ in course.epochs:
        for kept, wrong in course.spread(course.retain, nearest):
            yield {"all": _cross_entropy(course.model, _joined(kept, wrong))}


def nearest_examples(model: nn.Module, forget: objective.Forget, eps: float, iterations: int) -> Split:
    """An image near each of D_f that the model does not call its true class, and what it calls it.

    Itself where it is called wrong already; else from untargeted L2-PGD with the smallest of the radii eps, 2 eps, …,
    2^12 eps that changes the class. An image that none changes is left with the largest's and its class.
    """
    examples = forget.images.clone()
    with eval_mode(model), torch.no_grad():
        called = model(examples).argmax(1)
    for doublings in range(13):
        left = (called == forget.labels).nonzero().flatten()
        if not len(left):
            break
        radius, own = eps * 2**doublings, forget.images[left]
        settings = {"eps": radius, "alpha": radius / 10, "steps": iterations, "start": torch.zeros_like(own)}
        examples[left] = attack.pgd_l2(model, own, forget.labels[left], away=True, **settings)
        with eval_mode(model), torch.no_grad():
            called[left] = model(examples[left]).argmax(1)
    return Split(examples, called)


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.labels)


def _joined(first: Batch, second: Batch) -> Batch:
    return Batch(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def _wrong_labels(course: Course) -> Tensor:
    with eval_mode(course.model), torch.no_grad():
        num_classes = course.model(course.forget.images[:1]).shape[1]
    return random_new_labels(course.forget.labels.cpu(), num_classes, course.seed).to(course.forget.labels.device)


def _forget_gradient(course: Course, parameters: list[Tensor]) -> list[Tensor]:
    """∂CE(D_f)/∂θ⁰, the mean over the images, in eval mode."""
    total, forget = [torch.zeros_like(parameter) for parameter in parameters], course.forget
    with eval_mode(course.model):
        for indices in torch.arange(len(forget)).split(course.settings["batch"]):
            logits = course.model(forget.images[indices])
            loss = F.cross_entropy(logits, forget.labels[indices], reduction="sum") / len(forget)
            torch._foreach_add_(total, torch.autograd.grad(loss, parameters, materialize_grads=True))
    return total


def _squared_gradients(course: Course, parameters: list[Tensor], split: Split) -> tuple[list[Tensor], int]:
    """Sum over batches of the squared gradients of CE, in eval mode, and the number of batches."""
    total, number = [torch.zeros_like(parameter) for parameter in parameters], 0
    with eval_mode(course.model):
        for batch in course.batches(split):
            found = torch.autograd.grad(_cross_entropy(course.model, batch), parameters, materialize_grads=True)
            torch._foreach_addcmul_(total, found, found)
            number += 1
    return total, number
