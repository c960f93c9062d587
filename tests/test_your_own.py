"""The examples of docs/extending.md, run as they stand there."""

import re
import runpy

from conftest import FAST, ROOT
from helpers import load_records
import numpy as np
import pytest
import torch

from l2ul.data import datasets
from l2ul.methods import registry as methods_registry
from l2ul.metrics import registry as measuring_registry
import models

EXAMPLES = {
    re.match(r"# (my_\w+)\.py", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    if block.startswith("# my_")
}
REGISTRIES = (methods_registry.METHODS, models.OWN, datasets.LOADERS, measuring_registry.METRICS)


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


def test_there_are_four():
    assert list(EXAMPLES) == ["my_method", "my_net", "my_data", "my_metric"]


def test_a_method(example):
    records = example("my_method", "--method", "before", "bounded", "adv")
    assert {record["method"] for record in records} == {"before", "bounded", "adv"}
    (bounded,) = [record for record in records if record["method"] == "bounded"]
    assert bounded["steps"] > 0
    assert bounded["num_adv_images"] == 3


def test_a_net(example, tmp_path):
    runpy.run_path(str(write(tmp_path, "my_net")))
    torch.save(models.build("small", 10).net.state_dict(), tmp_path / "small.pt")
    records = example("my_net", "--model", "small", "--checkpoint", tmp_path / "small.pt")
    assert {record["model"] for record in records} == {"small"}
    assert records[0]["mean"] == "0.3 0.3 0.3"


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
    EXAMPLES["edited"] = EXAMPLES["my_method"].replace("math.log(10)", "math.log(5)")
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


def test_what_people_add_is_looked_at(example, monkeypatch):
    with pytest.raises(ValueError, match="needs .*importances.*; expected some of adv, importance, noise, retain"):
        methods_registry.method("odd", "importances")
    with pytest.raises(ValueError, match="needs adv and retain"):
        methods_registry.method("odd", "adv", "retain")
    for name in ("acc_test", "speed", "status"):
        with pytest.raises(ValueError, match="expected a new name that begins with acc_ or metric_"):
            measuring_registry.metric(name)
    measuring_registry.metric("metric_odd")(lambda measured: float("nan"))
    (record,) = [r for r in example("my_metric", "--method", "before") if r["method"] == "before"]
    assert record["metric_odd"] is None


def write(folder, name):
    path = folder / f"{name}.py"
    path.write_text(EXAMPLES[name])
    return path
