"""Rows of the tables: one for each method, and one for each other combination of settings it was run with."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import groupby
import json

from l2ul.common.text import shortened
from l2ul.experiments import records
from l2ul.experiments.records import Record
from l2ul.methods import registry
from l2ul.methods.settings import SHARED, from_text, has_effect

LONGEST = 400  # characters of the settings in the name of a row
OF_METHOD = (*SHARED, "course", "method_version", "method_revision", "method_code")
# What a method starts from and is measured on. Means are compared if these are the usual ones.
OF_DATA = {name for name, key in records.SCHEMA.items() if key.role == records.SETTING and name not in OF_METHOD}
OF_DATA |= {"listed", "forget_sha256", "data_sha256"}
OF_EACH = OF_DATA - {"surrogate", "test_without", "forget_sha256", "data_sha256"}  # which every method has, or null
HASHES = {"checkpoint_sha256": "weights", "forget_sha256": "D_f", "surrogate_sha256": "surrogate images"}
HASHES |= {"data_sha256": "D_r and D_test"}
BLOCK = ("goal", "continual_size", "dataset", "age_grouping", "model")


@dataclass
class Block:
    """The records of one goal, data set and model (and number of images per step).

    usual    most frequent value of each setting, among the methods that use it, of OF_EACH among all. The row of runs
             with these values has the name of their method, and other rows name what differs.
    records  the records. Each has two keys more: `row`, the name of its row, and `differs`, the settings that differ
             from `usual`.
    """

    goal: str
    continual_size: int | None
    dataset: str
    age_grouping: str | None
    model: str
    continual: bool
    usual: Record = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    @property
    def label(self) -> str:
        return shortened(f"{self.dataset}{f' {self.age_grouping}' if self.age_grouping else ''}, {self.model}")

    @property
    def data_label(self) -> str:
        """The data set in the name of a file of weights: of UTKFace with its grouping, see `cli.options.data_label`."""
        return f"{self.dataset}_{self.age_grouping}" if self.age_grouping else self.dataset

    def usual_text(self) -> str:
        """Return the usual values of the settings that names of rows name, without hashes; "" if there are none."""
        named = {name for record in self.records for name in record["differs"]} - {*HASHES, "listed"}
        return ", ".join(_describe(name, self.usual.get(name)) for name in sorted(named))


def main_row(runs: Iterable[Record], method: str) -> str:
    """Return the row that represents a method: the one with usual settings, else the one with most runs."""
    rows = Counter(record["row"] for record in runs if record["method"] == method)
    return method if method in rows or not rows else min(rows, key=lambda row: (-rows[row], row))


def has_usual_data(run: Record) -> bool:
    """Return whether a run of a block started from the usual weights and was measured on the usual images."""
    return not run["differs"].keys() & OF_DATA


def blocks(runs: Iterable[Record]) -> list[Block]:
    """Group copies of the records into blocks. The result does not depend on the order of the records."""

    def axes(record: Record) -> tuple:
        return (*(record[name] for name in BLOCK), record["continual_step"] is not None)

    def order(record: Record) -> str:
        return json.dumps([axes(record), record.get("forget_file"), record], sort_keys=True)

    made = []
    for key, group in groupby(sorted(runs, key=order), key=axes):
        block = Block(*key, records=[dict(record) for record in group])
        _name_rows(block)
        made.append(block)
    return made


def settings(record: Record) -> Record:
    """Return the settings of a run, those of a method of fixed length one by one, and whether D_f was listed."""
    values = records.settings(record)
    own = from_text(values.pop("course", None) or "")
    listed = {"listed": record.get("listed")}
    return values | {f"{record['method']}.{name}": value for name, value in own.items()} | listed


def known_settings(record: Record) -> Record:
    """Return the settings of a run that differ from those of a record without them, see `records.stated`."""
    return records.stated(settings(record), record["dataset"])


def _name_rows(block: Block) -> None:
    values = [settings(record) for record in block.records]
    pairs = list(zip(block.records, values, strict=True))
    users = defaultdict(set)  # of each setting the methods that use it, for which it is not null
    for record, own in pairs:
        for name, value in own.items():
            if value is not None:
                users[name].add(record["method"])
    for name in sorted(users):
        key = records.lookup(name)
        default, absent = key.default_for(block.dataset), key.absent_for(block.dataset)
        using = [own for record, own in pairs if _is_used(name, record, own, users)]
        for own in using if absent is not None else ():
            own.setdefault(name, absent)  # older records lack settings that were added later
        if using:
            block.usual[name] = _most_frequent([own.get(name) for own in using], default)
    for record, own in pairs:
        record["differs"] = {
            name: own.get(name)
            for name, usual in block.usual.items()
            if _is_used(name, record, own, users) and own.get(name) != usual
        }
    _separate_surrogates(block.records)
    _separate_data(block.records)
    _separate_forget_sets(block.records)
    settings_of = defaultdict(set)  # of each name of a row
    for record in block.records:
        record["row"] = _row(record)
        settings_of[record["row"]].add(json.dumps(record["differs"], sort_keys=True))
    for record in block.records:
        if len(settings_of[record["row"]]) > 1:
            record["row"] = _row(record, all_digits=True)


def _row(record: Record, all_digits: bool = False) -> str:
    differs = ", ".join(_describe(name, value, all_digits) for name, value in record["differs"].items())
    return record["method"] + (f" ({shortened(differs, LONGEST)})" if differs else "")


def _is_used(name: str, record: Record, own: Mapping[str, object], users: Mapping[str, Set[str]]) -> bool:
    """Return whether a setting has an effect on a run; `own` are its settings, `users` the methods that use each."""
    images = {key: record.get(key) for key in ("k", "continual_size")}
    is_known = name in own or records.lookup(name).absent_for(record["dataset"]) is not None
    is_used = record["method"] in users[name] or (name in OF_EACH and is_known)
    return is_used and has_effect(name, {**own, **images})


def _most_frequent(values: list, default: object) -> object:
    """Return the most frequent value. The default wins a tie."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value == default, repr(value)))


def _separate_surrogates(runs: list[Record]) -> None:
    """Separate runs whose surrogate sets have one name and other images: the hash of the images joins what differs."""
    hashes = defaultdict(set)
    for record in runs:
        hashes[record.get("surrogate")].add(record.get("surrogate_sha256"))
    _join(
        "surrogate_sha256",
        (record for record in runs if record.get("surrogate") and len(hashes[record["surrogate"]]) > 1),
    )


def _separate_data(runs: list[Record]) -> None:
    """Separate runs whose D_r or D_test have changed without another trace: their hash joins what differs."""
    for some in _alike(record for record in runs if record.get("data_sha256")):  # which older records lack
        if len({record["data_sha256"] for record in some}) > 1:
            _join("data_sha256", some)


def _separate_forget_sets(runs: list[Record]) -> None:
    """Separate runs that differ in D_f only: the hash of D_f joins what differs, for all seeds with such a D_f."""
    for some in _alike(runs):
        counts = Counter(map(_draw, some))
        hashes = {record.get("forget_sha256") for record in some if counts[_draw(record)] > 1} - {None}
        found = [one for one in some if counts[_draw(one)] > 1 or one.get("forget_sha256") in hashes]
        _join("forget_sha256", found)


def _alike(runs: Iterable[Record]) -> list[list[Record]]:
    """Return groups of the runs that have one method and differ from the usual settings alike."""
    groups = defaultdict(list)
    for record in runs:
        groups[json.dumps([record["method"], record["differs"]])].append(record)
    return list(groups.values())


def _join(name: str, runs: Iterable[Record]) -> None:
    """Add a hash to what differs in the runs, so that each of its values has a row."""
    for record in runs:
        record["differs"] = record["differs"] | {name: record.get(name)}


def _draw(record: Record) -> tuple:
    """Return what decides D_f unless a file lists it."""
    return record["k"], record["continual_step"], record["seed"]


def _describe(name: str, value: object, all_digits: bool = False) -> str:
    """Return name and value of a setting for the name of a row. Long values are shortened.

    all_digits  of a number, in place of six
    """
    if name == "listed":
        return "D_f from a file" if value else "D_f by seed"
    if name in HASHES:
        return f"{HASHES[name]} {str(value)[:12]}"
    name = name.rpartition(".")[2]  # without the method, which the row names already
    if isinstance(value, float) and not all_digits:
        return f"{name}={value:g}"
    return f"{name}={'none' if value is None else shortened(str(value))}"


def method_order(method: str) -> tuple[int, str]:
    """Return a sort key for methods: the order of the registry, then unknown methods by name."""
    names = list(registry.METHODS)
    return (names.index(method) if method in names else len(names), method)
