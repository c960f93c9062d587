"""Shared fixtures: a tiny trained network, the place of the real data, and calls of the scripts."""

import os
from pathlib import Path
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # -n: each worker has one core
    os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # without bytecode, every process compiles torch, which takes seconds
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

import l2ul  # isort: skip  # first: it sets the environment before torch is imported

import dataclasses
import functools
import json
import time

from PIL import Image
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul.common import device, precision
from l2ul.data import datasets
from l2ul.data.images import Split
from l2ul.deletion import search
from l2ul.experiments import defaults
from l2ul.methods import robust
from l2ul.metrics import relearn
import main_forget
import main_unlearn

ROOT = Path(__file__).resolve().parent.parent
REALDATA = Path(os.environ.get("L2UL_REALDATA", ROOT.parent / "shared" / "data"))
REFERENCE = ROOT / "result_data" / "reference"
CLASSES = 5  # of the tiny network
# options of main_unlearn.py with which a command takes about a second
FAST = ["--unlearn-k", 2, "--num-adv-images", 3, "--pgd-iter", 2, "--max-passes", 2, "--batch-size", 2]
FAST += ["--distill-steps", 2, "--distill-cycles", 1, "--distill-mixes", 4]
# options of main_forget.py, likewise
FAST_REQUEST = ["--minutes", 10, "--setting", "robust=0", "distill_steps=16", "distill_mixes=16", "distill_lr=0.02"]


def pytest_configure(config):
    """Hide GPUs from torch unless the tests marked `cuda` are selected: -m cuda.

    Autograd starts a thread for each GPU at the first backward pass, and refuses backward passes in processes that are
    forked later, as some tests do.
    """
    selected = config.getoption("markexpr") or ""
    if "cuda" not in selected or "not cuda" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    missing = {
        "realdata": pytest.mark.skip(reason=f"no real data in {REALDATA}; name their folder in L2UL_REALDATA"),
        "cuda": pytest.mark.skip(reason="needs a CUDA GPU and the option -m cuda"),
        "reference": pytest.mark.skip(reason="needs the committed records, which a clone has and an sdist has not"),
    }
    there = {"realdata": REALDATA.is_dir(), "cuda": torch.cuda.is_available(), "reference": REFERENCE.is_dir()}
    for item in items:
        for name, skip in missing.items():
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _on_cpu(request, monkeypatch):
    """Hide GPUs from every test without the mark `cuda`, and from the processes it starts.

    The CPU computes the same numbers again, so that tests can compare results bit for bit.
    """
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class TinyNet(nn.Module):
    """Two convolutions with batch-norm, dropout and a linear head, for images (N, 3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        self.head = nn.Linear(16 * 16, CLASSES)

    def forward(self, x):
        return self.head(self.features(x))


def tiny_net(seed: int = 0) -> TinyNet:
    """Return an untrained tiny network in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet().eval()


class WithAverage(nn.Module):
    """A network that is used in train mode, and its averaged weights, which are used in eval mode."""

    def __init__(self):
        super().__init__()
        self.net, self.average = tiny_net(), tiny_net()

    def forward(self, x):
        return (self.net if self.training else self.average)(x)


@pytest.fixture(scope="session")
def _trained():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.arange(40) % CLASSES
    model = tiny_net().train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.manual_seed(0)
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(images / 255), labels, label_smoothing=0.1).backward()
            optimizer.step()
    model.eval()
    assert (model(images / 255).argmax(1) == labels).all()
    return model.state_dict(), images, labels


@pytest.fixture
def trained(_trained):
    """Return a tiny network that classifies 40 images correctly, the images (uint8) and their labels."""
    state, images, labels = _trained
    model = tiny_net()
    model.load_state_dict(state)
    return model, images.clone(), labels.clone()


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    """Return a folder with a small untrained ViT of ten classes, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=48, patch_size=16, num_labels=10, **size)
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(config).eval().save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 48, "width": 48}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def fp32_is_faster(monkeypatch):
    """Let fp32 be the faster precision on this CPU. A measurement takes 0.7 s and varies for tiny networks."""
    monkeypatch.setattr(precision, "fastest", lambda model, images, *, trains: ("fp32", {"fp32": 1.0, "bf16": 2.0}))


@pytest.fixture
def script(monkeypatch, capsys, tmp_path_factory, fp32_is_faster):
    """Return a function that calls a script's main with arguments.

    It returns exit code, standard output and standard error. Each test has a cache of its own.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(defaults, "CACHE_DIR", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(device, "other_processes", lambda: 0.0)

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        monkeypatch.setattr(l2ul, "STARTED", time.perf_counter())
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@functools.cache
def _digits():
    return datasets.load("digits", "nowhere")


def load_few_digits():
    """Return the digits with 40 training and 20 test images, with which a command takes about a second."""
    digits = _digits()
    return dataclasses.replace(
        digits,
        train=Split(digits.train.images[:40].clone(), digits.train.labels[:40].clone()),
        test=Split(digits.test.images[:20].clone(), digits.test.labels[:20].clone()),
    )


@pytest.fixture
def few_digits(monkeypatch):
    """Reduce the digits; see `load_few_digits`."""
    few = load_few_digits()
    monkeypatch.setitem(datasets.LOADERS, "digits", lambda data_dir, **options: few)
    return few


@pytest.fixture
def run(script, tmp_path, few_digits):
    """Return a function that calls main_unlearn.py on few digits; see `script` for what it returns."""

    def call(*arguments):
        return script(main_unlearn.main, "--result-dir", tmp_path, *FAST, *arguments)

    return call


def save_images(folder, images, labels=None):
    """Write uint8 images (n, 3, H, W) as PNG files, in a subfolder per label if there are labels; return the folder."""
    for number, image in enumerate(images):
        place = folder / str(int(labels[number])) if labels is not None else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    return folder


@pytest.fixture
def fast_report(monkeypatch, fp32_is_faster):
    """Reduce the synthesis and the evaluation of a deletion request to about a second."""
    monkeypatch.setattr(robust, "ITERATIONS", 10)
    monkeypatch.setattr(search, "MAX_EXAMPLES", 32)
    monkeypatch.setattr(relearn, "MAX_STEPS", 30)


@pytest.fixture
def tiny(trained, tmp_path, fast_report):
    """Return arguments for a tiny trained network, all its images and labels; `in` has six of the images."""
    model, images, labels = trained
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "optimizer": {"m": torch.ones(2)}}, tmp_path / "tiny.pth")
    save_images(tmp_path / "in", images[:6])
    return ["--build", "conftest:tiny_net", "--checkpoint", tmp_path / "tiny.pth"], images, labels


@pytest.fixture
def forget(script, tmp_path, tiny):
    """Return a function that calls main_forget.py on the tiny network.

    It returns exit code, report and all output.
    """

    def call(*arguments, output="out", images="in", model=tiny[0]):
        fast = FAST_REQUEST[:2] if "--setting" in arguments else FAST_REQUEST
        words = [*model, "--images", tmp_path / images, "--output", tmp_path / output, *fast, *arguments]
        code, out, err = script(main_forget.main, *words)
        path = tmp_path / output / "report.json"
        return code, json.loads(path.read_text()) if path.exists() else None, out + err

    return call


def load_tiny_net(path):
    """Return the tiny network with the weights of a checkpoint."""
    model = tiny_net()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model


def predicted_classes(path, images):
    """Return the classes that the tiny network in a checkpoint predicts for uint8 images."""
    return load_tiny_net(path)(images / 255).argmax(1)
