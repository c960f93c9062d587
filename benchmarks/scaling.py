"""Measure the overhead of many runs: planning, finding finished runs, tables, scheduling by Ray, memory.

    uv run --extra sweep benchmarks/scaling.py                    # for about 100, 300 and 1,000 runs

The runs are not carried out: their records are copies of a real one with other settings, seeds and k. Their number is
the largest multiple of 40 that is not above the given number. The trials on Ray do nothing. The script prints a row for
each number of runs, and the estimated time of the paper's table for CIFAR-10, from the committed records. --output
names the file for both. docs/scaling.md explains the values.
"""

import argparse
import contextlib
import heapq
import io
import json
import operator
import os
from pathlib import Path
import resource
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import l2ul  # noqa: F401, I001  # first: it sets the environment before torch is imported

import pandas as pd

from l2ul.sweeps import ray_cluster
from l2ul.sweeps import ranges
from l2ul.experiments import records
from l2ul.cli import exit_codes
from l2ul.experiments.time_estimates import TimeEstimates
from l2ul.common.files import atomic
from l2ul.cli.parser import Parser, positive_int
from l2ul.sweeps.trials import Trial
from l2ul.sweeps import options as sweep_options
from l2ul.sweeps.sweep import SweepRunner
from l2ul.sweeps.worker import Workbench
import main_tables

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "result_data/reference/cifar10_resnet20/runs"
SEEDS, SIZES, METHODS = 5, (16, 64, 128, 256), ("adv", "adv_imp")  # of each setting: 40 runs
PAPER = ("neggrad", "rawp", "oracle", "adv", "adv_imp")


@exit_codes.clean_exit("scaling.py", exit_codes.NOTHING_WRITTEN)
def main() -> None:
    opts = parse()
    os.chdir(ROOT)
    rows = []
    for count in opts.counts:
        words = [sys.executable, __file__, "--one", str(count)]  # a process of its own, for its memory
        rows.append(
            json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
    found = {"machine": opts.machine, "cpus": os.cpu_count(), "rows": rows, "paper table": paper_table()}
    with atomic(opts.output) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    print(pd.DataFrame(rows).to_string(index=False), found["paper table"], sep="\n")
    print(f"written to {opts.output}")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__.split("\n")[0], prog="scaling.py")
    parser.add_argument("--counts", type=positive_int, nargs="+", default=[100, 300, 1000], metavar="N")
    parser.add_argument("--machine", default="not named", help="what the record calls the machine")
    parser.add_argument("--output", type=Path, default=Path("result_data/benchmarks/scaling.json"), metavar="PATH")
    parser.add_argument("--one", type=positive_int, help=argparse.SUPPRESS)
    opts = parser.parse_args()
    if opts.one:
        print(json.dumps(measure(opts.one)))
        raise SystemExit
    return opts


def measure(count: int) -> dict[str, float]:
    """Return the seconds of each part and the growth of the peak memory in MiB, for about `count` records."""
    row = {"records": count}

    def timed(name, function, *arguments):
        memory, started = mebibytes(), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found = function(*arguments)
        row[name] = round(time.perf_counter() - started, 3)
        row[f"{name} MiB"] = round(mebibytes() - memory, 1)
        return found

    with tempfile.TemporaryDirectory() as folder:
        settings = max(1, count // (SEEDS * len(SIZES) * len(METHODS)))
        words = ["--method", *METHODS, "--seed", f"0:{SEEDS - 1}:{SEEDS}", "--unlearn-k", *map(str, SIZES)]
        words += ["--unlearn-lr", f"1e-4:1e-2:log{settings}" if settings > 1 else "1e-3", "--result-dir", folder]
        sweep = sweep_options.parse(words)
        runner = SweepRunner(sweep)
        runner.plan([next(ranges.product(sweep.axes))])  # loads data and classifier
        trials, _ = timed("plan", runner.plan, ranges.product(sweep.axes))
        make_up(trials, runner.workbench)
        _, pending = timed("find what is done", runner.plan, ranges.product(sweep.axes))
        assert len(pending) == 0
        timed("tables", main_tables.make, main_tables.parse(["--result-dir", folder]))
        timed(
            "tables and figures", main_tables.make, main_tables.parse(["--result-dir", folder, "--figures", "1", "6"])
        )
        size = sum(path.stat().st_size for path in (Path(folder) / "runs").iterdir())
        row |= {"trials": len(trials), "KiB a record": round(size / 2**10 / len(trials), 1)}
    schedule(count, timed)
    return row


def make_up(trials: list[Trial], workbench: Workbench) -> None:
    """Write a record of each trial with the accuracies and times of a real run."""
    (path, *_) = sorted(REFERENCE.glob("*.json"))
    real = json.loads(path.read_text())
    for trial in trials:
        workbench.record_failure(trial.arguments, "")
        file = trial.files[0]
        record = json.loads(file.record.read_text())
        record = {key: real.get(key, value) if value is None else value for key, value in record.items()}
        record |= {key: value for key, value in real.items() if key.startswith(("acc_", "seconds_"))}
        file.rewrite(record | {"status": "forgotten", "error": None})


def schedule(count: int, timed) -> None:
    """Measure trials that do nothing, with as many workers as cores, after the workers have started."""
    function = ray_cluster.WorkerFunction(operator.is_not, ROOT, ROOT)
    with ray_cluster.connect(function) as cluster:
        cluster.share({})
        idle = [Trial((str(number),), "", (), {}) for number in range(count)]
        list(cluster.run_trials(idle[: 2 * cluster.slots()]))
        timed("schedule", lambda: list(cluster.run_trials(idle)))


def paper_table() -> dict[str, object]:
    """Return the estimated hours of each run of 4 k x 5 seeds x 5 methods, and of all on 1, 8 and 64 devices.

    The devices are as fast as those of the committed records, with one run at a time on each. The time of a run is the
    median of the records with its method and k. Without such records, that of the nearest k is scaled in proportion.
    """
    there = (records.read(path) for path in REFERENCE.glob("*.json"))
    plain = {"goal": "misclassify", "continual_step": None, "retain_sample": None}
    runs = [run for run in there if all(run.get(key) == value for key, value in plain.items()) and run["bn"] != "eval"]
    times, of_table = TimeEstimates(runs), {"dataset": "cifar10", "model": "resnet20"}
    each = {(m, k): times.seconds(of_table | {"method": m, "k": k}) for m in PAPER for k in SIZES}
    found = {"hours a run": {f"{m}, k = {k}": round(seconds / 3600, 4) for (m, k), seconds in each.items()}}
    for devices in (1, 8, 64):
        free = [0.0] * devices
        for seconds in sorted((seconds for seconds in each.values() for _ in range(SEEDS)), reverse=True):
            heapq.heapreplace(free, free[0] + seconds)
        found[f"hours on {devices}"] = round(max(free) / 3600, 2)
    return found


def mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
