"""The runs of a command, planned: what decides each of them, and where it is recorded."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from l2ul import METHOD_VERSION
from l2ul.data import images as image_sets
from l2ul.data.forget_set import ForgetSet
from l2ul.experiments import records
from l2ul.methods import fixed_length, registry

SGD_FLAGS = ("unlearn_lr", "momentum", "weight_decay", "batch_size", "bn")
ATTACK_FLAGS = ("num_adv_images", "pgd_eps", "pgd_alpha", "pgd_iter")
DISTILL_FLAGS = (
    *("distill_lr", "distill_steps", "distill_cycles", "distill_forget", "distill_mixes"),
    *("distill_logits", "distill_features", "distill_growth", "distill_margin"),
)
NEEDS_FLAGS = {  # the hyper-parameters that a method depends on, by what it needs
    "adv": (*ATTACK_FLAGS, "adv_batch_size", "adv_dtype"),
    "importance": ("reg_lamb",),
    "retain": ("adv_batch_size",),
    "noise": ("noise_growth",),
    "teacher": DISTILL_FLAGS,
}
LOOP_FLAGS = (*SGD_FLAGS, "max_passes", "adv_batch_size", "reg_lamb", "noise_growth", "course", *DISTILL_FLAGS)
HYPER_PARAMETERS = (*LOOP_FLAGS, *ATTACK_FLAGS, "adv_dtype", "precision")
# These came later: they are part of an id only where they matter, so that older records keep theirs.
LATER = {
    **dict.fromkeys(("noise_growth", "continual_size", "retain_sample", "age_grouping", "split_seed")),
    **dict.fromkeys(("train_sha256", "method_code", "course", *DISTILL_FLAGS)),
    "adv_dtype": "float32",
    "precision": "fp32",
}


def used_by(method: registry.Method) -> set[str]:
    """The hyper-parameters that decide a method's result."""
    if not method.terms:
        return set()
    if method.settings:
        return {"precision", "bn"}
    if "teacher" in method.needs:
        loop = ()
    else:
        loop = ("max_passes",) if "noise" in method.needs else ("max_passes", *SGD_FLAGS)
    return {"precision", *loop}.union(*(NEEDS_FLAGS[need] for need in method.needs))


@dataclass(frozen=True, eq=False)
class Run:
    """One row of a table: a method on one D_f. `settings` is all that decides its result; its id is their hash.

    Of a continual run, a Run is one step: `earlier` are the images of the steps before, which `previous` ends.
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
        """Of this D_f among all images that are to be forgotten."""
        return self.k - len(self.forget)

    @property
    def k(self) -> int:
        """Images forgotten once the run is done."""
        return self.settings["k"]

    @property
    def is_step(self) -> bool:
        return self.settings["continual_step"] is not None


@dataclass(frozen=True)
class Setup:
    """What all runs of a command share, and what decides their results.

    classifier     with `name`, `sha256` of its weights, and mean and std in `normalize` (see models.Classifier)
    hyper          every one of HYPER_PARAMETERS
    retain_sample  how many training images stand for D_r when measuring; None: all
    described      further keys of every record, which decide nothing
    model_suffix   of the file of an unlearned net
    """

    images: image_sets.Images
    classifier: nn.Module
    goal: str
    hyper: dict[str, object]
    result_dir: Path
    retain_sample: int | None = None
    described: dict[str, object] = field(default_factory=dict)
    model_suffix: str = ".safetensors"

    def plan(
        self, names: list[str], sizes: list[int], seed: int, forget: ForgetSet, step_size: int | None = None
    ) -> list[Run]:
        """The runs of a seed: each k of `sizes` with each method, on the first k images of `forget`.

        With `step_size`, the images of the largest k arrive so many at a time, and each step of it is a run.
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

    def _run(
        self,
        name: str,
        seed: int,
        forget: ForgetSet,
        digest: str,
        step: tuple[int, int] | None = None,
        previous: Run | None = None,
    ) -> Run:
        """The run of a method on `forget`; of step (number, size) of a continual run, on the last `size` of it."""
        method = registry.get(name, self.goal)
        settings = self._settings(method, len(forget), seed, digest, step)
        hashed = {key: value for key, value in settings.items() if key not in LATER or value not in (None, LATER[key])}
        files = records.RunFiles(self.result_dir, records.run_id(hashed), self.model_suffix)
        if step is None:
            return Run(method, seed, forget, settings, files)
        seen = len(forget) - step[1]
        return Run(method, seed, forget[seen:], settings, files, forget[:seen], previous)

    def _settings(
        self, method: registry.Method, k: int, seed: int, digest: str, step: tuple[int, int] | None
    ) -> dict[str, object]:
        used = used_by(method)
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
            **{name: self.hyper[name] if name in used else None for name in HYPER_PARAMETERS},
            "course": fixed_length.told(fixed_length.overridden(method.settings, self.hyper["course"]))
            if method.settings
            else None,
            **statistics,
            "num_train": len(images.train),
            "num_test": len(images.test),
            "forget_sha256": digest,
            "method_version": METHOD_VERSION,
            "continual_size": step[1] if step else None,
            "retain_sample": self.retain_sample,
            **dict.fromkeys(("image_size", "age_grouping", "split_seed")),
            **images.settings,
            "train_sha256": images.train_sha256,
            "method_code": method.code_sha256(),
        }
