"""Requests on damaged images and checkpoints end with a sentence or with true claims."""

import sys

from conftest import ROOT
import pytest


@pytest.fixture
def damaged_files(monkeypatch, script):  # `script` sets the working folder and restores the arguments
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["script"])
    import damaged_files

    monkeypatch.setattr(damaged_files.l2ul, "STARTED", 0.0)  # restored at the end
    return damaged_files


def test_damaged_files_never_end_in_a_traceback_or_a_wrong_claim(damaged_files, tmp_path):
    results = damaged_files.try_all(tmp_path, images=8, checkpoints=6, seed=3)
    assert results["failures"] == []
    assert sum(sum(outcomes.values()) for outcomes in results["outcomes"].values()) == 14
    assert {outcomes["refused"] > 0 for outcomes in results["outcomes"].values()} == {True}
    assert results["forgotten"] > 0


def test_a_wrong_claim_is_noticed(damaged_files, tmp_path):
    net, pixels, labels = damaged_files.train()
    words, _ = damaged_files.damaged_image(tmp_path, 0, net, pixels, labels, damaged_files.random.Random(0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt").write_bytes((tmp_path / "net.pt").read_bytes())
    file = next(path for path in (tmp_path / "in").rglob("[0-9]*.png"))
    row = {"file": file.relative_to(tmp_path / "in").as_posix(), "label": int(file.parent.name)}
    assert damaged_files.check_claims(tmp_path, words, [row]) == f"{row['file']} is still recognised"
    row["label"] = (row["label"] + 1) % 4
    assert damaged_files.check_claims(tmp_path, words, [row]) == f"{row['file']} was not recognised before"
