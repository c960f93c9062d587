"""The project's own files say the same thing in each place they say it, and the README tells the truth."""

import csv
import json
import os
from pathlib import Path
import re
import statistics
import subprocess
import tomllib

from conftest import ROOT
import pytest

from l2ul.cli import command_line_docs, unlearn_options
from l2ul.data import utkface
from l2ul.methods import registry
from l2ul.methods.settings import SHARED
from l2ul.metrics import columns
from l2ul.models import checkpoint
from l2ul.reporting import published

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*data/README.md")])
}


def split(requirement: str) -> tuple[str, str]:
    name, version = re.match(r"([A-Za-z0-9-]+)(.*)", requirement.strip()).groups()
    return {"pytorch": "torch"}.get(name, name), version


def conda_requirements() -> list[str]:
    text = (ROOT / "environment.yml").read_text()
    return [line.strip(" -") for line in text.split("dependencies:")[1].splitlines() if line.strip(" -")]


def test_conda_and_pip_read_the_same_ranges():
    pip = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    conda = {split(line) for line in conda_requirements() if line not in ("pip", "pip:")}
    assert conda == {split(line) for line in pip} | {("python", PROJECT["project"]["requires-python"])}


def test_constraints_are_equal_in_both_places_and_cover_what_is_asked_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == PROJECT["tool"]["uv"]["constraint-dependencies"]
    extras = sum(PROJECT["project"]["optional-dependencies"].values(), [])
    groups = PROJECT["dependency-groups"]
    asked = PROJECT["project"]["dependencies"] + extras + groups["dev"] + groups["notebooks"]
    assert [split(pin)[0] for pin in pins] == list(dict.fromkeys(split(line)[0] for line in asked))


def test_the_readme_is_short_and_names_every_method():
    assert len(README.splitlines()) <= 250
    for name in registry.METHODS:
        assert f"`{name}`" in README
        assert f"`{name}`" in (ROOT / "docs" / "methods.md").read_text()


def test_the_page_of_metrics_has_a_row_for_every_column():
    page = PAGES["docs/metrics.md"]
    for key in columns.COLUMNS:
        name = re.sub(r"metric_mia_\w+_(auc|tpr)", r"metric_mia_<attack>_\1", key)
        name = re.sub(r"metric_forgotten_(?!as_used)\w+", "metric_forgotten_<change>", name)
        assert re.search(rf"^\| .*`{name}`", page, re.MULTILINE), key


def test_commands_of_readme_and_docs_name_files_that_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"(?:uv run|python|bash|--extra \w+) ((?:\w+/)*[a-z0-9_]+\.(?:py|sh))", text):
            assert (ROOT / name).exists() or f"# {name}: " in text, (page, name)  # or an example of the page
    assert "pip install uv && uv run main_unlearn.py" in README
    assert "pip install uv && uv run pytest" in README


def commands(text: str) -> list[str]:
    """Return the lines of the shell blocks, continuation lines joined, without comments."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def known_flags():
    found = {script: command_line_docs.help_text(script) for script in command_line_docs.SCRIPTS}
    return {script: set(re.findall(r"--[a-z][a-z-]+", text)) for script, text in found.items()}


def test_flags_of_commands_in_readme_and_docs_exist(known_flags):
    checked = 0
    for page, text in PAGES.items():
        for command in commands(text):
            script = re.search(r"\bmain_\w+\.py", command)
            if script is None:
                continue
            flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]+", command[script.end() :]))
            assert flags <= known_flags[script[0]], (page, command)
            checked += 1
    assert checked > 20


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.reference
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        place = (ROOT / page).parent / name if name else ROOT / page
        assert place.exists(), (page, target)
        if anchor:
            assert anchor in anchors(place.read_text()), (page, target)


def test_no_page_is_wider_than_a_screen():
    for page, text in PAGES.items():
        for line in text.splitlines() if page != "docs/command-line.md" else ():
            assert len(line) <= 120 or line.startswith(("|", "![")), (page, line)


def results_rows() -> list[list[str]]:
    table = README.split("## Results")[1].split("\n\n")[2]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def recorded(folder: str, method: str, k: int) -> list[dict]:
    """Return the committed records of a method: plain runs that misclassify, with the default of --bn."""
    paths = sorted((ROOT / "result_data" / "reference" / folder / "runs").glob("*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    same = {"method": method, "k": k, "goal": "misclassify", "continual_step": None}
    return [record for record in found if same.items() <= record.items() and record["bn"] != "eval"]


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


@pytest.mark.reference
@pytest.mark.parametrize("row", results_rows(), ids=lambda row: " ".join(row[:2]))
def test_a_row_of_the_results_is_what_the_records_say(row):
    k, name, after, retained, tested, reported, time, count = row
    figures = {figure.method: f"{figure.acc_test:.2f}" for figure in published.figures("cifar10", "resnet18", int(k))}
    assert reported == figures.get(name.strip("`"), "")
    if not name.startswith("`"):
        assert [after, retained, tested, time, count] == [""] * 5  # published by others, not measured
        return
    runs = recorded("cifar10_resnet18", name.strip("`"), int(k))
    forgot = [run for run in runs if run["status"] == "forgotten"]
    averaged = forgot or [run for run in runs if run["status"] == "cap"]
    assert after == f"{statistics.mean(run['acc_forget'] for run in averaged):.2f}" + ("" if forgot else " †")
    assert retained == f"{statistics.mean(run['acc_retain'] for run in averaged):.2f}"
    (before,) = {f"D_r is at {run['acc_retain_before']:.2f} and D_test at {run['acc_test_before']:.2f}" for run in runs}
    assert f"Before unlearning, {before}." in " ".join(README.split())
    assert tested.replace("*", "") == shown([run["acc_test"] for run in averaged])
    assert ("**" in tested) == (name == "`distill`")  # the best of its k
    phases = ("seconds_attack", "seconds_importance", "seconds_unlearn")
    seconds = statistics.median(sum(run[phase] for phase in phases) for run in runs)
    assert time == (f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s")
    assert count == (str(len(runs)) if len(averaged) == len(runs) else f"{len(averaged)} of {len(runs)}")


def reference_rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / "result_data" / "reference" / name).read_text().splitlines()))


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and "|---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.reference
@pytest.mark.parametrize("heading", ["## What stands for D_r at k = 256", "## Forgetting as used"])
def test_accuracies_of_trials_on_a_gpu_are_those_of_the_records(heading):
    records = reference_rows("trials/distill_h100.csv")
    measured = {tuple(f"{float(row[key]):.2f}" for key in ("acc_retain", "acc_test")) for row in records}
    section = PAGES["docs/trials.md"].split(heading)[1].split("\n### ")[0].split("\n## ")[0]
    checked = 0
    for row in table_rows(section):
        numbers = [cell.split(" of ")[0] for cell in row if re.match(r"\d\d\.\d\d( of |$)", cell)]
        if numbers:
            assert tuple(numbers) in measured, row
            checked += 1
    assert checked > 20


@pytest.mark.reference
def test_requests_with_models_of_timm_are_those_of_the_records():
    section = PAGES["docs/deletion-requests.md"].split("**Models of timm.**")[1]
    shown = [row[2:] for row in table_rows(section)[1:]]
    columns_shown = ("recognised", "forgotten_as_stored", "forgotten_as_used")
    records = reference_rows("digits_timm/requests.csv")
    assert shown == [
        [*(row[name] for name in columns_shown), f"{float(row['agreement_percent']):.1f}"] for row in records
    ]
    assert max(float(row["largest_difference_of_probabilities"]) for row in records) < 6e-7


@pytest.mark.reference
def test_agreement_on_stand_ins_is_that_of_the_records():
    text = PAGES["docs/trials.md"].split("Agreement with θ⁰ explains")[1]
    for row in reference_rows("trials/agreement_cpu.csv"):
        kind = {"test images": " of the test images", "synthesised images": " on synthesised images"}.get(row["images"])
        if kind:
            assert f"{float(row['agreement_percent']):.1f} %{kind}" in text
    for row in reference_rows("trials/between_cpu.csv"):
        assert f"D_test {row['acc_test']}" in text


def test_generated_pages_are_what_the_code_says():
    for path, text in command_line_docs.generated().items():
        assert path.read_text() == text, f"{path.name} is out of date; run: python -m l2ul.cli.command_line_docs"


@pytest.mark.reference
def test_costs_of_the_main_command_in_the_readme_are_those_of_the_record():
    record = json.loads((ROOT / "result_data" / "reference" / "benchmarks" / "readme_commands.json").read_text())
    (row,) = [row for row in record["commands"] if row["command"] == "uv run main_unlearn.py"]
    text = " ".join(README.split())
    assert f"an environment of about {record['environment_gb']:.0f} GB" in text
    assert (
        f"needs {row['seconds_cpu'] / 60:.0f} minutes of CPU time and {row['peak_memory_mib'] / 1024:.1f} GiB" in text
    )
    assert f"{row['seconds_wall'] / 60:.0f} minutes on a busy AMD EPYC" in text


def test_files_name_no_place_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = tracked.stdout.split()
    assert "uv.lock" not in names
    for name in names:
        if name.endswith((".py", ".md", ".toml", ".yml", ".sh", ".json", ".txt")):
            text = (ROOT / name).read_text()
            assert f"{ROOT}/" not in text, name
            assert "index" + "-url" not in text, name


def shell(script, folder, answer="", arguments=("--dry-run",), **variables):
    """Run a shell script with a stub for python, which notes how it was called; `answer` is shell code of the stub."""
    stub = folder / "stub"
    stub.write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/calls\n{answer}\n')
    stub.chmod(0o755)
    words, environment = ["bash", str(ROOT / script), *arguments], os.environ | {"PYTHON": str(stub)} | variables
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    calls = (folder / "calls").read_text().splitlines()
    return done, calls


def test_shell_script_says_what_is_missing_and_goes_on(tmp_path):
    answer = 'case "$*" in *cifar100*) exit 2;; esac'  # no data for two of the experiments
    done, calls = shell("run_unlearn_cifar_imagenet.sh", tmp_path, answer, SEEDS="0 1", K="16")
    assert done.returncode == 1
    experiments = ["cifar10", "cifar100", "cifar100", "imagenet"] + ["cifar10"] * 6 + ["imagenet"]
    assert [line.split("--dataset ")[1].split()[0] for line in calls] == experiments
    assert all("--seed 0 1 " in line and line.endswith("--dry-run") for line in calls)
    assert done.stderr.count("was not run (exit code 2)") == 2
    assert "main_pretrain_cifar100_resnet50.py" in done.stderr
    for line in calls:
        options_of(line)  # every command is one that main_unlearn.py takes
    assert sum("--goal relabel" in line for line in calls) == 2
    assert sum("--continual-step 16" in line for line in calls) == 1


def options_of(line):
    return unlearn_options.parse(line.split()[1:])


def test_shell_script_does_what_is_asked_for_alone(tmp_path):
    done, calls = shell("run_unlearn_cifar_imagenet.sh", tmp_path, WHAT="vit continual")
    assert done.returncode == 0
    assert ["hf:" in line for line in calls] == [True, False]


def test_shell_script_runs_mnist_only_when_it_is_named(tmp_path):
    done, calls = shell("run_unlearn_cifar_imagenet.sh", tmp_path, WHAT="mnist fashion_mnist", SEEDS="0")
    assert done.returncode == 0
    given = [options_of(line) for line in calls]
    assert [(one.dataset, one.model) for one in given] == [("mnist", "lenet"), ("fashion_mnist", "lenet")]


def test_shell_script_knows_no_other_experiment(tmp_path):
    (tmp_path / "calls").touch()
    done, calls = shell("run_unlearn_cifar_imagenet.sh", tmp_path, WHAT="cifra10")
    assert (done.returncode, calls) == (2, [])
    assert "WHAT names cifra10" in done.stderr


def test_shell_script_has_the_settings_of_the_released_ones(tmp_path):
    _, calls = shell("run_unlearn_cifar_imagenet.sh", tmp_path, WHAT="cifar10 cifar100 vit imagenet")
    for line in calls:
        given = options_of(line)
        default = unlearn_options.parse(["--dataset", given.dataset])
        differing = {name for name in SHARED if getattr(given, name) != getattr(default, name)}
        assert differing == ({"adv_batch_size", "max_passes"} if "hf:" in line else set()), line


def test_shell_script_of_faces_pretrains_and_unlearns_each_grouping_with_the_released_settings(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for grouping in utkface.AGE_GROUPINGS:  # for a dry run unlearns where there are weights
        (weights / f"utkface_{grouping}_resnet18_cifar100.safetensors").touch()
    answer = 'case "$*" in *pretrain*MFD*) exit 2;; esac'
    done, calls = shell("run_unlearn_utkface.sh", tmp_path, answer, WEIGHTS=str(weights))
    assert done.returncode == 1
    assert done.stderr.count("was not finished (exit code 2)") == 1
    pretraining = [line for line in calls if "main_pretrain_utkface_resnet18.py" in line]
    unlearning = [line for line in calls if "main_unlearn.py" in line]
    assert [line.split("--age-grouping ")[1].split()[0] for line in pretraining] == list(utkface.AGE_GROUPINGS)
    assert len(unlearning) == 4  # not after the pretraining that failed
    default = unlearn_options.parse(["--dataset", "utkface"])
    for line in unlearning:
        given = options_of(line)
        assert [n for n in SHARED if getattr(given, n) != getattr(default, n)] == []
        assert given.unlearn_k == default.unlearn_k
        assert Path(given.checkpoint).stem == f"utkface_{given.age_grouping}_resnet18_cifar100"
    assert all("--epochs 100" in line and "--resume" in line for line in pretraining)


def test_a_dry_run_of_the_faces_trains_nothing(tmp_path):
    (tmp_path / "calls").touch()
    done, calls = shell("run_unlearn_utkface.sh", tmp_path, WEIGHTS=str(tmp_path / "none"))
    assert (done.returncode, calls) == (0, [])
    assert done.stdout.count("would train first: ") == 5


def test_a_dry_run_of_the_comparison_trains_nothing_and_lists_the_runs_of_nets_that_are_there(tmp_path):
    (tmp_path / "calls").touch()
    nets = tmp_path / "nets"
    done, calls = shell("run_compare.sh", tmp_path, NETS=str(nets))
    assert (done.returncode, calls) == (0, [])
    assert done.stdout.count("would train first: ") == 4
    assert not nets.exists()
    nets.mkdir()
    for name in ("original", "retrained", "reference2", "reference3"):
        (nets / f"{name}.safetensors").touch()
    done, calls = shell("run_compare.sh", tmp_path, NETS=str(nets), SETTINGS="epochs=2")
    assert done.returncode == 0
    given = [options_of(line) for line in calls]
    assert sorted(sum((found.method for found in given), [])) == sorted(registry.of_goal("misclassify"))
    assert [found.setting for found in given] == [{}, {}, {"augment": 2.0, "epochs": 2.0}]
    assert all(len(found.references) == 2 and found.retrained for found in given)
    own = {"SCRIPT": "my_method.py", "OURS": "bounded", "OTHERS": "", "TRAINED": ""}
    done, calls = shell("run_compare.sh", tmp_path, NETS=str(nets), **own)
    assert (done.returncode, len(calls)) == (0, 4)
    assert calls[3].startswith("my_method.py ")
    assert " --method bounded --dry-run" in calls[3]


def test_the_repository_has_the_nets_that_the_comparison_needs_by_default(tmp_path):
    folder = ROOT / "data" / "weights" / "compare" / "cifar10_resnet20_k256_seed0"
    if not folder.exists():
        pytest.skip("an sdist does not have these nets")
    settings = [checkpoint.read(file)[1] for file in sorted(folder.glob("*.safetensors"))]
    assert [found["seed"] for found in settings] == [0, 2, 3, 1]  # original, reference2, reference3, retrained
    assert [len(found.get("excluded", ())) for found in settings] == [0, 256, 256, 256]
    recipes = [{name: found[name] for name in ("schedule", "lr", "epochs", "precision")} for found in settings]
    assert recipes == [{"schedule": "onecycle", "lr": 0.2, "epochs": 8, "precision": "fp32"}] * 4
    done, calls = shell("run_compare.sh", tmp_path)
    assert (done.returncode, len(calls)) == (0, 3)  # nothing is trained


@pytest.mark.parametrize(
    ("metrics", "trained"),
    [("membership", 1), ("membership rmia", 3), ("relearn", 2), ("retrained distance", 2), ("rmia retrained", 4)],
)
def test_the_comparison_trains_the_nets_that_its_metrics_compare_with(tmp_path, metrics, trained):
    (tmp_path / "calls").touch()
    nets = tmp_path / "nets"
    done, calls = shell("run_compare.sh", tmp_path, NETS=str(nets), EVALUATE=metrics)
    assert (done.returncode, calls) == (0, [])
    assert done.stdout.count("would train first: ") == trained
    nets.mkdir()
    for name in ("original", "retrained", "reference2", "reference3"):
        (nets / f"{name}.safetensors").touch()
    done, calls = shell("run_compare.sh", tmp_path, NETS=str(nets), EVALUATE=metrics)
    assert (done.returncode, len(calls)) == (0, 3)
    for line in calls:
        options_of(line)  # which refuses models that no metric uses


def test_the_comparison_checks_that_its_nets_are_of_the_recipe(tmp_path):
    nets = tmp_path / "nets"
    nets.mkdir()
    for name in ("original", "retrained", "reference2", "reference3"):
        (nets / f"{name}.safetensors").touch()
    answer = 'case "$*" in *retrained*) exit 2;; esac'  # as main_pretrain does for a file of another recipe
    done, calls = shell("run_compare.sh", tmp_path, answer, arguments=(), NETS=str(nets), RECIPE="--epochs 3")
    assert done.returncode == 2
    assert ["--epochs 3 " in line for line in calls] == [True, True]


@pytest.mark.parametrize("flag", ["--tracker", "--model timm:", "--dataset hf:"])
def test_documented_commands_of_uv_name_the_extras_that_they_need(flag):
    pages = [ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")]
    commands = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    lines = [line for line in re.findall(r"^uv run .*$", commands, re.M) if flag in line]
    needed = {"--model timm:": ["timm"], "--dataset hf:": ["datasets"]}
    assert lines
    for line in lines:
        trackers = re.findall(r"\b(?:tensorboard|wandb|trackio)\b", line.partition("--tracker")[2].partition(" --")[0])
        missing = [name for name in needed.get(flag, trackers) if f"--extra {name}" not in line]
        assert not missing, line
