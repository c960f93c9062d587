"""Groups of metrics in records: comparison with reference models, and metrics added to finished runs."""

import json
from types import SimpleNamespace

from conftest import FAST, ROOT
import pytest
import torch

from l2ul import models, unlearn
from l2ul.data import forget_set
from l2ul.data.images import Split
from l2ul.experiments import measurement
from l2ul.experiments.reference_models import ReferenceModels
from l2ul.metrics import accuracy as evaluate
from l2ul.metrics import columns, groups, relearn
import main_unlearn

CHECKPOINT = ROOT / "data/weights/digits_resnet20.safetensors"
RUN = ["--unlearn-k", 6, "--method", "before", "distill"]
GAPS = ["metric_gap_forget", "metric_gap_retain", "metric_gap_test", "metric_gap_mia", "metric_average_gap"]


@pytest.fixture
def net(tmp_path):
    """Save the digits model with noise on its weights, and metadata that says it was trained without D_f."""

    def save(name, move, excluded=range(40)):
        classifier = models.load("resnet20", 10, CHECKPOINT)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for weights in classifier.net.parameters():
                weights.add_(move * weights.std(correction=0) * torch.randn(weights.shape, generator=generator))
        path = tmp_path / "nets" / f"{name}.safetensors"
        models.save(classifier, path, {"excluded": list(excluded)})
        return path

    return save


@pytest.fixture
def unlearned(script, few_digits, monkeypatch):
    """Call main_unlearn.py with a result folder; return its records by method and step, and its output."""
    monkeypatch.setattr(relearn, "MAX_STEPS", 6)
    monkeypatch.setattr(relearn, "OTHER_STEPS", 5)

    def call(folder, *arguments):
        code, out, err = script(main_unlearn.main, "--result-dir", folder, *FAST, *arguments)
        assert code == 0, err
        records = [json.loads(path.read_text()) for path in folder.glob("runs/*.json")]
        return {(record["method"], record["continual_step"]): record for record in records}, out

    return call


def test_all_gaps_of_the_retrained_model_itself_are_zero(unlearned, net, tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceModels, "check", lambda *_: None)  # refuses a model with the classifier's weights
    same = net("the_same", 0.0)
    groups = ["--evaluate", "retrained", "relearn", "duplicates", "rmia", "distance"]
    records, _ = unlearned(tmp_path, *RUN, *groups, "--retrained", same, "--references", same, same)
    record, unlike = records["before", None], records["distill", None]
    assert [record[name] for name in GAPS] == [0] * 5
    assert (record["metric_tow"], record["metric_distance_retrained"]) == (1, 0)
    assert (record["metric_js_forget"], record["metric_js_test"]) == pytest.approx((0, 0))
    assert (record["metric_cka_forget"], record["metric_cka_test"]) == pytest.approx((1, 1))
    assert (record["metric_relearn_steps"], record["metric_relearn_steps_retrained"]) == (0, 0)
    assert record["retrained_sha256"] == models.load("resnet20", 10, same).sha256
    assert 50 <= record["metric_rmia_auc"] <= 100
    assert 0 < unlike["metric_tow"] < 1
    assert 0 < unlike["metric_js_test"] < 1
    assert unlike["metric_distance_retrained"] == unlike["metric_distance"] > 0
    assert unlike["metric_gap_test"] == pytest.approx(abs(unlike["acc_test"] - record["acc_test"]))
    assert unlike["metric_average_gap"] == pytest.approx(sum(unlike[name] for name in GAPS[:4]) / 4)
    assert unlike["metric_near_duplicates"] == record["metric_near_duplicates"] >= 0


def test_metrics_added_later_equal_those_computed_with_the_run(unlearned, net, few_digits, tmp_path, monkeypatch):
    other, references = net("moved", 0.15), [net("a", 0.1), net("bc", 0.1)]
    asked = ["--evaluate", "membership", "distance", "retrained", "rmia", "relearn", "duplicates"]
    asked += ["--retrained", other, "--references", *references]
    kept = [*RUN, "--save-model"]
    measured, true_predict = [], measurement.Evaluator.predict
    monkeypatch.setattr(
        measurement.Evaluator, "predict", lambda self, m, what: measured.append(what) or true_predict(self, m, what)
    )
    at_once, _ = unlearned(tmp_path / "first", *kept, *asked)
    assert sorted(measured) == ["measure after", "measure before", "measure retrained"]  # no net twice
    plain, _ = unlearned(tmp_path / "second", *kept)
    monkeypatch.setattr(unlearn, "unlearn", None)
    assert (
        "0 runs to do, 0 done, 2 done that lack metrics"
        in unlearned(tmp_path / "second", *kept, *asked, "--dry-run")[1]
    )
    later, _ = unlearned(tmp_path / "second", *kept, *asked)
    for key, record in later.items():
        assert record.items() >= plain[key].items()
        added = {name: value for name, value in record.items() if name not in plain[key]}
        assert added == {name: at_once[key][name] for name in added}
        assert at_once[key].keys() == record.keys()
    assert "0 runs to do, 2 done\n" in unlearned(tmp_path / "second", *kept, *asked)[1]
    known = models.load("resnet20", 10, other)
    called = evaluate.predict(known, few_digits.test.images)
    accuracy = evaluate.accuracy(called, few_digits.test.labels)
    for record in later.values():
        assert record["metric_gap_test"] == pytest.approx(abs(record["acc_test"] - accuracy))


def test_another_retrained_model_replaces_the_metrics_of_the_first(unlearned, net, tmp_path):
    first, second = net("one", 0.1), net("other", 0.2)
    arguments = ["--unlearn-k", 6, "--method", "before", "--evaluate"]
    unlearned(tmp_path, *arguments, "retrained", "distance", "--retrained", first)
    found, out = unlearned(tmp_path, *arguments, "relearn", "--retrained", second)
    assert "0 runs to do, 0 done, 1 done that lack metrics" in out
    record = found["before", None]
    assert record["retrained_sha256"] == models.load("resnet20", 10, second).sha256
    assert not any(name in record for name in (*GAPS, "metric_tow", "metric_js_test"))
    assert record["metric_distance"] == 0
    assert record["metric_relearn_steps_retrained"] >= 0
    assert "0 runs to do, 1 done\n" in unlearned(tmp_path, *arguments, "relearn")[1]  # no reference model is needed
    again, out = unlearned(tmp_path, *arguments, "retrained", "--retrained", second)
    assert "1 done that lack metrics" in out
    assert again["before", None].items() >= record.items()


def test_metrics_are_added_to_continual_steps_and_to_diverged_runs(unlearned, tmp_path, monkeypatch):
    steps = ["--continual-step", 3, *RUN]
    lost = ["--unlearn-k", 6, "--method", "distill", "--distill-lr", 1e30]
    plain, _ = unlearned(tmp_path / "steps", *steps)
    unlearned(tmp_path / "lost", *lost)
    monkeypatch.setattr(unlearn, "unlearn", None)
    later, out = unlearned(tmp_path / "steps", *steps, "--evaluate", "distance")
    assert "0 runs to do, 0 done, 4 done that lack metrics" in out
    assert 0 < later["distill", 1]["metric_distance"] < later["distill", 2]["metric_distance"]
    assert all(record.items() >= plain[key].items() for key, record in later.items())
    (record,) = unlearned(tmp_path / "lost", *lost, "--evaluate", "distance", "relearn")[0].values()
    assert (record["status"], record["metric_distance"], record["metric_relearn_steps"]) == ("diverged", None, None)


def test_a_saved_model_that_does_not_match_its_record_is_rejected(unlearned, net, tmp_path):
    arguments = ["--unlearn-k", 6, "--method", "distill"]
    unlearned(tmp_path, *arguments, "--save-model")
    (kept,) = (tmp_path / "models").glob("*.safetensors")
    net("another", 3.0).rename(kept)
    with pytest.raises(AssertionError, match="is not the model of .*; do the run again with --rerun --save-model"):
        unlearned(tmp_path, *arguments, "--evaluate", "distance")
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(AssertionError, match="is damaged .*; do the run again with --rerun --save-model"):
        unlearned(tmp_path, *arguments, "--evaluate", "distance")


def test_metrics_that_another_command_adds_meanwhile_are_kept(run, tmp_path, monkeypatch):
    run("--method", "before")
    (path,) = (tmp_path / "runs").glob("*.json")
    true_evaluate = measurement.Evaluator.evaluate

    def evaluate(*arguments):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metric_near_duplicates": 3}))
        return true_evaluate(*arguments)

    monkeypatch.setattr(measurement.Evaluator, "evaluate", evaluate)
    assert run("--method", "before", "--evaluate", "distance")[0] == 0
    record = json.loads(path.read_text())
    assert (record["metric_near_duplicates"], record["metric_distance"]) == (3, 0.0)


def torch_state(file):
    return models.load("resnet20", 10, file).net.state_dict()


def test_unusable_reference_models_are_rejected_in_one_sentence(script, few_digits, net, tmp_path):
    def refused(*arguments):
        code, out, err = script(main_unlearn.main, "--result-dir", tmp_path, *FAST, "--method", "before", *arguments)
        assert (code, out) == (2, "")
        return err

    gone = forget_set.choose_forget(40, 2, 0).tolist()
    some = net("some", 0.1, gone[:1])
    told = refused("--evaluate", "retrained", "--retrained", some)
    assert f"was trained on 1 of the 2 images of D_f (k 2, seed 0), such as image {gone[1]}" in told
    assert "was trained on 1 of the 2" in refused("--evaluate", "rmia", "--references", net("all", 0.1), some)
    assert "is the original model" in refused("--evaluate", "retrained", "--retrained", CHECKPOINT)
    assert "there is no nowhere" in refused("--evaluate", "retrained", "--retrained", "nowhere")
    assert "expected weights of a model trained without D_f for --references" in refused(
        "--evaluate", "rmia", "--references", "nowhere"
    )
    small = tmp_path / "small.safetensors"
    models.save(models.build("resnet32", 10), small, {})
    assert "does not fit resnet20 with 10 classes" in refused("--evaluate", "retrained", "--retrained", small)
    trained_here = tmp_path / "whole.safetensors"
    models.save(models.load("resnet20", 10, some), trained_here, {"epochs": 3})
    assert "was trained on 2 of the 2" in refused("--evaluate", "retrained", "--retrained", trained_here)
    other_file = net("the_same", 0.0)
    for flags in (["retrained", "--retrained"], ["rmia", "--references", net("all", 0.1)]):
        assert f"{other_file} is the original model, which was trained on D_f" in refused(
            "--evaluate", *flags, other_file
        )
    for dtype in (torch.float16, torch.bfloat16):
        state = {name: value.to(dtype) for name, value in torch_state(other_file).items()}
        torch.save(state, tmp_path / "rounded.pt")
        assert "is the original model" in refused("--evaluate", "retrained", "--retrained", tmp_path / "rounded.pt")
    torch.save(torch_state(net("all", 0.1)), tmp_path / "all.pt")
    told = refused("--evaluate", "rmia", "--references", net("all", 0.1), tmp_path / "all.pt")
    assert f"{tmp_path / 'all.pt'} has the same weights as {net('all', 0.1)}; name each model once" in told
    assert "not finite" in refused("--evaluate", "relearn", "--retrained", net("lost", float("nan")))
    assert "name their weights with --retrained" in refused("--evaluate", "retrained")
    assert "name their weights with --references" in refused("--evaluate", "membership", "rmia")
    assert "add --evaluate rmia" in refused("--references", some)
    told = refused("--evaluate", "distance", "--retrained", some)
    assert "add --evaluate retrained or --evaluate relearn" in told


def test_forgotten_as_used_is_in_records_with_a_rate_for_each_change(unlearned, tmp_path):
    records, _ = unlearned(tmp_path, "--unlearn-k", 2, "--method", "before", "--evaluate", "robustness")
    record = records["before", None]
    assert record["metric_forgotten_as_used"] == 0
    rates = [record[f"metric_forgotten_{change}"] for change in columns.CHANGES]
    assert all(0 <= rate <= 100 for rate in rates)
    assert record["metric_forgotten_float16"] == 0


def test_recalibration_overforgetting_and_fine_tuning_of_the_original_and_an_unlearned_model(unlearned, tmp_path):
    records, _ = unlearned(tmp_path, *RUN, "--evaluate", "recalibration", "overforgetting", "finetuning")
    before, after = records["before", None], records["distill", None]
    assert (before["metric_near_test"], before["metric_near_noise"]) == (100, 100)
    assert before["metric_recalibrated_test"] > 60
    assert before["metric_tuned_forget"] == 100
    assert 0 <= after["metric_near_test"] <= 100
    assert 0 <= after["metric_near_noise"] < 100
    assert 0 <= after["metric_recalibrated_forget"] <= 100
    assert 0 <= after["metric_tuned_forget"] <= 100


def test_the_nearest_test_images_are_of_the_same_class(few_digits):
    model = models.load("resnet20", 10, CHECKPOINT)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 3, 8, 8, generator=generator), torch.arange(40) % 10
    forget, test = Split(images[:2], labels[:2]), Split(images[2:], labels[2:])
    test.images[0] = 1 - images[1]  # of class 2
    test.images[9], test.images[8] = images[1], images[0]  # of classes 1 and 0
    splits = {"forget": forget, "test": test}
    labels = {name: split.labels for name, split in splits.items()}
    device = torch.device("cpu")
    outputs = SimpleNamespace(original=model, split=splits.get, labels=labels, device=device, workers=0)
    nearest = groups._nearest_test_images(outputs)
    assert {8, 9} <= set(nearest.tolist())
    assert set(test.labels[nearest].tolist()) == {0, 1}
