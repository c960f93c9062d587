"""Images on disk: worker processes and the GPU decode the same images."""

import numpy as np
from PIL import Image
import pytest
import torch

from l2ul.common.errors import InputError
from l2ul.data import datasets, folder, forget_set
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    """Write smooth images as JPEG (RGB, greyscale, CMYK) and PNG; return the paths."""
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
def test_the_loader_yields_the_requested_images(photos, workers):
    images = FolderImages(photos, 32, prefetch=3)
    for batch, indices in zip(stream(images, workers), ([4, 0, 1], [2], [3, 3]), strict=True):
        assert torch.equal(batch, images[torch.tensor(indices)])


def test_images_decoded_for_the_gpu_are_nearly_equal(photos):
    """Only the decoder itself runs on the CPU here; the rest is the code path of a GPU."""
    images = FolderImages(photos, 32, decoder="gpu")
    taken = [folder._Encoded(images)[i].ndim for i in range(5)]
    assert taken == [1, 1, 3, 3, 1]
    for workers in (0, 1):
        for batch, indices in zip(stream(images, workers), ([4, 0, 1], [2], [3, 3]), strict=True):
            difference = (batch.float() - images[torch.tensor(indices)].float()).abs()
            assert batch.dtype == torch.uint8
            assert difference.mean() < 1  # of 255: resized as tensors
            assert difference.max() < 12


def test_the_cpu_decodes_what_the_gpu_cannot(photos, monkeypatch):
    expected = stream(FolderImages(photos, 32, decoder="gpu"))
    calls, decode = [], folder._decode

    def gpu_decode(images, device):
        calls.append((len(images), device.type))
        if device.type == "meta" and (len(images) > 1 or images[0].shape == gpu_decode.refused.shape):
            raise RuntimeError("nvjpegDecode failed: 4")
        return decode(images, CPU)

    gpu_decode.refused = folder._Encoded(FolderImages(photos, 32))[1]
    monkeypatch.setattr(folder, "_decode", gpu_decode)
    batch = [folder._Encoded(FolderImages(photos, 32))[i] for i in (4, 0, 1)]
    found = folder._decode_batch(batch, torch.device("meta"))  # stands for a GPU
    assert calls == [(3, "meta"), (1, "meta"), (1, "meta"), (1, "meta"), (1, "cpu")]
    resize = FolderImages(photos, 32).resize
    assert torch.equal(torch.stack([resize(image) for image in found]), expected[0])


def test_damaged_files_are_reported(photos):
    with open(photos[1], "r+b") as file:
        file.truncate(400)
    with pytest.raises(InputError, match="damaged|cannot read the image"):
        stream(FolderImages(photos, 32, decoder="gpu"))
    with open(photos[3], "r+b") as file:
        file.truncate(60)
    with pytest.raises(InputError, match="cannot read the image .*3.png"):
        stream(FolderImages(photos, 32, decoder="gpu"), order=((3,),))


def test_subsets_keep_the_decoding_options_and_the_hash_depends_on_them(photos, tmp_path):
    split = Split(FolderImages(photos, 32, 40, prefetch=5, decoder="gpu"), torch.arange(5))
    some = split.subset(torch.tensor([3, 1])).images
    assert (some.files, some.short_side, some.prefetch, some.decoder) == ([photos[3], photos[1]], 40, 5, "gpu")
    assert split.sha256() != Split(FolderImages(photos, 32, 40), split.labels).sha256()
    assert (
        forget_set.ForgetSet(split, torch.tensor([3, 1])).split.images.decoder == "cpu"
    )  # unlearning and evaluation use the same pixels
    for part in ("train", "val"):
        (tmp_path / "set" / part / "class").mkdir(parents=True)
        Image.open(photos[0]).save(tmp_path / "set" / part / "class" / "0.png")
    found = datasets.load("set", tmp_path, image_size=32, prefetch=7, decoder="gpu")
    assert (found.train.images.prefetch, found.test.images.decoder) == (7, "gpu")


def test_decoder_gpu_needs_a_gpu():
    folder.check_decoder("cpu", CPU)
    with pytest.raises(InputError, match="--decoder gpu needs a CUDA GPU"):
        folder.check_decoder("gpu", CPU)


@pytest.mark.cuda
def test_a_real_gpu_decodes_nearly_equal_images(photos):
    images, device = FolderImages(photos, 32, decoder="gpu"), torch.device("cuda")
    (batch,) = images.loader([torch.arange(5)], device)
    assert batch.device.type == "cuda"
    difference = (batch.cpu().float() - images[torch.arange(5)].float()).abs()
    assert difference.mean() < 2
