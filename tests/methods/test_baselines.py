"""Baselines: hand-computed values, and the effect of each method on a model."""

import copy

from conftest import tiny_net
import pytest
import torch
from torch import nn
import torch.nn.functional as F
import torchvision

from l2ul import objective
from l2ul.common.errors import InputError
from l2ul.data.images import Split
from l2ul.methods import baselines, fixed_length_procedure, paper, registry
from l2ul.methods.settings import from_text, override, to_text
from l2ul.unlearn import Settings, unlearn

K = 4
BASELINES = [name for name, method in registry.METHODS.items() if method.settings]
SOURCE_FREE = ("boundary_shrink", "jit")


@pytest.fixture
def inputs(trained):
    """Return model, D_f and D_r as keyword arguments of `unlearn`."""
    model, images, labels = trained
    return {"model": model, "images": images[:K], "labels": labels[:K], "retain": Split(images[K:], labels[K:])}


def run_method(inputs, name, **settings):
    return unlearn(**inputs, method=name, settings=Settings(method_settings={"batch": 8, "augment": 0, **settings}))


def start_method(inputs, name, **settings):
    """Return the context of the method and its generator."""
    own = override(registry.get(name).settings, {"batch": 8, "augment": 0, **settings})
    forget = objective.Forget(inputs["images"] / 255, inputs["labels"])
    context = fixed_length_procedure.MethodContext(inputs["model"], forget, own, inputs["retain"])
    return context, registry.get(name).terms(context)


def accuracy(model, split):
    with torch.inference_mode():
        return (model(split.images / 255).argmax(1) == split.labels).float().mean().item()


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_changes_a_copy_for_the_number_of_steps_in_its_settings(inputs, name):
    before = {key: value.clone() for key, value in inputs["model"].state_dict().items()}
    outcome = run_method(inputs, name, epochs=2, copies=2, select=1)
    steps = {"ssd": 1, "boundary_shrink": 2, "jit": 2, "scrub": 2 * 5 + 2, "bad_teaching": 2 * 2}
    assert outcome.status == "done"
    assert outcome.steps == steps.get(name, 2 * 5) == outcome.curve[-1]["step"]
    assert all(torch.equal(value, before[key]) for key, value in inputs["model"].state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in outcome.model.state_dict().items())
    assert not outcome.model.training


def test_a_method_of_fixed_length_of_the_user_runs_with_its_settings(inputs, monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @registry.fixed_length_method("own", "retain", epochs=2, batch=8, lr=0.01, pull=0.5)
    def own(context):
        """Fine-tune on D_r and scale the loss by the setting `pull`."""
        for _ in context.epochs:
            for batch in context.batches(context.retain):
                loss = F.cross_entropy(context.model(batch.images), batch.labels)
                yield {"retain": context.settings["pull"] * loss}

    full, none = (run_method(inputs, "own", pull=pull) for pull in (1.0, 0.0))
    assert registry.get("own").summary == "Fine-tune on D_r and scale the loss by the setting `pull`"
    assert full.status == "done"
    assert full.steps == none.steps == 2 * 5
    assert full.curve[-1]["retain"] > none.curve[-1]["retain"] == 0


@pytest.mark.parametrize("name", BASELINES)
def test_the_seed_decides_the_weights(inputs, name):
    first, second = (run_method(inputs, name, epochs=1, copies=2).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_all_baselines_but_two_need_the_retain_set():
    assert [name for name in BASELINES if "retain" not in registry.get(name).needs] == list(SOURCE_FREE)
    assert not set(BASELINES) & set(registry.usual("misclassify"))
    assert not set(BASELINES) & set(registry.of_goal("relabel"))


@pytest.mark.parametrize(
    ("name", "settings", "forgets"),
    [
        ("random_labels", {"epochs": 30, "lr": 0.05}, True),
        ("salun", {"epochs": 30, "lr": 0.05}, True),
        ("neggrad_plus", {"epochs": 10, "retain": 0.9}, True),
        ("scrub", {"epochs": 30, "lr": 0.05, "forget_epochs": 15, "temperature": 1}, True),
        ("amun", {"epochs": 30, "lr": 0.05}, None),
        ("finetune", {"epochs": 5}, False),
        ("l1_sparse", {"epochs": 5}, False),
    ],
)
def test_baseline_keeps_the_retain_set_and_forgets_or_not(inputs, name, settings, forgets):
    outcome = run_method(inputs, name, **settings)
    on_forget = accuracy(outcome.model, Split(inputs["images"], inputs["labels"]))
    assert accuracy(outcome.model, inputs["retain"]) > 0.9
    if forgets is not None:
        assert on_forget <= 0.5 if forgets else on_forget == 1


@pytest.mark.parametrize(("name", "settings"), [("boundary_shrink", {"epochs": 60, "lr": 0.02})])
def test_boundary_shrink_forgets_without_the_retain_set(inputs, name, settings):
    outcome = run_method(inputs, name, **settings)
    assert accuracy(outcome.model, Split(inputs["images"], inputs["labels"])) < 0.5


def test_neggrad_plus_is_oracle_with_weights(inputs):
    inputs["model"].eval()
    context, steps = start_method(inputs, "neggrad_plus", retain=0.75)
    forgotten = next(context.endless_batches(context.forget_split))  # in the order of the method: D_f before D_r
    retain = next(context.batches(context.retain))
    oracle = paper.oracle(registry.Step(inputs["model"], "misclassify", forgotten, retain=retain))
    weighted = next(registry.get("neggrad_plus").terms(start_method(inputs, "neggrad_plus", retain=0.75)[0]))
    assert weighted["retain"].item() != 0
    loss = F.cross_entropy(inputs["model"](retain.images), retain.labels)
    assert set(weighted) == set(oracle) == {"forget", "retain"}
    assert oracle["retain"].item() == pytest.approx(loss.item(), rel=1e-5)
    forget = F.cross_entropy(inputs["model"](context.forget.images), context.forget.labels)  # all of D_f is one batch
    assert weighted["forget"].item() == pytest.approx(-0.25 * forget.item(), rel=1e-5)


def test_l1_penalty_is_the_norm_of_all_weights_and_decreases(inputs):
    context, steps = start_method(inputs, "l1_sparse", epochs=4, l1=0.1)
    size = sum(parameter.abs().sum() for parameter in context.model.parameters()).item()
    penalties = [terms["l1"].item() for terms in steps][::5]  # first step of each epoch; the weights do not move here
    assert penalties == pytest.approx([0.1 * part * size for part in (1, 0.75, 0.5, 0.25)], rel=1e-5)


def salient(model, images, labels, share):
    """Return for each parameter where its gradient is among the largest of the whole model."""
    parameters = list(model.eval().parameters())
    loss = F.cross_entropy(model(images / 255), labels)
    sizes = [gradient.abs() for gradient in torch.autograd.grad(loss, parameters)]
    every = torch.cat([size.flatten() for size in sizes])
    least = every.topk(round(share * len(every))).values[-1]
    return [size >= least * (1 + 1e-4) for size in sizes], [size < least * (1 - 1e-4) for size in sizes]


def test_salun_moves_exactly_the_salient_weights(inputs):
    before = copy.deepcopy(inputs["model"])
    chosen, held = salient(copy.deepcopy(before), inputs["images"], inputs["labels"], 0.1)
    after = run_method(inputs, "salun", salient=0.1, epochs=3, lr=0.05).model
    moved = [a != b for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    for (name, _), changed, inside, outside in zip(before.named_parameters(), moved, chosen, held, strict=True):
        assert not changed[outside].any(), name
        assert changed[inside].all(), name
    total = sum(changed.numel() for changed in moved)
    assert 0.09 * total < sum(int(changed.sum()) for changed in moved) <= round(0.1 * total)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in before.modules())


def test_salun_holds_weights_of_equal_gradients_beyond_its_share(inputs):
    """All gradients of a layer behind a zero are 0: a threshold would select all of them."""
    with torch.no_grad():
        inputs["model"].head.weight.zero_()
    before = copy.deepcopy(inputs["model"])
    after = run_method(inputs, "salun", salient=0.8, epochs=2).model
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    assert sum(int((a != b).sum()) for a, b in pairs) <= 0.8 * sum(a.numel() for a, _ in pairs) + 1


def test_ssd_changes_no_weight_that_it_does_not_select(inputs):
    after = run_method(inputs, "ssd", select=1e9).model
    assert all(torch.equal(a, b) for a, b in zip(inputs["model"].parameters(), after.parameters(), strict=True))


class Linear(nn.Module):
    """Logits (n, 2) = (w₀ x₀, w₁ x₁) of pixels (n, 3, 1, 1)."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x.flatten(1)[:, :2] * self.weights


def linear_context(name, forget, retain, **settings):
    model = Linear(1.0, 1.0).eval()
    own = override(registry.get(name).settings, settings)
    labels = torch.zeros(len(forget), dtype=torch.int64)
    retain_split = Split(torch.tensor(retain).view(-1, 3, 1, 1), torch.zeros(len(retain), dtype=torch.int64))
    return model, fixed_length_procedure.MethodContext(
        model, objective.Forget(torch.tensor(forget).view(-1, 3, 1, 1), labels), own, retain_split
    )


def test_ssd_equals_hand_computed_values():
    """The gradients of CE are p₁ (-x₀, x₁) with label 0; D_f has most in x₀, D_r all in x₁."""
    model, context = linear_context("ssd", [[1.0, 0.1, 0.0]], [[0.0, 1.0, 0.0]], batch=1, select=1.5, dampen=0.5)
    p_forget, p_retain = torch.sigmoid(torch.tensor([0.1 - 1.0, 1.0]))  # p₁ on the two images
    on_forget = torch.tensor([p_forget, 0.1 * p_forget]) ** 2
    on_retain = torch.tensor([0.0, p_retain]) ** 2
    mean = (on_forget + on_retain) / 2
    assert on_forget[0] > 1.5 * mean[0]
    assert on_forget[1] < 1.5 * mean[1]
    assert list(registry.get("ssd").terms(context)) == [{}]
    assert model.weights.tolist() == pytest.approx([(0.5 * mean[0] / on_forget[0]).item(), 1.0], rel=1e-6)


def test_jit_equals_the_expected_value_of_a_linear_model():
    """‖f(x) - f(x + ξ)‖ / ‖ξ‖ is the relative length of two of the three coordinates of ξ."""
    images = [[0.2, 0.4, 0.6], [0.6, 0.4, 0.2]]
    model, context = linear_context("jit", images, [[0.0, 0.0, 0.0]], copies=4000, sigma=0.1)
    (terms,) = list(registry.get("jit").terms(context))
    # expected length of two of three coordinates of a uniform direction: π/4, for each of the two images
    assert terms["forget"].item() == pytest.approx(2 * torch.pi / 4, abs=0.02)


def test_jit_keeps_batch_norm_statistics(inputs):
    before, outcome = inputs["model"].state_dict(), run_method(inputs, "jit", copies=2)
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(torch.equal(outcome.model.state_dict()[name], before[name]) for name in statistics)


def test_nearest_examples_lie_just_beyond_the_decision_boundary():
    """The boundary, where the two pixels are equal, is 0.2 / √2 = 0.14 away; the radii are 0.05, 0.1 and 0.2."""
    images = torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.6, 0.5]]).view(2, 3, 1, 1)
    forget = objective.Forget(images, torch.tensor([0, 0]))  # the second is misclassified already
    nearest = baselines.nearest_examples(Linear(1.0, 1.0), forget, eps=0.05, iterations=20)
    assert nearest.labels.tolist() == [1, 1]
    step = 0.2 / 2**0.5
    assert nearest.images[0].flatten().tolist() == pytest.approx([0.6 - step, 0.4 + step, 0.5], abs=1e-5)
    assert torch.equal(nearest.images[1], images[1])


def test_scrub_alternates_between_the_forget_set_and_the_retain_set(inputs):
    context, steps = start_method(inputs, "scrub", epochs=3, forget_epochs=2)
    terms_of_steps = [set(terms) for terms in steps]
    keep = [{"retain", "logits"}] * 5
    assert terms_of_steps == [{"forget"}, *keep, {"forget"}, *keep, *keep]


def test_bad_teaching_has_a_teacher_with_other_weights(inputs):
    context, steps = start_method(inputs, "bad_teaching", part=0.5)
    context.model.eval()
    first = next(steps)["logits"]
    assert first.item() > 0.01  # from the bad teacher alone: the good one equals the model


def test_all_weights_of_the_random_teacher_of_a_vision_transformer_are_new():
    options = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16, "num_classes": 3}
    model = torchvision.models.VisionTransformer(32, 8, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    new = dict(baselines._with_new_weights(model).named_parameters())
    assert [name for name, value in model.named_parameters() if (new[name] == value).any()] == []
    assert new["encoder.pos_embedding"].std() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(new["encoder.ln.weight"], torch.ones(16))


def test_paired_batches_contain_every_image_once_and_evenly(inputs):
    context, _ = start_method(inputs, "random_labels")
    retain, forgotten = zip(*context.paired_batches(context.retain, context.forget_split), strict=True)
    assert [len(batch.labels) for batch in retain] == [8, 8, 8, 8, 4]
    assert [len(batch.labels) for batch in forgotten] == [0, 1, 1, 1, 1]
    for batches, split in ((retain, context.retain), (forgotten, context.forget_split)):
        sums = torch.cat([batch.images.flatten(1) for batch in batches]).sum(1).sort().values
        pixels = split.images.float().flatten(1).sum(1).sort().values
        assert torch.allclose(sums, pixels / (255 if split is context.retain else 1), atol=1e-3)


def test_settings_are_overridden_and_checked():
    settings = registry.get("finetune").settings
    defaults = override(settings, {})
    assert override(settings, {"epochs": 3.0, "l1": 1.0}) == {**defaults, "epochs": 3}
    for values in (defaults, {"lr": 0.00123456789, "epochs": 1234567}):
        assert from_text(to_text(values)) == values
    for name, value in {"epochs": 0.0, "batch": 2.5, "lr": -1.0}.items():
        with pytest.raises(InputError, match=rf"setting {name}={value} is not allowed; expected a"):
            override(settings, {name: value})


def test_a_baseline_whose_loss_is_not_finite_diverges(inputs):
    outcome = run_method(inputs, "finetune", lr=1e30, epochs=5)
    assert outcome.status == "diverged"


def test_tiny_models_of_different_seeds_differ():
    """Otherwise comparisons of models in these tests would compare nothing."""
    assert not torch.equal(tiny_net(0).head.weight, tiny_net(1).head.weight)
