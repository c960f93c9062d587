"""D_adv of a run: what of it is in the cache is taken from there, the rest is made, kept as asked for, and cached."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from l2ul import Progress, attack
from l2ul.common import distributed
from l2ul.common.cache import Cache, environment, fingerprint
from l2ul.common.files import tensors_sha256
from l2ul.data import storage
from l2ul.methods.settings import AttackSettings
from l2ul.metrics import accuracy


@dataclass(frozen=True)
class Adversarial:
    """D_adv of a D_f.

    examples    (k · N_adv, 3, H, W), floats in [0,1] or uint8, the draws of the first image first; targets (k · N_adv,)
    hits        which of them the net calls their target, as they are kept
    exact_hits  the same before they were rounded
    batch_size  pairs attacked at once: what was asked for, or less where memory ran out meanwhile
    """

    examples: Tensor
    targets: Tensor
    hits: Tensor
    exact_hits: Tensor
    batch_size: int

    def head(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        return self.examples[:num_pairs], self.targets[:num_pairs]

    def store(self, place: int, part: dict[str, Tensor]) -> None:
        """Take what the cache keeps of one image."""
        draws = len(part["hits"])
        where = slice(place * draws, (place + 1) * draws)
        self.examples[where] = part["examples"].to(self.targets.device)
        self.hits[where], self.exact_hits[where] = part["hits"], part["exact_hits"]

    def take(self, keys: dict[int, dict[str, object]], cache: Cache) -> dict[int, dict[str, object]]:
        """Take what the cache keeps under the keys of these images, by place; returns those of which it keeps none."""
        missing = {}
        for place, key in keys.items():
            kept = cache.get(key)
            if kept:
                self.store(place, kept)
            else:
                missing[place] = key
        return missing

    def success(self, num_pairs: int) -> dict[str, float]:
        """Percent of the first examples that are called their target, under the keys of a record."""
        hits = {"adv_success": self.hits, "adv_success_exact": self.exact_hits}
        return {key: 100 * which[:num_pairs].double().mean().item() for key, which in hits.items()}


@dataclass(frozen=True)
class Attack:
    """How D_adv is made.

    measuring_batch  examples looked at at once, to count hits
    scratch_dir      for a D_adv that does not fit in memory
    """

    num_classes: int
    settings: AttackSettings
    seed: int
    batch_size: int | None = None
    measuring_batch: int = 256
    scratch_dir: Path = Path("result_data/scratch")

    def make(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        first_position: int = 0,
        *,
        cache: Cache,
        progress: Progress,
    ) -> Adversarial:
        """D_adv of images (k, 3, H, W), labels (k,), of which the first has this position in D_f.

        On a CPU, bit by bit what it would be without the cache. Progress counts pairs times steps. A process that is
        stopped loses what it did for a few images. The processes of a torchrun share the work, see `helping`; the
        first has the whole set.
        """
        keys = self._keys(model, images, labels, first_position)
        aims = attack.random_targets(labels, self.num_classes, self.settings.num_adv_images, self.seed, first_position)
        made = self._empty(images, aims)
        missing = made.take(dict(enumerate(keys)), cache)
        sizes = [made.batch_size]
        if not missing:
            progress(len(aims) * self.settings.iterations)
            return replace(made, batch_size=sizes[-1])
        with cache.lock(keys[0]):  # or wait for another command that is at it
            missing = made.take(missing, cache)
            progress((len(keys) - len(missing)) * self.settings.num_adv_images * self.settings.iterations)
            work = Work(images, labels, first_position, self._stretches(list(missing), made.batch_size))
            distributed.call_others("attack", self, distributed.state(model), work.on(torch.device("cpu")), sizes)
            for number, (start, parts) in enumerate(self._shares(model, work, sizes, progress)):
                for place, part in enumerate(parts, start):
                    made.store(place, part)
                    cache.put(keys[place], part)
                    if number % distributed.size():  # of another process, which shows nothing
                        progress(self.settings.num_adv_images * self.settings.iterations)
                cache.trim()
            return replace(made, batch_size=min(distributed.gather(sizes[-1])))

    def assist(self, model: nn.Module, work: "Work", sizes: list[int]) -> None:
        """Of the other processes of a torchrun: their part of what `make` has called for, sent to the first."""
        for _ in self._shares(model, work, sizes, lambda count: None):
            pass
        distributed.gather(sizes[-1])

    def _stretches(self, missing: list[int], batch_size: int) -> list[tuple[int, int]]:
        """The images to attack, a few at a time: no more than a batch has room for, and some for every process."""
        share = math.ceil(len(missing) / distributed.size()) if distributed.size() > 1 else len(missing)
        return list(_stretches(missing, max(1, min(batch_size // self.settings.num_adv_images, share))))

    def _shares(
        self, model: nn.Module, work: "Work", sizes: list[int], progress: Progress
    ) -> Iterator[tuple[int, Iterable[dict[str, Tensor]]]]:
        """Of each stretch the place of its first image and what the cache keeps of its images; to the first process.

        Each process takes one of the next stretches, and all hand over what they made before any takes another.
        """
        for turn in range(0, len(work.stretches), distributed.size()):
            found, own = None, turn + distributed.rank()
            if own < len(work.stretches):
                start, stop = work.stretches[own]
                some = work.images[start:stop], work.labels[start:stop], work.first_position + start
                parts = self._attack(model, *some, sizes, progress)
                if distributed.size() > 1:
                    parts = [{name: tensor.cpu() for name, tensor in part.items()} for part in parts]
                found = start, parts
            yield from filter(None, distributed.gather(found))

    def _empty(self, images: Tensor, targets: Tensor) -> Adversarial:
        """Room for everything, made whole at once: small tensors between large ones keep memory from shrinking."""
        shape = (len(targets), *images.shape[1:])
        examples = storage.empty_images(shape, storage.DTYPES[self.settings.dtype], images.device, self.scratch_dir)
        hits, exact_hits = torch.zeros(2, len(targets), dtype=torch.bool)
        batch_size = self.batch_size or attack.default_batch_size(images.device, images.shape[-1])
        return Adversarial(examples, targets, hits, exact_hits, batch_size)

    def _attack(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        position: int,
        sizes: list[int],
        progress: Progress,
    ) -> Iterator[dict[str, Tensor]]:
        """What the cache keeps of each of a few images; a batch size that memory has room for is added to `sizes`."""
        exact, targets = attack.adversarial_set(
            model,
            images,
            labels,
            self.num_classes,
            num_adv_images=self.settings.num_adv_images,
            eps=self.settings.eps,
            alpha=self.settings.alpha,
            steps=self.settings.iterations,
            seed=self.seed,
            first_position=position,
            batch_size=sizes[-1],
            precision=self.settings.precision,
            on_halved=sizes.append,
            progress=progress,
        )
        stored = storage.as_stored(exact, storage.DTYPES[self.settings.dtype])
        hits = self._hits(model, stored, targets)
        exact_hits = hits.clone() if stored is exact else self._hits(model, exact, targets)
        parts = (part.split(self.settings.num_adv_images) for part in (stored, hits, exact_hits))
        for examples, hit, exact_hit in zip(*parts, strict=True):
            yield {"examples": examples.contiguous(), "hits": hit, "exact_hits": exact_hit}

    def _hits(self, model: nn.Module, examples: Tensor, targets: Tensor) -> Tensor:
        called = accuracy.predict(model, examples, batch_size=self.measuring_batch)
        return called == targets.cpu()

    def _keys(self, model: nn.Module, images: Tensor, labels: Tensor, first_position: int) -> list[dict[str, object]]:
        """For each image, all that decides its examples, bit by bit."""
        shared = asdict(self.settings) | {"num_classes": self.num_classes, "seed": self.seed}
        shared |= {"kind": "adversarial examples", "net": fingerprint(model)} | environment(images.device)
        return [
            shared | {"image": tensors_sha256({"": image}), "label": label, "position": first_position + place}
            for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
        ]


@dataclass(frozen=True)
class Work:
    """What of a D_f is to be attacked: images (k, 3, H, W) and labels (k,), of which the first has this position.

    stretches  place of the first image of each few, and of the one after the last
    """

    images: Tensor
    labels: Tensor
    first_position: int
    stretches: list[tuple[int, int]]

    def on(self, device: torch.device) -> "Work":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def _stretches(places: list[int], longest: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each stretch of consecutive places, cut where it gets too long."""
    start = None
    for index, place in enumerate(places):
        start = place if start is None else start
        if place + 1 - start == longest or index + 1 == len(places) or places[index + 1] != place + 1:
            yield start, place + 1
            start = None
