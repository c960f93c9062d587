"""`l2ul.forget`: what it returns and checks, what it leaves alone, and what it refuses."""

import copy
import dataclasses
import functools
import inspect
import io
import pickle
import re
import subprocess
import sys

from conftest import CLASSES, ROOT, TinyNet, WithAverage, tiny_net
import numpy as np
from PIL import Image
import pytest
import torch
from torch import nn

import l2ul
from l2ul import models
from l2ul.common.errors import InputError
from l2ul.data.image_files import ImageReader
from l2ul.deletion import candidates, search, strategies
from l2ul.deletion.candidates import TimeBudget
from l2ul.deletion.forget import Damaged, Forgotten, NotForgotten
from l2ul.metrics import robustness
from l2ul.models.classifier import Classifier, Normalize
from l2ul.objective import Forget
from l2ul.unlearn import Settings, unlearn

FAST = {"distill_steps": 12, "distill_mixes": 16, "distill_lr": 0.03}
STORED = {"robust": 0, **FAST}

pytestmark = pytest.mark.usefixtures("fast_report")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def predictions(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images / 255).argmax(1)


def test_the_returned_model_has_forgotten_what_the_result_says(trained):
    model, images, labels = trained
    result = l2ul.forget(model, images[:6], labels[:6], **STORED)
    now = predictions(result.model, images)
    assert (now[:6] != labels[:6]).all()
    assert result.predictions_after.tolist() == now[:6].tolist()
    assert result.predictions_before.tolist() == result.labels.tolist() == labels[:6].tolist()
    assert result.forgotten.all()
    assert result.recognised.all()
    assert result.successful
    assert result.outcome == "removed from predictions"
    assert "6 of 6 images are forgotten as stored" in str(result)
    assert "model=" not in repr(result)  # all layers of the network
    assert re.search(rf"; agreement with the original model {result.agreement:.1f} %$", result.summary)
    assert result.settings.items() >= STORED.items()
    assert (result.method, result.steps > 0, result.seconds > 0) == ("distill", True, True)


def test_forgotten_as_used_is_what_the_metric_measures_on_the_returned_model(trained):
    model, images, labels = trained
    few = {"distill_steps": 4, "distill_cycles": 1}
    with pytest.warns(UserWarning, match="partly removed from predictions: . of 6 images") as caught:
        result = l2ul.forget(model, images[:6], labels[:6], **{**FAST, **few})
    measured = robustness.as_used(result.model, Forget(images[:6] / 255, labels[:6]))
    assert result.forgotten_as_used.equal(measured.forgotten)
    assert result.forgotten_as_stored.equal(measured.stored)
    assert result.forgotten.equal(result.forgotten_as_used)  # with robust=1, only these count
    assert not result.successful
    assert result.note == "the run took all of its 4 steps before all images were forgotten: use other settings"
    assert str(caught[0].message) == f"{result.summary}; {result.note}"
    assert caught[0].filename == __file__


class Merging(TinyNet):
    """Add a part to the weights of the head in eval mode, and take it off in train mode, as adapters do."""

    is_merged = False

    def train(self, mode=True):
        if mode == self.is_merged:
            self.head.weight.data += -0.1 if mode else 0.1
            self.is_merged = not mode
        return super().train(mode)


def test_weights_that_no_gradient_reaches_are_named(trained):
    model, images, labels = trained
    assert l2ul.forget(model, images[:2], labels[:2], **STORED).unreached == ()
    both = WithAverage()
    both.net, both.average = copy.deepcopy(model).requires_grad_(False), model
    result = l2ul.forget(both, images[:2], labels[:2], **STORED)
    assert (result.successful, result.unreached) == (True, ("net.*",))


def test_a_model_that_changes_its_weights_in_eval_mode_is_refused_in_train_mode(trained):
    model, images, labels = trained
    merging = Merging().eval()
    merging.load_state_dict(model.state_dict())
    l2ul.forget(merging, images[:2], labels[:2], **STORED)
    with pytest.raises(InputError, match=r"changes its weights in eval\(\), .*; call model.eval\(\) first"):
        l2ul.forget(merging.train(), images[:2], labels[:2], **STORED)


class ReturnsNothing(TinyNet):
    """A net whose `train`, and therefore `eval`, returns nothing."""

    def train(self, mode=True):
        super().train(mode)


class NoModes(TinyNet):
    """A net without modes, as torch.export returned them."""

    def train(self, mode=True):
        raise NotImplementedError("calling train() or eval() is not supported")


@pytest.mark.parametrize("settings", [{"robust": 0}, {"robust": 1, "robust_images": 2}])
def test_a_model_whose_train_returns_nothing_is_unlearned(trained, settings):
    model, images, labels = trained
    net = ReturnsNothing()
    net.load_state_dict(model.state_dict())
    result = l2ul.forget(net, images[:2], labels[:2], **FAST | settings)
    assert result.model.training
    result.model.eval()
    assert torch.equal(result.model(images[:2] / 255).argmax(1), result.predictions_after)
    short = Settings(distill_steps=2, distill_cycles=1)
    assert unlearn(net, images[:2], labels[:2], "distill", settings=short).steps == 2


def test_a_model_without_eval_mode_is_refused(trained, forget):
    _, images, labels = trained
    message = "cannot be put in eval mode (calling train() or eval() is not supported)"
    with pytest.raises(InputError, match=f"the model {re.escape(message)}"):
        l2ul.forget(NoModes(), images[:2], labels[:2])
    code, _, printed = forget(model=["--build", "test_forget:NoModes"])
    assert (code, message in printed) == (2, True)


class Dropping(nn.Linear):
    """A classifier with a parameter in train mode that it has not in eval mode."""

    def train(self, mode=True):
        self.scale = nn.Parameter(torch.ones(1)) if mode else None
        return super().train(mode)

    def forward(self, x):
        return super().forward(x.flatten(1))


def test_a_model_that_drops_a_parameter_in_eval_mode_is_refused_in_train_mode(trained):
    _, images, labels = trained
    with pytest.raises(InputError, match=r"changes its weights in eval\(\)"):
        l2ul.forget(Dropping(192, CLASSES).train(), images[:2], labels[:2], **STORED)


def test_the_model_and_the_state_of_torch_stay_as_they_are(trained):
    model, images, labels = trained
    model.train()
    model.features[1].eval()
    model.head.bias.requires_grad_(False)
    before, modes = weights(model), [module.training for module in model.modules()]
    state, flags = torch.get_rng_state(), torch.backends.cudnn.conv.fp32_precision
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = l2ul.forget(model, images[:3], labels[:3].tolist(), **STORED)
    assert same(before, weights(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in result.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.cudnn.conv.fp32_precision == flags
    assert torch.equal(result.model.head.bias, before["head.bias"])  # it requires no gradient
    assert not result.model.head.bias.requires_grad
    assert result.forgotten.all()


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "meta")])
def test_other_defaults_of_torch(trained, dtype, device):
    model, images, labels = trained
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        result = l2ul.forget(model, images[:2], labels[:2], **STORED)
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (dtype, device)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert result.forgotten.all()


@pytest.mark.filterwarnings("error")
def test_the_result_is_kept_where_warnings_are_errors(trained):
    model, images, labels = trained
    with pytest.raises(NotForgotten, match="nothing to remove") as caught:
        l2ul.forget(model, images[:1], (labels[:1] + 1) % CLASSES, min_known=0, **STORED)
    assert caught.value.result.summary == str(caught.value)


def test_the_warning_says_why_images_are_not_forgotten_and_what_to_do(trained, monkeypatch):
    model, images, labels = trained
    monkeypatch.setattr(strategies.Robust, "has_time_for_cycle", lambda *arguments: False)
    with pytest.warns(NotForgotten, match="; there was too little time to forget .*: use minutes=") as caught:
        result = l2ul.forget(model, images[:2], labels[:2], minutes=0.2)
    assert re.search(r"use minutes=\d+ or more, surrogate with other images, or robust=0 to", result.note)
    assert str(caught[0].message) == f"{result.summary}; {result.note}"
    assert "--" not in result.note


def test_a_damaged_model_that_forgets_all_images_comes_with_a_warning(trained, monkeypatch):
    model, images, labels = trained
    monkeypatch.setattr(candidates, "ACCEPTABLE", 101)
    with pytest.warns(Damaged, match="6 of 6 images are forgotten") as caught:
        result = l2ul.forget(model, images[:6], labels[:6], **STORED)
    copied = pickle.loads(pickle.dumps(caught[0].message))
    assert (type(copied), str(copied), copied.result.steps) == (Damaged, str(caught[0].message), result.steps)
    damage = f"an agreement of {result.agreement:.1f} % is below 101 %, which is too much damage"
    assert result.note == f"{damage}: use more minutes, keep_images or another method"
    assert str(caught[0].message) == f"{result.summary}; {result.note}"


def test_inside_of_inference_mode(trained):
    model, images, labels = trained
    with torch.inference_mode():
        result = l2ul.forget(model, images[:2] / 255, labels[:2], **STORED)
    assert result.forgotten.all()


def test_an_image_that_was_not_recognised_never_counts_as_forgotten(trained):
    model, images, labels = trained
    wrong = labels[:6].clone()
    wrong[4:] = (wrong[4:] + 1) % CLASSES
    result = l2ul.forget(model, images[:6], wrong, **STORED)
    assert result.recognised.tolist() == [True] * 4 + [False] * 2
    assert result.forgotten.tolist() == [True] * 4 + [False] * 2
    assert not result.forgotten_as_stored[4:].any()
    assert "2 were not recognised before" in result.summary


def test_nothing_to_remove_is_no_success(trained):
    model, images, labels = trained
    with pytest.warns(UserWarning, match="nothing to remove"):
        result = l2ul.forget(model, images[:3], (labels[:3] + 1) % CLASSES, min_known=0, **STORED)
    assert not result.forgotten.any()
    assert same(weights(model), weights(result.model))
    assert (result.steps, result.settings, result.agreement) == (0, {}, 100.0)


@pytest.mark.parametrize("count", [1, 3])
def test_new_labels_of_images_that_were_not_recognised_are_no_success(trained, count):
    model, images, labels = trained
    wrong, new = (labels[:count] + 1) % CLASSES, (labels[:count] + 2) % CLASSES
    with pytest.warns(UserWarning, match=f"nothing to remove: .* none of {count} images? before; it predicts the new"):
        result = l2ul.forget(model, images[:count], wrong, new_labels=new, min_known=0, **STORED)
    assert predictions(result.model, images[:count]).equal(new)
    assert not result.forgotten.any()
    assert not result.successful


def test_without_labels_the_predictions_are_forgotten_and_float_images_work_as_well(trained):
    model, images, labels = trained
    result = l2ul.forget(model, images[:1].double() / 255, **STORED)
    assert result.labels.tolist() == labels[:1].tolist()
    assert result.forgotten.all()


def test_images_get_new_labels(trained):
    model, images, labels = trained
    new = (labels[:3] + 2) % CLASSES
    result = l2ul.forget(model, images[:3], labels[:3], new_labels=new, **STORED)
    assert predictions(result.model, images[:3]).tolist() == new.tolist()
    assert result.successful


def test_a_model_of_normalised_pixels_with_its_mean_and_std(trained):
    model, images, labels = trained
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)

    class OfNormalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, inputs):
            return self.net(inputs * std + mean)

    result = l2ul.forget(OfNormalised(), images[:3], labels[:3], mean=[0.4, 0.5, 0.6], std=(0.2, 0.25, 0.3), **STORED)
    inputs = (images[:3] / 255 - mean) / std
    assert (result.model.eval()(inputs).argmax(1) != labels[:3]).all()


def test_wrong_preprocessing_is_named_with_the_arguments_of_the_function(trained):
    model, images, labels = trained
    of_255 = nn.Sequential(Normalize([0] * 3, [255] * 3), model)
    with pytest.raises(InputError) as caught:
        l2ul.forget(of_255, images[:16], labels[:16])
    advised = {"mean": (0.0, 0.0, 0.0), "std": (0.00392157, 0.00392157, 0.00392157)}
    words = ", ".join(f"{name}={value}" for name, value in advised.items())
    assert str(caught.value).endswith(f"but 16 of 16 with pixels from 0 to 255: add {words}")
    assert l2ul.forget(of_255, images[:6], labels[:6], **advised, **STORED).recognised.all()
    with pytest.raises(InputError, match="BGR: change the model, the images or the labels accordingly$"):
        l2ul.forget(nn.Sequential(Flip(), model), images[:16], labels[:16])


class Fixed(nn.Module):
    """A network for images of 8 x 8 pixels alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        assert images.shape[2:] == (8, 8)
        return self.net(images)


def test_alternatives_keep_the_size_to_which_a_classifier_resizes(trained):
    model, images, labels = trained
    net = Fixed(nn.Sequential(Normalize([0] * 3, [255] * 3), model))
    resizing = Classifier("resizing", CLASSES, net, nn.Sequential(nn.AvgPool2d(2), Normalize([0] * 3, [1] * 3)))
    with pytest.raises(InputError, match="but 16 of 16 with pixels from 0 to 255: change the model"):
        l2ul.forget(resizing, images[:16].repeat_interleave(2, 2).repeat_interleave(2, 3), labels[:16])


class Grey(nn.Module):
    """A layer that takes images of one channel and returns three."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, images):
        return self.conv(images)


class Flip(nn.Module):
    def forward(self, images):
        return images.flip(1)


def test_files_and_pil_images(trained, tmp_path):
    model, images, labels = trained
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:2]]
    pictures[0].save(tmp_path / "0.png")
    result = l2ul.forget(model, [tmp_path / "0.png", pictures[1]], labels[:2], **STORED)
    assert (predictions(result.model, images[:2]) != labels[:2]).all()
    pictures[1].resize((9, 8)).save(tmp_path / "1.png")
    for files, message in (
        ([tmp_path / "0.png", str(tmp_path / "1.png")], "has 8 x 8 pixels, .* has 9 x 8; resize all images"),
        ([tmp_path / "none.png"], "cannot read the image .*none.png .No such file"),
        ([Image.new("F", (8, 8))], "more than 8 bits"),
        ([], "contains no image"),
    ):
        with pytest.raises(InputError, match=message):
            l2ul.forget(model, files)


def test_a_hugging_face_model_with_its_processor(vit_folder):
    transformers = pytest.importorskip("transformers")
    net = transformers.ViTForImageClassification.from_pretrained(vit_folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(vit_folder)
    with pytest.raises(InputError, match="of transformers, which usually takes normalised pixels; pass the mean"):
        l2ul.forget(net, torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8))
    images = torch.randint(256, (3, 3, 40, 60), generator=torch.Generator().manual_seed(0)).byte()
    result = l2ul.forget(net, images, processor=processor, min_known=0, **STORED)
    with torch.no_grad():
        inputs = processor(list(images), return_tensors="pt")
        before, after = (one(**inputs).logits.argmax(1) for one in (net, result.model))
    assert before.tolist() == result.labels.tolist()
    assert after.tolist() == result.predictions_after.tolist()
    assert type(result.model) is type(net)
    assert result.forgotten.tolist() == (before != after).tolist()
    with pytest.raises(InputError, match="the processor takes 8-bit images: pass uint8"):
        l2ul.forget(net, images / 255, processor=processor)
    net.config.problem_type = "multi_label_classification"
    with pytest.raises(InputError, match="is a multi-label model"):
        l2ul.forget(net, images, processor=processor)


def test_models_of_libraries_need_their_normalisation(trained):
    torchvision = pytest.importorskip("torchvision")
    images = trained[1][:2]
    with pytest.raises(InputError, match=r"torchvision's own weights have mean=\(0.485, 0.456, 0.406\)"):
        l2ul.forget(torchvision.models.resnet18(), images)
    own = type("Own", (torchvision.models.AlexNet,), {"__module__": "my_models"})
    with pytest.raises(InputError, match="model is a Own of torchvision, which usually takes normalised pixels"):
        l2ul.forget(own(num_classes=10), images)
    classifier = models.build("resnet20", 10)
    with pytest.raises(InputError, match="or pass the classifier that l2ul.models.load returns"):
        l2ul.forget(classifier.net, images)
    with pytest.raises(InputError, match="leave out mean, std and processor, or build it with another mean and std$"):
        l2ul.forget(classifier, images, mean=[0.5] * 3, std=[0.5] * 3)


def test_a_classifier_of_this_project_and_wrappers_of_torch(trained):
    model, images, labels = trained
    models.register("tiny", lambda classes: model)
    try:
        classifier = models.build("tiny", CLASSES)
    finally:
        del models.OWN["tiny"]
    result = l2ul.forget(nn.DataParallel(classifier), images[:2], labels[:2], **STORED)
    assert isinstance(result.model, models.Classifier)
    assert result.forgotten.all()
    assert (result.model.eval()(images[:2] / 255).argmax(1) != labels[:2]).all()


@pytest.mark.parametrize(
    ("method", "settings"), [("adv_imp", {"max_passes": 20, "unlearn_lr": 0.05}), ("jit", {"lr": 0.1, "copies": 2})]
)
def test_other_methods(trained, method, settings, recwarn):
    model, images, labels = trained
    model.features[0].weight.requires_grad_(False)
    result = l2ul.forget(model, images[:4], labels[:4], method=method, **settings)
    assert result.forgotten.equal(predictions(result.model, images[:4]) != labels[:4])
    assert result.forgotten.any() == (result.steps > 0) == (result.settings.items() >= settings.items())
    assert result.steps > 0 or method == "jit"
    assert torch.equal(result.model.features[0].weight, model.features[0].weight)


def test_images_to_keep_and_a_surrogate_are_used(trained, monkeypatch):
    model, images, labels = trained
    seen = {}
    find = search.find_candidates

    def spy(unlearner, *arguments, **options):
        seen.update(surrogate=unlearner.surrogate, keep=options["keep_images"])
        return find(unlearner, *arguments, **options)

    monkeypatch.setattr(search, "find_candidates", spy)
    l2ul.forget(model, images[:2], labels[:2], keep_images=images[10:20], surrogate=images[20:40] / 255, **STORED)
    assert torch.equal(seen["keep"], images[10:20])
    assert torch.allclose(seen["surrogate"], images[20:40] / 255)
    with pytest.raises(InputError, match="image 1 of keep_images is also an image to forget"):
        l2ul.forget(model, images[:2], labels[:2], keep_images=images[[9, 0]])
    refused("image 0 of keep_images is also", model, images[:2], labels[:2], keep_images=images[:1].half() / 255)
    refused("image 1 of surrogate is also", model, images[:2] / 255, labels[:2], surrogate=images[[9, 0]])
    with pytest.raises(InputError, match="surrogate and images differ in size"):
        l2ul.forget(model, images[:2], labels[:2], surrogate=images[:, :, :4])
    with pytest.raises(InputError, match="methods with a teacher"):
        l2ul.forget(model, images[:2], labels[:2], method="adv", surrogate=images)


def truncated_image():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "BMP")
    return Image.open(io.BytesIO(file.getvalue()[:-20]))


BAD_IMAGES = {
    "one image": (lambda x: x[0], r"shape 3 x 8 x 8; expected \(k, C, H, W\).*: pass one image as images\[None\]"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), r"pass images.permute\(0, 3, 1, 2\)"),
    "none": (lambda x: x[:0], "expected .* k of at least 1"),
    "grey": (lambda x: x[:, :1] / 255, "1 channels? of 3|does not accept images"),
    "whole numbers": (lambda x: x.long(), "type int64; expected uint8, or float"),
    "255": (lambda x: x.float(), r"from 0 to 255; expected pixels in \[0,1\]: divide them by 255"),
    "normalised": (lambda x: x / 255 * 8 - 2, "leave out the normalisation, and pass it as mean and std"),
    "overshoot": (lambda x: x / 255 + 0.01, "clamp them"),
    "dark": (lambda x: x / 255 / 255, "divide by 255 only once"),
    "dark bytes": (lambda x: (x / 255).round().byte(), "no value above 1, where white is 255"),
    "nan": (lambda x: torch.where(torch.arange(8) == 3, torch.nan, x / 255), "image 0 of images has values that are"),
    "array": (lambda x: x.numpy(), "images is a ndarray; expected a tensor"),
    "meta": (lambda x: x.to("meta"), "images is on the device meta"),
    "sparse": (lambda x: (x / 255).to_sparse(), r"images is a sparse tensor; pass images.to_dense\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x / 255), layout=torch.jagged), "images is a nested tensor"),
    "truncated": (lambda x: [truncated_image()], r"image 0 of images cannot be decoded \(.+\); leave it out"),
    "tensors": (list, "images is a list of Tensor; expected a tensor"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_are_no_pixels_are_refused(trained, case):
    model, images, labels = trained
    change, message = BAD_IMAGES[case]
    refused(message, model, change(images[:2]), labels[:2])


BAD_LABELS = {
    "range": ([0, 5], "label '5' is not a class of the model; expected a number from 0 to 4"),
    "negative": ([0, -1], "label '-1' is not a class of the model"),
    "count": ([0, 1, 2], "labels has the shape 3; expected one class number for each of 2 images"),
    "one": (3, "labels has the shape of one number"),
    "names": (["cat", "dog"], "labels is a list of str; expected 2 whole numbers"),
    "float": ([0.0, 1.0], "type float32; expected whole numbers"),
    "one-hot": (torch.eye(5)[:2], r"pass labels.argmax\(1\)"),
    "column": (torch.zeros(2, 1, dtype=torch.int64), r"pass labels.squeeze\(1\)"),
    "meta": (torch.zeros(2, dtype=torch.int64, device="meta"), "labels is on the device meta"),
    "huge": ([10**30, 0], "labels is a list of int; expected 2 whole numbers"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_are_no_classes_are_refused(trained, case):
    model, images, _ = trained
    labels, message = BAD_LABELS[case]
    refused(message, model, images[:2], labels)


def test_labels_that_contradict_each_other_are_refused(trained):
    model, images, labels = trained
    refused("the same image with different labels", model, images[[0, 0]], [0, 1])
    refused("the new_label of image 0 of images equals its label", model, images[:2], labels[:2], new_labels=labels[:2])


BAD_OPTIONS = {
    "setting": ({"distil_lr": 1}, "distil_lr is no argument of forget and no setting of method distill; did you mean"),
    "argument": ({"sed": 1}, "did you mean seed?"),
    "unlike": ({"zzz": 1}, "its settings are distill_lr, "),
    "value": ({"distill_lr": -1}, "setting distill_lr=-1 is not allowed; expected a number above 0"),
    "attack": ({"method": "adv", "pgd_eps": 1}, "deletion requests use a fixed attack"),
    "method": ({"method": "distil"}, "unknown method 'distil'.*did you mean distill?"),
    "retain": ({"method": "finetune"}, "trains on the retain set, which a request does not have; leave out method"),
    "no method": ({"method": None}, "unknown method None; expected one of"),
    "methods": ({"method": ["distill"]}, "unknown method .'distill'.; expected one of"),
    "minutes": ({"minutes": 0}, "minutes is 0; expected a number above 0"),
    "huge minutes": ({"minutes": 10**400}, "minutes is 10+; expected a number above 0"),
    "seed": ({"seed": -1}, "seed is -1"),
    "huge seed": ({"seed": 10**30}, "seed is 10+; expected a whole number of at least 0"),
    "min_known text": ({"min_known": "a"}, "min_known is 'a'; expected a number from 0 to 1"),
    "min_known nan": ({"min_known": float("nan")}, "min_known is nan; expected a number from 0 to 1"),
    "min_known high": ({"min_known": 2}, "min_known is 2; expected a number from 0 to 1"),
    "min_known low": ({"min_known": -1}, "min_known is -1; expected a number from 0 to 1"),
    "mean": ({"mean": [0.5] * 3}, "mean is given alone; pass both mean and std"),
    "values": ({"mean": [0.5] * 2, "std": [1] * 2}, "mean has 2 values, but the model takes images of 3 channels"),
    "std": ({"mean": [0.5] * 3, "std": [0] * 3}, "std is .* expected numbers above 0"),
    "words": ({"mean": "abc", "std": [1] * 3}, "mean is 'abc'; expected one number per channel"),
    "processor": ({"processor": 1}, "processor is a int; expected an image processor of transformers"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_do_not_exist_or_fit_are_refused(trained, case):
    model, images, labels = trained
    options, message = BAD_OPTIONS[case]
    refused(message, model, images[:2], labels[:2], **options)


BAD_MODELS = {
    "name": (lambda net: "resnet20", "model is a str; expected a torch.nn.Module"),
    "scripted": (torch.jit.script, "model is scripted or traced by torch.jit.* expected the torch.nn.Module"),
    "scripted inside": (lambda net: nn.Sequential(torch.jit.script(net)), "or a module in it is"),
    "weightless": (lambda net: nn.Flatten(), "model has no weights; expected a classifier"),
    "probabilities": (lambda net: nn.Sequential(net, nn.Softmax(1)), "the model returns probabilities, .* Softmax"),
    "sigmoid": (lambda net: nn.Sequential(net, nn.Sigmoid()), "as a Sigmoid does"),
    "half": (lambda net: net.half(), r"weights in float16; pass model.float\(\)"),
    "meta": (lambda net: net.to("meta"), "weights on meta; move it to one device"),
    "frozen": (lambda net: net.requires_grad_(False), "no weight of the model requires a gradient"),
    "size": (lambda net: nn.Sequential(nn.AvgPool2d(2), net), "does not accept images of 8 x 8 pixels"),
    "nan": (lambda net: nn.Sequential(net, Log()), "logits that are not finite for image 0 of images"),
}


class Log(nn.Module):
    def forward(self, logits):
        return torch.log(-1 - logits.abs())


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_unlearned_are_refused(trained, case):
    model, images, labels = trained
    change, message = BAD_MODELS[case]
    refused(message, change(model), images[:2], labels[:2])


def refused(message, *arguments, **options):
    """Check that a call is refused with one sentence, which names no flag of a script."""
    with pytest.raises(InputError) as caught:
        l2ul.forget(*arguments, **options)
    sentence = str(caught.value)
    assert re.search(message, sentence), sentence
    assert "--" not in sentence
    assert "\n" not in sentence
    assert not sentence.endswith(".")


def test_advice_names_arguments(trained):
    model, images, labels = trained
    wrong = (labels[:16] + 1) % CLASSES
    order = "likely causes are another order or numbering of the classes, another input range .* \\(mean, std\\), "
    refused(f"{order}another image size, .*; correct them, or add min_known=0 to go on$", model, images[:16], wrong)
    flat = copy.deepcopy(model)
    flat.head.weight.data *= 1e-3
    flat.head.bias.data = torch.tensor([0.0, 9, 0, 1, 0])
    of_255 = r"mean=\(0.0, 0.0, 0.0\), std=\(0.00392157, 0.00392157, 0.00392157\) for pixels from 0 to 255\)"
    labels_help = "or another image size; pass labels to have alternatives tried, or add min_known=0 to skip"
    refused(f"{of_255} {labels_help}", flat, images[:6])
    grey = nn.Sequential(Grey(), flat)
    refused(r"mean=\(0.0,\), std=\(0.00392157,\) for pixels from 0 to 255", grey, images[:6, :1])
    several = copy.deepcopy(model)
    levels = torch.tensor([3.0, 3, -4, -4, -4])
    several.register_forward_hook(lambda net, inputs, output: levels + 0.1 * output.tanh())
    refused("or add single_label=True if it is one$", several, images[:6])
    several.register_forward_pre_hook(fail)
    refused("same device.*, or move the model to the CPU$", several, images[:2])


def test_no_mean_and_std_are_advised_for_a_classifier_that_contains_them(trained):
    model, images, labels = trained

    def classifier(net, mean, std):
        return Classifier("tiny", CLASSES, net, nn.Sequential(Normalize([mean] * 3, [std] * 3))).eval()

    def refused_without(message, *arguments):
        with pytest.raises(InputError, match=message) as caught:
            l2ul.forget(*arguments, **STORED)
        assert not re.search(r"mean=|std=|\(mean|as mean", str(caught.value)), caught.value

    right, wrong = classifier(model, 0.0, 1.0), (labels[:16] + 1) % CLASSES
    inside = "leave out the normalisation, which the model contains"
    refused_without(inside, right, images[:2] / 255 * 8 - 2, labels[:2])
    refused_without(f"clamp them, or {inside}", right, images[:2] / 255 - 0.1, labels[:2])
    causes = "another input range or normalisation than in training, another image size"
    refused_without(causes, right, images[:16], wrong)
    flat = copy.deepcopy(model)
    flat.head.weight.data *= 1e-3
    flat.head.bias.data = torch.tensor([0.0, 9, 0, 1, 0])
    refused_without("normalisation than in training or another image size", classifier(flat, 0.0, 1.0), images[:6])
    other = classifier(model, 5.0, 0.01)
    assert (other(images[:16] / 255).argmax(1) == labels[:16]).float().mean() < 0.5
    found = "but 16 of 16 with pixels .*: change the model, the images or the labels accordingly"
    refused_without(found, other, images[:16], labels[:16])


def fail(module, inputs):
    raise RuntimeError("Expected all tensors to be on the same device")


def test_the_warning_names_the_limit_that_stopped_the_run(trained, monkeypatch):
    model, images, labels = trained
    monkeypatch.setattr(TimeBudget, "left", 0.0)
    with pytest.warns(NotForgotten, match="; minutes stopped the run at step 1: use a larger limit$"):
        l2ul.forget(model, images[:2], labels[:2], **STORED)


def test_advice_with_a_flag_that_is_no_argument_is_left_out(trained, tmp_path, monkeypatch):
    model, *_ = trained
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refused("pillow-heif.; install pillow-heif, or replace or remove it$", model, [tmp_path / "x.heic"])
    grey, colour = tmp_path / "grey.tif", tmp_path / "colour.png"
    Image.fromarray(np.full((8, 8), 9, np.float32)).save(grey)
    refused(
        r"^cannot read the image .*grey.tif \(grey levels from 9 to 9, expected 0 to 1\); convert to 8 bits, "
        "or replace or remove it$",
        model,
        [grey],
    )
    Image.new("RGB", (8, 8)).save(colour)
    monkeypatch.setattr("l2ul.deletion.forget.ImageReader", functools.partial(ImageReader, max_pixels=63))
    refused(r"^cannot read the image .*colour.png \(64 pixels, .*\); replace or remove it$", model, [colour])


def test_importing_the_package_imports_no_torch():
    code = "import sys, l2ul; assert not {'torch', 'numpy'} & sys.modules.keys(); assert 'forget' in dir(l2ul)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="module 'l2ul' has no attribute 'remember'"):
        l2ul.remember  # noqa: B018


def test_a_model_whose_outputs_are_constant_is_refused():
    net = tiny_net()
    nn.init.zeros_(net.head.weight)
    images = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    refused("gradient of the logits|predicts the label", net, images, [0, 1, 2, 3, 4, 0])


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_examples_of_the_documentation_run(page, trained, vit_folder, tmp_path, monkeypatch, recwarn):
    """Examples with l2ul.forget run with fixed settings in place of the search."""
    model, images, labels = trained
    names = {"model": model, "images": images[:2], "labels": labels[:2]}
    (tmp_path / "my_vit").symlink_to(vit_folder)
    for name, image in zip("ab", images, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(l2ul, "forget", functools.partial(l2ul.forget, **STORED))
    ran = 0
    for block in blocks(page):
        if any(text in block for text in ("my_method.py", "a timm model", "digits_resnet20")):
            continue
        for value in ("num_classes=10", "iterations=50", "max_passes=100"):
            block = block.replace(value, f"{value.split('=')[0]}={CLASSES}")
        exec(compile(block, page, "exec"), names)
        ran += 1
    assert ran == {"README.md": 1, "docs/python.md": 4}[page]


def test_the_example_with_the_digits_runs_in_a_clone(monkeypatch, recwarn):
    monkeypatch.chdir(ROOT)
    (block,) = (block for block in blocks("docs/python.md") if "digits_resnet20" in block)
    names = {}
    quicker = block.replace('"distill_steps": 100, "distill_mixes": 32', '"distill_steps": 2, "distill_mixes": 4')
    assert quicker != block
    exec(compile(quicker, "docs/python.md", "exec"), names)
    assert names["result"].recognised.tolist() == [True] * 8


def test_a_timm_model_with_the_normalisation_of_its_configuration(recwarn):
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    images = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    refused("ResNet of timm, which usually takes normalised pixels.*see its pretrained_cfg", net, images)
    mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    result = l2ul.forget(net, images, mean=mean, std=std, **STORED)
    inputs = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert result.labels.tolist() == net(inputs).argmax(1).tolist()
        assert result.predictions_after.tolist() == result.model(inputs).argmax(1).tolist()


def test_the_fields_and_arguments_of_the_documentation_exist():
    page = (ROOT / "docs" / "python.md").read_text()
    for name in (one.name for one in dataclasses.fields(Forgotten) if one.name != "model"):
        assert re.search(rf"^\| .*`{name}`.* \|", page, re.MULTILINE), name
    parameters = inspect.signature(l2ul.forget).parameters
    for name in set(parameters) - {"model", "images", "labels", "settings"}:
        assert re.search(rf"^\| `(\w+`, `)?{name}`", page, re.MULTILINE), name
