"""Rows of a table: a method, and what sets its runs apart where the same method was run with other settings."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
import json

from l2ul.experiments import defaults
from l2ul.methods import fixed_length, registry
from l2ul.reporting.collect import is_setting

BLOCK = ("goal", "continual_size", "dataset", "age_grouping", "model")
Record = dict[str, object]


@dataclass
class Block:
    """The records of one goal, data set and net (and number of images a step), their rows named.

    usual  the commonest value of each setting among the methods that use it; a row that has them is called by its
           method's name alone
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
        return f"{self.dataset}{f' {self.age_grouping}' if self.age_grouping else ''}, {self.model}"

    def main_row(self, method: str) -> str:
        """The row that stands for a method: its plain one, else the one of most runs."""
        rows = Counter(record["row"] for record in self.records if record["method"] == method)
        return method if method in rows or not rows else min(rows, key=lambda row: (-rows[row], row))


def blocks(records: list[Record]) -> list[Block]:
    """The records in blocks, in a fixed order; each record gets its `row` and in `differs` what sets it apart."""

    def axes(record: Record) -> tuple:
        return (*(record[name] for name in BLOCK), record["continual_step"] is not None)

    def order(record: Record) -> str:
        return json.dumps([axes(record), record], sort_keys=True)

    made = []
    for key, group in groupby(sorted(records, key=order), key=axes):
        block = Block(*key)
        block.records = list(group)
        _name_rows(block)
        made.append(block)
    return made


def settings(record: Record) -> Record:
    """What decided the run's result besides method, data and seed; those of a method of fixed length one by one."""
    found = {key: value for key, value in record.items() if is_setting(key)}
    own = fixed_length.read(found.pop("course", None) or "")
    return found | {f"{record['method']}.{key}": value for key, value in own.items()}


def _name_rows(block: Block) -> None:
    given = [settings(record) for record in block.records]
    users = defaultdict(set)  # of each setting: null is what a method that does not use it has
    for record, values in zip(block.records, given, strict=True):
        for key, value in values.items():
            if value is not None:
                users[key].add(record["method"])
    for key in sorted(users):
        _fill_in(key, block, given)
        pairs = zip(block.records, given, strict=True)
        block.usual[key] = _commonest(
            [values.get(key) for record, values in pairs if record["method"] in users[key]], key, block.dataset
        )
    for record, values in zip(block.records, given, strict=True):
        record["differs"] = {
            key: values.get(key)
            for key in block.usual
            if record["method"] in users[key] and values.get(key) != block.usual[key]
        }
    _tell_apart(block.records)
    for record in block.records:
        told = ", ".join(_told(key, value) for key, value in record["differs"].items())
        record["row"] = record["method"] + (f" ({told})" if told else "")


def _fill_in(key: str, block: Block, given: list[Record]) -> None:
    """Older records lack settings that came later: their runs had what is the default of these."""
    if key in defaults.COMMON_DEFAULTS:
        for values in given:
            values.setdefault(key, defaults.default(block.dataset, key))


def _commonest(values: list, key: str, dataset: str) -> object:
    """The value that most have; of several, the default."""
    counts = Counter(values)
    usual = defaults.default(dataset, key) if key in defaults.COMMON_DEFAULTS else None
    return max(counts, key=lambda value: (counts[value], value == usual, repr(value)))


def _tell_apart(records: list[Record]) -> None:
    """Two runs of one seed differ in D_f alone where all else is the same: that is then what sets them apart."""
    same = defaultdict(list)
    for record in records:
        same[json.dumps([record[key] for key in ("method", "differs", "k", "continual_step", "seed")])].append(record)
    for runs in same.values():
        if len(runs) > 1:
            for record in runs:
                record["differs"] = record["differs"] | {"forget_sha256": record.get("forget_sha256")}


def _told(key: str, value: object) -> str:
    if key == "listed":
        return "D_f from a file" if value else "D_f by seed"
    if key in ("checkpoint_sha256", "forget_sha256"):
        return f"{'weights' if key == 'checkpoint_sha256' else 'D_f'} {str(value)[:12]}"
    key = key.rpartition(".")[2]  # of a method of fixed length: its row is called by the method already
    return f"{key}={'none' if value is None else f'{value:g}' if isinstance(value, float) else value}"


def place(method: str) -> tuple[int, str]:
    """Where a method's rows stand: as in the registry, unknown ones after."""
    names = list(registry.METHODS)
    return (names.index(method) if method in names else len(names), method)
