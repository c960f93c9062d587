"""`distill`: its loss, mixes, teacher and schedule, and its effect on models."""

from dataclasses import replace
import math
from types import SimpleNamespace

from conftest import CLASSES
import pytest
import torch
from torch import nn

from l2ul import models, objective
from l2ul.common import activations
from l2ul.common.bn_folding import foldable
from l2ul.common.errors import InputError
from l2ul.data.mixes import KINDS
from l2ul.methods import distill, registry
from l2ul.methods.stand_ins import Synthesis
from l2ul.unlearn import Settings, unlearn

K = 4
FAST = Settings(distill_steps=40, distill_mixes=16, distill_lr=3e-3, distill_forget=2)


@pytest.fixture
def inputs(trained):
    """Return model, D_f and method as keyword arguments of `unlearn`."""
    model, images, labels = trained
    return {"model": model, "images": images[:K], "labels": labels[:K], "method": "distill"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_margin_loss_equals_hand_computed_values():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.1], [0.0, 0.4, 0.3]])
    labels = torch.tensor([0, 0, 0])
    misclassify = objective.margin_loss(logits, labels, "misclassify", 0.3)
    assert misclassify.tolist() == pytest.approx([1.3, 0.0, 0.0])  # 2 - 1 + 0.3; another logit leads by 0.5; by 0.4
    relabel = objective.margin_loss(logits, labels, "relabel", 0.3)
    assert relabel.tolist() == pytest.approx([0.0, 0.8, 0.7])


def test_margin_loss_has_a_bounded_gradient_that_is_zero_beyond_the_margin():
    logits = torch.tensor([[50.0, 0.0, 1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    objective.margin_loss(logits, torch.tensor([0, 0]), "misclassify", 0.3).sum().backward()
    assert logits.grad.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]


def test_kl_divergence_equals_that_of_torch_distributions():
    logits, original = (torch.randn(6, 5, generator=generator(seed)) for seed in (0, 1))
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=original), categorical(logits=logits)).mean()
    assert objective.kl_divergence(logits, original).item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.kl_divergence(original + 3.0, original).item() == pytest.approx(0.0, abs=1e-6)


def test_feature_gap_is_relative_to_the_variance():
    original = torch.tensor([[0.0, 2.0], [4.0, 6.0]])  # variance 5
    gap = objective.feature_gap([original + 1.0, 10 * original - 20.0], [original, 10 * original], [5.0, 500.0])
    assert gap.item() == pytest.approx((1 / 5 + 4 / 5) / 2)


def test_mixes_blend_two_different_images_with_weights_of_the_documented_range():
    images = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 16, 16)  # one red, one green, one blue
    blended = KINDS["mixes"](images, 200, generator())
    assert blended.shape == (200, 3, 16, 16)
    inside = blended[:, :, 8, 8]  # a shift of 2 does not change the centre
    assert torch.allclose(inside.sum(1), torch.ones(200))
    assert ((inside > 0).sum(1) == 2).all()
    assert inside[inside > 0].min() >= 0.3 - 1e-6
    assert inside.max() <= 0.7 + 1e-6
    assert len({tuple((row > 0).tolist()) for row in inside}) == 3
    assert (blended[:, :, 0] == 0).all(1).any(), "none was shifted down"
    assert torch.equal(KINDS["mixes"](images, 5, generator(1)), KINDS["mixes"](images, 5, generator(1)))


def test_a_single_image_is_mixed_with_itself_rotated_by_180_degrees():
    image = torch.zeros(1, 3, 7, 7)  # too small to be shifted
    image[0, :, 0, 3] = 1
    for mix in KINDS["mixes"](image, 20, generator()):
        assert mix[0, 0, 3] + mix[0, 6, 3] == pytest.approx(1.0)
        assert 0.3 - 1e-6 <= mix[0, 0, 3] <= 0.7 + 1e-6


def test_logits_and_inputs_returns_layer_inputs_and_removes_its_hooks(trained):
    model, images, _ = trained
    x = images[:5] / 255
    logits, (second, last) = activations.logits_and_inputs(model, x, ["features.3", "head"])
    assert torch.equal(logits, model(x))
    assert torch.equal(second, model.features[:3](x))
    assert torch.equal(last, model.features(x))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet20", "net.layer3"),
        ("resnet18_cifar100", "net.conv5_x"),
        ("mobilenet_v2", "net.features"),
        ("squeezenet1_1", "net.classifier.2"),
    ],
)
def test_last_spatial_module_gives_the_features_before_pooling(name, last):
    model = models.build(name, CLASSES)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert activations.last_spatial_module(model, images) == last
    _, (features,) = activations.logits_and_inputs(model.eval(), images, [], last)
    assert features.ndim == 4
    assert features.shape[2:].numel() > 1


def test_a_model_without_spatial_features_has_no_last_spatial_module():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert activations.last_spatial_module(model, images) is None
    assert len(distill.Teacher(model, images).variances) == 1


def test_teacher_measures_gaps_of_layer_inputs_and_of_the_last_feature_map(trained):
    model, images, _ = trained
    x = images[:5] / 255
    teacher = distill.Teacher(model, x)
    assert teacher.layers == ["features.3", "head"]
    assert len(foldable(model, x)) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.model.modules())
    assert teacher.last == "features.5"  # the last ReLU, before the features are flattened
    _, features = activations.logits_and_inputs(model, x, teacher.layers, teacher.last)
    with torch.no_grad():
        assert torch.allclose(features[-1], model.features[:6](x))
    assert teacher.variances == pytest.approx([layer.var(correction=0).item() for layer in features], rel=1e-5)
    assert [gap.item() for gap in teacher.gaps(model, x)] == pytest.approx([0.0, 0.0], abs=1e-6)
    with torch.no_grad():
        model.head.bias[0] += 1.0
        model.features[0].bias += 0.5
    logits, layers = teacher.gaps(model, x)
    assert logits > 1e-3
    assert layers > 1e-3
    nn.init.zeros_(model.features[1].weight)
    nn.init.zeros_(model.features[1].bias)  # the input of the second convolution is 0 for every image
    constant = distill.Teacher(model, x)
    assert constant.variances[0] == math.inf
    nn.init.ones_(model.features[1].bias)
    assert all(gap.isfinite() for gap in constant.gaps(model, x))


def test_large_features_are_averaged_over_positions(monkeypatch):
    monkeypatch.setattr("l2ul.common.activations.LARGEST", 10)
    maps, tokens = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3)
    assert torch.equal(activations.pooled(maps), maps.mean((2, 3)))
    assert torch.equal(activations.pooled(tokens), tokens.mean(1))
    assert activations.pooled(maps[:, :, :1, :1]).shape == (2, 3, 1, 1)


def test_one_cycle_rises_for_30_percent_and_ends_near_zero():
    rates = [distill.one_cycle(step, 100) for step in range(200)]
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates.index(max(rates)) in (29, 30)
    assert rates[:30] == sorted(rates[:30])
    assert rates[30:100] == sorted(rates[30:100], reverse=True)
    assert rates[99] < 1e-3
    assert rates[100:] == rates[:100]


def test_a_step_uses_the_remaining_images_and_weights_the_loss_by_their_number(trained):
    model, images, labels = trained
    forget = objective.Forget(images[:K] / 255, labels[:K])
    logits = torch.zeros(K, CLASSES)
    logits[torch.arange(K), labels[:K]] = 5.0
    logits[1] = logits[1].roll(1)  # forgotten by a margin of 5
    settings = Settings(distill_forget=8, distill_mixes=4, distill_logits=1.0, distill_features=1.0)
    settings = replace(settings, distill_growth=2.0, distill_steps=1)

    def procedure(logits):
        return distill.DistillProcedure(
            registry.get("distill"),
            model,
            forget,
            settings,
            SimpleNamespace(logits=logits, forget=forget),
            Synthesis(),
        )

    steps = procedure(logits)
    step = steps.next_step()
    assert sorted(step.forget.labels.tolist()) == sorted(labels[[0, 2, 3]].tolist())
    assert step.forget_weight == pytest.approx(2 * 3 / 8)
    assert steps.next_step().forget_weight == pytest.approx(4 * 3 / 8)
    terms = registry.get("distill").terms(step)
    assert terms["logits"].item() == pytest.approx(0.0, abs=1e-6)
    assert terms["features"].item() == pytest.approx(0.0, abs=1e-6)
    expected = objective.margin_loss(model(step.forget.images), step.forget.labels, "misclassify", 0.3).mean()
    assert terms["forget"].item() == pytest.approx(2 * 3 / 8 * expected.item(), rel=1e-6)
    forgotten = procedure(logits.roll(1, 1)).next_step()
    assert len(forgotten.forget.labels) == 0
    logits[torch.arange(K), labels[:K]] = torch.tensor([4.9, -9.0, -9.0, -9.0])
    barely = torch.where(logits == 4.9, -0.1, logits)  # all are forgotten, one of them within the margin
    assert procedure(barely).next_step().forget_weight == pytest.approx(1 / 8)
    assert registry.get("distill").terms(forgotten)["forget"].item() == 0.0


def test_distill_forgets_at_the_end_of_a_cycle_and_keeps_batch_norm_statistics(inputs):
    original = {name: tensor.clone() for name, tensor in inputs["model"].state_dict().items()}
    outcome = unlearn(**inputs, settings=FAST)
    assert (outcome.status, outcome.steps % 40) == ("forgotten", 0)
    assert any(row["forgotten"] == 100 for row in outcome.curve[:-1])
    with torch.inference_mode():
        predictions = outcome.model(inputs["images"] / 255).argmax(1)
    assert (predictions != inputs["labels"]).all()
    assert not outcome.model.training
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(inputs["model"].state_dict()[name], original[name])
        if "running" in name:
            assert torch.equal(tensor, original[name]), name
    again = unlearn(**inputs, settings=FAST)
    assert again.curve == outcome.curve


def test_distill_keeps_more_accuracy_than_gradient_ascent(inputs, trained):
    model, images, labels = trained
    others, true = images[K:] / 255, labels[K:]
    kept = {}
    for method in ("distill", "neggrad"):
        settings = Settings(distill_steps=60, distill_lr=3e-3, distill_mixes=32, batch_size=K, unlearn_lr=0.01)
        outcome = unlearn(**inputs | {"method": method}, settings=settings)
        assert outcome.status == "forgotten"
        with torch.inference_mode():
            kept[method] = (outcome.model(others).argmax(1) == true).float().mean().item()
    assert kept["distill"] > kept["neggrad"]


def test_distill_relabels_one_image_of_a_model_without_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, CLASSES))
    image = torch.rand(1, 3, 8, 8, generator=generator())
    label = model(image).argmax(1)
    new = (label + 1) % CLASSES
    outcome = unlearn(model.eval(), image, label, "distill", new_labels=new, settings=FAST)
    assert outcome.status == "forgotten"
    assert torch.equal(outcome.model(image).argmax(1), new)


def test_distill_gives_up_after_its_cycles(inputs):
    settings = Settings(distill_steps=3, distill_cycles=2, distill_lr=1e-9, distill_mixes=4)
    outcome = unlearn(**inputs, settings=settings)
    assert (outcome.status, outcome.steps) == ("cap", 6)
    diverged = unlearn(**inputs, settings=Settings(distill_lr=1e30, distill_mixes=4))
    assert diverged.status == "diverged"
    assert not all(map(math.isfinite, diverged.curve[-1].values()))


def test_cycles_are_longer_for_more_images_unless_their_steps_are_set():
    lengths = [distill.cycle_length(Settings(), k) for k in (1, 16, 64, 256)]
    assert lengths == [121, 132, 168, 600]
    assert distill.cycle_length(Settings(distill_further_steps=0.0), 256) == 312
    assert distill.cycle_length(Settings(distill_steps=40), 256) == 40
    assert distill.cycle_length(Settings(distill_steps=40, distill_image_steps=0.5), 256) == 168
    assert [distill.cycle_length(Settings(robust=1), k) for k in (1, 16, 42, 64)] == [600, 600, 600, 896]
    assert distill.cycle_length(Settings(robust=1, distill_steps=40), 16) == 40
    for settings in (Settings(robust=1, robust_cycle=1e307), Settings(distill_image_steps=1e308)):
        assert distill.cycle_length(settings, 16) >= distill.LONGEST


class Tokens(nn.Module):
    """A network with an embedding that it holds itself, before a convolution, batch-norm and linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, 4, 4, 4))
        self.first, self.norm = nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, images):
        x = self.norm(self.first(images)) + self.embedding
        return self.head(self.second(x.relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("share", "unchanged"),
    [(0.0, set()), (0.4, {"embedding", "first.weight", "first.bias", "norm.weight", "norm.bias"})],
)
def test_frozen_layers_keep_their_weights(share, unchanged):
    torch.manual_seed(0)
    model, images = Tokens().eval(), torch.rand(K, 3, 16, 16)
    model.second.bias.requires_grad_(False)  # of the caller's model: stays as it is
    settings = replace(FAST, distill_steps=3, distill_cycles=1, distill_frozen=share)
    outcome = unlearn(model, images, model(images).argmax(1), "distill", settings=settings)
    before, after = dict(model.named_parameters()), dict(outcome.model.named_parameters())
    assert {name for name in before if torch.equal(before[name], after[name])} == unchanged | {"second.bias"}
    assert {name for name in after if not after[name].requires_grad} == {"second.bias"}


def test_frozen_layers_must_leave_weights_that_change():
    model, images = Tokens().eval(), torch.rand(K, 3, 16, 16)
    model.requires_grad_(False).first.requires_grad_(True)
    settings = replace(FAST, distill_frozen=0.4)
    with pytest.raises(InputError, match=r"with distill_frozen 0\.4 no weight of the model changes"):
        unlearn(model, images, model(images).argmax(1), "distill", settings=settings)
    assert model.first.weight.requires_grad


@pytest.mark.parametrize(
    ("share", "names"), [(0, ["second", "head"]), (0.3, ["second", "head"]), (0.4, ["head"]), (1, ["head"])]
)
def test_features_are_kept_behind_frozen_layers_only(share, names):
    teacher = distill.Teacher(Tokens().eval(), torch.rand(K, 3, 16, 16), share)
    assert teacher.layers == names
    assert len(teacher.variances) == len(names) + 1  # and the last feature map


@pytest.mark.parametrize("robust", [0, 1])
def test_a_model_of_a_single_layer_keeps_its_logits_alone(robust):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.rand(4, 3, 8, 8)
    settings = replace(FAST, robust=robust, robust_pool=8, distill_cycles=1)
    outcome = unlearn(model, images, model(images).argmax(1), "distill", settings=settings)
    assert [row["features"] for row in outcome.curve] == [0.0] * 40
    assert outcome.curve[-1]["logits"] > 0
