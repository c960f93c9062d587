"""Images on disk: worker processes and the GPU decode the same images."""

import os
from pathlib import Path
import pickle

from helpers import load_records, write_image
import numpy as np
from PIL import Image
import pytest
import torch

from l2ul import models
from l2ul.common.errors import InputError
from l2ul.data import datasets, folder, forget_set, storage
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split
import main_unlearn

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


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_keeps_problem_and_advice(photos, workers, decoder):
    Path(photos[1]).write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        stream(FolderImages(photos, 32, decoder=decoder), workers)
    assert caught.value.problem == f"cannot read the image {photos[1]} (no image of a known format)"
    assert caught.value.advice == ("replace or remove it",)
    with pytest.raises(InputError, match="^cannot read the image .*; replace or remove it$"):
        FolderImages(photos, 32).in_memory(workers)


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
    found, refused = folder._decode_batch(batch, torch.device("meta"))  # stands for a GPU
    assert refused == [2]
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


def test_decoder_gpu_needs_a_gpu_with_a_working_nvjpeg(monkeypatch):
    folder.check_decoder("cpu", CPU)
    with pytest.raises(InputError, match="--decoder gpu needs a CUDA GPU"):
        folder.check_decoder("gpu", CPU)

    def fail(images, device):
        raise RuntimeError("nvjpegCreateSimple failed: 7\nmore")

    monkeypatch.setattr(folder, "_decode", fail)
    with pytest.raises(
        InputError, match="nvJPEG cannot decode on this GPU .nvjpegCreateSimple failed: 7.; leave it out$"
    ):
        folder.check_decoder("gpu", torch.device("cuda"))


def test_workers_pass_the_jpegs_of_a_batch_in_one_file(photos):
    """A worker passes each tensor in a file of its own; more open files than the limit would end the pass."""
    resource = pytest.importorskip("resource")
    images = FolderImages(photos, 32, decoder="gpu")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 60, before[1]))
    try:
        batches = stream(images, workers=2, order=[[0, 1, 2, 3, 4] * 20] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [len(batch) for batch in batches] == [100] * 4


@pytest.fixture
def read(monkeypatch):
    """Count the files that are decoded."""
    files, decode = [], folder.ImageReader.read
    monkeypatch.setattr(folder.ImageReader, "read", lambda self, file: files.append(file) or decode(self, file))
    return files


def test_images_are_decoded_once_and_subsets_share_them(photos, read):
    images = FolderImages(photos, 32)
    with torch.inference_mode():
        first = stream(images)
    assert len(read) == 6  # one of them twice, as it is twice in a batch
    later = stream(images, order=((0, 1, 2, 3, 4),))[0]
    assert torch.equal(later[torch.tensor([4, 0, 1])], first[0])
    some = images.subset(torch.tensor([4, 3]))
    assert torch.equal(stream(some, order=((1, 0),))[0], later[torch.tensor([3, 4])])
    assert len(read) == 6
    assert torch.equal(stream(pickle.loads(pickle.dumps(some)), order=((1, 0),))[0], later[torch.tensor([3, 4])])
    stream(images.with_channels(1))
    assert len(read) == 6 + 2 + 6
    stream(images.with_decoder("cpu"))
    assert len(read) == 6 + 2 + 6
    assert images.with_decoder("gpu")._decoded is not images._decoded


def test_a_part_is_kept_if_all_do_not_fit(photos, read, monkeypatch):
    monkeypatch.setattr(storage, "IN_MEMORY", 2 * 3 * 3 * 32 * 32)  # half of it: three images
    images = FolderImages(photos, 32)
    stream(images)
    stream(images)
    assert len(read) == 12
    some = images.subset(torch.tensor([4, 3, 0]))
    assert torch.equal(stream(some, order=((2, 1),))[0], stream(some, order=((2, 1),))[0])
    assert len(read) == 14


def test_random_numbers_do_not_depend_on_what_is_kept(photos):
    images, drawn = FolderImages(photos, 32), []
    for _ in range(2):
        torch.manual_seed(3)
        stream(images)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


def test_a_record_says_which_jpegs_the_cpu_decoded(photos, script, tmp_path, monkeypatch):
    for part, number in (("train", 0), ("train", 4), ("train", 1), ("val", 0)):
        place = tmp_path / "set" / part / f"class {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(Path(photos[number]).read_bytes())
    decode, refused = folder._decode, folder._Encoded(FolderImages(photos, 32))[4]
    calls = []

    def gpu_decode(images, device):
        calls.append(len(images) == 1 and torch.equal(images[0], refused))
        if len(images) > 1 or (calls[-1] and sum(calls) % 2):  # the second call stands for the CPU
            raise RuntimeError("nvjpegDecode failed: 4")
        return decode(images, CPU)

    monkeypatch.setattr(folder, "_decode", gpu_decode)
    monkeypatch.setattr(folder, "check_decoder", lambda decoder, device: None)
    data_set = ["--dataset", "set", "--data-dir", tmp_path, "--image-size", 32, "--workers", 0, "--model", "resnet20"]
    models.save(models.build("resnet20", 2), tmp_path / "net.safetensors", {})
    run = f"--checkpoint {tmp_path}/net.safetensors --method before --unlearn-k 1 --decoder gpu".split()
    code, out, err = script(main_unlearn.main, *data_set, *run, "--result-dir", tmp_path)
    assert code == 0, err
    assert f"nvJPEG cannot decode 1 files such as {tmp_path}/set/train/class 0/4.jpg; the CPU decoded them" in out
    (record,) = load_records(tmp_path).values()
    assert (record["decoder"], record["decoded_by_cpu"]) == ("gpu", 1)


@pytest.mark.cuda
def test_a_real_gpu_decodes_nearly_equal_images(photos):
    images, device = FolderImages(photos, 32, decoder="gpu"), torch.device("cuda")
    (batch,) = images.loader([torch.arange(5)], device)
    assert batch.device.type == "cuda"
    difference = (batch.cpu().float() - images[torch.arange(5)].float()).abs()
    assert difference.mean() < 2


@pytest.mark.parametrize(
    ("stored", "image_size", "side", "recorded"),
    [(32, None, 32, None), (32, 32, 32, None), (32, 28, 28, 28), (224, None, 224, None), (256, None, 224, 224)],
)
def test_square_images_of_the_size_of_the_crop_or_smaller_stay_as_they_are(
    tmp_path, stored, image_size, side, recorded
):
    for part in ("train", "val"):
        write_image(tmp_path / "set" / part / "class" / "0.png", (stored, stored))
    found = datasets.load("set", tmp_path, image_size=image_size)
    assert (found.side, found.settings.get("image_size")) == (side, recorded)
    pixels = found.train.images[0]
    as_stored = torch.from_numpy(np.array(Image.open(tmp_path / "set" / "train" / "class" / "0.png"))).permute(2, 0, 1)
    assert (pixels.shape == as_stored.shape and bool((pixels == as_stored).all())) == (recorded is None)
    if recorded is None:
        write_image(tmp_path / "set" / "train" / "class" / "1.png", (40, 60))  # now sizes differ
        assert datasets.load("set", tmp_path, image_size=image_size).settings["image_size"] == (image_size or 224)
