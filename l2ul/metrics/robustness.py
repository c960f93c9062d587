"""Robustness: whether images stay forgotten as they are used, after changes to the images or to the model.

`as_used` is the only definition of "forgotten as used".
"""

from collections.abc import Collection, Iterator, Sequence
import copy
from dataclasses import dataclass
import math
import time

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from l2ul.common import seeds
from l2ul.common.device import plain_defaults
from l2ul.common.errors import is_out_of_memory
from l2ul.common.memory import smaller_batch
from l2ul.common.modes import batch_norms, in_eval_mode
from l2ul.common.precision import exactly, quantised
from l2ul.data import mixes
from l2ul.data.changes import KINDS, PROBABILITY, Changes, jpeg_file
from l2ul.data.images import LARGE, as_pixels, pixels_of
from l2ul.metrics import accuracy
from l2ul.objective import Forget, is_forgotten

COPIES, REQUIRED = 64, 0.95  # random copies of an image, and the share of them that has to be forgotten
COPIES_OF_A_KIND = 8  # copies of an image with one kind of change alone, for its rate
SEED = 2**32 - 1  # of the copies; no run has this seed, so no method trains on them
CHUNK = {False: 1024, True: 64}  # copies at once; of large images
TIMED = 4  # images, of which COPIES_OF_A_KIND copies are timed
NUM_MIXES, BATCH_SIZE = 512, 256  # images for recalibration, if there are no others
WEIGHTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": 8, "int4": 4}  # data type, or bits
RECALIBRATED = "recalibrated"  # name of the recalibration of batch-norm among the changes of a model


@dataclass(frozen=True)
class AsUsed:
    """How each of k images is forgotten. Tensors are on the CPU.

    stored  (k,) bool: forgotten as it is stored
    copies  (k,) share of the COPIES random copies that are forgotten
    kinds   by kind of change, (k,) share of the copies with this change alone that are forgotten
    models  by change of the model, (k,) bool: forgotten as it is stored by the changed model, or not classified by it,
            as its logits are not finite; None if the changed model cannot run, or has finite logits for no image
    """

    stored: Tensor
    copies: Tensor
    kinds: dict[str, Tensor]
    models: dict[str, Tensor | None]

    @property
    def forgotten(self) -> Tensor:
        """Return which images (k,) bool are forgotten as used.

        An image is forgotten as used if it is forgotten as it is stored, in at least 95 % of its random copies, and by
        each changed model that can run.
        """
        result = self.stored & (self.copies >= REQUIRED)
        for kept in self.models.values():
            if kept is not None:
                result = result & kept
        return result

    def survives(self) -> dict[str, Tensor | None]:
        """Return, by change, which images (k,) bool stay forgotten under it; None for a model that cannot run.

        An image stays forgotten under a change of the image if it is forgotten in at least 95 % of its copies.
        """
        return {name: share >= REQUIRED for name, share in self.kinds.items()} | self.models

    def rates(self) -> dict[str, float]:
        """Return, by change, the percentage of copies or images that are forgotten; nan for a model that cannot run."""
        rates = {name: 100 * float(share.double().mean()) for name, share in self.kinds.items()}
        return rates | {
            name: math.nan if kept is None else 100 * float(kept.double().mean()) for name, kept in self.models.items()
        }


@plain_defaults()
@exactly()
def seconds_per_copy(model: nn.Module, forget: Forget) -> float:
    """Return the seconds that `as_used` takes for a copy, measured on copies of the first images of D_f."""
    new = None if forget.new_labels is None else forget.new_labels[:TIMED]
    few = Forget(forget.images[:TIMED], forget.labels[:TIMED], new)
    _share_of_copies(model, few, "warm-up", KINDS, 1, 1.0)  # the first call of each change takes longer
    started = time.perf_counter()
    _share_of_copies(model, few, "time", KINDS, COPIES_OF_A_KIND, PROBABILITY)
    return (time.perf_counter() - started) / (COPIES_OF_A_KIND * len(few))


def num_passes(model: nn.Module, k: int, *, in_full: bool = True) -> int:
    """Return how many images `as_used` passes to the model at most, for k images of D_f and without other images."""
    kinds = COPIES_OF_A_KIND * len(KINDS) if in_full else 0
    return k * (1 + COPIES + kinds + len(WEIGHTS) + 1) + (NUM_MIXES if batch_norms(model) else 0)


@plain_defaults()
@exactly()
def as_used(model: nn.Module, forget: Forget, other_images: Tensor | None = None, *, in_full: bool = True) -> AsUsed:
    """Measure whether D_f is forgotten as stored and as used.

    forget        D_f, on the model's device
    other_images  (n, C, H, W) images that are not in D_f, on which batch-norm is recalibrated; by default mixes of D_f
    in_full       False: measure only what `AsUsed.forgotten` needs, without single kinds of changes, and without
                  further copies of an image once too many are recognised; its share is then a lower bound

    The copies depend on the images and, in their noise, on the kind of device, not on the method or its seed. JPEG
    compression is that of Pillow.
    """
    if other_images is None:
        other_images = stand_ins(forget.images) if batch_norms(model) else forget.images
    models = {name: _forgotten_by(changed_weights(model, form), forget) for name, form in WEIGHTS.items()}
    models[RECALIBRATED] = _forgotten_by(recalibrated(model, other_images), forget)
    return AsUsed(
        accuracy.forgotten(model, forget.images, forget).cpu(),
        _share_of_copies(model, forget, "as used", KINDS, COPIES, PROBABILITY, 0.0 if in_full else REQUIRED),
        {
            kind: _share_of_copies(model, forget, kind, (kind,), COPIES_OF_A_KIND, 1.0)
            for kind in (KINDS if in_full else ())
        },
        models,
    )


def _share_of_copies(
    model: nn.Module,
    forget: Forget,
    purpose: str,
    kinds: Sequence[str],
    count: int,
    probability: float,
    required: float = 0.0,
) -> Tensor:
    """Return the share (k,) of `count` changed copies of each image that is forgotten, on the CPU.

    required  further copies of an image that can no longer reach this share are not made, and count as recognised

    So do copies with logits that are not finite: they do not show that the image is forgotten.
    """
    generator, changes = seeds.generator(SEED, purpose), Changes(kinds, probability=probability, codec=jpeg_file)
    device = forget.images.device
    forgotten, recognised = torch.zeros(2, len(forget), dtype=torch.int64)
    for part in torch.arange(len(forget)).repeat(count).split(CHUNK[forget.images.shape[-1] > LARGE]):
        # drawn for all copies of the part, so that a copy does not depend on which others are left out
        numbers = changes.draw(torch.Size([len(part), *forget.images.shape[1:]]), generator, device)
        counted = recognised[part] <= (1 - required) * count
        if not counted.any():
            continue
        part, numbers = part[counted], [[one[counted.to(one.device)] for one in own] for own in numbers]
        own = part.to(device)
        copies = changes.make(forget.images[own], numbers)
        predictions = accuracy.predict(model, copies, strict=False).to(device)
        gone = is_forgotten(predictions, forget.target_labels[own], forget.goal) & (predictions >= 0)
        gone = gone.long().cpu()
        forgotten.index_add_(0, part, gone)
        recognised.index_add_(0, part, 1 - gone)
    return forgotten / count


def _forgotten_by(model: nn.Module, forget: Forget) -> Tensor | None:
    try:
        logits = torch.cat(list(accuracy.logits(model, forget.images, fold=False)))
    except Exception as error:  # the module may be the user's own and raise anything
        if is_out_of_memory(error):
            raise
        return None  # such as types that the forward pass does not accept
    is_finite = logits.isfinite().all(1)  # it is not after an overflow in 16 bits
    forgotten = forget.is_forgotten(logits.argmax(1).to(forget.labels.device)).cpu()
    return forgotten | ~is_finite if is_finite.any() else None


def changed_weights(model: nn.Module, form: torch.dtype | int) -> nn.Module:
    """Return a copy with its weights in another format.

    form  a floating-point type, in which the copy also computes; or the bits of integers, see `quantised`
    """
    if isinstance(form, torch.dtype):
        return _InType(copy.deepcopy(model).to(form), form)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_(quantised(parameter, form))
    return result


class _InType(nn.Module):
    """A model that computes in a floating-point type, with pixels and logits in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels.to(self.dtype)).float()


def stand_ins(images: Tensor) -> Tensor:
    """Return mixes (n, C, H, W) of D_f on which batch-norm is recalibrated if there are no other images."""
    return mixes.KINDS["mixes"](images, NUM_MIXES, seeds.generator(SEED, "recalibration"))


@torch.no_grad()
def recalibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose batch-norm statistics are those of the images, as after a forward pass in train mode.

    images  (n, C, H, W), uint8 or float in [0,1]; no label is used. A model without batch-norm is copied as it is.

    Batches have BATCH_SIZE images, and fewer if memory runs out.
    """
    result = in_eval_mode(copy.deepcopy(model))
    norms = list(batch_norms(result).values())
    momenta = [norm.momentum for norm in norms]
    if norms and len(images) == 1:
        images = images.expand(2, *images.shape[1:])  # variances need two values
    size = min(BATCH_SIZE, len(images)) if norms else 0
    while size:
        try:
            parts = min(-(-len(images) // size), len(images) // 2)  # of nearly equal size, and of two images at least
            _recompute_statistics(result, norms, images.tensor_split(parts))
            break
        except (RuntimeError, MemoryError) as error:
            size = max(2, smaller_batch(size if size > 2 else 1, error))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return in_eval_mode(result)


def _recompute_statistics(model: nn.Module, norms: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
    device = next(model.parameters()).device
    for norm in norms:
        norm.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=device)  # None in old modules
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    for batch in batches:
        model(as_pixels(batch.to(device)))


CROP = 7 / 8  # side of the crops, relative to the image
QUALITIES = (75, 50)  # of JPEG


def with_changed_images(images: Tensor, forget: Forget, kinds: Collection[str]) -> Forget:
    """Return D_f extended by its images after all changes of the given kinds, with the same labels.

    images  D_f (k, 3, H, W) uint8, on the device of `forget`
    kinds   some of `choices.CHANGES`; without any, `forget` is returned as it is
    """
    if not kinds:
        return forget
    every = [images, *_changed_images(images, kinds)]
    new = forget.new_labels.repeat(len(every)) if forget.new_labels is not None else None
    return Forget(pixels_of(torch.cat(every)), forget.labels.repeat(len(every)), new)


def _changed_images(images: Tensor, kinds: Collection[str]) -> Iterator[Tensor]:
    """Yield images (k, 3, H, W) uint8 after each change of these kinds: flip, five crops, JPEG compression."""
    if "flipped" in kinds:
        yield images.flip(3)
    if "cropped" in kinds:
        height, width = images.shape[2:]
        high, wide = round(CROP * height), round(CROP * width)
        down, right = height - high, width - wide
        for top, left in ((0, 0), (0, right), (down // 2, right // 2), (down, 0), (down, right)):
            yield transforms.resized_crop(images, top, left, high, wide, [height, width], antialias=True)
    if "jpeg" in kinds:
        for quality in QUALITIES:
            coded = jpeg_file(as_pixels(images), torch.full((len(images),), quality))
            yield coded.mul(255).round().byte()
