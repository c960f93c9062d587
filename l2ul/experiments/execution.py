"""The experiment: carry out runs one after the other, and record each as soon as it ends."""

from collections import defaultdict
from collections.abc import Callable
import copy
from dataclasses import dataclass, field
import functools
from itertools import groupby
import platform

import torch
from torch import Tensor, nn
import torchvision

from l2ul import importance, models, unlearn
from l2ul.common import device as devices
from l2ul.common import distributed
from l2ul.common.cache import Cache, code_of_model
from l2ul.common.errors import Diverged, InputError
from l2ul.common.files import atomic, tensors_sha256
from l2ul.common.progress import progress_bar
from l2ul.common.text import first_three
from l2ul.common.tracking import Trackers
from l2ul.experiments import model_card, records
from l2ul.experiments.adversarial_sets import AdversarialSet, Attack
from l2ul.experiments.measurement import Evaluator
from l2ul.experiments.runs import Run, Setup
from l2ul.methods.checkpoint import Checkpoint
from l2ul.methods.settings import AttackSettings
from l2ul.methods.stand_ins import Synthesis
from l2ul.metrics.registry import (
    EVALUATIONS,
    METRICS_CODE,
    changed_code,
    code_in_record,
    outdated,
    recorded_code,
)
from l2ul.metrics.registry import own_code as own_metrics_code

ENDING = ("status", "steps", *records.ACCURACIES, "own_code", "data_sha256")  # equal in two records of one run
TOLERANCE = 1.0  # percentage points that an accuracy may change by rounding on another machine


@dataclass
class Importance:
    """MAS importance by parameter name, and the seconds that it took."""

    values: dict[str, Tensor]
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """Carries out the runs of a setup.

    For each seed the adversarial set of the largest D_f is made once, and smaller ones are its head. For each k the
    weight importance is computed once. Every method is then run, evaluated and recorded. A continual run is a series of
    runs, its steps: each starts from the model of the previous step, and has an adversarial set and importance of its
    own.

    Under torchrun every process carries out the same runs. They share the attack and the evaluation. The first process
    computes the importance, unlearns, and copies the weights to the others. It alone reads and writes files.

    keep_models        whether models are kept; those of continual runs always are, as the next step starts from them
    attack_batch_size  adversarial examples made at once; None: see `attack.default_batch_size`
    cache              for adversarial examples and synthesised images
    cuda_graph         whether the loop runs as CUDA graphs on a CUDA GPU, see `unlearn.unlearn`
    trackers           follow the runs
    on_record          called with each record that was written
    report             called with a sentence when a run continues from the state of an interrupted one, or cannot be
                       captured as a CUDA graph
    """

    setup: Setup
    evaluator: Evaluator
    keep_models: bool
    attack_batch_size: int | None
    cache: Cache
    cuda_graph: bool
    trackers: Trackers
    on_record: Callable[[dict[str, object]], object]
    report: Callable[[str], object]

    def pending(self, runs: list[Run], rerun: bool = False) -> tuple[list[Run], list[Run]]:
        """Return the runs that are to be carried out, and those whose record lacks metrics of a model that is kept.

        A run is done if its record has every metric, and its model exists where models are kept. Metrics whose code has
        changed count as lacking if there is a model. With `rerun`, every run is carried out.
        """
        actions = ["carry out"] * len(runs) if rerun else distributed.broadcast(lambda: list(map(self._action, runs)))
        return tuple(
            [run for run, own in zip(runs, actions, strict=True) if own == action]
            for action in ("carry out", "evaluate")
        )

    def carry_out(self, runs: list[Run]) -> None:
        """Carry out these runs in their order, and record each."""
        if runs:
            self.evaluator.original()  # first, so that what cannot be evaluated fails before the attack
        for run in runs if distributed.is_first() else ():
            self.evaluator.data_sha256(run)  # the same for files that cannot be read
        with self.trackers:
            for (_, is_step), group in groupby(runs, key=lambda run: (run.seed, run.is_step)):
                if is_step:
                    self._carry_out_steps(list(group))
                else:
                    self._carry_out_seed(list(group))

    def add_metrics(self, runs: list[Run]) -> None:
        """Evaluate the kept models of these runs and add the metrics that their records lack."""
        changed = distributed.broadcast(lambda: self.changes(runs).get("data_sha256"))
        if changed:
            raise InputError(
                f"the images of D_r or D_test are not those of the records of {first_three(changed)}, so no metric can "
                f"be added to these records",
                "do the runs again with --rerun --save-model",
                "restore the images",
            )
        for run in runs:
            record = distributed.broadcast(run.files.read)
            row = {}
            if record["status"] != records.DIVERGED:
                model, after = self.setup.classifier, self.evaluator.original()
                if run.method.trains:
                    model = self._load(run)
                    after = self.evaluator.predict(model, "measure after")
                row, _ = self.evaluator.evaluate(run, model, after)
                if abs(record["acc_test"] - row["acc_test"]) > TOLERANCE:
                    raise InputError(
                        f"{run.files.model} is not the model of {run.files.record}: its accuracy on D_test is "
                        f"{row['acc_test']:.2f} %, not {record['acc_test']:.2f} %",
                        "do the run again with --rerun --save-model",
                    )
            if distributed.is_first():
                references = self.evaluator.references.sha256
                record = run.files.read() or record  # another command may have added other metrics meanwhile
                stale = outdated(record, references) | changed_code(record)
                kept = {key: value for key, value in record.items() if key not in stale}
                new = {name: row.get(name) for name in self.evaluator.metrics}
                code = {key: digest for key, digest in recorded_code(record).items() if key in kept}
                code |= {key: digest for key, digest in own_metrics_code().items() if key not in kept}
                # metrics on record stay, unless their models or their code have changed
                record = new | kept | references | code_in_record(code)
                run.files.rewrite(record)
                if run.method.trains and run.files.card.exists() and record["status"] != records.DIVERGED:
                    self._write_card_of(run, record, model)

    def _carry_out_seed(self, runs: list[Run]) -> None:
        model = self.setup.classifier
        attack = functools.cache(lambda: self._attack(model, runs))  # made when the first run needs it
        for _, group in groupby(runs, key=lambda run: run.k):
            same_k = list(group)
            omega = functools.cache(functools.partial(self._importance, model, same_k))
            synthesis = Synthesis(self.cache, progress_bar)  # keeps its images for the runs on this D_f
            for run in same_k:
                needs = run.method.needs
                inputs = attack() if "adv" in needs else None, omega() if "importance" in needs else None
                self._track(run)
                self._finish(run, self._unlearn(run, model, *inputs, synthesis))

    def _carry_out_steps(self, runs: list[Run]) -> None:
        """Carry out steps of continual runs, and the earlier steps whose models are missing."""
        model, previous = None, None
        for run in self._with_missing_steps(runs):
            if run.previous is None:
                model = self.setup.classifier
            elif run.previous is not previous:
                model = self._load(run.previous)
            is_recorded = run not in runs
            if not is_recorded:
                self._track(run)
            result = self._step(run, model)
            if not is_recorded:
                self._finish(run, result)
            else:  # only its model is needed
                self._keep(run, result)
                if distributed.is_first():
                    self._write_card(run, run.files.read(), result)
                    self._checkpoint(run).delete()
            model, previous = (None if result.diverged else result.outcome.model), run

    def _track(self, run: Run) -> None:
        """Begin a run in the trackers."""
        step = f" step {run.settings['continual_step']}" if run.is_step else ""
        name = f"{run.method.name} k {run.k} seed {run.seed}{step}"
        self.trackers.start(run.files.identity, name, run.settings | self.setup.described)

    def _with_missing_steps(self, runs: list[Run]) -> list[Run]:
        """Insert before each step the earlier steps of the run whose models it needs and that were not kept."""
        steps: list[Run] = []
        for run in runs:
            missing, step = [], run.previous
            while step is not None and step not in steps:
                if distributed.broadcast(lambda step=step: self._has_model(step)):
                    break
                missing.append(step)
                step = step.previous
            steps += [*reversed(missing), run]
        return steps

    def _step(self, run: Run, model: nn.Module | None) -> "RunResult":
        """Unlearn one step from the model of the previous one, which is None if that diverged."""
        try:
            if model is None:
                raise Diverged("the previous step diverged")
            adversarial, omega = self._attack(model, [run]), self._importance(model, [run])
            return self._unlearn(run, model, adversarial, omega, Synthesis(self.cache, progress_bar))
        except Diverged:  # of the attack: the step has no model to start from
            return RunResult(unlearn.Outcome(self.setup.classifier, records.DIVERGED, 0))

    def _attack(self, model: nn.Module, runs: list[Run]) -> AdversarialSet | None:
        """Make D_adv of the largest D_f of these runs. None if no run needs it, and in all processes but the first."""
        runs = [run for run in runs if "adv" in run.method.needs]
        if not runs:
            return None
        largest = max(runs, key=lambda run: len(run.forget))
        attack = Attack(
            self.setup.images.num_classes,
            AttackSettings.of(self.setup.hyper),
            largest.seed,
            self.attack_batch_size,
            self.evaluator.batch_size,
            self.setup.result_dir / "scratch",
        )
        started = devices.clock(self.setup.device)
        total = len(largest.forget) * attack.settings.num_adv_images * attack.settings.iterations
        with progress_bar("attack, PGD steps", total) as advance:
            adversarial = attack.make(
                model, *self._forget(largest), largest.first_position, cache=self.cache, progress=advance
            )
        if adversarial:
            adversarial.seconds = devices.clock(self.setup.device) - started
        return adversarial

    def _importance(self, model: nn.Module, runs: list[Run]) -> Importance | None:
        """Compute MAS importance on the D_f that these runs share. None if no run needs it, and in other processes."""
        run = next((run for run in runs if "importance" in run.method.needs), None)
        if run is None or not distributed.is_first():
            return None
        started = devices.clock(self.setup.device)
        with progress_bar("importance", len(run.forget)) as advance:
            values = importance.mas_importance(model, self._forget(run)[0], advance)
        return Importance(values, devices.clock(self.setup.device) - started)

    def _unlearn(
        self,
        run: Run,
        model: nn.Module,
        adversarial: AdversarialSet | None,
        omega: Importance | None,
        synthesis: Synthesis,
    ) -> "RunResult":
        """Unlearn D_f of a run from `model` in the first process, and copy the result to the others."""
        devices.reset_peak_memory(self.setup.device)
        result = RunResult(unlearn.Outcome(model, "", 0))
        if distributed.is_first():
            inputs: dict[str, object] = {"synthesis": synthesis}
            if "adv" in run.method.needs:
                result.adversarial = adversarial.head(len(run.forget) * self.setup.hyper["num_adv_images"])
                inputs["adv"] = result.adversarial.examples, result.adversarial.targets
                result.seconds["attack"] = result.adversarial.seconds
            if "importance" in run.method.needs:
                inputs["importance"], result.seconds["importance"] = omega.values, omega.seconds
            if "retain" in run.method.needs:
                inputs["retain"] = self.evaluator.retain_set(run)
            if run.settings["surrogate"]:
                inputs["surrogate"] = self.setup.surrogate.images.to(self.setup.device)
            started = devices.clock(self.setup.device)
            result.outcome = self._loop(run, model, inputs)
            seconds = devices.clock(self.setup.device) - started
            result.seconds["unlearn"] = result.outcome.seconds_before + seconds
        outcome = result.outcome
        outcome.status, outcome.steps = distributed.broadcast(lambda: (outcome.status, outcome.steps))
        if not distributed.is_first():
            outcome.model = copy.deepcopy(model)
        distributed.copy_from_first(outcome.model)
        return result

    def _loop(self, run: Run, model: nn.Module, inputs: dict[str, object]) -> unlearn.Outcome:
        new = run.forget.new_labels
        done, limit, cycle = 0, None, None
        with progress_bar(f"{run.method.name} k {run.k}") as advance:

            def start(max_steps: int | None, stop_every: int | None, earlier: unlearn.Curve) -> None:
                nonlocal done, limit, cycle
                limit, cycle = max_steps, stop_every
                for row in earlier:
                    self.trackers.log(row)
                if earlier:
                    done = earlier[-1]["step"]
                    advance(done, limit=limit)

            def show(row: dict[str, float]) -> None:
                nonlocal done
                self.trackers.log(row)
                end = f"may end at step {-(-row['step'] // cycle) * cycle:,}, " if cycle and cycle > 1 else ""
                advance(row["step"] - done, f"{end}{row['forgotten']:.0f} % of D_f forgotten", limit)
                done = row["step"]

            return unlearn.unlearn(
                model,
                *self._forget(run),
                run.method.name,
                new_labels=new.to(self.setup.device) if new is not None else None,
                settings=self.setup.loop_settings(run),
                workers=self.evaluator.workers,
                predict=lambda model: self.evaluator.predict_forget(run, model),
                on_start=start,
                on_step=show,
                checkpoint=self._checkpoint(run),
                cuda_graph=self.cuda_graph,
                report=self.report,
                **inputs,
            )

    def _finish(self, run: Run, result: "RunResult") -> None:
        """Evaluate the model of a run, keep it where models are kept, and write the record."""
        outcome, after = result.outcome, None
        try:
            if outcome.status == records.DONE and outcome.steps == 0:
                after = self.evaluator.original()  # `before` does not change the model
            elif not result.diverged:
                after = self.evaluator.predict(outcome.model, "measure after")
        except Diverged:
            outcome.status = records.DIVERGED
        result.seconds["evaluate"] = after.seconds if after else 0.0
        try:
            row, predictions = self.evaluator.evaluate(run, outcome.model, after)
        except Diverged:  # the logits are finite for D_r and D_test, but not for D_f
            outcome.status = records.DIVERGED
            row, predictions = self.evaluator.evaluate(run, outcome.model, None)
        self._keep(run, result)
        if distributed.is_first():
            self._record(run, result, row, predictions)

    def _keep(self, run: Run, result: "RunResult") -> None:
        if distributed.is_first() and self.keeps(run) and not result.diverged:
            models.save(result.outcome.model, run.files.model, run.settings)

    def own_code(self, run: Run) -> str | None:
        """Return a hash of the user's files that the model and the method of a run are from; None without any."""
        return code_of_model(self.setup.classifier, run.method.implementation)

    def changes(self, runs: list[Run]) -> dict[str, list[str]]:
        """Return what has changed since runs were recorded and is no part of their ids.

        By a key of records (own_code, own_metrics or data_sha256), the ids of the runs that were recorded with another
        value. Records without the key, which are older than it, do not count, nor metrics that can be measured again.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for run in runs if distributed.is_first() else ():
            record = run.files.read() or {}
            if "own_code" in record and self.own_code(run) not in (None, record["own_code"]):
                found["own_code"].append(run.files.identity)
            if changed_code(record) and not self._has_model(run):
                found[METRICS_CODE].append(run.files.identity)
            if "data_sha256" in record and self.evaluator.data_sha256(run) != record["data_sha256"]:
                found["data_sha256"].append(run.files.identity)
        return dict(found)

    def keeps(self, run: Run) -> bool:
        """Return whether the model of a run is kept, unless the run diverges."""
        return (self.keep_models or run.is_step) and run.method.trains

    def _record(
        self, run: Run, result: "RunResult", row: dict[str, float | None], predictions: dict[str, Tensor]
    ) -> None:
        adversarial = result.adversarial
        record = {
            **run.settings,
            "status": result.outcome.status,
            "steps": result.outcome.steps,
            **row,
            "adv_success": adversarial.success if adversarial else None,
            "attack_batch_size": adversarial.batch_size if adversarial else None,
            **{f"seconds_{phase}": round(value, 3) for phase, value in result.seconds.items()},
            "peak_memory_mib": devices.peak_memory_mib(self.setup.device),
            "device": devices.device_name(self.setup.device),
            **self.setup.described,
            **({"own_code": own} if (own := self.own_code(run)) else {}),
            **code_in_record(own_metrics_code()),
            "data_sha256": self.evaluator.data_sha256(run),
            **({"decoded_by_cpu": len(refused)} if (refused := self.setup.images.refused) else {}),
            **self.evaluator.references.sha256,
            "test_batch_size": self.evaluator.batch_size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        record |= self._metrics_on_record(run, record)
        self._write_card(run, record, result)
        names = (run.earlier.names if run.earlier else []) + run.forget.names
        run.files.write(record, names, predictions, result.outcome.curve)
        self._checkpoint(run).delete()
        self.trackers.finish(record)
        self.on_record(record)

    def _metrics_on_record(self, run: Run, record: dict[str, object]) -> dict[str, object]:
        """Return the metrics that the earlier record of a run has in addition, if the run has ended as it did then."""
        earlier = run.files.read() or {}
        names = {name for group in EVALUATIONS.values() for name in group.names} - outdated(earlier, record)
        more = {name: earlier[name] for name in names if name in earlier and name not in record}
        if more and any(earlier.get(name, record.get(name)) != record.get(name) for name in ENDING):
            self.report(
                f"{run.files.record}: the run has ended otherwise than before; {len(more)} metrics of then are left out"
            )
            return {}
        compared = {key for group in EVALUATIONS.values() for name, key in group.compared_with.items() if name in more}
        return more | {key: earlier[key] for key in compared}

    def _write_card(self, run: Run, record: dict[str, object], result: "RunResult") -> None:
        """Write the model card of a run's model if that is kept."""
        if self.keeps(run) and not result.diverged:
            self._write_card_of(run, record, result.outcome.model)

    def _write_card_of(self, run: Run, record: dict[str, object], model: nn.Module) -> None:
        digest, path = tensors_sha256(model.net.state_dict()), run.files.model
        card = model_card.of_record(record, self.setup.images.num_classes, digest, path.is_dir(), path.name)
        with atomic(run.files.card) as part:
            part.write_text(card.text(), encoding="utf-8")

    def _checkpoint(self, run: Run) -> Checkpoint:
        """Return the file that holds the state of the run's loop while it is not finished."""
        return Checkpoint(run.files.state, report=self.report)

    def _forget(self, run: Run) -> tuple[Tensor, Tensor]:
        split = run.forget.split
        return split.pixels().to(self.setup.device), split.labels.to(self.setup.device)

    def _load(self, run: Run) -> nn.Module | None:
        """Read the model that a run ended with in the first process and copy it to the others; None if it diverged."""
        if not run.method.trains:
            return self.setup.classifier
        if distributed.broadcast(lambda: run.files.read()["status"] == records.DIVERGED):
            return None
        model = self.setup.classifier
        try:
            model = models.load_saved(run.files.model, model) if distributed.is_first() else copy.deepcopy(model)
        except InputError as error:  # whose advice is that for original models
            raise InputError(error.problem, "do the run again with --rerun --save-model") from None
        model = model.to(self.setup.device)
        distributed.copy_from_first(model)
        return model

    def _action(self, run: Run) -> str:
        """Return what is left to do for a run: "carry out", "evaluate" or "nothing"."""
        record = run.files.read()
        if record is None:
            return "carry out"
        references = self.evaluator.references.sha256
        if not (set(self.evaluator.metrics) <= record.keys() and references.items() <= record.items()):
            return "evaluate" if self._has_model(run) else "carry out"
        if changed_code(record) and self._has_model(run):
            return "evaluate"
        return "carry out" if self.keep_models and not self._has_model(run) else "nothing"

    def _has_model(self, run: Run) -> bool:
        """Return whether the run's model can be loaded. A run that diverged has none, which counts as well."""
        if not run.method.trains:  # the model is the original one
            return True
        record = run.files.read()
        return record is not None and (record["status"] == records.DIVERGED or run.files.model.exists())


@dataclass
class RunResult:
    """What a run ended with: the outcome, D_adv if the method needs it, and the seconds of each phase."""

    outcome: unlearn.Outcome
    adversarial: AdversarialSet | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("attack", "importance", "unlearn", "evaluate"), 0.0)
    )

    @property
    def diverged(self) -> bool:
        return self.outcome.status == records.DIVERGED
