"""What an encrypted store's key does to bytes on their way to the disk and back.

One 256-bit key; everything else is derived from it by HKDF. Files and blocks are sealed
with AES-256-GCM, values that have to be looked up with AES-SIV, which gives the same
bytes for the same value. Nothing here opens a file.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any

import blake3

from ..errors import KVStoreError
from ..format.documents import canonical_json

KEY_BYTES = 32
TAG_BYTES = 16
SALT_BYTES = 32
SEALED_BYTES = SALT_BYTES + TAG_BYTES
"""By how much sealing makes a small file longer."""
_NONCE_BYTES = 12
# What fits into a processor's cache is read, decrypted and put where it belongs.
_PIECE_BYTES = 256 * 1024
_SHUT = "it does not open with the store's key"
Data = bytes | memoryview


class Cipher:
    """The key of one store.

    Args:
        key: 32 bytes.
        store: The store's id, which all that is sealed is bound to.

    Raises:
        KVStoreError: The package for it is missing.
    """

    def __init__(self, key: bytes, store: str) -> None:
        aead = _aead()
        self._key, self._store = key, store
        # SIV gives equal bytes for equal values, which a look-up needs, and tells no
        # more of them than that they are equal.
        self._siv = aead.AESSIV(_derive(key, b"", "hidden values", 64))
        self._files = _derive(key, b"", "files", KEY_BYTES)
        self._salts = _derive(key, b"", "salts", KEY_BYTES)
        self._numbers = _derive(key, b"", "numbers", KEY_BYTES)

    def hide(self, value: bytes) -> bytes:
        """Return what stands for a value where it is looked up; always the same."""
        return bytes(self._siv.encrypt(value, [self._store.encode()]))

    def show(self, hidden: bytes) -> bytes:
        """Return the value that :meth:`hide` hid.

        Raises:
            ValueError: It is none of this store's.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(self._siv.decrypt(hidden, [self._store.encode()]))
        except InvalidTag as error:
            raise ValueError(_SHUT) from error

    def number(self, value: bytes) -> int:
        """Return a 63-bit number that stands for a value, and does not tell it."""
        digest = blake3.blake3(value, key=self._numbers).digest(8)
        # SQLite's integers have a sign.
        return int.from_bytes(digest, "little") >> 1

    def salt_of(self, header: bytes) -> bytes:
        """Return the salt of a shard: the same header, so the same bytes, one salt."""
        return bytes(blake3.blake3(header, key=self._salts).digest(SALT_BYTES))

    def seal(self, data: bytes, *about: str) -> bytes:
        """Encrypt a small file.

        Args:
            data: Its bytes.
            about: What it is; it opens as nothing else.
        """
        # A new key for each file, by its salt: a key may seal each number once.
        salt = secrets.token_bytes(SALT_BYTES)
        return salt + b"".join(self.parts(salt, self._files).seal(0, [data], *about))

    def open(self, data: bytes, *about: str) -> bytes:
        """Decrypt what :meth:`seal` encrypted.

        Raises:
            ValueError: It was changed, or is something else.
        """
        file = BytesIO(data)
        parts = self.parts(file.read(SALT_BYTES), self._files)
        opened = bytearray(max(0, len(data) - SEALED_BYTES))

        def read(buffer: memoryview) -> None:
            file.readinto(buffer)

        parts.open(0, [memoryview(opened)], read, *about)
        return bytes(opened)

    def parts(self, salt: bytes, key: bytes | None = None) -> PartCipher:
        """Return what seals the parts of one file, of which the salt is its own."""
        return PartCipher(key or self._key, salt, self._store)


class PartCipher:
    """The key of one file, which seals its numbered parts; each number once."""

    def __init__(self, key: bytes, salt: bytes, store: str) -> None:
        self._key = _derive(key, salt, "parts", KEY_BYTES)
        self._about = ["kvstore sealed 1", store, salt.hex()]

    def seal(self, number: int, data: Iterable[Data], *about: str) -> Iterator[bytes]:
        """Yield a part encrypted, and its tag; to decrypt it, `about` must be known.

        Piece by piece, since whole blocks would take their size in memory once more.
        """
        encryptor = self._begin(number, about).encryptor()
        encryptor.authenticate_additional_data(self._bound(number, about))
        for piece in _pieces(data):
            yield encryptor.update(piece)
        yield encryptor.finalize()
        yield encryptor.tag

    def open(
        self,
        number: int,
        buffers: Sequence[memoryview],
        read: Callable[[memoryview], None],
        *about: str,
    ) -> None:
        """Decrypt a part into buffers, one after the other.

        Args:
            number: The part's.
            buffers: Writable bytes, of as many as the part had.
            read: Fills a buffer with what comes next in the file.
            about: As :meth:`seal` took it.

        Raises:
            ValueError: It was changed, or is another part. What is in the buffers then
                means nothing.
        """
        from cryptography.exceptions import InvalidTag

        decryptor = self._begin(number, about).decryptor()
        decryptor.authenticate_additional_data(self._bound(number, about))
        scratch = memoryview(bytearray(_PIECE_BYTES))
        for piece in _pieces(buffers):
            sealed = scratch[: len(piece)]
            read(sealed)
            decryptor.update_into(sealed, piece)
        read(scratch[:TAG_BYTES])
        try:
            decryptor.finalize_with_tag(bytes(scratch[:TAG_BYTES]))
        except InvalidTag as error:
            raise ValueError(_SHUT) from error

    def _begin(self, number: int, about: tuple[str, ...]) -> Any:
        from cryptography.hazmat.primitives import ciphers

        # No nonce comes twice with one key: each file has its own key, and each of its
        # parts another number.
        nonce = number.to_bytes(_NONCE_BYTES, "little")
        aes, gcm = ciphers.algorithms.AES(self._key), ciphers.modes.GCM(nonce)
        return ciphers.Cipher(aes, gcm)

    def _bound(self, number: int, about: tuple[str, ...]) -> bytes:
        return canonical_json([*self._about, number, *about])


def _pieces(data: Iterable[Data]) -> Iterator[memoryview]:
    for part in data:
        view = memoryview(part).cast("B")
        for begin in range(0, len(view), _PIECE_BYTES):
            yield view[begin : begin + _PIECE_BYTES]


def _derive(key: bytes, salt: bytes, purpose: str, size: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = f"kvstore 1 {purpose}".encode()
    return bytes(HKDF(SHA256(), size, salt, info).derive(key))


def _aead() -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers import aead
    except ImportError as error:
        raise KVStoreError(
            "an encrypted store needs the package `cryptography`",
            hint="pip install 'mlx-kvstore[crypto]'",
        ) from error
    return aead
