"""Images in a folder on disk, decoded when they are needed: by worker processes, or by the GPU."""

from collections.abc import Iterator, Sequence
import copy
import hashlib
import os
from pathlib import Path
import warnings

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io
from torchvision.transforms import v2

from l2ul.common.choices import PREFETCH
from l2ul.common.errors import InputError
from l2ul.data.image_files import ImageReader, UnreadableImage, unreadable

READER_VERSION = 2  # part of the hashes by which caches find predictions; it grows when files give other pixels


def check_decoder(decoder: str, device: torch.device) -> None:
    """Raise InputError if the decoder does not work on the device."""
    if decoder == "gpu" and device.type != "cuda":
        raise InputError("--decoder gpu needs a CUDA GPU; leave it out on this device")


class FolderImages(Dataset):
    """Images on disk. `images[indices]` decodes some of them to uint8 (n, C, size, size).

    C is `channels`: 3, or 1 after `with_channels(1)`.

    files       paths of the images
    size        side of the centre crop, in pixels
    short_side  length to which the short side is resized before the crop; None: 8/7 of `size`, as is usual for
                evaluation on ImageNet (256 for 224)
    prefetch    batches that each worker of `loader` decodes ahead
    decoder     `cpu` or `gpu`; with `gpu`, `loader` decodes with torchvision's nvJPEG, whose pixels differ slightly
                from those of the CPU
    reader      decodes files on the CPU

    Raises InputError when a file cannot be decoded.
    """

    def __init__(
        self,
        files: list[str],
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
        self.resize = v2.Compose([v2.Resize(self.short_side), v2.CenterCrop(size)])
        self.transform = v2.Compose([self.resize, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Tensor) -> "FolderImages":
        """Return the images at `indices`, in that order."""
        subset = copy.copy(self)
        subset.files = [self.files[i] for i in indices.tolist()]
        return subset

    def with_channels(self, channels: int) -> "FolderImages":
        """Return the images in colour (3) or in grey (1), converted before they are resized."""
        new = copy.copy(self)
        new.channels = channels
        grey = [v2.Grayscale()] if channels == 1 else []
        new.resize = v2.Compose([*grey, v2.Resize(self.short_side), v2.CenterCrop(self.size)])
        new.transform = v2.Compose([new.resize, v2.PILToTensor()])
        return new

    def sha256(self) -> str:
        """Return a hash of the names, sizes and modification times of the files, and of how they are decoded."""
        how = [READER_VERSION, self.decoder, *(f"{name}={value}" for name, value in self.reader.settings.items())]
        digest = hashlib.sha256(" ".join(map(str, [self.size, self.short_side, *how])).encode())
        if self.channels == 1:
            digest.update(b" grey")
        for file in self.files:
            try:
                status = os.stat(file)
            except OSError as error:
                raise unreadable(file, error.strerror) from None
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor) and index.ndim:
            return torch.stack([self[i] for i in index.tolist()])
        try:
            return self.transform(self.reader.read(self.files[index]))
        except UnreadableImage as error:
            raise unreadable(self.files[index], error) from None

    def loader(
        self,
        batches: Sequence[Tensor],
        device: torch.device,
        workers: int = 0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield a batch uint8 (n, 3, size, size) on the device for each tensor of indices (n,) in `batches`.

        workers    processes that decode
        generator  for the seeds of the workers; None: torch's global generator
        """
        encoded = self.decoder == "gpu"
        source = DataLoader(
            _Encoded(self) if encoded else self,
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=device.type == "cuda" and not encoded,
            collate_fn=list if encoded else None,
            generator=generator,
        )
        for batch in source:
            if encoded:
                yield torch.stack([self.resize(image.to(device)) for image in _decode_batch(batch, device)])
            else:
                yield batch.to(device, non_blocking=device.type == "cuda")


class _Encoded(Dataset):
    """The input of nvJPEG: the bytes (n,) of each JPEG in RGB or greyscale; the pixels (3, H, W) of any other image."""

    def __init__(self, images: FolderImages):
        self.images = images

    def __getitem__(self, index: int) -> Tensor:
        file, reader = self.images.files[index], self.images.reader
        try:
            if reader.needs_cpu(file):
                return v2.functional.pil_to_tensor(reader.read(file))
            return torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=torch.uint8)
        except (OSError, UnreadableImage) as error:
            raise unreadable(file, error) from None


def _decode_batch(batch: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return the pixels (3, H, W) uint8 of each item of `_Encoded`.

    All JPEGs are decoded in one call. If that fails, they are decoded one by one, and the CPU decodes those that the
    GPU cannot.
    """
    positions = [position for position, image in enumerate(batch) if image.ndim == 1]
    if not positions:
        return batch
    decoded = list(batch)
    try:
        pixels = _decode([batch[position] for position in positions], device)
    except RuntimeError:  # does not say which image failed
        pixels = [_decode_one(batch[position], device) for position in positions]
    for position, image in zip(positions, pixels, strict=True):
        decoded[position] = image
    return decoded


def _decode_one(image: Tensor, device: torch.device) -> Tensor:
    try:
        return _decode([image], device)[0]
    except RuntimeError:
        try:
            return _decode([image], torch.device("cpu"))[0]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"an image of the folder is damaged ({reason}); replace or remove it") from None


def _decode(images: list[Tensor], device: torch.device) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 and later recommend another package
        return io.decode_jpeg(images, mode=io.ImageReadMode.RGB, device=device)
