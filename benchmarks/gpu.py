"""Check, train and measure on a CUDA GPU, in parts that end at their time limit.

    python benchmarks/gpu.py check --out OUT                                 # is everything correct on this GPU?
    python benchmarks/gpu.py train:240 table:280 --data DATA --out OUT       # CIFAR-10: train ResNet-18, then its table
    python benchmarks/gpu.py speed --out OUT                                 # attack, evaluation and steps
    python benchmarks/gpu.py jobs --file jobs.txt --common "--dataset cifar10 --checkpoint W" --data DATA --out OUT
    python benchmarks/gpu.py check train table speed --device cpu --tiny     # the script itself, on a CPU

Each PART is a name, optionally with its limit in seconds: check, train, table, cifar100, utkface, jobs, speed,
together, data. docs/gpu.md says what each part does. Every process of a part has a time limit, and a process that fails
does not stop the others. OUT holds results.json, results.tar.gz (logs, rows and records) and trained weights, all in
pieces below 16 MiB; they are written again while the parts run, so that a stopped run keeps its results.

    python benchmarks/gpu.py pack cifar10 weights --to FOLDER --piece 1 --of 2     # copy a part of the files of folders
    python benchmarks/gpu.py data --source FOLDER --data DATA                      # join these parts, unpack data sets
    python benchmarks/gpu.py join OUT                                              # join pieces, check their SHA-256
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Sequence
import concurrent.futures
import contextlib
from dataclasses import dataclass
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

PIECE = 15 * 2**20  # bytes of a file in OUT, at most
SLACK = 6  # factor of all limits with --tiny, as CPUs may be slow
REPACK = 20  # seconds between two versions of results.tar.gz
PYTHON = sys.executable
OK, STOPPED = "ok", "stopped at its limit"


@dataclass
class Task:
    """A command in a process of its own.

    words    the command
    limit    seconds until it is stopped
    ok       exit codes of success
    """

    name: str
    words: list[str]
    limit: float = 120
    ok: tuple[int, ...] = (0,)
    status: str = "not started"
    seconds: float = 0.0


class Session:
    """Runs tasks, and writes their status and results to the folder OUT as they end."""

    def __init__(self, opts: argparse.Namespace):
        self.opts, self.out, self.work = opts, opts.out, opts.work
        self.began = time.monotonic()
        self.end = self.began + opts.seconds
        self.lock, self.packed, self.running, self.stopped = threading.RLock(), 0.0, set(), False
        self.results = {"device": gpu_name(opts.device), "torch": version("torch"), "python": sys.version.split()[0]}
        self.results["parts"] = {}
        for folder in (self.out, self.work / "logs", self.work / "rows"):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(
        self,
        part: str,
        tasks: Sequence[Task],
        parallel: int,
        seconds: float,
        go_on: Callable[[list[Task]], bool] = lambda ended: True,
    ) -> list[Task]:
        """Run tasks in their order, `parallel` at a time, for `seconds` in all. Return them.

        go_on  called with the tasks that ended; no further one is started after it returned False
        """
        end, ended = min(time.monotonic() + seconds, self.end - 3), []
        slack = SLACK if self.opts.tiny else 1

        def one(task: Task) -> None:
            with self.lock:
                skip = self.stopped or not go_on(list(ended))
            if not skip and end - time.monotonic() > 2:
                self._process(part, task, min(slack * task.limit, end - time.monotonic()))
            with self.lock:
                if not skip:
                    ended.append(task)
                self._note(part, task)

        with concurrent.futures.ThreadPoolExecutor(max(1, parallel)) as pool:
            try:
                list(pool.map(one, tasks))
            except BaseException:  # Ctrl-C
                self.stop()
                raise
        self.pack(force=True)
        return list(tasks)

    def log(self, part: str, task: Task) -> Path:
        return self.work / "logs" / f"{part}.{task.name}.txt"

    def _process(self, part: str, task: Task, seconds: float) -> None:
        """Run a task in a process group of its own, so that its children end with it."""
        environment = os.environ | ENVIRONMENT
        started = time.monotonic()
        with self.log(part, task).open("w") as log:
            print(f"$ {shlex.join(task.words)}", file=log, flush=True)
            process = subprocess.Popen(
                task.words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            with self.lock:
                self.running.add(process)
            while process.poll() is None and time.monotonic() - started < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(5, max(0.01, seconds - (time.monotonic() - started))))
                self.pack()
            code = process.poll()
            task.status = STOPPED if code is None else OK if code in task.ok else f"FAILED, exit code {code}"
            if code is None:
                end_group(process)
            with self.lock:
                self.running.discard(process)
        task.seconds = time.monotonic() - started

    def stop(self) -> None:
        """End all processes and start no more."""
        with self.lock:
            self.stopped, running = True, list(self.running)
        for process in running:
            end_group(process)

    def _note(self, part: str, task: Task) -> None:
        """Print the status of a task that ended, with the end of its log if it failed, and write the results."""
        say(f"{part} {task.name}: {task.status}, {task.seconds:.0f} s")
        log = self.log(part, task)
        if task.status != OK and log.exists():
            lines = log.read_text(errors="replace").splitlines()
            failed = [line for line in lines if "FAILED" in line]
            print(*(f"    {line[:200]}" for line in failed[-8:] + lines[-4:]), sep="\n", flush=True)
        row = {"status": task.status, "seconds": round(task.seconds, 1)}
        rows = self.work / "rows" / f"{task.name}.json"
        if rows.exists():
            row["rows"] = json.loads(rows.read_text())
        self.results["parts"].setdefault(part, {})[task.name] = row
        self.save()

    def save(self) -> None:
        with self.lock:
            partial = self.out / "results.json.part"
            partial.write_text(json.dumps(self.results, indent=1) + "\n")
            partial.replace(self.out / "results.json")
            self.pack()

    def pack(self, force: bool = False) -> None:
        """Write logs, rows and records (without weights) to pieces of results.tar.gz."""
        with self.lock:
            if not force and time.monotonic() - self.packed < REPACK:
                return
            whole = self.work / "results.tar.gz"
            with tarfile.open(whole, "w:gz", compresslevel=3) as tar:
                for name in ("logs", "rows", "records/runs"):
                    for path in sorted((self.work / name).glob("*")) if (self.work / name).is_dir() else ():
                        if path.suffix in (".txt", ".json", ".npz", ".csv"):
                            with contextlib.suppress(FileNotFoundError):  # a partly written file that was renamed
                                tar.add(path, f"{name}/{path.name}")
            split(whole, self.out)
            self.packed = time.monotonic()


def end_group(process: subprocess.Popen) -> None:
    """End a process and its children; main_unlearn.py gets the time to write the state of its loop."""
    for name, seconds in ((signal.SIGTERM, 4), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, name)
            process.wait(seconds)


ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def say(text: str) -> None:
    print(text, flush=True)


def gpu_name(device: str) -> str:
    if device != "cuda":
        return device
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown GPU"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown GPU"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


# ----------------------------------------------------------------------------------------------------- files in pieces
def split(path: Path, folder: Path, size: int = PIECE) -> list[Path]:
    """Copy a file into a folder: as it is if it is small, else in pieces NAME.part0, NAME.part1, …"""
    for old in folder.glob(f"{path.name}*"):
        old.unlink()
    count = max(1, -(-path.stat().st_size // size))
    pieces = [folder / (f"{path.name}.part{number}" if count > 1 else path.name) for number in range(count)]
    with path.open("rb") as file:
        for piece in pieces:
            piece.write_bytes(file.read(size))
    return pieces


def join(folder: Path, to: Path) -> None:
    """Join the pieces in a folder and check the SHA-256 of each file that results.json names."""
    to.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    weights = json.loads(results.read_text()).get("weights", {}) if results.exists() else {}
    names = sorted({re.sub(r"\.part\d+$", "", path.name) for path in folder.iterdir() if path.is_file()})
    for name in names:
        pieces = sorted(folder.glob(f"{name}.part*"), key=lambda path: int(path.name.rpartition("part")[2]))
        content = b"".join(path.read_bytes() for path in pieces or [folder / name])
        digest = hashlib.sha256(content).hexdigest()
        if name in weights and weights[name]["sha256"] != digest:
            sys.exit(f"gpu.py: {name} has SHA-256 {digest}, not {weights[name]['sha256']}; copy its pieces again")
        if pieces or to != folder:
            (to / name).write_bytes(content)
        say(f"{to / name}: {len(content)} bytes{', SHA-256 checked' if name in weights else ''}")


def pack(sources: list[Path], to: Path, piece: int, of: int, unpackers: list[Path]) -> None:
    """Copy a part of the files of folders to `to`, in a subfolder of each folder's name with the names of all files.

    piece, of  which part, from 1; parts have about equal sizes
    unpackers  scripts unpack_NAME.py, copied with each part
    """
    if to.exists():
        shutil.rmtree(to)
    files = [(source, path) for source in sources for path in sorted(source.iterdir()) if path.is_file()]
    total, before, copied = sum(path.stat().st_size for _, path in files), 0, 0
    for source in sources:
        (to / source.name).mkdir(parents=True, exist_ok=True)
        names = [path.name for folder, path in files if folder == source]
        (to / f"{source.name}.names").write_text("\n".join(names) + "\n")
    for script in unpackers:
        shutil.copy(script, to / script.name)
    for source, path in files:
        size = path.stat().st_size
        if int(of * (before + size / 2) / max(1, total)) == piece - 1:
            shutil.copy(path, to / source.name / path.name)
            copied += size
        before += size
    say(f"{to}: {copied / 2**20:.1f} of {total / 2**20:.1f} MiB")


def unpack(source: Path, parts: Path, data: Path) -> bool:
    """Add a part that `pack` made to the folder `parts`; put each folder that is complete into `data`.

    NAME goes through unpack_NAME.py if there is one, otherwise its files are copied to DATA/NAME. Return False if
    such a script fails.
    """
    shutil.copytree(source, parts, dirs_exist_ok=True, copy_function=shutil.copyfile)
    worked = True
    for names in sorted(parts.glob("*.names")):
        folder = parts / names.stem
        missing = [name for name in names.read_text().splitlines() if not (folder / name).exists()]
        script = parts / f"unpack_{names.stem}.py"
        if missing:
            say(f"{names.stem}: {len(missing)} files are missing, such as {missing[0]}")
        elif script.exists():
            worked &= subprocess.run([PYTHON, str(script), str(data)], check=False).returncode == 0
        else:
            shutil.copytree(folder, data / names.stem, dirs_exist_ok=True)
            say(f"{data / names.stem}: complete")
    return worked


def half_floats(source: Path, to: Path) -> float:
    """Write weights as half floats, with their metadata. Return the accuracy on D_test that the metadata states."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(source, "np") as file:
        metadata = file.metadata()
    tensors = {
        name: value.astype("float16") if value.dtype == "float32" else value
        for name, value in load_file(source).items()
    }
    save_file(tensors, to, metadata)
    return float(metadata["acc_test"])


# --------------------------------------------------------------------------------------------------------------- check
def measure(opts: argparse.Namespace, name: str, limit: float) -> Task:
    """Return the task of a part of gpu_measure.py, which ends by itself before its limit."""
    words = [PYTHON, str(HERE / "gpu_measure.py"), name, "--device", opts.device, "--out", str(opts.work / "rows")]
    seconds = max(5, (SLACK if opts.tiny else 1) * limit - 8)
    return Task(name, [*words, "--seconds", str(seconds), *(["--tiny"] if opts.tiny else [])], limit)


def script(opts: argparse.Namespace, name: str, *words: object) -> list[str]:
    return [PYTHON, f"main_{name}.py", "--device", opts.device, *map(str, words)]


def results_in(opts: argparse.Namespace, folder: str = "records") -> list[object]:
    return ["--result-dir", opts.work / folder, "--cache-dir", opts.work / "cache", "--threads", 1]


FAST = shlex.split(
    "--unlearn-k 2 --num-adv-images 2 --pgd-iter 2 --max-passes 2 --batch-size 2 --distill-steps 3 --distill-cycles 1 "
    "--distill-mixes 8 --retain-sample 64"
)
FIXED_LENGTH = "finetune random_labels neggrad_plus l1_sparse salun scrub ssd bad_teaching boundary_shrink jit amun"
TESTS = shlex.split(
    "tests/test_unlearn.py tests/test_attack.py tests/test_importance.py tests/common tests/methods tests/metrics "
    "tests/training tests/models/test_huggingface.py tests/data tests/deletion"
)


def check(session: Session, seconds: float) -> list[Task]:
    """Compare CPU and GPU, and run the program and its tests."""
    opts = session.opts
    digits, fast = results_in(opts, "check"), FAST if opts.tiny else []
    metrics = ["--evaluate", "membership", "distance", "agreement", "duplicates", *([] if opts.tiny else ["relearn"])]
    fixed = ["--method", *FIXED_LENGTH.split(), "--setting", *["epochs=1", "batch=256", "iterations=5", "copies=5"]]
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    workers = ["-v", "-n", "6", "--dist", "worksteal"] if has_module("xdist") and not opts.tiny else []
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    one = script(opts, "unlearn", "--result-dir", opts.work / "torchrun", "--no-cache", "--method", "before")[1:]
    tasks = [
        measure(opts, "env", 30),
        Task("tests_cuda", [*pytest, "-m", "cuda", "--tb=short", "tests"], 90, ok=(0, 5)),
        measure(opts, "parity", 70),
        Task("digits", script(opts, "unlearn", *digits, *metrics, "--save-model", *fast), 110),
        Task("digits_fixed_length", script(opts, "unlearn", *digits, *fixed, *fast), 110),
        measure(opts, "request", 90),
        measure(opts, "memory", 60),
        measure(opts, "decode", 60),
        Task("torchrun", [*torchrun, *one, *fast], 60),
        measure(opts, "graph", 70),
    ]
    if opts.device == "cuda":
        for precision in ("tf32", "bf16"):
            words = ["--method", "adv_imp", "distill", "--precision", precision, "--goal", "relabel", *fast]
            tasks.append(Task(f"digits_{precision}", script(opts, "unlearn", *digits, *words), 110))
        words = [*results_in(opts, "check_eager"), "--method", "neggrad", "adv_imp", "distill", "--cuda-graph", "off"]
        tasks.append(Task("digits_eager", script(opts, "unlearn", *words), 110))
    tests = [*pytest, "-m", "not ray and not realdata and not cuda", "--tb=line", *workers]
    tasks.insert(1, Task("tests", [*tests, *(TESTS if not opts.tiny else ["tests/data/test_storage.py"])], 150))
    return session.run("check", tasks, opts.parallel, seconds)


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ------------------------------------------------------------------------------------------------- training and tables
@dataclass(frozen=True)
class Plan:
    """How the original model of a data set is trained, and the runs of its table.

    script   main_pretrain_NAME.py
    recipes  options of this script, by name; all are trained at the same time, for as many epochs as time allows
    common   options of both scripts
    jobs     options of calls of main_unlearn.py, in the order of their worth
    """

    dataset: str
    model: str
    script: str
    recipes: dict[str, str]
    jobs: tuple[str, ...]
    common: str = ""
    most_epochs: int = 200

    @property
    def weights(self) -> str:
        return f"{self.dataset}_{self.model}.safetensors"


def rows(seeds: Iterable[int], sizes: str) -> tuple[str, ...]:
    """Return the jobs of a table, each with a seed: the methods that matter most, then the others of the paper."""
    groups = "before distill adv_imp", "neggrad adv rawp oracle"
    return tuple(f"--seed {seed} --unlearn-k {sizes} --method {methods}" for methods in groups for seed in seeds)


PLANS = {
    "cifar10": Plan(
        "cifar10",
        "resnet18",
        "pretrain_cifar10_resnet18",
        {
            "large": "--schedule onecycle --lr 0.4 --batch-size 512 --weight-decay 5e-4 --erase 8",
            "small": "--schedule onecycle --lr 0.2 --batch-size 256 --weight-decay 5e-4 --erase 8",
        },
        rows(range(5), "16 64 128 256"),
    ),
    "cifar100": Plan(
        "cifar100",
        "resnet50_cifar100",
        "pretrain_cifar100_resnet50",
        {"small": "--schedule onecycle --lr 0.2 --batch-size 256 --weight-decay 5e-4 --erase 8"},
        rows(range(3), "16 64 128 256"),
    ),
    "utkface": Plan(
        "utkface",
        "resnet18_cifar100",
        "pretrain_utkface_resnet18",
        {"released": ""},
        rows(range(3), "16 32 64 128 256"),
        common="--age-grouping MFD",
        most_epochs=100,
    ),
    "digits": Plan(  # of --tiny
        "digits",
        "resnet20",
        "pretrain_digits_resnet20",
        {"plain": "--weight-decay 5e-4", "erase": "--erase 8"},
        (
            f"{' '.join(FAST)} --seed 0 --method before neggrad distill",
            f"{' '.join(FAST)} --seed 0 1 --method before adv_imp",
        ),
    ),
}


@dataclass(frozen=True)
class Training:
    """A call of a main_pretrain script.

    options  of the recipe and of speed
    epochs   passes over the training set
    """

    recipe: str
    options: str
    epochs: int


def train(session: Session, seconds: float, plan: Plan) -> list[Task]:
    """Train with all recipes of a plan at the same time, and keep the best model by D_test as half floats."""
    opts, end, part = session.opts, time.monotonic() + seconds, f"train_{plan.dataset}"
    (opts.work / "train").mkdir(parents=True, exist_ok=True)
    (opts.work / "weights").mkdir(exist_ok=True)
    if opts.epochs or opts.tiny:
        tasks, trainings = [], [Training(name, words, opts.epochs or 1) for name, words in plan.recipes.items()]
    else:
        tasks, trainings = probe(session, seconds, plan, part, end)
    whole = [training_task(opts, plan, training, "whole", seconds) for training in trainings]
    tasks += session.run(part, whole, len(whole) or 1, end - time.monotonic() - 15)
    halves = {}
    for training in trainings:
        trained = trained_file(opts, plan, training, "whole")
        if trained.exists():
            halves[training.recipe] = trained.with_stem(f"{trained.stem}_half")
            acc_test = half_floats(trained, halves[training.recipe])
            found = {"acc_test": acc_test, "epochs": training.epochs, "options": training.options}
            with session.lock:
                session.results.setdefault(f"trained_{plan.dataset}", {})[training.recipe] = found
    if halves:
        found = session.results[f"trained_{plan.dataset}"]
        best = max(halves, key=lambda recipe: found[recipe]["acc_test"])
        say(f"{plan.dataset}: {found}, best {best}")
        kept = opts.work / "weights" / plan.weights
        shutil.copyfile(halves[best], kept)
        with session.lock:
            digest = hashlib.sha256(kept.read_bytes()).hexdigest()
            session.results.setdefault("weights", {})[plan.weights] = {"sha256": digest, "recipe": best}
        split(kept, session.out)
        session.save()
    common = ["--dataset", plan.dataset, "--model", plan.model, *plan.common.split(), "--data-dir", opts.data]
    common += ["--method", "before", "--unlearn-k", 16, *(["--retain-sample", 64] if opts.tiny else [])]
    measuring = [  # that main_unlearn.py reads the half floats, and D_r
        Task(
            f"measure_{recipe}",
            script(opts, "unlearn", *common, "--checkpoint", half, *results_in(opts, f"{part}_{recipe}")),
            60,
        )
        for recipe, half in halves.items()
    ]
    tasks += session.run(part, measuring, len(measuring) or 1, max(25, end - time.monotonic()))
    for recipe in halves:
        for path in (opts.work / f"{part}_{recipe}" / "runs").glob("*.json"):
            record = json.loads(path.read_text())
            measured = {f"half_{key}": record[key] for key in ("acc_test", "acc_retain")}
            session.results[f"trained_{plan.dataset}"][recipe] |= measured
    say(f"{plan.dataset}: {session.results.get(f'trained_{plan.dataset}', 'no model was trained')}")
    session.save()
    return tasks


def training_task(opts: argparse.Namespace, plan: Plan, training: Training, kind: str, limit: float) -> Task:
    words = script(opts, plan.script, *plan.common.split(), *training.options.split(), "--epochs", training.epochs)
    words += ["--data-dir", str(opts.data), "--output", str(trained_file(opts, plan, training, kind)), "--rerun"]
    words += ["--test-batch-size", "2048", "--threads", str(opts.threads)]
    return Task(f"{kind}_{training.recipe}", words, limit)


def trained_file(opts: argparse.Namespace, plan: Plan, training: Training, kind: str) -> Path:
    return opts.work / "train" / f"{plan.dataset}_{kind}_{training.recipe}.safetensors"


def probe(session: Session, seconds: float, plan: Plan, part: str, end: float) -> tuple[list[Task], list[Training]]:
    """Train a few epochs of each recipe; return the tasks, and trainings with as many epochs as the time allows.

    On a GPU the first recipe also runs without CUDA graphs. Without agreement of the losses, no graph is used.
    """
    opts, epochs = session.opts, 4
    precision = " --precision bf16" if opts.device == "cuda" else ""
    eager = " --cuda-graph off"
    first = next(iter(plan.recipes))
    probes = [Training(name, f"{words}{precision}", epochs) for name, words in plan.recipes.items()]
    if opts.device == "cuda":
        probes.append(Training("eager", f"{plan.recipes[first]}{precision}{eager}", epochs))
    tasks = [training_task(opts, plan, training, "probe", 75) for training in probes]
    session.run(part, tasks, len(tasks), seconds)
    logs = {training.recipe: session.log(part, task) for training, task in zip(probes, tasks, strict=True)}
    each = {recipe: epoch_seconds(log) for recipe, log in logs.items()}
    losses = {recipe: last_loss(log) for recipe, log in logs.items()}
    say(f"seconds an epoch {each}, losses {losses}")
    with session.lock:
        session.results[f"probes_{plan.dataset}"] = {"seconds_an_epoch": each, "loss": losses}
    graphs = ""
    if "eager" in each and not (each[first] and losses["eager"] and abs(losses[first] / losses["eager"] - 1) < 0.25):
        say("CUDA graphs failed or differ; training without them")
        graphs, each = eager, dict.fromkeys(each, each["eager"])
    left = end - time.monotonic() - 40  # start, and measure the result
    return tasks, [
        Training(name, f"{words}{precision}{graphs}", max(2, min(plan.most_epochs, int(0.88 * left / each[name]))))
        for name, words in plan.recipes.items()
        if each[name]
    ]


def epoch_seconds(log: Path) -> float | None:
    """Return the seconds of an epoch without the first one, from the lines of a training; None if there are none."""
    text = log.read_text() if log.exists() else ""
    lines = re.findall(r"epoch (\d+)/\d+: .*?([\d,]+) images/s", text)
    if len(lines) < 2:
        return None
    spent = [int(epoch) / float(rate.replace(",", "")) for epoch, rate in lines]  # seconds an image, times epochs
    images = re.search(r"^train (\d+) images", text, re.MULTILINE)
    return (spent[-1] - spent[0]) / (len(spent) - 1) * (int(images[1]) if images else 50_000)


def last_loss(log: Path) -> float | None:
    """Return the loss of the last epoch in the log of a training."""
    losses = re.findall(r"epoch \d+/\d+: loss ([\d.]+)", log.read_text() if log.exists() else "")
    return float(losses[-1]) if losses else None


def jobs(session: Session, seconds: float, part: str, lines: Sequence[str], common: str) -> list[Task]:
    """Call main_unlearn.py with the options of each line, several at a time, until the time is up."""
    opts = session.opts

    def words(line: str) -> list[str]:
        fixed = ["--data-dir", opts.data, *results_in(opts)]
        return script(opts, "unlearn", *fixed, *shlex.split(common), *shlex.split(line))

    def go_on(ended: list[Task]) -> bool:
        return len(ended) < 3 or not all(task.status.startswith("FAILED") for task in ended)

    tasks = [Task(f"{number:03}", words(line), 3600) for number, line in enumerate(lines)]
    return session.run(part, tasks, opts.parallel, seconds, go_on)


def table(session: Session, seconds: float, plan: Plan) -> list[Task]:
    """Make the records of the table of a plan, with the weights that were trained or that --weights names."""
    opts = session.opts
    weights = opts.work / "weights" / plan.weights
    if opts.weights and plan is not PLANS["cifar100"] and plan is not PLANS["utkface"]:
        weights = opts.weights
    if not weights.exists():
        weights = opts.data / "weights" / plan.weights
    common = f"--dataset {plan.dataset} --model {plan.model} {plan.common} --checkpoint {shlex.quote(str(weights))}"
    if opts.device == "cuda":
        common += f" --precision {opts.precision} {opts.common}"
    return jobs(session, seconds, f"table_{plan.dataset}", plan.jobs, common)


def read_jobs(path: Path) -> list[str]:
    """Return the lines of a file of jobs, without comments and empty lines."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def summary_of_records(folder: Path) -> list[str]:
    """Return a line for each method, its settings that are not the default, and k: means over the seeds."""
    from l2ul.experiments import defaults, records

    groups = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        if record := records.read(path):
            usual = {"goal": "misclassify", "continual_step": None, "retain_sample": None, "course": None}
            usual |= {name: defaults.default(record["dataset"], name) for name in defaults.COMMON_DEFAULTS}
            usual |= dict.fromkeys((record.get("method_settings") or "").split())
            changed = {
                name: record[name]
                for name, value in usual.items()
                if name in record and record[name] not in (None, value) and name not in ("model", "unlearn_k")
            }
            text = " ".join(f"{name}={value}" for name, value in changed.items())
            groups[record["dataset"], record["method"], text, record["k"]].append(record)
    lines = [f"{'method':9} {'k':>4} {'D_f':>6} {'D_r':>12} {'D_test':>12} {'steps':>6} {'s':>6} seeds and statuses"]
    for (_, method, text, k), group in groups.items():
        mean = {key: mean_of(group, key) for key in ("acc_forget", "acc_retain", "acc_test", "steps")}
        seconds = statistics.mean(
            sum(value or 0 for key, value in one.items() if key.startswith("seconds_")) for one in group
        )
        statuses = collections.Counter(one["status"] for one in group)
        seeds = " ".join(sorted({str(one["seed"]) for one in group}))
        ended = " ".join(f"{count} {status}" for status, count in statuses.items())
        lines.append(
            f"{method:9} {k:4} {mean['acc_forget'].split('±')[0]:>6} {mean['acc_retain']:>12} {mean['acc_test']:>12} "
            f"{mean['steps'].split('.')[0]:>6} {seconds:6.1f} {seeds}: {ended} {text}"
        )
    return lines[:1] + sorted(lines[1:])


def mean_of(group: list[dict], key: str) -> str:
    values = [one[key] for one in group if one.get(key) is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f"±{statistics.stdev(values):.2f}" if len(values) > 1 else "")


# --------------------------------------------------------------------------------------------------------------- speed
def speed(session: Session, seconds: float) -> list[Task]:
    """Measure rates, steps, the table row of CIFAR-10, kernels and synchronisations, in one process."""
    opts = session.opts
    task = measure(opts, "speed", seconds)
    if opts.tiny or (opts.data / "cifar-10-batches-py").exists():
        task.words += ["--data", str(opts.data)]
    weights = [opts.weights, opts.work / "weights" / PLANS["cifar10"].weights]
    if usable := [str(path) for path in weights if path and path.exists()]:
        task.words += ["--weights", usable[0]]
    return session.run("speed", [task], 1, seconds)


def together(session: Session, seconds: float) -> list[Task]:
    """Measure several runs at once on one GPU, as with main_sweep.py --gpus-per-trial 0.25."""
    return session.run("together", [measure(session.opts, "together", 120)], 1, seconds)


# ------------------------------------------------------------------------------------------------------------- command
def both(session: Session, seconds: float, plan: Plan) -> list[Task]:
    """Train a model, in at most 60 % of the time, then make its table."""
    began = time.monotonic()
    tasks = train(session, 0.6 * seconds, plan)
    return tasks + table(session, seconds - (time.monotonic() - began), plan)


def plan_of(session: Session, name: str) -> Plan:
    return PLANS["digits" if session.opts.tiny else name]


PARTS = {  # the function of each part, and its limit in seconds
    "check": (check, 120),
    "train": (lambda session, seconds: train(session, seconds, plan_of(session, "cifar10")), 240),
    "table": (lambda session, seconds: table(session, seconds, plan_of(session, "cifar10")), 280),
    "speed": (speed, 60),
    "cifar100": (lambda session, seconds: both(session, seconds, plan_of(session, "cifar100")), 280),
    "utkface": (lambda session, seconds: both(session, seconds, plan_of(session, "utkface")), 200),
    "jobs": (
        lambda session, seconds: jobs(session, seconds, "jobs", read_jobs(session.opts.file), session.opts.common),
        280,
    ),
    "together": (together, 130),
}


def print_rows(results: dict) -> None:
    """Print what was measured, a line each."""
    for part, tasks in results["parts"].items():
        for name, task in tasks.items():
            measured = task.get("rows", [])
            for row in measured.get("items", []) if isinstance(measured, dict) else measured:
                text = " ".join(
                    f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
                )
                if name != "env" or "package" not in row:
                    say(f"{part} {name}: {text[:260]}")


def run(argv: Sequence[str]) -> int:
    """Run the parts of a command line. Return 1 if a process of them failed."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="+", metavar="PART[:SECONDS]", help=", ".join(PARTS))
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--tiny", action="store_true", help="sizes for seconds on a CPU; digits in place of all data sets")
    add("--data", type=Path, default=ROOT / "data", metavar="DIR", help="--data-dir of the scripts (default: data)")
    add("--out", type=Path, default=Path("gpu_out"), metavar="DIR", help="results (default: gpu_out)")
    add(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "l2ul_gpu",
        metavar="DIR",
        help="records, cache, logs and weights; later calls continue there (default: l2ul_gpu in the temporary folder)",
    )
    add("--seconds", type=float, default=590, metavar="N", help="limit of the whole call (default: 590)")
    cpus = os.cpu_count() or 1
    add("--parallel", type=int, default=max(1, min(8, cpus - 2)), metavar="N", help="processes at a time in a part")
    add("--together", action="store_true", help="run all parts at the same time, but speed after them")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of a training (default: 1)")
    add("--epochs", type=int, metavar="N", help="of trainings (default: as many as the limit allows)")
    add("--weights", type=Path, metavar="FILE", help="of ResNet-18 for table and speed (default: those of train)")
    add("--precision", default="tf32", help="of table and speed on a GPU (default: tf32)")
    add(
        "--file",
        type=Path,
        metavar="FILE",
        help="of jobs: the options of one call of main_unlearn.py a line; # comments",
    )
    add(
        "--common",
        default="",
        metavar="OPTIONS",
        help="of jobs and, on a GPU, tables: further options of every main_unlearn.py",
    )
    opts = parser.parse_intermixed_args(argv)
    chosen = {}
    for word in opts.parts:
        name, _, limit = word.partition(":")
        if name not in PARTS or not (limit.isdecimal() or not limit):
            parser.error(f"the part is {word!r}; expected one of {', '.join(PARTS)}, with :SECONDS or without")
        chosen[name] = float(limit or PARTS[name][1])
    if "jobs" in chosen and not (opts.file and opts.file.is_file()):
        parser.error(f"--file is {opts.file}; expected a file with the options of one main_unlearn.py a line")
    for name in ("data", "out", "work", "weights"):
        setattr(opts, name, getattr(opts, name) and getattr(opts, name).resolve())
    session = Session(opts)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    def part(name: str) -> tuple[str, float]:
        started = time.monotonic()
        try:
            tasks = PARTS[name][0](session, min(chosen[name], session.left - 5))
            bad = [f"{task.name} {task.status}" for task in tasks if task.status != OK]
        except Exception as error:  # the other parts still run
            bad = [f"{type(error).__name__}: {error}"]
        return f"{'FAILED: ' + '; '.join(bad) if bad else 'ok'}", time.monotonic() - started

    ended: dict[str, tuple[str, float]] = {}
    try:
        beside = [name for name in chosen if opts.together and name != "speed"]
        with concurrent.futures.ThreadPoolExecutor(len(beside) or 1) as pool:
            ended |= dict(zip(beside, pool.map(part, beside), strict=True))
        for name in chosen:
            if name not in ended:
                ended[name] = part(name)
    except KeyboardInterrupt:
        session.stop()
    session.save()
    session.pack(force=True)
    print_rows(session.results)
    if (opts.work / "records" / "runs").is_dir():
        lines = summary_of_records(opts.work / "records" / "runs")
        (opts.work / "rows" / "records.txt").write_text("\n".join(lines) + "\n")
        say("\n".join(lines[:110]))
    for name, (status, seconds) in ended.items():
        say(f"{name.upper()} {status[:600]} {seconds:.0f} s")
    return 0 if len(ended) == len(chosen) and all(status == "ok" for status, _ in ended.values()) else 1


def main(argv: Sequence[str]) -> int:
    command, *rest = argv or ["--help"]
    if command == "pack":
        parser = argparse.ArgumentParser(prog="gpu.py pack", description=pack.__doc__)
        parser.add_argument("sources", type=Path, nargs="+", metavar="FOLDER")
        parser.add_argument("--to", type=Path, required=True)
        parser.add_argument("--piece", type=int, default=1)
        parser.add_argument("--of", type=int, default=1)
        parser.add_argument("--unpack", type=Path, nargs="*", default=[], metavar="SCRIPT")
        opts = parser.parse_args(rest)
        pack(opts.sources, opts.to, opts.piece, opts.of, opts.unpack)
    elif command == "data":
        parser = argparse.ArgumentParser(prog="gpu.py data", description=unpack.__doc__)
        parser.add_argument("--source", type=Path, required=True)
        parser.add_argument("--parts", type=Path, default=Path(tempfile.gettempdir()) / "l2ul_parts")
        parser.add_argument("--data", type=Path, required=True)
        opts = parser.parse_args(rest)
        return 0 if unpack(opts.source, opts.parts, opts.data) else 1
    elif command == "join":
        parser = argparse.ArgumentParser(prog="gpu.py join", description=join.__doc__)
        parser.add_argument("folder", type=Path)
        parser.add_argument("--to", type=Path, help="default: the folder itself")
        opts = parser.parse_args(rest)
        join(opts.folder, opts.to or opts.folder)
    else:
        return run(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
