"""A model is written in the form it was read in: names, wrappers, dtypes, metadata, and no other tensors."""

import argparse
import base64
import collections
import contextlib
import copy
import datetime
import pathlib
import shutil
import warnings
import zipfile

from conftest import CLASSES, tiny_net
import numpy as np
from PIL import Image
import pytest
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
import torch
from torch import nn
from torchvision.models import MobileNet_V2_Weights, MobileNet_V3_Small_Weights

from l2ul import models
from l2ul.common.errors import InputError
from l2ul.deletion import deployed_model as deployed
from l2ul.metrics import accuracy, preflight
from l2ul.models import checkpoint


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


def test_written_files_hold_no_values_of_the_original_weights_beside_the_tensors(net, tmp_path):
    before, moved = net
    flat = torch.cat([tensor.flatten().float() for tensor in before.state_dict().values()] * 2)
    state, other, place = {}, {}, 0
    for name, tensor in before.state_dict().items():
        part = slice(place, place + tensor.numel())
        state[name] = flat[part].view(tensor.shape).to(tensor.dtype)
        other[name] = flat[len(flat) // 2 :][part].view(tensor.shape)
        place += tensor.numel()
    content, left_out = rewritten({"state_dict": state, "ema": other | {"x": torch.ones(1)}}, moved, tmp_path)
    assert left_out == ["ema"]
    for tensor in content["state_dict"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert content["state_dict"].keys() == moved.state_dict().keys()


def test_numpy_arrays_are_left_out_like_tensors_but_short_vectors(net, tmp_path):
    before, moved = net
    arrays = {name: tensor.numpy() for name, tensor in before.state_dict().items()}
    others = {"ema": arrays, "flat": np.zeros(10**5), "images": [np.zeros((2, 3, 8, 8))]}
    others |= {"scores": np.zeros(CLASSES), "hyper_parameters": {"colours": np.eye(3)}}
    torch.save({"state_dict": before.state_dict(), **others}, tmp_path / "in.pt")
    assert checkpoint.rewrite(tmp_path / "in.pt", moved, tmp_path / "out.pt") == ["ema", "flat", "images"]
    assert list(torch.load(tmp_path / "out.pt", weights_only=False)) == ["state_dict", "scores", "hyper_parameters"]


def test_flattened_images_and_files_of_images_are_left_out(net, tmp_path):
    before, moved = net
    others = {"of_classes": torch.zeros(300), "curve": torch.zeros(200), "prototype": torch.zeros(3072)}
    state = {f"model.{name}": tensor for name, tensor in before.state_dict().items()}
    content = {"state_dict": state | others, "seen": np.zeros(3072, np.uint8), "png": bytes(500), "id": bytes(16)}
    torch.save(content, tmp_path / "in.pt")
    assert checkpoint.rewrite(tmp_path / "in.pt", moved, tmp_path / "out.pt", num_classes=300) == [
        *("seen", "png", "prototype")
    ]
    content = torch.load(tmp_path / "out.pt", weights_only=False)
    assert list(content) == ["state_dict", "id"]
    assert content["state_dict"].keys() - state.keys() == {"of_classes", "curve"}


def test_lists_of_numbers_and_encoded_bytes_are_left_out(net, tmp_path):
    before, moved = net
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    encoded = base64.b64encode(image.tobytes()).decode()
    gone = {"flat": image.flatten().tolist(), "rows": {"of": [image.tolist()]}, "uri": f"data:;base64,{encoded}"}
    gone |= {"mime": base64.encodebytes(image.tobytes()).decode(), "hex": ["x", image.tobytes().hex()]}
    kept = {"losses": [0.5] * 256, "weights": [0.1] * 300, "classes": [f"class{n}" for n in range(999)]}
    kept |= {
        "index": {f"n{n}": n for n in range(999)},
        "path": "/data/" * 50,
        "note": "a b" * 999,
        "names": "\n".join(map(str, range(9999))),
    }
    torch.save({"state_dict": before.state_dict(), **gone, **kept}, tmp_path / "in.pt")
    left_out = checkpoint.rewrite(tmp_path / "in.pt", moved, tmp_path / "out.pt", num_classes=300)
    assert left_out == list(gone)
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {name: content[name] for name in content if name != "state_dict"} == kept
    save_file(before.state_dict(), tmp_path / "in.safetensors", {"from": "somewhere", "image": encoded})
    left_out = checkpoint.rewrite(tmp_path / "in.safetensors", moved, tmp_path / "out.safetensors")
    assert left_out == ["image (metadata)"]
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"from": "somewhere"}


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes, bytes.hex])
def test_encoded_text_stays_up_to_256_bytes(net, tmp_path, encode):
    before, moved = net
    content = np.random.default_rng(0).bytes(257)
    texts = [text if isinstance(text, str) else text.decode() for text in map(encode, (content[1:], content))]
    torch.save({"state_dict": before.state_dict(), "small": texts[0], "large": texts[1]}, tmp_path / "in.pt")
    assert checkpoint.rewrite(tmp_path / "in.pt", moved, tmp_path / "out.pt") == ["large"]


def test_tensors_in_attributes_are_left_out(net, tmp_path):
    before, moved = net
    state = collections.OrderedDict(before.state_dict())
    state["head.bias"] = torch.nn.Parameter(state["head.bias"].clone())
    state["head.bias"].original = state["head.weight"].original = torch.zeros(300)
    state._metadata, state.ema = {"version": 1}, {"head.bias": torch.zeros(300)}
    content, _ = rewritten({"state_dict": state}, moved, tmp_path)
    assert vars(content["state_dict"]) == {"_metadata": {"version": 1}}
    for name in ("head.bias", "head.weight"):
        assert not vars(content["state_dict"][name])
        assert torch.equal(content["state_dict"][name], moved.state_dict()[name])


def test_the_normalisation_stays_where_other_tensors_beside_it_are_left_out(net, tmp_path):
    before, moved = net
    state = {f"model.net.{name}": tensor for name, tensor in before.state_dict().items()}
    statistics = {"model.normalize.mean": torch.full((1, 3, 1, 1), 0.4), "model.normalize.std": torch.ones(1, 3, 1, 1)}
    content, left_out = rewritten(state | statistics | {"model.queue": torch.ones(5, 6)}, moved, tmp_path)
    assert (list(content), left_out) == ([*state, *statistics], ["model.queue"])


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


def net_with_extra_state():
    net = tiny_net()
    net.head.__class__ = type("Head", (torch.nn.Linear,), {"get_extra_state": lambda self: {"scale": 1}})
    return net


def test_a_state_dict_with_more_than_tensors_is_refused():
    with pytest.raises(InputError, match=r"stores head\._extra_state in its state dict, which is no tensor"):
        deployed.open_model(None, build="test_deployed_model:net_with_extra_state")


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


@pytest.mark.parametrize(
    ("convert", "what"),
    [
        (torch.Tensor.to_sparse, "is sparse"),
        (lambda tensor: tensor.to("meta"), "is on the device meta"),
        (torch.Tensor.char, "is int8, not float32"),
    ],
)
def test_weights_that_cannot_be_loaded_are_refused(tmp_path, convert, what):
    state = tiny_net().state_dict()
    torch.save(state | {"head.weight": convert(state["head.weight"])}, tmp_path / "in.pt")
    with pytest.raises(InputError, match=f"does not fit the module .*: head.weight {what}"):
        deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")


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


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "ConvNextImageProcessor", "CLIPImageProcessor"])
def test_image_size_is_written_to_the_processor_of_a_hugging_face_model(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    config = transformers.ResNetConfig(num_labels=5, **sizes)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    getattr(transformers, kind)().save_pretrained(tmp_path / "net")
    opened = deployed.open_model(str(tmp_path / "net"), input_format=deployed.InputFormat(image_size=40))
    opened.write(opened.classifier, tmp_path)
    image = Image.effect_noise((60, 50), 60).convert("RGB")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    pixels = processor(image, return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 40, 40)
    with torch.no_grad():
        plain, ours = model(**pixels).logits, opened.classifier(opened.to_pixels(image)[None] / 255)
    assert torch.allclose(plain, ours, atol=1e-5)


def test_a_processor_that_cannot_take_an_image_size_is_refused(vit_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(vit_folder, tmp_path / "net")
    transformers.SegformerImageProcessor().save_pretrained(tmp_path / "net")
    with pytest.raises(InputError, match=r"\(SegformerImageProcessor\) cannot resize images to --image-size 48; "):
        deployed.open_model(str(tmp_path / "net"), input_format=deployed.InputFormat(image_size=48))


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


def test_a_written_torchvision_model_keeps_the_resizing_of_its_weights(monkeypatch, tmp_path):
    net, noise = models.zoo.build("torchvision:mobilenet_v2", 1000), Image.effect_noise((300, 280), 60).convert("RGB")
    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", lambda self, **options: net.state_dict())
    for choice in ("IMAGENET1K_V1", "IMAGENET1K_V2"):  # short sides of 256 and 232 pixels
        opened = deployed.open_model("torchvision:mobilenet_v2", choice)
        (tmp_path / choice).mkdir()
        opened.write(opened.classifier, tmp_path / choice)
        for _ in range(2):  # the output of a request, and of one that starts from it
            again = deployed.reopen(opened.opened_by, opened.class_names, tmp_path / choice / "model.pt")
            assert torch.equal(again.to_pixels(noise), opened.to_pixels(noise))
            opened = again


@pytest.mark.parametrize("name", ["torchvision:other", "torchvision:raft_large", "other", "hf:other", "torchvision:"])
def test_a_report_of_an_unknown_model_is_an_error_in_one_sentence(tmp_path, name):
    torch.save(tiny_net().state_dict(), tmp_path / "model.pt")
    opened_by = {"model": name, "image_size": None, "mean": None, "std": None, "preset": "other"}
    with pytest.raises(InputError, match=r"unknown model '|cannot load hf:.*model\.pt"):
        deployed.reopen(opened_by, ["a", "b"], tmp_path / "model.pt")


def test_the_class_names_of_a_request_precede_those_of_the_model(vit_folder, tmp_path):
    opened = deployed.open_model(str(vit_folder))
    opened.write(opened.classifier, tmp_path)
    names = [str(number) for number in (1, 0, *range(2, 10))]  # such as those of --class-order or --class-names
    assert deployed.reopen(opened.opened_by, names, tmp_path / "model").class_names == names


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


class Holder(torch.nn.Module):
    """A network under another name, as wrappers and Lightning modules hold it."""

    def __init__(self, **nets):
        super().__init__()
        for name, net in nets.items():
            setattr(self, name, net)


def wrapped_net(form):
    """Return the weights of `tiny_net` under the names that a wrapper gives them."""
    net = tiny_net()
    if form == "compiled layer":
        net.head = torch.compile(net.head, backend="eager")
        return net.state_dict()
    for part in reversed(form.split()):
        net = torch.compile(net, backend="eager") if part == "_orig_mod" else Holder(**{part: net})
    return net.state_dict()


@pytest.mark.parametrize(
    "form",
    [
        *("_orig_mod", "model", "net", "_orig_mod module", "module _orig_mod", "model net backbone"),
        *("module _orig_mod model", "anything", "compiled layer"),
    ],
)
def test_prefixes_of_wrappers_are_read_and_written_again(net, tmp_path, form):
    state = wrapped_net(form)
    torch.save({"state_dict": state}, tmp_path / "in.pt")
    opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")
    assert all(torch.equal(tensor, net[0].state_dict()[k]) for k, tensor in opened.classifier.net.state_dict().items())
    opened.classifier.net.load_state_dict(net[1].state_dict())
    opened.write(opened.classifier, tmp_path)
    written = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert list(written) == list(state)
    again = deployed.reopen(opened.opened_by, [], tmp_path / "model.pt", "conftest:tiny_net")
    assert all(torch.equal(t, net[1].state_dict()[name]) for name, t in again.classifier.net.state_dict().items())


LIGHTNING = {
    "epoch": np.float64(3.0),
    "pytorch-lightning_version": "2.5.0",
    "hyper_parameters": argparse.Namespace(lr=1e-3, root=pathlib.Path("runs/1"), best=np.float32(0.5)),
    "callbacks": {"best": {"best_model_path": pathlib.PureWindowsPath("a"), "scores": np.arange(3.0)}},
    "date": datetime.datetime(2024, 1, 2),
}


def test_a_lightning_checkpoint_is_read_and_written_with_its_other_content(net, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in net[0].state_dict().items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": state, "optimizer_states": [{"m": torch.ones(2)}], **LIGHTNING}, tmp_path / "in.ckpt")
    opened = deployed.open_model(None, tmp_path / "in.ckpt", "conftest:tiny_net")
    assert opened.not_read == ["loss.weight"]
    assert opened.write(net_classifier(opened, net[1]), tmp_path) == ["optimizer_states"]
    content = torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert torch.equal(content["state_dict"]["model.head.bias"], net[1].head.bias)
    assert torch.equal(content["state_dict"]["loss.weight"], torch.ones(3))
    assert content["callbacks"]["best"]["scores"].tolist() == [0.0, 1.0, 2.0]
    assert type(content["callbacks"]["best"]["scores"]) is np.ndarray
    assert content["hyper_parameters"] == LIGHTNING["hyper_parameters"]
    assert (content["epoch"], type(content["epoch"])) == (3.0, np.float64)
    assert content["date"] == LIGHTNING["date"]


def net_classifier(opened, net):
    opened.classifier.net.load_state_dict(net.state_dict())
    return opened.classifier


def test_several_weights_are_chosen_by_key(net, tmp_path):
    first, second = net[0].state_dict(), net[1].state_dict()
    torch.save({"model": first, "model_ema": second, "init_weight": second, "epoch": 3}, tmp_path / "in.pt")
    with pytest.raises(InputError, match="has several weights that fit: model, model_ema; .*with --weights-key"):
        deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")
    for key, state in (("model", first), ("model_ema", second)):
        opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net", weights_key=key)
        assert torch.equal(opened.classifier.net.head.bias, state["head.bias"])
        left_out = opened.write(opened.classifier, tmp_path)
        assert left_out == [one for one in ("model", "model_ema", "init_weight") if one != key]
        again = deployed.reopen(opened.opened_by, [], tmp_path / "model.pt", "conftest:tiny_net")
        assert torch.equal(again.classifier.net.head.bias, state["head.bias"])
    with pytest.raises(InputError, match="has no weights under --weights-key ema; expected one of model, model_ema"):
        deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net", weights_key="ema")


def test_initial_weights_and_copies_are_not_taken_for_the_weights_in_use(net, tmp_path):
    first, second = net[0].state_dict(), net[1].state_dict()
    content = {"init_weight": second, "state_dict": first, "best": {"net": dict(first)}}
    torch.save(content, tmp_path / "in.pt")
    opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")
    assert torch.equal(opened.classifier.net.head.bias, first["head.bias"])


def test_two_networks_in_one_state_dict_are_chosen_by_prefix(net, tmp_path):
    torch.save(Holder(student=net[0], teacher=net[1]).state_dict(), tmp_path / "in.pt")
    with pytest.raises(InputError, match="has several weights that fit: student, teacher; "):
        deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")
    opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net", weights_key="teacher")
    assert torch.equal(opened.classifier.net.head.bias, net[1].head.bias)
    assert opened.write(opened.classifier, tmp_path) == ["student.*"]
    assert not any(name.startswith("student") for name in torch.load(tmp_path / "model.pt", weights_only=True))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a", "a.SAFETENSORS"])
def test_safetensors_are_known_by_their_content(net, tmp_path, name):
    save_file(net[0].state_dict(), tmp_path / name, {"from": "somewhere"})
    opened = deployed.open_model(None, tmp_path / name, "conftest:tiny_net")
    opened.write(opened.classifier, tmp_path / "..")
    target = tmp_path / ".." / f"model{pathlib.Path(name).suffix}"
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"from": "somewhere"}
    target.unlink()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["a.safetensors", "a", "a.pth.tar"])
def test_pickles_are_known_by_their_content_and_written_in_the_same_format(net, tmp_path, name, is_zip):
    (tmp_path / "out").mkdir()
    torch.save(net[0].state_dict(), tmp_path / "other.pt", _use_new_zipfile_serialization=is_zip)
    (tmp_path / "other.pt").rename(tmp_path / name)
    opened = deployed.open_model(None, tmp_path / name, "conftest:tiny_net")
    opened.write(opened.classifier, tmp_path / "out")
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == f"model{name[1:]}"
    assert zipfile.is_zipfile(written) == is_zip


def compiled_net():
    return torch.compile(tiny_net(), backend="eager")


def parallel_net():
    net = tiny_net()
    net.head = torch.nn.DataParallel(net.head)
    return torch.nn.DataParallel(net)


def net_with_statistics():
    net = torch.nn.Sequential(models.Normalize([0.5] * 3, [0.25] * 3), tiny_net())
    return net


@pytest.mark.parametrize("build", ["compiled_net", "parallel_net"])
def test_wrappers_of_built_modules_are_taken_off(net, tmp_path, build):
    torch.save(globals()[build]().state_dict(), tmp_path / "in.pt")
    opened = deployed.open_model(None, tmp_path / "in.pt", f"test_deployed_model:{build}")
    assert list(opened.classifier.net.state_dict()) == list(net[0].state_dict())
    opened.write(net_classifier(opened, net[1]), tmp_path)
    loaded = globals()[build]()
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(list(loaded.parameters())[-1], list(net[1].parameters())[-1])


def test_the_input_normalisation_in_a_file_is_used_unless_the_module_has_it(net, tmp_path):
    state = {**net[0].state_dict(), "normalize.mean": torch.full((3,), 0.5), "normalize.std": torch.full((3,), 0.25)}
    torch.save({"state_dict": state}, tmp_path / "in.pt")
    opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")
    assert opened.classifier.normalize.mean.flatten().tolist() == [0.5] * 3
    assert opened.notes == ["in.pt: uses the input normalisation in the file (mean 0.5 0.5 0.5, std 0.25 0.25 0.25)"]
    opened.write(net_classifier(opened, net[1]), tmp_path)
    written = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert list(written) == list(state)
    assert torch.equal(written["head.bias"], net[1].head.bias)
    chosen = deployed.InputFormat(mean=[0.0] * 3, std=[1.0] * 3)
    opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net", chosen)
    assert (opened.classifier.normalize.std.flatten().tolist(), opened.notes) == ([1.0] * 3, [])
    opened = deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net", deployed.InputFormat(mean=[0.1] * 3))
    assert opened.classifier.normalize.std.flatten().tolist() == [0.25] * 3
    assert opened.notes == ["in.pt: uses the input normalisation in the file (std 0.25 0.25 0.25)"]
    torch.save(net_with_statistics().state_dict(), tmp_path / "own.pt")
    opened = deployed.open_model(None, tmp_path / "own.pt", "test_deployed_model:net_with_statistics")
    assert (opened.classifier.normalize.mean.flatten().tolist(), opened.notes) == ([0.0] * 3, [])


def test_released_weights_with_statistics_are_written_again(tmp_path):
    """`0.mean`, `0.std` and `1.` before all other names: Sequential(normalise, model)."""
    net = models.build("resnet20", 10).net
    content = {"0.mean": torch.zeros(3), "0.std": torch.ones(3), **{f"1.{k}": v for k, v in net.state_dict().items()}}
    torch.save(content, tmp_path / "in.pt")
    opened = deployed.open_model("resnet20", tmp_path / "in.pt", input_format=deployed.InputFormat(std=[0.5] * 3))
    assert opened.notes == ["in.pt: uses the input normalisation in the file (mean 0 0 0)"]
    opened = deployed.open_model("resnet20", tmp_path / "in.pt")
    with torch.no_grad():
        opened.classifier.net.linear.bias.add_(1)
    opened.write(opened.classifier, tmp_path)
    written = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(written) == list(content)
    assert torch.equal(written["1.linear.bias"], opened.classifier.net.linear.bias)


OTHER_FORMATS = {
    "net.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(60), "is an ONNX model"),
    "net.pt": (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file"),
    "net.tflite": (b"\x1c\0\0\0TFL3" + bytes(60), "is a TFLite model"),
    "net.bin": (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file"),
    "net.pth": (b"<!DOCTYPE html><html>", "is a web page"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
    "net.safetensors.index.json": (b'{"weight_map": {}}', "is a JSON file, which holds no weights"),
    "plain.pkl": (b"\x80\x04\x95" + bytes(60), "could run code when read"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_named(tmp_path, name):
    content, complaint = OTHER_FORMATS[name]
    (tmp_path / name).write_bytes(content)
    for arguments in ((str(tmp_path / name),), (None, tmp_path / name, "conftest:tiny_net")):
        with pytest.raises(InputError, match=complaint):
            deployed.open_model(*arguments)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (["a/model.weights.h5", "a/config.json"], "is a Keras model"),
        (["w.npy"], "is an archive of NumPy arrays"),
        (["readme.txt"], "is a zip archive that torch.save did not write"),
        (["a/code/net.py", "a/data.pkl"], "is a TorchScript program"),
        (["a/models/model.json"], "is a torch.export program"),
    ],
)
def test_other_archives_are_named(tmp_path, entries, complaint):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        for entry in entries:
            archive.writestr(entry, "x")
    with pytest.raises(InputError, match=complaint):
        checkpoint.read(tmp_path / "net.pt")


def test_a_type_that_could_run_code_is_named_with_how_to_save_again(tmp_path):
    torch.save({"state_dict": tiny_net().state_dict(), "config": Counted()}, tmp_path / "in.ckpt")
    with pytest.raises(
        InputError, match="holds more than tensors .test_deployed_model.Counted.*torch.save.model.state"
    ):
        checkpoint.read(tmp_path / "in.ckpt")
    torch.save({"state_dict": tiny_net().state_dict(), "config": np.array([{}])}, tmp_path / "in.ckpt")
    with pytest.raises(InputError, match="numpy.dtype.'O8'"):
        checkpoint.read(tmp_path / "in.ckpt")


class Counted:
    """Stands for a configuration of the user's own."""


def test_quantised_weights_do_not_fit(net, tmp_path):
    state = {name: (t * 100).to(torch.int8) if t.ndim > 1 else t for name, t in net[0].state_dict().items()}
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(InputError, match="is int8, not float32"):
        deployed.open_model(None, tmp_path / "in.pt", "conftest:tiny_net")


def tied_net():
    net = tiny_net()
    net.again = torch.nn.Linear(*reversed(net.head.weight.shape))
    net.again.weight, net.again.bias = net.head.weight, net.head.bias
    return net


def test_of_tied_weights_the_file_may_hold_one(tmp_path):
    net = tied_net()
    save_model(net, str(tmp_path / "in.safetensors"))
    opened = deployed.open_model(None, tmp_path / "in.safetensors", "test_deployed_model:tied_net")
    with torch.no_grad():
        opened.classifier.net.head.weight.add_(1)
    opened.write(opened.classifier, tmp_path)
    again = tied_net()
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again.again.weight, net.head.weight + 1)


def twins():
    return torch.nn.Sequential(tiny_net(), tiny_net())


def test_equal_weights_that_the_file_stores_once_are_written_apart(tmp_path):
    state = tiny_net().state_dict()
    torch.save({f"{place}.{name}": tensor for place in "01" for name, tensor in state.items()}, tmp_path / "in.pt")
    opened = deployed.open_model(None, tmp_path / "in.pt", "test_deployed_model:twins")
    with torch.no_grad():
        opened.classifier.net[0].head.weight.add_(1)
    opened.write(opened.classifier, tmp_path)
    written = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(written["0.head.weight"], state["head.weight"] + 1)
    assert torch.equal(written["1.head.weight"], state["head.weight"])


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="which is a folder; name the file of weights in it"):
        deployed.open_model(None, tmp_path, "conftest:tiny_net")


def test_a_damaged_pickle_with_other_content_raises_input_error_or_is_read(tmp_path):
    """The damage is in the pickle itself, where it changes types, keys and arguments."""
    state = {f"model.{name}": tensor for name, tensor in tiny_net().state_dict().items()}
    torch.save({**LIGHTNING, "state_dict": state}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    (tmp_path / "out").mkdir()
    path, generator = tmp_path / "damaged.ckpt", np.random.default_rng(1)
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    for _ in range(150):
        damaged = bytearray(entries[pickled])
        for place in generator.integers(0, len(damaged), generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        with zipfile.ZipFile(path, "w") as archive:  # with right checksums: torch compares them
            for name, content in entries.items():
                archive.writestr(name, bytes(damaged) if name == pickled else content)
        with contextlib.suppress(InputError):
            opened = deployed.open_model(None, path, "conftest:tiny_net")
            opened.write(opened.classifier, tmp_path / "out")


def test_built_networks_are_channels_last():
    opened = deployed.open_model(None, build="test_deployed_model:frozen_net")
    assert opened.classifier.net.features[3].weight.is_contiguous(memory_format=torch.channels_last)


class Flattening(nn.Module):
    """A network of the kind in PyTorch's tutorials, whose `view` needs the default memory format."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        return self.head(self.convolution(x).view(x.size(0), -1))


def test_networks_that_call_view_get_their_inputs_in_the_default_memory_format():
    classifier = deployed.open_model(None, build="test_deployed_model:Flattening").classifier
    net, images = Flattening(), torch.randint(0, 256, (6, 3, 8, 8)).to(torch.uint8)
    net.load_state_dict(classifier.net.state_dict())
    expected = net(images / 255).argmax(1)
    assert torch.equal(accuracy.predict(classifier, images), expected)
    assert preflight.check_model(classifier, images) == 5  # gradients too
    assert torch.equal(accuracy.predict(copy.deepcopy(classifier), images), expected)
