"""Random changed copies of images."""

import pytest
import torch

from l2ul.data import changes


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")  # smooth, as photographs are


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [*changes.KINDS, changes.TURNED])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 17, 23)])
def test_each_kind_changes_images_a_little_and_reproducibly(kind, shape, images):
    images = torch.nn.functional.interpolate(images[:, : shape[0]], shape[1:])
    before = images.clone()
    copies = changes.Changes((kind,), probability=1)(images, seeded())
    assert torch.equal(images, before)
    assert copies.shape == images.shape
    assert torch.equal(copies, changes.Changes((kind,), probability=1)(images, seeded()))
    assert 0 <= copies.min() <= copies.max() <= 1
    assert (copies * 255 - (copies * 255).round()).abs().max() < 1e-4  # 256 levels
    assert (copies - images).abs().amax((1, 2, 3)).min() > 0.5 / 255
    assert (copies - images).abs().mean() < 0.35
    assert (copies - images.flip(3)).abs().max() < 1 / 255 or kind != "mirrored"


def test_copies_without_a_kind_are_the_images(images):
    copies = changes.Changes(changes.KINDS, probability=0)(images, seeded())
    assert (copies - images).abs().max() < 0.6 / 255


def test_images_are_changed_in_parts_with_the_same_result(images, monkeypatch):
    make = changes.Changes(changes.KINDS, probability=0.5)
    whole = make(images, seeded())
    monkeypatch.setattr(changes, "AT_ONCE", 2 * images[0].numel())
    sizes, rounded = [], changes.Rounded.make
    monkeypatch.setattr(changes.Rounded, "make", lambda self, part: sizes.append(len(part)) or rounded(self, part))
    assert torch.equal(make(images, seeded()), whole)
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize("size", [(8, 224), (2, 64), (8, 8)])
def test_blurring_keeps_the_brightness_of_flat_images_of_any_shape(size):
    flat = torch.full((8, 3, *size), 0.6)
    assert (changes.Changes(("blurred",), probability=1)(flat, seeded()) - flat).abs().max() < 1e-5


def test_kinds_are_in_a_copy_with_their_probability(images):
    many = images[:1].expand(400, -1, -1, -1)
    changed = (changes.Changes(("mirrored",))(many, seeded()) - many).abs().amax((1, 2, 3)) > 0.01
    assert 100 < changed.sum() < 166


@pytest.mark.parametrize("quality", [40, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_on_the_device_is_close_to_the_codec(quality, channels, images):
    rounded = (images[:, :channels, :24] * 255).round() / 255  # sides that are no multiples of 16
    qualities = torch.full((len(images),), quality)
    coded, computed = (codec(rounded, qualities) for codec in (changes.jpeg_file, changes.jpeg_on_device))
    difference, change = (computed - coded).abs().mean(), (coded - rounded).abs().mean()
    assert difference < max(0.3 * change, 1.5 / 255)
    assert (coded - rounded).abs().max() < 0.3
