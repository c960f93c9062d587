"""Read and check the records of result folders. A file that cannot be used is reported with the reason."""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
import json
from pathlib import Path

from torch import Tensor

from l2ul.common.errors import InputError
from l2ul.common.markup import markdown_text
from l2ul.common.text import read_text
from l2ul.data import forget_set
from l2ul.experiments import records
from l2ul.experiments.records import Record

MOST_IMAGES = 2**24  # of a training set whose choice of D_f is drawn again
MOST_BYTES = 2**28  # of a list of D_f
# Records of older versions lack these keys, which the tables read.
LATER_KEYS = ("age_grouping", "continual_size", "retain_sample", "checkpoint", "forget_sha256")


def run_folders(folders: Iterable[Path]) -> list[Path]:
    """Return the `runs` folder of each folder or, where it has none, those of its subfolders.

    Raises InputError if a folder has neither.
    """
    run_dirs = []
    for folder in folders:
        runs = [folder / "runs"] if (folder / "runs").is_dir() else sorted(folder.glob("*/runs"))
        if not runs:
            raise InputError(
                f"{folder} has no folder runs, and no folder in it has one",
                "name with --result-dir a folder that main_unlearn.py wrote to",
            )
        run_dirs += runs
    return list(dict.fromkeys(run_dirs))


def read(folders: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Read the records of result folders.

    Returns the records, each run once, and a sentence for each file that was left out. Three keys are added to each
    record: `result_dir` and `forget_file`, the paths that belong to it, and `listed`, which is true if D_f is known not
    to be the choice of the seed.

    Raises InputError if there is no record file at all.
    """
    runs = run_folders(folders)
    paths = [path for folder in runs for path in sorted(folder.glob("*.json"))]
    if not paths:
        raise InputError(f"there is no record in {' '.join(map(str, runs))}", "make records with main_unlearn.py")
    return read_files(paths)


def read_files(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Read records from files, see `read`. Of several records of a run, the first that did not fail is used."""
    problems: list[str] = []
    runs: dict[str, list[tuple[Path, Record]]] = defaultdict(list)  # several of one identity if images have changed
    for path in paths:
        try:
            record = _load(path)
        except InputError as error:
            problems.append(f"{path}: {error}")
            continue
        alike = runs[_identity(record)]
        place = next((place for place, (_, twin) in enumerate(alike) if _have_same_images(twin, record)), None)
        if place is None:
            alike.append((path, record))
            continue
        kept, twin = alike[place]
        if twin["status"] == records.FAILED != record["status"]:
            alike[place] = (path, record)
            kept, path = path, kept
        problems.append(f"{path}: the same run as {kept}; it is counted once")
    return [_with_paths(path, record) for alike in runs.values() for path, record in alike], problems


def _load(path: Path) -> Record:
    try:
        record = json.loads(read_text(path, records.MOST_BYTES), parse_constant=_refuse)
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text that can be written
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError("is not JSON", "the file is damaged or incomplete") from None
    reason = next(records.problems(record), None)
    if reason:
        raise InputError(reason)
    if "decoder" in record:  # older records have the number of files that the GPU refused here: gpu, 2 files cpu
        record["decoder"] = record["decoder"].partition(",")[0]
    return dict.fromkeys(LATER_KEYS) | record


def _refuse(constant: str):
    raise InputError(f"holds {constant}", "a record has finite numbers only")


def _identity(record: Record) -> str:
    """Return the same text for two records of one run. Settings may be absent in older records."""
    chosen = records.stated(records.settings(record), record["dataset"])
    about = {name: record.get(name) for name in (*records.IDENTITY, "surrogate_sha256")}
    return json.dumps([about, chosen], sort_keys=True)


def _have_same_images(first: Record, second: Record) -> bool:
    """Return whether D_r and D_test of two records are the same, as far as is known: older records lack the hash."""
    hashes = {record["data_sha256"] for record in (first, second) if record.get("data_sha256")}
    return len(hashes) < 2


def _with_paths(path: Path, record: Record) -> Record:
    file = path.with_suffix(".txt")
    added = {"result_dir": str(path.parent.parent), "forget_file": str(file), "listed": _is_listed(file, record)}
    return record | added


def _is_listed(file: Path, record: Record) -> bool | None:
    """Return True if the indices beside a record differ from the seed's choice, None if they agree or are unknown.

    In a continual run, the file has the images of all steps so far, which are the choice for their sum.
    """
    total = record.get("num_train")
    if total is None or not record["k"] < total <= MOST_IMAGES:
        return None
    try:
        indices = [int(line) for line in read_text(file, MOST_BYTES).split()]
    except (OSError, ValueError):  # the file is absent, or names images that are not training images
        return None
    return True if indices != _choice(total, record["seed"])[: record["k"]].tolist() else None


@lru_cache(maxsize=8)
def _choice(total: int, seed: int) -> Tensor:
    return forget_set.choose_forget(total, total - 1, seed)


def problem_section(problems: list[str]) -> str:
    """Return a Markdown section that lists the files that were left out; "" if there are none."""
    listed = "".join(f"- {markdown_text(line)}\n" for line in problems)
    return f"## Problems: files that are not in the tables\n\n{listed}" if problems else ""
