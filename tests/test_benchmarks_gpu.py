"""The script that runs on a GPU: its processes, limits and files, and the command lines that it makes."""

import argparse
import json
import sys
import tarfile
import time

from conftest import ROOT
import pytest

from l2ul.cli import pretrain_command, unlearn_options
from l2ul.training.recipe import Recipe


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def session(gpu, tmp_path):
    places = {"data": tmp_path / "data", "out": tmp_path / "out", "work": tmp_path / "work"}
    options = {"device": "cpu", "tiny": False, "seconds": 60, "parallel": 2, "threads": 1, "epochs": None}
    return gpu.Session(argparse.Namespace(**places, **options, weights=None, precision="tf32"))


def python(gpu, name, code, limit=30.0, **options):
    return gpu.Task(name, [sys.executable, "-S", "-c", code], limit, **options)


def test_a_process_that_fails_or_is_too_slow_does_not_stop_the_others(gpu, session):
    codes = {
        "slow": "import time; time.sleep(60)",
        "bad": "print('the reason'); raise SystemExit(2)",
        "good": "print(1)",
    }
    tasks = [python(gpu, name, code, 1.0 if name == "slow" else 30) for name, code in codes.items()]
    session.run("part", [*tasks, python(gpu, "five", "raise SystemExit(5)", ok=(0, 5))], 2, 30)
    results = json.loads((session.out / "results.json").read_text())
    status = {name: row["status"] for name, row in results["parts"]["part"].items()}
    assert status == {"slow": gpu.STOPPED, "bad": "FAILED, exit code 2", "good": gpu.OK, "five": gpu.OK}
    assert results["torch"]
    with tarfile.open(session.out / "results.tar.gz") as tar:
        assert b"the reason" in tar.extractfile("logs/part.bad.txt").read()


def test_no_process_starts_after_the_limit_of_a_part(gpu, session):
    started = time.monotonic()
    tasks = [python(gpu, str(number), "import time; time.sleep(60)") for number in range(3)]
    session.run("part", tasks, 1, 3.0)
    assert time.monotonic() - started < 20
    assert tasks[0].status == gpu.STOPPED
    assert tasks[2].status.startswith("not started")


def test_jobs_stop_if_the_first_three_fail(gpu, session, monkeypatch):
    calls = iter(range(100))
    code = "raise SystemExit({})"
    monkeypatch.setattr(
        gpu, "script", lambda opts, name, *words: [sys.executable, "-S", "-c", code.format(next(calls) + 1)]
    )
    session.opts.parallel = 1
    ended = gpu.jobs(session, 40, "jobs", ["a"] * 6, "")
    assert [task.status[:6] for task in ended] == ["FAILED"] * 3 + ["not st"] * 3


def test_large_files_are_split_and_joined(gpu, tmp_path):
    content, out = bytes(range(256)) * 40, tmp_path / "out"
    out.mkdir()
    (tmp_path / "net.safetensors").write_bytes(content)
    pieces = gpu.split(tmp_path / "net.safetensors", out, 1000)
    assert len(pieces) == 11
    gpu.join(out, tmp_path / "joined")
    assert (tmp_path / "joined" / "net.safetensors").read_bytes() == content
    (out / "results.json").write_text(json.dumps({"weights": {"net.safetensors": {"sha256": "0"}}}))
    with pytest.raises(SystemExit, match="copy its pieces again"):
        gpu.join(out, tmp_path / "joined")


def test_data_sets_travel_in_parts(gpu, tmp_path):
    source, data = tmp_path / "small", tmp_path / "data"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.bin").write_bytes(bytes([number]) * 1000)
    script = tmp_path / "unpack_small.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'unpacked').mkdir(parents=True)")
    sizes = []
    for piece in (1, 2, 3):
        gpu.pack([source], tmp_path / "part", piece, 3, [script] if piece == 3 else [])
        sizes.append(len(list((tmp_path / "part" / "small").iterdir())))
        assert not (data / "unpacked").exists()
        assert gpu.unpack(tmp_path / "part", tmp_path / "parts", data)
    assert sum(sizes) == 5
    assert max(sizes) == 2
    assert (data / "unpacked").is_dir()


def test_the_options_of_all_jobs_and_recipes_are_valid(gpu):
    for plan in gpu.PLANS.values():
        for line in plan.jobs:
            words = ["--dataset", plan.dataset, "--model", plan.model, *plan.common.split(), *line.split()]
            assert unlearn_options.parse(words).dataset == plan.dataset
        for recipe in plan.recipes.values():
            parser = argparse.ArgumentParser()
            pretrain_command.add_recipe(parser, Recipe(epochs=1, lr=0.1), {})
            parser.parse_args(recipe.split())


def test_jobs_are_read_without_comments(gpu, tmp_path):
    (tmp_path / "jobs.txt").write_text("# explore\n--seed 0  # first\n\n--seed 1\n")
    assert gpu.read_jobs(tmp_path / "jobs.txt") == ["--seed 0", "--seed 1"]


@pytest.mark.reference
def test_records_are_summarised_by_method_settings_and_k(gpu):
    lines = gpu.summary_of_records(ROOT / "result_data" / "reference" / "digits" / "runs")
    assert any(line.startswith("distill") and "forgotten" in line for line in lines)


def test_the_time_of_an_epoch_leaves_out_the_first(gpu, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("epoch 1/3: loss 1, D_test 2 %, 5,000 images/s\nepoch 2/3: loss 1, D_test 2 %, 8,333 images/s\n")
    assert gpu.epoch_seconds(log) == pytest.approx(2.0, abs=0.01)
    assert gpu.epoch_seconds(tmp_path / "absent.txt") is None


def test_training_takes_the_epochs_that_fit_and_keeps_the_best_model(gpu, session, monkeypatch):
    """Replace training by a process that prints the lines of epochs and copies weights."""
    weights = ROOT / "data" / "weights" / "digits_resnet20.safetensors"
    seen = []

    def task(opts, plan, training, kind, limit):
        seen.append((kind, training))
        rate = {"large": 50_000, "small": 25_000, "eager": 20_000}[training.recipe]
        line = f"'epoch %d/4: loss 1.0000, D_test 50.00 %%, {rate:,} images/s' % epoch"
        copy = f"import shutil; shutil.copy({str(weights)!r}, {str(gpu.trained_file(opts, plan, training, kind))!r})"
        return python(gpu, f"{kind}_{training.recipe}", f"{copy}\nfor epoch in range(1, 5): print({line})")

    monkeypatch.setattr(gpu, "training_task", task)
    monkeypatch.setattr(gpu, "script", lambda opts, name, *words: [sys.executable, "-S", "-c", "pass"])
    session.opts.device = "cuda"
    tasks = gpu.train(session, 200.0, gpu.PLANS["cifar10"])
    assert [task.status for task in tasks] == [gpu.OK] * 7  # three probes, two trainings, two measurements
    whole = {training.recipe: training for kind, training in seen if kind == "whole"}
    assert 120 < whole["large"].epochs <= 141  # 0.88 · (200 - 40) seconds, one second an epoch
    assert whole["large"].epochs // 2 == whole["small"].epochs
    assert all("--cuda-graph" not in training.options for training in whole.values())
    kept = session.results["weights"]["cifar10_resnet18.safetensors"]
    gpu.join(session.out, session.out / "joined")
    assert kept["recipe"] in whole
    assert (session.out / "joined" / "cifar10_resnet18.safetensors").stat().st_size < 0.6 * weights.stat().st_size
