"""Settings of a method tried one after the other while there is time: what forgets with the least damage is taken."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
import time

import torch
from torch import Tensor, nn

from l2ul import attack, unlearn
from l2ul.common.errors import Diverged, InputError
from l2ul.experiments import runs
from l2ul.importance import mas_importance
from l2ul.methods import registry
from l2ul.metrics import accuracy, agreement
from l2ul.metrics.agreement import Kept, Probe
from l2ul.objective import Forget
from l2ul.unlearn import Settings

ATTACK = {"num_adv_images": 10, "eps": 4.0, "alpha": 0.4, "steps": 20}  # of D_adv: quicker than the paper's
LEAST_STEPS = 60  # of a cycle of distill
FEWEST_MIXES = 16  # of distill a step
LARGER = {True: {"distill_lr": 3.0}, False: {"unlearn_lr": 3.0}}  # whether the method has a teacher
MOST_LARGER = 3  # times that steps grow so
PATIENCE = 0.6  # part of the time left that a trial may take while none has forgotten everything
PROBING = 0.08  # of the time, for examples that damage is estimated on
FEWEST_EXAMPLES, MOST_EXAMPLES = 64, 1024
# What is tried after a method's own settings, as factors of them.
DISTILL = ({"distill_lr": 2.0}, {"distill_features": 3.0}, {"distill_lr": 0.5}, {"distill_steps": 2.0})
GRADIENT = ({"unlearn_lr": 1 / 3}, {"unlearn_lr": 3.0}, {"unlearn_lr": 0.1})
BETWEEN = ({"unlearn_lr": 0.6}, {"unlearn_lr": 2.0})  # where one forgot and a third of its rate did not


def named_settings(given: Sequence[tuple[str, float]], method: str) -> dict[str, float]:
    """Settings of a method's loop by name, as numbers of their type; InputError for one it has not, or not so."""
    types = {f.name: type(f.default) for f in fields(Settings)}
    used = runs.used_by(registry.get(method))
    known = {name: kind for name, kind in types.items() if name in used and kind in (int, float)}
    for name, value in given:
        if name not in known:
            expected = f"expected one of {', '.join(known)}" if known else "it has none: leave out --setting"
            raise InputError(f"method {method} has no setting {name}; {expected}")
        if known[name] is int and not (value >= 1 and value.is_integer()):
            raise InputError(f"setting {name}={value:g} is not allowed; expected a whole number of at least 1")
    return {name: known[name](value) for name, value in given}


class Budget:
    """Seconds that a command may take, counted from `started` on the clock of time.perf_counter."""

    def __init__(self, seconds: float, started: float):
        self.seconds, self.started = seconds, started

    @property
    def used(self) -> float:
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.used

    def part(self, share: float) -> "Budget":
        """As much of it as this share, from the start: the rest is for what comes after."""
        return Budget(share * self.seconds, self.started)


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it. `forgotten` (k,) bool, as asked; `kept` of each probe; no model: diverged."""

    settings: Settings
    changed: Mapping[str, float]  # settings that differ from the first trial's
    status: str
    steps: int
    seconds: float
    forgotten: Tensor
    kept: list[Kept]
    model: nn.Module | None

    @property
    def rank(self) -> tuple[int, float]:
        """Better is larger: all forgotten before any damage counts, and never one that diverged."""
        return (int(self.forgotten.sum()), agreement.overall(self.kept)) if self.kept else (-1, 0.0)


@dataclass
class Job:
    """What is to be forgotten by which method.

    model    left as it is
    forget   D_f, on its device
    wide     D_f, and after it each change of all of D_f that is to be forgotten too: what a method is given
    written  gives a model as it will be once it is written to a file and read again
    probes   of damage
    """

    model: nn.Module
    forget: Forget
    wide: Forget
    method: str
    num_classes: int
    seed: int
    written: Callable[[nn.Module], nn.Module]
    probes: list[Probe] = field(default_factory=list)
    _made: dict[str, object] = field(default_factory=dict)

    @property
    def uses_teacher(self) -> bool:
        return "teacher" in registry.get(self.method).needs

    def forgotten(self, model: nn.Module) -> Tensor:
        """Which images (k,) bool a model has forgotten as they are and after every change that was asked for."""
        return accuracy.forgotten(model, self.wide.images, self.wide).view(-1, len(self.forget)).all(0).cpu()

    def run(
        self,
        settings: Settings,
        go_on: Callable[[], bool] = lambda: True,
        on_step: Callable[[dict[str, float]], object] | None = None,
    ) -> unlearn.Outcome:
        """Unlearn with these settings; what does not depend on them is made once."""
        needs = registry.get(self.method, self.forget.goal).needs
        images, labels = self.wide.images, self.wide.labels
        if "adv" in needs and "adv" not in self._made:
            self._made["adv"] = attack.adversarial_set(
                self.model, images, labels, self.num_classes, seed=self.seed, **ATTACK
            )
        if "importance" in needs and "importance" not in self._made:
            self._made["importance"] = mas_importance(self.model, images)
        given = {"new_labels": self.wide.new_labels, "settings": settings, "go_on": go_on, "on_step": on_step}
        return unlearn.unlearn(self.model, images, labels, self.method, **given, **self._made)

    def try_out(self, settings: Settings, changed: Mapping[str, float], go_on: Callable[[], bool]) -> Trial:
        """Unlearn, and look at what is forgotten and kept by what would be written."""
        started = time.perf_counter()
        outcome = self.run(settings, go_on)
        nothing = torch.zeros(len(self.forget), dtype=torch.bool)
        trial = Trial(settings, changed, outcome.status, outcome.steps, 0.0, nothing, [], None)
        if outcome.status != "diverged":
            written = self.written(outcome.model)
            try:
                done, kept = self.forgotten(written), [agreement.kept(written, probe) for probe in self.probes]
                trial = replace(trial, forgotten=done, kept=kept, model=outcome.model)
            except Diverged:
                trial = replace(trial, status="diverged")
        return replace(trial, seconds=time.perf_counter() - started)


def prepare(job: Job, settings: Settings, budget: Budget) -> float:
    """Make held-out examples, as many as there is time for, the job's first probe; returns the seconds of a step."""
    seconds = _step_seconds(job, settings)
    passes = settings.distill_forget + 1.5 * settings.distill_mixes  # forward and backward, of images a step
    count = int(PROBING * budget.left / max(seconds / passes * agreement.STEPS, 1e-9))
    count = min(MOST_EXAMPLES, max(FEWEST_EXAMPLES, count))
    examples = agreement.held_out(job.model, job.forget.images, job.num_classes, count=count, seed=job.seed)
    job.probes.insert(0, examples)
    return seconds


def _step_seconds(job: Job, settings: Settings) -> float:
    """What a step of the loop takes, by three of them."""
    at: list[float] = []
    few = replace(settings, distill_steps=3, distill_cycles=1, max_passes=3)
    job.run(few, go_on=lambda: len(at) < 3, on_step=lambda row: at.append(time.perf_counter()))
    return (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else 0.0


def search(job: Job, first: Settings, budget: Budget, seconds: float, tried: Callable[[Trial], object]) -> list[Trial]:
    """Trials while there is time, the best of them first; `tried` is told each.

    first    the method's own settings
    seconds  that a step takes with them

    Where the time is short, the first trial is cut down to a third of it; what it took tells how long a second may be.
    Once one has forgotten everything, others are begun only where they should end in time; until then, one that fails
    is followed by one that takes larger steps. Where the first to forget was not the method's own settings, the others
    are begun at it.
    """
    trials: list[Trial] = []
    waiting = deque(_ladder(job, first, budget.left, seconds))
    while waiting:
        settings = waiting.popleft()
        forgotten = any(trial.forgotten.all() for trial in trials)
        if trials and (budget.left <= 0 or (forgotten and _expected(job, settings, trials) > budget.left)):
            continue
        least = 0.0 if forgotten else (1 - PATIENCE) * budget.left
        trials.append(job.try_out(settings, _changed(first, settings), lambda least=least: budget.left > least))
        tried(trials[-1])
        if not forgotten and not trials[-1].forgotten.all():
            if trials[-1].status != "diverged" and len(trials) <= MOST_LARGER and not _fixed_length(job):
                waiting.appendleft(_larger(job, settings, budget.left, trials))
        elif not forgotten and settings != first:
            waiting = deque(_around(job, first, budget.left, trials))
    return sorted(trials, key=lambda trial: trial.rank, reverse=True)  # stable: of equals the first


def _changed(first: Settings, settings: Settings) -> dict[str, float]:
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(first, name)}


def _ladder(job: Job, first: Settings, left: float, seconds: float) -> list[Settings]:
    """Settings to try: one that surely fits, or the method's own, then others."""
    if not job.uses_teacher:
        return [first, *(() if _fixed_length(job) else (_scaled(first, by) for by in GRADIENT))]
    if 3 * seconds * first.distill_steps <= left:
        return [first, *(_scaled(first, by) for by in DISTILL)]
    return [fitted(first, left / 3, seconds)]


def _fixed_length(job: Job) -> bool:
    """Whether the method runs as its paper has it, whatever the settings of the loop."""
    return registry.get(job.method).settings is not None


def _around(job: Job, first: Settings, left: float, trials: list[Trial]) -> list[Settings]:
    """Settings to try after the first that forgot everything: as many steps as there is time for, and changes of it."""
    taken = trials[-1].settings
    if not job.uses_teacher:
        return [_scaled(taken, by) for by in BETWEEN]
    sizes = {name: getattr(first, name) for name in ("distill_steps", "distill_mixes", "distill_forget")}
    whole = replace(taken, **sizes)
    longer = fitted(whole, left / _cycles(trials), _seconds_of_a_step(whole, trials))
    return [settings for settings in (longer, *(_scaled(longer, by) for by in DISTILL)) if settings != taken]


def fitted(settings: Settings, left: float, seconds: float) -> Settings:
    """Settings of distill of which a cycle ends in the seconds left: fewer steps, and if need be smaller batches.

    seconds  that a step takes as it is
    """
    steps = max(LEAST_STEPS, min(settings.distill_steps, int(left / max(seconds, 1e-9))))
    part = min(1.0, max(left, 0.0) / max(seconds * steps, 1e-9))
    mixes = max(FEWEST_MIXES, round(settings.distill_mixes * part))
    forget = max(FEWEST_MIXES, round(settings.distill_forget * part))
    return replace(
        settings, distill_steps=min(steps, settings.distill_steps), distill_mixes=mixes, distill_forget=forget
    )


def _scaled(settings: Settings, by: Mapping[str, float]) -> Settings:
    new = {name: type(getattr(settings, name))(getattr(settings, name) * factor) for name, factor in by.items()}
    return replace(settings, **new)


def _larger(job: Job, settings: Settings, left: float, trials: list[Trial]) -> Settings:
    """Settings that take larger steps, a cycle of which fits in the time left."""
    larger = _scaled(settings, LARGER[job.uses_teacher])
    return fitted(larger, PATIENCE * left, _seconds_of_a_step(larger, trials)) if job.uses_teacher else larger


def _expected(job: Job, settings: Settings, trials: list[Trial]) -> float:
    """Seconds that a trial should take: of distill by its steps and images, else as long as the longest so far."""
    if not job.uses_teacher:
        return max(trial.seconds for trial in trials)
    return _seconds_of_a_step(settings, trials) * settings.distill_steps * _cycles(trials)


def _cycles(trials: list[Trial]) -> float:
    """How many cycles of distill the first trial that forgot everything went through."""
    one = next((trial for trial in trials if trial.forgotten.all()), trials[0])
    return max(1.0, one.steps / one.settings.distill_steps)


def _seconds_of_a_step(settings: Settings, trials: list[Trial]) -> float:
    """By the trials so far, as if each image of a step cost the same: more than it is for a larger batch."""
    costs = (trial.seconds / trial.steps / _images(trial.settings) for trial in trials if trial.steps)
    return max(costs, default=0.0) * _images(settings)


def _images(settings: Settings) -> int:
    return settings.distill_forget + settings.distill_mixes
