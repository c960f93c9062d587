"""UTKFace: read ages from file names, group them into classes, and split the images for pretraining and unlearning."""

from bisect import bisect_right
import hashlib
from pathlib import Path
import re

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from l2ul import ProgressBar
from l2ul.common import seeds
from l2ul.common.choices import AGE_GROUPINGS
from l2ul.common.errors import InputError
from l2ul.data.folder import FolderImages
from l2ul.data.image_files import ImageReader
from l2ul.data.images import Images, Split

CROP = 15 / 16  # side of the centre crop relative to the image: 120 of 128 pixels
REGULAR = re.compile(r"\d+_[01]_[0-4]_\d+\.jpg(\.chip\.jpg)?", re.IGNORECASE)  # age_gender_race_time
FOLDERS = ("utkface", "UTKFace")


def load(
    data_dir: Path,
    grouping: str,
    *,
    image_size: int = 128,
    split_seed: int = 0,
    whole_train: bool = False,
    workers: int = 0,
    progress: ProgressBar | None = None,
    reader: ImageReader | None = None,
) -> Images:
    """Return the images in `<data_dir>/utkface` as uint8 tensors, labelled by age group.

    grouping     one of `choices.AGE_GROUPINGS`
    image_size   side to which images are resized, before a centre crop of 15/16 of that side
    split_seed   seed of the split into training, validation and test images, which depends on nothing else but the file
                 names
    whole_train  leave training images uncropped, for random crops in training
    workers      processes that decode images
    progress     shows how many images are decoded
    reader       decodes the files

    Raises InputError if there is no folder, fewer than 10 images, or a file name twice.
    """
    reader = reader or ImageReader()
    files, notes = _files(Path(data_dir))
    notes += tuple(f"UTKFace: {note}" for note in reader.examine(files, image_size))
    parts = split_files([file.name for file in files], split_seed)
    labels = torch.tensor([age_class(_age(file.name), grouping) for file in files])
    images = FolderImages([str(file) for file in files], image_size, image_size, reader=reader)
    pixels = images.in_memory(workers, progress)
    crop = round(image_size * CROP)
    sides = (image_size if whole_train else crop, crop, crop)
    train, validation, test = (
        Split(transforms.center_crop(pixels[part], [side, side]), labels[part])
        for part, side in zip(parts, sides, strict=True)
    )
    names = "\n".join(sorted(files[i].name for i in parts[0].tolist()))
    return Images(
        "utkface",
        len(AGE_GROUPINGS[grouping]),
        class_names(grouping),
        train,
        test,
        validation,
        settings={"age_grouping": grouping, "image_size": image_size, "split_seed": split_seed} | reader.settings,
        train_sha256=hashlib.sha256(names.encode()).hexdigest(),
        notes=notes,
        short_side=image_size,
    )


def age_class(age: int, grouping: str) -> int:
    """Return the class of an age: the index of the first bound above it, or the last class if there is none."""
    bounds = AGE_GROUPINGS[grouping]
    return min(bisect_right(bounds, age), len(bounds) - 1)


def class_names(grouping: str) -> list[str]:
    """Return the names of the classes of a grouping: 0-9, 10-14, …, 60+."""
    bounds = AGE_GROUPINGS[grouping][:-1]
    return [f"{low}-{high - 1}" for low, high in zip((0, *bounds), bounds, strict=False)] + [f"{bounds[-1]}+"]


def split_files(names: list[str], split_seed: int) -> list[Tensor]:
    """Return the indices of the training (80 %), validation (10 %) and test images among sorted file names.

    The 23,708 images of UTKFace are split into 18,966, 2,371 and 2,371, as in the released scripts.
    """
    order = torch.randperm(len(names), generator=seeds.generator(split_seed, "utkface split"))
    train, validation = round(0.8 * len(names)), round(0.1 * len(names))
    return [part.sort().values for part in order.tensor_split([train, train + validation])]


def _files(data_dir: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the image files in order of their names, and sentences about malformed names."""
    folder = next((data_dir / name for name in FOLDERS if (data_dir / name).is_dir()), None)
    if folder is None:
        raise InputError(
            f"there is no folder {data_dir / FOLDERS[0]}",
            "put the aligned and cropped UTKFace images there",
            "name the folder that holds utkface with --data-dir",
        )
    images = sorted((f for f in folder.rglob("*") if f.suffix.lower() == ".jpg"), key=lambda file: file.name)
    files = [file for file in images if _age(file.name) is not None]
    if len({file.name for file in files}) < len(files):
        raise InputError(f"{folder} has two files of the same name", "keep each image in one subfolder only")
    if len(files) < 10:
        raise InputError(f"{folder} has {len(files)} images whose names begin with an age", "expected at least 10")
    malformed = [file.name for file in files if not REGULAR.fullmatch(file.name)]
    notes = []
    if malformed:
        notes.append(f"UTKFace: {len(malformed)} file names are malformed; they are used by their age: {malformed}")
    if len(files) < len(images):
        notes.append(f"UTKFace: {len(images) - len(files)} files have no age in their names; they are left out")
    return files, tuple(notes)


def _age(name: str) -> int | None:
    """Return the age in years at the start of a file name, which malformed names have too; None if there is none."""
    match = re.match(r"(\d{1,3})_", name)
    return int(match[1]) if match else None
