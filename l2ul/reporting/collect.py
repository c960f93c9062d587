"""The records of result folders, each looked at closely: what cannot be used is named with the reason."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
import json
import math
from pathlib import Path

from torch import Tensor

from l2ul.common.choices import GOALS
from l2ul.common.errors import InputError
from l2ul.data import forget_set
from l2ul.experiments import defaults, records

# Records of older versions lack these.
LATER_KEYS = ("age_grouping", "continual_size", "retain_sample", "checkpoint")
TEXTS = ("dataset", "model", "method", "goal")
TEXTS_OR_NULL = ("age_grouping", "checkpoint", "checkpoint_sha256", "forget_sha256")
WHOLE_OR_NULL = ("continual_step", "continual_size", "retain_sample", "max_passes")
WHOLE = {"k": 1, "seed": 0, "steps": 0}  # and their least values
ABOUT = {  # what a run is of
    *("dataset", "age_grouping", "model", "method", "goal", "k", "seed", "forget_sha256"),
    *("continual_step", "continual_size"),
}
NOT_SETTINGS = ABOUT | {
    *("needs_retain", "checkpoint", "status", "steps", "peak_memory_mib", "device", "python", "torch", "torchvision"),
    *("retrained_sha256", "references_sha256", "error"),
    *("attack_batch_size", "test_batch_size", "retain_measured", "result_dir", "forget_file", "_path"),
}
HEADLINE = ("acc_forget", "acc_retain", "acc_test")


def run_folders(folders: Iterable[Path]) -> list[Path]:
    """The `runs` of each folder; where it has none, those of its subfolders. InputError where there are none."""
    found = []
    for folder in folders:
        runs = [folder / "runs"] if (folder / "runs").is_dir() else sorted(folder.glob("*/runs"))
        if not runs:
            raise InputError(
                f"{folder} holds no runs, nor does a folder in it; name with --result-dir what main_unlearn.py wrote to"
            )
        found += runs
    return list(dict.fromkeys(found))


def read(folders: Iterable[Path]) -> tuple[list[dict[str, object]], list[str]]:
    """Every record once, whatever the order of files, and a sentence for each file that could not be used.

    To each record are added its `_path`, the `result_dir` and `forget_file` that belong to it, and `listed`: whether
    D_f was not chosen by the seed.
    """
    runs = run_folders(folders)
    paths = [path for folder in runs for path in sorted(folder.glob("*.json"))]
    if not paths:
        raise InputError(f"there is no record in {' '.join(map(str, runs))}; make some with main_unlearn.py")
    return read_files(paths)


def read_files(paths: Iterable[Path]) -> tuple[list[dict[str, object]], list[str]]:
    """As `read`, of these files."""
    found, problems, first = [], [], {}
    for path in paths:
        try:
            record = _record(path)
        except InputError as error:
            problems.append(f"{path}: {error}")
            continue
        twin = first.setdefault(_identity(record), path)
        if twin is path:
            found.append(record | _origin(path, record))
        else:
            problems.append(f"{path}: the same run as {twin}, counted once")
    return found, problems


def _record(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text(), parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError("is not JSON; the file is damaged or cut off") from None
    reason = next(_faults(record), None)
    if reason:
        raise InputError(reason)
    return dict.fromkeys(LATER_KEYS) | record


def _refuse(constant: str):
    raise InputError(f"holds {constant}, which no record does")


def _faults(record: object) -> Iterator[str]:
    """What is wrong with what a file holds; nothing for a record."""
    if not isinstance(record, dict):
        yield "is not a record, which is a JSON object"
        return
    absent = [key for key in records.KEYS if key not in record]
    if absent:
        yield f"is not a whole record: it lacks {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}"
        return
    for key in TEXTS:
        if not isinstance(record[key], str):
            yield f"{key} is {record[key]!r}; expected text"
    if record["status"] not in records.STATUSES:
        yield f"status is {record['status']!r}; expected one of {', '.join(records.STATUSES)}"
    if record["goal"] not in GOALS:
        yield f"goal is {record['goal']!r}; expected one of {', '.join(GOALS)}"
    for key, least in WHOLE.items():
        if type(record[key]) is not int or record[key] < least:
            yield f"{key} is {record[key]!r}; expected a whole number of at least {least}"
    yield from _faulty_optional_values(record)
    yield from _faulty_values(record)


def _faulty_optional_values(record: dict[str, object]) -> Iterator[str]:
    given = {key: record[key] for key in (*TEXTS_OR_NULL, *WHOLE_OR_NULL) if record.get(key) is not None}
    for key, value in given.items():
        if key in TEXTS_OR_NULL and not isinstance(value, str):
            yield f"{key} is {value!r}; expected text or null"
        if key in WHOLE_OR_NULL and (type(value) is not int or value < 1):
            yield f"{key} is {value!r}; expected null or a whole number of at least 1"


def _faulty_values(record: dict[str, object]) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, list | dict):
            yield f"{key} holds several values; expected one"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}; expected a finite number"
        elif key.startswith("acc_") and value is not None and not (type(value) in (int, float) and 0 <= value <= 100):
            yield f"{key} is {value!r}; expected percent or null"
        elif key.startswith("metric_") and value is not None and type(value) not in (int, float):
            yield f"{key} is {value!r}; expected a number or null"
        elif key in HEADLINE and value is None and record["status"] not in (records.DIVERGED, records.FAILED):
            yield f"{key} is null though status is {record['status']}"


def is_setting(key: str) -> bool:
    """Whether a key of a record says how the run was to be done: not of what, not how it went, not on what machine."""
    return key not in NOT_SETTINGS and not key.startswith(("acc_", "metric_", "seconds_", "adv_success"))


def _identity(record: dict[str, object]) -> str:
    """The same for two records of one run. Older records lack settings that came later and have their defaults."""
    usual = {key: defaults.default(record["dataset"], key) for key in defaults.COMMON_DEFAULTS}
    chosen = {
        key: value for key, value in record.items() if is_setting(key) and value is not None and value != usual.get(key)
    }
    return json.dumps([{key: record.get(key) for key in sorted(ABOUT)}, chosen], sort_keys=True)


def _origin(path: Path, record: dict[str, object]) -> dict[str, object]:
    file = path.with_suffix(".txt")
    places = {"_path": str(path), "result_dir": str(path.parent.parent), "forget_file": str(file)}
    return places | {"listed": _is_listed(file, record)}


def _is_listed(file: Path, record: dict[str, object]) -> bool | None:
    """Whether the indices beside a record are others than its seed gives; None where they are those, or not known."""
    total = record.get("num_train")
    if record["continual_step"] is not None or type(total) is not int or record["k"] >= total:
        return None
    try:
        indices = [int(line) for line in file.read_text().split()]
    except (OSError, ValueError):  # moved away, or names of images that are no training images
        return None
    return True if indices != _order(total, record["seed"])[: record["k"]].tolist() else None


@lru_cache(maxsize=8)
def _order(total: int, seed: int) -> Tensor:
    return forget_set.choose_forget(total, total - 1, seed)
