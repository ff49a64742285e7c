"""Ed25519 signatures (RFC 8032) over what something from elsewhere says of itself.

What is signed is canonical JSON from which a digest of every byte follows, and what
kind of thing it describes, so that a signature of one kind is none of another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import IntegrityError, KVStoreError
from .documents import JSON, canonical_json, strict_json

MAX_SIGNATURE_BYTES = 1024
_KEY = re.compile(r"[0-9a-f]{64}")
_VALUE = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class Signature:
    """Who signed, and the signature; nothing is checked yet."""

    # The public key, 64 hex digits.
    key: str
    # 128 hex digits.
    value: str


def new_secret() -> str:
    """Return a new secret key, 64 hex digits."""
    private = _ed25519().Ed25519PrivateKey.generate()
    return str(private.private_bytes_raw().hex())


def public_key(secret: str) -> str:
    """Return the public key of a secret one, 64 hex digits."""
    return str(_private(secret).public_key().public_bytes_raw().hex())


def is_key(text: str) -> bool:
    """Whether a text has the form of a key."""
    return _KEY.fullmatch(text) is not None


def sign(secret: str, kind: str, description: Any) -> Signature:
    """Sign what something says of itself.

    Args:
        secret: From :func:`new_secret`.
        kind: What it is: ``bundle``, say.
        description: Any JSON; it must name all that is to be signed.
    """
    private = _private(secret)
    value = private.sign(_message(kind, description)).hex()
    return Signature(private.public_key().public_bytes_raw().hex(), value)


def check_signature(signature: Signature, kind: str, description: Any) -> None:
    """Check that the holder of the key signed this; whose key it is, others say.

    Raises:
        IntegrityError: It is not the signature of this.
    """
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(
            bytes.fromhex(signature.key)
        )
        public.verify(bytes.fromhex(signature.value), _message(kind, description))
    except (InvalidSignature, ValueError) as error:
        raise IntegrityError(
            f"the signature of key {signature.key[:12]} is not of this {kind}",
            hint="it was changed on the way, or somebody else made it",
        ) from error


def signature_to_json(signature: Signature) -> JSON:
    """Return a signature as a JSON value."""
    return {"key": signature.key, "signature": signature.value}


def parse_signature(value: Any) -> Signature:
    """Return a signature from its JSON value; nothing but its form is checked.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, dict) or value.keys() != {"key", "signature"}:
        raise ValueError("a signature has the fields key and signature")
    key, text = value["key"], value["signature"]
    if not (isinstance(key, str) and isinstance(text, str)):
        raise ValueError("a signature has texts")
    if not (_KEY.fullmatch(key) and _VALUE.fullmatch(text)):
        raise ValueError("a signature has 64 and 128 hex digits")
    return Signature(key, text)


def signature_to_bytes(signature: Signature) -> bytes:
    """Return the one spelling of a signature in a file."""
    return canonical_json(signature_to_json(signature))


def signature_from_bytes(data: bytes) -> Signature:
    """Return what :func:`signature_to_bytes` spelled.

    Raises:
        ValueError: It is none, or spelled otherwise.
    """
    signature = parse_signature(strict_json(data, allow_floats=False))
    if signature_to_bytes(signature) != data:
        raise ValueError("a signature has another spelling")
    return signature


def _message(kind: str, description: Any) -> bytes:
    return canonical_json(["kvstore signature 1", kind, description])


def _private(secret: str) -> Any:
    return _ed25519().Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise KVStoreError(
            "signatures need the package `cryptography`",
            hint="pip install 'mlx-kvstore[crypto]'",
        ) from error
    return ed25519
