"""Test the tables of further metrics and their legends."""

import tabled
from tabled import BEFORE, NONE, cells, csv

folder, tables = tabled.folder, tabled.tables  # fixtures
FOUND = {"metric_mia_loss_auc": 90.0, "metric_tow": 0.75, "retrained_sha256": "a" * 64}


def further(markdown: str) -> str:
    return markdown.partition("## Further metrics")[2].partition("\n## ")[0]


def test_without_further_metrics_there_is_no_such_table(folder, tables, tmp_path):
    folder(BEFORE, {})
    assert "Further metrics" not in tables()
    assert not csv(tmp_path)["metric"].str.startswith("metric_").any()


def test_rows_are_methods_and_columns_are_metrics(folder, tables, tmp_path):
    folder(
        BEFORE | {"metric_mia_loss_auc": 55.0, "metric_mia_logistic_auc": None},
        FOUND | {"metric_mia_logistic_auc": None},
        FOUND | {"seed": 1, "metric_mia_loss_auc": 94.0, "metric_tow": 0.7512, "metric_sharpness": 0.5},
        {"seed": 2},  # not measured
        {"method": "neggrad", "pgd_eps": None},  # no run of this method was measured
        {"method": "rawp", "status": "diverged", "metric_mia_loss_auc": None, "metric_tow": None} | NONE,
        {"method": "correct", "status": "cap"} | FOUND,
    )
    markdown = tables()
    text = further(markdown)
    assert "### cifar10, resnet20, k = 16, goal misclassify" in text
    assert cells(text, "method") == ["loss AUC", "ToW", "sharpness"]  # no run has the logistic attack
    assert cells(text, "adv") == ["92.00 ± 2.83", "0.7506 ± 0.0008", "0.5000 (n=1)"]
    assert cells(text, "before") == ["55.00 (n=1)", "–", "–"]
    assert cells(text, "rawp") == ["diverged (1)"] * 3
    assert cells(text, "correct") == ["90.00† (1 cap)", "0.7500† (1 cap)", "–"]
    assert "neggrad" not in text
    assert "- loss AUC: membership inference from the model's outputs, D_f against D_test" in text
    assert "AUC in percent; 50 is chance." in text
    assert "- ToW: tug of war" in text
    assert "higher is better." in text
    assert "- sharpness: your own metric." in text
    assert "–: not measured" in text
    assert "CKA" not in text
    row = csv(tmp_path).query("method == 'adv' and metric == 'metric_tow'").iloc[0]
    assert (round(row["mean"], 4), row["n"], row["runs"]) == (0.7506, 2, 2)
    latex = (tmp_path / "tables" / "table.tex").read_text()
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 2
    assert r"loss AUC & ToW & sharpness \\" in latex
    assert r"correct & 90.00$^\dagger$ (1 cap)" in latex


def test_other_goals_sizes_and_steps_have_tables_of_their_own(folder, tables):
    step = {"continual_step": 1, "continual_size": 16}
    folder(FOUND, FOUND | {"k": 64}, FOUND | step, FOUND | step | {"continual_step": 2, "k": 32})
    text = further(tables())
    titles = [line for line in text.splitlines() if line.startswith("###")]
    assert titles == [
        "### cifar10, resnet20, k = 16, goal misclassify",
        "### cifar10, resnet20, k = 64, goal misclassify",
        "### cifar10, resnet20, 16 images per step, goal misclassify",
    ]
    assert cells(text, "adv, step 2 (k = 32)") == ["90.00", "0.7500"]


def test_the_retrained_model_is_not_a_setting(folder, tables):
    folder(FOUND, FOUND | {"seed": 1, "retrained_sha256": "b" * 64, "references_sha256": "c" * 64})
    assert cells(tables(), "adv")[0] == "0.00 ± 0.00"


def test_a_metric_that_is_not_a_number_is_a_problem(folder, tables):
    folder(FOUND, {"seed": 1, "metric_tow": "high"})
    assert 'metric_tow is "high"; expected a number or null' in tables()
