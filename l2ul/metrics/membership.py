"""Membership inference: whether a model's outputs tell the images of D_f from images that it never saw."""

import math

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F

ATTACKS = ("confidence", "loss", "entropy", "modified_entropy", "logistic")
MOST_FALSE = 0.01  # false positives a hit rate is told at
FOLDS = 5
OFFLINE = 0.3  # a of the offline RMIA, the same for every data set
# γ of RMIA. The score only ever grows with ratio(x), so a larger γ changes no order but ties images: with 2, a net that
# is sure of nearly all images gives all of them one score, which would look like guessing.
GAMMA = 1.0


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What an attacker looks at, for each image (n,) in double precision: the higher, the more like a training image.

    logits (n, C) finite, labels (n,) int64. With p the class probabilities and y the label:
    confidence        max p, which needs no label
    loss              log p_y
    entropy           Σ p_c log p_c, minus the entropy
    modified_entropy  (1 - p_y) log p_y + Σ_{c≠y} p_c log(1 - p_c), minus the modified entropy
                      (Song & Mittal, USENIX Security 2021, arXiv 2003.10595)
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    own = F.one_hot(labels, logits.shape[1]).bool()
    top = log_p.argmax(1, keepdim=True)
    rest = log_p.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)  # of the top class: 1 - p may round to 0
    log_rest = torch.log(-torch.expm1(log_p)).scatter(1, top, rest)  # log(1 - p), (n, C)
    modified = torch.where(own, log_rest.exp() * log_p, p * log_rest).sum(1)
    return {
        "confidence": p.amax(1),
        "loss": log_p[own],
        "entropy": (p * log_p).sum(1),
        "modified_entropy": modified,
    }


def advantage(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """How well a threshold on scores (n,), (m,) tells members from others, to either side, in percent.

    auc  area under the ROC curve, of the side that is the better one: 50 is guessing
    tpr  members told at no more than 1 % false positives, of the better side

    Both sides count: an image whose loss is far too high for one never seen was as surely in D_f as one whose loss is
    too low.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    truth = np.r_[np.ones(len(members)), np.zeros(len(others))]
    found = np.r_[members, others]
    area = roc_auc_score(truth, found)
    hits = []
    for side in (found, -found):
        false, true, _ = roc_curve(truth, side)
        hits.append(true[false <= MOST_FALSE].max())
    return {"auc": 100 * max(area, 1 - area), "tpr": 100 * max(hits)}


def logistic_scores(members: np.ndarray, others: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a logistic attack on features (n, d), (m, d), each image's from a fit that did not see it.

    Cross-validated in 5 shuffled, stratified folds (fewer where there are fewer members, at least 2), classes weighted
    equally, features standardised. Quadratic terms let it tell both ends of a range from its middle.
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
    folds = StratifiedKFold(min(FOLDS, len(members), len(others)), shuffle=True, random_state=seed)
    found = cross_val_predict(fit, features, truth, cv=folds, method="decision_function")
    return found[: len(members)], found[len(members) :]


def inference(
    members: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Every attack of ATTACKS on logits and labels of D_f (members) and of images never trained on: see `advantage`.

    The logistic attack sees the four scores together; it is left out for a single member, which no fit can do without.
    """
    seen = [{name: s.cpu().numpy() for name, s in scores(*some).items()} for some in (members, others)]
    found = {name: advantage(seen[0][name], seen[1][name]) for name in seen[0]}
    if min(len(members[1]), len(others[1])) > 1:
        columns = [np.stack(list(one.values()), 1) for one in seen]
        found["logistic"] = advantage(*logistic_scores(*columns, seed))
    return found


def own_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y (n,) in double precision of logits (n, C) and labels (n,)."""
    return logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]


def likelihood_ratio(own: Tensor, references: Tensor) -> Tensor:
    """log of p(y|x, θ) / p(x) for each image (n,): how much likelier the model finds it than nets that never saw it.

    own (n,) and references (R, n) are log p_y of the model and of the reference nets. p(x), of the offline attack, is
    ((1 + a) · mean over references of p_y + 1 - a) / 2 with a = OFFLINE (Zarifzadeh et al. 2024, arXiv 2312.03262).
    """
    outside = references.logsumexp(0) - math.log(len(references))
    either_way = torch.log(((1 + OFFLINE) * outside.exp() + (1 - OFFLINE)) / 2)
    return own - either_way


def relative_scores(ratios: Tensor, population: Tensor) -> Tensor:
    """RMIA: the share of the population's images z (m,) with ratio(x) / ratio(z) ≥ γ, for each x (n,); 0 to 1.

    Both are logarithms, of `likelihood_ratio`. Zarifzadeh et al. 2024 (arXiv 2312.03262), γ = GAMMA.
    """
    below = population.sort().values
    return torch.searchsorted(below, ratios - math.log(GAMMA), right=True).double() / len(population)
