"""What `--evaluate` adds to a record: groups of metrics that need more than the classes that a model calls images."""

from collections.abc import Callable

import torch

from l2ul import membership
from l2ul.measuring import Evaluation, Measured

EVALUATIONS: dict[str, Evaluation] = {}


def evaluation(name: str, *metrics: str) -> Callable[[Callable], Callable]:
    """Register the function below as the group `name`; its docstring's first line is its summary."""

    def register(compute: Callable[[Measured], dict[str, float]]) -> Callable:
        EVALUATIONS[name] = Evaluation(metrics, compute, compute.__doc__.split("\n")[0])
        return compute

    return register


def summaries() -> str:
    """What each group is, in one line for all of them."""
    found = "; ".join(f"{name}: {group.summary}" for name, group in EVALUATIONS.items())
    return f"measure more: {found} (default: accuracies alone)"


@evaluation("membership", *(f"metric_mia_{attack}_{what}" for attack in membership.ATTACKS for what in ("auc", "tpr")))
def member_inference(measured: Measured) -> dict[str, float]:
    """whether outputs tell D_f from D_test: AUC, and hits at 1 in 100 false positives, of five attacks

    In percent: 50 and 1 are guessing. Either side counts, so that too much forgetting is as visible as too little.
    """
    forget, test = ((measured.logits(part), measured.labels[part]) for part in ("forget", "test"))
    found = membership.inference(forget, test)
    return {f"metric_mia_{attack}_{what}": value for attack, row in found.items() for what, value in row.items()}


@evaluation("distance", "metric_distance")
def parameter_distance(measured: Measured) -> dict[str, float]:
    """how far the weights moved: ‖θ - θ⁰‖ / ‖θ⁰‖, over all parameters"""
    now, before = (
        torch.cat([parameter.detach().double().flatten().cpu() for parameter in model.parameters()])
        for model in (measured.model, measured.original)
    )
    return {"metric_distance": float((now - before).norm() / before.norm())}
