"""Surrogate sets: parts of a data set, folders of images and other data sets."""

import json

from PIL import Image
import pytest
import torch

from l2ul.common.errors import InputError
from l2ul.data import surrogate
from l2ul.data.images import Images, Split
from l2ul.reporting import figure_set


def data_set(name="own", count=20, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (2 * count, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(2 * count) % 2
    train, test = Split(pixels[:count], labels[:count]), Split(pixels[count:], labels[count:])
    return Images(name, 2, ["a", "b"], train, test)


def no_other(name):
    raise AssertionError(name)


def test_a_range_of_the_test_set_is_taken_out_of_it():
    images = data_set()
    chosen, rest = surrogate.read("test:5-9", images, no_other)
    assert chosen.name == "test:5-9"
    assert torch.equal(chosen.images, images.test.images[5:9])
    assert torch.equal(rest.test.images, torch.cat([images.test.images[:5], images.test.images[9:]]))
    assert len(rest.test.labels) == 16
    assert rest.train is images.train


def test_the_hash_depends_on_the_images_alone():
    images = data_set()
    first, second = (surrogate.read(name, images, no_other)[0] for name in ("test:0-4", "test:4-8"))
    assert first.sha256 != second.sha256
    assert first.sha256 == surrogate.Surrogate("other", images.test.images[:4]).sha256


def test_a_folder_is_read_with_its_subfolders_in_the_size_of_the_data_set(tmp_path):
    (tmp_path / "week" / "monday").mkdir(parents=True)
    for place, name in enumerate(("b.png", "monday/a.jpg")):
        Image.new("RGB", (40, 30), (100 * place, 0, 0)).save(tmp_path / "week" / name)
    (tmp_path / "week" / "notes.txt").write_text("not an image")
    chosen, _ = surrogate.read(str(tmp_path / "week"), data_set(), no_other)
    assert (chosen.name, tuple(chosen.images.shape), chosen.images.dtype) == ("week", (2, 3, 8, 8), torch.uint8)
    assert chosen.images[:, 0].amax((1, 2)).tolist() == pytest.approx([0, 100], abs=3)


@pytest.mark.parametrize("name", [".", "../week", "monday/.."])
def test_a_folder_has_its_name_whatever_the_path(tmp_path, monkeypatch, name):
    (tmp_path / "week" / "monday").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "week" / "a.png")
    monkeypatch.chdir(tmp_path / "week")
    assert surrogate.read(name, data_set(), no_other)[0].name == "week"


def test_another_data_set_gives_its_training_images_in_the_size_of_this_one():
    other = data_set("cifar100", side=16, seed=1)
    chosen, rest = surrogate.read("cifar100", images := data_set(), lambda name: other)
    assert chosen.images.shape == (20, 3, 8, 8)
    assert rest is images


def test_a_large_set_is_reduced_to_what_fits_in_memory(monkeypatch):
    monkeypatch.setattr(surrogate, "LARGEST", 3 * 3 * 8 * 8)
    chosen, rest = surrogate.read("test:0-10", data_set(), no_other)
    assert (len(chosen.images), len(rest.test)) == (3, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test", "leaves no test images"),
        ("test:3-3", "expected a range within 0-20"),
        ("test:0-21", "expected a range within 0-20"),
        ("validation:0-3", "has no validation set"),
        ("nothing", "expected a folder of images"),
        ("own", "expected a folder of images"),
        ("{tmp}", "holds no images"),
    ],
)
def test_a_set_that_cannot_be_read_is_refused_in_one_sentence(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        surrogate.read(name.format(tmp=tmp_path), data_set(), no_other)


def test_a_folder_with_a_training_image_is_refused(tmp_path):
    images = data_set()
    Image.fromarray(images.train.images[3].permute(1, 2, 0).numpy()).save(tmp_path / "copy.png")
    with pytest.raises(InputError, match="is a training image of the data set"):
        surrogate.read(str(tmp_path), images, no_other)


def test_a_method_without_surrogate_images_has_a_run_for_each_part_of_the_test_set(run, tmp_path, few_digits):
    for part in ("test:0-10", "test:10-20", "test:0-10"):
        code, out, err = run("--method", "before", "--surrogate", part)
        assert code == 0, err
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    assert sorted(record["test_without"] for record in records) == ["test:0-10", "test:10-20"]
    assert {record["surrogate"] for record in records} == {None}
    for record in records:
        images = figure_set.load_images(record, tmp_path)  # a figure shows what is measured
        measured = slice(10, 20) if record["test_without"] == "test:0-10" else slice(10)
        assert torch.equal(images.test.images, few_digits.test.images[measured])
