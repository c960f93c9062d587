"""The scripts and notebooks of examples/, run as they stand there. `pytest --nbmake examples` runs these in Jupyter."""

import json
import re
import runpy
import shlex
import sys
import tempfile
import types

from conftest import ROOT
import matplotlib
import pytest

from l2ul import __main__ as l2ul_command
from l2ul.methods import registry

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def example(monkeypatch, capsys):
    """Return a function that runs an example as `python -m examples.NAME` and returns what it prints."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    def run(name):
        runpy.run_module(f"examples.{name}", run_name="__main__")
        return capsys.readouterr().out

    return run


def test_forget_tensors(example):
    out = example("forget_tensors")
    assert re.search(r"removed from predictions: \d of 8 images are forgotten as stored", out)
    before, after = map(float, re.findall(r"accuracy on the test images \w+: ([\d.]+) %", out))
    assert before > 85
    assert after > 50


def test_own_objective(example):
    out = example("own_objective")
    assert "forgotten after" in out
    predicted, labels = (json.loads(text) for text in re.findall(r": (\[.*?\])", out.splitlines()[-3]))
    assert len(predicted) == len(labels) == 8
    assert not any(one == other for one, other in zip(predicted, labels, strict=True))


def cells(path, kind="code"):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_have_no_outputs(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len(text) < 20_000
    assert "REPOSITORY =" in cells(path)[0]  # the first cell installs the project where it is not there


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_files_that_exist(path):
    for name in re.findall(r"`([\w/]+\.(?:md|ipynb|py))`", "\n".join(cells(path, "markdown"))):
        assert (ROOT / name).exists() or (EXAMPLES / name).exists(), name


class Notebook:
    """Run the code cells of a notebook in this process, without Jupyter: in much less time.

    A line that starts with ! is a command, in which {…} is an expression. `display` collects its arguments. `script` is
    the fixture of that name.
    """

    def __init__(self, monkeypatch, script):
        self.script = script
        self.names, self.output, self.displayed = {"__name__": "__main__", "_run": self.command}, "", []
        html = types.SimpleNamespace(HTML=lambda data: data, display=self.displayed.append)
        monkeypatch.setitem(sys.modules, "IPython.display", html)

    def run(self, path):
        for code in cells(path):
            code = re.sub(r"^!(.*)$", lambda match: f"_run(f{match[1]!r})", code, flags=re.MULTILINE)
            exec(compile(code, path.name, "exec"), self.names)
        return self.names

    def command(self, words):
        python, *module, name = (arguments := shlex.split(words))[:4]
        assert (python, module) == (sys.executable, ["-m", "l2ul"])
        code, out, err = self.script(l2ul_command.main, name, *arguments[4:])
        assert code == 0, err
        self.output += out


@pytest.fixture
def notebook(monkeypatch, script, tmp_path):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    backend = matplotlib.get_backend()
    matplotlib.use("agg", force=True)
    yield Notebook(monkeypatch, script)
    matplotlib.pyplot.close("all")
    matplotlib.use(backend, force=True)


def test_quickstart(notebook):
    names = notebook.run(EXAMPLES / "quickstart.ipynb")
    assert names["result"].successful
    accuracies = names["accuracies"]
    assert accuracies["before"][0] > 80 > 20 > accuracies["distill"][0]
    assert min(accuracies["before"][1:]) > 90
    assert accuracies["distill"][2] > 60
    assert names["outcome"].steps > 0


@pytest.mark.usefixtures("fast_report")
def test_deletion_request(notebook):
    names = notebook.run(EXAMPLES / "deletion_request.ipynb")
    assert names["report"]["outcome"] == "removed from predictions"
    assert (names["predictions"][:8] != names["labels"][:8]).all()
    assert "srcdoc" in notebook.displayed[0]
    assert "FAILED" not in notebook.output
