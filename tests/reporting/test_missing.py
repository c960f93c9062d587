"""Test the lists below the tables: missing runs with commands, damaged files, and messages on bad input."""

import json
from pathlib import Path
import re
import shlex

import pytest
import tabled
from tabled import NONE, RECORD, cells

from l2ul.common.markup import plain
from l2ul.reporting import read_records
import main_tables
import main_unlearn

folder, tables = tabled.folder, tabled.tables  # fixtures


def test_missing_runs_are_listed_with_commands(folder, tables):
    folder(
        {"checkpoint": "resnet20.th", "bn": "eval"},
        {"seed": 1, "bn": "eval"},
        {"k": 64, "bn": "eval"},
        {"method": "adv_imp", "bn": "eval"},
        {"method": "adv_imp", "bn": "eval", "seed": 1},
    )
    markdown = tables()
    assert "- cifar10, resnet20, goal misclassify, k = 64: `adv` seed 1; `adv_imp` seed 0 1\n" in markdown
    lines = markdown.split("```bash\n")[1].split("\n```")[0].splitlines()
    assert len(lines) == 2  # seed 0 lacks one method, seed 1 both
    assert all("--model resnet20 --checkpoint resnet20.th --bn eval" in line for line in lines)
    assert lines[0].endswith("--unlearn-k 64 --seed 1 --method adv adv_imp")
    assert lines[1].endswith("--unlearn-k 64 --seed 0 --method adv_imp")


def test_weights_without_a_file_name_are_identified_by_their_hash(folder, tables):
    folder({})
    markdown = tables("--seed", 0, 1)
    assert "--checkpoint FILE" in markdown
    assert "`FILE` is the file with the weights of resnet20 whose SHA-256 begins with 12fca82f0beb." in markdown


def test_commands_for_a_network_of_the_user_name_its_weights_and_say_what_to_start(folder, tables):
    folder({"model": "small", "checkpoint": "small.pt"})
    markdown = tables("--seed", 0, 1)
    assert "--model small --checkpoint small.pt" in markdown
    assert "\nIn place of main_unlearn.py, start the file of yours that registers `small`.\n" in markdown
    folder({"checkpoint": "resnet20.pt"})  # the name that the released scripts use
    (line,) = [line for line in tables("--seed", 0, 1).splitlines() if "--model resnet20" in line]
    assert "--checkpoint" not in line


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("relabel_file", "the file of the new labels, one for each image of D_f in its order"),
        ("forget_dir", "the folder of the images of D_f"),
    ],
)
def test_files_that_decide_d_f_are_named_in_commands_and_explained(folder, tables, key, meaning):
    folder({"goal": "relabel", "acc_relabel": 100.0, "checkpoint": "usual.pt", key: "new"})
    markdown = tables("--seed", 0, 1)
    assert f" --{key.replace('_', '-')} new " in markdown
    assert f"`new` is {meaning}. Add its folder if it is not in the current one." in markdown


def test_each_seed_has_its_own_file_of_new_labels(folder, tables):
    run = {"goal": "relabel", "acc_relabel": 100.0, "checkpoint": "usual.pt"}
    folder(*(run | {"seed": seed, "relabel_file": f"{seed}.txt"} for seed in (0, 1)))
    markdown = tables("--method", "adv", "adv_imp")
    assert "relabel_file=" not in markdown  # the seeds are one row
    for seed in (0, 1):
        assert re.search(f"--relabel-file {seed}.txt .*--seed {seed} --method adv_imp", markdown), markdown


def test_each_file_of_weights_is_identified_by_its_own_hash(folder, tables):
    other = {"checkpoint": "other.pt", "checkpoint_sha256": "22" * 32}
    folder({"checkpoint": "usual.pt"}, {"seed": 1, "checkpoint": "usual.pt"}, {"method": "neggrad"} | other)
    markdown = tables("--seed", 0, 1, 2)
    assert "`usual.pt` is the file with the weights of resnet20 whose SHA-256 begins with 12fca82f0beb." in markdown
    assert "`other.pt` is the file with the weights of resnet20 whose SHA-256 begins with 222222222222." in markdown


@pytest.mark.parametrize(
    ("record", "flag"),
    [
        ({"precision": "fp32", "device": "NVIDIA H100"}, "--precision fp32"),  # the default there is tf32
        ({"precision": "fp32", "device": "cpu (4 threads) x 2"}, None),
        ({"precision": "fp32", "device": "mps"}, None),
        ({"precision": "fp32", "device": None}, None),
        ({"dataset": "faces", "image_size": 224}, "--image-size 224"),  # the default of small images is their size
        ({"dataset": "hf:faces", "image_size": 224}, "--image-size 224"),
        ({"dataset": "imagenet", "image_size": 224}, None),
    ],
)
def test_commands_state_what_other_images_and_devices_do_not_imply(folder, tables, record, flag):
    folder(record)
    line = tables("--seed", 0, 1).split("```bash\n")[1].split("\n```")[0]
    assert flag in line if flag else "--precision" not in line and "--image-size" not in line


def planned(script, line: str) -> set[str]:
    words = shlex.split(line)
    assert words[:2] == ["python", "main_unlearn.py"]
    code, out, err = script(main_unlearn.main, *words[2:], "--dry-run")
    assert (code, err) == (0, "")
    assert "done " not in out.split("\n", 1)[1]
    return {text.split()[2] for text in out.splitlines() if text.startswith("to do")}


@pytest.mark.parametrize(("goal", "method"), [("misclassify", "neggrad"), ("relabel", "correct")])
def test_commands_plan_exactly_the_missing_runs(run, script, tables, tmp_path, goal, method):
    base = ["--goal", goal, "--method", "before", method, "--seed", 0, 1]
    assert run(*base, "--bn", "eval")[0] == 0
    assert run(*base[:-1], "--bn", "eval", "--unlearn-k", 3)[0] == 0
    there = {path: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    gone = {(2, "before", 1), (2, method, 0)}
    expected = {path for path, record in there.items() if (record["k"], record["method"], record["seed"]) in gone}
    for path in expected:
        path.unlink()
    lines = tables("--unlearn-k", 2).split("```bash\n")[1].split("\n```")[0].splitlines()
    assert set().union(*(planned(script, line) for line in lines)) == {path.stem for path in expected}


def test_settings_of_a_method_of_fixed_length_are_rows_and_flags(run, script, tables, tmp_path):
    net = ["--method", "boundary_shrink", "jit", "--course", "copies=2"]
    assert run(*net, "epochs=1", "--seed", 0, 1)[0] == 0
    assert run(*net, "epochs=2", "--seed", 0)[0] == 0
    theirs = [json.loads(path.read_text())["course"] for path in (tmp_path / "runs").glob("*.json")]
    assert theirs.count("augment=1 batch=64 bound=0.1 epochs=1 lr=1e-05") == 2
    markdown = tables("--seed", 0, 1, 2)
    assert cells(markdown, "boundary_shrink") != cells(markdown, "boundary_shrink (epochs=2)")
    assert cells(markdown, "jit")[0]
    lines = markdown.split("```bash\n")[1].split("\n```")[0].splitlines()
    assert sorted(shlex.split(line)[shlex.split(line).index("--setting") + 1] for line in lines) == [
        "copies=2",
        "epochs=1",
    ]
    assert all(len(planned(script, line)) == 1 for line in lines)


def test_commands_for_selected_runs_that_were_never_done(run, script, tables, tmp_path):
    assert run("--method", "neggrad", "adv")[0] == 0
    markdown = tables("--method", "adv", "adv_imp", "--unlearn-k", 2, 4, "--seed", 0)
    lines = markdown.split("```bash\n")[1].split("\n```")[0].splitlines()
    found = set().union(*(planned(script, line) for line in lines))
    assert run("--method", "adv", "adv_imp", "--unlearn-k", 2, 4)[0] == 0
    records_there = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    made = {(records_there[name]["k"], records_there[name]["method"]) for name in found}
    assert made == {(2, "adv_imp"), (4, "adv"), (4, "adv_imp")}
    assert "## Missing" not in tables("--method", "adv", "adv_imp", "--unlearn-k", 2, 4, "--seed", 0)


def test_a_listed_forget_set_is_a_row_of_its_own(run, script, tables, tmp_path):
    file = tmp_path / "forget.txt"
    file.write_text("3\n1\n")
    assert run("--method", "neggrad", "--seed", 0)[0] == 0
    assert run("--method", "neggrad", "before", "--forget-file", file, "--seed", 0)[0] == 0
    assert "neggrad (D_f by seed)" in tables()
    markdown = tables("--method", "before", "--seed", 0, 1)
    line = markdown.split("```bash\n")[1].split("\n```")[0]
    assert "--forget-file" in line
    assert len(planned(script, line)) == 1


def test_a_continual_run_on_a_listed_forget_set_is_a_row_of_its_own(run, tables, tmp_path):
    """With another seed, so that both would be averaged."""
    file = tmp_path / "forget.txt"
    file.write_text("3\n1\n")
    words = ["--method", "before", "--continual-step", 1]
    assert run(*words, "--seed", 0)[0] == 0
    assert "D_f from a file" not in tables()
    assert run(*words, "--seed", 1, "--forget-file", file)[0] == 0
    assert "before (D_f from a file), step 2" in tables()


DAMAGED = {
    "cut.json": ('{"method": "adv"', "is not JSON"),
    "bytes.json": (b"\xff\x00", "is not JSON"),
    "deep.json": ("[" * 100000, "is not JSON"),
    "list.json": ("[1]", "is not a record"),
    "empty.json": ("{}", "is incomplete: it lacks dataset, model, checkpoint_sha256 and more"),
    "status.json": ({"status": "fine"}, 'status is "fine"; expected one of forgotten'),
    "nan.json": ({"acc_test": float("nan")}, "holds NaN"),
    "huge.json": (json.dumps(RECORD).replace("70.0", "1e999"), "acc_test is Infinity"),
    "text.json": ({"acc_test": "good"}, 'acc_test is "good"; expected a percentage from 0 to 100 or null'),
    "null.json": ({"acc_test": None}, "acc_test is null but status is forgotten; expected a percentage"),
    "k.json": ({"k": "2"}, 'k is "2"; expected an integer of at least 1'),
    "name.json": ({"method": None}, "method is null; expected a name"),
    "goal.json": ({"goal": "retain"}, 'goal is "retain"; expected one of misclassify, relabel'),
    "step.json": ({"continual_step": 0}, "continual_step is 0; expected an integer of at least 1 or null"),
    "nested.json": ({"pgd_eps": [4.0]}, "pgd_eps is [4.0]; expected a number or null"),
    "unknown.json": ({"tags": ["a"]}, 'tags is ["a"]; expected a single value or null'),
    "boolean.json": ({"pgd_eps": True}, "pgd_eps is true; expected a number or null"),
    "words.json": ({"mean": "0.5 grey"}, "expected text that holds numbers separated by spaces or null"),
    "key.json": ({"metric_" + "x" * 99_999: 1.0}, "… ed957d5e'; expected a name of 1 to 255 characters"),
    "newline.json": ({"a\n- b": 1.0}, "a key is 'a\ufffd- b'; expected a name"),
    "twin.json": ({"seconds_unlearn": 9.0}, "the same run as"),
}


def test_every_damaged_file_is_listed_with_the_reason(folder, tables, tmp_path):
    runs = folder({}, {"seed": 1}) / "runs"
    for name, (content, _) in DAMAGED.items():
        content = json.dumps(RECORD | content) if isinstance(content, dict) else content
        (runs / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (runs / "folder.json").mkdir()
    markdown = tables()
    assert cells(markdown, "adv")[2] == "**70.00 ± 0.00**"
    problems = plain(markdown.split("## Problems")[1]).splitlines()
    for name, (_, reason) in DAMAGED.items():
        assert any(f"/{name}: " in line and reason in line for line in problems), name
    assert any("/folder.json: cannot be read" in line for line in problems)
    assert len([line for line in problems if line.startswith("- ")]) == len(DAMAGED) + 1


def test_records_from_before_a_setting_have_its_value_of_that_time(folder):
    old = {"method": "distill", "robust": 1, "robust_keep": 10.0}
    folder(old, old | {"robust_classes": 1.0}, old | {"robust_classes": 0.0})
    read, problems = read_records.read([folder({"seed": 1})])
    assert len(read) == 3
    assert len(problems) == 1
    assert "the same run as" in problems[0]


def test_a_record_of_a_failed_run_does_not_hide_the_run_that_was_repeated_elsewhere(folder, tables, tmp_path):
    folder({"status": "failed"} | NONE, into="a/runs")
    folder({}, into="b/runs")
    folder({"status": "failed"} | NONE, into="c/runs")
    markdown = tables()
    assert cells(markdown, "adv")[2] == "**70.00**"
    problems = markdown.split("## Problems")[1]
    assert all(f"{name}.json: the same run as" in problems for name in ("a/runs/00", "c/runs/02"))
    assert problems.count("the same run as") == problems.count("b/runs/01.json; it is counted once") == 2


def test_runs_on_images_that_have_changed_are_not_counted_as_one(folder, tables):
    folder({"data_sha256": "a" * 64}, into="a/runs")
    folder({"data_sha256": "b" * 64, "acc_test": 60.0}, into="b/runs")
    folder({"data_sha256": "b" * 64, "acc_test": 60.0}, {}, into="c/runs")  # {}: of an earlier version
    markdown = tables()
    assert [cells(markdown, f"adv (D_r and D_test {name * 12})")[2] for name in "ab"] == ["70.00", "60.00"]
    assert markdown.split("## Problems")[1].count("the same run as") == 2


def test_without_a_valid_record_there_is_no_table(tmp_path, tables):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{")
    assert tables().startswith("No table")


def test_runs_of_subfolders_are_read_only_if_the_folder_has_none(folder):
    place = folder({}, into="a/runs")
    folder({"seed": 1}, into="b/runs")
    assert [record["seed"] for record in read_records.read([place])[0]] == [0, 1]
    assert [record["seed"] for record in read_records.read([place / "b", place / "a"])[0]] == [1, 0]
    folder({"seed": 2})
    assert [record["seed"] for record in read_records.read([place])[0]] == [2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "nothing"], "unknown method 'nothing'"),
        (["--dataset", "cifar100"], "there is no record of data set 'cifar100'; expected one of cifar10"),
        (["--unlearn_k", "0"], "'0' is not allowed"),
        (["--result-dir", "nowhere"], "nowhere has no folder runs"),
    ],
)
def test_bad_input_is_one_sentence(folder, script, arguments, sentence):
    code, out, err = script(main_tables.main, "--result-dir", folder({}), *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not Path("nowhere").exists()


def test_an_empty_folder_is_one_sentence(script, tmp_path):
    (tmp_path / "runs").mkdir()
    code, _, err = script(main_tables.main, "--result-dir", tmp_path)
    assert code == 2
    assert re.fullmatch(r"main_tables\.py: there is no record in \S+; make records with main_unlearn\.py\n", err)


def test_commands_of_continual_runs_continue_from_recorded_steps(run, script, tables, tmp_path):
    steps = ["--continual-step", 1, "--method", "neggrad"]
    assert run(*steps, "--unlearn-k", 2)[0] == 0
    line = tables("--unlearn-k", 3, "--seed", 0).split("```bash\n")[1].split("\n```")[0]
    assert "--continual-step 1 --" in line
    code, out, _ = script(main_unlearn.main, *shlex.split(line)[2:], "--dry-run")
    assert code == 0
    states = [text.split()[0] for text in out.splitlines()[1:] if not text.startswith("estimated")]
    assert states == ["done", "done", "to"]


def test_commands_of_continual_runs_have_whole_steps(folder, tables):
    folder({"continual_step": 1, "continual_size": 16}, {"k": 40})
    assert "k = 32 (16 per step)" in tables("--unlearn-k", 40)
    assert "k = 40 (16 per step)" not in tables("--unlearn-k", 40)


def test_figures_are_written_beside_the_tables(folder, tables, tmp_path):
    folder({}, {"method": "adv_imp"})
    tables("--figures", 1)
    assert (tmp_path / "tables" / "cifar10_resnet20_1_accuracy_against_k.png").is_file()


def test_commands_name_the_surrogate_images_of_methods_that_use_them_or_lose_test_images(folder, tables):
    part = {"num_test": 5000, "test_without": "test:0-5000"}
    used = {"method": "distill", "num_test": 5000, "surrogate": "test:0-5000"}
    folder(part, used, {"method": "neggrad", "num_test": 10_000})
    lines = tables("--seed", 0, 1).split("```bash\n")[1].split("\n```")[0].splitlines()
    methods = {line.split("--method ")[1]: "--surrogate test:0-5000" in line for line in lines}
    assert methods == {"adv distill": True, "neggrad": False}


def test_files_that_a_gpu_refused_make_no_row_of_their_own(folder, tables):
    folder({"decoder": "gpu"}, {"decoder": "gpu, 2 files cpu", "seed": 1})
    markdown = tables("--method", "adv", "--seed", 0, 1, 2)
    assert cells(markdown, "adv")[2] == "**70.00 ± 0.00**"
    assert " --decoder gpu " in markdown
