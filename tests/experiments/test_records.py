"""Test records: their schema, their files, and the table on the screen."""

import json
import os

from conftest import ROOT
from matplotlib.figure import Figure
import numpy as np
import pandas as pd
import pytest
import torch

from l2ul.common import files
from l2ul.common.errors import InputError
from l2ul.experiments import records
from l2ul.models import checkpoint
from l2ul.reporting import figure_data, figure_set, figures, read_records, rows

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


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mine.txt").write_text("mine")
    with pytest.raises(IsADirectoryError), files.atomic(tmp_path / "weights") as part:
        part.write_text("weights")
    assert [path.name for path in tmp_path.rglob("*")] == ["weights", "mine.txt"]


def test_file_names_of_d_f_keep_bytes_that_are_no_text(tmp_path):
    run = records.RunFiles(tmp_path, "abc")
    run.write(RECORD, [os.fsdecode(b"caf\xc3\xa9/\xff.png")], {}, [])
    assert run.record.with_suffix(".txt").read_bytes() == b"caf\xc3\xa9/\xff.png\n"


def test_removes_partial_files_of_killed_processes(tmp_path):
    (tmp_path / ".a.json.0123.part").touch()
    (tmp_path / ".b.0123.part").mkdir()
    (tmp_path / "c.json").touch()
    files.remove_parts(tmp_path, older_than=0)
    assert len(list(tmp_path.iterdir())) == 3
    files.remove_parts(tmp_path, older_than=2e10)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


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


@pytest.mark.parametrize(
    "change",
    [
        {"acc_test": 10**400},
        {"seed": 10**30},
        {"steps": 10**400},
        {"acc_mine": -(10**400)},
        {"anything": 10**400},
        {"acc_mine": 1e308},
        {"dataset": "a\0b"},
        {"dataset": "x" * 300},
        {"model": ""},
        {"method": "a\nb"},
    ],
)
def test_numbers_and_names_that_nothing_can_use_are_problems(change, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text(json.dumps(RECORD))
    (tmp_path / "runs" / "b.json").write_text(json.dumps(RECORD | change))
    (tmp_path / "runs" / "b.txt").write_text("1\n2\n")
    found, problems = read_records.read([tmp_path])
    assert len(found) == 1
    (problem,) = problems
    assert "expected" in problem
    assert len(problem) < 1000


def test_files_that_are_no_records_are_problems_without_being_read(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "a.json").write_text(json.dumps(RECORD | {"num_train": 10**11}))
    (runs / "a.txt").write_text("1\n2\n")
    os.mkfifo(runs / "pipe.json")
    (runs / "deep.json").write_text("[" * 10**6)
    (runs / "zero.json").symlink_to("/dev/zero")
    with open(runs / "large.json", "wb") as file:
        file.truncate(2**40)
    (record,), problems = read_records.read([tmp_path])
    assert record["listed"] is None
    texts = ["is not JSON", "cannot be read (it is larger than", *["cannot be read (it is not a regular file)"] * 2]
    for problem, text in zip(problems, texts, strict=True):
        assert text in problem
    assert records.read(runs / "deep.json") is None
    assert records.read(runs / "pipe.json") is None
    with pytest.raises(InputError, match="not a regular file"):
        figure_data.curve(runs / "pipe.json")


def test_predictions_that_unpack_to_too_much_are_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_data, "MOST_BYTES", 10**5)
    np.savez_compressed(tmp_path / "a.npz", forget_after=np.zeros(10**6, np.uint8))
    with pytest.raises(InputError, match="is damaged.*more than 100,000 bytes"):
        figure_data.predictions(tmp_path / "a.npz")


def test_figures_have_file_names_and_titles_for_any_name(tmp_path):
    for name in ("a" * 255, "é" * 255, 'a<b>|"?*\\c', "$\\frac{$"):
        block = rows.Block("relabel", None, name, None, name, False)
        figure = Figure()
        figure.subplots().set(title=f"{name} $x$", xticks=[0, 1], xticklabels=[name, name])
        paths = figures.save(figure, pd.DataFrame(), tmp_path / figure_set.stem(block, 1))
        assert [path.is_file() for path in paths] == [True] * 3
    name = figure_set.stem(rows.Block("", None, "hf:a/b", None, "timm:c", False), 1)
    assert name.startswith("hf_a--b_timm_c_1_")


def test_joined_names_of_figures_have_one_meaning():
    def name(dataset, grouping, model):
        return figure_set.subject_name(rows.Block("", None, dataset, grouping, model, False))

    for group in (
        [("pets", None, "big_x"), ("pets_big", None, "x")],
        [("pets", None, "timm:x"), ("pets_timm", None, "x")],
        [("utkface", "TNN", "x"), ("utkface_TNN", None, "x")],
        [("hf:a", None, "b_x"), ("hf:a_b", None, "x")],
    ):
        assert len({name(*parts) for parts in group}) == len(group), group
    assert name("digits", None, "resnet18_nopool") == "digits_resnet18_nopool"
    assert name("fashion_mnist", None, "lenet") == "fashion_mnist_lenet"
    assert name("utkface", "TNN", "resnet18_cifar100") == "utkface_TNN_resnet18_cifar100"
    assert name("hf:a/b:c", None, "timm:vit_tiny") == "hf_a--b=c_timm_vit_tiny"


def test_different_names_give_different_files_of_figures_and_weights(tmp_path):
    names = ["hf:a/b", "hf:a_b", "hf:a:b", "a_b"]
    assert len({figure_set.stem(rows.Block("", None, name, None, "lenet", False), 1) for name in names}) == 4
    assert len({figure_set.stem(rows.Block("", None, "mnist", None, name, False), 1) for name in names}) == 4
    odd = ["a<b", "a>b", "a_b", "é" * 200, "é" * 201]
    assert len({figure_set.stem(rows.Block("", None, name, None, "lenet", False), 1) for name in odd}) == 5
    assert len({checkpoint.candidates(name, "lenet", tmp_path)[0] for name in names}) == 4
