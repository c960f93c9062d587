"""An interrupted command: what it leaves, and that the same command ends with the same results."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys

from conftest import FAST
from helpers import without_costs
import numpy as np
import pytest
import torch
from tracked import read_csv, read_tensorboard

from l2ul import unlearn as unlearning
from l2ul.cli import exit_codes
from l2ul.experiments import execution
import main_unlearn

STEPS = {"distill": ["--distill-steps", 6], "adv_imp": ["--max-passes", 6, "--unlearn-lr", 1e-5]}


def contents(folder):
    """The contents of all files of runs, without times and memory."""
    found = {}
    for path in sorted((folder / "runs").iterdir()):
        if path.suffix == ".json":
            found[path.name] = without_costs(json.loads(path.read_text()))
        elif path.suffix == ".npz":
            found[path.name] = {name: classes.tolist() for name, classes in np.load(path).items()}
        else:
            found[path.name] = path.read_text()
    return found


def sigterm_at(step, monkeypatch):
    """Send this process a SIGTERM once, after some steps of the loop."""
    true_unlearn, sent = unlearning.unlearn, []

    def unlearn(*arguments, on_step, **options):
        def on_each_step(row):
            on_step(row)
            if row["step"] == step and not sent:
                sent.append(step)
                signal.raise_signal(signal.SIGTERM)

        return true_unlearn(*arguments, on_step=on_each_step, **options)

    monkeypatch.setattr(unlearning, "unlearn", unlearn)


@pytest.mark.parametrize("method", STEPS)
def test_after_sigterm_the_same_command_ends_with_the_results_of_an_uninterrupted_one(
    script, few_digits, tmp_path, monkeypatch, method
):
    def run(folder, *more):
        words = ["--result-dir", tmp_path / folder, *FAST, "--method", method, *STEPS[method], *more]
        return script(main_unlearn.main, *words)

    trackers = ["--tracker", "csv", "tensorboard"]
    assert run("uninterrupted")[0] == 0
    expected = contents(tmp_path / "uninterrupted")
    (record,) = (one for path, one in expected.items() if path.endswith(".json"))
    assert record["steps"] > 3
    with monkeypatch.context() as patch:
        sigterm_at(3, patch)
        stopped, _, err = run("interrupted", *trackers)
    assert stopped == 143
    assert err.strip() == f"main_unlearn.py: stopped by SIGTERM; {exit_codes.CONTINUES}"
    (state,) = (tmp_path / "interrupted" / "runs").iterdir()
    assert state.name.endswith(".state.pt")
    tracked = tmp_path / "interrupted" / "tracking"
    assert read_csv(tracked)[2] is None
    assert "\nresume " in run("interrupted", "--dry-run")[1]
    counts = []

    @contextlib.contextmanager
    def bar(description, total=None):
        yield lambda count=1, note="", limit=None: counts.append((description, count, limit))

    monkeypatch.setattr(execution, "progress_bar", bar)
    _, out, _ = run("interrupted", *trackers)
    done = int(re.search(r"continuing after step (\d+)", out)[1])
    assert 3 <= done < record["steps"]
    counted = [(count, limit) for description, count, limit in counts if description.startswith(method)]
    assert [count for count, _ in counted] == [done, *[1] * (record["steps"] - done)]
    assert all(limit >= record["steps"] for _, limit in counted)
    assert contents(tmp_path / "interrupted") == expected
    (curve,) = (tmp_path / "interrupted" / "runs").glob("*.csv")
    assert (tracked / "csv" / curve.name).read_text() == curve.read_text()
    rows, _, results = read_tensorboard(tracked)
    assert [row["step"] for row in rows] == [row["step"] for row in read_csv(tracked)[0]]
    assert results["steps"] == record["steps"]


def main_until_sigterm(words, errors):
    """What a forked process does: main_unlearn.py, which gets a SIGTERM in the loop of distill."""
    true_unlearn = unlearning.unlearn

    def unlearn(model, images, labels, method, *, on_step, **options):
        def on_each_step(row):
            on_step(row)
            if method == "distill" and row["step"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        return true_unlearn(model, images, labels, method, on_step=on_each_step, **options)

    unlearning.unlearn = unlearn
    torch.set_num_threads(1)
    sys.argv = ["main_unlearn.py", *words]
    with open(errors, "w") as err, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        main_unlearn.main()


def test_a_process_that_gets_sigterm_in_distill_leaves_what_another_continues(script, few_digits, tmp_path):
    settings = [*FAST, "--threads", 1, "--method", "neggrad", "distill", "--distill-steps", 9]

    def words(folder):
        return list(map(str, ["--result-dir", folder, "--cache-dir", tmp_path / "cache", *settings]))

    errors = tmp_path / "errors"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=main_until_sigterm, args=(words(tmp_path / "one"), errors))
    process.start()
    process.join()
    assert process.exitcode == 143
    assert errors.read_text() == f"main_unlearn.py: stopped by SIGTERM; {exit_codes.CONTINUES}\n"
    suffixes = sorted("".join(path.suffixes) for path in (tmp_path / "one" / "runs").iterdir())
    assert suffixes == [".csv", ".json", ".npz", ".state.pt", ".txt"]  # neggrad is recorded
    for folder in ("one", "uninterrupted"):
        code, out, err = script(main_unlearn.main, *words(tmp_path / folder))
        assert code == 0, err
        assert ("continuing after step" in out) == (folder == "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "uninterrupted")
