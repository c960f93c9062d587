"""The attack against the library behind the paper, and what must hold of any adversarial set."""

import importlib
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
    """advertorch's L2PGDAttack. It is no longer kept up: a name that left torch, unused by this attack, is lent it."""
    gradcheck = sys.modules["torch.autograd.gradcheck"]
    gradcheck.zero_gradients = None
    try:
        return importlib.import_module("advertorch.attacks").L2PGDAttack
    finally:
        del gradcheck.zero_gradients


def problem(seed: int = 0, count: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    model = tiny_net(seed).to(dtype)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    start = torch.rand(x.shape, generator=generator, dtype=dtype) - x
    return model, x, targets, start


def norms(delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("eps", "alpha", "steps"), [(0.3, 0.1, 1), (0.5, 0.1, 20), (2.0, 0.1, 40), (4.0, 0.5, 100), (9.0, 0.1, 30)]
)
def test_agrees_with_the_library_behind_the_paper(advertorch_attack, eps, alpha, steps):
    # advertorch clips first and projects then, as we do, so whole runs agree, both bounds active
    model, x, targets, start = problem()
    theirs = advertorch_attack(
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
        loss_fn=theirs.loss_fn,
        minimize=True,
        ord=2,
        clip_min=0.0,
        clip_max=1.0,
        delta_init=nn.Parameter(first.clone()),
    )
    found = attack.pgd_l2(model, x, targets, eps=eps, alpha=alpha, steps=steps, start=start)
    assert (found - expected).abs().max() < 1e-5
    assert (found - x).abs().max() > 1e-3


def test_random_start_is_the_librarys(advertorch_attack):
    model, x, targets, _ = problem()
    torch.manual_seed(7)
    utils = sys.modules["advertorch.attacks.utils"]
    expected = x + utils.rand_init_delta(torch.zeros_like(x), x, 2, 1.5, 0.0, 1.0)
    generator = torch.Generator().manual_seed(7)
    found = attack.pgd_l2(model, x, targets, eps=1.5, alpha=0.1, steps=0, generator=generator)
    assert (found - expected).abs().max() < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(0, 10),
    alpha=st.floats(0, 5),
    steps=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_stays_in_the_ball_and_in_the_range_of_pixels(seed, eps, alpha, steps, dtype):
    model, x, targets, start = problem(seed, 3, dtype)
    found = attack.pgd_l2(model, x.round(decimals=1), targets, eps=eps, alpha=alpha, steps=steps, start=start * 3)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (norms(found - x.round(decimals=1)) <= eps * (1 + 1e-5) + 1e-6).all()


def test_leaves_the_model_as_it_was():
    model, x, targets, start = problem()
    model.train()
    model.head.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attack.pgd_l2(model, x, targets, eps=1, alpha=0.1, steps=3, start=start)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_takes_uint8_pixels():
    model, x, targets, _ = problem(dtype=torch.float32)
    pixels = (x * 255).to(torch.uint8)
    zero = torch.zeros_like(x)
    options = {"eps": 1.0, "alpha": 0.2, "steps": 4, "start": zero}
    assert torch.equal(
        attack.pgd_l2(model, pixels, targets, **options), attack.pgd_l2(model, pixels / 255, targets, **options)
    )


@pytest.mark.parametrize("bad", [{"eps": -1.0}, {"eps": float("nan")}, {"alpha": -0.1}, {"steps": -1}])
def test_refuses_numbers_that_mean_nothing(bad):
    model, x, targets, start = problem()
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"{name} is"):
        attack.pgd_l2(model, x, targets, **({"eps": 1.0, "alpha": 0.1, "steps": 1} | bad), start=start)


SET = {"num_adv_images": 4, "eps": 1.0, "alpha": 0.2, "steps": 5, "seed": 3}


def test_set_of_few_images_is_the_head_of_the_set_of_more(trained):
    model, images, labels = trained
    few, few_targets = attack.adversarial_set(model, images[:10], labels[:10], CLASSES, **SET, batch_size=40)
    many, many_targets = attack.adversarial_set(model, images, labels, CLASSES, **SET, batch_size=32)
    assert many.shape == (160, 3, 8, 8)
    assert torch.equal(few_targets, many_targets[:40])
    assert (few - many[:40]).abs().max() < 1e-5
    other, other_targets = attack.adversarial_set(model, images, labels, CLASSES, **(SET | {"seed": 4}))
    assert not torch.equal(other_targets, many_targets)
    assert not torch.equal(other, many)


def test_set_is_called_its_targets(trained):
    model, images, labels = trained
    found, targets = attack.adversarial_set(model, images, labels, CLASSES, **(SET | {"steps": 40, "eps": 3.0}))
    assert (model(found).argmax(1) == targets).float().mean() > 0.95
    owners = images.repeat_interleave(4, 0) / 255
    assert (norms(found - owners) <= 3.0 * (1 + 1e-5)).all()


def test_targets_are_uniform_over_the_other_classes():
    labels = torch.arange(CLASSES).repeat(40)
    targets = attack.random_targets(labels, CLASSES, 20, seed=0)
    own = labels.repeat_interleave(20)
    assert (targets != own).all()
    counts = torch.zeros(CLASSES, CLASSES).index_put_((own, targets), torch.ones(len(own)), accumulate=True)
    others = counts[~torch.eye(CLASSES, dtype=torch.bool)]  # 800 draws a class over 4 others: 200 each, sd 12
    assert (others - 200).abs().max() < 62
    assert ((others - 200) ** 2 / 200).sum() < 40  # chi-square, 15 degrees of freedom: P < 0.0005


def test_two_classes_leave_one_target():
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    targets = attack.random_targets(labels, 2, 3, seed=0)
    assert torch.equal(targets, 1 - labels.repeat_interleave(3))


def test_halves_the_batch_where_memory_runs_out(trained, monkeypatch):
    model, images, labels = trained
    expected = attack.adversarial_set(model, images, labels, CLASSES, **SET, batch_size=20)
    true_attack, sizes = attack.pgd_l2, []

    def small_memory(model, x, *arguments, **options):
        sizes.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("too much")
        return true_attack(model, x, *arguments, **options)

    monkeypatch.setattr(attack, "pgd_l2", small_memory)
    found = attack.adversarial_set(model, images, labels, CLASSES, **SET, batch_size=80)
    assert sizes == [80, 40] + [16] * 10
    assert torch.equal(found[0], expected[0])
    monkeypatch.setattr(attack, "pgd_l2", lambda *a, **o: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        attack.adversarial_set(model, images, labels, CLASSES, **SET)


def test_reports_its_progress(trained):
    model, images, labels = trained
    done = []
    attack.adversarial_set(model, images[:3], labels[:3], CLASSES, **SET, progress=done.append)
    assert sum(done) == 3 * SET["num_adv_images"] * SET["steps"]
