"""The schema of `report.json`: its keys, their types, and a check of a file against them.

The TypedDict classes are the only description of the format. `read_report` checks a file against them with
`find_error`. A key that verification or a later request relies on is required. All others are `NotRequired`, so that
reports of earlier versions stay readable. Unknown keys are allowed.
"""

from collections.abc import Callable
from dataclasses import dataclass
import datetime
import json
from pathlib import Path
import types
from typing import Annotated, Any, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from l2ul.common.choices import EXIF_ORIENTATIONS, PRECISIONS
from l2ul.common.errors import InputError

REPORT = "report.json"  # the report, in the folder of the unlearned model
PAGE, FORGET_LIST = "report.html", "forget_list.csv"  # files beside report.json
FORGOTTEN, NOT_RECOGNISED, STILL_RECOGNISED = "forgotten", "not recognised before", "still recognised"  # of images
EARLIER = "earlier"  # folder beside report.json with the reports of earlier requests: 1.json, 2.json, …

AS_USED, AS_STORED = "as used", "as stored"  # what counts as forgotten in a request


@dataclass(frozen=True)
class Rule:
    """A condition on a value, for use in `Annotated`."""

    expected: str
    holds: Callable[[Any], bool]


PIXELS = Rule("a whole number from 1 to 65536", lambda value: 1 <= value <= 65536)
PRECISION = Rule(" or ".join(PRECISIONS), lambda value: value in PRECISIONS)
READING = Rule(" or ".join(EXIF_ORIENTATIONS), lambda value: value in EXIF_ORIENTATIONS)
POSITIVE = Rule("a number above 0", lambda value: value > 0)
CLASS = Rule("the number of a class", lambda value: 0 <= value < 2**31)
ONE_PER_CHANNEL = Rule("1 or 3 numbers, one per channel", lambda values: len(values) in (1, 3))
POSITIVE_PER_CHANNEL = Rule("1 or 3 numbers above 0", lambda values: len(values) in (1, 3) and min(values) > 0)
OUTPUTS = Rule('"logits" or "probabilities"', lambda value: value in ("logits", "probabilities"))
STATE = Rule(
    f"{FORGOTTEN!r}, {NOT_RECOGNISED!r} or {STILL_RECOGNISED!r}",
    lambda value: value in (FORGOTTEN, NOT_RECOGNISED, STILL_RECOGNISED),
)
OUTCOMES = REMOVED, PARTLY_REMOVED, NOT_REMOVED, NOTHING_TO_REMOVE = (  # of a request, see `states.Counts.outcome`
    "removed from predictions",
    "partly removed from predictions",
    "not removed from predictions",
    "nothing to remove",
)
OUTCOME = Rule(", ".join(OUTCOMES), lambda value: value in OUTCOMES)
ACTIONS = ("deleted", "replaced", "informed", "kept", "open")  # open: to be decided or still to be done
ACTION = Rule(f"one of {', '.join(ACTIONS)}", lambda value: value in ACTIONS)
COUNTED = Rule(f"{AS_USED!r} or {AS_STORED!r}", lambda value: value in (AS_USED, AS_STORED))
NOT_EMPTY = Rule("at least one entry", bool)
NOT_BLANK = Rule("text that is not empty", str.strip)


def is_date(text: str) -> bool:
    """Return whether a text is a date such as 2026-11-20."""
    try:
        return len(text) == 10 and bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


DATE = Rule("a date such as 2026-11-20", is_date)
NUMBERED = Rule(
    f"the files {EARLIER}/1.json, {EARLIER}/2.json, … in this order",
    lambda rows: [row["file"] for row in rows] == [f"{EARLIER}/{n}.json" for n in range(1, len(rows) + 1)],
)


class Tool(TypedDict):
    """Versions of the software that wrote the report."""

    name: NotRequired[str]
    version: NotRequired[str]
    method_version: NotRequired[int]
    python: NotRequired[str]
    torch: NotRequired[str]
    torchvision: NotRequired[str]


class UnreadableRow(TypedDict):
    """A file of the request that is not a readable image."""

    file: str
    why: str


class SurrogateRow(TypedDict):
    """The images of --surrogate: name of the folder, their number, and a hash of their pixels in order."""

    folder: str
    images: int
    sha256: str


class RequestRow(TypedDict):
    """The request: name of the image folder, goal, source of the labels, settings.

    request_id, controller, requested_on
                                   the operator's reference, who is responsible for the request, and its date
    exif_orientation, white_level  how image files were read, see `ImageReader`; images of reports without them were
                                   turned upright
    counted                        whether images count as forgotten as they are stored, or only if also as used
    label_notes                    sentences about images whose label may not be their class
    image_notes                    sentences about images that other software may read differently
    """

    goal: str
    request_id: NotRequired[str | None]
    controller: NotRequired[str | None]
    requested_on: NotRequired[Annotated[str, DATE] | None]
    images: NotRequired[str]
    labels: NotRequired[str]
    label_notes: NotRequired[list[str]]
    left_out: NotRequired[list[UnreadableRow]]
    method: NotRequired[str]
    minutes: NotRequired[float]
    seed: NotRequired[int]
    also: NotRequired[list[str]]
    counted: NotRequired[Annotated[str, COUNTED]]
    surrogate: NotRequired[SurrogateRow | None]
    exif_orientation: NotRequired[Annotated[str, READING]]
    white_level: NotRequired[Annotated[float, POSITIVE] | None]
    image_notes: NotRequired[list[str]]


class OpenedBy(TypedDict):
    """Arguments that open the model again. `model` is a name, `hf:` or `timm:` for a folder, or `build` for --build.

    outputs  "probabilities" if the model returns them: their logarithms are the logits of the report
    preset   the name of torchvision's weights whose resizing is used, if not the first ones
    """

    model: str
    image_size: Annotated[int, PIXELS] | None
    mean: Annotated[list[float], ONE_PER_CHANNEL] | None
    std: Annotated[list[float], POSITIVE_PER_CHANNEL] | None
    outputs: NotRequired[Annotated[str, OUTPUTS]]
    preset: NotRequired[str]


class ModelHashes(TypedDict):
    """Hex sha256 of the weights."""

    weights_sha256: str
    files: NotRequired[dict[str, str]]


class WrittenModelHashes(ModelHashes):
    """Hex sha256 of the weights and of each model file in the output folder."""

    files: dict[str, str]


class ModelRow(TypedDict):
    """The model before and after the request.

    left_out   entries of the checkpoint that were not written again
    not_read   files of the model's folder and entries of its weights that were not read
    unreached  weights that no gradient of the predictions for the images reaches, see `preflight.unreached_weights`
    """

    opened_by: OpenedBy
    classes: list[str]
    before: ModelHashes
    after: WrittenModelHashes
    left_out: NotRequired[list[str]]
    not_read: NotRequired[list[str]]
    unreached: NotRequired[list[str]]


class ImageRow(TypedDict):
    """An image of the request: its hashes, its labels, and the predictions of the model before and after.

    sha256, pixels_sha256  of the file, and of the RGB image as decoded for the request
    same_as                files with the same pixels
    called_*               predicted class; confidence_* is its probability
    label_confidence_*     probability of `label`
    was_called             whether the model predicted `label` before the request
    state                  "forgotten": the model predicted `label` before, for the image or a changed copy that had
                           to be forgotten too, and the request is fulfilled; "not recognised before": it did not;
                           "still recognised": the request is not fulfilled. An image that the model recognised before
                           an earlier request, and that was not yet forgotten as used, counts as predicted if the
                           request counts images as used
    forgotten              whether the state is "forgotten"; in reports without states, whether the request is fulfilled
    forgotten_as_stored    whether the request is fulfilled for the image as it is stored, including copies of --also
    forgotten_as_used      whether it is also fulfilled as the image is used, see `metrics.robustness`
    copies_forgotten       share of the random changed copies for which it is fulfilled
    forgotten_earlier      whether an earlier request made the image forgotten
    back_after             fine-tuning steps until the model predicts `label` again; null: it did not
    survives               by the name of a change: whether the image is still forgotten under it
    """

    file: str
    sha256: str
    pixels_sha256: str
    label: Annotated[int, CLASS]
    new_label: Annotated[int, CLASS] | None
    forgotten: bool
    same_as: NotRequired[list[str]]
    called_before: NotRequired[int]
    confidence_before: NotRequired[float]
    label_confidence_before: NotRequired[float]
    called_after: NotRequired[int]
    confidence_after: NotRequired[float]
    label_confidence_after: NotRequired[float]
    was_called: NotRequired[bool]
    state: NotRequired[Annotated[str, STATE]]
    forgotten_as_stored: NotRequired[bool]
    forgotten_as_used: NotRequired[bool]
    copies_forgotten: NotRequired[float]
    forgotten_earlier: NotRequired[bool]
    back_after: NotRequired[int | None]
    survives: NotRequired[dict[str, bool]]


class AgreementRow(TypedDict):
    """Agreement with the original model on a set of images, in percent, with its 95 % interval."""

    name: str
    percent: float
    low: float
    high: float
    count: int


class RelearningRow(TypedDict):
    """Fine-tuning on the forgotten images: steps taken, images predicted as their label again, learning rate."""

    steps: int
    back: int
    lr: float


class RecalibrationRow(TypedDict):
    """Percent of D_f predicted as its label when batch-norm is recalibrated on other images.

    images, count   on which: their kind and number
    before, after   of the unlearned model, before and after the recalibration
    original_after  of the original model after it
    """

    images: str
    count: int
    before: float
    after: float
    original_after: float


class MembershipRow(TypedDict):
    """Membership inference: number of reference images, then metrics by attack, in percent."""

    references: int
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]


class PrecisionRow(TypedDict):
    """Floating-point precision of the passes: of the search for settings, and of all that the report states."""

    search: Annotated[str, PRECISION]
    checks: str


class CandidateRow(TypedDict):
    """A candidate of the search: settings that differ from the first candidate's, and what they achieved."""

    changed: dict[str, Any]
    status: str
    steps: int
    seconds: float
    forgotten: int
    kept: list[AgreementRow]


class SecondsRow(TypedDict):
    """Seconds of the whole command and of all candidates together."""

    total: float
    trials: float


class EarlierRow(TypedDict):
    """The report of an earlier request on the same model."""

    file: str
    sha256: str
    made: str
    images: int
    forgotten: int


class InventoryRow(TypedDict):
    """A copy of the model or the images that exists beside the written model, or a recipient of the model.

    action  what was done about it
    """

    name: Annotated[str, NOT_BLANK]
    action: Annotated[str, ACTION]
    location: NotRequired[str]
    date: NotRequired[Annotated[str, DATE]]
    note: NotRequired[str]


class Inventory(TypedDict):
    """Statements of the operator about what else contains the images, and who was informed. They are not checked."""

    original_models: NotRequired[list[InventoryRow]]
    backups: NotRequired[list[InventoryRow]]
    derived_models: NotRequired[list[InventoryRow]]
    quantised_models: NotRequired[list[InventoryRow]]
    recipients: NotRequired[list[InventoryRow]]


class AgainRow(TypedDict):
    """How to repeat the request.

    command  the words after `main_forget.py`, with all settings of the model that was written. Its weights must have
             the hash `model.after.weights_sha256`
    """

    command: list[str]


FileHashes = TypedDict("FileHashes", {PAGE: str, FORGET_LIST: str})  # hex sha256


class Report(TypedDict):
    """All of `report.json`. Times are in seconds, probabilities in [0,1], all other shares in percent."""

    outcome: NotRequired[Annotated[str, OUTCOME]]
    tool: Tool
    made: str  # UTC, ISO 8601
    asked: RequestRow
    model: ModelRow
    images: Annotated[list[ImageRow], NOT_EMPTY]
    files: FileHashes
    earlier: Annotated[list[EarlierRow], NUMBERED]
    damage: NotRequired[list[AgreementRow]]
    robustness: NotRequired[dict[str, int | None]]  # images still forgotten by the name of the change
    recalibration: NotRequired[RecalibrationRow | None]  # null: the model has no batch-norm
    relearning: NotRequired[RelearningRow | None]
    membership: NotRequired[MembershipRow | None]
    trials: NotRequired[list[CandidateRow]]  # best first
    search_end: NotRequired[str | None]  # why the search ended before the time limit, or what to do if time was short
    chosen: NotRequired[dict[str, Any] | None]  # settings of the candidate that was written; null: model unchanged
    not_claimed: NotRequired[list[str]]
    threats: NotRequired[dict[str, str]]  # by test: what it stands for
    inventory: NotRequired[Inventory | None]  # null: the operator gave none
    again: NotRequired[AgainRow]
    seconds: NotRequired[SecondsRow]
    peak_memory_mib: NotRequired[float | None]
    device: NotRequired[str]
    precision: NotRequired[PrecisionRow]


def read_report(path: Path) -> Report:
    """Return the report in a file. Raise InputError if the file is not one, naming the first difference."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        error = find_error(report, Report)
    except (OSError, ValueError, RecursionError) as failure:
        error = getattr(failure, "strerror", None) or "the file is not JSON text"
    if error:
        raise InputError(
            f"{path} is not a report of a deletion request ({error})", "give the report.json that main_forget.py wrote"
        )
    return report


LARGEST = 1e300  # of a number, so that it can be converted to a float
NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def find_error(value: object, expected: Any, place: str = "") -> str | None:
    """Return where and how a JSON value differs from a type, in words; None if it fits.

    expected  a TypedDict, `list[T]`, `dict[str, T]`, a union, `Annotated[T, Rule, …]`, `Any`, None or one of NAMES
    place     the path of keys to the value, such as `images[0].label`

    Numbers must be finite, a float may be written as a whole number, and `true` is not a number.
    """
    kind, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return None
    if kind is NotRequired:
        return find_error(value, arguments[0], place)
    if kind is Annotated:
        failed = (_differs(value, rule.expected, place) for rule in arguments[1:] if not rule.holds(value))
        return find_error(value, arguments[0], place) or next(failed, None)
    if kind in (Union, types.UnionType):
        errors = [find_error(value, one, place) for one in arguments]
        return None if None in errors else errors[0]
    if is_typeddict(expected):
        return _find_in_keys(value, expected, place) if isinstance(value, dict) else _differs(value, NAMES[dict], place)
    if kind is list and isinstance(value, list):
        return _first(find_error(one, arguments[0], f"{place}[{index}]") for index, one in enumerate(value))
    if kind is dict and isinstance(value, dict):
        return _first(find_error(one, arguments[1], f"{place}.{key}") for key, one in value.items())
    fits = not kind and _is_plain(value, expected)
    return None if fits else _differs(value, NAMES.get(kind or expected, "null"), place)


def _find_in_keys(value: dict[str, object], expected: Any, place: str) -> str | None:
    """`find_error` for a TypedDict."""
    missing = sorted(expected.__required_keys__ - value.keys())
    if missing:
        return f"{f'{place}.{missing[0]}'.lstrip('.')} is missing"
    hints = get_type_hints(expected, include_extras=True).items()
    return _first(find_error(value[key], hint, f"{place}.{key}".lstrip(".")) for key, hint in hints if key in value)


def _is_plain(value: object, expected: type) -> bool:
    if expected is float:
        return type(value) in (int, float) and abs(value) < LARGEST  # false for NaN
    return type(value) is expected


def _differs(value: object, expected: str, place: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return f"{place or 'the file'} is {shown}; expected {expected}"


def _first(errors) -> str | None:
    return next((error for error in errors if error), None)
