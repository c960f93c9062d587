"""Run a method on a request with some settings, in limited time, and measure what would be written."""

from collections.abc import Callable, Mapping
import contextlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
import math
import time

import torch
from torch import Tensor, nn

from l2ul import ProgressBar, attack, unlearn
from l2ul.common import precision as precisions
from l2ul.common.errors import Diverged, Wording, option, worded
from l2ul.data.images import stored
from l2ul.importance import mas_importance
from l2ul.methods import registry
from l2ul.methods.settings import Value
from l2ul.methods.stand_ins import Synthesis
from l2ul.metrics import accuracy, agreement, robustness
from l2ul.metrics.agreement import Agreement, Probe
from l2ul.metrics.robustness import AsUsed
from l2ul.objective import Forget
from l2ul.unlearn import Settings

ATTACK = {"num_adv_images": 10, "eps": 4.0, "alpha": 0.4, "steps": 20}  # of D_adv: faster than the paper's


class TimeBudget:
    """Seconds that a command may take, counted from `started`, a value of `time.perf_counter`."""

    def __init__(self, seconds: float, started: float):
        self.seconds, self.started = seconds, started

    @property
    def used(self) -> float:
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.used

    def part(self, share: float) -> "TimeBudget":
        """Return the first `share` of this budget; the rest is for later work."""
        return TimeBudget(share * self.seconds, self.started)


# What counts as forgotten as used:
ENOUGH = 0.9  # of the images are enough, as the last ones cost most accuracy
WORTHWHILE = 0.5  # of the images: fewer count as none, as they cost accuracy and fulfil no request
ACCEPTABLE = 50.0  # percent of agreement: with less, no image counts, as the model is too damaged


@dataclass(frozen=True)
class Candidate:
    """Settings that were run, and what they achieved.

    changed    settings that differ from those of the first candidate, by name
    status     of the loop: see `unlearn.Outcome`
    forgotten  (k,) bool: forgotten as the request demands, with the weights as they would be written
    kept       agreement with the original model on each probe
    model      None if the run diverged
    stored     (k,) bool: forgotten as they are stored; None: the same as `forgotten`
    demanded   (k,) bool: the images that count as forgotten only if they are so as the request demands, see
               `Unlearner.demanded`; None: all
    """

    settings: Settings
    changed: Mapping[str, float]
    status: str
    steps: int
    seconds: float
    forgotten: Tensor
    kept: list[Agreement]
    model: nn.Module | None

    stored: Tensor | None = None
    demanded: Tensor | None = None

    @property
    def succeeded(self) -> bool:
        """Whether enough images are forgotten: all as they are stored and, with robust=1, most as they are used."""
        return self._counts == (len(self.forgotten), self._enough)

    @property
    def number_forgotten(self) -> int:
        """The number of demanded images that are forgotten as the request demands."""
        return int(self._of_demanded(self.forgotten).sum())

    @property
    def rank(self) -> tuple[int, int, float]:
        """Larger is better: the number of images forgotten as stored, then as the request demands, then agreement.

        As used, more than ENOUGH images count as that many, and none count if they are fewer than WORTHWHILE or if
        agreement is below ACCEPTABLE. A diverged run ranks last.
        """
        return (*self._counts, self.agreement) if self.kept else (-1, -1, 0.0)

    def is_better_than(self, stored: Tensor, forgotten: Tensor) -> bool:
        """Return whether more images are forgotten than these, (k,) bool each: as stored, or as the request demands."""
        before = replace(self, stored=stored, forgotten=forgotten)
        return bool(self.kept) and self._counts > before._counts

    @property
    def values(self) -> dict[str, Value]:
        """The values of all settings by name."""
        values = asdict(self.settings)
        values |= values.pop("method_settings")
        values.pop("first_position")
        return values

    @property
    def agreement(self) -> float:
        return agreement.overall(self.kept)

    @property
    def uncertainty(self) -> float:
        """Of the agreement: half the width of its 95 % interval."""
        return sum(kept.high - kept.low for kept in self.kept) / (2 * len(self.kept))

    @property
    def is_damaged(self) -> bool:
        """Whether forgetting the images as used cost more than is acceptable."""
        return bool(self.settings.robust and self.kept) and self.agreement < ACCEPTABLE

    def _of_demanded(self, images: Tensor) -> Tensor:
        return images if self.demanded is None else images[self.demanded]

    @property
    def _enough(self) -> int:
        total = len(self._of_demanded(self.forgotten))
        return math.ceil(ENOUGH * total) if self.settings.robust else total

    @property
    def _counts(self) -> tuple[int, int]:
        stored, used = self.forgotten if self.stored is None else self.stored, self.number_forgotten
        counts = used >= WORTHWHILE * len(self._of_demanded(stored)) and not self.is_damaged
        return int(stored.sum()), min(self._enough, used) if counts else 0


def damage_note(agreement: float) -> Wording | None:
    """Return a sentence if agreement with the original model, in percent, is below ACCEPTABLE."""
    if agreement >= ACCEPTABLE:
        return None
    damage = f"an agreement of {agreement:.1f} % is below {ACCEPTABLE:g} %, which is too much damage"
    return worded("{}: use more {}, {} or another {}", damage, *map(option, ("minutes", "keep_images", "method")))


@dataclass
class Unlearner:
    """Run a method on a request with different settings.

    model       the original model, left unchanged
    forget      D_f, on the device of the model
    train_set   D_f and its changed copies that are to be forgotten too, see `robustness.with_changed_images`
    as_written  return a model with its weights as they will be in the file
    probes      sets of images on which agreement with the original model is measured
    progress    show the progress of each candidate
    as_used     whether an image counts as forgotten only if it is so as used, see `robustness.as_used`
    max_steps   each candidate ends after so many steps at most, as if time were up; None: no such limit
    precision   of the device in which `unlearn` computes, see `flow.Deletion`
    surrogate   (n, 3, H, W) unlabelled images that stand for D_r, see `unlearn.unlearn`
    earlier     (k,) bool, on the CPU: the images that the model recognised before an earlier request; None: none
    """

    model: nn.Module
    forget: Forget
    train_set: Forget
    method: str
    num_classes: int
    seed: int
    as_written: Callable[[nn.Module], nn.Module]
    progress: ProgressBar | None = None
    as_used: bool = False
    max_steps: int | None = None
    precision: str = "fp32"
    probes: list[Probe] = field(default_factory=list)
    surrogate: Tensor | None = None
    earlier: Tensor | None = None
    _inputs: dict[str, object] = field(default_factory=dict)  # D_adv and importance, made once

    @cached_property
    def synthesis(self) -> Synthesis:
        """What synthesises images for the candidates, and keeps them from one to the next."""
        return Synthesis(progress=self.progress)

    @property
    def uses_teacher(self) -> bool:
        return "teacher" in registry.get(self.method).needs

    @property
    def has_fixed_length(self) -> bool:
        """Whether the method runs as published, with settings of its own instead of those of the loop."""
        return registry.get(self.method).is_fixed_length

    def forgotten(self, model: nn.Module, used: AsUsed | None = None, stored: Tensor | None = None) -> Tensor:
        """Return which images (k,) bool count as forgotten by a model, on the CPU.

        used    how D_f is forgotten as used, if it is known
        stored  the result of `forgotten_as_stored`, if it is known

        They are forgotten as they are and in each changed copy of `train_set`. With `as_used`, those in `demanded` are
        also forgotten as used.
        """
        forgotten = self.forgotten_as_stored(model) if stored is None else stored
        if self.as_used and (forgotten & self.demanded).any():
            used = used or robustness.as_used(model, self.forget, in_full=False)
            forgotten = forgotten & (used.forgotten | ~self.demanded)
        return forgotten

    def forgotten_as_stored(self, model: nn.Module) -> Tensor:
        """Return which images (k,) bool a model has forgotten, as they are and in each copy of `train_set`."""
        forgotten = accuracy.forgotten(model, self.train_set.images, self.train_set)
        return forgotten.view(-1, len(self.forget)).all(0).cpu()

    @cached_property
    def recognised(self) -> Tensor:
        """Which images (k,) bool the original model predicts as their label, as they are or as a changed copy.

        With `as_used`, also those of `earlier` that the model has not forgotten as used.
        """
        predictions = accuracy.predict(self.model, self.train_set.images, fold=False)
        recognised = (predictions == self.train_set.labels.cpu()).view(-1, len(self.forget)).any(0)
        if self.as_used and self.earlier is not None and (self.earlier & ~recognised).any():
            used = robustness.as_used(self.model, replace(self.forget, new_labels=None), in_full=False)
            recognised = recognised | (self.earlier & ~used.forgotten)
        return recognised

    @cached_property
    def demanded(self) -> Tensor:
        """Which images (k,) bool count as forgotten only if they are so as the request demands.

        They are those of `recognised` and, unless they are to be relabelled, of `earlier`.
        """
        is_alone = self.earlier is None or self.forget.goal == "relabel"
        return self.recognised if is_alone else self.recognised | self.earlier

    def _unlearn(
        self,
        settings: Settings,
        go_on: Callable[[], bool] | None,
        on_step: Callable[[dict[str, float]], object] | None,
    ) -> unlearn.Outcome:
        needs = registry.get(self.method, self.forget.goal).needs
        images, labels = stored(self.train_set.images), self.train_set.labels
        if "adv" in needs and "adv" not in self._inputs:
            total = ATTACK["num_adv_images"] * ATTACK["steps"] * len(labels)
            with self.show_progress("adversarial examples, PGD steps", total) as advance:
                self._inputs["adv"] = attack.adversarial_set(
                    self.model, images, labels, self.num_classes, seed=self.seed, progress=advance, **ATTACK
                )
        if "importance" in needs and "importance" not in self._inputs:
            with self.show_progress("importance", len(labels)) as advance:
                self._inputs["importance"] = mas_importance(self.model, images, advance)
        step = 0

        def look(row: dict[str, float]) -> None:
            nonlocal step
            step = row["step"]
            if on_step:
                on_step(row)

        def continues() -> bool:
            return (self.max_steps is None or step < self.max_steps) and (go_on is None or go_on())

        options = {"new_labels": self.train_set.new_labels, "settings": settings, "go_on": continues, "on_step": look}
        options |= {"surrogate": self.surrogate, "synthesis": self.synthesis}
        options["predict"] = lambda model: accuracy.predict(model, images, fold=False)  # as `forgotten` measures
        return unlearn.unlearn(self.model, images, labels, self.method, **options, **self._inputs)

    def unlearn(
        self,
        settings: Settings,
        go_on: Callable[[], bool] | None = None,
        on_step: Callable[[dict[str, float]], object] | None = None,
    ) -> unlearn.Outcome:
        """Unlearn with these settings. D_adv and the importance do not depend on them and are made once."""
        with precisions.temporarily(self.forget.labels.device, self.precision):
            return self._unlearn(settings, go_on, on_step)

    def run_candidate(
        self, settings: Settings, changed: Mapping[str, float], budget: TimeBudget, reserve: float = 0.0
    ) -> Candidate:
        """Unlearn, stopping when only `reserve` seconds of the budget are left, and measure what would be written."""
        started = time.perf_counter()
        with self.show_progress(describe(changed), None) as advance:
            outcome = self.unlearn(
                settings,
                lambda: budget.left > reserve,
                lambda row: advance(
                    1, f"{row['forgotten']:.0f} % of D_f forgotten, at most {max(budget.left - reserve, 0):.0f} s left"
                ),
            )
        none = torch.zeros(len(self.forget), dtype=torch.bool)
        candidate = Candidate(settings, changed, outcome.status, outcome.steps, 0.0, none, [], None)
        if outcome.status != "diverged":
            written = self.as_written(outcome.model)
            try:
                stored = self.forgotten_as_stored(written)
                forgotten = self.forgotten(written, stored=stored)
                kept = [agreement.measure(written, probe) for probe in self.probes]
                masks = {"stored": stored, "forgotten": forgotten, "demanded": self.demanded}
                candidate = replace(candidate, **masks, kept=kept, model=outcome.model)
            except Diverged:
                candidate = replace(candidate, status="diverged")
        return replace(candidate, seconds=time.perf_counter() - started)

    def show_progress(self, description: str, total: int | None):
        """Return a context manager that yields a function to call with the number of finished units."""
        no_progress = contextlib.nullcontext(lambda count=1, note="": None)
        return self.progress(description, total) if self.progress else no_progress


def describe(changed: Mapping[str, Value]) -> str:
    """Return the settings of a candidate in words."""
    shown = {name: value if isinstance(value, str) else f"{value:g}" for name, value in changed.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "the method's own settings"


MEASURED_SHARE, PARTS = 0.1, 16  # of the time left: if timing steps takes more, a part of the images of a step is timed


def measure_step(unlearner: Unlearner, settings: Settings, budget: TimeBudget) -> float:
    """Return the seconds of a step of the loop, measured with a part of its images if that takes too long."""
    if unlearner.uses_teacher:
        names = ("distill_mixes", "distill_forget", "robust_pool")
        few = {name: max(1, getattr(settings, name) // PARTS) for name in names}
        seconds = PARTS * _time_steps(unlearner, replace(settings, **few), 2)
        if 3 * seconds > MEASURED_SHARE * budget.left:
            return seconds
    return _time_steps(unlearner, settings, 3)


def _time_steps(unlearner: Unlearner, settings: Settings, count: int) -> float:
    """Return the mean seconds of the first `count` steps but the first, before which images are synthesised."""
    times: list[float] = []
    short = replace(settings, distill_steps=count, distill_cycles=1, max_passes=count)
    with unlearner.show_progress("measure the time of a step", count) as advance:

        def note(row: dict[str, float]) -> None:
            times.append(time.perf_counter())
            advance(1)

        unlearner.unlearn(short, lambda: len(times) < count, note)
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def without_synthesis(settings: Settings) -> Settings:
    """Return settings whose steps take the same time, with stand-ins that are made of D_f."""
    return replace(settings, robust_images=0)
