"""Functions that several test modules use."""

import hashlib
import json
import pickle

from conftest import FAST
import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from l2ul.sweeps import options as sweep_options


def load_records(folder):
    """Return the records in a result folder, by id."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}


def without_costs(record):
    """Return a record without the keys about time and memory."""
    return {key: v for key, v in record.items() if not key.startswith("seconds_") and key != "peak_memory_mib"}


def write_folder(root, classes=("ant", "bee"), parts=("train", "val"), size=(40, 60)):
    """Write an image folder with three random images per class; red is 10 · class + number."""
    generator = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                pixels[:, :, 0] = 10 * label + number
                Image.fromarray(pixels).save(folder / f"{number}.png")


def write_image(path, size=(8, 8), seed=0):
    """Write an image of random pixels, of size (width, height); return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def parse_sweep(tmp_path, *arguments):
    """Return the options of main_sweep.py for these arguments."""
    return sweep_options.parse([str(word) for word in ("--result-dir", tmp_path, *FAST, *arguments)])


def write_cifar(root, kind, monkeypatch, count=4):
    """A folder in CIFAR's official python format, with its own check sums."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels, sums = {}, {}
    key = "labels" if kind is CIFAR10 else "fine_labels"
    for name, _ in [*kind.train_list, *kind.test_list]:
        pixels[name] = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels[name], key: list(range(count))})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(10)]})
    (folder / kind.meta["filename"]).write_bytes(meta)
    for attribute in ("train_list", "test_list"):
        listed = [[name, sums[name]] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, listed)
    monkeypatch.setitem(kind.meta, "md5", hashlib.md5(meta).hexdigest())
    return folder, pixels
