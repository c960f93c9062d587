"""The cache of tensors, and adversarial sets made with and without it."""

import copy
import dataclasses
import importlib.util
import os
from pathlib import Path
import sys
import types

from conftest import CLASSES, ROOT
import pytest
from safetensors.torch import load_file, save_file
import torch

from l2ul import attack, models
from l2ul.common.cache import Cache, code_of_model, model_fingerprint
from l2ul.data import datasets
from l2ul.data.images import as_pixels
from l2ul.experiments import adversarial_sets
from l2ul.experiments.adversarial_sets import Attack
from l2ul.methods.settings import AttackSettings

HOW = Attack(CLASSES, AttackSettings(4, eps=1.0, alpha=0.2, iterations=5), seed=3, batch_size=16)


def make(how, trained, where, cache=None, position=0):
    model, images, labels = trained
    done = []
    made = how.make(model, images[where], labels[where], position, cache=cache or Cache(), progress=done.append)
    return made, sum(done)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("examples", "targets", "hits"))


@pytest.fixture
def attacked(monkeypatch):
    """Return a list to which each attack appends its number of images."""
    sizes, true_set = [], attack.adversarial_set
    monkeypatch.setattr(
        adversarial_sets.attack,
        "adversarial_set",
        lambda m, x, *a, **o: sizes.append(len(x)) or true_set(m, x, *a, **o),
    )
    return sizes


def test_returns_what_was_stored_under_the_same_key(tmp_path):
    cache = Cache(tmp_path)
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.tensor([True, False])}
    assert cache.get({"x": 1}) is None
    cache.put({"x": 1}, tensors)
    found = cache.get({"x": 1})
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert cache.get({"x": 2}) is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert cache.get({"x": 1}) is None
    cache.put({"x": 1}, tensors)
    assert cache.get({"x": 1}) is not None
    assert Cache().get({"x": 1}) is None


def test_least_recently_used_entries_are_deleted_first(tmp_path):
    cache = Cache(tmp_path, limit=3000)
    for number in range(3):
        cache.put({"x": number}, {"a": torch.zeros(200)})  # 800 bytes and a header
        os.utime(cache._path({"x": number}), (number, number))
    cache.get({"x": 0})
    cache.put({"x": 3}, {"a": torch.zeros(200)})
    cache.trim()
    assert [cache.get({"x": number}) is not None for number in range(4)] == [True, False, True, True]
    cache.put({"x": 4}, {"a": torch.zeros(1000)})  # more than all of it
    assert cache.get({"x": 4}) is None


def test_a_full_disk_is_not_an_error(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    Cache(tmp_path).put({"x": 1}, {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_folder_are_kept(tmp_path):
    (tmp_path / "resnet50.safetensors").write_bytes(b"0" * 5000)
    (tmp_path / "l2ul-folder.safetensors").mkdir()
    cache = Cache(tmp_path, limit=1000)
    cache.put({"x": 0}, {"a": torch.zeros(200)})
    cache.put({"x": 1}, {"a": torch.zeros(200)})
    cache.trim()
    assert (tmp_path / "resnet50.safetensors").exists()
    assert (tmp_path / "l2ul-folder.safetensors").exists()


def test_the_last_gib_of_a_disk_stays_free(tmp_path, monkeypatch):
    monkeypatch.setattr("l2ul.common.cache.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**30 + 100}))
    Cache(tmp_path).put({"x": 0}, {"a": torch.zeros(200)})
    assert list(tmp_path.iterdir()) == []


def own_net(tmp_path, monkeypatch, name, forward):
    """Return an instance of a class Net from a new file, with this expression as its forward pass."""
    lines = ["import torch", "class Net(torch.nn.Module):", f"    def forward(self, x): return {forward}"]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.Net()


def test_fingerprints_of_own_models_depend_on_their_code(tmp_path, monkeypatch):
    one = own_net(tmp_path, monkeypatch, "one", "x.mean((2, 3))")
    same_code = own_net(tmp_path, monkeypatch, "same", "x.mean((2, 3))")
    edited = own_net(tmp_path, monkeypatch, "edited", "x.amax((2, 3))")
    assert repr(one) == repr(edited)
    assert model_fingerprint(one) == model_fingerprint(same_code) != model_fingerprint(edited)
    for net, value in ((one, 1.0), (same_code, 2.0)):
        net.register_buffer("scale", torch.tensor(value), persistent=False)
    assert model_fingerprint(one) != model_fingerprint(same_code)


def import_file(path, monkeypatch, name):
    """Import a file as a new module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("edited", ["base", "helper", "hook"])
def test_fingerprints_depend_on_all_files_of_the_user(tmp_path, monkeypatch, edited):
    files = {
        "helper": "FACTOR = 1.0\ndef scaled(x): return FACTOR * x",
        "base": "import torch\nfrom helper import scaled\nclass Base(torch.nn.Module):\n"
        "    def forward(self, x): return scaled(x) * 1.0",
        "hook": "def doubled(module, inputs): return tuple(x * 1.0 for x in inputs)",
        "net": "from base import Base\nimport hook\nclass Net(Base): pass\n"
        "def build():\n    net = Net()\n    net.register_forward_pre_hook(hook.doubled)\n    return net",
    }

    def fingerprint(folder, texts):
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(text)
            module = import_file(folder / f"{name}.py", monkeypatch, name)
        return model_fingerprint(module.build())

    first = fingerprint(tmp_path / "first", files)
    assert fingerprint(tmp_path / "same", files) == first
    assert fingerprint(tmp_path / "edited", files | {edited: files[edited].replace("1.0", "2.0")}) != first


def test_code_is_that_which_was_loaded(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("import torch\nclass Net(torch.nn.Module): pass")
    mine = import_file(path, monkeypatch, "mine")
    monkeypatch.setitem(models.OWN, "mine", None)
    models.register("mine", mine.Net)
    before = code_of_model(mine.Net())
    path.write_text("import torch\nclass Net(torch.nn.Module): edited = True")
    assert code_of_model(mine.Net()) == before
    assert code_of_model(import_file(path, monkeypatch, "mine").Net()) != before


def test_models_of_this_project_have_no_code_of_the_user():
    assert code_of_model(models.build("resnet20", 10)) is None
    assert code_of_model(models.build("torchvision:resnet18", 10)) is None


def test_a_library_in_another_folder_is_no_code_of_the_user(tmp_path, monkeypatch):
    for folder, is_own in (("site-packages", False), ("mine", True)):
        path = tmp_path / folder / "layers.py"
        path.parent.mkdir()
        path.write_text("import torch\nclass Net(torch.nn.Module): pass")
        code = code_of_model(import_file(path, monkeypatch, "layers").Net())
        assert (code is not None) == is_own


def test_fingerprints_depend_on_versions_of_libraries(monkeypatch):
    library = types.ModuleType("library")
    library.__version__ = "1.0"
    monkeypatch.setitem(sys.modules, "library", library)
    net = type("Layer", (torch.nn.Linear,), {"__module__": "library.layers"})(2, 2)
    before = model_fingerprint(net)
    assert model_fingerprint(net) == before
    library.__version__ = "1.1"
    assert model_fingerprint(net) != before


class Heads(torch.nn.Linear):
    """A layer whose setting is not in its repr."""

    def __init__(self, heads):
        super().__init__(4, 4)
        self.heads = heads

    def forward(self, x):
        return super().forward(x).unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)


def test_fingerprints_depend_on_settings_that_layers_do_not_show():
    two, four = Heads(2), Heads(4)
    four.load_state_dict(two.state_dict())
    assert repr(two) == repr(four)
    assert model_fingerprint(two) != model_fingerprint(four)
    four.heads = 2
    assert model_fingerprint(two) == model_fingerprint(four.eval())


@dataclasses.dataclass
class Configuration:
    depth: int
    scale: torch.Tensor | None = None


class Options:
    def __init__(self, scale):
        self.scale, self._last_used = scale, object()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.4])),
        ({"depth": 2, "net": torch.nn.ReLU()}, {"depth": 3, "net": torch.nn.ReLU()}),
        (Configuration(2, torch.ones(2)), Configuration(2, torch.zeros(2))),
        (types.SimpleNamespace(scale=1.0), types.SimpleNamespace(scale=2.0)),
        ({"of": Options(1.0)}, {"of": Options(2.0)}),
        (torch.relu, torch.tanh),
        (torch.nn.functional.gelu, torch.nn.functional.relu),
        ([1, 2], [1, 3]),
    ],
)
def test_fingerprints_depend_on_settings_that_are_no_single_values(first, second):
    nets = Heads(2), Heads(2), Heads(2)
    for net, value in zip(nets, (first, copy.deepcopy(first), second), strict=True):
        net.load_state_dict(nets[0].state_dict())
        net.setting = value
    assert model_fingerprint(nets[0]) == model_fingerprint(nets[1]) != model_fingerprint(nets[2])
    nets[0].last_output = torch.zeros(100, 100)  # may change with every pass
    assert model_fingerprint(nets[0]) == model_fingerprint(nets[1])


def test_fingerprints_of_models_whose_settings_contain_themselves():
    one, other = Heads(2), Heads(2)
    other.load_state_dict(one.state_dict())
    for net, depth in ((one, 1), (other, 2)):
        net.options = {"depth": depth}
        net.options["parent"] = net.options
    assert model_fingerprint(one) == model_fingerprint(one) != model_fingerprint(other)


@pytest.mark.parametrize(("draws", "first", "then"), [(5, 3, 6), (1, 15, 16), (3, 1, 2), (20, 1, 4), (7, 2, 5)])
def test_examples_do_not_depend_on_what_is_cached(tmp_path, draws, first, then):
    net = models.load("resnet20", 10, ROOT / "data" / "weights" / "digits_resnet20.safetensors")
    images = datasets.load("digits", "nowhere").train.images
    problem = net, images, torch.arange(len(images)) % 10
    how = Attack(10, AttackSettings(draws, eps=1.0, alpha=0.2, iterations=4), seed=0)
    expected, _ = make(how, problem, slice(0, then))
    make(how, problem, slice(0, first), Cache(tmp_path))
    assert same(make(how, problem, slice(0, then), Cache(tmp_path))[0], expected)


def test_fingerprints_depend_on_layers_and_weights(trained):
    model, *_ = trained
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    model.features[3].stride = (1, 1)  # the same weights
    assert model_fingerprint(model) != first
    model.features[3].stride = (2, 2)
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    assert model_fingerprint(model) != first


def test_only_missing_examples_are_made_and_are_equal_bit_for_bit(trained, tmp_path, attacked):
    cache = Cache(tmp_path)
    whole, done = make(HOW, trained, slice(0, 10))
    assert done == 10 * 4 * 5
    assert attacked == [4, 4, 2]  # 16 pairs at a time
    attacked.clear()
    few, _ = make(HOW, trained, slice(0, 3), cache)
    assert attacked == [3]
    assert torch.equal(few.examples, whole.examples[:12])
    attacked.clear()
    again, done = make(HOW, trained, slice(0, 10), cache)
    assert (attacked, done) == ([4, 3], 10 * 4 * 5)
    assert same(again, whole)
    attacked.clear()
    assert same(make(HOW, trained, slice(0, 10), cache)[0], whole)
    later, _ = make(HOW, trained, slice(4, 8), cache, position=4)  # as in a step of a continual run
    assert torch.equal(later.examples, whole.examples[16:32])
    assert attacked == []


def changed(**values):
    """Return HOW with other values of its fields, or of its settings."""
    own = {name: values.pop(name) for name in ("seed", "num_classes") if name in values}
    return dataclasses.replace(HOW, settings=dataclasses.replace(HOW.settings, **values), **own)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 1.1}, {"alpha": 0.3}, {"iterations": 6}, {"seed": 4}, {"num_adv_images": 5}, {"dtype": "uint8"},
        {"num_classes": CLASSES - 1},
    ],
)  # fmt: skip
def test_another_setting_is_another_entry(trained, tmp_path, attacked, change):
    cache = Cache(tmp_path)
    make(HOW, trained, slice(0, 2), cache)
    attacked.clear()
    make(changed(**change), trained, slice(0, 2), cache)
    assert attacked == [2]


def test_other_images_positions_labels_and_models_are_other_entries(trained, tmp_path, attacked):
    model, images, labels = trained
    cache = Cache(tmp_path)
    make(HOW, trained, slice(0, 2), cache)
    attacked.clear()
    make(HOW, trained, slice(0, 2), cache, position=1)
    make(HOW, (model, images, (labels + 1) % CLASSES), slice(0, 2), cache)
    make(HOW, (model, 255 - images, labels), slice(0, 2), cache)
    with torch.no_grad():
        model.head.weight.mul_(1.01)
    make(HOW, trained, slice(0, 2), cache)
    assert attacked == [2] * 4


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_hits_are_those_of_the_stored_examples(trained, dtype):
    model = trained[0]
    made, _ = make(changed(iterations=30, eps=3.0, dtype=dtype), trained, slice(0, 6))
    with torch.no_grad():
        predictions = model(as_pixels(made.examples)).argmax(1)
    assert torch.equal(made.hits, predictions == made.targets)
    assert made.success == 100 * made.hits.float().mean().item() > 0
    made.seconds = 6.0
    head = made.head(8)
    assert (head.success, head.seconds) == (100 * made.hits[:8].float().mean().item(), 2.0)
    assert torch.equal(head.examples, made.examples[:8])


def test_entries_of_older_versions_are_read(trained, tmp_path, attacked):
    cache = Cache(tmp_path)
    expected, _ = make(HOW, trained, slice(0, 2), cache)
    for file in tmp_path.glob("*.safetensors"):  # older versions also stored the hits before rounding
        part = load_file(file)
        save_file(part | {"exact_hits": ~part["hits"]}, file)
    attacked.clear()
    assert same(make(HOW, trained, slice(0, 2), cache)[0], expected)
    assert attacked == []


def test_states_the_batch_size_that_fits_in_memory(trained, tmp_path, monkeypatch):
    true_attack = attack.pgd_l2

    def small_memory(model, x, *arguments, **options):
        if len(x) > 5:
            raise torch.OutOfMemoryError("too much")
        return true_attack(model, x, *arguments, **options)

    monkeypatch.setattr(attack, "pgd_l2", small_memory)
    assert make(HOW, trained, slice(0, 4), Cache(tmp_path))[0].batch_size == 4
    monkeypatch.undo()
    assert make(HOW, trained, slice(0, 6), Cache(tmp_path))[0].batch_size == 16  # of the examples made in this call


def test_consecutive_positions_are_cut_to_chunks():
    assert list(adversarial_sets._consecutive([], 3)) == []
    assert list(adversarial_sets._consecutive([0, 1, 2, 3, 6, 8, 9], 3)) == [(0, 3), (3, 4), (6, 7), (8, 10)]


def test_an_interrupted_process_keeps_what_it_finished(trained, tmp_path, attacked, monkeypatch):
    cache, true_set = Cache(tmp_path), attack.adversarial_set

    def stopped(model, images, *arguments, **options):
        if options["first_position"] == 8:
            raise KeyboardInterrupt
        return true_set(model, images, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(adversarial_sets.attack, "adversarial_set", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(HOW, trained, slice(0, 10), cache)
    attacked.clear()
    make(HOW, trained, slice(0, 10), cache)
    assert attacked == [2]
