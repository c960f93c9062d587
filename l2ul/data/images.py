"""Data sets as pixels in [0,1]: small ones as uint8 tensors that live on the device, image folders as streams."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from l2ul.common import distributed
from l2ul.common.files import tensors_sha256
from l2ul.data.folder import FolderImages
from l2ul.data.storage import DiskImages

LARGE = 64  # pixels a side; larger images are taken fewer at once


@dataclass(frozen=True)
class Split:
    """Images and their labels: uint8 pixels (N, 3, H, W), as a tensor or as FolderImages; int64 labels (N,)."""

    images: Tensor | FolderImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """Pixels of a side of the images, which are square."""
        return self.images.size if isinstance(self.images, FolderImages) else self.images.shape[-1]

    def pixels(self) -> Tensor:
        """All images as one tensor: for sets that are small, such as D_f."""
        return self.images[torch.arange(len(self))]

    def sha256(self) -> str:
        """Hex hash of the images: of their pixels, or of their files' names, sizes and times."""
        if isinstance(self.images, FolderImages):
            return self.images.sha256()
        return tensors_sha256({"images": self.images})

    def subset(self, indices: Tensor) -> "Split":
        """The images at `indices`, in that order."""
        if isinstance(self.images, FolderImages):
            return Split(self.images.subset(indices), self.labels[indices])
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Split":
        """Tensors moved to the device; images on disk stay there."""
        images = self.images if isinstance(self.images, FolderImages) else self.images.to(device)
        return Split(images, self.labels.to(device))


@dataclass(frozen=True)
class Images:
    """A data set: its name, how many classes, what they are called, and its splits.

    validation    held out of training, where the data set has such a part
    settings       what else was chosen about it, under its flags' names: kept in every record
    train_sha256  of the training images' names, where the split is made here
    notes         sentences about it that a user should see
    short_side    of the images before their centre was cut out, where they are no longer on disk; None: nothing was cut
    """

    name: str
    num_classes: int
    classes: list[str]
    train: Split
    test: Split
    validation: Split | None = None
    settings: dict[str, object] = field(default_factory=dict)
    train_sha256: str | None = None
    notes: tuple[str, ...] = ()
    short_side: int | None = None

    @property
    def side(self) -> int:
        """Pixels of a side of the images that classifiers are measured on."""
        return self.test.side

    def to(self, device: torch.device) -> "Images":
        """The splits moved to the device, where they are tensors."""
        validation = self.validation.to(device) if self.validation else None
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)


def as_pixels(images: Tensor) -> Tensor:
    """Float pixels in [0,1] from uint8 ones; float ones keep their values, halves become float32.

    Channels last, which convolutions are fastest with.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    pixels = pixels.float() if pixels.dtype == torch.float16 else pixels
    return pixels.contiguous(memory_format=torch.channels_last)


def default_batch_size(sizes: dict[str, tuple[int, int]], device: torch.device, side: int) -> int:
    """How many images at once where nobody says, from the (usual, for large images) sizes for each kind of device."""
    return sizes[device.type][side > LARGE]


def batches(
    images: Tensor | FolderImages | DiskImages,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    shared: bool = False,
) -> Iterator[Tensor]:
    """All images in order, as float batches (n, 3, H, W) in [0,1] on the device.

    `shared` under torchrun: each process gets some of the batches, which are the same for any number of processes.
    """
    every = torch.arange(len(images)).split(batch_size)
    part = distributed.shard(len(every)) if shared else slice(None)
    if isinstance(images, Tensor):
        source = images.split(batch_size)[part]
    elif isinstance(images, DiskImages):
        source = (images[indices] for indices in every[part])
    else:
        source = images.loader(every[part], device, workers)
    for batch in source:
        yield as_pixels(batch.to(device, non_blocking=device.type == "cuda"))
