"""Read image files: the only reader of the project, so that a file gives the same pixels in every script.

By default the pixels equal those of the default loader of torchvision's `ImageFolder`: Pillow's `convert("RGB")`, EXIF
orientation ignored, transparency dropped, the first frame of several. The exception are images with more than 8 bits a
channel. `convert("RGB")` would clip their grey levels at 255; here they are scaled so that the level of white becomes
255:

    file                                   white
    16-bit grey (PNG, PGM, JPEG 2000)      65535
    TIFF                                   the largest value of its type, such as 4095, 65535 or 2**32 - 1
    floating-point grey                    1
    any of these, with `white_level`       white_level
    16-bit colour                          65535: Pillow keeps the upper 8 bits

White depends on the type of the file and on `white_level`, never on the values in the image. Files with a value outside
0 to white are refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
import contextlib
from dataclasses import dataclass, replace
from io import BytesIO
import os
from pathlib import Path
import re
import stat
import warnings

import numpy as np
from PIL import Image

from l2ul.common.choices import EXIF_ORIENTATIONS, MAX_IMAGE_PIXELS
from l2ul.common.errors import InputError, Reason, Wording, first_line
from l2ul.common.image_sizes import TooLarge, check_resize
from l2ul.common.installation import import_package
from l2ul.common.text import first_three

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {  # by EXIF orientation: the operation that turns an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, SAMPLE_FORMAT, SIGNED = 258, 339, 2  # TIFF tags, and a value of the second
DEEP_COLOUR = re.compile(r"\b(L|LA|RGB|RGBA|RGBX|CMYK);16")  # in Pillow's raw modes of channels with 16 bits
HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}  # in the first box of a HEIC file
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jfif")  # of images that ImageFolder does not list
EXAMINED = 10_000  # most headers that `ImageReader.examine` reads
MEASURED = 32  # most images that it decodes to measure their grey levels
DARK = 1 / 4  # grey levels below this share of white indicate another level of white


class UnreadableImage(Reason):
    """Why a file cannot be read as an image."""


class TooManyPixels(UnreadableImage):
    """The image has more pixels than the reader allows."""


class EmbeddedFile(ABC):
    """An image file inside a larger file, such as a table. Its `str` is its name, with slashes as in a path."""

    __slots__ = ()

    @abstractmethod
    def read_bytes(self) -> bytes:
        """Return the content. Raise UnreadableImage if there is none."""

    @abstractmethod
    def size(self) -> int:
        """Return the number of bytes of the content, without reading it. Raise UnreadableImage if there is none."""

    @abstractmethod
    def version(self) -> str:
        """Return a text that changes when the content may have changed. Raise UnreadableImage if there is none."""


ImageFile = str | Path | EmbeddedFile


def read_bytes(file: ImageFile) -> bytes:
    """Return the content of an image file. Raise UnreadableImage if it cannot be read."""
    try:
        return (file if isinstance(file, EmbeddedFile) else Path(file)).read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or first_line(error)) from None


def size(file: ImageFile) -> int:
    """Return the number of bytes of an image file, without reading it. Raise UnreadableImage if it cannot be read."""
    try:
        return file.size() if isinstance(file, EmbeddedFile) else os.path.getsize(file)
    except OSError as error:
        raise UnreadableImage(error.strerror or first_line(error)) from None


def version(file: ImageFile) -> str:
    """Return a text that changes when the content of an image file may have changed."""
    try:
        if isinstance(file, EmbeddedFile):
            return file.version()
        status = os.stat(file)
    except UnreadableImage as error:
        raise unreadable(file, error) from None
    except OSError as error:
        raise unreadable(file, UnreadableImage(error.strerror)) from None
    return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class ImageProperties:
    """What a user should know about how an image was read.

    orientation     EXIF orientation, 1 to 8
    peak, white     the largest value and the level of white of an image with more than 8 bits a channel; None for
                    others
    is_colour       whether it has more than one channel; peak and white are then those of the upper 8 bits
    has_frames      whether the file has more frames or pages than the one that was read
    is_transparent  whether the image has transparent pixels; only of images that were decoded
    """

    orientation: int = 1
    peak: float | None = None
    white: float | None = None
    is_colour: bool = False
    has_frames: bool = False
    is_transparent: bool = False


@dataclass(frozen=True)
class ImageReader:
    """Reads image files as RGB images of 8 bits a channel.

    exif_orientation  `ignore`: the pixels as stored. `obey`: turned upright
    white_level       value that becomes 255 in grey images of more than 8 bits; None: that of the type of the file
    max_pixels        images with more pixels are refused: a small file may need any amount of memory
    """

    exif_orientation: str = EXIF_ORIENTATIONS[0]
    white_level: float | None = None
    max_pixels: int = MAX_IMAGE_PIXELS

    @property
    def options(self) -> dict[str, object]:
        """The options that decide pixels, by the names of their flags."""
        return {"exif_orientation": self.exif_orientation, "white_level": self.white_level}

    @property
    def settings(self) -> dict[str, object]:
        """The options that decide pixels and differ from their defaults, by the names of their flags."""
        defaults = ImageReader().options
        return {name: value for name, value in self.options.items() if value != defaults[name]}

    def read(self, path: ImageFile) -> Image.Image:
        """Return the RGB image in a file. Raise UnreadableImage if it cannot be read."""
        return self.read_with_properties(path)[0]

    def read_with_properties(self, path: ImageFile) -> tuple[Image.Image, ImageProperties]:
        """Return the RGB image in a file and its properties. Raise UnreadableImage if it cannot be read."""
        with self._open(path) as opened:
            is_deep = _has_deep_channels(opened)
            opened.load()
            orientation = _orientation(opened)
            if _is_deep_grey(opened):
                image, peak, white = self._scale_grey(opened)
                properties = ImageProperties(orientation, peak, white)
                image = image.convert("RGB")
            else:
                image = opened.convert("RGB")
                peak = max(high for _, high in image.getextrema()) if is_deep else None
                white, is_transparent = 255 if is_deep else None, _is_transparent(opened)
                properties = ImageProperties(orientation, peak, white, is_colour=is_deep, is_transparent=is_transparent)
            if self.exif_orientation == "obey" and orientation in UPRIGHT:
                image = image.transpose(UPRIGHT[orientation])
            return image, replace(properties, has_frames=_has_frames(opened))

    def needs_cpu(self, path: ImageFile) -> bool:
        """Return whether a decoder of JPEG files gives other pixels than this reader. Reads the header only."""
        with self._open(path) as image:
            is_turned = self.exif_orientation == "obey" and _orientation(image) in UPRIGHT
            return image.format != "JPEG" or image.mode not in ("RGB", "L") or is_turned

    def examine(self, files: Sequence[ImageFile], short_side: int | None = None) -> list[str]:
        """Return the sentences of `notes` about image files, from their headers.

        short_side  length to which the short side of the images is resized; None: they are not resized

        Of more than EXAMINED files, as many are examined, evenly spread. Of images with more than 8 bits a channel, at
        most MEASURED are decoded. Files that cannot be read are left to `read`, except that InputError is raised for
        images with too many pixels, also after they are resized, or with grey levels outside the range.
        """
        properties: list[tuple[str, ImageProperties]] = []
        deep = []
        for file in _spread(files, EXAMINED):
            try:
                with self._open(file) as image:
                    check_resize(*image.size, short_side)
                    # Pillow turns the image of a TIFF upright when it decodes it, whatever its loader is
                    orientation = 1 if image.format == "TIFF" else _orientation(image)
                    is_deep = _has_deep_channels(image)
            except (TooManyPixels, TooLarge) as error:
                raise unreadable(file, error) from None
            except UnreadableImage:
                continue
            properties.append((_short(file), ImageProperties(orientation)))
            deep += [file] if is_deep else []
        for file in _spread(deep, MEASURED):
            try:
                measured = self.read_with_properties(file)[1]
            except UnreadableImage as error:
                raise unreadable(file, error) from None
            properties.append((_short(file), ImageProperties(1, measured.peak, measured.white, measured.is_colour)))
        return self.notes(properties, min(len(files), EXAMINED))

    def common_side(self, files: Sequence[ImageFile]) -> int | None:
        """Return the side of square images that all have one size; None if sizes differ.

        Reads headers, of more than EXAMINED files as many, evenly spread. Files that cannot be read are left to `read`.
        """
        side = None
        for file in _spread(files, EXAMINED):
            try:
                with self._open(file) as image:
                    width, height = image.size
            except UnreadableImage:
                continue
            if width != height or side not in (None, width):
                return None
            side = width
        return side

    def notes(self, properties: Iterable[tuple[str, ImageProperties]], total: int) -> list[str]:
        """Return sentences about images that other software may read differently or that are nearly black.

        properties  of each image, with its name
        total       number of images, for the text
        """
        properties = list(properties)
        sentences = []
        turned = [name for name, one in properties if one.orientation in UPRIGHT]
        if turned:
            effect = (
                "the pixels are read as stored, as by torchvision's ImageFolder; if the model was trained on upright "
                "images, add --exif-orientation obey"
                if self.exif_orientation == "ignore"
                else "the images are turned upright; if the model was trained with torchvision's ImageFolder, which "
                "reads pixels as stored, add --exif-orientation ignore"
            )
            sentences.append(
                f"{len(turned)} of {total} images have an EXIF orientation ({first_three(turned)}): {effect}"
            )
        several = [name for name, one in properties if one.has_frames]
        if several:
            sentences.append(
                f"{len(several)} of {total} files have several frames or pages ({first_three(several)}): the first of "
                f"each is the image, the others are not read; save them as files of their own if they are images too"
            )
        transparent = [name for name, one in properties if one.is_transparent]
        if transparent:
            sentences.append(
                f"{len(transparent)} of {total} images have transparent pixels ({first_three(transparent)}): their "
                f"transparency is dropped, as by torchvision's ImageFolder; if the model is used with such images on a "
                f"background, save them on it first"
            )
        ranges: dict[tuple[bool, float], list[tuple[str, float]]] = {}
        for name, one in properties:
            if one.white is not None:
                ranges.setdefault((one.is_colour, one.white), []).append((name, one.peak))
        for (is_colour, white), images in ranges.items():
            peak = max(value for _, value in images)
            if peak >= white * DARK:
                continue
            names = first_three([name for name, _ in images])
            if is_colour:
                remedy = "write them again with values up to 65535, or with 8 bits"
                text = f"the upper 8 bits of 16-bit colour images ({names}) reach {peak} of {white}"
            else:
                guess = f"{peak:g}" if white == 1 or peak < 1 else f"{2 ** int(peak).bit_length() - 1}"
                remedy = f"if white is {guess} in these files, add --white-level {guess}"
                text = f"the grey levels of images with more than 8 bits ({names}) reach {peak:g} of {white:g}"
            sentences.append(f"{text}, so they are nearly black; {remedy}")
        return sentences

    @contextlib.contextmanager
    def _open(self, path: ImageFile) -> Iterator[Image.Image]:
        """Yield the opened image, whose pixels are not decoded yet. Raise UnreadableImage for every error inside."""
        limit = Image.MAX_IMAGE_PIXELS
        try:
            Image.MAX_IMAGE_PIXELS = self.max_pixels
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of damage that it can repair
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with _identify(path) as image:
                    if image.format == "EPS":
                        raise UnreadableImage("PostScript, which is a program and not an image")
                    yield image
        except Image.UnidentifiedImageError:
            raise UnreadableImage("no image of a known format") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            count = re.search(r"\d+", str(error))[0]
            raise TooManyPixels(
                f"{count} pixels, above the limit of {self.max_pixels}", "raise the limit with --max-image-pixels"
            ) from None
        except (UnreadableImage, TooLarge, MemoryError):
            raise
        except Exception as error:  # the decoders raise many types
            raise UnreadableImage(getattr(error, "strerror", None) or f"damaged: {first_line(error)}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit

    def _scale_grey(self, image: Image.Image) -> tuple[Image.Image, float, float]:
        """Return a one-channel image scaled to 8 bits, its largest value and its level of white."""
        largest = _largest_value(image)
        values = np.asarray(image)
        if image.mode == "I" and largest == 2**32 - 1:  # unsigned, which Pillow's mode I does not distinguish
            values = values.view(np.uint32)
        white = self.white_level or largest
        low, peak = values.min().item(), values.max().item()
        if not np.isfinite(low + peak):
            raise UnreadableImage("grey levels that are not finite")
        if low < 0 or peak > white:
            raise UnreadableImage(
                f"grey levels from {low:g} to {peak:g}, expected 0 to {white:g}",
                "give the level of white as --white-level",
                "convert to 8 bits",
            )
        if values.dtype.kind in "iu" and peak < 2**16:
            table = np.arange(int(peak) + 1)
            levels = (table / white * 255).round().astype(np.uint8)[values]
        else:
            levels = (values.astype(np.float64) / white * 255).round().astype(np.uint8)
        return Image.fromarray(levels), peak, white


def unreadable(file: ImageFile, reason: Reason) -> InputError:
    """Return the error for an image file that a data set needs and that cannot be read."""
    return InputError(f"cannot read the image {file} ({reason.problem})", *reason.advice, "replace or remove it")


def _identify(file: ImageFile) -> Image.Image:
    """Open an image; one in the HEIC format with the package pillow-heif."""
    if not isinstance(file, EmbeddedFile) and not stat.S_ISREG(os.stat(file).st_mode):
        raise UnreadableImage("not a regular file")
    source = BytesIO(file.read_bytes()) if isinstance(file, EmbeddedFile) else file
    try:
        return Image.open(source)
    except Image.UnidentifiedImageError:
        if not _is_heic(source):
            raise
    try:
        pillow_heif = import_package("pillow_heif")
    except ImportError:
        raise UnreadableImage(
            "a HEIC image, which needs the package pillow-heif",
            Wording("install pillow-heif (uv run --extra heic …, or pip install pillow-heif)", "install pillow-heif"),
        ) from None
    pillow_heif.register_heif_opener()
    return Image.open(source)


def _is_heic(source: str | Path | BytesIO) -> bool:
    with contextlib.nullcontext(source) if isinstance(source, BytesIO) else open(source, "rb") as file:
        file.seek(0)
        start = file.read(64)
    brands = {start[place : place + 4] for place in range(8, min(len(start), int.from_bytes(start[:4])), 4)}
    return start[4:8] == b"ftyp" and bool(brands & HEVC_BRANDS)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied; 1 if there is none or the EXIF data is damaged."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys():
        return 1  # `getexif` would decode the pixels of an image that was only opened
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of damaged data
        return 1
    return orientation if orientation in UPRIGHT else 1


def _has_frames(image: Image.Image) -> bool:
    """Return whether a file has several images. Those of phones (MPO) have one, with its depth or its gain."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # of damaged later frames
        return False


def _is_transparent(image: Image.Image) -> bool:
    """Return whether pixels of a decoded image are transparent."""
    try:
        return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    except Exception:  # of damaged data
        return False


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _has_deep_channels(image: Image.Image) -> bool:
    """Return whether an opened image has more than 8 bits a channel."""
    return _is_deep_grey(image) or any(DEEP_COLOUR.search(str(tile[3])) for tile in image.tile)


def _largest_value(image: Image.Image) -> float:
    """Return the largest value of the type of a one-channel image, 1 for floating point."""
    if image.mode == "F":
        return 1.0
    tags = getattr(image, "tag_v2", None)
    if tags:
        bits, is_signed = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    else:
        is_signed = image.mode == "I" and image.format not in ("PNG", "PPM")
        bits = 32 if is_signed else 16
    return 2 ** (bits - is_signed) - 1


def _spread(files: Sequence, count: int) -> Sequence:
    """Return at most `count` files, evenly spread over all."""
    if len(files) <= count:
        return files
    return [files[index * len(files) // count] for index in range(count)]


def _short(file: ImageFile) -> str:
    return "/".join(Path(str(file)).parts[-2:])
