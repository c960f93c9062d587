"""The forget set D_f: choose its images, read them from files or a folder, and give them new labels."""

from collections import defaultdict
from collections.abc import Callable, Sequence
import contextlib
from dataclasses import dataclass
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from l2ul.common import seeds
from l2ul.common.errors import InputError, first_line
from l2ul.common.text import normal_form, read_text
from l2ul.data import image_files
from l2ul.data.folder import FolderImages, class_labels
from l2ul.data.image_files import OTHER_SUFFIXES, EmbeddedFile, ImageFile, ImageReader, UnreadableImage
from l2ul.data.images import Images, Split


@dataclass(frozen=True, eq=False)
class ForgetSet:
    """The forget set D_f, in the order in which it was chosen.

    source      the images that D_f is a part of, with the labels to forget
    positions   (k,) int64, indices of D_f in the source
    new_labels  (k,) int64, labels to learn instead, for the goal "relabel"
    in_train    whether the source is the training set; D_r is then the rest of it
    """

    source: Split
    positions: Tensor
    new_labels: Tensor | None = None
    in_train: bool = True

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, part: slice) -> "ForgetSet":
        new = self.new_labels[part] if self.new_labels is not None else None
        return ForgetSet(self.source, self.positions[part], new, self.in_train)

    @property
    def split(self) -> Split:
        """The images of D_f and the labels to forget.

        Images on disk are decoded on the CPU, so that unlearning and evaluation use the same pixels.
        """
        split = self.source.subset(self.positions)
        return Split(split.images.with_decoder("cpu"), split.labels) if split.on_disk else split

    @property
    def indices(self) -> Tensor:
        """Indices (k,) of D_f in the training set; empty if D_f is not part of it."""
        return self.positions if self.in_train else self.positions[:0]

    @property
    def names(self) -> list[str]:
        """Names of the images: their indices in the training set, or folder and file."""
        if self.in_train:
            return [str(index) for index in self.positions.tolist()]
        return ["/".join(Path(self.source.images.files[i]).parts[-2:]) for i in self.positions.tolist()]

    def sha256(self) -> str:
        """Return a hash of D_f: indices in the training set, labels, new labels and pixels."""
        split = self.split
        indices = self.positions if self.in_train else None
        digest = hashlib.sha256()
        for tensor in (indices, split.labels, self.new_labels, split.pixels()):
            digest.update(b"none" if tensor is None else np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()


def choose_forget(num_images: int, k: int, seed: int) -> Tensor:
    """Return the indices of a random D_f: the first k of a permutation that depends on the seed.

    D_f for a smaller k is a part of D_f for a larger k.
    """
    if not 1 <= k < num_images:
        raise InputError(
            f"k is {k}", f"expected 1 to {num_images - 1}, as some of the {num_images} training images must remain"
        )
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))[:k]


def complement(indices: Tensor, num_images: int) -> Tensor:
    """Return the indices of D_r in ascending order: those of 0 … num_images - 1 that are not in D_f's `indices`."""
    kept = torch.ones(num_images, dtype=torch.bool)
    kept[indices.cpu()] = False
    return kept.nonzero().flatten()


def read_integers(path: Path, what: str, read: Callable[[str], int] = int, expected: str = "a whole number") -> Tensor:
    """Read a text file with one whole number per line into an int64 tensor. Blank lines are ignored.

    read      returns the number of a line, or raises ValueError
    expected  what a line should be, for the error message
    """
    numbers = []
    for number, line in read_lines(path, what, expected).items():
        try:
            numbers.append(int(np.int64(read(line))))
        except InputError:  # a ValueError too, with a sentence of its own
            raise
        except (ValueError, OverflowError):
            raise InputError(f"line {number} of the {what} file {path} is {line!r}", f"expected {expected}") from None
    return torch.tensor(numbers)


def read_lines(path: Path, what: str, expected: str) -> dict[int, str]:
    """Read the lines of a text file that are not blank, by their numbers from 1.

    expected  what a line should be, for the error message

    Raises InputError if the file cannot be read, or all lines are blank.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"cannot read the {what} file {path}: {reason}") from None
    filled = {number: line for number, line in enumerate(lines, start=1) if line.strip()}
    if not filled:
        raise InputError(f"the {what} file {path} is empty", f"expected {expected} per line")
    return filled


def check_forget_file(path: Path) -> None:
    """Raise InputError if a file of D_f cannot be read. Whether its lines are images is known with the data set."""
    read_lines(path, "forget", "an index or a training image")


def read_forget(path: Path, num_images: int, files: Sequence[str] = ()) -> Tensor:
    """Read the indices of D_f from a text file.

    files  of the training images, for a data set that is a folder: a line can then be the last parts of a path, such
           as `cat/7.png`, in place of an index

    Raise InputError for an index that is out of range or repeated, and for a name that fits no image or several.
    """
    if files:
        example = "/".join(Path(files[0]).parts[-2:])
        indices = read_integers(
            path, "forget", _index_by_name(files), f"an index or a training image, such as {example}"
        )
    else:
        indices = read_integers(path, "forget")
    outside = indices[(indices < 0) | (indices >= num_images)]
    if len(outside):
        raise InputError(
            f"{path} has index {outside[0]}", f"expected 0 to {num_images - 1}, the indices of the training images"
        )
    values, counts = indices.unique(return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path} has index {values[counts > 1][0]} more than once", "list each image once")
    if len(indices) == num_images:
        raise InputError(f"{path} lists all {num_images} training images", "leave out some, which remain")
    return indices


def files_of(split: Split) -> Sequence[str]:
    """Return the files of the images, if each image is a file of its own."""
    files = split.images.files if split.on_disk else []
    return [] if files and isinstance(files[0], EmbeddedFile) else files


def _index_by_name(files: Sequence[str]) -> Callable[[str], int]:
    """Return a function that reads an index, or the last parts of the path of one of the files."""
    positions = defaultdict(list)
    for position, file in enumerate(files):
        positions[normal_form(Path(file).name)].append(position)

    def read(text: str) -> int:
        parts = Path(normal_form(text.strip())).parts
        fitting = [
            place
            for place in positions.get(parts[-1] if parts else "", ())
            if Path(normal_form(files[place])).parts[-len(parts) :] == parts
        ]
        if len(fitting) > 1:
            raise InputError(
                f"{text.strip()!r} fits several training images, such as {files[fitting[0]]} and {files[fitting[1]]}",
                "give more of the path",
            )
        return fitting[0] if fitting else int(text)

    return read


def read_new_labels(path: Path, labels: Tensor, num_classes: int) -> Tensor:
    """Read the new labels (k,) of D_f from a text file.

    Raise InputError unless there is one label per image, each a class other than the true one in `labels`.
    """
    new = read_integers(path, "relabel")
    if len(new) != len(labels):
        raise InputError(f"{path} has {len(new)} labels, but D_f has {len(labels)} images", "give one label per image")
    outside = new[(new < 0) | (new >= num_classes)]
    if len(outside):
        raise InputError(f"{path} has label {outside[0]}", f"expected a class, 0 to {num_classes - 1}")
    same = (new == labels).nonzero().flatten()
    if len(same):
        raise InputError(
            f"label {same[0] + 1} of {path} is the image's true label {new[same[0]]}", "give another class"
        )
    return new


def random_new_labels(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Draw new labels (k,), uniformly from the classes other than the true one.

    Each depends only on (seed, position).
    """
    draws = [seeds.stream(seed, "relabel", position).integers(num_classes - 1) for position in range(len(labels))]
    return other_class(labels, torch.tensor(draws))


def other_class(labels: Tensor, draws: Tensor) -> Tensor:
    """Map draws (n,) from 0 … C - 2 to classes other than the true labels (n,), by skipping the true one."""
    return draws + (draws >= labels)


def open_folder(folder: Path) -> ImageFolder:
    """Return the list of images of a folder that has a subfolder per class. Raises InputError if it has none."""
    try:
        return ImageFolder(str(folder), is_valid_file=is_image_name)
    except OSError as error:
        raise InputError(
            f"--forget-dir {folder} does not hold images in a subfolder per class ({first_line(error)})"
        ) from None


def read_folder(folder: Path, images: Images, reader: ImageReader | None = None) -> Split:
    """Return the images of a folder that has a subfolder per class, resized and cropped like those of the data set.

    images  the data set, whose classes are the allowed names of the subfolders
    reader  decodes the files; it should be the one that decodes the data set

    Raises InputError if a subfolder is not a class, or an image is also in the training or test set.
    """
    image_folder = open_folder(folder)
    known = set(map(normal_form, images.classes))
    unknown = [name for name in image_folder.classes if normal_form(name) not in known]
    if unknown:
        raise InputError(
            f"--forget-dir {folder} has a subfolder {unknown[0]!r}, which is no class of the data set",
            f"expected names such as {', '.join(map(repr, images.classes[:3]))}",
        )
    folder_images = images.from_files([file for file, _ in image_folder.samples], reader)
    reject_own(folder_images, images, "choose training images with --forget-file, and leave out test images")
    return Split(folder_images, class_labels(image_folder, images.classes))


def is_image_name(file: str) -> bool:
    """Return whether the suffix of a file is that of an image."""
    return Path(file).suffix.lower() in (*IMG_EXTENSIONS, *OTHER_SUFFIXES)


def reject_own(folder_images: FolderImages, images: Images, advice: str) -> None:
    """Raise InputError if an image is also in the training or test set, which are D_r and D_test.

    Images are compared by their pixels, or by their files if those of the data set are files on disk.
    """
    given = _files_by_hash(folder_images.files)
    sizes = set(map(image_files.size, given.values()))
    for what, split in (("training", images.train), ("test", images.test)):
        if split.on_disk:
            own = _files_by_hash(split.images.files, sizes)
            same = [file for digest, file in given.items() if digest in own]
        else:
            own = {image.tobytes() for image in split.images.cpu().numpy()}
            same = [file for i, file in enumerate(folder_images.files) if folder_images[i].numpy().tobytes() in own]
        if same:
            raise InputError(f"{same[0]} is a {what} image of the data set", advice)


def _files_by_hash(files: Sequence[ImageFile], sizes: set[int] | None = None) -> dict[str, ImageFile]:
    """Return files, of some sizes in bytes if these are given, by the SHA-256 of their content."""
    found: dict[str, ImageFile] = {}
    for file in files:
        with contextlib.suppress(UnreadableImage):  # which the reader of images reports
            if sizes is None or image_files.size(file) in sizes:
                found.setdefault(hashlib.sha256(image_files.read_bytes(file)).hexdigest(), file)
    return found


def from_folder(images: Split, predictions: Tensor, goal: str, seed: int, folder: Path) -> ForgetSet:
    """Return D_f from the images of a folder, in an order that depends on the seed.

    images       the result of `read_folder`
    predictions  (n,) the classes that the model predicts for them

    With the goal "misclassify", D_f has all images, and the labels to forget are the classes of their subfolders. With
    "relabel", D_f has the images that the model misclassifies: the labels to forget are the predictions, the new labels
    are the classes of their subfolders. Raises InputError if there are none.
    """
    order = torch.randperm(len(images), generator=seeds.generator(seed, "forget folder"))
    if goal == "misclassify":
        return ForgetSet(images, order, in_train=False)
    order = order[(predictions != images.labels)[order]]
    if not len(order):
        raise InputError(f"the model classifies every image of {folder} correctly: there is nothing to correct")
    return ForgetSet(Split(images.images, predictions), order, images.labels[order], in_train=False)
