"""Unlearning on tensors: attack and importance if the method needs them, then the loop.

The loop takes steps of the method until all of D_f is forgotten, the limit of steps is reached or a number is not
finite. It is the same for all methods, which differ in their `Procedure` (see `l2ul.methods`).
"""

from collections.abc import Callable, Sequence
import contextlib
import copy
from dataclasses import dataclass, field
import functools
import time

import torch
from torch import Tensor, nn

from l2ul import METHOD_VERSION, objective
from l2ul.attack import adversarial_set
from l2ul.common import precision, seeds
from l2ul.common.cache import code_of_model
from l2ul.common.choices import DIVERGED, DONE, FORGOTTEN, STOPPED
from l2ul.common.cuda_graphs import Graphed
from l2ul.common.device import plain_defaults
from l2ul.common.errors import Diverged
from l2ul.common.modes import counters_on_cpu, same_requires_grad
from l2ul.common.nested import Nested
from l2ul.data import storage
from l2ul.data.images import Split, pixels_of
from l2ul.importance import mas_importance
from l2ul.methods import distill, fixed_length_procedure, paper, registry, robust
from l2ul.methods.checkpoint import Checkpoint, Guard, State, fingerprint, summary
from l2ul.methods.monitor import ForgetMonitor
from l2ul.methods.procedure import Procedure
from l2ul.methods.settings import AttackSettings, Settings, override
from l2ul.methods.stand_ins import Synthesis
from l2ul.metrics import accuracy
from l2ul.objective import Terms

Curve = list[dict[str, float]]
RUNNING = "running"  # status of an outcome until the loop ends, then one of `choices.LOOP_STATUSES`


@dataclass
class Outcome:
    """An unlearned model and how the loop ended.

    status          "forgotten": all of D_f is forgotten; "cap": the limit of steps was reached before; "diverged": a
                    loss, a weight or a logit is not finite; "stopped": `go_on` returned False; "done": the method's
                    fixed length is over, or it is `before`
    steps           number of steps taken
    curve           a row for each measurement of D_f: `step`, the terms of the loss, `acc_forget` and `forgotten` (both
                    in percent of D_f)
    seconds_before  spent by interrupted calls that this one continued
    """

    model: nn.Module
    status: str
    steps: int
    curve: Curve = field(default_factory=list)
    seconds_before: float = 0.0


@plain_defaults()
def unlearn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str,
    *,
    num_classes: int | None = None,
    new_labels: Tensor | None = None,
    adv: tuple[Tensor, Tensor] | None = None,
    importance: dict[str, Tensor] | None = None,
    retain: Split | None = None,
    surrogate: Tensor | None = None,
    attack: AttackSettings | None = None,
    settings: Settings | None = None,
    workers: int = 0,
    predict: Callable[[nn.Module], Tensor] | None = None,
    on_start: Callable[[int | None, int | None, Curve], object] | None = None,
    on_step: Callable[[dict[str, float]], object] | None = None,
    go_on: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    synthesis: Synthesis | None = None,
    cuda_graph: bool = False,
    report: Callable[[str], object] = lambda sentence: None,
) -> Outcome:
    """Unlearn D_f with a method: attack and importance if the method needs them, then the loop.

    model       takes pixels in [0,1] and returns logits (n, C); a copy is unlearned, the model itself stays as it is
    images      D_f: (k, 3, H, W), uint8 or float in [0,1]
    labels      (k,) int64, the true classes
    method      a name in `registry.METHODS`
    num_classes needed to compute D_adv, for the methods that need it
    new_labels  (k,) int64, the classes to relabel D_f with; None to have D_f misclassified
    adv         D_adv: images and targets; by default computed with `attack` and the seed of `settings` (see
                `attack.adversarial_set`)
    importance  Ω by parameter name; by default computed (see `importance.mas_importance`)
    retain      D_r, for the methods that need it
    surrogate   (n, 3, H, W) uint8 or float in [0,1], unlabelled images that stand for D_r in methods with a teacher
    attack      how D_adv is computed; by default with the settings of the paper's run scripts
    settings    of the loop; by default those of the paper's run scripts
    workers     processes that decode images of D_r that stay on disk
    predict     returns a model's predictions of D_f (k,); the loop ends as "forgotten" only if D_f is forgotten in them
                too. By default `metrics.accuracy.predict`, whose rounding is that of all measurements
    on_start    called before the first step with the largest number of steps, None if the method has a fixed length;
                with the number of steps of which the loop stops after a multiple, None if it does not; and with the
                rows of an interrupted call that this one continues
    on_step     called with each new row of the curve, which has `step` and `forgotten` (percent of D_f) for a progress
                line
    go_on       called after each row; the loop stops if it returns False
    checkpoint  a file in which the state of the loop is written every few minutes and on KeyboardInterrupt, SystemExit,
                SIGINT or SIGTERM. A later call with the same arguments continues from it and returns the same weights,
                curve and status as an uninterrupted call. A state of other settings or inputs is ignored. The file is
                left to the caller to delete. Methods of fixed length write no state and start from their beginning.
    synthesis   synthesises the images that `distill` needs with some settings, and keeps them for later calls
    cuda_graph  run forward and backward passes on a CUDA GPU as CUDA graphs, where the method allows it
    report      called with a sentence if the model cannot be captured as a CUDA graph

    Returns the `Outcome`. Raises ValueError if an input that the method needs is missing, InputError if there is no
    such method or it does not support the goal.
    """
    goal = "misclassify" if new_labels is None else "relabel"
    chosen, settings = registry.get(method, goal), settings or Settings()
    if "retain" in chosen.needs and retain is None:
        raise ValueError(f"method {method!r} trains on the retain set D_r; pass it as retain")
    if "adv" in chosen.needs and adv is None:
        if num_classes is None:
            raise ValueError(f"method {method!r} needs adversarial examples; pass num_classes or adv")
        attack = attack or AttackSettings()
        examples, targets = adversarial_set(
            model,
            images,
            labels,
            num_classes,
            **attack.arguments(),
            seed=settings.seed,
            first_position=settings.first_position,
        )
        adv = storage.as_stored(examples, storage.DTYPES[attack.dtype]), targets
    if "importance" in chosen.needs and importance is None:
        importance = mas_importance(model, images)
    unlearned = copy.deepcopy(model)
    if not chosen.trains:
        return Outcome(unlearned, DONE, 0)

    forget = objective.Forget(pixels_of(images), labels, new_labels)
    adv = adv if "adv" in chosen.needs else None
    retain = retain if "retain" in chosen.needs else None
    importance = importance if "importance" in chosen.needs else None
    monitor = ForgetMonitor(unlearned, forget, predict or (lambda model: accuracy.predict(model, images)))
    is_random = seeds.fork_rng(labels.device, settings.seed, "dropout", settings.first_position)
    with is_random, contextlib.ExitStack() as stack:
        stack.enter_context(same_requires_grad(unlearned))  # a procedure may freeze layers
        stack.enter_context(precision.passes_in(unlearned, settings.loop_precision))
        if chosen.is_fixed_length:
            own = override(chosen.settings, settings.method_settings)
            context = fixed_length_procedure.MethodContext(
                unlearned, forget, own, retain, settings.seed, settings.first_position, workers
            )
            procedure = fixed_length_procedure.FixedLengthProcedure(chosen.terms, context, settings.bn)
        elif "teacher" in chosen.needs:
            kind = robust.RobustProcedure if settings.robust else distill.DistillProcedure
            procedure = kind(chosen, unlearned, forget, settings, monitor, synthesis or Synthesis(), surrogate)
        else:
            retained = Split(*adv) if adv else retain
            procedure = paper.PaperProcedure(chosen, unlearned, forget, settings, retained, importance, workers)
        loop = _Loop(unlearned, procedure, monitor)
        if cuda_graph and labels.is_cuda and procedure.has_draws:
            stack.enter_context(torch.cuda.device(labels.device))
            loop.use_graphs(report)
        else:  # counting on the CPU would not be part of a graph
            stack.enter_context(counters_on_cpu(unlearned))
        if checkpoint and procedure.is_resumable:
            own_code = code_of_model(model, chosen.implementation)
            code = METHOD_VERSION, torch.__version__, labels.device.type, method, chosen.code_sha256(), settings
            # of D_adv only the targets: a GPU may compute examples and importance differently each time, so `summary`
            # compares them with a tolerance
            code += (own_code,) if own_code else ()
            inputs = model.state_dict(), images, labels, new_labels, adv[1] if adv else None, retain, surrogate
            if state := checkpoint.load(fingerprint(*code, *inputs), summary(adv, importance)):
                loop.load_state_dict(state)
        else:
            checkpoint = None
        if on_start:
            on_start(procedure.max_steps, procedure.stop_every, list(loop.outcome.curve))
        try:
            return loop.run(on_step or (lambda row: None), go_on or (lambda: True), checkpoint)
        finally:
            loop.free()


class _Loop:
    """Steps of a procedure and measurements of D_f, with all state that decides how they go on."""

    def __init__(self, model: nn.Module, procedure: Procedure, monitor: ForgetMonitor):
        self.model, self.procedure, self.monitor = model, procedure, monitor
        self.outcome = Outcome(model, RUNNING, 0)
        self.last_terms: Terms = {}
        self.graphed: Graphed | None = None  # `_gradients` as a CUDA graph, see `use_graphs`
        self.started = time.perf_counter()

    def run(
        self,
        on_step: Callable[[dict[str, float]], object],
        go_on: Callable[[], bool],
        checkpoint: Checkpoint | None,
    ) -> Outcome:
        """Take steps until D_f is forgotten, the limit of steps is reached or a number is not finite."""
        with Guard(checkpoint, self.state_dict) as guard:
            while self.outcome.status == RUNNING:
                guard.step_begins()
                row = self._advance()
                guard.step_ends()
                if row is not None:
                    on_step(row)
                    if self.outcome.status == RUNNING and not go_on():
                        self.outcome.status = STOPPED
        self.model.eval()
        return self.outcome

    def _advance(self) -> dict[str, float] | None:
        """Take a step, or end the loop; return the row of a measurement of D_f, None if that is not due."""
        outcome, every = self.outcome, self.procedure.check_every
        terms = None if outcome.steps == self.procedure.max_steps else self._step()
        if terms is not None:
            outcome.steps += 1
            self.last_terms = terms
            return self._measure() if outcome.steps % every == 0 else None
        row = self._measure() if outcome.steps % every else None  # the last step is measured in any case
        if outcome.status == RUNNING:
            outcome.status = self.procedure.final_status
        return row

    def _measure(self) -> dict[str, float]:
        """Measure D_f, and set the status if the loop ends with this measurement; return its row."""
        outcome, stop_every = self.outcome, self.procedure.stop_every
        row, is_finite = self.monitor.measure(outcome.steps, self.last_terms)
        outcome.curve.append(row)
        if not is_finite:
            outcome.status = DIVERGED
        elif stop_every and outcome.steps % stop_every == 0 and row["forgotten"] == 100 and self.procedure.may_stop():
            self._confirm(row)
        return row

    def _confirm(self, row: dict[str, float]) -> None:
        """Set the status if the last row is confirmed by the predictions that are measured after the loop.

        Otherwise the row gets their percentages, and the loop goes on.
        """
        try:
            row |= self.monitor.confirm()
        except Diverged:
            self.outcome.status = DIVERGED
            return
        if row["forgotten"] == 100:
            self.outcome.status = FORGOTTEN

    def use_graphs(self, report: Callable[[str], object]) -> None:
        """Run gradients and measurements as CUDA graphs."""
        self.procedure.pads = True
        device = self.monitor.forget.images.device
        report = functools.cache(report)  # the same sentence once, if neither can be captured
        self.graphed = Graphed(self._gradients, device, report)
        self.monitor.graphed = Graphed(self.monitor.numbers, device, report)

    def free(self) -> None:
        """Free the graphs and gradients, which the weights and this loop refer to."""
        self.graphed = self.monitor.graphed = None
        self.procedure.optimizer.zero_grad()

    def _step(self) -> Terms | None:
        """Take a step and return the terms of its loss; None if the method has ended.

        The loop minimises the sum of the terms. Without terms, the method has changed the weights itself.
        """
        if self.procedure.has_draws:
            terms = self._repeatable_terms(self.procedure.draw())
        elif terms := next(self.procedure, None):
            self._backward(terms)
        if terms:
            self.procedure.optimizer.step()
            self.procedure.scheduler.step()
        return terms

    def _repeatable_terms(self, inputs: Sequence[Nested]) -> Terms:
        """Set the gradients of a step on these inputs and return its terms, in smaller parts if memory runs out."""
        while True:
            try:
                terms, gradients = (self.graphed or self._gradients)(*inputs)
                break
            except (RuntimeError, MemoryError) as error:
                self.procedure.use_smaller_parts(error)
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient
        return terms

    def _gradients(self, *inputs: Nested) -> tuple[Terms, list[Tensor | None]]:
        """Return the terms of the loss of a step on these inputs, and the gradients of their sum."""
        terms = self.procedure.terms(*inputs)
        self._backward(terms)
        # without references to the graph of autograd, which belongs to the stream it was made on
        return {name: value.detach() for name, value in terms.items()}, [one.grad for one in self._parameters()]

    def _parameters(self) -> list[nn.Parameter]:
        return [one for group in self.procedure.optimizer.param_groups for one in group["params"]]

    def _backward(self, terms: Terms) -> None:
        """Set the gradients of the weights to those of the sum of the terms.

        Autograd adds the gradients of two forward passes weight by weight. Those of separate terms are computed one
        after the other here and added for all weights together, which a GPU does with a few kernels.
        """
        separate = [value for name, value in terms.items() if name in self.procedure.separate and value.requires_grad]
        joint = [value for name, value in terms.items() if name not in self.procedure.separate]
        total: dict[Tensor, Tensor] = {}
        for loss in [*separate, sum(joint)] if joint else separate:
            self.procedure.optimizer.zero_grad()
            loss.backward()
            new = {one: one.grad for one in self._parameters() if one.grad is not None}
            if both := [one for one in new if one in total]:
                torch._foreach_add_([new[one] for one in both], [total[one] for one in both])
            total |= new
        for parameter, gradient in total.items():
            parameter.grad = gradient

    def _tensors(self) -> dict[str, Tensor]:
        """Return weights and buffers, also those that the model's `state_dict` leaves out."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def state_dict(self) -> State:
        """Return all that decides the steps to come, and the curve so far."""
        device = next(self.model.parameters()).device
        return {
            "step": self.outcome.steps,
            "status": self.outcome.status,
            "curve": self.outcome.curve,
            "seconds": self.outcome.seconds_before + time.perf_counter() - self.started,
            "model": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "logits": self.monitor.logits,
            "optimizer": self.procedure.optimizer.state_dict(),
            "scheduler": self.procedure.scheduler.state_dict(),
            "procedure": self.procedure.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Continue after the step at which `state_dict` returned this state."""
        self.outcome.steps, self.outcome.status, self.outcome.curve = state["step"], state["status"], state["curve"]
        self.outcome.seconds_before = state["seconds"]
        for name, tensor in self._tensors().items():
            tensor.copy_(state["model"][name])
        self.monitor.logits = state["logits"]
        self.procedure.optimizer.load_state_dict(state["optimizer"])
        self.procedure.scheduler.load_state_dict(state["scheduler"])
        self.procedure.load_state_dict(state["procedure"])
        torch.set_rng_state(state["generator"])  # last, as the procedure may draw from it
        if state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], next(self.model.parameters()).device)
