"""Whether a report still tells the truth: hashes, signature, the chain of requests, images that are to be forgotten."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
import json
from pathlib import Path
import shutil

from l2ul import signature
from l2ul.errors import InputError
from l2ul.files import REPORT, file_sha256
from l2ul.report import Report
from l2ul.request import Item

EARLIER = "earlier"  # folder of the reports of earlier requests, beside a report


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it holds, and what was found."""

    what: str
    holds: bool
    found: str


def read_report(path: Path) -> Report:
    """A report; InputError where the file is none."""
    try:
        report = json.loads(path.read_text())
        if {"tool", "asked", "model", "images", "earlier"} <= report.keys():
            return report
    except (OSError, ValueError, AttributeError):
        pass
    raise InputError(f"{path} is no report of a request; name the report.json that main_forget.py wrote")


def check_files(report: Report, folder: Path, model: Mapping[str, str]) -> list[Check]:
    """The files that a report tells the hashes of: the page beside it, and the model's, now in `model`."""
    told = report["model"]["after"]["files"]
    same = dict(model) == told
    checks = [Check("model", same, "unchanged" if same else _difference(told, model))]
    for name, sha256 in report["files"].items():
        there = (folder / name).is_file()
        same = there and file_sha256(folder / name) == sha256
        checks.append(Check(name, same, "unchanged" if same else "changed" if there else "missing"))
    return checks


def _difference(told: Mapping[str, str], found: Mapping[str, str]) -> str:
    names = sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))
    return f"not the model of the report: {', '.join(names)}"


def check_signature(path: Path, key=None) -> list[Check]:
    """The signature beside a report; nothing where there is none and no key is given that it should be by."""
    beside = path.with_name(path.name + signature.SUFFIX)
    if not beside.is_file():
        return [Check("signature", False, "missing")] if key else []
    found = signature.signed_by(path.read_bytes(), beside.read_text(), key)
    if found is None:
        return [Check("signature", False, "wrong: the report was changed, or another key signed it")]
    whose = "the given key" if key else "the key that came with it, whose owner nothing here tells"
    return [Check("signature", True, f"right, by {whose} (sha256 {found})")]


def chain_of(folder: Path) -> list[dict[str, object]]:
    """What the next report says of this folder's report and of those before it."""
    last = read_report(folder / REPORT)
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

    Each request has to begin with the weights that the one before it ended with.
    """
    reports, checks = [], []
    for told in report["earlier"]:
        path = folder / told["file"]
        same = path.is_file() and file_sha256(path) == told["sha256"]
        checks.append(Check(told["file"], same, "unchanged" if same else "changed" if path.is_file() else "missing"))
        if same:
            reports.append(read_report(path))
    chain = [*reports, report]
    for number, (first, second) in enumerate(zip(chain, chain[1:], strict=False), start=1):
        same = first["model"]["after"]["weights_sha256"] == second["model"]["before"]["weights_sha256"]
        if not same:
            checks.append(Check(f"request {number + 1}", False, f"does not begin with the model of request {number}"))
    return reports, checks


@dataclass(frozen=True)
class Wanted:
    """An image that is to be forgotten by what a report says, the class that this is about, and its file's hash."""

    request: int
    file: str
    sha256: str
    label: int
    new_label: int | None

    def forgotten(self, called: int) -> bool:
        return called != self.label if self.new_label is None else called == self.new_label


def wanted(reports: Iterable[Report]) -> dict[str, Wanted]:
    """What is to be forgotten after these requests by the hash of its pixels: the last request counts for an image."""
    return {
        image["pixels_sha256"]: Wanted(number, *(image[key] for key in ("file", "sha256", "label", "new_label")))
        for number, report in enumerate(reports, start=1)
        for image in report["images"]
    }


def check_images(wanted: Mapping[str, Wanted], called: Iterable[tuple[Item, int]]) -> list[Check]:
    """Whether images are still forgotten, a check a request; images that no request was about are passed over.

    called  images and the class that the model gives each. They are known by their pixels, or where these are decoded
            otherwise on this machine, by their files.
    """
    now: dict[str, int] = {}
    for item, found in called:
        now |= {item.pixels_sha256: found, item.sha256: found}
    checks = []
    for request in sorted({one.request for one in wanted.values()}):
        asked = [(one, now.get(key, now.get(one.sha256))) for key, one in wanted.items() if one.request == request]
        absent = [one.file for one, found in asked if found is None]
        back = [one.file for one, found in asked if found is not None and not one.forgotten(found)]
        text = f"{len(asked) - len(back) - len(absent)} of {len(asked)} images forgotten"
        text += f"; not forgotten: {_some(back)}" if back else ""
        text += f"; not among the images given: {_some(absent)}" if absent else ""
        checks.append(Check(f"images of request {request}", not back and not absent, text))
    return checks


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
