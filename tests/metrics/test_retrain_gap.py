"""Comparison with a retrained model, relearning and near-duplicates, on cases with a known value."""

import math

from conftest import tiny_net
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from l2ul.data.folder import FolderImages
from l2ul.data.images import Split
from l2ul.metrics import near_duplicates, relearn, retrain_gap


def test_js_divergence_is_in_bits_summed_over_classes_and_averaged_over_images():
    even, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1000.0, 0.0]])
    entropy = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)  # of the mean of the two
    assert retrain_gap.js_divergence(even, sure) == pytest.approx(entropy - 0.5)
    assert retrain_gap.js_divergence(sure, sure.flip(1)) == pytest.approx(1)
    assert retrain_gap.js_divergence(sure, sure + 3) == 0
    both = torch.cat([sure, sure]), torch.cat([sure, sure.flip(1)])
    assert retrain_gap.js_divergence(*both) == retrain_gap.js_divergence(*reversed(both)) == pytest.approx(0.5)
    many = torch.full((1, 100), -50.0)
    first, second = many.index_fill(1, torch.tensor(3), 50), many.index_fill(1, torch.tensor(7), 50)
    assert retrain_gap.js_divergence(first, second) == pytest.approx(1)  # for any number of classes


def test_tug_of_war_is_one_for_the_retrained_model_only():
    assert retrain_gap.tug_of_war([0, 0, 0]) == 1
    assert retrain_gap.tug_of_war([10, 20, 50]) == pytest.approx(0.9 * 0.8 * 0.5)
    assert retrain_gap.tug_of_war([100, 0, 0]) == 0


def test_features_are_compared_on_equally_many_images_of_each_part(trained):
    net, images, labels = trained
    few, many = Split(images[:7], labels[:7]), Split(images[7:], labels[7:])
    splits = retrain_gap.comparison_images(few, many)
    assert torch.equal(splits["forget"], images[:7])
    assert len(splits["test"]) == 7
    assert torch.equal(retrain_gap.comparison_images(few, many)["test"], splits["test"])
    assert retrain_gap.feature_similarity(net, net, splits) == pytest.approx({"forget": 1, "test": 1})
    other = retrain_gap.feature_similarity(tiny_net(3), net, splits)
    assert all(0 < value < 0.999 for value in other.values())
    single = retrain_gap.comparison_images(Split(images[:1], labels[:1]), Split(images[7:], labels[7:]))
    assert all(math.isnan(value) for value in retrain_gap.feature_similarity(net, net, single).values())


class Lever(nn.Module):
    """Return the logits w and -w for every image."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, pixels):
        return torch.stack([self.weight, -self.weight]).expand(len(pixels), 2)


def test_relearning_takes_as_many_steps_as_sgd_on_one_weight(monkeypatch):
    images, labels = torch.zeros(100, 3, 2, 2, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    weight, speed, steps = -0.05, 0.0, 0
    while weight < 0:  # the loss is log(1 + exp(-2 w))
        speed = 0.9 * speed - 2 / (1 + math.exp(2 * weight))
        weight, steps = weight - 1e-3 * speed, steps + 1
    net = Lever(-0.05)
    assert relearn.steps_to_relearn(net, images, labels, 100.0) == steps > 5
    assert net.weight == -0.05
    assert relearn.steps_to_relearn(Lever(0.1), images, labels, 100.0) == 0
    assert relearn.steps_to_relearn(Lever(-1.0), images, labels, 0.0) == 0
    monkeypatch.setattr(relearn, "MAX_STEPS", 20)
    assert relearn.steps_to_relearn(Lever(-100.0), images, labels, 100.0) == 20


def test_relearning_freezes_batch_norm_and_is_repeatable(trained):
    net, images, labels = trained
    wrong = (labels + 1) % 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = relearn.steps_to_relearn(net.train(), images, wrong, 40.0)
    assert 0 < first < relearn.MAX_STEPS
    assert first == relearn.steps_to_relearn(net.eval(), images, wrong, 40.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def noise(count, side, seed=0):
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(seed))


def test_near_duplicates_are_counted_by_correlation_of_pixels():
    device = torch.device("cpu")
    forget, others = noise(2, 16), noise(50, 16, seed=1)

    def count(retain, **how):
        return near_duplicates.count_near_duplicates(forget, retain, device, **how)

    assert count(others) == 0
    same = torch.cat(
        [others, forget[:1], forget[1:].flip(3), 0.3 * forget[:1] + 0.5]
    )  # copy, mirror image, less contrast
    assert count(same) == count(same, batch_size=7) == 3
    assert count(torch.cat([forget, forget])) == 4
    one, two = (F.normalize(part.flatten() - part.mean(), dim=0) for part in (forget[0], others[0]))
    aside = F.normalize(two - (two @ one) * one, dim=0)
    mixed = [(one + c * aside).view(1, 3, 16, 16) / 4 + 0.5 for c in (0.32, 0.34)]  # correlations 1 / √(1 + c²)
    assert [count(image) for image in mixed] == [1, 0]  # 0.952 and 0.947
    assert count(torch.full((3, 3, 16, 16), 0.4)) == 0
    assert near_duplicates.count_near_duplicates(torch.full((1, 3, 16, 16), 0.4), others, device) == 0


def test_near_duplicates_of_large_images_on_disk(tmp_path):
    small = (noise(4, 32) * 255).to(torch.uint8)
    large = F.interpolate(small, scale_factor=2, mode="nearest")
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file, image in zip(files, large, strict=True):
        to_pil_image(image).save(file)
    retain = FolderImages([str(file) for file in files], 64, 64)
    assert near_duplicates.count_near_duplicates(large[1:3], retain, torch.device("cpu"), batch_size=3) == 2
