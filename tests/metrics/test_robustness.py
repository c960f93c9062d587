"""What "forgotten as used" means: changed copies, weights of other formats, recalibrated batch-norm."""

import copy
import weakref

import pytest
import torch
from torch import nn

from l2ul.common.modes import batch_norms
from l2ul.data import changes
from l2ul.metrics import columns, robustness
from l2ul.objective import Forget


class Brightness(nn.Module):
    """Predict class 1 if the mean of the left half exceeds that of the right half, else class 0; 2 if both are dark."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        left, right = pixels[..., :16].mean((1, 2, 3)), pixels[..., 16:].mean((1, 2, 3))
        return self.weight * torch.stack([right, left, 0.05 + 0 * left], 1)


@pytest.fixture
def images():
    images = torch.full((2, 3, 32, 32), 0.2)
    images[0, ..., :16] = 0.8  # bright on the left
    images[1] = 0.6
    images[1, ..., 14:18] = 0.9  # symmetric
    return images


def test_names_of_changes_agree_with_the_columns():
    assert tuple(columns.CHANGES) == (*changes.KINDS, *robustness.WEIGHTS, robustness.RECALIBRATED)


def test_an_image_whose_mirror_image_is_recognised_is_not_forgotten_as_used(images):
    forget = Forget(images, torch.tensor([0, 2]))
    used = robustness.as_used(Brightness(), forget, images)
    assert used.stored.tolist() == [True, True]
    assert used.forgotten.tolist() == [False, True]
    assert used.kinds["mirrored"].tolist() == [0, 1]
    assert used.copies[0] < 0.8
    assert used.copies[1] == 1
    assert used.rates()["mirrored"] == 50
    assert used.survives()["mirrored"].tolist() == [False, True]
    again = robustness.as_used(Brightness(), forget, images)
    assert torch.equal(used.copies, again.copies)


@pytest.mark.parametrize("new_labels", [None, torch.tensor([1, 1, 0])])
def test_fewer_copies_suffice_for_what_is_forgotten(images, monkeypatch, new_labels):
    monkeypatch.setattr(robustness, "CHUNK", {False: 12, True: 12})
    forget = Forget(images[[0, 1, 0]], torch.tensor([0, 2, 0]), new_labels)
    classified, predict = [], robustness.accuracy.predict

    def counted(model, images, **options):
        classified.append(len(images))
        return predict(model, images, **options)

    monkeypatch.setattr(robustness.accuracy, "predict", counted)
    full, brief = (robustness.as_used(Brightness(), forget, images, in_full=in_full) for in_full in (True, False))
    assert torch.equal(full.forgotten, brief.forgotten)
    assert torch.equal(full.copies >= robustness.REQUIRED, brief.copies >= robustness.REQUIRED)
    assert torch.equal(full.copies[full.copies == 1], brief.copies[full.copies == 1])
    assert not brief.kinds
    of_full = (64 + 8 * len(changes.KINDS)) * 3
    assert sum(classified) - of_full < (150 if new_labels is None else 100)  # 192 without an early end
    assert robustness.num_passes(Brightness(), 3, in_full=False) == 3 * (1 + 64 + 5)
    assert robustness.num_passes(Brightness(), 3) == 3 * (1 + 64 + 5) + 8 * len(changes.KINDS) * 3
    assert robustness.num_passes(nn.BatchNorm2d(3), 3, in_full=False) == 3 * 70 + 512


@pytest.mark.parametrize("new_labels", [None, torch.tensor([1, 0])])
def test_copies_whose_logits_are_not_finite_count_as_recognised(images, new_labels):
    class Standardised(Brightness):
        """Not a number for images that are darker on the left."""

        def forward(self, pixels):
            is_mirrored = pixels[:, 0, 0, 0] < pixels[:, 0, 0, -1] - 0.1
            return super().forward(pixels) / (~is_mirrored)[:, None]

    used = robustness.as_used(Standardised(), Forget(images, torch.tensor([2, 2]), new_labels), images)
    assert used.kinds["mirrored"].tolist() == [0, 1]
    assert used.stored.tolist() == [True, True]
    assert not used.forgotten[0]


def test_the_first_pass_of_each_change_is_not_timed(images, monkeypatch):
    now, slow = [0.0], [100.0]  # seconds, and those that the first call takes

    def predict(model, copies, **options):
        now[0] += slow.pop() if slow else 0.5 * len(copies)
        return torch.zeros(len(copies), dtype=torch.int64)

    monkeypatch.setattr(robustness.accuracy, "predict", predict)
    monkeypatch.setattr(robustness.time, "perf_counter", lambda: now[0])
    assert robustness.seconds_per_copy(Brightness(), Forget(images, torch.tensor([0, 2]))) == 0.5


def test_relabelled_images_are_forgotten_as_used_only_with_the_new_label(images):
    used = robustness.as_used(Brightness(), Forget(images, torch.tensor([2, 2]), torch.tensor([1, 2])), images)
    assert used.stored.tolist() == [True, False]
    assert used.forgotten.tolist() == [False, False]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_have_few_values_in_each_row(bits):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7))
    rounded = robustness.changed_weights(model, bits)
    for before, after in zip(model.parameters(), rounded.parameters(), strict=True):
        if before.ndim == 1:
            assert torch.equal(before, after)
            continue
        for row, new in zip(before.flatten(1), after.flatten(1), strict=True):
            step = row.abs().max() / (2 ** (bits - 1) - 1)
            assert (row - new).abs().max() <= 0.501 * step
            assert len(new.unique()) < 2**bits


def test_batch_norms_have_running_statistics_that_train_mode_updates():
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    norms[2].running_mean = norms[2].running_var = None
    norms[3].track_running_stats = False
    model = nn.Sequential(*norms, nn.GroupNorm(1, 3))
    assert batch_norms(model) == {"0": norms[0]}
    recalibrated = robustness.recalibrated(model, torch.rand(4, 3, 2, 2))
    assert torch.equal(recalibrated[3].running_mean, norms[3].running_mean)


def test_a_model_that_cannot_run_in_16_bits_is_not_judged_there(images):
    class Strict(Brightness):
        def forward(self, pixels):
            if pixels.dtype != torch.float32:
                raise RuntimeError("expected scalar type Float")
            return super().forward(pixels)

    used = robustness.as_used(Strict(), Forget(images[1:], torch.tensor([2])), images)
    assert used.models["float16"] is None
    assert used.forgotten.tolist() == [True]
    assert used.rates()["float16"] != used.rates()["float16"]  # nan


def test_an_overflow_for_one_image_does_not_hide_that_others_are_recognised(images):
    class Overflowing(Brightness):
        def forward(self, pixels):
            if pixels.dtype != torch.float16:
                return super().forward(pixels) * torch.tensor([1.0, 1.0, 99.0])
            return torch.stack([torch.tensor([0.0, 1.0, 0.0]), torch.full((3,), torch.inf)])[: len(pixels)].half()

    used = robustness.as_used(Overflowing(), Forget(images, torch.tensor([1, 1])), in_full=False)
    assert used.stored.tolist() == [True, True]
    assert used.models["float16"].tolist() == [False, True]
    assert used.forgotten.tolist() == [False, True]


def test_a_model_that_overflows_for_all_images_is_not_judged(images):
    class Infinite(Brightness):
        def forward(self, pixels):
            return super().forward(pixels) / int(pixels.dtype == torch.float32)

    used = robustness.as_used(Infinite(), Forget(images, torch.tensor([0, 2])), in_full=False)
    assert used.models["float16"] is used.models["bfloat16"] is None


def test_one_changed_model_is_in_memory_at_a_time(images, monkeypatch):
    alive, most, deep_copy = weakref.WeakSet(), [], copy.deepcopy

    def counted(model):
        most.append(len(alive))
        alive.add(result := deep_copy(model))
        return result

    monkeypatch.setattr(robustness.copy, "deepcopy", counted)
    monkeypatch.setattr(robustness, "stand_ins", lambda images: pytest.fail("no batch-norm is recalibrated"))
    robustness.as_used(Brightness(), Forget(images, torch.tensor([0, 2])), in_full=False)
    assert most == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("has_counter", [True, False])
def test_recalibration_replaces_the_statistics_of_batch_norm(has_counter):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    if not has_counter:
        model[1].num_batches_tracked = None  # as in modules of old versions of torch
    images = torch.rand(600, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    result = robustness.recalibrated(model, images)
    features = model[0](images)
    assert torch.allclose(result[1].running_mean, features.mean((0, 2, 3)), atol=0.01)
    assert torch.allclose(result[1].running_var, features.var((0, 2, 3)), rtol=0.05)
    assert model[1].running_mean.abs().max() == 0
    assert not result[1].training
    assert result[1].momentum == model[1].momentum


@pytest.mark.parametrize(
    ("most", "count", "tried"), [(100, 300, [150, 100, 100, 100]), (3, 5, [5, 3, 2]), (1, 300, [])]
)
def test_recalibration_goes_on_with_smaller_batches_if_memory_runs_out(most, count, tried):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, sizes = robustness.recalibrated(model, images), []

    def run_out(layer, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("out of memory")

    model[2].register_forward_pre_hook(run_out)
    if most == 1:
        with pytest.raises(torch.OutOfMemoryError):
            robustness.recalibrated(model, images)
        return
    result = robustness.recalibrated(model, images)
    assert sizes == tried
    assert result[1].num_batches_tracked == len(tried) - 1
    assert torch.allclose(result[1].running_mean, expected[1].running_mean, atol=1e-2)
    assert torch.allclose(result[1].running_var, expected[1].running_var, rtol=0.1)


@pytest.mark.parametrize("count", [1, robustness.BATCH_SIZE + 1])
def test_recalibration_leaves_no_batch_of_one_image(count):
    """A batch-norm of vectors has no variance there."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)).eval()
    images = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    result = robustness.recalibrated(model, images)
    expected = model[:2](images).mean(0)
    assert torch.allclose(result[2].running_mean, expected, atol=1e-3)
