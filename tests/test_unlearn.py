"""Objective, methods and loop: values worked out by hand, and what each method must do to a net."""

import math

from conftest import CLASSES
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul import attack, importance, objective
from l2ul.common.errors import InputError
from l2ul.data.forget_set import random_new_labels
from l2ul.data.images import Split
from l2ul.methods import paper, registry
from l2ul.unlearn import Settings, unlearn

K, DRAWS = 3, 5  # three classes of five: a net that calls everything one class can forget them too
FAST = {"batch_size": 2, "adv_batch_size": 8, "unlearn_lr": 0.01}


@pytest.fixture
def request_(trained):
    """Model, D_f, D_adv and importance, as keyword arguments of `unlearn`."""
    model, images, labels = trained
    x, y = images[:K], labels[:K]
    adv = attack.adversarial_set(model, x, y, CLASSES, num_adv_images=DRAWS, eps=1.0, alpha=0.1, steps=20, seed=0)
    retain = Split(images[K:], labels[K:])
    weighed = importance.mas_importance(model, x)
    return {"model": model, "images": x, "labels": y, "adv": adv, "importance": weighed, "retain": retain}


def called(model, images):
    with torch.inference_mode():
        return model(images / 255).argmax(1)


def test_objective_equals_values_worked_out_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # probabilities (1/4, 3/4) and (1/2, 1/2)
    labels = torch.tensor([0, 1])
    ce = (math.log(4) + math.log(2)) / 2
    assert objective.forget_loss(logits, labels, "misclassify").item() == pytest.approx(-ce, rel=1e-6)
    assert objective.forget_loss(logits, labels, "relabel").item() == pytest.approx(ce, rel=1e-6)
    now, before = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([0.0, 4.0]), torch.tensor([[2.5]])]
    held = [torch.tensor([0.5, 1.0]), torch.tensor([[0.2]])]
    # ½ (0.5 · 1² + 1 · 2² + 0.2 · 0.5²)
    assert objective.importance_penalty(now, before, held).item() == pytest.approx(2.275, rel=1e-6)


def test_gradient_of_the_penalty_is_that_of_its_equation():
    generator = torch.Generator().manual_seed(0)
    now, before, held = ([torch.rand(shape, generator=generator) for shape in ((3, 2), (4,))] for _ in range(3))
    now = [weights.requires_grad_() for weights in now]
    expected = 0.5 * sum((w * (a - b).square()).sum() for a, b, w in zip(now, before, held, strict=True))
    gradients = torch.autograd.grad(3 * expected, now)
    found = torch.autograd.grad(3 * objective.importance_penalty(now, before, held), now)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(found, gradients, strict=True))


class Fixed(nn.Module):
    """Logits that are the pixels themselves: (n, C, 1, 1) in, (n, C) out."""

    def forward(self, x):
        return x.flatten(1)


def test_terms_of_each_method_equal_values_worked_out_by_hand():
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
        found = {term: value.item() for term, value in registry.get(name).terms(step).items()}
        assert found == pytest.approx(terms, rel=1e-6), name


def test_train_mode_normalises_each_batch_by_itself(trained):
    model, images, labels = trained
    one, two = objective.Batch(images[:4] / 255, labels[:4]), objective.Batch(images[4:20] / 255, labels[4:20])
    model.features[7].p = 0.0  # dropout would differ between the passes
    model.train()
    forgotten, kept = paper._joint_logits(model, one, two)
    assert torch.allclose(kept, model(two.images), atol=1e-5)
    assert torch.allclose(forgotten, model(one.images), atol=1e-5)
    model.eval()
    forgotten, kept = paper._joint_logits(model, one, two)
    assert torch.allclose(torch.cat([forgotten, kept]), model(images[:20] / 255), atol=1e-5)


@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", ["neggrad", "oracle", "adv", "adv_imp"])
def test_forgets_and_leaves_the_original_alone(request_, method, bn):
    original = {name: tensor.clone() for name, tensor in request_["model"].state_dict().items()}
    rows = []
    outcome = unlearn(method=method, **request_, settings=Settings(**FAST, bn=bn), on_step=rows.append)
    assert outcome.status == "forgotten"
    assert outcome.steps == len(outcome.curve) == len(rows) > 0
    assert (called(outcome.model, request_["images"]) != request_["labels"]).all()
    assert outcome.curve[-1]["acc_forget"] == 0
    assert all(row["acc_forget"] > 0 for row in outcome.curve[:-1])  # it stopped as soon as it could
    assert not outcome.model.training
    after = outcome.model.state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in request_["model"].state_dict().items())
    assert not torch.equal(original["head.weight"], after["head.weight"])
    kept = torch.equal(original["features.1.running_mean"], after["features.1.running_mean"])
    assert kept == (bn == "eval")


@pytest.mark.parametrize("method", ["correct", "oracle", "adv", "adv_imp"])
def test_relabels(request_, method):
    new = random_new_labels(request_["labels"], CLASSES, seed=0)
    outcome = unlearn(method=method, **request_, new_labels=new, settings=Settings(**FAST))
    assert outcome.status == "forgotten"
    assert torch.equal(called(outcome.model, request_["images"]), new)


def test_before_is_the_model_itself(request_):
    outcome = unlearn(method="before", **request_)
    assert (outcome.status, outcome.steps, outcome.curve) == ("done", 0, [])
    assert outcome.model is not request_["model"]
    for found, given in zip(outcome.model.parameters(), request_["model"].parameters(), strict=True):
        assert torch.equal(found, given)


def test_importance_holds_the_weights_that_do_not_matter_for_the_forgotten(request_):
    held = importance.held_weights(request_["importance"])
    given = dict(request_["model"].named_parameters())

    def moved(method):
        settings = Settings(batch_size=K, adv_batch_size=K * DRAWS, unlearn_lr=0.005, max_passes=6, reg_lamb=20.0)
        outcome = unlearn(method=method, **request_, settings=settings)
        assert (outcome.status, outcome.steps) == ("cap", 6)
        parameters = dict(outcome.model.named_parameters())
        return sum((parameters[n] - given[n])[held[n] > 0.5].square().sum().item() for n in held)

    assert 0 < moved("adv_imp") < 0.9 * moved("adv")


def test_one_step_is_sgd_on_the_objective(request_):
    settings = Settings(batch_size=K, adv_batch_size=K * DRAWS, unlearn_lr=0.01, max_passes=1, bn="eval")
    outcome = unlearn(method="adv", **request_, settings=settings)
    model, (adv, targets) = request_["model"], request_["adv"]
    share = K / (K + len(adv))
    loss = -share * F.cross_entropy(model(request_["images"] / 255), request_["labels"])
    loss = loss + (1 - share) * F.cross_entropy(model(adv), targets)
    gradient = torch.autograd.grad(loss, model.head.weight)[0] + 1e-4 * model.head.weight
    assert torch.allclose(outcome.model.head.weight, model.head.weight - 0.01 * gradient, atol=1e-7)


def test_gives_up_at_the_cap(request_):
    settings = Settings(batch_size=4, adv_batch_size=16, unlearn_lr=1e-9, max_passes=3)
    outcome = unlearn(method="adv", **request_, settings=settings)
    assert outcome.status == "cap"
    assert outcome.steps == 3 * math.ceil(K * DRAWS / 16)
    assert unlearn(method="neggrad", **request_, settings=settings).steps == 3 * math.ceil(K / 4)


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_numbers_that_are_no_longer_finite_end_the_run(request_, bn):
    settings = Settings(unlearn_lr=1e30, bn=bn)
    outcome = unlearn(method="neggrad", **(request_ | {"images": request_["images"][:1], "labels": torch.tensor([0])}))
    assert outcome.status == "forgotten"
    outcome = unlearn(method="adv", **request_, settings=settings)
    assert outcome.status == "diverged"
    assert outcome.steps < 10


def test_same_seed_same_weights(request_):
    def weights(seed):
        settings = Settings(**FAST, seed=seed, max_passes=2)
        return torch.cat([p.flatten() for p in unlearn(method="adv", **request_, settings=settings).model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_makes_what_a_method_needs_and_says_what_is_missing(trained):
    model, images, labels = trained
    asked = {"num_classes": CLASSES, "num_adv_images": 3, "eps": 1.0, "attack_steps": 5, "settings": Settings(**FAST)}
    assert unlearn(model, images[:3], labels[:3], "adv_imp", **asked).status == "forgotten"
    with pytest.raises(ValueError, match="num_classes"):
        unlearn(model, images[:3], labels[:3], "adv")
    with pytest.raises(ValueError, match="retain set"):
        unlearn(model, images[:3], labels[:3], "oracle")
    with pytest.raises(InputError, match="unknown method 'sgd'; expected one of before, neggrad"):
        unlearn(model, images[:3], labels[:3], "sgd")


def test_summary_of_each_method_is_one_line():
    ours = ["before", "neggrad", "correct", "rawp", "oracle", "adv", "adv_imp", "distill"]
    assert list(registry.METHODS)[: len(ours)] == ours
    assert all(method.summary and "\n" not in method.summary for method in registry.METHODS.values())


def test_methods_of_one_goal_are_refused_for_the_other(request_):
    new = random_new_labels(request_["labels"], CLASSES, seed=0)
    for method in ("neggrad", "rawp"):
        with pytest.raises(InputError, match=f"method {method} is not for the goal relabel; expected one of before"):
            unlearn(method=method, **request_, new_labels=new)
    with pytest.raises(InputError, match="method correct is not for the goal misclassify"):
        unlearn(method="correct", **request_)


def test_rawp_draws_noise_of_the_size_it_says_until_all_is_forgotten_or_the_cap(request_):
    settings = Settings(max_passes=40, noise_growth=0.2, seed=3)
    outcome = unlearn(method="rawp", **request_, settings=settings)
    assert outcome.status in ("forgotten", "cap")
    assert outcome.steps == len(outcome.curve) <= 40
    given = dict(request_["model"].named_parameters())
    sigma = 0.2 * outcome.steps
    for name, found in outcome.model.named_parameters():
        scale = given[name].square().mean().sqrt()
        if found.numel() >= 100:
            assert ((found - given[name]).std() / scale).item() == pytest.approx(sigma, rel=0.25)
    for name, buffer in outcome.model.named_buffers():
        assert torch.equal(buffer, dict(request_["model"].named_buffers())[name])
    again = unlearn(method="rawp", **request_, settings=settings)
    assert again.curve == outcome.curve
    capped = unlearn(method="rawp", **request_, settings=Settings(max_passes=2, noise_growth=1e-6))
    assert (capped.status, capped.steps) == ("cap", 2)
