"""MAS importance and held weights: hand-computed values and edge cases."""

from conftest import tiny_net
import torch
from torch import nn

from l2ul import importance


def test_importance_equals_gradients_of_single_images():
    model, images = tiny_net(3).double(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    omega = importance.mas_importance(model, images)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter)
        for image in images:
            model.zero_grad()
            model(image[None]).square().sum().sqrt().backward()
            expected += parameter.grad.abs() / len(images)
        assert torch.allclose(omega[name], expected, rtol=1e-10, atol=1e-14), name


def test_importance_is_the_mean_over_single_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1, bias=False))
    nn.init.ones_(model[1].weight)
    images = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.4, 0.0]]).view(2, 3, 1, 1)
    # ‖g‖ = |w·x|, so |∂‖g‖/∂w| = x for each image
    omega = importance.mas_importance(model, images)["1.weight"]
    assert torch.allclose(omega, torch.tensor([[0.1, 0.2, 0.0]]))


def test_importance_changes_no_state_and_handles_frozen_and_unused_weights():
    model = tiny_net().train()
    model.unused = nn.Parameter(torch.ones(2))
    model.head.bias.requires_grad_(False)
    statistics = model.features[1].running_mean.clone()
    omega = importance.mas_importance(model, torch.rand(2, 3, 8, 8))
    assert model.training
    assert torch.equal(model.features[1].running_mean, statistics)
    assert all(p.grad is None for p in model.parameters())
    assert "head.bias" not in omega
    assert torch.equal(omega["unused"], torch.zeros(2))


def test_importance_is_finite_for_zero_logits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    assert all(omega.isfinite().all() for omega in importance.mas_importance(model, torch.rand(2, 3, 1, 1)).values())


def test_held_weights_are_one_minus_min_max_within_each_tensor():
    held = importance.held_weights(
        {"a": torch.tensor([1.0, 2.0, 5.0]), "b": torch.tensor([[10.0, 30.0]]), "constant": torch.full((3,), 4.0)}
    )
    assert torch.allclose(held["a"], torch.tensor([1.0, 0.75, 0.0]))
    assert torch.allclose(held["b"], torch.tensor([[1.0, 0.0]]))
    assert torch.equal(held["constant"], torch.ones(3))
    one = importance.held_weights({"single": torch.tensor([7.0]), "zero": torch.zeros(2)})
    assert all(tensor.isfinite().all() for tensor in one.values())
