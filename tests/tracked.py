"""Shared by the tests of trackers: read what they wrote with the readers of their packages."""

import csv
import json
import struct
import time


def read_csv(folder):
    """Return curve, settings and record of the only run; settings and record are None if the run was interrupted."""
    (path,) = (folder / "csv").glob("*.csv")
    summary = path.with_suffix(".json")
    content = json.loads(summary.read_text()) if summary.exists() else {"settings": None, "record": None}
    curve = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(path.open())]
    return curve, content["settings"], content["record"]


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (run,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points, record = {}, {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if tag.startswith("record/"):
                record[tag.removeprefix("record/")] = event.value
            else:
                points.setdefault(event.step, []).append((tag, event.value))
    hparams = events.summary_metadata.get("_hparams_/session_start_info")
    settings = None
    if hparams:
        values = HParamsPluginData.FromString(hparams.plugin_data.content).session_start_info.hparams
        settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
    curve = []
    for step, values in sorted(points.items()):
        assert len(values) == len(dict(values)), f"step {step} is there twice"
        curve.append({"step": step, **dict(values)})
    return curve, settings, record or None


def read_wandb(folder):
    """Return curve, settings and record of the only offline run, whose file wandb's process may still be writing."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    (path,) = run.glob("*.wandb")
    curve, settings, record, code, until = [], None, {}, None, time.monotonic() + 60
    while code is None:
        assert time.monotonic() < until, "wandb has not written the end of the run"
        time.sleep(0.05)
        messages = list(_wandb_messages(path.read_bytes()))
        code = next((one.exit.exit_code for one in messages if one.HasField("exit")), None)
    for message in messages:
        if message.HasField("history"):
            curve.append({"step": message.history.step.num, **_items(message.history.item)})
        elif message.HasField("run"):
            settings = _items(message.run.config.update)
        elif message.HasField("summary"):
            record |= _items(message.summary.update)
    return curve, settings, None if code else record


def _wandb_messages(content):
    """Yield the messages in the file of an offline run: wandb's protocol buffers in blocks of LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, data = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        data, place = data + content[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(data)
            data = b""


def read_trackio(folder):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("l2ul")
    curve, record = [], {}
    for row in SQLiteStorage.get_logs("l2ul", run.name, run_id=run.id):
        step, _ = row.pop("step"), row.pop("timestamp")
        values = {name: value for name, value in row.items() if isinstance(value, int | float)}
        record |= {name.removeprefix("record/"): value for name, value in values.items() if name.startswith("record/")}
        values = {name: value for name, value in values.items() if not name.startswith("record/")}
        curve += [{"step": step, **values}] if values else []
    return curve, {name: value for name, value in run.config.items() if name[0] != "_"}, record or None


def _items(items):
    found = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
    return {name: value for name, value in found.items() if name[0] != "_"}


READERS = {"csv": read_csv, "tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}
