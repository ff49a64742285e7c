"""Files that mlx-lm has written, of whichever release, are taken over or refused."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    save_prompt_cache,
)

import kvstore
from kvstore.caches.kinds.saved import FROM_0_28_1, IN_0_31, IN_0_32, TO_0_28_0
from kvstore.caches.live import read_provenance
from kvstore.caches.mlx_files import open_cache_file
from kvstore.caches.provenance import Provenance
from kvstore.errors import FingerprintError, FormatError, KVStoreError
from kvstore.models.load import read_cache_file
from kvstore.models.templates import Template

LAYOUTS = (TO_0_28_0, FROM_0_28_1, IN_0_31, IN_0_32)
METADATA = {"model": "a/model", "tokenizer_config": '{"trust_remote_code": null}'}
INSTALLED = IN_0_31 if mlx_lm.__version__.startswith("0.31.") else IN_0_32


def fed(cache, *steps):
    """Return a cache that was given so many rows at a time."""
    for seed, num_rows in enumerate(steps):
        shape = (2, 1, 2, num_rows, 64)
        rows = mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)
        cache.update_and_fetch(rows[0], rows[1])
    return cache


def recurrent():
    """Return a cache of two states."""
    cache = ArraysCache(2)
    cache[0] = mx.random.normal((1, 3, 8), key=mx.random.key(7))
    cache[1] = mx.random.normal((1, 2, 4, 5), key=mx.random.key(8)).astype(mx.float16)
    return cache


def chunked():
    """Return a cache that has let go of its first rows."""
    # Up to 0.31, mlx-lm lets go of too many where its buffer is not full.
    cache = fed(ChunkedKVCache(256), 256, 256)
    cache.maybe_trim_front()
    return fed(cache, 1, 1)


def trimmed():
    """Return a cache whose buffer holds rows behind its offset."""
    cache = fed(KVCache(), 40)
    cache.trim(9)
    return cache


# Kind: the caches of a prompt, and the empty ones of its model.
KINDS = {
    "KVCache": (lambda: [fed(KVCache(), 40), fed(KVCache(), 39, 1)], [KVCache] * 2),
    "trimmed": (lambda: [trimmed()], [KVCache]),
    "QuantizedKVCache": (
        lambda: [fed(QuantizedKVCache(32, 4), 40), fed(QuantizedKVCache(64, 8), 40)],
        [KVCache] * 2,
    ),
    "early and late": (
        lambda: [fed(KVCache(), 300), fed(QuantizedKVCache(), 300)],
        [KVCache] * 2,
    ),
    "RotatingKVCache": (
        lambda: [fed(RotatingKVCache(32, 4), *steps) for steps in ([9], [8, 1])],
        [KVCache] * 2,
    ),
    "wrapped": (
        lambda: [fed(RotatingKVCache(32, 4), 20, *[1] * 30)],
        [lambda: RotatingKVCache(32, 4)],
    ),
    "long prefill": (
        lambda: [fed(RotatingKVCache(32), 50, 1), fed(KVCache(), 51)],
        [lambda: RotatingKVCache(32), KVCache],
    ),
    "in one go": (
        lambda: [fed(RotatingKVCache(32), 50)],
        [lambda: RotatingKVCache(32)],
    ),
    "ArraysCache": (
        lambda: [recurrent(), fed(KVCache(), 40)],
        [lambda: ArraysCache(2), KVCache],
    ),
    "ChunkedKVCache": (
        lambda: [chunked(), fed(KVCache(), 514)],
        [lambda: ChunkedKVCache(256), KVCache],
    ),
    "CacheList": (
        lambda: [CacheList(recurrent(), fed(KVCache(), 40))],
        [lambda: CacheList(ArraysCache(2), KVCache())],
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(kind):
    """Return the caches of one kind, and their model's empty ones."""
    filled, empty = KINDS[kind]
    return filled(), [maker() for maker in empty]


def older_state(cache, layout):
    """Return the property `state` of a cache up to mlx-lm 0.31."""
    if isinstance(cache, CacheList):
        states = [older_state(c, layout) for c in cache.caches]
        return states if layout == IN_0_31 else [s for state in states for s in state]
    if isinstance(cache, ArraysCache):
        return cache.cache
    return tree_map(lambda x: x[..., : cache.offset, :], (cache.keys, cache.values))


def older_info(cache, layout):
    """Return the property `meta_state` of a cache up to mlx-lm 0.31."""
    step = ("256",) if layout == TO_0_28_0 else ()
    match cache:
        case QuantizedKVCache():
            numbers = (cache.offset, cache.group_size, cache.bits)
            return (*step, *map(str, numbers))
        case RotatingKVCache():
            numbers = (str(cache.keep), str(cache.max_size))
            return (*numbers, *step, str(cache.offset), str(cache._idx))
        case ChunkedKVCache():
            return (str(cache.chunk_size), str(cache.start_position))
        case CacheList() if layout == IN_0_31:
            return (
                [type(c).__name__ for c in cache.caches],
                [older_info(c, layout) for c in cache.caches],
            )
    return ""


def newer_state(cache):
    """Return the property `state` of a cache of mlx-lm 0.32."""
    match cache:
        case CacheList():
            return [(newer_state(c), type(c).__name__) for c in cache.caches]
        case ArraysCache():
            return cache.cache, None, None
    names = {
        QuantizedKVCache: ("offset", "group_size", "bits"),
        RotatingKVCache: ("offset", "keep", "max_size", "_idx"),
        ChunkedKVCache: ("offset", "chunk_size", "start_position"),
    }.get(type(cache), ("offset",))
    return cache.keys, cache.values, *(getattr(cache, name) for name in names)


def write_newer(path, prompt_cache, metadata):
    """Write a file as `save_prompt_cache` of mlx-lm 0.32 does."""
    scalars, arrays = [""], {}
    for name, value in tree_flatten([newer_state(c) for c in prompt_cache]):
        if isinstance(value, mx.array):
            arrays[name] = value
            continue
        kind = {int: "scalar", str: "string"}.get(type(value), "none")
        scalars.append((name, kind))
        as_list = [ord(c) for c in value] if kind == "string" else value
        arrays[name] = mx.array([] if kind == "none" else as_list)
    names = [type(c).__name__ for c in prompt_cache]
    texts = dict(tree_flatten([metadata, names, scalars]))
    mx.save_safetensors(str(path), arrays, texts)


def write(path, prompt_cache, layout, metadata=METADATA):
    """Write a file as `save_prompt_cache` of some release does."""
    if layout == IN_0_32:
        write_newer(path, prompt_cache, metadata)
        return path
    arrays = dict(tree_flatten([older_state(c, layout) for c in prompt_cache]))
    infos = [older_info(c, layout) for c in prompt_cache]
    names = [type(c).__name__ for c in prompt_cache]
    if layout == TO_0_28_0:
        names = [n.replace("ArraysCache", "MambaCache") for n in names]
    texts = dict(tree_flatten([infos, metadata, names]))
    mx.save_safetensors(str(path), arrays, texts)
    return path


def contents(path):
    """Return metadata, and dtype, shape and bytes of every array of a file."""
    header, data = parts(path)
    metadata = header.pop("__metadata__")
    arrays = {
        name: (spec["dtype"], spec["shape"], data[slice(*spec["data_offsets"])])
        for name, spec in header.items()
    }
    return metadata, arrays


def parts(path):
    """Return a safetensors file's header and data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path, header, data):
    """Write a file of this header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def bits(value):
    """Return arrays as bytes with their shape and dtype, nested as they are."""
    if isinstance(value, mx.array):
        plain = mx.contiguous(value).view(mx.uint8)
        return value.shape, str(value.dtype), bytes(memoryview(plain))
    return [bits(item) for item in value] if value is not None else None


def held(cache):
    """Return all that a cache is, without rows that it does not hold."""
    match cache:
        case CacheList():
            return [held(c) for c in cache.caches]
        case ArraysCache():
            return bits(cache.cache)
    first = getattr(cache, "start_position", 0)
    sides = tree_map(
        lambda x: x[..., : cache.offset - first, :], [cache.keys, cache.values]
    )
    names = ("offset", "keep", "max_size", "_idx", "bits", "group_size", "chunk_size")
    numbers = [getattr(cache, name, None) for name in names]
    return [type(cache).__name__, bits(sides), numbers, first]


def gone_on(prompt_cache):
    """Return all that caches are, after another row where they take any."""
    for cache in prompt_cache:
        if isinstance(cache, ChunkedKVCache):
            there = cache.offset - cache.start_position
            cache.start_position = cache.offset - cache.chunk_size
            rows = slice(there - cache.chunk_size, there)
            cache.keys, cache.values = cache.keys[:, :, rows], cache.values[:, :, rows]
        if not isinstance(cache, ArraysCache | CacheList):
            fed(cache, 1)
    return [held(c) for c in prompt_cache]


@kinds
@layouts
def test_every_release_is_read_bit_for_bit(tmp_path, store_path, caches, kind, layout):
    """What a file holds is what the store gives back, as the installed classes."""
    prompt_cache, like = make(kind)
    file = open_cache_file(
        write(tmp_path / "x.safetensors", prompt_cache, layout), like
    )
    assert layout in file.layouts
    assert file.model == "a/model"
    read = file.read()
    assert [held(c) for c in read] == [held(c) for c in prompt_cache]
    tokens = list(range(file.num_tokens))
    with kvstore.Store(store_path, codec="planes+zstd") as store:
        store.save(tokens, read, caches.MODEL, name="x")
        restored, _ = store.load_entry("x", caches.MODEL)
    # The store gives a window no more rows than it needs to go on.
    assert gone_on(restored) == gone_on(prompt_cache)


@kinds
def test_the_tests_write_what_mlx_lm_writes(tmp_path, kind):
    """For the installed release, the files of these tests are the library's own."""
    prompt_cache, _ = make(kind)
    ours = write(tmp_path / "ours.safetensors", prompt_cache, INSTALLED)
    theirs = tmp_path / "theirs.safetensors"
    save_prompt_cache(str(theirs), prompt_cache, METADATA)
    assert contents(ours) == contents(theirs)


@pytest.mark.parametrize(
    ("kind", "layout", "expected"),
    [
        ("KVCache", TO_0_28_0, LAYOUTS[:3]),
        ("KVCache", IN_0_32, (IN_0_32,)),
        ("QuantizedKVCache", TO_0_28_0, (TO_0_28_0,)),
        ("RotatingKVCache", FROM_0_28_1, (FROM_0_28_1, IN_0_31)),
        ("CacheList", FROM_0_28_1, (TO_0_28_0, FROM_0_28_1)),
        ("CacheList", IN_0_31, (IN_0_31,)),
    ],
)
def test_a_release_is_told_where_it_can_be(tmp_path, kind, layout, expected):
    """Layouts that differ for the classes at hand are told apart."""
    prompt_cache, like = make(kind)
    path = write(tmp_path / "x.safetensors", prompt_cache, layout)
    assert open_cache_file(path, like).layouts == expected


def test_an_unused_layer_stays_empty(tmp_path):
    """A layer that never had a row has none behind the others."""
    path = write(tmp_path / "x.safetensors", [fed(KVCache(), 5), KVCache()], IN_0_32)
    read = open_cache_file(path, [KVCache(), KVCache()]).read()
    assert [cache.offset for cache in read] == [5, 0]


def edited(path, change):
    """Rewrite a file's header."""
    header, data = parts(path)
    change(header)
    return join(path, header, data)


def reshaped(name, *shape):
    """Return an edit that gives an array another shape of the same size."""
    return lambda header: header[name].update(shape=list(shape))


def described(**texts):
    """Return an edit of the metadata; None takes a key away."""

    def change(header):
        metadata = header["__metadata__"]
        metadata.update({k.replace("_", "."): v for k, v in texts.items()})
        for key in [key for key, text in metadata.items() if text is None]:
            del metadata[key]

    return change


HEADERS = {
    "overlap": lambda h: h["0.1"].update(data_offsets=h["0.0"]["data_offsets"]),
    "huge": lambda h: h["0.0"].update(shape=[1, 2, 2**30, 2**30]),
    "a batch": reshaped("0.0", 2, 1, 40, 64),
    "fewer dimensions": reshaped("0.0", 2, 40, 64),
    "other heads": reshaped("0.0", 1, 1, 80, 64),
    "no rows": reshaped("0.0", 1, 80, 64, 1),
    "integers": lambda h: h["0.0"].update(dtype="U16"),
    "an array renamed": lambda h: h.update({"0.7": h.pop("0.1")}),
    "an array too deep": lambda h: h.update({"0" + ".0" * 99: h.pop("0.1")}),
    "an array below an array": lambda h: h.update({"0.0.0": h.pop("0.1")}),
    "a class unknown": described(**{"2_0": "Popen"}),
    "a batch class": described(**{"2_0": "BatchKVCache"}),
    "no class": described(**{"2_0": None}),
    "a class too many": described(**{"2_2": "KVCache"}),
    "numbers too many": described(**{"0_0": None, "0_0_0": "1", "0_0_1": "2"}),
    "other metadata": described(x="y"),
    "no metadata": lambda h: h.pop("__metadata__"),
    "a class of its own": described(**{"2_0": "QuantizedKVCache"}),
}


def refused(path, like):
    """Return the one line that a file is refused with."""
    with pytest.raises(FormatError) as caught:
        open_cache_file(path, like).read()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.hint
    return message


@pytest.mark.parametrize("change", HEADERS)
def test_a_hostile_header_is_refused(tmp_path, change):
    """A header that no release wrote is one error, before MLX sees it."""
    prompt_cache, like = make("KVCache")
    path = write(tmp_path / "x.safetensors", prompt_cache, IN_0_31)
    refused(edited(path, HEADERS[change]), like)


NEWER = {
    "more tokens than rows": ("trimmed", {"0.2": 257}, "256 rows for 257 tokens"),
    "layers disagree": ("KVCache", {"0.2": 39}, "hold 39 and 40 tokens"),
    "a negative offset": ("trimmed", {"0.2": -1}, "`offset` is not a count"),
    "no tokens": ("trimmed", {"0.2": 0}, "does not say"),
    "bits that are none": ("QuantizedKVCache", {"0.4": 7}, "with 7 bits"),
    "groups that do not fit": ("QuantizedKVCache", {"0.3": 64}, "codes, scales"),
    "a window of nothing": ("RotatingKVCache", {"0.4": 0}, "a window of 0"),
    "an index beyond": ("wrapped", {"0.5": 99}, "index 99"),
    "an index in the kept rows": ("wrapped", {"0.5": 3}, "index 3"),
    "another window": ("wrapped", {"0.4": 16}, "max_size 16, the model 32"),
    "another number kept": ("wrapped", {"0.3": 5}, "keep 5, the model 4"),
    "rows of the future": ("ChunkedKVCache", {"0.4": 999}, "rows of 514 tokens"),
    "rows that are gone": ("ChunkedKVCache", {"0.4": 513}, "rows of 514 tokens"),
}


@pytest.mark.parametrize("case", NEWER)
def test_hostile_numbers_are_refused(tmp_path, case):
    """Numbers that no run leaves in a cache are one error, naming them."""
    kind, numbers, message = NEWER[case]
    prompt_cache, like = make(kind)
    path = write(tmp_path / "x.safetensors", prompt_cache, IN_0_32)
    header, data = parts(path)
    data = bytearray(data)
    for name, number in numbers.items():
        begin, end = header[name]["data_offsets"]
        data[begin:end] = struct.pack("<i", number)
    assert message in refused(join(path, header, bytes(data)), like)


@pytest.mark.parametrize("num_layers", [1, 3])
@layouts
def test_another_number_of_layers_is_refused(tmp_path, layout, num_layers):
    """A file of fewer or more layers than the model has is never half a cache."""
    prompt_cache = [fed(KVCache(), 40) for _ in range(num_layers)]
    path = write(tmp_path / "x.safetensors", prompt_cache, layout)
    message = refused(path, [KVCache(), KVCache()])
    assert f"{num_layers} layers, and the model has 2" in message


def test_another_class_is_refused(tmp_path):
    """A layer that the model cannot have made is named with both classes."""
    path = write(tmp_path / "x.safetensors", [fed(KVCache(), 40)], IN_0_32)
    message = refused(path, [RotatingKVCache(32)])
    assert "layer 0 is a KVCache, the model's a RotatingKVCache" in message


def test_mixed_layouts_are_refused(tmp_path):
    """Layers as different releases write them come from none."""
    prompt_cache, like = make("RotatingKVCache")
    path = write(tmp_path / "x.safetensors", prompt_cache, IN_0_31)
    message = refused(edited(path, described(**{"0_1_4": "9"})), like)
    assert "different releases" in message


def test_a_file_that_does_not_tell_its_tokens_is_refused(tmp_path):
    """Recurrent states alone would fit any prompt."""
    path = write(tmp_path / "x.safetensors", [recurrent()], IN_0_32)
    assert "does not say how many" in refused(path, [ArraysCache(2)])


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, b"\0" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    """Any bytes are one error."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, [KVCache()])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused(tmp_path):
    """What is no file is not waited for."""
    os.mkfifo(tmp_path / "x.safetensors")
    assert "not a file" in refused(tmp_path / "x.safetensors", [KVCache()])


def test_a_shortened_file_is_refused(tmp_path):
    """A file that lost its end, before or while it is read, is one error."""
    prompt_cache, like = make("KVCache")
    path = write(tmp_path / "x.safetensors", prompt_cache, IN_0_32)
    file = open_cache_file(path, like)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError):
        file.read()
    refused(path, like)


PROMPT = "a document that is cached"


@pytest.fixture
def cached(tiny_model, tmp_path):
    """A file that `mlx_lm.cache_prompt` wrote of the tiny model."""
    path = tmp_path / "cached.safetensors"
    command = ["-m", "mlx_lm", "cache_prompt", "--model", str(tiny_model)]
    options = ["--prompt", PROMPT, "--prompt-cache-file", str(path)]
    subprocess.run(
        [sys.executable, *command, *options],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return path


def test_what_cache_prompt_wrote_is_found_again(cached, loaded, tiny_model, run_cli):
    """An imported prompt is one that `save` would find already there."""
    _, tokenizer, _ = loaded
    options = ("--model", tiny_model, "--prompt", PROMPT)
    code, out, _ = run_cli("import", cached, *options, "--name", "x", "--json")
    tokens = Template(tokenizer).encode_prompt(PROMPT, is_open=True)
    assert code == 0
    found = json.loads(out)
    assert found["entry"]["num_tokens"] == len(tokens)
    assert INSTALLED in found["layouts"]
    code, out, _ = run_cli("save", *options, "--json")
    # The last token is fed again, as always.
    assert json.loads(out)["num_restored_tokens"] == len(tokens) - 1


def test_lossy_rows_are_no_exact_ones_when_they_come_back(
    tiny_model, tmp_path, run_cli
):
    """What `load -o` wrote of lossy blocks is lossy in the store that imports it."""
    path, prompt = tmp_path / "doc.safetensors", "a document " * 30
    of_model = ("--model", tiny_model, "--prompt", prompt)
    assert run_cli("save", *of_model, "--name", "doc", "--codec", "turbo3")[0] == 0
    assert run_cli("load", "doc", "-o", path)[0] == 0
    other = {"store": tmp_path / "other"}
    words = ("import", path, *of_model, "--name", "x", "--codec", "turbo4")
    assert run_cli(*words, **other)[0] == 0
    blocks = json.loads(run_cli("inspect", "x", "--json", **other)[1])["blocks"]
    assert len(blocks) == 2
    # Not coded a second time, and not called exact.
    assert [b["is_lossless"] for b in blocks] == [True, True]
    assert [b["is_exact"] for b in blocks] == [False, False]


@layouts
@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "1", '{"bits":256,"coded_tokens":0,"num_moved":0}',
             '{"bits":3,"coded_tokens":-1,"num_moved":0}',
             '{"bits":3,"coded_tokens":1,"num_moved":-1}'],
)  # fmt: skip
def test_a_provenance_that_is_none_is_refused(tmp_path, layout, text):
    """A file that says of its rows what nobody can read is not taken for exact."""
    prompt_cache, like = make("KVCache")
    metadata = METADATA | {"kvstore_provenance": text}
    refused(write(tmp_path / "x.safetensors", prompt_cache, layout, metadata), like)


@layouts
def test_the_provenance_in_a_file_is_kept(tmp_path, layout):
    """It is read from the metadata of whichever release goes on with the file."""
    prompt_cache, like = make("KVCache")
    text = '{"bits":3,"coded_tokens":20,"num_moved":7}'
    metadata = METADATA | {"kvstore_provenance": text}
    path = write(tmp_path / "x.safetensors", prompt_cache, layout, metadata)
    restored = open_cache_file(path, like).read()
    assert read_provenance(restored) == Provenance(20, 3, num_moved=7)


def test_a_file_that_is_refused_leaves_no_trace(tiny_model, tmp_path, run_cli, cached):
    """A wrong prompt, a wrong file and a wrong model are one line and no store."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"1234567890")
    good = ("import", cached, "--model", tiny_model, "--prompt")
    for words, message in (
        ((*good, "short"), "tokens, and the prompt has"),
        (
            ("import", bad, "--model", tiny_model, "--prompt", PROMPT),
            "not a cache file",
        ),
    ):
        code, out, err = run_cli(*words)
        assert (code, out) == (1, "")
        assert message in err
        assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
        assert not (tmp_path / "store").exists()


def test_another_models_file_is_refused(cached, loaded, tmp_path):
    """The name in the file must be the model's, or lead to the same folder."""
    model, tokenizer, fingerprint = loaded
    tokens = Template(tokenizer).encode_prompt(PROMPT, is_open=True)
    folder = Path(fingerprint.label)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for label in (fingerprint.label, str(link), os.path.relpath(folder)):
        prompt_cache, _ = read_cache_file(cached, tokens, model, label)
        assert prompt_cache[0].offset == len(tokens)
    with pytest.raises(FingerprintError, match="made by another model"):
        read_cache_file(cached, tokens, model, str(tmp_path))
    with pytest.raises(KVStoreError, match=f"holds {len(tokens)} tokens, .* has 3"):
        read_cache_file(cached, tokens[:3], model, fingerprint.label)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("0.28.0", (TO_0_28_0,)),
        ("0.30.7", (FROM_0_28_1, IN_0_31)),
        ("0.31.3", (FROM_0_28_1, IN_0_31)),
    ],
)
def test_files_of_old_releases_are_read_for_ever(release, expected):
    """What those releases themselves wrote: 12 rows at once, then 8 one by one."""
    path = Path(__file__).parent / "golden" / f"mlx-lm-{release}.safetensors"
    file = open_cache_file(path, [KVCache(), KVCache(), KVCache()])
    assert (file.layouts, file.num_tokens) == (expected, 20)
    plain, rotating, quantized = file.read()
    rows = mx.arange(640).reshape(1, 1, 20, 32).astype(mx.float16)
    last = mx.concatenate([rows[:, :, :4], rows[:, :, 8:]], axis=2)
    for side, sign in (("keys", 1), ("values", -1)):
        assert bits(getattr(plain, side)) == bits(sign * rows)
        in_order = rotating._temporal_order(getattr(rotating, side))
        assert bits(in_order) == bits(sign * last)
        coded = mx.dequantize(*getattr(quantized, side), group_size=32, bits=8)
        assert mx.abs(coded - sign * rows).max().item() < 1
    assert (rotating._idx, rotating.keep, rotating.max_size) == (8, 4, 16)
