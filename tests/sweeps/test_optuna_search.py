"""Search for settings: the score, what is known from records, and what Optuna receives."""

from helpers import parse_sweep
import torch

from l2ul.cli import unlearn_options
from l2ul.metrics import agreement, groups, registry
from l2ul.sweeps import optuna_search, trials
from l2ul.sweeps.ranges import Interval
from l2ul.sweeps.sweep import SweepRunner


def record(status="forgotten", goal="misclassify", **values):
    return {"status": status, "goal": goal, "acc_forget": 0.0, "acc_retain": 90.0, "metric_answers_kept": 70.0} | values


def test_the_score_is_the_accuracy_on_d_r_if_all_is_forgotten_and_does_not_depend_on_d_test():
    both = [record(), record(acc_retain=80.0)]
    assert trials.score(both) == 85.0
    assert trials.score(both, "metric_answers_kept") == 70.0
    assert trials.score([record(acc_forget=25.0, acc_retain=99.0, status="cap"), record()]) == -25.0
    assert trials.score([record("diverged", acc_forget=None, acc_retain=None)]) == -100.0
    assert trials.score([record(goal="relabel", acc_relabel=75.0)]) == -25.0
    assert trials.score([record(goal="relabel", acc_relabel=100.0)]) == 90.0
    assert trials.score([record("done", acc_forget=50.0)]) == -50.0
    assert "acc_test" not in record()  # none of the above needed it


def test_a_search_finds_its_settings_on_record(run, tmp_path, few_digits):
    for rate in (0.003, 0.01, 0.5):
        run("--method", "neggrad", "--seed", 0, "--unlearn-lr", rate)
    run("--method", "neggrad", "--seed", 1, "--unlearn-lr", 0.003)
    search = ["--method", "neggrad", "--seed", 0, 1, "--unlearn-lr", "1e-3:1e-1:log", "--search", 9]
    runner = SweepRunner(parse_sweep(tmp_path, *search))
    known, started = runner.recall()
    assert [settings for settings, _ in known] == [{"unlearn_lr": 0.003}]
    assert started == [{"unlearn_lr": 0.01}]
    planned, _ = runner.plan([{"unlearn_lr": 0.003}])
    assert known[0][1] == trials.score([file.read() for trial in planned for file in trial.files])


def test_optuna_receives_listed_values_as_indices():
    axes = {"pgd_eps": [1.0, 2.0, 4.0], "unlearn_lr": Interval(1e-4, 1e-2, log=True)}
    settings = {"pgd_eps": 4.0, "unlearn_lr": 0.001}
    assert optuna_search.encode(axes, settings) == {"pgd_eps": 2, "unlearn_lr": 0.001}
    assert optuna_search.decode(axes, {"pgd_eps": 2, "unlearn_lr": 0.001}) == settings
    others = [{"pgd_eps": 3.0, "unlearn_lr": 0.001}, {"pgd_eps": 4.0, "unlearn_lr": 0.1}, {"pgd_eps": 4.0}]
    assert optuna_search.settings_on_record(axes, [settings, settings | {"k": 3}, *others]) == [settings]


def test_a_search_measures_a_sample_of_d_r_or_source_free_the_agreement_on_held_out_examples(tmp_path):
    words = ["--method", "adv", "--pgd-eps", "1:5", "--search", 3]
    opts = unlearn_options.parse(parse_sweep(tmp_path, *words).arguments({"pgd_eps": 2.0}))
    assert (opts.retain_sample, opts.evaluate, opts.pgd_eps) == (5000, [], 2.0)
    opts = unlearn_options.parse(parse_sweep(tmp_path, *words, "--source-free").arguments({"pgd_eps": 2.0}))
    assert opts.evaluate == ["agreement"]


def test_agreement_of_a_model_with_itself_is_complete_and_no_run_uses_the_same_examples(trained):
    model, images, _ = trained
    seed = groups.HELD_OUT_SEED
    probe = agreement.held_out(model, images[:8], 5, count=64, seed=seed)
    assert agreement.measure(model, probe).percent == 100
    assert agreement.measure(type(model)().eval(), probe).percent < 100
    other = agreement.held_out(model, images[:8], 5, count=64, seed=0)
    assert not torch.equal(probe.images, other.images)
    assert registry.EVALUATIONS["agreement"].names == ("metric_answers_kept",)
