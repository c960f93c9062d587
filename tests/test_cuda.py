"""The project on a CUDA GPU: every method, goal and group of metrics, requests, pretraining, and what CUDA refuses.

On a machine without a GPU, `test_emulated_cuda.py` runs these tests on an emulated one.
"""

import sys

from conftest import CLASSES, save_images
from helpers import load_records
import pytest
import torch
from torch import nn

import l2ul
from l2ul import attack, importance, models, objective, unlearn
from l2ul.cli import pretrain_command
from l2ul.common import precision
from l2ul.common.choices import STAND_INS
from l2ul.common.nested import upload_together
from l2ul.data import storage
from l2ul.data.changes import KINDS, Changes
from l2ul.data.folder import FolderImages
from l2ul.data.images import Split
from l2ul.methods import registry, robust
from l2ul.methods.checkpoint import Checkpoint
from l2ul.methods.fixed_length_procedure import FixedLengthProcedure
from l2ul.methods.settings import AttackSettings, Settings
from l2ul.metrics import accuracy, groups, relearn, robustness
from l2ul.metrics.registry import EVALUATIONS
from l2ul.training.recipe import Recipe
import main_forget
import main_unlearn

pytestmark = pytest.mark.cuda
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ATTACK = {"num_adv_images": 2, "eps": 0.5, "alpha": 0.2, "steps": 2, "seed": 0}
LOOP = {"batch_size": 2, "adv_batch_size": 3, "max_passes": 1, "bn": "eval"}
LOOP |= {"distill_steps": 2, "distill_cycles": 1, "distill_mixes": 4}
POOL = {"distill_pool": 4, "distill_pool_steps": 2}  # of synthesised images
SHORT = {"epochs": 1, "batch": 16, "augment": 2, "iterations": 2, "copies": 2}  # of methods of fixed length
CLOSE = {"rel": 1e-2, "abs": 1e-3}  # a GPU adds in another order
RANDOM = {"bad_teaching"}  # draw from the generator of the device, whose numbers are not those of the CPU
emulated_cuda = sys.modules.get("emulated_cuda")


@pytest.fixture(autouse=True)
def _exact():
    """Compute in fp32, as the CPU does."""
    precision.use(CUDA, "fp32")
    yield
    precision.use(CUDA, "fp32")


def small_net(num_classes):
    """Return a network for images of any size, with batch-norm and a convolution of 1 x 1 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


@pytest.mark.parametrize("goal", ["misclassify", "relabel"])
@pytest.mark.parametrize("method", registry.METHODS)
def test_a_method_computes_what_it_computes_on_the_cpu(trained, method, goal):
    if goal not in registry.METHODS[method].goals:
        pytest.skip("the method has another goal")
    model, images, labels = trained
    own = {name: SHORT[name] for name in registry.METHODS[method].all_settings.keys() & SHORT.keys()}
    curves = []
    for device in (CPU, CUDA):
        on_device = [tensor.to(device) for tensor in (images[:4], labels[:4], (labels[:4] + 1) % CLASSES)]
        outcome = unlearn.unlearn(
            model.to(device),
            *on_device[:2],
            method,
            num_classes=CLASSES,
            new_labels=on_device[2] if goal == "relabel" else None,
            retain=Split(images[4:], labels[4:]).to(device),
            attack=AttackSettings(num_adv_images=2, eps=0.5, alpha=0.2, iterations=2),
            settings=Settings(**LOOP, method_settings=own),
        )
        assert outcome.status in ("cap", "forgotten", "done")
        tensors = [*outcome.model.parameters(), *outcome.model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {device.type}
        curves.append(outcome.curve)
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    if method not in RANDOM and curves[0]:
        assert curves[1][0] == pytest.approx(curves[0][0], **CLOSE)


def test_attack_importance_and_predictions_are_those_of_the_cpu(trained):
    model, images, labels = trained
    results = {}
    for device in (CPU, CUDA):
        net, some = model.to(device), images[:4].to(device)
        adversarial, targets = attack.adversarial_set(net, some, labels[:4].to(device), CLASSES, **ATTACK)
        omega = importance.mas_importance(net, some)
        results[device] = adversarial.cpu(), targets.cpu(), *(values.cpu() for values in omega.values())
        assert torch.equal(accuracy.predict(net, images.to(device)), labels)  # of a copy on the device
        assert torch.equal(accuracy.predict(net, images), labels)  # of images that stay on the CPU
    for on_cpu, on_cuda in zip(*results.values(), strict=True):
        assert torch.allclose(on_cpu, on_cuda, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("chosen", precision.PRECISIONS)
def test_examples_of_every_precision_are_finite(trained, chosen):
    model, images, labels = (part.to(CUDA) for part in trained)
    precision.use(CUDA, chosen)
    examples, _ = attack.adversarial_set(model, images[:4], labels[:4], CLASSES, **ATTACK, precision=chosen)
    assert examples.dtype == torch.float32
    assert examples.isfinite().all()
    assert (examples[::2] - images[:4] / 255).flatten(1).norm(dim=1).max() < ATTACK["eps"] + 1e-3


def test_examples_on_disk_are_trained_on(trained, tmp_path, monkeypatch):
    model, images, labels = (part.to(CUDA) for part in trained)
    monkeypatch.setattr(storage, "_memory_limit", lambda device: 0)
    examples = storage.empty_images((8, 3, 8, 8), torch.uint8, CUDA, tmp_path)
    examples[:] = images[:8]
    assert examples.device.type == "cpu"
    options = {"adv": (examples, labels[:8]), "settings": Settings(**LOOP)}
    outcome = unlearn.unlearn(model, images[:2], labels[:2], "adv", **options)
    assert outcome.steps == 3


def test_an_interrupted_loop_continues(trained, tmp_path):
    model, images, labels = (part.to(CUDA) for part in trained)
    for method in ("neggrad", "distill"):
        arguments, state = (model, images[:4], labels[:4], method), tmp_path / f"{method}.pt"
        options = {"settings": Settings(**LOOP | {"max_passes": 3, "distill_steps": 6})}
        whole = unlearn.unlearn(*arguments, **options)

        def stop(row):
            if row["step"] == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            unlearn.unlearn(*arguments, **options, on_step=stop, checkpoint=Checkpoint(state))
        assert state.exists()
        outcome = unlearn.unlearn(*arguments, **options, checkpoint=Checkpoint(state))
        assert (outcome.status, outcome.steps) == (whole.status, whole.steps)
        assert outcome.curve[-1] == pytest.approx(whole.curve[-1], **CLOSE)


def test_weights_that_are_not_channels_last_are_trained():
    torch.manual_seed(0)
    model, images, labels = small_net(3).eval().to(CUDA), torch.rand(4, 3, 8, 8, device=CUDA), torch.arange(4) % 3
    for method in ("neggrad", "distill"):
        outcome = unlearn.unlearn(model, images, labels.to(CUDA), method, settings=Settings(**LOOP))
        assert outcome.steps


def test_a_vision_transformer_unlearns(vit_folder):
    model = models.load(f"hf:{vit_folder}", 10)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = accuracy.predict(model, images)
    model = model.to(CUDA)
    assert torch.equal(accuracy.predict(model, images.to(CUDA)), labels)
    for method in ("adv_imp", "distill"):
        options = {"num_classes": 10, "attack": AttackSettings(num_adv_images=2, iterations=2)}
        arguments = model, images.to(CUDA), labels.to(CUDA), method
        outcome = unlearn.unlearn(*arguments, **options, settings=Settings(**LOOP))
        assert outcome.status in ("cap", "forgotten")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(models, "OWN", dict(models.OWN))
    models.register("small", small_net, mean=[0.5] * 3, std=[0.5] * 3)


@pytest.fixture
def fast_metrics(monkeypatch):
    """Reduce every group of metrics to a fraction of a second."""
    small = {relearn: ("MAX_STEPS", "OTHER_STEPS"), groups: ("NUM_HELD_OUT", "NUM_SAMPLED", "NOISY_COPIES")}
    small |= {robustness: ("COPIES", "COPIES_OF_A_KIND", "NUM_MIXES")}
    for module, names in small.items():
        for name in names:
            monkeypatch.setattr(module, name, 4)


@pytest.mark.usefixtures("fast_metrics")
def test_scripts_train_unlearn_and_measure(script, run, small, tmp_path):
    """Train a classifier and one without D_f, compute every group of metrics, and carry out a continual run."""

    def pretrain(*arguments):
        recipe = Recipe(epochs=2, lr=0.1, batch_size=16, crop_padding=2)
        words = ["--data-dir", tmp_path, "--device", "cuda", *arguments]
        code, _, err = script(lambda: pretrain_command.main("x.py", "Train.", "digits", "small", recipe), *words)
        assert code == 0, err

    pretrain()
    pretrain("--exclude-k", 2, "--output", tmp_path / "retrained.safetensors")
    network = ["--data-dir", tmp_path, "--model", "small", "--device", "cuda", "--no-cache"]
    words = [*network, "--method", "adv_imp", "--save-model", "--evaluate", *EVALUATIONS]
    retrained = ["--retrained", tmp_path / "retrained.safetensors", "--references", tmp_path / "retrained.safetensors"]
    code, _, err = run(*words, *retrained)
    assert code == 0, err
    for record in load_records(tmp_path).values():
        assert record["device"] == torch.cuda.get_device_name()
        assert {name for group in EVALUATIONS.values() for name in group.names} <= record.keys()
        assert record["peak_memory_mib"] > 0
    code, _, err = run(*network, "--method", "adv", "--continual-step", 1)
    assert code == 0, err
    assert {record["continual_step"] for record in load_records(tmp_path).values()} == {None, 1, 2}


@pytest.mark.usefixtures("fast_metrics")
@pytest.mark.parametrize("words", [[], ["--method", "adv_imp", "--setting", "unlearn_lr=0.03", "momentum=0"]])
def test_a_request_is_carried_out_and_verified(forget, script, tmp_path, words):
    code, report, printed = forget("--device", "cuda", *words)
    assert code == 0, printed
    assert report["device"] == torch.cuda.get_device_name()
    words = ["--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", "--device", "cuda"]
    code, out, err = script(main_forget.main, *words, "--build", "conftest:tiny_net")
    assert code == 0, out + err


@pytest.mark.usefixtures("fast_report")
def test_a_module_forgets_images_in_memory(trained, recwarn):
    model, images, labels = trained
    short = {"distill_steps": 2, "distill_mixes": 4, "distill_cycles": 1, "surrogate": images[10:20]}
    result = l2ul.forget(model.to(CUDA), images[:2].to(CUDA) / 255, labels[:2], keep_images=images[2:4], **short)
    assert all(tensor.is_cuda for tensor in result.model.state_dict().values())
    assert result.forgotten_as_stored.equal(result.predictions_after != labels[:2])
    assert result.forgotten.equal(result.forgotten_as_used)


@pytest.mark.usefixtures("fast_metrics")
def test_images_in_folders_are_decoded_for_the_gpu(script, small, tmp_path, trained):
    _, images, labels = trained
    for part, count in (("train", 40), ("val", 10)):
        save_images(tmp_path / "data" / "things" / part, images[:count], labels[:count])
    models.save(models.build("small", CLASSES).eval(), tmp_path / "small.safetensors", {})
    words = ["--dataset", "things", "--data-dir", tmp_path / "data", "--image-size", 8, "--model", "small"]
    words += ["--checkpoint", tmp_path / "small.safetensors", "--result-dir", tmp_path, "--unlearn-k", 2]
    words += ["--method", "oracle", "finetune", "--max-passes", 1, "--setting", "epochs=1"]
    words += ["--evaluate", *(name for name, group in EVALUATIONS.items() if not group.compared_with)]
    code, _, err = script(main_unlearn.main, *words, "--device", "cuda", "--no-cache")
    assert code == 0, err


def test_workers_decode_images_after_the_gpu_was_used(trained, tmp_path):
    torch.zeros(1, device=CUDA)
    files = sorted(str(path) for path in save_images(tmp_path / "images", trained[1][:6]).iterdir())
    images = FolderImages(files, 8, short_side=8)
    batches = list(images.loader([torch.tensor([0, 1]), torch.tensor([2, 5])], CUDA, workers=2))
    assert [batch.device.type for batch in batches] == ["cuda", "cuda"]
    assert torch.equal(torch.cat(batches).cpu(), images[torch.tensor([0, 1, 2, 5])])


def test_what_cuda_refuses():
    here, there = torch.ones(2, 3), torch.ones(2, 3, device=CUDA)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        nn.functional.linear(there, torch.ones(1, 3))
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=CUDA, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="indices should be"):
        here[torch.tensor([0], device=CUDA)]
    assert (there + torch.tensor(1.0)).sum() == 12
    assert there[torch.tensor([1])].shape == (1, 3)
    assert there.cpu().numpy().sum() == 6


counts_kernels = pytest.mark.skipif(emulated_cuda is None, reason="the emulated device counts them")
STEPS = {  # most kernels of a step of ResNet-18, by method, mode of batch-norm and whether steps are CUDA graphs
    ("neggrad", "train", False): 255,
    ("adv", "train", False): 430,
    ("adv_imp", "train", False): 445,
    ("adv_imp", "eval", False): 285,
    ("distill", "eval", False): 575,
    ("adv_imp", "train", True): 20,
    (
        "distill",
        "eval",
        True,
    ): 7,  # copy, graph, two of Adam, graph of the monitor, two that bring its numbers to the CPU
}
PASSES = {"attack": (125, 0), "importance": (175, 0)}  # of an iteration of PGD, and of an image


@pytest.fixture(scope="module")
def resnet18():
    """Return a network, images and labels, of which none is ever forgotten."""
    torch.manual_seed(0)
    model = models.build("resnet18", 10).eval().to(CUDA).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (2, 3, 16, 16)).to(torch.uint8).to(CUDA)
    return model, images, accuracy.predict(model, images, fold=False).to(CUDA)


@pytest.fixture(scope="module")
def omega(resnet18):
    """Return the importance of the weights of the network."""
    return importance.mas_importance(resnet18[0], resnet18[1][:1])


@counts_kernels
@pytest.mark.parametrize(("method", "bn", "graph"), STEPS)
def test_a_step_has_few_kernels_and_one_synchronisation(resnet18, omega, method, bn, graph, monkeypatch):
    """The numbers hardly depend on the number and the size of the images in a step."""
    monkeypatch.setattr(objective.Forget, "is_forgotten", lambda self, predictions: predictions != predictions)
    steps = 5 if graph else 2  # a graph replaces the passes from the fourth step on
    rates = {"unlearn_lr": 1e-12, "distill_lr": 1e-12}
    settings = Settings(**LOOP | rates | {"bn": bn, "max_passes": steps, "distill_steps": steps})
    adv = torch.rand(3, 3, 16, 16, device=CUDA), torch.arange(3, device=CUDA)
    after = []
    with emulated_cuda.counting() as counts:
        on_step = lambda row: after.append((counts.copy(), row))  # noqa: E731
        unlearn.unlearn(
            *resnet18, method, adv=adv, importance=omega, settings=settings, on_step=on_step, cuda_graph=graph
        )
    step = after[-1][0] - after[-2][0]
    assert step.synchronisations.total() <= 1, step.synchronisations
    assert step.kernels.total() <= STEPS[method, bn, graph], step.kernels.most_common(40)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("neggrad", {}),
        ("adv_imp", {}),
        ("distill", {}),
        ("distill", {"distill_stand_ins": "+".join(STAND_INS), "distill_mixes": 9, **POOL}),
        ("distill", {"robust": 1, "robust_pool": 8, "robust_cycle": 1.0, "robust_images": 16}),
        ("adv_imp", {"loop_precision": "bf16"}),
        ("distill", {"loop_precision": "bf16"}),
    ],
)
def test_a_loop_of_cuda_graphs_ends_as_one_without(trained, method, changed, monkeypatch):
    monkeypatch.setattr(robust, "ITERATIONS", 4)
    model, images, labels = (part.to(CUDA) for part in trained)
    adv, sentences = (images[4:11], (labels[4:11] + 1) % CLASSES), []
    settings = Settings(**LOOP | {"batch_size": 4, "max_passes": 8, "distill_steps": 12, "unlearn_lr": 1e-5} | changed)
    options = {"adv": adv, "settings": settings, "report": sentences.append}
    arguments = model, images[:4], labels[:4], method
    outcomes = [unlearn.unlearn(*arguments, cuda_graph=graph, **options) for graph in (False, True)]
    assert sentences == []
    assert outcomes[0].steps == outcomes[1].steps >= 8
    for eager, graphed in zip(outcomes[0].curve, outcomes[1].curve, strict=True):
        assert graphed == pytest.approx(eager, **CLOSE)
    for eager, graphed in zip(outcomes[0].model.parameters(), outcomes[1].model.parameters(), strict=True):
        assert torch.allclose(eager, graphed, rtol=1e-2, atol=1e-4)


@counts_kernels
@pytest.mark.parametrize("method", [name for name, known in registry.METHODS.items() if known.is_fixed_length])
def test_no_step_of_a_method_of_fixed_length_waits_for_the_gpu(trained, method, monkeypatch):
    model, images, labels = (part.to(CUDA) for part in trained)
    monkeypatch.setattr(FixedLengthProcedure, "check_every", 1000)
    steps, take = [], unlearn._Loop._step

    def counted(loop):
        with emulated_cuda.counting() as counts:
            terms = take(loop)
        steps.append(counts)
        return terms

    monkeypatch.setattr(unlearn._Loop, "_step", counted)
    settings, retain = Settings(method_settings=SHORT | {"batch": 2}), Split(images[4:], labels[4:])
    unlearn.unlearn(model, images[:4], labels[:4], method, retain=retain, settings=settings)
    assert sum(counts.synchronisations.total() for counts in steps[1:]) == 0  # the first one prepares the method


@counts_kernels
@pytest.mark.parametrize("k", [1, 4])
def test_a_step_as_a_graph_has_as_few_launches_with_every_kind_of_stand_ins(trained, k, monkeypatch):
    monkeypatch.setattr(objective.Forget, "is_forgotten", lambda self, predictions: predictions != predictions)
    model, images, labels = (part.to(CUDA) for part in trained)
    kinds = {"distill_stand_ins": "+".join(STAND_INS), "distill_mixes": 20, "distill_surrogate": 0.25, **POOL}
    settings = Settings(**LOOP | kinds | {"distill_steps": 6})
    options, curves, after = {"surrogate": images[10:14], "settings": settings}, [], []
    for graph in (False, True):
        with emulated_cuda.counting() as counts:
            on_step = lambda row: after.append(counts.copy())  # noqa: E731, B023
            arguments = model, images[:k], labels[:k], "distill"
            curves.append(unlearn.unlearn(*arguments, **options, on_step=on_step, cuda_graph=graph).curve)
    step = after[-1] - after[-2]
    assert step.kernels.total() <= STEPS["distill", "eval", True], step.kernels
    assert step.synchronisations.total() == 1
    for eager, graphed in zip(*curves, strict=True):
        assert graphed == pytest.approx(eager, **CLOSE)


def test_changed_copies_are_those_of_the_cpu():
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changes = Changes([kind for kind in KINDS if kind != "noise"], probability=0.5)  # each device has its own noise
    numbers = changes.draw(images.shape, torch.Generator().manual_seed(1), CUDA)
    expected = changes.make(images, numbers)
    for own in (numbers, upload_together(numbers, CUDA)):  # chosen on the CPU, and on the GPU
        copies = changes.make(images.to(CUDA), own).cpu()
        assert ((copies - expected).abs() > 1.5 / 255).float().mean() < 0.01  # rounded to 256 levels


@counts_kernels
def test_a_step_on_changed_copies_as_a_graph_has_few_launches(trained, monkeypatch):
    monkeypatch.setattr(robust, "ITERATIONS", 2)
    monkeypatch.setattr(robust.RobustProcedure, "may_stop", lambda self: False)
    model, images, labels = (part.to(CUDA) for part in trained)
    settings = Settings(**LOOP | {"robust": 1, "robust_pool": 8, "robust_images": 8, "distill_steps": 6})
    after = []
    with emulated_cuda.counting() as counts:
        on_step = lambda row: after.append(counts.copy())  # noqa: E731
        unlearn.unlearn(model, images[:4], labels[:4], "distill", settings=settings, on_step=on_step, cuda_graph=True)
    step = after[-1] - after[-2]
    assert step.kernels.total() <= 13, step.kernels
    assert step.synchronisations.total() == 1


def test_a_model_that_waits_for_the_gpu_runs_without_graphs(trained):
    model, images, labels = (part.to(CUDA) for part in trained)
    model.register_forward_hook(waits)
    settings, sentences = Settings(**LOOP | {"max_passes": 6, "unlearn_lr": 1e-5}), []
    options = {"settings": settings, "cuda_graph": True, "report": sentences.append}
    outcome = unlearn.unlearn(model, images[:2], labels[:2], "neggrad", **options)
    assert outcome.steps == 6
    assert sentences == ["steps run without CUDA graphs, as this model cannot be captured (it waits for the GPU)"]


def waits(model, inputs, output):
    assert output.sum().item() != 1


@counts_kernels
def test_the_attack_and_the_importance_have_few_kernels_and_no_synchronisation(resnet18):
    model, images, labels = resnet18

    def count(compute, *arguments):
        with emulated_cuda.counting() as counts:
            compute(*arguments)
        return counts

    def attacked(steps):
        attack.adversarial_set(model, images, labels, 10, **ATTACK | {"steps": steps})

    attacked(1)  # finds the layers that can be folded
    more = {
        "attack": count(attacked, 2) - count(attacked, 1),
        "importance": count(importance.mas_importance, model, images)
        - count(importance.mas_importance, model, images[:1]),
    }
    for name, counts in more.items():
        kernels, synchronisations = PASSES[name]
        assert counts.synchronisations.total() <= synchronisations, counts.synchronisations
        assert counts.kernels.total() <= kernels, counts.kernels.most_common(40)


@counts_kernels
def test_tensors_on_the_cpu_reach_the_gpu_in_one_copy_beside_those_that_are_there():
    there = torch.ones(2, device=CUDA)
    with emulated_cuda.counting() as counts:
        indices, (weight, same) = upload_together([torch.arange(3), [torch.tensor(0.5), there]], CUDA)
    assert (counts.kernels.total(), counts.synchronisations.total()) == (1, 0)
    assert (indices.tolist(), weight.item(), same is there) == ([0, 1, 2], 0.5, True)
    assert indices.is_cuda
    assert weight.is_cuda


@counts_kernels
def test_the_device_counts():
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    with emulated_cuda.counting() as counts:
        (there + there).mul_(2)
        there.view(3, 1)
        torch.empty(2, device=CUDA)
    assert (counts.kernels.total(), counts.synchronisations.total()) == (2, 0)
    cases = (lambda: here.to(CUDA), there.cpu, there.sum().item, there.tolist, there.nonzero, lambda: there[[0, 1]])
    for number, case in enumerate(cases):
        with emulated_cuda.counting() as counts:
            case()
        assert counts.synchronisations.total() == 1, number
    with emulated_cuda.counting() as counts:
        here.to(CUDA, non_blocking=True)
    assert (counts.kernels.total(), counts.synchronisations.total()) == (1, 0)


@pytest.mark.skipif(emulated_cuda is None, reason="the emulated device can act as mps")
@pytest.mark.usefixtures("fast_metrics")
def test_metrics_and_requests_use_no_float64_on_mps(forget, run, small, tmp_path):
    torch.manual_seed(0)
    models.save(models.build("small", 10).eval(), tmp_path / "small.safetensors", {})
    reference = tmp_path / "reference.safetensors"
    models.save(models.build("small", 10).eval(), reference, {})
    with emulated_cuda.as_mps():
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, device="mps").double()
        words = ["--model", "small", "--checkpoint", tmp_path / "small.safetensors", "--method", "before"]
        words += ["--evaluate", *EVALUATIONS, "--retrained", reference, "--references", reference]
        code, _, err = run(*words, "--device", "mps", "--no-cache")
        assert code == 0, err
        code, _, printed = forget("--device", "mps")
        assert code == 0, printed
