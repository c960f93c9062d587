"""The tests of `test_cuda.py` pass on the emulated GPU, in a process of its own."""

import os
import subprocess
import sys

from conftest import ROOT

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "emulated_cuda", "-p", "no:cacheprovider"]


def test_the_project_runs_on_the_emulated_gpu():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    words = [*PYTEST, "tests/test_cuda.py"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    assert " passed" in done.stdout
