"""`--help` of the scripts: quick, as it does not import torch."""

import re
import subprocess
import sys

from conftest import ROOT
import pytest

from l2ul.sweeps import ranges
from l2ul.sweeps.options import VALUES

SLOW = ("torch", "pandas", "matplotlib", "transformers", "ray")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("main_*.py")))
def test_help_does_not_import_what_takes_seconds(script):
    words = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {script}")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert imported.isdisjoint(SLOW)


def test_ranges_in_the_help_of_sweeps_are_what_it_says():
    shown = re.findall(r"^(\S+) +\d values .*: ([\d. ]+)$", VALUES, re.MULTILINE)
    assert len(shown) == 2
    for text, numbers in shown:
        assert ranges.values(text, float) == [float(number) for number in numbers.split()]
