"""Test records: their schema, their files, and the table on the screen."""

import json

from conftest import ROOT
import numpy as np
import pytest
import torch

from l2ul.common import files
from l2ul.experiments import records
from l2ul.reporting import read_records

RECORD = dict.fromkeys(records.KEYS) | {
    "dataset": "cifar10",
    "model": "resnet20",
    "goal": "misclassify",
    "method": "adv",
    "k": 2,
    "seed": 0,
    "status": "forgotten",
    "steps": 7,
    "acc_forget": 0.0,
    "acc_retain": 80.0,
    "acc_test": 70.0,
    "seconds_attack": 1.0,
    "seconds_importance": 0.5,
    "seconds_unlearn": 2.0,
    "seconds_evaluate": 0.5,
    "pgd_eps": 4.0,
}


def test_id_depends_on_every_setting_but_not_on_their_order():
    settings = {"method": "adv", "k": 16, "pgd_eps": 4.0, "reg_lamb": None}
    first = records.run_id(settings)
    assert first == records.run_id(dict(reversed(settings.items())))
    for name in settings:
        assert records.run_id(settings | {name: 5}) != first
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.run_id(settings | {"pgd_eps": float("nan")})


def test_writes_all_files_of_a_run(tmp_path):
    run = records.RunFiles(tmp_path, "abc")
    assert run.read() is None
    predictions = {"forget_before": torch.tensor([3, 9]), "test_after": torch.tensor([1, 999])}
    run.write({"pgd_eps": 4.0} | RECORD, torch.tensor([40, 7]), predictions, [{"step": 1, "adv": 0.5}])
    assert run.read() == RECORD
    assert list(run.read())[:3] == ["dataset", "model", "checkpoint_sha256"]
    folder = tmp_path / "runs"
    assert sorted(path.name for path in folder.iterdir()) == ["abc.csv", "abc.json", "abc.npz", "abc.txt"]
    assert (folder / "abc.txt").read_text() == "40\n7\n"
    assert (folder / "abc.csv").read_text() == "step,adv\n1,0.5\n"
    with np.load(folder / "abc.npz") as found:
        assert found["forget_before"].dtype == np.uint8
        assert found["test_after"].tolist() == [1, 999]


@pytest.mark.parametrize("content", ["", "{", '{"method": "adv"', "[1]", "{}", "\x00\xff"])
def test_a_damaged_record_is_none(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert records.read(tmp_path / "x.json") is None
    assert records.read(tmp_path / "missing.json") is None


def test_a_record_never_holds_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        records.RunFiles(tmp_path, "abc").write(RECORD | {"acc_test": float("nan")}, torch.tensor([1]), {}, [])
    assert not (tmp_path / "runs" / "abc.json").exists()
    assert not list((tmp_path / "runs").glob(".*"))


def test_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with files.atomic(path) as part:
            part.write_text("ne")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with files.atomic(tmp_path / "folder") as part:
        part.mkdir()
        (part / "a").touch()
    with files.atomic(tmp_path / "folder") as part:
        part.mkdir()
    assert list((tmp_path / "folder").iterdir()) == []


def test_removes_partial_files_of_killed_processes(tmp_path):
    (tmp_path / ".a.json.0123.part").touch()
    (tmp_path / ".b.0123.part").mkdir()
    (tmp_path / "c.json").touch()
    files.remove_parts(tmp_path, older_than=0)
    assert len(list(tmp_path.iterdir())) == 3
    files.remove_parts(tmp_path, older_than=2e10)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_table_has_means_over_seeds_and_counts_runs_that_did_not_forget():
    none = {"acc_forget": None, "acc_retain": None, "acc_test": None}
    table = records.table(
        [
            RECORD,
            RECORD | {"seed": 1, "acc_test": 74.0, "status": "cap"},
            RECORD | {"seed": 2, "status": "diverged"} | none,
            RECORD | {"k": 4, "method": "neggrad", "status": "diverged"} | none,
        ]
    )
    assert table["method"].tolist() == ["adv", "neggrad"]
    first, second = table.to_dict("records")
    assert first["D_test %"] == "72.00 ± 2.83"
    assert first["D_f %"] == "0.00 ± 0.00"
    assert (first["runs"], first["seeds"], first["not forgotten"]) == (3, "0 1 2", "1 cap, 1 diverged")
    assert first["seconds"] == "4.00 ± 0.00"
    assert (second["D_test %"], second["runs"], second["not forgotten"]) == ("-", 1, "1 diverged")
    (row,) = records.table([RECORD]).to_dict("records")
    assert (row["steps"], row["not forgotten"]) == (str(RECORD["steps"]), "0")


@pytest.mark.reference
def test_reference_records_follow_the_schema():
    paths = sorted((ROOT / "result_data" / "reference").glob("*/runs/*.json"))
    assert len(paths) >= 119
    for path in paths:
        record = json.loads(path.read_text())
        assert list(records.problems(record)) == []
        assert list(record)[: len(records.KEYS)] == list(records.KEYS)
        assert set(record) <= set(records.SCHEMA)
        assert record["device"]
    found, problems = read_records.read([ROOT / "result_data" / "reference"])
    assert (len(found), problems) == (len(paths), [])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"k": True}, "k is true; expected an integer of at least 1"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ({"acc_test": 101}, "acc_test is 101; expected a percentage from 0 to 100 or null"),
        ({"pgd_eps": "4"}, 'pgd_eps is "4"; expected a number or null'),
        ({"needs_retain": 0}, "needs_retain is 0; expected true or false or null"),
        ({"std": "1 nan 1"}, 'std is "1 nan 1"; expected text that holds numbers separated by spaces or null'),
        ({"acc_mine": -1}, "acc_mine is -1; expected a percentage from 0 to 100 or null"),
        ({"anything": {}}, "anything is {}; expected a single value or null"),
        ({"status": "cap", "acc_forget": None}, "acc_forget is null but status is cap; expected a percentage"),
    ],
)
def test_a_value_that_breaks_the_schema_is_one_sentence(change, problem):
    assert list(records.problems(RECORD)) == []
    assert list(records.problems(RECORD | change)) == [problem]


def test_a_failed_run_follows_the_schema():
    settings = {name: RECORD[name] for name in records.IDENTITY if name in RECORD}
    record = records.failure(settings, ["metric_distance"], "RuntimeError: no")
    assert list(records.problems(record)) == []
    assert (record["status"], record["error"], record["acc_test"]) == ("failed", "RuntimeError: no", None)


def test_settings_are_the_keys_that_the_schema_or_the_method_declares():
    record = RECORD | {"hostname": "a", "mine": 3, "device": "cuda", "pgd_eps": 2.0}
    assert records.settings(record) == {"checkpoint_sha256": None, "pgd_eps": 2.0}
    assert records.settings(record | {"method_settings": "mine theirs"})["mine"] == 3


def test_the_page_on_records_has_the_schema():
    page = (ROOT / "docs" / "records-and-tables.md").read_text()
    inner = page.partition("<!-- record schema: begin -->")[2].partition("<!-- record schema: end -->")[0]
    assert inner.strip() == records.schema_table().strip(), "paste what l2ul.experiments.records.schema_table returns"
    assert all(key.doc for key in records.SCHEMA.values())
