"""A model that does not predict the labels of a request stops it; the alternative that makes them right is named."""

from types import SimpleNamespace

from conftest import CLASSES, save_images, tiny_net
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from l2ul import models
from l2ul.deletion import plausibility
from l2ul.deletion.request import order_classes
from l2ul.models.classifier import Classifier, Normalize

COUNT = 12  # classes, so that their order as text is not their order as numbers


class Stem(nn.Module):
    """A small network with a max-pool after its first layer, or without it."""

    def __init__(self, pooled, count=CLASSES, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.maxpool = nn.MaxPool2d(8) if pooled else nn.Identity()
        self.fc = nn.Linear(16 * 16, count)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.maxpool(self.conv1(x).relu()), 4).flatten(1))


def wide_net():
    net = tiny_net()
    net.head = nn.Linear(16 * 16, COUNT)
    return net


def train(net, images, labels, preprocess=lambda pixels: pixels, steps=40):
    optimizer = torch.optim.Adam(net.train().parameters(), 0.01)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(preprocess(images / 255)), labels).backward()
            optimizer.step()
    assert (net.eval()(preprocess(images / 255)).argmax(1) == labels).float().mean() > 0.9
    return net.state_dict()


@pytest.fixture(autouse=True)
def no_deadline(monkeypatch):
    """Try all alternatives, also on a busy machine."""
    monkeypatch.setattr(plausibility, "SECONDS", 3600.0)


@pytest.fixture
def built(trained, forget, tmp_path):
    """Return a function that trains a net, and requests six images with a network of the same layers."""
    _, images, labels = trained

    def call(net, build, *arguments, labels=labels, preprocess=lambda pixels: pixels, names=None):
        torch.save(train(net, images, labels, preprocess), tmp_path / "net.pt")
        save_images(tmp_path / "labelled", images[:6], (labels if names is None else names)[:6])
        words = ["--build", build, "--checkpoint", tmp_path / "net.pt"]
        return forget("--dry-run", *arguments, images="labelled", model=words)

    return call


def test_the_string_order_of_classes_is_named_and_then_used(built, trained):
    names = (torch.arange(40) * 5 + 10) % COUNT
    indices = torch.tensor([sorted(map(str, range(COUNT))).index(str(int(name))) for name in names])
    request = {"labels": indices, "names": names}
    code, _, printed = built(wide_net(), "test_plausibility:wide_net", **request)
    assert (code, printed.count("\n")) == (2, 1)
    assert "of 6 images, but 6 of 6 with ImageFolder's string order of classes: add --class-order string" in printed
    code, _, printed = built(wide_net(), "test_plausibility:wide_net", "--class-order", "string", **request)
    assert code == 0, printed
    assert "predictions: 6 of 6 images are classified as their label" in printed


def test_the_order_of_classes_is_named_if_half_of_the_labels_are_right_without_it(built):
    order = sorted(map(str, range(COUNT)))  # 0 and 1 have the same number in both orders
    names = torch.tensor([0, 1, 0, 2, 11, 5, *[3] * 34])
    indices = torch.tensor([order.index(str(int(name))) for name in names])
    request = {"labels": indices, "names": names}
    code, _, printed = built(wide_net(), "test_plausibility:wide_net", **request)
    assert (code, printed.count("\n")) == (2, 1)
    assert "the label of 3 of 6 images, but 6 of 6 with ImageFolder's string order of classes: add" in printed
    assert built(wide_net(), "test_plausibility:wide_net", "--min-known", "0", **request)[0] == 0


def test_the_input_range_is_named(built):
    request = {"preprocess": lambda pixels: 255 * pixels}
    code, _, printed = built(tiny_net(), "conftest:tiny_net", **request)
    assert (code, printed.count("\n")) == (2, 1)
    assert "but 6 of 6 with pixels from 0 to 255: add --std 0.00392157 0.00392157 0.00392157" in printed
    assert built(tiny_net(), "conftest:tiny_net", "--std", *["0.00392157"] * 3, **request)[0] == 0


def test_inverted_pixels_are_named(built):
    code, _, printed = built(tiny_net(), "conftest:tiny_net", preprocess=lambda pixels: 1 - pixels)
    assert (code, "with inverted pixels (255 - x): build this into a module" in printed) == (2, True), printed


@pytest.mark.parametrize("channels", [3, 1])
def test_a_missing_max_pool_is_named(forget, trained, tmp_path, monkeypatch, channels):
    for name in ("stem", "stem_nopool"):
        family = SimpleNamespace(
            MEAN=(0,) * 3, STD=(1,) * 3, build=lambda name, count: Stem("nopool" not in name, count)
        )
        monkeypatch.setitem(models.OWN, name, family)
    _, images, labels = trained
    torch.manual_seed(0)
    images = images[:, :channels]
    torch.save(train(Stem(False, channels=channels), images, labels, steps=150), tmp_path / "stem.pt")
    save_images(tmp_path / "labelled", images.expand(-1, 3, -1, -1), labels)
    words = ["--checkpoint", tmp_path / "stem.pt", "--min-known", 0.9]
    code, _, printed = forget("--dry-run", images="labelled", model=["--model", "stem", *words])
    assert (code, "no max-pool after the first layer: add --model stem_nopool" in printed) == (2, True), printed
    assert forget("--dry-run", images="labelled", model=["--model", "stem_nopool", *words])[0] == 0


def test_no_mean_or_size_is_advised_for_the_output_of_a_request(forget, tiny, tmp_path):
    _, images, labels = tiny
    assert forget()[0] == 0
    save_images(tmp_path / "wrong", images[6:22], (labels[6:22] + 1) % CLASSES)
    second = ["--model", tmp_path / "out", "--build", "conftest:tiny_net"]
    code, _, printed = forget(images="wrong", output="second", model=second)
    assert (code, "another input range or normalisation than in training" in printed) == (2, True), printed
    assert not any(flag in printed for flag in ("--mean", "--std", "--image-size")), printed


def test_wrong_labels_are_an_error_with_the_likely_causes_unless_the_check_is_off(forget, tiny, tmp_path):
    save_images(tmp_path / "wrong", tiny[1][:6], (tiny[2][:6] + 1) % CLASSES)
    code, report, printed = forget(images="wrong")
    assert (code, report, printed.count("\n")) == (2, None, 1)
    assert "the label of 0 of 6 images, but a classifier predicts most of its training images correctly" in printed
    assert printed.index("--class-order") < printed.index("--mean")  # each label is predicted as one other class
    assert forget("--dry-run", "--min-known", 0, images="wrong")[0] == 0
    save_images(tmp_path / "one", tiny[1][:1], (tiny[2][:1] + 1) % CLASSES)
    assert forget("--dry-run", images="one")[0] == 0  # one image is no evidence
    code, _, printed = forget("--dry-run", "--min-known", 1, images="one")
    assert (code, "the label of 0 of 1 images" in printed) == (2, True)


def test_images_of_an_earlier_request_are_not_compared_with_their_labels(forget, tiny, tmp_path):
    save_images(tmp_path / "labelled", tiny[1][:6], tiny[2][:6])
    assert forget(images="labelled")[0] == 0
    again = ["--model", tmp_path / "out", "--build", "conftest:tiny_net"]
    code, report, printed = forget(images="labelled", output="second", model=again)
    assert (code, {row["state"] for row in report["images"]}) == (0, {"not recognised before"}), printed


def test_outputs_that_hardly_depend_on_the_image_are_an_error_without_labels(forget, tmp_path, trained):
    state = trained[0].state_dict() | {"head.weight": trained[0].head.weight * 1e-3}
    state["head.bias"] = torch.tensor([0.0, 9, 0, 1, 0])
    torch.save(state, tmp_path / "flat.pt")
    model = ["--build", "conftest:tiny_net", "--checkpoint", tmp_path / "flat.pt"]
    code, _, printed = forget("--dry-run", model=model)
    assert (code, printed.count("\n")) == (2, 1)
    assert "predicts 1 for all 6 images, and its outputs hardly depend on the image" in printed
    assert forget("--dry-run", "--min-known", 0, model=model)[0] == 0


def several_net():
    net = tiny_net()
    levels = torch.tensor([3.0, 3, -4, -4, -4])
    net.register_forward_hook(lambda net, inputs, output: levels.to(output) + 0.1 * output.tanh())
    return net


def test_outputs_of_a_multi_label_model_are_an_error_without_single_label(forget):
    model = ["--build", "test_plausibility:several_net"]
    code, _, printed = forget("--dry-run", "--min-known", 0, model=model)
    assert (code, "add --single-label if it is one" in printed, printed.count("\n")) == (2, True, 1)
    assert forget("--dry-run", "--min-known", 0, "--single-label", model=model)[0] == 0


def test_orders_of_class_names():
    numbers = [str(number) for number in range(11)]
    assert order_classes(numbers, "string")[:4] == ["0", "1", "10", "2"]
    assert order_classes(order_classes(numbers, "string"), "numeric") == numbers
    assert order_classes([f"LABEL_{number}" for number in numbers], "string")[2] == "10"
    long = ["2", "1", "9" * 5000]  # a text, as Python reads no such number
    assert order_classes(long, "numeric") == long
    assert order_classes(["cat", "ant"], "numeric") == ["cat", "ant"]


def test_alternatives_enlarge_no_narrow_image():
    classifier = Classifier("x", CLASSES, tiny_net(), nn.Sequential(Normalize([0.0] * 3, [1.0] * 3)))
    model = SimpleNamespace(classifier=classifier, opened_by={"model": "build"}, fixed_input=False)

    def sizes(height):
        found = plausibility._alternatives(model, torch.zeros(1, 3, height, 8, dtype=torch.uint8))
        return [words for _, one in found for words in one.words if words.startswith("images of")]

    assert "images of 224 pixels" in sizes(8)
    assert "images of 224 pixels" not in sizes(80000)
