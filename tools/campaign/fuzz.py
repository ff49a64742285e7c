"""Bytes from elsewhere, mutated: as they are, and with digests that fit again."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvstore
from kvstore.errors import FormatError, IntegrityError
from kvstore.format.config import parse_config
from kvstore.format.documents import blake3_hex, canonical_json
from kvstore.format.entry import parse_entry
from kvstore.format.safetensors import parse_header
from kvstore.format.shard import _NO_DIGEST, _digest_field, _seal, parse_shard_header

from .damage import BYTES

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, "", "x", "\0", "\ud800",
    "../../etc", "9" * 64, "f" * 64, "x" * 70_000, [], {}, [[]] * 50, {"a": {}},
]  # fmt: skip


class Fuzzer:
    """Knows what is parsed of files from elsewhere, and with which errors.

    Args:
        folder: Where stores are made.
        empty: An empty store.
        caches: The tests' makers of prompt caches.
    """

    def __init__(self, folder: Path, empty: Path, caches: Any) -> None:
        path = shutil.copytree(empty, folder / "fuzzed")
        tokens, cache = caches.make_conversation(2, 1)
        with kvstore.Store(path, "turbo4+zstd") as store:
            entry = store.save(tokens, cache, caches.MODEL, name="fuzz")
            file = io.BytesIO()
            store.export_bundle("fuzz", file)
        self._bundle = file.getvalue()
        (shard,) = path.glob("shards/*/*")
        data = shard.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        self._header, self._size = data[8:end], len(data)
        self._entry = path / "entries" / f"{entry.id}.json"
        self._config = path / "config.json"
        self._documents = {p: p.read_bytes() for p in (self._entry, self._config)}
        self._target = shutil.copytree(empty, folder / "target")
        self.accepted: Counter[str] = Counter()
        """How many mutants of a kind were taken."""
        refusals = (IntegrityError, FormatError)
        header = (ValueError, KeyError, TypeError, FormatError)
        self._subjects: dict[str, tuple[Callable[[Any], None], tuple[Any, ...]]] = {
            "config": (self._config_bytes, refusals),
            "entry": (self._entry_bytes, refusals),
            "config, sealed": (self._sealed_config, refusals),
            "entry, sealed": (self._sealed_entry, refusals),
            "header": (self._header_bytes, header),
            "header, sealed": (self._sealed_header, header),
            "tensors": (self._tensors, header),
            "bundle": (self._import, (kvstore.KVStoreError,)),
        }
        self.quick = [name for name in self._subjects if name != "bundle"]

    def try_one(self, subject: str, chance: random.Random) -> None:
        """Parse one mutant; raises whatever is no refusal."""
        parse, refusals = self._subjects[subject]
        try:
            parse(chance)
        except refusals:
            return
        self.accepted[subject] += 1

    def _config_bytes(self, chance: random.Random) -> None:
        good = self._documents[self._config]
        found = parse_config(self._config, _mutated(chance, good))
        assert found == parse_config(self._config, good), "another value is taken"

    def _entry_bytes(self, chance: random.Random) -> None:
        good = self._documents[self._entry]
        found = parse_entry(self._entry, _mutated(chance, good))
        assert found == parse_entry(self._entry, good), "another value is taken"

    def _sealed_config(self, chance: random.Random) -> None:
        parse_config(self._config, self._sealed(self._config, chance))

    def _sealed_entry(self, chance: random.Random) -> None:
        parse_entry(self._entry, self._sealed(self._entry, chance))

    def _sealed(self, path: Path, chance: random.Random) -> bytes:
        """Return a changed document with a digest that fits."""
        values = json.loads(self._documents[path])
        del values["digest"]
        values = _changed(chance, values)
        digest = blake3_hex(_text(values))
        fields = values if isinstance(values, dict) else {"x": values}
        return _text({**fields, "digest": digest})

    def _header_bytes(self, chance: random.Random) -> None:
        data = _mutated(chance, self._header)
        parse_shard_header(data, self._size - len(self._header) + len(data))
        assert data == self._header, "changed bytes are taken"

    def _sealed_header(self, chance: random.Random) -> None:
        values = json.loads(self._header)
        meta = json.loads(values["__metadata__"]["kvstore"])
        if chance.random() < 0.7:
            meta = _changed(chance, meta)
        else:
            values = _changed(chance, values)
        if isinstance(meta, dict) and isinstance(values, dict):
            meta["header_digest"] = _NO_DIGEST
            text = _text(meta).decode(errors="replace")
            values["__metadata__"] = {"format": "pt", "kvstore": text}
        data = _text(values)
        if _digest_field(_NO_DIGEST) in data:
            data = _seal(data)
        parse_shard_header(data, self._size - len(self._header) + len(data))

    def _tensors(self, chance: random.Random) -> None:
        values = _changed(chance, json.loads(self._header))
        parse_header(_text(values), self._size - len(self._header) - 8)

    def _import(self, chance: random.Random) -> None:
        data = _mutated(chance, self._bundle)
        with kvstore.Store(self._target, create=False) as store:
            try:
                store.import_bundle(io.BytesIO(data))
                assert data.startswith(self._bundle), "changed bytes are taken"
            finally:
                assert not list((self._target / "tmp").iterdir())


def _mutated(chance: random.Random, data: bytes) -> bytes:
    """Return bytes with a few places changed."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        found = bytearray(BYTES[chance.choice([*BYTES])](chance, found))
    return bytes(found)


def _changed(chance: random.Random, value: Any) -> Any:
    """Return a document with a value somewhere in it replaced, added or taken away."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key, what = chance.choice(sorted(value)), chance.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.2:
            return {**value, f"{key}x": value[key]}
        return {**value, key: _changed(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at, what = chance.randrange(len(value)), chance.random()
        if what < 0.2:
            return [*value[:at], *value[at + 1 :]]
        if what < 0.3:
            return [*value, value[at]]
        return [*value[:at], _changed(chance, value[at]), *value[at + 1 :]]
    return chance.choice([*HOSTILE, value])


def _text(value: Any) -> bytes:
    """Return a document as bytes, even one that we would not write."""
    try:
        return canonical_json(value)
    except (ValueError, TypeError):
        return json.dumps(value).encode()
