"""Images that stay uint8 in memory give the same results as float pixels."""

import pytest
import torch

from l2ul.data import images as image_sets
from l2ul.data.images import Split, StoredImages, as_pixels, pixels_of, stored
from l2ul.methods.registry import METHODS
from l2ul.metrics import accuracy, relearn
from l2ul.unlearn import Settings, unlearn


def test_stored_images_are_indexed_and_split_like_float_pixels(monkeypatch):
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(pixels_of(images), as_pixels(images))
    monkeypatch.setattr(image_sets, "MAX_FLOATS", 0)
    few = pixels_of(images)
    assert isinstance(few, StoredImages)
    assert pixels_of(few) is few
    assert stored(few) is images
    assert (len(few), few.shape, few.device) == (5, images.shape, images.device)
    for indices in (
        torch.tensor([3, 0, 3]),
        torch.tensor([[3, 0], [1, 1]]),
        slice(1, 3),
        torch.tensor([], dtype=torch.int64),
    ):
        assert torch.equal(few[indices], as_pixels(images)[indices])
    assert torch.equal(torch.cat(list(few.split(2))), as_pixels(images))
    assert torch.equal(pixels_of(images / 255), images / 255)  # floats stay floats


@pytest.mark.parametrize("name", [method.name for method in METHODS.values() if method.is_fixed_length])
def test_methods_of_other_papers_are_the_same(trained, monkeypatch, name):
    model, images, labels = trained
    settings = Settings(method_settings={"epochs": 1, "batch": 4})  # D_f is in two batches

    def weights():
        outcome = unlearn(model, images[:6], labels[:6], name, retain=Split(images[6:], labels[6:]), settings=settings)
        return outcome.model.state_dict().values()

    expected = weights()
    monkeypatch.setattr(image_sets, "MAX_FLOATS", 0)
    assert all(map(torch.equal, expected, weights()))


def test_unlearning_and_metrics_are_the_same(trained, monkeypatch):
    model, images, labels = trained
    settings = Settings(distill_steps=3, distill_cycles=1, distill_mixes=6, distill_forget=4)

    def results():
        outcomes = [
            unlearn(model, images[:6], labels[:6], "distill", settings=settings),
            unlearn(model, images[:6], labels[:6], "neggrad", settings=Settings(max_passes=2, bn="eval")),
        ]
        weights = [tensor for outcome in outcomes for tensor in outcome.model.state_dict().values()]
        predictions = accuracy.predict(model, pixels_of(images), batch_size=7)
        back, steps = relearn.steps_to_relearn_each(outcomes[0].model, images[:6], labels[:6])
        return [*weights, predictions, torch.tensor([-1 if one is None else one for one in back]), torch.tensor(steps)]

    expected = results()
    monkeypatch.setattr(image_sets, "MAX_FLOATS", 0)
    for before, after in zip(expected, results(), strict=True):
        assert torch.equal(before, after)
