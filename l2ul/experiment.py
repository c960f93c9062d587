"""The runs of one command: planned, those that are not done yet carried out, each recorded as soon as it ends."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
import platform

import torch
from torch import Tensor, nn
import torchvision

from l2ul import METHOD_VERSION, attack, data, evaluate, importance, methods, records, running, unlearn
from l2ul.errors import Diverged, InputError

LOOP_FLAGS = ("unlearn_lr", "momentum", "weight_decay", "batch_size", "max_passes", "bn")
ATTACK_FLAGS = ("num_adv_images", "pgd_eps", "pgd_alpha", "pgd_iter")
NEEDS_FLAGS = {  # the hyper-parameters that a method depends on, by what it needs
    "adv": (*ATTACK_FLAGS, "adv_batch_size"),
    "importance": ("reg_lamb",),
    "retain": ("adv_batch_size",),
}
HYPER_PARAMETERS = (*LOOP_FLAGS, *ATTACK_FLAGS, "adv_batch_size", "reg_lamb")


@dataclass(frozen=True, eq=False)
class Run:
    """One row of a table: a method on one D_f. `settings` is all that decides its result; its id is their hash."""

    method: methods.Method
    seed: int
    forget: Tensor  # (k,) indices of D_f
    new_labels: Tensor | None  # (k,), to relabel
    settings: dict[str, object]
    files: records.RunFiles

    @property
    def k(self) -> int:
        return len(self.forget)


@dataclass(frozen=True)
class Predictions:
    """What a classifier calls every image of the training and the test split, and the seconds that took."""

    train: Tensor
    test: Tensor
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """What all runs of a command share.

    classifier   with `name`, `sha256` of its weights, and mean and std in `normalize` (see models.Classifier)
    hyper        every one of HYPER_PARAMETERS
    save_model   writes an unlearned model to a path with settings as metadata; None: models are not kept
    model_suffix of such a path
    """

    images: data.Images
    classifier: nn.Module
    goal: str
    hyper: dict[str, object]
    result_dir: Path
    test_batch_size: int = 256
    attack_batch_size: int | None = None
    workers: int = 0
    save_model: Callable[[nn.Module, Path, dict[str, object]], None] | None = None
    model_suffix: str = ".safetensors"

    @property
    def device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    def plan(self, names: list[str], sizes: list[int], seed: int, forget: Tensor, new: Tensor | None) -> list[Run]:
        """The runs of a seed, each k of `sizes` with each method: on the first k of D_f's indices `forget`."""
        runs = []
        for k in sorted(set(sizes)):
            chosen, labels = forget[:k], new[:k] if new is not None else None
            digest = data.forget_sha256(self.images.train.subset(chosen), chosen, labels)
            runs += [self._planned(methods.get(name), seed, chosen, labels, digest) for name in names]
        return runs

    def _planned(
        self, method: methods.Method, seed: int, forget: Tensor, new_labels: Tensor | None, digest: str
    ) -> Run:
        used = set(LOOP_FLAGS if method.terms else ()).union(*(NEEDS_FLAGS[need] for need in method.needs))
        train = self.images.train
        statistics = {
            name: " ".join(f"{value:g}" for value in getattr(self.classifier.normalize, name).flatten().tolist())
            for name in ("mean", "std")
        }
        settings = {
            "dataset": self.images.name,
            "model": self.classifier.name,
            "checkpoint_sha256": self.classifier.sha256,
            "method": method.name,
            "needs_retain": "retain" in method.needs,
            "goal": self.goal,
            "k": len(forget),
            "seed": seed,
            "continual_step": None,
            **{name: self.hyper[name] if name in used else None for name in HYPER_PARAMETERS},
            **statistics,
            "image_size": train.images.size if isinstance(train.images, data.FolderImages) else None,
            "num_train": len(train),
            "num_test": len(self.images.test),
            "forget_sha256": digest,
            "method_version": METHOD_VERSION,
        }
        files = records.RunFiles(self.result_dir, records.run_id(settings), self.model_suffix)
        return Run(method, seed, forget, new_labels, settings, files)

    def is_done(self, run: Run) -> bool:
        """Whether the run's record exists, and its model where models are kept and there is one to keep."""
        record = run.files.read()
        if record is None or not (self.save_model and run.method.terms):
            return record is not None
        return record["status"] == records.DIVERGED or run.files.model.exists()

    def carry_out(self, runs: list[Run]) -> None:
        """Do these runs, in their order, and record each; what several of them need is made once."""
        if not runs:
            return
        before = self.predict(self.classifier, "measure before")
        for _, of_seed in groupby(runs, key=lambda run: run.seed):
            same_seed = list(of_seed)
            adversarial = self._attack(same_seed)
            for _, of_size in groupby(same_seed, key=lambda run: run.k):
                same_size = list(of_size)
                weighed = self._weigh(same_size)
                for run in same_size:
                    self._carry_out(run, before, adversarial, weighed)

    def predict(self, model: nn.Module, what: str) -> Predictions:
        """The model's classes for every image, both splits in one pass."""
        splits = (self.images.train, self.images.test)
        started = running.clock(self.device)
        with running.progress(what, sum(map(len, splits))) as advance:
            found = [
                evaluate.predict(
                    model, split.images, batch_size=self.test_batch_size, workers=self.workers, progress=advance
                )
                for split in splits
            ]
        return Predictions(*found, running.clock(self.device) - started)

    def _forget(self, run: Run) -> tuple[Tensor, Tensor]:
        forget = self.images.train.subset(run.forget)
        return forget.pixels().to(self.device), forget.labels

    def _attack(self, runs: list[Run]) -> tuple[tuple[Tensor, Tensor], float] | None:
        """D_adv of the largest k of a seed, and the seconds that an image of D_f took; None if no run needs it."""
        needing = [run for run in runs if "adv" in run.method.needs]
        if not needing:
            return None
        largest = max(needing, key=lambda run: run.k)
        draws, steps = self.hyper["num_adv_images"], self.hyper["pgd_iter"]
        started = running.clock(self.device)
        with running.progress("attack", largest.k * draws * steps, estimate=True) as advance:
            made = attack.adversarial_set(
                self.classifier,
                *self._forget(largest),
                self.images.num_classes,
                num_adv_images=draws,
                eps=self.hyper["pgd_eps"],
                alpha=self.hyper["pgd_alpha"],
                steps=steps,
                seed=largest.seed,
                batch_size=self.attack_batch_size,
                progress=advance,
            )
        return made, (running.clock(self.device) - started) / largest.k

    def _weigh(self, runs: list[Run]) -> tuple[dict[str, Tensor], float] | None:
        """MAS importance on the D_f that these runs share, and the seconds it took; None if no run needs it."""
        run = next((run for run in runs if "importance" in run.method.needs), None)
        if run is None:
            return None
        started = running.clock(self.device)
        with running.progress("importance", run.k) as advance:
            omega = importance.mas_importance(self.classifier, self._forget(run)[0], advance)
        return omega, running.clock(self.device) - started

    def _carry_out(self, run: Run, before: Predictions, adversarial, weighed) -> None:
        needs, seconds = run.method.needs, {"attack": 0.0, "importance": 0.0}
        inputs = {}
        if "adv" in needs:
            (examples, targets), a_image = adversarial
            head = slice(run.k * self.hyper["num_adv_images"])
            inputs["adv"], seconds["attack"] = (examples[head], targets[head]), a_image * run.k
        if "importance" in needs:
            inputs["importance"], seconds["importance"] = weighed
        if "retain" in needs:
            inputs["retain"] = self.images.train.subset(evaluate.complement(run.forget, len(self.images.train)))
        started = running.clock(self.device)
        outcome = self._unlearn(run, inputs)
        seconds["unlearn"] = running.clock(self.device) - started
        after = self._measure_after(outcome, before)
        seconds["evaluate"] = after.seconds if after else 0.0
        if self.save_model and run.method.terms and after:
            self.save_model(outcome.model, run.files.model, run.settings)
        self._record(run, outcome, before, after, seconds)

    def _unlearn(self, run: Run, inputs: dict[str, object]) -> unlearn.Outcome:
        settings = unlearn.Settings(
            seed=run.seed, **{name: self.hyper[name] for name in (*LOOP_FLAGS, "adv_batch_size", "reg_lamb")}
        )
        new_labels = run.new_labels.to(self.device) if run.new_labels is not None else None
        with running.progress(f"{run.method.name} k = {run.k}", None) as advance:
            try:
                return unlearn.unlearn(
                    self.classifier,
                    *self._forget(run),
                    run.method.name,
                    new_labels=new_labels,
                    settings=settings,
                    on_step=lambda row: advance(1),
                    **inputs,
                )
            except ValueError as error:
                if "Expected more than 1 value per channel" not in str(error):
                    raise
                raise InputError(
                    "batch-norm in train mode cannot learn from a single value a channel, which a batch of one image "
                    "gives this net; take --bn eval, or a --batch-size that leaves no image alone"
                ) from None

    def _measure_after(self, outcome: unlearn.Outcome, before: Predictions) -> Predictions | None:
        if outcome.status == records.DONE and outcome.steps == 0:
            return before  # the model is the one that was measured
        if outcome.status == records.DIVERGED:
            return None
        try:
            return self.predict(outcome.model, "measure after")
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
    ) -> None:
        labels = self._parts(run, self.images.train.labels.cpu(), self.images.test.labels.cpu())
        called_before = self._parts(run, before.train, before.test)
        called_after = self._parts(run, after.train, after.test) if after else {}
        record = {
            **run.settings,
            "status": outcome.status,
            "steps": outcome.steps,
            **{f"acc_{part}": None for part in labels},
            **{f"acc_{part}": evaluate.accuracy(found, labels[part]) for part, found in called_after.items()},
            **{f"acc_{part}_before": evaluate.accuracy(found, labels[part]) for part, found in called_before.items()},
            "acc_relabel": None,
            **{f"seconds_{phase}": round(value, 3) for phase, value in seconds.items()},
            "peak_memory_mib": running.peak_memory_mib(self.device),
            "device": running.device_name(self.device),
            "attack_batch_size": self.attack_batch_size or attack.BATCH_SIZE[self.device.type],
            "test_batch_size": self.test_batch_size,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        if run.new_labels is not None and after:
            record["acc_relabel"] = evaluate.accuracy(called_after["forget"], run.new_labels)
        predictions = {f"{part}_before": found for part, found in called_before.items()}
        predictions |= {f"{part}_after": found for part, found in called_after.items()}
        run.files.write(record, run.forget, predictions, outcome.curve)

    def _parts(self, run: Run, train: Tensor, test: Tensor) -> dict[str, Tensor]:
        """Values of all training and all test images, told apart as those of D_f, D_r and D_test."""
        retain = evaluate.complement(run.forget, len(train))
        return {"forget": train[run.forget], "retain": train[retain], "test": test}
