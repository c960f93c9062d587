"""The runs of a command: what decides each of them, and where it is recorded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from l2ul import METHOD_VERSION, models
from l2ul.common.choices import HUB_OPTIONS
from l2ul.common.errors import InputError
from l2ul.common.text import shortened
from l2ul.data.forget_set import ForgetSet
from l2ul.data.images import Images
from l2ul.data.surrogate import Surrogate
from l2ul.experiments import records
from l2ul.methods import registry
from l2ul.methods import settings as setting_values
from l2ul.methods.settings import SHARED, Settings

# Keys that were added after the first records. An id depends on them only if they are not null, so that older records
# keep theirs. For settings, their declaration says the same, see `Setting.in_id`.
LATER = (
    *("continual_size", "retain_sample", "age_grouping", "split_seed", "train_sha256", "method_code", "course"),
    *("method_settings", "method_revision", "surrogate", "surrogate_sha256", "test_without"),
    *HUB_OPTIONS,
)


def identity(settings: Mapping[str, object]) -> str:
    """Return the id of a run from its settings, see `Run.settings`."""

    def is_part(name: str, value: object) -> bool:
        return setting_values.is_part_of_id(name, value) if name in SHARED else value is not None or name not in LATER

    return records.run_id({name: value for name, value in settings.items() if is_part(name, value)})


@dataclass(frozen=True, eq=False)
class Run:
    """A method on a forget set.

    settings  everything that decides the result, by the keys of records; the id of the run is a hash of it
    earlier   in a step of a continual run, the images of the steps before
    previous  in such a step, the step before
    """

    method: registry.Method
    seed: int
    forget: ForgetSet
    settings: dict[str, object]
    files: records.RunFiles
    earlier: ForgetSet | None = None
    previous: "Run | None" = None

    @property
    def first_position(self) -> int:
        """Return the position of the first image of D_f among all images of a continual run."""
        return self.k - len(self.forget)

    @property
    def k(self) -> int:
        """Return the number of images that are forgotten once the run is done."""
        return self.settings["k"]

    @property
    def indices(self) -> Tensor:
        """Return the indices (n,) in the training set of the images that the run and its earlier steps forget."""
        return torch.cat([part.indices for part in (self.forget, self.earlier) if part is not None])

    @property
    def is_step(self) -> bool:
        return self.settings["continual_step"] is not None


@dataclass(frozen=True)
class Setup:
    """What all runs of a command share.

    classifier     the original model, with `name`, `sha256` of its weights, and mean and std in `normalize` (see
                   models.Classifier)
    hyper          the value of every setting in `settings.SHARED`, and `method_settings`, a dictionary of settings that
                   methods declare themselves
    retain_sample  number of images of D_r that accuracies are measured on; None: all
    surrogate      images that stand for D_r in the methods with a teacher
    described      further keys of every record, which decide no result
    """

    images: Images
    classifier: nn.Module
    goal: str
    hyper: dict[str, object]
    result_dir: Path
    retain_sample: int | None = None
    surrogate: Surrogate | None = None
    described: dict[str, object] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return next(self.classifier.parameters()).device

    def plan(
        self, names: list[str], sizes: list[int], seed: int, forget: ForgetSet, step_size: int | None = None
    ) -> list[Run]:
        """Return the runs of a seed: every method with every k of `sizes`, on the first k images of `forget`.

        With `step_size`, return the steps of continual runs: `max(sizes)` images arrive `step_size` at a time.
        """
        if step_size is None:
            digests = {k: forget[:k].sha256() for k in sorted(set(sizes))}
            return [self._run(name, seed, forget[:k], digest) for k, digest in digests.items() for name in names]
        ends = range(step_size, max(sizes) + 1, step_size)
        digests = [forget[:end].sha256() for end in ends]
        runs = []
        for name in names:
            run = None
            for step, (end, digest) in enumerate(zip(ends, digests, strict=True), start=1):
                run = self._run(name, seed, forget[:end], digest, (step, step_size), run)
                runs.append(run)
        return runs

    def loop_settings(self, run: Run) -> Settings:
        """Return the settings of the loop of a run."""
        own = self.hyper["method_settings"]
        return Settings.of(self.hyper, method_settings=own, seed=run.seed, first_position=run.first_position)

    def _run(
        self,
        name: str,
        seed: int,
        forget: ForgetSet,
        digest: str,
        step: tuple[int, int] | None = None,
        previous: Run | None = None,
    ) -> Run:
        """Return the run of a method on `forget`, or for a step (number, size) on the last `size` images of it."""
        method = registry.get(name, self.goal)
        settings = self._settings(method, len(forget), seed, digest, step)
        for key, value in ((records.lookup(name), value) for name, value in settings.items()):
            if not key.accepts(value):
                raise InputError(
                    f"{key.name} is {shortened(repr(value))}", f"expected {key.expected}, as records require"
                )
        files = records.RunFiles(self.result_dir, identity(settings), models.saved_suffix(self.classifier.name))
        if step is None:
            return Run(method, seed, forget, settings, files)
        seen = len(forget) - step[1]
        return Run(method, seed, forget[seen:], settings, files, forget[:seen], previous)

    def _settings(
        self, method: registry.Method, k: int, seed: int, digest: str, step: tuple[int, int] | None
    ) -> dict[str, object]:
        used = method.all_settings
        own = setting_values.override(method.settings, self.hyper["method_settings"])
        surrogate = self.surrogate if "teacher" in method.needs else None
        values = self.hyper | {"k": step[1] if step else k}
        images, normalize = self.images, self.classifier.normalize
        statistics = {
            name: " ".join(f"{value:g}" for value in getattr(normalize, name).flatten().tolist())
            for name in ("mean", "std")
        }
        return {
            "dataset": images.name,
            "model": self.classifier.name,
            "checkpoint_sha256": self.classifier.sha256,
            "method": method.name,
            "needs_retain": "retain" in method.needs,
            "goal": self.goal,
            "k": k,
            "seed": seed,
            "continual_step": step[0] if step else None,
            **{
                name: self.hyper[name] if name in used and setting_values.has_effect(name, values) else None
                for name in SHARED
            },
            **(
                {"course": setting_values.to_text(own), "method_settings": None}
                if method.is_fixed_length
                else _of_own_flags(own)
            ),
            **statistics,
            "num_train": len(images.train),
            "num_test": len(images.test),
            "forget_sha256": digest,
            "method_version": METHOD_VERSION,
            "method_revision": method.revision,
            "continual_size": step[1] if step else None,
            "retain_sample": self.retain_sample,
            "surrogate": surrogate and surrogate.name,
            "surrogate_sha256": surrogate and surrogate.sha256,
            "test_without": self.surrogate.name
            if self.surrogate and self.surrogate.of_test and not surrogate
            else None,
            **dict.fromkeys(("image_size", "age_grouping", "split_seed")),
            **images.settings,
            "train_sha256": images.train_sha256,
            "method_code": method.code_sha256(),
        }


def _of_own_flags(values: Mapping[str, object]) -> dict[str, object]:
    """Return the keys of a record for settings that a method declares with flags, and one that lists their names.

    Raises InputError if a setting has the name of another key.
    """
    clash = next((name for name in values if name in records.SCHEMA), None)
    if clash:
        raise InputError(f"a method declares the setting {clash}, which is a key of every record", "rename the setting")
    return {"course": None, "method_settings": " ".join(values) or None, **values}
