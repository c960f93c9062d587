"""Trackers: follow the curve, the settings and the record of a run in CSV files, TensorBoard, wandb or Trackio.

A tracker writes below a folder of its own. Its packages are imported when it is opened, so that parsers can use this
module. Without settings of the user in the environment, nothing leaves the machine.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import io
import json
import os
from pathlib import Path
import re
import shutil
import socket
import struct
import time
from typing import Protocol
import warnings

from l2ul.common.errors import InputError, first_line
from l2ul.common.files import atomic, csv_writer
from l2ul.common.installation import is_installed
from l2ul.common.markup import markdown_text
from l2ul.common.offline import offline

PROJECT = "l2ul"  # name of the project in wandb and Trackio
Row = dict[str, float]  # of a curve; the first key is the step or epoch
Values = dict[str, object]


class Tracker(Protocol):
    """Follows one run at a time, in a folder. Any method may raise any exception.

    A tracker that needs a package names it in the attribute `package`. It is also the name of the extra.
    """

    def __init__(self, folder: Path): ...

    def start(self, identity: str, name: str, settings: Values) -> None:
        """Begin a run, in place of what this tracker holds of a run of the same identity."""

    def log(self, row: Row) -> None:
        """Add a row to the curve."""

    def finish(self, record: Values | None, figures: Sequence[Path]) -> None:
        """End the run with its record and figures (PNG files). `record` is None if the run was interrupted."""


class Csv:
    """Write the curve to `<identity>.csv` row by row, then settings and record to `<identity>.json`."""

    def __init__(self, folder: Path):
        self.folder = folder / "csv"

    def start(self, identity: str, name: str, settings: Values) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.summary, self.settings, self.write = self.folder / f"{identity}.json", settings, None
        self.summary.unlink(missing_ok=True)
        self.file = open(self.folder / f"{identity}.csv", "w", newline="", buffering=1)  # noqa: SIM115

    def log(self, row: Row) -> None:
        self.write = self.write or csv_writer(self.file, row)
        self.write(row)

    def finish(self, record: Values | None, figures: Sequence[Path]) -> None:
        self.write = self.write or csv_writer(self.file, ["step"])
        self.file.close()
        if record is not None:
            with atomic(self.summary) as part:
                part.write_text(json.dumps({"settings": self.settings, "record": record}, indent=1) + "\n")


class TensorBoard:
    """Write scalars, texts, hyper-parameters and images to an event file in `<name>_<identity>`.

    Events are written by this thread: the SummaryWriter of torch has one of its own, which prints a traceback if the
    disk is full.
    """

    package = "tensorboard"

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.folder, self.Event, self.Summary, self.Writer, self.torch = folder, Event, Summary, RecordWriter, summary

    def start(self, identity: str, name: str, settings: Values) -> None:
        folder = self.folder / "tensorboard" / re.sub(r"[^\w.-]+", "_", f"{name}_{identity}")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.writer, self.settings, self.step = self.Writer(open(path, "wb", buffering=0)), settings, 0  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        self._write(summary=self.torch.text("settings", _markdown(settings)))

    def log(self, row: Row) -> None:
        self.step, values = _split(row)
        self._scalars(values)

    def finish(self, record: Values | None, figures: Sequence[Path]) -> None:
        if record is not None:
            results = {f"record/{name}": value for name, value in _numbers(record).items()}
            for summary in self.torch.hparams(_plain(self.settings), results):
                self._write(summary=summary)
            self._scalars(results)
            self._write(summary=self.torch.text("record", _markdown(record)))
        for path in figures:
            content = path.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # in the header of a PNG file
            image = self.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
            self._write(summary=self.Summary(value=[self.Summary.Value(tag=path.stem, image=image)]))
        self.writer.close()

    def _scalars(self, values: Row) -> None:
        scalars = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(summary=self.Summary(value=scalars))

    def _write(self, **content: object) -> None:
        event = self.Event(wall_time=time.time(), step=self.step, **content)
        self.writer.write(event.SerializeToString())


class Wandb:
    """Log to Weights & Biases: offline, to `wandb/offline-run-…-<identity>`, unless WANDB_MODE says otherwise."""

    package = "wandb"

    def __init__(self, folder: Path):
        self.folder, self.mode = folder, os.environ.get("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        if self.mode == "offline":  # otherwise wandb reports its own use to its server all the same
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        if self.mode == "online" and not wandb.login(prompt=False):
            raise InputError(
                "WANDB_MODE is online but you are not logged in to wandb", "run wandb login", "unset WANDB_MODE"
            )

    def start(self, identity: str, name: str, settings: Values) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"wandb/offline-run-*-{identity}*"):
            shutil.rmtree(old)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=name,
            config=settings,
            dir=self.folder,
            mode=self.mode,
            settings=self.wandb.Settings(
                silent=True, console="off", init_timeout=30, finish_timeout=60, finish_timeout_raises=True
            ),
        )

    def log(self, row: Row) -> None:
        step, values = _split(row)
        self.run.log(values, step=step, commit=True)  # otherwise the last row replaces values of the summary

    def finish(self, record: Values | None, figures: Sequence[Path]) -> None:
        if record is not None:
            self.run.summary.update(record)
        if figures:
            self.run.log({path.stem: self.wandb.Image(str(path)) for path in figures})
        self.run.finish(exit_code=1 if record is None else 0)


class Trackio:
    """Log to the local store of Trackio in `trackio`, unless variables of Trackio in the environment say otherwise.

    Trackio turns its own errors into warnings.
    """

    package = "trackio"

    def __init__(self, folder: Path):
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").absolute()))  # read when it is imported
        import trackio

        self.trackio = trackio
        warnings.filterwarnings("error", module=r"trackio\.utils")  # Trackio then prints them as a line

    def start(self, identity: str, name: str, settings: Values) -> None:
        name = f"{name} {identity}"
        with contextlib.suppress(ValueError):  # there is no project yet
            for run in self.trackio.Api().runs(PROJECT):
                if run.name == name:
                    run.delete()
        to_space = bool(os.environ.get("TRACKIO_SPACE_ID"))  # otherwise Trackio asks the hub for the user's name
        with _without_output(), contextlib.nullcontext() if to_space else offline():
            self.run = self.trackio.init(PROJECT, name=name, config=settings, embed=False)
        self.step = 0

    def log(self, row: Row) -> None:
        self.step, values = _split(row)
        self.run.log(values, step=self.step)

    def finish(self, record: Values | None, figures: Sequence[Path]) -> None:
        last = {path.stem: self.trackio.Image(path) for path in figures}
        if record is not None:
            last |= {f"record/{name}": value for name, value in _numbers(record).items()}
            last["record"] = self.trackio.Markdown(_markdown(record))
        if last:
            self.run.log(last, step=self.step)
        with _without_output():
            self.trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {"csv": Csv, "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def require_packages(names: Iterable[str]) -> None:
    """Raise InputError if the package of a tracker is not installed."""
    for name in names:
        package = _package(name)
        if package and not is_installed(package):
            raise _missing(name, package)


class Trackers:
    """The trackers of a command, which follow its runs one after the other.

    A tracker that fails is reported once and left out from then on: it never ends a run. A run that has not finished
    when the `with` block ends counts as interrupted.

    names   of TRACKERS
    folder  for what they write
    report  called with a sentence about a tracker that failed

    Raises InputError if a package cannot be imported.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        folder: Path = Path("result_data/tracking"),
        report: Callable[[str], object] = lambda sentence: None,
    ):
        self.report, self.is_running = report, False
        self._trackers: dict[str, Tracker] = {}
        names = list(dict.fromkeys(names))
        require_packages(names)
        for name in names:
            try:
                self._trackers[name] = TRACKERS[name](Path(folder))
            except ImportError as error:
                raise _missing(name, _package(name) or error.name) from None
            except InputError:
                raise
            except Exception as error:
                self._report_failure(name, error)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish(None)

    def start(self, identity: str, name: str, settings: Values) -> None:
        """Begin a run. The trackers drop what they hold of an earlier, interrupted run of the same identity.

        identity  distinguishes the run from all others: hex digits
        name      a short text for people
        settings  of the run. Those that are None are left out, as of a record
        """
        self.is_running = True
        self._call("start", identity, name, _known(settings))

    def log(self, row: Row) -> None:
        """Add a row to the curve of the run. Its first key is the step or the epoch."""
        if self.is_running:
            self._call("log", row)

    def finish(self, record: Values | None, figures: Sequence[Path] = ()) -> None:
        """End the run, if there is one. `record` is None if the run was interrupted."""
        if self.is_running:
            self.is_running = False
            self._call("finish", record and _known(record), figures)

    def _call(self, action: str, *arguments: object) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, action)(*arguments)
            except Exception as error:
                del self._trackers[name]
                self._report_failure(name, error)

    def _report_failure(self, name: str, error: Exception) -> None:
        self.report(f"--tracker {name} failed ({first_line(error)}); the command goes on without it")


def _package(name: str) -> str | None:
    return getattr(TRACKERS[name], "package", None)


def _missing(name: str, package: str | None) -> InputError:
    return InputError(
        f"--tracker {name} needs the package {package}",
        f"install it (uv run --extra {package} …, or pip install {package})",
        f"leave out {name}",
    )


def _split(row: Row) -> tuple[int, Row]:
    """Return the step, or epoch, of a row and its other values."""
    (_, step), *values = row.items()
    return int(step), dict(values)


def _known(values: Values) -> Values:
    return {name: value for name, value in values.items() if value is not None}


def _numbers(values: Values) -> Row:
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def _plain(values: Values) -> Values:
    """Return values of the types that TensorBoard allows for hyper-parameters."""
    return {name: value if type(value) in (int, float, bool, str) else str(value) for name, value in values.items()}


def _markdown(values: Values) -> str:
    """Return a table in Markdown."""
    rows = (f"| {markdown_text(name)} | {markdown_text(str(value))} |" for name, value in values.items())
    return "\n".join(["| name | value |", "|---|---|", *rows])


@contextlib.contextmanager
def _without_output():
    """Hide what Trackio prints. Raises RuntimeError if one of its lines is a warning."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    if warning := re.search("Trackio warning: (.*)", printed.getvalue()):
        raise RuntimeError(warning[1])
