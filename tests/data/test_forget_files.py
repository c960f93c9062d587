"""Random forget sets, files of indices and of new labels."""

import shutil

from conftest import save_images
import pytest
import torch

from l2ul import models
from l2ul.cli import pretrain_command
from l2ul.common.errors import InputError
from l2ul.data import forget_set
from l2ul.models import checkpoint
from l2ul.training.recipe import Recipe
import main_unlearn


def test_random_forget_sets_of_a_seed_are_nested():
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
def test_a_bad_forget_file_raises_input_error(tmp_path, text, complaint):
    path = tmp_path / "forget.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        forget_set.read_forget(path, 10)


def test_an_unreadable_forget_file_raises_input_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "binary"):
        with pytest.raises(InputError, match=f"cannot read the forget file {path}"):
            forget_set.read_forget(path, 10)


def test_a_forget_file_keeps_its_order(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("7\n\n3\n9")
    assert forget_set.read_forget(path, 10).tolist() == [7, 3, 9]


FILES = ["d/train/cat/1.png", "d/train/cat/7.png", "d/train/dog/7.png", "d/train/dog/a b.png"]


def test_a_forget_file_may_name_files(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("dog/7.png\n0\n./train/cat/7.png\n")
    assert forget_set.read_forget(path, 4, FILES).tolist() == [2, 0, 1]
    path.write_text("a b.png\n")
    assert forget_set.read_forget(path, 4, FILES).tolist() == [3]
    composed, decomposed = "d/train/chat\u00e9/1.png", "d/train/chate\u0301/1.png"  # as on Linux, as on macOS
    for name, file in ((composed, decomposed), (decomposed, composed)):
        path.write_text(name.removeprefix("d/train/"))
        assert forget_set.read_forget(path, 2, ["d/train/cat/1.png", file]).tolist() == [1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("7.png\n", "'7.png' fits several training images, such as d/train/cat/7.png and d/train/dog/7.png; give more"),
        ("cow/7.png\n", "line 1 .* is 'cow/7.png'; expected an index or a training image, such as cat/1.png"),
        ("0\n.\n", "line 2 .* is '.'; expected an index"),
        ("4\n", "index 4; expected 0 to 3"),
        ("0\ncat/1.png\n", "index 0 more than once"),
    ],
)
def test_a_name_that_fits_no_image_or_several_raises_input_error(tmp_path, text, complaint):
    path = tmp_path / "forget.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        forget_set.read_forget(path, 4, FILES)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1\n2\n", "has 2 labels, but D_f has 3 images"),
        ("1\n2\n5\n", "label 5; expected a class, 0 to 4"),
        ("1\n1\n3\n", "label 2 of .* is the image's true label 1"),
    ],
)
def test_a_bad_relabel_file_raises_input_error(tmp_path, text, complaint):
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


@pytest.fixture
def pets(tmp_path):
    """Write a data set of 2 x 3 training and 2 test images in folders, and weights for it; return flags for both."""
    for part, count in (("train", 3), ("val", 1)):
        for kind in ("cat", "dog"):
            images = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(len(part)))
            save_images(tmp_path / "pets" / part / kind, images.to(torch.uint8))
    models.save(models.build("resnet20", 2), tmp_path / "net.safetensors", {})
    (tmp_path / "forget.txt").write_text("cat/1.png\n5\n")
    data = ["--dataset", "pets", "--data-dir", tmp_path, "--image-size", 32, "--workers", 0, "--model", "resnet20"]
    return data, ["--checkpoint", tmp_path / "net.safetensors", "--result-dir", tmp_path]


def test_a_command_takes_a_forget_file_with_names(script, pets, tmp_path):
    data, weights = pets
    words = ["--forget-file", tmp_path / "forget.txt", "--method", "before", "--no-cache"]
    code, _, err = script(main_unlearn.main, *data, *weights, *words)
    assert code == 0, err
    (forget_file,) = (tmp_path / "runs").glob("*.txt")
    assert forget_file.read_text().split() == ["1", "5"]


def test_a_folder_to_forget_with_a_copy_of_a_training_image_is_refused(script, pets, tmp_path):
    data, weights = pets
    (tmp_path / "own" / "cat").mkdir(parents=True)
    shutil.copy(tmp_path / "pets" / "train" / "cat" / "1.png", tmp_path / "own" / "cat" / "other.png")
    words = ["--forget-dir", tmp_path / "own", "--method", "before", "--no-cache"]
    code, _, err = script(main_unlearn.main, *data, *weights, *words)
    assert (code, "other.png is a training image of the data set; choose training images with" in err) == (2, True)


def test_training_leaves_out_images_by_name(script, pets, tmp_path):
    def main():
        recipe = Recipe(epochs=1, lr=0.1, crop_padding=2, flip=False)
        pretrain_command.main("main_pretrain_x.py", "Train.", "pets", "resnet20", recipe)

    words = ["--exclude", tmp_path / "forget.txt", "--batch-size", 4, "--output", tmp_path / "new.safetensors"]
    code, _, err = script(main, *pets[0], *words)
    assert code == 0, err
    assert checkpoint.read(tmp_path / "new.safetensors")[1]["excluded"] == [1, 5]
