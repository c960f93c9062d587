"""Sweeps on Ray itself: uv run --extra sweep pytest tests/test_sweep_ray.py"""

import os
from pathlib import Path
import signal
import subprocess
import sys

from conftest import FAST, ROOT
import pytest

from l2ul.experiments import records
from l2ul.sweeps import cluster
from l2ul.sweeps.cluster import Place, Resources
from l2ul.sweeps.trials import Trial

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray


# What workers do below: the words are a file that notes each try, and how it is to end.
def behave(words, shared):
    file, how = Path(words[0]), words[1]
    with open(file, "a") as notes:
        notes.write(f"{os.getpid()}\n")
    tries = len(file.read_text().splitlines())
    if how == "kill" or (how == "kill twice" and tries < 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise RuntimeError("the reason is on the last line")
    return shared()["answer"]


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return Place("test_sweep_ray:behave", ROOT, tmp_path)


def test_a_trial_that_dies_is_tried_thrice_and_others_go_on(place, tmp_path):
    ways = ["well", "kill", "raise", "kill twice", "well"]
    trials = [Trial((str(tmp_path / f"{number}"), how), how, (), ()) for number, how in enumerate(ways)]
    with cluster.connected(place, Resources(parallel=2)) as there:
        there.share({"answer": 42})
        ended = {trial: fault for some in there.carry_out(trials) for trial, fault in some}
        assert there.running == 0
    assert [len((tmp_path / f"{number}").read_text().splitlines()) for number in range(5)] == [1, 3, 3, 3, 1]
    assert ended.keys() == set(trials)
    faults = [ended[trial] for trial in trials]
    assert faults[0] is faults[3] is faults[4] is None
    assert "died" in faults[1] or "crashed" in faults[1]
    assert faults[2].endswith("RuntimeError: the reason is on the last line")


def sweep(folder, *arguments):
    words = [
        sys.executable,
        "main_sweep.py",
        "--result-dir",
        folder,
        "--cache-dir",
        folder / "cache",
        *FAST,
        *arguments,
    ]
    return subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_records_each_trial_then_shows_tables_and_does_nothing_again(tmp_path):
    grid = ["--method", "adv", "neggrad", "--pgd-eps", 1, 2, "--unlearn-lr", 0.003, 0.01, 0.03]
    done = sweep(tmp_path, *grid)
    assert done.returncode == 0, done.stderr
    paths = list((tmp_path / "runs").glob("*.json"))
    assert len(paths) == 9
    assert all(records.read(path)["device"] == "cpu (1 threads)" for path in paths)
    assert "| neggrad" in done.stdout
    assert (tmp_path / "tables" / "digits_resnet20_6_ablations.png").exists()
    when = {path: path.stat().st_mtime_ns for path in paths}
    again = sweep(tmp_path, *grid)
    assert again.stdout.startswith("9 trials: 0 to do, 9 done")
    assert when == {path: path.stat().st_mtime_ns for path in paths}


def test_a_search_goes_on_from_what_is_on_record(tmp_path):
    wanted = ["--method", "neggrad", "--unlearn-lr", "1e-3:1e-1:log", "--batch-size", 1, 2, "--max-passes", 40]
    done = sweep(tmp_path, *wanted, "--search", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 of 2 settings are on record, 2 to try")
    assert "best of 2, " in done.stdout
    done = sweep(tmp_path, *wanted, "--search", 3)
    assert done.stdout.startswith("2 of 3 settings are on record, 1 to try")
    assert "best of 3, " in done.stdout
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3
