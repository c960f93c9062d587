"""Baselines: unlearning methods of other papers, each of fixed length and with the settings of its paper.

The papers forget many images, often a whole class, and most methods train on D_r. Where a paper gives ranges of
settings, the defaults are within them. The defaults are in the table `BUILT_IN` of `l2ul.methods.registry`;
`--setting NAME=VALUE` changes any of them. The first line of a docstring is the summary of the method in `--help`.
Differences from a paper are stated in the docstring of its method.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import attack, objective
from l2ul.common.device import upload
from l2ul.common.modes import eval_mode, frozen_copy, trainable
from l2ul.data.forget_set import random_new_labels
from l2ul.data.images import Split
from l2ul.methods.fixed_length_procedure import MethodContext
from l2ul.methods.paper import oracle
from l2ul.methods.registry import Step
from l2ul.objective import Batch, Terms


def finetune(context: MethodContext) -> Iterator[Terms]:
    """Fine-tune on D_r (Golatkar et al. 2020, arXiv 1911.04933)."""
    for _ in context.epochs:
        for retain in context.batches(context.retain):
            yield {"retain": _cross_entropy(context.model, retain)}


def random_labels(context: MethodContext) -> Iterator[Terms]:
    """Fine-tune on D_r and on D_f with random wrong labels (Graves et al. 2021, arXiv 2010.10981).

    The labels are drawn once.
    """
    relabelled = Split(context.forget.images, _wrong_labels(context))
    for _ in context.epochs:
        for retain, forget in context.paired_batches(context.retain, relabelled):
            yield {"all": _cross_entropy(context.model, _concatenated(retain, forget))}


def neggrad_plus(context: MethodContext) -> Iterator[Terms]:
    """Minimise the loss of oracle with weights (Kurmanji et al. 2023, arXiv 2302.09880).

    The loss is `retain` · CE on D_r + (1 - `retain`) · L_forget.
    """
    weights = {"retain": context.settings["retain"], "forget": 1 - context.settings["retain"]}
    forget_batches = context.endless_batches(context.forget_split)
    for _ in context.epochs:
        for retain in context.batches(context.retain):
            terms = oracle(Step(context.model, "misclassify", next(forget_batches), retain=retain))
            yield {name: weights[name] * term for name, term in terms.items()}


def l1_sparse(context: MethodContext) -> Iterator[Terms]:
    """Fine-tune on D_r with a decreasing L1 penalty on the weights (Jia et al. 2023, arXiv 2304.04934).

    The loss is CE on D_r + γ ‖θ‖₁, with γ falling linearly from `l1` to 0 over the epochs.
    """
    for epoch in context.epochs:
        weight = context.settings["l1"] * (1 - epoch / len(context.epochs))
        for retain in context.batches(context.retain):
            norm = sum(parameter.abs().sum() for parameter in context.model.parameters())
            yield {"retain": _cross_entropy(context.model, retain), "l1": weight * norm}


def salun(context: MethodContext) -> Iterator[Terms]:
    """Run random_labels on the weights that are salient for D_f (Fan et al. 2024, arXiv 2310.12508).

    The salient weights, a share `salient` of all, have the largest |∂CE(D_f)/∂θ⁰| of the whole model. All other weights
    stay bit for bit: neither momentum nor weight decay moves them. (Earlier versions of the authors' code mask the
    gradients only, so that weight decay moves every weight; so did version 1 of this method.) The authors' code draws
    new labels in each epoch, among all classes.
    """
    parameters = trainable(context.model)
    saliency = [gradient.abs() for gradient in _forget_gradient(context, parameters)]
    sizes = [values.numel() for values in saliency]
    flat = torch.cat([values.flatten() for values in saliency])
    is_salient = torch.zeros_like(flat, dtype=torch.bool)
    is_salient[flat.topk(max(1, round(context.settings["salient"] * len(flat)))).indices] = True
    masks = [mask.view_as(weights) for mask, weights in zip(is_salient.split(sizes), parameters, strict=True)]
    context.train_only(parameters, masks)
    yield from random_labels(context)


def scrub(context: MethodContext) -> Iterator[Terms]:
    """Move away from the outputs of θ⁰ on D_f and distil them on D_r (Kurmanji et al. 2023, arXiv 2302.09880).

    An epoch of D_f precedes each of the first `forget_epochs` epochs of D_r. On D_r, CE has the weight 0.99 and the KL
    divergence the weight `kl`.
    """
    teacher = frozen_copy(context.model)

    def kl_divergence(images: Tensor) -> Tensor:
        temperature = context.settings["temperature"]
        logits, original = context.model(images) / temperature, teacher(images) / temperature
        return temperature**2 * objective.kl_divergence(logits, original)

    for epoch in context.epochs:
        if epoch < context.settings["forget_epochs"]:
            for forget in context.batches(context.forget_split):
                yield {"forget": -kl_divergence(forget.images)}
        for retain in context.batches(context.retain):
            yield {
                "retain": 0.99 * _cross_entropy(context.model, retain),
                "logits": context.settings["kl"] * kl_divergence(retain.images),
            }


def ssd(context: MethodContext) -> Iterator[Terms]:
    """Shrink weights that matter far more for D_f than for all of D (Foster et al. 2024, arXiv 2308.07707).

    A weight with F_f > `select` · F is multiplied by min(`dampen` · F / F_f, 1). F_f and F are the mean over batches of
    the squared gradient of CE, on D_f and on all of D_train.
    """
    parameters = trainable(context.model)
    on_forget, num_forget = _squared_gradients(context, parameters, context.forget_split)
    on_retain, num_retain = _squared_gradients(context, parameters, context.retain)
    with torch.no_grad():
        for parameter, forget, retain in zip(parameters, on_forget, on_retain, strict=True):
            fisher_forget, fisher = forget / num_forget, (forget + retain) / (num_forget + num_retain)
            factor = (context.settings["dampen"] * fisher / fisher_forget.clamp_min(1e-30)).clamp_max(1)
            parameter.mul_(torch.where(fisher_forget > context.settings["select"] * fisher, factor, 1.0))
    yield {}


def bad_teaching(context: MethodContext) -> Iterator[Terms]:
    """Distil θ⁰ on a part of D_r and a random model on D_f (Chundawat et al. 2023, arXiv 2205.08096).

    The share `part` of D_r is used. The random model has the architecture of the original one and new weights.
    """
    good, bad = frozen_copy(context.model), _with_new_weights(context.model)
    number = max(1, round(context.settings["part"] * len(context.retain)))
    part = context.retain.subset(torch.randperm(len(context.retain), generator=context.generator)[:number])
    for _ in context.epochs:
        for retain, forget in context.paired_batches(part, context.forget_split):
            targets = [model(batch.images) for model, batch in ((good, retain), (bad, forget)) if len(batch.labels)]
            logits = context.model(_concatenated(retain, forget).images)
            yield {"logits": objective.kl_divergence(logits, torch.cat(targets))}


def _with_new_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model, as `frozen_copy` does, with the initial weights of each layer.

    Parameters that no layer initialises itself, such as the class token of a vision transformer, are drawn from a
    normal distribution of standard deviation 0.02; scales become 1 and biases 0.
    """
    new = frozen_copy(model)
    for module in new.modules():
        known = [name for name in ("reset_parameters", "_reset_parameters") if hasattr(module, name)]
        for name in known:  # the second one belongs to nn.MultiheadAttention
            getattr(module, name)()
        for name, parameter in () if known else module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("weight") and parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
    return new


def boundary_shrink(context: MethodContext) -> Iterator[Terms]:
    """Fine-tune on D_f with the nearest wrong labels (Chen et al. 2023, arXiv 2303.11570).

    The nearest wrong label is the most probable class other than the true one after a step of length `bound` in every
    pixel along the sign of the gradient. The paper takes the most probable class even if it is the true one.
    """
    nearest = torch.cat([_nearest_wrong_labels(context, indices) for indices in _batches_in_order(context)])
    relabelled = Split(context.forget.images, nearest)
    for _ in context.epochs:
        for forget in context.batches(relabelled):
            yield {"forget": _cross_entropy(context.model, forget)}


def _nearest_wrong_labels(context: MethodContext, indices: Tensor) -> Tensor:
    """Return the nearest wrong labels (n,) of these images of D_f."""
    labels, pixels = context.forget.labels[indices], context.forget.images[indices].requires_grad_()
    with eval_mode(context.model):
        loss = F.cross_entropy(context.model(pixels), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
        with torch.no_grad():
            logits = context.model((pixels + context.settings["bound"] * gradient.sign()).clamp(0, 1))
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def jit(context: MethodContext) -> Iterator[Terms]:
    """Make the outputs on D_f insensitive to noise (just in time; Foster et al. 2024, arXiv 2402.01401).

    The loss is the sum over the images of a batch of the mean over `copies` of ‖f(x) - f(x + ξ)‖ / ‖ξ‖, with Gaussian
    noise ξ of standard deviation `sigma` per pixel. The paper chooses rate and σ for each model. The model is in eval
    mode: the paper's models have no batch-norm, whose running statistics would become those of noise. The authors' code
    has plain SGD, no gradient through f(x + ξ), and clips x + ξ to the range of the batch. (Version 1 of this method
    took the mean over the images, so that its steps at the same rate were shorter by their number.)
    """
    with eval_mode(context.model):
        for _ in context.epochs:
            for forget in context.batches(context.forget_split):
                logits, ratios = context.model(forget.images), []
                for _ in range(context.settings["copies"]):
                    noise = torch.randn(forget.images.shape, generator=context.generator)
                    noise = context.settings["sigma"] * upload(noise, logits.device)
                    change = (logits - context.model(forget.images + noise)).norm(dim=1)
                    ratios.append(change / noise.flatten(1).norm(dim=1))
                yield {"forget": torch.stack(ratios).mean(0).sum()}


def amun(context: MethodContext) -> Iterator[Terms]:
    """Fine-tune on D_r and on the nearest adversarial examples of D_f, labelled by θ⁰ (arXiv 2503.00917).

    The nearest adversarial examples are those of L2-PGD with a radius of `eps`, doubled until the predicted class
    changes, and steps of a tenth of the radius (see `nearest_examples`).

    D_f itself is left out. This is the variant that the authors' code calls `advonly`; their default also trains on D_f
    with its true labels.
    """
    nearest = nearest_examples(
        context.model,
        context.forget,
        context.settings["eps"],
        context.settings["iterations"],
        context.settings["batch"],
    )
    for _ in context.epochs:
        for retain, wrong in context.paired_batches(context.retain, nearest):
            yield {"all": _cross_entropy(context.model, _concatenated(retain, wrong))}


def nearest_examples(
    model: nn.Module, forget: objective.Forget, eps: float, iterations: int, batch_size: int = 128
) -> Split:
    """Return a misclassified image near each image of D_f, with its predicted class as the label.

    An image that is misclassified already is returned as it is. The others come from untargeted L2-PGD with the
    smallest of the radii eps, 2 eps, …, 2^12 eps that changes the prediction. If none does, the image of the largest
    radius and its true class are returned. `batch_size` images are computed at once.
    """
    parts = zip(forget.images.split(batch_size), forget.labels.split(batch_size), strict=True)
    examples, predictions = zip(*(_nearest(model, *part, eps, iterations) for part in parts), strict=True)
    return Split(torch.cat(examples), torch.cat(predictions))


def _nearest(model: nn.Module, images: Tensor, labels: Tensor, eps: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return `nearest_examples` of one batch: examples and their labels."""
    examples = images.clone()
    with eval_mode(model), torch.no_grad():
        predictions = model(examples).argmax(1)
    for doublings in range(13):
        remaining = (predictions == labels).nonzero().flatten()
        if not len(remaining):
            break
        radius, chosen = eps * 2**doublings, images[remaining]
        settings = {"eps": radius, "alpha": radius / 10, "steps": iterations, "start": torch.zeros_like(chosen)}
        examples[remaining] = attack.pgd_l2(model, chosen, labels[remaining], targeted=False, **settings)
        with eval_mode(model), torch.no_grad():
            predictions[remaining] = model(examples[remaining]).argmax(1)
    return examples, predictions


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.labels)


def _concatenated(first: Batch, second: Batch) -> Batch:
    return Batch(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def _wrong_labels(context: MethodContext) -> Tensor:
    """Draw a label (k,) for each image of D_f, uniform over the classes other than the true one."""
    with eval_mode(context.model), torch.no_grad():
        num_classes = context.model(context.forget.images[:1]).shape[1]
    labels = context.forget.labels
    return random_new_labels(labels.cpu(), num_classes, context.seed).to(labels.device)


def _batches_in_order(context: MethodContext) -> Sequence[Tensor]:
    """Return the indices of D_f in batches."""
    return torch.arange(len(context.forget)).split(context.settings["batch"])


def _forget_gradient(context: MethodContext, parameters: list[Tensor]) -> list[Tensor]:
    """Compute ∂CE(D_f)/∂θ⁰, the mean over the images, in eval mode."""
    total, forget = [torch.zeros_like(parameter) for parameter in parameters], context.forget
    with eval_mode(context.model):
        for indices in _batches_in_order(context):
            logits = context.model(forget.images[indices])
            loss = F.cross_entropy(logits, forget.labels[indices], reduction="sum") / len(forget)
            torch._foreach_add_(total, torch.autograd.grad(loss, parameters, materialize_grads=True))
    return total


def _squared_gradients(context: MethodContext, parameters: list[Tensor], split: Split) -> tuple[list[Tensor], int]:
    """Compute the sum over batches of the squared gradients of CE, in eval mode, and the number of batches."""
    total, num_batches = [torch.zeros_like(parameter) for parameter in parameters], 0
    with eval_mode(context.model):
        for batch in context.batches(split):
            gradients = torch.autograd.grad(_cross_entropy(context.model, batch), parameters, materialize_grads=True)
            torch._foreach_addcmul_(total, gradients, gradients)
            num_batches += 1
    return total, num_batches
