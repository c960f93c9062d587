"""`distill` with robust=1: copies of D_f, what decides that the loop may stop, and its effect on models."""

import copy
from dataclasses import replace

import pytest
import torch

from l2ul.methods import robust
from l2ul.methods.monitor import ForgetMonitor
from l2ul.methods.registry import get
from l2ul.methods.stand_ins import Synthesis
from l2ul.metrics import robustness
from l2ul.objective import Forget, margin_loss
from l2ul.unlearn import Settings, unlearn

K = 3
FAST = Settings(
    distill_steps=60,
    distill_mixes=8,
    distill_lr=3e-3,
    distill_forget=8,
    robust=1,
    robust_pool=16,
    robust_images=12,
)


@pytest.fixture(autouse=True)
def _fast_synthesis(monkeypatch):
    monkeypatch.setattr(robust, "ITERATIONS", 10)


@pytest.fixture
def forget(trained):
    _, images, labels = trained
    return Forget(images[:K] / 255, labels[:K])


def procedure(model, forget, settings, surrogate=None):
    monitor = ForgetMonitor(model, forget, None)
    return robust.RobustProcedure(get("distill"), model, forget, settings, monitor, Synthesis(), surrogate)


def test_more_copies_are_forgotten_than_without(trained):
    model, images, labels = trained
    forget, copies = Forget(images[:K] / 255, labels[:K]), {}
    for value in (0, 1):
        outcome = unlearn(model, images[:K], labels[:K], "distill", settings=replace(FAST, robust=value))
        copies[value] = float(robustness.as_used(outcome.model, forget).copies.mean())
        assert outcome.status == "forgotten"
    assert copies[1] > max(0.94, copies[0])


def test_a_step_trains_on_the_worst_of_the_pool(trained, forget):
    model = trained[0]
    steps = procedure(model, forget, replace(FAST, distill_forget=4, robust_pool=30, robust_adversarial=0.0))
    inputs = steps.draw()
    batch = steps._step(*inputs).forget
    images, labels = forget.images[inputs[0]], forget.labels[inputs[0]]
    images = torch.cat([images[:3], steps.changes.make(images[3:], inputs[1])])
    assert labels.bincount(minlength=2).sum() == 30
    ahead = model(images).gather(1, labels[:, None])[:, 0] - model(images).scatter(1, labels[:, None], -1e9).amax(1)
    used = model(batch.images).gather(1, batch.labels[:, None])[:, 0]
    used = used - model(batch.images).scatter(1, batch.labels[:, None], -1e9).amax(1)
    assert used.sort().values.tolist() == pytest.approx(ahead.topk(4).values.sort().values.tolist(), abs=1e-4)


def test_the_weight_grows_while_copies_are_recognised_and_the_margin_until_half_of_the_cycle(trained, forget):
    steps = procedure(trained[0], forget, replace(FAST, distill_steps=4, distill_growth=16.0 / 3, robust_margin=2.3))
    taken = [steps.next_step() for _ in range(5)]
    assert [float(step.forget_weight) for step in taken] == pytest.approx([2, 4, 8, 16, 32])
    assert [step.margin for step in taken] == pytest.approx([0.3, 1.3, 2.3, 2.3, 0.3])
    tolerant = procedure(trained[0], forget, replace(FAST, robust_tolerance=1.0))
    assert [float(tolerant.next_step().forget_weight) for _ in range(3)] == [1, 1, 1]


def test_the_loop_may_stop_only_if_copies_are_forgotten(trained, forget):
    model = trained[0]
    assert not procedure(model, forget, FAST).may_stop()
    wrong = Forget(forget.images, (forget.labels + 1) % 3)
    with torch.no_grad():
        model.head.bias[wrong.labels.unique()] -= 100.0
    assert procedure(model, wrong, FAST).may_stop()


@pytest.mark.parametrize(
    "changed",
    [
        {"robust_targets": 0.0},
        {"robust_adversarial": 0.0},
        {"robust_mixes": 0.0},
        {"robust_keep": 3.0},
        {"robust_tolerance": 1.0},
        {"robust_pool": 1},
        {"robust_images": 0},
        {"robust_classes": 1.0},
        {"robust_int4": 0.0},
        {"robust_int4": 3.0},
    ],
)
def test_each_setting_changes_the_result_and_leaves_the_statistics_of_batch_norm(changed, trained):
    model, images, labels = trained
    settings = replace(FAST, distill_steps=3, distill_cycles=1)
    first, second, other = (
        unlearn(model, images[:K], labels[:K], "distill", settings=one).model
        for one in (settings, settings, replace(settings, **changed))
    )
    assert all(torch.equal(one, second.state_dict()[name]) for name, one in first.state_dict().items())
    assert not torch.equal(first.head.weight, other.head.weight)
    assert all(torch.equal(one, dict(model.named_buffers())[name]) for name, one in first.named_buffers())
    assert not any(module.training for module in first.modules())


def test_stand_ins_are_made_of_synthesised_images_that_are_kept_more_strongly(trained, forget, monkeypatch):
    bright = torch.ones(5, 3, 8, 8)
    monkeypatch.setattr(Synthesis, "images", lambda self, model, images, settings, count, *rest: bright[:count])
    settings = replace(FAST, distill_stand_ins="recoloured+mixes", robust_images=4, robust_keep=5.0, robust_mixes=0.0)
    steps = procedure(trained[0], forget, settings)
    assert steps.settings.distill_stand_ins == "copies+recoloured+mixes"
    assert (steps.stand_ins.make(steps.draw()[2]).amax((1, 2, 3)) > 0.99).all()
    assert steps.settings.distill_logits == 5 * FAST.distill_logits
    assert steps.settings.distill_features == 5 * FAST.distill_features


def test_whole_images_of_the_forget_set_do_not_stand_for_others(trained, forget):
    def kinds_and_weight(model, **changed):
        settings = procedure(model, forget, replace(FAST, **changed)).settings
        return settings.distill_stand_ins, settings.distill_logits

    model = trained[0]
    expected = "mixes", FAST.distill_logits
    assert kinds_and_weight(model, robust_images=0, distill_stand_ins="recoloured+mixes") == expected
    assert kinds_and_weight(model, robust_images=0, distill_stand_ins="copies") == expected
    without_norm = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3)).eval()
    assert kinds_and_weight(without_norm, distill_stand_ins="copies") == expected


def test_a_surrogate_set_is_kept_as_strongly_as_synthesised_images(trained, forget, monkeypatch):
    monkeypatch.setattr(Synthesis, "images", None)  # not called
    steps = procedure(trained[0], forget, FAST, torch.zeros(2, 3, 8, 8))
    assert steps.settings.distill_logits == FAST.robust_keep * FAST.distill_logits


def test_quantised_weights_have_their_own_logits_and_pass_gradients_to_the_weights(trained):
    model, images, _ = trained
    own, pixels = copy.deepcopy(model), images[:5] / 255
    changed = robustness.changed_weights(model, 4)
    logits = robust._Quantised(own)(pixels)
    torch.testing.assert_close(logits, changed(pixels))
    assert not torch.equal(logits, model(pixels))
    logits.square().sum().backward()
    changed(pixels).square().sum().backward()
    for weight, expected in zip(own.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)


@pytest.mark.parametrize("goal", ["misclassify", "relabel"])
def test_the_forget_loss_includes_images_with_quantised_weights(goal, trained):
    model, images, labels = trained
    forget = Forget(images[:K] / 255, labels[:K], (labels[:K] + 1) % 3 if goal == "relabel" else None)
    included, without = (procedure(model, forget, replace(FAST, robust_int4=weight)) for weight in (3.0, 0.0))
    inputs = included.draw()
    chosen, margin = inputs[-1], inputs[-2]
    assert len(chosen) == 2  # a quarter of distill_forget
    added = included.terms(*inputs)["forget"] - without.terms(*inputs)["forget"]
    logits = robustness.changed_weights(model, 4)(forget.images[chosen])
    losses = margin_loss(logits, forget.target_labels[chosen], goal, margin)
    expected = 3 * included.weight * losses.sum() / FAST.distill_forget
    assert float(added.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert added > 0


def test_images_can_be_relabelled_as_used(trained):
    model, images, labels = trained
    new = (labels[:K] + 1) % 3
    outcome = unlearn(model, images[:K], labels[:K], "distill", new_labels=new, settings=FAST)
    used = robustness.as_used(outcome.model, Forget(images[:K] / 255, labels[:K], new))
    assert used.stored.all()
    assert used.copies.mean() > 0.8


def test_the_length_of_a_cycle_is_a_multiple_of_300_steps_or_distill_steps_and_steps_have_more_stand_ins(
    trained, forget
):
    assert procedure(trained[0], forget, replace(FAST, distill_steps=0, robust_cycle=1.5)).stop_every == 450
    changed = replace(FAST, distill_steps=10, distill_image_steps=2.0, robust_cycle=1.5)
    assert procedure(trained[0], forget, changed).stop_every == 16
    steps = procedure(trained[0], forget, replace(FAST, distill_mixes=6))
    assert len(steps.stand_ins.make(steps.draw()[2])) == 12
