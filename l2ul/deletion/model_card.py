"""The model card of a request: what was forgotten in numbers, never which images."""

from l2ul.deletion import states
from l2ul.deletion.deployed_model import BUILT
from l2ul.deletion.report_schema import AS_STORED, AS_USED, Report
from l2ul.deletion.states import readable_time
from l2ul.experiments.model_card import CHANGED, UNIFORM, Card, Table, library_of, method_sentence, opening
from l2ul.methods import registry
from l2ul.methods.settings import has_effect


def of_report(report: Report, weights_sha256: str, file: str | None) -> Card:
    """Return the card of a model from its report, which may lack what is known only after the model was written.

    weights_sha256  of the unlearned weights, `UNIFORM`
    file            name of the file of the model; None for a folder
    """
    counts, request, tool = states.count(report["images"]), report["asked"], report["tool"]
    relabel = request["goal"] == "relabel"
    counted = request.get("counted")  # None in reports of earlier versions
    now = "predicts their new label" if relabel else "does not"
    how = {None: "", AS_STORED: f" {AS_STORED}", AS_USED: f" {AS_USED}, {CHANGED}"}
    rows = [(f"forgotten{how[counted]}: the original model predicted their label, this one {now}", counts.forgotten)]
    other, number = (AS_STORED, counts.as_stored) if counted == AS_USED else (AS_USED, counts.as_used)
    if number is not None:
        rows.append((f"forgotten{how[other]}", number))
    rows += [
        ("not recognised by the original model", counts.not_recognised),
        (f"still recognised{f' {AS_USED}' if counted == AS_USED else ''}", counts.still_recognised),
    ]
    rows += [
        (f"earlier request of {readable_time(row['made'])}: forgotten then", f"{row['forgotten']} of {row['images']}")
        for row in report["earlier"]
    ]
    damage = [
        (f"{row['count']} {row['name']}", f"{row['percent']:.1f} %", f"{row['low']:.1f} to {row['high']:.1f} %")
        for row in report["damage"]
    ]
    chosen = report["chosen"] or {}
    settings = {
        name: value
        for name, value in registry.loop_settings(request["method"], chosen).items()
        if has_effect(name, chosen)
    }
    method = method_sentence(request["method"], request["seed"], settings)
    opened_by, num_classes = report["model"]["opened_by"], len(report["model"]["classes"])
    model, statistics = opened_by["model"], (opened_by["mean"], opened_by["std"])
    return Card(
        title="Classifier after a deletion request",
        introduction=f"This model was trained on images that it has to {'relabel' if relabel else 'forget'}. It is the "
        f"result of a request with {tool['name']} {tool['version']}, carried out {readable_time(report['made'])}. Its "
        f"report, which is not public, names the images by their hashes.",
        outcome=counts.outcome + (f", {counted}" if counted and not counts.nothing_to_remove else ""),
        tables=[Table(("images of the request", "number"), rows)]
        + ([Table(("images", "agreement with the original model", "95 % interval"), damage)] if damage else []),
        method=method if chosen else "The weights are those of the original model.",
        hashes={
            f"original, {UNIFORM}": report["model"]["before"]["weights_sha256"],
            f"this model, {UNIFORM}": weights_sha256,
        },
        limits=report["not_claimed"],
        opening=opening(model, num_classes, file, *statistics) if file and model != BUILT else "",
        library=None if file else library_of(model),
    )
