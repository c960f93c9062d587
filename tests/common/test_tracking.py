"""Trackers, with their real packages and without a network: curve, settings, record, interruptions, failures."""

import errno
import os
import socket
import sys

from matplotlib import pyplot
import pytest
from tracked import READERS

from l2ul.cli import unlearn_command, unlearn_options
from l2ul.common import distributed, installation, tracking
from l2ul.common.errors import InputError
from l2ul.common.tracking import TRACKERS, Trackers
from l2ul.data import huggingface
from l2ul.models import timm_models

SETTINGS = {"method": "adv", "k": 2, "lr": 0.5, "needs_retain": False, "surrogate": None}
RECORD = {"acc_test": 87.5, "status": "forgotten", "acc_forget": 12.5, "acc_relabel": None}
ROWS = [{"step": step, "forget": -step / 4, "acc_forget": 100.0 - step} for step in range(1, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder for the runs of this module. Trackio writes to one folder in the life of a process."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Fail if another machine is looked up, although the user is logged in to the Hugging Face Hub."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_" + 34 * "x")
    looked_up, true_lookup = [], socket.getaddrinfo

    def lookup(host, *arguments, **options):
        if host not in (None, "127.0.0.1", "localhost"):
            looked_up.append(host)
            raise socket.gaierror("there is no network")
        return true_lookup(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    yield
    assert not looked_up


@pytest.fixture(scope="module", autouse=True)
def _no_process_stays():
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_continued_run_has_one_whole_curve_its_settings_and_its_record(name, folder, tmp_path):
    if name != "csv":
        pytest.importorskip(name)
    pyplot.imsave(tmp_path / "figure.png", [[0, 1]])
    problems = []
    with Trackers([name], folder, problems.append) as trackers:
        trackers.start("0123456789abcdef", "adv k 2", SETTINGS)
        for row in ROWS[:3]:
            trackers.log(row)
    curve, _, record = READERS[name](folder)
    assert (curve, record) == (ROWS[:3], None)
    with Trackers([name], folder, problems.append) as trackers:
        trackers.start("0123456789abcdef", "adv k 2", SETTINGS)
        for row in ROWS:
            trackers.log(row)
        trackers.finish(RECORD, [tmp_path / "figure.png"])
        trackers.log({"step": 9, "forget": 0.0})  # belongs to no run
    curve, settings, record = READERS[name](folder)
    assert [row for row in curve if "figure" not in row] == ROWS
    assert settings == {key: value for key, value in SETTINGS.items() if value is not None}
    expected = {key: value for key, value in RECORD.items() if value is not None}
    if name in ("tensorboard", "trackio"):  # numbers only; all of the record is in a text
        del expected["status"]
    assert expected.items() <= record.items()
    assert not problems


def test_figures_are_there(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pyplot.imsave(tmp_path / "figure.png", [[0, 1, 2]])
    with Trackers(["tensorboard"], tmp_path) as trackers:
        trackers.start("1", "sweep", {})
        trackers.finish({}, [tmp_path / "figure.png"])
    (run,) = (tmp_path / "tensorboard").iterdir()
    (image,) = EventAccumulator(str(run)).Reload().Images("figure")
    assert (image.width, image.height) == (3, 1)
    assert image.encoded_image_string == (tmp_path / "figure.png").read_bytes()


def test_runs_of_other_identities_are_kept(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = Trackers(["csv", "tensorboard"], tmp_path)
    for identity in ("a", "b"):
        trackers.start(identity, "adv", {})
        trackers.log(ROWS[0])
        trackers.finish(RECORD)
    assert len(list((tmp_path / "csv").glob("*.csv"))) == 2
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_full_disk_costs_the_tracker_and_one_line(name, tmp_path, monkeypatch):
    if name != "csv":
        pytest.importorskip(name)
    problems = []
    true_open = open
    monkeypatch.setattr(tracking, "open", lambda path, *how, **options: true_open("/dev/full", *how, **options), False)
    trackers = Trackers([name], tmp_path, problems.append)
    trackers.start("a", "adv", SETTINGS)
    for row in ROWS:
        trackers.log(row)
    trackers.finish(RECORD)
    trackers.start("b", "adv", SETTINGS)
    trackers.finish(RECORD)
    (problem,) = problems
    assert problem == (
        f"--tracker {name} failed ([Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}); the command goes on without it"
    )


def test_a_tracker_that_fails_changes_neither_results_nor_the_other_trackers(run, tmp_path, monkeypatch):
    def fails(self, row):
        raise ConnectionError("the server is\nunreachable")

    words = ["--method", "adv", "neggrad"]
    code, plain, _ = run(*words)
    assert code == 0
    expected = {path.name: path.read_text() for path in (tmp_path / "runs").glob("*.csv")}
    monkeypatch.setattr(tracking.TensorBoard, "log", fails)
    code, out, err = run(*words, "--tracker", "tensorboard", "csv", "--rerun")
    assert code == 0, err
    assert out.count("--tracker tensorboard failed (the server is); the command goes on without it\n") == 1
    for place in ("runs", "tracking/csv"):
        assert {path.name: path.read_text() for path in (tmp_path / place).glob("*.csv")} == expected
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "csv"])
def test_a_missing_package_ends_a_command_before_any_work(name, run, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run("--tracker", "csv", name)
    assert (code, out) == (2, "")
    assert err == (
        f"main_unlearn.py: --tracker {name} needs the package {name}; install it (uv run --extra {name} …, or pip "
        f"install {name}), or leave out {name}\n"
    )


def test_a_package_that_cannot_be_imported_is_missing_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracking.require_packages(["wandb"])
    with pytest.raises(InputError, match="--tracker wandb needs the package wandb"):
        Trackers(["wandb"], tmp_path)


def test_a_tracker_of_your_own_follows_a_run(run, monkeypatch):
    class Mine:
        def __init__(self, folder):
            self.events = events

        def start(self, identity, name, settings):
            self.events.append(settings["method"])

        def log(self, row):
            self.events.append(row["step"])

        def finish(self, record, figures):
            self.events.append(record["status"])

    events = []
    monkeypatch.setitem(TRACKERS, "mine", Mine)
    code, _, err = run("--method", "neggrad", "--tracker", "mine")
    assert code == 0, err
    assert events == ["neggrad", *range(1, len(events) - 1), events[-1]]
    assert events[-1] in ("forgotten", "cap")


def test_a_tracker_that_cannot_start_is_left_out(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, folder):
            raise ConnectionError("the server is unreachable")

    monkeypatch.setitem(TRACKERS, "broken", Broken)
    problems = []
    with Trackers(["broken", "csv"], tmp_path, problems.append) as trackers:
        trackers.start("a", "adv", SETTINGS)
        trackers.finish(RECORD)
    assert problems == ["--tracker broken failed (the server is unreachable); the command goes on without it"]
    assert (tmp_path / "csv" / "a.json").exists()


def test_wandb_online_needs_a_login(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(InputError, match="WANDB_MODE is online but you are not logged in to wandb; run wandb login"):
        Trackers(["wandb"], tmp_path)


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
    opts = unlearn_options.parse(["--tracker", "csv", "csv", "--result-dir", str(tmp_path)])
    for is_first in (True, False):
        monkeypatch.setattr(distributed, "is_first", lambda is_first=is_first: is_first)
        trackers = unlearn_command.open_trackers(opts, print)
        trackers.start("a", "adv", {})
        trackers.finish({})
        assert (tmp_path / "tracking").exists() == is_first
        tracking.shutil.rmtree(tmp_path / "tracking", ignore_errors=True)


@pytest.mark.parametrize("package", ["wandb", "trackio", "datasets", "timm", "pillow_heif"])
def test_a_folder_named_like_a_package_does_not_count_as_it(package, tmp_path, monkeypatch):
    (tmp_path / package).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, package, None)  # restored at the end
    del sys.modules[package]
    assert not installation.is_installed(package)
    with pytest.raises(ImportError):
        installation.import_package(package)
    users = {"datasets": huggingface._package, "timm": timm_models._timm}
    use = users.get(package, lambda: Trackers([package], tmp_path))
    if package != "pillow_heif":
        with pytest.raises(InputError, match=f"needs the package {package}"):
            use()
