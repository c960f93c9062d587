"""The methods: what each computes its loss from at a step. A new one is a function here; nothing else changes."""

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul.methods.registry import METHODS, Method, Step, Terms, method
from l2ul.objective import Batch, forget_loss, margin_loss

METHODS["before"] = Method("before", None, frozenset(), "the classifier as it was given, θ⁰")


@method("neggrad", goals=("misclassify",))
def neggrad(step: Step) -> Terms:
    """L_forget alone: gradient ascent on D_f"""
    return {"forget": forget_loss(step.model(step.forget.images), step.forget.labels, step.goal)}


@method("correct", goals=("relabel",))
def correct(step: Step) -> Terms:
    """L_forget alone: fine-tuning on the new labels of D_f"""
    return {"forget": forget_loss(step.model(step.forget.images), step.forget.labels, step.goal)}


@method("rawp", "noise", goals=("misclassify",))
def rawp(step: Step) -> Terms:
    """no loss: random weight perturbation, grown until D_f is forgotten"""
    step.perturb()
    return {}


@method("oracle", "retain")
def oracle(step: Step) -> Terms:
    """CE on batches of D_r + L_forget, with the remaining training set that the others do without"""
    forgotten, kept = _together(step.model, step.forget, step.retain)
    return {
        "forget": forget_loss(forgotten, step.forget.labels, step.goal),
        "retain": F.cross_entropy(kept, step.retain.labels),
    }


@method("adv", "adv")
def adv(step: Step) -> Terms:
    """L_forget + CE on D_adv, each weighted by its part of the joint batch (arXiv 2301.11578)"""
    forgotten, kept = _together(step.model, step.forget, step.adv)
    share = len(forgotten) / (len(forgotten) + len(kept))  # n_f / (n_f + n_a)
    return {
        "forget": share * forget_loss(forgotten, step.forget.labels, step.goal),
        "adv": (1 - share) * F.cross_entropy(kept, step.adv.labels),
    }


@method("adv_imp", "adv", "importance")
def adv_imp(step: Step) -> Terms:
    """the terms of adv + λ · the importance penalty (arXiv 2301.11578)"""
    return adv(step) | {"importance": step.reg_lamb * step.penalty()}


@method("distill", "teacher")
def distill(step: Step) -> Terms:
    """ours: margin loss on D_f + logits and features of θ⁰ distilled on mixes of D_f"""
    logits_gap, features_gap = step.compare()
    terms = {"forget": logits_gap.new_zeros(()), "logits": logits_gap, "features": features_gap}
    if len(step.forget.labels):
        logits = step.model(step.forget.images)
        terms["forget"] = step.share * margin_loss(logits, step.forget.labels, step.goal, step.margin).mean()
    return terms


def _together(model: nn.Module, forget: Batch, keep: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the two batches of a step.

    In eval mode from one forward pass. In train mode batch-norm would mix their statistics, so each goes by itself, as
    in the released scripts: the batch to keep first.
    """
    if model.training:
        kept = model(keep.images)
        return model(forget.images), kept
    logits = model(torch.cat([forget.images, keep.images]))
    return logits[: len(forget.labels)], logits[len(forget.labels) :]


# noqa: E402, F401  # registers methods of others, after those above
