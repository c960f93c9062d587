"""D_adv in a file: the same examples as in memory, and 8-bit ones that are valid images."""

from conftest import CLASSES
import pytest
import torch

from l2ul import attack
from l2ul.common.cache import Cache
from l2ul.common.errors import InputError
from l2ul.data import storage
from l2ul.data.images import Split
from l2ul.experiments.adversarial_sets import Attack
from l2ul.metrics import accuracy
from l2ul.unlearn import Settings, unlearn

NAMES = {dtype: name for name, dtype in storage.DTYPES.items()}


def make(trained, count, folder, dtype=torch.float32, batch_size=None):
    """D_adv of the first images, kept as dtype, in a file in the folder where they do not fit."""
    model, images, labels = trained
    how = Attack(CLASSES, 4, 2.0, 0.3, 5, 1, NAMES[dtype], batch_size=batch_size, scratch_dir=folder)
    made = how.make(model, images[:count], labels[:count], cache=Cache(), progress=lambda count: None)
    return made.examples, made.targets


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(storage, "IN_MEMORY", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_a_file_holds_what_memory_holds(trained, tmp_path, monkeypatch, dtype):
    model, *_ = trained
    expected, targets = make(trained, 6, tmp_path, dtype)
    assert isinstance(expected, torch.Tensor)
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    found, same = make(trained, 6, tmp_path, dtype, batch_size=7)
    assert isinstance(found, storage.DiskImages)
    assert (found.shape, len(found), found.dtype) == (expected.shape, 24, dtype)
    assert torch.equal(targets, same)
    some = torch.tensor([23, 0, 7, 7])
    tolerance = 1.01 if dtype == torch.uint8 else 1e-3 if dtype == torch.float16 else 1e-5
    assert (found[some].double() - expected[some].double()).abs().max() < tolerance
    with pytest.raises(ValueError, match="is not the head of a set"):
        found[2:8]
    head = found[:8]
    assert (len(head), len(found)) == (8, 24)
    assert torch.equal(head[torch.tensor([7])], found[torch.tensor([7])])
    assert not list(tmp_path.iterdir())  # a file without a name: nothing is left behind
    called = accuracy.predict(model, found, batch_size=5)
    assert torch.equal(called, accuracy.predict(model, found[torch.arange(24)], batch_size=5))


def test_eight_bits_are_the_nearest(trained, tmp_path):
    exact, _ = make(trained, 3, tmp_path)
    rounded, _ = make(trained, 3, tmp_path, torch.uint8)
    assert (rounded.float() / 255 - exact).abs().max() <= 0.5 / 255 + 1e-6


def test_unlearns_with_examples_from_a_file(trained, tmp_path, on_disk):
    model, images, labels = trained
    made = make(trained, 4, tmp_path)
    settings = Settings(unlearn_lr=0.01, batch_size=4, adv_batch_size=8, max_passes=3)
    outcome = unlearn(model, images[:4], labels[:4], "adv", adv=made, settings=settings)
    in_memory = made[0][torch.arange(16)], made[1]
    again = unlearn(model, images[:4], labels[:4], "adv", adv=in_memory, settings=settings)
    assert outcome.curve == again.curve
    assert len(Split(*made)) == 16


def test_a_full_disk_is_said_before_the_attack(trained, tmp_path, on_disk, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    monkeypatch.setattr(attack, "pgd_l2", None)
    with pytest.raises(InputError, match="the adversarial examples take .* GiB, and .* has 0.0 GiB left; make room"):
        make(trained, 4, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(trained, tmp_path, on_disk):
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
