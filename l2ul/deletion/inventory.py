"""Read the operator's inventory: what else contains the images, and who was informed.

The file is TOML, which cannot run code. It has any of the tables in `Inventory`, each with any number of entries:

    [[backups]]
    name = "nightly backup of the model store"
    action = "deleted"            # deleted, replaced, informed, kept or open
    date = 2026-11-20             # optional, like location and note
    location = "tape 7"

    [[recipients]]
    name = "Example Hospital"
    action = "informed"
    note = "has the model since March"

The report repeats these statements. They are not checked.
"""

import datetime
from pathlib import Path
import tomllib
from typing import get_type_hints

from l2ul.common.choices import did_you_mean
from l2ul.common.errors import InputError
from l2ul.common.text import read_text
from l2ul.deletion.report_schema import Inventory, InventoryRow, find_error


def read_inventory(path: Path) -> Inventory:
    """Return the inventory in a TOML file. Raise InputError, naming the first error, if it is none."""
    try:
        content = _dates_as_text(tomllib.loads(read_text(path)))
        error = _unknown_key(content) or find_error(content, Inventory)
    except OSError as failure:
        error = failure.strerror
    except RecursionError:
        error = "it is nested too deeply"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        error = f"it is not TOML: {failure}"
    if error:
        raise InputError(
            f"cannot read the inventory {path} ({error})",
            "expected TOML with tables such as [[backups]], each with name and action",
        )
    return content


def _dates_as_text(value: object) -> object:
    if isinstance(value, dict):
        return {key: _dates_as_text(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_dates_as_text(one) for one in value]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def _unknown_key(content: dict[str, object]) -> str | None:
    """Return in words the first key that an inventory does not have; None if there is none."""
    tables = get_type_hints(Inventory)
    for name, rows in content.items():
        if name not in tables:
            return f"there is no table {name}; expected some of {', '.join(tables)}{did_you_mean(name, tables)}"
        keys = get_type_hints(InventoryRow)
        for row in rows if isinstance(rows, list) else ():
            unknown = next((key for key in row if key not in keys), None) if isinstance(row, dict) else None
            if unknown is not None:
                return f"{name} has no {unknown}; expected {', '.join(keys)}{did_you_mean(unknown, keys)}"
    return None
