"""CUDA graphs of functions: when they are captured, what they read and write, and the loop with them."""

import contextlib
import warnings

import pytest
import torch

from l2ul import models
from l2ul.common import cuda_graphs
from l2ul.data.images import Split
from l2ul.importance import mas_importance
from l2ul.unlearn import Settings, unlearn

CLASSES = 10
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Recorded:
    """Stands in for a CUDA graph on the CPU and counts its replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def emulated(monkeypatch):
    """Let `Graphed` run on the CPU, without streams; a capture calls the function and a replay does nothing."""
    streams = contextlib.nullcontext()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(cuda_graphs.Graphed, "_run", lambda graphed, inputs: graphed.compute(*inputs))


def test_a_graph_is_captured_at_the_fourth_call_of_a_shape_and_reads_copies_of_the_inputs(emulated):
    seen, sentences = [], []

    def compute(images, weight):
        seen.append((images, weight))
        return images * weight

    graphed = cuda_graphs.Graphed(compute, CPU, sentences.append)
    for call in range(cuda_graphs.WARM_UP):
        assert torch.equal(graphed(torch.ones(2, 3), torch.tensor(2.0 + call)), torch.full((2, 3), 2.0 + call))
    assert len(seen) == cuda_graphs.WARM_UP
    result = graphed(torch.ones(2, 3), torch.tensor(7.0))
    images, weight = seen[-1]
    assert torch.equal(images, torch.ones(2, 3))
    assert weight == 7.0
    assert graphed(torch.full((2, 3), 5.0), torch.tensor(8.0)) is result
    assert torch.equal(images, torch.full((2, 3), 5.0))
    assert weight == 8.0
    assert len(seen) == cuda_graphs.WARM_UP + 1
    (captured,) = graphed._captured.values()
    assert captured.graph.replays == 2
    assert torch.equal(graphed(torch.ones(1, 3), torch.tensor(2.0)), torch.full((1, 3), 2.0))  # another shape
    assert len(seen) == cuda_graphs.WARM_UP + 2
    assert sentences == []


def test_a_function_that_cannot_be_captured_runs_without_a_graph_and_says_so_once(emulated, monkeypatch):
    @contextlib.contextmanager
    def fail(graph, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    sentences = []
    graphed = cuda_graphs.Graphed(lambda images: images + 1, CPU, sentences.append)
    for _ in range(8):
        assert torch.equal(graphed(torch.zeros(2)), torch.ones(2))
    reason = "operation not permitted when stream is capturing"
    assert sentences == [f"steps run without CUDA graphs, as this model cannot be captured ({reason})"]


def test_a_function_that_waits_for_the_gpu_is_never_captured(emulated):
    sentences, seen = [], []

    def compute(images):
        seen.append(images)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return images + 1

    graphed, images = cuda_graphs.Graphed(compute, CPU, sentences.append), torch.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            assert torch.equal(graphed(images), torch.ones(2))
    assert all(one is images for one in seen)
    assert sentences == ["steps run without CUDA graphs, as this model cannot be captured (it waits for the GPU)"]


@pytest.mark.cuda
def test_after_a_function_that_waits_for_the_gpu_another_one_is_captured():
    sentences, images = [], torch.ones(2, device="cuda")
    waiting = cuda_graphs.Graphed(lambda images: images * images.sum().item(), CUDA, sentences.append)
    for _ in range(6):
        assert waiting(images).tolist() == [2, 2]
    assert sentences == ["steps run without CUDA graphs, as this model cannot be captured (it waits for the GPU)"]
    other = cuda_graphs.Graphed(lambda images: images + torch.rand(2, device=CUDA), CUDA, sentences.append)
    results = [other(images).clone() for _ in range(6)]
    assert len(other._captured) == len(sentences) == 1
    assert len(torch.unique(torch.cat(results))) == 12  # random numbers differ between replays


def loop(name, method, device, cuda_graph, sentences=None, **options):
    """Unlearn 6 images of noise from an untrained model on a device."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.build(name, CLASSES).eval().to(memory_format=torch.channels_last).to(device)
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
    with torch.inference_mode():
        for _ in range(40):  # running statistics of the images: in train mode they do not change predictions by steps
            model.train()(images / 255)
        model.eval()
        labels = model(images / 255).argmax(1).clone()
    adv = torch.rand(22, 3, 32, 32, generator=generator).to(device), (torch.arange(22) % CLASSES).to(device)
    settings = {"batch_size": 6, "adv_batch_size": 8, "max_passes": 12, "reg_lamb": 0.1}
    # with which D_f is forgotten after a few steps
    rates = {("resnet20", "train"): 1e-3, ("resnet20", "eval"): 1e-4, ("resnet18", "train"): 5e-5}
    settings["unlearn_lr"] = rates.get((name, options.get("bn", "train")), 2e-6)
    settings |= {"distill_steps": 30, "distill_cycles": 1, "distill_mixes": 16, "distill_lr": 1e-4}
    return unlearn(
        model,
        images,
        labels,
        method,
        adv=adv,
        importance=mas_importance(model, images),
        retain=Split(images, labels),
        settings=Settings(**settings | options),
        cuda_graph=cuda_graph,
        report=(sentences if sentences is not None else []).append,
    )


def weights(outcome):
    return torch.cat([parameter.detach().float().flatten().cpu() for parameter in outcome.model.parameters()])


@pytest.mark.cuda
@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", ["neggrad", "oracle", "adv", "adv_imp", "distill"])
@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_a_loop_of_cuda_graphs_ends_as_one_without(name, method, bn, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    sentences, device = [], torch.device("cuda")
    eager = loop(name, method, device, False, bn=bn)
    graphed = loop(name, method, device, True, sentences, bn=bn)
    assert sentences == []
    assert (graphed.status, graphed.steps) == (eager.status, eager.steps)
    assert eager.steps > 4
    # rounding in another order and its consequences; batches of distill are padded, and Adam amplifies
    share, images = (0.1, 1) if method == "distill" else (0.01, 0)
    moved = (weights(eager) - weights(loop(name, "before", device, False))).norm()
    assert (weights(eager) - weights(graphed)).norm() <= share * moved
    for one, other in zip(eager.curve, graphed.curve, strict=True):
        assert abs(one["forgotten"] - other["forgotten"]) <= 100 / 6 * images + 1e-6
    counts = [dict(outcome.model.named_buffers()) for outcome in (eager, graphed)]
    for key in counts[0]:
        if "num_batches" in key:
            assert counts[0][key] == counts[1][key]


def test_padding_a_batch_of_distill_does_not_change_its_loss(monkeypatch):
    plain = loop("resnet20", "distill", torch.device("cpu"), False, distill_steps=8)
    monkeypatch.setattr("l2ul.methods.distill.DistillProcedure.pads", True)
    padded = loop("resnet20", "distill", torch.device("cpu"), False, distill_steps=8)
    assert (padded.status, padded.steps) == (plain.status, plain.steps)
    for one, other in zip(plain.curve, padded.curve, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
