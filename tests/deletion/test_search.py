"""The search for settings: what is tried in how much time, and what is taken."""

from dataclasses import dataclass, field

import pytest
import torch

from l2ul.common.errors import InputError
from l2ul.deletion import search
from l2ul.metrics.agreement import Kept
from l2ul.unlearn import Settings

OWN = Settings()


@dataclass
class FakeJob:
    """Trials that take the time their steps take on a clock of its own; `outcome` gives forgotten and percent kept."""

    outcome: object
    clock: object
    method: str = "distill"
    uses_teacher: bool = True
    cycles: float = 1  # that every trial needs
    tried: list = field(default_factory=list)

    def try_out(self, settings, changed, go_on):
        seconds = self.cycles * settings.distill_steps * (settings.distill_mixes + settings.distill_forget) / 256
        gone, percent = self.outcome(settings)
        began = self.clock.now
        while seconds > 0 and go_on():
            self.clock.now += min(1, seconds)
            seconds -= 1
        status = "stopped" if seconds > 0 else "forgotten" if gone else "cap"
        done = torch.tensor([gone and seconds <= 0])
        self.tried.append(settings)
        kept = [Kept("some", percent, 0, 100, 10)]
        return search.Trial(
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


def tried(monkeypatch, minutes, outcome, method="distill", cycles=1):
    clock = Clock()
    monkeypatch.setattr(search.time, "perf_counter", lambda: clock.now)
    job = FakeJob(outcome, clock, method, method == "distill", cycles)
    trials = search.search(job, OWN, search.Budget(60 * minutes, 0.0), 1.0, lambda trial: None)
    return job, trials, clock.now


def test_with_time_the_methods_own_settings_come_first_and_the_least_damage_is_taken(monkeypatch):
    job, trials, _ = tried(monkeypatch, 60, lambda s: (True, 95.0 if s.distill_lr > OWN.distill_lr else 90.0))
    assert job.tried[0] == OWN
    assert len(trials) == 1 + len(search.DISTILL)
    assert trials[0].changed == {"distill_lr": 2 * OWN.distill_lr}


def test_of_equals_the_first_is_taken(monkeypatch):
    _, trials, _ = tried(monkeypatch, 60, lambda s: (True, 90.0))
    assert trials[0].changed == {}


def test_with_little_time_a_short_trial_comes_first(monkeypatch):
    job, trials, now = tried(monkeypatch, 5, lambda s: (True, s.distill_steps / 10))
    assert job.tried[0].distill_steps == 100  # a third of the time
    assert 200 < now <= 300  # the time is used
    assert trials[0].settings.distill_steps == max(s.distill_steps for s in job.tried) > 150


def test_a_net_that_needs_more_than_a_cycle_is_given_the_time_for_them(monkeypatch):
    job, trials, now = tried(monkeypatch, 5, lambda s: (True, 90.0), cycles=1.7)
    assert [s.distill_steps for s in job.tried[:2]] == [100, int(130 / 1.7)]
    assert all(trial.forgotten.all() for trial in trials)
    assert now <= 300


def test_with_hardly_any_time_batches_shrink_too(monkeypatch):
    job, _, now = tried(monkeypatch, 1, lambda s: (True, 90.0))
    assert job.tried[0].distill_steps == search.LEAST_STEPS
    assert search.FEWEST_MIXES <= job.tried[0].distill_mixes < OWN.distill_mixes
    assert now <= 60


def test_while_nothing_forgets_steps_grow_and_some_time_is_left_for_that(monkeypatch):
    job, trials, now = tried(monkeypatch, 60, lambda s: (s.distill_lr > 5 * OWN.distill_lr, 90.0))
    rates = [s.distill_lr for s in job.tried]
    assert rates[:3] == pytest.approx([OWN.distill_lr, 3 * OWN.distill_lr, 9 * OWN.distill_lr])
    assert trials[0].settings.distill_lr == pytest.approx(9 * OWN.distill_lr)
    assert now <= 3600


def test_forgetting_counts_before_damage(monkeypatch):
    _, trials, _ = tried(monkeypatch, 60, lambda s: (s.distill_features > OWN.distill_features, 100.0 - s.distill_lr))
    assert trials[0].forgotten.all()


def test_gradient_methods_are_tried_at_other_rates(monkeypatch):
    job, _, _ = tried(monkeypatch, 60, lambda s: (True, 90.0), "adv_imp")
    assert [s.unlearn_lr / OWN.unlearn_lr for s in job.tried] == pytest.approx([1, 1 / 3, 3, 0.1])


def test_a_method_that_runs_as_its_paper_has_it_is_tried_once(monkeypatch):
    job, _, _ = tried(monkeypatch, 60, lambda s: (False, 90.0), "jit")
    assert job.tried == [OWN]


def test_settings_by_name():
    assert search.named_settings([("distill_steps", 5.0), ("distill_lr", 0.1)], "distill") == {
        "distill_steps": 5,
        "distill_lr": 0.1,
    }
    assert search.named_settings([("reg_lamb", 2.0)], "adv_imp") == {"reg_lamb": 2.0}
    with pytest.raises(InputError, match="method distill has no setting distill_step; expected one of distill_lr"):
        search.named_settings([("distill_step", 5.0)], "distill")
    with pytest.raises(InputError, match="distill_steps=0.5 is not allowed; expected a whole number"):
        search.named_settings([("distill_steps", 0.5)], "distill")
    with pytest.raises(InputError, match="method adv has no setting reg_lamb; expected one of unlearn_lr"):
        search.named_settings([("reg_lamb", 1.0)], "adv")
    with pytest.raises(InputError, match="method jit has no setting unlearn_lr; it has none"):
        search.named_settings([("unlearn_lr", 1.0)], "jit")


@pytest.mark.parametrize("minutes", [60, 5])
def test_where_larger_steps_forget_first_others_are_tried_at_them(monkeypatch, minutes):
    needed = 2 * OWN.distill_lr
    job, _, now = tried(monkeypatch, minutes, lambda s: (s.distill_lr > needed, s.distill_steps / 10 - s.distill_lr))
    first = next(place for place, s in enumerate(job.tried) if s.distill_lr > needed)
    after = job.tried[first + 1 :]
    assert after
    assert all(s.distill_lr > 1.4 * OWN.distill_lr for s in after)
    assert job.tried[first] not in after
    assert now <= 60 * minutes


def test_where_a_larger_rate_forgets_first_rates_around_it_are_tried(monkeypatch):
    job, _, _ = tried(monkeypatch, 60, lambda s: (s.unlearn_lr > 2 * OWN.unlearn_lr, 90.0), "adv_imp")
    assert [s.unlearn_lr / OWN.unlearn_lr for s in job.tried] == pytest.approx([1, 3, 1.8, 6])
