"""Model families, their layer names and shapes; loading weights from files of every form, and bad files."""

import hashlib
import importlib
import json
import pickle

from conftest import REALDATA
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch
import torchvision

from l2ul import models
from l2ul.common.errors import InputError
from l2ul.models import checkpoint, resnet, resnet_small, zoo

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def initial_weights(name: str, num_classes: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(name))
    return models.build(name, num_classes).net.state_dict()


@pytest.mark.parametrize(
    ("name", "parameters", "some_shapes"),
    [
        ("resnet18", 11_173_962, {"conv1.weight": (64, 3, 3, 3), "layer2.0.downsample.0.weight": (128, 64, 1, 1)}),
        ("resnet34", 21_282_122, {"layer3.5.conv2.weight": (256, 256, 3, 3), "fc.weight": (10, 512)}),
        ("resnet50", 23_520_842, {"layer1.0.conv3.weight": (256, 64, 1, 1), "fc.weight": (10, 2048)}),
        (
            "resnet18_nopool",
            11_173_962,
            {"conv1.weight": (64, 3, 3, 3), "layer2.0.downsample.0.weight": (128, 64, 1, 1)},
        ),
        ("resnet34_nopool", 21_282_122, {"layer3.5.conv2.weight": (256, 256, 3, 3), "fc.weight": (10, 512)}),
        ("resnet50_nopool", 23_520_842, {"layer1.0.conv3.weight": (256, 64, 1, 1), "fc.weight": (10, 2048)}),
        ("resnet18_cifar100", 11_173_962, {"conv1.0.weight": (64, 3, 3, 3), "conv5_x.0.shortcut.1.bias": (512,)}),
        ("resnet34_cifar100", 21_282_122, {"conv4_x.5.residual_function.3.weight": (256, 256, 3, 3)}),
        ("resnet50_cifar100", 23_520_842, {"conv2_x.0.residual_function.0.weight": (64, 64, 1, 1)}),
        ("resnet20", 269_722, {"layer2.0.conv1.weight": (32, 16, 3, 3), "linear.weight": (10, 64)}),
        ("resnet32", 464_154, {"layer1.4.bn2.weight": (16,)}),
        ("resnet44", 658_586, {"layer1.6.bn2.weight": (16,)}),
        ("resnet56", 853_018, {"layer3.8.bn2.weight": (64,)}),
    ],
)
def test_own_families_have_the_expected_parameters(name, parameters, some_shapes):
    with torch.device("meta"):
        net = models.build(name, 10).net
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert {key: tuple(state[key].shape) for key in some_shapes} == some_shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet18_nopool", "resnet50_nopool", "resnet18_cifar100", "resnet20"])
def test_only_the_cifar10_family_keeps_the_max_pool(name):
    sizes = {}
    classifier = models.build(name, 7).eval()
    stage = "conv2_x" if name == "resnet18_cifar100" else "layer1"
    getattr(classifier.net, stage).register_forward_hook(lambda m, i, out: sizes.update(side=out.shape[-1]))
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert sizes["side"] == (16 if name == "resnet18" else 32)


def test_normalisation_is_the_first_layer():
    classifier = models.build("resnet18", 10)
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR10)
    assert torch.allclose(classifier.preprocess(pixels), (pixels - mean) / std)
    chosen = models.build("resnet18", 10, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    assert torch.allclose(chosen.preprocess(torch.ones(1, 3, 1, 1)).flatten(), torch.tensor([0.9, 0.4, 0.175]))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("resnet19", "unknown model 'resnet19': expected one of resnet18"),
        ("vgg16", "did you mean torchvision:vgg16"),
        ("torchvision:nothing", "unknown model"),
        ("hf:", "unknown model"),
    ],
)
def test_an_unknown_name_raises_input_error_with_a_hint(name, complaint):
    with pytest.raises(InputError, match=complaint):
        models.build(name, 10)


def wrap(state, form):
    """Return a state dict in one of the forms in which it may be saved."""
    normalise = {"0.mean": torch.tensor([0.1, 0.2, 0.3]), "0.std": torch.tensor([0.4, 0.5, 0.6])}
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3, "best": 91.7},
        "model_state_dict": {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        "model": {"model": state},
        "net": {"net": state},
        "data parallel": {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
        "released": {f"1.{key}": tensor for key, tensor in state.items()},
        "released with statistics": normalise | {f"1.{key}": tensor for key, tensor in state.items()},
        "both": {f"module.1.{key}": tensor for key, tensor in state.items()},
        "old": {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")},
    }[form]


FORMS = ["plain", "state_dict", "model_state_dict", "model", "net", "data parallel", "released", "both", "old"]


@pytest.mark.parametrize("form", [*FORMS, "released with statistics"])
def test_every_form_of_state_dict_is_loaded(tmp_path, form):
    state, path = initial_weights("resnet20"), tmp_path / "weights.pth"
    torch.save(wrap(state, form), path)
    classifier = models.load("resnet20", 10, path)
    assert torch.equal(classifier.net.layer3[2].conv2.weight, state["layer3.2.conv2.weight"])
    assert not classifier.training
    assert classifier.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = [0.1, 0.2, 0.3] if form == "released with statistics" else list(resnet_small.MEAN)
    assert classifier.normalize.mean.flatten().tolist() == pytest.approx(expected)
    overridden = models.load("resnet20", 10, path, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    assert overridden.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_weights_of_one_file_that_a_key_chooses_have_hashes_of_their_own(tmp_path):
    state = initial_weights("resnet20")
    ema = {name: tensor * 2 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": ema}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="several weights that fit: state_dict, state_dict_ema; .* --weights-key"):
        models.load("resnet20", 10, tmp_path / "weights.pth")
    keys = ("state_dict", "state_dict_ema")
    first, second = (models.load("resnet20", 10, tmp_path / "weights.pth", weights_key=key) for key in keys)
    assert torch.equal(second.net.linear.weight, 2 * first.net.linear.weight)
    assert first.sha256 != second.sha256


def test_safetensors_of_other_software_are_loaded(tmp_path):
    state = initial_weights("resnet18_cifar100", 100)
    save_file(state, tmp_path / "weights.safetensors")
    classifier = models.load("resnet18_cifar100", 100, tmp_path / "weights.safetensors")
    assert torch.equal(classifier.net.fc.weight, state["fc.weight"])


def test_weights_are_found_where_pretraining_saves_them_and_in_the_released_layout(tmp_path):
    assert checkpoint.find("cifar10", "resnet34", tmp_path) is None
    released = tmp_path / "cifar100_pretrained_models" / "resnet50.pt"
    released.parent.mkdir()
    released.touch()
    assert checkpoint.find("cifar100", "resnet50_cifar100", tmp_path) == released
    ours = tmp_path / "weights" / "cifar100_resnet50_cifar100.safetensors"
    ours.parent.mkdir()
    ours.touch()
    assert checkpoint.find("cifar100", "resnet50_cifar100", tmp_path) == ours
    for dataset, model, size in (("digits", "resnet20", 2), ("cifar10", "resnet18", 22)):
        assert checkpoint.find(dataset, model, tmp_path).stat().st_size <= size * 2**20  # in the repository


def test_saved_weights_are_loaded_again_and_by_other_software(tmp_path):
    classifier = models.build("resnet20", 10, mean=(0.1, 0.25, 0.3), std=(0.7, 0.8, 0.9)).eval()
    path = tmp_path / "new" / "weights.safetensors"
    models.save(classifier, path, {"lr": 0.1, "note": "ä"})
    again = models.load("resnet20", 10, path)
    pixels = torch.rand(3, 3, 32, 32)
    assert torch.allclose(again(pixels), classifier(pixels), atol=1e-6)
    assert again.normalize.std.flatten().tolist() == classifier.normalize.std.flatten().tolist()
    plain = resnet_small.build("resnet20", 10)
    plain.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata == {
        "model": "resnet20",
        "num_classes": 10,
        "mean": [0.1, 0.25, 0.3],
        "std": [0.7, 0.8, 0.9],
        "lr": 0.1,
        "note": "ä",
    }
    assert list(path.parent.iterdir()) == [path]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_a_pickle_with_code_is_not_run(tmp_path, saved_by):
    path, trace = tmp_path / "evil.pt", tmp_path / "it ran"
    content = {"state_dict": initial_weights("resnet20"), "extra": Malicious(trace)}
    if saved_by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="could run code when read, so it was not read"):
        models.load("resnet20", 10, path)
    assert not trace.exists()


def test_a_pickled_module_is_not_read(tmp_path):
    torch.save(models.build("resnet20", 10), tmp_path / "module.pt")
    with pytest.raises(InputError, match="could run code"):
        models.load("resnet20", 10, tmp_path / "module.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "folder"])
def test_a_damaged_file_raises_input_error(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    state = initial_weights("resnet20")
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    expected = "there is no checkpoint" if damage in ("missing", "folder") else "is damaged or is no checkpoint"
    with pytest.raises(InputError, match=expected):
        models.load("resnet20", 10, path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {"a": 1}}, [1, 2], {}, torch.ones(2)])
def test_a_file_without_a_state_dict_raises_input_error(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        models.load("resnet20", 10, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("model", "classes", "like", "complaint"),
    [
        ("resnet20", 10, "resnet56", "layer1.3.conv1.weight .16, 16, 3, 3. is unexpected.*looks like resnet56 with 10"),
        ("resnet56", 10, "resnet20", "layer1.3.conv1.weight .* is missing.*looks like resnet20 with 10"),
        ("resnet18", 10, "resnet18_cifar100", "looks like resnet18_cifar100 with 10"),
        ("resnet18", 10, "torchvision:resnet18", "conv1.weight is .64, 3, 7, 7., not .64, 3, 3, 3."),
        ("resnet20", 100, "resnet20", "linear.weight is .10, 64., not .100, 64.*looks like resnet20 with 10 classes"),
    ],
)
def test_weights_of_another_model_are_described(tmp_path, model, classes, like, complaint):
    state = initial_weights(like)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=complaint):
        models.load(model, classes, tmp_path / "weights.pt")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=complaint):
        models.load(model, classes, tmp_path / "weights.pt")


def test_weights_of_an_unknown_network_get_no_hint(tmp_path):
    torch.save({"encoder.w": torch.ones(3, 4)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="conv1.weight .* is missing") as caught:
        models.load("resnet20", 10, tmp_path / "weights.pt")
    assert "looks like" not in str(caught.value)


def test_own_families_need_a_file():
    with pytest.raises(InputError, match="resnet20 has no weights to download; name a file with --checkpoint"):
        models.load("resnet20", 10)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_torchvision_networks_load_weights_from_a_file(tmp_path, name):
    torch.manual_seed(0)
    net = torchvision.models.get_model(
        name, weights=None, num_classes=6, **({"init_weights": False} if name == "googlenet" else {})
    )
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    classifier = models.load(f"torchvision:{name}", 6, tmp_path / "weights.pth")
    pixels = torch.rand(2, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(classifier(pixels), net.eval()(normalised), atol=1e-5)
    assert classifier.train()(pixels).shape == (2, 6)


def test_torchvision_networks_load_pretrained_weights(tmp_path, monkeypatch):
    weights = torchvision.models.SqueezeNet1_1_Weights
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    calls = []

    def download(self, **options):
        calls.append(options)
        return state

    monkeypatch.setattr(weights, "get_state_dict", download)
    for choice in (None, "IMAGENET1K_V1"):
        classifier = models.load("torchvision:squeezenet1_1", 1000, choice)
        assert torch.equal(classifier.net.classifier[1].weight, state["classifier.1.weight"])
        assert "IMAGENET1K_V1" in classifier.source
        assert len(classifier.sha256) == 64
    assert all(options["weights_only"] and options["check_hash"] for options in calls)
    with pytest.raises(InputError, match="are for 1000 classes, but the data set has 10"):
        models.load("torchvision:squeezenet1_1", 10)

    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(InputError, match="could not be downloaded .no route to host"):
        models.load("torchvision:squeezenet1_1", 1000)


def test_googlenet_uses_the_normalisation_it_was_trained_with(monkeypatch):
    weights = torchvision.models.GoogLeNet_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: {})
    _, _, mean, std = zoo.pretrained_state("torchvision:googlenet", 1000, None)
    pixels = torch.rand(1, 3, 4, 4)
    usual = torchvision.transforms.functional.normalize(pixels, zoo.MEAN, zoo.STD)
    theirs = torchvision.models.GoogLeNet(init_weights=False, transform_input=True)._transform_input(usual)
    assert torch.allclose(torchvision.transforms.functional.normalize(pixels, mean, std), theirs, atol=1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["resnet20-12fca82f.th", "resnet56-4bfd9763.th"])
def test_third_party_weights_are_loaded(name):
    classifier = models.load(name.split("-")[0], 10, REALDATA / "weights" / name)
    assert classifier.sha256.startswith(name.split("-")[1].split(".")[0])  # the file names contain the hash


def test_top_level_name_is_the_same_package():
    assert importlib.import_module("models") is models
    assert importlib.import_module("models.resnet") is resnet
