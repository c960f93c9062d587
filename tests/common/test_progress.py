"""Progress lines in a log file: when they appear and what they say."""

import io
import re
import sys

import pytest
from tqdm import tqdm

from l2ul.cli.output import ShownText
from l2ul.common import progress
from l2ul.common.progress import format_duration, format_rate, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """The clock of progress lines, in seconds: `clock[0]` is the current time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in err.splitlines())
    return [line[10:] for line in err.splitlines()]


def test_a_line_tells_units_rate_and_time_left_without_the_preparation(clock, capsys):
    with progress_bar("attack", 32_000) as advance:
        for clock[0], count in ((8.0, 200), (9.0, 50), (12.0, 170)):  # 8 s of preparation, then 55 per second
            advance(count)
    assert lines(capsys) == ["attack: 420 / 32,000 (1 %), 55 per second, about 10 min left"]


def test_pauses_double_until_they_reach_five_minutes(clock, capsys):
    moments = []
    with progress_bar("attack", 10_000) as advance:
        for second in range(1, 1501):
            clock[0] = second
            advance()
            moments += [second] * len(lines(capsys))
    assert moments == [10, 30, 70, 150, 310, 610, 910, 1210]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_names_on_progress_lines_and_bars_hold_no_control_characters(clock, capsys, monkeypatch):
    with progress_bar("read a\x1b[31m.png", 10) as advance:
        clock[0] = 11.0
        advance(1, "b\n\x9b2J")
    (line,) = lines(capsys)
    assert line.startswith("read a [31m.png: 1 / 10 (10 %), b  2J")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("read a\x1b[31m.png", 10) as advance:
        advance(1, "b\x1b[2J")
        advance(1, "c\u202e")
    assert "read a [31m.png" in sys.stderr.getvalue()
    assert not re.search("[\x1b\x9b\u202e]", sys.stderr.getvalue())


def test_bars_move_the_cursor_but_names_do_not():
    terminal = Terminal()
    stream = ShownText(terminal, bars=True)
    with tqdm(desc="a", total=3, file=stream) as bar, tqdm(desc="b\x1b[A\rc", total=2, file=stream, position=1):
        bar.update()
    shown = terminal.getvalue()
    assert "\x1b[A" in shown
    assert "\rb\ufffd[A\ufffdc" in shown
    for text in ("\rname\r", "a\x1b[A", "\x1b[A\x1b[31m", "\n\x1b[31m"):
        assert not re.search("\x1b|.\r", _written(text))


def _written(text):
    stream = ShownText(io.StringIO(), bars=True)
    stream.write(text)
    return stream.stream.getvalue()


def test_short_work_shows_no_line(clock, capsys):
    with progress_bar("attack", 3) as advance:
        for clock[0] in (3.0, 6.0, 9.9):
            advance()
    with progress_bar("attack", 2) as advance:
        for clock[0] in (15.0, 25.0):  # at the end of the work nothing is left to report
            advance()
    assert lines(capsys) == []


def test_work_of_unknown_length_counts_steps_and_shows_the_note(clock, capsys):
    with progress_bar("adv_imp k 16") as advance:
        for clock[0] in (1.0, 11.0):
            advance(600, "40 % of D_f forgotten")
    assert lines(capsys) == ["adv_imp k 16: step 1,200, 40 % of D_f forgotten, 60 steps per second"]


def test_work_of_limited_length_shows_the_limit(clock, capsys):
    with progress_bar("distill k 4") as advance:
        for clock[0] in (1.0, 11.0):
            advance(9, "0 % of D_f forgotten", 90)
    assert lines(capsys) == ["distill k 4: step 18 of at most 90, 0 % of D_f forgotten, 54 steps per minute"]


def test_without_a_measured_rate_the_line_has_no_estimate(clock, capsys):
    with progress_bar("evaluate", 4) as advance:
        clock[0] = 60.0
        advance()
    assert lines(capsys) == ["evaluate: 1 / 4 (25 %)"]


def test_other_processes_of_a_torchrun_show_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr("l2ul.common.distributed.is_first", lambda: False)
    with progress_bar("attack", 10) as advance:
        for clock[0] in (20.0, 90.0):
            advance(1, "note")
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar("attack", 10) as advance:
        advance(4, "note")
    assert "attack:   0%" in capsys.readouterr().err


def test_units_of_the_first_call_do_not_count_for_the_rate(clock, capsys, monkeypatch):
    for name in ("tqdm.std.time", "l2ul.common.progress.time.time"):
        monkeypatch.setattr(name, lambda: clock[0])
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        clock[0] = 0.0
        with progress_bar("train", 1000) as advance:
            advance(900)  # by an earlier command
            for clock[0], count in ((10.0, 1), (40.0, 3)):
                advance(count)
        _, err = capsys.readouterr()
        last = re.split(r"[\r\n]", err.strip())[-1]
        assert ("904/1.00k" if is_terminal else "904 / 1,000 (90 %)") in last
        assert ("10.0s/it" if is_terminal else "6.0 per minute") in last


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(1234.5, "1,234 per second"), (55.4, "55 per second"), (3.25, "3.2 per second"), (0.05, "3.0 per minute")]
    + [(0.001, "3.6 per hour"), (0.0001, "0.4 per hour")],
)
def test_rates(per_second, text):
    assert format_rate(per_second) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(61.2, "61 s"), (540, "9 min"), (9000, "2.5 h"), (172_800, "2.0 days"), (0.2, "0 s")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
