"""Precision: its default on a device, the switches of torch, and the faster one on a CPU."""

import copy

from conftest import CLASSES, tiny_net
from helpers import load_records, parse_sweep
import pytest
import torch
import torch.nn.functional as F

import l2ul
from l2ul import attack, objective, unlearn
from l2ul.common import bn_folding, precision
from l2ul.common.errors import InputError
from l2ul.deletion import checks
from l2ul.experiments import runs
from l2ul.methods.settings import Settings
from l2ul.metrics import accuracy, near_duplicates, preflight
from l2ul.sweeps import sweep
import main_forget

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def switches():
    backends = torch.backends
    return tuple(one.fp32_precision for one in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn))


@pytest.fixture(autouse=True)
def restored():
    with precision.temporarily(CPU, "fp32"):
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
    monkeypatch.setattr(precision, "is_supported", lambda device, name: True)


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


def types_inside(model):
    """Return a list that gets the type of the features before the last layer at each pass."""
    types = []
    model.head.register_forward_pre_hook(lambda layer, inputs: types.append(inputs[0].dtype))
    return types


def test_passes_in_bf16_have_weights_gradients_and_logits_in_float32():
    model, images = tiny_net(), torch.rand(4, 3, 8, 8)
    types, expected = types_inside(model), model(images)
    types.clear()
    with precision.passes_in(model, "bf16"):
        logits = model(images)
        copied = copy.deepcopy(model)  # as a teacher
        with precision.exactly():
            assert torch.equal(model(images), expected)
    assert torch.equal(model(images), expected)
    with precision.passes_in(model, "full"):
        assert torch.equal(model(images), expected)
    assert types == [torch.bfloat16, *[torch.float32] * 3]
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, rtol=0.1, atol=0.05)
    assert torch.equal(copied(images), logits)
    assert bn_folding.foldable(copied, images) == bn_folding.foldable(model, images) != ()  # checked in float64
    logits.square().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_passes_in_bf16_use_the_present_weights_inside_an_autocast_of_the_caller():
    model, images = tiny_net(), torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), precision.passes_in(model, "bf16"):
        before = model(images)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.fill_(2.0)
        assert not torch.equal(before, model(images))
        assert model(images).unique().tolist() == [2.0]


def test_a_pass_that_fails_leaves_no_autocast():
    model = tiny_net()
    with precision.passes_in(model, "bf16"):
        with pytest.raises(RuntimeError):
            model(torch.rand(1, 3, 9, 9))
        assert not torch.is_autocast_enabled("cpu")
        assert model(torch.rand(1, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("adv_imp", {"bn": "train"}),
        ("adv_imp", {"bn": "eval"}),
        ("rawp", {}),
        ("distill", {"distill_ascent": 0.1, "distill_stand_ins": "mixes"}),
        ("distill", {"distill_stand_ins": "synthesised", "distill_pool": 4, "distill_pool_steps": 2}),
        ("distill", {"robust": 1, "robust_pool": 4, "robust_images": 0, "distill_steps": 3, "distill_cycles": 1}),
        ("jit", {"method_settings": {"copies": 2}}),
    ],
)
def test_each_kind_of_method_runs_in_bf16_and_ends_in_fp32(trained, method, changed):
    model, images, labels = trained
    types, confirmed = types_inside(model), []

    def predict(unlearned):
        count = len(types)
        predictions = accuracy.predict(unlearned, images[:3])
        confirmed.extend(types[count:])
        return predictions

    rates = {"unlearn_lr": 0.01, "distill_lr": 0.01, "max_passes": 200, "distill_steps": 20, "distill_mixes": 8}
    attacked = {"adv": (images[4:9], (labels[4:9] + 1) % CLASSES), "num_classes": CLASSES, "predict": predict}

    def weights(name):
        settings = Settings(**rates | changed, loop_precision=name)
        outcome = unlearn.unlearn(model, images[:3], labels[:3], method, settings=settings, **attacked)
        assert outcome.status != "diverged"
        return torch.nn.utils.parameters_to_vector(outcome.model.parameters())

    full = weights("full")
    types.clear()
    in_bf16 = weights("bf16")
    assert types.count(torch.bfloat16) > len(types) / 2
    assert torch.bfloat16 not in confirmed
    assert confirmed or method == "jit" or "robust" in changed  # which need not confirm
    assert torch.equal(in_bf16, weights("bf16"))
    assert (method == "rawp") or not torch.equal(in_bf16, full)
    assert in_bf16.isfinite().all()


def test_the_gap_of_features_in_bf16_is_a_float32_of_all_layers():
    features, original = [torch.rand(4, 3, 2, 2).bfloat16() for _ in range(2)]
    expected = 2 * F.mse_loss(features.float(), original.float())
    gap = objective.feature_gap([features.requires_grad_()], [original], [0.5])
    assert gap.dtype == torch.float32
    assert gap.item() == pytest.approx(expected.item(), rel=0.01)
    gap.backward()
    assert torch.allclose(features.grad.float(), (features - original).float() / 12, rtol=0.02, atol=1e-4)


@pytest.fixture
def bf16_is_faster(monkeypatch):
    """Let this CPU have bf16, twice as fast as fp32; return the list of `trains` of the measurements."""
    measured = []

    def fastest(model, images, *, trains):
        measured.append(trains)
        return "bf16", {"fp32": 2.0, "bf16": 1.0}

    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "fastest", fastest)
    return measured


def test_the_precision_of_the_loop_is_part_of_a_run_unless_it_is_the_default(run, tmp_path, bf16_is_faster):
    words = "--method", "adv"
    assert run(*words)[0] == 0
    (identity,) = load_records(tmp_path)
    code, out, err = run(*words, "--loop-precision", "auto")
    assert code == 0, err
    assert "--loop-precision auto: bf16; images a second, forward and backward: fp32 8, bf16 16" in out
    assert bf16_is_faster == [True]
    assert "1 done" in run(*words, "--loop-precision", "bf16")[1]
    assert "1 done" in run(*words, "--setting", "loop_precision=full")[1]
    records = load_records(tmp_path)
    assert {record["loop_precision"] for record in records.values()} == {"full", "bf16"}
    assert {record["precision"] for record in records.values()} == {"fp32"}
    old = {name: value for name, value in records[identity].items() if name != "loop_precision"}  # before it existed
    assert runs.identity(old) == runs.identity(records[identity])


def test_bf16_in_the_loop_needs_hardware_for_it(run, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    code, _, err = run("--loop-precision", "bf16")
    assert code == 2
    assert "bf16 needs a CUDA GPU, or a CPU with AMX or AVX512-BF16; use --loop-precision full on this device" in err
    assert precision.resolve_loop("auto", CPU) == "full"


def test_a_request_searches_in_the_faster_precision_of_a_cpu(forget, script, tmp_path, monkeypatch, bf16_is_faster):
    code, report, printed = forget()
    assert code == 0, printed
    assert "search in bf16" in printed
    assert report["precision"] == {"search": "bf16", "checks": "fp32"}
    assert report["chosen"]["loop_precision"] == "bf16"
    assert "loop_precision=bf16" in report["again"]["command"]
    assert bf16_is_faster == [True]
    words = "--verify", tmp_path / "out" / "report.json", "--images", tmp_path / "in", "--build", "conftest:tiny_net"
    code, out, err = script(main_forget.main, *words, "--again")
    assert code == 0, out + err
    assert bf16_is_faster == [True]  # not measured again
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    code, _, err = script(main_forget.main, *words, "--again")
    assert code == 2
    assert "bf16 needs a CUDA GPU, or a CPU with AMX or AVX512-BF16; the request was carried out in it" in err


def test_the_user_decides_the_precision_of_the_search(trained, monkeypatch, bf16_is_faster):
    model, images, labels = trained
    named = {"minutes": 10, "robust": 0, "distill_steps": 20}
    result = l2ul.forget(model, images[:2], labels[:2], mean=(0, 0, 0), std=(1, 1, 1), loop_precision="full", **named)
    assert (bf16_is_faster, result.settings["loop_precision"]) == ([], "full")
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    with pytest.raises(InputError, match=r"bf16 needs a CUDA GPU.*use loop_precision=\"full\""):
        l2ul.forget(model, images[:2], labels[:2], mean=(0, 0, 0), std=(1, 1, 1), loop_precision="bf16", **named)


def test_a_sweep_takes_a_named_precision_of_the_loop(tmp_path):
    with pytest.raises(InputError, match="--loop-precision auto .* a sweep takes one of full, bf16"):
        parse_sweep(tmp_path, "--loop-precision", "auto")
    assert parse_sweep(tmp_path, "--loop-precision", "full", "bf16").axes == {"loop_precision": ["full", "bf16"]}
