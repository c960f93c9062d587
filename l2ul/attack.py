"""Targeted L2-PGD, and the adversarial set of a forget set made with it on the original weights."""

from collections.abc import Callable
import math

import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import Progress
from l2ul.common import precision as precisions
from l2ul.common import seeds
from l2ul.common.bn_folding import folded
from l2ul.common.errors import is_out_of_memory
from l2ul.common.modes import eval_mode, frozen
from l2ul.data import images as image_sets
from l2ul.data.forget_set import other_class
from l2ul.data.images import as_pixels

LEAST = 16  # pairs attacked at once, with some of them repeated where there are fewer: see `_even`
BATCH_SIZE = {"cpu": (128, 16), "mps": (512, 64), "cuda": (2048, 256)}  # pairs attacked at once; of large images


def pgd_l2(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    away: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Adversarial examples that `model` calls `targets`, within an L2 ball around the images.

    images   (N, 3, H, W) float in [0,1] or uint8; targets (N,) int64 classes to be called
    eps      radius of the ball, alpha length of a step: L2 norms over all pixels of an image, in [0,1] units
    start    a first perturbation (N, 3, H, W), brought into the ball and the range of pixels; by default u - x with
             u uniform in [0,1], from `generator`
    away     untargeted: `targets` are the classes to get away from, and steps go up the gradient
    returns  (N, 3, H, W) float: inside [0,1] exactly, inside the ball to rounding

    Each step: δ ← δ - α g / max(‖g‖₂, 1e-6) with g = ∇_δ CE(model(x + δ), target), then x + δ clipped to [0,1], then δ
    projected on the ball. Clipping comes first, as in the library behind the paper (arXiv 2301.11578);
    shrinking δ toward 0 afterwards cannot leave [0,1]. The model runs in eval mode, its weights without gradients.
    Raises ValueError for a negative or undefined eps, alpha or steps.
    """
    for name, value in {"eps": eps, "alpha": alpha, "steps": steps}.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected a number of at least 0")
    x = as_pixels(images)
    if start is None:
        start = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) - x
    delta = _clip(x, _project(start, eps))
    sign = 1 if away else -1
    with frozen(model):
        for _ in range(steps):
            example = (x + delta).requires_grad_()
            loss = F.cross_entropy(model(example), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, example)
            delta = delta + sign * alpha * gradient / _norm(gradient).clamp_min(1e-6)
            delta = _project(_clip(x, delta), eps)
            if progress:
                progress(len(x))
    return (x + delta).clamp_(0, 1)  # the sum may round to a hair outside


def _norm(pixels: Tensor) -> Tensor:
    return torch.linalg.vector_norm(pixels, dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)


def _project(delta: Tensor, eps: float) -> Tensor:
    return delta * (eps / _norm(delta).clamp_min(1e-12)).clamp_max(1)


def _clip(x: Tensor, delta: Tensor) -> Tensor:
    return (x + delta).clamp_(0, 1) - x


def adversarial_set(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    num_adv_images: int,
    eps: float,
    alpha: float,
    steps: int,
    seed: int,
    first_position: int = 0,
    batch_size: int | None = None,
    precision: str = "fp32",
    fold: bool = True,
    on_halved: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """D_adv: `num_adv_images` targeted examples of each image, each with its own random target and start.

    images     (k, 3, H, W) uint8 or float in [0,1]; labels (k,) int64, the true classes
    precision  of the passes through the model: see `precisions`
    fold       whether batch-norm is folded into convolutions, see `bn_folding.folded`
    on_halved  called with the new number of pairs a batch where memory ran out
    returns    examples (k · num_adv_images, 3, H, W) float in [0,1] and their targets (k · num_adv_images,), the draws
               of the first image first

    Target (uniform over the classes other than the true one) and start of a draw depend on (seed, position of the
    image, draw) alone, so the set of the first k images is the head of the set of more. The first image's position is
    0, or `first_position` where they are not the first of D_f. Pairs are attacked `batch_size` at a time (by default
    `default_batch_size`), rounded down to a multiple of eight, whatever images they belong to; half as many where
    memory runs out.
    """
    targets = random_targets(labels, num_classes, num_adv_images, seed, first_position)
    pixels = as_pixels(images)
    owners = torch.arange(len(images), device=images.device).repeat_interleave(num_adv_images)
    size = _even(batch_size or default_batch_size(images.device, images.shape[-1]))
    examples = torch.empty((len(owners), *pixels.shape[1:]), device=images.device, memory_format=torch.channels_last)
    done = 0
    with folded(model, pixels) if fold else eval_mode(model):
        while done < len(owners):
            left = len(owners) - done
            count = math.ceil(left / math.ceil(left / size))  # all batches of about one size
            part = slice(done, done + count)
            full = max(math.ceil(count / 8) * 8, min(size, LEAST)) if size >= 8 else count
            filled = torch.arange(done, done + full).clamp_max(part.stop - 1)  # with the last pair, again and again
            x = pixels[owners[filled]]
            start = _starts(x, filled.tolist(), num_adv_images, seed, first_position) - x
            options = {"eps": eps, "alpha": alpha, "steps": steps, "start": start}
            options["progress"] = (lambda _, count=count: progress(count)) if progress else None
            try:
                with precisions.autocast(images.device, precision):
                    examples[part] = pgd_l2(model, x, targets[filled], **options)[:count]
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size = _even(math.ceil(size / 2))
                if on_halved:
                    on_halved(size)
                continue
            done = part.stop
    return examples, targets


def _even(size: int) -> int:
    """A size for batches that can be filled up: a multiple of eight, or less than eight.

    Batches of a multiple of eight are rounded alike by a CPU's kernels, others are not (nor, of linear layers with
    AVX-512, one of eight itself): so an example does not depend on how many are made with it.
    """
    return size - size % 8 if size >= 8 else size


def default_batch_size(device: torch.device, side: int) -> int:
    """Pairs of image and target attacked at once where nobody says, of so many pixels a side."""
    return image_sets.default_batch_size(BATCH_SIZE, device, side)


def random_targets(labels: Tensor, num_classes: int, num_adv_images: int, seed: int, first_position: int = 0) -> Tensor:
    """The class (k · num_adv_images,) that each example is to be called: uniform over those other than its label."""
    draws = [
        seeds.stream(seed, "target", position, draw).integers(num_classes - 1)
        for position in range(first_position, first_position + len(labels))
        for draw in range(num_adv_images)
    ]
    return other_class(labels.repeat_interleave(num_adv_images), torch.tensor(draws, device=labels.device))


def _starts(like: Tensor, pairs: list[int], num_adv_images: int, seed: int, first_position: int) -> Tensor:
    """The images (n, 3, H, W), uniform noise, that these pairs start from."""
    drawn = [divmod(pair, num_adv_images) for pair in pairs]  # place in D_f, draw
    streams = [seeds.stream(seed, "start", first_position + place, draw) for place, draw in drawn]
    noise = [stream.random(tuple(like.shape[1:]), dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(noise)).to(like.device)
