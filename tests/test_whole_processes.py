"""main_unlearn.py as a process: killed at any moment, its OpenMP threads, and a classifier of others on real data."""

import contextlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time

from conftest import FAST, REALDATA, ROOT
import pytest
import torch

from l2ul import models
from l2ul.data import datasets
from l2ul.experiments import records
from l2ul.metrics import accuracy
import main_unlearn


def main_in_child(words):
    """What a forked process does: main_unlearn.py without the time to import torch."""
    torch.set_num_threads(1)
    sys.argv = ["main_unlearn.py", *words]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main_unlearn.main()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_random_moments_it_leaves_no_damage_and_continues(script, few_digits, tmp_path):
    """L2UL_KILLS=20 for a longer test."""
    words = ["--result-dir", tmp_path, "--cache-dir", tmp_path / "cache", *FAST, "--method", "before", "neggrad", "adv"]
    words = list(map(str, [*words, "--threads", 1, "--unlearn-k", 1, 2, "--retain-sample", 10]))
    moments, done = random.Random(0), {}
    for _ in range(int(os.environ.get("L2UL_KILLS", 3))):
        process = multiprocessing.get_context("fork").Process(target=main_in_child, args=(words,))
        process.start()
        time.sleep(moments.uniform(0.2, 2))
        process.kill()
        process.join()
        now = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
        assert all(records.read(path) for path in now)
        assert all(now[path] == when for path, when in done.items())
        done = now
    code, _, err = script(main_unlearn.main, *words)
    assert code == 0, err
    assert sum(path.suffix == ".json" for path in (tmp_path / "runs").iterdir()) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU OpenMP")
def test_openmp_threads_spin_briefly_before_they_sleep():
    environment = {key: value for key, value in os.environ.items() if "OMP" not in key} | {"OMP_DISPLAY_ENV": "verbose"}
    words = [sys.executable, "-c", "import main_unlearn, torch"]
    output = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stderr
    assert re.search(r"OMP_WAIT_POLICY = 'PASSIVE'", output)
    assert re.search(r"GOMP_SPINCOUNT = '2000'", output)
    for script in ROOT.glob("main_*.py"):  # importing l2ul first sets it
        imported = re.findall(r"^(?:from|import) (l2ul|torch)", script.read_text(), re.MULTILINE)
        assert imported[0] == "l2ul", script


@pytest.mark.realdata
def test_a_classifier_of_others_has_its_published_accuracy_on_the_real_test_set(tmp_path):
    words = [sys.executable, str(REALDATA / "unpack_cifar10.py"), str(tmp_path)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    images = datasets.load("cifar10", tmp_path, download=False)
    classifier = models.load("resnet20", 10, REALDATA / "weights" / "resnet20-12fca82f.th")
    assert accuracy.accuracy(accuracy.predict(classifier, images.test.images), images.test.labels) == pytest.approx(
        91.73
    )
