"""Try deletion requests on damaged images and checkpoints, and check what they claim with plain torch code.

    python benchmarks/damaged_files.py                              # 500 images and 500 checkpoints
    python benchmarks/damaged_files.py --images 20 --checkpoints 20 --seed 1

Each case damages one file: cut off, bytes changed, a block zeroed, repeated or removed, or random content. A request
must end with exit code 0, 2 or 3 and, for 2, with one sentence. Each image that a report calls forgotten must be
predicted as its label by the original weights and not by the written ones, in code that shares nothing with requests
but the network. The script prints the failures and a table, and ends with exit code 1 if there are any.
"""

import argparse
from collections import Counter
import contextlib
import io
import json
from pathlib import Path
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))  # for --build damaged_files:network

import l2ul  # noqa: I001  # first: it sets the environment before torch is imported

from PIL import Image
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from l2ul.deletion import search
from l2ul.metrics import relearn, robustness
import main_forget

CLASSES, SIDE, SECONDS = 4, 16, 120  # of the images; the longest that a case may take
FORMATS = (
    *("png", "jpg", "bmp", "gif", "webp", "tif", "ppm", "ico", "tga", "jp2"),
    *("progressive.jpg", "grey.png", "grey16.png", "palette.png", "alpha.png", "exif.jpg"),
)
FAST = ["--minutes", "1", "--threads", "1", "--device", "cpu", "--setting", "distill_steps=12", "distill_cycles=2"]
FAST += ["distill_mixes=8", "distill_lr=0.01", "robust=0"]  # as stored: more images count as forgotten


def network() -> nn.Module:
    """Return a small network with batch-norm for images of 16 pixels. `--build damaged_files:network` names it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="number of damaged images")
    parser.add_argument("--checkpoints", type=int, default=500, help="number of damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = try_all(Path(folder), args.images, args.checkpoints, args.seed)
    for kind, outcomes in results["outcomes"].items():
        print(f"{kind}: {', '.join(f'{name} {count}' for name, count in outcomes.most_common())}")
    print(f"images reported as forgotten: {results['forgotten']}; failures: {len(results['failures'])}")
    raise SystemExit(1 if results["failures"] else 0)


def try_all(folder: Path, images: int, checkpoints: int, seed: int) -> dict:
    """Return counts of the outcomes, the number of images reported as forgotten, and the failures as text."""
    fewer = {search: {"MAX_EXAMPLES": 32}, relearn: {"MAX_STEPS": 5}}
    fewer |= {robustness: {"COPIES": 8, "COPIES_OF_A_KIND": 2}}  # what is fuzzed does not depend on them
    with contextlib.ExitStack() as stack:
        for module, values in fewer.items():
            stack.enter_context(mock.patch.multiple(module, **values))
        return _try_all(folder, images, checkpoints, seed)


def _try_all(folder: Path, images: int, checkpoints: int, seed: int) -> dict:
    generator = random.Random(seed)
    net, pixels, labels = train()
    results = {"outcomes": {"images": Counter(), "checkpoints": Counter()}, "forgotten": 0, "failures": []}
    cases = [("images", one) for one in range(images)] + [("checkpoints", one) for one in range(checkpoints)]
    for kind, number in cases:
        place = folder / f"{kind}{number}"
        make = damaged_image if kind == "images" else damaged_checkpoint
        words, what = make(place, number, net, pixels, labels, generator)
        outcome, forgotten, failure = try_request(place, words)
        results["outcomes"][kind][outcome] += 1
        results["forgotten"] += forgotten
        if failure:
            results["failures"].append(f"{kind} {number} ({what}): {failure}")
            print(results["failures"][-1], flush=True)
    return results


def train() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the trained network, its training images (n, 3, SIDE, SIDE) uint8 and their labels."""
    torch.manual_seed(0)
    pixels = torch.rand(24, 3, 4, 4).repeat_interleave(SIDE // 4, 2).repeat_interleave(SIDE // 4, 3)
    pixels, labels = (255 * pixels).to(torch.uint8), torch.arange(24) % CLASSES
    net = network().train()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(pixels / 255), labels).backward()
        optimizer.step()
    assert (net.eval()(pixels / 255).argmax(1) == labels).all()
    return net, pixels, labels


def save_image(pixels: Tensor, path: Path) -> None:
    """Write an image in the format that the end of its name stands for."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    name = path.name.partition(".")[2]
    if name.startswith("grey16"):
        image = Image.fromarray(pixels.float().mean(0).mul(257).numpy().astype("uint16"))
    elif name.startswith("grey"):
        image = image.convert("L")
    elif name.startswith("palette"):
        image = image.quantize(16)
    elif name.startswith("alpha"):
        image = image.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if name.startswith("exif") else {}
    options |= {"progressive": True} if name.startswith("progressive") else {}
    image.save(path, **options)


def damage(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    """Return damaged content and how it was damaged."""
    size = len(content)
    place, length = generator.randrange(size), generator.randint(1, max(1, size // 4))
    kind = generator.choice(("cut", "bytes", "bytes", "bytes", "zeros", "repeat", "remove", "random", "empty", "swap"))
    if kind == "cut":
        return content[:place], f"cut at {place}"
    if kind == "bytes":
        changed = bytearray(content)
        count = generator.choice((1, 2, 8, 64))
        for _ in range(count):
            # half of the changes are in the first kibibyte, where formats keep their structure
            value = generator.randrange(256)
            changed[generator.randrange(min(size, 1024) if generator.random() < 0.5 else size)] = value
        return bytes(changed), f"{count} bytes changed"
    if kind == "zeros":
        zeros = bytes(len(content[place : place + length]))
        return content[:place] + zeros + content[place + length :], "a block zeroed"
    if kind == "repeat":
        return content[:place] + content[place : place + length] * 2 + content[place + length :], "a block repeated"
    if kind == "remove":
        return content[:place] + content[place + length :], "a block removed"
    if kind == "random":
        return generator.randbytes(size), "random content"
    if kind == "swap":
        return content[size // 2 :] + content[: size // 2], "halves swapped"
    return b"", "empty"


def write_intact(place: Path, pixels: Tensor, labels: Tensor, generator: random.Random) -> None:
    """Write three of the images for a request, in a subfolder per class."""
    for index in generator.sample(range(len(pixels)), 3):
        file = place / "in" / str(int(labels[index])) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(pixels[index], file)


def damaged_image(place: Path, number: int, net, pixels, labels, generator) -> tuple[list[str], str]:
    """Make a request of three intact images and a damaged one; return its arguments and what was damaged."""
    form = FORMATS[number % len(FORMATS)]
    write_intact(place, pixels, labels, generator)
    index = generator.randrange(len(pixels))
    file = place / "in" / str(int(labels[index])) / f"damaged.{form}"
    file.parent.mkdir(exist_ok=True)
    save_image(pixels[index], file)
    content, how = damage(file.read_bytes(), generator)
    file.write_bytes(content)
    torch.save(net.state_dict(), place / "net.pt")
    skip = ["--skip-bad"] if generator.random() < 0.5 else []
    return [*arguments(place, "net.pt"), "--image-size", str(SIDE), *skip], f"{form}, {how}"


def damaged_checkpoint(place: Path, number: int, net, pixels, labels, generator) -> tuple[list[str], str]:
    """Make a request on a damaged checkpoint; return its arguments and what was damaged."""
    write_intact(place, pixels, labels, generator)
    state = net.state_dict()
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    form = ("zip.pt", "legacy.pth", "safetensors", "wrapped.ckpt", "half.pt")[number % 5]
    file = place / f"net.{form}"
    if form == "safetensors":
        save_file(state, file)
    else:
        content = {"wrapped.ckpt": wrapped, "half.pt": half}.get(form, state)
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy.pth")
    content, how = damage(file.read_bytes(), generator)
    file.write_bytes(content)
    return arguments(place, file.name), f"{form}, {how}"


def arguments(place: Path, file: str) -> list[str]:
    words = ["--build", "damaged_files:network", "--checkpoint", str(place / file), "--images", str(place / "in")]
    return [*words, "--output", str(place / "out"), *FAST]


def try_request(place: Path, words: list[str]) -> tuple[str, int, str | None]:
    """Carry out a request; return its outcome, how many images it calls forgotten, and what went wrong."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv, l2ul.STARTED = ["main_forget.py", *words], time.perf_counter()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main_forget.main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # what a user would see as a traceback
        return "traceback", 0, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        signal.alarm(0)
    if code not in (0, 2, 3):
        return f"exit code {code}", 0, f"exit code {code}: {err.getvalue()[-300:]}"
    if code == 2:
        lines = err.getvalue().strip().splitlines()
        return "refused", 0, None if len(lines) == 1 else f"{len(lines)} lines: {err.getvalue()[-500:]}"
    report = json.loads((place / "out" / "report.json").read_text())
    claimed = [row for row in report["images"] if row["state"] == "forgotten"]
    return f"carried out, exit code {code}", len(claimed), check_claims(place, words, claimed)


def _too_long(number, frame):
    raise TimeoutError(f"more than {SECONDS} s")


def check_claims(place: Path, words: list[str], rows: list[dict]) -> str | None:
    """Return how what a report calls forgotten differs from what plain code says; None if it does not."""
    before = plain_network(Path(words[3]))
    after = plain_network(next((place / "out").glob("model*")))
    for row in rows:
        with Image.open(place / "in" / row["file"]) as image:  # as torchvision's ImageFolder does
            image = image.convert("I").point(lambda value: value / 257) if image.mode.startswith("I") else image
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)[None] / 255
        if pixels.shape[2:] != (SIDE, SIDE):
            continue  # resized by the request
        if int(before(pixels).argmax(1)) != row["label"]:
            return f"{row['file']} was not recognised before"
        if int(after(pixels).argmax(1)) == row["label"]:
            return f"{row['file']} is still recognised"
    return None


def plain_network(path: Path) -> nn.Module:
    """Return the network with the weights of a file, read with torch or safetensors alone."""
    try:
        content = torch.load(path, weights_only=True)
    except Exception:  # safetensors under any name
        content = load_file(path)
    state = content.get("state_dict", content)
    net = network()
    net.load_state_dict({re.sub(r"^module\.", "", name): tensor.float() for name, tensor in state.items()})
    return net.eval()


if __name__ == "__main__":
    main()
