"""A reader that was written from FORMAT.md alone restores what kvstore restores."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from blake3 import blake3
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from kvstore import Fingerprint, Store
from turboquant.kv_cache import quantize_prompt_cache

ROOT = Path(__file__).parent.parent.parent
LOSSY = {"k", "v", "k.coded", "v.coded"}
GOLDEN = ROOT / "tests/kvstore/golden"
TOOL = ROOT / "tools/read_shard.py"
MODEL = Fingerprint({"weights": "of this test", "config": {"theta": 1e4}}, "test")
DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
TOLERANCE = 2.0**-20  # of norm and mean, FORMAT.md 10.1


def load_tool() -> Any:
    """Return the program as a module."""
    spec = importlib.util.spec_from_file_location("read_shard", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load_tool()


def make_store(path: Path, block_size: int = 16) -> Path:
    """Make an empty store with small blocks, as FORMAT.md says."""
    for name in ("entries", "shards", "quarantine", "tmp"):
        (path / name).mkdir(parents=True, mode=0o700)
    config = {"format": 1, "id": "0" * 32, "block_size": block_size}
    digest = blake3(reader.canonical(config).encode()).hexdigest()
    (path / "config.json").write_text(reader.canonical({**config, "digest": digest}))
    return path


def make_golden(path: Path) -> Path:
    """Return a store of the entries and shards that are kept as they were saved."""
    store = make_store(path)
    for shard in GOLDEN.glob("[0-9a-f]*.safetensors"):
        (store / "shards" / shard.name[:2]).mkdir(exist_ok=True)
        shutil.copy(shard, store / "shards" / shard.name[:2])
    for entry in GOLDEN.glob("*.json"):
        shutil.copy(entry, store / "entries")
    return store


def make_imported(path: Path) -> Path:
    """Return a store of all bundles that are kept as they were exported."""
    with Store(make_store(path)) as store:
        for bundle in GOLDEN.glob("*.kvbundle"):
            store.import_bundle(io.BytesIO(bundle.read_bytes()))
    return path


def arrays_of(cache: Any, num_tokens: int) -> list[dict[str, mx.array]]:
    """Return the arrays of a cache, named as FORMAT.md names them."""
    if isinstance(cache, CacheList):
        return [found for one in cache.caches for found in arrays_of(one, num_tokens)]
    if isinstance(cache, ArraysCache):
        states = enumerate(cache.cache)
        return [{f"state{i}": s.reshape(1, 1, -1) for i, s in states if s is not None}]
    if cache.empty():
        return [{}]
    if isinstance(cache, QuantizedKVCache):
        names = [
            f"{side}.{part}" for side in "kv" for part in ("codes", "scales", "biases")
        ]
        arrays = (*cache.keys, *cache.values)
        return [{n: a[0, :, :num_tokens] for n, a in zip(names, arrays, strict=True)}]
    if hasattr(cache, "coded_keys"):
        keys, values = cache.keys_and_values()
        return [{"k.coded": keys[0], "v.coded": values[0]}]
    sides = {"k": cache.keys, "v": cache.values}
    if isinstance(cache, ChunkedKVCache):
        return [{f"{side}.window": rows[0] for side, rows in sides.items()}]
    if isinstance(cache, RotatingKVCache):
        ordered = {s: cache._temporal_order(rows)[0] for s, rows in sides.items()}
        kept = {f"{s}.keep": rows[:, : cache.keep] for s, rows in ordered.items()}
        last = {f"{s}.window": rows[:, cache.keep :] for s, rows in ordered.items()}
        return [(kept if cache.keep else {}) | last]
    return [{side: rows[0, :, :num_tokens] for side, rows in sides.items()}]


def to_numpy(array: mx.array) -> Any:
    """Return an array as the reader returns it: bfloat16 as float32."""
    is_bfloat16 = array.dtype == mx.bfloat16
    return np.array(array.astype(mx.float32) if is_bfloat16 else array)


def assert_same(path: Path, *, is_lossy: bool = False) -> None:
    """Compare all entries of a store as kvstore restores them and as the tool does."""
    entries = list(reader.read_entries(path))
    assert entries
    with Store(path) as store:
        assert {entry.id for entry in store.entries()} == {e["id"] for e in entries}
        for entry in entries:
            cache, tokens = store.load_entry(entry["id"], None)
            expected = [a for one in cache for a in arrays_of(one, len(tokens))]
            found_tokens, actual = reader.restore(path, entry)
            assert found_tokens == tokens
            assert len(expected) == len(actual)
            for number, (wanted, found) in enumerate(
                zip(expected, actual, strict=True)
            ):
                assert set(wanted) == set(found) - {"index"}
                for name, array in wanted.items():
                    exact = not is_lossy or name not in LOSSY
                    assert_rows(array, found[name], exact, f"layer {number}, {name}")


def assert_rows(array: mx.array, found: Any, exact: bool, what: str) -> None:
    """Compare one array to the bit, or to the tolerance of lossy rows."""
    wanted = to_numpy(array)
    assert wanted.dtype == found.dtype, what
    assert wanted.shape == found.shape, what
    if exact:
        assert wanted.tobytes() == found.tobytes(), what
        return
    assert np.array_equal(np.isnan(wanted), np.isnan(found)), what
    # Norms and means of these rows are below twice their own length.
    length = 2 * np.linalg.norm(
        np.nan_to_num(wanted.astype(float)), axis=-1, keepdims=True
    )
    digits = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
    ulp = np.abs(wanted.astype(float)) * digits[array.dtype]
    gap = np.abs(wanted.astype(float) - found.astype(float))
    assert np.nan_to_num(gap - ulp - TOLERANCE * length).max() <= 0, what


def make_rows(seed: int, dtype: mx.Dtype, dim: int, num_tokens: int) -> mx.array:
    """Return random keys and values of two heads, the keys off centre."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((2, 1, 2, num_tokens, dim)).astype(np.float32)
    rows[0] += 3
    return mx.array(rows).astype(dtype)


def fill(cache: Any, rows: mx.array) -> Any:
    """Return the cache with these rows in it."""
    cache.update_and_fetch(rows[0], rows[1])
    return cache


def save(path: Path, codec: str, cache: list[Any], num_tokens: int) -> Path:
    """Save a prompt cache to a new store and return its folder."""
    with Store(make_store(path), codec) as store:
        store.save(list(range(num_tokens)), cache, MODEL, name="one")
    return path


@pytest.mark.parametrize("make", [make_golden, make_imported])
def test_every_golden_store_is_restored(make, tmp_path):
    """The reader restores every kept store and bundle as kvstore does."""
    assert_same(make(tmp_path / "store"), is_lossy=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["raw", "planes", "raw+zstd", "planes+zstd"])
def test_lossless_codecs_are_restored_to_the_bit(codec, dtype, tmp_path):
    """The reader returns every bit of rows that a lossless codec stored."""
    rows = make_rows(1, DTYPES[dtype], 24, 40)
    path = save(tmp_path / "store", codec, [fill(KVCache(), rows)], 40)
    assert_same(path)
    _, (found,) = reader.restore(path, next(reader.read_entries(path)))
    assert found["k"].tobytes() == to_numpy(rows[0, 0]).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [*map(str, range(1, 9)), "5v3", "2v7"])
def test_turbo_codes_of_every_width_are_restored(bits, dtype, tmp_path):
    """The reader decodes every width of codes within the tolerance of FORMAT.md."""
    layers = [fill(KVCache(), make_rows(i, DTYPES[dtype], 40, 40)) for i in range(2)]
    path = save(tmp_path / "store", f"turbo{bits}", layers, 40)
    assert_same(path, is_lossy=True)


@pytest.mark.parametrize("dim", [8, 80, 96, 128, 576])
def test_rotations_of_every_size_are_undone(dim, tmp_path):
    """The reader undoes rotations of vectors whose length is no power of two."""
    cache = [fill(KVCache(), make_rows(2, mx.bfloat16, dim, 40))]
    assert_same(save(tmp_path / "store", "turbo8+zstd", cache, 40), is_lossy=True)


def test_broken_vectors_stay_broken(tmp_path):
    """A vector with an infinity is not a number anywhere, and zeros stay zeros."""
    rows = make_rows(3, mx.float16, 64, 40)
    rows[1, 0, 0, 10, 5] = float("inf")
    rows[1, 0, 1, 11] = 0
    path = save(tmp_path / "store", "turbo4", [fill(KVCache(), rows)], 40)
    assert_same(path, is_lossy=True)
    _, (found,) = reader.restore(path, next(reader.read_entries(path)))
    assert np.isnan(found["v"][0, 10]).all()
    assert not found["v"][1, 11].any()


@pytest.mark.parametrize("codec", ["turbo4+zstd", "turbo3", "planes"])
def test_every_class_of_cache_is_restored(codec, tmp_path):
    """The reader restores windows, states, lists and caches of codes."""
    plain = [fill(KVCache(), make_rows(i, mx.float16, 64, 40)) for i in range(3)]
    states = ArraysCache(3)
    states[0] = mx.arange(24, dtype=mx.int32).reshape(1, 4, 6)
    states[2] = mx.array(np.random.default_rng(5).standard_normal((1, 7)))
    rotating = fill(RotatingKVCache(12, 4), make_rows(6, mx.bfloat16, 64, 30))
    for token in range(10):  # it wraps in place, so it has a mark
        rotating = fill(rotating, make_rows(token, mx.bfloat16, 64, 1))
    cache = [
        *plain[:2],
        plain[2].to_quantized(32, 4),
        rotating,
        fill(RotatingKVCache(64), make_rows(7, mx.float32, 64, 40)),
        fill(ChunkedKVCache(8), make_rows(8, mx.float16, 64, 40)),
        CacheList(plain[2], states),
        *quantize_prompt_cache([plain[0], plain[1]], "turbo5v3"),
        KVCache(),
    ]
    path = save(tmp_path / "store", codec, cache, 40)
    assert_same(path, is_lossy=codec.startswith("turbo"))


@pytest.mark.parametrize("codec", ["turbo4+zstd", "raw"])
def test_live_codes_are_restored(codec, tmp_path):
    """The reader decodes the blocks of a live cache that are in codes."""
    rows = fill(KVCache(), make_rows(1, mx.bfloat16, 64, 300))
    codes = quantize_prompt_cache([rows], "turbo5v3")
    path = make_store(tmp_path / "store", 256)
    with Store(path, codec) as store:
        store.save(list(range(300)), codes, MODEL)
    assert_same(path, is_lossy=True)


def test_a_conversation_of_several_saves_is_restored(tmp_path):
    """The reader follows a chain through several shards and several entries."""
    rows = make_rows(9, mx.bfloat16, 64, 75)
    path = make_store(tmp_path / "store")
    with Store(path, "turbo4+zstd") as store:
        for name, length in (("a", 20), ("b", 40), ("c", 75), (None, 75)):
            cache = [fill(KVCache(), rows[..., :length, :])]
            store.save([*range(length)], cache, MODEL, name=name)
    assert len(list(path.glob("shards/*/*.safetensors"))) > 1
    assert_same(path, is_lossy=True)


def tar_file(name: str, content: bytes) -> bytes:
    """Return one file of an archive, by the table of FORMAT.md 13."""
    front = name.encode().ljust(100, b"\0") + b"0000600\0" + b"0000000\0" * 2
    front += b"%011o\0" % len(content) + b"0" * 11 + b"\0"
    back = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64) + b"0000000\0" * 2
    back += bytes(155 + 12)
    checksum = b"%06o\0 " % (sum(front) + 8 * ord(" ") + sum(back))
    return front + checksum + back + content + bytes(-len(content) % 512)


def test_a_bundle_is_the_archive_that_format_md_describes(tmp_path):
    """Its files give every byte of it, and unpacked they are a store."""
    (bundle,) = GOLDEN.glob("*.kvbundle")
    with tarfile.open(bundle) as archive:
        found = [(member.name, archive.extractfile(member)) for member in archive]
        files = {name: file.read() for name, file in found if file}
        archive.extractall(tmp_path / "store", filter="data")
    members = [tar_file(name, content) for name, content in files.items()]
    assert bundle.read_bytes() == b"".join(members) + bytes(1024)
    config, entry, *shards = files
    assert entry == f"entries/{json.loads(files[config])['id']}.json"
    names = []
    for data in (files[name] for name in shards):
        size = 8 + int.from_bytes(data[:8], "little")
        names.append(sha256(data[:size]).hexdigest())
    assert shards == [f"shards/{n[:2]}/{n}.safetensors" for n in names]
    for name in (config, entry):
        body = json.loads(files[name])
        assert files[name].decode() == reader.canonical(body)
    digest = body.pop("digest")
    assert digest == blake3(reader.canonical(body).encode()).hexdigest()
    tokens, layers = reader.restore(tmp_path / "store", body)
    assert len(tokens) == body["num_tokens"]
    assert layers


def test_the_command_lists_entries_and_what_one_holds(tmp_path):
    """Given an entry's name, the command prints the shapes of its arrays as well."""
    path = make_golden(tmp_path / "store")
    outputs = [
        subprocess.run(
            [sys.executable, str(TOOL), str(path), *more],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for more in ([], ["golden"])
    ]
    (entry,) = reader.read_entries(path)
    tokens, layers = reader.restore(path, entry)
    line = f"{entry['id']} golden {len(tokens)} {entry['codec']}"
    shapes = [{name: rows.shape for name, rows in layer.items()} for layer in layers]
    held = [f"{number} {layer}" for number, layer in enumerate(shapes)]
    assert outputs == [[line], [line, *held]]


@pytest.mark.parametrize("part", ["entries", "shards"])
def test_a_flipped_bit_is_refused(part, tmp_path):
    """The reader refuses every file of a store in which one bit is not as it was."""
    path = make_golden(tmp_path / "store")
    (file,) = (f for f in path.glob(f"{part}/**/*") if f.is_file())
    data = file.read_bytes()
    step = max(1, len(data) // 97)
    file.chmod(0o600)
    for place in range(0, len(data), step):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((ValueError, KeyError, TypeError)):
            reader.restore(path, next(reader.read_entries(path)))


def test_levels_are_those_that_format_md_lists():
    """The levels that the reader solves for are those of the appendix."""
    text = (ROOT / "docs/FORMAT.md").read_text(encoding="utf-8")
    appendix = text.split("## Appendix A", 1)[1]
    listed: dict[int, list[float]] = {}
    for bits, numbers in re.findall(r"^(\d) bits?:\n((?:  .*\n)+)", appendix, re.M):
        listed[int(bits)] = [float(number) for number in numbers.split()]
    assert list(listed) == list(range(1, 9))
    for width, positive in listed.items():
        solved = reader.levels(width)
        assert len(positive) == 2 ** (width - 1)
        assert np.abs(solved[len(positive) :] - positive).max() < 1e-9


def test_the_reader_is_short_and_stands_alone():
    """The reader has at most 200 lines and imports nothing of this project."""
    text = TOOL.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    others = {name for name in imported if name not in sys.stdlib_module_names}
    assert others <= {"numpy", "zstandard", "blake3"}
