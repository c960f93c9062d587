"""Images that stay on disk: what is read ahead and decoded elsewhere are the same images."""

import numpy as np
from PIL import Image
import pytest
import torch

from l2ul.common.errors import InputError
from l2ul.data import datasets, folder, forget_set
from l2ul.data import folder as streaming
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    """Smooth images in each way that a folder may hold them: two JPEGs, a grey one, one in CMYK, a PNG."""
    rows, columns = np.mgrid[0:60, 0:80]
    files = []
    for number, (mode, suffix) in enumerate(
        [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGB", "jpg")]
    ):
        pixels = np.stack([rows * 4, columns * 3, (rows + columns + 30 * number)], 2).astype(np.uint8)
        files.append(str(tmp_path / f"{number}.{suffix}"))
        Image.fromarray(pixels).convert(mode).save(files[-1], **({"quality": 95} if suffix == "jpg" else {}))
    return files


def stream(images, workers=0, order=((4, 0, 1), (2,), (3, 3))):
    return list(images.loader([torch.tensor(part) for part in order], CPU, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_gives_the_images_asked_for_whoever_decodes_them(photos, workers):
    images = FolderImages(photos, 32, prefetch=3)
    for batch, indices in zip(stream(images, workers), ([4, 0, 1], [2], [3, 3]), strict=True):
        assert torch.equal(batch, images[torch.tensor(indices)])


def test_as_the_gpu_gets_them_they_look_the_same(photos):
    """The decoder is the CPU's here; bytes handed over, files that are no plain JPEG, and the cut are a GPU's."""
    images = FolderImages(photos, 32, decoder="gpu")
    taken = [folder._Encoded(images)[i].ndim for i in range(5)]
    assert taken == [1, 1, 3, 3, 1]
    for workers in (0, 1):
        for batch, indices in zip(stream(images, workers), ([4, 0, 1], [2], [3, 3]), strict=True):
            difference = (batch.float() - images[torch.tensor(indices)].float()).abs()
            assert batch.dtype == torch.uint8
            assert difference.mean() < 1  # of 255: resized as tensors
            assert difference.max() < 12


def test_what_the_gpu_cannot_decode_the_cpu_does(photos, monkeypatch):
    expected = stream(FolderImages(photos, 32, decoder="gpu"))
    asked, decode = [], folder._decode

    def choosy(images, device):
        asked.append((len(images), device.type))
        if device.type == "meta" and (len(images) > 1 or images[0].shape == choosy.refused.shape):
            raise RuntimeError("nvjpegDecode failed: 4")
        return decode(images, CPU)

    choosy.refused = folder._Encoded(FolderImages(photos, 32))[1]
    monkeypatch.setattr(streaming, "_decode", choosy)
    batch = [folder._Encoded(FolderImages(photos, 32))[i] for i in (4, 0, 1)]
    found = folder._decoded(batch, torch.device("meta"))  # stands for a GPU
    assert asked == [(3, "meta"), (1, "meta"), (1, "meta"), (1, "meta"), (1, "cpu")]
    cut = FolderImages(photos, 32).cut
    assert torch.equal(torch.stack([cut(image) for image in found]), expected[0])


def test_damaged_files_are_said_to_be(photos):
    with open(photos[1], "r+b") as file:
        file.truncate(400)
    with pytest.raises(InputError, match="damaged|cannot read the image"):
        stream(FolderImages(photos, 32, decoder="gpu"))
    with open(photos[3], "r+b") as file:
        file.truncate(60)
    with pytest.raises(InputError, match="cannot read the image .*3.png"):
        stream(FolderImages(photos, 32, decoder="gpu"), order=((3,),))


def test_how_they_are_read_goes_with_them_and_is_told_apart(photos, tmp_path):
    split = Split(FolderImages(photos, 32, 40, prefetch=5, decoder="gpu"), torch.arange(5))
    some = split.subset(torch.tensor([3, 1])).images
    assert (some.files, some.short_side, some.prefetch, some.decoder) == ([photos[3], photos[1]], 40, 5, "gpu")
    assert split.sha256() != Split(FolderImages(photos, 32, 40), split.labels).sha256()
    assert (
        forget_set.ForgetSet(split, torch.tensor([3, 1])).split.images.decoder == "cpu"
    )  # unlearned and measured alike
    for part in ("train", "val"):
        (tmp_path / "set" / part / "class").mkdir(parents=True)
        Image.open(photos[0]).save(tmp_path / "set" / part / "class" / "0.png")
    found = datasets.load("set", tmp_path, image_size=32, prefetch=7, decoder="gpu")
    assert (found.train.images.prefetch, found.test.images.decoder) == (7, "gpu")


def test_a_gpu_that_is_not_there_decodes_nothing():
    folder.check_decoder("cpu", CPU)
    with pytest.raises(InputError, match="--decoder gpu needs a CUDA GPU"):
        folder.check_decoder("gpu", CPU)


@pytest.mark.cuda
def test_a_gpu_decodes_the_same_images(photos):
    images, device = FolderImages(photos, 32, decoder="gpu"), torch.device("cuda")
    (batch,) = images.loader([torch.arange(5)], device)
    assert batch.device.type == "cuda"
    difference = (batch.cpu().float() - images[torch.arange(5)].float()).abs()
    assert difference.mean() < 2
