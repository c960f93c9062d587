"""Read text files and compare names as people write them: byte order marks, line ends, Unicode normal forms."""

import codecs
from pathlib import Path
import unicodedata


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or of a UTF-16 file with a byte order mark, with `\\n` as the line end.

    Raises OSError for a file that cannot be read, and UnicodeDecodeError for one that is not such text.
    """
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def normal_form(name: str) -> str:
    """Return the name in Unicode normal form C. Names are the same if they are equal in this form.

    macOS and Linux may store a letter such as é as one code point or as two.
    """
    return unicodedata.normalize("NFC", name)
