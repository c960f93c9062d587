"""A request to forget: the images of a folder with their hashes, and what they are called and shall be called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
import hashlib
from pathlib import Path
import warnings

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
import torch
from torch import Tensor

from l2ul.common.errors import InputError
from l2ul.common.files import file_sha256

LABELS = "labels.csv"  # in the folder of images: file, label, new_label
Shape = Callable[[Image.Image], Tensor]  # from an RGB image to pixels, uint8 (3, H, W)


@dataclass(frozen=True)
class Item:
    """An image that was asked for.

    file           where it is below the folder, with / between folders
    sha256         of the file's bytes; pixels_sha256 of the upright RGB image in its own size
    label          its class as the folder or the table of labels tells it, or None
    new_label      what it shall be called instead, or None
    same_as        files of the same pixels, which count as this one
    """

    file: str
    sha256: str
    pixels_sha256: str
    label: str | None = None
    new_label: str | None = None
    same_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bad:
    """A file that is no image that can be read, and why."""

    file: str
    why: str


@dataclass(frozen=True)
class Request:
    """Images (n, 3, H, W) uint8 on the CPU, of one size, what is known of each, and what could not be read.

    table  the file that tells labels, if there is one
    """

    folder: Path
    items: list[Item]
    images: Tensor
    bad: list[Bad] = field(default_factory=list)
    table: Path | None = None

    @property
    def labels_from(self) -> str:
        """What tells what the images are called."""
        told = sum(item.label is not None for item in self.items)
        source = f"from {self.table.name}" if self.table else "names of folders"
        if told == len(self):
            return source
        return f"{source}; of {len(self) - told} the model's own predictions" if told else "the model's own predictions"

    def __len__(self) -> int:
        return len(self.items)


class _Unreadable(Exception):
    """Why a file is no image that can be read."""


def read(
    folder: Path, shape: Shape, table: Path | None = None, skip_bad: bool = False, flag: str = "--images"
) -> Request:
    """The images of a folder, or of a folder a label in it, sorted by name; those of the same pixels once.

    shape     brings an RGB image to the pixels that the model takes
    table     a CSV file with columns file, label and new_label (one or both); `labels.csv` in the folder by default
    skip_bad  leave out what cannot be read, rather than to raise
    flag      that named the folder, for what is said of it

    Raises InputError where there is no image, one cannot be read, names contradict each other or sizes differ.
    """
    if not folder.is_dir():
        raise InputError(f"{flag} {folder} is no folder; name the folder that holds the images")
    named = table or (folder / LABELS if (folder / LABELS).is_file() else None)
    tables = {folder / LABELS, named.resolve() if named else None}
    listed = _listed(folder, flag).items()
    found = {file: label for file, label in listed if not tables & {folder / file, (folder / file).resolve()}}
    labels = _labels(named, found, folder) if named else {}
    items, pixels, bad = [], [], []
    for file, label in found.items():
        try:
            image = _decoded(folder / file)
        except _Unreadable as error:
            bad.append(Bad(file, str(error)))
            continue
        items.append(Item(file, file_sha256(folder / file), _sha256(image), *labels.get(file, (label, None))))
        pixels.append(shape(image))
    if bad and not skip_bad:
        listed = "; ".join(f"{one.file}: {one.why}" for one in bad[:5])
        raise InputError(
            f"{len(bad)} of {len(found)} files in {folder} cannot be read ({listed}{'; …' if len(bad) > 5 else ''}); "
            f"mend or remove them, or leave them out with --skip-bad"
        )
    if not items:
        raise InputError(f"{flag} {folder} holds no image; name the folder that holds the images")
    _check_sizes(items, pixels)
    return Request(folder, *_once(items, pixels), bad, named)


def _listed(folder: Path, flag: str) -> dict[str, str | None]:
    """Files of the folder, and of one level of folders in it, sorted, with the name of their folder as their label."""
    found: dict[str, str | None] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        _check_name(path)
        if path.is_dir():
            for inner in map(_check_name, sorted(path.iterdir())):
                if inner.is_dir() and not inner.name.startswith("."):
                    raise InputError(f"{inner} is a folder within a label's folder; expected images in {path}")
                if not inner.name.startswith("."):
                    found[f"{path.name}/{inner.name}"] = path.name
        else:
            found[path.name] = None
    loose = [file for file, label in found.items() if label is None and file != LABELS]
    if loose and len(loose) < len(found) - (LABELS in found):
        raise InputError(
            f"{flag} {folder} holds images beside folders of labels, such as {loose[0]}; put all in folders, or none"
        )
    return found


def _check_name(path: Path) -> Path:
    """The path; InputError where its name cannot be written down in a report."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        shown = path.name.encode(errors="surrogateescape").decode(errors="replace")
        raise InputError(f"the name {shown} in {path.parent} is not UTF-8; rename it") from None
    return path


def _labels(table: Path, found: dict[str, str | None], folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """Label and new label by file, of a CSV file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of fields for which there is no column
            rows = pd.read_csv(table, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False)
            rows = rows.fillna("")  # fields that are not there
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise InputError(f"cannot read the labels {table} ({str(error).strip().splitlines()[0]})") from None
    unknown = set(rows.columns) - {"file", "label", "new_label"}
    if "file" not in rows or len(rows.columns) == 1 or unknown:
        raise InputError(
            f"{table} has columns {', '.join(rows.columns)}; expected file, and label or new_label or both"
        )
    twice = rows.file[rows.file.duplicated()]
    if len(twice):
        raise InputError(f"{table} has {twice.iloc[0]} more than once; list each image once")
    absent = sorted(set(rows.file) - found.keys())
    if absent:
        raise InputError(f"{table} lists {absent[0]}, which is not in {folder}; correct the name or remove the line")
    labels = {}
    for row in rows.to_dict("records"):
        told, by_folder = row.get("label", "").strip() or None, found[row["file"]]
        if told and by_folder and told != by_folder:
            raise InputError(
                f"{table} calls {row['file']} {told!r}, but its folder is {by_folder!r}; correct one of them"
            )
        labels[row["file"]] = (told or by_folder, row.get("new_label", "").strip() or None)
    return labels


def _decoded(path: Path) -> Image.Image:
    """An image upright, as RGB: 16-bit greys scaled, transparency dropped, of several frames the first."""
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # what a reader says of damage that it can do with
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened.load()
            return _as_rgb(ImageOps.exif_transpose(opened))
    except Image.UnidentifiedImageError:
        raise _Unreadable("no image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _Unreadable("far too large for an image") from None
    except (_Unreadable, MemoryError):
        raise
    except Exception as error:  # each format's reader has its own way to fail
        raise _Unreadable(f"damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise _Unreadable("grey levels are floating-point numbers, whose range nothing tells")
    return image.convert("RGB")


def _sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _check_sizes(items: list[Item], pixels: list[Tensor]) -> None:
    """Raise InputError unless all images have one size: what the model takes is not known to resize them."""
    for item, image in zip(items, pixels, strict=True):
        if image.shape != pixels[0].shape:
            sizes = [" x ".join(map(str, reversed(one.shape[1:]))) for one in (pixels[0], image)]
            raise InputError(
                f"{items[0].file} has {sizes[0]} pixels and {item.file} has {sizes[1]}, and nothing tells what size "
                f"the model takes; give it by --image-size"
            )


def _once(items: list[Item], pixels: list[Tensor]) -> tuple[list[Item], Tensor]:
    """The same images, each only once; InputError where files of the same pixels are called differently."""
    index: dict[str, int] = {}
    kept, places = [], []
    for place, item in enumerate(items):
        own = index.setdefault(item.pixels_sha256, len(kept))
        if own == len(kept):
            kept.append(item)
            places.append(place)
            continue
        first = kept[own]
        if (first.label, first.new_label) != (item.label, item.new_label):
            raise InputError(
                f"{first.file} and {item.file} are the same image with different labels; correct one of them"
            )
        kept[own] = replace(first, same_as=(*first.same_as, item.file))
    return kept, torch.stack([pixels[place] for place in places])


def class_numbers(names: Sequence[str | None], classes: Sequence[str], default: Tensor | None, what: str) -> Tensor:
    """The class (n,) int64 that each name or number means; where there is none, that of `default`.

    classes  what they are called; a name of one counts before its number
    what     the names are, for what is said of them

    Raises InputError for a name that no class has, or that several have.
    """
    known: dict[str, int] = {}
    for index, name in enumerate(classes):
        known.setdefault(name, index)
    several = {name for name in known if classes.count(name) > 1}
    found = []
    for position, name in enumerate(names):
        if name is None:
            if default is None:
                raise InputError(f"there is no {what} for an image; give one for each")
            found.append(int(default[position]))
        elif name in several:
            raise InputError(f"{what} {name!r} is the name of several classes; give its number")
        elif name in known:
            found.append(known[name])
        elif name.isdecimal() and int(name) < len(classes):
            found.append(int(name))
        else:
            shown = ", ".join(map(repr, list(classes)[:3]))
            raise InputError(
                f"{what} {name!r} is no class of the model; expected a name such as {shown}, or a number from 0 to "
                f"{len(classes) - 1}"
            )
    return torch.tensor(found)
