"""Sweeps without Ray: which trials there are, that they equal runs of main_unlearn.py, and what is printed."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import types

from conftest import FAST, ROOT
from helpers import parse_sweep, write_folder
from matplotlib import pyplot
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
import torch

from l2ul import models
from l2ul.cli import options, unlearn_command, unlearn_options
from l2ul.common import tracking
from l2ul.common.cache import Cache
from l2ul.common.errors import InputError
from l2ul.data import datasets
from l2ul.data.images import Images, Split
from l2ul.experiments import execution, records, time_estimates
from l2ul.experiments.time_estimates import TimeEstimates
from l2ul.sweeps import monitor, ranges, ray_cluster, worker
from l2ul.sweeps import options as sweep_options
from l2ul.sweeps.sweep import SweepRunner
from l2ul.sweeps.trials import start_order
import main_sweep
import main_tables

GRID = ["--method", "neggrad", "adv", "--seed", "0:1:2", "--pgd-eps", "1:4:3", "--unlearn-lr", 0.003, 0.01]


@pytest.fixture
def swept(script, tmp_path, few_digits):
    """Call main_sweep.py on few digits, with the result folder of the fixture `run`."""

    def call(*arguments):
        return script(main_sweep.main, "--result-dir", tmp_path, *FAST, *arguments)

    return call


def states(out):
    found = re.findall(r"^(to do|done|failed|measure) +([0-9a-f]{16})", out, re.MULTILINE)
    return {identity: state for state, identity in found}


def plan(tmp_path, *arguments):
    """The trials of a command, and those that are not finished."""
    sweep = parse_sweep(tmp_path, *arguments)
    return SweepRunner(sweep).plan(ranges.product(sweep.axes))


def test_the_trials_are_the_runs_of_main_unlearn_for_each_combination_without_duplicates(swept, run):
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


def test_values_without_an_effect_are_named(swept):
    words = ["--method", "neggrad", "--seed", 0, "--unlearn-lr", 0.01, 0.02, "--pgd-eps", 1, 2, "--age-grouping", "TNN"]
    code, out, _ = swept(*words, "MFD", "--dry-run")
    assert code == 0
    assert out.startswith("2 trials: ")
    unused = re.findall("the values of (.*) give the same runs, which are done once", out)
    assert sorted(unused) == ["--age-grouping", "--pgd-eps"]


def test_a_dry_run_counts_finished_trials_and_estimates_the_time_of_the_others(swept, run):
    run("--method", "neggrad", "--seed", 0)
    code, out, _ = swept("--method", "neggrad", "--seed", 0, 1, 2, "--dry-run")
    assert code == 0
    assert out.startswith("3 trials: 2 to do, 1 done, 0 failed before\n")
    assert sorted(states(out).values()) == ["done", "to do", "to do"]
    assert re.search(
        r"^estimated time: [\d.]+ s one after the other, [\d.]+ s with \d+ at once, by the records in", out, re.M
    )
    _, out, _ = swept("--method", "adv", "--seed", 0, "--dry-run")
    assert "no estimate of the time" in out


@pytest.mark.parametrize(
    "more",
    [
        ["--goal", "relabel", "--method", "correct", "--unlearn-k", 2, 3],
        ["--continual-step", 2, "--unlearn-k", 4, "--method", "neggrad"],
        ["--method", "finetune", "--course", "epochs=1", "lr=0.01"],
        ["--method", "adv_imp", "--bn", "train", "eval", "--retain-sample", 10],
    ],
)
def test_a_worker_gives_the_results_of_main_unlearn_bit_for_bit(tmp_path, few_digits, run, more, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(worker, "WORKBENCH", worker.Workbench())
    sweeping = ["--threads", 2, "--cache-dir", tmp_path / "cache"]
    planned, pending = plan(tmp_path / "swept", *sweeping, *more)
    assert planned == pending
    for trial in start_order(pending, 2):
        found = worker.run_trial(trial.arguments, dict)
        assert [record["k"] for record in found][-1] == trial.settings["k"]
    plain = [word for word in more if word not in ("train", "eval")]
    for last in (["train"], ["eval"]) if "--bn" in more else ([],):
        words = plain[:3] + last + plain[3:] if last else plain
        assert run("--threads", 2, *words)[0] == 0
    ours, theirs = (contents(folder / "runs") for folder in (tmp_path / "swept", tmp_path))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name


def contents(folder):
    """The contents of the files of runs, without times and memory."""
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


def test_a_process_loads_data_and_model_once(tmp_path, few_digits, monkeypatch):
    monkeypatch.chdir(ROOT)
    loads, true_load = [], unlearn_command.load_setup
    monkeypatch.setattr(unlearn_command, "load_setup", lambda *given: loads.append(1) or true_load(*given))
    planned, _ = plan(tmp_path, *GRID)
    assert (len(planned), len(loads)) == (16, 1)


def test_a_process_reads_images_again_for_other_options_of_the_reader(tmp_path):
    write_folder(tmp_path / "data" / "insects")
    torch.save(models.build("resnet20", 2).net.state_dict(), tmp_path / "net.pt")
    words = ["--dataset", "insects", "--data-dir", tmp_path / "data", "--image-size", 32, "--model", "resnet20"]
    words += ["--checkpoint", tmp_path / "net.pt", "--method", "neggrad", "--exif-orientation", "ignore", "obey"]
    planned, _ = plan(tmp_path, *words)
    assert [trial.settings.get("exif_orientation") for trial in planned] == [None, "obey"]


def test_trials_that_share_a_d_adv_start_after_the_one_with_the_largest_k(tmp_path, few_digits):
    words = ["--method", "neggrad", "adv", "--unlearn-k", 1, 2, "--pgd-eps", 1, 2, 3]
    planned, _ = plan(tmp_path, *words)
    ordered = list(start_order(planned, 2))
    assert sorted(trial.identity for trial in ordered) == sorted(trial.identity for trial in planned)
    settings = [(trial.settings["method"], trial.settings["pgd_eps"], trial.settings["k"]) for trial in ordered]
    assert settings[:6] == [("adv", eps, k) for eps, k in ((1, 2), (2, 2), (1, 1), (2, 1), (3, 2), (3, 1))]
    assert {method for method, *_ in settings[6:]} == {"neggrad"}


RUN = dict.fromkeys(f"seconds_{phase}" for phase in ("attack", "importance", "unlearn", "evaluate"))
RUN |= {"dataset": "d", "model": "m", "method": "adv", "k": 16, "status": "forgotten", "seconds_unlearn": 1.0}


def test_the_estimate_is_the_median_and_proportional_to_k():
    found = [RUN | {"seconds_attack": value} for value in (1.0, 2.0, 90.0)]
    estimates = TimeEstimates([*found, RUN | {"status": "failed", "seconds_attack": 0.0}])
    assert estimates.seconds(RUN) == 3.0
    assert estimates.seconds(RUN | {"k": 64}) == 12.0
    assert estimates.seconds(RUN | {"method": "oracle"}) is None
    others = [RUN, RUN | {"k": 64}, RUN | {"method": "oracle"}]
    assert time_estimates.sentence(others, found) == (
        "estimated time: 15 s, by the records in records; 1 of 3 runs have no comparable record"
    )


def test_the_estimate_of_a_step_is_that_of_its_images():
    step = RUN | {"k": 64, "continual_step": 4, "continual_size": 16, "seconds_unlearn": 5.0}
    estimates = TimeEstimates([step, RUN | {"k": 64, "seconds_unlearn": 50.0}])
    assert estimates.seconds(step | {"k": 32, "continual_step": 2}) == 5.0
    assert estimates.seconds(RUN | {"k": 64}) == 50.0


def test_few_runs_take_as_long_as_the_longest():
    runs = [RUN, RUN | {"k": 32}]
    text = "estimated time: 60 s one after the other, 40 s with 2 at once, by the records in records"
    assert time_estimates.sentence(runs, [RUN | {"seconds_unlearn": 20.0}], at_once=16) == text
    assert " at once" not in time_estimates.sentence(runs[:1], [RUN], at_once=16)


def test_the_estimate_leaves_out_damaged_records(run, tmp_path):
    run("--method", "neggrad", "--seed", 0)
    (path,) = (tmp_path / "runs").glob("*.json")
    (tmp_path / "runs" / "a.json").write_text('{"method": "neggrad"}')
    (tmp_path / "runs" / "b.json").write_text(json.dumps(json.loads(path.read_text()) | {"seconds_unlearn": "x"}))
    code, out, err = run("--method", "neggrad", "--seed", 1, "--dry-run")
    assert (code, "estimated time: " in out) == (0, True), err
    path.write_text('{"method": "neggrad"}')
    code, out, err = run("--method", "neggrad", "--seed", 0, "--evaluate", "agreement", "--dry-run")
    assert (code, "1 run to do, 0 done" in out) == (0, True), err


def test_a_continual_sweep_estimates_all_of_its_steps(swept, run):
    run("--method", "neggrad", "--unlearn-k", 2)
    steps = ["--method", "neggrad", "--unlearn-k", 8, "--continual-step", 2, "--dry-run"]
    (one,) = re.findall("estimated time: ([0-9.]+) s, by", swept("--method", "neggrad", "--seed", 1, "--dry-run")[1])
    (four,) = re.findall("estimated time: ([0-9.]+) s, by", swept(*steps)[1])
    assert float(four) == pytest.approx(4 * float(one), abs=2.1)


def fail(tmp_path, *arguments, error="RuntimeError: it broke"):
    planned, _ = plan(tmp_path, *arguments)
    for trial in planned:
        worker.Workbench().record_failure(trial.arguments, error)
    return planned


def test_a_failed_run_is_recorded_counted_in_the_table_and_repeated(swept, run, script, tmp_path, few_digits):
    run("--method", "before", "neggrad", "--seed", 0, "--threads", 1)
    (failed,) = fail(tmp_path, "--method", "neggrad", "--seed", 1, error="many lines\nRuntimeError: it broke")
    found = records.read(failed.files[0].record)
    assert (found["status"], found["acc_forget"], found["steps"]) == ("failed", None, 0)
    assert found["error"].endswith("RuntimeError: it broke")
    assert failed.has_failed
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


def test_what_is_in_the_way_of_the_tables_is_refused_before_any_trial(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(SweepRunner, "run", lambda runner: pytest.fail("work was begun"))
    (tmp_path / "tables" / "table.tex").mkdir(parents=True)
    code, _, err = swept("--method", "neggrad")
    assert (code, f"{tmp_path / 'tables' / 'table.tex'} is a folder" in err, err.count("\n")) == (2, True, 1), err


def test_says_that_files_of_the_user_have_changed_since_the_runs(swept, run, monkeypatch):
    monkeypatch.setattr(execution.Experiment, "own_code", lambda experiment, run: "as it was")
    run("--method", "neggrad", "--seed", 0)
    assert "have changed" not in swept("--method", "neggrad", "--seed", 0, 1, "--dry-run")[1]
    monkeypatch.setattr(execution.Experiment, "own_code", lambda experiment, run: "edited")
    out = swept("--method", "neggrad", "--seed", 0, 1, "--dry-run")[1]
    assert "1 of the runs on record" in out
    assert "the files of your model or method have changed since" in out


def test_says_that_images_have_changed_since_the_runs_also_in_a_search(swept, run, few_digits):
    run("--method", "neggrad", "--seed", 0, "--unlearn-lr", 0.01)
    few_digits.test.labels[0] = 9 - few_digits.test.labels[0]
    expected = "1 of the runs on record"
    assert expected in swept("--method", "neggrad", "--unlearn-lr", 0.01, 0.02, "--dry-run")[1]
    search = ["--retain-sample", 40, "--search", 3, "--dry-run"]  # all of D_r, so that the runs are the same
    out = swept("--method", "neggrad", "--unlearn-lr", 0.01, 0.02, *search)[1]
    assert "1 of 3 settings are on record" in out
    assert expected in out
    assert "the images or labels of D_r or D_test have changed since" in out


def test_a_failure_never_replaces_a_result(run, tmp_path, few_digits):
    run("--method", "neggrad", "--seed", 0)
    (path,) = (tmp_path / "runs").glob("*.json")
    before = path.read_bytes()
    fail(tmp_path, "--method", "neggrad", "--seed", 0, "--rerun")
    assert path.read_bytes() == before


def test_several_that_need_the_same_from_the_cache_compute_it_once(tmp_path):
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


@pytest.mark.parametrize(
    "words", [["--slurm", "2", "--gpus-per-trial", "0"], ["--slurm=2"], ["--slurm", "--pgd-eps", "1:5:9"]]
)
def test_the_job_script_is_valid_and_runs_the_same_command(script, tmp_path, words):
    code, out, _ = script(main_sweep.main, "--method", "adv", *words)
    assert code == 0
    (tmp_path / "job.sh").write_text(out)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    nodes = 1 if "1:5:9" in words else 2
    assert f"#SBATCH --nodes={nodes}\n" in out
    assert f"--min-nodes {nodes} " in out
    assert ("--gpus-per-node" in out) == ("--gpus-per-trial" not in words)
    command = shlex.split(out.splitlines()[-1].split(" -- ")[1])
    assert command[:2] == ["python", "main_sweep.py"]
    sweep = sweep_options.parse(command[2:])
    assert sweep.opts.address == "auto"
    assert sweep.opts.slurm is None
    assert sweep.axes == sweep_options.parse(["--method", "adv", *words]).axes


def test_the_job_script_runs_the_script_of_the_user(tmp_path):
    (tmp_path / "my sweep.py").write_text("import main_sweep\nif __name__ == '__main__':\n    main_sweep.main()\n")
    words = [sys.executable, tmp_path / "my sweep.py", "--method", "adv", "--slurm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    command = shlex.split(done.stdout.splitlines()[-1].split(" -- ")[1])
    assert command == ["python", str(tmp_path / "my sweep.py"), "--method", "adv", "--address", "auto"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--pgd-eps", "1:5"], "--pgd-eps is a range without a number of points"),
        (["--pgd-eps", "1:5", "2:6", "--search", 3], "must be the only value"),
        (["--pgd-eps", "1:5", 6, "--search", 3], "must be the only value"),
        (["--search", 3], "--search has nothing to choose"),
        (["--search", 3, "--pgd-eps", "1:5", "--method", "adv", "adv_imp"], "--search is for one method"),
        (
            ["--search", 3, "--method", "finetune", "--setting", "lr=0.1:0.2:2"],
            "--search cannot vary settings without a",
        ),
        (["--source-free", "--pgd-eps", 1, 2], "add --search N"),
        (["--pgd-eps", "5:1:3"], "goes from 5 to 1"),
        (["--method", "nothing", "--pgd-eps", 1, 2], "nothing"),
        (["--device", "cpu", "cuda"], "unexpected argument 'cuda': --device takes one value"),
        (["--decoder", "cpu", "gpu"], "unexpected argument 'gpu': --decoder takes one value"),
        (["--dataset", "nowhere", "--dry-run"], "nowhere"),
        (["--search", 3, "--model", "resnet20", "resnet18", "--method", "adv", "--dry-run"], "no weights of resnet18"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(swept, words, reason):
    code, _, err = swept(*words)
    assert code == 2
    assert reason in err
    assert len(err.strip().splitlines()) == 1


def test_without_ray_the_error_names_the_command(swept, monkeypatch):
    true_find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else true_find(name))
    code, _, err = swept("--method", "neggrad")
    assert code == 2
    assert err == "main_sweep.py: ray is not installed; run: uv run --extra sweep main_sweep.py …\n"


def test_settings_of_a_method_are_combined_too(tmp_path):
    sweep = parse_sweep(tmp_path, "--method", "finetune", "--course", "epochs=1:2:2", "lr=0.01", "lr=0.1")
    assert sweep.axes["setting"][1] == ("epochs=1", "lr=0.1")
    assert len(sweep.axes["setting"]) == 4
    opts = unlearn_options.parse(sweep.arguments({"setting": sweep.axes["setting"][1]}))
    assert opts.setting == {"epochs": 1, "lr": 0.1}


def test_a_search_in_intervals_starts_with_a_check(swept):
    words = ["--search", 2, "--method", "neggrad", "--unlearn-lr", "1e-4:1e-2:log", "--dry-run"]
    for sample in (["50:100"], [20, 30]):
        code, out, err = swept(*words, "--retain-sample", *sample)
        assert (code, "0 of 2 settings are on record, 2 to try" in out) == (0, True), err
    code, out, err = swept(*words, "--split-seed", 0, 1)
    assert (code, out) == (2, "")
    assert (
        "--search cannot vary --split-seed, which gives the same runs for all values; leave it out, or give one" in err
    )


ROBUST_POOL = ["--method", "distill", "--robust-pool", "8:64"]
FURTHER = ["--method", "distill", "--distill-further-steps", 0, 1, "--distill-steps"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method", "neggrad", "--unlearn-lr", "1e-4:1e-2", "--pgd-eps", "1:5"], "pgd-eps"),  # used_by
        (["--method", "finetune", "--unlearn-lr", 0.1, 0.2], "unlearn-lr"),
        (ROBUST_POOL, "robust-pool"),  # only_with
        ([*ROBUST_POOL, "--robust", 1], None),
        ([*ROBUST_POOL, "--robust", 0, 1], None),
        ([*FURTHER, 5, "--unlearn-k", 80], "distill-further-steps"),  # without
        ([*FURTHER, 0, "--unlearn-k", 80], None),
        ([*FURTHER, "0:9", "--unlearn-k", 80], None),
        ([*FURTHER, 0, "--unlearn-k", 64], "distill-further-steps"),  # more_than
        ([*FURTHER, 0, "--unlearn-k", 64, 80], None),
        ([*FURTHER, 0, "--unlearn-k", 80, "--continual-step", 8], "distill-further-steps"),
    ],
)
def test_a_search_refuses_a_setting_without_an_effect(tmp_path, words, named):
    if named is None:
        assert parse_sweep(tmp_path, "--search", 3, *words).axes
        return
    with pytest.raises(
        InputError, match=f"--search cannot vary --{named}, which has no effect with method {words[1]} "
    ):
        parse_sweep(tmp_path, "--search", 3, *words)


def test_a_setting_of_a_method_of_fixed_length_can_have_one_value(swept):
    words = ["--method", "finetune", "--setting", "epochs=2", "--seed", 0, 1, "--dry-run"]
    code, out, err = swept(*words)
    assert (code, len(states(out))) == (0, 2), err


def test_a_worker_with_a_gpu_does_one_trial_and_others_do_all(monkeypatch):
    """A process keeps the GPU that CUDA found first, and Ray gives the next trial another one."""
    options = []
    fake = types.SimpleNamespace(
        cluster_resources=lambda: {"CPU": 16.0, "GPU": 2.0},
        remote=lambda **given: options.append(given) or (lambda function: function),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    for gpus, slots, calls in ((None, 2, 1), (0.25, 8, 1), (0, 16, 0)):
        cluster = ray_cluster.Cluster(None, gpus=gpus)
        assert cluster.slots() == slots
        assert list(cluster.run_trials([])) == []
        assert options[-1]["max_calls"] == calls
    assert options[1]["num_gpus"] == 0.25


def test_trials_are_tracked_and_their_failures_and_figures_reach_the_sweep(tmp_path, few_digits, monkeypatch):
    sweep = parse_sweep(tmp_path, "--method", "neggrad", "--unlearn-lr", 0.01, 0.02, "--tracker", "csv", "tensorboard")
    assert sweep.shared.count("--tracker") == 1
    monkeypatch.setattr(tracking.TensorBoard, "log", lambda self, row: row["no such key"])
    said = []
    runner = SweepRunner(sweep, report=said.append)
    planned, pending = runner.plan(ranges.product(sweep.axes))
    assert len(pending) == 2
    cluster = types.SimpleNamespace(share=lambda value: None)
    monkeypatch.setattr(ray_cluster, "connect", lambda *arguments, **resources: contextlib.nullcontext(cluster))
    with runner._cluster(worker.run_trial):
        for trial in pending:
            worker.run_trial(trial.arguments, dict)
    assert said == ["--tracker tensorboard failed ('no such key'); the command goes on without it"]
    curves = tmp_path / "tracking" / "csv"
    assert {path.stem for path in curves.glob("*.csv")} == {trial.identity for trial in planned}
    for trial in planned:
        name = f"{trial.identity}.csv"
        assert (curves / name).read_text() == (tmp_path / "runs" / name).read_text()
    pyplot.imsave(tmp_path / "figure.png", [[0, 1]])
    runner.track([tmp_path / "figure.png"], failed=0)
    (run,) = (tmp_path / "tracking" / "tensorboard").glob("sweep_*")
    assert EventAccumulator(str(run)).Reload().Tags()["images"] == ["figure"]


def test_the_threads_of_a_trial_do_not_depend_on_what_runs_beside_it(tmp_path):
    def threads(*words):
        return unlearn_options.parse(parse_sweep(tmp_path, *words).arguments({})).threads

    assert threads() == 1
    assert threads("--cpus-per-trial", 4, "--parallel", 8) == 4
    assert threads("--cpus-per-trial", 0.5) == 1
    assert threads("--cpus-per-trial", 4, "--threads", 2) == 2


def test_the_workers_of_a_trial_are_its_cores_and_those_of_a_command_all(tmp_path, monkeypatch):
    def workers(*words):
        return unlearn_options.parse(parse_sweep(tmp_path, *words).arguments({})).workers

    assert workers() == 1
    assert workers("--cpus-per-trial", 4) == 4
    assert workers("--cpus-per-trial", 4, "--workers", 2) == 2
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda process: range(6), raising=False)
    assert options.default_workers() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert options.default_workers() == 1
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda process: range(256))
    assert options.default_workers() == 16


def test_the_monitor_shows_counts_always_and_a_table_every_minute(run, tmp_path, monkeypatch):
    now, texts, counts = [0.0], [], []
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    run("--method", "neggrad", "--seed", 0)
    (path,) = (tmp_path / "runs").glob("*.json")
    watch = monitor.SweepMonitor(4, lambda ended, **numbers: counts.append((ended, numbers)), texts.append)
    watch.update(2)
    now[0] = 30
    watch.trial_ended([path], failed=False)
    watch.update(2)
    assert texts == []
    now[0] = 61
    watch.trial_ended([tmp_path / "none.json"], failed=True)
    watch.update(2)
    assert texts[0].startswith("1 of 4 trials done, 1 failed, 2 running, about 61 s left")
    assert "| neggrad" in texts[0]
    assert counts[-1] == (2, {"done": 1, "failed": 1, "running": 2})
    now[0] = 130
    watch.update(2)
    assert len(texts) == 1  # no trial has ended since


def test_the_documentation_has_every_flag_of_its_own(script):
    code, help_text, _ = script(main_sweep.main, "--help")
    assert code == 0
    page = (ROOT / "docs" / "sweeps-and-clusters.md").read_text()
    flags = set(re.findall(r"^\| `(--[a-z-]+)", page, re.MULTILINE))
    assert flags == {f"--{name.replace('_', '-')}" for name in sweep_options.OWN} - {"--dry-run"}
    assert all(flag in help_text for flag in flags)


def test_a_model_of_grey_images_leaves_the_data_set_in_colour_for_the_next_model(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (12, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(12) % 10)
    colours = Images("digits", 10, [str(digit) for digit in range(10)], split, split)
    monkeypatch.setitem(datasets.LOADERS, "digits", lambda data_dir, **options: colours)
    bench, identities = worker.Workbench(), []
    torch.manual_seed(0)  # other random weights may look like those of a multi-label model
    for name in ("resnet20", "lenet", "resnet20"):
        path = tmp_path / f"{name}.safetensors"
        models.save(models.build(name, 10), path, {})
        words = ["--model", name, "--checkpoint", path, "--method", "before", "--result-dir", tmp_path, *FAST]
        opts = unlearn_options.parse([*map(str, words), "--single-label"])  # for untrained outputs
        experiment, (run,) = bench.open(opts, torch.device("cpu"))
        assert experiment.setup.images.channels == (1 if name == "lenet" else 3)
        identities.append(run.settings["forget_sha256"])
    assert identities[0] == identities[2]
