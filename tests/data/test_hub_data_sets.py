"""Data sets of Hugging Face `datasets`: folders that save_to_disk wrote, and names of the hub without a network."""

import json
import pickle
import socket
import sys

from helpers import load_records, without_costs, write_cifar
import numpy as np
from PIL import Image
import pytest
import torch
from torchvision.datasets import CIFAR10

from l2ul.cli import pretrain_command
from l2ul.common.errors import InputError
from l2ul.data import datasets as data_sets
from l2ul.data import folder, huggingface, storage, surrogate
from l2ul.data.folder import FolderImages
from l2ul.data.forget_set import files_of, read_folder
from l2ul.data.images import batches
from l2ul.metrics import preflight
from l2ul.models import checkpoint
from l2ul.reporting import figure_set
import main_pretrain_mnist_lenet
import main_unlearn

datasets = pytest.importorskip("datasets")
LABEL = datasets.ClassLabel(names=["ant", "bee"])


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def pixels(count, size=(8, 8), seed=0):
    """Return random colour images (count, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def table(images, labels=None, label=LABEL, **columns):
    """Return a data set of images, labelled 0, 1, 0, 1, …, and of further columns (feature, values)."""
    labels = [number % 2 for number in range(len(images))] if labels is None else labels
    features = datasets.Features({"image": datasets.Image(), "label": label} | {n: f for n, (f, _) in columns.items()})
    values = {"image": [Image.fromarray(image) for image in images], "label": labels}
    return datasets.Dataset.from_dict(values | {name: rows for name, (_, rows) in columns.items()}, features)


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def load(name, data_dir="nowhere", **options):
    return data_sets.load(name, data_dir, **options)


def test_the_same_images_as_cifar10_give_the_same_records(script, tmp_path, monkeypatch):
    write_cifar(tmp_path / "data", CIFAR10, monkeypatch)
    official = data_sets.load("cifar10", tmp_path / "data")
    classes = datasets.ClassLabel(names=official.classes)
    train, test = (
        table(split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist(), classes)
        for split in (official.train, official.test)
    )
    save(tmp_path / "data" / "copy", train=train, test=test)
    run = ["--data-dir", tmp_path / "data", "--model", "resnet20", "--threads", 1, "--unlearn-k", 3, "--no-cache"]
    run += ["--checkpoint", "data/weights/digits_resnet20.safetensors", "--method", "neggrad", "distill"]
    run += ["--max-passes", 2, "--distill-steps", 4, "--distill-cycles", 1, "--distill-mixes", 8, "--batch-size", 2]
    for name in ("cifar10", "hf:copy"):
        code, _, err = script(main_unlearn.main, "--dataset", name, "--result-dir", tmp_path / name[:2], *run)
        assert code == 0, err
    ours, theirs = (
        {record["method"]: (identity, record) for identity, record in load_records(tmp_path / part).items()}
        for part in ("hf", "ci")
    )
    table_keys = {"image_column": "image", "label_column": "label", "train_split": "train", "test_split": "test"}
    for method, (identity, record) in theirs.items():
        mine, own = ours[method]
        assert without_costs(own) == without_costs(record) | {"dataset": "hf:copy"} | table_keys
        with (
            np.load(tmp_path / "ci" / "runs" / f"{identity}.npz") as a,
            np.load(tmp_path / "hf" / "runs" / f"{mine}.npz") as b,
        ):
            assert all(np.array_equal(a[key], b[key]) for key in (*a.files, *b.files))
    absolute = ["--dataset", f"hf:{tmp_path / 'data' / 'copy'}", "--result-dir", tmp_path / "hf"]
    assert "0 runs to do, 2 done" in script(main_unlearn.main, *absolute, *run)[1]
    (tmp_path / "forget.txt").write_text("4\n0\n")
    chosen = ["--forget-file", tmp_path / "forget.txt", "--unlearn-k", 2, "--result-dir", tmp_path / "chosen"]
    assert script(main_unlearn.main, "--dataset", "hf:copy", *run, *chosen, "--method", "before")[0] == 0
    assert [path.read_text().split() for path in (tmp_path / "chosen" / "runs").glob("*.txt")] == [["4", "0"]]


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_folder_holds_no_images_of_a_data_set_on_disk(tmp_path, is_saved):
    name = f"hf:{tmp_path / 'set'}"
    for number, place in enumerate(("train/ant/0", "train/bee/1", "test/ant/2", "test/bee/3")):
        file = tmp_path / "set" / f"{place}.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(pixels(1, (9, 8 + number), seed=number)[0]).save(file)  # of several sizes: they stay on disk
    if is_saved:  # in a table, not by the paths of their files
        datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set")).save_to_disk(tmp_path / "saved")
        name = f"hf:{tmp_path / 'saved'}"
    images = load(name)
    assert (images.train.images.files[0].column.values[0].as_py()["bytes"] is not None) == is_saved
    digests = images.train.sha256(), images.train.images.listing_sha256()
    copy = tmp_path / "forget" / "ant" / "0.png"
    copy.parent.mkdir(parents=True)
    for what, file in (("training", "train/bee/1.png"), ("test", "test/bee/3.png")):
        copy.write_bytes((tmp_path / "set" / file).read_bytes())
        with pytest.raises(InputError, match=f"0.png is a {what} image of the data set; choose training images with"):
            read_folder(tmp_path / "forget", images)
        with pytest.raises(InputError, match=f"0.png is a {what} image of the data set; a surrogate set must not"):
            surrogate.read(str(tmp_path / "forget"), images, load)
    Image.fromarray(pixels(1, seed=9)[0]).save(copy)
    assert len(read_folder(tmp_path / "forget", images)) == 1
    (tmp_path / "set" / "train/ant/0.png").write_bytes(
        copy.read_bytes()
    )  # which a table with its bytes does not notice
    for digest, now in zip(digests, (images.train.sha256(), images.train.images.listing_sha256()), strict=True):
        assert (digest == now) == is_saved


def test_square_images_of_one_size_stay_as_they_are(tmp_path, monkeypatch):
    images = pixels(6)
    name = save(tmp_path / "insects", train=table(images[:4]), test=table(images[4:]))
    loaded = load(name)
    assert (loaded.name, loaded.classes, loaded.num_classes) == ("hf:insects", ["ant", "bee"], 2)
    assert torch.equal(loaded.train.images, torch.from_numpy(images[:4]).permute(0, 3, 1, 2))
    assert torch.equal(loaded.test.images, torch.from_numpy(images[4:]).permute(0, 3, 1, 2))
    assert loaded.train.labels.tolist() == [0, 1, 0, 1]
    assert "image_size" not in loaded.settings
    monkeypatch.setattr(storage, "IN_MEMORY", 4 * 3 * 8 * 8 - 1)  # bytes: the training set is larger
    large = load(name)
    assert isinstance(large.train.images, FolderImages)
    assert isinstance(large.test.images, torch.Tensor)
    for workers in (0, 2):
        streamed = torch.cat(list(batches(large.train.images, 3, torch.device("cpu"), workers)))
        assert torch.equal(streamed, loaded.train.images / 255)
    assert torch.equal(large.train.subset(torch.tensor([3, 0])).pixels(), loaded.train.images[[3, 0]])
    assert files_of(large.train) == []  # a forget file lists rows, not files
    assert torch.equal(folder._Encoded(large.train.images)[1], loaded.train.images[1])
    again = pickle.loads(pickle.dumps(large.train))  # as in another process
    assert torch.equal(again.pixels(), loaded.train.images)
    digest = large.train.sha256()
    assert load(name).train.sha256() == digest
    save(tmp_path / "insects", train=table(images[2:]), test=table(images[4:]))
    assert load(name).train.sha256() != digest


def test_weights_of_a_part_of_a_split_are_not_tested_on_another_part_of_it(tmp_path):
    name = save(tmp_path / "set", train=table(pixels(8)), test=table(pixels(2, seed=1)))
    metadata = {"dataset": "hf:set", "epochs": 3, "train_split": "train[:6]"}
    halves = load(name, train_split="train[:4]", test_split="train[4:]")
    with pytest.raises(InputError, match=r"w was trained on --train-split train\[:6\], which may hold"):
        preflight.check_trained_on(halves, metadata, "w")
    preflight.check_trained_on(load(name, train_split="train[:6]", test_split="train[6:]"), metadata, "w")
    preflight.check_trained_on(load(name), metadata, "w")
    preflight.check_trained_on(halves, {}, "w")


def test_other_images_are_resized_as_those_of_a_folder(tmp_path):
    images = [*pixels(2, (40, 60)), *pixels(2, (70, 50))]
    name = save(tmp_path / "insects", train=table(images), validation=table(images[:2]))
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    expected = FolderImages([str(tmp_path / f"{number}.png") for number in range(4)], 32)
    loaded = load(name, image_size=32)
    assert loaded.settings["image_size"] == 32
    assert loaded.settings["test_split"] == "validation"
    assert torch.equal(loaded.train.pixels(), expected[torch.arange(4)])
    assert load(name).side == 224
    square = save(tmp_path / "squares", train=table(pixels(2)), test=table(pixels(2)))
    assert load(square, image_size=6).side == 6


def test_images_with_a_file_beside_the_table_and_with_an_exif_orientation(tmp_path):
    photo = Image.fromarray(pixels(1, (8, 8))[0])
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.png", exif=exif)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int64")})
    rows = {"photo": [str(tmp_path / "photo.png")] * 2, "kind": [0, 1]}
    beside = datasets.Dataset.from_dict(rows, features)
    loaded = load(save(tmp_path / "copied", train=beside, test=beside))
    assert loaded.classes == ["0", "1"]
    assert np.array_equal(loaded.train.images[0].permute(1, 2, 0).numpy(), np.asarray(photo))
    assert "hf:copied/train: 2 of 2 images have an EXIF orientation (train/0, train/1)" in loaded.notes[0]
    column = huggingface.ImageColumn(
        "beside", beside.select_columns(["photo"]).cast_column("photo", datasets.Image(decode=False)), ""
    )
    assert huggingface.Row(column, 1).read_bytes() == (tmp_path / "photo.png").read_bytes()
    (tmp_path / "photo.png").unlink()
    with pytest.raises(InputError, match="cannot read the image beside/1 .its file .* does not exist.; replace"):
        FolderImages([huggingface.Row(column, 1)], 8)[0]


def test_columns_and_splits_are_chosen_by_flags(tmp_path):
    value = datasets.Value("uint8")
    extra = {"mask": (datasets.Image(), [Image.fromarray(one) for one in pixels(6, seed=1)])}
    rows = table(pixels(6), label=LABEL, coarse=(value, [0, 0, 1, 1, 2, 2]), **extra)
    name = save(tmp_path / "set", train=rows)
    with pytest.raises(InputError, match="no split test or validation, its splits are train; name one with --test-spl"):
        load(name)
    parts = {"train_split": "train[:4]", "test_split": "train[4:]"}
    loaded = load(name, **parts)
    assert (len(loaded.train), len(loaded.test), loaded.settings["image_column"]) == (4, 2, "image")
    with pytest.raises(InputError, match=r"row 0 of the split train\[4:\] of hf:set has label 2; expected 0 to 1"):
        load(name, label_column="coarse", **parts)
    mask = load(name, image_column="mask", label_column="coarse", train_split="train[:5]", test_split="train[-1:]")
    assert torch.equal(mask.test.images[0].permute(1, 2, 0), torch.from_numpy(pixels(6, seed=1)[5]))
    assert mask.num_classes == 3
    with pytest.raises(InputError, match="have images in common"):
        load(name, train_split="train[:4]", test_split="train[3:]")
    split = load(save(tmp_path / "named", **{"training-1": rows, "test": rows}), train_split="training-1")
    assert len(split.train) == 6
    renamed = save(tmp_path / "renamed", train=rows.rename_column("image", "photo"), test=rows)
    with pytest.raises(InputError, match="has several columns of images, photo, mask; choose one with --image-column"):
        load(renamed)


def struct(images):
    return table(images, nested=({"label": LABEL}, [{"label": 0}] * len(images))).remove_columns("label")


def without(images, row):
    """Return a table whose image in a row is missing."""
    rows = [None if number == row else Image.fromarray(image) for number, image in enumerate(images)]
    return datasets.Dataset.from_dict(
        {"image": rows, "label": [0, 1]}, datasets.Features({"image": datasets.Image(), "label": LABEL})
    )


def damaged(images):
    """Return a table whose second image is damaged."""
    whole = table(images)
    files = [file["bytes"] for file in whole.cast_column("image", datasets.Image(decode=False))["image"]]
    values = {"image": [{"bytes": files[0]}, {"bytes": files[1][:60]}], "label": [0, 1]}
    return datasets.Dataset.from_dict(values, whole.features)


TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
WRONG = {  # a training set, and part of the sentence that refuses it
    "labels -1": (lambda x: table(x, [0, -1]), "1 labels in the split train of hf:set are missing or negative, such"),
    "no labels": (lambda x: table(x, [None, None]), "2 labels in the split train of hf:set are missing"),
    "text": (lambda x: table(x, ["a", "b"], TEXT), r"no column of labels among image \(Image\), label \(string\); exp"),
    "nested": (struct, r"no column of labels among image \(Image\), nested \(dict\); .* flatten\(\) opens nested"),
    "array": (
        lambda x: table(x, [[[0, 1]], [[1, 0]]], datasets.Array2D((1, 2), "int64")),
        r"no column of labels among image \(Image\), label \(Array2D\)",
    ),
    "gaps": (lambda x: table(x, [0, 7], NUMBER), "label of hf:set are 0 to 7 with gaps; expected 0, 1"),
    "no image": (lambda x: without(x, 1), r"cannot read the image hf:set/train/1 \(the row has no image\)"),
    "damaged": (damaged, r"cannot read the image hf:set/train/1 \(damaged: .*\); replace or"),
    "no images": (lambda x: table(x).remove_columns("image"), "has no column of images among label .ClassLabel.; exp"),
    "empty": (lambda x: table(x).select([]), "the split train of hf:.*set is empty; save the data set without"),
    "classes": (lambda x: table(x, label=datasets.ClassLabel(names=["bee", "ant"])), "label of hf:set differs between"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tables_are_refused_with_one_sentence(tmp_path, kind):
    make, sentence = WRONG[kind]
    train = make(pixels(2))
    test = table(pixels(2)) if kind in ("empty", "classes") else train
    with pytest.raises(InputError, match=sentence) as caught:
        load(save(tmp_path / "set", train=train, test=test))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            {"image_column": "picture"},
            r"--image-column is picture, but hf:set has no such column; expected one of image",
        ),
        ({"image_column": "label"}, "--image-column is label, a column of type ClassLabel; expected the type Image"),
        ({"label_column": "image"}, "--label-column is image, a column of type Image; expected ClassLabel or integers"),
        (
            {"train_split": "training"},
            "--train-split is training, but hf:set has no such split, its splits are train, t",
        ),
        ({"test_split": "test[7:"}, r"--test-split is test\[7:, but hf:set has no such split"),
        ({"test_split": "test[1:1]"}, r"the split test\[1:1\] of hf:set is empty"),
        ({"test_split": "train"}, "--train-split train and --test-split train of hf:set have images in common"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, option, sentence):
    name = save(tmp_path / "set", train=table(pixels(2)), test=table(pixels(2)))
    with pytest.raises(InputError, match=sentence):
        load(name, **option)


def test_a_folder_without_splits_or_without_a_data_set_is_refused(tmp_path):
    table(pixels(4)).save_to_disk(tmp_path / "plain")
    with pytest.raises(InputError, match="hf:plain has no split test or validation, its splits are train"):
        load(f"hf:{tmp_path / 'plain'}")
    assert len(load(f"hf:{tmp_path / 'plain'}", train_split="train[:3]", test_split="train[3:]").test) == 1
    with pytest.raises(InputError, match="hf:none has no split train, it has no splits"):
        load(save(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot load the data set hf:.*empty: expected what save_to_disk of datasets"):
        load(f"hf:{tmp_path / 'empty'}")
    name = save(tmp_path / "cut", train=table(pixels(2)), test=table(pixels(2)))
    file = next((tmp_path / "cut" / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot load the data set hf:.*cut: expected what save_to_disk"):
        load(name)
    for name in ("hf:", "hf:::"):
        with pytest.raises(InputError, match=r"--dataset is hf:|cannot load the data set hf:"):
            load(name)


def test_a_copy_of_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = pixels(6)
    (tmp_path / "data" / "clone").mkdir(parents=True)
    for split, part in (("train", slice(4)), ("test", slice(4, 6))):
        table(images[part]).to_parquet(tmp_path / "data" / "clone" / f"{split}-00000-of-00001.parquet")
    loaded = load("hf:clone", tmp_path / "data")
    assert (loaded.name, loaded.classes) == ("hf:clone", ["ant", "bee"])
    assert torch.equal(loaded.test.images, torch.from_numpy(images[4:]).permute(0, 3, 1, 2))


def test_code_in_a_data_set_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"cannot load .*Dataset scripts are no longer supported, but found evil\.py"):
        load(f"hf:{tmp_path / 'evil'}")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match="datasets 3.6.0 is installed, which may run code of a data set; expected ver"):
        load(f"hf:{tmp_path / 'evil'}")


def test_names_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append(arguments)
        return datasets.DatasetDict(train=table(pixels(2)), test=table(pixels(2, seed=1)))

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        assert [load(f"hf:{name}").name for name in ("one/set", "set:small")] == ["hf:one/set", "hf:set:small"]
    assert asked == [("one/set", None), ("set", "small")]
    file = checkpoint.candidates("hf:one/set:small", "resnet20", tmp_path)[0]
    assert file == tmp_path / "weights" / "hf_one--set=small_resnet20.safetensors"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("one/set", "x" * 300):
        with pytest.raises(
            InputError, match=f"cannot load the data set hf:{name}: there is no such folder, and it can"
        ):
            load(f"hf:{name}")


@pytest.fixture
def no_network(monkeypatch):
    """Return a list of the connections that were tried; each fails."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("no network in this test")

    def look_up(host, *arguments, **options):
        connect(None, host)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return tried


@pytest.mark.parametrize("name", ["hf:not/a-set", "hf:a-set-of-nobody:part", "hf:buckets/a/b/c"])
def test_the_data_set_of_a_record_does_not_contact_the_hub(name, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InputError, match=r"no folder on this machine, and it is downloaded with --download only"):
        figure_set.load_images({"dataset": name}, tmp_path)
    assert no_network == []
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "where", ["https://localhost:9/x.parquet", [{"split": "train", "path": ["zip://a::http://b/c"]}]]
)
def test_a_folder_is_read_without_a_network(file, where, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        table(pixels(2)).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    lines = "---\n" if file == "README.md" else ""
    card = {"license_link": "https://localhost/licence"}
    (tmp_path / file).write_text(f"{lines}{json.dumps(card)}\n{lines}")
    assert len(load(f"hf:{tmp_path}").train) == 2
    card["configs"] = [{"config_name": "default", "data_files": where}]
    (tmp_path / file).write_text(f"{lines}{json.dumps(card)}\n{lines}")
    with pytest.raises(InputError, match=r"names files that are not in its folder \((https|zip)://"):
        load(f"hf:{tmp_path}")
    assert no_network == []


def test_a_missing_package_and_flags_of_other_data_sets_end_a_script_with_one_sentence(script, tmp_path, monkeypatch):
    code, _, err = script(main_unlearn.main, "--dataset", "digits", "--image-column", "x", "--result-dir", tmp_path)
    assert (code, err.splitlines()) == (
        2,
        ["main_unlearn.py: --image-column is for --dataset hf:NAME_OR_FOLDER, not digits; leave it out"],
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ["--dataset", "hf:set", "--model", "resnet20", "--result-dir", tmp_path]
    words += ["--checkpoint", "data/weights/digits_resnet20.safetensors"]
    code, _, err = script(main_unlearn.main, *words)
    assert (code, err.splitlines()) == (
        2,
        [
            "main_unlearn.py: --dataset hf:… needs the package datasets; install it (uv run --extra datasets …, or pip "
            "install datasets)"
        ],
    )


def test_a_lenet_is_trained_on_grey_images_of_a_table_and_unlearns(script, tmp_path):
    levels = pixels(24, (28, 28))[..., 0]
    levels[::2] //= 3  # dark and light images
    name = save(tmp_path / "grey", train=table(levels[:20]), test=table(levels[20:]))
    common = ["--dataset", name, "--model", "lenet", "--data-dir", tmp_path, "--threads", 1]
    recipe = main_pretrain_mnist_lenet.RECIPE

    def pretrain():
        pretrain_command.main("main_pretrain_mnist_lenet.py", "Train.", "mnist", "lenet", recipe)

    code, out, err = script(pretrain, *common, "--epochs", 12, "--batch-size", 4, "--precision", "fp32")
    assert code == 0, err
    weights = tmp_path / "weights" / "hf_grey_lenet.safetensors"
    assert f"D_test 100.00 %: {weights}" in out
    state, metadata = checkpoint.read(weights)
    assert state["0.weight"].shape == (6, 1, 5, 5)
    assert metadata["dataset"] == "hf:grey"
    run = ["--result-dir", tmp_path, "--unlearn-k", 2, "--method", "neggrad", "distill", "adv_imp", "--num-adv-images"]
    run += [2, "--pgd-iter", 2, "--max-passes", 5, "--distill-steps", 3, "--no-cache"]
    code, out, err = script(main_unlearn.main, *common, *run)
    assert code == 0, err
    records = load_records(tmp_path).values()
    assert {(record["dataset"], record["mean"], record["status"] != "failed") for record in records} == {
        ("hf:grey", "0.1307", True)
    }
