"""Measure how much faster a step of `distill` is in bf16, with frozen layers, and without `robust=1`.

    python benchmarks/distill_steps.py --data-dir DATA --model resnet20 --checkpoint resnet20.th --threads 1

The variants take turns in one process, --repeats times, with --steps steps after a first one. On a CPU, the seconds are
CPU seconds of the process, which other processes change little. The last lines have the median and range of each ratio.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path
import sys
import time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import l2ul  # noqa: F401, I001  # first: it sets the environment before torch is imported

from parts import load, parser_of, ratio
import torch
from torch import Tensor, nn

from l2ul.cli import exit_codes
from l2ul.common import device as device_module
from l2ul.common import precision
from l2ul.common.files import atomic, require_writable
from l2ul.methods.robust import ITERATIONS
from l2ul.methods.stand_ins import BATCH, Synthesis
from l2ul.unlearn import Settings, unlearn

FROZEN = 0.35  # distill_frozen of the variants with frozen layers
SYNTHESIS = "synthesis of an image"
IMAGES = 32  # synthesised for a variant with robust=1; their number does not change the time of a step


@exit_codes.clean_exit("distill_steps.py", exit_codes.NOTHING_WRITTEN)
def main() -> None:
    opts = parse()
    device = device_module.choose_device(opts.device, opts.no_cuda, opts.threads)
    model, data, _ = load(opts, device)
    images, labels = data.train.images[: opts.unlearn_k], data.train.labels[: opts.unlearn_k]
    seconds: dict[str, list[float]] = {}
    synthesis = Synthesis()  # keeps the images of the first repeat
    for repeat in range(opts.repeats):
        for name, settings in variants(opts, device).items():
            print(f"measure {name}, {repeat + 1} of {opts.repeats}", flush=True)
            one = seconds_per_step(model, images, labels, settings, opts.steps, synthesis)
            seconds.setdefault(name, []).append(one)
        for name in precisions(device):
            with precision.autocast(device, name):
                seconds.setdefault(f"{SYNTHESIS}, {name}", []).append(seconds_per_image(model, images))
    ratios = {f"{slow} / {fast}": ratio(seconds[slow], seconds[fast]) for slow, fast in comparisons(seconds)}
    record = {"device": device_module.device_name(device), "model": opts.model, "k": opts.unlearn_k}
    record |= {"torch": torch.__version__, "steps": opts.steps, "repeats": opts.repeats, "threads": opts.threads}
    with atomic(opts.output) as file:
        file.write_text(json.dumps(record | {"seconds": seconds, "ratios": ratios}, indent=1) + "\n")
    for name, (median, least, most) in ratios.items():
        print(f"{name}: {median:.2f} ({least:.2f} to {most:.2f})")
    print(f"record: {opts.output}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    counts = (
        ("--unlearn-k", 16, "images of D_f"),
        ("--steps", 2, "steps of a variant per repeat"),
        ("--repeats", 5, "measurements of each variant"),
    )
    parser, group = parser_of(__doc__.split("\n")[0], "distill_steps.py", "resnet20", counts)
    group.add_argument("--robust", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="values of the setting")
    group.add_argument("--output", type=Path, default=Path("result_data/benchmarks/distill_steps.json"), metavar="FILE")
    opts = parser.parse_args(argv)
    require_writable(opts.output.parent)
    return opts


def variants(opts: argparse.Namespace, device: torch.device) -> dict[str, Settings]:
    """Return the settings of each variant by name. Nothing is forgotten, so that every step has all of its images."""
    usual = Settings(distill_steps=opts.steps + 1, distill_cycles=1, distill_lr=1e-12, robust_images=IMAGES)
    return {
        f"robust={robust}, {name}{', frozen' if share else ''}": replace(
            usual, robust=robust, loop_precision="bf16" if name == "bf16" else "full", distill_frozen=share
        )
        for robust in opts.robust
        for name in precisions(device)
        for share in (0.0, FROZEN)
    }


def precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that the device has hardware for."""
    return ("fp32",) if precision.resolve("auto", device) == "fp32" else ("fp32", "bf16")


def comparisons(seconds: dict[str, list[float]]) -> list[tuple[str, str]]:
    """Return the pairs whose ratio is of interest: fp32 to bf16, all layers to frozen, and with and without robust."""
    pairs = [(name, name.replace("fp32", "bf16")) for name in seconds]
    pairs += [(name, f"{name}, frozen") for name in seconds]
    pairs += [(name, name.replace("robust=1", "robust=0")) for name in seconds]
    robust = [name for name in seconds if name.startswith("robust=1")]
    pairs += [(name, name.replace("robust=1", SYNTHESIS).removesuffix(", frozen")) for name in robust]
    return [(slow, fast) for slow, fast in pairs if slow != fast and fast in seconds]


def seconds_per_step(
    model: nn.Module, images: Tensor, labels: Tensor, settings: Settings, steps: int, synthesis: Synthesis
) -> float:
    """Return the seconds of a step, the mean of `steps` after a first one."""
    read, times = clock(images.device), []
    options = {"settings": settings, "synthesis": synthesis, "on_step": lambda row: times.append(read())}
    unlearn(model, images, labels, "distill", **options)
    return (times[-1] - times[0]) / steps


def seconds_per_image(model: nn.Module, images: Tensor) -> float:
    """Return the seconds of the synthesis of an image, from two of its iterations for a full batch."""
    read, iterations = clock(images.device), 2
    started = read()
    Synthesis().images(model, images.float() / 255, Settings(), BATCH, iterations, 0.0)
    return (read() - started) / BATCH * ITERATIONS / iterations


def clock(device: torch.device) -> Callable[[], float]:
    """Return a function that returns CPU seconds of this process, or on a GPU the time after all submitted work."""
    return time.process_time if device.type == "cpu" else lambda: device_module.clock(device)


if __name__ == "__main__":
    main()
