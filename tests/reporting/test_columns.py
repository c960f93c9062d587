"""Test that one entry in the list of columns is enough for a value to appear in every table."""

from dataclasses import replace
import subprocess
import sys

from conftest import ROOT
import pytest
import tabled
from tabled import BEFORE, cells, csv

from l2ul.experiments import records
from l2ul.metrics import columns
from l2ul.metrics.registry import EVALUATIONS, METRICS, metric
from l2ul.reporting import summary

folder, tables = tabled.folder, tabled.tables  # fixtures


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(columns, "COLUMNS", dict(columns.COLUMNS))
    monkeypatch.setitem(METRICS, "metric_sharpness", None)


def test_a_metric_of_your_own_is_in_markdown_csv_and_latex(registry, folder, tables, tmp_path):
    shown = {"heading": "sharpness_1", "legend": "largest eigenvalue", "digits": 1, "better": "down"}
    metric("metric_sharpness", **shown, latex=r"$\lambda_1$")(lambda measured: 0.0)
    folder(BEFORE, {"metric_sharpness": 3.25}, {"seed": 1, "metric_sharpness": 3.75})
    text = tables()
    assert cells(text.partition("## Further metrics")[2], "method") == ["sharpness_1"]
    assert cells(text.partition("## Further metrics")[2], "adv") == ["3.5 ± 0.4"]
    assert "- sharpness_1: largest eigenvalue; lower is better." in text
    latex = (tmp_path / "tables" / "table.tex").read_text()
    assert r" & $\lambda_1$ \\" in latex
    assert r"adv & 3.5 $\pm$ 0.4 \\" in latex
    assert csv(tmp_path).query("metric == 'metric_sharpness'")["mean"].tolist() == [3.5]


def test_names_and_legends_of_your_own_are_shown_as_they_are(registry, folder, tables, tmp_path):
    name, legend = "a|b *c* <i>", "of `x` & **y**, _z_ [0, 1]\n50 %"
    metric("metric_sharpness", heading=name, legend=legend)(lambda measured: 0.0)
    odd = {"metric_sharpness": 2.0, "dataset": "d|e*", "model": "my_net [v<2>]", "retain_sample": 5, "num_train": 9}
    folder(odd, odd | {"method": "my|`method`*"}, odd | {"method": "[tune]", "needs_retain": True})
    text = tables("--html")
    further = text.partition("## Further metrics")[2]
    assert "### d\\|e\\*, my_net \\[v\\<2>], k = 16, goal misclassify" in further
    assert cells(further.replace("\\|", "!"), "method") == ["a!b \\*c\\* \\<i>"]
    assert "- a\\|b \\*c\\* \\<i>: of \\`x\\` \\& \\*\\*y\\*\\*, \\_z\\_ \\[0, 1] 50 %." in further
    assert "my\\|\\`method\\`\\*" in text
    assert "- d\\|e\\*, my_net \\[v\\<2>]: D_r is measured on a random sample" in text
    latex = (tmp_path / "tables" / "table.tex").read_text()
    assert "a|b *c* \\textless{}i\\textgreater{}: of `x` \\& **y**, \\_z\\_ [0, 1] 50 \\%." in latex
    assert "\n{}[tune] & " in latex
    page = (tmp_path / "tables" / "results.html").read_text()
    assert "a|b *c* &lt;i&gt;: of `x` &amp; **y**, _z_ [0, 1] 50 %." in page
    assert name not in page.partition("<script")[0]


def test_an_accuracy_of_your_own_is_shown_without_a_column(folder, tables):
    folder({"acc_worst_class": 12.34})
    text = tables().partition("## Further metrics")[2]
    assert cells(text, "method") == ["worst class"]
    assert cells(text, "adv") == ["12.34"]
    assert "worst class: your own metric, accuracy in percent" in text


def test_a_column_can_join_the_table_of_accuracies(registry, folder, tables, tmp_path):
    added = replace(columns.default("metric_sharpness"), table="accuracy", compared=True, better="down", digits=1)
    columns.register(added)
    folder({"metric_sharpness": 3.0}, {"method": "adv_imp", "metric_sharpness": 2.0}, {"method": "rawp"})
    text = tables()
    assert cells(text, "") == ["D_f", "D_r", "D_test", "sharpness"]
    assert cells(text, "adv")[3] == "3.0"
    assert cells(text, "adv_imp")[3] == "**2.0**"  # lower is better
    assert "the best value of a column (D_r, D_test, sharpness)" in text
    assert r"$D_\mathrm{test}$ & sharpness \\" in (tmp_path / "tables" / "table.tex").read_text()
    assert summary.brief([tabled.RECORD | {"metric_sharpness": 3.0}])["sharpness"].tolist() == ["3.00"]


@pytest.mark.parametrize("key", ["acc_test", "acc_test_before", "acc_retain_low", "metric_tow", "speed"])
def test_keys_that_are_taken_or_named_otherwise_are_refused(key):
    with pytest.raises(ValueError, match="expected a new name that begins with acc_ or metric_"):
        columns.register(columns.default(key))


def test_every_metric_has_a_column_with_a_legend():
    measured = [name for group in EVALUATIONS.values() for name in group.names]
    assert set(measured) <= set(columns.COLUMNS)
    assert all(column.legend and column.heading for column in columns.COLUMNS.values())
    assert all(column.better for column in columns.COLUMNS.values() if column.compared)


def test_every_metric_in_the_schema_is_reserved():
    assert {name for name in records.SCHEMA if name.startswith(("acc_", "metric_"))} <= columns.RESERVED


def test_columns_and_schema_do_not_import_torch():
    code = "import sys; import l2ul.metrics.columns, l2ul.experiments.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
