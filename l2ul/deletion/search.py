"""Search the settings of a method for those that forget all images with the least damage, in a limited time."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
import itertools
import math
from typing import Any

from torch import Tensor, nn

from l2ul.common import precision as precisions
from l2ul.common.choices import AUTO, BF16, STOPPED
from l2ul.common.errors import InputError
from l2ul.deletion.candidates import Candidate, TimeBudget, Unlearner, describe, measure_step
from l2ul.methods import registry
from l2ul.methods.distill import cycle_length
from l2ul.methods.robust import ITERATIONS, synthesised_images
from l2ul.methods.settings import ATTACK as ATTACK_SETTINGS
from l2ul.methods.settings import SHARED, Value
from l2ul.metrics import agreement, preflight, robustness
from l2ul.metrics.agreement import Probe
from l2ul.unlearn import Settings

MIN_STEPS = 60  # of a cycle of distill
MIN_BATCH = 16  # images of D_f, and mixes, per step of distill
SEARCH_SHARE = 0.8  # of the time: the search ends then, or earlier if the checks after it take longer
LEAST_SEARCH = 0.4  # of the time: it gets that in any case
FIRST_SHARE = 0.6  # of the time left: the most that one candidate takes while none has forgotten all images
PROBE_SHARE = 0.08  # of the time: for making the examples on which agreement is measured
MIN_EXAMPLES, MAX_EXAMPLES = 64, 1024  # of that probe
PROBE_IMAGES, PROBE_ITERATIONS = (16, 128), (5, 25)  # fewest and most images synthesised for it, and their iterations
FREE = ("robust", "loop_precision", "distill_frozen")  # settings that the user may set without ending the search
MIN_CYCLE, MIN_IMAGES = 1 / 6, 1 / 3  # of the steps and synthesised images with robust=1: the fewest that were measured
AS_STORED = 1 / 3  # of the time, at most: for the run with robust=0 before one with robust=1
ROBUST_STEP = 2  # steps with robust=0 that take the time of one with robust=1, at least
SYNTHESIS = 5  # images that are synthesised in the time of a step with robust=1
PLANNED = 0.85  # of the time left: the part that a shortened cycle with robust=1 is planned for
MAX_ENLARGED = 3  # times that the learning rate is raised while images are not forgotten
# Factors of the method's own settings, for methods with ("distill") and without a teacher.
LARGER_STEPS = {True: {"distill_lr": 3.0}, False: {"unlearn_lr": 3.0}}  # while images are not forgotten
DISTILL = ({"distill_lr": 2.0}, {"distill_features": 3.0}, {"distill_lr": 0.5}, {"distill_steps": 2.0})
GRADIENT = ({"unlearn_lr": 1 / 3}, {"unlearn_lr": 3.0}, {"unlearn_lr": 0.1})
BETWEEN = ({"unlearn_lr": 0.6}, {"unlearn_lr": 2.0})  # if a learning rate forgets all images and a third of it does not


def check_method(method: str, goal: str | None = None) -> None:
    """Raise InputError unless a method can carry out a request: it forgets, without D_r, and is for the goal."""
    needs = registry.get(method, goal).needs
    if method == "before" or "retain" in needs:
        why = "forgets nothing" if method == "before" else "trains on the retain set, which a request does not have"
        raise InputError(f"method {method} {why}", "leave out --method", "name one such as distill or adv_imp")


def choose_settings(method: str, chosen: Sequence[tuple[str, str]], seed: int) -> tuple[Settings, dict[str, Value]]:
    """Return the settings of the first candidate, and those of them that the user chose.

    chosen  names and values as text; they replace the defaults

    Methods with the setting robust forget images as they are used, unless it is set to 0. The settings in FREE leave
    the search free.

    Raises InputError for a method that cannot carry out a request, or a setting or value that it does not allow.
    """
    check_method(method)
    fixed = registry.parse_settings(chosen, [method])
    for name in fixed.keys() & ATTACK_SETTINGS.keys():
        raise InputError(f"setting {name} cannot be changed here: deletion requests use a fixed attack", "leave it out")
    if fixed.get("bn", "eval") != "eval":
        raise InputError(
            "setting bn is train, but deletion requests leave the statistics of batch-norm", "leave it out"
        )
    loop = {name: value for name, value in fixed.items() if name in SHARED}
    own = {name: value for name, value in fixed.items() if name not in SHARED}
    loop = {"robust": int("robust" in registry.get(method).all_settings)} | loop
    fixed = {name: value for name, value in fixed.items() if name not in FREE}
    return Settings(**{"bn": "eval"} | loop, seed=seed, method_settings=own), fixed


def choose_precision(settings: Settings, is_chosen: bool, model: nn.Module, images: Tensor) -> tuple[Settings, str]:
    """Return the settings with the precision of the loop, and the precision of the search: one of PRECISIONS.

    is_chosen  whether the user chose the precision of the loop, in these settings
    images     (k, C, H, W) uint8 or float in [0,1], D_f, on the device of the model

    On a CPU the loop runs in bf16 if a step of the model is faster in it, see `preflight.fastest_precision`. Raises
    InputError if the user chose bf16 and the device or the model cannot compute in it.
    """
    device = images.device
    if is_chosen and settings.loop_precision == BF16:
        precisions.require(device, BF16, "use --setting loop_precision=full")
        preflight.check_model(model, images, BF16)
    has_choice = not is_chosen and precisions.resolve(AUTO, device) == AUTO  # on a CPU with bf16
    if has_choice and preflight.fastest_precision(model, images, trains=True)[0] == BF16:
        settings = replace(settings, loop_precision=BF16)
    return settings, BF16 if settings.loop_precision == BF16 else precisions.resolve(None, device)


def find_candidates(
    unlearner: Unlearner,
    first: Settings,
    budget: TimeBudget,
    *,
    fixed: Mapping[str, float] | None = None,
    keep_images: Tensor | None = None,
    on_candidate: Callable[[Candidate], object] = lambda candidate: None,
    on_early_end: Callable[[str], object] = lambda sentence: None,
) -> list[Candidate]:
    """Return candidates, best first. Adds the probes of agreement to `unlearner`.

    first         the settings of the first candidate
    budget        of the whole command; the search takes SEARCH_SHARE of it, or less if the checks take longer
    fixed         the settings that the user chose, part of `first`: then this is the only candidate
    keep_images   (n, 3, H, W) images that must keep their predictions: a further probe
    on_candidate  called with each candidate when it is finished
    on_early_end  called with a sentence if the search ends before the time is up, see `search`, or if the limit of time
                  or steps stops the run with the user's settings
    """
    if unlearner.uses_teacher:
        length = cycle_length(first, len(unlearner.train_set))
        first = replace(first, distill_steps=length, distill_image_steps=0.0)
    if first.robust:
        images = synthesised_images(first, unlearner.model, unlearner.surrogate)
        first = replace(first, robust_images=images)  # the time of a synthesis is not planned where there is none
    seconds_per_step = measure_step(unlearner, _without_synthesis(first), budget)
    seconds_of_checks = _seconds_of_checks(unlearner)
    of_search = budget.part(_search_share(seconds_of_checks, budget))
    unlearner.probes.append(_held_out_probe(unlearner, first, budget, seconds_per_step))
    if keep_images is not None:
        unlearner.probes.append(agreement.make_probe("images to keep", unlearner.model, keep_images))
    if fixed:
        candidate = unlearner.run_candidate(first, fixed, of_search)
        on_candidate(candidate)
        if candidate.status == STOPPED:
            on_early_end(f"--minutes or --max-steps stopped the run at step {candidate.steps}: use a larger limit")
        return [candidate]
    return search(unlearner, first, of_search, seconds_per_step, on_candidate, on_early_end, seconds_of_checks)


def find_best(
    unlearner: Unlearner, first: Settings, budget: TimeBudget, forgotten: Tensor, **options: Any
) -> tuple[list[Candidate], Candidate | None]:
    """Return the candidates of `find_candidates`, best first, and the best if it is better than the original model.

    forgotten  (k,) bool, the images that need no unlearning; if these are all, there are no candidates
    options    see `find_candidates`
    """
    candidates = [] if forgotten.all() else find_candidates(unlearner, first, budget, **options)
    stored = unlearner.forgotten_as_stored(unlearner.model)
    return candidates, next((one for one in candidates[:1] if one.is_better_than(stored, forgotten)), None)


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


def _without_synthesis(settings: Settings) -> Settings:
    """Return settings whose steps take the same time, with stand-ins that are made of D_f."""
    return replace(settings, robust_images=0)


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
        affordable = SYNTHESIS * ITERATIONS * steps  # iterations of an image
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
    on_early_end: Callable[[str], object] = lambda sentence: None,
    seconds_of_checks: float = 0.0,
) -> list[Candidate]:
    """Run candidates while there is time; return them, best first and of equals the earlier one.

    first              the method's own settings
    seconds_per_step   with these settings
    seconds_of_checks  after the search, for the advice on how many minutes are enough

    With robust=1, a candidate with robust=0 comes before: it forgets the images as they are stored in a third of the
    time. Then the cycle with robust=1 is as long as there is time for once its images are synthesised. Without time for
    MIN_CYCLE of its steps, the candidate with robust=0 gets all of the time, and the cycle runs only if steps are then
    measured to be faster than before.

    If time is short, the first candidate is a version of `first` that takes a third of it. Until a candidate has
    forgotten all images, each is followed by one with a larger learning rate, or with robust=1 by one of twice the
    length. After that, others are only started if they should end in time. If the first successful candidate had other
    settings than `first`, the search continues around those.

    After the first success, settings are left out if they cannot be expected to be better than the best by more than
    the uncertainty of its agreement (see `_expected_agreement`). `on_early_end` is called with a sentence if this ends
    the search, or if the time or the damage prevents that the images are forgotten as used.
    """
    candidates: list[Candidate] = []
    left_out: list[Settings] = []
    time_is_up, used_before = False, budget.used
    as_stored = []
    if first.robust:
        rest = budget.left - _seconds_as_stored(unlearner, first, budget.left, seconds_per_step)
        has_time = bool(_initial_queue(unlearner, first, rest, seconds_per_step))
        share = AS_STORED if has_time else PLANNED
        as_stored = [_run_as_stored(unlearner, first, budget, seconds_per_step, share)]
        on_candidate(as_stored[0])
        if not has_time and 3 * seconds_per_step < budget.left:  # other processes may have slowed the steps measured
            seconds_per_step = min(seconds_per_step, measure_step(unlearner, _without_synthesis(first), budget))
    queue = deque(_initial_queue(unlearner, first, budget.left, seconds_per_step))
    while queue:
        settings = queue.popleft()
        succeeded = any(candidate.succeeded for candidate in candidates)
        must_end = bool(candidates) and (succeeded or first.robust)
        late = must_end and _expected_seconds(unlearner, settings, candidates) > budget.left
        if candidates and (budget.left <= 0 or late):
            time_is_up = True
            continue
        if succeeded and _expected_agreement(settings, candidates) <= _convincing_agreement(candidates):
            left_out.append(settings)
            continue
        if first.robust and settings.robust_images and not candidates:
            settings = _after_synthesis(unlearner, first, settings, budget)
        reserve = 0.0 if succeeded or first.robust else (1 - FIRST_SHARE) * budget.left
        candidates.append(unlearner.run_candidate(settings, _changed(first, settings), budget, reserve))
        on_candidate(candidates[-1])
        if not succeeded and not candidates[-1].succeeded:
            can_enlarge = len(candidates) <= MAX_ENLARGED and not unlearner.has_fixed_length
            if first.robust:
                queue = deque([_scaled(settings, {"distill_steps": 2.0})] if can_enlarge else [])
            elif candidates[-1].status != "diverged" and can_enlarge:
                queue.appendleft(_enlarged(unlearner, settings, budget.left, candidates))
        elif not succeeded and settings != first:
            queue = deque(_around(unlearner, first, budget.left, candidates))
    if first.robust and unlearner.demanded.any() and not any(candidate.rank[1] for candidate in candidates):
        on_early_end(_not_as_used(first, candidates, used_before, seconds_per_step, seconds_of_checks))
    elif left_out and not time_is_up:
        on_early_end(_early_end(first, left_out, candidates))
    return sorted([*as_stored, *candidates], key=lambda candidate: candidate.rank, reverse=True)  # stable


def _run_as_stored(
    unlearner: Unlearner, first: Settings, budget: TimeBudget, seconds_per_step: float, share: float
) -> Candidate:
    """Run the method with robust=0, in this share of the time and at most half as much again.

    seconds_per_step  with robust=1
    """
    usual = replace(first, robust=0, distill_steps=_steps_as_stored(unlearner, first))
    settings = fit_to_time(usual, share * budget.left, seconds_per_step / ROBUST_STEP)
    return unlearner.run_candidate(settings, _changed(first, settings), budget, max(0.0, 1 - 1.5 * share) * budget.left)


def _steps_as_stored(unlearner: Unlearner, first: Settings) -> int:
    return cycle_length(replace(first, robust=0, distill_steps=0), len(unlearner.train_set))


def _seconds_as_stored(unlearner: Unlearner, first: Settings, left: float, seconds_per_step: float) -> float:
    """Estimate the seconds of the run with robust=0, from those of a step with robust=1."""
    return min(AS_STORED * left, _steps_as_stored(unlearner, first) * seconds_per_step / ROBUST_STEP)


def _successes(candidates: list[Candidate]) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.succeeded and candidate.kept]


def _convincing_agreement(candidates: list[Candidate]) -> float:
    """Return the highest agreement of a success plus its uncertainty, half the width of its 95 % interval."""
    best = max(_successes(candidates), key=lambda candidate: candidate.rank)
    return best.agreement + best.uncertainty


def _expected_agreement(settings: Settings, candidates: list[Candidate]) -> float:
    """Return the highest agreement in percent that can be expected of settings.

    It is 100, unless two successes differ in one setting alone, in which these settings differ from the first of them
    alone as well. Then it is extrapolated, linearly in the logarithm of that setting.
    """
    expected = []
    for one, other in itertools.permutations(_successes(candidates), 2):
        changed, varied = _changed(one.settings, settings), _changed(one.settings, other.settings)
        if changed.keys() == varied.keys() and len(changed) == 1:
            (name,) = changed
            values = [getattr(each, name) for each in (one.settings, other.settings, settings)]
            if all(isinstance(value, int | float) and value > 0 for value in values):
                steps = math.log(values[2] / values[0]) / math.log(values[1] / values[0])
                expected.append(one.agreement + steps * (other.agreement - one.agreement))
    return min(100.0, max(expected, default=100.0))


def _early_end(first: Settings, left_out: list[Settings], candidates: list[Candidate]) -> str:
    best = max(_successes(candidates), key=lambda candidate: candidate.rank)
    names = "; ".join(describe(_changed(first, one)) for one in left_out)
    return (
        f"the search ended before the time limit: {names} cannot be expected to raise the agreement of "
        f"{best.agreement:.1f} % by more than its uncertainty of {best.uncertainty:.1f} points"
    )


def _not_as_used(
    first: Settings,
    candidates: list[Candidate],
    used_before: float,
    seconds_per_step: float,
    seconds_of_checks: float,
) -> str:
    """Return why no candidate counts as forgotten as used, and what to do.

    used_before        seconds that the command took before the search
    seconds_of_checks  that it takes after the search
    """
    damaged = [candidate for candidate in candidates if candidate.is_damaged]
    if damaged:
        best = max(damaged, key=lambda candidate: (candidate.number_forgotten, candidate.agreement))
        total = len(best.forgotten) if best.demanded is None else int(best.demanded.sum())
        why = (
            f"forgetting {best.number_forgotten} of {total} images as they are used lowers the "
            f"agreement with the original model to {best.agreement:.1f} %, which is too much damage"
        )
    else:
        why = "there was too little time to forget the images as they are used"
    # for a run with robust=1 of twice the shortest length, or of twice the usual length if that was too damaging
    longer = 2 * _cost(first) if damaged else 2 * _cost(fit_to_time(first, 0.0, seconds_per_step))
    seconds = used_before + seconds_per_step * longer / PLANNED / (1 - AS_STORED)
    minutes = math.ceil(_enough_for(seconds, seconds_of_checks) / 60)
    return (
        f"{why}: use --minutes {minutes} or more, --surrogate with a folder of other images, or --setting robust=0 to "
        "forget them as they are stored only"
    )


def _changed(first: Settings, settings: Settings) -> dict[str, float]:
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(first, name)}


def _initial_queue(unlearner: Unlearner, first: Settings, left: float, seconds_per_step: float) -> list[Settings]:
    if not unlearner.uses_teacher:
        return [first, *(() if unlearner.has_fixed_length else (_scaled(first, by) for by in GRADIENT))]
    if first.robust:
        steps = PLANNED * left / max(seconds_per_step, 1e-9)
        if steps < _cost(fit_to_time(first, 0.0, seconds_per_step)):
            return []
        variations = [_scaled(first, by) for by in DISTILL] if steps >= _cost(first) else []
        return [fit_to_time(first, PLANNED * left, seconds_per_step), *variations]
    if 3 * seconds_per_step * first.distill_steps <= left:
        return [first, *(_scaled(first, by) for by in DISTILL)]
    return [fit_to_time(first, left / 3, seconds_per_step)]


def _around(unlearner: Unlearner, first: Settings, left: float, candidates: list[Candidate]) -> list[Settings]:
    """Return settings to run after the first success: as many steps as there is time for, and variations of that."""
    last = candidates[-1].settings
    if not unlearner.uses_teacher:
        return [_scaled(last, by) for by in BETWEEN]
    names = ("distill_steps", "distill_mixes", "distill_forget", "robust_images")
    sizes = {name: getattr(first, name) for name in names}
    full = replace(last, **sizes)
    longer = fit_to_time(full, left / _cycles(candidates), _seconds_per_step(full, candidates))
    return [settings for settings in (longer, *(_scaled(longer, by) for by in DISTILL)) if settings != last]


def fit_to_time(settings: Settings, left: float, seconds_per_step: float) -> Settings:
    """Return settings of distill with one cycle in `left` seconds: fewer steps, and then smaller batches.

    With robust=1, fewer steps and synthesised images, and no less than MIN_CYCLE and MIN_IMAGES of them.
    """
    if settings.robust:
        steps = left / max(seconds_per_step, 1e-9)
        images = round(max(MIN_IMAGES, min(1.0, steps / _cost(settings))) * settings.robust_images)
        return _with_steps(replace(settings, robust_images=images), int(steps - images / SYNTHESIS))
    steps = max(MIN_STEPS, min(settings.distill_steps, int(left / max(seconds_per_step, 1e-9))))
    share = min(1.0, max(left, 0.0) / max(seconds_per_step * steps, 1e-9))
    mixes = max(MIN_BATCH, round(settings.distill_mixes * share))
    forget = max(MIN_BATCH, round(settings.distill_forget * share))
    sizes = {"distill_mixes": mixes, "distill_forget": forget}
    return replace(settings, distill_steps=min(steps, settings.distill_steps), **sizes)


def _after_synthesis(unlearner: Unlearner, first: Settings, settings: Settings, budget: TimeBudget) -> Settings:
    """Synthesise the images of a candidate with robust=1; return it with the steps that there is time for after that.

    The ratio of the times of synthesis and steps depends on the model and the machine, so SYNTHESIS is an estimate.
    """
    seconds_per_step = measure_step(unlearner, settings, budget)
    steps = int(PLANNED * budget.left / max(seconds_per_step, 1e-9))
    return _with_steps(replace(settings, distill_steps=first.distill_steps), steps)


def _with_steps(settings: Settings, steps: int) -> Settings:
    """Return settings with this many steps, at most as many as they have and at least MIN_CYCLE of that."""
    usual = settings.distill_steps
    return replace(settings, distill_steps=max(1, round(MIN_CYCLE * usual), min(steps, usual)))


def _cost(settings: Settings) -> float:
    """Return the cost of a cycle with robust=1 and of its synthesised images, in steps."""
    return settings.distill_steps + settings.robust_images / SYNTHESIS


def _scaled(settings: Settings, factors: Mapping[str, float]) -> Settings:
    values = {name: (getattr(settings, name), factor) for name, factor in factors.items()}
    return replace(settings, **{name: type(value)(value * factor) for name, (value, factor) in values.items()})


def _enlarged(unlearner: Unlearner, settings: Settings, left: float, candidates: list[Candidate]) -> Settings:
    """Return settings with a larger learning rate, for distill with one cycle in FIRST_SHARE of the time left."""
    larger = _scaled(settings, LARGER_STEPS[unlearner.uses_teacher])
    if not unlearner.uses_teacher:
        return larger
    return fit_to_time(larger, FIRST_SHARE * left, _seconds_per_step(larger, candidates))


def _expected_seconds(unlearner: Unlearner, settings: Settings, candidates: list[Candidate]) -> float:
    """Estimate the seconds of a candidate: for distill from its steps and images, else the most so far."""
    if not unlearner.uses_teacher:
        return max(candidate.seconds for candidate in candidates)
    return _seconds_per_step(settings, candidates) * settings.distill_steps * _cycles(candidates)


def _cycles(candidates: list[Candidate]) -> float:
    """Return the number of cycles of distill that the first successful candidate took."""
    one = next((candidate for candidate in candidates if candidate.succeeded), candidates[0])
    return max(1.0, one.steps / one.settings.distill_steps)


def _seconds_per_step(settings: Settings, candidates: list[Candidate]) -> float:
    """Estimate the seconds of a step from the candidates so far, in proportion to the images per step."""
    costs = (one.seconds / one.steps / _images_per_step(one.settings) for one in candidates if one.steps)
    return max(costs, default=0.0) * _images_per_step(settings)


def _images_per_step(settings: Settings) -> int:
    return settings.distill_forget + settings.distill_mixes
