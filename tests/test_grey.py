"""Classifiers of one-channel images: opened, unlearned, checked and written in every form."""

from conftest import FAST_REQUEST, save_images
import numpy as np
from PIL import Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F
import torchvision

from l2ul import models
from l2ul.common.errors import InputError
from l2ul.data.folder import FolderImages
from l2ul.data.images import Images, Split, to_grey
from l2ul.deletion.deployed_model import InputFormat, open_model
from l2ul.deletion.request import read_images
from l2ul.models.classifier import input_channels
import main_forget
import main_unlearn

IMAGES = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(16) % 3


def grey_net(num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes))


def flat_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that classify the images, without normalisation."""
    net = grey_net()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES / 255), LABELS).backward()
        optimizer.step()
    assert (net.eval()(IMAGES / 255).argmax(1) == LABELS).all()
    path = tmp_path_factory.mktemp("grey") / "grey.pt"
    torch.save(net.state_dict(), path)
    return path


def save_grey(folder, images, labels):
    """Write images (n, 1, H, W) as grey PNG files in a subfolder per label."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / str(label) / f"{number}.png")
    return folder


def test_a_request_for_a_grey_net(script, tmp_path, fast_report, weights):
    save_grey(tmp_path / "in", IMAGES[:4], LABELS[:4])
    request = ["--build", "test_grey:grey_net", "--checkpoint", weights, "--images", tmp_path / "in"]
    fast = [*FAST_REQUEST, "--threads", 1, "--also", "flipped"]
    code, out, err = script(main_forget.main, *request, *fast, "--output", tmp_path / "out")
    assert code in (0, 3), err
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert state["0.weight"].shape == (8, 1, 3, 3)
    net = grey_net().eval()
    net.load_state_dict(state)
    forgotten = int((net(IMAGES[:4] / 255).argmax(1) != LABELS[:4]).sum())
    assert forgotten == 4
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()
    verify = ["--verify", tmp_path / "out" / "report.json", "--build", "test_grey:grey_net"]
    assert script(main_forget.main, *verify, "--images", tmp_path / "in")[0] == 0


@pytest.mark.parametrize("statistics", [((0.0,), (1.0,)), (None, None)])
def test_a_registered_grey_net_unlearns_images_of_a_folder(script, tmp_path, weights, monkeypatch, statistics):
    monkeypatch.setattr(models, "OWN", dict(models.OWN))
    models.register("grey", grey_net, *statistics)
    save_grey(tmp_path / "data" / "scans" / "train", IMAGES, LABELS)
    save_grey(tmp_path / "data" / "scans" / "val", IMAGES[:6], LABELS[:6])
    run = ["--dataset", "scans", "--data-dir", tmp_path / "data", "--image-size", 8, "--model", "grey"]
    run += ["--checkpoint", weights, "--result-dir", tmp_path, "--unlearn-k", 2, "--method", "neggrad", "distill"]
    run += ["--num-adv-images", 2, "--pgd-iter", 2, "--setting", "distill_steps=5", "--threads", 1, "--no-cache"]
    code, out, err = script(main_unlearn.main, *run)
    assert code == 0, err
    assert "D_f" in out
    code, out, err = script(main_unlearn.main, *run, "--mean", "0.5", "0.5", "0.5")
    assert code == 2
    assert "--mean has 3 values, but grey takes images of 1 channel; give one value per channel" in err


def test_a_torchvision_net_with_a_grey_first_layer(tmp_path):
    net = torchvision.models.resnet18(num_classes=4)
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "net.pt")
    with pytest.raises(InputError, match="1 channel and its weights define no normalisation; give it with --mean"):
        open_model("torchvision:resnet18", tmp_path / "net.pt")
    opened = open_model("torchvision:resnet18", tmp_path / "net.pt", input_format=InputFormat(32, [0.4], [0.2]))
    pixels = torch.rand(2, 1, 32, 32)
    assert torch.allclose(opened.classifier(pixels), net.eval()((pixels - 0.4) / 0.2), atol=1e-5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(opened.to_pixels(image)[0].numpy(), np.asarray(image.convert("L")))
    assert opened.opened_by["mean"] == [0.4]


def test_a_hugging_face_net_of_one_channel(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, num_channels=1, **size)
    net = transformers.ViTForImageClassification(config).eval()
    net.save_pretrained(tmp_path / "vit")
    sides = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=sides, image_mean=[0.4], image_std=[0.3]).save_pretrained(tmp_path / "vit")
    opened = open_model(str(tmp_path / "vit"))
    save_grey(tmp_path / "in", IMAGES[:3], LABELS[:3])
    images = read_images(tmp_path / "in", opened.to_pixels).images
    assert images.shape == (3, 1, 16, 16)
    expected = net(((images / 255) - 0.4) / 0.3).logits
    assert torch.allclose(opened.classifier(images / 255), expected, atol=1e-5)
    (tmp_path / "out").mkdir()
    opened.write(opened.classifier, tmp_path / "out")
    again = open_model(str(tmp_path / "out" / "model"))
    assert torch.allclose(again.classifier(images / 255), expected, atol=1e-5)
    transformers.ViTImageProcessor(size=sides, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="image_mean of its processor has 3 values, but .* takes images of 1 channel"):
        open_model(str(tmp_path / "vit"))


def test_the_number_of_values_of_mean_decides_what_a_built_net_takes(weights):
    opened = open_model(None, weights, "test_grey:grey_net", InputFormat(8, [0.3], [0.2]))
    assert opened.classifier.channels == 1
    with pytest.raises(InputError, match=r"--std has 1 value, but .* takes images of 3 channels"):
        open_model(None, weights, "test_grey:grey_net", InputFormat(8, [0.1, 0.2, 0.3], [0.2]))
    with pytest.raises(InputError, match=r"--mean has 2 values; expected 1 for grey or 3 for colour"):
        open_model(None, weights, "test_grey:grey_net", InputFormat(8, [0.1, 0.2], [0.2]))


class Average(nn.Module):
    """Averages colours before a convolution of one channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.conv(x.mean(1, keepdim=True)).mean((2, 3))


@pytest.mark.parametrize(
    ("net", "channels"),
    [
        (grey_net(), 1),
        (flat_net(), 1),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 3)), 3),
        (Average(), 3),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)), 3),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), 4),
    ],
)
def test_channels_that_a_net_takes(net, channels):
    assert input_channels(net.train()) == channels
    assert net.training


def test_colour_becomes_grey_as_in_pillow_and_grey_becomes_colour(tmp_path):
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    expected = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    assert np.array_equal(to_grey(images)[:, 0].numpy(), np.stack(expected))
    assert to_grey(images / 255).sub(to_grey(images) / 255).abs().max() < 1 / 255
    split = Split(images, torch.zeros(2, dtype=torch.int64))
    data = Images("some", 1, ["x"], split, split).with_channels(1)
    assert data.channels == 1
    assert data.with_channels(3).train.images.shape == (2, 3, 9, 9)
    assert data.with_channels(1).train is data.train
    files = [str(save_images(tmp_path, images) / f"{number}.png") for number in range(2)]
    folder = FolderImages(files, 9, 9).with_channels(1)
    assert np.array_equal(folder[torch.arange(2)][:, 0].numpy(), np.stack(expected))
    assert folder.subset(torch.tensor([1]))[torch.tensor([0])].shape == (1, 1, 9, 9)
    assert folder.sha256() != FolderImages(files, 9, 9).sha256()
