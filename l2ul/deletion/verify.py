"""Whether a report still tells the truth: hashes, signature, the chain of requests, images that are to be forgotten."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
import inspect
import json
import math
from pathlib import Path
import shutil

from torch import Tensor

from l2ul.common.errors import InputError
from l2ul.common.files import REPORT, file_sha256
from l2ul.deletion import signature
from l2ul.deletion.report import FORGET_LIST, PAGE, Report, forget_list
from l2ul.deletion.request import Item

EARLIER = "earlier"  # folder of the reports of earlier requests, beside a report


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it holds (None: that cannot be told), and what was found."""

    what: str
    holds: bool | None
    found: str


def _mean(value: object) -> bool:
    """Whether this is a number a channel, or None."""
    whole = _fits(value, [int | float]) and len(value) == 3
    return value is None or (whole and all(map(math.isfinite, value)))


def _std(value: object) -> bool:
    return value is None or (_mean(value) and min(value) > 0)


def _size(value: object) -> bool:
    return value is None or (isinstance(value, int) and value > 0)


# What is relied upon of a report: of a dictionary some keys, of a list what each entry is, else a type or a function.
SHAPE = {
    "tool": dict,
    "made": str,
    "asked": {"goal": str},
    "model": {
        "opened_by": {"model": str, "image_size": _size, "mean": _mean, "std": _std},
        "classes": [str],
        "before": {"weights_sha256": str},
        "after": {"weights_sha256": str, "files": dict},
    },
    "images": [
        {
            "file": str,
            "sha256": str,
            "pixels_sha256": str,
            "label": int,
            "new_label": int | None,
            "forgotten": bool,
        }
    ],
    "files": {PAGE: str, FORGET_LIST: str},
    "earlier": [{"file": str, "sha256": str, "made": str, "images": int, "forgotten": int}],
}


def _fits(value: object, shape: dict | list | type | Callable[[object], bool]) -> bool:
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(name in value and _fits(value[name], shape[name]) for name in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(one, shape[0]) for one in value)
    return shape(value) if inspect.isfunction(shape) else isinstance(value, shape)


def read_report(path: Path) -> Report:
    """A report; InputError where the file is none, or names other files than a report does."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        report = None
    if _fits(report, SHAPE) and report["images"] and report["files"].keys() == SHAPE["files"].keys():
        names = [f"{EARLIER}/{number}.json" for number in range(1, len(report["earlier"]) + 1)]
        if names == [told["file"] for told in report["earlier"]]:
            return report
    raise InputError(f"{path} is no report of a request; name the report.json that main_forget.py wrote")


def check_files(report: Report, folder: Path, model: Mapping[str, str]) -> list[Check]:
    """The files that a report tells the hashes of: the page and the list beside it, and the model's, now in `model`."""
    told = report["model"]["after"]["files"]
    same = dict(model) == told
    checks = [Check("model", same, "unchanged" if same else _difference(told, model))]
    for name, sha256 in report["files"].items():
        there = (folder / name).is_file()
        same = there and file_sha256(folder / name) == sha256
        checks.append(Check(name, same, "unchanged" if same else "changed" if there else "missing"))
        if name == FORGET_LIST and same and (folder / name).read_text(encoding="utf-8") != forget_list(report):
            checks[-1] = Check(name, False, "says otherwise than the report")
    return checks


def check_weights(report: Report, found: str | None) -> Check:
    """Whether the weights are those of the report by their hash; None: the model could not be opened."""
    if found is None:
        return Check("weights", None, "not looked at: name by --build what builds the model")
    same = found == report["model"]["after"]["weights_sha256"]
    return Check("weights", same, "those of the report" if same else "not those of the report")


def _difference(told: Mapping[str, str], found: Mapping[str, str]) -> str:
    names = sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))
    return f"not the model of the report: {', '.join(names)}"


def check_signature(path: Path, key=None) -> Check:
    """The signature beside a report, which has to be by the key where one is given."""
    beside, what = path.with_name(path.name + signature.SUFFIX), f"signature of {path.name}"
    if not beside.is_file():
        if key:
            return Check(what, False, "missing")
        return Check(what, None, "none: nothing tells who wrote this report, nor whether it was changed")
    found = signature.signed_by(path.read_bytes(), beside.read_bytes(), key)
    if found is None:
        return Check(what, False, "wrong: the report was changed, or another key signed it")
    whose = "the given key" if key else "the key that came with it, whose owner nothing here tells"
    return Check(what, True, f"right, by {whose} (sha256 {found})")


def chain(folder: Path) -> list[Report]:
    """The reports of all requests that led to the model in this folder, the first first.

    Raises InputError where one is missing or was changed: no report could be put behind it.
    """
    last = read_report(folder / REPORT)
    earlier, checks = earlier_reports(last, folder)
    broken = next((check for check in checks if check.holds is False), None)
    if broken:
        raise InputError(
            f"the chain of requests in {folder} is broken ({broken.what}: {broken.found}); put back what was written, "
            f"or begin anew with --checkpoint"
        )
    return [*earlier, last]


def next_earlier(last: Report, folder: Path) -> list[dict[str, object]]:
    """What the next report says of this folder's last report and of those before it."""
    gone = sum(image["forgotten"] for image in last["images"])
    told = {"file": f"{EARLIER}/{len(last['earlier']) + 1}.json", "sha256": file_sha256(folder / REPORT)}
    return [*last["earlier"], told | {"made": last["made"], "images": len(last["images"]), "forgotten": gone}]


def copy_chain(folder: Path, last: Path) -> None:
    """Put this folder's report as `last`, those before it beside that, each with its signature."""
    last.parent.mkdir()
    for path in (folder / EARLIER).glob("*.json*"):
        shutil.copy(path, last.parent)
    for path in folder.glob(f"{REPORT}*"):
        shutil.copy(path, last.parent / path.name.replace(REPORT, last.name))


def earlier_reports(report: Report, folder: Path) -> tuple[list[Report], list[Check]]:
    """The reports of earlier requests, the first first, and whether they are whole and lead to this one.

    Each request has to begin with the weights that the one before it ended with. A signature of an earlier report may
    be by another key: it is the last report that tells which earlier ones there were.
    """
    reports, checks = [], []
    for told in report["earlier"]:
        path = folder / told["file"]
        same = path.is_file() and file_sha256(path) == told["sha256"]
        checks.append(Check(told["file"], same, "unchanged" if same else "changed" if path.is_file() else "missing"))
        if same:
            reports.append(read_report(path))
        if path.with_name(path.name + signature.SUFFIX).is_file() and path.is_file():
            checks.append(check_signature(path))
    chained = [*reports, report]
    for number, (first, second) in enumerate(zip(chained, chained[1:], strict=False), start=1):
        same = first["model"]["after"]["weights_sha256"] == second["model"]["before"]["weights_sha256"]
        if not same:
            checks.append(Check(f"request {number + 1}", False, f"does not begin with the model of request {number}"))
    return reports, checks


def first_labels(reports: Iterable[Report], items: Sequence[Item], new_labels: Tensor | None) -> list[int | None]:
    """The class that each image had when it was first asked for, by its pixels or else its file; None: it was not.

    new_labels  (k,) what the images shall be called: None too for one that shall be called again what it was at first
    """
    found: dict[str, int] = {}
    for report in reports:
        for image in report["images"]:
            for key in ("pixels_sha256", "sha256"):
                found.setdefault(image[key], image["label"])
    then = [found.get(item.pixels_sha256, found.get(item.sha256)) for item in items]
    new = [None] * len(then) if new_labels is None else new_labels.tolist()
    return [None if old == wanted else old for old, wanted in zip(then, new, strict=True)]


@dataclass(frozen=True)
class Wanted:
    """An image that is to be forgotten by what a report says, and the class that this is about.

    superseded  a later request wants what cannot hold as well
    """

    request: int
    file: str
    sha256: str
    pixels_sha256: str
    label: int
    new_label: int | None
    superseded: bool = False

    def forgotten(self, called: int) -> bool:
        return called != self.label if self.new_label is None else called == self.new_label


def wanted(reports: Iterable[Report]) -> list[Wanted]:
    """What is to be forgotten after these requests, the last one's first: all they asked for that can hold together."""
    found: list[Wanted] = []
    allowed: dict[str, set[int]] = {}  # what an image may still be called
    keys = ("file", "sha256", "pixels_sha256", "label", "new_label")
    for number, report in reversed(list(enumerate(reports, start=1))):
        for image in report["images"]:
            one = Wanted(number, *(image[key] for key in keys))
            classes = allowed.get(one.pixels_sha256, range(len(report["model"]["classes"])))
            left = {called for called in classes if one.forgotten(called)}
            found.append(replace(one, superseded=not left))
            allowed[one.pixels_sha256] = left or classes
    return found


def check_images(wanted: Iterable[Wanted], called: Iterable[tuple[Item, int]]) -> list[Check]:
    """Whether images are still forgotten, a check a request; images that no request was about are passed over.

    called  images and the class that the model gives each. They are known by their pixels, or where these are decoded
            otherwise on this machine, by their files.
    """
    now: dict[str, int] = {}
    for item, found in called:
        now |= {item.pixels_sha256: found, item.sha256: found}
    requests: dict[int, list[Wanted]] = {}
    for one in wanted:
        requests.setdefault(one.request, []).append(one)
    return [_of_request(number, requests[number], now) for number in sorted(requests)]


def _of_request(number: int, wanted: list[Wanted], now: Mapping[str, int]) -> Check:
    asked = [(one, now.get(one.pixels_sha256, now.get(one.sha256))) for one in wanted if not one.superseded]
    absent = [one.file for one, found in asked if found is None]
    back = [one.file for one, found in asked if found is not None and not one.forgotten(found)]
    text = f"{len(asked) - len(back) - len(absent)} of {len(asked)} images forgotten"
    text += f"; not forgotten: {_some(back)}" if back else ""
    text += f"; not among the images given: {_some(absent)}" if absent else ""
    text += f"; {len(wanted) - len(asked)} were later to be called otherwise" if len(wanted) > len(asked) else ""
    return Check(f"images of request {number}", not back and not absent, text)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
