"""Surrogate images: unlabelled images that stand for D_r in methods that use a teacher."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
import os
from pathlib import Path
import re

import torch
from torch import Tensor
import torch.nn.functional as F

from l2ul.common import seeds
from l2ul.common.errors import InputError
from l2ul.common.files import tensors_sha256
from l2ul.data.datasets import LOADERS
from l2ul.data.folder import FolderImages
from l2ul.data.forget_set import is_image_name, reject_own
from l2ul.data.image_files import ImageReader
from l2ul.data.images import Images, Split

PART = re.compile(r"(test|validation)(?::(\d+)-(\d+))?")
LARGEST = 2**30  # bytes of uint8 images in memory; of a larger set, a random part is used


@dataclass(frozen=True)
class Surrogate:
    """A surrogate set.

    name     as the user named it; of a folder, its last part
    images   (n, C, H, W) uint8, or float in [0,1] if the data set has such images
    of_test  whether they are a part of the test set, which is measured without them
    """

    name: str
    images: Tensor
    of_test: bool = False

    @cached_property
    def sha256(self) -> str:
        """A hash of the images."""
        return tensors_sha256({"images": self.images})


def read(
    name: str, images: Images, load: Callable[[str], Images], reader: ImageReader | None = None
) -> tuple[Surrogate, Images]:
    """Return a surrogate set, and the data set without it.

    name    `test` or `validation`, for that part of the data set, or `test:0-5000` for its images 0 to 4,999; a folder
            of images, with or without subfolders; or the name of another data set, whose training images are used
    load    returns a data set by name
    reader  decodes the files of a folder

    Images have the size and channels of the data set. Raises InputError if there is no such set, it is empty or holds
    images of the data set's training or test set.
    """
    if match := PART.fullmatch(name):
        chosen, rest = _part_of(images, name, *match.groups())
        return Surrogate(name, _in_memory(chosen.images), of_test=match[1] == "test"), rest
    if Path(name).is_dir():
        files = sorted(str(file) for file in Path(name).rglob("*") if file.is_file() and is_image_name(file.name))
        if not files:
            raise InputError(f"--surrogate {name} holds no images", "expected image files, in subfolders or not")
        chosen = images.from_files(files, reader)
        reject_own(chosen, images, "a surrogate set must not hold such images: remove it from the folder")
        return Surrogate(Path(os.path.abspath(name)).name, _in_memory(chosen)), images
    if name in LOADERS and name != images.name:
        other = load(name).with_channels(images.channels).train.images
        return Surrogate(name, _resized(_in_memory(other), images.side)), images
    raise InputError(
        f"--surrogate is {name}",
        f"expected a folder of images, test or validation with or without a range such as test:0-5000, or the name of "
        f"another data set: {', '.join(one for one in LOADERS if one != images.name)}",
    )


def without_part(images: Images, name: str | None) -> Images:
    """Return a data set without the part of its test set that a surrogate set has taken out; `name` as in `read`."""
    match = PART.fullmatch(name or "")
    return _part_of(images, name, *match.groups())[1] if match and match[1] == "test" else images


def _part_of(images: Images, name: str, part: str, first: str | None, last: str | None) -> tuple[Split, Images]:
    """Return a part of the test or validation set, and the data set without it."""
    split: Split | None = getattr(images, part)
    if split is None:
        raise InputError(f"--surrogate is {name}, but {images.name} has no validation set", "use test or a folder")
    start, stop = (0, len(split)) if first is None else (int(first), int(last))
    if not start < stop <= len(split):
        raise InputError(
            f"--surrogate is {name}", f"expected a range within 0-{len(split)}, such as {part}:0-{len(split) // 2}"
        )
    if part == "test" and stop - start == len(split):
        raise InputError(
            f"--surrogate {name} leaves no test images to measure on", f"give a range such as test:0-{stop // 2}"
        )
    inside = torch.zeros(len(split), dtype=torch.bool)
    inside[start:stop] = True
    rest = split.subset((~inside).nonzero().flatten().to(split.labels.device))
    return split.subset(torch.arange(start, stop, device=split.labels.device)), replace(images, **{part: rest})


def _in_memory(images: Tensor | FolderImages) -> Tensor:
    """Return images as a tensor, a random part of them if they take more than LARGEST bytes."""
    number = max(1, LARGEST // images.shape[1:].numel())
    if number < len(images):
        chosen = torch.randperm(len(images), generator=seeds.generator(0, "surrogate"))[:number].sort().values
        return images[chosen]
    return images[torch.arange(len(images))]


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[2:] == (side, side):
        return images
    parts = [F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True) for part in images.split(1024)]
    return torch.cat([part.round().clamp(0, 255).to(images.dtype) for part in parts])
