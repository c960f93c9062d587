"""What a script says while it runs, and to whom."""

import sys
from types import SimpleNamespace

import pytest

from l2ul.common.errors import InputError
from l2ul.common.progress import progress_bar
from l2ul.training import tracker


def test_the_estimate_of_time_leaves_out_what_came_before_the_first_units(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("l2ul.common.progress.time.perf_counter", lambda: now[0])
    with progress_bar("attack", 100, estimate=True) as advance:
        for moment in (30.0, 31.0, 33.0, 34.0):  # half a minute of preparation, then 10 units in one to two seconds
            now[0] = moment
            advance(10)
    assert capsys.readouterr().out == "attack: about 14 s\n"


@pytest.mark.parametrize(("asked", "total"), [(False, 100), (True, 100)])
def test_short_work_and_work_without_an_estimate_say_nothing(monkeypatch, capsys, asked, total):
    now = [0.0]
    monkeypatch.setattr("l2ul.common.progress.time.perf_counter", lambda: now[0])
    with progress_bar("attack", total, estimate=asked) as advance:
        for moment in (30.0, 31.0, 31.5 if asked else 60.0):
            now[0] = moment
            advance(10)
    assert capsys.readouterr().out == ""


def test_a_tracker_gets_loss_and_accuracy_an_epoch_and_is_asked_for_by_name(tmp_path, monkeypatch):
    tracker.open_tracker(None, tmp_path)({"epoch": 1, "loss": 0.5, "acc": 90.0})
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tracker tensorboard needs the package tensorboard"):
        tracker.open_tracker("tensorboard", tmp_path)
    written = []
    writer = SimpleNamespace(add_scalar=lambda *values: written.append(values), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    tracker.open_tracker("tensorboard", tmp_path)({"epoch": 3, "loss": 0.5, "acc": 90.0})
    assert written == [("loss", 0.5, 3), ("acc", 90.0, 3)]
