"""Measure one thing on a CUDA GPU, in a process of its own. gpu.py runs these parts under time limits.

    python benchmarks/gpu_measure.py PART --device cuda --out FOLDER [--seconds N] [--tiny]

PART is env, parity, request, memory, decode, profile, graph, speed or together. Rows are printed as they are measured
and all rows are written to FOLDER/PART.json, so that a part that is stopped keeps its rows. An expected value stands in
brackets. --tiny: sizes for seconds on a CPU.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import json
import os
from pathlib import Path
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import l2ul  # noqa: F401, I001  # first: it sets the environment before torch is imported

from PIL import Image
import released
import torch
from torch import nn
import torch.nn.functional as F

from l2ul import attack, importance, objective, unlearn
from l2ul.common import device as devices
from l2ul.common import precision as precisions
from l2ul.common.bn_folding import folded
from l2ul.common.cache import Cache
from l2ul.common.cuda_graphs import WARM_UP, Graphed
from l2ul.common.errors import is_out_of_memory
from l2ul.common.modes import eval_mode, frozen
from l2ul.data import datasets, storage
from l2ul.data.folder import FolderImages
from l2ul.data.images import as_pixels
from l2ul.experiments.adversarial_sets import Attack
from l2ul.methods.paper import WeightNoise
from l2ul.methods.settings import AttackSettings, Settings
from l2ul.metrics import accuracy
from l2ul import models

STARTED = time.perf_counter()
ROWS: list[dict] = []


def left() -> float:
    return OPTS.seconds - (time.perf_counter() - STARTED)


def row(**values) -> None:
    """Print a row and write all rows so far. A value that its key does not expect is marked as FAILED."""
    unexpected = [key for key, value in values.items() if not is_expected(key, value)]
    values |= {"FAILED": f"unexpected {', '.join(unexpected)}"} if unexpected else {}
    ROWS.append(values)
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    print("  ".join(shown), flush=True)
    if OPTS.out:
        (OPTS.out / f"{OPTS.part}.json").write_text(json.dumps(ROWS, indent=1, default=str) + "\n")


def is_expected(key: str, value: object) -> bool:
    """Return whether a value is what the brackets at the end of its key say: `pixels (<0.02)` or `code (0, 3)`."""
    bracket = re.search(r"\(([<>]?)([^()]*)\)$", key)
    if not bracket:
        return True
    sign, text = bracket.groups()
    if sign:
        return float(value) < float(text) if sign == "<" else float(value) > float(text)
    return str(value) in text.split(", ")


def clock() -> float:
    return devices.clock(DEVICE)


def timed(part, least: float = 0.4, most: int = 20) -> float:
    """Return the median seconds of a part after one warm-up, from repeats for at least `least` seconds."""
    part()
    found, begun = [], clock()
    while len(found) < 3 or (clock() - begun < least and len(found) < most):
        started = clock()
        part()
        found.append(clock() - started)
        if OPTS.tiny or left() < 5:
            break
    return statistics.median(found)


def free() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")


def net_of(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, classes).eval().to(DEVICE).to(memory_format=torch.channels_last)


def pixels(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------- env
def env() -> None:
    row(
        python=sys.version.split()[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )
    for name in (
        "torchvision",
        "transformers",
        "numpy",
        "pandas",
        "sklearn",
        "scipy",
        "safetensors",
        "advertorch",
        "ray",
    ):
        try:
            row(package=name, version=getattr(__import__(name), "__version__", "?"))
        except ImportError as error:
            row(package=name, version=f"missing ({error})")
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row(
            gpu=properties.name,
            gib=properties.total_memory / 2**30,
            sms=properties.multi_processor_count,
            nccl=str(torch.cuda.nccl.version()),
        )
        row(cpus=os.cpu_count(), nofile=os.popen("ulimit -n").read().strip())
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for precision in ("fp32", "tf32") if DEVICE.type == "cuda" else ("fp32",):
            precisions.use(DEVICE, precision)
            row(
                precision=precision,
                matmul=getattr(torch.backends.cuda.matmul, "fp32_precision", "?"),
                conv=getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", "?"),
                legacy=str((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)),
                matmul_precision=torch.get_float32_matmul_precision(),
            )
    row(warnings_of_precisions=[str(one.message)[:120] for one in caught])
    if DEVICE.type == "cuda":  # check that the flags have an effect
        a = torch.randn(2048, 2048, device=DEVICE)
        exact = (a.double() @ a.double()).float()
        for precision in ("fp32", "tf32"):
            precisions.use(DEVICE, precision)
            row(precision=precision, matmul_error=float((a @ a - exact).norm() / exact.norm()))
            x, w = torch.randn(64, 64, 32, 32, device=DEVICE), torch.randn(64, 64, 3, 3, device=DEVICE)
            true = F.conv2d(x.double(), w.double(), padding=1).float()
            row(precision=precision, conv_error=float((F.conv2d(x, w, padding=1) - true).norm() / true.norm()))


# ------------------------------------------------------------------------------------------------------------- parity
def digits():
    return datasets.load("digits", Path("data"))


def digits_net(device: torch.device) -> nn.Module:
    return models.load("resnet20", 10, Path("data/weights/digits_resnet20.safetensors")).to(device)


def parity() -> None:
    """Compare CPU and device in float32. The expected value stands in brackets."""
    precisions.use(DEVICE, "fp32")
    cpu, images = torch.device("cpu"), digits()
    nets = {device: digits_net(device) for device in (cpu, DEVICE)}
    some, labels = images.train.images[:16], images.train.labels[:16]

    def both(part):
        return {device: part(net, some.to(device), labels.to(device)) for device, net in nets.items()}

    def check(name, part) -> None:
        try:
            row(check=name, **part())
        except Exception as error:  # the other checks still run
            row(check=name, FAILED=f"{type(error).__name__}: {str(error)[:200]}")
            traceback.print_exc(limit=-3)

    def predictions() -> dict:
        found = {device: accuracy.predict(net, images.train.images.to(device)) for device, net in nets.items()}
        logits = {d: torch.cat(list(accuracy.logits(n, images.test.images.to(d)))) for d, n in nets.items()}
        return {
            "differing_of_1438 (0)": int((found[cpu] != found[DEVICE]).sum()),
            "logits (<1e-4)": float((logits[cpu] - logits[DEVICE]).abs().max() / logits[cpu].abs().max()),
        }

    def attacks() -> dict:
        how = {"num_adv_images": 4, "eps": 4.0, "alpha": 0.4, "seed": 0}
        # each iteration follows the direction of a gradient, which enlarges differences of rounding
        few, many = (
            both(lambda net, x, y, steps=steps: attack.adversarial_set(net, x, y, 10, steps=steps, **how))
            for steps in (3, 5 if OPTS.tiny else 20)
        )
        (a, t), (b, u) = few[cpu], few[DEVICE]
        hits = {d: 100 * float((accuracy.predict(nets[d], x) == y.cpu()).double().mean()) for d, (x, y) in many.items()}
        return {
            "targets_same (True)": bool(torch.equal(t, u.cpu())),
            "pixels after 3 iterations (<0.01)": float((a - b.cpu()).abs().max()),
            "hits_differ (<2)": abs(hits[cpu] - hits[DEVICE]),
            "pixels after all": float((many[cpu][0] - many[DEVICE][0].cpu()).abs().max()),
        }

    def attack_bf16() -> dict:
        if DEVICE.type != "cuda":
            return {"skipped": "no GPU"}
        how = {"num_adv_images": 4, "eps": 4.0, "alpha": 0.4, "steps": 20, "seed": 0}
        x, y = some.to(DEVICE), labels.to(DEVICE)
        hits = {}
        for precision in precisions.PRECISIONS:
            precisions.use(DEVICE, precision)
            made, targets = attack.adversarial_set(nets[DEVICE], x, y, 10, precision=precision, **how)
            precisions.use(DEVICE, "fp32")
            hits[precision] = 100 * float((accuracy.predict(nets[DEVICE], made) == targets.cpu()).double().mean())
        return {f"hits_{name} (>95)": value for name, value in hits.items()}

    def weights() -> dict:
        found = both(lambda net, x, y: importance.mas_importance(net, x))
        worst = max(
            float((a - found[DEVICE][n].cpu()).norm() / a.norm()) for n, a in found[cpu].items() if a.norm() > 0
        )
        return {"importance (<1e-3)": worst}

    check("predictions", predictions)
    check("attack", attacks)
    check("attack in bf16, hits in fp32", attack_bf16)
    check("importance", weights)
    for method in ("adv_imp", "distill", "neggrad", "rawp", "adv"):

        def loop(method=method) -> dict:
            settings = Settings(
                unlearn_lr=1e-2,
                adv_batch_size=32,
                max_passes=200,
                distill_steps=20 if OPTS.tiny else 40,
                distill_mixes=32,
                noise_growth=0.05,
            )
            attack = AttackSettings(num_adv_images=4, alpha=0.4, iterations=5)
            how = {"num_classes": 10, "attack": attack, "settings": settings}
            found = both(lambda net, x, y: unlearn.unlearn(net, x, y, method, **how))
            a, b = found[cpu], found[DEVICE]
            return {
                "status": f"{a.status}/{b.status}",
                "steps": f"{a.steps}/{b.steps}",
                "first_row (<1e-3)": max(
                    abs(a.curve[0][k] - b.curve[0][k]) / max(1, abs(a.curve[0][k])) for k in a.curve[0]
                ),
            }

        check(f"loop {method}", loop)

    def disk() -> dict:
        limit, storage._memory_limit = storage._memory_limit, lambda device: 0
        try:
            settings = AttackSettings(3, 1.0, 0.5, 2, dtype="uint8")
            how = Attack(10, settings, seed=0, scratch_dir=Path(tempfile.mkdtemp()))
            net, x, y = nets[DEVICE], some.to(DEVICE), labels.to(DEVICE)
            made = how.make(net, x, y, cache=Cache(Path(tempfile.mkdtemp())), progress=lambda count: None)
            adv = made.examples[:48], made.targets[:48]
            outcome = unlearn.unlearn(net, x, y, "adv", adv=adv, settings=Settings(max_passes=2))
            return {"device": made.examples.device.type, "steps": outcome.steps}
        finally:
            storage._memory_limit = limit

    check("D_adv on disk", disk)


# ------------------------------------------------------------------------------------------------------------ request
def request() -> None:
    """Forget 8 digits with main_forget.py, and verify the report on the device and on the CPU."""
    work, images = Path(tempfile.mkdtemp()), digits().train.images
    for name, first, count in (("forget", 0, 8), ("keep", 100, 16)):
        (work / name).mkdir()
        for number, image in enumerate(images[first : first + count]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(work / name / f"{number}.png")
    few = ["distill_steps=4", "distill_mixes=8", "distill_cycles=1"] if OPTS.tiny else ["distill_mixes=32"]
    weights = ["--model", "resnet20", "--checkpoint", "data/weights/digits_resnet20.safetensors"]
    how = ["--keep-images", work / "keep", "--also", "flipped", "--output", work / "out", "--minutes", 1]
    calls = {"forget": [*weights, *how, "--device", OPTS.device, "--setting", *few]}
    calls |= {f"verify on {name}": ["--verify", work / "out" / "report.json", "--device", name] for name in SIDES}
    for name, words in calls.items():
        command = [sys.executable, "main_forget.py", "--images", work / "forget", *words, "--threads", 1]
        started = time.perf_counter()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)
        values = {"call": name, "exit_code (0, 3)": done.returncode, "seconds": time.perf_counter() - started}
        row(**values, **({} if done.returncode in (0, 3) else {"error": done.stderr.strip()[-200:]}))


# ------------------------------------------------------------------------------------------------------------- memory
def memory() -> None:
    """Run out of memory on purpose: the attack halves its batches. Then report the memory of attack and step."""
    if DEVICE.type == "cuda":
        net = net_of("resnet18")
        x, labels = pixels(256, 32), torch.arange(256, device=DEVICE) % 10
        free()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 0.9 * 2**30) / total)
        sizes_tried: list[int] = []
        how = {"num_adv_images": 16, "eps": 4.0, "alpha": 0.1, "steps": 1, "seed": 0, "batch_size": 4096}
        try:
            made, _ = attack.adversarial_set(net, x, labels, 10, on_halved=sizes_tried.append, **how)
            row(check="out of memory", halved_to=sizes_tried, finite=bool(made.isfinite().all()))
        except Exception as error:
            row(check="out of memory", FAILED=f"{type(error).__name__}: {str(error)[:200]}", halved_to=sizes_tried)
        try:
            accuracy.predict(net, pixels(20000, 32), batch_size=20000)
            row(check="predict in too little memory", result="it fitted")
        except Exception as error:
            row(check="predict in too little memory", error=type(error).__name__, recognised=is_out_of_memory(error))
        try:
            ended = steps_of("adv_imp", step_inputs("resnet18", 32, 64, 8192), 2, 64, 8192)
            row(check="step in too little memory", status=ended.status, steps=ended.steps)
        except Exception as error:
            row(check="step in too little memory", error=type(error).__name__, recognised=is_out_of_memory(error))
        torch.cuda.set_per_process_memory_fraction(1.0)
        del net, x
        free()
    for name, side, count in sizes():
        if left() < 10:
            return
        net = net_of(name)
        x = as_pixels(pixels(8, side))
        many = x.repeat(-(-count // 8), 1, 1, 1)[:count].contiguous(memory_format=torch.channels_last)
        free()
        with folded(net, x[:1]):
            attack.pgd_l2(net, many, torch.zeros(count, dtype=torch.int64, device=DEVICE), eps=4.0, alpha=0.1, steps=1)
        attack_gib = peak_gib()
        free()
        keep, forget = (32, 8) if OPTS.tiny else (256, 32)
        net.train()
        loss = F.cross_entropy(net(many[:keep]), torch.zeros(min(keep, count), dtype=torch.int64, device=DEVICE))
        (
            loss
            - F.cross_entropy(net(many[:forget]), torch.zeros(min(forget, count), dtype=torch.int64, device=DEVICE))
        ).backward()
        row(net=name, examples=count, attack_gib=attack_gib, step_of_256_and_32_gib=peak_gib())
        del net, many, loss
        free()


def sizes():
    if OPTS.tiny:
        return [("resnet18", 32, 16), ("resnet20", 32, 16)]
    return [("resnet18", 32, 2048), ("resnet50_cifar100", 32, 2048), ("torchvision:vit_b_16", 224, 256)]


# ------------------------------------------------------------------------------------------------------------- decode
def decode() -> None:
    """Measure images a second from disk, by worker processes and by nvJPEG. Workers start after CUDA is initialised.

    At most 1,024 files are open, the usual limit of Linux.
    """
    import resource

    import numpy as np

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard) if hard > 0 else 1024, hard))
    folder, count = Path(tempfile.mkdtemp()), 64 if OPTS.tiny else 1536
    rng = np.random.default_rng(0)
    for number in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 43, 3), dtype=np.uint8)).resize((500, 375), 3)
        noisy = np.clip(np.asarray(coarse) + rng.normal(0, 12, (375, 500, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)
    row(kib_an_image=(folder / "0.jpg").stat().st_size / 1024)
    files = [str(folder / f"{number % 16}.jpg") for number in range(count)]
    torch.zeros(1, device=DEVICE)
    batches = list(torch.arange(count).split(32 if OPTS.tiny else 256))
    cpus = os.cpu_count() or 1
    for decoder, workers in (("cpu", 2), ("cpu", cpus), ("gpu", 2), ("gpu", min(8, cpus))):
        if left() < 10:
            return
        images = FolderImages(files, 224, decoder=decoder)
        try:
            started = clock()
            total = sum(len(batch) for batch in images.loader(batches, DEVICE, workers))
            row(decoder=decoder, workers=workers, images_a_second=total / (clock() - started))
        except Exception as error:
            row(
                decoder=decoder,
                workers=workers,
                FAILED=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}",
            )


# ------------------------------------------------------------------------------------------------------------ profile
def step_inputs(name: str, side: int, k: int, keep: int):
    """Return net, D_f labelled by the net's own predictions, D_adv and importance."""
    net = net_of(name)
    images = pixels(k, side)
    labels = accuracy.predict(net, images, fold=False).to(DEVICE)
    adv = as_pixels(pixels(keep, side)), torch.arange(keep, device=DEVICE) % 10
    return net, images, labels, adv, importance.mas_importance(net, images[:2])


@contextlib.contextmanager
def never_forgotten():
    """Let no image count as forgotten, so that the loop takes all of its steps."""
    decide = objective.Forget.is_forgotten
    objective.Forget.is_forgotten = lambda self, predictions: predictions != predictions
    try:
        yield
    finally:
        objective.Forget.is_forgotten = decide


ROBUST = "distill, robust=1"


def steps_of(method: str, inputs, steps: int, k: int, keep: int, on_step=None, go_on=None, **options):
    net, images, labels, adv, omega = inputs
    as_used = {"robust": 1, "robust_images": 8, "robust_pool": 16} if OPTS.tiny else {"robust": 1, "robust_images": 256}
    settings = Settings(
        unlearn_lr=1e-12,
        adv_batch_size=keep,
        max_passes=steps if method != "neggrad" else -(-steps // -(-k // 32)),
        distill_lr=1e-12,
        distill_steps=steps,
        distill_cycles=1,
        distill_forget=64 if not OPTS.tiny else 4,
        distill_mixes=192 if not OPTS.tiny else 8,
        **(as_used if method == ROBUST else {}),
    )
    method = method.partition(",")[0]
    given = options | ({"adv": adv} if method in ("adv", "adv_imp") else {})
    given |= {"importance": omega} if method == "adv_imp" else {}
    with never_forgotten():
        return unlearn.unlearn(net, images, labels, method, settings=settings, on_step=on_step, go_on=go_on, **given)


def profile() -> None:
    """Count kernels, launches and synchronisations of a step of each method and of an iteration of the attack."""
    methods = "adv_imp", "distill", "neggrad"
    whats = [(f"step of {method}", graphed) for method in methods for graphed in (False, True)]
    for precision in ("tf32", "fp32") if DEVICE.type == "cuda" else ("fp32",):
        profiles(precision, [*whats, (ATTACKING, False)])


ATTACKING = "iteration of the attack"


def profiles(precision: str, whats: list[tuple[str, bool]]) -> None:
    """Profile some of the steps after the sixth, of ResNet-18.

    whats  `step of METHOD` or ATTACKING, and whether as CUDA graphs
    """
    k, keep, side, steps, warm = (4, 8, 32, 8, 5) if OPTS.tiny else (64, 256, 32, 14, 6)
    inputs = step_inputs("resnet20" if OPTS.tiny else "resnet18", side, k, keep)
    precisions.use(DEVICE, precision)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if DEVICE.type == "cuda" else []

    def run(what: str, graphed: bool, on_step) -> None:
        if what != ATTACKING:
            steps_of(what.split()[-1], inputs, steps, k, keep, on_step, cuda_graph=graphed)
            return
        how = {"num_adv_images": 2 if OPTS.tiny else 2048 // k, "eps": 4.0, "alpha": 0.1, "steps": steps, "seed": 0}
        attack.adversarial_set(inputs[0], inputs[1], inputs[2], 10, progress=on_step, **how)

    for what, graphed in whats:
        if left() < 4:
            return
        marks: list[float] = []
        run(what, graphed, lambda *_, marks=marks: marks.append(clock()))
        wall = statistics.median(after - before for before, after in itertools.pairwise(marks[warm - 1 :]))
        profiler, seen = torch.profiler.profile(activities=kinds), []

        def watch(*_, profiler=profiler, seen=seen) -> None:
            seen.append(1)
            if len(seen) == warm:
                clock()
                profiler.start()
            elif len(seen) == steps:
                clock()
                profiler.stop()

        run(what, graphed, watch)
        report(f"{what}{' as CUDA graph' if graphed else ''}", precision, wall, steps - warm, profiler)


RUNTIME_CALLS = (
    *("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync"),
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
)


def report(what: str, precision: str, wall: float, steps: int, profiler) -> None:
    kernels, calls = collections.defaultdict(lambda: [0, 0.0]), collections.Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.name.startswith("Mem"):
                calls[" ".join(event.name.split()[:2])] += 1
            elif not event.name.startswith(("aten::", "ProfilerStep", "Optimizer", "autograd::")):
                kernels[event.name][0] += 1
                kernels[event.name][1] += event.time_range.elapsed_us()
        elif event.name.startswith(RUNTIME_CALLS):
            calls[event.name.split("Ex")[0]] += 1
        elif event.name in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::copy_"):
            calls[event.name] += 1
    count, busy = sum(n for n, _ in kernels.values()), sum(t for _, t in kernels.values())
    row(
        what=what,
        precision=precision,
        ms=1e3 * wall,
        kernels=count / steps,
        gpu_busy_ms=busy / steps / 1e3,
        busy_share=busy / steps / 1e6 / wall,
        **{name: n / steps for name, n in sorted(calls.items())},
    )
    for name, (number, time_taken) in sorted(kernels.items(), key=lambda item: -item[1][1])[:6]:
        print(f"      {time_taken / steps:8.0f} us  {number / steps:6.1f} x  {name[:100]}", flush=True)


# -------------------------------------------------------------------------------------------------------------- graph
def graph() -> None:
    """Time the steps of the loop eagerly and as CUDA graphs, and compare the terms of their losses."""
    both = ("tf32", "fp32") if DEVICE.type == "cuda" else ("fp32",)
    step_rows(*(SMALL_STEP[0] if OPTS.tiny else STEPS[0]), both[0], (ROBUST,))
    for precision in both:
        for name, side, k, keep in SMALL_STEP if OPTS.tiny else STEPS[:3]:
            step_rows(name, side, k, keep, precision)


SMALL_STEP = (("resnet20", 32, 4, 8),)
STEPS = (  # net, side, images of D_f and of D_adv a step
    *(("resnet18", 32, 16, 256), ("resnet18", 32, 256, 256), ("resnet50_cifar100", 32, 64, 256)),
    ("torchvision:vit_b_16", 224, 16, 128),
)


def step_rows(
    name: str, side: int, k: int, keep: int, precision: str, methods=("adv_imp", "distill", "neggrad"), steps: int = 30
) -> None:
    """Time the steps of methods eagerly and as CUDA graphs, next to the passes alone (the floor)."""
    inputs = step_inputs(name, side, k, keep)
    precisions.use(DEVICE, precision)
    for method in methods:
        if left() < 5:
            return
        values = eager_and_graph(method, inputs, k, keep, 4 if OPTS.tiny else steps)
        if "graph_ms" in values:
            sizes = {"adv_imp": (min(k, 32), keep), "distill": (256,), "neggrad": (min(k, 32),), ROBUST: (512,)}[method]
            values |= step_floor(inputs[0], side, (4,) if OPTS.tiny else sizes)
            values["of_floor"] = values["floor_ms"] / min(values["eager_ms"], values["graph_ms"])
        row(net=name, k=k, precision=precision, method=method, **values)
    del inputs
    free()


def step_floor(net: nn.Module, side: int, sizes: tuple[int, ...]) -> dict[str, float]:
    """Return the time of a forward and backward pass with gradients of the weights for each of some batches.

    floor_ms is that of a CUDA graph on a GPU.
    """
    model = copy.deepcopy(net).train()
    batches = [(as_pixels(pixels(size, side)), torch.arange(size, device=DEVICE) % 10) for size in sizes]

    def passes() -> list[torch.Tensor | None]:
        model.zero_grad()
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
        return [parameter.grad for parameter in model.parameters()]

    eager = 1e3 * timed(passes, 0.1)
    if DEVICE.type != "cuda":
        return {"floor_ms": eager}
    graphed = Graphed(passes, DEVICE, print)
    for _ in range(WARM_UP + 1):
        graphed()
    return {"floor_eager_ms": eager, "floor_ms": 1e3 * timed(graphed, 0.1)}


def eager_and_graph(method: str, inputs, k: int, keep: int, steps: int) -> dict[str, object]:
    times, rows, reports = {}, {}, []
    for way, graphed in (("eager", False), ("graph", True)):
        marks: list[float] = []
        try:
            outcome = steps_of(
                *(method, inputs, steps, k, keep, lambda r, marks=marks: marks.append(clock())),
                **({"cuda_graph": True, "report": reports.append} if graphed else {}),
            )
        except Exception as error:
            return times | {"FAILED": f"{way}: {type(error).__name__}: {str(error)[:160]}"}
        spent = [after - before for before, after in itertools.pairwise(marks)]
        times[f"{way}_ms"], rows[way] = 1e3 * statistics.median(spent[len(spent) // 3 :]), outcome.curve
    differences = [
        abs(a[key] - b[key]) / max(1e-3, abs(a[key]))
        for a, b in zip(rows["eager"], rows["graph"], strict=True)
        for key in a
        if isinstance(a[key], float)
    ]
    times |= {"gain": times["eager_ms"] / times["graph_ms"], "terms_differ (<0.01)": max(differences, default=0.0)}
    return times | ({"report": reports[0][:120]} if reports else {})


# -------------------------------------------------------------------------------------------------------------- speed
def speed() -> None:
    """Measure what matters most first: rates against floors, steps, the table row, kernels; then larger networks."""
    on_gpu = DEVICE.type == "cuda"
    (first, *others), usual = sizes(), "tf32" if on_gpu else "fp32"
    steps = SMALL_STEP if OPTS.tiny else STEPS
    net = net_of(first[0])
    for precision in ("bf16", "tf32", "fp32") if on_gpu else ("fp32",):
        speed_of(net, *first, precision)
    step_rows(*steps[0], usual)
    if OPTS.data:
        try:
            ratio(usual)
        except Exception as error:  # the other rows are still measured
            row(what="table row", FAILED=f"{type(error).__name__}: {str(error)[:200]}")
            traceback.print_exc(limit=-3)
    whats = [("step of adv_imp", False), ("step of adv_imp", True), ("step of distill", False)]
    profiles(usual, [*whats, (ATTACKING, False), ("step of distill", True)])
    for one in steps[1:2]:
        step_rows(*one, usual)
    for name, side, count in others:
        net = net_of(name, 100 if "100" in name else 10)
        for precision in ("bf16", "tf32") if on_gpu else ("fp32",):
            if left() > 6:
                speed_of(net, name, side, count, precision)
        del net
        free()
    for one in steps[2:]:
        if left() > 8:
            step_rows(*one, usual, ("adv_imp",), 12)
    if left() > 5:
        noise()
    for name, side, count in sizes():
        if left() > 6:
            net = net_of(name, 100 if "100" in name else 10)
            speed_of(net, name, side, count, "fp32", released=True)


def speed_of(net: nn.Module, name: str, side: int, count: int, precision: str, *, released: bool = False) -> None:
    """Measure rates of the attack, of forward and input gradients alone (the floor), and of evaluation.

    released  also measure the released order of work
    """
    precisions.use(DEVICE, precision)
    iterations = 10 if name == "resnet18" and not OPTS.tiny else 3
    many = pixels(8, side).repeat(-(-count // 8), 1, 1, 1)[:count].contiguous()
    x = as_pixels(many)
    labels, start = torch.arange(count, device=DEVICE) % 10, torch.zeros_like(x)

    def floor() -> None:
        z = x
        for _ in range(iterations):
            z = z.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(net(z), labels, reduction="sum"), z)

    def attacked() -> None:
        attack.pgd_l2(net, many, labels, eps=4.0, alpha=0.1, steps=iterations, start=start)

    free()
    rates: dict[str, object] = {"net": name, "precision": precision, "examples": count}
    with folded(net, x[:1]), frozen(net), precisions.autocast(DEVICE, precision):
        rates["attack_examples_s"] = count * iterations / timed(attacked)
        rates["attack_gib"] = peak_gib()
        rates["floor_examples_s"] = count * iterations / timed(floor)
    rates["of_floor"] = rates["attack_examples_s"] / rates["floor_examples_s"]
    rates["eval_images_s"] = count / timed(lambda: accuracy.predict(net, many, batch_size=count))
    if released:
        rates |= released_order(net, many, labels, side)
    row(**rates)


def ratio(precision: str) -> None:
    """Measure the parts of the table row of CIFAR-10 against the released order of work; see speed.py."""
    import speed as against_released

    words = ["--device", OPTS.device, "--precision", precision]
    if OPTS.tiny:
        words += shlex.split("--dataset digits --model resnet20 --repeats 1 --pairs 32 --iterations 1 --steps 1")
        words += shlex.split("--step-k 2 --adv-batch-size 4 --eval-images 4 --workers-of-loader 0 --threads 1")
    else:
        words += ["--data-dir", str(OPTS.data), *(["--checkpoint", str(OPTS.weights)] if OPTS.weights else [])]
        words += shlex.split(
            "--repeats 2 --pairs 1024 --released-pairs 32 --iterations 20 --steps 4 --eval-images 6000"
        )
    opts = against_released.parse([*words, "--part", *against_released.ROW_PARTS])
    bench, _, measured = against_released.measure(opts, DEVICE)
    for one in measured:
        row(trained=bench.trained, precision=precision, **one)


def released_order(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, side: int) -> dict[str, float]:
    """Return rates of the released scripts' order of work, in fp32; see released.py."""
    k, keep, count = (4, 8, 2) if OPTS.tiny else (32, 256, 4) if side <= 64 else (16, 128, 2)
    model, few = released.as_built(net), released.PilImages(images[:k], labels[:k])
    size = {"eps": 4.0, "alpha": 0.1, "steps": count, "batch_size": 16, "device": DEVICE}
    attack_seconds = timed(lambda: released.attack(model, few, 10, 1, **size), 0.2, 3)
    adv, held = as_pixels(images[:keep]).cpu(), {n: torch.ones_like(p) for n, p in model.named_parameters()}
    sizes = {"batch_size": 32, "adv_batch_size": keep, "lr": 1e-12, "device": DEVICE}
    steps = released.steps(model, few, (adv, labels[:keep].cpu()), held, **sizes)
    step_seconds = timed(lambda: next(steps), 0.2, 3)
    pixels_seconds = timed(lambda: released.accuracy(model, few, DEVICE, 128), 0.2, 3)
    return {
        "released_attack_examples_s": k * count / attack_seconds,
        "released_step_adv_imp_ms": 1e3 * step_seconds,
        "released_eval_images_s": k / pixels_seconds,
    }


def noise() -> None:
    """Time what the host does: starts of the attack, noise of rawp, folding, a change of mode."""
    model, sample = net_of("resnet20" if OPTS.tiny else "resnet18"), as_pixels(pixels(1, 32))
    like, examples = torch.zeros(2048, 3, 32, 32, device=DEVICE), list(range(64 if OPTS.tiny else 2048))

    def fold() -> None:
        with folded(model, sample):
            pass

    def switch() -> None:
        with eval_mode(model):
            pass

    parts = {
        "starts of 2048 examples": lambda: attack._starts(like, examples, 20, 0, 0),
        "folding": fold,
        "eval mode": switch,
        "noise of rawp": lambda: WeightNoise(list(model.parameters()), 0.01, torch.Generator())(),
    }
    for name, part in parts.items():
        try:
            row(what=name, ms=1e3 * timed(part, 0.1, 5))
        except (TypeError, AttributeError) as error:  # their signatures are not public
            row(what=name, absent=str(error)[:100])


# ----------------------------------------------------------------------------------------------------------- together
def alone() -> None:
    """Print the steps of adv_imp a second of this process; `together` starts several."""
    inputs, marks = step_inputs("resnet20" if OPTS.tiny else "resnet18", 32, 64, 256), []
    precisions.use(DEVICE, "tf32" if DEVICE.type == "cuda" else "fp32")
    steps_of(
        "adv_imp",
        inputs,
        2 if OPTS.tiny else 2000,
        64,
        256,
        lambda r: marks.append(time.perf_counter()),
        go_on=lambda: left() > 0,
    )
    print(len(marks) / (marks[-1] - marks[0] + 1e-9))


def together() -> None:
    """Measure several runs at once on one GPU, as with main_sweep.py --gpus-per-trial 0.25."""
    for count in (1, 2) if OPTS.tiny else (1, 2, 4, 8):
        words = [
            sys.executable,
            __file__,
            "alone",
            "--device",
            OPTS.device,
            "--seconds",
            "4" if OPTS.tiny else "20",
            *(["--tiny"] if OPTS.tiny else []),
        ]
        there = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        found = [one.communicate()[0].split() for one in there]
        rates = [float(words[0]) for words in found if words and words[0][0].isdigit()]
        row(processes=count, steps_a_second=sum(rates), measured=len(rates))


PARTS = {part.__name__: part for part in (env, parity, request, memory, decode, profile, graph, speed, together, alone)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--data", type=Path, help="of speed: --data-dir with CIFAR-10")
    parser.add_argument("--weights", type=Path, help="of speed: the weights of ResNet-18")
    parser.add_argument("--tiny", action="store_true")
    OPTS = parser.parse_args()
    DEVICE = torch.device(OPTS.device)
    SIDES = dict.fromkeys((OPTS.device, "cpu"))
    if OPTS.device == "cpu":
        torch.set_num_threads(1)
    if OPTS.out:
        OPTS.out.mkdir(parents=True, exist_ok=True)
    PARTS[OPTS.part]()
    print(f"-- {OPTS.part}: {time.perf_counter() - STARTED:.0f} s", flush=True)
    sys.exit(any("FAILED" in one for one in ROWS))
