"""Test the tables of accuracies: means, marks, rows, published numbers, and the three files."""

import io
import json
import re

from conftest import ROOT
import pandas as pd
import pytest
import tabled
from tabled import BEFORE, NONE, cells, csv

from l2ul.methods.settings import SHARED
from l2ul.reporting import published, summary
import main_tables

folder, tables = tabled.folder, tabled.tables  # fixtures


def test_mean_deviation_and_bold_for_the_best(folder, tables, tmp_path):
    folder(
        BEFORE,
        {"acc_test": 72.0},
        {"seed": 1, "acc_test": 74.0},
        {"method": "neggrad", "acc_test": 50.0, "pgd_eps": None},
        {"method": "neggrad", "seed": 1, "acc_test": 52.0, "pgd_eps": None, "acc_retain": 90.0},
        {"method": "oracle", "needs_retain": True, "acc_test": 88.0, "acc_retain": 99.0},
        {"method": "oracle", "needs_retain": True, "acc_test": 88.0, "acc_retain": 99.0, "seed": 1},
    )
    markdown = tables()
    assert cells(markdown, "method") == ["cifar10, resnet20, k = 16", "", ""]
    assert cells(markdown, "") == ["D_f", "D_r", "D_test"]
    assert cells(markdown, "adv") == ["0.00 ± 0.00", "80.00 ± 0.00", "**73.00 ± 1.41**"]
    assert cells(markdown, "neggrad") == ["0.00 ± 0.00", "**85.00 ± 7.07**", "51.00 ± 1.41"]
    assert cells(markdown, "oracle")[2] == "88.00 ± 0.00"
    assert cells(markdown, "before")[2] == "91.00 (n=1)"
    assert "over 2 seeds unless it states another n" in markdown
    assert "Methods that train on D_r: `oracle`" in markdown
    rows = [line.split("|")[1].strip() for line in markdown.splitlines() if line.startswith("| ")][2:]
    assert rows == ["before", "neggrad", "oracle", "adv"]  # as in the registry
    row = csv(tmp_path).query("method == 'adv' and metric == 'acc_test'").iloc[0]
    assert (row["mean"], round(row["std"], 4), row["n"], row["runs"], row["bold"]) == (73.0, 1.4142, 2, 2, True)
    assert csv(tmp_path)["bold"].sum() == 2


def test_runs_that_did_not_forget_are_marked_and_not_averaged(folder, tables, tmp_path):
    diverged = {"status": "diverged"} | NONE
    folder(
        *({"seed": seed} for seed in range(3)),
        {"k": 64, "acc_test": 72.0},
        {"k": 64, "seed": 1, "acc_test": 10.0, "acc_forget": 50.0, "status": "cap"},
        {"k": 64, "seed": 2} | diverged,
        *({"k": 128, "seed": seed, "acc_forget": 40.0 + seed, "status": "cap"} for seed in range(3)),
        *({"k": 256, "seed": seed} | diverged for seed in range(2)),
        {"k": 256, "seed": 2, "status": "failed"} | NONE,
    )
    markdown = tables()
    found = cells(markdown, "adv")
    assert found[3] == "0.00 (1 of 3; 1 cap, 1 diverged)"
    assert found[5] == "72.00 (1 of 3; 1 cap, 1 diverged)"
    assert found[6] == "41.00 ± 1.00† (3 cap)"
    assert found[9:] == ["diverged (2), failed (1)"] * 3
    assert found[2] == "**70.00 ± 0.00**"
    assert "**" not in "".join(found[3:])  # the best must have forgotten in every run
    assert "reached the cap (max_passes = 1000)" in markdown
    row = csv(tmp_path).query("k == 128 and metric == 'acc_forget'").iloc[0]
    assert pd.isna(row["mean"])
    assert (row["n"], row["runs"], row["cap"], row["mean_cap"]) == (0, 3, 3, 41.0)


def test_other_settings_and_weights_are_rows_of_their_own(folder, tables):
    folder(
        {},
        {"seed": 1},
        {"acc_test": 20.0, "bn": "eval"},
        {"acc_test": 30.0, "unlearn_lr": 1e-4, "pgd_eps": 2.0},
        {"acc_test": 90.0, "checkpoint_sha256": "f" * 64},
        BEFORE,
        BEFORE | {"seed": 1},
    )
    markdown = tables()
    assert cells(markdown, "adv")[2] == "**70.00 ± 0.00**"
    assert cells(markdown, "adv (bn=eval)")[2] == "20.00 (n=1)"
    assert cells(markdown, "adv (pgd_eps=2, unlearn_lr=0.0001)")[2] == "30.00 (n=1)"
    assert cells(markdown, "adv (weights ffffffffffff)")[2] == "90.00 (n=1)"  # not compared with the others
    assert "`before`, rows with other weights or images and published numbers are not compared." in markdown
    assert "Rows with brackets" in markdown
    assert "Rows without brackets: bn=train, pgd_eps=4, unlearn_lr=0.001.\n" in markdown
    assert "## Missing" not in markdown  # rows with brackets are extras


def test_rows_with_surrogate_images_are_named_and_not_compared(folder, tables, tmp_path):
    folder(
        {"method": "distill", "acc_test": 88.0},
        {"method": "distill", "acc_test": 90.0, "surrogate": "test:0-500"},
        {"method": "distill", "acc_test": 90.0, "surrogate": "test:0-500", "seed": 1},
        {"method": "distill", "acc_test": 88.0, "seed": 1},
    )
    markdown = tables()
    assert cells(markdown, "distill")[2] == "**88.00 ± 0.00**"
    assert cells(markdown, "distill (surrogate=test:0-500)")[2] == "90.00 ± 0.00"
    assert "do not train on D_r or surrogate images" in markdown
    needs = dict(csv(tmp_path)[["row", "needs"]].drop_duplicates().itertuples(index=False))
    assert needs == {"distill": "D_f", "distill (surrogate=test:0-500)": "D_f, surrogate"}


def test_runs_measured_on_images_that_have_changed_have_rows_of_their_own(folder, tables):
    runs = [
        {"acc_test": 70.0},  # of an earlier version
        {"acc_test": 72.0, "seed": 1, "data_sha256": "a" * 64},
        {"acc_test": 60.0, "seed": 2, "data_sha256": "b" * 64},
    ]
    folder(*runs[:2])
    assert cells(tables(), "adv")[2] == "**71.00 ± 1.41**"
    folder(runs[2])
    markdown = tables()
    assert [cells(markdown, f"adv (D_r and D_test {name * 12})")[2] for name in "ab"] == ["72.00", "60.00"]
    assert cells(markdown, "adv")[2].strip("*") == "70.00"


def test_surrogate_folders_of_one_name_with_other_images_have_rows_of_their_own(folder, tables):
    distill = {"method": "distill", "surrogate": "week"}
    folder(distill | {"surrogate_sha256": "a" * 64}, distill | {"surrogate_sha256": "b" * 64, "acc_test": 60.0})
    markdown = tables()
    assert cells(markdown, f"distill (surrogate images {'a' * 12})")[2] == "70.00"
    assert cells(markdown, f"distill (surrogate images {'b' * 12})")[2] == "60.00"
    assert "Problems" not in markdown


def test_of_two_equally_frequent_settings_the_default_is_the_main_row(folder, tables):
    folder({"bn": "eval", "acc_test": 20.0}, {})
    assert cells(tables(), "adv (bn=eval)")[2] == "20.00"


def test_two_forget_sets_of_a_seed_have_rows_of_their_own(folder, tables):
    folder({"forget_sha256": "a" * 64}, {"forget_sha256": "b" * 64, "acc_test": 60.0})
    markdown = tables()
    assert cells(markdown, "adv (D_f aaaaaaaaaaaa)")[2] == "70.00"  # not compared: each is of other images
    assert cells(markdown, "adv (D_f bbbbbbbbbbbb)")[2] == "60.00"


def test_two_forget_sets_of_a_seed_have_rows_of_their_own_for_all_seeds(folder, tables):
    other = {"forget_sha256": "b" * 64, "acc_test": 60.0}
    folder({"forget_sha256": "a" * 64}, other, other | {"seed": 1, "acc_test": 62.0})
    folder({"seed": 2, "forget_sha256": "c" * 64})
    markdown = tables()
    assert cells(markdown, "adv (D_f aaaaaaaaaaaa)")[2] == "70.00"
    assert cells(markdown, "adv (D_f bbbbbbbbbbbb)")[2] == "61.00 ± 1.41 (n=2)"
    assert cells(markdown, "adv")[2] == "**70.00**"


def test_settings_that_differ_after_six_digits_have_rows_of_their_own(folder, tables):
    folder({}, {"unlearn_lr": 0.01234567, "acc_test": 10.0}, {"unlearn_lr": 0.01234568}, {"unlearn_lr": 0.01 / 3})
    markdown = tables()
    assert cells(markdown, "adv (unlearn_lr=0.01234567)")[2] == "10.00"
    assert cells(markdown, "adv (unlearn_lr=0.01234568)")[2] == "**70.00**"
    assert cells(markdown, "adv (unlearn_lr=0.00333333)")[2] == "**70.00**"


def test_published_accuracies_stand_below_ours_with_their_source(folder, tables, tmp_path):
    at = {"model": "resnet18", "k": 256, "acc_test": 46.0}
    folder(at | {"method": "adv_imp"}, at, at | {"k": 16})
    markdown = tables()
    lines = [line.split("|")[1].strip() for line in markdown.splitlines() if line.startswith("| ")][2:]
    assert lines == [
        "oracle, published¹",
        "adv",
        "adv, published¹",
        "adv_imp",
        "adv_imp, published¹",
        "StructGuard, published¹",
    ]
    assert cells(markdown, "adv_imp, published¹") == ["", "", "", "", "", "45.44"]
    assert cells(markdown, "oracle, published¹")[5] == "38.59 (derived)"
    assert f"¹ Published by others, not measured here: {published.SOURCE}" in markdown
    theirs = csv(tmp_path).dropna(subset="published")
    assert theirs["published"].tolist() == [38.59, 36.69, 45.44, 56.32]
    assert theirs["mean"].isna().tolist() == [True, False, False, True]
    assert set(theirs["metric"]) == {"acc_test"}


@pytest.mark.parametrize(
    "change", [{"goal": "relabel", "acc_relabel": 100.0}, {"k": 128}, {"model": "resnet20"}, {"dataset": "other"}]
)
def test_published_accuracies_are_shown_for_their_experiment_only(folder, tables, change):
    folder({"model": "resnet18", "k": 256} | change)
    assert "published¹" not in tables()


def test_relabelling_and_other_goals_have_tables_of_their_own(folder, tables):
    folder({}, {"goal": "relabel", "acc_relabel": 100.0, "acc_test": 60.0})
    first, second = tables().split("## Goal relabel")
    assert cells(first, "adv") == ["0.00", "**80.00**", "**70.00**"]
    assert cells(second, "") == ["D_f", "relabelled", "D_r", "D_test"]
    assert cells(second, "adv") == ["0.00", "100.00", "**80.00**", "**60.00**"]


def test_continual_runs_have_a_row_for_each_step(folder, tables):
    steps = [{"continual_step": n, "continual_size": 8, "k": 8 * n, "acc_forget_earlier": None} for n in (1, 2)]
    steps[1]["acc_forget_earlier"] = 12.5
    folder(*steps, {}, *(step | {"seed": 1, "acc_forget_earlier": step["k"] - 3.5} for step in steps[1:]))
    markdown = tables()
    plain, continual = markdown.split("## Goal misclassify, continual")
    assert cells(plain, "adv") == ["0.00", "**80.00**", "**70.00**"]
    assert cells(continual, "method")[0] == "cifar10, resnet20, 8 per step"
    assert cells(continual, "") == ["D_f", "earlier D_f", "D_r", "D_test"]
    assert cells(continual, "adv, step 1 (k = 8)") == ["0.00 (n=1)", "", "**80.00** (n=1)", "**70.00** (n=1)"]
    assert cells(continual, "adv, step 2 (k = 16)")[1] == "12.50 ± 0.00"
    assert "k = 8 (8 per step): `adv` seed 1" in markdown
    assert "--continual-step 8" in markdown.split("```bash")[1]


def test_age_groupings_and_samples_of_the_retain_set_are_named(folder, tables):
    age = {"dataset": "utkface", "model": "resnet18_cifar100"}
    folder(
        age | {"age_grouping": "TNN"},
        age | {"age_grouping": "MFD", "retain_sample": 500, "acc_retain_low": 78.0, "acc_retain_high": 82.0},
    )
    markdown = tables()
    names = ["utkface MFD, resnet18_cifar100, k = 16", "utkface TNN, resnet18_cifar100, k = 16"]
    assert cells(markdown, "method")[::3] == names
    assert "resnet18_cifar100: D_r is measured on a random sample of 500 of its images, within ± 2.00" in markdown


def test_the_order_of_files_does_not_matter(folder, tables, tmp_path):
    changes = [
        {"seed": s, "k": k, "acc_test": 70.1 + s, "bn": b} for s in (0, 1) for k in (16, 64) for b in ("train", "eval")
    ]
    folder(*changes, into="a/runs")
    first = tables()
    for path in (tmp_path / "a" / "runs").iterdir():
        path.unlink()
    folder(*reversed(changes), into="a/runs")
    assert tables() == first


def test_latex_and_csv_are_complete(folder, tables, tmp_path):
    folder(
        {"dataset": "my_data & co", "acc_forget": 50.0, "status": "cap"},
        {"method": "adv_imp", "dataset": "my_data & co"},
    )
    tables("--output", tmp_path / "tables")
    text = (tmp_path / "tables" / "table.tex").read_text()
    assert r"\multicolumn{3}{c}{my\_data \& co, resnet20}" in text
    assert r"50.00$^\dagger$ (1 cap)" in text
    assert r"adv\_imp & 0.00 & \textbf{80.00} & \textbf{70.00} \\" in text
    opened, closed = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert opened == ["table", "tabular", "minipage"]
    assert sorted(closed) == sorted(opened)
    assert text.replace(r"\{", "").count("{") == text.replace(r"\}", "").count("}")
    assert text.isascii()
    frame = pd.read_csv(io.StringIO((tmp_path / "tables" / "table.csv").read_text()))
    assert len(frame) == 6
    assert not set(frame) & {"rank", "data", "forgot"}


@pytest.mark.reference
def test_the_reference_records_make_a_table(script, tmp_path):
    code, out, _ = script(main_tables.main, "--result-dir", "result_data/reference", "--output", tmp_path)
    assert code == 0
    assert "## Problems" not in out
    runs = [json.loads(path.read_text()) for path in (ROOT / "result_data/reference/digits/runs").glob("*.json")]
    (adv,) = [record for record in runs if record["method"] == "adv"]
    code, out, _ = script(main_tables.main, "--result-dir", "result_data/reference/digits", "--output", tmp_path)
    assert cells(out, "adv")[:3] == [f"{adv[key]:.2f}" for key in ("acc_forget", "acc_retain", "acc_test")]


def test_unknown_keys_and_facts_of_the_machine_change_no_table(folder, tables, tmp_path):
    runs = [{"seed": seed, "k": k, "acc_test": 70.0 + seed} for seed in range(3) for k in (16, 64)]
    folder(*runs)
    before = tables(), csv(tmp_path)
    for path in (tmp_path / "runs").iterdir():
        path.unlink()
    added = ({"hostname": "a"}, {"hostname": "b", "cuda_driver": 550.54}, {}, {"device": "cuda", "python": "3.13.0"})
    folder(*(run | added[place % 4] for place, run in enumerate(runs)))
    assert tables() == before[0]
    assert csv(tmp_path).equals(before[1])


def test_a_key_is_a_setting_only_if_the_record_or_the_schema_says_so(folder, tables):
    own = {"method": "bounded", "method_settings": "margin"}
    folder(
        own | {"margin": 1.0, "loss": 3.0},
        own | {"margin": 2.0, "seed": 1, "loss": 4.0},
        own | {"margin": 1.0, "seed": 2},
    )
    markdown = tables()
    assert cells(markdown, "bounded")[2] == "**70.00 ± 0.00**"
    assert cells(markdown, "bounded (margin=2)")[2] == "**70.00** (n=1)"
    assert "loss=" not in markdown


def numbers(markdown: str) -> list[list[str]]:
    """Return the lines of all tables without their headings."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] not in ("", "method") and not row[0].startswith(":--")]


@pytest.mark.reference
@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_resnet20_compare", "cifar100_resnet20", "utkface"])
def test_the_committed_tables_are_reproduced(script, tmp_path, name):
    folder = f"result_data/reference/{name}"
    code, out, _ = script(main_tables.main, "--result-dir", folder, "--output", tmp_path)
    assert code == 0
    committed = ROOT / folder / "tables"
    assert numbers(out) == numbers((committed / "table.md").read_text())
    for file in ("table.md", "table.tex"):
        assert (tmp_path / file).read_text() == (committed / file).read_text()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), pd.read_csv(committed / "table.csv"))


def test_older_records_have_the_default_of_a_later_setting(folder, tables):
    folder({}, {"seed": 1, "adv_dtype": "float32"}, {"seed": 2, "adv_dtype": "uint8"})
    markdown = tables()
    assert cells(markdown, "adv")[2] == "**70.00 ± 0.00**"
    assert cells(markdown, "adv (adv_dtype=uint8)")[2] == "**70.00** (n=1)"


def test_records_from_before_a_setting_have_the_value_of_that_time(folder, tables):
    kinds = {1: "mixes", 2: "patches", 3: SHARED["distill_stand_ins"].default}
    folder({"method": "distill"}, *({"method": "distill", "seed": n, "distill_stand_ins": kinds[n]} for n in kinds))
    markdown = tables()
    assert cells(markdown, "distill")[2] == "**70.00 ± 0.00**"  # those with mixes, which are most frequent
    assert cells(markdown, "distill (distill_stand_ins=patches)")[2] == "**70.00** (n=1)"


def test_long_settings_are_shortened_for_display_and_exact_as_csv(folder, tables, tmp_path):
    long = "x" * 100_000
    names = [long, f"{long}y", "a\n- b | <c>"]
    folder({}, {"seed": 1}, *({"forget_dir": name} for name in names), {"error": long, "seed": 3})
    page = tables("--html", "--figures", 1, 7, "--expected", tmp_path)
    lines = [line for line in page.splitlines() if line.startswith("| adv (forget_dir=x")]
    assert len(set(lines)) == len(lines) == 2
    assert "| adv (forget_dir=a\ufffd- b \\| \\<c>)" in page
    files = ("table.md", "table.tex", "results.html")
    assert all(long[:1500] not in (tmp_path / "tables" / file).read_text() for file in files)
    settings = [json.loads(text)["forget_dir"] for text in csv(tmp_path)["settings"].unique() if "forget_dir" in text]
    assert sorted(settings) == sorted(names)


def test_tables_that_cannot_be_written_are_refused_before_they_are_made(folder, script, tmp_path, monkeypatch):
    place = folder({})
    monkeypatch.setattr(summary, "summarise", lambda *arguments: pytest.fail("work was begun"))
    (tmp_path / "out" / "results.html").mkdir(parents=True)
    for output, message in (("pyproject.toml/out", "cannot write to"), (tmp_path / "out", "results.html is a folder")):
        code, _, err = script(main_tables.main, "--result-dir", place, "--output", output, "--html")
        assert (code, message in err, err.count("\n")) == (2, True, 1), err


def test_the_table_on_the_screen_has_means_over_seeds_and_counts_runs_that_did_not_forget():
    record = tabled.RECORD | {f"seconds_{phase}": 1.0 for phase in ("attack", "importance", "unlearn", "evaluate")}
    record["metric_seconds_of_your_own"] = 100.0
    table = summary.brief(
        [
            record,
            record | {"seed": 1, "acc_test": 74.0, "status": "cap"},
            record | {"seed": 2, "status": "diverged"} | NONE,
            record | {"k": 4, "method": "neggrad", "status": "diverged"} | NONE,
        ]
    )
    assert table["method"].tolist() == ["adv", "neggrad"]
    first, second = table.to_dict("records")
    assert first["D_test %"] == "72.00 ± 2.83"
    assert first["D_f %"] == "0.00 ± 0.00"
    assert (first["runs"], first["seeds"]) == ("3 (1 not forgotten, 1 diverged)", "0 1 2")
    assert first["seconds"] == "4.00 ± 0.00"
    assert (second["D_test %"], second["runs"]) == ("-", "1 (1 diverged)")
    (row,) = summary.brief([record]).to_dict("records")
    assert (row["steps"], row["runs"]) == (str(record["steps"]), "1")
    heading, line, _ = summary.brief_text(table).splitlines()
    assert re.split("  +", heading)[-2:] == ["seeds", "runs"]
    assert re.split("  +", line)[-2:] == ["0 1 2", "3 (1 not forgotten, 1 diverged)"]


def test_runs_of_robust_that_forgot_as_stored_are_averaged_and_counted_as_not_forgotten_as_used(folder, tables):
    robust = {"method": "distill", "robust": 1}
    runs = [
        robust | {"acc_test": 70.0},
        robust | {"acc_test": 74.0, "seed": 1, "status": "cap"},  # too few copies are forgotten
        robust | {"acc_test": 20.0, "seed": 2, "status": "cap", "acc_forget": 50.0},
    ]
    folder(*runs)
    markdown = tables()
    assert cells(markdown, "distill")[2] == "72.00 ± 2.83 (2 of 3; 1 cap)"
    (row,) = summary.brief([tabled.RECORD | {"seconds_unlearn": 1.0} | run for run in runs]).to_dict("records")
    assert row["runs"] == "3 (1 not forgotten as used, 1 not forgotten)"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"retain_sample": 500}, "retain_sample=500"),
        ({"forget_dir": "photos"}, "forget_dir=photos"),
        ({"exif_orientation": "obey"}, "exif_orientation=obey"),
        ({"image_size": 96}, "image_size=96"),
    ],
)
def test_images_of_one_method_alone_are_named_and_not_compared(folder, tables, data, name):
    others = {"image_size": None, "forget_dir": None}
    folder(others, {"method": "neggrad", "acc_test": 80.0} | data, {"method": "salun"} | others)
    markdown = tables("--method", "adv", "neggrad", "--seed", 0, 1)
    assert cells(markdown, f"neggrad ({name})")[2] == "80.00"
    assert cells(markdown, "adv")[2] == "**70.00**"
    lines = markdown.split("```bash\n")[1].split("\n```")[0].splitlines()
    flag = "--" + name.replace("_", "-").replace("=", " ")
    assert {line.split("--method ")[1]: flag in line for line in lines} == {"adv": False, "neggrad": True}


def test_notes_are_on_the_runs_that_are_shown(folder, tables):
    folder({"method": "neggrad", "retain_sample": 500, "status": "cap", "acc_forget": 5.0}, {}, {"seed": 1})
    folder({"method": "salun", "seed": 2})
    assert "sample of 500 of its images, in some of the runs." in tables()
    assert "sample of 500 of its images." in tables("--method", "neggrad")
    markdown = tables("--method", "adv")
    assert "random sample" not in markdown
    assert "version 1" not in markdown


def test_settings_that_have_an_effect_in_no_run_name_no_row(folder, tables):
    folder({"method": "distill", "robust": 0, "robust_pool": 512, "distill_further_steps": 1.5})
    folder({"course": "lr"}, {"k": 64, "retain_sample": 500, "acc_retain_low": 78.0})  # not written by L2UL
    markdown = tables()
    assert cells(markdown, "distill")[2] == "**70.00**"
    assert cells(markdown, "adv (lr=)")[2] == "**70.00**"


def test_settings_without_effect_name_no_row(folder, tables):
    usual = {"robust_keep": 5.0, "robust_pool": 512}
    without = {"method": "distill", "robust": 0, "robust_keep": None, "robust_pool": None}
    robust = {"method": "distill", "robust": 1} | usual
    folder(
        *(without | {"seed": seed} for seed in range(3)),
        {"method": "distill", "seed": 3},  # from before these settings
        robust,
        robust | {"seed": 1},
        robust | {"seed": 2, "robust_keep": 10.0},
    )
    markdown = tables()
    assert cells(markdown, "distill")[2] == "**70.00 ± 0.00**"
    assert cells(markdown, "distill (robust=1)")[2] == "**70.00 ± 0.00** (n=2)"
    assert cells(markdown, "distill (robust=1, robust_keep=10)")[2] == "**70.00** (n=1)"
