"""`--help` of the scripts: quick, as it does not import torch."""

import re
import subprocess
import sys

from conftest import ROOT
import pytest

SLOW = ("torch", "pandas", "matplotlib", "transformers", "ray")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("main_*.py")))
def test_help_does_not_import_what_takes_seconds(script):
    words = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {script}")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert imported.isdisjoint(SLOW)
