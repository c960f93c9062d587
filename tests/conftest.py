"""What the tests share: a tiny trained net, where the real data are, and scripts called as a user calls them."""

import l2ul  # isort: skip  # first: it sets the environment before torch is imported

import dataclasses
import os
from pathlib import Path
import sys
import time

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul import data, defaults
from l2ul.data import Split
import main_unlearn

ROOT = Path(__file__).resolve().parent.parent
REALDATA = Path(os.environ.get("L2UL_REALDATA", ROOT.parent / "shared" / "data"))
CLASSES = 5  # of the tiny net
# flags of main_unlearn.py that make a command take a second
FAST = ["--unlearn-k", 2, "--num-adv-images", 3, "--pgd-iter", 2, "--max-passes", 2, "--batch-size", 2]
FAST += ["--distill-steps", 2, "--distill-cycles", 1, "--distill-mixes", 4]


def pytest_collection_modifyitems(items):
    missing = {
        "realdata": pytest.mark.skip(reason=f"no real data in {REALDATA}; name their folder in L2UL_REALDATA"),
        "cuda": pytest.mark.skip(reason="no CUDA GPU"),
    }
    there = {"realdata": REALDATA.is_dir(), "cuda": torch.cuda.is_available()}
    for item in items:
        for name, skip in missing.items():
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(skip)


class TinyNet(nn.Module):
    """Two convolutions with batch-norm, dropout and a linear head, for (N, 3, 8, 8)."""

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet().eval()


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
    """A tiny net that knows its 40 images, those images (uint8) and their labels."""
    state, images, labels = _trained
    model = tiny_net()
    model.load_state_dict(state)
    return model, images.clone(), labels.clone()


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    """A small untrained ViT of ten classes, saved as `save_pretrained` saves it."""
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
def script(monkeypatch, capsys, tmp_path_factory):
    """Call a script's main with arguments; returns exit code, standard output and standard error.

    Each test has a cache of its own.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(defaults, "CACHE_DIR", tmp_path_factory.mktemp("cache"))

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


@pytest.fixture
def few_digits(monkeypatch):
    """The digits cut down to 40 training and 20 test images, so that a whole command takes a second."""
    digits = data.load("digits", "nowhere")
    few = dataclasses.replace(
        digits,
        train=Split(digits.train.images[:40], digits.train.labels[:40]),
        test=Split(digits.test.images[:20], digits.test.labels[:20]),
    )
    monkeypatch.setattr(data, "_digits", lambda: few)
    return few


@pytest.fixture
def run(script, tmp_path, few_digits):
    def call(*arguments):
        return script(main_unlearn.main, "--result-dir", tmp_path, *FAST, *arguments)

    return call
