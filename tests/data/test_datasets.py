"""Data sets in their official file formats, the choice of D_f, and files of indices and labels."""

import csv
import hashlib
import pickle

from conftest import REALDATA
from helpers import write_folder
import numpy as np
import pytest
import torch
from torchvision import datasets

from l2ul.common.errors import InputError
from l2ul.data import datasets as datasets_module
from l2ul.data import forget_set
from l2ul.data import images as image_sets
from l2ul.metrics import accuracy


def test_digits_are_the_real_ones():
    images = datasets_module.load("digits", "nowhere")
    assert (len(images.train), len(images.test), images.num_classes) == (1438, 359, 10)
    assert images.train.images.dtype == torch.uint8
    assert images.train.images.shape[1:] == (3, 32, 32)
    assert images.train.images.max() == 255
    assert torch.equal(images.train.images[:, 0], images.train.images[:, 2])
    assert set(images.test.labels.tolist()) == set(range(10))


def write_cifar(root, kind, monkeypatch, count=4):
    """A folder in CIFAR's official python format, with its own check sums."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels, sums = {}, {}
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    for name, _ in [*kind.train_list, *kind.test_list]:
        pixels[name] = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels[name], key: list(range(count))})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(10)]})
    (folder / kind.meta["filename"]).write_bytes(meta)
    for attribute in ("train_list", "test_list"):
        listed = [[name, sums[name]] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, listed)
    monkeypatch.setitem(kind.meta, "md5", hashlib.md5(meta).hexdigest())
    return folder, pixels


@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_reads_the_official_cifar_files(tmp_path, monkeypatch, name, kind):
    folder, pixels = write_cifar(tmp_path, kind, monkeypatch)
    images = datasets_module.load(name, tmp_path)
    first = next(iter(pixels.values()))[1].reshape(3, 32, 32)  # planes of red, green and blue
    assert torch.equal(images.train.images[1], torch.from_numpy(first))
    assert images.train.labels[:4].tolist() == [0, 1, 2, 3]
    assert images.classes[3] == "class 3"
    assert len(images.train) == 4 * len(kind.train_list)
    next(folder.iterdir()).write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{name} is not complete in .*--data-dir"):
        datasets_module.load(name, tmp_path, download=False)


def test_says_so_when_a_download_fails(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(InputError, match="could not be downloaded .no route to host"):
        datasets_module.load("cifar10", tmp_path)


def test_reads_a_folder_of_images_as_a_stream(tmp_path):
    write_folder(tmp_path / "insects")
    images = datasets_module.load("insects", tmp_path, image_size=32)
    assert (images.classes, images.num_classes, len(images.train)) == (["ant", "bee"], 2, 6)
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    picked = images.train.images[torch.tensor([5, 0])]
    assert picked.dtype == torch.uint8
    assert picked.shape == (2, 3, 32, 32)
    assert picked[:, 0].flatten(1).unique(dim=1).tolist() == [[12], [0]]
    subset = images.train.subset(torch.tensor([5, 0]))
    assert torch.equal(subset.images[torch.arange(2)], picked)
    for workers in (0, 2):
        streamed = torch.cat(list(image_sets.batches(images.train.images, 4, torch.device("cpu"), workers)))
        assert torch.equal(streamed, images.train.images[torch.arange(6)] / 255)


def test_of_imagenet_the_folders_names_decide_the_classes_where_only_some_are_there(tmp_path):
    write_folder(tmp_path / "imagenet", ("n02110341", "n01440764"))  # dalmatian and tench
    images = datasets_module.load("imagenet", tmp_path, image_size=32)
    assert images.num_classes == len(set(images.classes)) == 1000
    assert sorted(images.train.labels.tolist()) == [0] * 3 + [251] * 3
    assert sorted(images.test.labels.tolist()) == [0] * 3 + [251] * 3
    write_folder(tmp_path / "imagenet", ("tench",), ("train",))
    with pytest.raises(InputError, match="train has a class 'tench'; expected an ImageNet-1k class"):
        datasets_module.load("imagenet", tmp_path)


@pytest.mark.realdata
def test_classes_of_imagenet_are_those_of_the_real_images():
    wnids = datasets_module.WNIDS.read_text().split()
    with open(REALDATA / "imagenet" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert all(wnids[int(row["class_index"])] == row["file"].split("/")[0] for row in rows)


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no data set 'nothing': expected digits, cifar10"):
        datasets_module.load("nothing", tmp_path)
    write_folder(tmp_path / "one", parts=("train",))
    with pytest.raises(InputError, match="val"):
        datasets_module.load("one", tmp_path)
    write_folder(tmp_path / "one", ("ant", "cat"), ("test",))
    with pytest.raises(InputError, match="has a class 'cat'; expected one that is in"):
        datasets_module.load("one", tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    write_folder(tmp_path / "insects")
    damaged = tmp_path / "insects" / "train" / "ant" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    images = datasets_module.load("insects", tmp_path, image_size=32).train.images
    with pytest.raises(InputError, match="cannot read the image .*1.png"):
        images[torch.tensor([1])]


def test_forget_sets_of_a_seed_are_nested():
    many = forget_set.choose_forget(1000, 256, seed=5)
    torch.manual_seed(5)
    assert torch.equal(many, torch.randperm(1000)[:256])  # as the released scripts choose
    for k in (1, 16, 64):
        assert torch.equal(forget_set.choose_forget(1000, k, seed=5), many[:k])
    assert not torch.equal(forget_set.choose_forget(1000, 256, seed=6), many)
    for k in (0, -3, 1000, 1001):
        with pytest.raises(InputError, match=f"k is {k}; expected 1 to 999"):
            forget_set.choose_forget(1000, k, seed=5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1\ntwo\n", "line 2 .* is 'two'; expected a whole number"),
        ("1\n2.5\n", "line 2 .* is '2.5'"),
        ("4\n7\n4\n", "index 4 more than once"),
        ("4\n10\n", "index 10; expected 0 to 9"),
        ("-1\n", "index -1; expected 0 to 9"),
        ("99999999999999999999\n", "expected a whole number"),
        ("".join(f"{i}\n" for i in range(10)), "lists all 10 training images"),
        ("\n \n", "is empty"),
    ],
)
def test_bad_forget_files(tmp_path, text, complaint):
    path = tmp_path / "forget.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        forget_set.read_forget(path, 10)


def test_unreadable_forget_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "binary"):
        with pytest.raises(InputError, match=f"cannot read the forget file {path}"):
            forget_set.read_forget(path, 10)


def test_forget_file_keeps_its_order(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("7\n\n3\n9")
    assert forget_set.read_forget(path, 10).tolist() == [7, 3, 9]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1\n2\n", "has 2 labels, but 3 images"),
        ("1\n2\n5\n", "label 5; expected 0 to 4"),
        ("1\n1\n3\n", "label 2 of .* is the image's true label 1"),
    ],
)
def test_bad_relabel_files(tmp_path, text, complaint):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        forget_set.read_new_labels(path, torch.tensor([0, 1, 2]), 5)


def test_random_new_labels_are_other_classes_and_nested():
    labels = torch.arange(300) % 10
    new = forget_set.random_new_labels(labels, 10, seed=2)
    assert (new != labels).all()
    assert set(new.tolist()) == set(range(10))
    assert torch.equal(forget_set.random_new_labels(labels[:16], 10, seed=2), new[:16])


def test_pixels_are_scaled_once():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(image_sets.as_pixels(images).flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(image_sets.as_pixels(image_sets.as_pixels(images)), image_sets.as_pixels(images))


def test_predictions_accuracy_and_the_rest():
    class Blue(torch.nn.Module):
        """Calls an image 1 where blue is brighter than red; nan for a black one."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0]))

        def forward(self, x):
            total = x.sum((1, 2, 3))
            return torch.stack([x[:, 0].mean((1, 2)), x[:, 2].mean((1, 2))], 1) * self.weight * (total / total)[:, None]

    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = 9
    images[torch.tensor([1, 4]), 2] = 200
    found = accuracy.predict(Blue(), images, batch_size=2)
    assert found.tolist() == [0, 1, 0, 0, 1]
    assert accuracy.accuracy(found, torch.tensor([0, 1, 1, 0, 0])) == pytest.approx(60)
    assert accuracy.complement(torch.tensor([3, 1]), 5).tolist() == [0, 2, 4]
    images[2] = 0
    with pytest.raises(ArithmeticError, match="1 of 5 images"):
        accuracy.predict(Blue(), images)
    with pytest.raises(InputError, match="tells 2 classes apart, the data set has 10"):
        accuracy.check_fit(Blue(), images[:1] + 1, 10)
