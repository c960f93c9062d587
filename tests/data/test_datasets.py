"""Data sets: digits, the official CIFAR files, image folders, pixel values."""

import csv
from functools import partial
import gzip
import hashlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import threading

from conftest import REALDATA
from helpers import write_cifar, write_folder
import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST

from l2ul.common.errors import InputError
from l2ul.data import datasets
from l2ul.data.images import as_pixels, batches


def test_digits_have_the_expected_sizes_and_pixel_values():
    images = datasets.load("digits", "nowhere")
    assert (len(images.train), len(images.test), images.num_classes) == (1438, 359, 10)
    assert images.train.images.dtype == torch.uint8
    assert images.train.images.shape[1:] == (3, 32, 32)
    assert images.train.images.max() == 255
    assert torch.equal(images.train.images[:, 0], images.train.images[:, 2])
    assert set(images.test.labels.tolist()) == set(range(10))


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_official_cifar_files_are_read_and_damaged_ones_reported(tmp_path, monkeypatch, name, kind):
    folder, pixels = write_cifar(tmp_path, kind, monkeypatch)
    images = datasets.load(name, tmp_path)
    first = next(iter(pixels.values()))[1].reshape(3, 32, 32)  # planes of red, green and blue
    assert torch.equal(images.train.images[1], torch.from_numpy(first))
    assert images.train.labels[:4].tolist() == [0, 1, 2, 3]
    assert images.classes[3] == "class 3"
    assert len(images.train) == 4 * len(kind.train_list)
    next(folder.iterdir()).write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{name} is not complete in .*--data-dir"):
        datasets.load(name, tmp_path, download=False)


def test_a_failed_download_is_reported(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(InputError, match="could not be downloaded .no route to host"):
        datasets.load("cifar10", tmp_path)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Serve a folder as the mirror of MNIST and Fashion-MNIST, with eight random images each, and return the folder."""
    generator = np.random.default_rng(0)
    serve = partial(QuietHandler, directory=str(tmp_path / "mirror"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for kind in (MNIST, FashionMNIST):
        folder = tmp_path / "mirror" / kind.__name__
        folder.mkdir(parents=True)
        resources = []
        for name, _ in kind.resources:
            shape = (8, 28, 28) if "images" in name else (8,)
            values = generator.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
            header = np.array([0x0800 + len(shape), *shape], dtype=">i4")
            (folder / name).write_bytes(gzip.compress(header.tobytes() + values.tobytes()))
            resources.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))
        monkeypatch.setattr(kind, "resources", resources)
        monkeypatch.setattr(kind, "mirrors", [f"http://127.0.0.1:{server.server_port}/{kind.__name__}/"])
    yield tmp_path / "mirror"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("name", "kind"), [("mnist", MNIST), ("fashion_mnist", FashionMNIST)])
def test_one_channel_images_are_downloaded_and_read_and_damaged_files_reported(tmp_path, mirror, name, kind):
    images = datasets.load(name, tmp_path)
    content = gzip.decompress((mirror / kind.__name__ / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert images.test.images.numpy().tobytes() == content[16:]
    assert (images.train.images.shape, images.train.images.dtype) == ((8, 1, 28, 28), torch.uint8)
    assert (images.channels, images.num_classes, images.classes) == (1, 10, kind.classes)
    assert images.train.labels.dtype == torch.int64
    raw = tmp_path / kind.__name__ / "raw"
    good = {file: (raw / file).read_bytes() for file in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
    damages = [("train-images-idx3-ubyte", slice(200)), ("train-images-idx3-ubyte", slice(0))]
    damages += [("train-labels-idx1-ubyte", slice(12)), ("train-labels-idx1-ubyte", slice(3))]
    for file, part in damages:
        (raw / file).write_bytes(good[file][part])
        with pytest.raises(InputError, match=rf"^{name} (is not complete )?in .*raw .*folder"):
            datasets.load(name, tmp_path, download=False)
        (raw / file).write_bytes(good[file])


def test_a_missing_one_channel_data_set_without_a_network_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(InputError, match="mnist is not complete in .*MNIST/raw and could not be downloaded"):
        datasets.load("mnist", tmp_path)
    with pytest.raises(InputError, match="is downloaded with --download only .Dataset not found"):
        datasets.load("mnist", tmp_path, download=False)


def test_images_of_a_folder_are_decoded_on_demand(tmp_path):
    write_folder(tmp_path / "insects")
    images = datasets.load("insects", tmp_path, image_size=32)
    assert (images.classes, images.num_classes, len(images.train)) == (["ant", "bee"], 2, 6)
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    picked = images.train.images[torch.tensor([5, 0])]
    assert picked.dtype == torch.uint8
    assert picked.shape == (2, 3, 32, 32)
    assert picked[:, 0].flatten(1).unique(dim=1).tolist() == [[12], [0]]
    subset = images.train.subset(torch.tensor([5, 0]))
    assert torch.equal(subset.images[torch.arange(2)], picked)
    for workers in (0, 2):
        streamed = torch.cat(list(batches(images.train.images, 4, torch.device("cpu"), workers)))
        assert torch.equal(streamed, images.train.images[torch.arange(6)] / 255)


def test_imagenet_has_1000_classes_even_if_some_folders_are_absent(tmp_path):
    write_folder(tmp_path / "imagenet", ("n02110341", "n01440764"))  # dalmatian and tench
    images = datasets.load("imagenet", tmp_path, image_size=32)
    assert images.num_classes == len(set(images.classes)) == 1000
    assert sorted(images.train.labels.tolist()) == [0] * 3 + [251] * 3
    assert sorted(images.test.labels.tolist()) == [0] * 3 + [251] * 3
    write_folder(tmp_path / "imagenet", ("tench",), ("train",))
    with pytest.raises(InputError, match="train has a class 'tench'; expected an ImageNet-1k class"):
        datasets.load("imagenet", tmp_path)


@pytest.mark.realdata
def test_the_list_of_imagenet_classes_matches_the_real_images():
    wnids = datasets.WNIDS.read_text().split()
    with open(REALDATA / "imagenet" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert all(wnids[int(row["class_index"])] == row["file"].split("/")[0] for row in rows)


def test_a_folder_of_the_wrong_shape_raises_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no data set 'nothing': expected digits, cifar10.* with --data-dir"):
        datasets.load("nothing", tmp_path)
    write_folder(tmp_path / "one", parts=("train",))
    with pytest.raises(InputError, match="one has no subfolder val or test, which holds the test images; put them"):
        datasets.load("one", tmp_path)
    write_folder(tmp_path / "one", ("ant", "cat"), ("test",))
    with pytest.raises(InputError, match="has a class 'cat'; expected a class of"):
        datasets.load("one", tmp_path)


def test_a_damaged_image_is_reported_with_its_name(tmp_path):
    write_folder(tmp_path / "insects")
    damaged = tmp_path / "insects" / "train" / "ant" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    images = datasets.load("insects", tmp_path, image_size=32).train.images
    with pytest.raises(InputError, match="cannot read the image .*1.png"):
        images[torch.tensor([1])]


def test_as_pixels_divides_uint8_images_by_255_once():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(as_pixels(images).flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(as_pixels(as_pixels(images)), as_pixels(images))
