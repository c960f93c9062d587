"""Reading the images of a request: formats, orientation, equal images, labels, damaged files."""

from io import BytesIO
import os
import time

from helpers import write_image
import numpy as np
from PIL import Image, features
import pytest
import torch

from l2ul.common.errors import InputError
from l2ul.data.image_files import ImageReader, UnreadableImage
from l2ul.deletion import deployed_model, request


def test_skip_bad_leaves_out_damaged_files(tmp_path):
    write_image(tmp_path / "0.png")
    path = write_image(tmp_path / "2.jpg", (64, 64))
    path.write_bytes(path.read_bytes()[:600])
    (tmp_path / "notes.txt").write_text("no write_image")
    read = request.read_images(tmp_path, deployed_model._central_square(None), skip_bad=True)
    assert [image.file for image in read.files] == ["0.png"]
    assert [one.file for one in read.unreadable] == ["2.jpg", "notes.txt"]


def test_only_regular_files_are_images(tmp_path):
    write_image(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("/dev/zero")
    (tmp_path / "3.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "4.png").symlink_to(tmp_path / "4.png")
    read = request.read_images(tmp_path, deployed_model._central_square(None), skip_bad=True)
    assert [image.file for image in read.files] == ["0.png"]
    assert [one.file for one in read.unreadable] == ["1.png", "2.png", "3.png", "4.png"]
    assert [one.why for one in read.unreadable[:2]] == ["not a regular file"] * 2


@pytest.mark.parametrize("spoil", [lambda path: path.symlink_to("none.csv"), os.mkfifo])
def test_a_label_table_that_cannot_be_read_is_not_ignored(tmp_path, spoil):
    write_image(tmp_path / "0.png")
    spoil(tmp_path / "labels.csv")
    with pytest.raises(InputError, match=r"labels\.csv is a broken link or no regular file"):
        request.read_images(tmp_path, deployed_model._central_square(None))


def test_images_that_are_not_read_are_in_the_notes(tmp_path):
    write_image(tmp_path / "0.png")
    write_image(tmp_path / ".1.png")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 99)]
    kinds = ["gif", "tiff", "png", *(["webp"] if features.check("webp") else [])]
    for kind in kinds:
        frames[0].save(tmp_path / f"several.{kind}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"single.{kind}")
    read = request.read_images(tmp_path, deployed_model._central_square(None))
    several, hidden = read.notes
    assert several.startswith(f"{len(kinds)} of {2 * len(kinds) + 1} files have several frames or pages (several.gif, ")
    assert hidden == "1 files or folders are not read because their names begin with a dot"


def test_images_with_transparent_pixels_are_in_the_notes(tmp_path):
    colours = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    opaque, clear = colours.convert("RGBA"), colours.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 99))
    for name, image in {"opaque": opaque, "clear": clear, "grey": clear.convert("LA"), "plain": colours}.items():
        image.save(tmp_path / f"{name}.png")
    colours.convert("P").save(tmp_path / "index.png", transparency=colours.convert("P").getpixel((0, 0)))
    colours.convert("P").save(tmp_path / "unused.png", transparency=255)
    (note,) = request.read_images(tmp_path, deployed_model._central_square(None)).notes
    assert note.startswith("3 of 6 images have transparent pixels (clear.png, grey.png, index.png): their transparency")


def test_images_whose_levels_are_scaled_are_in_the_notes(tmp_path):
    write_image(tmp_path / "0.png")
    Image.fromarray(np.full((8, 8), 50_000, np.uint16)).save(tmp_path / "deep.png")
    (note,) = request.read_images(tmp_path, deployed_model._central_square(None)).notes
    assert note.startswith("1 of 2 images have more than 8 bits (deep.png): their levels are scaled to 8 bits; ")


def test_images_of_all_modes_can_be_read_as_upright_rgb(tmp_path):
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[0, 0] = 255  # upper left
    folder = tmp_path / "in"
    folder.mkdir()
    upright = Image.fromarray(colours)
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    turned = upright.rotate(180)
    turned.save(folder / "turned.png", exif=exif)
    upright.save(folder / "upright.bmp")
    upright.convert("P").save(folder / "palette.gif")
    Image.fromarray(colours[:, :, 0]).save(folder / "grey.png")
    Image.fromarray(colours[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    upright.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    reader = ImageReader(exif_orientation="obey")
    read = request.read_images(folder, deployed_model._central_square(None), reader=reader)
    assert len(read) == 1  # all files show one image
    assert set(read.files[0].same_as) == {"deep.png", "grey.png", "palette.gif", "turned.png", "upright.bmp"}
    assert torch.equal(read.images[0], torch.from_numpy(colours).permute(2, 0, 1))


def test_labels_of_folders_and_table_must_agree(tmp_path):
    write_image(tmp_path / "cat" / "a.png")
    (tmp_path / "labels.csv").write_text("file,label,new_label\ncat/a.png,,dog\n")
    read = request.read_images(tmp_path, deployed_model._central_square(None))
    assert (read.files[0].label, read.files[0].new_label) == ("cat", "dog")
    (tmp_path / "labels.csv").write_text("file,label\ncat/a.png,dog\n")
    with pytest.raises(InputError, match="but its folder is 'cat'"):
        request.read_images(tmp_path, deployed_model._central_square(None))


def test_class_indices_of_names_and_numbers():
    classes = ["cat", "7", "dog", "dog"]
    assert request.class_indices(["cat", "7", "2", None], classes, torch.tensor([0, 0, 0, 3]), "label").tolist() == [
        0,
        1,
        2,
        3,
    ]
    with pytest.raises(InputError, match="the name of several classes; give the number of the class$"):
        request.class_indices(["dog"], classes, None, "label")
    with pytest.raises(InputError, match="the name of several classes; give other names with --class-names$"):
        request.class_indices(["1"], ["1", "1", "2"], None, "label")
    for numbered in (["1", "2", "3"], ["001", "002", "003"]):
        assert request.class_indices(numbered, numbered, None, "label").tolist() == [0, 1, 2]
        with pytest.raises(
            InputError, match="label '0' is not a class of the model; expected a name such as '0?0?1', .*3'$"
        ):
            request.class_indices(["0"], numbered, None, "label")
    with pytest.raises(InputError, match="expected a number from 0 to 1, or name the classes with --class-names$"):
        request.class_indices(["cat"], ["0", "1"], None, "label")


def test_labels_of_many_classes_are_found_at_once():
    classes = [f"class {number}" for number in range(50_000)]
    started = time.perf_counter()
    assert request.class_indices(["class 49999", "7"], classes, None, "label").tolist() == [49_999, 7]
    assert time.perf_counter() - started < 5


def test_a_label_table_may_be_elsewhere_and_is_not_an_image(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "labels.csv").write_text("file,label\na.png,cat\n")
    (tmp_path / "other.csv").write_text("file,label\na.png,dog\n")
    to_pixels = deployed_model._central_square(None)
    assert request.read_images(tmp_path / "in", to_pixels, tmp_path / "other.csv").files[0].label == "dog"
    for table in (None, tmp_path / "in" / ".." / "in" / "labels.csv"):
        read = request.read_images(tmp_path / "in", to_pixels, table)
        assert (read.files[0].label, read.unreadable) == ("cat", [])


FORMATS = ("png", "jpeg", "gif", "tiff", "bmp", "webp", "avif", "dds", "ppm")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_read_or_reported(tmp_path, kind):
    if kind in ("webp", "avif") and not features.check(kind):
        pytest.skip(f"this Pillow has no {kind}")
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    coded = BytesIO()
    pixels = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pixels.save(coded, kind, **({"exif": exif} if kind in ("jpeg", "png", "tiff", "webp", "avif") else {}))
    path, whole = tmp_path / "image", coded.getvalue()
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 600), generator.integers(1, 5)):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged[: generator.integers(1, len(damaged))] if generator.random() < 0.3 else damaged)
        try:
            image = ImageReader(exif_orientation="obey").read(path)
        except UnreadableImage:
            continue
        assert image.mode == "RGB"
