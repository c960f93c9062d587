"""Data sets as pixels in [0,1]: small ones as uint8 tensors that live on the device, image folders as streams."""

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, replace
import hashlib
from pathlib import Path
import socket

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2

from l2ul import seeds
from l2ul.errors import InputError

SMALL = ("digits", "cifar10", "cifar100")  # held whole in memory; every other name is a folder of images


class FolderImages(Dataset):
    """Images that stay on disk, decoded when asked for: `images[indices]` is uint8 (n, 3, size, size).

    Short side resized to 8/7 of `size` (256 for 224), then the centre cut out, as ImageNet classifiers are tested.
    """

    def __init__(self, files: list[str], size: int):
        self.files, self.size = files, size
        self.read = v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor) and index.ndim:
            return torch.stack([self[i] for i in index.tolist()])
        try:
            return self.read(datasets.folder.pil_loader(self.files[index]))
        except OSError as error:
            raise InputError(f"cannot read the image {self.files[index]} ({error}); mend or remove it") from None


@dataclass(frozen=True)
class Split:
    """Images and their labels: uint8 pixels (N, 3, H, W), as a tensor or as FolderImages; int64 labels (N,)."""

    images: Tensor | FolderImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        """All images as one tensor: for sets that are small, such as D_f."""
        return self.images[torch.arange(len(self))]

    def subset(self, indices: Tensor) -> "Split":
        """The images at `indices`, in that order."""
        if isinstance(self.images, FolderImages):
            files = [self.images.files[i] for i in indices.tolist()]
            return Split(FolderImages(files, self.images.size), self.labels[indices])
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Split":
        """Tensors moved to the device; images on disk stay there."""
        images = self.images if isinstance(self.images, FolderImages) else self.images.to(device)
        return Split(images, self.labels.to(device))


@dataclass(frozen=True)
class Images:
    """A data set: its name, how many classes, what they are called, and the two splits."""

    name: str
    num_classes: int
    classes: list[str]
    train: Split
    test: Split

    def to(self, device: torch.device) -> "Images":
        """Both splits moved to the device, where they are tensors."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def as_pixels(images: Tensor) -> Tensor:
    """Float pixels in [0,1] from uint8 ones; float ones keep their values. Channels last: convolutions' fastest."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return pixels.contiguous(memory_format=torch.channels_last)


def batches(images: Tensor | FolderImages, batch_size: int, device: torch.device, workers: int = 0) -> Iterator[Tensor]:
    """All images in order, as float batches (n, 3, H, W) in [0,1] on the device."""
    if isinstance(images, Tensor):
        source = images.split(batch_size)
    else:
        source = DataLoader(images, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    for batch in source:
        yield as_pixels(batch.to(device, non_blocking=device.type == "cuda"))


def load(name: str, data_dir: Path, *, image_size: int = 224, download: bool = True) -> Images:
    """The data set called `name`: `digits`, `cifar10`, `cifar100`, or a folder of images below `data_dir`.

    A folder `<data_dir>/<name>` must hold `train` and `val` (or `test`), each with one folder a class; its images are
    cut to (image_size, image_size). Raises InputError where there is no such data set or it cannot be had.
    """
    if name == "digits":
        return _digits()
    if name in SMALL:
        return _cifar(name, Path(data_dir), download)
    return _image_folder(name, Path(data_dir) / name, image_size)


def _digits() -> Images:
    """scikit-learn's 1,797 handwritten digits (8 × 8, 17 grey levels), enlarged to 32 × 32 RGB; every fifth tests."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8)
    large = F.interpolate(grey, scale_factor=4, mode="bilinear").round().to(torch.uint8)
    images, labels = large.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    train = Split(images[~test], labels[~test])
    return Images("digits", 10, [str(d) for d in range(10)], train, Split(images[test], labels[test]))


def _cifar(name: str, data_dir: Path, download: bool) -> Images:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = data_dir / kind.base_folder
    try:
        with _short_patience():
            parts = [kind(str(data_dir), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{name} is not complete in {folder} and could not be downloaded ({str(error).splitlines()[0]}); "
            f"put the official python version of it there, or name its folder with --data-dir"
        ) from None
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return Images(name, len(parts[0].classes), parts[0].classes, train, test)


@contextlib.contextmanager
def _short_patience(seconds: float = 30) -> Iterator[None]:
    """A machine without a network should say so soon: connections in the block time out."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _image_folder(name: str, folder: Path, size: int) -> Images:
    if not (folder / "train").is_dir():
        raise InputError(
            f"there is no data set {name!r}: expected {', '.join(SMALL)}, or the name of a folder of images with "
            f"train and val in it, and there is no {folder / 'train'}"
        )
    held_out = next((folder / part for part in ("val", "test") if (folder / part).is_dir()), folder / "val")
    found = {}
    for part in (folder / "train", held_out):
        try:
            found[part] = datasets.ImageFolder(str(part))
        except FileNotFoundError as error:
            raise InputError(f"{part} holds no images in a folder a class: {str(error).splitlines()[0]}") from None
    train, test = found.values()
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise InputError(f"{held_out} has a class that {folder / 'train'} lacks: {unknown[0]!r}; name its folder alike")
    splits = [
        Split(FolderImages([file for file, _ in part.samples], size), _labels(part, train.class_to_idx))
        for part in (train, test)
    ]
    return Images(name, len(train.classes), train.classes, *splits)


def _labels(part: datasets.ImageFolder, class_to_idx: dict[str, int]) -> Tensor:
    return torch.tensor([class_to_idx[part.classes[target]] for target in part.targets])


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


def forget_sha256(forget: Split, indices: Tensor, new_labels: Tensor | None) -> str:
    """Hex sha256 of what is to be forgotten: indices, labels, new labels where there are any, and pixels."""
    digest = hashlib.sha256()
    for tensor in (indices, forget.labels, new_labels, forget.pixels()):
        digest.update(b"none" if tensor is None else np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()
