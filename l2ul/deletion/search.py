"""Search the settings of a method for those that forget all images with the least damage, in a limited time."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
import itertools
import math

from torch import Tensor

from l2ul.common.choices import CAP, STOPPED
from l2ul.common.errors import Wording, option, worded
from l2ul.deletion import strategies
from l2ul.deletion.candidates import Candidate, TimeBudget, Unlearner, describe, measure_step, without_synthesis
from l2ul.methods.distill import cycle_length
from l2ul.methods.robust import ITERATIONS, synthesised_images
from l2ul.metrics import agreement, robustness
from l2ul.metrics.agreement import Probe
from l2ul.unlearn import Settings


def find_candidates(
    unlearner: Unlearner,
    first: Settings,
    budget: TimeBudget,
    *,
    fixed: Mapping[str, float] | None = None,
    keep_images: Tensor | None = None,
    on_candidate: Callable[[Candidate], object] = lambda candidate: None,
) -> tuple[list[Candidate], str | None]:
    """Return candidates, best first, and why the search ended early. Adds the probes of agreement to `unlearner`.

    first         the settings of the first candidate
    budget        of the whole command; the search takes SEARCH_SHARE of it, or less if the checks take longer
    fixed         the settings that the user chose, part of `first`: then this is the only candidate
    keep_images   (n, 3, H, W) images that must keep their predictions: a further probe
    on_candidate  called with each candidate when it is finished

    The reason is a sentence if the search ends before the time is up, see `search`, or if the run with the user's
    settings ends before all images are forgotten, and None otherwise.
    """
    if unlearner.uses_teacher:
        length = cycle_length(first, len(unlearner.train_set))
        first = replace(first, distill_steps=length, distill_image_steps=0.0)
    if first.robust:
        images = synthesised_images(first, unlearner.model, unlearner.surrogate)
        first = replace(first, robust_images=images)  # the time of a synthesis is not planned where there is none
    seconds_per_step = measure_step(unlearner, without_synthesis(first), budget)
    seconds_of_checks = _seconds_of_checks(unlearner)
    of_search = budget.part(_search_share(seconds_of_checks, budget))
    unlearner.probes.append(_held_out_probe(unlearner, first, budget, seconds_per_step))
    if keep_images is not None:
        unlearner.probes.append(agreement.make_probe("images to keep", unlearner.model, keep_images))
    if fixed:
        candidate = unlearner.run_candidate(first, fixed, of_search)
        on_candidate(candidate)
        return [candidate], _end_of_only(candidate, unlearner.max_steps)
    return search(unlearner, first, of_search, seconds_per_step, on_candidate, seconds_of_checks)


def _end_of_only(candidate: Candidate, max_steps: int | None) -> str | None:
    """Return what ended the only run, with the user's settings, before all images were forgotten; None: nothing did."""
    if candidate.status == STOPPED:
        limit = "--max-steps" if candidate.steps == max_steps else option("minutes")
        return worded("{} stopped the run at step {}: use a larger limit", limit, candidate.steps)
    if candidate.status == CAP:
        return f"the run took all of its {candidate.steps} steps before all images were forgotten: use other settings"
    return None


SEARCH_SHARE = 0.8  # of the time: the search ends then, or earlier if the checks after it take longer
LEAST_SEARCH = 0.4  # of the time: it gets that in any case


def _seconds_of_checks(unlearner: Unlearner) -> float:
    """Return the seconds that it takes to check the last candidate and the result as used; 0 if that is not done."""
    if not unlearner.as_used:
        return 0.0
    model, k = unlearner.model, len(unlearner.forget)
    passes = robustness.num_passes(model, k, in_full=False) + robustness.num_passes(model, k)
    return passes * robustness.seconds_per_copy(model, unlearner.forget)


def _search_share(seconds_of_checks: float, budget: TimeBudget) -> float:
    """Return the share of the budget after which candidates stop: before the last one and the result are checked."""
    return max(LEAST_SEARCH, min(SEARCH_SHARE, 1 - seconds_of_checks / budget.seconds))


def _enough_for(seconds: float, seconds_of_checks: float) -> float:
    """Return the seconds of the smallest budget whose share for the search (see `_search_share`) has these seconds."""
    return max(seconds / SEARCH_SHARE, min(seconds + seconds_of_checks, seconds / LEAST_SEARCH))


def _minutes_for(seconds: float, seconds_of_checks: float) -> int:
    return math.ceil(_enough_for(seconds, seconds_of_checks) / 60)


PROBE_SHARE = 0.08  # of the time: for making the examples on which agreement is measured
MIN_EXAMPLES, MAX_EXAMPLES = 64, 1024  # of that probe
PROBE_IMAGES, PROBE_ITERATIONS = (16, 128), (5, 25)  # fewest and most images synthesised for it, and their iterations


def _held_out_probe(unlearner: Unlearner, settings: Settings, budget: TimeBudget, seconds_per_step: float) -> Probe:
    """Return held-out adversarial examples, as many as PROBE_SHARE of the time allows.

    They are made of D_f. With robust=1, copies of D_f are forgotten, and many mixes of D_f with them. So the examples
    are made of images that are synthesised for this purpose.
    """
    passes = settings.distill_forget + 1.5 * settings.distill_mixes  # forward and backward, of images per step
    count = int(PROBE_SHARE * budget.left / max(seconds_per_step / passes * agreement.STEPS, 1e-9))
    count = min(MAX_EXAMPLES, max(MIN_EXAMPLES, count))
    images, num_classes = unlearner.forget.images, unlearner.num_classes
    if settings.robust:
        (few, many), (short, long) = PROBE_IMAGES, PROBE_ITERATIONS
        steps = PROBE_SHARE * budget.left / max(seconds_per_step, 1e-9)
        affordable = strategies.SYNTHESIS * ITERATIONS * steps  # iterations of an image
        size = int(max(few, min(many, affordable / long)))
        iterations = int(max(short, min(long, affordable / size)))
        other = replace(settings, seed=unlearner.seed + agreement.SEED_OFFSET)
        images = unlearner.synthesis.images(unlearner.model, images, other, size, iterations, 0.0)
    with unlearner.show_progress("examples for agreement, PGD steps", count * agreement.STEPS) as advance:
        return agreement.held_out(
            unlearner.model, images, num_classes, count=count, seed=unlearner.seed, progress=advance
        )


def search(
    unlearner: Unlearner,
    first: Settings,
    budget: TimeBudget,
    seconds_per_step: float,
    on_candidate: Callable[[Candidate], object],
    seconds_of_checks: float = 0.0,
) -> tuple[list[Candidate], str | None]:
    """Run candidates while there is time. Return them, best first, then in their order, and why this ended early.

    first              the method's own settings
    seconds_per_step   with these settings
    seconds_of_checks  after the search, for the advice on how many minutes are enough

    `strategies` decides what is run: attempts until one succeeds, then variations. A variation is left out if it is not
    expected to end in time, or if it is not promising. The reason is a sentence if only variations that are not
    promising are left, or if there is too little time or too much damage to forget the images; otherwise None.
    """

    def run(settings: Settings, reserve: float = 0.0) -> Candidate:
        candidate = unlearner.run_candidate(settings, _changed(first, settings), budget, reserve)
        on_candidate(candidate)
        return candidate

    used_before, left_out, time_is_up = budget.used, [], False
    strategy = strategies.choose(unlearner, first, budget, seconds_per_step)
    candidates = strategy.candidates
    before = strategy.run_before(run)
    while not strategy.successes and (settings := strategy.next_attempt()):
        candidates.append(run(settings, strategy.reserve(settings)))
    for settings in strategy.variations():
        if not strategy.has_time(settings):
            time_is_up = True
        elif not _is_promising(settings, strategy.successes):
            left_out.append(settings)
        else:
            candidates.append(run(settings))
    end = None
    if first.robust and unlearner.demanded.any() and not any(candidate.rank[1] > 0 for candidate in candidates):
        end = _not_as_used(strategy, used_before, seconds_of_checks)
    elif not strategy.successes and (budget.left <= 0 or candidates[0].settings != first):
        end = _not_in_time(strategy, used_before, seconds_of_checks)
    elif left_out and not time_is_up:
        end = _early_end(first, left_out, strategy.successes)
    return sorted([*before, *candidates], key=lambda candidate: candidate.rank, reverse=True), end  # stable


def _changed(first: Settings, settings: Settings) -> dict[str, float]:
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(first, name)}


def _best(candidates: list[Candidate]) -> Candidate:
    return max(candidates, key=lambda candidate: candidate.rank)


def _is_promising(settings: Settings, successes: list[Candidate]) -> bool:
    """Return whether the expected agreement exceeds that of the best success by more than its uncertainty."""
    best = _best(successes)
    return _expected_agreement(settings, successes) > best.agreement + best.uncertainty


def _expected_agreement(settings: Settings, successes: list[Candidate]) -> float:
    """Return the highest agreement in percent that can be expected of settings.

    It is 100, unless two successes differ in one setting alone, in which these settings differ from the first of them
    alone as well. Then it is extrapolated, linearly in the logarithm of that setting.
    """
    expected = []
    for one, other in itertools.permutations(successes, 2):
        changed, varied = _changed(one.settings, settings), _changed(one.settings, other.settings)
        if changed.keys() == varied.keys() and len(changed) == 1:
            (name,) = changed
            values = [getattr(each, name) for each in (one.settings, other.settings, settings)]
            if all(isinstance(value, int | float) and value > 0 for value in values):
                steps = math.log(values[2] / values[0]) / math.log(values[1] / values[0])
                expected.append(one.agreement + steps * (other.agreement - one.agreement))
    return min(100.0, max(expected, default=100.0))


def _early_end(first: Settings, left_out: list[Settings], successes: list[Candidate]) -> str:
    best = _best(successes)
    names = "; ".join(describe(_changed(first, one)) for one in left_out)
    return (
        f"the search ended before the time limit: {names} cannot be expected to raise the agreement of "
        f"{best.agreement:.1f} % by more than its uncertainty of {best.uncertainty:.1f} points"
    )


def _not_in_time(strategy: strategies.Strategy, used_before: float, seconds_of_checks: float) -> Wording:
    """Return that no candidate succeeded for want of time, and what to do; arguments as those of `_not_as_used`."""
    seconds = max(used_before + strategy.usual_seconds, 2 * strategy.budget.seconds)
    minutes = _minutes_for(seconds, seconds_of_checks)
    return worded("there was too little time to forget all images: use {} or more", option("minutes", minutes))


def _not_as_used(strategy: strategies.Robust, used_before: float, seconds_of_checks: float) -> Wording:
    """Return why no candidate counts as forgotten as used, and what to do.

    used_before        seconds that the command took before the search
    seconds_of_checks  that it takes after the search
    """
    damaged = [candidate for candidate in strategy.candidates if candidate.is_damaged]
    instead = worded(
        "{}, or {} to forget them as they are stored only",
        Wording("--surrogate with a folder of other images", "surrogate with other images"),
        Wording("--setting robust=0", "robust=0"),
    )
    if strategy.candidates and not any(candidate.kept for candidate in strategy.candidates):
        return worded("each run that forgets the images as they are used diverged: use {}", instead)
    if damaged:
        best = max(damaged, key=lambda candidate: (candidate.number_forgotten, candidate.agreement))
        total = len(best.forgotten) if best.demanded is None else int(best.demanded.sum())
        why = (
            f"forgetting {best.number_forgotten} of {total} images as they are used lowers the "
            f"agreement with the original model to {best.agreement:.1f} %, which is too much damage"
        )
    else:
        why = "there was too little time to forget the images as they are used"
    seconds = used_before + strategy.advised_seconds(was_damaged=bool(damaged))
    minutes = _minutes_for(seconds, seconds_of_checks)
    return worded("{}: use {} or more, {}", why, option("minutes", minutes), instead)
