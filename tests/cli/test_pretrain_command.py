"""The main_pretrain_*.py scripts: where weights are saved, excluded images, lines about epochs, bad input."""

import contextlib
import dataclasses
import re
import subprocess
import sys

from conftest import ROOT
import pytest
import torch
from torch import nn
from tracked import read_csv

from l2ul import models
from l2ul.cli import pretrain_command
from l2ul.common import precision
from l2ul.data import datasets
from l2ul.data.forget_set import choose_forget
from l2ul.data.images import Split
from l2ul.models import checkpoint
from l2ul.training import loop
from l2ul.training.recipe import Recipe


def head(split, count):
    return Split(split.images[:count], split.labels[:count])


@pytest.fixture
def pretrain(script, tmp_path, monkeypatch):
    """Call the command for a small net and 96 digits; return exit code, standard output and standard error."""
    digits = datasets.load("digits", tmp_path)
    few = dataclasses.replace(digits, train=head(digits.train, 96), test=head(digits.test, 32))
    monkeypatch.setattr(datasets, "load", lambda *arguments, **options: few)

    def call(*arguments):
        recipe = Recipe(epochs=9, lr=0.1, crop_padding=2, flip=False)

        def main():
            pretrain_command.main("main_pretrain_x.py", "Train.", "digits", "resnet20", recipe)

        return script(main, "--data-dir", tmp_path, "--epochs", 1, "--batch-size", 64, *arguments)

    return call


def test_weights_are_saved_where_unlearning_looks_for_them(pretrain, tmp_path):
    code, out, err = pretrain("--lr", "1e-3", "--optimizer", "adamw")
    assert code == 0, err
    usual = tmp_path / "weights" / "digits_resnet20.safetensors"
    assert usual.exists()
    *_, last = out.splitlines()
    assert re.fullmatch(rf"D_test [\d.]+ %: {re.escape(str(usual))}", last)
    assert not list(usual.parent.glob("*.training.pt"))
    metadata = checkpoint.read(usual)[1]
    assert (metadata["lr"], metadata["optimizer"], metadata["dataset"]) == (0.001, "adamw", "digits")
    assert float(last.split()[1]) == pytest.approx(metadata["acc_test"], abs=0.005)
    assert "exists; add --rerun" in pretrain("--lr", "1e-3", "--optimizer", "adamw")[1]
    assert "was trained with lr 0.001, not 0.1; add --rerun" in pretrain("--lr", 0.1, "--optimizer", "adamw")[2]
    assert "was trained with optimizer adamw, not sgd; add --rerun" in pretrain("--lr", "1e-3")[2]
    same = ("--lr", "1e-3", "--optimizer", "adamw", "--mean")
    assert "exists; add --rerun" in pretrain(*same, *metadata["mean"])[1]
    assert "was trained with mean [0.485, 0.456, 0.406], not [0.5, 0.5, 0.5]" in pretrain(*same, 0.5, 0.5, 0.5)[2]


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_the_optimizer_has_its_options(name, kind):
    recipe = Recipe(epochs=1, lr=0.25, weight_decay=0.125, optimizer=name)
    optimizer = loop._optimizer(nn.Linear(2, 2), recipe)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == kind
    assert (group["lr"], group["weight_decay"], group.get("momentum")) == (0.25, 0.125, 0.9 if name == "sgd" else None)


def test_a_retrained_model_has_a_file_of_its_own(pretrain, tmp_path):
    weights = tmp_path / "weights"
    (tmp_path / "out.txt").write_text("5\n1\n")
    assert pretrain("--exclude", tmp_path / "out.txt")[0] == 0
    assert "exists; add --rerun" in pretrain("--exclude", tmp_path / "out.txt")[1]
    (retrained,) = weights.glob("digits_resnet20_without_2_*.safetensors")
    assert checkpoint.read(retrained)[1]["excluded"] == [5, 1]
    assert pretrain("--exclude-k", 3, "--exclude-seed", 7)[0] == 0
    (chosen,) = weights.glob("digits_resnet20_without_3_*.safetensors")
    assert checkpoint.read(chosen)[1]["excluded"] == choose_forget(96, 3, 7).tolist()
    assert not (weights / "digits_resnet20.safetensors").exists()
    (tmp_path / "out.txt").write_text("1\n5\n")
    assert "exists; add --rerun" in pretrain("--exclude", tmp_path / "out.txt", "--output", retrained)[1]
    for words, images in (((), "all images"), (("--exclude-k", 1), f"all images but 1 ({choose_forget(96, 1, 0)[0]})")):
        code, _, err = pretrain("--output", retrained, *words)
        assert (code, f"was trained on all images but 2 (1, 5), not on {images}; add --rerun" in err) == (2, True), err


def test_each_epoch_has_a_line_with_rate_and_time_left(pretrain):
    code, out, err = pretrain("--epochs", 2)
    assert code == 0, err
    first, second, _ = out.splitlines()
    assert re.fullmatch(r"epoch 1/2: loss [\d.]+, D_test [\d.]+ %, [\d,]+ images/s, about [\d.]+ (s|min|h) left", first)
    assert re.fullmatch(r"epoch 2/2: loss [\d.]+, D_test [\d.]+ %, [\d,]+ images/s", second)


def test_the_curve_of_an_interrupted_training_goes_on_when_it_is_resumed(pretrain, tmp_path, monkeypatch):
    def stop_after_two(self, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        return "line"

    words = ["--epochs", 3, "--seed", 1, "--schedule", "cosine", "--tracker", "csv"]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_command.EpochLines, "line", stop_after_two)
        code, _, err = pretrain(*words)
    assert code == 130
    assert err.endswith(f"\nmain_pretrain_x.py: stopped by Ctrl-C; {pretrain_command.AFTER_STOP}\n")
    tracked = tmp_path / "weights" / "tracking"
    curve, _, record = read_csv(tracked)
    assert (len(curve), record) == (2, None)
    monkeypatch.setattr(pretrain_command.EpochLines, "line", lambda self, row: "line")
    counts = []

    @contextlib.contextmanager
    def bar(description, total):
        counts.append(total)
        yield counts.append

    monkeypatch.setattr(pretrain_command, "progress_bar", bar)
    code, out, err = pretrain(*words, "--resume")
    assert code == 0, err
    assert counts == [3 * 96, 2 * 96, 64, 32]
    assert f"continuing after epoch 2 of 3 from {tmp_path / 'weights' / 'digits_resnet20.training.pt'}\n" in out
    continued, settings, record = read_csv(tracked)
    assert [row["epoch"] for row in continued] == [1, 2, 3]
    assert continued[:2] == curve
    assert [row["lr"] for row in continued] == pytest.approx([0.1, 0.075, 0.025])
    assert (settings["seed"], settings["weights"]) == (1, "digits_resnet20.safetensors")
    assert record.keys() == {"acc_test"}
    code, out, _ = pretrain("--resume", "--rerun", "--exclude-k", 3, "--tracker", "csv")
    assert code == 0
    assert re.search(r"there is no .*training.pt to continue from; the training starts with epoch 1\n", out)
    (other,) = (path for path in (tracked / "csv").glob("*.json") if '"excluded": 3' in path.read_text())
    assert '"weights": "digits_resnet20_without_3_' in other.read_text()


def test_rate_and_time_left_are_means_over_the_epochs_of_this_process(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pretrain_command.time, "monotonic", lambda: now[0])
    lines = pretrain_command.EpochLines(10, 6000, "validation")
    now[0] += 60
    row = {"epoch": 7, "loss": 0.5, "acc": 71.2}  # the first epoch after --resume
    assert lines.line(row) == "epoch 7/10: loss 0.5000, validation 71.20 %, 100 images/s, about 3 min left"
    now[0] += 180
    row = {"epoch": 8, "loss": 0.5, "acc": 71.2}
    assert lines.line(row) == "epoch 8/10: loss 0.5000, validation 71.20 %, 50 images/s, about 4 min left"


def test_bad_input_is_one_sentence(pretrain, tmp_path):
    (tmp_path / "out.txt").write_text("5\n1\n")
    for arguments, expected in (
        (["--exclude", tmp_path / "none.txt"], 2),
        (["--exclude", tmp_path / "out.txt", "--exclude-k", 3], 2),
        (["--exclude-k", 96], 2),
        (["--output", tmp_path / "net.pt"], 2),
        (["--model", "hf:somewhere"], 2),
        (["--lr", "1e30", "--rerun"], 1),
    ):
        code, _, err = pretrain(*arguments)
        assert (code, err.count("\n")) == (expected, 1)


def test_help_shows_examples_and_does_not_import_torch():
    program = (
        "import sys, runpy\n"
        "sys.argv = ['main_pretrain_digits_resnet20.py', '--help']\n"
        "try:\n"
        "    runpy.run_path('main_pretrain_digits_resnet20.py', run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--weight-decay" in done.stdout
    assert "\nexamples:\n" in done.stdout
    assert "\n  python main_pretrain_digits_resnet20.py --rerun\n" in done.stdout
    assert done.stdout.endswith("False\n")


def test_auto_measures_the_precision_and_an_existing_training_decides_it(pretrain, tmp_path, monkeypatch):
    chosen = iter(["bf16", "fp32", "fp32"])
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "fastest", lambda model, images, trains: (next(chosen), {"fp32": 2.0, "bf16": 1.0}))
    code, out, err = pretrain("--precision", "auto")
    assert code == 0, err
    assert "--precision auto: bf16; images a second, forward and backward: fp32 8, bf16 16" in out
    weights = tmp_path / "weights" / "digits_resnet20.safetensors"
    assert checkpoint.read(weights)[1]["precision"] == "bf16"
    for options in ([], ["--precision", "auto"]):
        assert "exists; add --rerun" in pretrain(*options)[1]
    assert "was trained with precision bf16, not fp32" in pretrain("--precision", "fp32")[2]
    assert pretrain("--precision", "auto", "--rerun")[0] == 0
    assert checkpoint.read(weights)[1]["precision"] == "fp32"


def test_a_resumed_training_keeps_its_precision(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_command.EpochLines, "line", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pretrain("--precision", "bf16", "--epochs", 2)[0] == 130
    assert pretrain("--precision", "auto", "--epochs", 2, "--resume")[0] == 0
    assert checkpoint.read(tmp_path / "weights" / "digits_resnet20.safetensors")[1]["precision"] == "bf16"


@pytest.mark.parametrize("name", ["new.safetensors", "new.training.pt", "tracking"])
def test_what_cannot_be_written_is_refused_before_training(pretrain, tmp_path, name, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *arguments, **options: pytest.fail("work was begun"))
    blocked = tmp_path / name
    blocked.write_text("mine") if name == "tracking" else blocked.mkdir()
    code, _, err = pretrain("--output", tmp_path / "new.safetensors", "--rerun", "--tracker", "csv")
    assert (code, str(blocked) in err, err.count("\n")) == (2, True, 1), err


def test_a_model_that_cannot_be_written_is_refused_before_training(pretrain, tmp_path, monkeypatch):
    def build(classes):
        net = nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))
        net(torch.zeros(1, 1, 8, 8))
        net[0].register_buffer("index", torch.eye(2).to_sparse())
        return net

    monkeypatch.setattr(models, "OWN", dict(models.OWN))
    models.register("indexed", build, mean=(0.5,), std=(0.2,))
    monkeypatch.setattr(loop, "fit", lambda *arguments, **options: pytest.fail("work was begun"))
    code, _, err = pretrain("--model", "indexed")
    assert (code, "indexed cannot be written again in its form" in err, err.count("\n")) == (2, True, 1), err
    assert not list((tmp_path / "weights").iterdir())
