"""Shared by the tests of tables: a record, a folder of records, and a call of main_tables.py."""

import itertools
import json
import re

import pandas as pd
import pytest

from l2ul.experiments import records
import main_tables

NONE = {"acc_forget": None, "acc_retain": None, "acc_test": None}
RECORD = dict.fromkeys(records.KEYS) | {
    "dataset": "cifar10",
    "model": "resnet20",
    "checkpoint_sha256": "12fca82f0bebc413",
    "method": "adv",
    "needs_retain": False,
    "goal": "misclassify",
    "k": 16,
    "seed": 0,
    "status": "forgotten",
    "steps": 7,
    "acc_forget": 0.0,
    "acc_retain": 80.0,
    "acc_test": 70.0,
    "device": "cpu",
    "unlearn_lr": 1e-3,
    "max_passes": 1000,
    "bn": "train",
    "pgd_eps": 4.0,
    "mean": "0.485 0.456 0.406",
    "std": "0.229 0.224 0.225",
    "acc_relabel": None,
}
BEFORE = {"method": "before", "status": "done", "acc_forget": 100.0, "acc_test": 91.0, "max_passes": None, "bn": None}
BEFORE |= {"unlearn_lr": None, "pgd_eps": None}


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes copies of RECORD with changes, and returns their folder."""
    number = itertools.count()

    def write(*changes, into="runs"):
        (tmp_path / into).mkdir(exist_ok=True, parents=True)
        for change in changes:
            (tmp_path / into / f"{next(number):02}.json").write_text(json.dumps(RECORD | change))
        return tmp_path

    return write


@pytest.fixture
def tables(script, tmp_path):
    """Return a function that calls main_tables.py on the folder and returns the Markdown."""

    def call(*arguments):
        code, out, err = script(main_tables.main, "--result-dir", tmp_path, *arguments)
        assert (code, err) == (0, "")
        markdown = (tmp_path / "tables" / "table.md").read_text()
        assert out.startswith(markdown)
        assert f"written to {tmp_path / 'tables'}:\n  table.md .csv .tex\n" in out
        return markdown

    return call


def cells(markdown: str, row: str) -> list[str]:
    """Return the cells of the first row with this name."""
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in markdown.splitlines()]
    return next(line[1:] for line in lines if line and line[0] == row)


def csv(tmp_path) -> pd.DataFrame:
    return pd.read_csv(tmp_path / "tables" / "table.csv")
