"""Data of the figures: which runs they show, and tables made from records and from the predictions beside them."""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable
import json
from pathlib import Path
import zipfile
import zlib

import numpy as np
import pandas as pd

from l2ul import models
from l2ul.common.errors import InputError, option
from l2ul.common.text import require_file
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.metrics import columns
from l2ul.reporting.rows import OF_DATA, known_settings, main_row, method_order

WITH_ACCURACIES = (records.FORGOTTEN, records.DONE, records.CAP)
MEASURED = tuple(column.key for column in columns.of_table("accuracy") if column.compared)  # D_r and D_test
PREFERRED = ("distill", "adv_imp", "adv", "neggrad")  # methods of a figure that has room for a few
SWEPT = {  # settings whose effect figure 6 shows: label of the axis, and whether it is logarithmic
    "num_adv_images": ("examples per image, $N_{adv}$", True),
    "pgd_eps": ("ε (L2, pixels in [0,1])", False),
    "reg_lamb": ("weight of the penalty, λ", True),
    "unlearn_lr": ("learning rate", True),
}
CURVE_KEYS = ("run", "method", "k", "seed", "label", "step")  # columns of `curves` beside the measured ones
PERCENTAGES = ("acc_forget", "forgotten")  # columns of a curve that are not terms of the loss
MOST_BYTES = 2**30  # of the predictions or the curve of a run
MOST_CLASSES = 20  # in a matrix; the others are merged
OTHER = "(other)"
DAMAGED = (EOFError, zlib.error, AttributeError, RuntimeError)  # of np.load, beside ValueError


def path_of(run: Record, suffix: str) -> Path:
    """Return the path of a file beside the record of a run."""
    return Path(run["forget_file"]).with_suffix(suffix)


def saved_model(run: Record) -> Path:
    """Return the path that main_unlearn.py --save-model uses: a file, or a folder for Hugging Face and timm."""
    record = path_of(run, ".json")
    return records.RunFiles(record.parent.parent, record.stem, models.saved_suffix(run["model"])).model


def usual(runs: Iterable[Record]) -> list[Record]:
    """Return for each method the runs of one row: the one with usual settings, else the one with most runs.

    The runs are from a `rows.Block`.
    """
    runs = list(runs)
    main = {method: main_row(runs, method) for method in {run["method"] for run in runs}}
    return [run for run in runs if run["row"] == main[run["method"]]]


def on_one_forget_set(runs: Iterable[Record], most: int | None = None) -> list[Record]:
    """Return runs with usual settings on one D_f, one for each method: the largest k, and its smallest seed.

    If they are more than `most`, methods in PREFERRED are kept before others.
    """
    runs = usual(runs)
    largest = max(run["k"] for run in runs)
    first = min((run for run in runs if run["k"] == largest), key=lambda run: run["seed"])
    keys = ("k", "seed", "forget_sha256", "checkpoint_sha256")
    by_method = {run["method"]: run for run in runs if all(run.get(key) == first.get(key) for key in keys)}
    known = sorted(by_method, key=method_order)
    kept = sorted(known, key=lambda name: PREFERRED.index(name) if name in PREFERRED else len(PREFERRED))[:most]
    return [by_method[name] for name in known if name in kept]


def first_of_each_method(runs: Iterable[Record]) -> list[Record]:
    """Return a run with usual settings for each method, in the order of the registry: smallest k, first seed."""
    first = {}
    for run in sorted(usual(runs), key=lambda run: (method_order(run["method"]), run["k"], run["seed"])):
        first.setdefault(run["method"], run)
    return list(first.values())


def means(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return a row for each value of `by`: number of runs, mean and standard deviation of the metrics in MEASURED.

    Runs that stopped at the cap (`capped`) have rows of their own. Runs without accuracies are left out.
    """
    ended = runs[runs["status"].isin(WITH_ACCURACIES)]
    capped = [records.gave_up(run) for run in ended.to_dict("records")]
    ended = ended.assign(capped=capped).astype(dict.fromkeys(MEASURED, float))
    groups = ended.groupby([*by, "capped"], sort=False)
    table = groups.size().rename("runs").to_frame()
    for name in MEASURED:
        table[name], table[f"{name}_std"] = groups[name].mean(), groups[name].std()
    return table.reset_index()


def _before(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row like those of `means` with the accuracies of the original model."""
    row = {"method": "before", "capped": False, "runs": len(runs)}
    return pd.DataFrame([row | {name: runs[f"{name}_before"].mean() for name in MEASURED}])


def accuracies(runs: Iterable[Record]) -> pd.DataFrame:
    """Return `means` by method and k of the runs with usual settings, and a row for the original model."""
    frame = pd.DataFrame([run for run in usual(runs) if run["method"] != "before"])
    table = means(frame, ["method", "k"]) if len(frame) else frame
    if not len(table):
        raise InputError("no run of a method has accuracies", "do more runs with main_unlearn.py")
    return pd.concat([table, _before(frame)], ignore_index=True)


def ablations(runs: Iterable[Record], k: int | None = None) -> pd.DataFrame:
    """Return `means` by setting, value and method, of runs that differ in a single setting.

    The settings are those of SWEPT, and numbers that methods of the user declare.

    All runs have one k, weights and images, those with most values (the largest such k). For each setting and method,
    the runs are those with most values of the setting and all other settings equal. Each setting has a row for the
    original model.

    Raises InputError if no runs differ in a single setting.
    """
    runs = [run for run in runs if run["method"] != "before" and k in (None, run["k"])]
    settings = [*SWEPT, *_own_numbers(runs)]
    swept = {(setting, *key): same for setting in settings for key, same in _sweeps(runs, setting).items()}
    sizes = Counter()
    for (setting, *subject, _), same in swept.items():
        sizes[tuple(subject)] += _values(same, setting)
    if not sizes:
        flags = ", ".join(option(name) for name in SWEPT)
        raise InputError("no records differ in a single setting", f"run main_unlearn.py with several values of {flags}")
    shown, tables = max(sizes, key=lambda subject: (sizes[subject], subject)), []
    for setting in settings:
        same = [run for (*subject, _), group in swept.items() if subject == [setting, *shown] for run in group]
        if same:
            frame = pd.DataFrame(same).assign(setting=setting, value=[float(run[setting]) for run in same])
            before = _before(frame).assign(setting=setting, k=shown[0])
            tables += [means(frame, ["setting", "value", "method", "k"]), before]
    return pd.concat(tables, ignore_index=True)


def _own_numbers(runs: list[Record]) -> list[str]:
    """Return the names of settings that methods of the user declare and that are numbers."""
    names = {name for run in runs for name in (run.get("method_settings") or "").split()} - SWEPT.keys()
    return sorted(name for name in names if all(isinstance(run.get(name, 0), int | float | None) for run in runs))


def _sweeps(runs: list[Record], setting: str) -> dict[tuple[int, str, str], list[Record]]:
    """Return, by k, weights and images, and method, the runs with most values of a setting that agree in all others."""
    alike = defaultdict(list)
    for run in runs:
        if run.get(setting) is not None and run["status"] in WITH_ACCURACIES:
            others = {name: value for name, value in known_settings(run).items() if name != setting}
            data = {name: others.pop(name) for name in OF_DATA & others.keys()}
            data, others = (json.dumps(values, sort_keys=True) for values in (data, others))
            alike[run["k"], data, run["method"], others].append(run)
    most = defaultdict(list)
    for (*subject, _), same in alike.items():
        best = most[tuple(subject)]
        most[tuple(subject)] = max(best, same, key=lambda group: (_values(group, setting), len(group)))
    return {key: same for key, same in most.items() if _values(same, setting) > 1}


def _values(runs: list[Record], setting: str) -> int:
    return len({run[setting] for run in runs})


def confusion_matrices(
    labels: np.ndarray, predicted: dict[str, np.ndarray], names: list[str]
) -> dict[str, pd.DataFrame]:
    """Return a matrix of counts for each entry of `predicted`: true classes (rows) by predicted classes (columns).

    labels     true classes (k,)
    predicted  arrays (k · n,) of n classes for each image, those of the first image first
    names      names of all classes. If there are more than MOST_CLASSES, the most frequent ones keep their rows and
               columns and the others are merged
    """
    shares = sum(np.bincount(classes, minlength=len(names)) / len(classes) for classes in predicted.values())
    true_classes, new_classes = _most(np.bincount(labels, minlength=len(names))), _most(shares)
    index = _headings(true_classes, labels, names)
    heads = _headings(new_classes, np.concatenate(list(predicted.values())), names)
    matrices = {}
    for name, classes in predicted.items():
        true = np.repeat(labels, len(classes) // len(labels))
        table = pd.crosstab(_named(true, true_classes, names), _named(classes, new_classes, names))
        matrices[name] = table.reindex(index=index, columns=heads, fill_value=0)
    return matrices


def counts(matrices: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the cells of `confusion_matrices`, one per row."""
    cells = [
        matrix.rename_axis(index="label", columns="prediction")
        .stack()
        .rename("count")
        .reset_index()
        .assign(panel=panel)
        for panel, matrix in matrices.items()
    ]
    return pd.concat(cells, ignore_index=True)


def _most(weights: np.ndarray) -> list[int]:
    """Return all classes, or those with the MOST_CLASSES highest weights, in ascending order."""
    if len(weights) <= MOST_CLASSES:
        return list(range(len(weights)))
    return sorted(c for c in np.argsort(-weights, kind="stable")[:MOST_CLASSES].tolist() if weights[c])


def _headings(kept: list[int], classes: np.ndarray, names: list[str]) -> list[str]:
    rest = [OTHER] if set(classes.tolist()) - set(kept) else []
    return [names[c] for c in kept] + rest


def _named(classes: np.ndarray, kept: list[int], names: list[str]) -> np.ndarray:
    return np.array([names[c] if c in kept else OTHER for c in classes.tolist()], dtype=object)


def coloured_classes(classes: np.ndarray, forget: np.ndarray, names: list[str]) -> np.ndarray:
    """Return the class name of each image, "" for classes without a colour of their own.

    All classes have a colour if they are at most ten, else the eight that are most frequent in D_f.
    """
    counts = np.bincount(forget, minlength=len(names))
    kept = range(len(names)) if len(names) <= 10 else [c for c in np.argsort(-counts, kind="stable")[:8] if counts[c]]
    return np.array([names[c] if c in kept else "" for c in classes.tolist()], dtype=object)


def predictions(path: Path, names: Container[str] | None = None) -> dict[str, np.ndarray]:
    """Read the predicted classes in the .npz file of a run: the arrays (n,) with these names, None for all."""
    try:
        require_file(path, MOST_BYTES)
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > MOST_BYTES:
                raise ValueError(f"it holds more than {MOST_BYTES:,} bytes")
        with np.load(path) as kept:
            chosen = [name for name in kept if names is None or name in names]
            return {name: kept[name].astype(np.int64).ravel() for name in chosen}
    except (OSError, ValueError, zipfile.BadZipFile, *DAMAGED) as error:
        raise InputError(f"{path} is damaged ({error})", "repeat its run with main_unlearn.py --rerun") from None


def curve(path: Path) -> pd.DataFrame:
    """Read the curve of a run from its .csv file: a column `step`, and one for each term and percentage.

    Values that are not finite numbers are NaN. The table is empty for a run without steps.

    Raises InputError if the file is absent or damaged.
    """
    try:
        require_file(path, MOST_BYTES)
        table = pd.read_csv(path).apply(pd.to_numeric, errors="coerce").astype(float)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a table"
        raise InputError(f"the curve {path} cannot be read: {reason}") from None
    if "step" not in table:
        raise InputError(f"the curve {path} has no column step", "repeat its run with main_unlearn.py --rerun")
    table = table.where(np.isfinite(table))
    return table[table["step"].between(1, 2**53)].reset_index(drop=True)


def thinned(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return at most `most` rows of a table at equal distances, with the first and the last one."""
    if len(table) <= most:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, most).round().astype(int)]


def measured(table: pd.DataFrame) -> list[str]:
    """Return the columns of `curves` with values: percentages of D_f, then terms of the loss."""
    names = [name for name in table if name not in CURVE_KEYS and table[name].notna().any()]
    return sorted(names, key=lambda name: name not in PERCENTAGES)


def curves(runs: Iterable[Record]) -> pd.DataFrame:
    """Return the curves of runs below each other, with the columns of CURVE_KEYS. `run` is the id of a run.

    The label is the row of a run, with k and seed where these differ between the runs. `forgotten` is left out where it
    is the rest of `acc_forget` to 100.

    Raises InputError if a curve is absent or damaged, or none has a value.
    """
    runs, tables = list(runs), []
    differ = [name for name in ("k", "seed") if len({run[name] for run in runs}) > 1]
    for run in runs:
        path, label = path_of(run, ".csv"), ", ".join([run["row"], *(f"{name} {run[name]}" for name in differ)])
        about = {"run": path.stem, "label": label} | {name: run[name] for name in ("method", "k", "seed")}
        tables.append(curve(path).assign(**about))
    table = pd.concat(tables, ignore_index=True).astype({"step": int})
    if not measured(table):
        raise InputError("the runs took no steps", "choose others with --figure-runs")
    if {"acc_forget", "forgotten"} <= set(table) and (
        table["acc_forget"] + table["forgotten"] - 100
    ).abs().max() < 1e-6:
        table = table.drop(columns="forgotten")
    return table[[*CURVE_KEYS, *measured(table)]]
