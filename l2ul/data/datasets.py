"""Load a data set by name: digits, CIFAR, MNIST, UTKFace, Hugging Face, a folder. Register new ones with `dataset`."""

from collections.abc import Callable, Iterator
import contextlib
from functools import partial
from pathlib import Path
import socket

import torch
import torch.nn.functional as F
from torchvision import datasets as torchvision_datasets

from l2ul import ProgressBar
from l2ul.common import distributed
from l2ul.common.device import plain_defaults
from l2ul.common.errors import InputError, first_line, option
from l2ul.common.text import normal_form, require_utf8_name
from l2ul.data import huggingface, utkface
from l2ul.data.folder import PREFETCH, FolderImages, class_labels
from l2ul.data.image_files import OTHER_SUFFIXES, ImageReader
from l2ul.data.images import Images, Split

DEFAULT_SIZE = 224  # side of the images of a folder
WNIDS = Path(__file__).with_name("imagenet_wnids.txt")  # the 1,000 classes of ImageNet-1k, in order

Loader = Callable[..., Images]
LOADERS: dict[str, Loader] = {}  # any other name is a folder of images


@plain_defaults()
def load(
    name: str,
    data_dir: Path,
    *,
    image_size: int | None = None,
    age_grouping: str = "TNN",
    split_seed: int = 0,
    whole_train: bool = False,
    workers: int = 0,
    download: bool = True,
    prefetch: int = PREFETCH,
    decoder: str = "cpu",
    reader: ImageReader | None = None,
    progress: ProgressBar | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
) -> Images:
    """Return a data set.

    name               `digits`, `cifar10`, `cifar100`, `mnist`, `fashion_mnist`, `utkface`, a name registered with
                       `dataset`, `hf:NAME_OR_FOLDER`, or a folder
    data_dir           the folder that holds the data set
    image_size         side of the square images of a folder (default 224), of UTKFace (default 128) or of `hf:`. In a
                       folder, square images of this size stay as they are, by default also smaller ones of one size
    age_grouping, split_seed, whole_train, workers, progress   of UTKFace, see `utkface.load`
    download           whether a missing data set of torchvision or of the hub is downloaded
    prefetch, decoder  of images on disk, see `folder.FolderImages`
    reader             decodes image files
    image_column, label_column, train_split, test_split   of `hf:`, see `huggingface.load`

    A folder `<data_dir>/<name>` has the subfolders `train` and `val` (or `test`), and these have a subfolder per class.
    The classes of `imagenet` are the 1,000 of ImageNet-1k, even if some of their folders are absent.

    Raises InputError if there is no such data set, or it is incomplete and cannot be downloaded.
    """
    data_dir = Path(data_dir)
    reading = {"prefetch": prefetch, "decoder": decoder, "reader": reader or ImageReader()}
    table = {"image_column": image_column, "label_column": label_column}
    table |= {"train_split": train_split, "test_split": test_split}
    if name.startswith(huggingface.PREFIX):
        decoding = {"image_size": image_size, "workers": workers, "progress": progress, **reading}
        return huggingface.load(name, data_dir, download=download, **table, **decoding)
    flag = next((flag for flag, value in table.items() if value is not None), None)
    if flag:
        raise InputError(f"{option(flag)} is for --dataset hf:NAME_OR_FOLDER, not {name}", "leave it out")
    if name in LOADERS:
        options = {"image_size": image_size, "age_grouping": age_grouping, "split_seed": split_seed}
        options |= {"whole_train": whole_train, "workers": workers, "download": download, "progress": progress}
        return LOADERS[name](data_dir, **options, **reading)
    return _image_folder(name, data_dir / name, image_size, **reading)


def dataset(name: str) -> Callable[[Loader], Loader]:
    """Register the decorated function as the loader of the data set `name`.

    The function gets the data folder and, by keyword, the other arguments of `load` except those of `hf:`. It returns
    Images.
    """

    def register(loader: Loader) -> Loader:
        LOADERS[name] = loader
        return loader

    return register


@dataset("digits")
def _digits(data_dir: Path, **options) -> Images:
    """Return scikit-learn's 1,797 handwritten digits (8 × 8, 17 grey levels), enlarged to 32 × 32 RGB.

    Every fifth image is a test image.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8)
    large = F.interpolate(grey, scale_factor=4, mode="bilinear").round().to(torch.uint8)
    images, labels = large.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    train = Split(images[~test], labels[~test])
    return Images("digits", 10, [str(d) for d in range(10)], train, Split(images[test], labels[test]))


def _cifar(name: str, kind: type[torchvision_datasets.CIFAR10], data_dir: Path, *, download: bool, **options) -> Images:
    parts = _of_torchvision(name, kind, data_dir, data_dir / kind.base_folder, "its official python version", download)
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]
    return Images(name, len(parts[0].classes), parts[0].classes, *splits)


def _mnist(name: str, kind: type[torchvision_datasets.MNIST], data_dir: Path, *, download: bool, **options) -> Images:
    folder = data_dir / kind.__name__ / "raw"
    parts = _of_torchvision(name, kind, data_dir, folder, "its four files in the IDX format", download)
    for part in parts:
        shape, labels = tuple(part.data.shape), part.targets
        if len(shape) != 3 or not 0 < shape[0] == len(labels) or shape[1] != shape[2] or labels.max() >= 10:
            raise InputError(
                f"{name} in {folder} has images of the shape {shape} and {len(labels)} labels",
                "expected square images (N, 28, 28) and N labels from 0 to 9: delete the folder, so that it is "
                "downloaded again",
            )
    return Images(name, 10, kind.classes, *(Split(part.data[:, None], part.targets) for part in parts))


for _name, _load, _kind in (
    ("cifar10", _cifar, torchvision_datasets.CIFAR10),
    ("cifar100", _cifar, torchvision_datasets.CIFAR100),
    ("mnist", _mnist, torchvision_datasets.MNIST),
    ("fashion_mnist", _mnist, torchvision_datasets.FashionMNIST),
):
    dataset(_name)(partial(_load, _name, _kind))


@dataset("utkface")
def _utkface(data_dir: Path, *, age_grouping: str, image_size: int | None, **options) -> Images:
    options = {name: options[name] for name in ("split_seed", "whole_train", "workers", "progress", "reader")}
    return utkface.load(data_dir, age_grouping, image_size=image_size or 128, **options)


def _of_torchvision(
    name: str, kind: type, data_dir: Path, folder: Path, content: str, download: bool
) -> tuple[torchvision_datasets.VisionDataset, ...]:
    """Return the training and the test set of a data set of torchvision, downloaded if they are missing.

    folder, content  the folder in which torchvision expects the data set, and a name of its files for messages
    """
    try:
        with _socket_timeout(), distributed.local_first():
            return tuple(kind(str(data_dir), train=train, download=download) for train in (True, False))
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, LookupError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "damaged files")  # an AssertionError has no message
        problem = "could not be downloaded" if download else "is downloaded with --download only"
        raise InputError(
            f"{name} is not complete in {folder} and {problem} ({reason})",
            f"put {content} there",
            "name the folder that holds it with --data-dir",
        ) from None


@contextlib.contextmanager
def _socket_timeout(seconds: float = 30) -> Iterator[None]:
    """Set the default timeout of connections inside the block, so that a download without a network fails soon."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _image_folder(name: str, folder: Path, size: int | None, *, reader: ImageReader, **reading) -> Images:
    if not (folder / "train").is_dir():
        raise InputError(
            f"there is no data set {name!r}: expected {', '.join(LOADERS)}, hf:NAME, or the name of a folder with the "
            f"subfolders train and val, but {folder / 'train'} does not exist",
            "name the folder above it with --data-dir",
        )
    held_out = next((folder / part for part in ("val", "test") if (folder / part).is_dir()), None)
    if held_out is None:
        raise InputError(
            f"{folder} has no subfolder val or test, which holds the test images",
            "put them into one, with a folder per class",
        )
    train, test = _read_image_folder(folder / "train"), _read_image_folder(held_out)
    classes = WNIDS.read_text().split() if name == "imagenet" else train.classes
    for part in (train, test):
        known = set(map(normal_form, classes))
        unknown = sorted(label for label in part.classes if normal_form(label) not in known)
        if unknown:
            expected = "an ImageNet-1k class, n01440764 …" if name == "imagenet" else f"a class of {train.root}"
            raise InputError(
                f"{part.root} has a class {unknown[0]!r}", f"expected {expected}: rename or remove its folder"
            )
    files = [[file for file, _ in part.samples] for part in (train, test)]
    side = reader.common_side([*files[0], *files[1]]) if name != "imagenet" else None
    stays = side is not None and (side == size or (size is None and side <= DEFAULT_SIZE))
    size = side if stays else size or DEFAULT_SIZE
    splits = [
        Split(FolderImages(some, size, size if stays else None, reader=reader, **reading), class_labels(part, classes))
        for some, part in zip(files, (train, test), strict=True)
    ]
    notes = [
        f"{part.root}: {note}" for part in (train, test) for note in _notes(part, reader, splits[0].images.short_side)
    ]
    settings = ({} if stays else {"image_size": size}) | reader.settings
    return Images(name, len(classes), classes, *splits, settings=settings, notes=tuple(notes))


def _read_image_folder(folder: Path) -> torchvision_datasets.ImageFolder:
    try:
        part = torchvision_datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"{folder} does not hold images in a subfolder per class: {first_line(error)}") from None
    first: dict[str, str] = {}
    for name in part.classes:
        require_utf8_name(folder / name)
        if first.setdefault(normal_form(name), name) != name:
            raise InputError(
                f"{folder} has two subfolders {normal_form(name)!r} whose names differ only in their Unicode normal "
                f"form",
                "move their images into one subfolder",
            )
    return part


def _notes(part: torchvision_datasets.ImageFolder, reader: ImageReader, short_side: int) -> list[str]:
    """Return sentences about images that other software may read differently, and images that are not read."""
    notes = reader.examine([file for file, _ in part.samples], short_side)
    other = [
        file
        for label in part.classes
        for file in sorted(Path(part.root, label).iterdir())
        if file.suffix.lower() in OTHER_SUFFIXES
    ]
    if other:
        notes.append(
            f"{len(other)} images such as {other[0].name} are left out, as torchvision's ImageFolder does not read "
            f"{other[0].suffix} files; convert them to use them"
        )
    return notes
