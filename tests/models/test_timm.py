"""Models of timm: their data config as layers, folders as timm writes them, its training checkpoints, wrong input."""

import argparse
import json
from pathlib import Path
import pickle
import shutil
import sys

from conftest import save_images
from helpers import load_records
import numpy as np
from PIL import Image
import pytest
from safetensors.torch import load_file, save_file
import torch

from l2ul import models
from l2ul.cli import pretrain_command
from l2ul.common.errors import InputError
from l2ul.deletion.deployed_model import InputFormat, open_model, reopen
from l2ul.models import timm_models
from l2ul.training.recipe import Recipe
import main_forget
import main_unlearn

timm = pytest.importorskip("timm")
SMALL = "timm:test_resnet,img_size=32,crop_pct=1"
VIT = "timm:test_vit,img_size=32,patch_size=8,depth=2"
NAMES = tuple(f"class {number}" for number in range(10))


def picture(width=50, height=40, mode="RGB"):
    """Return a random picture without fine detail, on which resizes in 8 bits and in floating point agree."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def pixels_of(image):
    array = np.asarray(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1).copy())[None] / 255


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small ViT of ten classes, as timm's save_for_hf writes it."""
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=32, patch_size=16, depth=1, embed_dim=32, num_classes=10)
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.9}
    folder = tmp_path_factory.mktemp("timm") / "vit"
    timm.models.save_for_hf(net, folder, model_config={"label_names": NAMES}, safe_serialization=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder."""
    return Path(shutil.copytree(saved, tmp_path / "vit"))


@pytest.fixture
def hub(monkeypatch):
    """Answer downloads of timm from a local folder, which the test stores in the list."""
    from huggingface_hub.utils import EntryNotFoundError

    folders = []

    def download(repo_id, filename, **_):
        if not (folders[0] / filename).is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}", response=None)
        return str(folders[0] / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return folders


def change(folder, **values):
    """Change values in the config.json of a folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def plain_logits(folder, image, **options):
    """Return the logits of an image with timm alone."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.no_grad():
        return net(transform(image)[None])


@pytest.mark.parametrize("interpolation", timm_models.INTERPOLATION)
@pytest.mark.parametrize("crop", ["center,crop_pct=0.75", "center,crop_pct=1.1", "squash,crop_pct=0.9"])
def test_the_data_config_becomes_layers(interpolation, crop):
    classifier = models.build(f"timm:test_resnet,img_size=32,interpolation={interpolation},crop_mode={crop}", 3)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(classifier.net))
    difference = classifier.preprocess(pixels_of(picture())) - transform(picture())[None]
    assert difference.shape == (1, 3, 32, 32)
    assert (difference.abs() * classifier.normalize.std * 255).max() <= 4
    assert timm_models.transform(classifier.net)(picture()).shape == (3, 32, 32)


def test_images_of_the_size_of_the_network_are_not_resized():
    classifier = models.build(SMALL, 3)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(classifier.preprocess(pixels), classifier.normalize(pixels))
    assert classifier.input_side(20) == 32


@pytest.mark.parametrize("name", [SMALL, VIT, "timm:test_convnext,img_size=32"])
def test_a_file_of_weights_and_a_saved_folder_give_the_same_logits(name, tmp_path):
    torch.manual_seed(0)
    classifier = models.build(name, 5).eval()
    pixels = torch.rand(2, 3, 32, 32)
    models.save(classifier, tmp_path / "net.safetensors", {"epochs": 1})
    loaded = models.load(name, 5, tmp_path / "net.safetensors")
    assert torch.allclose(loaded(pixels), classifier(pixels), atol=1e-6)
    loaded.normalize.mean.copy_(torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
    models.save(loaded, tmp_path / "net", {})
    net = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(net)
    assert (config["input_size"], config["mean"]) == ((3, 32, 32), pytest.approx((0.1, 0.2, 0.3)))
    assert config["crop_pct"] == timm.data.resolve_model_data_config(loaded.net)["crop_pct"]
    assert torch.allclose(net(loaded.preprocess(pixels)), loaded(pixels), atol=1e-6)
    again = models.load_saved(tmp_path / "net", loaded)
    assert torch.equal(again(pixels), loaded(pixels))
    assert again.name == name


def test_a_training_checkpoint_of_timm_is_read_with_and_without_averages(tmp_path):
    net, averaged = (timm_models.build(SMALL, 4) for _ in range(2))
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    content = {"epoch": 3, "arch": "test_resnet", "state_dict": state, "optimizer": {"state": {}}, "version": 2}
    content["args"] = argparse.Namespace(model="test_resnet", lr=0.1)
    path = tmp_path / "checkpoint-3.pth.tar"
    torch.save(content, path)
    assert torch.equal(models.load(SMALL, 4, path).net.fc.weight, net.fc.weight)
    torch.save(content | {"state_dict_ema": averaged.state_dict()}, path)
    with pytest.raises(InputError, match="several weights that fit: state_dict, state_dict_ema.*--weights-key"):
        models.load(SMALL, 4, path)
    for key, expected in (("state_dict", net), ("state_dict_ema", averaged)):
        assert torch.equal(models.load(SMALL, 4, path, weights_key=key).net.fc.weight, expected.fc.weight)
    opened = open_model(SMALL, path, weights_key="state_dict_ema")
    assert opened.classifier.num_classes == 4
    opened.write(opened.classifier, tmp_path)
    written = torch.load(tmp_path / "model.pth.tar", weights_only=False)
    assert (written["args"].lr, "state_dict" in written) == (0.1, False)
    assert torch.equal(written["state_dict_ema"]["fc.weight"], averaged.fc.weight)


def test_a_folder_opens_with_its_transform_and_classes_and_is_written_as_it_was(folder, tmp_path):
    opened = open_model(str(folder))
    assert tuple(opened.class_names) == NAMES
    assert opened.not_read == []
    image = picture()
    logits = opened.classifier(opened.to_pixels(image)[None] / 255)
    assert torch.allclose(logits, plain_logits(folder, image), atol=1e-5)
    with torch.no_grad():
        opened.classifier.net.head.bias.add_(torch.arange(10.0))
    assert opened.write(opened.classifier, tmp_path) == []
    assert (tmp_path / "model" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert [path.name for path in sorted((tmp_path / "model").iterdir())] == ["config.json", "model.safetensors"]
    assert torch.allclose(logits + torch.arange(10.0), plain_logits(tmp_path / "model", image), atol=1e-5)
    again = reopen(opened.opened_by, [], tmp_path / "model")
    assert torch.equal(again.classifier.net.head.bias, opened.classifier.net.head.bias)


@pytest.mark.parametrize("name", ["timm:{}", "timm:local-dir:{}", "{}"])
def test_ways_to_name_a_folder(folder, name):
    assert open_model(name.format(folder)).opened_by["model"] == "timm:"


def test_a_folder_with_the_name_of_an_architecture(folder, monkeypatch):
    folder.rename(folder.with_name("resnet18"))
    monkeypatch.chdir(folder.parent)
    assert tuple(open_model("resnet18").class_names) == NAMES
    assert models.load("timm:local-dir:resnet18", 10).num_classes == 10


def test_a_folder_in_half_precision_with_pickled_weights_is_written_in_both(folder, tmp_path):
    state = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "notes").mkdir()
    opened = open_model(str(folder), input_format=InputFormat(mean=[0.1, 0.2, 0.3]))
    assert opened.not_read == ["notes/"]
    opened.write(opened.classifier, tmp_path)
    written = torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=True)
    assert {value.dtype for value in written.values()} == {torch.float16}
    cfg = json.loads((tmp_path / "model" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])


def test_a_grey_network(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", in_chans=1, num_classes=3).eval()
    timm.models.save_for_hf(net, tmp_path / "grey", safe_serialization=True)
    opened = open_model(str(tmp_path / "grey"))
    image = picture(mode="L")
    pixels = opened.to_pixels(image.convert("RGB"))
    assert pixels.shape == (1, 160, 160)
    assert torch.allclose(opened.classifier(pixels[None] / 255), plain_logits(tmp_path / "grey", image), atol=1e-4)
    torch.save(net.state_dict(), tmp_path / "grey.pt")
    for name in ("timm:test_resnet", "timm:test_resnet,in_chans=1"):
        loaded = models.load(name, 3, tmp_path / "grey.pt")
        assert loaded.channels == 1
        models.save(loaded, tmp_path / "again", {})
        again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
        assert torch.equal(again(torch.ones(1, 1, 64, 64)), net(torch.ones(1, 1, 64, 64)))


def test_models_of_the_hub_and_published_weights(hub, saved, tmp_path):
    hub.append(saved)
    opened = open_model("timm:hf_hub:someone/vit")
    assert (opened.class_names, opened.path) == (list(NAMES), None)
    opened.write(opened.classifier, tmp_path)
    assert torch.allclose(plain_logits(tmp_path / "model", picture()), plain_logits(saved, picture()), atol=1e-6)
    written = reopen(opened.opened_by, [], tmp_path / "model")
    assert written.class_names == list(NAMES)
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=1000)
    hub[0] = tmp_path / "published"
    timm.models.save_for_hf(net, hub[0], safe_serialization=True)
    loaded = models.load("timm:test_resnet.r160_in1k", 1000)
    assert torch.equal(loaded.net.fc.weight, net.fc.weight)
    assert timm_models.class_names("timm:test_resnet", loaded.net)[0] == "n01440764"
    with pytest.raises(InputError, match="has 1000 classes, but the data set has 10"):
        models.load("timm:test_resnet", 10)
    (hub[0] / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match="weights could not be downloaded .*; download them elsewhere and name the file"
    ):
        models.load("timm:test_resnet", 1000)


def pretrain():
    pretrain_command.main("main_pretrain_x.py", "Train.", "digits", "resnet20", Recipe(epochs=1, lr=0.1, flip=False))


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def no_json(folder):
    (folder / "config.json").write_text("{")


def a_list(folder):
    (folder / "config.json").write_text("[" * 100_000)


def other_weights(folder):
    state = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=10).state_dict()
    save_file(state, folder / "model.safetensors")


def pickled(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state, "x": Runs()}, folder / "pytorch_model.bin")


def plain_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([Runs(), bytes(10**6)]))


def no_weights(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def set_cfg(**values):
    def harm(folder):
        change(folder, pretrained_cfg=json.loads((folder / "config.json").read_text())["pretrained_cfg"] | values)

    return harm


def set_args(**values):
    def harm(folder):
        change(folder, model_args=json.loads((folder / "config.json").read_text())["model_args"] | values)

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_json, "it is no JSON.*expected a folder that save_for_hf"),
        (a_list, "it is no JSON"),
        (lambda folder: (folder / "config.json").unlink(), "cannot read .*config.json"),
        (lambda folder: change(folder, architecture="nothing"), "names the architecture 'nothing', which timm"),
        (lambda folder: change(folder, architecture=7), "names the architecture 7"),
        (lambda folder: change(folder, model_type="timm_wrapper"), "that transformers wrote.*save_for_hf"),
        (lambda folder: change(folder, pretrained_cfg=[1]), "timm does not accept its config.json"),
        (lambda folder: change(folder, model_args=[1]), "timm does not accept its config.json"),
        (set_cfg(std=[0.5, 0.5]), r"has std \[0.5, 0.5\] in its config.json; expected one number per channel"),
        (set_cfg(mean=0.5), r"has mean 0.5 in its config.json; expected one number per channel"),
        (set_cfg(mean=[]), r"has mean \[\] in its config.json; expected one number per channel"),
        (set_args(num_classes=7), "has 7 classes, but the data set has 10"),
        (set_args(num_classes=10**12), "is too small for"),
        (set_args(num_classes=0), "has no classifier .0 classes."),
        (set_args(img_size=48), "does not fit .*pos_embed"),
        (set_args(img_size=10**9), "images of size 1000000000"),
        (set_args(in_chans=1), "does not fit .*patch_embed"),
        (set_args(in_chans=5), "images of 5 channels"),
        (set_args(checkpoint_path="x.pt"), "sets checkpoint_path in model_args of its config.json"),
        (set_args(features_only=True), "sets features_only in model_args of its config.json"),
        (set_args(pretrained=True), "sets pretrained in model_args of its config.json"),
        (set_cfg(mean=[0.5, "a", 0.5]), "has mean .* in its config.json"),
        (set_cfg(std=[0, 0.1, 0.2]), "has std .* in its config.json"),
        (set_cfg(crop_pct=0), "has crop_pct 0; expected a number above 0"),
        (set_cfg(crop_mode="border"), "does more than resize, centre crop and normalise"),
        (set_cfg(interpolation="lanczos"), "has interpolation 'lanczos'; expected one of bilinear"),
        (other_weights, "does not fit .* with 10 classes"),
        (no_weights, "has no file of weights; expected one of model.safetensors"),
        (pickled, "holds more than tensors .*could run code"),
        (plain_pickle, "is a plain pickle, which could run code"),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused(folder, tmp_path, monkeypatch, harm, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_looks_like", lambda state: "")  # which takes seconds
    harm(folder)
    with pytest.raises(InputError, match=message):
        models.load(f"timm:{folder}", 10)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:", "unknown model 'timm:'"),
        ("timm:resnt18", "did you mean timm:resnet18?"),
        ("timm:resnet18.nothing", "unknown weights 'nothing' of timm:resnet18; timm has: a1_in1k, "),
        ("timm:/no/folder", "unknown model"),
        ("timm:local-dir:/no/folder", "cannot read /no/folder/config.json"),
        ("timm:hf_hub:", "could not be downloaded"),
        ("timm:test_resnet,img_size", "'img_size' in .* is not valid; expected KEY=VALUE"),
        ("timm:test_resnet,img_size=0", "img_size=0 .*expected a whole number of pixels"),
        ("timm:test_resnet,img_size=__import__", "expected a whole number of pixels"),
        ("timm:test_resnet,num_classes=3", "num_classes .* cannot be set"),
        ("timm:test_resnet,checkpoint_path=x", "checkpoint_path .* cannot be set"),
        ("timm:test_resnet,nothing=3", "timm does not accept its arguments"),
        ("timm:test_vit,img_size=30,patch_size=8", "cannot classify images of 3x30x30"),
        ("timm:test_resnet,in_chans=4", "takes images of 4 channels; expected 1"),
        ("timm:test_resnet,crop_mode=border", "does more than resize"),
    ],
)
def test_names_that_are_not_valid(name, message):
    with pytest.raises(InputError, match=message):
        models.build(name, 10)


def test_a_model_without_classes_or_weights(monkeypatch):
    for open_it in (open_model, lambda name: models.load(name, 10)):
        with pytest.raises(InputError, match=r"has no classifier \(0 classes\).*--checkpoint"):
            open_it("timm:vit_small_patch14_dinov2.lvd142m")
    monkeypatch.setattr(timm.models, "is_model_pretrained", lambda name: False)
    with pytest.raises(InputError, match="timm has no weights for timm:test_resnet; name a file"):
        models.load("timm:test_resnet", 1000)


def test_without_timm_one_sentence_names_the_extra(script, folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    save_images(tmp_path / "in", torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    request = ["--images", tmp_path / "in", "--output", tmp_path / "out"]
    for main, words in (
        (main_unlearn.main, ["--dataset", "digits", "--model", "timm:resnet18", "--result-dir", tmp_path]),
        (pretrain, ["--model", "timm:resnet18", "--data-dir", tmp_path]),
        (main_forget.main, ["--model", folder, *request]),
        (main_forget.main, ["--model", "timm:resnet18", *request]),
    ):
        code, _, err = script(main, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert "needs the package timm; install it (uv run --extra timm" in err


@pytest.mark.usefixtures("fast_report")
def test_a_request_on_a_folder_gives_the_logits_of_the_report_with_timm_alone(script, folder, tmp_path):
    images = torch.randint(0, 256, (2, 3, 40, 36), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_images(tmp_path / "in", images)
    words = ["--model", folder, "--images", tmp_path / "in", "--output", tmp_path / "out", "--min-known", 0]
    few = ["robust=0", "distill_steps=10", "distill_mixes=4", "distill_lr=0.01"]
    code, out, err = script(main_forget.main, *words, "--minutes", 0.02, "--setting", *few)
    assert code in (0, 3), out + err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in report["images"]:
        logits = plain_logits(tmp_path / "out" / "model", Image.open(tmp_path / "in" / row["file"]))
        assert int(logits.argmax()) == row["called_after"]
        share = float(logits.double().softmax(1)[0, row["label"]])
        assert share == pytest.approx(row["label_confidence_after"], abs=1e-5)
    assert (tmp_path / "out" / "model" / "README.md").read_text().startswith("---\nlibrary_name: timm\n")
    _, out, _ = script(main_forget.main, "--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in")
    assert "ok     weights: those of the report" in out


def test_image_size_is_written_to_the_config(tmp_path):
    net = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(net, tmp_path / "net", safe_serialization=True)
    opened = open_model(str(tmp_path / "net"), input_format=InputFormat(image_size=40))
    opened.write(opened.classifier, tmp_path)
    pixels = opened.to_pixels(picture(60, 50))
    assert pixels.shape == (3, 40, 40)
    with torch.no_grad():
        ours = opened.classifier(pixels[None] / 255)
    assert torch.allclose(plain_logits(tmp_path / "model", picture(60, 50)), ours, atol=1e-5)
    again = reopen(opened.opened_by, [], tmp_path / "model")
    assert torch.equal(again.to_pixels(picture(60, 50)), pixels)


@pytest.mark.usefixtures("few_digits")
def test_trained_unlearned_and_saved_as_a_folder(script, tmp_path):
    name = "timm:test_resnet,img_size=32,crop_pct=1"
    words = ["--model", name, "--data-dir", tmp_path, "--threads", 1, "--device", "cpu"]
    code, out, err = script(pretrain, *words)
    assert code == 0, err
    (path,) = (tmp_path / "weights").glob("*.safetensors")
    words += ["--dataset", "digits", "--method", "adv", "--unlearn-k", 2, "--save-model", "--result-dir", tmp_path]
    code, _, err = script(main_unlearn.main, *words, "--num-adv-images", 2, "--pgd-iter", 2)
    assert code == 0, err
    ((identity, record),) = load_records(tmp_path).items()
    assert (record["model"], record["checkpoint"]) == (name, path.name)
    net = timm.create_model(f"local-dir:{tmp_path / 'models' / identity}", pretrained=True)
    assert (net.num_classes, net.pretrained_cfg["input_size"]) == (10, (3, 32, 32))
