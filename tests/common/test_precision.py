"""Precision: its default on a device, the switches of torch, and the faster one on a CPU."""

from conftest import tiny_net
from helpers import load_records, parse_sweep
import pytest
import torch

from l2ul import attack, unlearn
from l2ul.common import precision
from l2ul.common.errors import InputError
from l2ul.deletion import checks
from l2ul.metrics import accuracy, near_duplicates, preflight
from l2ul.sweeps import sweep
import main_forget

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def switches():
    backends = torch.backends
    return tuple(one.fp32_precision for one in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn))


@pytest.fixture(autouse=True)
def restored():
    with precision.exactly():
        yield


def test_the_default_is_tf32_on_a_gpu_and_fp32_elsewhere():
    assert [precision.resolve(None, device) for device in (GPU, CPU, torch.device("mps"))] == ["tf32", "fp32", "fp32"]
    assert precision.resolve("fp32", GPU) == "fp32"


def test_auto_is_bf16_on_a_gpu_and_is_measured_on_a_cpu_with_bf16(monkeypatch):
    for supported, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=supported: there)
        assert precision.resolve("auto", GPU) == chosen
    for supported, chosen in ((True, "auto"), (False, "fp32")):
        monkeypatch.setattr(precision, "has_bf16", lambda there=supported: there)
        assert precision.resolve("auto", CPU) == chosen
    assert precision.resolve("auto", torch.device("mps")) == "fp32"


def test_a_cpu_has_bf16_with_amx_or_avx512_bf16(monkeypatch):
    for capabilities, expected in (
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"avx512_f": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert precision.has_bf16() == expected


def test_the_switches_of_torch_agree_in_both_of_its_interfaces():
    for name, expected in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "tf32")):
        precision.use(GPU, name)
        assert switches() == (expected,) * 3
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (expected == "tf32")
    with pytest.raises(InputError, match="tf32 needs a CUDA GPU"):
        precision.use(CPU, "tf32")
    with pytest.raises(ValueError, match="expected one of fp32, tf32, bf16"):
        precision.use(CPU, "auto")


def test_the_previous_precision_returns_after_a_block_even_if_it_fails():
    precision.use(GPU, "tf32")

    @precision.exactly()
    def fail():
        raise KeyError(switches())

    with pytest.raises(KeyError, match="ieee.*ieee.*ieee"):
        fail()
    assert switches() == ("tf32",) * 3
    with precision.exactly(), precision.temporarily(GPU, "tf32"):
        assert switches() == ("tf32",) * 3
    torch.backends.fp32_precision = "tf32"  # as code of a user may set it
    try:
        with precision.exactly():
            assert switches() == ("ieee",) * 3
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("trains", [False, True])
def test_the_faster_precision_is_measured_without_changing_the_model(monkeypatch, trains):
    model, images = tiny_net(), torch.rand(4, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    monkeypatch.setattr(precision, "MEASURED_SECONDS", 0)
    chosen, seconds = precision.fastest(model, images, trains=trains)
    assert chosen in seconds
    assert min(seconds.values()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("milliseconds", "chosen"), [(1, "bf16"), (5.9, "fp32")])
def test_bf16_has_to_be_faster_by_a_margin(monkeypatch, milliseconds, chosen):
    clock = [0.0]

    def step(net, images, name):
        clock[0] += 6e-3 if name == "fp32" else 1e-3 * milliseconds

    monkeypatch.setattr(precision, "_step", step)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    model, images = tiny_net(), torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    assert preflight.fastest_precision(model, images, trains=True)[0] == chosen


def test_a_model_that_cannot_run_in_bf16_runs_in_fp32(monkeypatch):
    model = tiny_net()
    model.features[0].register_forward_hook(lambda layer, inputs, output: output.numpy(force=True).sum())  # no bf16
    monkeypatch.setattr(precision, "fastest", None)  # is not reached
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    chosen, sentence = preflight.fastest_precision(model, images, trains=False)
    assert chosen == "fp32"
    assert "in bf16 the model does not accept" in sentence


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the scripts choose and set the precision as on a CUDA GPU; CPU kernels ignore it."""
    use, resolve = precision.use, precision.resolve
    monkeypatch.setattr(precision, "use", lambda device, name: use(GPU, name))
    monkeypatch.setattr(precision, "resolve", lambda name, device: resolve(name, GPU))


def spy(monkeypatch, owner, name):
    """Return a list that gets the switches of torch for convolutions at each call of a function."""
    function, seen = getattr(owner, name), []

    def call(*arguments, **options):
        seen.append(switches()[1])
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return seen


def test_runs_on_a_gpu_use_tf32_and_decide_in_fp32_which_images_are_forgotten(run, tmp_path, monkeypatch, as_on_a_gpu):
    evaluated, attacked = spy(monkeypatch, accuracy, "predict"), spy(monkeypatch, attack, "pgd_l2")
    code, _, err = run("--method", "adv", "--max-passes", 100)
    assert code == 0, err
    assert attacked == ["tf32"]
    assert evaluated[:3] == ["tf32", "tf32", "ieee"]  # D_r and D_test before, success of the examples
    assert evaluated[3:-4] == ["ieee"]  # D_f, when the loop takes it for forgotten
    assert evaluated[-4:] == ["tf32", "tf32", "ieee", "ieee"]  # D_r and D_test after, D_f before and after
    assert [record["precision"] for record in load_records(tmp_path).values()] == ["tf32"]


def test_requests_search_in_tf32_and_judge_in_fp32(forget, script, fast_report, tmp_path, monkeypatch, as_on_a_gpu):
    searched, judged = spy(monkeypatch, unlearn, "unlearn"), spy(monkeypatch, accuracy, "predict")
    checked = spy(monkeypatch, checks, "measure")
    code, report, printed = forget()
    assert code == 0, printed
    assert set(searched) == {"tf32"}
    assert (set(judged), checked) == ({"ieee"}, ["ieee"])
    assert report["precision"] == {"search": "tf32", "checks": "fp32"}
    searched.clear()
    code, out, err = script(
        main_forget.main,
        "--verify",
        tmp_path / "out" / "report.json",
        "--images",
        tmp_path / "in",
        "--build",
        "conftest:tiny_net",
        "--again",
    )
    assert code == 0, out + err
    assert searched == ["tf32"]


def test_near_duplicates_are_counted_in_fp32(monkeypatch, as_on_a_gpu):
    precision.use(GPU, "tf32")
    compared = spy(monkeypatch, near_duplicates, "_standardised")
    images = torch.rand(3, 3, 8, 8)
    assert near_duplicates.count_near_duplicates(images[:1], images, CPU) == 1
    assert set(compared) == {"ieee"}


def test_auto_enters_a_record_as_the_precision_that_was_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "fastest", lambda model, images, trains: ("bf16", {"fp32": 2.0, "bf16": 1.0}))
    code, out, err = run("--method", "adv", "--precision", "auto")
    assert code == 0, err
    assert "--precision auto: bf16; images a second, forward and backward: fp32 8, bf16 16" in out
    assert "1 done" in run("--method", "adv", "--precision", "bf16")[1]
    assert [record["precision"] for record in load_records(tmp_path).values()] == ["bf16"]


def test_a_sweep_has_the_precision_of_its_workers(tmp_path, monkeypatch):
    def chosen(*words):
        arguments = sweep.with_precision(parse_sweep(tmp_path, *words)).arguments({})
        return arguments[arguments.index("--precision") + 1]

    assert chosen() == chosen("--gpus-per-trial", 0) == "fp32"
    assert chosen("--gpus-per-trial", 0.5) == "tf32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen() == "tf32"
    assert chosen("--device", "cpu") == chosen("--gpus-per-trial", 0) == "fp32"
    named = parse_sweep(tmp_path, "--precision", "bf16")
    assert sweep.with_precision(named) == named
    several = parse_sweep(tmp_path, "--precision", "fp32", "bf16")
    assert sweep.with_precision(several) == several
    with pytest.raises(InputError, match="a sweep takes one of fp32, tf32, bf16"):
        parse_sweep(tmp_path, "--precision", "auto", "fp32")
