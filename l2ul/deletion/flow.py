"""The flow of a deletion request: of files for `main_forget.py`, of a module and tensors for `l2ul.forget`.

Both make a `Deletion`, open the model, read the images, and call `check`, `prepare` and `Prepared.carry_out`. Then they
write or return the unlearned model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from l2ul import ProgressBar
from l2ul.common import precision as precisions
from l2ul.common.choices import AUTO, BF16
from l2ul.common.errors import InputError, Wording, option, worded
from l2ul.deletion import plausibility, search
from l2ul.deletion.candidates import Candidate, TimeBudget, Unlearner
from l2ul.deletion.deployed_model import DeployedModel
from l2ul.deletion.request import Request
from l2ul.methods import registry
from l2ul.methods.settings import ATTACK, SHARED, Value
from l2ul.metrics import preflight, robustness
from l2ul.unlearn import Settings

FREE = ("robust", "loop_precision", "distill_frozen")  # settings that the user may choose and still have a search


@dataclass(frozen=True)
class Result:
    """What a deletion achieved.

    candidates  all that were run, best first
    best        of the candidates; None if none is better than the original model
    model       of the best one, with its weights as they will be in the file; else the original model
    early_end   why the search ended early, see `search.find_candidates`
    """

    candidates: list[Candidate]
    best: Candidate | None
    model: nn.Module
    early_end: str | None


@dataclass(frozen=True)
class Prepared:
    """A checked request with what carries it out.

    unlearner  runs the method on it
    settings   of the first candidate: those of the `Deletion`, with the precision of the loop
    fixed      see `Deletion`
    """

    unlearner: Unlearner
    settings: Settings
    fixed: Mapping[str, Value]

    def carry_out(
        self,
        budget: TimeBudget,
        keep_images: Tensor | None,
        on_candidate: Callable[[Candidate], object] = lambda candidate: None,
    ) -> Result:
        """Search settings that forget all images with the least damage; arguments as in `search.find_candidates`."""
        unlearner, candidates, early_end = self.unlearner, [], None
        stored = unlearner.forgotten_as_stored(unlearner.model)
        forgotten = unlearner.forgotten(unlearner.model, stored=stored)
        if not forgotten.all():
            options = {"fixed": self.fixed, "keep_images": keep_images, "on_candidate": on_candidate}
            candidates, early_end = search.find_candidates(unlearner, self.settings, budget, **options)
        best = next((one for one in candidates[:1] if one.is_better_than(stored, forgotten)), None)
        return Result(candidates, best, unlearner.as_written(best.model if best else unlearner.model), early_end)


@dataclass(frozen=True)
class Deletion:
    """How a request is carried out. Raises InputError for a method or settings that no request can have.

    values         settings of the method, as names and texts; one that is not in FREE replaces the search
    has_surrogate  whether images stand for the training images, which only methods with a teacher use
    also           changed copies of the images that are to be forgotten too, names of `choices.CHANGES`

    The others are those of an `Unlearner`.
    """

    method: str
    values: Sequence[tuple[str, str]]
    seed: int
    has_surrogate: bool = False
    also: Sequence[str] = ()
    max_steps: int | None = None
    progress: ProgressBar | None = None

    def __post_init__(self) -> None:
        self._check_method()
        for name in self._chosen.keys() & ATTACK.keys():
            if name == "precision":
                loop = Wording("--setting loop_precision=bf16", 'loop_precision="bf16"')
                raise InputError(
                    "setting precision cannot be changed here: deletion requests measure in fp32 and search in the "
                    "fastest precision of the device",
                    "leave it out",
                    worded("choose that of the loop with {}", loop),
                )
            problem = f"setting {name} cannot be changed here: deletion requests use a fixed attack"
            raise InputError(problem, "leave it out")
        if self._chosen.get("bn", "eval") != "eval":
            problem = "setting bn is train, but deletion requests leave the statistics of batch-norm as they are"
            raise InputError(problem, "leave it out")

    @cached_property
    def _chosen(self) -> dict[str, Value]:
        return registry.parse_settings(self.values, [self.method])

    @property
    def fixed(self) -> dict[str, Value]:
        """Those of `values` that replace the search."""
        return {name: value for name, value in self._chosen.items() if name not in FREE}

    @property
    def settings(self) -> Settings:
        """The settings of the first candidate. A method with robust forgets images as they are used by default."""
        loop = {name: value for name, value in self._chosen.items() if name in SHARED}
        own = {name: value for name, value in self._chosen.items() if name not in SHARED}
        loop = {"bn": "eval", "robust": int("robust" in registry.get(self.method).all_settings)} | loop
        return Settings(**loop, seed=self.seed, method_settings=own)

    def _check_method(self, goal: str | None = None) -> None:
        """Raise InputError unless the method can carry out a request: it forgets, without D_r, and is for the goal."""
        method, needs = self.method, registry.get(self.method, goal).needs
        if method == "before" or "retain" in needs:
            why = "forgets nothing" if method == "before" else "trains on the retain set, which a request does not have"
            leave_out = worded("leave out {}", option("method"))
            raise InputError(f"method {method} {why}", leave_out, "name one such as distill or adv_imp")
        if self.has_surrogate and "teacher" not in needs:
            problem = worded("{} is for methods with a teacher such as distill, not {}", option("surrogate"), method)
            raise InputError(problem, "leave it out")

    def check(self, model: DeployedModel, request: Request, min_known: float | None, single_label: bool) -> None:
        """Raise InputError if the labels do not fit the model, see `plausibility.check`, or the goal the method."""
        plausibility.check(request, model, min_known, single_label)
        self._check_method(request.forget.goal)

    def prepare(self, model: DeployedModel, request: Request, surrogate: Tensor | None) -> Prepared:
        """Return a checked request with what carries it out, in the fastest precisions.

        On a CPU the loop runs in bf16 if a step of the model is faster in it, see `preflight.fastest_precision`. Raises
        InputError if `values` has bf16 and the device or the model cannot compute in it.
        """
        device, settings = request.images.device, self.settings
        is_chosen = "loop_precision" in self._chosen
        if is_chosen and settings.loop_precision == BF16:
            precisions.require(device, BF16, Wording("use --setting loop_precision=full", 'use loop_precision="full"'))
            preflight.check_model(model.classifier, request.images, BF16)
        if not is_chosen and precisions.resolve(AUTO, device) == AUTO:  # on a CPU with bf16
            fastest, _ = preflight.fastest_precision(model.classifier, request.images, trains=True)
            settings = replace(settings, loop_precision=BF16) if fastest == BF16 else settings
        of_search = BF16 if settings.loop_precision == BF16 else precisions.resolve(None, device)
        unlearner = self.unlearner(model, request, surrogate, bool(settings.robust), of_search)
        return Prepared(unlearner, settings, self.fixed)

    def unlearner(
        self, model: DeployedModel, request: Request, surrogate: Tensor | None, as_used: bool, precision: str
    ) -> Unlearner:
        """Return what runs the method on a request; arguments as in `Unlearner`."""
        return Unlearner(
            model=model.classifier,
            forget=request.forget,
            train_set=robustness.with_changed_images(request.images, request.forget, self.also),
            method=self.method,
            num_classes=len(request.class_names),
            seed=self.seed,
            as_written=model.as_written,
            progress=self.progress,
            as_used=as_used,
            max_steps=self.max_steps,
            precision=precision,
            surrogate=surrogate,
            earlier=request.recognised_earlier,
        )
