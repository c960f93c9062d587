"""The main script as a process of its own: killed, and on real data."""

import os
import random
import re
import signal
import subprocess
import sys
import time

from conftest import FAST, REALDATA, ROOT
import pytest

from l2ul.data import datasets
from l2ul.experiments import records
from l2ul.metrics import accuracy
import models


def command(folder, *arguments):
    places = ["--result-dir", folder, "--cache-dir", f"{folder}/cache"]
    return [sys.executable, "main_unlearn.py", *places, *map(str, [*FAST, *arguments])]


def test_killed_at_random_moments_it_leaves_no_damage_and_goes_on(tmp_path):
    """L2UL_KILLS=20 for a longer look."""
    settings = ["--threads", 1, "--unlearn-k", 1, 2, "--retain-sample", 100]
    words = command(str(tmp_path), "--method", "before", "neggrad", "adv", *settings)
    moments, done = random.Random(0), {}
    for _ in range(int(os.environ.get("L2UL_KILLS", 2))):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(4, 9))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
        assert all(records.read(path) for path in now)
        assert all(now[path] == when for path, when in done.items())
        done = now
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert sum(path.suffix == ".json" for path in (tmp_path / "runs").iterdir()) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's OpenMP")
def test_threads_wait_a_little_before_they_sleep():
    environment = {key: value for key, value in os.environ.items() if "OMP" not in key} | {"OMP_DISPLAY_ENV": "verbose"}
    words = [sys.executable, "-c", "import main_unlearn"]
    told = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stderr
    assert re.search(r"OMP_WAIT_POLICY = 'PASSIVE'", told)
    assert re.search(r"GOMP_SPINCOUNT = '2000'", told)
    for script in ROOT.glob("main_*.py"):  # what sets it comes before torch in all of them
        imported = re.findall(r"^(?:from|import) (l2ul|torch)", script.read_text(), re.MULTILINE)
        assert imported[0] == "l2ul", script


@pytest.mark.realdata
def test_third_party_classifier_on_the_real_test_set(tmp_path):
    words = [sys.executable, str(REALDATA / "unpack_cifar10.py"), str(tmp_path)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    images = datasets.load("cifar10", tmp_path, download=False)
    classifier = models.load("resnet20", 10, REALDATA / "weights" / "resnet20-12fca82f.th")
    assert accuracy.accuracy(accuracy.predict(classifier, images.test.images), images.test.labels) == pytest.approx(
        91.73
    )
