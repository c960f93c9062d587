"""Candidates: how they are ranked, which images count as forgotten, and what they share."""

import contextlib
from dataclasses import replace
import time

from conftest import CLASSES
import pytest
import torch

from l2ul.deletion.candidates import Candidate, TimeBudget, Unlearner, measure_step
from l2ul.metrics import robustness
from l2ul.metrics.agreement import Agreement
from l2ul.objective import Forget
from l2ul.unlearn import Settings


def test_candidates_are_ranked_by_images_as_stored_then_by_enough_as_used_then_by_agreement():
    def candidate(stored, used, percent, robust=1):
        masks = [torch.arange(20) < number for number in (used, stored)]
        kept = [Agreement("some", percent, percent, percent, 10)]
        settings = Settings(robust=robust)
        return Candidate(settings, {}, "cap", 1, 1.0, masks[0], kept, None, masks[1])

    best = [candidate(20, 18, 95.0), candidate(20, 20, 90.0), candidate(20, 17, 99.0), candidate(19, 19, 99.0)]
    assert sorted(best, key=lambda one: one.rank, reverse=True) == best
    assert [one.succeeded for one in best] == [True, True, False, False]
    assert candidate(20, 10, 60.0).rank > candidate(20, 0, 95.0).rank > candidate(20, 9, 60.0).rank
    assert not candidate(18, 18, 99.0, robust=0).succeeded
    none = torch.zeros(20, dtype=torch.bool)
    assert candidate(5, 0, 99.0).is_better_than(none, none)
    assert not candidate(0, 0, 99.0).is_better_than(none, none)


def test_images_that_were_not_recognised_do_not_count_as_forgotten_as_used():
    demanded = torch.arange(20) < 2

    def candidate(used, percent):
        forgotten, kept = torch.arange(20) >= 2 - used, [Agreement("some", percent, percent, percent, 10)]
        stored = torch.ones(20, dtype=torch.bool)
        return Candidate(Settings(robust=1), {}, "cap", 1, 1.0, forgotten, kept, None, stored, demanded)

    assert candidate(1, 60.0).rank > candidate(0, 95.0).rank
    assert [candidate(used, 60.0).succeeded for used in (0, 1, 2)] == [False, False, True]
    assert candidate(1, 60.0).is_better_than(torch.ones(20, dtype=torch.bool), ~demanded)


@pytest.mark.parametrize("goal", ["misclassify", "relabel"])
@pytest.mark.parametrize(("as_used", "copies", "recognised"), [(True, 0, True), (True, 1, False), (False, 0, False)])
def test_an_image_of_an_earlier_request_counts_as_recognised_until_it_is_forgotten_as_used(
    monkeypatch, trained, goal, as_used, copies, recognised
):
    model, images, labels = trained
    labels = (labels[:3] - torch.tensor([0, 1, 1])) % CLASSES  # the model recognises the first image alone
    forget, goals = Forget(images[:3] / 255, labels, (labels + 1) % CLASSES if goal == "relabel" else None), []
    used = robustness.AsUsed(torch.ones(3, dtype=torch.bool), torch.tensor([0.0, copies, copies]), {}, {})
    monkeypatch.setattr(robustness, "as_used", lambda _, forget, **options: goals.append(forget.goal) or used)
    unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 0, lambda model: model, as_used=as_used)
    unlearner.earlier = torch.tensor([False, True, False])
    assert unlearner.recognised.tolist() == [True, recognised, False]
    assert set(goals) <= {"misclassify"}  # whether the label is recognised, not whether the new one is
    assert unlearner.demanded.tolist() == [True, recognised or goal == "misclassify", False]
    if goal == "misclassify":
        assert unlearner.forgotten(model).tolist() == [False, bool(copies) or not as_used, True]


def test_candidates_share_synthesised_images_and_show_their_synthesis(trained):
    model, images, labels = trained
    forget, bars = Forget(images[:3] / 255, labels[:3]), []

    @contextlib.contextmanager
    def bar(description, total):
        bars.append((description, total))
        yield lambda count=1, note="": None

    unlearner = Unlearner(model, forget, forget, "distill", CLASSES, 0, lambda model: model, bar)
    settings = Settings(robust=1, distill_steps=2, distill_cycles=1, distill_mixes=4, robust_pool=4, robust_images=4)
    measure_step(unlearner, settings, TimeBudget(60, time.perf_counter()))
    for rate in (1e-3, 1e-4):
        unlearner.unlearn(replace(settings, distill_lr=rate))
    measured = [("measure the time of a step", steps) for steps in (2, 3)]
    assert bars == [measured[0], ("synthesise 4 images, 100 iterations each", 400), measured[1]]
