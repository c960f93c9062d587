"""One file a finished run, whole or absent, and the table made from them: no other state is kept."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from l2ul.common.files import atomic

FORGOTTEN, CAP, DONE, DIVERGED, FAILED = STATUSES = ("forgotten", "cap", "done", "diverged", "failed")
KEYS = (  # of every record, first and in this order: tables and other people's tools rely on them
    *("dataset", "model", "checkpoint_sha256", "method", "needs_retain", "goal", "k", "seed", "continual_step"),
    *("status", "steps", "acc_forget", "acc_retain", "acc_test"),
    *("acc_forget_before", "acc_retain_before", "acc_test_before"),
    *("seconds_attack", "seconds_importance", "seconds_unlearn", "seconds_evaluate", "peak_memory_mib", "device"),
)
NOT_FORGOTTEN = (CAP, DIVERGED, FAILED)  # what the table points at
MEASURED = ("acc_forget", "acc_relabel", "acc_forget_earlier", "acc_retain", "acc_test", "steps")
SPECIAL = {"acc_relabel": "relabelled %", "acc_forget_earlier": "earlier D_f %"}  # shown where there are any


def run_id(settings: dict[str, object]) -> str:
    """Sixteen hex digits from everything that decides a run's result, whatever the order of the keys."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunFiles:
    """The files of one run below `<result_dir>`: runs/<id>.json, .txt, .npz and .csv, and models/<id>…"""

    def __init__(self, result_dir: Path, identity: str, model_suffix: str = ".safetensors"):
        self.identity = identity
        self.record = Path(result_dir) / "runs" / f"{identity}.json"
        self.state = self.record.with_suffix(".state.pt")  # of an unfinished loop
        self.model = Path(result_dir) / "models" / f"{identity}{model_suffix}"

    def read(self) -> dict[str, object] | None:
        """The finished run's record; None where there is none, it is damaged, or it says that the run failed."""
        record = read(self.record)
        return None if record is None or record.get("status") == FAILED else record

    def write(
        self,
        record: dict[str, object],
        forget: list[str],
        predictions: dict[str, Tensor],
        curve: list[dict[str, float]],
    ) -> None:
        """Everything of a finished run, `forget` being what tells the images of D_f.

        The record comes last, so where it is, the rest is too.
        """
        with atomic(self.record.with_suffix(".txt")) as part:
            part.write_text("".join(f"{name}\n" for name in forget))
        with atomic(self.record.with_suffix(".npz")) as part, open(part, "wb") as file:
            np.savez_compressed(file, **{name: _small(classes) for name, classes in predictions.items()})
        with atomic(self.record.with_suffix(".csv")) as part:
            pd.DataFrame(curve, columns=list(curve[0]) if curve else ["step"]).to_csv(part, index=False)
        self.rewrite(record)

    def rewrite(self, record: dict[str, object]) -> None:
        """The record alone: what stands beside it stays."""
        ordered = {key: record[key] for key in KEYS} | record
        with atomic(self.record) as part:
            part.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n")


def failure(settings: dict[str, object], metrics: list[str], error: str) -> dict[str, object]:
    """The record of a run that ended without a result: nothing was measured, and `error` says why."""
    unknown = dict.fromkeys((*KEYS, *metrics))
    phases = {key: 0.0 for key in KEYS if key.startswith("seconds_")}
    return unknown | settings | phases | {"status": FAILED, "steps": 0, "error": error}


def _small(classes: Tensor) -> np.ndarray:
    """Classes, or indices, in as few bytes as hold them."""
    values = classes.cpu().numpy()
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def read(path: Path) -> dict[str, object] | None:
    """A record; None where the file is missing or is not one."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "method" in record else None


def table(records: list[dict[str, object]]) -> pd.DataFrame:
    """A row for each method and k, in the order given: mean (± standard deviation over seeds) of what was measured.

    Runs that diverged or failed have no accuracies and are left out of the means of those, not of steps and seconds;
    a column counts every run that did not forget.
    """
    rows = []
    frame = pd.DataFrame(records)
    measured = [name for name in MEASURED if name in frame and (frame[name].notna().any() or name not in SPECIAL)]
    for (method, k), runs in frame.groupby(["method", "k"], sort=False):
        row = {"method": method, "k": k} | {name: _mean(runs[name]) for name in measured}
        row["seconds"] = _mean(runs.filter(like="seconds_").sum(axis=1))
        counts = runs["status"][runs["status"].isin(NOT_FORGOTTEN)].value_counts()
        row["not forgotten"] = ", ".join(f"{count} {status}" for status, count in counts.items())
        rows.append(row | {"runs": len(runs)})
    names = {"acc_forget": "D_f %", "acc_retain": "D_r %", "acc_test": "D_test %"} | SPECIAL
    return pd.DataFrame(rows).rename(columns=names)


def _mean(values: pd.Series) -> str:
    measured = values.dropna().astype(float)
    if not len(measured):
        return "-"
    spread = f" ± {measured.std():.2f}" if len(measured) > 1 else ""
    return f"{measured.mean():.2f}{spread}"
