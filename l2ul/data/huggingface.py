"""Data sets of Hugging Face `datasets`, by hub name or folder. Code in a data set is never run.

The images are the files in a column of a table. The reader of the project decodes them, so that a file gives the same
pixels as in a folder.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
from dataclasses import dataclass
from functools import cached_property
import hashlib
import json
import os
from pathlib import Path
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from l2ul import ProgressBar
from l2ul.common import distributed
from l2ul.common.errors import InputError, rejected
from l2ul.common.installation import require
from l2ul.common.offline import offline
from l2ul.common.text import read_text
from l2ul.data import storage
from l2ul.data.folder import FolderImages
from l2ul.data.image_files import EmbeddedFile, ImageReader, UnreadableImage, version
from l2ul.data.images import Images, Split

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray

PREFIX = "hf:"
TEST_SPLITS = ("test", "validation", "valid", "val")  # the first that exists is the test set
OLDEST = 4  # major version of datasets; earlier ones run the loading script of a data set
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder that save_to_disk wrote
PER_WORKER = 1000  # images that are worth a process to decode them


@dataclass(frozen=True)
class ImageColumn:
    """The images of a split.

    name     of the split, as the folder of its images
    rows     a table with one column, of type Image(decode=False)
    version  changes when the files of the table change
    """

    name: str
    rows: "Dataset"
    version: str

    @cached_property
    def values(self) -> "ChunkedArray":
        """The column in memory-mapped files: a row of it takes a third of the time of a row of the table."""
        return self.rows.with_format("arrow")[:].column(0)

    @cached_property
    def sizes(self) -> list[int | None]:
        """The number of bytes of each image; None for one that is not in the table."""
        from pyarrow import compute

        return compute.binary_length(compute.struct_field(self.values, "bytes")).to_pylist()

    def __getstate__(self) -> dict[str, object]:
        """Return the state for another process, which opens the files itself."""
        return {name: value for name, value in vars(self).items() if name not in ("values", "sizes")}


@dataclass(frozen=True, slots=True)
class Row(EmbeddedFile):
    """The image in a row of a column."""

    column: ImageColumn
    index: int

    def __str__(self) -> str:
        return f"{self.column.name}/{self.index}"

    def read_bytes(self) -> bytes:
        value = self.column.values[self.index].as_py()
        content = value["bytes"] if value else None
        return self._path().read_bytes() if content is None else content

    def size(self) -> int:
        size = self.column.sizes[self.index]
        return self._path().stat().st_size if size is None else size

    def _path(self) -> Path:
        """Return the file of an image that is not in the table. Raise UnreadableImage if there is none."""
        value = self.column.values[self.index].as_py()
        path = value["path"] if value else None
        if path is None:
            raise UnreadableImage("the row has no image")
        if not Path(path).is_file():
            raise UnreadableImage(f"its file {path} does not exist")
        return Path(path)

    def version(self) -> str:
        if self.column.sizes[self.index] is not None:
            return self.column.version
        return f"{self.column.version} {version(self._path())}"  # of a file that is not in the table


@dataclass(frozen=True)
class Part:
    """A split of a data set, or a part of one.

    spec         as the user named it, such as train or train[:80%]
    rows         its rows
    split        name of the split
    first, last  its rows in that split: first, …, last - 1
    """

    spec: str
    rows: "Dataset"
    split: str
    first: int
    last: int


def load(
    name: str,
    data_dir: Path,
    *,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    workers: int = 0,
    progress: ProgressBar | None = None,
    reader: ImageReader | None = None,
    download: bool = True,
    **reading,
) -> Images:
    """Return a data set.

    name                       `hf:NAME`, `hf:NAME:CONFIGURATION` of the hub, or `hf:FOLDER` that `save_to_disk` wrote,
                               in the current folder or in `data_dir`
    image_size                 side to which images are resized and cropped as those of a folder. None: square images of
                               one size are left as they are, others are resized to 224
    image_column, label_column names of columns. None: the only ones of the type, or `image` and `label`
    train_split, test_split    names of splits, or parts such as `train[:80%]`. None: `train`, and `test` or
                               `validation`
    workers, progress          of decoding into memory, see `FolderImages.in_memory`
    reader, reading            decode images, see FolderImages
    download                   whether the hub may be contacted. If not, a name of it must be in the cache of datasets

    Images that are left as they are and take at most `storage.IN_MEMORY` bytes a split are decoded once into memory.
    Others stay on disk, as those of a folder.

    Raises InputError if there is no such data set, or it has no images with one label each.
    """
    reader = reader or ImageReader()
    shown = record_name(name, data_dir)
    splits = _open(name, data_dir, download)
    train = _part(splits, shown, "train", train_split, ("train",))
    test = _part(splits, shown, "test", test_split, TEST_SPLITS)
    if train.split == test.split and train.first < test.last and test.first < train.last:
        raise InputError(
            f"--train-split {train.spec} and --test-split {test.spec} of {shown} have images in common",
            "name other splits, or parts such as train[:80%] and train[80%:]",
        )
    features = train.rows.features
    image = _image_column(features, shown, image_column)
    label = _label_column(features, shown, label_column)
    for column in (image, label):
        if test.rows.features.get(column) != features[column]:
            raise InputError(
                f"the column {column} of {shown} differs between its splits {train.spec} and {test.spec} in type or "
                f"class names",
                "name other splits with --train-split and --test-split",
                "save it with equal features",
            )
    classes, labels = _labels(shown, train, test, label)
    files = [_files(shown, part, image) for part in (train, test)]
    side = reader.common_side([*files[0], *files[1]]) if image_size is None else None
    size = side or image_size or 224
    pixels = [FolderImages(some, size, side, reader=reader, **reading) for some in files]
    if side:
        pixels = [_in_memory(images, workers, progress) for images in pixels]
    settings = {"image_column": image, "label_column": label, "train_split": train.spec, "test_split": test.spec}
    settings |= ({} if side else {"image_size": size}) | reader.settings
    parts = [Split(*pair) for pair in zip(pixels, labels, strict=True)]
    short_side = parts[0].images.short_side if parts[0].on_disk else None
    notes = [f"{part[0].column.name}: {note}" for part in files for note in reader.examine(part, short_side)]
    return Images(shown, len(classes), classes, *parts, settings=settings, notes=tuple(notes))


def record_name(name: str, data_dir: Path) -> str:
    """Return the name of a data set `hf:…` in records: of a folder, without the path to it."""
    folder, configuration = _find(name, Path(data_dir))
    if folder is None:
        return name
    return f"{PREFIX}{Path(os.path.abspath(folder)).name}" + (f":{configuration}" if configuration else "")


def _find(name: str, data_dir: Path) -> tuple[Path | None, str | None]:
    """Return the folder that `hf:…` names, None if it is a name of the hub, and the configuration."""
    place = name.removeprefix(PREFIX)
    start, colon, end = place.rpartition(":")
    for text, configuration in ((place, None), (start, end)) if colon else ((place, None),):
        for folder in (Path(text), data_dir / text):
            if text and os.path.isdir(folder):  # False for a name that no folder can have
                return folder, configuration
    return None, end if colon else None


def _open(name: str, data_dir: Path, download: bool) -> "Mapping[str, Dataset]":
    """Return the splits of a data set, whose tables stay on disk. A folder is read without a network."""
    folder, configuration = _find(name, Path(data_dir))
    place = str(folder) if folder else name.removeprefix(PREFIX).removesuffix(f":{configuration}")
    if not place:
        raise InputError(f"--dataset is {name}", "expected hf:NAME of a data set on the hub, or hf:FOLDER")
    datasets, advice = _package(), ()
    if folder:
        problem = "expected what save_to_disk of datasets writes, or a copy of a data set of the hub"
    elif download:
        problem = "there is no such folder, and it cannot be read from the hub"
        advice = ("expected hf:NAME or hf:FOLDER, or hf:NAME:CONFIGURATION for a data set with several configurations",)
    else:
        problem = "it is no folder on this machine, and it is downloaded with --download only"
    with rejected(f"cannot load the data set {name}: {problem}", *advice):
        if folder and any((folder / file).is_file() for file in SAVED):
            _check_saved(folder, name)
            splits = datasets.load_from_disk(place, keep_in_memory=False)
        else:
            if folder:
                _check_addresses(folder, name)
            from_hub = download and not folder
            with (
                distributed.local_first(),  # the first process of a machine downloads, the others find it
                contextlib.nullcontext() if from_hub else offline(datasets.config),
            ):
                splits = datasets.load_dataset(place, configuration, keep_in_memory=False)
    return splits if isinstance(splits, dict) else {str(splits.split or "train"): splits}


def _check_saved(folder: Path, name: str) -> None:
    """Raise InputError if a split in a folder of save_to_disk has no file, which datasets does not explain."""
    for state in sorted(folder.glob("**/state.json")):
        if json.loads(state.read_text()).get("_data_files") == []:
            raise InputError(f"the split {state.parent.name} of {name} is empty", "save the data set without it")


def _check_addresses(folder: Path, name: str) -> None:
    """Raise InputError if the card of a folder names files elsewhere, which datasets would fetch."""
    from huggingface_hub import metadata_load
    import yaml

    card, settings = folder / "README.md", folder / ".huggingface.yaml"
    contents = [metadata_load(card) if card.is_file() else None]
    contents += [yaml.safe_load(read_text(settings)) if settings.is_file() else None]
    for content in contents:
        address = next((text for text in _texts((content or {}).get("configs")) if "://" in text), None)
        if address:
            raise InputError(
                f"{name} names files that are not in its folder ({address[:100]})",
                "download them to the folder, and name them there with relative paths",
            )


def _texts(value: object) -> Iterator[str]:
    """Yield all texts in lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(one)


def _package():
    """Return the package datasets. Raise InputError if it is not installed, or if it could run code."""
    datasets = require("datasets", "--dataset hf:…")
    if int(datasets.__version__.split(".")[0]) < OLDEST:
        raise InputError(
            f"datasets {datasets.__version__} is installed, which may run code of a data set",
            f"expected version {OLDEST} or newer: pip install -U datasets",
        )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _part(splits: "Mapping[str, Dataset]", shown: str, what: str, spec: str | None, usual: tuple[str, ...]) -> Part:
    """Return the training or test set: what the user named, or the first of the usual splits that exists."""
    from datasets import ReadInstruction

    flag = f"--{what}-split"
    advice = f"name one with {flag}, or a part of one such as train[:80%] or train[80%:]"
    names = f"its splits are {', '.join(splits)}" if splits else "it has no splits"
    if spec is None:
        spec = next((name for name in usual if name in splits), None)
        if spec is None:
            raise InputError(f"{shown} has no split {' or '.join(usual[:2])}, {names}", advice)
    if spec in splits:
        part = Part(spec, splits[spec], spec, 0, len(splits[spec]))
    else:
        try:
            (place,) = ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in splits.items()})
        except (ValueError, AssertionError):
            raise InputError(f"{flag} is {spec}, but {shown} has no such split, {names}", advice) from None
        rows = splits[place.splitname].select(range(place.from_, place.to))
        part = Part(spec, rows, place.splitname, place.from_, place.to)
    if not len(part.rows):
        raise InputError(f"the split {spec} of {shown} is empty, {names}", advice)
    return part


def _image_column(features: Mapping[str, object], shown: str, chosen: str | None) -> str:
    from datasets import Image

    remedy = "expected the type Image: cast_column(NAME, Image()) of datasets converts paths and bytes of image files"
    return _column(features, shown, "image", chosen, [lambda kind: isinstance(kind, Image)], remedy)


def _label_column(features: Mapping[str, object], shown: str, chosen: str | None) -> str:
    from datasets import ClassLabel, Value

    remedy = "expected ClassLabel or integers: class_encode_column(NAME) of datasets converts text"
    kinds = [lambda kind: isinstance(kind, ClassLabel), lambda kind: isinstance(kind, Value) and "int" in kind.dtype]
    return _column(features, shown, "label", chosen, kinds, remedy)


def _column(
    features: Mapping[str, object],
    shown: str,
    what: str,
    chosen: str | None,
    kinds: list[Callable[[object], bool]],
    remedy: str,
) -> str:
    """Return the name of a column: what the user named, or the only one of the first kind that there is."""
    listed = ", ".join(f"{name} ({_type_name(kind)})" for name, kind in features.items())
    flag = f"--{what}-column"
    if chosen is not None and chosen not in features:
        raise InputError(f"{flag} is {chosen}, but {shown} has no such column", f"expected one of {listed}")
    names = [chosen] if chosen is not None else list(features)
    fitting = next(filter(None, ([name for name in names if fits(features[name])] for fits in kinds)), [])
    if not fitting and chosen is not None:
        raise InputError(f"{flag} is {chosen}, a column of type {_type_name(features[chosen])}", remedy)
    if not fitting:
        raise InputError(
            f"{shown} has no column of {what}s among {listed}", f"{remedy}, and flatten() opens nested ones"
        )
    if len(fitting) > 1 and what not in fitting:
        raise InputError(f"{shown} has several columns of {what}s, {', '.join(fitting)}", f"choose one with {flag}")
    return what if what in fitting else fitting[0]


def _type_name(kind: object) -> str:
    """Return the name of the type of a column, such as Image, ClassLabel or string; dict and list are nested."""
    return getattr(kind, "dtype", "") if type(kind).__name__ == "Value" else type(kind).__name__


def _labels(shown: str, train: Part, test: Part, column: str) -> tuple[list[str], list[Tensor]]:
    """Return the class names, and the labels (n,) int64 of the training and the test set."""
    names = getattr(train.rows.features[column], "names", None)
    labels = [_column_labels(shown, part, column) for part in (train, test)]
    classes = list(names) if names else [str(number) for number in range(int(labels[0].max()) + 1)]
    if not names and not np.array_equal(np.unique(labels[0]), np.arange(len(classes))):
        raise InputError(
            f"the labels in the column {column} of {shown} are {labels[0].min()} to {labels[0].max()} with gaps",
            f"expected 0, 1, …, or a column of type ClassLabel: class_encode_column({column!r}) of datasets",
        )
    for part, values in zip((train, test), labels, strict=True):
        if values.max() >= len(classes):
            raise InputError(
                f"row {values.argmax()} of the split {part.spec} of {shown} has label {values.max()}",
                f"expected 0 to {len(classes) - 1}, {'its classes' if names else 'as in the training set'}",
            )
    return classes, [torch.tensor(values) for values in labels]


def _column_labels(shown: str, part: Part, column: str) -> np.ndarray:
    values = part.rows.select_columns([column]).with_format("arrow")[:].column(0)
    labels = values.cast("int64", safe=False).fill_null(-1).to_numpy()
    missing = (labels < 0).nonzero()[0]
    if len(missing):
        raise InputError(
            f"{len(missing)} labels in the split {part.spec} of {shown} are missing or negative, such as that of row "
            f"{missing[0]}",
            "name a split with labels (--train-split, --test-split)",
            "remove these rows",
        )
    return labels


def _files(shown: str, part: Part, column: str) -> list[EmbeddedFile]:
    from datasets import Image

    rows = part.rows.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
    images = ImageColumn(f"{shown}/{part.spec}", rows, _version(rows))
    return [Row(images, index) for index in range(len(rows))]


def _version(rows: "Dataset") -> str:
    """Return a text that changes when the files of a table change."""
    stats = [(file["filename"], os.stat(file["filename"])) for file in rows.cache_files]
    text = " ".join(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_memory(images: FolderImages, workers: int, progress: ProgressBar | None) -> Tensor | FolderImages:
    """Return images as a tensor if they are few enough."""
    if len(images) * images.channels * images.size**2 > storage.IN_MEMORY:
        return images
    return images.in_memory(min(workers, len(images) // PER_WORKER), progress)
