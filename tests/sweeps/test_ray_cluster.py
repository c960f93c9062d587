"""Sweeps on Ray: uv run --extra sweep pytest -m ray"""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from conftest import FAST, ROOT
import pytest

from l2ul.cli import exit_codes
from l2ul.experiments import records
from l2ul.sweeps import ray_cluster
from l2ul.sweeps.ray_cluster import WorkerFunction
from l2ul.sweeps.trials import Trial

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray


def behave(arguments, shared):
    """What the workers below do. The arguments are a file that counts the tries, and how the trial ends."""
    file, how = Path(arguments[0]), arguments[1]
    with open(file, "a") as notes:
        notes.write(f"{os.getpid()}\n")
    tries = len(file.read_text().splitlines())
    if how == "kill" or (how == "kill twice" and tries < 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "gpu":
        with open(file, "a") as notes:
            notes.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {ray.get_gpu_ids()[0]}\n")
    if how == "raise":
        raise RuntimeError("the reason is on the last line")
    return shared()["answer"]


@pytest.fixture
def worker_function(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "sweeps")]))
    return WorkerFunction(behave, ROOT, tmp_path)


def test_a_trial_that_dies_is_tried_three_times_and_others_continue(worker_function, tmp_path):
    ways = ["well", "kill", "raise", "kill twice", "well"]
    trials = [Trial((str(tmp_path / f"{number}"), how), how, (), {}) for number, how in enumerate(ways)]
    errors = {}
    with ray_cluster.connect(worker_function, at_most=2) as cluster:
        cluster.share({"answer": 42})
        for ended in cluster.run_trials(trials):
            errors |= {trial.label + trial.arguments[0]: error for trial, error in ended}
        assert cluster.num_running == 0
    assert [len((tmp_path / f"{number}").read_text().splitlines()) for number in range(5)] == [1, 3, 3, 3, 1]
    errors = [errors[trial.label + trial.arguments[0]] for trial in trials]
    assert errors[0] is errors[3] is errors[4] is None
    assert "died" in errors[1] or "crashed" in errors[1]
    assert errors[2].endswith("RuntimeError: the reason is on the last line")


@pytest.mark.parametrize(("gpus", "at_once"), [(1, 2), (0.25, 8)])
def test_each_trial_has_a_process_that_sees_the_gpu_of_the_trial(worker_function, tmp_path, monkeypatch, gpus, at_once):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    start = ray.init
    monkeypatch.setattr(ray, "init", lambda **options: start(num_gpus=2, num_cpus=8, **options))  # emulated GPUs
    trials = [Trial((str(tmp_path / f"{number}"), "gpu"), "", (), {}) for number in range(5)]
    with ray_cluster.connect(worker_function, gpus=gpus) as cluster:
        assert cluster.slots() == at_once
        cluster.share({"answer": 42})
        assert [error for ended in cluster.run_trials(trials) for _, error in ended] == [None] * 5
    seen = [(tmp_path / f"{number}").read_text().splitlines() for number in range(5)]
    assert len({process for process, _ in seen}) == 5
    assert {gpu for _, gpu in seen} <= {"0 0", "1 1"}


def test_messages_of_native_threads_that_lose_the_cluster_are_not_shown(worker_function, monkeypatch, capfd):
    shutdown = ray.shutdown

    def shutdown_with_message():
        os.write(2, b"task_manager.cc: Failed to push error to driver\n")
        shutdown()

    monkeypatch.setattr(ray, "shutdown", shutdown_with_message)
    with ray_cluster.connect(worker_function, at_most=1):
        pass
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def command(folder, *arguments):
    words = [sys.executable, "main_sweep.py", "--result-dir", folder, "--cache-dir", folder / "cache"]
    return list(map(str, [*words, *FAST, *arguments]))


def sweep(folder, *arguments):
    return subprocess.run(command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_records_each_trial_shows_tables_and_repeats_nothing(tmp_path):
    grid = ["--method", "adv", "neggrad", "--pgd-eps", 1, 2, "--unlearn-lr", 0.003, 0.01, 0.03]
    done = sweep(tmp_path, *grid)
    assert done.returncode == 0, done.stderr
    paths = list((tmp_path / "runs").glob("*.json"))
    assert len(paths) == 9
    assert all(records.read(path)["device"] == "cpu (1 thread)" for path in paths)
    assert "| neggrad" in done.stdout
    assert (tmp_path / "tables" / "digits_resnet20_6_ablations.png").exists()
    when = {path: path.stat().st_mtime_ns for path in paths}
    again = sweep(tmp_path, *grid)
    assert again.stdout.startswith("9 trials: 0 to do, 9 done")
    assert when == {path: path.stat().st_mtime_ns for path in paths}


def test_a_search_continues_from_the_records(tmp_path):
    search = ["--method", "neggrad", "--unlearn-lr", "1e-3:1e-1:log", "--batch-size", 1, 2, "--max-passes", 40]
    done = sweep(tmp_path, *search, "--search", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 of 2 settings are on record, 2 to try")
    assert "best of 2, " in done.stdout
    done = sweep(tmp_path, *search, "--search", 3)
    assert done.stdout.startswith("2 of 3 settings are on record, 1 to try")
    assert "best of 3, " in done.stdout
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3


def test_sigterm_ends_a_sweep_with_one_line_and_the_same_command_continues(tmp_path):
    words = ["--method", "neggrad", "--seed", *range(40), "--parallel", 1]
    process = subprocess.Popen(command(tmp_path, *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(6000):  # ten minutes, for a busy machine
            if any((tmp_path / "runs").glob("*.json")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert err.decode() == f"main_sweep.py: stopped by SIGTERM; {exit_codes.CONTINUES}\n"
    finished = len(list((tmp_path / "runs").glob("*.json")))
    assert 1 <= finished < 40
    assert sweep(tmp_path, *words, "--dry-run").stdout.startswith(f"40 trials: {40 - finished} to do, {finished} done")
