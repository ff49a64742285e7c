"""Bundles for tests: exported and imported, taken apart and forged.

The fixtures are to be named in the modules that use them.
"""

import hashlib
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

import kvstore
from kvstore.caches import live as prompt_cache
from kvstore.format import bundle as bundles
from kvstore.format import shard as shards
from kvstore.format.chain import hash_block_tokens
from kvstore.format.documents import canonical_json
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
    """Return the manifest of a bundle, and its shards."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        contents = [archive.extractfile(m).read() for m in archive.getmembers()]
    return json.loads(contents[0]), contents[1:]


def seal(manifest):
    """Return a manifest as bytes, with its digest put right."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    digest = blake3.blake3(canonical_json(body)).hexdigest()
    return canonical_json({**body, "digest": digest})


def member(name, data, size=None):
    """Return one file of an archive, as ours are."""
    header = bundles._header(name, len(data) if size is None else size)
    return header + data + bytes(-len(data) % 512)


def pack(manifest, contents):
    """Return a bundle of a manifest and shards, their names and digests put right."""
    names = [hashlib.sha256(data).hexdigest() for data in contents]
    manifest = manifest | {
        "shards": [
            {"sha256": name, "nbytes": len(data)}
            for name, data in zip(names, contents, strict=True)
        ]
    }
    found = [member(bundles.MANIFEST, seal(manifest))]
    for name, data in zip(names, contents, strict=True):
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


def encode(origin, blocks):
    """Return a shard of blocks, whatever they are."""
    with (
        tempfile.TemporaryDirectory() as folder,
        # Who forges does not look whether it can be read back.
        patch.object(shards, "_parse"),
        staged_shard(Path(folder), origin, blocks) as staged,
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
    return [shard["sha256"] for shard in unpack(data)[0]["shards"]]
