"""Adversarial examples in a memory-mapped file equal those in memory; 8-bit examples are valid images."""

from pathlib import Path
import sys

from conftest import CLASSES
import pytest
import torch

from l2ul import attack
from l2ul.common.cache import Cache
from l2ul.common.errors import InputError
from l2ul.data import storage
from l2ul.data.images import Split
from l2ul.experiments.adversarial_sets import Attack
from l2ul.methods.settings import AttackSettings
from l2ul.metrics import accuracy
from l2ul.unlearn import Settings, unlearn

NAMES = {dtype: name for name, dtype in storage.DTYPES.items()}


def make(trained, count, folder, dtype=torch.float32, batch_size=None):
    """Return examples and targets of D_adv for the first `count` images."""
    model, images, labels = trained
    attack = Attack(CLASSES, AttackSettings(4, 2.0, 0.3, 5, NAMES[dtype]), 1, batch_size=batch_size, scratch_dir=folder)
    made = attack.make(model, images[:count], labels[:count], cache=Cache(), progress=lambda count: None)
    return made.examples, made.targets


@pytest.fixture
def on_disk(monkeypatch):
    """Store all adversarial examples on disk; return the shapes of the tensors that were."""
    shapes, memory_mapped = [], storage._memory_mapped

    def record(shape, *arguments):
        shapes.append(shape)
        return memory_mapped(shape, *arguments)

    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    monkeypatch.setattr(storage, "_memory_mapped", record)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_examples_on_disk_equal_those_in_memory(trained, tmp_path, request, dtype):
    model, *_ = trained
    expected, targets = make(trained, 6, tmp_path, dtype)
    on_disk = request.getfixturevalue("on_disk")
    stored, same_targets = make(trained, 6, tmp_path, dtype, batch_size=7)
    assert on_disk == [(24, 3, 8, 8)]
    assert (stored.shape, len(stored), stored.dtype) == (expected.shape, 24, dtype)
    assert torch.equal(targets, same_targets)
    some = torch.tensor([23, 0, 7, 7])
    tolerance = 1.01 if dtype == torch.uint8 else 1e-3 if dtype == torch.float16 else 1e-5
    assert (stored[some].double() - expected[some].double()).abs().max() < tolerance
    head = stored[:8]
    assert (len(head), len(stored)) == (8, 24)
    assert torch.equal(head[torch.tensor([7])], stored[torch.tensor([7])])
    assert not list(tmp_path.iterdir())  # the file has no name, so nothing is left behind
    predictions = accuracy.predict(model, stored, batch_size=5)
    assert torch.equal(predictions, accuracy.predict(model, stored.clone(), batch_size=5))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_set_on_disk_is_a_file_that_goes_with_the_tensor(tmp_path, on_disk):
    def is_mapped():
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    images = storage.empty_images((5, 3, 8, 8), torch.float32, torch.device("cpu"), tmp_path)
    images[2:4] = 0.5
    assert is_mapped()
    assert images.flatten(1).amax(1).tolist() == [0, 0, 0.5, 0.5, 0]
    del images
    assert not is_mapped()


def test_uint8_examples_are_rounded_to_the_nearest_level(trained, tmp_path):
    exact, _ = make(trained, 3, tmp_path)
    rounded, _ = make(trained, 3, tmp_path, torch.uint8)
    assert (rounded.float() / 255 - exact).abs().max() <= 0.5 / 255 + 1e-6


def test_unlearning_with_examples_on_disk_equals_unlearning_in_memory(trained, tmp_path, on_disk):
    model, images, labels = trained
    made = make(trained, 4, tmp_path)
    settings = Settings(unlearn_lr=0.01, batch_size=4, adv_batch_size=8, max_passes=3)
    outcome = unlearn(model, images[:4], labels[:4], "adv", adv=made, settings=settings)
    in_memory = made[0].clone(), made[1]
    again = unlearn(model, images[:4], labels[:4], "adv", adv=in_memory, settings=settings)
    assert outcome.curve == again.curve
    assert len(Split(*made)) == 16


def test_a_full_disk_is_reported_before_the_attack(trained, tmp_path, on_disk, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    monkeypatch.setattr(attack, "pgd_l2", None)
    with pytest.raises(
        InputError, match="the adversarial examples need .* GiB, and .* has 0.0 GiB free; free some space"
    ):
        make(trained, 4, tmp_path)


def test_an_unwritable_folder_raises_input_error(trained, tmp_path, on_disk):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*file"):
        make(trained, 4, tmp_path / "file")


def test_small_sets_stay_in_memory(trained, tmp_path):
    made, _ = make(trained, 2, tmp_path / "none")
    assert isinstance(made, torch.Tensor)
    assert not (tmp_path / "none").exists()


def test_large_images_are_attacked_in_smaller_batches():
    cpu = torch.device("cpu")
    assert attack.default_batch_size(cpu, 32) == 8 * attack.default_batch_size(cpu, 224) == 128
