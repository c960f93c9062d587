"""Strategies: which settings a search runs next, given the candidates so far and the time that is left.

A search makes attempts until one succeeds (see `Candidate.succeeded`). Then it runs variations, which may do less
damage. The own settings of a method are its defaults.

`Gradient`, for methods without a teacher such as `adv`:

    at first                              the own settings
    images are not forgotten              a larger learning rate, up to 3 times
    still not, or the run diverged        the next variation of the own settings
    the own settings succeeded            the variations of the own settings
    other settings succeeded              variations of these

`FixedLength`, for methods that run as published, such as `jit`:

    at first                              the own settings, and nothing else

`Distill`, for `distill` with robust=0:

    at first                              the own settings; if time is short, with fewer steps and smaller batches
    images are not forgotten              a larger learning rate, up to 3 times
    still not, or the run diverged        the next variation of the own settings, unless time is short
    the own settings succeeded            the variations of the own settings
    other settings succeeded              these in a cycle as long as there is time for, and variations of that

`Robust`, for `distill` with robust=1:

    before                                a run with robust=0
    at first                              the own settings; if time is short, with fewer steps and synthesised images
    too few images are forgotten          twice the steps, up to 3 times
    the own settings succeeded            the variations of the own settings, unless time is short
    other settings succeeded              these in a cycle as long as there is time for, and variations of that

A variation is run if it should end in time and is promising, see `search.search`.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from l2ul.common.choices import DIVERGED
from l2ul.deletion.candidates import Candidate, TimeBudget, Unlearner, measure_step, without_synthesis
from l2ul.methods.distill import cycle_length
from l2ul.unlearn import Settings

MAX_ENLARGED = 3  # times that the learning rate is raised, or a cycle with robust=1 doubled
FIRST_SHARE = 0.6  # of the time left: the most that an attempt takes


class Strategy(ABC):
    """The order in which the settings of a method are run.

    first             the method's own settings
    budget            of the search
    seconds_per_step  with `first`, as measured
    candidates        with the settings of this strategy, in the order of their runs; the caller appends them
    untried           variations of `first` that were not run
    """

    def __init__(self, unlearner: Unlearner, first: Settings, budget: TimeBudget, seconds_per_step: float):
        self.unlearner, self.first, self.budget, self.seconds_per_step = unlearner, first, budget, seconds_per_step
        self.candidates: list[Candidate] = []
        self.untried: deque[Settings] = deque()

    @property
    def successes(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.succeeded]

    def next_attempt(self) -> Settings | None:
        """Return the settings to run while no candidate has succeeded; None: there are none, or no time for them."""
        return self.after_failure(self.candidates[-1]) if self.candidates else self.first_attempt()

    def after_failure(self, last: Candidate) -> Settings | None:
        """Return the settings to run after this candidate: larger ones, or an untried variation."""
        if self.budget.left <= 0:
            return None
        if last.status != DIVERGED and len(self.candidates) <= MAX_ENLARGED:
            return self.enlarged(last.settings)
        return self.untried.popleft() if self.untried else None

    def reserve(self, settings: Settings) -> float:
        """Return the seconds of the budget that an attempt with these settings leaves for the next ones."""
        return (1 - FIRST_SHARE) * self.budget.left

    @property
    def usual_seconds(self) -> float:
        """The seconds in which a search begins with `first`; 0 if they are not known."""
        return 0.0

    def variations(self) -> list[Settings]:
        """Return the settings to run after the first success."""
        if not self.successes:
            return []
        settings = self.candidates[-1].settings
        return list(self.untried) if settings == self.first else self.around(settings)

    def has_time(self, settings: Settings) -> bool:
        """Whether a run with these settings is expected to end in time."""
        return self.budget.left > 0 and self.expected_seconds(settings) <= self.budget.left

    def run_before(self, run: Callable[[Settings, float], Candidate]) -> list[Candidate]:
        """Run what comes before the attempts; `run` takes settings and the seconds to leave. Return the candidates."""
        return []

    @abstractmethod
    def first_attempt(self) -> Settings | None:
        """Return the settings to run first. Fills `untried`."""

    @abstractmethod
    def enlarged(self, settings: Settings) -> Settings:
        """Return these settings with a larger learning rate."""

    @abstractmethod
    def around(self, settings: Settings) -> list[Settings]:
        """Return variations of the first settings that succeeded, which are not `first`."""

    @abstractmethod
    def expected_seconds(self, settings: Settings) -> float:
        """Estimate the seconds of a run from the candidates so far."""


def choose(unlearner: Unlearner, first: Settings, budget: TimeBudget, seconds_per_step: float) -> Strategy:
    """Return the strategy for a method and its settings."""
    if unlearner.has_fixed_length:
        strategy = FixedLength
    elif unlearner.uses_teacher:
        strategy = Robust if first.robust else Distill
    else:
        strategy = Gradient
    return strategy(unlearner, first, budget, seconds_per_step)


# Factors of settings of methods without a teacher:
GRADIENT_LARGER = {"unlearn_lr": 3.0}  # while images are not forgotten
GRADIENT = ({"unlearn_lr": 1 / 3}, {"unlearn_lr": 3.0}, {"unlearn_lr": 0.1})  # of the own settings
GRADIENT_AROUND = ({"unlearn_lr": 0.6}, {"unlearn_lr": 2.0})  # of a rate that succeeds where a third of it does not


class Gradient(Strategy):
    """Methods without a teacher: other learning rates."""

    def first_attempt(self) -> Settings:
        self.untried.extend(_varied(self.first, GRADIENT))
        return self.first

    def enlarged(self, settings: Settings) -> Settings:
        return _scaled(settings, GRADIENT_LARGER)

    def around(self, settings: Settings) -> list[Settings]:
        return _varied(settings, GRADIENT_AROUND)

    def expected_seconds(self, settings: Settings) -> float:
        return max(candidate.seconds for candidate in self.candidates)


class FixedLength(Gradient):
    """Methods that run as published: the own settings, once."""

    def first_attempt(self) -> Settings:
        return self.first

    def after_failure(self, last: Candidate) -> Settings | None:
        return None


# Factors of settings of distill:
DISTILL_LARGER = {"distill_lr": 3.0}  # while images are not forgotten
DISTILL = ({"distill_lr": 2.0}, {"distill_features": 3.0}, {"distill_lr": 0.5}, {"distill_steps": 2.0})
# The least work per cycle if time is short:
MIN_STEPS = 60
MIN_BATCH = 16  # images of D_f, and mixes, per step


class Distill(Strategy):
    """`distill` with robust=0: other learning rates, weights and lengths, in cycles that fit into the time."""

    def first_attempt(self) -> Settings:
        if self.usual_seconds <= self.budget.left:
            self.untried.extend(_varied(self.first, DISTILL))
            return self.first
        return fit_to_time(self.first, self.budget.left / 3, self.seconds_per_step)

    def enlarged(self, settings: Settings) -> Settings:
        larger = _scaled(settings, DISTILL_LARGER)
        return self.fit(larger, FIRST_SHARE * self.budget.left)

    def reserve(self, settings: Settings) -> float:
        """Return the seconds that an attempt leaves: none if it needs all of the time for a cycle."""
        usual = super().reserve(settings)
        return usual if self.expected_step(settings) * settings.distill_steps <= self.budget.left - usual else 0.0

    @property
    def usual_seconds(self) -> float:
        return 3 * self.seconds_per_step * self.first.distill_steps

    def around(self, settings: Settings) -> list[Settings]:
        names = ("distill_steps", "distill_mixes", "distill_forget", "robust_images")
        full = replace(settings, **{name: getattr(self.first, name) for name in names})
        longer = self.fit(full, self.budget.left / self.cycles)
        return [one for one in (longer, *_varied(longer, DISTILL)) if one != settings]

    def expected_seconds(self, settings: Settings) -> float:
        return self.expected_step(settings) * settings.distill_steps * self.cycles

    def fit(self, settings: Settings, seconds: float) -> Settings:
        """Return settings with one cycle in this time, as expected from the candidates so far."""
        return fit_to_time(settings, seconds, self.expected_step(settings))

    def expected_step(self, settings: Settings) -> float:
        """Estimate the seconds of a step from the candidates so far, in proportion to the images per step."""
        ran = [candidate for candidate in self.candidates if candidate.steps]
        costs = (candidate.seconds / candidate.steps / _images_per_step(candidate.settings) for candidate in ran)
        measured = self.seconds_per_step / _images_per_step(self.first)
        return max(costs, default=measured) * _images_per_step(settings)

    @property
    def cycles(self) -> float:
        """The number of cycles of the first success, or of the first candidate."""
        one = next(iter(self.successes), self.candidates[0])
        return max(1.0, one.steps / one.settings.distill_steps)


def fit_to_time(settings: Settings, seconds: float, seconds_per_step: float) -> Settings:
    """Return settings with robust=0 and one cycle in this time: fewer steps, and then smaller batches."""
    steps = max(MIN_STEPS, min(settings.distill_steps, int(_steps_in(seconds, seconds_per_step))))
    share = min(1.0, max(seconds, 0.0) / max(seconds_per_step * steps, 1e-9))
    mixes = max(MIN_BATCH, round(settings.distill_mixes * share))
    forget = max(MIN_BATCH, round(settings.distill_forget * share))
    sizes = {"distill_mixes": mixes, "distill_forget": forget}
    return replace(settings, distill_steps=min(steps, settings.distill_steps), **sizes)


# How the time is divided between the run with robust=0 and those with robust=1:
AS_STORED = 1 / 3  # of the time, at most: for the run with robust=0
PLANNED = 0.85  # of the time left: the part that a cycle is planned for
ROBUST_STEP = 2  # steps with robust=0 that take the time of one with robust=1, at least
SYNTHESIS = 5  # images that are synthesised in the time of a step with robust=1
# The shortest cycle with robust=1 that was measured, in parts of the usual one:
MIN_CYCLE, MIN_IMAGES = 1 / 6, 1 / 3  # of the steps, and of the synthesised images


class Robust(Distill):
    """`distill` with robust=1, after a run with robust=0 that forgets the images as they are stored.

    Cycles are shortened in steps and synthesised images, and keep their batches and learning rate. Each is run only if
    it should end in time.
    """

    def run_before(self, run: Callable[[Settings, float], Candidate]) -> list[Candidate]:
        """Run with robust=0: in AS_STORED of the time, or in PLANNED of it if the rest is too short for robust=1.

        The run is stopped if it takes half as much again. If there is too little time, a step with robust=1 is then
        measured again, because other processes may have slowed the steps that were measured.
        """
        left, seconds_per_step = self.budget.left, self.seconds_per_step / ROBUST_STEP
        usual = replace(self.first, robust=0, distill_steps=_steps_as_stored(self.unlearner, self.first))
        expected = min(AS_STORED * left, usual.distill_steps * seconds_per_step)
        has_time = self.has_time_for_cycle(left - expected)
        share = AS_STORED if has_time else PLANNED
        candidate = run(fit_to_time(usual, share * left, seconds_per_step), max(0.0, 1 - 1.5 * share) * left)
        if not has_time and 3 * self.seconds_per_step < self.budget.left:
            again = measure_step(self.unlearner, without_synthesis(self.first), self.budget)
            self.seconds_per_step = min(self.seconds_per_step, again)
        return [candidate]

    def first_attempt(self) -> Settings | None:
        if not self.has_time_for_cycle(self.budget.left):
            return None
        steps = _steps_in(PLANNED * self.budget.left, self.seconds_per_step)
        if steps >= _cost(self.first):
            self.untried.extend(_varied(self.first, DISTILL))
        settings = shortened(self.first, steps)
        return self.after_synthesis(settings) if settings.robust_images else settings

    def after_failure(self, last: Candidate) -> Settings | None:
        longer = _scaled(last.settings, {"distill_steps": 2.0})
        return longer if len(self.candidates) <= MAX_ENLARGED and self.has_time(longer) else None

    def reserve(self, settings: Settings) -> float:
        return 0.0

    def fit(self, settings: Settings, seconds: float) -> Settings:
        return shortened(settings, _steps_in(seconds, self.expected_step(settings)))

    def has_time_for_cycle(self, seconds: float) -> bool:
        """Whether the shortest cycle fits into this time."""
        return _steps_in(PLANNED * seconds, self.seconds_per_step) >= _cost(shortened(self.first, 0.0))

    def after_synthesis(self, settings: Settings) -> Settings:
        """Synthesise the images of these settings; return them with the steps that there is time for after that.

        The ratio of the times of synthesis and steps depends on the model and the machine, so SYNTHESIS is an estimate.
        """
        seconds_per_step = measure_step(self.unlearner, settings, self.budget)
        steps = int(_steps_in(PLANNED * self.budget.left, seconds_per_step))
        return _with_steps(replace(settings, distill_steps=self.first.distill_steps), steps)

    def advised_seconds(self, was_damaged: bool) -> float:
        """Return the seconds of a search with a cycle of twice the shortest length, after damage of twice the usual."""
        longer = 2 * _cost(self.first if was_damaged else shortened(self.first, 0.0))
        return self.seconds_per_step * longer / PLANNED / (1 - AS_STORED)


def shortened(settings: Settings, steps: float) -> Settings:
    """Return settings with robust=1, a cycle and a synthesis in the time of so many steps, but not below the minima."""
    images = round(max(MIN_IMAGES, min(1.0, steps / _cost(settings))) * settings.robust_images)
    return _with_steps(replace(settings, robust_images=images), int(steps - images / SYNTHESIS))


def _steps_as_stored(unlearner: Unlearner, first: Settings) -> int:
    return cycle_length(replace(first, robust=0, distill_steps=0), len(unlearner.train_set))


def _with_steps(settings: Settings, steps: int) -> Settings:
    """Return settings with this many steps, at most as many as they have and at least MIN_CYCLE of that."""
    usual = settings.distill_steps
    return replace(settings, distill_steps=max(1, round(MIN_CYCLE * usual), min(steps, usual)))


def _cost(settings: Settings) -> float:
    """Return the cost of a cycle with robust=1 and of its synthesised images, in steps."""
    return settings.distill_steps + settings.robust_images / SYNTHESIS


def _steps_in(seconds: float, seconds_per_step: float) -> float:
    return seconds / max(seconds_per_step, 1e-9)


def _images_per_step(settings: Settings) -> int:
    return settings.distill_forget + settings.distill_mixes


def _varied(settings: Settings, variations: Sequence[Mapping[str, float]]) -> list[Settings]:
    return [_scaled(settings, factors) for factors in variations]


def _scaled(settings: Settings, factors: Mapping[str, float]) -> Settings:
    values = {name: (getattr(settings, name), factor) for name, factor in factors.items()}
    return replace(settings, **{name: type(value)(value * factor) for name, (value, factor) in values.items()})
