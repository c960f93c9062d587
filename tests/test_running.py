"""What a script says while it runs."""

import pytest

from l2ul import running


def test_the_estimate_of_time_leaves_out_what_came_before_the_first_units(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])
    with running.progress("attack", 100, estimate=True) as advance:
        for moment in (30.0, 31.0, 33.0, 34.0):  # half a minute of preparation, then 10 units in one to two seconds
            now[0] = moment
            advance(10)
    assert capsys.readouterr().out == "attack: about 15 s\n"


@pytest.mark.parametrize(("asked", "total"), [(False, 100), (True, 100)])
def test_short_work_and_work_without_an_estimate_say_nothing(monkeypatch, capsys, asked, total):
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])
    with running.progress("attack", total, estimate=asked) as advance:
        for moment in (30.0, 31.0, 31.5 if asked else 60.0):
            now[0] = moment
            advance(10)
    assert capsys.readouterr().out == ""
