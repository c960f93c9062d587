"""Test --expected of main_tables.py: which reference runs are compared, and what lies outside their spread."""

import pytest
import tabled
from tabled import BEFORE, NONE, cells

from l2ul.reporting import expected
import main_tables

folder, tables = tabled.folder, tabled.tables  # fixtures
SPREAD = [{"seed": seed, "acc_test": 70.0 + seed, "acc_retain": 80.0 + 3 * seed} for seed in range(3)]


@pytest.fixture
def compared(folder, tables, tmp_path):
    """Write runs and reference runs; return the lines of the section, each as a list of cells, and the section."""

    def compare(ours, references):
        folder(*ours)
        folder(*references, into="reference/runs")
        section = tables("--expected", tmp_path / "reference").split("## Expected")[1].split("## ")[0]
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line]
        return lines[2:], section

    return compare


def test_the_interval_is_that_of_a_further_mean_and_never_narrower_than_rounding():
    low, high = expected.interval([70.0, 71.0, 72.0], 1)
    assert (low + high) / 2 == 71.0
    assert high - 71.0 == pytest.approx(4.3027 * (1 + 1 / 3) ** 0.5, rel=1e-4)
    assert expected.interval([70.0, 71.0, 72.0], 3)[1] == pytest.approx(71 + 4.3027 * (2 / 3) ** 0.5, rel=1e-4)
    assert expected.interval([0.0, 0.0], 1) == (0.0, expected.ROUNDING)
    assert expected.interval([99.0, 90.0], 1) == (0.0, 100.0)
    assert expected.interval([70.0], 1) is expected.interval([], 1) is None


def test_a_shifted_record_is_marked_and_others_are_not(compared):
    before = [BEFORE | {"seed": seed} for seed in range(2)]
    ours = [BEFORE, {"acc_test": 70.5}, {"k": 64, "acc_test": 55.0}]
    lines, section = compared(ours, before + SPREAD + [run | {"k": 64} for run in SPREAD])
    assert [line[:2] for line in lines] == [
        ["cifar10, resnet20, k = 16", "before"],
        ["cifar10, resnet20, k = 16", "adv"],
        ["cifar10, resnet20, k = 64", "adv"],
    ]
    assert [line[-1] for line in lines] == ["within", "within", "**outside: D_test**"]
    assert lines[1][2:5] == ["0.00 (0.00 – 0.10)", "80.00 (68.10 – 97.90)", "70.50 (66.03 – 75.97)"]
    assert lines[2][3:6] == ["80.00 (68.10 – 97.90)", "**55.00 (66.03 – 75.97)**", "1, 3"]
    assert "- 2 of 3 rows with several reference runs are within their spread.\n" in section


def test_runs_that_end_in_another_way_are_outside(compared):
    ours = [{"status": "cap", "acc_forget": 50.0, "max_passes": 1000}, {"k": 64, "status": "diverged"} | NONE]
    lines, _ = compared(ours, SPREAD + [run | {"k": 64} for run in SPREAD])
    assert lines[0][-1] == "**outside: D_f, 1 of 1 cap**"
    assert lines[1][-1] == "**outside: 1 of 1 diverged**"


def test_the_most_similar_reference_runs_are_compared_and_what_differs_is_named(compared):
    others = [run | {"acc_test": 10.0, "pgd_eps": 1.0, "unlearn_lr": 0.1} for run in SPREAD]
    ours = [{"checkpoint_sha256": "ffff", "unlearn_lr": 1e-2}, {"seed": 1, "checkpoint_sha256": "ffff"}]
    lines, _ = compared(ours, SPREAD + others)
    assert [line[-1] for line in lines] == [
        "within; reference runs differ: weights",
        "within; reference runs differ: weights, unlearn_lr 0.001, here 0.01",
    ]
    assert [line[-2] for line in lines] == ["1, 3", "1, 3"]


def test_a_single_reference_run_is_shown_without_a_verdict_and_missing_ones_are_listed(compared):
    lines, section = compared([{"acc_test": 1.0}, {"k": 64}, {"goal": "relabel", "acc_relabel": 100.0}], SPREAD[:1])
    assert [line[-3:] for line in lines] == [["1.00 (70.00)", "1, 1", ""]]
    assert "- One reference run has no spread" in section
    assert "- No reference run: cifar10, resnet20, k = 64, adv; cifar10, resnet20, k = 16, relabel, adv.\n" in section


def test_reference_runs_of_which_one_has_accuracies_give_no_verdict(compared):
    failed = {"seed": 1, "status": "diverged"} | NONE
    lines, section = compared([{"acc_test": 1.0}, {"k": 64} | failed], [{}, failed, {"k": 64} | failed, {"k": 64}])
    assert [line[-3:] for line in lines] == [["1.00 (70.00)", "1, 2", ""], ["", "1, 2", "within; diverged"]]
    assert "- 1 of 1 rows with several reference runs" in section


def test_a_selection_applies_and_the_tables_stay_the_same(folder, tables, tmp_path):
    folder(*SPREAD, {"k": 64})
    folder(*SPREAD, into="reference/runs")
    alone, both = tables(), tables("--expected", tmp_path / "reference", "--unlearn-k", 16)
    assert cells(alone, "adv")[:3] == cells(both, "adv")[:3]
    assert "k = 64" not in both.split("## Expected")[1]


@pytest.mark.reference
def test_a_missing_folder_is_one_sentence_and_the_default_is_that_of_the_committed_records(script, tmp_path):
    code, _, err = script(main_tables.main, "--expected", tmp_path / "none")
    assert code == 2
    assert err.count("\n") == 1
    assert "name one with reference records with --expected FOLDER" in err
    assert main_tables.parse(["--expected"]).expected == main_tables.REFERENCE
    assert list(main_tables.REFERENCE.glob("*/runs/*.json"))
    assert main_tables.parse([]).expected is None


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ({"method_revision": 2}, {}, "method_revision none, here 2"),
        ({}, {"method_revision": 2}, "method_revision 2, here none"),
        ({"surrogate": "test:0-5000"}, {"surrogate": None}, "surrogate none, here test:0-5000"),
        ({"retain_sample": None}, {"retain_sample": 5000}, "retain_sample 5000, here none"),
        ({"robust": 1, "robust_keep": 5.0}, {"robust": 1}, "robust_keep 10.0, here 5.0"),  # the default was 10 before
        ({"robust": 0, "robust_keep": None}, {"robust": 0}, None),
        ({"method_code": None}, {}, None),
    ],
)
def test_versions_and_settings_that_one_side_has_alone_differ(compared, ours, theirs, difference):
    distill = {"method": "distill", "unlearn_lr": None, "pgd_eps": None, "bn": None, "max_passes": None}
    lines, _ = compared([distill | ours], [run | distill | theirs for run in SPREAD])
    assert lines[0][-1] == f"within{f'; reference runs differ: {difference}' if difference else ''}"


def test_a_listed_forget_set_differs_from_the_choice_of_the_seed(compared, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "00.txt").write_text("".join(f"{index}\n" for index in range(16)))
    known = {"num_train": 50_000}
    lines, _ = compared([known], [run | known for run in SPREAD])
    assert lines[0][-1] == "within; reference runs differ: choice of D_f"
