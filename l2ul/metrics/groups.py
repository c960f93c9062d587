"""What `--evaluate` adds to a record: groups of metrics that need more than the classes that a model calls images."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from l2ul.common import choices
from l2ul.data import near_duplicates as duplicates
from l2ul.metrics import accuracy as evaluate
from l2ul.metrics import agreement, membership, relearn, retrain_gap
from l2ul.metrics.registry import Evaluation, Measured

EVALUATIONS: dict[str, Evaluation] = {}
HELD_OUT, HELD_OUT_SEED = 512, 2**32 - 1  # examples of the group agreement; no user's seed is this one


def evaluation(
    name: str, *metrics: str, to_retrained: tuple[str, ...] = (), to_references: tuple[str, ...] = ()
) -> Callable[[Callable], Callable]:
    """Register the function below as the group `name`; its docstring's first line is its summary.

    metrics  what it gives of any run; to_…  what it gives where a retrained net, or reference nets, are there too
    """
    against = dict.fromkeys(to_retrained, "retrained_sha256") | dict.fromkeys(to_references, "references_sha256")

    def register(compute: Callable[[Measured], dict[str, float]]) -> Callable:
        summary = choices.EVALUATIONS.setdefault(name, compute.__doc__.split("\n")[0])
        EVALUATIONS[name] = Evaluation((*metrics, *against), compute, summary, against)
        return compute

    return register


def outdated(record: dict[str, object], against: dict[str, str]) -> set[str]:
    """The metrics that a record has against other nets than these (see `Peers.described`), or would have."""
    changed = {key for key, value in against.items() if record.get(key) != value}
    return {name for group in EVALUATIONS.values() for name, key in group.against.items() if key in changed}


@evaluation("membership", *(f"metric_mia_{attack}_{what}" for attack in membership.ATTACKS for what in ("auc", "tpr")))
def member_inference(measured: Measured) -> dict[str, float]:
    """whether outputs tell D_f from D_test: AUC, and hits at 1 in 100 false positives, of five attacks

    In percent: 50 and 1 are guessing. Either side counts, so that too much forgetting is as visible as too little.
    """
    found = _inference(measured, measured.logits)
    return {f"metric_mia_{attack}_{what}": value for attack, row in found.items() for what, value in row.items()}


def _inference(measured: Measured, logits: Callable[[str], Tensor]) -> dict[str, dict[str, float]]:
    return membership.inference(*((logits(part), measured.labels[part]) for part in ("forget", "test")))


@evaluation("distance", "metric_distance")
def parameter_distance(measured: Measured) -> dict[str, float]:
    """how far the weights moved: ‖θ - θ⁰‖ / ‖θ⁰‖, over all parameters"""
    return {"metric_distance": _distance(measured.model, measured.original)}


def _distance(model: nn.Module, origin: nn.Module) -> float:
    now, then = (
        torch.cat([parameter.detach().double().flatten().cpu() for parameter in net.parameters()])
        for net in (model, origin)
    )
    return float((now - then).norm() / then.norm())


PARTS = ("forget", "retain", "test")
GAPS = tuple(f"metric_gap_{what}" for what in (*PARTS, "mia"))


@evaluation(
    "retrained",
    to_retrained=(
        *GAPS,
        *("metric_average_gap", "metric_tow", "metric_js_forget", "metric_js_test"),
        *("metric_cka_forget", "metric_cka_test", "metric_distance_retrained"),
    ),
)
def gaps_to_retrained(measured: Measured) -> dict[str, float]:
    """how far the net is from the one of --retrained: in accuracies, attack, outputs, features and weights

    Gaps are absolute, in points: accuracy on D_f, D_r and D_test, and the AUC of the logistic membership attack (of the
    confidence, for one image). Their mean is the average gap of Fan et al. 2024 (SalUn, arXiv 2310.12508). See
    `retrained` for tug of war, divergence and CKA. Of the retrained net itself: 0, but 1 of tug of war and CKA.
    """
    other = measured.retrained
    gaps = [
        abs(evaluate.accuracy(measured.after[part], true) - evaluate.accuracy(other.classes(part), true))
        for part, true in ((part, measured.labels[part]) for part in PARTS)
    ]
    area = measured.once("attack on the retrained net", lambda: _area(measured, other.logits))
    found = dict(zip(GAPS, (*gaps, abs(_area(measured, measured.logits) - area)), strict=True))
    found["metric_average_gap"] = sum(found.values()) / len(found)
    found["metric_tow"] = retrain_gap.tug_of_war(gaps)
    for part in ("forget", "test"):
        found[f"metric_js_{part}"] = retrain_gap.divergence(measured.logits(part), other.logits(part))
    splits = retrain_gap.compared(measured.split("forget"), measured.split("test"))
    alike = retrain_gap.alikeness(other.model, measured.model, splits)
    found |= {f"metric_cka_{part}": value for part, value in alike.items()}
    return found | {"metric_distance_retrained": _distance(measured.model, other.model)}


def _area(measured: Measured, logits: Callable[[str], Tensor]) -> float:
    found = _inference(measured, logits)
    return found.get("logistic", found["confidence"])["auc"]


@evaluation("rmia", to_references=("metric_rmia_auc", "metric_rmia_tpr"))
def relative_inference(measured: Measured) -> dict[str, float]:
    """a stronger attack (RMIA), for which --references show what nets that never saw D_f make of an image

    AUC and hits at 1 in 100 false positives, in percent, to the better side, as of `membership`: 50 and 1 are guessing.
    Members are D_f, non-members the test images of odd number; those of even number are the attack's population.
    """
    ratios = {}
    for part in ("forget", "test"):
        labels = measured.labels[part]
        references = [membership.own_probability(net.logits(part), labels) for net in measured.references]
        own = membership.own_probability(measured.logits(part), labels)
        ratios[part] = membership.likelihood_ratio(own, torch.stack(references))
    population, others = ratios["test"][::2], ratios["test"][1::2]
    scores = (membership.relative_scores(some, population).numpy() for some in (ratios["forget"], others))
    return {f"metric_rmia_{what}": value for what, value in membership.advantage(*scores).items()}


@evaluation("relearn", "metric_relearn_steps", to_retrained=("metric_relearn_steps_retrained",))
def relearning(measured: Measured) -> dict[str, float]:
    """steps of fine-tuning on D_f until the net calls as much of it right as the original did (see `relearn`)

    Far fewer than the net of --retrained takes: the net still holds something of D_f.
    """
    accuracy = evaluate.accuracy(measured.before["forget"], measured.labels["forget"])
    device = next(measured.model.parameters()).device
    images, labels = measured.split("forget").pixels().to(device), measured.labels["forget"].to(device)
    found = {"metric_relearn_steps": relearn.steps_to_relearn(measured.model, images, labels, accuracy)}
    if measured.retrained:
        found["metric_relearn_steps_retrained"] = measured.once(
            "relearning of the retrained net",
            lambda: relearn.steps_to_relearn(measured.retrained.model, images, labels, accuracy),
        )
    return found


@evaluation("duplicates", "metric_near_duplicates")
def near_duplicates(measured: Measured) -> dict[str, float]:
    """how many images of D_r are nearly the same as one of D_f: a net trained on those knows D_f unseen"""

    def count() -> int:
        device = next(measured.model.parameters()).device
        forget, retain = measured.split("forget").pixels(), measured.split("retain").images
        return duplicates.count_near_duplicates(forget, retain, device, workers=measured.workers)

    return {"metric_near_duplicates": measured.once("near-duplicates", count)}


@evaluation("agreement", "metric_answers_kept")
def answers_as_before(measured: Measured) -> dict[str, float]:
    """percent of held-out adversarial examples of mixes of D_f that the net calls what the original called them

    Needs no image of D_r; no run trains on these examples.
    """
    original = measured.original
    device = next(original.parameters()).device

    def make() -> agreement.Probe:
        images = measured.split("forget").pixels().to(device)
        return agreement.held_out(
            original, images, measured.logits("forget").shape[1], count=HELD_OUT, seed=HELD_OUT_SEED
        )

    return {"metric_answers_kept": agreement.kept(measured.model, measured.once("held-out examples", make)).percent}
