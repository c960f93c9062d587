"""Membership inference: how well a model's outputs tell D_f from images that it was not trained on."""

import math

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common.device import plain_defaults

MAX_FALSE_POSITIVES = 0.01  # false-positive rate at which the true-positive rate is reported
FOLDS = 5
OFFLINE = 0.3  # a of the offline RMIA, the same for every data set
# γ of RMIA. A score is monotonic in ratio(x), so a larger γ changes no order but produces ties: with γ = 2, a model
# that is certain of nearly all images gives all of them one score, which would look like guessing.
GAMMA = 1.0
ROWS = 1024  # images whose probabilities are computed at once: in double precision, those of many classes are large


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compute the scores that attackers threshold: the higher, the more an image looks like a training image.

    logits   (n, C), finite
    labels   (n,) int64, the true classes
    returns  (n,) in double precision by attack, with p the class probabilities and y the label:
             confidence        max p, which needs no label
             loss              log p_y
             entropy           Σ p_c log p_c, the negative entropy
             modified_entropy  (1 - p_y) log p_y + Σ_{c≠y} p_c log(1 - p_c), the negative modified entropy
                               (Song & Mittal, USENIX Security 2021, arXiv 2003.10595)
    """
    parts = [_scores(*part) for part in zip(logits.split(ROWS), labels.split(ROWS), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    own = F.one_hot(labels, logits.shape[1]).bool()
    top = log_p.argmax(1, keepdim=True)
    rest = log_p.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)  # of the top class, where 1 - p may round to 0
    log_rest = torch.log(-torch.expm1(log_p)).scatter(1, top, rest)  # log(1 - p), (n, C)
    modified = torch.where(own, log_rest.exp() * log_p, p * log_rest).sum(1)
    return {
        "confidence": p.amax(1),
        "loss": log_p[own],
        "entropy": (p * log_p).sum(1),
        "modified_entropy": modified,
    }


def advantage(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Compute how well a threshold on scores separates members (n,) from others (m,), in percent.

    auc  area under the ROC curve: 50 for guessing, 100 for perfect separation
    tpr  members detected at a false-positive rate of at most 1 %: 1 for guessing, 100 for perfect separation

    Both are the better of the two directions. An image whose loss is far too high for an unseen image reveals its
    membership as much as one whose loss is too low.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    truth = np.r_[np.ones(len(members)), np.zeros(len(others))]
    values = np.r_[members, others]
    area = roc_auc_score(truth, values)
    rates = []
    for direction in (values, -values):
        false_positives, true_positives, _ = roc_curve(truth, direction)
        rates.append(true_positives[false_positives <= MAX_FALSE_POSITIVES].max())
    return {"auc": 100 * max(area, 1 - area), "tpr": 100 * max(rates)}


def logistic_scores(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score members (n, d) and others (m, d) by cross-validated logistic regression on their d features.

    Returns the scores (n,) and (m,). Each image is scored by a fit that excludes it: 5 shuffled, stratified folds, or
    as many as there are images of the smaller class. Both classes have equal weight, and features are standardised.
    Quadratic terms separate both ends of a range from its middle.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    truth = np.r_[np.ones(len(members)), np.zeros(len(others))]
    features = np.r_[members, others]
    squares = PolynomialFeatures(degree=2, include_bias=False)
    fit = make_pipeline(
        StandardScaler(), squares, StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(min(FOLDS, len(members), len(others)), shuffle=True, random_state=0)
    values = cross_val_predict(fit, features, truth, cv=folds, method="decision_function")
    return values[: len(members)], values[len(members) :]


@plain_defaults()
def inference(members: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> dict[str, dict[str, float]]:
    """Run every attack of `columns.MEMBERSHIP_ATTACKS` and return its `advantage`.

    members  logits (n, C) and labels (n,) of D_f
    others   logits (m, C) and labels (m,) of images that the model was not trained on

    The logistic attack uses the four scores together. It is absent where a class has a single image, as
    cross-validation needs two.
    """
    each = [{name: score.cpu().numpy() for name, score in scores(*part).items()} for part in (members, others)]
    result = {name: advantage(each[0][name], each[1][name]) for name in each[0]}
    if min(len(members[1]), len(others[1])) > 1:
        features = [np.stack(list(part.values()), 1) for part in each]
        result["logistic"] = advantage(*logistic_scores(*features))
    return result


def label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p_y (n,) in double precision, for logits (n, C) and labels y (n,) int64: at most 0."""
    return torch.cat(
        [
            some.double().log_softmax(1).gather(1, own[:, None])[:, 0]
            for some, own in zip(logits.split(ROWS), labels.split(ROWS), strict=True)
        ]
    )


def likelihood_ratio(own: Tensor, references: Tensor) -> Tensor:
    """Return log(p(y|x, θ) / p(x)) for each image (n,): how much likelier the model finds it than reference models do.

    own         log p_y (n,) of the model
    references  log p_y (R, n) of R models that were not trained on the images

    p(x) is that of the offline attack of Zarifzadeh et al. 2024 (arXiv 2312.03262):
    ((1 + a) · mean of p_y over the reference models + 1 - a) / 2 with a = OFFLINE.
    """
    outside = references.logsumexp(0) - math.log(len(references))
    marginal = torch.log(((1 + OFFLINE) * outside.exp() + (1 - OFFLINE)) / 2)
    return own - marginal


def relative_scores(ratios: Tensor, population: Tensor) -> Tensor:
    """Compute RMIA scores: for each image x, the share of population images z with ratio(x) / ratio(z) ≥ γ.

    ratios      (n,) and population (m,): logarithms, as `likelihood_ratio` returns them
    returns     (n,) in double precision, 0 to 1

    Zarifzadeh et al. 2024 (arXiv 2312.03262) with γ = GAMMA.
    """
    below = population.sort().values
    return torch.searchsorted(below, ratios - math.log(GAMMA), right=True).double() / len(population)
