"""The functions behind `--evaluate`: each computes the metrics of one group of `registry.EVALUATIONS` for one run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul.common import activations, seeds
from l2ul.data.images import as_pixels, batches
from l2ul.metrics import accuracy, agreement, membership, relearn, retrain_gap, robustness
from l2ul.metrics import near_duplicates as duplicates
from l2ul.metrics.registry import GAPS, RunOutputs
from l2ul.objective import Forget

NUM_HELD_OUT, HELD_OUT_SEED = 512, 2**32 - 1  # examples of the group agreement; no run has this seed
NUM_SAMPLED = 1024  # images of D_r, on which batch-norm is recalibrated and the model fine-tuned
NUM_NEAREST, NEAR_NOISE, NOISY_COPIES = 10, 0.05, 8  # of the group overforgetting
PARTS = ("forget", "retain", "test")


def membership_inference(outputs: RunOutputs) -> dict[str, float]:
    """Compute AUC and true-positive rate of each membership inference attack, in percent.

    Members are D_f, non-members D_test. Guessing achieves an AUC of 50 and a rate of 1. 100 means that the attack
    separates D_f from D_test perfectly. See `membership.advantage`. The logistic attack is absent for a single image.
    """
    attacks = _membership_attacks(outputs, outputs.logits)
    return {f"metric_mia_{attack}_{name}": value for attack, row in attacks.items() for name, value in row.items()}


def parameter_distance(outputs: RunOutputs) -> dict[str, float]:
    """Compute ‖θ - θ⁰‖ / ‖θ⁰‖ over all parameters: at least 0, and 0 for `before`."""
    return {"metric_distance": _relative_distance(outputs.model, outputs.original)}


def retrain_gaps(outputs: RunOutputs) -> dict[str, float]:
    """Compare the unlearned model with the retrained model.

    metric_gap_…               absolute difference in percentage points: accuracy on D_f, D_r and D_test, and AUC of the
                               logistic membership attack (of the confidence attack for a single image)
    metric_average_gap         mean of these four, as in Fan et al. 2024 (SalUn, arXiv 2310.12508)
    metric_tow                 tug of war, see `retrain_gap.tug_of_war`
    metric_js_…                Jensen-Shannon divergence of the outputs in bits, see `retrain_gap.js_divergence`
    metric_cka_…               similarity of the features, see `retrain_gap.feature_similarity`
    metric_distance_retrained  ‖θ - θ'‖ / ‖θ'‖ with the retrained model's weights θ'

    For the retrained model itself, tug of war and CKA are 1 and everything else is 0.
    """
    retrained = outputs.retrained
    gaps = [
        abs(accuracy.accuracy(outputs.after[part], labels) - accuracy.accuracy(retrained.classes(part), labels))
        for part, labels in ((part, outputs.labels[part]) for part in PARTS)
    ]
    area = outputs.once("membership attack on the retrained model", lambda: _attack_auc(outputs, retrained.logits))
    result = dict(zip(GAPS, (*gaps, abs(_attack_auc(outputs, outputs.logits) - area)), strict=True))
    result["metric_average_gap"] = sum(result.values()) / len(result)
    result["metric_tow"] = retrain_gap.tug_of_war(gaps)
    for part in ("forget", "test"):
        result[f"metric_js_{part}"] = retrain_gap.js_divergence(outputs.logits(part), retrained.logits(part))
    images = retrain_gap.comparison_images(outputs.split("forget"), outputs.split("test"))
    similarity = retrain_gap.feature_similarity(retrained.model, outputs.model, images)
    result |= {f"metric_cka_{part}": value for part, value in similarity.items()}
    return result | {"metric_distance_retrained": _relative_distance(outputs.model, retrained.model)}


def relative_membership_inference(outputs: RunOutputs) -> dict[str, float]:
    """Compute AUC and true-positive rate of RMIA in percent, calibrated with the reference models.

    Members are D_f, non-members the test images of odd index. The test images of even index are the attack's
    population. As in `membership_inference`, guessing achieves an AUC of 50 and a rate of 1.
    """
    ratios = {}
    for part in ("forget", "test"):
        labels = outputs.labels[part]
        references = [membership.label_log_probability(model.logits(part), labels) for model in outputs.references]
        own = membership.label_log_probability(outputs.logits(part), labels)
        ratios[part] = membership.likelihood_ratio(own, torch.stack(references))
    population, others = ratios["test"][::2], ratios["test"][1::2]
    scores = (membership.relative_scores(some, population).numpy() for some in (ratios["forget"], others))
    return {f"metric_rmia_{name}": value for name, value in membership.advantage(*scores).items()}


def relearning_speed(outputs: RunOutputs) -> dict[str, float]:
    """Count the steps of fine-tuning on D_f until its accuracy is that of the original model again.

    0 for `before`, `relearn.MAX_STEPS` if the accuracy is not reached earlier. See `relearn.steps_to_relearn`. A model
    that takes far fewer steps than the retrained model still contains information about D_f.
    """
    target = accuracy.accuracy(outputs.before["forget"], outputs.labels["forget"])
    images, labels = _forget_set(outputs)
    result = {"metric_relearn_steps": relearn.steps_to_relearn(outputs.model, images, labels, target)}
    if outputs.retrained:
        result["metric_relearn_steps_retrained"] = outputs.once(
            "relearning of the retrained model",
            lambda: relearn.steps_to_relearn(outputs.retrained.model, images, labels, target),
        )
    return result


def near_duplicates(outputs: RunOutputs) -> dict[str, float]:
    """Count the images of D_r that are near-duplicates of an image of D_f.

    A model that is trained on near-duplicates classifies D_f correctly without having seen it. The count depends on
    the data alone.
    """

    def count() -> int:
        forget, retain = outputs.split("forget").pixels(), outputs.split("retain").images
        return duplicates.count_near_duplicates(forget, retain, outputs.device, workers=outputs.workers)

    return {"metric_near_duplicates": outputs.once("near-duplicates", count)}


def agreement_with_original(outputs: RunOutputs) -> dict[str, float]:
    """Compute the agreement with the original model on held-out adversarial examples, in percent: 100 for `before`.

    The examples are made from mixes of D_f, see `agreement.held_out`. No method trains on them, and no image of D_r is
    needed.
    """

    def make() -> agreement.Probe:
        images, _ = _forget_set(outputs)
        num_classes = outputs.logits("forget").shape[1]
        return agreement.held_out(outputs.original, images, num_classes, count=NUM_HELD_OUT, seed=HELD_OUT_SEED)

    probe = outputs.once("held-out examples", make)
    return {"metric_answers_kept": agreement.measure(outputs.model, probe).percent}


def robustness_as_used(outputs: RunOutputs) -> dict[str, float]:
    """Compute which part of D_f is forgotten as used, in percent, and the rate of each change.

    See `robustness.as_used`. Batch-norm is recalibrated on images of D_r. The rate of a change of images is the share
    of changed copies that are forgotten, that of a change of the model the share of images.
    """
    images, labels = _forget_set(outputs)
    new_labels = outputs.new_labels.to(outputs.device) if outputs.new_labels is not None else None
    others, _ = _sample_of_retain(outputs)
    used = robustness.as_used(outputs.model, Forget(as_pixels(images), labels, new_labels), others)
    rates = {f"metric_forgotten_{change}": value for change, value in used.rates().items()}
    return {"metric_forgotten_as_used": 100 * float(used.forgotten.double().mean()), **rates}


def recalibration(outputs: RunOutputs) -> dict[str, float]:
    """Compute the accuracy on D_f and D_test after batch-norm is recalibrated on images of D_r, in percent.

    An unlearning that relies on the old statistics is undone by new ones. See `robustness.recalibrated`.
    metric_recalibrated_mixes is the accuracy on D_f after a recalibration on mixes of D_f, which needs no other images.
    """
    others, _ = _sample_of_retain(outputs)
    model = robustness.recalibrated(outputs.model, others)
    pixels = as_pixels(_forget_set(outputs)[0])
    on_mixes = robustness.recalibrated(outputs.model, robustness.stand_ins(pixels))
    predictions = {
        "forget": accuracy.predict(model, pixels),
        "mixes": accuracy.predict(on_mixes, pixels),
        "test": accuracy.predict(model, outputs.split("test").images, workers=outputs.workers),
    }
    labels = {"mixes": outputs.labels["forget"], **outputs.labels}
    return {f"metric_recalibrated_{name}": accuracy.accuracy(one, labels[name]) for name, one in predictions.items()}


def overforgetting(outputs: RunOutputs) -> dict[str, float]:
    """Compute the agreement with the original model on images near D_f, in percent: 100 for `before`.

    metric_near_test   on the NUM_NEAREST test images of the same class that are nearest to each image of D_f, by the
                       cosine similarity of the original model's features before its last layer
    metric_near_noise  on D_f with Gaussian noise of a standard deviation of NEAR_NOISE, NOISY_COPIES of each image
    """
    near = outputs.once("nearest test images", lambda: _nearest_test_images(outputs))
    device = outputs.device
    generator = seeds.generator(HELD_OUT_SEED, "near noise")
    pixels = as_pixels(outputs.split("forget").pixels().cpu()).repeat(NOISY_COPIES, 1, 1, 1)
    noisy = (pixels + NEAR_NOISE * torch.randn(pixels.shape, generator=generator)).clamp(0, 1).to(device)
    same = accuracy.predict(outputs.model, noisy) == accuracy.predict(outputs.original, noisy)
    kept = outputs.after["test"][near] == outputs.before["test"][near]
    return {
        name: 100 * float(part.double().mean())
        for name, part in (("metric_near_test", kept), ("metric_near_noise", same))
    }


@torch.no_grad()
def _nearest_test_images(outputs: RunOutputs) -> Tensor:
    """Return the indices of the test images nearest to D_f, each once."""
    model, device = outputs.original, outputs.device
    last = list(activations.layers(model, as_pixels(outputs.split("forget").pixels()[:1].to(device))))[-1:]

    def features(part: str) -> Tensor:
        images = outputs.split(part).images
        size = accuracy.default_batch_size(device, outputs.split(part).side)
        loaded = batches(images, size, device, outputs.workers)
        return torch.cat(
            [F.normalize(activations.logits_and_inputs(model, one, last)[1][0].flatten(1)) for one in loaded]
        )

    similarity = (features("forget") @ features("test").T).cpu()
    similarity[outputs.labels["forget"][:, None] != outputs.labels["test"]] = -2.0
    nearest = similarity.topk(min(NUM_NEAREST, similarity.shape[1]))
    return nearest.indices[nearest.values > -2.0].unique()


def fine_tuning(outputs: RunOutputs) -> dict[str, float]:
    """Compute the accuracy on D_f after a short fine-tuning on images of D_r, in percent.

    See `relearn.recognised_after_tuning`. Information about D_f that is hidden, and not removed, comes back.
    """
    others = (one.to(outputs.device) for one in _sample_of_retain(outputs))
    return {"metric_tuned_forget": relearn.recognised_after_tuning(outputs.model, *_forget_set(outputs), *others)}


def _forget_set(outputs: RunOutputs) -> tuple[Tensor, Tensor]:
    """Return the images of D_f as they are stored and their labels, on the device of the models."""
    return outputs.split("forget").pixels().to(outputs.device), outputs.labels["forget"].to(outputs.device)


def _sample_of_retain(outputs: RunOutputs) -> tuple[Tensor, Tensor]:
    """Return images of D_r, drawn at random and once for all runs with this D_f, and their labels."""

    def sample() -> tuple[Tensor, Tensor]:
        retain = outputs.split("retain")
        drawn = torch.randperm(len(retain), generator=seeds.generator(HELD_OUT_SEED, "recalibration"))
        chosen = retain.subset(drawn[:NUM_SAMPLED])
        return chosen.pixels(), chosen.labels

    return outputs.once("images of D_r", sample)


def _membership_attacks(outputs: RunOutputs, logits: Callable[[str], Tensor]) -> dict[str, dict[str, float]]:
    return membership.inference(*((logits(part), outputs.labels[part]) for part in ("forget", "test")))


def _attack_auc(outputs: RunOutputs, logits: Callable[[str], Tensor]) -> float:
    attacks = _membership_attacks(outputs, logits)
    return attacks.get("logistic", attacks["confidence"])["auc"]


def _relative_distance(model: nn.Module, origin: nn.Module) -> float:
    now, then = (
        torch.cat([parameter.detach().cpu().double().flatten() for parameter in net.parameters()])
        for net in (model, origin)
    )
    return float((now - then).norm() / then.norm())
