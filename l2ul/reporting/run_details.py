"""What the results page shows of each run: values of the record, the curve, and the forget set with predictions."""

from collections.abc import Callable, Iterable
import json
from pathlib import Path

import torch

from l2ul.common import pages
from l2ul.common.errors import InputError
from l2ul.common.text import is_number, read_text, shortened
from l2ul.data.images import Images
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.reporting import figure_data, figure_set, read_records

UNITS = {"percent": ", in percent"}  # after the meaning of a key, by its type
THUMBNAIL = 64  # pixels of the longer side, at most
MOST_THUMBNAILS = 4096  # on a page
MOST_POINTS = 200  # of a curve
MOST_CHARACTERS = 1000  # of a value of a record
DIGITS = 4  # of the values of a curve
ADDED = ("result_dir", "forget_file", "listed", "row", "differs")  # keys of `read_records` and `rows`, not of the file
FURTHER = "further keys"  # in place of the role of keys that the schema does not know
Report = Callable[[str], object]


def details(
    runs: Iterable[Record],
    data_dir: Path,
    with_thumbnails: bool = True,
    download: bool = False,
    report: Report = print,
    progress: Callable[[int], object] = lambda count: None,
) -> Record:
    """Return the details of runs as values for JSON. Runs refer by index to what several of them share.

    runs             runs of `rows.Block`s
    data_dir         folder with data sets, from which labels, names of classes and thumbnails are read
    with_thumbnails  whether images are shown
    download         whether these data sets may be downloaded
    report           called with a sentence for each data set that cannot be read
    progress         called with 1 for each run that was read

    The result has these keys:
    runs     of each run id, path of the record, goal, curve, predictions, notes on what is absent, and indices
             of the others
    values   parts of records, one for each role of their keys
    docs     the meaning of the keys
    forget   lists of the images of a D_f: indices in the training set, or folder and file
    sources  data sets: names of classes, and for each image label and thumbnail. The first images of each run have
             thumbnails if there are more than MOST_THUMBNAILS.
    """
    values, forget = {}, {}  # by JSON text, the indices of the values
    gallery, made = Gallery(data_dir, download, report), {}
    for run in runs:
        notes: list[str] = []
        names, before, after = _forget_set(run, notes)
        file = figure_data.path_of(run, ".json")
        name = file.stem if file.stem not in made else f"{file.stem}.{len(made)}"  # the name of files in two folders
        made[name] = {
            "id": name,
            "file": str(file),
            "goal": run["goal"],
            "values": {role: _index(values, part) for role, part in _by_role(run).items()},
            "curve": _curve(run, notes),
            "forget": _index(forget, names),
            "source": gallery.place(run, names, notes),
            "before": before,
            "after": after,
            "notes": notes,
        }
        progress(1)
    gallery.finish(with_thumbnails)
    values, forget = (list(map(json.loads, shared)) for shared in (values, forget))
    known = {name for part in values for name in part}
    docs = {name: key.doc + UNITS.get(key.type, "") for name, key in records.SCHEMA.items() if name in known}
    return {"runs": list(made.values()), "values": values, "docs": docs, "forget": forget, "sources": gallery.sources}


def _index(shared: dict[str, int], value: object) -> int:
    """Return the index of a value among those that runs share. It is added if it is new."""
    return shared.setdefault(json.dumps(value), len(shared))


def _by_role(run: Record) -> dict[str, Record]:
    """Return the values of a record that are not null, by the role of their keys."""
    parts: dict[str, Record] = {role: {} for role in (records.RESULT, records.COST, *records.ROLES, FURTHER)}
    for name, value in run.items():
        if value is not None and name not in ADDED:
            is_long = isinstance(value, str) and len(value) > MOST_CHARACTERS
            shown = shortened(value, MOST_CHARACTERS) if is_long else value
            parts[records.lookup(name).role or FURTHER][name] = shown
    return {role: part for role, part in parts.items() if part}


def _curve(run: Record, notes: list[str]) -> Record | None:
    """Return the steps of a curve and pairs of names and values, null where they are not finite."""
    if run["status"] == records.FAILED:
        return None
    try:
        table = figure_data.curve(figure_data.path_of(run, ".csv"))
    except InputError as error:
        notes.append(f"{error}.")
        return None
    table = figure_data.thinned(table, MOST_POINTS)
    terms = [[name, [_short(value) for value in table[name].tolist()]] for name in figure_data.measured(table)]
    return {"steps": table["step"].astype(int).tolist(), "terms": terms} if terms else None


def _short(value: float) -> float | int | None:
    if value != value:
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short


def _forget_set(run: Record, notes: list[str]) -> tuple[list[int | str], list[int] | None, list[int] | None]:
    """Return the images of D_f and the predictions for them, before and after: null if they are not there."""
    if run["status"] == records.FAILED:
        return [], None, None
    path, classes = figure_data.path_of(run, ".npz"), {}
    try:
        classes = figure_data.predictions(path, ("forget_before", "forget_after"))
    except InputError as error:
        notes.append(f"{error}." if path.is_file() else f"There are no predictions: {path} does not exist.")
    before, after = (classes[name].tolist() if name in classes else None for name in ("forget_before", "forget_after"))
    file = figure_data.path_of(run, ".txt")
    try:
        lines = read_text(file, read_records.MOST_BYTES).split("\n")
    except (OSError, UnicodeDecodeError):
        notes.append(f"The images of D_f are not known: {file} cannot be read.")
        lines = []
    names = [int(line) if is_number(line) else line for line in map(str.strip, lines) if line]
    count = max(len(some) for some in (before or (), after or (), () if before or after else names))
    return names[-count:] if count else [], before, after  # in a continual run, images of earlier steps come first


class Gallery:
    """The images of all D_f with their labels and thumbnails, each once.

    sources  what the page holds of each data set
    """

    def __init__(self, data_dir: Path, download: bool, report: Report):
        self.data_dir, self.download, self.report = data_dir, download, report
        self.sources: list[Record] = []
        self._images: list[Images] = []
        self._places: dict[str, tuple[int | None, str]] = {}
        self._first: dict[tuple[int, int], int] = {}  # of each image of a source, the first position in a D_f

    def place(self, run: Record, names: list[int | str], notes: list[str]) -> int | None:
        """Return the index of a run's data set, null if it cannot be read, and remember the images of its D_f."""
        if not names:
            return None
        keys = ("dataset", *figure_set.DATA_KEYS, "num_train", "mean", "exif_orientation", "white_level")
        key = json.dumps([run.get(name) for name in keys])
        if key not in self._places:
            self._places[key] = self._load(run)
        source, reason = self._places[key]
        if source is None:
            notes.append(reason)
            return None
        for position, name in enumerate(names):
            if isinstance(name, int) and name < len(self._images[source].train):
                self._first[source, name] = min(position, self._first.get((source, name), position))
        return source

    def _load(self, run: Record) -> tuple[int | None, str]:
        try:
            images = figure_set.load_images(run, self.data_dir, self.download)
        except InputError as error:
            reason = f"Images and labels of D_f are not shown: {error}."
            self.report(reason)
            return None, reason
        self._images.append(images)
        self.sources.append({"classes": images.classes, "images": {}})
        return len(self.sources) - 1, ""

    def finish(self, with_thumbnails: bool) -> None:
        """Add labels, and thumbnails of the images that are first in a D_f, to the sources."""
        for number, (source, index) in enumerate(sorted(self._first, key=self._first.get)):
            shown = with_thumbnails and number < MOST_THUMBNAILS
            label = int(self._images[source].train.labels[index])
            self.sources[source]["images"][index] = [label, self._thumbnail(source, index) if shown else None]

    def _thumbnail(self, source: int, index: int) -> str | None:
        try:
            image = self._images[source].train.images[index]
        except InputError:  # a file that is damaged or was deleted
            return None
        if image.shape[0] not in (1, 3):
            return None
        image = image if image.dtype == torch.uint8 else image.float().clamp(0, 1)
        return pages.thumbnail(image, min(THUMBNAIL, max(image.shape[1:])), "webp")
