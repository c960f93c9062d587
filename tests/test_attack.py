"""The attack: agreement with advertorch, constraints, and properties of adversarial sets."""

import sys

from conftest import CLASSES, tiny_net
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch
from torch import nn

from l2ul import attack


@pytest.fixture(scope="module")
def advertorch_attack():
    """Return the L2PGDAttack of advertorch, which imports a name that torch has removed and that it does not use."""
    gradcheck = sys.modules["torch.autograd.gradcheck"]
    gradcheck.zero_gradients = None
    try:
        return pytest.importorskip("advertorch.attacks").L2PGDAttack
    finally:
        del gradcheck.zero_gradients


def attack_inputs(seed: int = 0, count: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    model = tiny_net(seed).to(dtype)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    start = torch.rand(x.shape, generator=generator, dtype=dtype) - x
    return model, x, targets, start


def l2_norms(delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("eps", "alpha", "steps"), [(0.3, 0.1, 1), (0.5, 0.1, 20), (2.0, 0.1, 40), (4.0, 0.5, 100), (9.0, 0.1, 30)]
)
def test_examples_equal_those_of_advertorch(advertorch_attack, eps, alpha, steps):
    # both libraries clip before they project, so examples agree while both constraints are active
    model, x, targets, start = attack_inputs()
    reference = advertorch_attack(
        model, eps=eps, eps_iter=alpha, nb_iter=steps, rand_init=False, clip_min=0.0, clip_max=1.0, targeted=True
    )
    first = attack._clip(x, attack._project(start, eps))
    module = sys.modules["advertorch.attacks.iterative_projected_gradient"]
    expected = module.perturb_iterative(
        x,
        targets,
        model,
        nb_iter=steps,
        eps=eps,
        eps_iter=alpha,
        loss_fn=reference.loss_fn,
        minimize=True,
        ord=2,
        clip_min=0.0,
        clip_max=1.0,
        delta_init=nn.Parameter(first.clone()),
    )
    examples = attack.pgd_l2(model, x, targets, eps=eps, alpha=alpha, steps=steps, start=start)
    assert (examples - expected).abs().max() < 1e-5
    assert (examples - x).abs().max() > 1e-3


def test_random_start_equals_that_of_advertorch(advertorch_attack):
    model, x, targets, _ = attack_inputs()
    torch.manual_seed(7)
    utils = sys.modules["advertorch.attacks.utils"]
    expected = x + utils.rand_init_delta(torch.zeros_like(x), x, 2, 1.5, 0.0, 1.0)
    generator = torch.Generator().manual_seed(7)
    examples = attack.pgd_l2(model, x, targets, eps=1.5, alpha=0.1, steps=0, generator=generator)
    assert (examples - expected).abs().max() < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(0, 10),
    alpha=st.floats(0, 5),
    steps=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_examples_stay_in_the_ball_and_in_the_pixel_range(seed, eps, alpha, steps, dtype):
    model, x, targets, start = attack_inputs(seed, 3, dtype)
    examples = attack.pgd_l2(model, x.round(decimals=1), targets, eps=eps, alpha=alpha, steps=steps, start=start * 3)
    assert examples.min() >= 0
    assert examples.max() <= 1
    assert (l2_norms(examples - x.round(decimals=1)) <= eps * (1 + 1e-5) + 1e-6).all()


def test_attack_does_not_change_the_model():
    model, x, targets, start = attack_inputs()
    model.train()
    model.head.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attack.pgd_l2(model, x, targets, eps=1, alpha=0.1, steps=3, start=start)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_attack_accepts_uint8_pixels():
    model, x, targets, _ = attack_inputs(dtype=torch.float32)
    pixels = (x * 255).to(torch.uint8)
    zero = torch.zeros_like(x)
    options = {"eps": 1.0, "alpha": 0.2, "steps": 4, "start": zero}
    assert torch.equal(
        attack.pgd_l2(model, pixels, targets, **options), attack.pgd_l2(model, pixels / 255, targets, **options)
    )


@pytest.mark.parametrize("bad", [{"eps": -1.0}, {"eps": float("nan")}, {"alpha": -0.1}, {"steps": -1}])
def test_invalid_settings_raise_value_error(bad):
    model, x, targets, start = attack_inputs()
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"{name} is"):
        attack.pgd_l2(model, x, targets, **({"eps": 1.0, "alpha": 0.1, "steps": 1} | bad), start=start)


SET = {"num_adv_images": 4, "eps": 1.0, "alpha": 0.2, "steps": 5, "seed": 3}


def test_set_of_few_images_is_the_head_of_the_set_of_more_images(trained):
    model, images, labels = trained
    few, few_targets = attack.adversarial_set(model, images[:10], labels[:10], CLASSES, **SET, batch_size=40)
    many, many_targets = attack.adversarial_set(model, images, labels, CLASSES, **SET, batch_size=32)
    assert many.shape == (160, 3, 8, 8)
    assert torch.equal(few_targets, many_targets[:40])
    assert (few - many[:40]).abs().max() < 1e-5
    other, other_targets = attack.adversarial_set(model, images, labels, CLASSES, **(SET | {"seed": 4}))
    assert not torch.equal(other_targets, many_targets)
    assert not torch.equal(other, many)


def test_examples_are_classified_as_their_targets(trained):
    model, images, labels = trained
    examples, targets = attack.adversarial_set(model, images, labels, CLASSES, **(SET | {"steps": 40, "eps": 3.0}))
    assert (model(examples).argmax(1) == targets).float().mean() > 0.95
    owners = images.repeat_interleave(4, 0) / 255
    assert (l2_norms(examples - owners) <= 3.0 * (1 + 1e-5)).all()


def test_targets_are_uniform_over_the_other_classes():
    labels = torch.arange(CLASSES).repeat(40)
    targets = attack.random_targets(labels, CLASSES, 20, seed=0)
    own = labels.repeat_interleave(20)
    assert (targets != own).all()
    counts = torch.zeros(CLASSES, CLASSES).index_put_((own, targets), torch.ones(len(own)), accumulate=True)
    others = counts[
        ~torch.eye(CLASSES, dtype=torch.bool)
    ]  # 800 draws per class over 4 others: 200 each, standard deviation 12
    assert (others - 200).abs().max() < 62
    assert ((others - 200) ** 2 / 200).sum() < 40  # chi-square, 15 degrees of freedom: P < 0.0005


def test_with_two_classes_the_target_is_the_other_class():
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    targets = attack.random_targets(labels, 2, 3, seed=0)
    assert torch.equal(targets, 1 - labels.repeat_interleave(3))


def test_batch_size_is_halved_if_memory_runs_out(trained, monkeypatch):
    model, images, labels = trained
    expected = attack.adversarial_set(model, images, labels, CLASSES, **SET, batch_size=20)
    original_attack, sizes = attack.pgd_l2, []

    def limited_attack(model, x, *arguments, **options):
        sizes.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("too much")
        return original_attack(model, x, *arguments, **options)

    monkeypatch.setattr(attack, "pgd_l2", limited_attack)
    examples = attack.adversarial_set(model, images, labels, CLASSES, **SET, batch_size=80)
    assert sizes == [80, 40] + [16] * 10
    assert torch.equal(examples[0], expected[0])
    monkeypatch.setattr(attack, "pgd_l2", lambda *a, **o: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        attack.adversarial_set(model, images, labels, CLASSES, **SET)


def test_progress_counts_examples_and_steps(trained):
    model, images, labels = trained
    progress = []
    attack.adversarial_set(model, images[:3], labels[:3], CLASSES, **SET, progress=progress.append)
    assert sum(progress) == 3 * SET["num_adv_images"] * SET["steps"]
