"""The parts that `speed.py` measures: of L2UL, in the released order of work, and passes of the network alone."""

import argparse
from collections.abc import Callable, Iterable
import itertools
import math
from pathlib import Path
import statistics
import tempfile

import released
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul import models
from l2ul.attack import adversarial_set
from l2ul.cli import options
from l2ul.cli.parser import Parser, positive_int
from l2ul.common import device as device_module
from l2ul.common import precision
from l2ul.common.bn_folding import folded
from l2ul.common.cache import Cache
from l2ul.common.modes import frozen
from l2ul.data.images import Images, as_pixels
from l2ul.experiments.adversarial_sets import Attack
from l2ul.importance import mas_importance
from l2ul.methods.settings import AttackSettings
from l2ul.metrics import accuracy
from l2ul.models import checkpoint
from l2ul.unlearn import Settings, unlearn

EPS, ALPHA, ITERATIONS, DRAWS, BATCH = 4.0, 0.1, 100, 20, 32  # the released settings for CIFAR-10
LOADER_BATCH = 128  # of the released order's loader when it measures
RATE = 1e-12  # of learning while timing: nothing is forgotten, so every run does all of its steps
Measured = dict[str, list[float]]  # seconds of each repeat, by what was done
Labelled = tuple[Tensor, Tensor]


def interleaved(
    parts: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm: bool = True
) -> Measured:
    """Return the seconds of each part in each repeat. Parts take turns (A B A B …), after each was done once."""
    for part in parts.values() if warm else ():
        part()
    seconds = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            started = device_module.clock(device)
            part()
            seconds[name].append(device_module.clock(device) - started)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Return the median, the smallest and the largest ratio of pairs."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def parser_of(
    description: str, prog: str, model: str, counts: Iterable[tuple[str, int, str]]
) -> tuple[Parser, argparse._ArgumentGroup]:
    """Return a parser of flags for data, weights and machine, and its group of flags of the benchmark.

    counts  flag, default and help text of the flags that are positive whole numbers
    """
    parser = Parser(description, prog=prog)
    options.add_data(parser, dataset="cifar10", model=model)
    options.add_weights(parser)
    options.add_machine(parser)
    group = parser.add_argument_group("benchmark")
    for flag, default, text in counts:
        group.add_argument(flag, type=positive_int, default=default, help=f"{text} (default: {default})")
    return parser, group


def load(opts: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Images, bool]:
    """Return the model, the data set and whether the model is trained; without weights it is not."""
    path = opts.checkpoint or checkpoint.find(opts.dataset, opts.model, opts.data_dir)
    images = options.load_data(opts).to(device)
    if path:
        model = models.load(opts.model, images.num_classes, path, opts.mean, opts.std)
    else:
        model = models.build(opts.model, images.num_classes).eval()
    return model.to(device, memory_format=torch.channels_last), images, path is not None


class Bench:
    """The networks, the images and the parts that are measured."""

    def __init__(self, opts: argparse.Namespace, device: torch.device):
        self.opts, self.device = opts, device
        self.ours, self.images, self.trained = load(opts, device)
        self.theirs = released.as_built(self.ours)
        self.fresh = itertools.count()

    def forget(self, k: int) -> Labelled:
        """Return k images, others at each call, and labels with which a step does not forget them all.

        The labels are the predictions of a trained network. An untrained one predicts one class for nearly all images;
        the labels are then all classes in turn.
        """
        first = next(self.fresh) * k % (len(self.images.train) - k)
        images = self.images.train.images[first : first + k]
        if not self.trained:
            return images, torch.arange(k, device=self.device) % self.images.num_classes
        return images, accuracy.predict(self.ours, images).to(self.device)

    def make(self, forget: Labelled, draws: int, iterations: int, cache: Cache | None = None) -> None:
        how = Attack(
            self.images.num_classes,
            AttackSettings(draws, EPS, ALPHA, iterations, precision=self.opts.precision),
            seed=0,
        )
        how.make(self.ours, *forget, cache=cache or Cache(), progress=lambda count: None)

    def attack(self) -> Measured:
        """Measure the seconds of an iteration of the attack for an example, on other images in each repeat."""
        count, iterations = self.opts.pairs, self.opts.iterations
        few_pairs = min(count, self.opts.released_pairs)  # in batches of 16 or 32, whose number changes no rate
        few, more = (itertools.cycle([self.forget(k) for _ in range(self.opts.repeats + 1)]) for k in (16, 32))
        sizes = sorted({max(1, count // 2), count, 2 * count})
        parts = {
            "ours": lambda: self._our_attack(next(few), count // 16),
            "released": lambda: self._released_attack(next(few), few_pairs // 16, iterations),
            "released, batches of 32": lambda: self._released_attack(next(more), few_pairs // 32, iterations),
        }
        parts |= {f"floor at {size}": lambda size=size: self._floor(size, iterations) for size in sizes}
        found = interleaved(parts, self.opts.repeats, self.device)

        def pairs_of(name: str) -> int:
            return int(name.split()[-1]) if "floor" in name else count if name == "ours" else few_pairs

        found = {name: [part / iterations / pairs_of(name) for part in seconds] for name, seconds in found.items()}
        best = min(sizes, key=lambda size: statistics.median(found[f"floor at {size}"]))
        return found | {"floor": found[f"floor at {best}"]}

    def _our_attack(self, forget: Labelled, draws: int) -> None:
        how = {"num_adv_images": draws, "eps": EPS, "alpha": ALPHA, "steps": self.opts.iterations, "seed": 0}
        how |= {"batch_size": self.opts.pairs, "precision": self.opts.precision}
        adversarial_set(self.ours, *forget, self.images.num_classes, **how)

    def _released_attack(self, forget: Labelled, draws: int, iterations: int) -> None:
        images = released.PilImages(*forget)
        batch_size = 16 if len(images) <= 16 else BATCH
        size = {"eps": EPS, "alpha": ALPHA, "steps": iterations, "batch_size": batch_size, "device": self.device}
        released.attack(self.theirs, images, self.images.num_classes, draws, **size)

    def _floor(self, size: int, iterations: int) -> None:
        """Compute forward passes and input gradients alone, of the network with folded batch-norms."""
        x = torch.rand(size, 3, self.images.side, self.images.side, device=self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        targets = torch.zeros(size, dtype=torch.long, device=self.device)
        with folded(self.ours, x), frozen(self.ours), precision.autocast(self.device, self.opts.precision):
            for _ in range(iterations):
                x.requires_grad_()
                torch.autograd.grad(F.cross_entropy(self.ours(x), targets), x)

    def step(self, method: str) -> Measured:
        """Measure the seconds of a step of a method with the accuracy on D_f after it, the mean of --steps.

        On a GPU, ten times as many steps of L2UL are measured, because they include the capture of the CUDA graph.
        """
        forget, adv, omega = self._inputs(self.opts.step_k, method)
        count = self.opts.steps * (math.ceil(self.opts.step_k / BATCH) if method == "neggrad" else 1)
        more = 10 if self.device.type == "cuda" else 1
        parts = {
            "ours": lambda: self._our_steps(method, forget, adv, omega, more * self.opts.steps),
            "released": lambda: self._released_steps(forget, adv, omega, count),
            "ours without steps": lambda: unlearn(self.ours, *forget, "before"),
            "released without steps": lambda: self._released_steps(forget, adv, omega, 0),
        }
        found = interleaved(parts, self.opts.repeats, self.device)
        idle = {way: statistics.median(found.pop(f"{way} without steps")) for way in ("ours", "released")}
        counts = {"ours": more * count, "released": count}
        return {way: [(part - idle[way]) / counts[way] for part in seconds] for way, seconds in found.items()}

    def _inputs(self, k: int, method: str) -> tuple[Labelled, Labelled | None, dict[str, Tensor] | None]:
        """Return D_f, one batch in place of D_adv, and the importance; None for what the method does not need."""
        size, side = self.opts.adv_batch_size, self.images.side
        adv = None
        if method != "neggrad":
            labels = torch.randint(self.images.num_classes, (size,), device=self.device)
            adv = as_pixels(torch.rand(size, 3, side, side, device=self.device)), labels
        forget = self.forget(k)
        return forget, adv, mas_importance(self.ours, forget[0][:2]) if method == "adv_imp" else None

    def _our_steps(self, method: str, forget: Labelled, adv: Labelled | None, omega, passes: int) -> None:
        """Take `passes` steps, as D_adv is one batch; of neggrad, `passes` times the number of batches of D_f."""
        settings = Settings(RATE, batch_size=BATCH, adv_batch_size=self.opts.adv_batch_size, max_passes=passes)
        given = {"adv": adv, "importance": omega, "settings": settings, "cuda_graph": True}
        if unlearn(self.ours, *forget, method, **given).status != "cap":
            raise RuntimeError("D_f was forgotten while steps were timed")

    def _released_steps(self, forget: Labelled, adv: Labelled | None, omega, count: int) -> None:
        model, images = released.as_built(self.ours), released.PilImages(*forget)
        held = {name: 1 - value for name, value in omega.items()} if omega else None
        kept = tuple(part.cpu() for part in adv) if adv else None
        sizes = {"batch_size": BATCH, "adv_batch_size": self.opts.adv_batch_size, "lr": RATE, "device": self.device}
        for _ in itertools.islice(released.steps(model, images, kept, held, **sizes), count):
            pass

    def evaluation(self) -> Measured:
        """Measure the seconds of an image of the accuracy on --eval-images images."""
        images, labels = (part[: self.opts.eval_images] for part in (self.images.test.images, self.images.test.labels))
        decoded = released.PilImages(images, labels)
        parts = {
            "ours": lambda: accuracy.accuracy(accuracy.predict(self.ours, images), labels),
            "released": lambda: released.accuracy(
                self.theirs, decoded, self.device, LOADER_BATCH, self.opts.workers_of_loader
            ),
        }
        found = interleaved(parts, self.opts.repeats, self.device)
        return {name: [seconds / len(images) for seconds in values] for name, values in found.items()}

    def again(self) -> Measured:
        """Measure D_adv of 16 images: read from the cache, as for another learning rate, and made again."""
        forget, iterations = self.forget(16), self.opts.iterations
        with tempfile.TemporaryDirectory() as folder:
            cache = Cache(Path(folder))
            parts = {
                "ours": lambda: self.make(forget, 4, iterations, cache),
                "released": lambda: self._released_attack(forget, 4, iterations),
            }
            return interleaved(parts, self.opts.repeats, self.device)

    def whole(self, steps: dict[str, int], cut: int) -> Measured:
        """Measure all runs of k = 16 once, with these steps of each method, every part reduced to 1 / `cut`."""
        iterations, count = max(1, ITERATIONS // cut), 60_000 // cut
        test = self.images.test
        images, labels = test.images[:count].to(self.device), test.labels[:count]
        decoded = released.PilImages(images, labels)
        few = {name: max(1, number // cut) for name, number in steps.items()}

        def ours() -> None:
            self.make(self.forget(16), DRAWS, iterations)
            for name, number in few.items():
                self._our_steps(name, *self._inputs(16, name), number)
            for _ in range(1 + len(few)):
                accuracy.predict(self.ours, images)

        def theirs() -> None:
            self._released_attack(self.forget(16), DRAWS, iterations)
            for name, number in few.items():
                self._released_steps(*self._inputs(16, name), number)
            for _ in range(2 * len(few)):
                released.accuracy(self.theirs, decoded, self.device, LOADER_BATCH, self.opts.workers_of_loader)

        return interleaved({"ours": ours, "released": theirs}, 1, self.device, warm=False)

    def profile(self) -> str:
        """Return tables of the time of the attack and of a step of adv_imp by operator."""
        inputs, forget = self._inputs(self.opts.step_k, "adv_imp"), self.forget(16)
        tables = []
        for name, part in {
            "attack": lambda: self._our_attack(forget, self.opts.pairs // 16),
            "step of adv_imp": lambda: self._our_steps("adv_imp", *inputs, self.opts.steps),
        }.items():
            with torch.profiler.profile() as profiler:
                part()
            order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            tables.append(
                f"{name}\n{profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=44)}"
            )
        return "\n".join(tables)
