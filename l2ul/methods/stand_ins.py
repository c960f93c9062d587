"""Stand-ins for D_r: the images on which `distill` keeps the outputs and features of the original model θ⁰.

They are made of D_f (see `l2ul.data.mixes`), of D_f and θ⁰, or are unlabelled images that the user has (see
`l2ul.data.surrogate`). Images are synthesised before the loop (see `Synthesis`).
"""

from collections.abc import Sequence
import contextlib

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
import torch.nn.functional as F

from l2ul import Progress, ProgressBar
from l2ul.common import activations, seeds
from l2ul.common.cache import Cache, environment, model_fingerprint
from l2ul.common.files import tensors_sha256
from l2ul.common.modes import batch_norms, frozen
from l2ul.common.nested import upload_together
from l2ul.data.images import StoredImages, stored
from l2ul.data.mixes import KINDS, Kind
from l2ul.methods.settings import Settings

BATCH = 256  # images that are synthesised at once; their statistics are those of the batch
SYNTHESIS_LR = 0.01  # highest rate of Adam on pixels in [0,1]
STATISTICS_VERSION = 2  # part of the keys of images that models without batch-norm made; it grows with each change
STATISTICS, VARIATION = 10.0, 1.0  # weights of the statistics of features and of the total variation


class StandIns:
    """The stand-ins of each step: `draw` draws random numbers on the CPU, and `make` computes images from them.

    model      the original model, in eval mode; used here alone, to synthesise images
    images     (k, 3, H, W) float in [0,1], D_f
    settings   `distill_stand_ins` names the kinds, in equal parts of the `distill_mixes` images of a step
    synthesis  makes the synthesised images
    surrogate  (n, 3, H, W) uint8 or float in [0,1], images that the user has; they take the part
               `distill_surrogate` of a step
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        settings: Settings,
        synthesis: "Synthesis",
        surrogate: Tensor | None = None,
    ):
        kinds = settings.distill_stand_ins.split("+")
        natural = round(settings.distill_surrogate * settings.distill_mixes) if surrogate is not None else 0
        rest = settings.distill_mixes - natural
        sizes = [rest // len(kinds) + (place < rest % len(kinds)) for place in range(len(kinds))]
        sources = dict.fromkeys(KINDS, images)
        if "synthesised" in kinds and natural < settings.distill_mixes:
            count, iterations = settings.distill_pool, settings.distill_pool_steps
            sources["synthesised"] = synthesis.images(model, images, settings, count, iterations)
        self._parts: list[tuple[Kind, Tensor | StoredImages, int]] = [
            (KINDS.get(kind, KINDS["copies"]), sources[kind], size)
            for kind, size in zip(kinds, sizes, strict=True)
            if size
        ]
        self._parts += [(KINDS["copies"], StoredImages(surrogate), natural)] if natural else []

    def __call__(self, generator: torch.Generator) -> Tensor:
        """Return stand-ins (n, 3, H, W)."""
        return self.make(upload_together(self.draw(generator), self._parts[0][1].device))

    def draw(self, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """Draw the random numbers of the next step, for each part of the stand-ins."""
        return [kind.draw(images.shape, size, generator) for kind, images, size in self._parts]

    def make(self, numbers: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the stand-ins (n, 3, H, W) with these random numbers, which are on the device of D_f."""
        parts = [kind.make(images, *own) for (kind, images, _), own in zip(self._parts, numbers, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Synthesis:
    """Synthesises images like those that a model was trained on, from D_f and the model alone.

    cache     on disk, for later commands; by default nothing is written
    progress  shows the progress; None: nothing does

    Images are kept as long as this object: the same ones are synthesised once.

    Yin et al., Dreaming to Distill (CVPR 2020, arXiv 1912.08795). A batch starts from `patches` of D_f, with a random
    class for each image, and minimises over the pixels

        c · CE(model(x), class) + 10 · mean_l ( mean (μ_l - μ⁰_l)²/σ⁰_l² + mean (σ_l/σ⁰_l - 1)² ) + total variation

    with the channel means μ_l and deviations σ_l of the batch at each batch-norm and the running statistics μ⁰, σ⁰. A
    model without batch-norm has those of D_f in their place, at the inputs of its convolutions and linear layers. With
    c = 0 the images stay less certain to the model, as images of other classes are, and the loss on them sees more of
    the damage (docs/trials.md).
    """

    def __init__(self, cache: Cache | None = None, progress: ProgressBar | None = None):
        self.cache, self.progress = cache or Cache(), progress
        self._made: dict[str, Tensor] = {}  # by key

    def images(
        self,
        model: nn.Module,
        images: Tensor,
        settings: Settings,
        count: int,
        iterations: int,
        class_weight: float = 1.0,
    ) -> Tensor:
        """Return `count` images (count, 3, H, W), synthesised in `iterations` from D_f with the seed of the settings.

        model         in eval mode
        images        (k, 3, H, W) float in [0,1], D_f
        class_weight  c, the weight of the cross-entropy
        """
        with torch.no_grad():  # the logits depend on the precision of the passes
            inputs = tensors_sha256({"images": stored(images), "logits": model(images[:1])})
        key = {"kind": "synthesised images", "count": count, "iterations": iterations, "seed": settings.seed}
        key |= {"position": settings.first_position, "net": model_fingerprint(model), "inputs": inputs}
        key |= {"class_weight": class_weight} | environment(images.device)
        key |= {} if batch_norms(model) else {"statistics": STATISTICS_VERSION}
        name = repr(key)
        if name not in self._made:
            with self.cache.lock(key):  # waits for another command that makes the same
                entry = self.cache.get(key)
                made = (
                    entry["images"] if entry else self._make(model, images, settings, count, iterations, class_weight)
                )
                if not entry:
                    self.cache.put(key, {"images": made.contiguous()})
                    self.cache.trim()
            self._made[name] = made.to(images.device, memory_format=torch.channels_last)
        return self._made[name]

    def _make(
        self, model: nn.Module, images: Tensor, settings: Settings, count: int, iterations: int, class_weight: float
    ) -> Tensor:
        generator = seeds.generator(settings.seed, "synthesised", settings.first_position)
        no_progress = contextlib.nullcontext(lambda count: None)
        name = f"synthesise {count} images, {iterations} iterations each"
        bar = self.progress(name, count * iterations) if self.progress else no_progress
        with bar as advance:
            statistics = _Statistics(model, images)
            starts = (KINDS["patches"](images, size, generator) for size in _sizes(count))
            return torch.cat(
                [
                    _synthesise(model, statistics, start, iterations, class_weight, generator, advance)
                    for start in starts
                ]
            )


def _synthesise(
    model: nn.Module,
    statistics: "_Statistics",
    start: Tensor,
    steps: int,
    class_weight: float,
    generator: torch.Generator,
    progress: Progress,
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
            loss = STATISTICS * gap + VARIATION * _total_variation(pixels)
            if class_weight:
                loss = loss + class_weight * F.cross_entropy(logits, classes)
            (pixels.grad,) = torch.autograd.grad(loss, pixels)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
            progress(len(pixels))
    return pixels.detach()


class _Statistics:
    """Means and variances of the channels of features that synthesised images should have."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.model = model
        norms = batch_norms(model)
        names = activations.run_names(model, norms, images)
        self.moments = {name: (norms[name].running_mean, norms[name].running_var) for name in names}
        if not self.moments:
            names = list(activations.layers(model, images)) or [""]  # the pixels, if it has no such layers
            with torch.no_grad():
                _, found = activations.logits_and_inputs(
                    model,
                    images[:BATCH],
                    names,
                    reduce=lambda name, inputs: (self._has_positions(name, inputs), self._of_channels(name, inputs)),
                )
            # inputs with a single position, which have no variance if k = 1, are left out unless all are so
            some = any(has_positions for has_positions, _ in found)
            kept = [has_positions or not some for has_positions, _ in found]
            self.moments = {name: moments for name, (_, moments), keep in zip(names, found, kept, strict=True) if keep}

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

    def _channel(self, name: str, features: Tensor) -> int:
        """Return the axis of the channels in the input of a module."""
        return features.ndim - 1 if isinstance(self.model.get_submodule(name), nn.Linear) else 1

    def _has_positions(self, name: str, features: Tensor) -> bool:
        """Return whether there are several positions per image: pixels of a feature map, or tokens."""
        return features.numel() > len(features) * features.shape[self._channel(name, features)]

    def _of_channels(self, name: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance (C,) over images and positions."""
        channel = self._channel(name, features)
        others = [axis for axis in range(features.ndim) if axis != channel]
        features = features.float()  # of bf16 passes
        with saved_tensors_hooks(_same, _same):  # not those of a checkpoint, which recomputes without this function
            return features.mean(others), features.var(others, correction=0)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, a scalar."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def _sizes(count: int) -> list[int]:
    """Return the sizes of batches of nearly equal size, at most BATCH."""
    return [len(part) for part in torch.arange(count).tensor_split(-(-count // BATCH))]
