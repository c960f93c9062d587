"""main_unlearn.py as users call it: runs, records, and which runs are not repeated."""

import contextlib
import importlib.util
import json
import re
import sys

from conftest import FAST, ROOT
from helpers import load_records, without_costs, write_folder
import numpy as np
import pytest
import torch
import torchvision

from l2ul import attack, models
from l2ul.cli import unlearn_options
from l2ul.common import seeds
from l2ul.common.errors import Diverged
from l2ul.data import forget_set
from l2ul.experiments import execution, measurement, records
from l2ul.methods import registry
from l2ul.methods.settings import SHARED, has_effect
from l2ul.metrics import columns
from l2ul.metrics import registry as measuring_registry
import main_unlearn


def check_lines(lines, records):
    """Each run has a line with its results, in the order of the methods, and a row in the table."""
    by_method = {record["method"]: record for record in records.values()}
    assert [line.split()[1] for line in lines[1:8]] == registry.usual("misclassify")
    for line, record in zip(lines[1:8], (by_method[line.split()[1]] for line in lines[1:8]), strict=True):
        assert re.match(r"\d\d:\d\d:\d\d  \w+ +k 2    seed 0  ", line)
        for name, key in (("D_f", "acc_forget"), ("D_r", "acc_retain"), ("D_test", "acc_test")):
            assert f"  {name} {record[key]:.2f}  " in line
        assert re.search(r"(not changed|orgotten after \d+ steps) .* [\d.]+ s$", line)
    assert [line.split()[0] for line in lines[9:16]] == registry.usual("misclassify")


def check_records(tmp_path, few_digits):
    """Records, files of D_f, predictions and curves agree with each other and with what each method uses."""
    by_method = {record["method"]: record for record in load_records(tmp_path).values()}
    assert set(by_method) == {"before", "neggrad", "rawp", "oracle", "adv", "adv_imp", "distill"}
    for name, record in by_method.items():
        assert list(record)[: len(records.KEYS)] == list(records.KEYS)
        assert (
            record["checkpoint_sha256"]
            == models.load("resnet20", 10, ROOT / "data/weights/digits_resnet20.safetensors").sha256
        )
        assert (record["dataset"], record["model"], record["k"], record["seed"]) == ("digits", "resnet20", 2, 0)
        assert record["needs_retain"] == (name == "oracle")
        assert record["status"] in ("forgotten", "cap", "done")
        assert (record["reg_lamb"] is None) == (name != "adv_imp")
        assert (record["pgd_eps"] is None) == (name not in ("adv", "adv_imp"))
        assert (record["seconds_attack"] > 0) == (name in ("adv", "adv_imp"))
        assert (record["adv_success"] is None) == (name not in ("adv", "adv_imp"))
        assert (record["unlearn_lr"] is None) == (name in ("before", "rawp", "distill"))
        assert (record["max_passes"] is None) == (name in ("before", "distill"))
        own = [flag for flag in SHARED if flag.startswith("distill_") and has_effect(flag, record)]
        assert {record[flag] is None for flag in own} == {name != "distill"}
        assert (record["noise_growth"] is None) == (name != "rawp")
        assert record["checkpoint"] == "digits_resnet20.safetensors"
        assert record["acc_retain_low"] is record["acc_forget_earlier"] is record["acc_relabel"] is None
        assert record["continual_step"] is None
        assert record["acc_test_before"] == by_method["before"]["acc_test"]
    for identity, record in load_records(tmp_path).items():
        indices = [int(line) for line in (tmp_path / "runs" / f"{identity}.txt").read_text().split()]
        assert indices == forget_set.choose_forget(40, 2, 0).tolist()
        with np.load(tmp_path / "runs" / f"{identity}.npz") as kept:
            labels = few_digits.train.labels[indices].numpy()
            assert 100 * (kept["forget_after"] == labels).mean() == record["acc_forget"]
            assert 100 * (kept["test_after"] == few_digits.test.labels.numpy()).mean() == pytest.approx(
                record["acc_test"]
            )
            assert len(kept["retain_before"]) == 38
        curve = (tmp_path / "runs" / f"{identity}.csv").read_text().splitlines()
        assert len(curve) == record["steps"] + 1


def test_runs_every_method_and_records_it(run, tmp_path, few_digits):
    code, out, err = run()
    assert code == 0, err
    check_lines(out.splitlines(), load_records(tmp_path))
    check_records(tmp_path, few_digits)
    first = load_records(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    code, out, _ = run()
    assert code == 0
    assert "0 runs to do, 7 done" in out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert run("--rerun")[0] == 0
    again = load_records(tmp_path)
    assert first.keys() == again.keys()
    for identity, record in again.items():
        assert without_costs(record) == without_costs(first[identity])
    # a setting that a method does not use does not change its id
    assert "2 runs to do, 5 done" in run("--pgd-eps", 1.0, "--dry-run")[1]
    assert "1 run to do, 6 done" in run("--reg-lamb", 2.0, "--dry-run")[1]
    assert "7 runs to do, 0 done" in run("--seed", 1, "--dry-run")[1]
    damaged = next((tmp_path / "runs").glob("*.json"))
    damaged.write_text("{")
    assert "1 run to do, 6 done" in run()[1]
    assert json.loads(damaged.read_text())["method"]


def test_all_runs_of_a_seed_share_one_attack_and_one_measurement_of_the_original_model(run, tmp_path, monkeypatch):
    sizes, measured = [], []
    true_set, true_predict = attack.adversarial_set, measurement.Evaluator.predict
    monkeypatch.setattr(
        attack, "adversarial_set", lambda m, x, *a, **o: sizes.append(len(x)) or true_set(m, x, *a, **o)
    )
    monkeypatch.setattr(
        measurement.Evaluator, "predict", lambda self, m, what: measured.append(what) or true_predict(self, m, what)
    )
    code, _, err = run("--unlearn-k", 4, 2, "--method", "before", "adv", "adv_imp")
    assert code == 0, err
    assert sizes == [4]
    assert measured == ["measure before"] + ["measure after"] * 4
    together = load_records(tmp_path)
    code, out, _ = run("--unlearn-k", 2, "--method", "adv", "--rerun", "--no-cache")
    alone = {i: r for i, r in load_records(tmp_path).items() if r["method"] == "adv" and r["k"] == 2}
    for identity, record in alone.items():
        assert without_costs(record) == without_costs(together[identity])


def test_another_learning_rate_repeats_neither_attack_nor_measurement_of_the_original_model(run, tmp_path, monkeypatch):
    methods_named = ["--method", "before", "adv"]
    assert run(*methods_named)[0] == 0
    measured, true_predict = [], measurement.Evaluator.predict
    monkeypatch.setattr(attack, "pgd_l2", None)
    monkeypatch.setattr(
        measurement.Evaluator, "predict", lambda self, m, what: measured.append(what) or true_predict(self, m, what)
    )
    code, _, err = run(*methods_named, "--unlearn-lr", 0.02, "--reg-lamb", 3)
    assert code == 0, err
    assert measured == ["measure after"]
    slow, fast = (
        next(r for r in load_records(tmp_path).values() if r["method"] == "adv" and r["unlearn_lr"] == lr)
        for lr in (0.01, 0.02)
    )
    assert fast["adv_success"] == slow["adv_success"]
    assert fast["acc_test_before"] == slow["acc_test_before"]
    with pytest.raises(TypeError):
        run(*methods_named, "--unlearn-lr", 0.03, "--no-cache")


def test_the_progress_of_distill_names_the_step_at_which_it_may_end(run, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress_bar(description, total=None):
        yield lambda count=1, note="", limit=None: shown.append((description, note.split(",")[0], limit))

    monkeypatch.setattr(execution, "progress_bar", progress_bar)
    few = ["--distill-steps", 3, "--distill-cycles", 2, "--distill-lr", 1e-6, "--distill-mixes", 8, "--robust", 0]
    assert run("--method", "distill", "neggrad", "--max-passes", 2, *few)[0] == 0
    ends = [note for name, note, limit in shown if (name, limit) == ("distill k 2", 6)]
    assert ends == ["may end at step 3"] * 3 + ["may end at step 6"] * 3
    assert not any("may end" in note for name, note, _ in shown if name == "neggrad k 2")


def test_a_dry_run_lists_the_runs_and_does_none(run, tmp_path):
    code, out, _ = run("--dry_run", "--seed", 0, 1, "--unlearn-k", 1, 2, "--method", "neggrad", "adv")
    assert code == 0
    assert "8 runs to do, 0 done" in out
    assert out.count("to do ") == 8
    assert not list((tmp_path / "runs").iterdir())


def test_relabels_images_that_files_name(run, tmp_path, few_digits):
    (tmp_path / "forget.txt").write_text("7\n3\n11\n")
    new = (few_digits.train.labels[[7, 3, 11]] + 1) % 10
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in new))
    arguments = [
        "--goal",
        "relabel",
        "--forget_file",
        tmp_path / "forget.txt",
        "--relabel_file",
        tmp_path / "labels.txt",
    ]
    code, _, err = run(*arguments, "--unlearn-k", 3, "--method", "correct", "--max-passes", 60, "--unlearn-lr=0.02")
    assert code == 0, err
    ((identity, record),) = load_records(tmp_path).items()
    assert (record["goal"], record["k"], record["status"], record["acc_relabel"]) == ("relabel", 3, "forgotten", 100.0)
    assert record["acc_forget"] == 0
    assert record["relabel_file"] == "labels.txt"
    assert (tmp_path / "runs" / f"{identity}.txt").read_text() == "7\n3\n11\n"
    (tmp_path / "labels.txt").write_text("".join(f"{(label + 1) % 10}\n" for label in new))
    assert "1 run to do, 0 done" in run(*arguments, "--unlearn-k", 3, "--method", "correct", "--dry-run")[1]


def test_says_that_the_files_of_an_own_model_have_changed(run, tmp_path, monkeypatch):
    def register(text):
        (tmp_path / "mine.py").write_text(text)
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        models.register("mine", module.Net)
        return module

    monkeypatch.setattr(models, "OWN", dict(models.OWN))
    text = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(4 * 8 * 8, num_classes))
    def forward(self, x):
        return scale(super().forward(x))

def scale(x):
    return x * 1.0
"""
    module = register(text)
    torch.manual_seed(0)
    torch.save(module.Net(10).state_dict(), tmp_path / "mine.pt")
    command = ["--model", "mine", "--checkpoint", tmp_path / "mine.pt", "--method", "adv"]
    assert run(*command)[0] == 0
    assert "have changed" not in run(*command)[1]
    register(text.replace("1.0", "-1.0"))
    out = run(*command)[1]
    assert "0 runs to do" in out
    assert "the files of your model or method have changed since" in out
    run(*command, "--rerun")
    assert "have changed" not in run(*command)[1]


def test_says_that_images_on_disk_have_changed(script, tmp_path):
    write_folder(tmp_path / "data" / "pets", size=(16, 16))
    torch.manual_seed(0)
    torch.save(models.build("resnet20", 2).net.state_dict(), tmp_path / "pets.pt")
    where = ["--dataset", "pets", "--model", "resnet20", "--checkpoint", tmp_path / "pets.pt", "--result-dir", tmp_path]

    def call(*arguments, data="data"):
        code, out, err = script(
            main_unlearn.main, *where, "--data-dir", tmp_path / data, *FAST, "--method", "before", "oracle", *arguments
        )
        assert code == 0, err
        return out

    call()
    assert "have changed" not in call()
    for file in (tmp_path / "data" / "pets" / "val").rglob("*.png"):
        file.touch()
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "have changed" not in call(data="moved")  # names and sizes decide, not times and the place of the folder
    ant = tmp_path / "moved" / "pets" / "val" / "ant" / "0.png"
    before = ant.read_bytes()
    ant.write_bytes(before + b"further bytes")
    changed = (
        r"2 of the runs on record \(\w{16}, \w{16}\): the images or labels of D_r or D_test have changed since; to do"
    )
    for _ in range(2):
        out = call(data="moved")
        assert "0 runs to do, 2 done" in out
        assert re.search(changed, out)
    assert "have changed" not in call("--rerun", data="moved")
    assert "have changed" not in call(data="moved")
    ant.rename(ant.parent.parent / "bee" / "9.png")  # another label
    assert re.search(changed, call(data="moved"))


def test_says_that_images_or_labels_in_memory_have_changed(run, few_digits):
    arguments = ["--method", "before", "finetune", "--setting", "epochs=1", "--retain-sample", 4, "--unlearn-k", 1]
    run(*arguments)
    assert "have changed" not in run(*arguments)[1]
    few_digits.test.labels[0] = 9 - few_digits.test.labels[0]
    assert "2 of the runs on record" in run(*arguments)[1]
    assert "have changed" not in run(*arguments, "--rerun")[1]
    sample = torch.randperm(40, generator=seeds.generator(0, "retain sample"))[:4]
    forgotten = forget_set.choose_forget(40, 1, 0)
    other = next(index for index in range(40) if index not in {*sample.tolist(), *forgotten.tolist()})
    few_digits.train.images[other] = 255 - few_digits.train.images[other]
    assert (
        "1 of the runs on record" in run(*arguments)[1]
    )  # of the method that trains on D_r, which is measured in part
    code, _, err = run(*arguments[:2], *arguments[5:], "--evaluate", "distance")
    assert code == 0, err  # the measured images are the same
    few_digits.test.images[0] = 255 - few_digits.test.images[0]
    code, _, err = run(*arguments[:2], *arguments[5:], "--evaluate", "duplicates")
    assert code == 2
    assert "the images of D_r or D_test are not those of the records of" in err
    assert "do the runs again with --rerun" in err


def test_records_without_a_hash_of_the_images_stay_as_they_are(run, tmp_path, few_digits):
    run("--method", "before")
    ((identity, record),) = load_records(tmp_path).items()
    assert len(record.pop("data_sha256")) == 64
    (tmp_path / "runs" / f"{identity}.json").write_text(json.dumps(record))
    few_digits.test.images[0] = 255 - few_digits.test.images[0]
    _, out, _ = run("--method", "before")
    assert "0 runs to do, 1 done" in out
    assert "have changed" not in out


def test_own_metrics_are_measured_again_after_an_edit(run, tmp_path, monkeypatch):
    for table in (measuring_registry.METRICS, columns.COLUMNS):  # what is registered is gone afterwards
        monkeypatch.setitem(table, "metric_mine", None)
        del table["metric_mine"]

    def register(value):
        text = f"def metric(outputs):\n    return value()\n\n\ndef value():\n    return {value}\n"
        (tmp_path / "mine.py").write_text(text + "#" * value)  # of another size: Python compiles it again
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        measuring_registry.metric("metric_mine")(module.metric)

    def values():
        return {record["method"]: record["metric_mine"] for record in load_records(tmp_path).values()}

    methods = ["--method", "before", "neggrad"]
    register(1)
    run(*methods)
    assert "0 runs to do, 2 done\n" in run(*methods)[1]
    register(2)
    _, out, _ = run(*methods)
    assert "0 runs to do, 1 done, 1 done that lack metrics" in out  # there is a model of `before`, the original one
    assert "1 of the runs on record" in out
    assert "the files of your metrics have changed since; to measure them again, add --rerun" in out
    assert values() == {"before": 2, "neggrad": 1}
    _, out, _ = run(*methods)
    assert "0 runs to do, 2 done\n" in out
    assert "the files of your metrics have changed since" in out
    run(*methods, "--rerun", "--save-model")
    assert values() == {"before": 2, "neggrad": 2}
    assert "have changed" not in run(*methods)[1]
    register(3)
    assert "0 runs to do, 0 done, 2 done that lack metrics" in run(*methods, "--evaluate", "distance")[1]
    assert values() == {"before": 3, "neggrad": 3}
    assert "0 runs to do, 2 done\n" in run(*methods, "--evaluate", "distance")[1]
    del measuring_registry.METRICS["metric_mine"]
    assert "have changed" not in run(*methods)[1]  # the metric is not asked for


def test_a_repeated_run_keeps_the_metrics_on_record_if_it_ends_alike(run, tmp_path, monkeypatch):
    run("--method", "adv", "--evaluate", "distance")
    (first,) = load_records(tmp_path).values()
    _, out, _ = run("--method", "adv", "--evaluate", "duplicates")  # repeated, as there is no model to measure
    assert "1 run to do" in out
    (both,) = load_records(tmp_path).values()
    assert both["metric_distance"] == first["metric_distance"]
    assert "metric_near_duplicates" in both
    assert "0 runs to do, 1 done" in run("--method", "adv", "--evaluate", "distance", "duplicates")[1]
    (file,) = (tmp_path / "runs").glob("*.json")
    file.write_text(json.dumps(both | {"acc_test": 1.0}))  # as another machine may round
    _, out, _ = run("--method", "adv", "--rerun")
    assert "has ended otherwise than before; 2 metrics of then are left out" in out
    (last,) = load_records(tmp_path).values()
    assert not {"metric_distance", "metric_near_duplicates"} & last.keys()


def test_keeps_the_unlearned_model_and_repeats_the_run_if_it_is_missing(run, tmp_path, few_digits):
    arguments = ["--method", "before", "neggrad", "--save-model"]
    assert run(*arguments)[0] == 0
    (path,) = (tmp_path / "models").glob("*.safetensors")
    record = load_records(tmp_path)[path.stem]
    assert record["method"] == "neggrad"
    classifier = models.load("resnet20", 10, path)
    with torch.inference_mode():
        called = classifier(few_digits.test.images / 255).argmax(1)
    assert 100 * (called == few_digits.test.labels).double().mean().item() == pytest.approx(record["acc_test"])
    assert "0 runs to do" in run(*arguments)[1]
    path.unlink()
    assert "1 run to do, 1 done" in run(*arguments)[1]
    assert path.exists()


def test_unlearns_a_hugging_face_model_and_saves_it_for_transformers(run, tmp_path, vit_folder):
    import transformers

    arguments = ["--model", f"hf:{vit_folder}", "--method", "adv_imp", "--unlearn-k", 1, "--save-model"]
    code, _, err = run(*arguments)
    assert code == 0, err
    ((identity, record),) = load_records(tmp_path).items()
    assert record["status"] in ("forgotten", "cap")
    net = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "models" / identity)
    given = transformers.AutoModelForImageClassification.from_pretrained(vit_folder)
    assert not torch.equal(net.classifier.weight, given.classifier.weight)
    assert "0 runs to do" in run(*arguments)[1]


def test_a_saved_hugging_face_model_has_the_mean_and_std_it_was_used_with(run, tmp_path, vit_folder):
    import transformers

    given = ["--model", f"hf:{vit_folder}", "--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6]
    arguments = [*given, "--method", "neggrad", "--continual-step", 1, "--unlearn-k", 2, "--bn", "eval"]
    code, _, err = run(*arguments)
    assert code == 0, err
    whole = load_records(tmp_path)
    (first, second) = sorted(whole, key=lambda identity: whole[identity]["k"])
    (tmp_path / "runs" / f"{second}.json").unlink()
    assert run(*arguments)[0] == 0
    assert without_costs(load_records(tmp_path)[second]) == without_costs(whole[second])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "models" / first)
    assert processor.image_mean == pytest.approx([0.1, 0.2, 0.3])
    assert processor.image_std == pytest.approx([0.4, 0.5, 0.6])


def test_unlearns_images_of_a_folder(script, tmp_path):
    write_folder(tmp_path / "insects", size=(80, 64))
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "weights.pt")
    data_set = ["--dataset", "insects", "--data-dir", tmp_path, "--image-size", 64, "--workers", 0]
    net = ["--model", "torchvision:squeezenet1_1", "--checkpoint", tmp_path / "weights.pt"]
    code, _, err = script(main_unlearn.main, "--result-dir", tmp_path, *FAST, *data_set, *net)
    assert code == 0, err
    for record in load_records(tmp_path).values():
        assert (record["num_train"], record["num_test"], record["image_size"]) == (6, 6, 64)
    assert len(load_records(tmp_path)) == 7


def test_a_diverged_run_has_no_accuracy(run, tmp_path):
    code, out, err = run("--method", "adv", "--unlearn-lr", "1e30", "--bn", "eval")
    assert code == 0, err
    (record,) = load_records(tmp_path).values()
    assert record["status"] == "diverged"
    assert record["acc_test"] is record["acc_forget"] is record["acc_retain"] is None
    assert record["acc_test_before"] > 90
    assert "1 diverged" in out


def test_the_defaults_of_each_data_set_are_those_of_the_released_scripts():
    def given(dataset):
        opts = unlearn_options.parse(["--dataset", dataset])
        return {name: getattr(opts, name) for name in expected}

    expected = {
        "model": "resnet18",
        "unlearn_lr": 1e-3,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 32,
        "adv_batch_size": 256,
        "max_passes": 1000,
        "bn": "train",
        "num_adv_images": 20,
        "pgd_eps": 4.0,
        "pgd_alpha": 0.1,
        "pgd_iter": 100,
        "reg_lamb": 1.0,
        "noise_growth": 0.01,
        "distill_lr": 3e-4,
        "distill_steps": 0,
        "distill_cycles": 3,
        "distill_forget": 64,
        "distill_mixes": 192,
        "distill_logits": 10.0,
        "distill_features": 1000.0,
        "distill_growth": 10.0,
        "distill_margin": 0.3,
        "setting": {},
        "adv_dtype": "float32",
        "precision": None,  # depends on the device
    }
    assert given("cifar10") == expected
    hundred = {"model": "resnet50_cifar100", "num_adv_images": 200, "max_passes": 100}
    assert given("cifar100") == expected | hundred
    large = {"model": "torchvision:resnet50", "batch_size": 16, "adv_batch_size": 128}
    assert given("imagenet") == expected | hundred | large | {"adv_dtype": "uint8"}
    faces = {"model": "resnet18_cifar100", "pgd_eps": 2.0, "num_adv_images": 300, "batch_size": 128}
    assert given("utkface") == expected | faces | {"adv_batch_size": 128}


def test_help_shows_groups_and_defaults(run, capsys):
    code, out, _ = run("--help")
    assert code == 0
    assert "adversarial examples" in out
    assert "L2 norm over pixels in [0,1] (default: 4.0; utkface: 2.0)" in " ".join(out.split())
    assert all(f"--{name.replace('_', '-')}" in out for name in SHARED)


def test_a_model_whose_logits_of_the_forget_set_are_not_finite_is_not_kept(run, tmp_path, monkeypatch):
    evaluate = measurement.Evaluator.evaluate

    def diverge(evaluator, run, model, after):
        if after is not None:
            raise Diverged("the logits of 1 of 2 images are not finite")
        return evaluate(evaluator, run, model, after)

    monkeypatch.setattr(measurement.Evaluator, "evaluate", diverge)
    code, _, err = run("--method", "neggrad", "--save-model")
    assert code == 0, err
    (record,) = load_records(tmp_path).values()
    assert record["status"] == "diverged"
    assert not list((tmp_path / "models").iterdir())
