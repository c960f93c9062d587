"""How a script ends: exit codes, sentences and signals."""

import errno
import importlib
import os
import signal
import subprocess
import sys

from conftest import ROOT
import pytest

from l2ul.cli import exit_codes
from l2ul.common.errors import Diverged, InputError


def ending(error, **options):
    """Exit code of a script in which `error` is raised."""
    with pytest.raises(SystemExit) as stop, exit_codes.clean_exit("script.py", "nothing was written", **options):
        raise error
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("--seed is x; expected a number"), 2, "script.py: --seed is x; expected a number\n"),
        (InputError("cannot read a\nb\x1b[31m.png"), 2, "script.py: cannot read a b [31m.png\n"),
        (Diverged("2 of 10 images"), 1, "script.py: 2 of 10 images\n"),
        (KeyboardInterrupt(), 130, "\nscript.py: stopped by Ctrl-C; nothing was written\n"),
        (exit_codes.Terminated(), 143, "script.py: stopped by SIGTERM; nothing was written\n"),
        (MemoryError(), 1, "script.py: out of memory (MemoryError); use smaller batches; nothing was written\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x.json"),
            1,
            "script.py: the disk is full (runs/x.json); free some space; nothing was written\n",
        ),
    ],
)
def test_an_error_that_a_user_can_act_on_is_one_sentence(capsys, error, code, sentence):
    assert ending(error) == code
    assert capsys.readouterr() == ("", sentence)


def test_the_advice_for_batches_of_one_image_names_only_flags_of_the_script(capsys):
    error = ValueError("Expected more than 1 value per channel when training, got input size [1, 3]")
    for options, has_bn in (({}, False), ({"larger_batches": exit_codes.LARGER_BATCHES}, True)):
        assert ending(error, **options) == 2
        sentence = capsys.readouterr().err
        assert ("--batch-size" in sentence, "--bn eval" in sentence) == (True, has_bn)


def test_no_name_reaches_the_terminal_as_a_command(capsys):
    with exit_codes.clean_exit("script.py", ""):
        print("a\x1b[31m\udcff\u2028b\tc\nd")
    assert capsys.readouterr().out == "a\ufffd[31m\ufffd\ufffdb\tc\nd\n"


def test_no_name_reaches_standard_error_as_a_command(capsys):
    with exit_codes.clean_exit("script.py", ""):
        print("a\x1b[31m\u202eb\tc\nd", file=sys.stderr)
    assert capsys.readouterr().err == "a\ufffd[31m\ufffdb\tc\nd\n"
    with pytest.raises(SystemExit) as stop, exit_codes.clean_exit("script.py", ""):
        raise SystemExit("script.py: f\x1b[2J failed")
    assert (stop.value.code, capsys.readouterr().err) == (1, "script.py: f [2J failed\n")


@pytest.mark.parametrize("code", ["raise KeyError(name)", "raise LookupError(name)", "raise SystemExit(name)"])
def test_no_name_in_a_traceback_reaches_the_terminal_as_a_command(code):
    code = f"from l2ul.cli import exit_codes\nname = 'e\x1b[2J'\nwith exit_codes.clean_exit('', ''): {code}"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert made.returncode == 1
    assert b"[2J" in made.stderr
    assert b"\x1b" not in made.stderr


def test_an_encoding_without_a_character_ends_no_script():
    code = "from l2ul.cli import exit_codes\nwith exit_codes.clean_exit('', ''): print('± → x')"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True
    )
    assert (made.returncode, made.stdout) == (0, b"\xb1 \\u2192 x\n")


@pytest.mark.parametrize(
    ("program", "kept"),
    [
        ("main_unlearn", "finished runs are kept; the same command continues"),
        ("main_sweep", "finished runs are kept; the same command continues"),
        ("main_forget", "nothing was written; the same command starts again"),
        ("main_tables", "finished files are kept; the same command writes all files"),
    ],
)
def test_each_script_says_what_is_kept_and_how_to_go_on(script, monkeypatch, program, kept):
    monkeypatch.setattr("l2ul.cli.parser.Parser.parse_args", lambda *_: signal.raise_signal(signal.SIGTERM))
    main = importlib.import_module(program).main
    assert script(main) == (143, "", f"{program}.py: stopped by SIGTERM; {kept}\n")


@pytest.mark.parametrize(
    ("program", "remedy"),
    [
        ("main_unlearn", "use smaller batches"),
        ("main_forget", "forget fewer images per request, or use --device cpu"),
        ("main_tables", "make fewer --figures at once, or use --device cpu"),
    ],
)
def test_each_script_has_a_remedy_when_memory_runs_out(script, monkeypatch, program, remedy):
    def parse(*_):
        raise MemoryError

    monkeypatch.setattr("l2ul.cli.parser.Parser.parse_args", parse)
    code, _, err = script(importlib.import_module(program).main)
    assert (code, f"out of memory (MemoryError); {remedy}; " in err) == (1, True)


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ValueError("a fault"), OSError(errno.EACCES, "denied")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), exit_codes.clean_exit("script.py", "go on"):
        raise error


def test_sigterm_runs_the_clean_up_once_and_exits_with_143(capsys):
    before, cleaned_up = signal.getsignal(signal.SIGTERM), []

    @exit_codes.clean_exit("script.py", "go on")
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # as code that cleans up after Ctrl-C does
            signal.raise_signal(signal.SIGTERM)  # a second one does not disturb it
            cleaned_up.append(True)
            raise

    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, cleaned_up) == (143, [True])
    assert capsys.readouterr().err == "script.py: stopped by SIGTERM; go on\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_is_reported_even_if_a_library_replaces_the_exception(capsys):
    @exit_codes.clean_exit("script.py", "go on")
    def main(stop):
        try:
            stop()
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    def press_ctrl_c():
        raise KeyboardInterrupt

    stops = {143: (lambda: signal.raise_signal(signal.SIGTERM), "SIGTERM"), 130: (press_ctrl_c, "Ctrl-C")}
    for code, (stop, name) in stops.items():
        with pytest.raises(SystemExit) as ended:
            main(stop)
        assert ended.value.code == code
        assert f"script.py: stopped by {name}; " in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_dies_of_sigterm_as_if_there_were_no_handler():
    with exit_codes.clean_exit("script.py", "go on"):
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_torchrun_may_start_only_scripts_that_share_their_work(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, sentences in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as stop, exit_codes.clean_exit("script.py", "go on"):
            raise AssertionError("work began")
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("start it without torchrun\n") == sentences
    with exit_codes.clean_exit("script.py", "go on", shared=True):
        pass


def test_the_end_of_the_reader_of_the_output_ends_a_script_without_a_traceback():
    code = (
        "from l2ul.cli import exit_codes\n"
        "with exit_codes.clean_exit('x', 'go on'):\n"
        " for n in range(9**6): print(n, flush=True)"
    )
    script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert script.stdout.readline() == b"0\n"
    script.stdout.close()
    assert script.stderr.read() == b""
    script.stderr.close()
    assert script.wait(60) == 141
