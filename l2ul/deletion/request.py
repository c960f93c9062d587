"""Read a deletion request: the images of a folder with their hashes, and the class each has and may be given."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
import hashlib
from io import StringIO
import os
from pathlib import Path
import warnings

import pandas as pd
from PIL import Image
import torch
from torch import Tensor, nn

from l2ul.common.choices import EXIF_ORIENTATIONS
from l2ul.common.errors import InputError, Reason, Wording, first_line, option
from l2ul.common.files import file_sha256
from l2ul.common.image_sizes import TooLarge
from l2ul.common.text import first_three, is_number, normal_form, read_text, require_utf8_name
from l2ul.data.image_files import ImageReader, UnreadableImage
from l2ul.data.images import Split, pixels_of
from l2ul.deletion import states
from l2ul.deletion.deployed_model import DeployedModel
from l2ul.deletion.report_schema import Report
from l2ul.metrics import accuracy, preflight
from l2ul.objective import Forget

LABELS = "labels.csv"  # in the folder of images; columns file, label, new_label
HASHES = ("pixels_sha256", "sha256")  # of an image in a report
ToPixels = Callable[[Image.Image], Tensor]  # from an RGB image to uint8 pixels (3, H, W)


@dataclass(frozen=True)
class ImageFile:
    """An image of a folder.

    file           path relative to the folder, with / as the separator
    sha256         of the file's bytes
    pixels_sha256  of the RGB image in its original size, as the reader of the folder decodes it
    label          the class by the name of its folder or the label table, or None
    new_label      the class that it shall get, or None
    same_as        files with the same pixels, which count as this image
    """

    file: str
    sha256: str
    pixels_sha256: str
    label: str | None = None
    new_label: str | None = None
    same_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnreadableFile:
    """A file that cannot be read as an image, and why."""

    file: str
    why: str


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, each once.

    images       (n, 3, H, W) uint8 on the CPU, in the order of `files`
    unreadable   files that were left out
    label_table  the CSV file with labels, if there is one
    reader       decoded the files
    notes        sentences about images that other software may read differently
    """

    path: Path
    files: list[ImageFile]
    images: Tensor
    unreadable: list[UnreadableFile] = field(default_factory=list)
    label_table: Path | None = None
    reader: ImageReader = field(default_factory=ImageReader)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Request:
    """The images to forget, on the device of the model.

    images             (k, 3, H, W) uint8, or float from `l2ul.forget`; forget has the same images as floats, with
                       labels and new labels
    class_names        of the model
    logits_before      (k, C) of the original model, on the CPU
    earlier_labels     the label that each image had in an earlier request, or None
    forgotten_earlier  indices of the images that an earlier request made forgotten
    recognised_earlier (k,) bool, on the CPU: whether the model recognised the image before an earlier request
    """

    folder: ImageFolder
    images: Tensor
    forget: Forget
    class_names: list[str]
    logits_before: Tensor
    earlier_labels: list[int | None]
    forgotten_earlier: frozenset[int] = frozenset()
    recognised_earlier: Tensor | None = None

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def label_source(self) -> str:
        """Where the labels come from, in words."""
        named = sum(image.label is not None for image in self.folder.files)
        predicted = "predictions of the model"
        source = f"the table {self.folder.label_table.name}" if self.folder.label_table else "names of the folders"
        text = source if named == len(self) else f"{source}; for {len(self) - named} images {predicted}"
        text = text if named else predicted
        pairs = zip(self.folder.files, self.earlier_labels, strict=True)
        earlier = sum(image.label is None and label is not None for image, label in pairs)
        return f"{text}; for {earlier} images the label of an earlier request" if earlier else text

    @property
    def new(self) -> list[int]:
        """Places of the images that are in no earlier request."""
        return [place for place, label in enumerate(self.earlier_labels) if label is None]

    @property
    def unlabelled(self) -> list[int]:
        """Places of the images whose label is the prediction of the model, as nothing gives one."""
        return [place for place in self.new if self.folder.files[place].label is None]

    def label_notes(self, recognised: Tensor) -> list[str]:
        """Return sentences about images whose label may not be their class, which is then not removed.

        recognised  (k,) bool, on the CPU: see `Unlearner.recognised`

        Images of earlier requests are left out.
        """
        unlabelled = self.unlabelled
        missed = [place for place in sorted({*self.new} - {*unlabelled}) if not recognised[place]]
        notes, total = [], states.images(len(self))
        if unlabelled:
            notes.append(
                f"{len(unlabelled)} of {total} have no label ({self._first_three(unlabelled)}): the prediction counts "
                f"as the label, so the class of an image that the model misclassifies is not removed; if you know the "
                f"labels, name them by folders or in {LABELS}"
            )
        if missed:
            notes.append(
                f"{len(missed)} of {total} are not predicted as their label ({self._first_three(missed)}): they never "
                f"count as forgotten; if a label is wrong, correct it, because the class of the image is not removed"
            )
        return notes

    def _described(self, place: int) -> str:
        """Return the file of an image, the prediction for it and its label, in words."""
        share, prediction = self.logits_before[place].double().softmax(0).max(0)
        predicted, label = self.class_names[prediction], self.class_names[self.forget.labels[place]]
        return f"{self.folder.files[place].file}: predicted as {predicted} ({100 * share:.1f} %), label {label}"

    def _first_three(self, places: Sequence[int]) -> str:
        return "; ".join(map(self._described, places[:3])) + "; …" * (len(places) > 3)

    def summary(self, max_images: int = 20) -> list[str]:
        """Return lines about the labels and the present predictions, with a line for each of the first images."""
        labels = self.forget.labels.cpu()
        counts = {
            self.class_names[index]: states.images(int((labels == index).sum())) for index in labels.unique().tolist()
        }
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        lines = [f"labels, from {self.label_source}: {listed}"]
        labelled = sorted({*range(len(self))} - {*self.unlabelled})
        right = int((self.logits_before.argmax(1) == labels)[labelled].sum())
        which = "images" if len(labelled) == len(self) else "images with a label"
        if labelled:
            lines.append(f"predictions: {right} of {len(labelled)} {which} are classified as their label")
        new_labels = [None] * len(self) if self.forget.new_labels is None else self.forget.new_labels.tolist()
        for place, new in enumerate(new_labels[:max_images]):
            line = f"  {self._described(place)}"
            lines.append(line if new is None else f"{line}, new label {self.class_names[new]}")
        lines += [f"  … and {len(self) - max_images} more"] if len(self) > max_images else []
        return lines


def make_request(
    read: ImageFolder, model: DeployedModel, earlier: Sequence[Report] = (), class_order: str | None = None
) -> Request:
    """Return the request to forget images that were read, with the label of each.

    earlier      reports of the earlier requests on this model, first to last
    class_order  "string" or "numeric", see `order_classes`; None: as the model or the user names them

    The label of an image is the one that the folder or the table gives. Without one, it is the label of an earlier
    request for the same image, or else the model's prediction. Sets what the model returns, logits or probabilities,
    and the weights that are not reached. Raises InputError if the model does not fit the images or a label is no class
    of the model.
    """
    images = read.images.to(next(model.classifier.parameters()).device)
    class_names = _check_class_names(model.class_names, preflight.check_model(model.classifier, images))
    class_names = order_classes(class_names, class_order) if class_order else class_names
    model.detect_outputs(images)
    before = logits(model.classifier, images)
    if not before.isfinite().all():
        index = int((~before.isfinite()).any(1).nonzero()[0])
        raise InputError(
            f"the model returns logits that are not finite for {read.files[index].file}", "check the model's weights"
        )
    preflight.check_alone(model.classifier, images, before)
    model.unreached = preflight.unreached_weights(model.classifier, images)
    names = [image.new_label for image in read.files]
    if any(names) and not all(names):
        file = read.files[names.index(None)].file
        raise InputError(f"{file} has no new_label", "give one for every image, or for none")
    new_labels = class_indices(names, class_names, None, "new_label").to(images.device) if any(names) else None
    earlier_labels = labels_of_earlier_requests(earlier, read.files, new_labels)
    default = before.argmax(1)
    for index, label in enumerate(earlier_labels):
        default[index] = default[index] if label is None else label
    labels = class_indices([image.label for image in read.files], class_names, default, "label").to(images.device)
    _check_first_labels(earlier, read.files, labels.tolist(), earlier_labels, class_names)
    if new_labels is not None and (new_labels == labels).any():
        index = int((new_labels == labels).nonzero()[0])
        raise InputError(f"the new_label of {read.files[index].file} equals its label", "give another class")
    forget = Forget(pixels_of(images), labels, new_labels)
    keys = [{(one.sha256, y), (one.pixels_sha256, y)} for one, y in zip(read.files, labels.tolist(), strict=True)]
    known, gone = states.recognised_images(earlier), states.forgotten_images(earlier)
    recognised = torch.tensor([bool(known & own) for own in keys])
    places = frozenset(index for index, own in enumerate(keys) if gone & own)
    return Request(read, images, forget, class_names, before, earlier_labels, places, recognised)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (n, C) in eval mode on the CPU, without folding batch-norm."""
    return torch.cat(list(accuracy.logits(model, images, fold=False))).clone()  # a copy outside inference mode


def _check_class_names(names: list[str], num_classes: int) -> list[str]:
    """Return the names, or numbers if there are none. Raise InputError if their number differs from the model's."""
    names = names or [str(number) for number in range(num_classes)]
    if len(names) != num_classes:
        raise InputError(f"the model has {num_classes} classes, but {len(names)} class names are given")
    if num_classes < 2:
        raise InputError("the model has one class", "expected a classifier with at least 2 classes")
    return names


def order_classes(names: Sequence[str], order: str) -> list[str]:
    """Return the names of the classes in another order.

    order  "string": sorted as text, as torchvision's ImageFolder sorts folders (0, 1, 10, 11, 2, …); "numeric": by
           their value, if all are numbers

    The names LABEL_0, LABEL_1, … that transformers makes up count as numbers.
    """
    numbers = [str(number) for number in range(len(names))]
    names = numbers if list(names) == [f"LABEL_{number}" for number in numbers] else list(names)
    if order == "string":
        return sorted(names)
    return sorted(names, key=int) if all(map(is_number, names)) else names


def labels_of_earlier_requests(
    reports: Iterable[Report], files: Sequence[ImageFile], new_labels: Tensor | None
) -> list[int | None]:
    """Return the label of each image in the first request that contained it, or None.

    Images are compared by their pixels, then by their files. An image whose new label (k,) is its earlier label counts
    as new: it may be given its original class again.
    """
    first: dict[str, int] = {}
    for report in reports:
        for row in report["images"]:
            for key in HASHES:
                first.setdefault(row[key], row["label"])
    labels = [first.get(image.pixels_sha256, first.get(image.sha256)) for image in files]
    new = [None] * len(files) if new_labels is None else new_labels.tolist()
    return [None if label == target else label for label, target in zip(labels, new, strict=True)]


def _check_first_labels(
    reports: Iterable[Report],
    files: Sequence[ImageFile],
    labels: Sequence[int],
    earlier_labels: Sequence[int | None],
    class_names: Sequence[str],
) -> None:
    """Raise InputError for an image with another label than in an earlier request, and than its new label there.

    Forgetting the other label may lead the model back to the first.
    """
    relabelled = {row[key]: row["new_label"] for report in reports for row in report["images"] for key in HASHES}
    for image, label, first in zip(files, labels, earlier_labels, strict=True):
        new = relabelled.get(image.pixels_sha256, relabelled.get(image.sha256))
        if first is not None and label not in (first, new):
            raise InputError(
                f"{image.file} has the label {class_names[label]}, but {class_names[first]} in an earlier request, as "
                f"which the model might recognise it again",
                "leave out its label",
            )


def read_unlabelled(
    folder: Path | None, name: Wording, model: DeployedModel, request: Request, skip_bad: bool
) -> Tensor | None:
    """Return the images (n, 3, H, W) uint8 of --keep-images or --surrogate on the model's device; None for no folder.

    Their labels are not read, so subfolders may have any names. Raises InputError as `check_others` does.
    """
    if folder is None:
        return None
    reader = request.folder.reader
    read = read_images(folder, model.to_pixels, None, skip_bad, name, reader, with_labels=False)
    return check_others(read, name, request)


def read_reference_images(
    folder: Path | None, model: DeployedModel, request: Request, skip_bad: bool, surrogate: Tensor | None = None
) -> Split | None:
    """Return images that the model was not trained on, with labels, on the model's device; None for no folder.

    surrogate  images of --surrogate, on which the model will be trained

    An image without a label by its subfolder or a table gets the model's prediction. Raises InputError as
    `check_others` does, for a label that is no class of the model, and for an image that is in `surrogate`.
    """
    if folder is None:
        return None
    name = option("reference_images")
    read = read_images(folder, model.to_pixels, None, skip_bad, name, request.folder.reader)
    images = check_others(read, name, request)
    used = set() if surrogate is None else set(map(_digest, surrogate.cpu()))
    pairs = zip(read.files, read.images, strict=True)
    common = next((image.file for image, pixels in pairs if _digest(pixels) in used), None)
    if common:
        raise InputError(
            f"{common} of --reference-images is also an image of --surrogate, on which the model will be trained",
            "remove it from one of the folders",
        )
    predictions = accuracy.predict(model.classifier, images)
    labels = class_indices([image.label for image in read.files], request.class_names, predictions, "label")
    return Split(images, labels.to(images.device))


def check_others(read: ImageFolder, name: Wording, request: Request) -> Tensor:
    """Return images that are not to be forgotten, on the model's device; `name` of the option that names them.

    Raises InputError if the size differs from that of the request's images, or an image is part of the request.
    """
    if read.images.shape[1:] != request.images.shape[1:]:
        problem = f"the images of {name} and of --images differ in size", f"{name.in_python} and images differ in size"
        raise InputError(Wording(*problem), Wording("give one size with --image-size", "resize them to the same"))
    forgotten = {image.pixels_sha256 for image in request.folder.files}
    common = next((image.file for image in read.files if image.pixels_sha256 in forgotten), None)
    if common:
        problem = Wording(f"{common} of {name} is also an image to forget", f"{common} is also an image to forget")
        raise InputError(problem, Wording("remove it from one of the folders", "leave it out"))
    return read.images.to(request.images.device)


def choose_reader(
    chain: Sequence[Report],
    metadata: Mapping[str, object],
    exif_orientation: str | None,
    white_level: float | None,
    max_pixels: int,
) -> ImageReader:
    """Return the reader of a request's images. Options that are None are those of the last request, or of training.

    chain     reports of the earlier requests on the model
    metadata  of the file of weights, as main_pretrain scripts write it
    """
    orientation, white = metadata.get("exif_orientation"), metadata.get("white_level")
    options = {
        "exif_orientation": orientation if orientation in EXIF_ORIENTATIONS else None,
        "white_level": white if isinstance(white, float) and white > 0 else None,
    }
    if chain:
        options |= reading_of(chain[-1])
    options |= {"exif_orientation": exif_orientation} if exif_orientation else {}
    options |= {"white_level": white_level} if white_level else {}
    options = {name: value for name, value in options.items() if value is not None}
    return ImageReader(**options, max_pixels=max_pixels)


def reading_of(report: Report) -> dict[str, object]:
    """Return the options of `ImageReader` with which the images of a report were read.

    Reports without them were written when requests always turned images upright.
    """
    request = report["asked"]
    return {"exif_orientation": request.get("exif_orientation", "obey"), "white_level": request.get("white_level")}


def read_images(
    folder: Path,
    to_pixels: ToPixels,
    label_table: Path | None = None,
    skip_bad: bool = False,
    flag: str = "--images",
    reader: ImageReader | None = None,
    with_labels: bool = True,
) -> ImageFolder:
    """Read the images of a folder, or of its subfolders named by label, sorted by name. Equal images count once.

    to_pixels    convert an RGB image to the pixels that the model takes
    label_table  CSV file with the columns file, label and new_label (or one of the two); default: `labels.csv` in the
                 folder if it exists
    skip_bad     leave out unreadable files instead of raising
    flag         names the folder in messages
    reader       decodes the files
    with_labels  read labels, of the label table and the subfolders

    Each image is decoded, hashed and reduced to the size that the model takes before the next one is decoded.

    Raises InputError if there is no image, one cannot be read, labels contradict each other or sizes differ.
    """
    if not folder.is_dir():
        raise InputError(f"{flag} {folder} is not a folder", "give the folder that contains the images")
    own = folder / LABELS
    if with_labels and not label_table and os.path.lexists(own) and not own.is_file():
        raise InputError(f"{own} is a broken link or no regular file", "replace it by a label table", "remove it")
    table = label_table or (own if own.is_file() else None)
    place = os.path.realpath(table) if table else None
    listed = _list_files(folder, flag).items()
    listed = {file: label for file, label in listed if file != LABELS and os.path.realpath(folder / file) != place}
    labels = _read_labels(table, listed, folder) if table and with_labels else {}
    reader = reader or ImageReader()
    files, properties = [], []
    unreadable: dict[str, Reason] = {}
    pixels = torch.empty(0)
    odd_size: tuple[ImageFile, Tensor] | None = None
    for file, label in listed.items():
        try:
            image, about = reader.read_with_properties(folder / file)
            small = to_pixels(image)
        except (UnreadableImage, TooLarge) as error:
            unreadable[file] = Reason(*error.args)  # without the traceback, which keeps the image in memory
            continue
        properties.append((file, about))
        own_labels = labels.get(file, (label if with_labels else None, None))
        files.append(ImageFile(file, file_sha256(folder / file), _sha256(image), *own_labels))
        if len(files) == 1:
            pixels = torch.empty(len(listed), *small.shape, dtype=small.dtype)
        if small.shape == pixels.shape[1:]:
            pixels[len(files) - 1] = small
        else:
            odd_size = odd_size or (files[-1], small)
        del image, small
    if unreadable and not skip_bad:
        shown = [f"{file}: {reason.problem}" for file, reason in unreadable.items()]
        shown = "; ".join([*shown[:5], "…"] if shown[5:] else shown)
        raise InputError(
            f"{len(unreadable)} of {len(listed)} files in {folder} cannot be read as images ({shown})",
            *dict.fromkeys(remedy for reason in unreadable.values() for remedy in reason.advice),
            "repair or remove them",
            "leave them out with --skip-bad",
        )
    if not files:
        raise InputError(f"{flag} {folder} contains no image", "give the folder that contains the images")
    if odd_size:
        image, small = odd_size
        sizes = [" x ".join(map(str, reversed(shape[-2:]))) for shape in (pixels.shape, small.shape)]
        raise InputError(
            f"{files[0].file} has {sizes[0]} pixels, {image.file} has {sizes[1]}, and the model does not define the "
            f"size that it takes",
            "give it with --image-size",
        )
    notes = reader.notes(properties, len(files))
    deep = [file for file, about in properties if about.white is not None and not about.is_colour]
    if deep:
        notes.append(
            f"{len(deep)} of {len(files)} images have more than 8 bits ({first_three(deep)}): their levels are scaled "
            f"to 8 bits; torchvision's ImageFolder and Pillow's convert clip them at 255: if the model is used with "
            f"these, convert the images with them first"
        )
    hidden = len([*folder.glob(".*"), *folder.glob("*/.*")])
    if hidden:
        notes.append(f"{hidden} files or folders are not read because their names begin with a dot")
    left_out = [UnreadableFile(file, str(reason)) for file, reason in unreadable.items()]
    return ImageFolder(folder, *_merge_equal(files, pixels), left_out, table, reader, notes)


def _list_files(folder: Path, flag: str) -> dict[str, str | None]:
    """Return the files of a folder and of its subfolders, with the name of the subfolder as the label.

    They are sorted by the Unicode normal forms of their names, so that their order is the same on all systems.
    """
    files: dict[str, str | None] = {}
    for path in sorted(folder.iterdir(), key=_name):
        if path.name.startswith("."):
            continue
        require_utf8_name(path)
        if path.is_dir():
            for inner in map(require_utf8_name, sorted(path.iterdir(), key=_name)):
                if inner.is_dir() and not inner.name.startswith("."):
                    raise InputError(f"{inner} is a folder inside the folder of a label", f"expected images in {path}")
                if not inner.name.startswith("."):
                    files[f"{path.name}/{inner.name}"] = normal_form(path.name)
        else:
            files[path.name] = None
    loose = [file for file, label in files.items() if label is None and file != LABELS]
    if loose and len(loose) < len(files) - (LABELS in files):
        raise InputError(
            f"{flag} {folder} contains images beside folders of labels, such as {loose[0]}",
            "put all images into folders, or none",
        )
    return files


def _name(path: Path) -> tuple[str, str]:
    return normal_form(path.name), path.name


def _read_labels(table: Path, files: dict[str, str | None], folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """Return label and new label by file from a CSV file. `files` has the label of each file by its subfolder.

    A name in the table means the file whose name has the same Unicode normal form.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more fields than columns
            text = StringIO(read_text(table))
            rows = pd.read_csv(text, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False)
            rows = rows.fillna("")  # rows with fewer fields than columns
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        long_row = isinstance(error, pd.errors.ParserWarning)
        reason = "a row has more fields than the first one" if long_row else first_line(error)
        raise InputError(
            f"cannot read the label table {table} ({reason})",
            "expected CSV in UTF-8 with the columns file, label, new_label",
        ) from None
    unknown = set(rows.columns) - {"file", "label", "new_label"}
    if "file" not in rows or len(rows.columns) == 1 or unknown:
        raise InputError(
            f"{table} has the columns {', '.join(rows.columns)}",
            "expected file, and label or new_label or both, separated by commas",
        )
    rows.file = rows.file.map(normal_form)
    by_name: dict[str, str] = {}
    for file in files:
        if by_name.setdefault(normal_form(file), file) != file and normal_form(file) in set(rows.file):
            raise InputError(
                f"{folder} has two files {normal_form(file)} whose names differ only in their Unicode normal form",
                "rename one of them",
            )
    repeated = rows.file[rows.file.duplicated()]
    if len(repeated):
        raise InputError(f"{table} lists {repeated.iloc[0]!r} more than once", "list each image once")
    missing = sorted(set(rows.file) - by_name.keys())
    if missing:
        raise InputError(
            f"{table} lists {missing[0]!r}, which is not in {folder}", "correct the name or remove the row"
        )
    labels = {}
    for row in rows.to_dict("records"):
        file = by_name[row["file"]]
        by_table, by_folder = normal_form(row.get("label", "").strip()) or None, files[file]
        if by_table and by_folder and by_table != by_folder:
            raise InputError(
                f"{table} gives {row['file']} the label {by_table!r}, but its folder is {by_folder!r}",
                "correct one of them",
            )
        labels[file] = (by_table or by_folder, normal_form(row.get("new_label", "").strip()) or None)
    return labels


def _digest(pixels: Tensor) -> bytes:
    """Return a hash of an image (C, H, W) on the CPU, as the model takes it."""
    return hashlib.sha256(pixels.contiguous().numpy()).digest()


def _sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _merge_equal(files: list[ImageFile], pixels: Tensor) -> tuple[list[ImageFile], Tensor]:
    """Return the images without repetitions, in the same memory.

    pixels  one image per file, and possibly more rows, which are left out

    Raises InputError if files with the same pixels have different labels.
    """
    index: dict[str, int] = {}
    kept: list[ImageFile] = []
    for place, image in enumerate(files):
        own = index.setdefault(image.pixels_sha256, len(kept))
        if own == len(kept):
            if own != place:
                pixels[own] = pixels[place]
            kept.append(image)
            continue
        first = kept[own]
        if (first.label, first.new_label) != (image.label, image.new_label):
            raise InputError(
                f"{first.file} and {image.file} are the same image with different labels", "correct one of them"
            )
        kept[own] = replace(first, same_as=(*first.same_as, image.file))
    return kept, pixels[: len(kept)]


def class_indices(names: Sequence[str | None], class_names: Sequence[str], default: Tensor | None, what: str) -> Tensor:
    """Return the class index (n,) int64 of each name, or of its `default` where the name is None.

    names    names or numbers of classes; a name takes precedence over a number. Where all names of classes are numbers,
             such as 1, 2, … or 001, 002, …, other numbers are no classes
    default  (n,) int64, or None if every image has a name
    what     "label" or "new_label", for messages

    Raises InputError for a name that no class has, or several classes have.
    """
    normal = [normal_form(name) for name in class_names]
    known = {name: index for index, name in enumerate(normal)}
    ambiguous = {name for name, count in Counter(normal).items() if count > 1}
    are_indices = known.keys() == set(map(str, range(len(normal))))
    are_numbers = all(map(is_number, normal)) and not are_indices
    indices = []
    for position, name in enumerate(None if name is None else normal_form(name) for name in names):
        if name is None:
            indices.append(int(default[position]))
        elif name in ambiguous:
            advice = "give other names with --class-names" if are_numbers else "give the number of the class"
            raise InputError(f"{what} {name!r} is the name of several classes", advice)
        elif name in known:
            indices.append(known[name])
        elif is_number(name) and int(name) < len(class_names) and not are_numbers:
            indices.append(int(name))
        else:
            number = f"a number from 0 to {len(class_names) - 1}"
            example = f"a name such as {', '.join(map(repr, list(class_names)[:3]))}"
            expected = number if are_indices else example if are_numbers else f"{example}, or {number}"
            advice = ["name the classes with --class-names"] if are_indices else []
            raise InputError(f"{what} {name!r} is not a class of the model", f"expected {expected}", *advice)
    return torch.tensor(indices)
