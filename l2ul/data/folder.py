"""Images that stay on disk: decoded as they are asked for, by worker processes or by the GPU."""

from collections.abc import Iterator, Sequence
import hashlib
import os
from pathlib import Path
import warnings

from PIL import Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, io
from torchvision.transforms import v2

from l2ul.common.choices import PREFETCH
from l2ul.common.errors import InputError


def check_decoder(decoder: str, device: torch.device) -> None:
    """Raise InputError where the device cannot decode so."""
    if decoder == "gpu" and device.type != "cuda":
        raise InputError("--decoder gpu needs a CUDA GPU, and this runs on another device; leave it out")


class FolderImages(Dataset):
    """Images that stay on disk, decoded when asked for: `images[indices]` is uint8 (n, 3, size, size).

    The short side is resized to `short_side`, by default 8/7 of `size` (256 for 224), then the centre cut out, as
    ImageNet classifiers are tested.

    prefetch  batches that each worker of `loader` decodes ahead
    decoder   `gpu`: what `loader` gives is decoded by torchvision's nvJPEG, which rounds otherwise than the CPU
    """

    def __init__(
        self,
        files: list[str],
        size: int,
        short_side: int | None = None,
        *,
        prefetch: int = PREFETCH,
        decoder: str = "cpu",
    ):
        self.files, self.size, self.prefetch, self.decoder = files, size, prefetch, decoder
        self.short_side = short_side or round(size * 8 / 7)
        self.cut = v2.Compose([v2.Resize(self.short_side), v2.CenterCrop(size)])
        self.read = v2.Compose([self.cut, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Tensor) -> "FolderImages":
        """The images at `indices`, in that order."""
        files = [self.files[i] for i in indices.tolist()]
        return FolderImages(files, self.size, self.short_side, prefetch=self.prefetch, decoder=self.decoder)

    def sha256(self) -> str:
        """Hex hash of the files' names, sizes and times of change, and of how they are cut and decoded."""
        how = "" if self.decoder == "cpu" else f" {self.decoder}"
        digest = hashlib.sha256(f"{self.size} {self.short_side}{how}".encode())
        for file in self.files:
            try:
                told = os.stat(file)
            except OSError as error:
                raise _unreadable(file, error.strerror) from None
            digest.update(f"{file} {told.st_size} {told.st_mtime_ns}".encode())
        return digest.hexdigest()

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor) and index.ndim:
            return torch.stack([self[i] for i in index.tolist()])
        try:
            return self.read(datasets.folder.pil_loader(self.files[index]))
        except OSError as error:
            raise _unreadable(self.files[index], error) from None

    def loader(
        self,
        batches: Sequence[Tensor],
        device: torch.device,
        workers: int = 0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The images at each of these indices (n,), uint8 (n, 3, size, size) on the device, one batch after the other.

        generator  what the workers' seeds are drawn from, by default torch's own
        """
        encoded = self.decoder == "gpu"
        source = DataLoader(
            _Encoded(self) if encoded else self,
            batch_sampler=[part.tolist() for part in batches],
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=device.type == "cuda" and not encoded,
            collate_fn=list if encoded else None,
            generator=generator,
        )
        for batch in source:
            if encoded:
                yield torch.stack([self.cut(image.to(device)) for image in _decoded(batch, device)])
            else:
                yield batch.to(device, non_blocking=device.type == "cuda")


class _Encoded(Dataset):
    """Images as nvJPEG takes them: the bytes (n,) of a plain JPEG; of any other file its pixels, uint8 (3, H, W)."""

    def __init__(self, images: FolderImages):
        self.images = images

    def __getitem__(self, index: int) -> Tensor:
        file = self.images.files[index]
        try:
            with Image.open(file) as image:  # the head of the file alone
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    return torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=torch.uint8)
            return v2.functional.pil_to_tensor(datasets.folder.pil_loader(file))
        except (OSError, RuntimeError) as error:
            raise _unreadable(file, error) from None


def _decoded(batch: list[Tensor], device: torch.device) -> list[Tensor]:
    """The pixels, uint8 (3, H, W), of what `_Encoded` gave: all at once on the GPU, or one by one where one will not.

    What the GPU cannot decode, the CPU does.
    """
    where = [place for place, image in enumerate(batch) if image.ndim == 1]
    if not where:
        return batch
    found = list(batch)
    try:
        pixels = _decode([batch[place] for place in where], device)
    except RuntimeError:  # which of them it is, is not told
        pixels = [_decode_one(batch[place], device) for place in where]
    for place, image in zip(where, pixels, strict=True):
        found[place] = image
    return found


def _decode_one(image: Tensor, device: torch.device) -> Tensor:
    try:
        return _decode([image], device)[0]
    except RuntimeError:
        try:
            return _decode([image], torch.device("cpu"))[0]
        except RuntimeError as error:
            raise InputError(f"an image of the folder is damaged ({str(error).splitlines()[0]}); mend it") from None


def _decode(images: list[Tensor], device: torch.device) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 and later: of a successor, which is another package
        return io.decode_jpeg(images, mode=io.ImageReadMode.RGB, device=device)


def _unreadable(file: str, reason: object) -> InputError:
    return InputError(f"cannot read the image {file} ({reason}); mend or remove it")
