"""What is measured of a run: accuracies on D_f, D_r and D_test before and after, and the classes they come from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from l2ul.common import device as device_module
from l2ul.common import distributed, seeds
from l2ul.common.cache import Cache, environment, fingerprint
from l2ul.common.errors import InputError
from l2ul.common.progress import progress_bar
from l2ul.data import datasets
from l2ul.data import images as image_sets
from l2ul.experiments.reference_models import Peer, Peers, gone
from l2ul.experiments.runs import Run, Setup
from l2ul.metrics import accuracy
from l2ul.metrics.registry import METRICS, Evaluation, Measured, Seen

Value = TypeVar("Value")


@dataclass(frozen=True)
class Predictions:
    """What a classifier calls the training images that stand for D_r and the test images, and the seconds it took."""

    train: Tensor
    test: Tensor
    seconds: float


@dataclass(frozen=True)
class Measuring:
    """How nets are measured on the data set of a setup: `batch_size` images at once, decoded by so many workers.

    cache        where what the classifier itself calls the images is kept
    evaluations  what is measured beside METRICS
    peers        nets that never saw D_f, for evaluations that need such
    """

    setup: Setup
    batch_size: int
    workers: int = 0
    cache: Cache = field(default_factory=Cache)
    evaluations: tuple[Evaluation, ...] = ()
    peers: Peers = field(default_factory=Peers)
    _known: dict[object, object] = field(default_factory=dict)  # what this command has computed once

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics of a record: of those that need other nets, the ones whose nets are there."""
        there = {None, *self.peers.described}
        found = ((name, each.against.get(name)) for each in self.evaluations for name in each.names)
        return [*METRICS, *(name for name, against in found if against in there)]

    @property
    def device(self) -> torch.device:
        return next(self.setup.classifier.parameters()).device

    @cached_property
    def stand_in(self) -> Tensor:
        """Indices of the training images that are measured: all, or a sample that depends on its size alone."""
        num_train, wanted = len(self.setup.images.train), self.setup.retain_sample
        if wanted is None or wanted >= num_train:
            return torch.arange(num_train)
        return torch.randperm(num_train, generator=seeds.generator(0, "retain sample"))[:wanted].sort().values

    @cached_property
    def _splits(self) -> dict[str, image_sets.Split]:
        """What stands for D_r, and the test images."""
        train = self.setup.images.train
        if len(self.stand_in) < len(train):
            train = train.subset(self.stand_in)
        return {"train": train, "test": self.setup.images.test}

    def predict(self, model: nn.Module, what: str) -> Predictions:
        """The model's classes for what stands for D_r and for the test images, in one pass.

        Each process of a torchrun looks at some of the images, once the first has called the others, see `helping`.
        """
        started = device_module.clock(self.device)
        distributed.call_others("predict", distributed.state(model))
        with progress_bar(what, sum(map(len, self._splits.values()))) as advance:
            options = self._pass | {"shared": True, "progress": advance}
            found = {part: accuracy.predict(model, split.images, **options) for part, split in self._splits.items()}
        return Predictions(**found, seconds=device_module.clock(self.device) - started)

    def before(self) -> Predictions:
        """Those of the classifier as it was given."""
        return self.given(self.setup.classifier, "measure before")

    def given(self, model: nn.Module, what: str) -> Predictions:
        """Those of a net that no run changes: computed once for the same weights and images, then cached."""
        return self._once(("predictions", model), lambda: self._given(model, what))

    def _given(self, model: nn.Module, what: str) -> Predictions:
        if self.cache.folder is None:
            return self.predict(model, what)
        started = device_module.clock(self.device)
        key = {"kind": "predictions", "precision": self.setup.hyper["precision"], "net": fingerprint(model)}
        key |= environment(self.device) | {part: split.sha256() for part, split in self._splits.items()}
        with self.cache.lock(key):  # or wait for another process that is at it
            kept = self.cache.get(key)
            if kept:
                return Predictions(**kept, seconds=device_module.clock(self.device) - started)
            found = self.predict(model, what)
            self.cache.put(key, {"train": found.train, "test": found.test})
            self.cache.trim()
        return found

    def _once(self, key: object, compute: Callable[[], Value]) -> Value:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def classes(self, model: nn.Module, images: Tensor | datasets.FolderImages) -> Tensor:
        """The classes (N,), on the CPU, that the model gives the images."""
        return accuracy.predict(model, images, **self._pass)

    @property
    def _pass(self) -> dict[str, object]:
        """How images are passed through a net, as options of `evaluate.predict` and `evaluate.logits`."""
        return {"batch_size": self.batch_size, "workers": self.workers}

    def of_run(
        self, run: Run, before: Predictions, model: nn.Module, after: Predictions | None
    ) -> tuple[dict[str, float | None], dict[str, Tensor]]:
        """Accuracies of a run under their keys of a record, and the classes under the names of its `.npz`.

        `before` is of the net before any run, `after` of the model that this run ended with; None if it diverged.
        """
        labels = self._labels(run)
        called = {"before": self._called(run, self.setup.classifier, before)}
        if after:
            called["after"] = self._called(run, model, after)
        predictions = {f"{part}_{when}": found for when, parts in called.items() for part, found in parts.items()}
        if self.setup.retain_sample is not None:
            predictions["retain_indices"] = self.stand_in[self._kept(run, self.stand_in)]
        row = self._accuracies(run, labels, called) | dict.fromkeys(self.metrics)
        if after:
            measured = self._measured(run, model, labels, called)
            found = {name: float(function(measured)) for name, function in METRICS.items()}
            with progress_bar("evaluate", len(self.evaluations)) as advance:
                for evaluation in self.evaluations:
                    found |= evaluation.compute(measured)
                    advance(1)
            row |= {name: value if math.isfinite(value) else None for name, value in found.items()}
        return row, predictions

    def _measured(self, run: Run, model: nn.Module, labels: dict, called: dict) -> Measured:
        digest = run.settings["forget_sha256"]

        def split(part: str) -> image_sets.Split:
            if part == "retain":
                return self.retain(run)
            return run.forget.split if part == "forget" else self.setup.images.test

        def logits(net: nn.Module, part: str) -> Tensor:
            return torch.cat(list(accuracy.logits(net, split(part).images, **self._pass)))

        def seen(peer: Peer) -> Seen:
            def its_logits(part: str) -> Tensor:
                key = ("logits", peer.model, part, digest if part == "forget" else None)
                return self._once(key, lambda: logits(peer.model, part))

            def classes(part: str) -> Tensor:
                if part == "forget":
                    return its_logits(part).argmax(1)
                known = self.given(peer.model, "measure retrained")
                return known.test if part == "test" else known.train[self._kept(run, self.stand_in)]

            return Seen(peer.model, classes, its_logits)

        return Measured(
            model,
            labels,
            called["before"],
            called["after"],
            self.setup.classifier,
            logits=cache(lambda part: logits(model, part)),
            split=split,
            once=lambda name, compute: self._once((name, digest), compute),
            retrained=seen(self.peers.retrained) if self.peers.retrained else None,
            references=tuple(map(seen, self.peers.references)),
            workers=self.workers,
        )

    def _accuracies(self, run: Run, labels: dict[str, Tensor], called: dict[str, dict[str, Tensor]]) -> dict:
        row = dict.fromkeys(("acc_forget_earlier", "acc_relabel", "acc_retain_low", "acc_retain_high"))
        row |= {f"acc_{part}": None for part in labels}
        row["retain_measured"] = len(labels["retain"])
        for when, suffix in (("before", "_before"), ("after", "")):
            for part, found in called.get(when, {}).items():
                row[f"acc_{part}{suffix}"] = accuracy.accuracy(found, labels[part])
        if "after" in called and run.forget.new_labels is not None:
            row["acc_relabel"] = accuracy.accuracy(called["after"]["forget"], run.forget.new_labels)
        if "after" in called and self.setup.retain_sample is not None:
            interval = accuracy.interval(called["after"]["retain"], labels["retain"])
            row["acc_retain_low"], row["acc_retain_high"] = interval
        return row

    def _labels(self, run: Run) -> dict[str, Tensor]:
        """True labels of what is measured, or for images from elsewhere those to get away from."""
        found = {"forget": run.forget.split.labels}
        if run.earlier:
            found["forget_earlier"] = run.earlier.split.labels
        train = self.setup.images.train.labels.cpu()[self.stand_in]
        found |= {"retain": train[self._kept(run, self.stand_in)], "test": self.setup.images.test.labels}
        return {part: labels.cpu() for part, labels in found.items()}

    def _called(self, run: Run, model: nn.Module, predictions: Predictions) -> dict[str, Tensor]:
        """What the model calls the images of D_f, of earlier steps' D_f, of D_r and of D_test."""
        found = {"forget": self.classes(model, run.forget.split.images)}
        if run.earlier:
            found["forget_earlier"] = self.classes(model, run.earlier.split.images)
        return found | {"retain": predictions.train[self._kept(run, self.stand_in)], "test": predictions.test}

    def check(self, run: Run) -> None:
        """Raise InputError where nothing would stand for D_r."""
        if not self._kept(run, self.stand_in).any():
            raise InputError(
                f"--retain-sample is {self.setup.retain_sample}, and all of these images are to be forgotten; take more"
            )

    def retain(self, run: Run) -> image_sets.Split:
        """D_r: the training images that this and earlier steps do not forget."""
        every = torch.arange(len(self.setup.images.train))
        return self.setup.images.train.subset(every[self._kept(run, every)])

    def _kept(self, run: Run, indices: Tensor) -> Tensor:
        """Which of these training images are in D_r: those that this and earlier steps do not forget."""
        return ~torch.isin(indices, gone(run))
