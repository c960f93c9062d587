"""UTKFace: malformed file names, the split, age groups, pretraining and unlearning."""

from collections import Counter
import re

from conftest import FAST, REALDATA
import numpy as np
from PIL import Image
import pytest
import torch

from l2ul.cli import pretrain_command
from l2ul.common.errors import InputError
from l2ul.data import datasets, utkface
from l2ul.models import checkpoint
from l2ul.training import loop, pretrain
import main_pretrain_utkface_resnet18
import main_unlearn

ODD = ["39_1_20170116174525125.jpg.chip.jpg", "24_0_1_20170116220224657 .jpg.chip.jpg", "55_0_0_2017jpg.chip.jpg"]


def write_faces(folder, count=40, side=20):
    """Faces of ages 0, 3, 6, … with the odd names of the real folder among them; each image is of one colour."""
    folder.mkdir(parents=True)
    names = [f"{3 * i}_{i % 2}_{i % 5}_20170112{i:09d}.jpg.chip.jpg" for i in range(count - len(ODD))] + ODD
    for i, name in enumerate(names):
        Image.fromarray(np.full((side, side, 3), 6 * i, np.uint8)).save(folder / name, "JPEG")
    return names


def load(folder, **options):
    return datasets.load("utkface", folder, **({"image_size": 16, "age_grouping": "MFD"} | options))


def test_every_image_is_in_one_split_whatever_the_order_of_files(tmp_path, monkeypatch):
    write_faces(tmp_path / "utkface")
    images = load(tmp_path)
    assert (len(images.train), len(images.validation), len(images.test)) == (32, 4, 4)
    colours = [
        split.images.float().mean((1, 2, 3)).round().int().tolist()
        for split in (images.train, images.validation, images.test)
    ]
    assert max(Counter(sum(colours, [])).values()) == 1
    true_rglob = utkface.Path.rglob
    monkeypatch.setattr(utkface.Path, "rglob", lambda self, what: sorted(true_rglob(self, what), reverse=True))
    again = load(tmp_path)
    assert torch.equal(images.train.images, again.train.images)
    assert images.train_sha256 == again.train_sha256
    other = load(tmp_path, split_seed=1)
    assert images.train_sha256 != other.train_sha256
    assert load(tmp_path, age_grouping="tens").train_sha256 == images.train_sha256


def test_split_of_the_whole_set_has_the_published_sizes():
    parts = utkface.split_files([str(i) for i in range(23_708)], 0)
    assert [len(part) for part in parts] == [18_966, 2_371, 2_371]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(23_708))


def test_malformed_names_are_used_and_reported_and_names_without_an_age_left_out(tmp_path):
    write_faces(tmp_path / "utkface")
    (tmp_path / "utkface" / "mother.jpg").write_bytes(b"no image")
    images = load(tmp_path)
    malformed, left_out = images.notes
    assert malformed.startswith("UTKFace: 3 file names are malformed")
    assert all(name in malformed for name in ODD)
    assert left_out == "UTKFace: 1 files have no age in their names; they are left out"
    assert [utkface._age(name) for name in ODD] == [39, 24, 55]


@pytest.mark.parametrize(
    ("grouping", "ages", "classes"),
    [
        ("TNN", [0, 9, 10, 24, 59, 60, 119, 120, 130], [0, 0, 1, 3, 7, 8, 8, 8, 8]),
        ("MFD", [19, 20, 40, 41, 116, 120], [0, 1, 1, 2, 2, 2]),
        ("balanced", [19, 20, 30, 45, 200], [0, 1, 2, 3, 3]),
        ("groups", [3, 4, 12, 13, 61], [0, 1, 1, 2, 6]),
        ("tens", [10, 11, 110, 111, 116, 120], [0, 1, 10, 11, 11, 11]),
    ],
)
def test_class_is_the_first_bound_above_the_age(grouping, ages, classes):
    assert [utkface.age_class(age, grouping) for age in ages] == classes
    assert len(utkface.class_names(grouping)) == len(utkface.AGE_GROUPINGS[grouping])
    assert utkface.class_names("MFD") == ["0-19", "20-40", "41+"]


def test_images_are_centre_cropped_and_keep_their_pixel_values(tmp_path):
    write_faces(tmp_path / "utkface")
    images = load(tmp_path, image_size=32)
    assert images.train.images.shape[1:] == (3, 30, 30)
    assert images.train.images.dtype == torch.uint8
    whole = load(tmp_path, image_size=32, whole_train=True)
    assert torch.equal(whole.train.images[:, :, 1:31, 1:31], images.train.images)
    assert whole.test.images.shape[1:] == (3, 30, 30)
    assert images.train.images.max() > 200  # not divided by 255 on the way


def test_a_folder_without_faces_raises_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no folder .*utkface; put the aligned and cropped"):
        load(tmp_path)
    (tmp_path / "UTKFace").mkdir()
    with pytest.raises(InputError, match="has 0 images whose names begin with an age"):
        load(tmp_path)
    write_faces(tmp_path / "UTKFace" / "part1")
    write_faces(tmp_path / "UTKFace" / "part2")
    with pytest.raises(InputError, match="has two files of the same name"):
        load(tmp_path)


@pytest.fixture
def train(script, tmp_path):
    """Call the UTKFace script on the faces in tmp_path with a small net."""

    def call(*arguments):
        def main():
            recipe, by_grouping = main_pretrain_utkface_resnet18.RECIPE, main_pretrain_utkface_resnet18.BY_GROUPING
            pretrain_command.main("script", "Train.", "utkface", "resnet20", recipe, by_grouping)

        small = ["--data-dir", tmp_path, "--image-size", 16, "--epochs", 2, "--batch-size", 16, "--workers", 0]
        return script(main, *small, *arguments)

    return call


def test_pretraining_and_unlearning_use_the_same_split(train, script, tmp_path):
    write_faces(tmp_path / "utkface")
    code, out, err = train("--age_grouping", "MFD")
    assert code == 0, err
    assert out.count("malformed") == 1
    assert re.search(r"train 32 images \(0-19: \d+, 20-40: \d+, 41\+: \d+\)", out)
    weights = tmp_path / "weights" / "utkface_MFD_resnet20.safetensors"
    assert weights.exists()
    _, metadata = checkpoint.read(weights)
    assert metadata["lr"] == 1e-4
    assert "exists; add --rerun" in train("--age-grouping", "MFD")[1]

    def unlearn(*arguments):
        given = ["--dataset", "utkface", "--data-dir", tmp_path, "--model", "resnet20", "--age-grouping", "MFD"]
        return script(main_unlearn.main, *given, "--result-dir", tmp_path, *FAST, "--workers", 0, *arguments)

    code, out, err = unlearn("--image-size", 16, "--method", "before", "adv")
    assert code == 0, err
    assert "0 runs to do, 2 done" in unlearn("--image-size", 16, "--method", "before", "adv")[1]
    for arguments, complaint in (
        ([], "was trained with --image-size 16, not 128"),
        (["--image-size", 16, "--split-seed", 1], "was trained with --split-seed 0, not 1"),
    ):
        code, _, err = unlearn(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert complaint in err
    next((tmp_path / "utkface").iterdir()).unlink()
    code, _, err = unlearn("--image-size", 16)
    assert (code, err.count("\n")) == (2, 1)
    assert "was trained on other images of utkface" in err


def test_the_weights_of_the_best_epoch_are_kept(train, tmp_path, monkeypatch):
    write_faces(tmp_path / "utkface")
    found = iter([60.0, 70.0, 65.0, 50.0])  # after each of three epochs, then on the test images
    states = []

    def accuracy(predictions, labels):
        return next(found)

    true_fit = loop.fit

    def fit(model, *arguments, on_epoch, **options):
        def keep(row):
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            on_epoch(row)

        return true_fit(model, *arguments, on_epoch=keep, **options)

    monkeypatch.setattr(pretrain.accuracy, "accuracy", accuracy)
    monkeypatch.setattr(loop, "fit", fit)
    assert train("--age-grouping", "TNN", "--epochs", 3)[0] == 0
    saved, _ = checkpoint.read(tmp_path / "weights" / "utkface_TNN_resnet20.safetensors")
    best = {name.removeprefix("net."): value for name, value in states[1].items()}
    assert all(torch.equal(value, best[name]) for name, value in saved.items())
    assert not torch.equal(saved["linear.weight"], states[2]["net.linear.weight"])


def test_weights_with_other_settings_are_not_reused(train, tmp_path):
    write_faces(tmp_path / "utkface")
    assert train("--age-grouping", "MFD")[0] == 0
    for arguments, complaint in (
        (["--epochs", 3], "was trained with epochs 2, not 3; add --rerun"),
        (["--lr", 0.1], "was trained with lr 0.0001, not 0.1"),
        (["--split-seed", 1], "was trained with split_seed 0, not 1"),
    ):
        code, _, err = train("--age-grouping", "MFD", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert complaint in err


def test_a_training_on_other_images_is_not_resumed(train, tmp_path, monkeypatch):
    write_faces(tmp_path / "utkface")
    true_fit = loop.fit

    def stop(model, *arguments, on_epoch, **options):
        def end(row):
            raise KeyboardInterrupt

        return true_fit(model, *arguments, on_epoch=end, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "fit", stop)
        code, _, err = train("--age-grouping", "MFD")
    assert code == 130
    assert "with --resume to continue" in err
    next((tmp_path / "utkface").iterdir()).unlink()
    code, _, err = train("--age-grouping", "MFD", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "is from another recipe, model or data set" in err


def test_a_batch_of_one_image_is_reported(train, tmp_path):
    write_faces(tmp_path / "utkface")
    code, _, err = train("--age-grouping", "MFD", "--batch-size", 31, "--image-size", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "needs more than one value per channel" in err


@pytest.mark.realdata
def test_the_real_folder_has_five_malformed_names():
    files, (note,) = utkface._files(REALDATA)
    assert len(files) == 2505
    assert "5 file names are malformed" in note
