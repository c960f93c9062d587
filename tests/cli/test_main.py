"""`python -m l2ul NAME`, and what main_unlearn.py prints."""

import re
import sys

import pytest

from l2ul import VERSION, __main__
from l2ul.cli import unlearn_command


def test_a_name_of_no_script_is_wrong_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["l2ul", "unlern"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "l2ul: there is no script 'unlern'; did you mean unlearn?; see l2ul --help\n")


def test_versions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["l2ul", "--version"])
    __main__.main()
    out = capsys.readouterr().out
    assert VERSION in out.splitlines()[0]
    assert "\ndevice " in out


def test_runs_that_diverged_are_followed_by_what_to_change():
    def note(*runs):
        return unlearn_command.divergence_note({"method": name, "status": status} for name, status in runs)

    assert note(("adv", "forgotten"), ("before", "done")) is None
    ascent = note(("neggrad", "diverged"), ("neggrad", "diverged"), ("adv", "forgotten"))
    assert re.fullmatch(r"neggrad: the loss .* lower the learning rate, or choose distill: -CE, .* bound", ascent)
    assert note(("distill", "diverged")).endswith("; lower the learning rate")
