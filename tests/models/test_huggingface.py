"""Hugging Face classifiers: their processor as layers, loading and saving."""

import json
from pathlib import Path
import shutil

import pytest
from safetensors.torch import load_file, save_file
import torch
from torch import nn

from l2ul import models
from l2ul.common.errors import InputError
from l2ul.deletion.deployed_model import open_model
from l2ul.methods import distill
from l2ul.models import huggingface
from l2ul.unlearn import Settings, unlearn

PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 48, "width": 32}, "image_mean": [0.5, 0.4, 0.3]},
    "DeiTImageProcessor": {},
    "CLIPImageProcessor": {"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
    "MobileNetV2ImageProcessor": {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}},
    "BitImageProcessor": {"do_normalize": False},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_layers_equal_the_processor(tmp_path, kind):
    import transformers

    getattr(transformers, kind)(**PROCESSORS[kind]).save_pretrained(tmp_path)
    image = torch.randint(0, 256, (1, 3, 20, 30), generator=torch.Generator().manual_seed(0)).float()
    image = torch.nn.functional.interpolate(image, size=(120, 90), mode="bilinear").to(torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(image[0], return_tensors="pt")["pixel_values"]
    layers = huggingface._preprocess(f"hf:{tmp_path}")
    actual = layers(image / 255)
    assert actual.shape == expected.shape
    levels = (
        (actual - expected).abs() * layers[-1].std * 255
    )  # 8-bit levels: the processor rounds in each of two passes
    assert levels.max() < 2
    assert levels.mean() < 0.5


@pytest.mark.parametrize("kind", ["MobileViTImageProcessor", "LevitImageProcessor", "PerceiverImageProcessor"])
def test_a_processor_with_other_steps_raises_input_error(tmp_path, kind):
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{kind}.* does more than resize, centre crop and normalise"):
        huggingface._preprocess(f"hf:{tmp_path}")


def test_half_precision_weights_are_loaded_as_float32(vit_folder, tmp_path):
    import transformers

    transformers.AutoModelForImageClassification.from_pretrained(vit_folder).half().save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(vit_folder).save_pretrained(tmp_path)
    assert {p.dtype for p in models.load(f"hf:{tmp_path}", 10).parameters()} == {torch.float32}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_model(str(tmp_path))  # transformers takes the type of the weights then
    assert set(opened.dtypes.values()) == {torch.float16}
    (tmp_path / "new").mkdir()
    opened.write(opened.classifier, tmp_path / "new")
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "new" / "model")
    assert plain.dtype == torch.float16


def test_gradients_reach_the_pixels(vit_folder):
    classifier = models.load(f"hf:{vit_folder}", 10)
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    classifier(pixels)[0, 0].backward()
    assert pixels.grad[0].abs().max() > 0
    assert pixels.grad[1].abs().max() == 0


def test_a_saved_model_is_loaded_by_plain_transformers_code(vit_folder, tmp_path):
    import transformers

    classifier = models.load(f"hf:{vit_folder}", 10)
    with torch.no_grad():
        classifier.net.classifier.bias += 1.0
    models.save(classifier, tmp_path / "unlearned", {"k": 1})
    net = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "unlearned").eval()
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "unlearned")
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.allclose(net(classifier.preprocess(pixels)).logits, classifier(pixels), atol=1e-6)
    assert torch.allclose(models.load(f"hf:{tmp_path / 'unlearned'}", 10)(pixels), classifier(pixels), atol=1e-6)
    assert models.build(f"hf:{vit_folder}", 3)(pixels).shape == (2, 3)


def test_a_bad_folder_raises_input_error(vit_folder, tmp_path):
    with pytest.raises(InputError, match="has 10 classes, but the data set has 7"):
        models.load(f"hf:{vit_folder}", 7)
    with pytest.raises(InputError, match="cannot load hf:.*expected what save_pretrained writes"):
        models.load(f"hf:{tmp_path}", 10)
    (tmp_path / "config.json").write_text((vit_folder / "config.json").read_text())
    state = load_file(vit_folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks weights of its own network .classifier.weight"):
        models.load(f"hf:{tmp_path}", 10)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_gradients_equal_those_through_the_resize_of_the_processor(tmp_path, resample):
    import transformers

    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    net = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=96, patch_size=16, num_labels=10, **size)
    )
    net.eval().save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}, resample=resample).save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    # values away from 0 and 1, where bicubic overshoot is clamped
    images = 0.4 + 0.2 * torch.rand(2, 3, 32, 32)

    def gradient(logits_of):
        pixels = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(logits_of(pixels).logsumexp(1).sum(), pixels)
        return found

    ours = gradient(models.load(f"hf:{tmp_path}", 10))
    theirs = gradient(lambda x: net(processor(x, return_tensors="pt", do_rescale=False)["pixel_values"]).logits)
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("resample", [0, 1])
def test_layers_resize_with_the_filter_of_the_processor(resample):
    import transformers

    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48}, resample=resample)
    noise = torch.randint(0, 256, (3, 80, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = huggingface.processor_layers(processor, "some")(noise[None] / 255)
    difference = (ours - processor(noise, return_tensors="pt")["pixel_values"]).abs() * processor.image_std[0] * 255
    assert difference.mean() < 1  # of 255 levels; 11 or more with a bilinear filter


def test_a_filter_that_torch_does_not_have_is_refused():
    import transformers

    processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48}, resample=4)
    with pytest.raises(InputError, match="resizes with the filter 4, which torch does not have"):
        huggingface.processor_layers(processor, "some")


def test_a_size_that_is_too_large_is_not_taken_for_a_filter():
    def processor(pixels, return_tensors):
        return {"pixel_values": None}

    processor.do_resize, processor.size, processor.resample = True, {"shortest_edge": 10_000}, 2
    with pytest.raises(InputError, match="which resizing the short side to 10000 enlarges to"):
        huggingface.processor_layers(processor, "some")


def test_distill_keeps_what_the_layers_of_a_vit_are_given(vit_folder):
    model = models.load(f"hf:{vit_folder}", 10)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        labels = model(images).argmax(1)
    teacher = distill.Teacher(model, images)
    weighted = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(teacher.layers) == len(weighted) - 1 == 2 * 6 + 1  # of each block six; the classifier; not the patches
    assert [gap.item() for gap in teacher.gaps(model, images)] == pytest.approx([0.0, 0.0], abs=1e-6)
    outcome = unlearn(model, images, labels, "distill", settings=Settings(distill_steps=10, distill_mixes=4))
    assert outcome.status == "forgotten"


@pytest.fixture
def folder(vit_folder, tmp_path):
    """A copy of the folder of a model."""
    return Path(shutil.copytree(vit_folder, tmp_path / "model"))


def test_an_adapter_is_refused_with_the_command_that_merges_it(folder):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "base/vit-1.0"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter of peft.*merge_and_unload") as raised:
        models.load(f"hf:{folder}", 10)
    assert "M.from_pretrained('base/vit-1.0')" in str(raised.value)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="adapter of peft"):
        huggingface.configuration(f"hf:{folder}")


@pytest.mark.parametrize("base", ["a'; rm -r x; '", "$(rm -r x)", "-c", 7, None])
def test_a_command_in_a_message_has_no_text_of_a_file_that_a_shell_would_run(folder, base):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(InputError, match="M.from_pretrained.'BASE_MODEL'"):
        models.load(f"hf:{folder}", 10)


def test_weights_of_an_adapter_inside_the_weights_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"vit.x.lora_A.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights of an adapter \(vit.x.lora_A.weight\)"):
        models.load(f"hf:{folder}", 10)


@pytest.mark.parametrize(
    ("file", "key"),
    [("config.json", "AutoModelForImageClassification"), ("preprocessor_config.json", "AutoImageProcessor")],
)
def test_a_folder_with_code_of_its_own_is_refused(folder, file, key):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"auto_map": {"AutoConfig": "a.B", key: "own.Thing"}}))
    with pytest.raises(InputError, match=r"has code of its own \(own.Thing\), which is not run, .*; remove auto_map"):
        models.load(f"hf:{folder}", 10)


def test_what_is_not_read_is_listed(folder):
    assert models.load(f"hf:{folder}", 10).not_read == []
    state = load_file(folder / "model.safetensors")
    save_file(state | {"pooler.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    for name in ("optimizer.pt", "trainer_state.json", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
    (folder / "checkpoint-5").mkdir()
    listed = ["checkpoint-5/", "optimizer.pt", "pytorch_model.bin", "trainer_state.json", "pooler.weight (weights)"]
    assert models.load(f"hf:{folder}", 10).not_read == listed


def test_the_parts_of_sharded_weights_are_read(folder):
    import transformers

    net = transformers.AutoModelForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*"))) > 1
    assert models.load(f"hf:{folder}", 10).not_read == []


def test_a_model_folder_of_timm_is_refused_with_its_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 10}))
    with pytest.raises(InputError, match=rf"is a model of timm, not of transformers; give --model timm:{tmp_path}$"):
        models.load(f"hf:{tmp_path}", 10)


@pytest.mark.parametrize(("file", "library"), huggingface.OTHER_LIBRARIES.items())
def test_a_folder_of_another_library_is_named(tmp_path, file, library):
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=f"is a model folder of {library}"):
        open_model(str(tmp_path))
