"""Evaluation of a run: predictions of the original and the unlearned model, accuracies, and further metrics."""

from collections.abc import Callable
import contextlib
from dataclasses import dataclass, field
from functools import cache, cached_property
import hashlib
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from l2ul import Progress
from l2ul.common import device as devices
from l2ul.common import distributed, seeds
from l2ul.common.cache import Cache, environment, model_fingerprint
from l2ul.common.errors import InputError
from l2ul.common.files import tensors_sha256
from l2ul.common.precision import exactly
from l2ul.common.progress import progress_bar
from l2ul.data.images import Split
from l2ul.experiments.reference_models import ReferenceModel, ReferenceModels
from l2ul.experiments.runs import Run, Setup
from l2ul.metrics import accuracy
from l2ul.metrics.registry import METRICS, EvaluationGroup, ReferenceOutputs, RunOutputs

Value = TypeVar("Value")
Classes = dict[str, Tensor]  # predictions or labels (n,) int64 by part: forget, forget_earlier, retain and test


@dataclass(frozen=True)
class Predictions:
    """A model's predictions (n,) int64 for the retain sample and the test images, and the seconds they took."""

    retain_sample: Tensor
    test: Tensor
    seconds: float


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the data set of a setup.

    batch_size  images per batch
    workers     processes that decode images on disk
    cache       for the predictions of models that no run changes
    groups      metrics beside the accuracies and METRICS
    references  models that were trained without D_f, for the groups that need such

    Models that no run changes, the original and the retrained one, are evaluated once: their predictions for the
    retain sample and D_test are in the cache on disk, as they are the same in every command. Everything else that
    several runs share, such as their predictions for D_f, is kept in memory for the command.

    Under torchrun all processes call the same methods with equal models and share the predictions. The first process
    alone computes the metrics.
    """

    setup: Setup
    batch_size: int
    workers: int
    cache: Cache
    groups: tuple[EvaluationGroup, ...]
    references: ReferenceModels
    _memory: dict[object, object] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The keys of all metrics in a record. Those that need reference models count only if these are given."""
        available = {None, *self.references.sha256}
        keys = ((name, group.compared_with.get(name)) for group in self.groups for name in group.names)
        return [*METRICS, *(name for name, models in keys if models in available)]

    @cached_property
    def retain_sample(self) -> Tensor:
        """Indices of the training images that are measured: all, or a random sample that depends on its size alone."""
        num_train, size = len(self.setup.images.train), self.setup.retain_sample
        if size is None or size >= num_train:
            return torch.arange(num_train)
        return torch.randperm(num_train, generator=seeds.generator(0, "retain sample"))[:size].sort().values

    def check(self, run: Run) -> None:
        """Raise InputError if the run forgets every image of the retain sample."""
        if not _retained(run, self.retain_sample).any():
            raise InputError(
                f"--retain-sample is {self.setup.retain_sample}, and all of these images are to be forgotten",
                "use a larger sample",
            )

    def data_sha256(self, run: Run) -> str:
        """Return a hash of images and labels on which a record depends: D_test and D_r, or the retain sample of it.

        If the method of the run trains on D_r, all training images count. Image files count with their names and sizes.
        """
        train = self.setup.images.train if "retain" in run.method.needs else self._splits["retain_sample"]
        parts = [self._content("train", train), self._content("test", self.setup.images.test)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _content(self, name: str, split: Split) -> str:
        """Return a hash of the images and labels of a part of the data set, which is computed once."""
        known, key = self.setup.images.digests, (name, len(split))  # a retain sample depends on its size alone
        if key not in known:
            images = split.images.listing_sha256() if split.on_disk else split.sha256()
            known[key] = f"{images} {tensors_sha256({'labels': split.labels})}"
        return known[key]

    def retain_set(self, run: Run) -> Split:
        """Return D_r: the training images that neither this nor an earlier step of the run forgets."""
        indices = torch.arange(len(self.setup.images.train))
        return self.setup.images.train.subset(indices[_retained(run, indices)])

    def predict(self, model: nn.Module, description: str) -> Predictions:
        """Predict the retain sample and D_test; `description` labels the progress. Raises Diverged."""
        started = devices.clock(self.setup.device)
        with progress_bar(description, sum(map(len, self._splits.values()))) as advance:
            result = {name: self._predict(model, split, advance) for name, split in self._splits.items()}
        return Predictions(**result, seconds=devices.clock(self.setup.device) - started)

    def original(self) -> Predictions:
        """Return the predictions of the original model, from the cache if possible."""
        return self._once(("predictions", "original"), lambda: self._cached(self.setup.classifier, "measure before"))

    def evaluate(
        self, run: Run, model: nn.Module, after: Predictions | None
    ) -> tuple[dict[str, float | None], dict[str, Tensor]]:
        """Evaluate the model that a run ended with.

        after    the model's predictions; None if the run diverged
        returns  accuracies and metrics under their keys of a record, and predictions under their names in the .npz

        Raises Diverged if the model's logits for D_f are not finite.
        """
        key = "original on D_f", run.settings["forget_sha256"], len(run.forget)
        forget = self._once(key, lambda: self._predict_steps(run, self.setup.classifier))
        classes = {"before": self._by_part(run, forget, self.original())}
        if after:
            classes["after"] = self._by_part(run, self._predict_steps(run, model), after)
            if self.references.retrained and any(group.retrained for group in self.groups):
                self._retrained()  # by all processes together, before the first one needs them
        predictions = {f"{part}_{when}": value for when, parts in classes.items() for part, value in parts.items()}
        if self.setup.retain_sample is not None:
            predictions["retain_indices"] = self.retain_sample[_retained(run, self.retain_sample)]
        labels = self._labels(run)
        row = self._accuracies(run, labels, classes) | dict.fromkeys(self.metrics)
        if after and distributed.is_first():
            row |= self._metrics(self._outputs(run, model, labels, classes))
        return row, predictions

    @cached_property
    def _splits(self) -> dict[str, Split]:
        train = self.setup.images.train
        if len(self.retain_sample) < len(train):
            train = train.subset(self.retain_sample)
        return {"retain_sample": train, "test": self.setup.images.test}

    def predict_forget(self, run: Run, model: nn.Module) -> Tensor:
        """Predict D_f as `evaluate` does, but in one process."""
        return self._predict(model, run.forget.split, shared=False)

    def _predict(self, model: nn.Module, split: Split, progress: Progress | None = None, shared: bool = True) -> Tensor:
        options = {"batch_size": self.batch_size, "workers": self.workers, "shared": shared, "progress": progress}
        return accuracy.predict(model, split.images, **options)

    @exactly()
    def _predict_steps(self, run: Run, model: nn.Module) -> Classes:
        """Predict D_f and, in a continual run, D_f of the earlier steps: in fp32, as it decides what is forgotten."""
        classes = {"forget": self._predict(model, run.forget.split)}
        return classes | ({"forget_earlier": self._predict(model, run.earlier.split)} if run.earlier else {})

    def _by_part(self, run: Run, forget: Classes, predictions: Predictions) -> Classes:
        retain = predictions.retain_sample[_retained(run, self.retain_sample)]
        return forget | {"retain": retain, "test": predictions.test}

    def _labels(self, run: Run) -> Classes:
        """Return the true labels of each part; for images from a folder, the labels to move away from."""
        labels = {"forget": run.forget.split.labels}
        if run.earlier:
            labels["forget_earlier"] = run.earlier.split.labels
        train = self.setup.images.train.labels.cpu()[self.retain_sample]
        labels |= {"retain": train[_retained(run, self.retain_sample)], "test": self.setup.images.test.labels}
        return {part: values.cpu() for part, values in labels.items()}

    def _accuracies(self, run: Run, labels: Classes, classes: dict[str, Classes]) -> dict[str, float | None]:
        row = dict.fromkeys(("acc_forget_earlier", "acc_relabel", "acc_retain_low", "acc_retain_high"))
        row |= {f"acc_{part}": None for part in labels}
        row["retain_measured"] = len(labels["retain"])
        for when, suffix in (("before", "_before"), ("after", "")):
            for part, values in classes.get(when, {}).items():
                row[f"acc_{part}{suffix}"] = accuracy.accuracy(values, labels[part])
        if "after" in classes and run.forget.new_labels is not None:
            row["acc_relabel"] = accuracy.accuracy(classes["after"]["forget"], run.forget.new_labels)
        if "after" in classes and self.setup.retain_sample is not None:
            interval = accuracy.interval(classes["after"]["retain"], labels["retain"])
            row["acc_retain_low"], row["acc_retain_high"] = interval
        return row

    def _metrics(self, outputs: RunOutputs) -> dict[str, float | None]:
        values = {name: float(function(outputs)) for name, function in METRICS.items()}
        with progress_bar("evaluate", len(self.groups)) as advance:
            for group in self.groups:
                values |= group.compute(outputs)
                advance(1)
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def _outputs(self, run: Run, model: nn.Module, labels: Classes, classes: dict[str, Classes]) -> RunOutputs:
        digest, references = run.settings["forget_sha256"], self.references
        return RunOutputs(
            model,
            self.setup.classifier,
            labels,
            classes["before"],
            classes["after"],
            logits=cache(lambda part: self._logits_of(run, model, part)),
            split=lambda part: self._split_of(run, part),
            once=lambda name, compute: self._once((name, digest), compute),
            retrained=self._reference_outputs(run, references.retrained) if references.retrained else None,
            references=tuple(self._reference_outputs(run, reference) for reference in references.references),
            workers=self.workers,
            new_labels=run.forget.new_labels,
        )

    def _reference_outputs(self, run: Run, reference: ReferenceModel) -> ReferenceOutputs:
        """Return what computes the outputs of a reference model; runs share them where their images are the same."""

        def logits(part: str) -> Tensor:
            key = "logits", reference.model, part, run.settings["forget_sha256"] if part == "forget" else None
            return self._once(key, lambda: self._logits_of(run, reference.model, part))

        def classes(part: str) -> Tensor:
            if part == "forget":
                return logits(part).argmax(1)
            return self._by_part(run, {}, self._retrained())[part]

        return ReferenceOutputs(reference.model, classes, logits)

    def _split_of(self, run: Run, part: str) -> Split:
        if part == "retain":
            return self.retain_set(run)
        return run.forget.split if part == "forget" else self.setup.images.test

    def _logits_of(self, run: Run, model: nn.Module, part: str) -> Tensor:
        options = {"batch_size": self.batch_size, "workers": self.workers}
        return torch.cat(list(accuracy.logits(model, self._split_of(run, part).images, **options)))

    def _retrained(self) -> Predictions:
        model = self.references.retrained.model
        return self._once(("predictions", "retrained"), lambda: self._cached(model, "measure retrained"))

    def _cached(self, model: nn.Module, description: str) -> Predictions:
        """Return a model's predictions from the cache on disk, or compute and cache them."""
        started, key, known = devices.clock(self.setup.device), None, None
        with contextlib.ExitStack() as stack:
            if distributed.is_first() and self.cache.folder is not None:
                digests = {name: split.sha256() for name, split in self._splits.items()}
                key = {"kind": "predictions", "precision": self.setup.hyper["precision"]}
                key |= {"net": model_fingerprint(model)} | environment(self.setup.device)
                key |= {"train": digests["retain_sample"], "test": digests["test"]}
                stack.enter_context(self.cache.lock(key))  # waits for another command that computes the same
                known = self.cache.get(key)
            known = distributed.broadcast(lambda: known)
            if known:
                seconds = devices.clock(self.setup.device) - started
                return Predictions(known["train"], known["test"], seconds)
            result = self.predict(model, description)
            if key:
                self.cache.put(key, {"train": result.retain_sample, "test": result.test})
                self.cache.trim()
        return result

    def _once(self, key: object, compute: Callable[[], Value]) -> Value:
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]


def _retained(run: Run, indices: Tensor) -> Tensor:
    """Return which of these training images (n,) bool are in D_r."""
    return ~torch.isin(indices, run.indices)
