"""Sweeps, but for Ray itself: which trials there are, that they are main_unlearn.py's, and what is said of them."""

import importlib.util
import json
import re
import shlex
import subprocess
import threading
import time

from conftest import FAST, ROOT
from helpers import parse_sweep
import numpy as np
import pytest
import torch

from l2ul.common.cache import Cache
from l2ul.experiments import records
from l2ul.sweeps import cluster, monitor
from l2ul.sweeps import trials as sweep
from l2ul.sweeps import worker as main_trials
import main_sweep
import main_tables
import main_unlearn

GRID = ["--method", "neggrad", "adv", "--seed", "0:1:2", "--pgd-eps", "1:4:3", "--unlearn-lr", 0.003, 0.01]


@pytest.fixture
def swept(script, tmp_path, few_digits):
    """Call main_sweep.py on few digits, with the same folder as the fixture `run`."""

    def call(*arguments):
        return script(main_sweep.main, "--result-dir", tmp_path, *FAST, *arguments)

    return call


def states(out):
    found = re.findall(r"^(to do|done|failed|measure) +([0-9a-f]{16})", out, re.MULTILINE)
    return {identity: state for state, identity in found}


def trials(tmp_path, *arguments):
    found = parse_sweep(tmp_path, *arguments)
    return main_sweep.plan(found, main_trials.Bench(), main_sweep.ranges.product(found.axes))


def test_the_cross_product_is_what_main_unlearn_would_do_for_each_and_no_run_is_there_twice(swept, run):
    code, out, _ = swept(*GRID, "--dry-run")
    assert code == 0
    assert out.startswith("16 trials: 16 to do, 0 done, 0 failed before\n")  # neggrad has no ε: 4, adv has 12
    expected = {}
    for eps in (1, 2.5, 4):
        for rate in (0.003, 0.01):
            several = ["--method", "neggrad", "adv", "--seed", 0, 1, "--pgd-eps", eps, "--unlearn-lr", rate]
            expected |= states(run(*several, "--dry-run")[1])
    assert states(out) == expected
    assert "pgd_eps = 2.5, unlearn_lr = 0.003" in out


def test_done_runs_are_told_and_the_time_of_the_others_is_estimated_from_them(swept, run):
    run("--method", "neggrad", "--seed", 0)
    code, out, _ = swept("--method", "neggrad", "--seed", 0, 1, 2, "--dry-run")
    assert code == 0
    assert out.startswith("3 trials: 2 to do, 1 done, 0 failed before\n")
    assert sorted(states(out).values()) == ["done", "to do", "to do"]
    assert re.search(r"about [\d.]+ s one after the other", out)
    _, out, _ = swept("--method", "adv", "--seed", 0, "--dry-run")
    assert "how long they take cannot be told" in out


@pytest.mark.parametrize(
    "more",
    [
        ["--goal", "relabel", "--method", "correct", "--unlearn-k", 2, 3],
        ["--continual-step", 2, "--unlearn-k", 4, "--method", "neggrad"],
        ["--method", "finetune", "--course", "epochs=1", "lr=0.01"],
        ["--method", "adv_imp", "--bn", "train", "eval", "--retain-sample", 10],
    ],
)
def test_a_worker_does_what_main_unlearn_does_bit_for_bit(tmp_path, few_digits, run, more, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(main_trials, "BENCH", main_trials.Bench())
    sweeping = ["--threads", 2, "--cache-dir", tmp_path / "cache"]
    every, pending = trials(tmp_path / "swept", *sweeping, *more)
    assert every == pending
    for trial in sweep.in_order(pending, 2):
        found = main_trials.work(trial.words, dict)
        assert [record["k"] for record in found][-1] == trial.about[-1]
    plain = [word for word in more if word not in ("train", "eval")]
    for last in (["train"], ["eval"]) if "--bn" in more else ([],):
        words = plain[:3] + last + plain[3:] if last else plain
        assert run("--threads", 2, *words)[0] == 0
    ours, theirs = (contents(folder / "runs") for folder in (tmp_path / "swept", tmp_path))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name


def contents(folder):
    """What the files of runs hold, but for times and memory."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            found[path.name] = same_but_for_time(json.loads(path.read_text()))
        elif path.suffix == ".npz":
            found[path.name] = {name: classes.tolist() for name, classes in np.load(path).items()}
        else:
            found[path.name] = path.read_text()
    return found


def same_but_for_time(record):
    return {key: value for key, value in record.items() if not key.startswith("seconds") and key != "peak_memory_mib"}


def test_data_and_classifier_are_loaded_once_by_a_process(tmp_path, few_digits, monkeypatch):
    monkeypatch.chdir(ROOT)
    loads, true_load = [], main_unlearn.load
    monkeypatch.setattr(main_unlearn, "load", lambda *given: loads.append(1) or true_load(*given))
    found, _ = trials(tmp_path, *GRID)
    assert (len(found), len(loads)) == (16, 1)


def test_those_that_share_examples_come_after_the_first_of_them_that_has_most_images(tmp_path, few_digits):
    words = ["--method", "neggrad", "adv", "--unlearn-k", 1, 2, "--pgd-eps", 1, 2, 3]
    found, _ = trials(tmp_path, *words)
    ordered = list(sweep.in_order(found, 2))
    assert sorted(trial.identity for trial in ordered) == sorted(trial.identity for trial in found)
    sets = [(trial.shares and trial.shares[3], trial.about[-1]) for trial in ordered]
    assert sets[:6] == [(1.0, 2), (2.0, 2), (1.0, 1), (2.0, 1), (3.0, 2), (3.0, 1)]
    assert {trial.about[2] for trial in ordered[6:]} == {"neggrad"}


def test_the_estimate_takes_the_median_and_other_sizes_in_proportion():
    like = {"dataset": "d", "model": "m", "method": "adv", "k": 16, "status": "forgotten"}
    found = [like | {"seconds_attack": value, "seconds_unlearn": 1.0} for value in (1.0, 2.0, 90.0)]
    times = sweep.Times([*found, like | {"status": "failed", "seconds_attack": 0.0}])
    assert times.of(("d", "m", "adv", 16)) == 3.0
    assert times.of(("d", "m", "adv", 64)) == 12.0
    assert times.of(("d", "m", "oracle", 16)) is None


def fail(tmp_path, *arguments, error="RuntimeError: it broke"):
    found, _ = trials(tmp_path, *arguments)
    for trial in found:
        main_trials.Bench().record_failure(trial.words, error)
    return found


def test_a_failed_run_is_recorded_shown_not_averaged_and_tried_again(swept, run, script, tmp_path, few_digits):
    run("--method", "before", "neggrad", "--seed", 0, "--threads", 1)
    (failed,) = fail(tmp_path, "--method", "neggrad", "--seed", 1, error="many lines\nRuntimeError: it broke")
    found = records.read(failed.files[0].record)
    assert (found["status"], found["acc_forget"], found["steps"]) == ("failed", None, 0)
    assert found["error"].endswith("RuntimeError: it broke")
    assert failed.failed
    code, out, _ = script(main_tables.main, "--result-dir", tmp_path)
    assert code == 0
    assert re.search(r"^\| neggrad +\|.*1 failed", out, re.MULTILINE)
    assert "## Problems" not in out
    csv = (tmp_path / "tables" / "table.csv").read_text().splitlines()
    assert sum(",neggrad," in line for line in csv) == 3  # of one row: the failed run is none of other settings
    _, out, _ = swept("--method", "neggrad", "--seed", 0, 1, "--dry-run")
    assert "2 trials: 1 to do, 1 done, 1 failed before" in out
    assert states(out)[failed.identity] == "failed"
    assert states(run("--method", "neggrad", "--seed", 1, "--dry-run")[1])[failed.identity] == "to do"
    assert run("--method", "neggrad", "--seed", 1)[0] == 0
    assert records.read(failed.files[0].record)["status"] != "failed"


def test_a_failure_never_replaces_a_result(run, tmp_path, few_digits):
    run("--method", "neggrad", "--seed", 0)
    (path,) = (tmp_path / "runs").glob("*.json")
    before = path.read_bytes()
    fail(tmp_path, "--method", "neggrad", "--seed", 0, "--rerun")
    assert path.read_bytes() == before


def test_of_two_that_want_the_same_from_the_cache_one_makes_it(tmp_path):
    cache, made = Cache(tmp_path), []

    def want():
        with cache.lock({"x": 1}):
            if cache.get({"x": 1}) is None:
                time.sleep(0.05)
                made.append(1)
                cache.put({"x": 1}, {"a": torch.zeros(1)})

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    with Cache().lock({"x": 1}), Cache(tmp_path / "none").lock({"x": 1}):
        pass  # no folder, no lock


@pytest.mark.parametrize("words", [["--slurm", "2", "--gpus-per-trial", "0"], ["--slurm", "--pgd-eps", "1:5:9"]])
def test_the_job_script_is_shell_and_gives_the_same_command(script, tmp_path, words):
    code, out, _ = script(main_sweep.main, "--method", "adv", *words)
    assert code == 0
    (tmp_path / "job.sh").write_text(out)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    nodes = 2 if "2" in words else 1
    assert f"#SBATCH --nodes={nodes}\n" in out
    assert f"--min-nodes {nodes} " in out
    assert ("--gpus-per-node" in out) == ("--gpus-per-trial" not in words)
    command = shlex.split(out.splitlines()[-1].split(" -- ")[1])
    assert command[:2] == ["python", "main_sweep.py"]
    found = main_sweep.parse(command[2:])
    assert found.opts.address == "auto"
    assert found.opts.slurm is None
    assert found.axes == main_sweep.parse(["--method", "adv", *words]).axes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--pgd-eps", "1:5"], "--pgd-eps is a range without a number of points"),
        (["--pgd-eps", "1:5", "2:6", "--search", 3], "stands alone"),
        (["--search", 3], "--search has nothing to choose"),
        (["--search", 3, "--pgd-eps", "1:5", "--method", "adv", "adv_imp"], "--search is for one method"),
        (["--search", 3, "--method", "finetune", "--course", "lr=0.1:0.2:2"], "--search does not vary --course"),
        (["--source-free", "--pgd-eps", 1, 2], "add --search N"),
        (["--pgd-eps", "5:1:3"], "goes from 5 to 1"),
        (["--method", "nothing", "--pgd-eps", 1, 2], "nothing"),
        (["--device", "cpu", "cuda"], "unrecognized arguments: cuda"),
        (["--dataset", "nowhere", "--dry-run"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(swept, words, reason):
    code, _, err = swept(*words)
    assert code == 2
    assert reason in err
    assert len(err.strip().splitlines()) == 1


def test_without_ray_it_says_what_to_call(swept, monkeypatch):
    true_find = importlib.util.find_spec
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None if name == "ray" else true_find(name))
    code, _, err = swept("--method", "neggrad")
    assert code == 2
    assert err == "main_sweep.py: ray is not installed; call this as: uv run --extra sweep main_sweep.py …\n"


def test_settings_of_a_course_are_crossed_too(tmp_path):
    found = parse_sweep(tmp_path, "--method", "finetune", "--course", "epochs=1:2:2", "lr=0.01", "lr=0.1")
    assert found.axes["course"][1] == ("epochs=1.0", "lr=0.1")
    assert len(found.axes["course"]) == 4
    parsed = main_unlearn.parse(list(found.command({"course": found.axes["course"][1]})))
    assert parsed.course == {"epochs": 1.0, "lr": 0.1}


def test_threads_are_those_of_a_trial_whatever_runs_beside_it(tmp_path):
    def threads(*words):
        return main_unlearn.parse(list(parse_sweep(tmp_path, *words).command({}))).threads

    assert threads() == 1
    assert threads("--cpus-per-trial", 4, "--parallel", 8) == 4
    assert threads("--cpus-per-trial", 0.5) == 1
    assert threads("--cpus-per-trial", 4, "--threads", 2) == 2


def test_the_table_so_far_is_shown_now_and_then(run, tmp_path, monkeypatch):
    now, said, told = [0.0], [], []
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    run("--method", "neggrad", "--seed", 0)
    (path,) = (tmp_path / "runs").glob("*.json")
    watch = monitor.Watch(4, lambda ended, **counts: told.append((ended, counts)), said.append)
    watch.look(2)
    now[0] = 30
    watch.end([path], failed=False)
    watch.look(2)
    assert said == []
    now[0] = 61
    watch.end([tmp_path / "none.json"], failed=True)
    watch.look(2)
    assert said[0].startswith("1 of 4 trials done, 1 failed, 2 running, about 61 s left")
    assert "| neggrad" in said[0]
    assert told[-1] == (2, {"done": 1, "failed": 1, "running": 2})
    now[0] = 130
    watch.look(2)
    assert len(said) == 1  # nothing new


def test_readme_has_every_flag_of_its_own(script):
    code, told, _ = script(main_sweep.main, "--help")
    assert code == 0
    section = (ROOT / "README.md").read_text().split("## Many runs: sweeps")[1].split("\n## ")[0]
    flags = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
    assert flags == {f"--{name.replace('_', '-')}" for name in main_sweep.OWN} - {"--dry-run"}
    assert all(flag in told for flag in flags)
