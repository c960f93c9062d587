"""The wheel, the sdist, and the files for GitHub and pre-commit."""

import os
from pathlib import Path
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

from conftest import ROOT
import pytest
import torch
import yaml

import l2ul
from l2ul.cli import command_line_docs

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "from setuptools import build_meta; build_meta.build_wheel('out'); build_meta.build_sdist('out')"
NOT_CODE = (".py", ".pyc")


def run(*words, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(map(str, words), cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_every_package_and_its_data_are_in_pyproject():
    folders = {path.parent for path in (ROOT / "l2ul").rglob("*.py")}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        ".".join(folder.relative_to(ROOT).parts) for folder in folders
    )
    data = [path for path in (ROOT / "l2ul").rglob("*") if path.is_file() and path.suffix not in NOT_CODE]
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    assert sorted(data) == sorted(
        ROOT / Path(*package.split(".")) / name for package, names in listed.items() for name in names
    )


def test_the_version_is_the_same_in_code_and_metadata():
    assert PROJECT["project"]["version"] == l2ul.VERSION
    assert f"## [{l2ul.VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a wheel and an sdist, built from a copy of the clone without build isolation."""
    setuptools = pytest.importorskip("setuptools", "77")
    assert setuptools
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "reference", "cifar10_resnet18.safetensors", "*.egg-info")
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".md", ".txt", ".in", ".sh", ".cff", ".yml", ""):
            shutil.copy(path, folder)
    for name in ("l2ul", "models", "docs", "tests", "benchmarks", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("data/README.md", "data/weights/digits_resnet20.safetensors", "result_data/README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    done = run(sys.executable, "-c", f"import os; os.mkdir('out'); {BUILD}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_the_wheel_has_one_package_with_all_that_it_needs(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        metadata = content.read(f"l2ul-{l2ul.VERSION}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"l2ul", f"l2ul-{l2ul.VERSION}.dist-info"}
    expected = [path for path in (ROOT / "l2ul").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT).as_posix() for path in expected} <= names
    assert {f"l2ul/scripts/{path.name}" for path in ROOT.glob("main_*.py")} <= names
    assert "l2ul/scripts/data/weights/digits_resnet20.safetensors" in names
    assert wheel.stat().st_size < 5e6
    assert "License-Expression: MIT" in metadata


def test_the_sdist_has_scripts_docs_and_tests_but_no_records(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    tracked = ["README.md", "LICENSE", "constraints.txt", "pyproject.toml", "setup.py", "environment.yml"]
    tracked += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    tracked += [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.*")]
    assert set(tracked) | {*command_line_docs.SCRIPTS, "models/__init__.py"} <= names
    assert not any(name.startswith("result_data/reference") for name in names)
    assert sdist.stat().st_size < 10e6


def test_an_installed_wheel_runs_outside_of_the_clone(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "site")
    site = {"PYTHONPATH": str(tmp_path / "site")}
    code = "from l2ul.common.installation import *; print(SCRIPTS, CLONE, commit(), *command('main_forget.py'))"
    done = run(sys.executable, "-c", code, cwd=tmp_path, **site)
    assert done.stdout.split() == [str(tmp_path / "site" / "l2ul" / "scripts"), "None", "None", "l2ul", "forget"]
    for name in ("forget", "pretrain_digits_resnet20"):
        done = run(sys.executable, "-m", "l2ul", name, "--help", cwd=tmp_path, **site)
        assert done.stdout.startswith(f"usage: main_{name}.py [flags]"), done.stderr


def test_the_scripts_start_by_name_in_a_clone_and_a_mistyped_name_is_named():
    done = run(sys.executable, "-m", "l2ul", "tables", "--help", cwd=ROOT)
    assert done.stdout.startswith("usage: main_tables.py [flags]"), done.stderr
    done = run(sys.executable, "-m", "l2ul", "forgt", cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        2,
        "l2ul: there is no script 'forgt'; did you mean forget?; see l2ul --help\n",
    )
    done = run(sys.executable, "-m", "l2ul", cwd=ROOT)
    for script in ROOT.glob("main_*.py"):
        assert f"\n  {script.stem.removeprefix('main_')} " in done.stdout


@pytest.mark.parametrize("name", command_line_docs.SCRIPTS)
def test_the_version_names_software_commit_and_device(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.match(rf"L2UL {re.escape(l2ul.VERSION)}( \(commit [0-9a-f]{{12}}\+?\))?\nPython 3\.", output)
    assert [line.split()[0] for line in output.splitlines()[2:]] == ["torch", "torchvision", "transformers", "device"]
    assert f"torch {torch.__version__.split('+')[0]}" in output


FILES = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_yaml_files_are_valid(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_workflow_calls_the_script_that_people_run():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert {"run": ".ci/run"} in jobs["ci"]["steps"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[!c]*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_github_needs_and_name_flags_that_exist(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert all(element["type"] in ("textarea", "input") and element["attributes"]["label"] for element in fields)
    ids = [element["id"] for element in fields]
    assert len(set(ids)) == len(ids)
    for script, flag in re.findall(r"`python (main_\w+\.py) (--[a-z-]+)`", path.read_text()):
        assert flag in command_line_docs.help_text(script)


def test_pre_commit_uses_the_tested_ruff():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff=="))
    assert [hook["additional_dependencies"] for hook in repository["hooks"]] == [[pin], [pin]]
