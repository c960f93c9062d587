"""One reader of image files: the same pixels in every script, EXIF orientation, deep images, limits, names."""

import json
import shutil
import sys

from helpers import write_folder, write_image
import numpy as np
from PIL import Image, ImageOps
import pytest
import torch
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode

from l2ul.cli import unlearn_options
from l2ul.cli.options import image_reader, load_data
from l2ul.common import text
from l2ul.common.errors import InputError
from l2ul.data import datasets, folder, forget_set, image_files, utkface
from l2ul.data.folder import FolderImages
from l2ul.data.image_files import ImageReader, UnreadableImage
from l2ul.deletion import deployed_model, forget, options, request
from l2ul.metrics import preflight
from l2ul.models import checkpoint, huggingface, preprocessing, timm_models, zoo
from l2ul.training import pretrain
import main_unlearn

CPU = torch.device("cpu")
OBEY = ImageReader(exif_orientation="obey")


def noise(shape, dtype=np.uint8, high=256):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def save_turned(path, orientation=6, size=(24, 16)):
    """Write a JPEG file with an EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise((*size, 3))).save(path, exif=exif, quality=95)
    return path


def save_grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def pixels(path, reader=None):
    return np.asarray((reader or ImageReader()).read(path))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_pixels_equal_those_of_image_folder(tmp_path, mode):
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise((10, 12, 3))).convert(mode).save(path)
    try:
        expected = np.asarray(pil_loader(str(path)))
    except OSError:
        pytest.skip(f"this version of Pillow cannot read the {mode} file that it wrote")
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_or_obeyed(tmp_path, orientation):
    path = save_turned(tmp_path / "photo.jpg", orientation)
    assert np.array_equal(pixels(path), np.asarray(pil_loader(str(path))))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(pixels(path, OBEY), upright)
    notes = [reader.examine([path]) for reader in (ImageReader(), OBEY)]
    if orientation == 1:
        assert notes == [[], []]
    else:
        assert "1 of 1 images have an EXIF orientation" in notes[0][0]
        assert "add --exif-orientation obey" in notes[0][0]
        assert "add --exif-orientation ignore" in notes[1][0]


@pytest.mark.parametrize("kind", ["turned", "deep", "plain"])
@pytest.mark.parametrize("reader", [ImageReader(), OBEY, ImageReader(white_level=4095.0)])
def test_a_file_has_the_same_pixels_in_training_forget_dir_and_request(tmp_path, kind, reader):
    path = tmp_path / "set" / "train" / "cat" / f"{kind}.png"
    path.parent.mkdir(parents=True)
    if kind == "deep":
        save_grey(path, noise((24, 16), np.uint16, 4096))
    else:
        exif = Image.Exif()
        exif[0x0112] = 8 if kind == "turned" else 1
        Image.fromarray(noise((24, 16, 3))).save(path, exif=exif)
    for name in ("train/dog", "val/cat", "val/dog"):
        write_image(tmp_path / "set" / name / "0.png", (16, 24), seed=1)
    forgotten = tmp_path / "forget" / "cat" / path.name
    forgotten.parent.mkdir(parents=True)
    forgotten.write_bytes(path.read_bytes() + b" ")  # a copy of a training image is refused
    images = datasets.load("set", tmp_path, image_size=16, reader=reader)
    (streamed,) = images.train.images.loader([torch.tensor([0])], CPU)
    evaluated = images.train.images[torch.tensor([0])]
    folder = forget_set.read_folder(tmp_path / "forget", images, reader)
    short_side = images.train.images.short_side
    to_pixels = deployed_model.v2.Compose([images.train.images.resize, deployed_model.v2.PILToTensor()])
    requested = request.read_images(tmp_path / "forget", to_pixels, reader=reader)
    assert short_side == folder.images.short_side
    assert torch.equal(streamed, evaluated)
    assert torch.equal(streamed, folder.images[torch.tensor([0])])
    assert torch.equal(streamed, requested.images)


def test_faces_are_read_by_the_same_reader(tmp_path):
    for number in range(12):
        save_turned(tmp_path / "utkface" / f"{number + 10}_0_0_20170112{number:09d}.jpg", size=(20, 20))
    stored, upright = (
        utkface.load(tmp_path, "MFD", image_size=16, reader=reader).train.images for reader in (ImageReader(), OBEY)
    )
    assert not torch.equal(stored, upright)
    assert "UTKFace: 12 of 12 images have an EXIF orientation" in utkface.load(tmp_path, "MFD", image_size=16).notes[-1]


def test_16_bit_grey_levels_are_scaled_by_their_range(tmp_path):
    values = np.array([[0, 256, 257], [4080, 32768, 65535]], np.uint16)
    expected = (values / 257).round().astype(np.uint8)
    for name in ("deep.png", "deep.tif"):
        path = save_grey(tmp_path / name, values)
        assert np.array_equal(pixels(path)[:, :, 0], expected)
    header = b"P5 3 2 65535\n"
    (tmp_path / "deep.pgm").write_bytes(header + values.astype(">u2").tobytes())
    assert np.array_equal(pixels(tmp_path / "deep.pgm")[:, :, 0], expected)


def test_32_bit_and_float_grey_levels_are_scaled_by_their_range(tmp_path):
    path = save_grey(tmp_path / "signed.tif", np.array([[0, 2**30, 2**31 - 1]], np.int32))
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 255]
    path = save_grey(tmp_path / "float.tif", np.array([[0.0, 0.5, 1.0]], np.float32))
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 255]
    path = save_grey(tmp_path / "large.tif", np.array([[0.0, 500.0, 1000.0]], np.float32))
    with pytest.raises(UnreadableImage, match="grey levels from 0 to 1000, expected 0 to 1: .*--white-level"):
        pixels(path)
    assert pixels(path, ImageReader(white_level=1000.0))[0, :, 0].tolist() == [0, 128, 255]
    path = save_grey(tmp_path / "negative.tif", np.array([[-5, 100]], np.int32))
    with pytest.raises(UnreadableImage, match="grey levels from -5 to 100"):
        pixels(path)
    path = save_grey(tmp_path / "nan.tif", np.array([[np.nan, 1.0]], np.float32))
    with pytest.raises(UnreadableImage, match="grey levels that are not finite"):
        pixels(path)


def test_grey_levels_of_12_bits_in_16_are_reported_and_scaled_by_the_white_level(tmp_path):
    path = save_grey(tmp_path / "xray.png", np.array([[0, 2048, 4095]], np.uint16))
    assert pixels(path)[0, :, 0].tolist() == [0, 8, 16]
    (note,) = ImageReader().examine([path])
    assert "reach 4095 of 65535, so they are nearly black" in note
    assert note.endswith("if white is 4095 in these files, add --white-level 4095")
    reader = ImageReader(white_level=4095.0)
    assert pixels(path, reader)[0, :, 0].tolist() == [0, 128, 255]
    assert reader.examine([path]) == []
    save_grey(path, np.array([[0, 4096]], np.uint16))
    with pytest.raises(InputError, match="cannot read the image .*xray.png .grey levels from 0 to 4096"):
        reader.examine([path])


def test_colour_images_of_16_bits_that_are_nearly_black_are_reported(tmp_path):
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def write(values):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0))]
        parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
        (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))

    write(noise((2, 12), np.uint16, 4096))
    (note,) = ImageReader().examine([tmp_path / "colour.png"])
    assert "the upper 8 bits of 16-bit colour images" in note
    write(noise((2, 12), np.uint16, 65536))
    assert ImageReader().examine([tmp_path / "colour.png"]) == []


def test_images_above_the_limit_are_refused_with_the_flag_that_raises_it(tmp_path):
    write_folder(tmp_path / "set")
    small = ImageReader(max_pixels=1000)
    remedy = "raise the limit with --max-image-pixels"
    sentence = rf"\(2400 pixels, above the limit of 1000\); {remedy}, or replace or remove it$"
    with pytest.raises(InputError, match=sentence):
        datasets.load("set", tmp_path, image_size=16, reader=small)
    file = str(next((tmp_path / "set").glob("*/*/0.png")))
    with pytest.raises(InputError, match=sentence):
        FolderImages([file], 16, reader=small)[0]
    with pytest.raises(
        InputError, match=rf"2400 pixels, above the limit of 1000; .*\); {remedy}, or repair or remove them, or"
    ) as caught:
        request.read_images(tmp_path / "set" / "train", deployed_model._central_square(None), reader=small)
    assert caught.value.without({"--max-image-pixels", "--skip-bad"}).advice == ("repair or remove them",)
    assert "--" not in caught.value.problem
    assert Image.MAX_IMAGE_PIXELS == image_files.MAX_IMAGE_PIXELS  # as before
    assert ImageReader(max_pixels=2400).read(file).size == (60, 40)


NARROW = r"1 x 60000 pixels, which resizing the short side to 64 enlarges to 245,760,000, above the limit of 89,478,485"


def test_images_that_would_be_too_large_after_resizing_are_refused(tmp_path, monkeypatch):
    def resize(*arguments, **options):
        raise AssertionError("the image was resized")

    write_folder(tmp_path / "set")
    path = write_image(tmp_path / "set" / "val" / "ant" / "narrow.png", (1, 60000))
    whole = write_image(tmp_path / "wide" / "wide.png", (1200, 40))
    assert FolderImages([str(whole)], 56)[0].shape == (3, 56, 56)
    monkeypatch.setattr(Image.Image, "resize", resize)
    monkeypatch.setattr(torch.nn.functional, "interpolate", resize)
    sentence = f"cannot read the image .*narrow.png .{NARROW}.; crop the long side, or replace or remove it"
    with pytest.raises(InputError, match=sentence):
        datasets.load("set", tmp_path, image_size=56)
    with pytest.raises(InputError, match=sentence):
        FolderImages([str(path)], 56)[0]
    monkeypatch.setattr(folder, "_decode_batch", lambda batch, device: ([torch.zeros(3, 60000, 1)], []))  # by nvJPEG
    decoded = FolderImages([str(path)], 56, decoder="gpu").loader([torch.tensor([0])], CPU)
    with pytest.raises(InputError, match=sentence):
        next(decoded)
    path.rename(whole)
    with pytest.raises(InputError, match=f"1 of 1 files .*wide.png: {NARROW}.; crop the long side, or repair"):
        request.read_images(whole.parent, deployed_model._central_square(64))
    with pytest.raises(InputError, match=NARROW):
        preprocessing.Resize(64, InterpolationMode.BILINEAR)(torch.zeros(1, 3, 60000, 1))


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_the_transforms_of_other_libraries_enlarge_no_narrow_image(library, vit_folder, tmp_path):
    if library == "transformers":
        shutil.copytree(vit_folder, tmp_path / "vit")
        config = json.loads((vit_folder / "preprocessor_config.json").read_text())
        config |= {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}
        config["image_processor_type"] = "CLIPImageProcessor"
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(config))
        transform = huggingface.transform(f"hf:{tmp_path / 'vit'}")
        assert transform(Image.new("RGB", (80, 70))).shape == (3, 48, 48)
    elif library == "timm":
        transform = timm_models.transform(pytest.importorskip("timm").create_model("resnet18"))
    else:
        transform = zoo.transform("torchvision:resnet18")
    with pytest.raises(InputError, match="60000 x 1 pixels, which resizing the short side to"):
        transform(Image.new("RGB", (60000, 1)))
    for images in ([Image.new("RGB", (60000, 1))], torch.full((1, 3, 1, 60000), 9, dtype=torch.uint8)):
        with pytest.raises(InputError, match="image 0 of images has 60000 x 1 pixels, which resizing"):
            forget._PixelReader(3, transform).read(images, "images")


def test_heic_names_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "photo.jpg"  # the content decides
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(UnreadableImage, match="a HEIC image, which needs the package pillow-heif"):
        pixels(path)


def test_postscript_is_not_executed(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match="PostScript, which is a program"):
        pixels(path)


def test_damaged_exif_data_does_not_matter(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(noise((8, 8, 3))).save(path, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    for reader in (ImageReader(), OBEY):
        assert np.array_equal(pixels(path, reader), np.asarray(pil_loader(str(path))))


def test_many_files_are_examined_in_part(tmp_path, monkeypatch):
    files = [save_turned(tmp_path / f"{number}.jpg") for number in range(10)]
    monkeypatch.setattr(image_files, "EXAMINED", 5)
    (note,) = ImageReader().examine(files)
    assert note.startswith("5 of 5 images")
    assert note.count(".jpg") == 3


def test_options_of_the_reader_are_part_of_settings_only_where_they_differ(tmp_path):
    write_folder(tmp_path / "set")
    default, other = (
        datasets.load("set", tmp_path, image_size=16, reader=reader) for reader in (None, ImageReader("obey", 4095.0))
    )
    assert default.settings == {"image_size": 16}
    assert other.settings == {"image_size": 16, "exif_orientation": "obey", "white_level": 4095.0}
    assert default.train.sha256() != other.train.sha256()
    opts = unlearn_options.parse(["--dataset", "set", "--data-dir", str(tmp_path), "--exif-orientation", "obey"])
    assert load_data(opts).settings["exif_orientation"] == "obey"
    assert image_reader(unlearn_options.parse([])) == ImageReader()
    metadata = {"epochs": 3, "dataset": "set"}
    preflight.check_trained_on(default, metadata, "weights")
    with pytest.raises(InputError, match="was trained with --exif-orientation ignore, not --exif-orientation obey"):
        preflight.check_trained_on(other, metadata, "weights")
    with pytest.raises(InputError, match="was trained with --white-level 4095.0, not no --white-level"):
        preflight.check_trained_on(default, metadata | {"white_level": 4095.0}, "weights")


def test_weights_of_another_reading_are_not_taken_for_finished(tmp_path):
    checkpoint.write(tmp_path / "net.safetensors", torch.nn.Linear(1, 1), {"exif_orientation": "obey", "epochs": 3})
    pretrain.check_settings(tmp_path / "net.safetensors", {"exif_orientation": "obey", "epochs": 3})
    with pytest.raises(InputError, match="was trained with exif_orientation obey, not ignore"):
        pretrain.check_settings(tmp_path / "net.safetensors", {"epochs": 3})


def test_a_request_reads_as_the_last_request_or_the_training_did():
    reports = [{"asked": {"exif_orientation": "ignore", "white_level": 4095.0}}]
    defaults = (None, None, 100)
    assert request.choose_reader([], {}, *defaults) == ImageReader(max_pixels=100)
    assert request.choose_reader([], {"exif_orientation": "obey"}, *defaults) == ImageReader("obey", None, 100)
    assert request.choose_reader([], {"exif_orientation": "no"}, *defaults) == ImageReader(max_pixels=100)
    assert request.choose_reader(reports, {"exif_orientation": "obey"}, *defaults).white_level == 4095
    assert request.choose_reader([{"asked": {}}], {}, *defaults).exif_orientation == "obey"  # of earlier versions
    assert request.choose_reader([{"asked": {}}], {}, "ignore", None, 100).exif_orientation == "ignore"
    assert options.parse("main_forget.py", ["--images", "x", "--output", "y"]).exif_orientation is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    indices = tmp_path / "forget.txt"
    indices.write_bytes("7\r\n3\r\n".encode(encoding))
    assert forget_set.read_forget(indices, 10).tolist() == [7, 3]
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "labels.csv").write_bytes("file,label\r\na.png,été\r\n".encode(encoding))
    (image,) = request.read_images(tmp_path / "in", deployed_model._central_square(None)).files
    assert image.label == "été"


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_names_that_differ_only_in_normal_form_are_the_same(tmp_path):
    assert COMPOSED != DECOMPOSED
    assert text.normal_form(DECOMPOSED) == COMPOSED
    folder = tmp_path / "in"
    write_image(folder / DECOMPOSED / f"{DECOMPOSED}.png")
    row = f"{COMPOSED}/{COMPOSED}.png"
    (folder / "labels.csv").write_text(f"file,label,new_label\n{row},{DECOMPOSED},dog\n", encoding="utf-8")
    (image,) = request.read_images(folder, deployed_model._central_square(None)).files
    assert (image.label, image.new_label) == (COMPOSED, "dog")
    assert request.class_indices([image.label], ["dog", DECOMPOSED], None, "label").tolist() == [1]
    write_image(folder / DECOMPOSED / f"{COMPOSED}.png", seed=1)
    with pytest.raises(InputError, match="two files .* differ only in their Unicode normal form"):
        request.read_images(folder, deployed_model._central_square(None))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_class_folder_that_no_text_file_can_name_is_refused(tmp_path):
    write_folder(tmp_path / "set", ("bad\udcff",), ("train", "val"))
    with pytest.raises(InputError, match="the name bad\ufffd in .* is not UTF-8; rename the file or folder"):
        datasets.load("set", tmp_path, image_size=16)


def test_class_folders_that_differ_only_in_normal_form_are_the_same(tmp_path):
    write_folder(tmp_path / "set", ("bar", DECOMPOSED), ("train",))
    write_folder(tmp_path / "set", ("bar", COMPOSED), ("val",))
    write_folder(tmp_path / "other", (COMPOSED,), ("forget",), size=(41, 60))
    images = datasets.load("set", tmp_path, image_size=16)
    assert images.train.labels.tolist() == images.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert forget_set.read_folder(tmp_path / "other" / "forget", images).labels.tolist() == [1, 1, 1]
    write_folder(tmp_path / "set", (COMPOSED,), ("train",))
    with pytest.raises(InputError, match="two subfolders .* differ only in their Unicode normal form"):
        datasets.load("set", tmp_path, image_size=16)


def test_images_that_image_folder_does_not_read_are_named(tmp_path):
    write_folder(tmp_path / "set")
    Image.fromarray(noise((8, 8, 3))).save(tmp_path / "set" / "train" / "ant" / "x.gif")
    (note,) = datasets.load("set", tmp_path, image_size=16).notes
    assert "1 images such as x.gif are left out" in note


def test_main_unlearn_warns_and_records_the_reading(tmp_path, script, capsys):
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(3):
                save_turned(tmp_path / "set" / part / label / f"{number}.jpg", size=(32 + number, 32))
    net = tmp_path / "weights" / "set_resnet20.safetensors"
    from l2ul import models

    checkpoint.write(net, models.build("resnet20", 2).net, {"exif_orientation": "obey", "epochs": 1, "dataset": "set"})
    words = ["--dataset", "set", "--data-dir", tmp_path, "--model", "resnet20", "--image-size", 16, "--unlearn-k", 1]
    words += ["--method", "before", "--result-dir", tmp_path / "results", "--checkpoint", net, "--dry-run"]
    code, _, err = script(main_unlearn.main, *words)
    assert code == 2
    assert "was trained with --exif-orientation obey, not --exif-orientation ignore" in err
    code, out, err = script(main_unlearn.main, *words, "--exif-orientation", "obey")
    assert code == 0, err
    assert "6 of 6 images have an EXIF orientation" in out
