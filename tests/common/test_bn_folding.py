"""Folding batch-norm: equal logits with fewer layers, only where it is exact; the layers are restored afterwards."""

import copy

from conftest import tiny_net
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul import models
from l2ul.common import bn_folding
from l2ul.common.bn_folding import KNOWN, foldable, folded
from l2ul.metrics import accuracy


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch-norms random statistics and weights, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor in (module.running_mean, module.weight, module.bias):
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
                module.running_var.mul_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


class Silent(nn.Sequential):
    """A net whose `train`, and therefore `eval`, returns nothing."""

    def train(self, mode=True):
        super().train(mode)


def test_a_model_whose_train_returns_nothing_is_folded():
    model = Silent(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.eval()
    assert foldable(model, torch.rand(1, 3, 8, 8)) == (("0", "1"),)


@pytest.mark.parametrize(
    ("name", "side", "some_stay"),
    [
        ("resnet20", 32, False),
        ("resnet18", 32, False),
        ("resnet18_cifar100", 16, False),
        ("mobilenet_v2", 32, False),
        ("densenet121", 32, True),  # half of its batch-norms come before their convolution
        ("squeezenet1_1", 32, False),
        ("torchvision:resnet50", 64, False),
    ],
)
def test_folding_keeps_the_logits_and_restores_the_layers(name, side, some_stay):
    model = with_statistics(models.build(name, 10))
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    pairs = foldable(model, pixels)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert ({norm for _, norm in pairs} < set(norms)) if some_stay else ([norm for _, norm in pairs] == norms)
    modules, state = list(model.modules()), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(pixels)
        with folded(model, pixels):
            assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == len(norms) - len(pairs)
            found = model(pixels)
        assert torch.equal(model(pixels), expected)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert list(model.modules()) == modules
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_folding_uses_the_current_weights():
    model, pixels = tiny_net(), torch.rand(2, 3, 8, 8)
    assert foldable(model, pixels) == (("features.0", "features.1"), ("features.3", "features.4"))
    with_statistics(model)
    with torch.no_grad(), folded(model, pixels):
        found = model(pixels)
    assert torch.allclose(found, model(pixels), atol=1e-5)


class Odd(nn.Module):
    """A convolution whose output is used in a way that forbids folding.

    The batch-norm is untrained, so folding without a check would not change the logits much.
    """

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x):
        made = self.conv(x)
        if self.how == "read twice":
            made = self.norm(made) + made
        elif self.how == "called twice":
            made = self.norm(self.conv(self.norm(made)))
        elif self.how == "changed in place":
            made = self.norm(F.relu_(made))
        elif self.how == "raises in double":
            made = self.norm(made.to(torch.float32))
        return self.head(made.mean((2, 3)))


@pytest.mark.parametrize("how", ["read twice", "called twice", "changed in place", "raises in double"])
def test_layers_whose_folding_would_change_the_logits_stay(how):
    model, pixels = Odd(how).eval(), torch.rand(2, 3, 8, 8)
    assert foldable(model, pixels) == ()
    assert torch.equal(accuracy.predict(model, pixels), accuracy.predict(model, pixels, fold=False, batch_size=2))


def test_layers_and_train_mode_are_restored_after_an_error():
    model, pixels = tiny_net().train(), torch.rand(2, 3, 8, 8)
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="channels"), folded(model, pixels):
        model(pixels[:, :2])
    assert list(model.modules()) == before
    assert all(module.training for module in model.modules())


def test_folding_keeps_the_input_gradients():
    model = with_statistics(tiny_net())
    pixels = torch.rand(4, 3, 8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
    with folded(model, pixels):
        (found,) = torch.autograd.grad(model(pixels).square().sum(), pixels)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())


def test_pairs_are_searched_once_for_a_model_and_its_copies(monkeypatch):
    searches, search = [], bn_folding._verified_pairs
    monkeypatch.setattr(bn_folding, "_verified_pairs", lambda *arguments: searches.append(1) or search(*arguments))
    model, pixels = tiny_net(), torch.rand(2, 3, 8, 8)
    pairs = foldable(model, pixels)
    assert foldable(copy.deepcopy(model), pixels[:1]) == foldable(model, pixels) == pairs
    assert len(searches) == 1
    model.features[1] = nn.Identity()
    assert foldable(model, pixels) == pairs[1:]
    assert len(searches) == 2
    assert KNOWN not in model.state_dict()
