"""The examples of README.md and docs/extending.md, run as they stand there."""

import re
import runpy
import sys

from conftest import FAST, ROOT
from helpers import load_records
import numpy as np
import pytest
import torch

from l2ul import models
from l2ul.data import datasets
from l2ul.methods import registry as methods_registry
from l2ul.methods.settings import Setting
from l2ul.metrics import columns
from l2ul.metrics import registry as measuring_registry
import main_tables
import main_unlearn

EXAMPLES = {
    re.match(r"# (my_\w+)\.py", block)[1]: block
    for page in ("README.md", "docs/extending.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    if block.startswith("# my_")
}
REGISTRIES = (methods_registry.METHODS, models.OWN, datasets.LOADERS, measuring_registry.METRICS, columns.COLUMNS)


@pytest.fixture
def example(script, tmp_path, few_digits):
    """Run one of the examples as a script with these arguments; what it registers is gone afterwards."""
    kept = [dict(registry) for registry in REGISTRIES]

    def call(name, *arguments):
        path = tmp_path / f"{name}.py"
        path.write_text(EXAMPLES[name])
        given = ["--result-dir", tmp_path, *FAST, *arguments]
        code, out, err = script(lambda: runpy.run_path(str(path), run_name="__main__"), *given)
        assert code == 0, err
        return list(load_records(tmp_path).values())

    yield call
    for registry, before in zip(REGISTRIES, kept, strict=True):
        registry.clear()
        registry.update(before)


def test_there_are_seven():
    names = ["my_method", "my_setting", "my_net", "my_training", "my_tables", "my_data", "my_metric"]
    assert list(EXAMPLES) == names


def test_a_method(example):
    records = example("my_method", "--method", "before", "bounded", "adv")
    assert {record["method"] for record in records} == {"before", "bounded", "adv"}
    (bounded,) = [record for record in records if record["method"] == "bounded"]
    assert bounded["steps"] > 0
    assert bounded["num_adv_images"] == 3


def test_a_method_with_a_flag_of_its_own(example, script, tmp_path):
    run = ["--method", "softened", "adv"]
    first = {record["method"]: record for record in example("my_setting", *run)}
    assert (first["softened"]["temperature"], first["softened"]["method_settings"]) == (2.0, "temperature")
    assert "temperature" not in first["adv"]
    assert len(example("my_setting", *run, "--temperature", 4)) == 3  # another run of softened, none of adv
    assert len(example("my_setting", *run, "--setting", "temperature=4")) == 3  # the same again
    path = str(write(tmp_path, "my_setting"))
    for words, message in (
        (["--temperature", "0"], "'0' is not allowed; expected a number above 0"),
        (["--method", "adv", "--temperature", "4"], "method adv has no setting temperature"),
        ([*run, "--temperature", "4", "--setting", "temperature=5"], "contradict each other"),
        (["--temprature", "4"], "unknown flag --temprature; did you mean --temperature?"),
    ):
        code, _, err = script(lambda: runpy.run_path(path, run_name="__main__"), *words)
        assert (code, message in err) == (2, True), err
    clash = tmp_path / "clash.py"
    clash.write_text(EXAMPLES["my_setting"].replace('"temperature", 2.0', '"status", 2.0'))
    code, _, err = script(lambda: runpy.run_path(str(clash), run_name="__main__"), "--method", "softened", "--dry-run")
    assert (code, "the setting status, which is a key of every record; rename" in err) == (2, True), err
    code, out, _ = script(lambda: runpy.run_path(path, run_name="__main__"), "--help")
    assert code == 0
    assert (
        "--temperature X               temperature of the softmax on D_adv, for method softened (default: 2.0)" in out
    )
    assert "softened          L_forget + CE on D_adv with a softmax temperature" in out


def test_a_net(example, tmp_path):
    runpy.run_path(str(write(tmp_path, "my_net")))
    torch.save(models.build("small", 10).net.state_dict(), tmp_path / "small.pt")
    records = example("my_net", "--model", "small", "--checkpoint", tmp_path / "small.pt")
    assert {record["model"] for record in records} == {"small"}
    assert records[0]["mean"] == "0.3 0.3 0.3"


def test_a_net_is_trained_and_drawn(example, script, monkeypatch, tmp_path):
    write(tmp_path, "my_net")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)

    def run(name, *words):
        path = str(write(tmp_path, name))
        code, out, err = script(lambda: runpy.run_path(path, run_name="__main__"), *words)
        assert (code, err) == (0, ""), err
        return out

    weights = tmp_path / "small.safetensors"
    run("my_training", "--dataset", "digits", "--epochs", 1, "--output", weights)
    net = ["--model", "small", "--checkpoint", weights]
    (record,) = example("my_net", *net, "--method", "neggrad", "--save-model")
    assert record["checkpoint"] == weights.name
    (card,) = (tmp_path / "models").glob("*.md")
    assert '\n# first import the file that registers "small"\nmodel = models.load("small"' in card.read_text()
    out = run("my_tables", "--result-dir", tmp_path, "--checkpoint", weights, "--figures", 4)
    assert "digits_small_4_layer_similarity.png" in out
    models.OWN.pop("small")
    code, out, _ = script(main_tables.main, "--result-dir", tmp_path, "--figures", 4, 5)
    assert code == 0
    assert "digits_small: figures 4, 5 were left out: unknown model 'small': expected one of" in out
    code, _, err = script(main_unlearn.main, "--model", "small")
    assert (code, "for a network of your own, start the command from the file that registers it" in err) == (2, True)
    runpy.run_path(str(tmp_path / "my_net.py"))
    code, _, err = script(main_unlearn.main, "--model", "small")
    assert (code, "train them with a file that registers the network" in err) == (2, True), err


def test_a_data_set(example, tmp_path):
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    np.savez(tmp_path / "mine.npz", images=images.numpy(), labels=(torch.arange(40) % 2).numpy())
    torch.save(models.build("resnet20", 2).net.state_dict(), tmp_path / "mine.pt")
    arguments = ["--dataset", "mine", "--data-dir", tmp_path, "--model", "resnet20"]
    records = example("my_data", *arguments, "--checkpoint", tmp_path / "mine.pt", "--method", "before", "neggrad")
    assert {(record["dataset"], record["num_train"], record["num_test"]) for record in records} == {("mine", 30, 10)}


def test_a_metric(example, few_digits):
    records = example("my_metric", "--method", "before", "adv")
    for record in records:
        assert 0 <= record["acc_worst_class"] <= record["acc_test"]


def test_an_edit_of_a_method_makes_another_run_and_a_new_metric_is_added_to_old_ones(example, tmp_path):
    example("my_method", "--method", "bounded")
    (record,) = example("my_method", "--method", "bounded")
    assert len(record["method_code"]) == 64
    EXAMPLES["edited"] = EXAMPLES["my_method"].replace("clamp_max(math.log(", "clamp_max(0.5 * math.log(")
    try:
        records = example("edited", "--method", "bounded")
    finally:
        del EXAMPLES["edited"]
    assert len(records) == 2
    assert len({record["method_code"] for record in records}) == 2
    example("my_metric", "--method", "before")
    example("my_method", "--method", "before")
    (before,) = [r for r in example("my_metric", "--method", "before") if r["method"] == "before"]
    assert "acc_worst_class" in before


def test_wrong_additions_raise(example, monkeypatch):
    with pytest.raises(ValueError, match="needs .*importances.*; expected some of adv, importance, noise, retain"):
        methods_registry.method("odd", "importances")
    with pytest.raises(ValueError, match="needs adv and retain"):
        methods_registry.method("odd", "adv", "retain")
    with pytest.raises(ValueError, match="declares pgd_eps, a setting of the loop"):
        methods_registry.method("odd", settings=[Setting("pgd_eps", 1.0)])
    methods_registry.method("first", settings=[Setting("rate", 1.0)])(torch.abs)
    with pytest.raises(ValueError, match="declare different settings rate"):
        methods_registry.method("odd", settings=[Setting("rate", 2.0)])
    with pytest.raises(ValueError, match="has no docstring"):
        methods_registry.method("odd")(lambda step: {})
    for name in ("acc_test", "speed", "status"):
        with pytest.raises(ValueError, match="expected a new name that begins with acc_ or metric_"):
            measuring_registry.metric(name)
    measuring_registry.metric("metric_odd")(lambda measured: float("nan"))
    (record,) = [r for r in example("my_metric", "--method", "before") if r["method"] == "before"]
    assert record["metric_odd"] is None


def test_a_column_of_the_tables(example, script, tmp_path):
    example("my_metric", "--method", "before", "adv")
    page = (ROOT / "docs" / "extending.md").read_text()
    path = tmp_path / "worst_class_tables.py"
    path.write_text(re.search(r"```python\n(# worst_class_tables.*?)```", page, re.DOTALL)[1])
    code, out, err = script(lambda: runpy.run_path(str(path), run_name="__main__"), "--result-dir", tmp_path)
    assert code == 0, err
    main_table = out.split("\n## ")[0]
    assert re.search(r"\| D_f .*\| D_test +\| worst class", main_table)
    assert "worst class: accuracy on the class with the lowest accuracy on D_test; higher is better." in main_table
    assert r"$D_\mathrm{worst}$" in (tmp_path / "tables" / "table.tex").read_text()


def write(folder, name):
    path = folder / f"{name}.py"
    path.write_text(EXAMPLES[name])
    return path
