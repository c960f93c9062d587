"""Images with labels: a split, a data set of several splits, and batches of float pixels in [0,1]."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from l2ul.common import distributed
from l2ul.common.files import tensors_sha256
from l2ul.data.folder import FolderImages
from l2ul.data.image_files import ImageReader

LARGE = 64  # pixels; images with a longer side have smaller default batches
MAX_FLOATS = 2**26  # values; more than these stay uint8 in memory, see `pixels_of`


@dataclass(frozen=True)
class StoredImages:
    """Images (n, C, H, W) that take a quarter of the memory: uint8, converted to float pixels where they are used.

    Indexing with anything but a whole number, and `split`, give tensors of float pixels in [0,1].
    """

    stored: Tensor

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        if isinstance(indices, Tensor) and indices.ndim > 1:
            return self[indices.flatten()].unflatten(0, indices.shape)
        return as_pixels(self.stored[indices])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, in batches."""
        return map(as_pixels, self.stored.split(size))

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        return self.stored.device


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    images  (N, C, H, W): a tensor, uint8 or float in [0,1], or FolderImages; C is 3, or 1 for grey images
    labels  (N,) int64
    """

    images: Tensor | FolderImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def on_disk(self) -> bool:
        """Whether the images are FolderImages, which are decoded when they are needed."""
        return isinstance(self.images, FolderImages)

    @property
    def side(self) -> int:
        """The height and width of the images, in pixels."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """The channels of the images."""
        return self.images.shape[1]

    def with_channels(self, channels: int) -> "Split":
        """Return the split with its images converted from colour to grey (1) or grey to colour (3)."""
        if self.channels == channels:
            return self
        if self.on_disk:
            return Split(self.images.with_channels(channels), self.labels)
        if (self.channels, channels) == (3, 1):
            return Split(torch.cat([to_grey(part) for part in self.images.split(4096)]), self.labels)
        if (self.channels, channels) == (1, 3):
            return Split(self.images.expand(-1, 3, -1, -1).contiguous(), self.labels)
        return self

    def pixels(self) -> Tensor:
        """Return all images as one tensor. Meant for small sets such as D_f."""
        return self.images[torch.arange(len(self))]

    def sha256(self) -> str:
        """Return a hash of the images: of their pixels, or of the names, sizes and times of their files."""
        return self.images.sha256() if self.on_disk else tensors_sha256({"images": self.images})

    def subset(self, indices: Tensor) -> "Split":
        """Return the images at `indices`, in that order."""
        images = self.images.subset(indices) if self.on_disk else self.images[indices]
        return Split(images, self.labels[indices])

    def to(self, device: torch.device) -> "Split":
        """Return the split with its tensors on the device. FolderImages stay on disk."""
        return Split(self.images if self.on_disk else self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Images:
    """A data set.

    classes       names of the classes
    validation    held out of training, in data sets that have such a split
    settings      the options that decide the data set, by flag name: part of every record
    train_sha256  hash of the names of the training images, for data sets whose split is made by this project
    notes         sentences about the data set that a user should see
    short_side    side to which images were resized before the centre crop, if they are no longer on disk; None if they
                  were not cropped
    digests       hashes of parts of it that were computed, see `Evaluator.data_sha256`
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
    digests: dict[tuple[str, int], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def side(self) -> int:
        """The height and width of the test images, in pixels."""
        return self.test.side

    @property
    def channels(self) -> int:
        """The channels of the images."""
        return self.train.channels

    def from_files(self, files: list[str], reader: ImageReader | None = None) -> FolderImages:
        """Return image files as images with the size and channels of the data set, resized and cropped like it."""
        short_side = self.train.images.short_side if self.train.on_disk else self.short_side or self.side
        return FolderImages(files, self.side, short_side, reader=reader).with_channels(self.channels)

    @property
    def refused(self) -> set[str]:
        """The files that `--decoder gpu` left to the CPU so far, because nvJPEG cannot decode them."""
        splits = (self.train, self.validation, self.test)
        return set().union(*(split.images.refused for split in splits if split and split.on_disk))

    def decoding_notes(self) -> list[str]:
        """Return a sentence about the files in `refused`, if there are any."""
        if not self.refused:
            return []
        return [f"nvJPEG cannot decode {len(self.refused)} files such as {min(self.refused)}; the CPU decoded them"]

    def with_channels(self, channels: int) -> "Images":
        """Return the data set with its images converted from colour to grey (1) or grey to colour (3)."""
        validation = self.validation.with_channels(channels) if self.validation else None
        train, test = self.train.with_channels(channels), self.test.with_channels(channels)
        return replace(self, train=train, test=test, validation=validation)

    def to(self, device: torch.device) -> "Images":
        """Return the data set with its tensors on the device."""
        validation = self.validation.to(device) if self.validation else None
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)


def to_grey(images: Tensor) -> Tensor:
    """Convert colour images (N, 3, H, W) to grey images (N, 1, H, W); uint8 as Pillow's mode L does."""
    weights = (19595, 38470, 7471)  # ITU-R 601-2 luma, of 65536
    if images.dtype != torch.uint8:
        return sum(weight / 65536 * images[:, i : i + 1] for i, weight in enumerate(weights))
    total = sum(weight * images[:, i : i + 1].int() for i, weight in enumerate(weights))
    return ((total + 32768) >> 16).to(torch.uint8)


def as_pixels(images: Tensor) -> Tensor:
    """Convert images to float32 pixels in [0,1], in channels-last memory format.

    uint8 images are divided by 255; float images keep their values.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32, memory_format=torch.channels_last).div_(255)  # one copy, not three
    pixels = images.float() if images.dtype == torch.float16 else images
    return pixels.contiguous(memory_format=torch.channels_last)


def input_side(model: nn.Module, side: int) -> int:
    """Return the side of a network's input for images of (side, side) pixels.

    It is what the method `input_side` of the model or of a module in it returns, such as that of `models.Classifier`,
    which may resize images; for other models it is `side`.
    """
    return next((module.input_side(side) for module in model.modules() if hasattr(module, "input_side")), side)


def pixels_of(images: Tensor | StoredImages) -> Tensor | StoredImages:
    """Return images as float pixels in [0,1]: a tensor, or StoredImages for uint8 images of more than MAX_FLOATS."""
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.numel() <= MAX_FLOATS):
        return as_pixels(images)
    return images if isinstance(images, StoredImages) else StoredImages(images)


def stored(images: Tensor | StoredImages) -> Tensor:
    """Return the tensor of images: uint8 or float."""
    return images.stored if isinstance(images, StoredImages) else images


def batches(
    images: Tensor | StoredImages | FolderImages,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    shared: bool = False,
) -> Iterator[Tensor]:
    """Yield all images in order, as batches (n, 3, H, W) of float pixels in [0,1] on the device.

    workers  processes that decode FolderImages
    shared   under torchrun, yield only this process's share of the batches; the batches themselves are the same for any
             number of processes
    """
    indices = torch.arange(len(images)).split(batch_size)
    share = distributed.shard(len(indices)) if shared else slice(None)
    if isinstance(images, Tensor | StoredImages):
        source = stored(images).split(batch_size)[share]
    else:
        source = images.loader(indices[share], device, workers)
    for batch in source:
        yield as_pixels(batch.to(device, non_blocking=device.type == "cuda"))
