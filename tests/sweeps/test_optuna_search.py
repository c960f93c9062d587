"""Search for settings: by what it goes, what it knows from records, and what Optuna is told."""

from helpers import parse_sweep
import torch

from l2ul.cli.ranges import Interval
from l2ul.metrics import agreement, groups
from l2ul.sweeps import search, trials
from l2ul.sweeps import worker as main_trials
import main_sweep
import main_unlearn


def record(status="forgotten", goal="misclassify", **values):
    return {"status": status, "goal": goal, "acc_forget": 0.0, "acc_retain": 90.0, "metric_answers_kept": 70.0} | values


def test_a_search_goes_by_what_is_kept_where_all_is_forgotten_and_never_by_the_test_set():
    both = [record(), record(acc_retain=80.0)]
    assert trials.score(both) == 85.0
    assert trials.score(both, "metric_answers_kept") == 70.0
    assert trials.score([record(acc_forget=25.0, acc_retain=99.0, status="cap"), record()]) == -25.0
    assert trials.score([record("diverged", acc_forget=None, acc_retain=None)]) == -100.0
    assert trials.score([record(goal="relabel", acc_relabel=75.0)]) == -25.0
    assert trials.score([record(goal="relabel", acc_relabel=100.0)]) == 90.0
    assert trials.score([record("done", acc_forget=50.0)]) == -50.0
    assert "acc_test" not in record()  # none of the above looked at it


def test_a_search_knows_what_is_on_record(run, tmp_path, few_digits):
    for rate in (0.003, 0.01, 0.5):
        run("--method", "neggrad", "--seed", 0, "--unlearn-lr", rate)
    run("--method", "neggrad", "--seed", 1, "--unlearn-lr", 0.003)
    wanted = ["--method", "neggrad", "--seed", 0, 1, "--unlearn-lr", "1e-3:1e-1:log", "--search", 9]
    found = parse_sweep(tmp_path, *wanted)
    known, begun = main_sweep.recall(found, main_trials.Bench(), tmp_path)
    assert [settings for settings, _ in known] == [{"unlearn_lr": 0.003}]
    assert begun == [{"unlearn_lr": 0.01}]
    done, _ = main_sweep.plan(found, main_trials.Bench(), [{"unlearn_lr": 0.003}])
    assert known[0][1] == trials.score([file.read() for trial in done for file in trial.files])


def test_settings_are_told_to_optuna_by_their_places_and_back():
    axes = {"pgd_eps": [1.0, 2.0, 4.0], "unlearn_lr": [Interval(1e-4, 1e-2, log=True)]}
    settings = {"pgd_eps": 4.0, "unlearn_lr": 0.001}
    assert search.encoded(axes, settings) == {"pgd_eps": 2, "unlearn_lr": 0.001}
    assert search.decoded(axes, {"pgd_eps": 2, "unlearn_lr": 0.001}) == settings
    others = [{"pgd_eps": 3.0, "unlearn_lr": 0.001}, {"pgd_eps": 4.0, "unlearn_lr": 0.1}, {"pgd_eps": 4.0}]
    assert search.tried(axes, [settings, settings | {"k": 3}, *others]) == [settings]


def test_a_search_measures_on_a_sample_and_without_the_source_on_held_out_examples(tmp_path):
    words = ["--method", "adv", "--pgd-eps", "1:5", "--search", 3]
    found = main_unlearn.parse(list(parse_sweep(tmp_path, *words).command({"pgd_eps": 2.0})))
    assert (found.retain_sample, found.evaluate, found.pgd_eps) == (5000, [], 2.0)
    found = main_unlearn.parse(list(parse_sweep(tmp_path, *words, "--source-free").command({"pgd_eps": 2.0})))
    assert found.evaluate == ["agreement"]


def test_agreement_is_whole_for_the_net_itself_and_uses_other_examples_than_any_run(trained):
    model, images, _ = trained
    seed = groups.HELD_OUT_SEED
    probe = agreement.held_out(model, images[:8], 5, count=64, seed=seed)
    assert agreement.kept(model, probe).percent == 100
    assert agreement.kept(type(model)().eval(), probe).percent < 100
    other = agreement.held_out(model, images[:8], 5, count=64, seed=0)
    assert not torch.equal(probe.images, other.images)
    assert groups.EVALUATIONS["agreement"].names == ("metric_answers_kept",)
