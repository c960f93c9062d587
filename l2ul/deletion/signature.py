"""Ed25519 signatures of a report, and whether one is right."""

import base64
import hashlib
import json
from pathlib import Path

from l2ul.common.errors import InputError

SUFFIX = ".sig"  # of a report's signature, after the report's own name


def _serialization():
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise InputError(
            "signatures need the package cryptography: run by uv run --extra sign, or pip install cryptography"
        ) from None
    return serialization


def private_key(path: Path):
    """The Ed25519 key in a PEM file; InputError where it is missing, of another kind, or kept under a password."""
    from_pem = _serialization().load_pem_private_key
    return _read(path, lambda content: from_pem(content, password=None), "sign", "a private")


def public_key(path: Path):
    """The Ed25519 public key in a PEM file; InputError where there is none."""
    return _read(path, _serialization().load_pem_public_key, "verify", "a public")


def _read(path: Path, load, method: str, what: str):
    from cryptography.exceptions import UnsupportedAlgorithm

    wanted = f"expected {what} Ed25519 key as PEM without a password, such as openssl genpkey -algorithm ed25519 writes"
    try:
        key = load(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the key {path} ({error.strerror}); {wanted}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not to be used as a key ({why[:80]}); {wanted}") from None
    if type(key).__name__ not in ("Ed25519PrivateKey", "Ed25519PublicKey") or not hasattr(key, method):
        raise InputError(f"{path} holds a {type(key).__name__}; {wanted}")
    return key


def sign(content: bytes, key) -> str:
    """The signature of a report's bytes as JSON text, with the public key that it can be checked by."""
    return json.dumps(
        {
            "algorithm": "ed25519",
            "public_key": _pem(key.public_key()),
            "signature": base64.b64encode(key.sign(content)).decode(),
        },
        indent=1,
    )


def signed_by(content: bytes, signature: bytes, key=None) -> str | None:
    """The fingerprint of the public key that this signature of the bytes is right for; None where it is wrong.

    key  the public key that it has to be by; by default the one beside the signature, which then only tells that
         nothing was changed since whoever holds it signed
    """
    serialization = _serialization()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        told = json.loads(signature)
        key = key or serialization.load_pem_public_key(told["public_key"].encode())
        key.verify(base64.b64decode(told["signature"]), content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidSignature, UnsupportedAlgorithm):
        return None
    return fingerprint(key)


def fingerprint(key) -> str:
    """Hex sha256 of a public key as PEM."""
    return hashlib.sha256(_pem(key).encode()).hexdigest()


def _pem(key) -> str:
    serialization = _serialization()
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, kind).decode()
