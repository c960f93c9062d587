"""Runs carried out one after the other, each measured and recorded as soon as it ends."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
import platform

import torch
from torch import Tensor, nn
import torchvision

from l2ul import importance, unlearn
from l2ul.common import device as device_module
from l2ul.common.cache import Cache
from l2ul.common.errors import Diverged, InputError
from l2ul.common.progress import progress_bar
from l2ul.experiments import records
from l2ul.experiments.adversarial_sets import Adversarial, Attack
from l2ul.experiments.measurement import Measuring, Predictions
from l2ul.experiments.runs import Run, Setup
from l2ul.methods.checkpoint import Checkpoint
from l2ul.methods.settings import AttackSettings
from l2ul.metrics.groups import outdated

SAME = 1.0  # points of accuracy that rounding on another machine may change


@dataclass(frozen=True)
class Experiment:
    """How the runs of a setup are carried out.

    save, load   write an unlearned net to a path with settings as metadata, and read it again
    keep_models  whether the nets are kept; those of continual runs always are, as the next step starts from them
    scratch_dir  for what does not fit in memory
    cache        where adversarial examples are kept
    on_record    called with each record that was written
    report       called with a sentence when a run continues from the state of an interrupted one
    """

    setup: Setup
    measuring: Measuring
    save: Callable[[nn.Module, Path, dict[str, object]], None]
    load: Callable[[Path], nn.Module]
    keep_models: bool = False
    attack_batch_size: int | None = None
    scratch_dir: Path = Path("result_data/scratch")
    cache: Cache = field(default_factory=Cache)
    on_record: Callable[[dict[str, object]], object] = lambda record: None
    report: Callable[[str], object] = lambda sentence: None

    @property
    def device(self) -> torch.device:
        return next(self.setup.classifier.parameters()).device

    def is_done(self, run: Run) -> bool:
        """Whether the run's record exists with every metric, and its model where models are kept and there is one."""
        record = run.files.read()
        if record is None or not self._is_measured(record):
            return False
        return not self.keep_models or self._has_net(run, record)

    def can_be_measured(self, run: Run) -> bool:
        """Whether all that the run's record lacks are metrics, and the net that they are of is there."""
        record = run.files.read()
        return record is not None and not self._is_measured(record) and self._has_net(run, record)

    def _is_measured(self, record: dict[str, object]) -> bool:
        """Whether it has every metric, against the very nets that are given."""
        against = self.measuring.peers.described
        return set(self.measuring.metrics) <= record.keys() and against.items() <= record.items()

    def _has_net(self, run: Run, record: dict[str, object]) -> bool:
        """Whether the net that the run ended with is at hand, or there is none: it diverged, or is the classifier."""
        return not run.method.trains or record["status"] == records.DIVERGED or run.files.model.exists()

    def measure(self, runs: list[Run]) -> None:
        """Add to the records of these runs the metrics that they lack; whatever else they have stays as it is."""
        for run in runs:
            record, found = run.files.read(), {}
            if record["status"] != records.DIVERGED:
                before = after = self.measuring.before()
                model = self.setup.classifier
                if run.method.trains:
                    model = self.load(run.files.model)
                    after = self.measuring.predict(model, "measure after")
                found, _ = self.measuring.of_run(run, before, model, after)
                self._check_same(run, record["acc_test"], found["acc_test"])
            against = self.measuring.peers.described
            stale = outdated(record, against)
            kept = {key: value for key, value in record.items() if key not in stale}
            added = {name: found.get(name) for name in self.measuring.metrics}
            run.files.rewrite(added | kept | against)

    def _check_same(self, run: Run, recorded: float, found: float) -> None:
        """Raise InputError where the net that was kept is not the one of the record, as after another --rerun."""
        if abs(recorded - found) > SAME:
            raise InputError(
                f"{run.files.model} is not the net of {run.files.record}: it calls {found:.2f} % of D_test right, not "
                f"{recorded:.2f} %; do the run again with --rerun --save-model"
            )

    def carry_out(self, runs: list[Run]) -> None:
        """Do these runs, in their order, and record each; what several of them need is made once."""
        if not runs:
            return
        before = self.measuring.before()
        for (_, are_steps), group in groupby(runs, key=lambda run: (run.seed, run.is_step)):
            if are_steps:
                self._carry_out_steps(list(group), before)
            else:
                self._carry_out_seed(list(group), before)

    def _carry_out_seed(self, runs: list[Run], before: Predictions) -> None:
        adversarial = self._attack(runs, self.setup.classifier)
        for _, of_size in groupby(runs, key=lambda run: run.k):
            same_size = list(of_size)
            weighed = self._weigh(same_size, self.setup.classifier)
            for run in same_size:
                self._carry_out(run, self.setup.classifier, before, adversarial, weighed)

    def _carry_out_steps(self, runs: list[Run], before: Predictions) -> None:
        """Steps of continual runs: each from the net that the step before ended with, on its own images alone."""
        last: tuple[Run, nn.Module] | None = None
        for run in runs:
            start = last[1] if last and last[0] is run.previous else self._end_of(run.previous, before)
            last = run, self._carry_out_step(run, start, before)

    def _end_of(self, run: Run | None, before: Predictions) -> nn.Module | None:
        """The net that a step ended with, made again where it was not kept; None where it diverged."""
        if run is None or not run.method.trains:
            return self.setup.classifier
        record = run.files.read()
        if record and record["status"] == records.DIVERGED:
            return None
        if record and run.files.model.exists():
            return self.load(run.files.model)
        return self._carry_out_step(run, self._end_of(run.previous, before), before, measure=record is None)

    def _carry_out_step(
        self, run: Run, start: nn.Module | None, before: Predictions, measure: bool = True
    ) -> nn.Module | None:
        """The net that a step ends with, None if it diverged; without `measure`, its record stays as it is."""
        try:
            if start is None:
                raise Diverged("the step before ended without a net")
            adversarial, weighed = self._attack([run], start), self._weigh([run], start)
        except Diverged:  # nothing can be learned from a net whose numbers are lost
            outcome = unlearn.Outcome(self.setup.classifier, records.DIVERGED, 0)
            phases = ("attack", "importance", "unlearn", "evaluate")
            self._record(run, outcome, before, None, dict.fromkeys(phases, 0.0), {})
            return None
        outcome = self._carry_out(run, start, before, adversarial, weighed, measure)
        return None if outcome.status == records.DIVERGED else outcome.model

    def _forget(self, run: Run) -> tuple[Tensor, Tensor]:
        split = run.forget.split
        return split.pixels().to(self.device), split.labels.to(self.device)

    def _attack(self, runs: list[Run], model: nn.Module) -> tuple[Adversarial, float] | None:
        """D_adv of the largest D_f of these runs, the others' are its head, and the seconds an image took.

        None if no run needs it.
        """
        needing = [run for run in runs if "adv" in run.method.needs]
        if not needing:
            return None
        largest = max(needing, key=lambda run: len(run.forget))
        attack = Attack(
            self.setup.images.num_classes,
            AttackSettings.of(self.setup.hyper),
            largest.seed,
            self.attack_batch_size,
            self.measuring.batch_size,
            self.scratch_dir,
        )
        total = len(largest.forget) * attack.settings.num_adv_images * attack.settings.iterations
        started = device_module.clock(self.device)
        with progress_bar("attack", total) as advance:
            made = attack.make(
                model,
                *self._forget(largest),
                largest.first_position,
                cache=self.cache,
                progress=advance,
            )
        return made, (device_module.clock(self.device) - started) / len(largest.forget)

    def _weigh(self, runs: list[Run], model: nn.Module) -> tuple[dict[str, Tensor], float] | None:
        """MAS importance on the D_f that these runs share, and the seconds it took; None if no run needs it."""
        run = next((run for run in runs if "importance" in run.method.needs), None)
        if run is None:
            return None
        started = device_module.clock(self.device)
        with progress_bar("importance", len(run.forget)) as advance:
            omega = importance.mas_importance(model, self._forget(run)[0], advance)
        return omega, device_module.clock(self.device) - started

    def _carry_out(
        self,
        run: Run,
        model: nn.Module,
        before: Predictions,
        adversarial: tuple[Adversarial, float] | None,
        weighed: tuple[dict[str, Tensor], float] | None,
        measure: bool = True,
    ) -> unlearn.Outcome:
        needs, seconds = run.method.needs, {"attack": 0.0, "importance": 0.0}
        inputs, attacked = {}, {}
        if "adv" in needs:
            made, seconds_an_image = adversarial
            num_pairs = len(run.forget) * self.setup.hyper["num_adv_images"]
            inputs["adv"], seconds["attack"] = made.head(num_pairs), seconds_an_image * len(run.forget)
            attacked = made.success(num_pairs) | {"attack_batch_size": made.batch_size}
        if "importance" in needs:
            inputs["importance"], seconds["importance"] = weighed
        if "retain" in needs:
            inputs["retain"] = self.measuring.retain(run)
        started = device_module.clock(self.device)
        outcome = self._unlearn(run, model, inputs)
        seconds["unlearn"] = outcome.seconds_before + device_module.clock(self.device) - started
        after = self._measure_after(outcome, before) if measure else None
        seconds["evaluate"] = after.seconds if after else 0.0
        finite = outcome.status != records.DIVERGED
        if (self.keep_models or run.is_step) and run.method.trains and finite:
            self.save(outcome.model, run.files.model, run.settings)
        if measure:
            self._record(run, outcome, before, after, seconds, attacked)
        run.files.state.unlink(missing_ok=True)
        return outcome

    def _unlearn(self, run: Run, model: nn.Module, inputs: dict[str, object]) -> unlearn.Outcome:
        new = run.forget.new_labels
        done = 0
        with progress_bar(f"{run.method.name} k {run.k}") as advance:

            def show(row: dict[str, float]) -> None:
                nonlocal done
                advance(row["step"] - done, f"{row['forgotten']:.0f} % of D_f forgotten")
                done = row["step"]

            return unlearn.unlearn(
                model,
                *self._forget(run),
                run.method.name,
                new_labels=new.to(self.device) if new is not None else None,
                settings=self.setup.loop_settings(run),
                workers=self.measuring.workers,
                on_step=show,
                checkpoint=Checkpoint(run.files.state, report=self.report),
                **inputs,
            )

    def _measure_after(self, outcome: unlearn.Outcome, before: Predictions) -> Predictions | None:
        if outcome.status == records.DONE and outcome.steps == 0:
            return before  # the model is the one that was measured
        if outcome.status == records.DIVERGED:
            return None
        try:
            return self.measuring.predict(outcome.model, "measure after")
        except Diverged:
            outcome.status = records.DIVERGED
            return None

    def _record(
        self,
        run: Run,
        outcome: unlearn.Outcome,
        before: Predictions,
        after: Predictions | None,
        seconds: dict[str, float],
        attacked: dict[str, float],
    ) -> None:
        """Write the record: accuracies are of the net before any run, and of the one that this run ended with."""
        try:
            accuracies, predictions = self.measuring.of_run(run, before, outcome.model, after)
        except Diverged:  # finite on D_r and D_test, not on the images to forget
            outcome.status = records.DIVERGED
            accuracies, predictions = self.measuring.of_run(run, before, outcome.model, None)
        record = {
            **run.settings,
            "status": outcome.status,
            "steps": outcome.steps,
            **accuracies,
            **dict.fromkeys(("adv_success", "adv_success_exact", "attack_batch_size")),
            **attacked,
            **{f"seconds_{phase}": round(value, 3) for phase, value in seconds.items()},
            "peak_memory_mib": device_module.peak_memory_mib(self.device),
            "device": device_module.device_name(self.device),
            **self.setup.described,
            **self.measuring.peers.described,
            "test_batch_size": self.measuring.batch_size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        names = (run.earlier.names if run.earlier else []) + run.forget.names
        run.files.write(record, names, predictions, outcome.curve)
        self.on_record(record)
