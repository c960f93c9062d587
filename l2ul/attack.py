"""Targeted L2-PGD and the adversarial set D_adv of a forget set, computed on the original weights.

D_adv is used in place of the retain set (Cha et al., AAAI 2024, arXiv 2301.11578).
"""

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
from l2ul.common.device import plain_defaults
from l2ul.common.memory import multiple_of_eight, smaller_batch
from l2ul.common.modes import eval_mode, frozen
from l2ul.data.forget_set import other_class
from l2ul.data.images import LARGE, as_pixels, input_side

MIN_BATCH = 16  # smallest batch of the attack; smaller batches are filled with copies, see `multiple_of_eight`
BATCH_SIZE = {"cpu": (128, 16), "mps": (512, 64), "cuda": (2048, 256)}  # by device type: (images up to LARGE, larger)


@plain_defaults()
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
    targeted: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """Compute adversarial examples that `model` classifies as `targets`, within an L2 ball around the images.

    images     (N, 3, H, W) float in [0,1] or uint8
    targets    (N,) int64, the target classes; the true classes if not `targeted`
    eps        radius of the ball, an L2 norm over all pixels of an image with pixels in [0,1]
    alpha      length of a step, in the same unit
    steps      number of steps
    start      first perturbation (N, 3, H, W), projected on the ball and clipped; by default u - x with u uniform in
               [0,1], drawn from `generator`
    targeted   False: move away from the classes `targets`, up the gradient
    progress   called with N after each step
    returns    (N, 3, H, W) float, inside [0,1] exactly and inside the ball up to rounding

    A step: δ ← δ - α g / max(‖g‖₂, 1e-6) with g = ∇_δ CE(model(x + δ), target), then x + δ is clipped to [0,1], then δ
    is projected on the ball. The order is that of advertorch, the library behind arXiv 2301.11578. The projection
    shrinks δ toward 0, so x + δ stays in [0,1]. The model runs in eval mode and its weights get no gradients.
    Raises ValueError if eps, alpha or steps is negative or not finite.

    Example: `pgd_l2(model, images, targets, eps=4.0, alpha=0.1, steps=100)`
    """
    for name, value in {"eps": eps, "alpha": alpha, "steps": steps}.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected a number of at least 0")
    x = as_pixels(images)
    if start is None:
        start = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) - x
    delta = _clip(x, _project(start, eps))
    sign = -1 if targeted else 1
    with frozen(model):
        for _ in range(steps):
            example = (x + delta).requires_grad_()
            loss = F.cross_entropy(model(example), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, example)
            delta = delta + sign * alpha * gradient / _norm(gradient).clamp_min(1e-6)
            delta = _project(_clip(x, delta), eps)
            if progress:
                progress(len(x))
    return (x + delta).clamp_(0, 1)  # rounding of the sum can leave [0,1]


def l2_step(images: Tensor, gradient: Tensor, length: float) -> Tensor:
    """Move each image by a step of this L2 length along its gradient, and clip it to [0,1]."""
    return (images + length * gradient / _norm(gradient).clamp_min(1e-12)).clamp(0, 1)


def _norm(pixels: Tensor) -> Tensor:
    return torch.linalg.vector_norm(pixels, dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)


def _project(delta: Tensor, eps: float) -> Tensor:
    return delta * (eps / _norm(delta).clamp_min(1e-12)).clamp_max(1)


def _clip(x: Tensor, delta: Tensor) -> Tensor:
    return (x + delta).clamp_(0, 1) - x


@plain_defaults()
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
    """Compute D_adv: `num_adv_images` targeted examples of each image, each with its own random target and start.

    images          (k, 3, H, W) uint8 or float in [0,1]
    labels          (k,) int64, the true classes
    eps, alpha, steps   of the attack, see `pgd_l2`
    first_position  position of the first image in D_f, above 0 in a later step of a continual run
    batch_size      examples computed at once, by default `default_batch_size`
    precision       of forward and backward passes, see `common.precision`
    fold            whether to fold batch-norms into convolutions, see `bn_folding.folded`
    on_halved       called with the new batch size each time that memory runs out
    progress        called with the number of examples after each step of a batch
    returns         examples (k · num_adv_images, 3, H, W) float in [0,1] and their targets (k · num_adv_images,)
                    int64, the examples of the first image first

    Target and start of an example depend only on (seed, position of the image, number of the draw). The set of the
    first k images is therefore the head of the set of more images. The target is uniform over the classes other than
    the true one. The batch size is rounded down to a multiple of eight and halved when memory runs out.
    Raises ValueError as `pgd_l2`, and the out-of-memory error if a single example does not fit.
    """
    targets = random_targets(labels, num_classes, num_adv_images, seed, first_position)
    pixels = as_pixels(images)
    owners = torch.arange(len(images), device=images.device).repeat_interleave(num_adv_images)
    size = multiple_of_eight(batch_size or default_batch_size(images.device, input_side(model, images.shape[-1])))
    examples = torch.empty((len(owners), *pixels.shape[1:]), device=images.device, memory_format=torch.channels_last)
    done = 0
    with folded(model, pixels) if fold else eval_mode(model):
        while done < len(owners):
            left = len(owners) - done
            count = math.ceil(left / math.ceil(left / size))  # batches of nearly equal size
            part = slice(done, done + count)
            full = max(math.ceil(count / 8) * 8, min(size, MIN_BATCH)) if size >= 8 else count
            filled = torch.arange(done, done + full).clamp_max(part.stop - 1)  # padded with copies of the last example
            x = pixels[owners[filled]]
            start = _starts(x, filled.tolist(), num_adv_images, seed, first_position) - x
            advance = (lambda _, count=count: progress(count)) if progress else None  # without the copies
            try:
                with precisions.autocast(images.device, precision):
                    examples[part] = pgd_l2(
                        model, x, targets[filled], eps=eps, alpha=alpha, steps=steps, start=start, progress=advance
                    )[:count]
            except (RuntimeError, MemoryError) as error:
                size = smaller_batch(size, error)
                if on_halved:
                    on_halved(size)
                continue
            done = part.stop
    return examples, targets


def default_batch_size(device: torch.device, side: int) -> int:
    """Return the default number of examples of `side` x `side` pixels computed at once on the device."""
    return BATCH_SIZE[device.type][side > LARGE]


def random_targets(labels: Tensor, num_classes: int, num_adv_images: int, seed: int, first_position: int = 0) -> Tensor:
    """Draw the targets (k · num_adv_images,) int64 of D_adv, uniform over the classes other than the true one.

    labels (k,) int64, the true classes; for `seed` and `first_position` see `adversarial_set`
    """
    draws = [
        seeds.stream(seed, "target", position, draw).integers(num_classes - 1)
        for position in range(first_position, first_position + len(labels))
        for draw in range(num_adv_images)
    ]
    return other_class(labels.repeat_interleave(num_adv_images), torch.tensor(draws, device=labels.device))


def _starts(like: Tensor, examples: list[int], num_adv_images: int, seed: int, first_position: int) -> Tensor:
    """Draw the starting images (n, 3, H, W) of these examples of D_adv: uniform noise in [0,1]."""
    drawn = [divmod(example, num_adv_images) for example in examples]  # (position in D_f, number of the draw)
    streams = [seeds.stream(seed, "start", first_position + position, draw) for position, draw in drawn]
    noise = [stream.random(tuple(like.shape[1:]), dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(noise)).to(like.device)
