"""Bundles for tests: exported and imported, taken apart and forged.

The fixtures are to be named in the modules that use them.
"""

import io
import json
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import blake3
import mlx.core as mx
import pytest
from kit import shard_name

import kvstore
from kvstore.caches import live as prompt_cache
from kvstore.format import bundle as bundles
from kvstore.format import shard as shards
from kvstore.format.chain import hash_block_tokens
from kvstore.format.config import StoreConfig
from kvstore.format.documents import canonical_json
from kvstore.format.entry import entry_id
from kvstore.storage import shards as stored_shards
from kvstore.storage.folder import StoreFolder
from kvstore.storage.shards import open_shard_at, staged_shard

BLOCK = 16


def export(path, ref="doc"):
    """Return the bundle of an entry."""
    file = io.BytesIO()
    with kvstore.Store(path, create=False) as store:
        assert store.export_bundle(ref, file) == len(file.getvalue())
    return file.getvalue()


def take(path, data, **options):
    """Import a bundle and return its entry."""
    with kvstore.Store(path, create=False) as store:
        return store.import_bundle(io.BytesIO(data), **options)


def tree(path):
    """Return every file and folder of a store, but SQLite's own helpers."""
    return {
        str(child.relative_to(path)): child.read_bytes() if child.is_file() else None
        for child in path.rglob("*")
        if child.suffix not in (".sqlite-wal", ".sqlite-shm")
    }


def bits_of(restored):
    """Return the bits of all rows and states of a prompt cache."""
    return [
        (name, first, bytes(memoryview(mx.contiguous(array).view(mx.uint8))))
        for held in prompt_cache.hold(restored)
        for name, (array, first) in sorted(held.items())
    ]


@pytest.fixture
def stores(tmp_path, empty_store):
    """Two stores of small blocks, as if of two people."""
    return [shutil.copytree(empty_store, tmp_path / name / "store") for name in "ab"]


@pytest.fixture(scope="session")
def small(tmp_path_factory, empty_store, caches):
    """A small bundle of two shards, and what went into it."""
    path = shutil.copytree(empty_store, tmp_path_factory.mktemp("small") / "store")
    tokens = [7, -3, *range(100, 100 + 65 * BLOCK)]
    rows = caches.random_rows(len(tokens), 5, layers=1, heads=1, dim=8)
    cache = caches.grow(None, rows)
    with kvstore.Store(path, "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
    return SimpleNamespace(data=export(path), tokens=tokens, rows=rows, cache=cache)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, empty_store, caches):
    """The smallest bundle of two blocks, one of them a tail."""
    path = shutil.copytree(empty_store, tmp_path_factory.mktemp("tiny") / "store")
    cache = caches.make_cache(17, 6, layers=1, heads=1, dim=8)
    with kvstore.Store(path, "raw") as store:
        store.save(list(range(17)), cache, caches.MODEL, name="doc")
    return export(path)


def unpack(data):
    """Return what a bundle says of itself, as one object, and its shards."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        config, entry, *contents = [archive.extractfile(m).read() for m in members]
    origin = json.loads(shard_metadata(contents[0]))
    entry = json.loads(entry)
    del entry["digest"]
    names = [Path(m.name).stem for m in members[2:]]
    return {
        **json.loads(config),
        "entry": entry,
        "fingerprint": origin["fingerprint"],
        "layout": origin["layout"],
        "shards": [
            {"name": name, "nbytes": len(data)}
            for name, data in zip(names, contents, strict=True)
        ],
    }, contents


def shard_metadata(shard):
    """Return the text that a shard has about itself in its header."""
    size = int.from_bytes(shard[:8], "little")
    return json.loads(shard[8 : 8 + size])["__metadata__"]["kvstore"]


def seal(entry):
    """Return an entry as bytes, with its digest put right."""
    body = {key: value for key, value in entry.items() if key != "digest"}
    digest = blake3.blake3(canonical_json(body)).hexdigest()
    return canonical_json({**body, "digest": digest})


def member(name, data, size=None):
    """Return one file of an archive, as ours are."""
    header = bundles._header(name, len(data) if size is None else size)
    return header + data + bytes(-len(data) % 512)


def heads(manifest):
    """Return the first two files of a bundle."""
    rest = ("entry", "fingerprint", "layout", "shards")
    config = {k: v for k, v in manifest.items() if k not in rest}
    name = bundles.entry_member(manifest["entry"].get("id"))
    return [
        member(bundles.CONFIG, canonical_json(config)),
        member(name, seal(manifest["entry"])),
    ]


def settled(manifest, contents):
    """Return what a bundle says, with what follows from other fields put right."""
    entry = manifest["entry"]
    data_bytes = [len(d) - 8 - int.from_bytes(d[:8], "little") for d in contents]
    name = entry.get("name")
    is_text = isinstance(name, str) and name.isprintable()
    own = entry_id(name if is_text else None, str(entry.get("tip")))
    entry = entry | {"id": own, "nbytes": sum(data_bytes)}
    entry["updated_at"] = entry.get("created_at")
    return manifest | {"id": own, "entry": entry}


def pack(manifest, contents, *, settle=settled):
    """Return a bundle of an entry and shards, their names and digests put right."""
    found = heads(settle(manifest, contents))
    for data in contents:
        name = shard_name(data)
        found.append(member(bundles.shard_member(name), data))
    return b"".join(found) + bytes(1024)


def decode(shard):
    """Return the origin of a shard, and its blocks as they were encoded."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(shard)
        file.flush()
        with open_shard_at(Path(file.name)) as opened:
            stored = opened.header.blocks
            pairs = zip(stored, opened.read(stored), strict=True)
            return opened.header.origin, [shards.as_written(b, d) for b, d in pairs]


def folder_in(path):
    """Return a store in the clear, of which there is `tmp` alone."""
    (path / "tmp").mkdir()
    return StoreFolder(path, StoreConfig("0" * 32, BLOCK))


def encode(origin, blocks):
    """Return a shard of blocks, whatever they are."""
    with (
        tempfile.TemporaryDirectory() as name,
        # Who forges does not look whether it can be read back.
        patch.object(stored_shards, "open_shard_at"),
        staged_shard(folder_in(Path(name)), origin, blocks) as staged,
    ):
        return staged.path.read_bytes()


def assert_refused(path, data, *errors, match=None):
    """Assert that a bundle is refused and that the store is as it was."""
    before = tree(path)
    with pytest.raises(errors or kvstore.KVStoreError, match=match):
        take(path, data)
    assert tree(path) == before


def rehash(blocks, root, tokens=None):
    """Return blocks whose hashes follow from their tokens, from a root on."""
    parent, start, found = root, 0, []
    for encoded in blocks:
        kept = encoded.block.tokens if tokens is None else tokens.pop(0)
        own = hash_block_tokens(parent, kept)
        block = replace(
            encoded.block, hash=own, parent=parent, start=start, tokens=kept
        )
        parts = encoded.parts
        if len(kept) != len(encoded.block.tokens):
            parts = tuple(resized(part, len(kept)) for part in parts)
        found.append(replace(encoded, block=block, parts=parts))
        parent, start = own, start + len(kept)
    return found


def resized(part, num_tokens):
    """Return raw rows of zeros in the place of others."""
    layers, heads, before, dim = part.shape
    data = bytes(len(part.data) // before * num_tokens)
    return replace(part, shape=(layers, heads, num_tokens, dim), data=data)


def bundle_names(data):
    """Return the names of a bundle's shards."""
    return [shard["name"] for shard in unpack(data)[0]["shards"]]
