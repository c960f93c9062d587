"""Ed25519 signatures of reports. They need the package `cryptography`."""

import base64
import hashlib
import json
from pathlib import Path

from l2ul.common.errors import InputError, first_line

SUFFIX = ".sig"  # appended to the file name of a report


def private_key(path: Path):
    """Read an Ed25519 private key from a PEM file. Raise InputError for any other content, or if a password is set."""
    from_pem = _serialization().load_pem_private_key
    return _read_key(path, lambda content: from_pem(content, password=None), "sign", "a private")


def public_key(path: Path):
    """Read an Ed25519 public key from a PEM file. Raise InputError for any other content."""
    return _read_key(path, _serialization().load_pem_public_key, "verify", "a public")


def write_signature(report: Path, key) -> None:
    """Sign a report with a private key; the signature is written beside it."""
    signature_path(report).write_text(sign(report.read_bytes(), key))


def signature_path(report: Path) -> Path:
    """Return the path of the signature of a report."""
    return report.with_name(report.name + SUFFIX)


def sign(content: bytes, key) -> str:
    """Return the signature of bytes as JSON text, together with the public key."""
    return json.dumps(
        {
            "algorithm": "ed25519",
            "public_key": _pem(key.public_key()),
            "signature": base64.b64encode(key.sign(content)).decode(),
        },
        indent=1,
    )


def signed_by(content: bytes, signature: bytes, key=None) -> str | None:
    """Return the fingerprint of the public key if the signature of the bytes is valid, else None.

    key  the public key that must have signed. By default, the key stored with the signature: the check then shows only
         that nothing was changed since the owner of that key signed.
    """
    serialization = _serialization()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        stored = json.loads(signature)
        key = key or serialization.load_pem_public_key(stored["public_key"].encode())
        key.verify(base64.b64decode(stored["signature"]), content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidSignature, UnsupportedAlgorithm):
        return None
    return fingerprint(key)


def fingerprint(key) -> str:
    """Return the hex sha256 of a public key in PEM form."""
    return hashlib.sha256(_pem(key).encode()).hexdigest()


def _serialization():
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise InputError(
            "signatures need the package cryptography", "run uv run --extra sign, or pip install cryptography"
        ) from None
    return serialization


def _read_key(path: Path, load, method: str, what: str):
    from cryptography.exceptions import UnsupportedAlgorithm

    expected = (
        f"expected {what} Ed25519 key in PEM form without a password, as openssl genpkey -algorithm ed25519 writes"
    )
    try:
        key = load(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the key {path} ({error.strerror})", expected) from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not a usable key ({first_line(error)[:80]})", expected) from None
    if type(key).__name__ not in ("Ed25519PrivateKey", "Ed25519PublicKey") or not hasattr(key, method):
        raise InputError(f"{path} contains a {type(key).__name__}", expected)
    return key


def _pem(key) -> str:
    serialization = _serialization()
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, kind).decode()
