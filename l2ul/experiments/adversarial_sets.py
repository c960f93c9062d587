"""The adversarial set D_adv of a forget set: read from the cache as far as possible, otherwise made and cached."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from l2ul import Progress, attack
from l2ul.common import distributed
from l2ul.common.cache import Cache, environment, model_fingerprint
from l2ul.common.errors import Diverged
from l2ul.common.files import tensors_sha256
from l2ul.common.precision import exactly
from l2ul.data import storage
from l2ul.data.images import input_side
from l2ul.methods.settings import AttackSettings
from l2ul.metrics import accuracy

Part = dict[str, Tensor]  # what the cache keeps of one image: examples (N_adv, 3, H, W) and hits (N_adv,)


@dataclass
class AdversarialSet:
    """D_adv of k images, N_adv examples each.

    examples     (k · N_adv, 3, H, W), float in [0,1] or uint8; the examples of the first image come first
    targets      (k · N_adv,) int64
    hits         (k · N_adv,) bool on the CPU: whether the original model classifies the stored example as its target
    batch_size   examples attacked at once: the given number, or less if memory ran out
    seconds      that the attack took
    """

    examples: Tensor
    targets: Tensor
    hits: Tensor
    batch_size: int
    seconds: float = 0.0

    def head(self, count: int) -> "AdversarialSet":
        """Return the first `count` examples, with their share of the seconds."""
        seconds = self.seconds * count / len(self.targets)
        return AdversarialSet(self.examples[:count], self.targets[:count], self.hits[:count], self.batch_size, seconds)

    @property
    def success(self) -> float:
        """Percent of the examples that the original model classifies as their target."""
        return 100 * self.hits.double().mean().item()

    def store(self, position: int, part: Part) -> None:
        """Store the examples of the image at `position`."""
        count = len(part["hits"])
        where = slice(position * count, (position + 1) * count)
        self.examples[where] = part["examples"].to(self.targets.device)
        self.hits[where] = part["hits"]

    def load(self, keys: dict[int, dict[str, object]], cache: Cache) -> dict[int, dict[str, object]]:
        """Store what the cache has under the keys of these positions; return the keys that it does not have."""
        missing = {}
        for position, key in keys.items():
            part = cache.get(key)  # entries of older versions also have exact_hits, which is ignored
            if part:
                self.store(position, part)
            else:
                missing[position] = key
        return missing


@dataclass(frozen=True)
class Attack:
    """How D_adv is made.

    batch_size       examples attacked at once
    test_batch_size  examples per batch when hits are counted
    scratch_dir      folder for a D_adv that does not fit in memory
    """

    num_classes: int
    settings: AttackSettings
    seed: int
    batch_size: int | None = None
    test_batch_size: int = 256
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
    ) -> AdversarialSet | None:
        """Return D_adv, from the cache or newly made.

        images, labels  D_f (k, 3, H, W) and (k,)
        first_position  of these images in D_f
        progress        called with the number of examples times steps done since the last call

        On a CPU the result does not depend on what is cached, bit for bit. Each image is cached as soon as its batch
        is finished, so that an interrupted process loses little.

        Under torchrun all processes call this and share the work. The first process reads and writes the cache, and
        gets the whole set; the others get None. Raises Diverged if the model's logits are not finite.
        """
        first = distributed.is_first()
        targets = attack.random_targets(
            labels, self.num_classes, self.settings.num_adv_images, self.seed, first_position
        )
        batch_size = self.batch_size or attack.default_batch_size(images.device, input_side(model, images.shape[-1]))
        result, keys, missing = None, {}, {}
        if first:
            keys = dict(enumerate(self._keys(model, images, labels, first_position)))
            result = self._allocate(images, targets, batch_size)
            missing = result.load(keys, cache)
        cost = self.settings.num_adv_images * self.settings.iterations  # of an image, in units of progress
        if not distributed.broadcast(lambda: bool(missing)):
            progress(len(labels) * cost)
            return result
        with (cache if first else Cache()).lock(keys.get(0, {})):  # waits for another command that makes the same
            if first:
                missing = result.load(missing, cache)
                progress((len(keys) - len(missing)) * cost)
            chunks = self._chunks(distributed.broadcast(lambda: list(missing)), batch_size)
            sizes = [batch_size]  # the last one is used; smaller ones are added where memory runs out
            for turn in range(0, len(chunks), distributed.size()):
                own = turn + distributed.rank()
                chunk = chunks[own] if own < len(chunks) else None
                parts = self._attack_chunk(model, images, labels, first_position, chunk, sizes, progress)
                for rank, chunk_parts in enumerate(distributed.gather(parts)):  # an empty list in the other processes
                    for position, part in chunk_parts:
                        result.store(position, part)
                        cache.put(keys[position], part)
                        if rank:  # made by another process, which shows no progress
                            progress(cost)
                if first:
                    cache.trim()
        smallest = min(distributed.gather(sizes[-1]), default=None)
        if first:
            result.batch_size = smallest
        return result

    def _chunks(self, positions: list[int], batch_size: int) -> list[tuple[int, int]]:
        """Split the positions to attack into (start, stop) chunks that fit in a batch, at least one per process."""
        share = math.ceil(len(positions) / distributed.size()) if distributed.size() > 1 else len(positions)
        return list(_consecutive(positions, max(1, min(batch_size // self.settings.num_adv_images, share))))

    def _allocate(self, images: Tensor, targets: Tensor, batch_size: int) -> AdversarialSet:
        """Allocate all examples at once: growing them would leave gaps in memory between small tensors."""
        shape = (len(targets), *images.shape[1:])
        examples = storage.empty_images(shape, storage.DTYPES[self.settings.dtype], images.device, self.scratch_dir)
        return AdversarialSet(examples, targets, torch.zeros(len(targets), dtype=torch.bool), batch_size)

    def _attack_chunk(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        first_position: int,
        chunk: tuple[int, int] | None,
        sizes: list[int],
        progress: Progress,
    ) -> list[tuple[int, Part]]:
        """Attack the images of a chunk, start and stop, if this process has one; return the parts with their positions.

        Appends to `sizes` where memory runs out. Raises Diverged in every process if it is raised in one.
        """
        parts, diverged = [], None
        if chunk:
            start, stop = chunk
            try:
                made = self._attack(
                    model, images[start:stop], labels[start:stop], first_position + start, sizes, progress
                )
                parts = list(enumerate(made, start))
            except Diverged as error:
                diverged = str(error)
        gathered = distributed.gather(diverged)
        if error := next(filter(None, distributed.broadcast(lambda: gathered)), None):
            raise Diverged(error)
        if distributed.size() > 1:
            parts = [(position, {name: tensor.cpu() for name, tensor in part.items()}) for position, part in parts]
        return parts

    def _attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, position: int, sizes: list[int], progress: Progress
    ) -> Iterator[Part]:
        exact, targets = attack.adversarial_set(
            model,
            images,
            labels,
            self.num_classes,
            **self.settings.arguments(),
            seed=self.seed,
            first_position=position,
            batch_size=sizes[-1],
            on_halved=sizes.append,
            progress=progress,
        )
        stored = storage.as_stored(exact, storage.DTYPES[self.settings.dtype])
        with exactly():
            hits = accuracy.predict(model, stored, batch_size=self.test_batch_size) == targets.cpu()
        parts = (values.split(self.settings.num_adv_images) for values in (stored, hits))
        for examples, hit in zip(*parts, strict=True):
            yield {"examples": examples.contiguous(), "hits": hit}

    def _keys(self, model: nn.Module, images: Tensor, labels: Tensor, first_position: int) -> list[dict[str, object]]:
        """Return for each image everything that decides its examples, bit for bit."""
        shared = asdict(self.settings) | {"num_classes": self.num_classes, "seed": self.seed}
        shared["steps"] = shared.pop("iterations")  # the name in the keys of existing caches
        shared |= {"kind": "adversarial examples", "net": model_fingerprint(model)} | environment(images.device)
        return [
            shared | {"image": tensors_sha256({"": image}), "label": label, "position": first_position + place}
            for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
        ]


def _consecutive(positions: list[int], longest: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of consecutive positions, cut to at most `longest`."""
    for _, pairs in itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        run = [position for _, position in pairs]
        for start in range(run[0], run[-1] + 1, longest):
            yield start, min(start + longest, run[-1] + 1)
