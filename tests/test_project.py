"""The project's own files say the same thing in each place they say it, and the README tells the truth."""

import os
import re
import subprocess
import sys
import tomllib

from conftest import ROOT
import pytest

from l2ul import methods, options, runs
import main_unlearn

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


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
    asked = PROJECT["project"]["dependencies"] + extras + PROJECT["dependency-groups"]["dev"]
    assert [split(pin)[0] for pin in pins] == [split(line)[0] for line in asked]


def test_readme_has_every_flag_and_method_and_no_other():
    parser_help = subprocess.run(
        [sys.executable, "main_unlearn.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r"(--[a-z-]+)", parser_help.replace("-\n", "-"))) - {"--help"}
    table = README.split("## Flags")[1].split("\n## ")[0]
    told = set(re.findall(r"^\| `(--[a-z-]+)", table, re.MULTILINE))
    assert told == flags
    for name in methods.METHODS:
        assert f"`{name}`" in README


def test_readme_commands_name_files_that_exist():
    for name in re.findall(r"(?:uv run|python|bash) ([a-z0-9_]+\.(?:py|sh))", README):
        assert (ROOT / name).exists() or name.startswith("my_"), name
    assert "pip install uv && uv run main_unlearn.py" in README
    assert "pip install uv && uv run pytest" in README


def test_files_stay_small_and_name_no_place_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = tracked.stdout.split()
    assert "uv.lock" not in names
    for name in names:
        if name.endswith(".py") and not name.startswith("tests/"):
            assert len((ROOT / name).read_text().splitlines()) <= 300, name
        if name.endswith((".py", ".md", ".toml", ".yml", ".sh", ".json", ".txt")):
            text = (ROOT / name).read_text()
            assert f"{ROOT}/" not in text, name
            assert "index" + "-url" not in text, name


def test_shell_script_says_what_is_missing_and_goes_on(tmp_path):
    words = ["bash", str(ROOT / "run_unlearn_cifar_imagenet.sh"), "--dry-run"]
    stub = tmp_path / "stub"  # stands for python: notes how it was called, and has no data for two of four
    stub.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\ncase "$*" in *cifar100*) exit 2;; esac\n')
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "SEEDS": "0 1", "K": "16"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.split("--dataset ")[1].split()[0] for line in calls] == ["cifar10", "cifar100", "cifar100", "imagenet"]
    assert all("--seed 0 1 --method before" in line and line.endswith("--dry-run") for line in calls)
    assert done.stderr.count("was not run (exit code 2)") == 2
    assert "main_pretrain_cifar100_resnet50.py" in done.stderr


def test_shell_script_has_the_settings_of_the_released_ones(monkeypatch):
    script = (ROOT / "run_unlearn_cifar_imagenet.sh").read_text()
    calls = re.findall(r'run "[^"]+" (--dataset [^$]*?) --unlearn-k.*?\\\n(.*?) "\$@"', script, re.DOTALL)
    assert len(calls) == 4
    values = {"$CIFAR10_ADV": "20", "$OTHER_ADV": "200"}
    for head, tail in calls:
        words = [values.get(word.strip('"'), word) for word in f"{head} {tail}".split()]
        given, default = main_unlearn.parse(words), main_unlearn.parse(words[:2])
        differing = {n for n in runs.HYPER_PARAMETERS if getattr(given, n) != getattr(default, n)}
        assert differing == ({"adv_batch_size", "max_passes"} if "hf:" in head else set()), head
    for variable, flag in (("EPS", "pgd_eps"), ("ALPHA", "pgd_alpha"), ("ITERATIONS", "pgd_iter")):
        assert float(re.search(rf"{variable}=\$\{{{variable}:-([^}}]+)\}}", script)[1]) == options.COMMON_DEFAULTS[flag]
