"""Read text and JSON files, compare names as people write them (Unicode normal forms), shorten texts for display."""

import codecs
from collections.abc import Sequence
import errno
import hashlib
import json
import os
from pathlib import Path
import re
import stat
import unicodedata

from l2ul.common.errors import InputError

# Control characters, line ends, characters that turn the direction of the following text, and halves of characters
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def read_text(path: Path, most: int | None = None) -> str:
    """Return the text of a UTF-8 file, or of a UTF-16 file with a byte order mark, with `\\n` as the line end.

    most  bytes that the file may have, which must then be a regular file; None: any

    Raises OSError for a file that cannot be read, and UnicodeDecodeError for one that is not such text.
    """
    if most is not None:
        require_file(path, most)
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; empty if the file is absent or holds something else."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def require_file(path: Path, most: int) -> None:
    """Raise OSError unless `path` is a regular file of at most `most` bytes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))


def normal_form(name: str) -> str:
    """Return the name in Unicode normal form C. Names are the same if they are equal in this form.

    macOS and Linux may store a letter such as é as one code point or as two.
    """
    return unicodedata.normalize("NFC", name)


def in_file_name(name: str) -> str:
    """Return the name of a data set or model as a part of a file name: `hf:a/b:c` becomes `hf_a--b=c`.

    Different names stay different, because those of hubs contain neither -- nor =.
    """
    kind, colon, place = name.partition(":")
    return f"{kind}_{place.replace('/', '--').replace(':', '=')}" if colon else name


def is_number(text: str) -> bool:
    """Return whether a text is a whole number of at most 18 digits. Python refuses to read numbers of thousands."""
    return text.isdecimal() and len(text) <= 18


def shortened(text: str, most: int = 120) -> str:
    """Return a text for display on one line, at most `most` characters long.

    A longer text is cut and gets a part of its hash, so that different texts stay different.
    """
    if len(text) > most:
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
        text = f"{text[: most - 10]}… {digest}"
    return one_line(text, "\ufffd")


def require_utf8_name(path: Path) -> Path:
    """Return the path. Raise InputError if its name is not UTF-8, so that no text file can contain it."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        shown = path.name.encode(errors="surrogateescape").decode(errors="replace")
        raise InputError(f"the name {shown} in {path.parent} is not UTF-8", "rename the file or folder") from None
    return path


def one_line(text: str, instead: str = " ") -> str:
    """Return a text with another character in place of each line break and control character."""
    return CONTROLS.sub(instead, text)


def first_three(names: Sequence[str]) -> str:
    """Return the first three names for a message, and … if there are more."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
