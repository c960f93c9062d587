"""Loops that are interrupted and continued: the same result as without an interruption, for each looping method."""

import dataclasses
import functools
import os
import signal

from conftest import CLASSES, save_images
from helpers import load_records, without_costs, write_image
import pytest
import torch

from l2ul import attack, importance
from l2ul.data.folder import FolderImages
from l2ul.data.forget_set import random_new_labels
from l2ul.data.images import Split
from l2ul.experiments import execution
from l2ul.methods import checkpoint as checkpoints
from l2ul.methods import registry
from l2ul.methods.checkpoint import Checkpoint, fingerprint, summary
from l2ul.methods.monitor import ForgetMonitor
from l2ul.methods.procedure import EndlessBatches
from l2ul.unlearn import Settings, unlearn

K = 6
METHODS = ("neggrad", "correct", "rawp", "oracle", "adv", "adv_imp", "distill")
# steps so small that no method ends early; batches that divide no set; passes and a cycle that end in between
SETTINGS = Settings(
    unlearn_lr=1e-4,
    batch_size=4,
    adv_batch_size=7,
    max_passes=3,
    reg_lamb=2.0,
    noise_growth=1e-4,
    distill_lr=1e-3,
    distill_steps=5,
    distill_cycles=2,
    distill_mixes=4,
    distill_forget=2,
    seed=3,
)


@pytest.fixture
def inputs(trained):
    """Return the arguments of `unlearn` for each method: a model with batch-norm and dropout, D_f, D_adv, Ω and D_r."""
    model, images, labels = trained
    x, y = images[:K], labels[:K]
    attacked = {"num_adv_images": 3, "eps": 1.0, "alpha": 0.1, "steps": 3, "seed": 0}
    shared = {
        "model": model,
        "images": x,
        "labels": y,
        "settings": SETTINGS,
        "adv": attack.adversarial_set(model, x, y, CLASSES, **attacked),
        "importance": importance.mas_importance(model, x),
        "retain": Split(images[K:30], labels[K:30]),
    }
    new_labels = random_new_labels(y, CLASSES, seed=0)
    return lambda method: shared | {"method": method, "new_labels": new_labels if method == "correct" else None}


def interrupted_at(steps, error=KeyboardInterrupt):
    """Return an `on_step` that raises the error after each of these steps."""

    def on_step(row):
        if row["step"] in steps:
            raise error

    return on_step


def same(first, second):
    assert first.status == second.status
    assert first.steps == second.steps
    assert first.curve == second.curve
    theirs = second.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def continued(arguments, path, steps, error=KeyboardInterrupt):
    """Return the outcome of a call that is interrupted after each of these steps and repeated each time."""
    for step in steps:
        with pytest.raises(error):
            unlearn(**arguments, checkpoint=Checkpoint(path), on_step=interrupted_at({step}, error))
        assert path.exists()
    rows = []
    calls = {"on_start": lambda max_steps, stop_every, earlier: rows.extend(earlier), "on_step": rows.append}
    outcome = unlearn(**arguments, checkpoint=Checkpoint(path), **calls)
    assert rows == outcome.curve
    return outcome


@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_loop_ends_as_an_uninterrupted_one(inputs, tmp_path, method, bn):
    arguments = inputs(method) | {"settings": dataclasses.replace(SETTINGS, bn=bn)}
    expected = unlearn(**arguments)
    last = expected.steps
    assert last >= 3
    same(continued(arguments, tmp_path / "state.pt", sorted({1, 2, last // 2, last - 1, last})), expected)


def test_a_method_that_forgets_stops_at_the_same_step(inputs, tmp_path):
    arguments = inputs("adv") | {"settings": dataclasses.replace(SETTINGS, unlearn_lr=0.02, max_passes=30)}
    expected = unlearn(**arguments)
    assert expected.status == "forgotten"
    assert expected.steps > 3
    same(continued(arguments, tmp_path / "state.pt", [2, expected.steps - 1, expected.steps]), expected)


def test_system_exit_and_other_errors_between_two_steps_keep_the_state_too(inputs, tmp_path):
    arguments = inputs("neggrad")
    expected = unlearn(**arguments)
    same(continued(arguments, tmp_path / "one.pt", [2], SystemExit), expected)
    same(continued(arguments, tmp_path / "two.pt", [2], OSError), expected)


def test_an_error_in_the_middle_of_a_step_keeps_the_last_complete_state(inputs, tmp_path, monkeypatch):
    arguments, path = inputs("adv_imp"), tmp_path / "state.pt"
    expected = unlearn(**arguments)
    method, calls = registry.METHODS["adv_imp"], []

    def terms(step):
        calls.append(step)
        if len(calls) == 4:
            step.model.features[1].running_mean.zero_()  # what a half-done step leaves behind
            raise KeyboardInterrupt
        return method.terms(step)

    broken = dataclasses.replace(method, implementation=terms)
    monkeypatch.setattr(type(method), "code_sha256", lambda self: None)
    monkeypatch.setitem(registry.METHODS, "adv_imp", broken)
    with pytest.raises(KeyboardInterrupt):
        unlearn(**arguments, checkpoint=Checkpoint(path, every=0.0))
    assert torch.load(path, weights_only=True)["step"] == 3
    monkeypatch.setitem(registry.METHODS, "adv_imp", method)
    same(unlearn(**arguments, checkpoint=Checkpoint(path)), expected)


def with_signals(monkeypatch, name, call, *numbers):
    """Send these signals to the process in the middle of a step of the method; return the method as it was."""
    method, calls = registry.METHODS[name], []

    def terms(step):
        calls.append(step)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return method.terms(step)

    monkeypatch.setattr(type(method), "code_sha256", lambda self: None)  # of the function above it would differ
    monkeypatch.setitem(registry.METHODS, name, dataclasses.replace(method, implementation=terms))
    return method


@pytest.fixture
def handler():
    """Handle both signals by SystemExit with the signal's number during a test."""

    def raise_exit(number, frame):
        raise SystemExit(number)

    previous = {number: signal.signal(number, raise_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    yield raise_exit
    for number, one in previous.items():
        signal.signal(number, one)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(inputs, tmp_path, monkeypatch, handler, number):
    arguments, path = inputs("oracle"), tmp_path / "state.pt"
    expected = unlearn(**arguments)
    method = with_signals(monkeypatch, "oracle", 3, number, signal.SIGTERM)  # SLURM may send several
    with pytest.raises(SystemExit) as stop:
        unlearn(**arguments, checkpoint=Checkpoint(path))
    assert stop.value.code == number
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is handler
    assert torch.load(path, weights_only=True)["step"] == 3
    monkeypatch.setitem(registry.METHODS, "oracle", method)
    same(unlearn(**arguments, checkpoint=Checkpoint(path)), expected)


def test_a_signal_after_the_last_step_keeps_the_result(inputs, tmp_path, handler):
    arguments, path = inputs("adv"), tmp_path / "state.pt"
    arguments["settings"] = dataclasses.replace(SETTINGS, unlearn_lr=0.02, max_passes=30)
    expected = unlearn(**arguments)

    def on_step(row):
        if row["step"] == expected.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        unlearn(**arguments, checkpoint=Checkpoint(path), on_step=on_step)
    assert torch.load(path, weights_only=True)["status"] == expected.status == "forgotten"
    same(unlearn(**arguments, checkpoint=Checkpoint(path)), expected)


def test_a_second_ctrl_c_does_not_wait(inputs, tmp_path, monkeypatch, handler):
    arguments, path = inputs("oracle"), tmp_path / "state.pt"
    with_signals(monkeypatch, "oracle", 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit):
        unlearn(**arguments, checkpoint=Checkpoint(path))
    assert not path.exists()


def test_a_handler_that_is_replaced_on_delivery_stays_replaced(inputs, tmp_path, monkeypatch, handler):
    def once(number, frame):
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit

    signal.signal(signal.SIGTERM, once)
    with_signals(monkeypatch, "oracle", 3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        unlearn(**inputs("oracle"), checkpoint=Checkpoint(tmp_path / "state.pt"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_the_state_is_written_every_so_many_seconds(inputs, tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: (written.append(state["step"]), self.restart_clock()))

    def on_step(row):
        now[0] += 100.0

    unlearn(**inputs("oracle"), checkpoint=Checkpoint(tmp_path / "state.pt", every=250.0), on_step=on_step)
    assert written == [4, 7, 10, 12]  # at 300, 600, 900 and 1,200 seconds, the last at the end of the loop


def test_the_state_of_another_run_is_ignored_with_a_reason(inputs, tmp_path, monkeypatch):
    path, sentences = tmp_path / "state.pt", []
    arguments = inputs("adv")
    with pytest.raises(KeyboardInterrupt):
        unlearn(**arguments, checkpoint=Checkpoint(path), on_step=interrupted_at({2}))
    kept = path.read_bytes()
    (adv, targets), settings = arguments["adv"], arguments["settings"]
    others = [
        {"method": "adv_imp"},
        {"settings": dataclasses.replace(settings, unlearn_lr=2e-4)},
        {"settings": dataclasses.replace(settings, seed=4)},
        {"labels": arguments["labels"].roll(1)},
        {"adv": (adv, targets.roll(1))},
        {"adv": (1 - adv, targets)},
    ]
    for changed in others:
        path.write_bytes(kept)
        expected = unlearn(**arguments | changed)
        same(unlearn(**arguments | changed, checkpoint=Checkpoint(path, report=sentences.append)), expected)
    with monkeypatch.context() as patch:
        patch.setattr("l2ul.unlearn.code_of_model", lambda *parts: "of other files")
        path.write_bytes(kept)
        same(unlearn(**arguments, checkpoint=Checkpoint(path, report=sentences.append)), unlearn(**arguments))
    model = arguments["model"]
    with torch.no_grad():
        model.head.bias.add_(0.1)
    path.write_bytes(kept)
    expected = unlearn(**arguments)
    same(unlearn(**arguments, checkpoint=Checkpoint(path, report=sentences.append)), expected)
    reason = f"{path} belongs to other settings or inputs; the run starts from its beginning"
    assert sentences == [reason] * (len(others) + 2)


def test_a_damaged_state_is_ignored_with_a_reason(inputs, tmp_path):
    path, sentences, arguments = tmp_path / "state.pt", [], inputs("neggrad")
    expected = unlearn(**arguments)
    with pytest.raises(KeyboardInterrupt):
        unlearn(**arguments, checkpoint=Checkpoint(path), on_step=interrupted_at({2}))
    for content in (b"", path.read_bytes()[:-100], b"not a state"):
        path.write_bytes(content)
        same(unlearn(**arguments, checkpoint=Checkpoint(path, report=sentences.append)), expected)
    assert sentences == [f"{path} is damaged; the run starts from its beginning"] * 3


def test_a_state_that_cannot_be_written_does_not_end_the_run(inputs, tmp_path):
    (tmp_path / "file").touch()
    sentences, arguments = [], inputs("neggrad")
    checkpoint = Checkpoint(tmp_path / "file" / "state.pt", every=0.0, report=sentences.append)
    same(unlearn(**arguments, checkpoint=checkpoint), unlearn(**arguments))
    assert sentences
    assert all(sentence.startswith("cannot write ") for sentence in sentences)


def test_the_time_of_the_interrupted_call_counts(inputs, tmp_path):
    path, sentences, arguments = tmp_path / "state.pt", [], inputs("neggrad")
    with pytest.raises(KeyboardInterrupt):
        unlearn(**arguments, checkpoint=Checkpoint(path), on_step=interrupted_at({2}))
    spent = torch.load(path, weights_only=True)["seconds"]
    outcome = unlearn(**arguments, checkpoint=Checkpoint(path, report=sentences.append))
    assert outcome.seconds_before == spent > 0
    assert sentences == [f"continuing after step 2 from {path}"]


def test_methods_of_fixed_length_write_no_state_and_start_again(inputs, tmp_path):
    path, arguments = tmp_path / "state.pt", inputs("finetune")
    with pytest.raises(KeyboardInterrupt):
        unlearn(**arguments, checkpoint=Checkpoint(path, every=0.0), on_step=interrupted_at({10}))
    assert not path.exists()
    same(unlearn(**arguments, checkpoint=Checkpoint(path)), unlearn(**arguments))


def count_calls(model, inputs):
    model.calls.add_(1)


def test_images_on_disk_continue_in_the_middle_and_at_the_end_of_a_pass(inputs, tmp_path):
    """The loader draws from torch's global generator at the beginning of a pass, as dropout does at each step."""
    arguments = inputs("oracle")
    retain = arguments["retain"]
    files = sorted(map(str, save_images(tmp_path / "retain", retain.images).iterdir()))
    arguments["retain"] = Split(FolderImages(files, 8, 8), retain.labels)
    expected = unlearn(**arguments)
    assert expected.steps == 12
    same(continued(arguments, tmp_path / "state.pt", [1, 4, 6, 8, 11]), expected)


def test_buffers_that_a_state_dict_leaves_out_are_kept(inputs, tmp_path):
    arguments = inputs("neggrad")
    model = arguments["model"]
    model.register_buffer("calls", torch.zeros(()), persistent=False)
    model.register_forward_pre_hook(count_calls)
    expected = unlearn(**arguments)
    found = continued(arguments, tmp_path / "state.pt", [2, 3])
    same(found, expected)
    assert found.model.calls == expected.model.calls > 0


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 8, 9])
def test_batches_continue_in_the_middle_and_at_the_ends_of_a_pass(taken):
    split = Split(torch.arange(11).view(11, 1, 1, 1).expand(11, 3, 1, 1) / 255, torch.arange(11))

    def batches():
        return EndlessBatches(split, 3, torch.Generator().manual_seed(5))

    whole = batches()
    for _ in range(taken):
        next(whole)
    other = batches()
    other.load_state_dict(whole.state_dict())
    for _ in range(9):
        assert torch.equal(next(other).labels, next(whole).labels)


def test_fingerprints_differ_where_inputs_do():
    tensor, split = torch.arange(6.0), Split(torch.zeros(600, 3, 1, 1), torch.zeros(600, dtype=torch.int64))
    parts = [
        (tensor,),
        (tensor.view(2, 3),),
        (tensor.double(),),
        (tensor, None),
        ({"a": tensor},),
        ({"b": tensor},),
        (split,),
        (Split(split.images + 1, split.labels),),
        (Split(split.images, split.labels + 1),),
    ]
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint(*parts[4]) == fingerprint({"a": tensor.clone()})


def test_the_fingerprint_of_files_changes_with_their_content(tmp_path):
    split = Split(FolderImages([str(write_image(tmp_path / "a.png"))], 8), torch.zeros(1, dtype=torch.int64))
    before = fingerprint(split)
    assert fingerprint(split) == before
    write_image(tmp_path / "a.png", seed=1)
    assert fingerprint(split) != before


def test_inputs_that_a_gpu_computes_with_other_rounding_continue(inputs, tmp_path):
    path, sentences, arguments = tmp_path / "state.pt", [], inputs("adv_imp")
    with pytest.raises(KeyboardInterrupt):
        unlearn(**arguments, checkpoint=Checkpoint(path), on_step=interrupted_at({2}))
    (adv, targets), omega = arguments["adv"], arguments["importance"]
    rounded = {"adv": (adv + 1e-6, targets), "importance": {name: 1.00001 * value for name, value in omega.items()}}
    unlearn(**arguments | rounded, checkpoint=Checkpoint(path, report=sentences.append))
    other = {"importance": {name: 1.1 * value for name, value in omega.items()}}
    unlearn(**arguments | other, checkpoint=Checkpoint(path, report=sentences.append))
    assert [sentence.split()[0] for sentence in sentences] == ["continuing", str(path)]


def test_summaries_are_means_of_images_and_tensors():
    adv = torch.stack([torch.full((3, 2, 2), value) for value in (0.25, 0.75)]), torch.zeros(2)
    omega = {"one": torch.tensor([1.0, 3.0]), "two": torch.tensor(5.0)}
    assert summary(adv, omega).tolist() == [0.25, 0.75, 2.0, 5.0]
    assert summary(None, None).shape == (0,)


def test_a_command_continues_from_the_state_beside_the_record(run, tmp_path, monkeypatch):
    arguments = ["--method", "oracle", "distill", "--adv-batch-size", 16]
    code, _, _ = run(*arguments, "--result-dir", tmp_path / "expected")
    assert code == 0
    measure, calls = ForgetMonitor.measure, []

    def interrupt(monitor, step, terms):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(monitor, step, terms)

    with monkeypatch.context() as patch:
        patch.setattr(ForgetMonitor, "measure", interrupt)
        patch.setattr(execution, "Checkpoint", functools.partial(Checkpoint, every=0.0))
        assert run(*arguments)[0] == 130
    (state,) = (tmp_path / "runs").iterdir()
    assert state.name.endswith(".state.pt")
    code, out, _ = run(*arguments, "--dry-run")
    assert [line.split()[0] for line in out.splitlines() if "k = 2" in line] == ["resume", "to"]
    code, out, _ = run(*arguments)
    assert code == 0
    assert f"continuing after step 3 from {state}" in out
    assert not state.exists()
    for file in (tmp_path / "expected" / "runs").iterdir():
        if file.suffix in (".csv", ".txt"):
            assert file.read_bytes() == (tmp_path / "runs" / file.name).read_bytes()
    records, expected = load_records(tmp_path), load_records(tmp_path / "expected")
    assert records.keys() == expected.keys()
    for identity, record in records.items():
        assert without_costs(record) == without_costs(expected[identity])
