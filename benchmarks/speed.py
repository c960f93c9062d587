"""Compare the speed of L2UL with the released scripts' order of work, and with the passes of the network alone.

    python benchmarks/speed.py --data-dir DATA                   # ResNet-18 with the weights in DATA, or untrained
    python benchmarks/speed.py --data-dir DATA --model resnet20 --checkpoint resnet20.th --profile

All parts are measured in one process, in turn, --repeats times. The network may be untrained, as its weights do not
change the times. The last lines have the name of each part, how many times as fast as the released order it is (the
median), and for the attack the share of the floor: the time of forward passes and input gradients alone.
"""

import argparse
import json
from pathlib import Path
import statistics
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import l2ul  # noqa: F401, I001  # first: it sets the environment before torch is imported

import pandas as pd
from parts import DRAWS, ITERATIONS, Bench, Measured, parser_of, ratio
import torch

from l2ul.common import choices, precision
from l2ul.experiments import records
from l2ul.cli import exit_codes
from l2ul.common import device as device_module
from l2ul.common.errors import InputError
from l2ul.common.files import atomic, require_writable
from l2ul.cli.parser import nonnegative_int

SIZES = (16, 64, 128, 256)
METHODS = ("neggrad", "adv", "adv_imp")
REFERENCE = Path(__file__).resolve().parent.parent / "result_data" / "reference" / "cifar10_resnet20" / "runs"
ROW_PARTS = ("attack", *(f"step {method}" for method in METHODS), "evaluation")  # of which a table row consists
PARTS = (*ROW_PARTS, "same examples again", "k = 16, cut down")
ALL = 60_000  # images of D_r and D_test, measured once before all runs and after each; as released, twice a run


@exit_codes.clean_exit("speed.py", exit_codes.NOTHING_WRITTEN)
def main() -> None:
    opts = parse()
    device = device_module.choose_device(opts.device, opts.no_cuda, opts.threads)
    bench, found, rows = measure(opts, device)
    about = {"device": device_module.device_name(device), "model": opts.model, "trained": bench.trained}
    about |= {"cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    about |= {"precision": opts.precision, "repeats": opts.repeats}
    profile = bench.profile() if opts.profile else ""
    with atomic(opts.output) as file:
        record = about | {"items": rows, "seconds": found, "profile": profile.splitlines()}
        file.write_text(json.dumps(record, indent=1) + "\n")
    print(pd.DataFrame(rows).round(4).to_string(index=False, na_rep=""))
    print(f"record: {opts.output}; {', '.join(f'{key} {value}' for key, value in about.items())}")
    print(profile)
    for item in rows:
        floor = f", {100 * item['of the floor']:.0f} % of the floor" if "of the floor" in item else ""
        print(f"{item['item']}: {item['ratio']:.2f} x{floor}")


def measure(opts: argparse.Namespace, device: torch.device) -> tuple[Bench, dict[str, Measured], list[dict]]:
    """Measure the parts that the options name; return the bench, the seconds of each part, and a row for each."""
    precision.use(device, opts.precision)
    bench, steps = Bench(opts, device), steps_on_record()
    steps_of_16 = {method: steps[method, 16] for method in METHODS}
    steppers = [lambda method=method: bench.step(method) for method in METHODS]
    measurers = [bench.attack, *steppers, bench.evaluation, bench.again, lambda: bench.whole(steps_of_16, opts.cut)]
    found = {}
    for name, part in zip(PARTS, measurers, strict=True):
        if not opts.part or name in opts.part:
            print(f"measuring: {name}", flush=True)
            found[name] = part()
    rows = [summary(name, measured) for name, measured in found.items()]
    if set(ROW_PARTS) <= set(found):
        rows += [table_row(found, steps, sizes) for sizes in ((16,), SIZES)]
    return bench, found, rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    counts = (
        ("--repeats", 5, "of each part"),
        ("--pairs", 128, "examples attacked a repeat, a multiple of 32"),
        ("--released-pairs", 128, "of these, attacked a repeat in the released order, a multiple of 32"),
        ("--iterations", 2, "of the attack a repeat"),
        ("--steps", 2, "of unlearning a repeat; ten times as many of ours on a GPU"),
        ("--step-k", 64, "images of D_f while steps are timed"),
        ("--adv-batch-size", 256, "images of D_adv a step"),
        ("--eval-images", 6000, "images measured a repeat"),
        ("--cut", 20, "by how much everything in the whole run of k = 16 is cut"),
    )
    parser, group = parser_of(__doc__.split("\n")[0], "speed.py", "resnet18", counts)
    group.add_argument("--precision", choices=choices.PRECISIONS, default="fp32", help="of ours, on a GPU")
    group.add_argument(
        "--workers-of-loader",
        type=nonnegative_int,
        default=2,
        help="processes that decode in the released order (default: 2)",
    )
    group.add_argument("--part", nargs="+", metavar="NAME", help="only these parts, by the names that are printed")
    group.add_argument("--profile", action="store_true", help="also print where the time of attack and step goes")
    group.add_argument("--output", type=Path, default=Path("result_data/benchmarks/speed.json"), metavar="FILE")
    opts = parser.parse_args(argv)
    unknown = sorted(set(opts.part or ()) - set(PARTS))
    if unknown:
        raise InputError(f"--part names {unknown[0]!r}", f"expected some of {', '.join(PARTS)}")
    for flag, count in (("--pairs", opts.pairs), ("--released-pairs", opts.released_pairs)):
        if count % 32:
            raise InputError(f"{flag} is {count}", "expected a multiple of 32")
    require_writable(opts.output.parent)
    return opts


def summary(name: str, measured: Measured) -> dict[str, object]:
    """Return medians in seconds, median, least and largest ratio of released to ours, and the share of the floor."""
    found = {"item": name} | {part: statistics.median(measured[part]) for part in ("released", "ours")}
    found |= dict(zip(("ratio", "least", "most"), ratio(measured["released"], measured["ours"]), strict=True))
    if "floor" in measured:
        found["of the floor"], *_ = ratio(measured["floor"], measured["ours"])
    return found


def steps_on_record() -> dict[tuple[str, int], int]:
    """Return the steps until D_f was forgotten by method and k: means over the records of CIFAR-10 with ResNet-20.

    For a k without records, the steps of the largest k with records are scaled in proportion to k. Only the ratio of
    the table row depends on this assumption.
    """
    runs = [record for path in REFERENCE.glob("*.json") if (record := records.read(path))]
    plain = {"goal": "misclassify", "continual_step": None, "bn": "train", "status": records.FORGOTTEN}
    runs = [run for run in runs if all(run.get(key) == value for key, value in plain.items())]
    found = {}
    for method in METHODS:
        known = {k: [run["steps"] for run in runs if (run["method"], run["k"]) == (method, k)] for k in SIZES}
        largest = max(k for k in SIZES if known[k])
        for k in SIZES:
            steps = known[k] or [steps * k / largest for steps in known[largest]]
            found[method, k] = round(statistics.mean(steps))
    return found


def table_row(
    found: dict[str, Measured], steps: dict[tuple[str, int], int], sizes: tuple[int, ...]
) -> dict[str, object]:
    """Return the seconds of a table row, computed from the times of its parts and how often each is done."""
    pairs = {"ours": max(sizes) * DRAWS, "released": sum(sizes) * DRAWS}  # nested sets are made once
    passes = {"ours": 1 + len(METHODS) * len(sizes), "released": 2 * len(METHODS) * len(sizes)}
    seconds = {}
    for way in ("released", "ours"):
        cost = {name: statistics.median(measured[way]) for name, measured in found.items()}
        seconds[way] = pairs[way] * ITERATIONS * cost["attack"]
        seconds[way] += sum(steps[method, k] * cost[f"step {method}"] for method in METHODS for k in sizes)
        seconds[way] += passes[way] * ALL * cost["evaluation"]
    name = f"table row, k = {' '.join(map(str, sizes))} (from the parts)"
    return {"item": name, **seconds, "ratio": seconds["released"] / seconds["ours"]}


if __name__ == "__main__":
    main()
