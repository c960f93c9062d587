"""D_f: which images are to be forgotten, what they are called and what they shall be called instead."""

from dataclasses import dataclass
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from l2ul.common import seeds
from l2ul.common.errors import InputError
from l2ul.data.folder import FolderImages
from l2ul.data.images import Images, Split


@dataclass(frozen=True, eq=False)
class ForgetSet:
    """D_f in the order it was chosen.

    source      the images it is taken from, with the labels to get away from
    positions   (k,) of D_f in the source, int64
    new_labels  (k,) what the images are to be called instead, to relabel
    in_train    whether the source is the training set, so that D_r are its other images
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
        """The images and the labels to get away from. What is unlearned and what is measured are the same pixels."""
        found = self.source.subset(self.positions)
        if isinstance(found.images, FolderImages):
            found.images.decoder = "cpu"
        return found

    @property
    def indices(self) -> Tensor:
        """Indices (k,) in the training set; none (0,) where the images come from elsewhere."""
        return self.positions if self.in_train else self.positions[:0]

    @property
    def names(self) -> list[str]:
        """What tells the images: their indices in the training set, or folder and file."""
        if self.in_train:
            return [str(index) for index in self.positions.tolist()]
        return ["/".join(Path(self.source.images.files[i]).parts[-2:]) for i in self.positions.tolist()]

    def sha256(self) -> str:
        """Hex hash of what is to be forgotten: indices, labels, new labels where there are any, and pixels."""
        split = self.split
        indices = self.positions if self.in_train else None
        digest = hashlib.sha256()
        for tensor in (indices, split.labels, self.new_labels, split.pixels()):
            digest.update(b"none" if tensor is None else np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()


def choose_forget(num_images: int, k: int, seed: int) -> Tensor:
    """Indices of D_f: the first k of a permutation of the training set under the seed, so nested in k."""
    if not 1 <= k < num_images:
        raise InputError(
            f"k is {k}; expected 1 to {num_images - 1}: some of the {num_images} training images must remain"
        )
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))[:k]


def read_integers(path: Path, what: str) -> Tensor:
    """A text file of one whole number a line (blank lines are passed over) as an int64 tensor."""
    try:
        lines = Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"cannot read the {what} file {path}: {reason}") from None
    numbers = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                numbers.append(int(np.int64(int(line))))
            except (ValueError, OverflowError):
                raise InputError(
                    f"line {number} of the {what} file {path} is {line!r}; expected a whole number"
                ) from None
    if not numbers:
        raise InputError(f"the {what} file {path} is empty; expected one whole number a line")
    return torch.tensor(numbers)


def read_forget(path: Path, num_images: int) -> Tensor:
    """Indices of D_f from a text file: each in range, none twice."""
    indices = read_integers(path, "forget")
    outside = indices[(indices < 0) | (indices >= num_images)]
    if len(outside):
        raise InputError(f"{path} has index {outside[0]}; expected 0 to {num_images - 1}, the training images")
    values, counts = indices.unique(return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{path} has index {values[counts > 1][0]} more than once; list each image once")
    if len(indices) == num_images:
        raise InputError(f"{path} lists all {num_images} training images; leave some that remain")
    return indices


def read_new_labels(path: Path, labels: Tensor, num_classes: int) -> Tensor:
    """New labels (k,) of D_f from a text file: one for each image, a class, and not the true one in `labels`."""
    new = read_integers(path, "relabel")
    if len(new) != len(labels):
        raise InputError(
            f"{path} has {len(new)} labels, but {len(labels)} images are to be forgotten; give one for each"
        )
    outside = new[(new < 0) | (new >= num_classes)]
    if len(outside):
        raise InputError(f"{path} has label {outside[0]}; expected 0 to {num_classes - 1}, the classes")
    same = (new == labels).nonzero().flatten()
    if len(same):
        raise InputError(f"label {same[0] + 1} of {path} is the image's true label {new[same[0]]}; give another class")
    return new


def random_new_labels(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """New labels (k,), each uniform over the classes other than the true one, by (seed, position) alone."""
    draws = [seeds.stream(seed, "relabel", position).integers(num_classes - 1) for position in range(len(labels))]
    return other_class(labels, torch.tensor(draws))


def other_class(labels: Tensor, draws: Tensor) -> Tensor:
    """Draws (n,) from 0 … C - 2 as classes other than the true labels (n,): the true one is skipped."""
    return draws + (draws >= labels)


def read_folder(folder: Path, images: Images) -> Split:
    """Images to forget from a folder that holds a folder a class, called and sized as those of the data set `images`.

    Raises InputError where a folder's name is not one of the classes, or an image is one of the data set's own.
    """
    try:
        found = datasets.ImageFolder(str(folder))
    except OSError as error:
        raise InputError(
            f"--forget-dir {folder} holds no images in a folder a class ({str(error).splitlines()[0]})"
        ) from None
    unknown = [name for name in found.classes if name not in images.classes]
    if unknown:
        raise InputError(
            f"--forget-dir {folder} has a folder {unknown[0]!r}, which is no class of the data set; "
            f"expected names such as {', '.join(map(repr, images.classes[:3]))}"
        )
    files, on_disk = [file for file, _ in found.samples], images.train.images
    short_side = on_disk.short_side if isinstance(on_disk, FolderImages) else images.short_side or images.side
    read = FolderImages(files, images.side, short_side)
    _refuse_own(read, images)
    return Split(read, torch.tensor([images.classes.index(found.classes[target]) for target in found.targets]))


def _refuse_own(read: FolderImages, images: Images) -> None:
    """Raise InputError where one of these images is in D_r or D_test too: it cannot be kept and be forgotten."""
    for what, split in (("training", images.train), ("test", images.test)):
        if isinstance(split.images, FolderImages):
            own = {Path(file).resolve() for file in split.images.files}
            same = [file for file in read.files if Path(file).resolve() in own]
        else:
            own = {image.tobytes() for image in split.images.cpu().numpy()}
            same = [file for i, file in enumerate(read.files) if read[i].numpy().tobytes() in own]
        if same:
            raise InputError(
                f"{same[0]} is a {what} image of the data set; name training images by --forget-file, and leave out "
                f"test images"
            )


def from_folder(found: Split, called: Tensor, goal: str, seed: int, folder: Path) -> ForgetSet:
    """D_f from the images of a folder, in an order by the seed; `called` (n,) is what the classifier calls them.

    To misclassify: all of them, to get away from their folder's class. To relabel: those that are called otherwise, to
    be called their folder's class. Raises InputError where none is left.
    """
    order = torch.randperm(len(found), generator=seeds.generator(seed, "forget folder"))
    if goal == "misclassify":
        return ForgetSet(found, order, in_train=False)
    order = order[(called != found.labels)[order]]
    if not len(order):
        raise InputError(f"the classifier gets every image of {folder} right already: there is nothing to correct")
    return ForgetSet(Split(found.images, called), order, found.labels[order], in_train=False)
