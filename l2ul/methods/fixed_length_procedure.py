"""What methods of fixed length share: their context, passes through D_r and D_f, their optimizer and their settings.

A method of fixed length is a generator: it takes a `MethodContext` and yields the terms of the loss of each step. It
runs for a number of epochs, whether D_f is forgotten or not. The methods are in `l2ul.methods.baselines`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

from l2ul.common import seeds
from l2ul.common.choices import DONE
from l2ul.common.modes import trainable
from l2ul.data.augment import augment
from l2ul.data.images import Split
from l2ul.methods.procedure import Procedure, shuffled
from l2ul.methods.settings import Value
from l2ul.objective import Batch, Forget, Terms


@dataclass(frozen=True)
class MethodContext:
    """What a method of fixed length works with.

    model           the original model at first; the loop moves it in place between steps
    forget          D_f
    settings        the method's own settings by name, see `registry.fixed_length_method`
    retain          D_r, for the methods that need it
    seed            of every order and draw
    first_position  position of the first image in D_f, above 0 in a later step of a continual run
    workers         processes that decode images of D_r that stay on disk
    """

    model: nn.Module
    forget: Forget
    settings: Mapping[str, Value]
    retain: Split | None = None
    seed: int = 0
    first_position: int = 0
    workers: int = 0
    _held: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # weights, where they train, their values

    @property
    def epochs(self) -> range:
        """The numbers of the epochs."""
        return range(self.settings["epochs"])

    @cached_property
    def generator(self) -> torch.Generator:
        """The CPU generator of all draws of the method, in the order of its steps."""
        return seeds.generator(self.seed, "course", self.first_position)

    @property
    def forget_split(self) -> Split:
        """D_f with its true labels."""
        return Split(self.forget.images, self.forget.labels)

    def train_only(self, parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Keep the weights outside the masks bit for bit as they are now, whatever optimizer and weight decay do.

        masks  bool, of the shape of each parameter: True where the weight is trained

        A mask on the gradients alone is not enough, because weight decay and momentum move weights without a gradient.
        """
        self._held[:] = [(one, mask, one.detach().clone()) for one, mask in zip(parameters, masks, strict=True)]

    @torch.no_grad()
    def restore_held(self) -> None:
        """Set the weights outside the masks of `train_only` back to their values; the loop does so after each step."""
        for parameter, mask, values in self._held:
            parameter.copy_(torch.where(mask, parameter, values))

    def batches(self, split: Split, size: int | None = None) -> Iterator[Batch]:
        """Yield the batches of one pass through a set in a random order, `size` (by default `batch`) images each.

        The setting `augment` selects the augmentation: 0 none, 1 random crops as in training, 2 also random flips.
        """
        augmentation = self.settings.get("augment", 0)
        for batch in shuffled(split, size or self.settings["batch"], self.generator, self.workers):
            images = batch.images
            if augmentation:
                images = augment(images, images.shape[-1] // 8, augmentation > 1, self.generator)
            yield Batch(images.to(memory_format=torch.channels_last), batch.labels)

    def endless_batches(self, split: Split) -> Iterator[Batch]:
        """Yield the batches of pass after pass through a set."""
        while True:
            yield from self.batches(split)

    def paired_batches(self, retain: Split, forget: Split) -> Iterator[tuple[Batch, Batch]]:
        """Yield the batches of one pass through D_r, each with its share of one pass through D_f.

        D_f is spread evenly over the batches, as if both sets were shuffled together. A share can be empty.
        """
        steps = -(-len(retain) // self.settings["batch"])
        bounds = torch.arange(steps + 1) * len(forget) // steps  # images of D_f before and after each step
        all_of_forget = next(self.batches(forget, len(forget)))
        for batch, low, high in zip(self.batches(retain), bounds[:-1], bounds[1:], strict=True):
            yield batch, Batch(all_of_forget.images[low:high], all_of_forget.labels[low:high])


class FixedLengthProcedure(Procedure):
    """The steps of a method of fixed length, with SGD (momentum 0.9, weight decay 5e-4) or Adam at a constant rate.

    terms    the method's generator
    bn       "train" or "eval", the mode of the model in training steps

    A step is usually a batch of D_r, so D_f is measured every tenth step. The state is not kept: an interrupted run
    starts from its beginning.
    """

    check_every, stop_every, final_status, is_resumable = 10, None, DONE, False

    def __init__(self, terms: Callable[[MethodContext], Iterator[Terms]], context: MethodContext, bn: str):
        self.model = context.model.train(bn == "train")
        parameters = trainable(self.model)
        lr = context.settings.get("lr", 0.0)  # a method that changes the weights itself has no lr
        if context.settings.get("adam"):
            self.optimizer = torch.optim.Adam(parameters, lr)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
        self.optimizer.register_step_post_hook(lambda *_: context.restore_held())
        self.scheduler = ConstantLR(self.optimizer, factor=1.0)
        self._steps = terms(context)

    def __next__(self) -> Terms:
        return next(self._steps)
