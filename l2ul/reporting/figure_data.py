"""What figures show: which runs, the files beside these, and tables made from records and predictions."""

from collections import Counter, defaultdict
from collections.abc import Iterable
import json
from pathlib import Path
import zipfile

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from l2ul.common import seeds
from l2ul.common.errors import InputError
from l2ul.experiments import records
from l2ul.reporting import rows as variants
from l2ul.reporting.rows import Record

ENDED = (records.FORGOTTEN, records.DONE, records.CAP)  # with accuracies
MEASURED = ("acc_retain", "acc_test")
FIRST = ("adv_imp", "adv", "oracle", "neggrad")  # the methods that a figure with room for a few shows
SWEPT = {  # settings whose influence is shown, and the flag that sets each
    "num_adv_images": "--num-adv-images",
    "pgd_eps": "--pgd-eps",
    "reg_lamb": "--reg-lamb",
    "unlearn_lr": "--unlearn-lr",
}
MOST_CLASSES = 20  # of a matrix; the others are put together
OTHER = "(other)"


def plain(record: Record) -> Record:
    """A copy as `variants` takes it: the record's `_path` not among the settings, nothing that it has added before."""
    kept = {key: value for key, value in record.items() if key not in ("_path", "row", "differs")}
    beside = {"forget_file": str(Path(record["_path"]).with_suffix(".txt"))}
    return {"age_grouping": None, "continual_size": None} | kept | beside


def path_of(run: Record, suffix: str) -> Path:
    """A file beside the run's record."""
    return Path(run["forget_file"]).with_suffix(suffix)


def saved_net(run: Record) -> Path:
    """Where main_unlearn.py --save-model keeps the unlearned net: a file, of a Hugging Face net a folder."""
    record = path_of(run, ".json")
    suffix = "" if run["model"].startswith("hf:") else ".safetensors"
    return records.RunFiles(record.parent.parent, record.stem, suffix).model


def usual(runs: Iterable[Record]) -> list[Record]:
    """Of each method the runs of its plain row, or where it has none, of the row with most: one kind of settings.

    The runs are those of a `variants.Block`, whose rows are named.
    """
    runs, counts = list(runs), defaultdict(Counter)
    for run in runs:
        counts[run["method"]][run["row"]] += 1
    main = {
        method: method if method in rows else min(rows, key=lambda row: (-rows[row], row))
        for method, rows in counts.items()
    }
    return [run for run in runs if run["row"] == main[run["method"]]]


def on_one_forget_set(runs: Iterable[Record], most: int | None = None) -> list[Record]:
    """Of the usual runs those on one D_f, one a method: of the largest k, of the smallest seed with that.

    Where they are more than `most`, methods in FIRST are kept before others.
    """
    runs = usual(runs)
    largest = max(run["k"] for run in runs)
    first = min((run for run in runs if run["k"] == largest), key=lambda run: run["seed"])
    keys = ("k", "seed", "forget_sha256", "checkpoint_sha256")
    by_method = {run["method"]: run for run in runs if all(run.get(key) == first.get(key) for key in keys)}
    known = sorted(by_method, key=variants.place)
    kept = sorted(known, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))[:most]
    return [by_method[name] for name in known if name in kept]


def means(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row for each value of `by`: number of runs, mean and standard deviation of accuracies on D_r and D_test.

    Runs that forgot and runs that hit the cap (`capped`) have rows of their own; others, which diverged, have none.
    """
    ended = runs[runs["status"].isin(ENDED)]
    ended = ended.assign(capped=ended["status"] == records.CAP).astype(dict.fromkeys(MEASURED, float))
    groups = ended.groupby([*by, "capped"], sort=False)
    table = groups.size().rename("runs").to_frame()
    for name in MEASURED:
        table[name], table[f"{name}_std"] = groups[name].mean(), groups[name].std()
    return table.reset_index()


def _before(runs: pd.DataFrame) -> pd.DataFrame:
    """One row, as of `means`: what the original net gave for the same D_f."""
    row = {"method": "before", "capped": False, "runs": len(runs)}
    return pd.DataFrame([row | {name: runs[f"{name}_before"].mean() for name in MEASURED}])


def accuracies(runs: Iterable[Record]) -> pd.DataFrame:
    """`means` by method and k of the usual runs, and a row for the net before."""
    frame = pd.DataFrame([run for run in usual(runs) if run["method"] != "before"])
    table = means(frame, ["method", "k"]) if len(frame) else frame
    if not len(table):
        raise InputError("no run of a method ended well; make some with main_unlearn.py")
    return pd.concat([table, _before(frame)], ignore_index=True)


def ablations(runs: Iterable[Record], k: int | None = None) -> pd.DataFrame:
    """`means` by setting, value and method, of runs that differ in one of SWEPT alone, and the net before.

    All are of one k: that of most values, of several the largest. Of each setting and method those runs are taken that
    show most values of it with all else the same.
    """
    runs = [run for run in runs if run["method"] != "before" and k in (None, run["k"])]
    swept = {(setting, *key): same for setting in SWEPT for key, same in _sweeps(runs, setting).items()}
    sizes = Counter()
    for (setting, size, _), same in swept.items():
        sizes[size] += _values(same, setting)
    if not sizes:
        flags = ", ".join(SWEPT.values())
        raise InputError(f"no records differ in one setting alone; run main_unlearn.py with several values of {flags}")
    shown, tables = max(sizes, key=lambda size: (sizes[size], size)), []
    for setting in SWEPT:
        same = [run for (name, size, _), group in swept.items() if (name, size) == (setting, shown) for run in group]
        if same:
            frame = pd.DataFrame(same).assign(setting=setting, value=[float(run[setting]) for run in same])
            before = _before(frame).assign(setting=setting, k=shown)
            tables += [means(frame, ["setting", "value", "method", "k"]), before]
    return pd.concat(tables, ignore_index=True)


def _sweeps(runs: list[Record], setting: str) -> dict[tuple[int, str], list[Record]]:
    """By k and method: runs of several values of a setting, and the same of every other; those of most values."""
    alike = defaultdict(list)
    for run in runs:
        if run.get(setting) is not None and run["status"] in ENDED:
            given = variants.settings(run)
            others = {name: value for name, value in given.items() if name not in (setting, "row", "differs")}
            alike[run["k"], run["method"], json.dumps(others, sort_keys=True)].append(run)
    most = defaultdict(list)
    for (size, method, _), same in alike.items():
        most[size, method] = max(most[size, method], same, key=lambda group: (_values(group, setting), len(group)))
    return {key: same for key, same in most.items() if _values(same, setting) > 1}


def _values(runs: list[Record], setting: str) -> int:
    return len({run[setting] for run in runs})


def crossings(labels: np.ndarray, called: dict[str, np.ndarray], names: list[str]) -> dict[str, pd.DataFrame]:
    """A matrix of counts for each entry of `called`: true classes (rows) by the classes the images are called.

    labels (k,) are classes, each entry of `called` (k · n,) with the n classes of the first image first. Of more than
    MOST_CLASSES classes, those that occur most keep their rows and columns, the others share one.
    """
    shares = sum(np.bincount(classes, minlength=len(names)) / len(classes) for classes in called.values())
    rows, columns = _most(np.bincount(labels, minlength=len(names))), _most(shares)
    index = _headings(rows, labels, names)
    heads = _headings(columns, np.concatenate(list(called.values())), names)
    matrices = {}
    for name, classes in called.items():
        old = np.repeat(labels, len(classes) // len(labels))
        table = pd.crosstab(_named(old, rows, names), _named(classes, columns, names))
        matrices[name] = table.reindex(index=index, columns=heads, fill_value=0)
    return matrices


def counts(matrices: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The cells of `crossings`, a row each."""
    cells = [
        matrix.rename_axis(index="label", columns="called").stack().rename("count").reset_index().assign(panel=panel)
        for panel, matrix in matrices.items()
    ]
    return pd.concat(cells, ignore_index=True)


def _most(weights: np.ndarray) -> list[int]:
    """All classes if they are few, else those with the highest weights, in their order."""
    if len(weights) <= MOST_CLASSES:
        return list(range(len(weights)))
    return sorted(c for c in np.argsort(-weights, kind="stable")[:MOST_CLASSES].tolist() if weights[c])


def _headings(kept: list[int], classes: np.ndarray, names: list[str]) -> list[str]:
    rest = [OTHER] if set(classes.tolist()) - set(kept) else []
    return [names[c] for c in kept] + rest


def _named(classes: np.ndarray, kept: list[int], names: list[str]) -> np.ndarray:
    return np.array([names[c] if c in kept else OTHER for c in classes.tolist()], dtype=object)


def told_apart(classes: np.ndarray, forget: np.ndarray, names: list[str]) -> np.ndarray:
    """The names of classes that get a colour: all of up to ten, else the eight most frequent in D_f; "" for others."""
    counts = np.bincount(forget, minlength=len(names))
    kept = range(len(names)) if len(names) <= 10 else [c for c in np.argsort(-counts, kind="stable")[:8] if counts[c]]
    return np.array([names[c] if c in kept else "" for c in classes.tolist()], dtype=object)


def predictions(path: Path) -> dict[str, np.ndarray]:
    """The classes that a run's .npz holds."""
    try:
        with np.load(path) as kept:
            return {name: classes.astype(np.int64) for name, classes in kept.items()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}); do its run again with --rerun") from None


def sample(among: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """At most `count` of these indices, drawn under the seed, in the order they stand."""
    drawn = seeds.stream(seed, purpose).permutation(len(among))[:count]
    return among[torch.from_numpy(drawn).sort().values]
