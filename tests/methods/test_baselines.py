"""Methods of others: values worked out by hand, and what each must do to a net."""

from conftest import tiny_net
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul import objective
from l2ul.common.errors import InputError
from l2ul.data.images import Split
from l2ul.methods import baselines, fixed_length, paper, registry
from l2ul.methods.settings import from_text, override, to_text
from l2ul.unlearn import Settings, unlearn

K = 4
THEIRS = [name for name, method in registry.METHODS.items() if method.settings]
SOURCE_FREE = ("boundary_shrink", "jit")


@pytest.fixture
def given(trained):
    """Model, D_f and D_r, as keyword arguments of `unlearn`."""
    model, images, labels = trained
    return {"model": model, "images": images[:K], "labels": labels[:K], "retain": Split(images[K:], labels[K:])}


def carried_out(given, name, **settings):
    return unlearn(**given, method=name, settings=Settings(method_settings={"batch": 8, "augment": 0, **settings}))


def making(given, name, **settings):
    """A course of the method, and its generator."""
    own = override(registry.get(name).settings, {"batch": 8, "augment": 0, **settings})
    forget = objective.Forget(given["images"] / 255, given["labels"])
    made = fixed_length.MethodContext(given["model"], forget, own, given["retain"])
    return made, registry.get(name).terms(made)


def accuracy(model, split):
    with torch.inference_mode():
        return (model(split.images / 255).argmax(1) == split.labels).float().mean().item()


@pytest.mark.parametrize("name", THEIRS)
def test_changes_a_copy_for_as_long_as_its_settings_say(given, name):
    before = {key: value.clone() for key, value in given["model"].state_dict().items()}
    outcome = carried_out(given, name, epochs=2, copies=2, select=1)
    steps = {"ssd": 1, "boundary_shrink": 2, "jit": 2, "scrub": 2 * 5 + 2, "bad_teaching": 2 * 2}
    assert outcome.status == "done"
    assert outcome.steps == steps.get(name, 2 * 5) == outcome.curve[-1]["step"]
    assert all(torch.equal(value, before[key]) for key, value in given["model"].state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in outcome.model.state_dict().items())
    assert not outcome.model.training


@pytest.mark.parametrize("name", THEIRS)
def test_same_seed_same_weights(given, name):
    first, second = (carried_out(given, name, epochs=1, copies=2).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_only_those_two_do_without_the_remaining_training_set():
    assert [name for name in THEIRS if "retain" not in registry.get(name).needs] == list(SOURCE_FREE)
    assert not set(THEIRS) & set(registry.usual("misclassify"))
    assert not set(THEIRS) & set(registry.of_goal("relabel"))


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
def test_forgets_or_not_and_keeps_the_rest(given, name, settings, forgets):
    outcome = carried_out(given, name, **settings)
    on_forget = accuracy(outcome.model, Split(given["images"], given["labels"]))
    assert accuracy(outcome.model, given["retain"]) > 0.9
    if forgets is not None:
        assert on_forget <= 0.5 if forgets else on_forget == 1


@pytest.mark.parametrize(("name", "settings"), [("boundary_shrink", {"epochs": 60, "lr": 0.02})])
def test_forgets_without_the_rest(given, name, settings):
    outcome = carried_out(given, name, **settings)
    assert accuracy(outcome.model, Split(given["images"], given["labels"])) < 0.5


def test_negative_gradient_is_oracle_with_weights(given):
    given["model"].eval()
    made, steps = making(given, "neggrad_plus", retain=0.75)
    forgotten = next(made.endless_batches(made.forget_split))  # as the method draws them: D_f before D_r
    kept = next(made.batches(made.retain))
    oracle = paper.oracle(registry.Step(given["model"], "misclassify", forgotten, retain=kept))
    found = next(registry.get("neggrad_plus").terms(making(given, "neggrad_plus", retain=0.75)[0]))
    assert found["retain"].item() != 0
    retain = F.cross_entropy(given["model"](kept.images), kept.labels)
    assert set(found) == set(oracle) == {"forget", "retain"}
    assert oracle["retain"].item() == pytest.approx(retain.item(), rel=1e-5)
    forget = F.cross_entropy(given["model"](made.forget.images), made.forget.labels)  # all of D_f is one batch
    assert found["forget"].item() == pytest.approx(-0.25 * forget.item(), rel=1e-5)


def test_l1_is_the_sum_of_all_weights_and_fades(given):
    made, steps = making(given, "l1_sparse", epochs=4, l1=0.1)
    size = sum(parameter.abs().sum() for parameter in made.model.parameters()).item()
    found = [terms["l1"].item() for terms in steps][::5]  # of the first step of each epoch: no step is taken here
    assert found == pytest.approx([0.1 * part * size for part in (1, 0.75, 0.5, 0.25)], rel=1e-5)


def test_salient_weights_alone_move(given):
    """The optimizer's weight decay moves the others too, so gradients are looked at."""
    made, steps = making(given, "salun", salient=0.25)
    parameters = list(made.model.parameters())
    made.model.eval()
    loss = F.cross_entropy(made.model(made.forget.images), made.forget.labels)
    sizes = [gradient.abs() for gradient in torch.autograd.grad(loss, parameters)]
    every = torch.cat([size.flatten() for size in sizes])
    least = every.topk(round(0.25 * len(every))).values[-1]
    next(steps)["all"].backward()
    for parameter, size in zip(parameters, sizes, strict=True):
        assert (parameter.grad[size < least * (1 - 1e-4)] == 0).all()
    moved = sum(int((parameter.grad != 0).sum()) for parameter in parameters)
    assert 0.2 * len(every) < moved <= 0.26 * len(every)
    steps.close()
    made.model.zero_grad()
    F.cross_entropy(made.model(made.forget.images), made.forget.labels).backward()
    assert sum(int((parameter.grad != 0).sum()) for parameter in parameters) > 0.5 * len(every)


class Linear(nn.Module):
    """Logits (n, 2) = (w₀ x₀, w₁ x₁) of pixels (n, 3, 1, 1)."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x.flatten(1)[:, :2] * self.weights


def linear_course(name, forget, retain, **settings):
    model = Linear(1.0, 1.0).eval()
    own = override(registry.get(name).settings, settings)
    labels = torch.zeros(len(forget), dtype=torch.int64)
    kept = Split(torch.tensor(retain).view(-1, 3, 1, 1), torch.zeros(len(retain), dtype=torch.int64))
    return model, fixed_length.MethodContext(
        model, objective.Forget(torch.tensor(forget).view(-1, 3, 1, 1), labels), own, kept
    )


def test_dampening_equals_values_worked_out_by_hand():
    """D_f lights the first pixel, D_r the second more: the gradients of CE are p₁ (-x₀, x₁) with label 0."""
    model, made = linear_course("ssd", [[1.0, 0.1, 0.0]], [[0.0, 1.0, 0.0]], batch=1, select=1.5, dampen=0.5)
    p_forget, p_retain = torch.sigmoid(torch.tensor([0.1 - 1.0, 1.0]))  # p₁ on the two images
    on_forget = torch.tensor([p_forget, 0.1 * p_forget]) ** 2
    on_retain = torch.tensor([0.0, p_retain]) ** 2
    whole = (on_forget + on_retain) / 2
    assert on_forget[0] > 1.5 * whole[0]
    assert on_forget[1] < 1.5 * whole[1]
    assert list(registry.get("ssd").terms(made)) == [{}]
    assert model.weights.tolist() == pytest.approx([(0.5 * whole[0] / on_forget[0]).item(), 1.0], rel=1e-6)


def test_just_in_time_equals_the_value_of_a_linear_net():
    """‖f(x) - f(x + ξ)‖ / ‖ξ‖ of logits (ξ₀, ξ₁): the part of the noise in two of its three pixels."""
    model, made = linear_course("jit", [[0.2, 0.4, 0.6]], [[0.0, 0.0, 0.0]], copies=4000, sigma=0.1)
    (terms,) = list(registry.get("jit").terms(made))
    # E of the length of two of three coordinates of a uniform direction: π/4
    assert terms["forget"].item() == pytest.approx(torch.pi / 4, abs=0.01)


def test_just_in_time_does_not_take_the_statistics_of_noise_for_those_of_images(given):
    before, outcome = given["model"].state_dict(), carried_out(given, "jit", copies=2)
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(torch.equal(outcome.model.state_dict()[name], before[name]) for name in statistics)


def test_nearest_examples_lie_just_beyond_the_border():
    """Logits are two pixels; the border is where they are equal, 0.2 / √2 = 0.14 away; radii are 0.05, 0.1, 0.2."""
    images = torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.6, 0.5]]).view(2, 3, 1, 1)
    forget = objective.Forget(images, torch.tensor([0, 0]))  # the second is called otherwise already
    found = baselines.nearest_examples(Linear(1.0, 1.0), forget, eps=0.05, iterations=20)
    assert found.labels.tolist() == [1, 1]
    step = 0.2 / 2**0.5
    assert found.images[0].flatten().tolist() == pytest.approx([0.6 - step, 0.4 + step, 0.5], abs=1e-5)
    assert torch.equal(found.images[1], images[1])


def test_scrub_goes_away_from_the_teacher_and_toward_it_by_turns(given):
    made, steps = making(given, "scrub", epochs=3, forget_epochs=2)
    found = [set(terms) for terms in steps]
    keep = [{"retain", "logits"}] * 5
    assert found == [{"forget"}, *keep, {"forget"}, *keep, *keep]


def test_bad_teacher_has_other_weights_and_the_student_learns_of_both(given):
    made, steps = making(given, "bad_teaching", part=0.5)
    made.model.eval()
    first = next(steps)["logits"]
    assert first.item() > 0.01  # far from the bad teacher; the good one's are its own


def test_spread_sees_every_image_once_and_evenly(given):
    made, _ = making(given, "random_labels")
    kept, forgotten = zip(*made.paired_batches(made.retain, made.forget_split), strict=True)
    assert [len(batch.labels) for batch in kept] == [8, 8, 8, 8, 4]
    assert [len(batch.labels) for batch in forgotten] == [0, 1, 1, 1, 1]
    for batches, split in ((kept, made.retain), (forgotten, made.forget_split)):
        seen = torch.cat([batch.images.flatten(1) for batch in batches]).sum(1).sort().values
        pixels = split.images.float().flatten(1).sum(1).sort().values
        assert torch.allclose(seen, pixels / (255 if split is made.retain else 1), atol=1e-3)


def test_settings_are_looked_at():
    theirs = registry.get("finetune").settings
    defaults = override(theirs, {})
    assert override(theirs, {"epochs": 3.0, "l1": 1.0}) == {**defaults, "epochs": 3}
    for values in (defaults, {"lr": 0.00123456789, "epochs": 1234567}):
        assert from_text(to_text(values)) == values
    for name, value in {"epochs": 0.0, "batch": 2.5, "lr": -1.0}.items():
        with pytest.raises(InputError, match=rf"setting {name}={value} is not allowed; expected a"):
            override(theirs, {name: value})


def test_a_net_whose_numbers_are_lost_has_diverged(given):
    outcome = carried_out(given, "finetune", lr=1e30, epochs=5)
    assert outcome.status == "diverged"


def test_nets_that_differ_in_seed_are_not_alike():
    """The tiny net's weights come from its seed: else the tests above would compare nothing."""
    assert not torch.equal(tiny_net(0).head.weight, tiny_net(1).head.weight)
