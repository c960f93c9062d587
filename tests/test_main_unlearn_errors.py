"""The messages and exit codes of main_unlearn.py for bad input and failures."""

import json
import shlex
import shutil

from conftest import FAST, ROOT
from helpers import write_folder
import pytest
from safetensors.torch import load_file
import torch
import torchvision

from l2ul import models
from l2ul.cli import unlearn_command, unlearn_options
from l2ul.data import forget_set
from l2ul.experiments import execution
import main_unlearn


def test_weights_of_another_data_set_whose_file_has_the_same_name_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "OWN", dict(models.OWN))
    for name in ("x", "big_x"):
        models.register(name, lambda num_classes: models.build("resnet20", num_classes).net)
    write_folder(tmp_path / "pets", size=(16, 16))
    write_folder(tmp_path / "pets_big", size=(16, 16))
    torch.manual_seed(0)
    classifier, file = models.build("resnet20", 2).eval(), tmp_path / "weights" / "pets_big_x.safetensors"
    models.save(classifier, file, {"dataset": "pets_big"})
    words = ["--data-dir", tmp_path, "--result-dir", tmp_path, "--method", "before", "--unlearn-k", 1, "--dry-run"]
    code, _, err = script(main_unlearn.main, "--dataset", "pets", "--model", "big_x", *words)
    assert code == 2
    assert f"{file} has the weights of --dataset pets_big, not pets; name the file of the weights with" in err
    code, _, err = script(main_unlearn.main, "--dataset", "pets_big", "--model", "x", *words)
    assert (code, "has the weights of --model resnet20, not x" in err) == (2, True), err
    code, _, err = script(main_unlearn.main, "--dataset", "pets", "--model", "big_x", "--checkpoint", file, *words)
    assert code == 0, err


def test_a_batch_of_one_image_that_batch_norm_cannot_use(run, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "weights.pt")
    net = ["--model", "torchvision:resnet18", "--checkpoint", tmp_path / "weights.pt"]
    code, _, err = run(*net, "--method", "neggrad", "--unlearn-k", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "unlearn with --bn eval" in err
    assert run(*net, "--method", "neggrad", "--unlearn-k", 1, "--bn", "eval")[0] == 0


def test_a_reference_model_with_several_weights_is_refused_without_advice_for_others(run, tmp_path):
    state = load_file(ROOT / "data" / "weights" / "digits_resnet20.safetensors")
    torch.save({"state_dict": state, "ema": {name: 2 * one for name, one in state.items()}}, tmp_path / "two.pt")
    code, _, err = run("--retrained", tmp_path / "two.pt", "--evaluate", "retrained", "--method", "neggrad")
    assert (code, "several weights that fit: state_dict, ema; give files with one set of weights" in err) == (2, True)
    assert "--weights-key" not in err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_in_a_folder_is_one_sentence(script, tmp_path, workers):
    write_folder(tmp_path / "insects", size=(80, 64))
    (tmp_path / "insects" / "val" / "bee" / "1.png").write_bytes(b"no image")
    torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "weights.pt")
    data_set = ["--dataset", "insects", "--data-dir", tmp_path, "--image-size", 64, "--workers", workers]
    net = ["--model", "torchvision:squeezenet1_1", "--checkpoint", tmp_path / "weights.pt"]
    code, _, err = script(main_unlearn.main, "--result-dir", tmp_path, *FAST, *data_set, *net)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("main_unlearn.py: cannot read the image")


def test_a_name_that_no_record_can_have_is_refused_before_the_run(script, tmp_path):
    write_folder(tmp_path / "in\x1bsects", size=(80, 64))
    torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "weights.pt")
    data_set = ["--dataset", "in\x1bsects", "--data-dir", tmp_path, "--image-size", 64, "--workers", 0]
    net = ["--model", "torchvision:squeezenet1_1", "--checkpoint", tmp_path / "weights.pt"]
    code, _, err = script(main_unlearn.main, "--result-dir", tmp_path, *FAST, *data_set, *net)
    assert (code, err.count("\n")) == (2, 1)
    assert "dataset is 'in\\x1bsects'; expected a name of 1 to 255 characters, none a control character" in err


def test_without_a_writable_cache_the_runs_continue_and_a_line_says_so(run):
    code, out, err = run("--method", "adv", "--cache-dir", "/proc/here")
    assert code == 0, err
    assert out.startswith("nothing is cached: cannot write to /proc/here")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dataset", "svhn"], "there is no data set 'svhn'"),
        (["--model", "resnet19"], "unknown model 'resnet19'"),
        (["--model", "mine"], "start the command from the file that registers it (docs/extending.md)"),
        (["--method", "adv", "sgd"], "unknown method 'sgd'; expected one of before, neggrad"),
        (["--method", "sgd"], "(see main_unlearn.py --help)"),
        (["--checkpoint", "none.pt"], "there is no checkpoint none.pt"),
        (["--checkpoint", "pyproject.toml"], "pyproject.toml is damaged or is no checkpoint"),
        (["--model", "resnet56"], "no weights of resnet56 for digits: looked for"),
        (
            ["--model", "resnet56"],
            "train them with: python main_pretrain_digits_resnet20.py --dataset digits --model resnet56, or name",
        ),
        (["--unlearn-k", "0"], "--unlearn-k is 0; expected 1 or more"),
        (["--unlearn-k", "16", "-4"], "--unlearn-k is -4; expected 1 or more"),
        (["--unlearn-k", "41"], "k is 41; expected 1 to 39"),
        (["--unlearn-k", "many"], "'many' is not allowed; expected a whole number"),
        (["--pgd-eps", "-1"], "'-1' is not allowed; expected a number of at least 0"),
        (["--pgd-eps", "nan"], "'nan' is not allowed"),
        (["--unlearn-lr", "0"], "expected a number above 0"),
        (["--unlearn-lr", "inf"], "'inf' is not allowed"),
        (["--reg_lamb", "-0.5"], "'-0.5' is not allowed"),
        (["--pgd-iter", "0"], "expected a whole number of at least 1"),
        (["--seed", "-1"], "expected a whole number of at least 0"),
        (
            ["--method", "scrub", "--setting", "l1=1"],
            "method scrub has no setting l1; expected one of bn, loop_precision, precision, epochs",
        ),
        (
            ["--method", "adv", "oracle", "--course", "epochs=1"],
            "none of the methods adv oracle has a setting epochs; exp",
        ),
        (["--method", "scrub", "--setting", "epochs"], "'epochs' is not allowed; expected NAME=VALUE"),
        (["--method", "scrub", "--course", "lr=-1"], "setting lr=-1 is not allowed; expected a number of at least 0"),
        (
            ["--method", "scrub", "--setting", "batch=2.5"],
            "setting batch=2.5 is not allowed; expected a whole number of",
        ),
        (["--seed", "99999999999999999999"], "expected a whole number of at least 0"),
        (["--seed", "9" * 400], "expected a whole number of at least 0"),
        (["--unlearn-k", "40"], "k is 40; expected 1 to 39"),
        (["--forget-file", "none.txt"], "cannot read the forget file none.txt"),
        (["--relabel-file", "labels.txt"], "add --goal relabel"),
        (["--goal", "relabel", "--relabel-file", "x", "--seed", "0", "1"], "add --forget-file"),
        (["--goal", "erase"], "'erase' is not allowed; expected one of misclassify, relabel"),
        (["--std", "1", "0", "1"], "expected a number above 0"),
        (["--result-dir", "pyproject.toml"], "cannot write to pyproject.toml"),
        (["--result-dir", "/proc/here"], "cannot write to /proc/here"),
        (["--device", "tpu"], "'tpu' is not allowed; expected one of cuda, mps, cpu"),
        (["--precision", "tf32", "--device", "cpu"], "tf32 needs a CUDA GPU; use --precision fp32 on this device"),
        (["--cache-gib", "0"], "expected a number above 0"),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
        (
            ["--model", "torchvision:vit_b_16", "--checkpoint", "data/weights/digits_resnet20.safetensors"],
            "does not fit",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, arguments, complaint, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("work was begun")

    monkeypatch.setattr(execution.Experiment, "carry_out", never)
    code, out, err = run(*arguments)
    assert code == 2
    assert complaint in err
    assert err.startswith("main_unlearn.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--checkpoint", "none.pt"], "there is no checkpoint none.pt; name an existing file with --checkpoint"),
        (
            ["--model", "torchvision:resnet18", "--checkpoint", "IMAGENET1K_V9"],
            "there is no checkpoint IMAGENET1K_V9; name an existing file with --checkpoint",
        ),
        (
            ["--evaluate", "retrained", "--retrained", "none.pt"],
            "there is no none.pt; expected weights of a model trained without D_f for --retrained",
        ),
        (["--forget-file", "none.txt"], "cannot read the forget file none.txt: No such file or directory"),
        (["--goal", "relabel", "--relabel-file", "none.txt"], "cannot read the relabel file none.txt"),
        (["--forget-dir", "nowhere"], "--forget-dir nowhere does not hold images in a subfolder per class"),
    ],
)
def test_a_missing_file_is_reported_before_the_data_set_is_loaded(run, arguments, complaint, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("data are loaded")

    monkeypatch.setattr("l2ul.cli.options.load_data", never)
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err


def test_the_scripts_that_train_original_models_are_there():
    assert all((ROOT / script).is_file() for script in unlearn_command.PRETRAINING.values())
    arguments = ["--dataset", "utkface", "--age-grouping", "MFD", "--model", "resnet18"]
    words = "python main_pretrain_utkface_resnet18.py --dataset utkface --model resnet18 --age-grouping MFD"
    assert shlex.join(unlearn_command.pretraining(unlearn_options.parse(arguments))) == words


def test_the_command_that_trains_missing_weights_has_the_data_of_the_run(tmp_path):
    data = f"--data-dir '{tmp_path}/my data' --image-size 64 --split-seed 3"
    opts = unlearn_options.parse(shlex.split(f"--dataset utkface --model resnet34 {data}"))
    command = shlex.join(unlearn_command.pretraining(opts))
    assert command == f"python main_pretrain_utkface_resnet18.py --dataset utkface --model resnet34 {data}"


def test_a_missing_gpu_is_one_sentence(run):
    code, _, err = run("--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "--device cuda is not available on this machine; expected one of" in err


def test_bad_forget_and_relabel_files_are_one_sentence(run, tmp_path, few_digits):
    true = few_digits.train.labels[forget_set.choose_forget(40, 2, 0)].tolist()
    for flag, text, complaint in (
        ("--forget-file", "1\nx\n", "line 2"),
        ("--forget-file", "1\n1\n", "more than once"),
        ("--forget-file", "1\n40\n", "index 40; expected 0 to 39"),
        ("--forget-file", "1\n", "--unlearn-k is 2, but"),
        ("--relabel-file", "1\n", "has 1 labels, but D_f has 2 images"),
        ("--relabel-file", f"{(true[0] + 1) % 10}\n{true[1]}\n", "is the image's true label"),
    ):
        (tmp_path / "file.txt").write_text(text)
        goal = ["--goal", "relabel"] if flag == "--relabel-file" else []
        code, _, err = run(*goal, flag, tmp_path / "file.txt")
        assert (code, err.count("\n")) == (2, 1)
        assert complaint in err


def test_interruption_full_memory_and_full_disk_are_one_sentence(run, tmp_path, monkeypatch):
    for error, expected, sentence in (
        (KeyboardInterrupt(), 130, "finished runs are kept"),
        (torch.OutOfMemoryError("tried 8 GiB"), 1, "out of memory (tried 8 GiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (OSError(28, "No space left on device", "runs/x.json"), 1, "the disk is full (runs/x.json)"),
    ):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(execution.unlearn, "unlearn", fail)
        code, _, err = run("--method", "neggrad")
        assert code == expected
        assert sentence in err
        assert err.strip().count("\n") == 0


def test_outputs_of_a_multi_label_model_are_refused_without_single_label(run, tmp_path):
    state = load_file("data/weights/digits_resnet20.safetensors")
    (weight,) = [name for name, tensor in state.items() if tensor.ndim == 2]
    state[weight] *= 0.01
    state[weight.replace("weight", "bias")] = torch.tensor([3.0, 3.0] + [-4.0] * 8)
    torch.save(state, tmp_path / "several.pt")
    words = ["--checkpoint", tmp_path / "several.pt", "--method", "neggrad", "--dry-run"]
    code, _, err = run(*words)
    assert (code, err.count("\n"), "add --single-label if it is one" in err) == (2, 1, True)
    assert run(*words, "--single-label")[0] == 0


def test_a_model_that_its_library_does_not_write_is_refused_before_the_attack(run, tmp_path, vit_folder, monkeypatch):
    folder = shutil.copytree(vit_folder, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_attentions": True}))
    words = ["--model", f"hf:{folder}", "--method", "neggrad"]
    monkeypatch.setattr(execution.Experiment, "carry_out", lambda experiment, runs: pytest.fail("work was begun"))
    for keeps in (["--save-model"], ["--continual-step", 1], ["--save-model", "--dry-run"]):
        code, out, err = run(*words, *keeps)
        assert (code, err.count("\n")) == (2, 1), out + err
        assert "cannot be written again in its form (ValueError: The `output_attentions` attribute" in err
        assert not list((tmp_path / "models").iterdir())
    assert run(*words, "--dry-run")[0] == 0


@pytest.mark.parametrize("name", ["runs", "models", "tracking"])
def test_a_file_in_the_place_of_a_result_folder_is_refused(run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    code, _, err = run("--method", "neggrad", "--save-model", "--tracker", "csv")
    assert (code, f"cannot write to {tmp_path / name} (" in err) == (2, True), err
