"""Random crops, flips and erased squares."""

import torch

from l2ul.data.augment import augment, erase


def test_each_image_has_a_crop_of_its_own_and_half_of_them_are_flipped():
    rows, columns = torch.meshgrid(torch.arange(1, 7), torch.arange(1, 7), indexing="ij")
    image = torch.stack([rows, columns, rows * 10 + columns]).to(torch.uint8)
    images = image.expand(400, -1, -1, -1)
    cropped = augment(images, 2, True, torch.Generator().manual_seed(0))
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    flipped, positions = 0, set()
    for one in cropped:
        inside = one[2] > 0
        assert torch.equal(one[2][inside], (one[0] * 10 + one[1])[inside])  # channels move together
        steps = one[1][:, 1:].int() - one[1][:, :-1].int()
        descending = (steps[inside[:, 1:] & inside[:, :-1]] == -1).all().item()
        flipped += descending
        positions.add(
            (int(one[0].max()), int(one[0][one[0] > 0].min()), int(one[1].max()), int(one[1][one[1] > 0].min()))
        )
    assert 150 < flipped < 250
    assert len(positions) == 25
    same = augment(images[:3], 0, False, torch.Generator())
    assert torch.equal(same, images[:3])


def test_a_square_of_each_image_is_black():
    images = torch.full((3, 3, 6, 7), 9, dtype=torch.uint8)
    erased = erase(images, 4, torch.tensor([[2, 0, 5], [3, 6, 0]]))
    expected = images.clone()
    expected[0, :, 0:4, 1:5] = 0
    expected[1, :, 0:2, 4:7] = 0
    expected[2, :, 3:6, 0:2] = 0
    assert torch.equal(erased, expected)
    assert (images == 9).all()
