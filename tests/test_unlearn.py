"""Objective, the paper's methods and the loop: hand-computed values, and the effect of each method on a model."""

from dataclasses import replace
import math

from conftest import CLASSES
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from l2ul import attack, importance, objective
from l2ul.common.errors import Diverged, InputError
from l2ul.data.forget_set import random_new_labels
from l2ul.data.images import Split
from l2ul.methods import paper, registry
from l2ul.methods.settings import AttackSettings, Settings
from l2ul.unlearn import unlearn

K, DRAWS = 3, 5  # D_f has three of five classes, so that a model which predicts one class can forget it
FAST = {"batch_size": 2, "adv_batch_size": 8, "unlearn_lr": 0.01}


@pytest.fixture
def inputs(trained):
    """Return model, D_f, D_adv, Ω and D_r as keyword arguments of `unlearn`."""
    model, images, labels = trained
    x, y = images[:K], labels[:K]
    adv = attack.adversarial_set(model, x, y, CLASSES, num_adv_images=DRAWS, eps=1.0, alpha=0.1, steps=20, seed=0)
    retain = Split(images[K:], labels[K:])
    omega = importance.mas_importance(model, x)
    return {"model": model, "images": x, "labels": y, "adv": adv, "importance": omega, "retain": retain}


def predict(model, images):
    with torch.inference_mode():
        return model(images / 255).argmax(1)


def test_objective_equals_hand_computed_values():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # probabilities (1/4, 3/4) and (1/2, 1/2)
    labels = torch.tensor([0, 1])
    ce = (math.log(4) + math.log(2)) / 2
    assert objective.forget_loss(logits, labels, "misclassify").item() == pytest.approx(-ce, rel=1e-6)
    assert objective.forget_loss(logits, labels, "relabel").item() == pytest.approx(ce, rel=1e-6)
    now, before = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([0.0, 4.0]), torch.tensor([[2.5]])]
    held = [torch.tensor([0.5, 1.0]), torch.tensor([[0.2]])]
    # ½ (0.5 · 1² + 1 · 2² + 0.2 · 0.5²)
    assert objective.importance_penalty(now, before, held).item() == pytest.approx(2.275, rel=1e-6)


def test_penalty_has_the_gradient_of_its_equation():
    generator = torch.Generator().manual_seed(0)
    now, before, held = ([torch.rand(shape, generator=generator) for shape in ((3, 2), (4,))] for _ in range(3))
    now = [weights.requires_grad_() for weights in now]
    expected = 0.5 * sum((w * (a - b).square()).sum() for a, b, w in zip(now, before, held, strict=True))
    gradients = torch.autograd.grad(3 * expected, now)
    custom = torch.autograd.grad(3 * objective.importance_penalty(now, before, held), now)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(custom, gradients, strict=True))


class Fixed(nn.Module):
    """Logits that are the pixels themselves: (n, C, 1, 1) in, (n, C) out."""

    def forward(self, x):
        return x.flatten(1)


def test_terms_of_each_method_equal_hand_computed_values():
    forget = objective.Batch(torch.tensor([[0.0, math.log(3.0)]]).view(1, 2, 1, 1), torch.tensor([0]))  # CE log 4
    kept = objective.Batch(torch.zeros(3, 2, 1, 1), torch.tensor([0, 1, 1]))  # CE log 2
    step = registry.Step(
        Fixed().eval(), "misclassify", forget, adv=kept, retain=kept, penalty=lambda: torch.tensor(7.0), reg_lamb=0.1
    )
    expected = {
        "neggrad": {"forget": -math.log(4)},
        "oracle": {"forget": -math.log(4), "retain": math.log(2)},
        "adv": {"forget": -math.log(4) / 4, "adv": math.log(2) * 3 / 4},
        "adv_imp": {"forget": -math.log(4) / 4, "adv": math.log(2) * 3 / 4, "importance": 0.7},
    }
    for name, terms in expected.items():
        values = {term: value.item() for term, value in registry.get(name).terms(step).items()}
        assert values == pytest.approx(terms, rel=1e-6), name


def test_batches_have_separate_passes_in_train_mode(trained):
    model, images, labels = trained
    forget, keep = objective.Batch(images[:4] / 255, labels[:4]), objective.Batch(images[4:20] / 255, labels[4:20])
    model.features[7].p = 0.0  # dropout would differ between the passes
    model.train()
    forget_logits, keep_logits = paper._joint_logits(model, forget, keep)
    assert torch.allclose(keep_logits, model(keep.images), atol=1e-5)
    assert torch.allclose(forget_logits, model(forget.images), atol=1e-5)
    model.eval()
    forget_logits, keep_logits = paper._joint_logits(model, forget, keep)
    assert torch.allclose(torch.cat([forget_logits, keep_logits]), model(images[:20] / 255), atol=1e-5)


@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", ["neggrad", "oracle", "adv", "adv_imp"])
def test_method_forgets_and_does_not_change_the_original_model(inputs, method, bn):
    original = {name: tensor.clone() for name, tensor in inputs["model"].state_dict().items()}
    rows = []
    outcome = unlearn(method=method, **inputs, settings=Settings(**FAST, bn=bn), on_step=rows.append)
    assert outcome.status == "forgotten"
    assert outcome.steps == len(outcome.curve) == len(rows) > 0
    assert (predict(outcome.model, inputs["images"]) != inputs["labels"]).all()
    assert outcome.curve[-1]["acc_forget"] == 0
    assert all(row["acc_forget"] > 0 for row in outcome.curve[:-1])  # it stops at the first step that forgets D_f
    assert not outcome.model.training
    after = outcome.model.state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in inputs["model"].state_dict().items())
    assert not torch.equal(original["head.weight"], after["head.weight"])
    statistics_kept = torch.equal(original["features.1.running_mean"], after["features.1.running_mean"])
    assert statistics_kept == (bn == "eval")


@pytest.mark.parametrize("method", ["correct", "oracle", "adv", "adv_imp"])
def test_method_relabels(inputs, method):
    new = random_new_labels(inputs["labels"], CLASSES, seed=0)
    outcome = unlearn(method=method, **inputs, new_labels=new, settings=Settings(**FAST))
    assert outcome.status == "forgotten"
    assert torch.equal(predict(outcome.model, inputs["images"]), new)


def test_before_returns_an_equal_copy(inputs):
    outcome = unlearn(method="before", **inputs)
    assert (outcome.status, outcome.steps, outcome.curve) == ("done", 0, [])
    assert outcome.model is not inputs["model"]
    for copied, original in zip(outcome.model.parameters(), inputs["model"].parameters(), strict=True):
        assert torch.equal(copied, original)


def test_penalty_holds_weights_that_do_not_matter_for_the_forget_set(inputs):
    held = importance.held_weights(inputs["importance"])
    original = dict(inputs["model"].named_parameters())

    def distance(method):
        settings = Settings(batch_size=K, adv_batch_size=K * DRAWS, unlearn_lr=0.005, max_passes=6, reg_lamb=20.0)
        outcome = unlearn(method=method, **inputs, settings=settings)
        assert (outcome.status, outcome.steps) == ("cap", 6)
        parameters = dict(outcome.model.named_parameters())
        return sum((parameters[n] - original[n])[held[n] > 0.5].square().sum().item() for n in held)

    assert 0 < distance("adv_imp") < 0.9 * distance("adv")


def test_a_step_is_sgd_on_the_objective(inputs):
    settings = Settings(batch_size=K, adv_batch_size=K * DRAWS, unlearn_lr=0.01, max_passes=1, bn="eval")
    outcome = unlearn(method="adv", **inputs, settings=settings)
    model, (adv, targets) = inputs["model"], inputs["adv"]
    share = K / (K + len(adv))
    loss = -share * F.cross_entropy(model(inputs["images"] / 255), inputs["labels"])
    loss = loss + (1 - share) * F.cross_entropy(model(adv), targets)
    gradient = torch.autograd.grad(loss, model.head.weight)[0] + 1e-4 * model.head.weight
    assert torch.allclose(outcome.model.head.weight, model.head.weight - 0.01 * gradient, atol=1e-7)


def test_loop_gives_up_at_the_cap(inputs):
    settings = Settings(batch_size=4, adv_batch_size=16, unlearn_lr=1e-9, max_passes=3)
    outcome = unlearn(method="adv", **inputs, settings=settings)
    assert outcome.status == "cap"
    assert outcome.steps == 3 * math.ceil(K * DRAWS / 16)
    assert unlearn(method="neggrad", **inputs, settings=settings).steps == 3 * math.ceil(K / 4)


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_loop_ends_if_a_number_is_not_finite(inputs, bn):
    settings = Settings(unlearn_lr=1e30, bn=bn)
    outcome = unlearn(method="neggrad", **(inputs | {"images": inputs["images"][:1], "labels": torch.tensor([0])}))
    assert outcome.status == "forgotten"
    outcome = unlearn(method="adv", **inputs, settings=settings)
    assert outcome.status == "diverged"
    assert outcome.steps < 10


def test_the_seed_decides_the_weights(inputs):
    def weights(seed):
        settings = Settings(**FAST, seed=seed, max_passes=2)
        return torch.cat([p.flatten() for p in unlearn(method="adv", **inputs, settings=settings).model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_missing_inputs_are_computed_or_reported(trained):
    model, images, labels = trained
    options = {"attack": AttackSettings(3, eps=1.0, iterations=5), "settings": Settings(**FAST)}
    options["num_classes"] = CLASSES
    assert unlearn(model, images[:3], labels[:3], "adv_imp", **options).status == "forgotten"
    with pytest.raises(ValueError, match="num_classes"):
        unlearn(model, images[:3], labels[:3], "adv")
    with pytest.raises(ValueError, match="retain set"):
        unlearn(model, images[:3], labels[:3], "oracle")
    with pytest.raises(InputError, match="unknown method 'sgd'; expected one of before, neggrad"):
        unlearn(model, images[:3], labels[:3], "sgd")


def test_d_adv_is_computed_with_the_attack_settings_and_the_seed(trained):
    model, images, labels = trained
    x, y = images[:3], labels[:3]
    settings = Settings(**FAST, max_passes=3, seed=5, first_position=2)
    size = {"num_adv_images": 2, "eps": 1.0, "alpha": 0.2, "steps": 4, "seed": 5, "first_position": 2}
    examples, targets = attack.adversarial_set(model, x, y, CLASSES, **size)
    rounded = (examples * 255).round().to(torch.uint8)

    def weights(**inputs):
        return parameters_to_vector(unlearn(model, x, y, "adv", settings=settings, **inputs).model.parameters())

    how = AttackSettings(2, eps=1.0, alpha=0.2, iterations=4)
    assert torch.equal(weights(num_classes=CLASSES, attack=how), weights(adv=(examples, targets)))
    how = replace(how, dtype="uint8")
    assert torch.equal(weights(num_classes=CLASSES, attack=how), weights(adv=(rounded, targets)))
    assert not torch.equal(weights(adv=(rounded, targets)), weights(adv=(examples, targets)))


def test_each_method_has_a_summary_of_one_line():
    ours = ["before", "neggrad", "correct", "rawp", "oracle", "adv", "adv_imp", "distill"]
    assert list(registry.METHODS)[: len(ours)] == ours
    assert all(method.summary and "\n" not in method.summary for method in registry.METHODS.values())


def test_a_method_of_another_goal_raises_input_error(inputs):
    new = random_new_labels(inputs["labels"], CLASSES, seed=0)
    for method in ("neggrad", "rawp"):
        with pytest.raises(InputError, match=f"method {method} does not support the goal relabel; expected one of"):
            unlearn(method=method, **inputs, new_labels=new)
    with pytest.raises(InputError, match="method correct does not support the goal misclassify"):
        unlearn(method="correct", **inputs)


def test_rawp_adds_noise_of_the_documented_size_until_d_f_is_forgotten_or_the_cap(inputs):
    settings = Settings(max_passes=40, noise_growth=0.2, seed=3)
    outcome = unlearn(method="rawp", **inputs, settings=settings)
    assert outcome.status in ("forgotten", "cap")
    assert outcome.steps == len(outcome.curve) <= 40
    original = dict(inputs["model"].named_parameters())
    sigma = 0.2 * outcome.steps
    for name, noisy in outcome.model.named_parameters():
        scale = original[name].square().mean().sqrt()
        if noisy.numel() >= 100:
            assert ((noisy - original[name]).std() / scale).item() == pytest.approx(sigma, rel=0.25)
    for name, buffer in outcome.model.named_buffers():
        assert torch.equal(buffer, dict(inputs["model"].named_buffers())[name])
    again = unlearn(method="rawp", **inputs, settings=settings)
    assert again.curve == outcome.curve
    capped = unlearn(method="rawp", **inputs, settings=Settings(max_passes=2, noise_growth=1e-6))
    assert (capped.status, capped.steps) == ("cap", 2)


def test_is_forgotten_compares_predictions_with_true_or_new_labels():
    predictions, labels = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1])
    assert objective.is_forgotten(predictions, labels, "misclassify").tolist() == [False, True, True]
    assert objective.is_forgotten(predictions, labels, "relabel").tolist() == [True, False, False]
    images, new_labels = torch.zeros(3, 3, 1, 1), torch.tensor([1, 1, 2])
    assert objective.Forget(images, labels).is_forgotten(predictions).tolist() == [False, True, True]
    assert objective.Forget(images, labels, new_labels).is_forgotten(predictions).tolist() == [False, True, True]


@pytest.mark.parametrize("goal", ["misclassify", "relabel"])
def test_loop_goes_on_until_the_predictions_measured_after_it_confirm_that_d_f_is_forgotten(inputs, goal):
    new = random_new_labels(inputs["labels"], CLASSES, seed=0) if goal == "relabel" else None
    options = {"method": "adv", "new_labels": new, "settings": Settings(**FAST)}
    at_once = unlearn(**inputs, **options)
    calls, unforgotten = [], inputs["labels"]

    def predict_after_two_more(model):
        calls.append(model)
        return unforgotten if len(calls) <= 2 else predict(model, inputs["images"])

    later = unlearn(**inputs, **options, predict=predict_after_two_more)
    assert (at_once.status, later.status) == ("forgotten", "forgotten")
    assert later.steps >= at_once.steps + 2
    assert len(calls) >= 3
    refused = later.curve[at_once.steps - 1]
    assert (refused["acc_forget"], refused["forgotten"]) == (100.0, 0.0)
    assert later.curve[: at_once.steps - 1] == at_once.curve[:-1]
    few = replace(options["settings"], max_passes=at_once.steps)
    never = unlearn(**inputs, **options | {"settings": few}, predict=lambda model: unforgotten)
    assert never.status == "cap"


def test_loop_ends_as_diverged_if_the_measured_logits_are_not_finite(inputs):
    def fail(model):
        raise Diverged("the logits of 1 of 3 images are not finite")

    assert unlearn(method="adv", **inputs, settings=Settings(**FAST), predict=fail).status == "diverged"


@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", ["neggrad", "oracle", "adv", "adv_imp", "distill"])
def test_gradients_of_separate_terms_add_up_to_those_of_the_loss(inputs, method, bn, monkeypatch):
    inputs["model"].features[7].p = 0.0  # dropout draws in the order of the forward passes, which stays the same
    steps = {"max_passes": 2, "distill_steps": 3, "distill_cycles": 1, "distill_mixes": 6, "distill_lr": 1e-4}
    settings = Settings(**FAST | {"unlearn_lr": 1e-4}, bn=bn, reg_lamb=2.0, **steps)
    ours = unlearn(method=method, **inputs, settings=settings)

    def backward(loop, terms):
        loop.procedure.optimizer.zero_grad()
        sum(terms.values()).backward()

    monkeypatch.setattr("l2ul.unlearn._Loop._backward", backward)
    plain = unlearn(method=method, **inputs, settings=settings)
    assert (ours.status, ours.steps) == (plain.status, plain.steps)
    one, other = (parameters_to_vector(outcome.model.parameters()) for outcome in (ours, plain))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    counts = [outcome.model.state_dict()["features.1.num_batches_tracked"] for outcome in (ours, plain)]
    assert counts[0] == counts[1]


def test_noise_has_the_numbers_of_the_generator_whatever_computes_it(inputs):
    parameters = [parameter.detach().clone() for parameter in inputs["model"].parameters()]
    noise = paper.WeightNoise(parameters, 0.1, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    original = [parameter.clone() for parameter in parameters]
    for draw in (1, 2):
        noise()
        for parameter, weights in zip(parameters, original, strict=True):
            drawn = torch.randn(weights.shape, generator=generator)
            assert torch.equal(parameter, weights + 0.1 * draw * weights.square().mean().sqrt() * drawn)


class ShortOfMemory(nn.Module):
    """A model that has no memory for more than `limit` images at a time. `refused` counts the calls of all copies."""

    refused = 0

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, images):
        if len(images) > self.limit:
            ShortOfMemory.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(images)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        *((method, {}) for method in ("neggrad", "oracle", "adv", "adv_imp", "distill")),
        ("distill", {"robust": 1, "robust_pool": 8, "robust_images": 0}),
    ],
)
def test_a_step_without_memory_for_its_batches_is_repeated_in_parts_with_the_same_result(inputs, method, changed):
    steps = {"max_passes": 2, "distill_steps": 3, "distill_cycles": 1, "distill_mixes": 16, "distill_lr": 1e-4}
    steps |= changed
    settings = Settings(batch_size=K, adv_batch_size=16, unlearn_lr=1e-4, reg_lamb=2.0, bn="eval", **steps)
    inputs["importance"] = {f"model.{name}": omega for name, omega in inputs["importance"].items()}
    before = ShortOfMemory.refused
    limits = 1000, 2 if method == "neggrad" else 8
    models = (ShortOfMemory(inputs["model"], limit) for limit in limits)
    whole, parts = (unlearn(method=method, **inputs | {"model": model}, settings=settings) for model in models)
    assert ShortOfMemory.refused > before
    assert (parts.status, parts.steps) == (whole.status, whole.steps)
    assert parts.curve[0] == pytest.approx(whole.curve[0], rel=1e-4, abs=1e-6)
    share = 0.2 if method == "distill" else 1e-3  # Adam turns a gradient of rounding errors into a whole step
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert other == pytest.approx(one, rel=share, abs=1e-6)
    start, one, other = (parameters_to_vector(net.parameters()) for net in (inputs["model"], whole.model, parts.model))
    assert (one - other).norm() <= share * (one - start).norm()


def test_batches_stay_whole_where_parts_would_give_another_result(inputs):
    inputs["importance"] = None
    short = ShortOfMemory(inputs["model"], 8)
    with pytest.raises(torch.OutOfMemoryError):  # statistics of batch-norm are those of the batch
        unlearn(method="adv", **inputs | {"model": short}, settings=Settings(batch_size=K, adv_batch_size=16))
