"""A model is written in the form it was read in: names, wrappers, dtypes, metadata, and no other tensors."""

import contextlib
import warnings

from conftest import tiny_net
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file
import torch
from torchvision.models import MobileNet_V3_Small_Weights

from l2ul.common.errors import InputError
from l2ul.deletion import deployed_model as deployed
import models
from models import checkpoint


@pytest.fixture
def net():
    """A network, and a copy with all weights changed."""
    moved = tiny_net()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.25)
    return tiny_net(), moved


def rewritten(content, moved, path):
    torch.save(content, path / "in.pt")
    left_out = checkpoint.rewrite(path / "in.pt", moved, path / "out.pt")
    return torch.load(path / "out.pt", weights_only=True), left_out


def test_wrappers_prefixes_and_other_entries_are_kept(net, tmp_path):
    before, moved = net
    state = {f"module.{name}": tensor for name, tensor in before.state_dict().items()}
    content, left_out = rewritten({"epoch": 7, "model": {"state_dict": state, "best": 0.9}}, moved, tmp_path)
    assert (content["epoch"], content["model"]["best"], left_out) == (7, 0.9, [])
    found = content["model"]["state_dict"]
    assert list(found) == list(state)
    assert all(torch.equal(found[f"module.{name}"], tensor) for name, tensor in moved.state_dict().items())


def test_other_tensors_are_left_out(net, tmp_path):
    before, moved = net
    content = {"state_dict": before.state_dict(), "ema": dict(before.state_dict()), "steps": [1, {"m": torch.ones(1)}]}
    content, left_out = rewritten(content, moved, tmp_path)
    assert (list(content), left_out) == (["state_dict"], ["ema", "steps"])


def test_dtypes_are_kept(net, tmp_path):
    before, moved = net
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in before.state_dict().items()}
    content, _ = rewritten(state, moved, tmp_path)
    assert content["head.weight"].dtype == torch.bfloat16
    assert torch.equal(content["head.weight"], moved.head.weight.detach().bfloat16())


def test_metadata_of_safetensors_is_kept(net, tmp_path):
    before, moved = net
    save_file(before.state_dict(), tmp_path / "in.safetensors", {"from": "somewhere"})
    assert checkpoint.rewrite(tmp_path / "in.safetensors", moved, tmp_path / "out.safetensors") == []
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"from": "somewhere"}
        assert torch.equal(file.get_tensor("head.bias"), moved.head.bias.detach())


def frozen_net():
    return tiny_net().requires_grad_(False)


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "old"])
def test_a_damaged_file_of_weights_raises_input_error_or_is_read(tmp_path, suffix):
    path, state = tmp_path / f"net.{suffix}", tiny_net().state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "pt")
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), generator.integers(1, 40)):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged[: generator.integers(1, len(damaged))] if generator.random() < 0.3 else damaged)
        with contextlib.suppress(InputError), warnings.catch_warnings(action="ignore"):
            checkpoint.read(path)


def test_frozen_weights_are_unfrozen():
    opened = deployed.open_model(None, build="test_deployed_model:frozen_net")
    assert all(parameter.requires_grad for parameter in opened.classifier.parameters())


def test_a_file_of_parameters_can_be_rewritten(net, tmp_path):
    before, moved = net
    content, _ = rewritten(dict(before.named_parameters()), moved, tmp_path)
    assert torch.equal(content["head.weight"], moved.head.weight)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "densenet121", "shufflenet_v2_x0_5"]
)
def test_the_number_of_classes_does_not_depend_on_the_order_in_the_file(tmp_path, name):
    state = models.zoo.build(f"torchvision:{name}", 7).state_dict()
    save_file(dict(sorted(state.items(), reverse=True)), tmp_path / "net.safetensors")
    opened = deployed.open_model(f"torchvision:{name}", tmp_path / "net.safetensors")
    assert opened.classifier.num_classes == 7


def test_image_size_replaces_the_processor_of_a_hugging_face_model(vit_folder):
    from PIL import Image

    opened = deployed.open_model(str(vit_folder), input_format=deployed.InputFormat(image_size=32))
    assert opened.to_pixels(Image.new("RGB", (60, 40))).shape == (3, 32, 32)


def test_a_file_without_weights_is_an_error(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="does not fit resnet20"):
        models.load("resnet20", 10, tmp_path / "empty.safetensors")


def test_as_written_gives_the_weights_that_are_read_again(net, tmp_path):
    before, moved = net
    torch.save({name: t.half() for name, t in before.state_dict().items()}, tmp_path / "half.pt")
    opened = deployed.open_model(None, tmp_path / "half.pt", "conftest:tiny_net")
    classifier = opened.as_written(opened.classifier)
    assert classifier is not opened.classifier
    opened.classifier.net.load_state_dict(moved.state_dict())
    opened.write(opened.classifier, tmp_path)
    again = deployed.reopen(opened.opened_by, [], tmp_path / "model.pt", "conftest:tiny_net")
    rounded = opened.as_written(opened.classifier)
    for name, tensor in again.classifier.net.state_dict().items():
        assert torch.equal(tensor, rounded.net.state_dict()[name])


def test_pretrained_torchvision_weights_define_class_names_and_image_size(monkeypatch, tmp_path):
    from PIL import Image

    net = models.zoo.build("torchvision:mobilenet_v3_small", 1000)
    monkeypatch.setattr(MobileNet_V3_Small_Weights, "get_state_dict", lambda self, **options: net.state_dict())
    opened = deployed.open_model("torchvision:mobilenet_v3_small")
    assert opened.class_names[:1] == ["tench"]
    image = Image.effect_noise((300, 280), 60).convert("RGB")
    preset = MobileNet_V3_Small_Weights.IMAGENET1K_V1.transforms()
    ours = opened.classifier.preprocess(opened.to_pixels(image)[None] / 255)
    assert torch.allclose(ours[0], preset(image), atol=1e-6)
    assert opened.write(opened.classifier, tmp_path) == []
    models.zoo.build("torchvision:mobilenet_v3_small", 1000).load_state_dict(
        torch.load(tmp_path / "model.pt", weights_only=True)
    )


def test_flags_that_do_not_apply_to_the_output_of_a_request_are_errors(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="--checkpoint cannot be used with .*, the output of an earlier request"):
        deployed.open_model(str(tmp_path), "other.pt")
    for flag, sizes in (("image-size", {"image_size": 32}), ("mean", {"mean": [0, 0, 0]}), ("std", {"std": [1, 1, 1]})):
        with pytest.raises(InputError, match=f"--{flag} cannot be used with"):
            deployed.open_model(str(tmp_path), input_format=deployed.InputFormat(**sizes))
    with pytest.raises(InputError, match="is not a report of a deletion request"):
        deployed.open_model(str(tmp_path))
    with pytest.raises(InputError, match="--build cannot be used with the model .*, a resnet20"):
        deployed.reopen(
            {"model": "resnet20"} | dict.fromkeys(("image_size", "mean", "std")), [], tmp_path, "conftest:tiny_net"
        )
