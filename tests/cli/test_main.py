"""`python -m l2ul NAME`."""

import sys

import pytest

from l2ul import VERSION, __main__


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
