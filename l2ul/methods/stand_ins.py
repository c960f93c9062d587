"""Stand-ins for D_r: the images on which `distill` keeps the outputs and features of the original model θ⁰.

They are made of D_f (see `l2ul.data.mixes`), of D_f and θ⁰, or are unlabelled images that the user has (see
`l2ul.data.surrogate`). Synthesised images are made once, before the loop.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from l2ul.common import activations, seeds
from l2ul.common.device import upload
from l2ul.common.modes import frozen
from l2ul.data import mixes
from l2ul.data.augment import augment
from l2ul.data.images import as_pixels
from l2ul.methods.checkpoint import fingerprint
from l2ul.methods.settings import Settings

Draw = Callable[[int, torch.Generator], Tensor]  # from a count and a CPU generator to images (count, 3, H, W)

BATCH = 256  # images that are synthesised at once; their statistics are those of the batch
SYNTHESIS_LR = 0.01  # highest rate of Adam on pixels in [0,1]
STATISTICS, VARIATION = 10.0, 1.0  # weights of the statistics of features and of the total variation
_last: dict[str, Tensor] = {}  # by the inputs of the last call of `synthesised`
MIXED_KINDS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "mixes": mixes.mixes,
    "triples": mixes.triples,
    "copies": mixes.copies,
    "recoloured": mixes.recoloured,
    "patches": mixes.patches,
    "crops": mixes.crops,
    "spectra": mixes.spectra,
}


class StandIns:
    """Draws the stand-ins of each step.

    model      the original model, in eval mode; used here alone, to synthesise images
    images     (k, 3, H, W) float in [0,1], D_f
    settings   `distill_stand_ins` names the kinds, in equal parts of the `distill_mixes` images of a step
    surrogate  (n, 3, H, W) uint8 or float in [0,1], images of the same kind as D_r; they take the part
               `distill_surrogate` of a step
    """

    def __init__(self, model: nn.Module, images: Tensor, settings: Settings, surrogate: Tensor | None = None):
        kinds = settings.distill_stand_ins.split("+")
        natural = round(settings.distill_surrogate * settings.distill_mixes) if surrogate is not None else 0
        rest = settings.distill_mixes - natural
        sizes = [rest // len(kinds) + (place < rest % len(kinds)) for place in range(len(kinds))]
        draws: dict[str, Draw] = {kind: partial(make, images) for kind, make in MIXED_KINDS.items()}
        if "synthesised" in kinds and natural < settings.distill_mixes:
            draws["synthesised"] = partial(_drawn, synthesised(model, images, settings))
        self._parts = [(draws[kind], size) for kind, size in zip(kinds, sizes, strict=True) if size]
        self._parts += [(partial(_drawn, surrogate), natural)] if natural else []

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the stand-ins (n, 3, H, W) of the next step."""
        parts = [draw(size, generator) for draw, size in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def synthesised(model: nn.Module, images: Tensor, settings: Settings) -> Tensor:
    """Synthesise `distill_pool` images that the model classifies with confidence, from D_f and the model alone.

    Yin et al., Dreaming to Distill (CVPR 2020, arXiv 1912.08795). A batch starts from `patches` of D_f, with a random
    class for each image, and minimises over the pixels

        CE(model(x), class) + 10 · mean_l ( mean (μ_l - μ⁰_l)²/σ⁰_l² + mean (σ_l/σ⁰_l - 1)² ) + total variation

    with the channel means μ_l and deviations σ_l of the batch at each batch-norm and the running statistics μ⁰, σ⁰. A
    model without batch-norm has those of D_f at the inputs of its convolutions and linear layers in their place. The
    images of the last call are kept for a call with the same inputs.
    """
    draws = settings.seed, settings.first_position, settings.distill_pool, settings.distill_pool_steps
    key = fingerprint(model.state_dict(), images, draws)
    if key not in _last:
        generator = seeds.generator(settings.seed, "synthesised", settings.first_position)
        targets = _Statistics(model, images)
        pool = [
            _synthesise(model, targets, mixes.patches(images, size, generator), settings.distill_pool_steps, generator)
            for size in _sizes(settings.distill_pool)
        ]
        _last.clear()
        _last[key] = torch.cat(pool)
    return _last[key]


def has_statistics(model: nn.Module) -> bool:
    """Return whether a model has batch-norm layers with running statistics."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())


def _synthesise(
    model: nn.Module, statistics: "_Statistics", start: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    with torch.no_grad():
        num_classes = model(start[:1]).shape[1]
    classes = torch.randint(num_classes, (len(start),), generator=generator).to(start.device)
    pixels = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], SYNTHESIS_LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    reach = max(1, start.shape[-1] // 16)
    with frozen(model):
        for _ in range(steps):
            down, right, mirror = torch.randint(2 * reach + 1, (3,), generator=generator).tolist()
            moved = pixels.roll((down - reach, right - reach), (2, 3))
            logits, gap = statistics.gap(moved.flip(3) if mirror % 2 else moved)
            loss = F.cross_entropy(logits, classes) + STATISTICS * gap + VARIATION * _total_variation(pixels)
            (pixels.grad,) = torch.autograd.grad(loss, pixels)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
    return pixels.detach()


class _Statistics:
    """Means and variances of the channels of features that synthesised images should have."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.model = model
        names = activations.run_names(model, activations.module_names(model, _BatchNorm), images)
        norms = {name: model.get_submodule(name) for name in names}
        moments = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
        self.moments = {name: pair for name, pair in moments.items() if pair[0] is not None}
        if not self.moments:
            names = list(activations.layers(model, images))
            with torch.no_grad():
                _, found = activations.logits_and_inputs(model, images[:BATCH], names, reduce=self._of_channels)
            self.moments = dict(zip(names, found, strict=True))

    def gap(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of images and the difference of their moments from the targets, a scalar."""
        logits, moments = activations.logits_and_inputs(
            self.model, images, list(self.moments), reduce=self._of_channels
        )
        gaps = []
        for (mean, variance), (target_mean, target_variance) in zip(moments, self.moments.values(), strict=True):
            floor = 1e-3 * target_variance.mean() + 1e-12  # for channels that are constant
            deviation, target_deviation = (variance + floor).sqrt(), (target_variance + floor).sqrt()
            gaps.append(
                ((mean - target_mean) / target_deviation).square().mean()
                + (deviation / target_deviation - 1).square().mean()
            )
        return logits, torch.stack(gaps).mean()

    def _of_channels(self, name: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance (C,) over images and positions."""
        channel = features.ndim - 1 if isinstance(self.model.get_submodule(name), nn.Linear) else 1
        others = [axis for axis in range(features.ndim) if axis != channel]
        return features.mean(others), features.var(others, correction=0)


def _total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, a scalar."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def _sizes(count: int) -> list[int]:
    """Return the sizes of batches of nearly equal size, at most BATCH."""
    return [len(part) for part in torch.arange(count).tensor_split(-(-count // BATCH))]


def _drawn(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw images, shifted and mirrored at random."""
    chosen = upload(torch.randint(len(images), (count,), generator=generator), images.device)
    return augment(as_pixels(images[chosen]), images.shape[-1] // 8, True, generator)
