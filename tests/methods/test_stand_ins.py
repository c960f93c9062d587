"""Stand-ins for D_r: images made of D_f and of the original model, and their use in a run."""

import contextlib

from conftest import CLASSES
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from l2ul.common.cache import Cache
from l2ul.common.choices import STAND_INS
from l2ul.data.images import StoredImages
from l2ul.data.mixes import KINDS
from l2ul.methods import distill, stand_ins
from l2ul.methods.stand_ins import StandIns, Synthesis
from l2ul.unlearn import Settings, unlearn

FAST = {"distill_mixes": 9, "distill_pool": 6, "distill_pool_steps": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("k", [1, 3])
def test_every_kind_gives_pixels_that_depend_on_the_generator_alone(trained, kind, k):
    model, images, _ = trained
    settings = Settings(distill_stand_ins=kind, **FAST)
    drawn = [StandIns(model, images[:k] / 255, settings, Synthesis())(generator(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (9, *images.shape[1:])
    assert drawn[0].min() >= 0
    assert drawn[0].max() <= 1
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_kinds_get_equal_parts_and_a_surrogate_set_its_part(trained):
    model, images, _ = trained
    dark, bright = torch.zeros(2, 3, 8, 8), torch.full((5, 3, 8, 8), 255, dtype=torch.uint8)
    settings = Settings(distill_stand_ins="mixes+crops", distill_mixes=8, distill_surrogate=0.25)
    drawn = StandIns(model, dark, settings, Synthesis(), bright)(generator())
    assert (drawn.amax((1, 2, 3)) == 1).tolist() == [False] * 6 + [True] * 2
    alone = StandIns(model, dark, Settings(distill_mixes=4), Synthesis(), bright)(generator())
    assert (alone.amax((1, 2, 3)) == 1).all()


def test_a_patch_is_made_of_parts_of_two_images():
    images = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 16, 16).contiguous()  # one red, one green, one blue
    pasted = KINDS["patches"](images, 50, generator())
    shares = pasted[:, :, 2:-2, 2:-2].mean((2, 3))
    assert ((shares > 0).sum(1) == 2).all()
    assert set(pasted.unique().tolist()) == {0.0, 1.0}


def test_recoloured_images_keep_their_brightness_and_change_their_hue():
    images = torch.tensor([0.6, 0.3, 0.3]).view(1, 3, 1, 1).expand(1, 3, 16, 16).contiguous()  # one reddish image
    inside = KINDS["recoloured"](images, 50, generator())[:, :, 4:-4, 4:-4].mean((2, 3))
    assert torch.allclose(inside.mean(1), torch.full((50,), 0.4), atol=1e-5)
    assert ((inside - images[0, :, 0, 0]).abs().amax(1) > 0.05).all()
    grey = torch.rand(2, 1, 8, 8, generator=generator())
    assert KINDS["recoloured"](grey, 5, generator()).shape == (5, 1, 8, 8)


def test_synthesised_images_come_closer_to_the_statistics_of_the_model(trained):
    model, images, _ = trained
    pixels = images[:8] / 255
    statistics = stand_ins._Statistics(model, pixels)
    start = KINDS["patches"](pixels, 16, generator())
    made = Synthesis().images(model, pixels, Settings(), 16, 40)
    with torch.no_grad():
        before, after = (statistics.gap(batch)[1].item() for batch in (start, made))
    assert after < before


def test_synthesised_images_without_classes_come_closer_to_the_statistics(trained):
    model, images, _ = trained
    pixels = images[:8] / 255
    statistics, synthesis = stand_ins._Statistics(model, pixels), Synthesis()
    made = [synthesis.images(model, pixels, Settings(), 16, 40, weight) for weight in (0.0, 1.0, 100.0)]
    with torch.no_grad():
        none, some, most = (statistics.gap(batch)[1].item() for batch in made)
    assert none < some < most


def test_images_are_synthesised_from_many_large_images_that_are_stored_as_bytes(trained):
    model, images, _ = trained
    some = images[:4].to(torch.uint8)
    stored, floats = (Synthesis().images(model, one, Settings(), 4, 2) for one in (StoredImages(some), some / 255))
    assert torch.equal(stored, floats)


def test_a_model_without_batch_norm_has_the_statistics_of_d_f():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).eval()
    images = torch.rand(4, 3, 8, 8, generator=generator())
    statistics = stand_ins._Statistics(model, images)
    assert list(statistics.moments) == ["0"]  # the input of "3" has one position
    assert statistics.gap(images)[1].item() == pytest.approx(0.0, abs=1e-9)
    assert statistics.gap(images[:1])[1].item() < 10
    one = stand_ins._Statistics(model, images[:1])
    assert one.gap(images[1:])[1].item() < 10  # as no target has a variance of 0
    without_positions = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, CLASSES)).eval()
    assert list(stand_ins._Statistics(without_positions, images).moments) == ["1", "3"]


def test_maps_of_one_pixel_and_single_tokens_are_left_out_of_the_statistics_of_d_f():
    class Gated(nn.Module):
        """A convolution of a pooled map, as in squeeze-and-excitation, and a linear layer of one token."""

        def __init__(self):
            super().__init__()
            self.features, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, CLASSES)

        def forward(self, pixels):
            features = self.features(pixels)
            pooled = features.mean((2, 3), keepdim=True)
            return self.head((pooled * self.gate(pooled)).flatten(2).transpose(1, 2)).squeeze(1)

    torch.manual_seed(0)
    statistics = stand_ins._Statistics(Gated().eval(), torch.rand(1, 3, 8, 8, generator=generator()))
    assert list(statistics.moments) == ["features"]
    assert statistics.gap(torch.rand(3, 3, 8, 8, generator=generator()))[1].item() < 10


def test_a_model_without_convolutions_and_linear_layers_has_the_colours_of_d_f():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(192, CLASSES, generator=generator()))

        def forward(self, pixels):
            return pixels.flatten(1) @ self.weight

    images = torch.rand(2, 3, 8, 8, generator=generator())
    made = stand_ins.Synthesis().images(Raw().eval(), images, Settings(), 4, 2, 0.0)
    assert made.shape == (4, 3, 8, 8)
    assert list(stand_ins._Statistics(Raw(), images).moments) == [""]


def test_images_are_moved_to_where_the_models_differ_more(trained):
    model, images, _ = trained
    pixels = images[:5] / 255
    teacher = distill.Teacher(model, pixels)
    with torch.no_grad():
        model.head.weight[0] *= 1.5
    moved = teacher.farther(model, pixels, 0.1)
    assert (moved - pixels).flatten(1).norm(dim=1).max() <= 0.1 + 1e-5
    assert teacher.gaps(model, moved)[0] > teacher.gaps(model, pixels)[0]


def test_cycles_are_longer_for_more_images(trained):
    model, images, labels = trained
    settings = Settings(distill_steps=2, distill_image_steps=0.5, distill_cycles=2, distill_lr=1e-9, distill_mixes=4)
    outcome = unlearn(model, images[:4], labels[:4], "distill", settings=settings)
    assert (outcome.status, outcome.steps) == ("cap", 8)


def test_a_run_with_surrogate_images_forgets(trained):
    model, images, labels = trained
    settings = Settings(distill_steps=40, distill_mixes=16, distill_lr=3e-3, distill_forget=2)
    outcome = unlearn(model, images[:4], labels[:4], "distill", settings=settings, surrogate=images[20:])
    assert outcome.status == "forgotten"


@pytest.fixture
def made(monkeypatch):
    """A list that gets the number of images of each synthesis."""
    counts, make = [], Synthesis._make

    def count(self, model, images, settings, count, *rest):
        counts.append(count)
        return make(self, model, images, settings, count, *rest)

    monkeypatch.setattr(Synthesis, "_make", count)
    return counts


def test_the_same_images_are_synthesised_once(trained, made):
    model, images, _ = trained
    pixels, synthesis = images[:4] / 255, Synthesis()
    one, two = (synthesis.images(model, pixels, Settings(), count, 1) for count in (4, 3))
    assert synthesis.images(model, pixels, Settings(distill_lr=1.0), 4, 1) is one
    assert synthesis.images(model, pixels, Settings(), 3, 1) is two
    assert made == [4, 3]
    others = [synthesis.images(model, pixels[:3], Settings(), 4, 1)]
    others += [synthesis.images(model, pixels, Settings(seed=1), 4, 1)]
    others += [synthesis.images(model, pixels, Settings(first_position=4), 4, 1)]
    others += [synthesis.images(model, pixels, Settings(), 4, 1, 0.0)]
    with torch.no_grad():
        model.head.weight[0] *= 1.5
    others += [synthesis.images(model, pixels, Settings(), 4, 1)]
    assert not any(torch.equal(other, one) for other in others)
    assert len(made) == 7
    assert torch.equal(Synthesis().images(model, pixels, Settings(), 4, 1), others[-1])


def test_later_commands_find_synthesised_images_in_the_cache(trained, made, tmp_path):
    model, images, _ = trained
    pixels = images[:4] / 255
    first, second = (Synthesis(Cache(tmp_path)).images(model, pixels, Settings(), 4, 1) for _ in range(2))
    assert torch.equal(first, second)
    assert first.stride() == second.stride()
    assert made == [4]


def test_synthesis_shows_its_progress(trained, monkeypatch):
    model, images, _ = trained
    bars, done = [], []

    @contextlib.contextmanager
    def bar(description, total):
        bars.append((description, total))
        yield done.append

    monkeypatch.setattr(stand_ins, "BATCH", 4)
    synthesis = Synthesis(progress=bar)
    for _ in range(2):
        synthesis.images(model, images[:2] / 255, Settings(), 7, 3)
    assert bars == [("synthesise 7 images, 3 iterations each", 21)]
    assert done == [4, 4, 4, 3, 3, 3]


def test_images_are_synthesised_for_a_model_that_recomputes_its_activations(trained):
    class Recomputing(nn.Sequential):
        def forward(self, images):
            return checkpoint(super().forward, images, use_reentrant=False)

    model, images, _ = trained
    pixels = images[:4] / 255
    made = [
        Synthesis().images(net.eval(), pixels, Settings(), 5, 3) for net in (nn.Sequential(model), Recomputing(model))
    ]
    assert torch.equal(*made)
