"""The search of settings: which candidates run in how much time, and which is chosen."""

import contextlib
from dataclasses import FrozenInstanceError, dataclass, field, replace
import re
import time
from types import SimpleNamespace

from conftest import CLASSES
import pytest
import torch

from l2ul.common.errors import InputError, in_python
from l2ul.deletion import flow, search, strategies
from l2ul.deletion.candidates import PARTS, Candidate, TimeBudget, Unlearner, measure_step, without_synthesis
from l2ul.deletion.flow import Deletion
from l2ul.methods.stand_ins import Synthesis
from l2ul.metrics import robustness
from l2ul.metrics.agreement import Agreement
from l2ul.objective import Forget
from l2ul.unlearn import Settings

OWN = Settings(distill_steps=300)
UNCERTAINTY = 0.5  # of the agreement of a fake candidate, in percent


@dataclass
class FakeUnlearner:
    """Candidates take the time of their steps on a fake clock; `outcome` returns forgotten and agreement in percent."""

    outcome: object
    clock: object
    method: str = "distill"
    uses_teacher: bool = True
    has_fixed_length: bool = False
    cycles: float = 1  # of every candidate
    synthesis: float = 1.0  # steps that the synthesis of strategies.SYNTHESIS images takes
    run: list = field(default_factory=list)
    synthesised: list = field(default_factory=list)  # numbers of images
    train_set: object = (None,) * 16
    demanded: object = torch.ones(1, dtype=torch.bool)  # noqa: RUF009  # not changed

    def unlearn(self, settings, go_on, on_step):
        new = settings.robust_images if settings.robust_images not in self.synthesised else 0  # others are kept
        self.synthesised.append(settings.robust_images)
        self.clock.now += 2 * self.synthesis * new / strategies.SYNTHESIS
        for step in range(settings.distill_steps):
            self.clock.now += (1 + settings.robust) * settings.distill_mixes / OWN.distill_mixes
            on_step({"step": step})

    def show_progress(self, description, total):
        return contextlib.nullcontext(lambda count: None)

    def run_candidate(self, settings, changed, budget, reserve=0.0):
        images = settings.distill_mixes + settings.distill_forget
        seconds = self.cycles * settings.distill_steps * images / 256 * (1 + settings.robust)
        gone, percent = self.outcome(settings)
        began = self.clock.now
        while seconds > 0 and budget.left > reserve:
            self.clock.now += min(1, seconds)
            seconds -= 1
        status = "stopped" if seconds > 0 else "forgotten" if gone else "cap"
        done = torch.tensor([gone and seconds <= 0])
        self.run.append(settings)
        if percent is None:
            status, kept = "diverged", []
        else:
            kept = [Agreement("some", percent, percent - UNCERTAINTY, percent + UNCERTAINTY, 10)]
        return Candidate(
            settings,
            changed,
            status,
            round(self.cycles * settings.distill_steps),
            self.clock.now - began,
            done,
            kept,
            None,
        )


class Clock:
    now = 0.0


def run_search(
    monkeypatch, minutes, outcome, method="distill", cycles=1, ended=None, first=OWN, synthesis=1.0, measured=None
):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    unlearner = FakeUnlearner(outcome, clock, method, method == "distill", method == "jit", cycles, synthesis)
    budget = TimeBudget(60 * minutes, 0.0)
    seconds = measured or 1.0 + first.robust
    candidates, end = search.search(unlearner, first, budget, seconds, lambda candidate: None)
    if ended is not None and end:
        ended.append(end)
    return unlearner.run, candidates, clock.now


def test_the_methods_own_settings_come_first_and_the_best_agreement_is_chosen(monkeypatch):
    run, candidates, _ = run_search(monkeypatch, 60, lambda s: (True, 95.0 if s.distill_lr > OWN.distill_lr else 90.0))
    assert run[0] == OWN
    assert len(candidates) == len(strategies.DISTILL)  # half of the learning rate is left out
    assert candidates[0].changed == {"distill_lr": 2 * OWN.distill_lr}


def test_the_first_of_equal_candidates_is_chosen(monkeypatch):
    _, candidates, _ = run_search(monkeypatch, 60, lambda s: (True, 90.0))
    assert candidates[0].changed == {}


def test_a_short_candidate_comes_first_if_time_is_limited(monkeypatch):
    run, candidates, now = run_search(monkeypatch, 5, lambda s: (True, s.distill_steps / 10))
    assert run[0].distill_steps == 100  # a third of the time
    assert 200 < now <= 300  # the time is used
    assert candidates[0].settings.distill_steps == max(s.distill_steps for s in run) > 150


def test_time_is_planned_for_the_cycles_that_a_model_needs(monkeypatch):
    run, candidates, now = run_search(monkeypatch, 5, lambda s: (True, 90.0), cycles=1.7)
    assert [s.distill_steps for s in run[:2]] == [100, int(130 / 1.7)]
    assert all(candidate.forgotten.all() for candidate in candidates)
    assert now <= 300


def test_batches_shrink_if_time_is_very_short(monkeypatch):
    run, _, now = run_search(monkeypatch, 1, lambda s: (True, 90.0))
    assert run[0].distill_steps == strategies.MIN_STEPS
    assert strategies.MIN_BATCH <= run[0].distill_mixes < OWN.distill_mixes
    assert now <= 60


def test_the_learning_rate_grows_until_all_images_are_forgotten(monkeypatch):
    run, candidates, now = run_search(monkeypatch, 60, lambda s: (s.distill_lr > 5 * OWN.distill_lr, 90.0))
    rates = [s.distill_lr for s in run]
    assert rates[:3] == pytest.approx([OWN.distill_lr, 3 * OWN.distill_lr, 9 * OWN.distill_lr])
    assert candidates[0].settings.distill_lr == pytest.approx(9 * OWN.distill_lr)
    assert now <= 3600


def test_forgetting_counts_before_agreement(monkeypatch):
    _, candidates, _ = run_search(
        monkeypatch, 60, lambda s: (s.distill_features > OWN.distill_features, 100.0 - s.distill_lr)
    )
    assert candidates[0].forgotten.all()


def test_gradient_methods_run_with_other_learning_rates(monkeypatch):
    run, _, _ = run_search(monkeypatch, 60, lambda s: (True, 90.0 - 1e3 * s.unlearn_lr), "adv_imp")
    assert [s.unlearn_lr / OWN.unlearn_lr for s in run] == pytest.approx([1, 1 / 3, 0.1])
    run, _, _ = run_search(monkeypatch, 60, lambda s: (True, 90.0 + 1e3 * s.unlearn_lr), "adv_imp")
    assert [s.unlearn_lr / OWN.unlearn_lr for s in run] == pytest.approx([1, 1 / 3, 3])


def test_a_setting_of_which_nothing_better_can_be_expected_is_left_out(monkeypatch):
    ended = []
    run, _, now = run_search(monkeypatch, 60, lambda s: (True, 90.0), ended=ended)
    assert [s.distill_lr / OWN.distill_lr for s in run] == pytest.approx([1, 2, 1, 1])  # without half of it
    assert now < 60 * 60 * search.SEARCH_SHARE
    assert ended == [
        "the search ended before the time limit: distill_lr 0.00015 cannot be expected to raise the agreement of "
        "90.0 % by more than its uncertainty of 0.5 points"
    ]


def test_the_search_goes_on_where_the_trend_promises_more(monkeypatch):
    ended = []
    run, candidates, _ = run_search(monkeypatch, 60, lambda s: (True, 90.0 - 1e4 * s.distill_lr), ended=ended)
    assert candidates[0].changed == {"distill_lr": OWN.distill_lr / 2}
    assert (len(run), ended) == (1 + len(strategies.DISTILL), [])


def test_the_search_ends_at_once_if_agreement_is_almost_complete(monkeypatch):
    ended = []
    run, _, _ = run_search(monkeypatch, 60, lambda s: (True, 99.6), ended=ended)
    assert (run, len(ended)) == ([OWN], 1)


def test_the_search_does_not_end_early_before_all_images_are_forgotten(monkeypatch):
    ended = []
    run, _, _ = run_search(monkeypatch, 60, lambda s: (False, 100.0), ended=ended)
    assert (len(run) > 1 + strategies.MAX_ENLARGED, ended) == (True, [])


def test_a_method_of_fixed_length_runs_once(monkeypatch):
    run, _, _ = run_search(monkeypatch, 60, lambda s: (False, 90.0), "jit")
    assert run == [OWN]


def test_chosen_settings_replace_the_defaults():
    of = Deletion("distill", [("distill_steps", "5"), ("distill_lr", "0.1")], seed=7)
    assert of.fixed == {"distill_steps": 5, "distill_lr": 0.1}
    assert of.settings == Settings(bn="eval", seed=7, distill_steps=5, distill_lr=0.1, robust=1)
    of = Deletion("distill", [("robust", "0"), ("loop_precision", "bf16"), ("distill_frozen", "0.4")], seed=7)
    expected = Settings(bn="eval", seed=7, loop_precision="bf16", distill_frozen=0.4)
    assert (of.settings, of.fixed) == (expected, {})  # other settings are searched
    of = Deletion("adv_imp", [("reg_lamb", "2")], seed=0)
    assert (of.settings.robust, of.fixed) == (0, {"reg_lamb": 2.0})
    assert Deletion("jit", [("copies", "3")], seed=0).settings.method_settings == {"copies": 3}


@pytest.mark.parametrize(
    ("method", "setting", "expected"),
    [
        ("distill", ("distill_step", "5"), "method distill has no setting distill_step; expected one of distill_lr"),
        ("distill", ("distill_steps", "0.5"), "distill_steps=0.5 is not allowed; expected a whole number"),
        ("adv", ("reg_lamb", "1"), "method adv has no setting reg_lamb; expected one of unlearn_lr"),
        (
            "jit",
            ("unlearn_lr", "1"),
            "method jit has no setting unlearn_lr; expected one of bn, loop_precision, precision, epochs",
        ),
        ("adv", ("pgd_eps", "1"), "setting pgd_eps cannot be changed here: deletion requests use a fixed attack"),
        ("adv", ("adv_dtype", "uint8"), "adv_dtype cannot be changed here: deletion requests use a fixed attack"),
        *(
            (method, ("precision", "tf32"), "precision cannot be changed here: deletion requests measure in fp32 and")
            for method in ("distill", "adv", "jit")
        ),
        ("adv", ("bn", "train"), "bn is train, but deletion requests leave the statistics of batch-norm as they are"),
    ],
)
def test_settings_that_the_method_does_not_allow(method, setting, expected):
    with pytest.raises(InputError, match=expected):
        Deletion(method, [setting], seed=0)


@pytest.mark.parametrize(("fastest", "chosen"), [("bf16", []), ("bf16", [("loop_precision", "full")]), ("fp32", [])])
def test_the_precision_of_the_loop_is_part_of_what_prepare_returns(monkeypatch, trained, fastest, chosen):
    model, images, labels = trained
    monkeypatch.setattr(flow.precisions, "resolve", lambda name, device: name or "fp32")  # of a CPU with bf16
    monkeypatch.setattr(flow.preflight, "fastest_precision", lambda *_, **options: (fastest, ""))
    request = SimpleNamespace(images=images[:2], forget=Forget(images[:2] / 255, labels[:2]), class_names="ab")
    request.recognised_earlier = None
    deletion = Deletion("distill", chosen, seed=0)
    before = deletion.settings
    prepared = deletion.prepare(SimpleNamespace(classifier=model, as_written=None), request, None)
    in_bf16 = fastest == "bf16" and not chosen
    assert prepared.settings == replace(before, loop_precision="bf16" if in_bf16 else "full")
    assert prepared.unlearner.precision == ("bf16" if in_bf16 else "fp32")
    assert deletion.settings == before
    with pytest.raises(FrozenInstanceError):
        deletion.seed = 1


@pytest.mark.parametrize("minutes", [60, 5])
def test_the_search_continues_around_the_first_success(monkeypatch, minutes):
    needed = 2 * OWN.distill_lr
    run, _, now = run_search(
        monkeypatch, minutes, lambda s: (s.distill_lr > needed, s.distill_steps / 10 - s.distill_lr)
    )
    first = next(place for place, s in enumerate(run) if s.distill_lr > needed)
    after = run[first + 1 :]
    assert after
    assert all(s.distill_lr > 1.4 * OWN.distill_lr for s in after)
    assert run[first] not in after
    assert now <= 60 * minutes


def test_gradient_methods_continue_around_the_first_success(monkeypatch):
    run, _, _ = run_search(monkeypatch, 60, lambda s: (s.unlearn_lr > 2 * OWN.unlearn_lr, 90.0), "adv_imp")
    assert [s.unlearn_lr / OWN.unlearn_lr for s in run] == pytest.approx([1, 3, 1.8, 6])


ROBUST = replace(OWN, robust=1)


@pytest.mark.parametrize("minutes", [2, 60])
def test_images_are_first_forgotten_as_stored_which_stays_if_nothing_better_is_reached(monkeypatch, minutes):
    ended = []
    run, candidates, now = run_search(monkeypatch, minutes, lambda s: (not s.robust, 90.0), first=ROBUST, ended=ended)
    assert [s.robust for s in run[:2]] == ([0] if minutes == 2 else [0, 1])
    assert run[0].distill_steps == (int(strategies.PLANNED * 120) if minutes == 2 else 132)
    assert candidates[0].settings.robust == 0
    assert candidates[0].forgotten.all()
    assert now <= 60 * minutes
    assert len(ended) == 1
    assert ended[0].startswith("there was too little time to forget the images as they are used: use --minutes ")
    _, candidates, _ = run_search(monkeypatch, 60, lambda s: (True, 95.0 if s.robust else 90.0), first=ROBUST)
    assert candidates[0].settings.robust == 1


@pytest.mark.parametrize(("method", "least"), [("distill", 7), ("adv_imp", 4)])
def test_the_search_advises_more_minutes_if_time_is_too_short_to_forget_all_images(monkeypatch, method, least):
    ended = []
    run_search(monkeypatch, 2, lambda s: (False, 90.0), method, ended=ended)
    assert len(ended) == 1
    assert ended[0].startswith("there was too little time to forget all images: use --minutes ")
    assert int(ended[0].partition("--minutes ")[2].split()[0]) >= least
    ended.clear()
    run_search(monkeypatch, 2000, lambda s: (False, 90.0), method, ended=ended)  # ends as nothing is left to try
    assert ended == []


def test_an_attempt_that_needs_all_of_the_time_for_a_cycle_gets_it(monkeypatch):
    run, candidates, _ = run_search(monkeypatch, 10 / 60, lambda s: (False, 90.0))
    (first,) = [candidate for candidate in candidates if candidate.settings == run[0]]
    assert first.status == "cap"  # not stopped
    assert first.seconds > strategies.FIRST_SHARE * 10


def test_the_search_says_that_runs_as_used_diverged(monkeypatch):
    ended = []
    outcome = lambda s: (not s.robust, None if s.robust else 90.0)  # noqa: E731
    run, candidates, _ = run_search(monkeypatch, 600, outcome, first=ROBUST, ended=ended)
    assert [s.robust for s in run] == [0] + [1] * (1 + strategies.MAX_ENLARGED)
    assert candidates[0].settings.robust == 0
    assert len(ended) == 1
    assert ended[0].startswith("each run that forgets the images as they are used diverged: use --surrogate ")


def test_the_advised_minutes_leave_time_for_the_checks():
    def advised(seconds_of_checks):
        strategy = strategies.choose(FakeUnlearner(None, None), ROBUST, TimeBudget(60, 0.0), 60.0)
        sentence = search._not_as_used(strategy, 0.0, seconds_of_checks)
        return int(sentence.partition("--minutes ")[2].split()[0])

    short, long = advised(0.0), advised(1e9)
    assert long == pytest.approx(short * search.SEARCH_SHARE / search.LEAST_SEARCH, abs=2)
    assert short < advised(60.0 * short / 2) < long


def test_a_cycle_with_robust_is_shortened_but_keeps_its_batches_and_rate(monkeypatch):
    run, candidates, now = run_search(monkeypatch, 15, lambda s: (True, 80.0 + s.robust), first=ROBUST)
    short = run[1]
    assert strategies.MIN_CYCLE * OWN.distill_steps <= short.distill_steps < OWN.distill_steps
    assert strategies.MIN_IMAGES * OWN.robust_images <= short.robust_images < OWN.robust_images
    assert short == replace(ROBUST, distill_steps=short.distill_steps, robust_images=short.robust_images)
    assert candidates[0].settings == short
    assert now <= 15 * 60


def test_steps_that_were_slow_when_first_measured_are_measured_again(monkeypatch):
    run, candidates, now = run_search(monkeypatch, 15, lambda s: (True, 80.0 + s.robust), first=ROBUST, measured=20.0)
    assert [s.robust for s in run[:2]] == [0, 1]
    assert run[0].distill_steps < 132  # for which there is no time at that rate
    assert run[1].distill_steps > strategies.MIN_CYCLE * OWN.distill_steps
    assert candidates[0].settings == run[1]
    assert now <= 15 * 60


def test_a_part_of_a_slow_step_is_timed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    settings = without_synthesis(ROBUST)
    for seconds, parts_only in ((59, True), (61, False)):
        unlearner, began = FakeUnlearner(None, clock), clock.now
        assert measure_step(unlearner, settings, TimeBudget(seconds, began)) == 2
        assert clock.now - began == pytest.approx(2 * 2 / PARTS + (0 if parts_only else 3 * 2))


@pytest.mark.parametrize(("seconds_per_copy", "share"), [(0.01, 0.8), (1.0, 0.4), (0.1, 1 - 0.1 * 138 / 30)])
def test_the_search_leaves_time_for_checks_of_a_slow_model(monkeypatch, trained, seconds_per_copy, share):
    model, images, labels = trained
    forget = Forget(images[:2] / 255, labels[:2])
    monkeypatch.setattr(robustness, "seconds_per_copy", lambda model, forget: seconds_per_copy)
    monkeypatch.setattr(robustness, "num_passes", lambda model, k, in_full=True: 100 if in_full else 38)
    budget = TimeBudget(60 if share == 0.4 else 30, time.perf_counter())
    unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 0, lambda model: model, as_used=True)
    seconds = search._seconds_of_checks(unlearner)
    assert search._search_share(seconds, budget) == pytest.approx(share)
    assert search._search_share(search._seconds_of_checks(replace(unlearner, as_used=False)), budget) == 0.8
    for needed in (1.0, 100.0, 1e4):
        total = search._enough_for(needed, seconds)
        assert total * search._search_share(seconds, TimeBudget(total, 0.0)) == pytest.approx(needed)


def test_steps_are_not_measured_again_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(FakeUnlearner, "unlearn", None)  # not called
    run, _, now = run_search(monkeypatch, 2, lambda s: (True, 90.0), first=ROBUST, measured=100.0)
    assert [s.robust for s in run] == [0]
    assert now <= 120


def test_the_advised_time_suffices_for_a_cycle_with_robust(monkeypatch):
    ended = []
    run, _, _ = run_search(monkeypatch, 2, lambda s: (True, 90.0), first=ROBUST, ended=ended)
    assert [s.robust for s in run] == [0]
    advised = int(re.search(r"--minutes (\d+)", ended[0])[1])
    run, candidates, _ = run_search(monkeypatch, advised, lambda s: (True, 90.0 + s.robust), first=ROBUST)
    assert run[1].robust == 1
    assert run[1].distill_steps > 2 * strategies.MIN_CYCLE * OWN.distill_steps
    assert candidates[0].settings == run[1]


@pytest.mark.parametrize("synthesis", [0.5, 1.0, 2.0])
def test_a_cycle_with_robust_ends_in_time_however_long_the_synthesis_takes(monkeypatch, synthesis):
    run, candidates, now = run_search(
        monkeypatch, 15, lambda s: (True, 80.0 + s.robust), first=ROBUST, synthesis=synthesis
    )
    (one,) = (candidate for candidate in candidates if candidate.settings.robust)
    assert one.status == "forgotten"
    assert strategies.MIN_CYCLE * OWN.distill_steps <= one.steps < OWN.distill_steps
    assert 0.8 * 60 * 15 < now <= 60 * 15


@pytest.mark.parametrize("minutes", range(2, 20))
def test_a_cycle_with_robust_has_no_less_than_the_fewest_steps_and_images(monkeypatch, minutes):
    run, _, _ = run_search(monkeypatch, minutes, lambda s: (True, 80.0 + s.robust), first=ROBUST)
    robust = [s for s in run if s.robust]
    assert bool(robust) == (minutes > 5)
    assert all(s.distill_steps >= round(strategies.MIN_CYCLE * OWN.distill_steps) for s in robust)
    assert all(s.robust_images >= round(strategies.MIN_IMAGES * OWN.robust_images) for s in robust)


def test_a_cycle_with_robust_that_does_not_suffice_is_followed_by_a_longer_one(monkeypatch):
    run, candidates, _ = run_search(
        monkeypatch, 120, lambda s: (s.distill_steps >= 600 or not s.robust, 80.0 + s.robust), first=ROBUST
    )
    assert [s.distill_steps for s in run[1:3]] == [300, 600]
    assert all(s.distill_lr <= OWN.distill_lr for s in run[:3])
    assert candidates[0].settings.robust == 1


def test_a_model_that_is_damaged_too_much_does_not_count_as_forgotten_as_used(monkeypatch):
    ended = []
    _, candidates, _ = run_search(
        monkeypatch, 60, lambda s: (True, 45.0 if s.robust else 95.0), first=ROBUST, ended=ended
    )
    assert candidates[0].settings.robust == 0
    assert len(ended) == 1
    assert "lowers the agreement with the original model to 45.0 %, which is too much damage: use" in ended[0]


def test_no_time_is_planned_for_a_synthesis_that_does_not_take_place(monkeypatch, trained):
    def robust_runs(**changes):
        run, _, _ = run_search(monkeypatch, 5, lambda s: (True, 80.0 + s.robust), first=replace(ROBUST, **changes))
        return [s.distill_steps for s in run if s.robust]

    assert robust_runs() == []
    assert len(robust_runs(robust_images=0)) == 1
    model, images, labels = trained
    forget, surrogate = Forget(images[:2] / 255, labels[:2]), images[2:8] / 255
    first = Settings(robust=1, distill_steps=1, distill_cycles=1, distill_mixes=2, robust_pool=2)
    planned = []
    monkeypatch.setattr(search, "search", lambda unlearner, first, *_: planned.append(first) or [])
    for given in (surrogate, None):
        unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 0, lambda model: model, surrogate=given)
        search.find_candidates(unlearner, first, TimeBudget(60, time.perf_counter()))
    assert [(one.robust, one.robust_images) for one in planned] == [(1, 0), (1, first.robust_images)]


def test_agreement_is_measured_on_synthesised_images_where_copies_are_forgotten(monkeypatch, trained):
    model, images, labels = trained
    forget, made_of, synthesised = Forget(images[:2] / 255, labels[:2]), [], []
    monkeypatch.setattr(
        Synthesis,
        "images",
        lambda self, model, images, settings, count, *how: synthesised.append((settings.seed, count, *how)) or count,
    )
    monkeypatch.setattr(search.agreement, "held_out", lambda model, images, *_, **options: made_of.append(images))
    for robust, seconds_per_step in ((0, 1), (1, 1), (1, 10), (1, 1e4)):
        unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 3, lambda model: model)
        budget = TimeBudget(60, time.perf_counter())
        search._held_out_probe(unlearner, Settings(robust=robust), budget, seconds_per_step)
    seconds = 0.08 * 59.99
    sizes = int(seconds * 20), 16, 16  # 20 images with 25 iterations in the time of a step
    assert made_of == [forget.images, *sizes]
    iterations = 25, int(seconds / 10 * 500 / 16), 5
    assert synthesised == [(3 + 7_919, size, some, 0.0) for size, some in zip(sizes, iterations, strict=True)]


@pytest.mark.parametrize("max_steps", [None, 2])
def test_a_limit_that_stops_a_run_with_settings_of_the_user_is_stated(max_steps, trained):
    model, images, labels = trained
    forget = Forget(images[:2] / 255, labels[:2])
    unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 0, lambda model: model, max_steps=max_steps)
    first, budget = Settings(distill_steps=4, distill_cycles=1, distill_mixes=4), TimeBudget(60, time.perf_counter())
    (one,), end = search.find_candidates(unlearner, first, budget, fixed={"distill_steps": 4})
    assert one.steps == (max_steps or 4)
    all_taken = "the run took all of its 4 steps before all images were forgotten: use other settings"
    assert end == ("--max-steps stopped the run at step 2: use a larger limit" if max_steps else all_taken)


def test_a_time_limit_that_stops_a_run_with_settings_of_the_user_is_stated(trained):
    model, images, labels = trained
    forget = Forget(images[:2] / 255, labels[:2])
    unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 0, lambda model: model)
    first, budget = Settings(distill_steps=4, distill_cycles=1, distill_mixes=4), TimeBudget(1e-6, time.perf_counter())
    (one,), end = search.find_candidates(unlearner, first, budget, fixed={"distill_steps": 4})
    assert end == f"--minutes stopped the run at step {one.steps}: use a larger limit"
    assert in_python(end) == f"minutes stopped the run at step {one.steps}: use a larger limit"
