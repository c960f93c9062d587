"""What the loop needs of a method: steps, optimizer, schedule and state; and the batches that steps are made of."""

from collections.abc import Iterator
import itertools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint

from l2ul.common.choices import CAP
from l2ul.common.device import upload
from l2ul.common.memory import smaller_batch
from l2ul.common.nested import Nested
from l2ul.data.images import Split, as_pixels
from l2ul.objective import Batch, Terms


class Procedure(Iterator[Terms]):
    """The training procedure of a method: `next` gives the terms of the loss of the next step.

    The loop minimises the sum of the terms with `optimizer` and `scheduler`. A step without terms has changed the
    weights itself. Where `has_draws` is True, the loop does not call `next`, but divides a step into three parts:

    1. `draw`, on the CPU: the random numbers of the step, such as indices of images, and all that changes from step to
       step, such as the weight of a term.
    2. `terms` of these inputs, on the device of the model, and the backward pass. If memory runs out, the loop repeats
       this part in smaller parts of the batches. On a CUDA GPU, it is captured as a graph and replayed, so it may not
       wait for the GPU, draw random numbers or read attributes that change.
    3. A step of the optimizer and of the scheduler.

    max_steps     steps until the loop gives up; None: until the iterator ends
    check_every   steps between two measurements of D_f
    stop_every    the loop stops after a multiple of this number of steps if D_f is forgotten; None: it never does
    separate      names of the terms that share no forward pass with another one: each gets a backward pass of its own
    final_status  status of the outcome if the loop runs to its end
    is_resumable  whether `state_dict` holds all that decides the steps to come
    has_draws     whether a step is `terms` of what `draw` returns
    pads          set by the loop if steps are captured: inputs then have the same shapes at each step, where possible
    batch_size    number of images in the largest batch of a step
    part_size     largest number of images in one forward pass of the model, see `in_parts`; None: the whole batch
    """

    model: nn.Module

    optimizer: Optimizer
    scheduler: LRScheduler
    max_steps: int | None = None
    check_every: int = 1
    stop_every: int | None = 1
    separate: frozenset[str] = frozenset()
    final_status: str = CAP
    is_resumable: bool = True
    has_draws: bool = False
    pads: bool = False
    batch_size: int
    part_size: int | None = None

    def draw(self) -> tuple[Nested, ...]:
        """Return the inputs of the next step: tensors on the device of the model or on the CPU, which may be nested."""
        raise NotImplementedError

    def terms(self, *inputs: Nested) -> Terms:
        """Return the terms of the loss of a step, which depend on nothing but its inputs and the weights.

        All inputs are on the device of the model if the step is captured as a CUDA graph.
        """
        raise NotImplementedError

    def in_parts(self, model: nn.Module | None = None) -> "nn.Module | InParts":
        """Return a model, by default the own one, or a wrapper that passes at most `part_size` images to it at once."""
        model = self.model if model is None else model
        return InParts(model, self.part_size) if self.part_size else model

    def use_smaller_parts(self, error: BaseException) -> None:
        """Compute later steps in smaller parts of their batches, after an error of a step.

        The terms and gradients are the same up to rounding. Raises the error if it is not about memory, or if the
        model does not treat each image on its own, so that the result would be another one.
        """
        if any(isinstance(module, BatchNorm) and module.training for module in self.model.modules()):
            raise error
        self.part_size = smaller_batch(self.part_size or self.batch_size, error)

    def may_stop(self) -> bool:
        """Return whether the loop may stop after a step after which D_f is forgotten."""
        return True

    def state_dict(self) -> dict[str, object]:
        """Return what decides the next steps beside model, optimizer and scheduler: tensors, numbers and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue after the step at which `state_dict` returned this state."""


class EndlessBatches(Iterator[Batch]):
    """Batches of a set in endless passes, each pass in a new random order.

    generator  on the CPU; draws the order at the beginning of each pass
    workers    processes that decode images that stay on disk
    """

    def __init__(self, split: Split, batch_size: int, generator: torch.Generator, workers: int = 0):
        self.split, self.batch_size, self.generator, self.workers = split, batch_size, generator, workers
        self._before_pass = generator.get_state()
        self._taken = 0  # batches of the current pass
        self._pass: Iterator[Batch] = iter(())

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return -(-len(self.split) // self.batch_size)

    def __next__(self) -> Batch:
        batch = next(self._pass, None)
        if batch is None:
            self._before_pass, self._taken = self.generator.get_state(), 0
            self._pass = shuffled(self.split, self.batch_size, self.generator, self.workers)
            batch = next(self._pass)
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, object]:
        """Return the state of the generator before the current pass and the number of batches taken from the pass."""
        return {"generator": self._before_pass, "taken": self._taken}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue in the middle of a pass. May draw from torch's global generator: restore that one afterwards."""
        self._before_pass, self._taken = state["generator"].cpu(), state["taken"]
        self.generator.set_state(self._before_pass)
        if self._taken:
            rest = shuffled(self.split, self.batch_size, self.generator, self.workers, skip=self._taken)
            self._pass = itertools.chain([batch for batch in [next(rest, None)] if batch], rest)


def shuffled(split: Split, batch_size: int, generator: torch.Generator, workers: int, skip: int = 0) -> Iterator[Batch]:
    """Yield the batches of one pass through a set in a random order.

    generator  on the CPU; draws the order
    workers    processes that decode images that stay on disk
    skip       batches to leave out at the beginning of the pass

    The last batch is smaller if the set is not a multiple of the batch size. A loader of images on disk draws a seed
    from torch's global generator at the first batch.
    """
    device = split.labels.device
    order = torch.randperm(len(split), generator=generator)
    labels = split.labels[upload(order, device)].split(batch_size)[skip:]  # once a pass, so that no step waits for it
    if split.on_disk:
        loaded = split.images.loader(order.split(batch_size)[skip:], device, workers)
    else:
        own_order = upload(order, split.images.device).split(batch_size)[skip:]
        loaded = (upload(split.images[indices], device) for indices in own_order)
    for images, some in zip(loaded, labels, strict=True):
        yield Batch(as_pixels(images.to(device)), some)


class InParts:
    """Call a model on one part of a batch after the other, which the backward pass does again.

    Only the activations of one part are in memory at a time. The model must treat each image on its own.

    size  images of a part
    """

    def __init__(self, model: nn.Module, size: int):
        self.model, self.size = model, size

    @property
    def training(self) -> bool:
        return self.model.training

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) <= self.size:
            return self.model(images)
        options = {"use_reentrant": False, "preserve_rng_state": self.training}  # dropout draws the same numbers again
        return torch.cat([checkpoint(self.model, part, **options) for part in images.split(self.size)])
