"""Images in a folder on disk, decoded when they are needed: by worker processes, or by the GPU."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import copy
from dataclasses import dataclass
import functools
import hashlib
from io import BytesIO
import itertools
import math
import os
from pathlib import Path
import warnings

from PIL import Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import io
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from l2ul import ProgressBar
from l2ul.common.choices import PREFETCH
from l2ul.common.errors import InputError, first_line
from l2ul.common.image_sizes import TooLarge, check_resize
from l2ul.common.text import normal_form
from l2ul.data.image_files import ImageFile, ImageReader, UnreadableImage, read_bytes, size, unreadable, version
from l2ul.data.storage import DecodedImages

READER_VERSION = 2  # part of the hashes by which caches find predictions; it grows when files give other pixels


def class_labels(folder: ImageFolder, classes: Sequence[str]) -> Tensor:
    """Return the labels (n,) of the images of a folder: the places of the names of their subfolders in `classes`."""
    index = {normal_form(name): number for number, name in enumerate(classes)}
    return torch.tensor([index[normal_form(folder.classes[target])] for target in folder.targets])


def check_decoder(decoder: str, device: torch.device) -> None:
    """Raise InputError if the decoder does not work on the device, which is tried with one JPEG."""
    if decoder != "gpu":
        return
    if device.type != "cuda":
        raise InputError("--decoder gpu needs a CUDA GPU", "leave it out on this device")
    jpeg = BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    try:
        _decode([_as_tensor(jpeg.getvalue())], device)
    except RuntimeError as error:
        why = first_line(error)
        raise InputError(f"--decoder gpu: nvJPEG cannot decode on this GPU ({why})", "leave it out") from None


class FolderImages(Dataset):
    """Images on disk. `images[indices]` decodes some of them to uint8 (n, C, size, size).

    C is `channels`: 3, or 1 after `with_channels(1)`.

    files       paths of the images, or files inside of a larger file
    size        side of the centre crop, in pixels
    short_side  length to which the short side is resized before the crop; None: 8/7 of `size`, as is usual for
                evaluation on ImageNet (256 for 224)
    prefetch    batches that each worker of `loader` decodes ahead
    decoder     `cpu` or `gpu`; with `gpu`, `loader` decodes with torchvision's nvJPEG, whose pixels differ slightly
                from those of the CPU
    reader      decodes files on the CPU

    Images that `loader` has decoded stay in memory on the device if all fit, so that later passes do not decode them
    again. `refused` names the JPEGs that nvJPEG could not decode; the CPU did.

    Raises InputError when a file cannot be decoded.
    """

    def __init__(
        self,
        files: list[ImageFile],
        size: int,
        short_side: int | None = None,
        *,
        prefetch: int = PREFETCH,
        decoder: str = "cpu",
        reader: ImageReader | None = None,
    ):
        self.files, self.size, self.prefetch, self.decoder = files, size, prefetch, decoder
        self.reader = reader or ImageReader()
        self.short_side = short_side or round(size * 8 / 7)
        self.channels = 3
        self.refused: set[str] = set()  # the same object in all copies
        self._decoded = DecodedImages(len(files))
        self.resize = v2.Compose([v2.Resize(self.short_side), v2.CenterCrop(size)])
        self.transform = v2.Compose([self.resize, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> torch.Size:
        """(N, C, size, size), as of a tensor of the images."""
        return torch.Size([len(self), self.channels, self.size, self.size])

    def subset(self, indices: Tensor) -> "FolderImages":
        """Return the images at `indices`, in that order."""
        subset = copy.copy(self)
        subset.files = [self.files[i] for i in indices.tolist()]
        subset._decoded = self._decoded.part(indices)
        return subset

    def with_decoder(self, decoder: str) -> "FolderImages":
        """Return the images, decoded by `cpu` or `gpu`."""
        new = copy.copy(self)
        if decoder != self.decoder:
            new.decoder, new._decoded = decoder, DecodedImages(len(self))
        return new

    def with_channels(self, channels: int) -> "FolderImages":
        """Return the images in colour (3) or in grey (1), converted before they are resized."""
        new = copy.copy(self)
        new.channels, new._decoded = channels, DecodedImages(len(self))
        grey = [v2.Grayscale()] if channels == 1 else []
        new.resize = v2.Compose([*grey, v2.Resize(self.short_side), v2.CenterCrop(self.size)])
        new.transform = v2.Compose([new.resize, v2.PILToTensor()])
        return new

    def in_memory(self, workers: int = 0, progress: ProgressBar | None = None) -> Tensor:
        """Decode all images to uint8 (N, C, size, size).

        workers   processes that decode
        progress  shows how many images are decoded
        """
        pixels = torch.empty(len(self), self.channels, self.size, self.size, dtype=torch.uint8)
        done = 0
        with progress("read images", len(self)) if progress else contextlib.nullcontext() as advance:
            for batch in _batches(self, batch_size=64, num_workers=workers):
                pixels[done : done + len(batch)] = batch
                done += len(batch)
                if advance:
                    advance(len(batch))
        return pixels

    def sha256(self) -> str:
        """Return a hash of the names, sizes and modification times of the files, and of how they are decoded."""
        how = [READER_VERSION, self.decoder, *(f"{name}={value}" for name, value in self.reader.settings.items())]
        digest = hashlib.sha256(" ".join(map(str, [self.size, self.short_side, *how])).encode())
        if self.channels == 1:
            digest.update(b" grey")
        for file in self.files:
            digest.update(f"{file} {version(file)}".encode())
        return digest.hexdigest()

    def listing_sha256(self) -> str:
        """Return a hash of the name, the folder's name and the size of each file, which is the same on every machine.

        The files are not read. Other contents of the same size give the same hash.
        """
        digest = hashlib.sha256()
        for file in self.files:
            name = "/".join(os.fspath(file).split(os.sep)[-2:]) if isinstance(file, str | Path) else ""
            try:
                digest.update(f"{name} {size(file)}\n".encode())
            except UnreadableImage as error:
                raise unreadable(file, error) from None
        return digest.hexdigest()

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor) and index.ndim:
            return torch.stack([self[i] for i in index.tolist()])
        try:
            image = self.reader.read(self.files[index])
        except UnreadableImage as error:
            raise unreadable(self.files[index], error) from None
        self._check_size(index, *image.size)
        return self.transform(image)

    def _check_size(self, index: int | Tensor, width: int, height: int) -> None:
        try:
            check_resize(width, height, self.short_side)
        except TooLarge as error:
            raise unreadable(self.files[index], error) from None

    def loader(
        self,
        batches: Sequence[Tensor],
        device: torch.device,
        workers: int = 0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield a batch uint8 (n, C, size, size) on the device for each tensor of indices (n,) in `batches`.

        workers    processes that decode
        generator  for the seeds of the workers; None: torch's global generator
        """
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # as a DataLoader does, with and without memory
        memory = self._decoded.memory((self.channels, self.size, self.size), device)
        if memory is None:
            yield from self._read(batches, device, workers)
            return
        pixels, is_decoded, places = memory
        known = [bool(is_decoded[places[indices]].all()) for indices in batches]
        new = [indices for indices, there in zip(batches, known, strict=True) if not there]
        decoded = self._read(new, device, workers)
        for indices, there in zip(batches, known, strict=True):
            at = places[indices].to(device)
            if not there:
                pixels[at] = next(decoded)
                is_decoded[places[indices]] = True
            yield pixels[at]

    def _read(self, batches: Sequence[Tensor], device: torch.device, workers: int) -> Iterator[Tensor]:
        encoded = self.decoder == "gpu"
        workers = min(workers, len(batches))
        source = _batches(
            _Encoded(self) if encoded else self,
            _join if encoded else default_collate,
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=device.type == "cuda" and not encoded,
            generator=torch.Generator(),
        )
        for indices, batch in zip(batches, source, strict=True):
            if encoded:
                images, refused = _decode_batch(_separate(*batch), device)
                self.refused.update(str(self.files[indices[position]]) for position in refused)
                for index, image in zip(indices, images, strict=True):
                    self._check_size(index, image.shape[2], image.shape[1])
                yield torch.stack([self.resize(image.to(device)) for image in images])
            else:
                yield batch.to(device, non_blocking=device.type == "cuda")


def _batches(images: Dataset, collate: Callable[[list], object] = default_collate, **options) -> Iterator:
    """Yield the batches of a DataLoader. Raise the InputError of an image as it is, also from a worker process.

    DataLoader itself would raise another one, whose only argument is the traceback of the worker as a text.

    collate  makes a batch of several images
    options  of DataLoader
    """
    for batch in DataLoader(_Caught(images), collate_fn=functools.partial(_collate, collate), **options):
        if isinstance(batch, InputError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Caught(Dataset):
    """The images of a data set, and an InputError in place of each that cannot be read."""

    images: Dataset

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> object:
        try:
            return self.images[index]
        except InputError as error:
            return error


def _collate(collate: Callable[[list], object], images: list) -> object:
    """Return a batch, or the first InputError in it."""
    return next((image for image in images if isinstance(image, InputError)), None) or collate(images)


class _Encoded(Dataset):
    """The input of nvJPEG: the bytes (n,) of each JPEG in RGB or greyscale; the pixels (3, H, W) of any other image."""

    def __init__(self, images: FolderImages):
        self.images = images

    def __getitem__(self, index: int) -> Tensor:
        file, reader = self.images.files[index], self.images.reader
        try:
            if reader.needs_cpu(file):
                return v2.functional.pil_to_tensor(reader.read(file))
            return _as_tensor(read_bytes(file))
        except UnreadableImage as error:
            raise unreadable(file, error) from None


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _join(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return the values of all tensors in one, and their shapes.

    A worker process passes each tensor in a file of its own, and a process may open only so many.
    """
    return torch.cat([image.flatten() for image in images]), [tuple(image.shape) for image in images]


def _separate(values: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return the tensors of which `_join` made one."""
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _decode_batch(batch: list[Tensor], device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Return the pixels (3, H, W) uint8 of each item of `_Encoded`, and the positions that nvJPEG could not decode.

    All JPEGs are decoded in one call. If that fails, they are decoded one by one, and the CPU decodes those that the
    GPU cannot.
    """
    positions = [position for position, image in enumerate(batch) if image.ndim == 1]
    decoded, refused = list(batch), []
    if not positions:
        return decoded, refused
    try:
        pixels = _decode([batch[position] for position in positions], device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # does not say which image failed
        pixels, is_refused = zip(*(_decode_one(batch[position], device) for position in positions), strict=True)
        refused = list(itertools.compress(positions, is_refused))
    for position, image in zip(positions, pixels, strict=True):
        decoded[position] = image
    return decoded, refused


def _decode_one(image: Tensor, device: torch.device) -> tuple[Tensor, bool]:
    """Return the pixels of a JPEG and whether the CPU decoded it because the device cannot."""
    try:
        return _decode([image], device)[0], False
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        try:
            return _decode([image], torch.device("cpu"))[0], True
        except RuntimeError as error:
            why = first_line(error)
            raise InputError(f"an image of the folder is damaged ({why})", "replace or remove it") from None


def _decode(images: list[Tensor], device: torch.device) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 and later recommend another package
        return io.decode_jpeg(images, mode=io.ImageReadMode.RGB, device=device)
