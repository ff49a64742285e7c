"""What the store promises, shown on SmolLM2-135M and on caches of a realistic shape.

This file is also the program that its tests start: a prompt cache is saved by one
process and restored by another, and OpenBLAS goes in before MLX.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from kvstore.blas import load_openblas

ROOT = Path(__file__).parent.parent.parent
BLOCK = 256

EXACT_CODECS = ("raw", "planes+zstd")
# Tokens in a block; bfloat16 is slow on the CPU, so it gets small ones.
BLOCKS = {"float32": BLOCK, "bfloat16": 16}
# Before, at and behind the end of a block, and behind that of another.
LENGTHS = {"float32": (255, 256, 257, 600), "bfloat16": (15, 16, 17, 40)}
NUM_FOLLOWING, NUM_ANSWER = 9, 8

LAYERS, HEADS, DIM = 4, 2, 64
ROW_BYTES = LAYERS * HEADS * DIM * 2 * 2
CHAT, TURN, NUM_TURNS = 2048, 200, 5
HEADER_BYTES = 10_000


def start(verb, *arguments):
    """Run a function of this file in a process of its own and return its JSON."""
    finished = subprocess.run(
        [sys.executable, __file__, verb, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def model_dir():
    """The model's folder, made where it is missing."""
    folder = Path(os.environ.get("KVSTORE_DEMO_MODEL") or ROOT / ".cache/smollm2")
    command = [sys.executable, str(ROOT / "tools/demo_model.py"), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.fail(f"cannot make the demo model in {folder}:\n{made.stderr}")
    return folder


# Lossless: the same bits go on as if nothing had happened.


@pytest.fixture(scope="module")
def continuations(model_dir, tmp_path_factory):
    """What one process computed without a stop, and another after restoring."""
    folder = tmp_path_factory.mktemp("lossless")
    return start("save", model_dir, folder), start("resume", model_dir, folder)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("codec", EXACT_CODECS)
@pytest.mark.parametrize(
    ("dtype", "length"),
    [(dtype, length) for dtype in LENGTHS for length in LENGTHS[dtype]],
)
def test_restored_rows_go_on_with_the_same_bits(continuations, dtype, length, codec):
    """Logits and greedy text behind a lossless restore are those of no stop at all."""
    before, after = continuations
    assert after[f"{dtype} {length} {codec}"] == before[f"{dtype} {length}"]


def save(model_dir, folder):
    """Prefill, save, and go on; return digests of what came out."""
    found = {}
    for dtype, model, fingerprint, prompts in each_dtype(model_dir):
        stores = open_stores(folder, dtype)
        for tokens, following in prompts:
            prompt_cache = prefill(model, tokens)
            for store in stores.values():
                store.save(tokens, prompt_cache, fingerprint)
            went_on = go_on(model, prompt_cache, following)
            found[f"{dtype} {len(tokens)}"] = went_on
    return found


def resume(model_dir, folder):
    """Restore what `save` saved, and go on; return digests of what came out."""
    found = {}
    for dtype, model, fingerprint, prompts in each_dtype(model_dir):
        for codec, store in open_stores(folder, dtype).items():
            for tokens, following in prompts:
                prompt_cache, rest = store.load(tokens + following, fingerprint)
                assert rest == following, (dtype, len(tokens), codec, len(rest))
                went_on = go_on(model, prompt_cache, rest)
                found[f"{dtype} {len(tokens)} {codec}"] = went_on
    return found


def open_stores(folder, dtype):
    """Return a store for each codec."""
    import kvstore
    from kvstore.storage.folder import create_folder

    stores = {}
    for codec in EXACT_CODECS:
        path = Path(folder) / f"{dtype}-{codec}"
        create_folder(path, BLOCKS[dtype])
        stores[codec] = kvstore.Store(path, codec)
    return stores


def each_dtype(model_dir):
    """Yield the model in each dtype, with the prompts to feed it."""
    from pydoc_data.topics import topics

    import mlx.core as mx
    import mlx_lm

    import kvstore

    model, tokenizer = mlx_lm.load(model_dir)[:2]
    text = tokenizer.encode(topics["types"][:20_000])
    for dtype, lengths in LENGTHS.items():
        model.set_dtype(getattr(mx, dtype))
        # No prompt starts as another does: each block is stored by one run only.
        starts = [50 * i for i in range(len(lengths))]
        prompts = [
            (text[at : at + n], text[at + n : at + n + NUM_FOLLOWING])
            for at, n in zip(starts, lengths, strict=True)
        ]
        yield dtype, model, kvstore.Fingerprint.of(model), prompts


def prefill(model, tokens):
    """Return the prompt cache of some tokens, fed all at once."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    prompt_cache = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=prompt_cache))
    return prompt_cache


def go_on(model, prompt_cache, following):
    """Feed what follows, answer greedily; return the answer, and a digest of logits."""
    import mlx.core as mx

    digest, fed, answer = hashlib.sha256(), following, []
    for _ in range(NUM_ANSWER):
        logits = model(mx.array([fed]), cache=prompt_cache)
        digest.update(octets(logits))
        fed = [int(mx.argmax(logits[0, -1]).item())]
        answer += fed
    return [answer, digest.hexdigest()]


def octets(array):
    """Return the bytes of an array of any dtype."""
    import mlx.core as mx

    return bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))


# Growing: what is stored is never encoded again.


@pytest.fixture(
    scope="module",
    params=["turbo4+zstd", pytest.param("raw", marks=pytest.mark.slow)],
)
def growth(request, tmp_path_factory):
    """A chat of 2,048 tokens grown by 200 five times, each time in a new process."""
    folder = tmp_path_factory.mktemp("growth")
    turns = [
        start("grow", folder / "store", request.param, turn)
        for turn in range(NUM_TURNS + 1)
    ]
    last = start("restore", folder / "store", request.param)
    at_once = start("save_at_once", folder / "other", request.param)
    return turns, last, at_once


def test_a_turn_writes_its_tokens_and_one_block_at_most(growth):
    """The new shards hold the 200 new tokens, and the tail that they completed."""
    turns, _, _ = growth
    for turn in turns[1:]:
        assert TURN <= turn["new_tokens"] <= TURN + BLOCK
        assert turn["new_bytes"] <= (TURN + BLOCK) * ROW_BYTES + HEADER_BYTES


def test_a_full_block_is_restored_the_same_for_ever(growth):
    """Each process restores every full block with the bits that the last one had."""
    turns, last, _ = growth
    blocks = [turn["blocks"] for turn in turns[1:]] + [last["blocks"]]
    assert [len(restored) for restored in blocks] == [
        (CHAT + TURN * turn) // BLOCK for turn in range(NUM_TURNS + 1)
    ]
    for earlier, later in pairwise(blocks):
        assert later[: len(earlier)] == earlier


def test_a_tail_is_restored_as_it_was_computed(growth):
    """Until its block is full, a row comes back with its own bits under any codec."""
    turns, last, _ = growth
    assert all(turn["is_tail_exact"] for turn in [*turns[1:], last])


def test_a_grown_chat_is_stored_as_one_saved_at_once(growth):
    """Every row was encoded once, from what was computed: growing leaves no trace."""
    _, last, at_once = growth
    assert last["blocks"] == at_once["blocks"]
    assert last["tail"] == at_once["tail"]


def grow(path, codec, turn):
    """Restore the chat, add a turn, save; say what was restored and written."""
    import kvstore

    number = int(turn)
    with kvstore.Store(path, codec) as store:
        restored = describe(store) if number else {}
        prompt_cache = store.load_entry("chat", None)[0] if number else None
        held, shards = hashes(store) if number else set(), sizes(store)
        tokens = list(range(CHAT + TURN * number))
        prompt_cache = add_rows(prompt_cache, [number])
        store.save(tokens, prompt_cache, fingerprint(), name="chat")
        new = [row for _, row in store.chain("chat") if row.block.hash not in held]
        written = {k: size for k, size in sizes(store).items() if k not in shards}
    return restored | {
        "new_tokens": sum(len(row.block.tokens) for row in new),
        "new_bytes": sum(written.values()),
    }


def restore(path, codec):
    """Say what is restored."""
    import kvstore

    with kvstore.Store(path, codec, create=False) as store:
        return describe(store)


def save_at_once(path, codec):
    """Save all turns in one go; say what is restored."""
    import kvstore

    with kvstore.Store(path, codec) as store:
        prompt_cache = add_rows(None, range(NUM_TURNS + 1))
        tokens = list(range(prompt_cache[0].offset))
        store.save(tokens, prompt_cache, fingerprint(), name="chat")
        return describe(store)


def describe(store):
    """Return digests of the blocks that the chat is restored as, and of its tail."""
    restored, tokens = store.load_entry("chat", None)
    size = len(tokens)
    full = size - size % BLOCK
    original = add_rows(None, range((size - CHAT) // TURN + 1))
    return {
        "blocks": [digest(restored, at, at + BLOCK) for at in range(0, full, BLOCK)],
        "tail": digest(restored, full, size),
        "is_tail_exact": digest(restored, full, size) == digest(original, full, size),
    }


def add_rows(prompt_cache, turns):
    """Add the rows of some turns, always the same for the same turn."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    prompt_cache = prompt_cache or [KVCache() for _ in range(LAYERS)]
    for turn in turns:
        shape = (LAYERS, 2, 1, HEADS, TURN if turn else CHAT, DIM)
        rows = mx.random.normal(shape, key=mx.random.key(turn)).astype(mx.bfloat16)
        for cache, (keys, values) in zip(prompt_cache, rows, strict=True):
            cache.update_and_fetch(keys, values)
    return prompt_cache


def digest(prompt_cache, begin, end):
    """Return a digest of the bits of some rows."""
    found = hashlib.sha256()
    for cache in prompt_cache:
        for rows in (cache.keys, cache.values):
            found.update(octets(rows[..., begin:end, :]))
    return found.hexdigest()


def fingerprint():
    """Return what stands for a model here."""
    import kvstore

    return kvstore.Fingerprint({"weights": "random"}, "random")


def hashes(store):
    """Return the hashes of the chat's blocks."""
    return {row.block.hash for _, row in store.chain("chat")}


def sizes(store):
    """Return the size of each shard by name."""
    return {path.name: path.stat().st_size for path in store.path.glob("shards/*/*")}


# Fidelity: how far a lossy prefix moves the next tokens.


@pytest.mark.model
@pytest.mark.slow
def test_a_lossy_prefix_moves_the_next_tokens_little(model_dir):
    """On one context, turbo4 and turbo3 stay close, far closer than mlx's affine."""
    rows = start("measure", model_dir, 1, 512, 128, "turbo4+zstd,turbo3+zstd", "4")
    turbo4, turbo3, affine4 = rows
    assert turbo4["mean_kl"] <= 0.01
    assert turbo3["mean_kl"] <= 0.05
    assert affine4["bits_per_element"] >= turbo4["bits_per_element"]
    assert turbo4["mean_kl"] * 3 <= affine4["mean_kl"]


@pytest.mark.model
@pytest.mark.slow
def test_fidelity_over_eight_contexts(model_dir):
    """turbo4 and turbo3 keep to their bounds, at a third of affine's KL or less."""
    codecs = "turbo4+zstd,turbo3+zstd"
    rows = start("measure", model_dir, 8, 1024, 256, codecs, "3,4,5")
    turbo4, turbo3, *affine = rows
    assert turbo4["mean_kl"] <= 0.005
    assert turbo3["mean_kl"] <= 0.025
    for turbo in (turbo4, turbo3):
        # The smallest of mlx's that has no fewer bits.
        rival = next(
            row
            for row in affine
            if row["bits_per_element"] >= turbo["bits_per_element"]
        )
        assert turbo["mean_kl"] * 3 <= rival["mean_kl"]


def measure(model_dir, contexts, prefix, following, codecs, bits):
    """Return the lines of `tools/quality.py` for some codecs and affine widths."""
    from dataclasses import asdict

    quality = load_quality()
    import mlx_lm

    model, tokenizer = mlx_lm.load(model_dir)[:2]
    texts = [tokenizer.encode(text) for text in quality.texts_of("python", tokenizer)]
    length = int(prefix) + int(following)
    made = [
        quality.make_context(model, part[: int(prefix)], part[int(prefix) :])
        for part in quality.cut(texts, int(contexts), length)
    ]
    ways = {name: quality.restore_from_store(name) for name in codecs.split(",")}
    ways |= {f"affine{b}": quality.restore_from_affine(int(b)) for b in bits.split(",")}
    return list(map(asdict, quality.measure(model, made, "python", ways)))


def load_quality():
    """Return `tools/quality.py` as a module; it loads OpenBLAS itself."""
    path = ROOT / "tools/quality.py"
    spec = importlib.util.spec_from_file_location("kvstore_tools_quality", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


# The main job, as a whole.


def run_demo(model_dir, path, *options):
    """Run `kvstore demo` and return its table by way."""
    command = [sys.executable, "-m", "kvstore", "--store", path, "--json", "demo"]
    command += ["--model", model_dir, *options]
    finished = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, check=True, cwd=ROOT
    )
    return {row["way"]: row for row in json.loads(finished.stdout)["rows"]}


@pytest.mark.model
def test_the_demo_resumes_faster_than_it_prefills(model_dir, tmp_path):
    """Even a short document is resumed faster, and answered the same when exact."""
    options = ("--num-tokens", 300, "--codec", "planes+zstd", "--codec", "turbo4+zstd")
    rows = run_demo(model_dir, tmp_path / "store", *options)
    assert rows["planes+zstd"]["is_same"]
    assert rows["planes+zstd"]["speedup"] > 1
    assert rows["turbo4+zstd"]["nbytes"] * 3 < rows["mlx-lm's file"]["nbytes"]


@pytest.mark.model
@pytest.mark.slow
def test_resuming_is_many_times_faster(model_dir, tmp_path):
    """Behind 2,000 tokens, raw resumes 60 times faster and turbo4 40 times."""
    if not has_openblas():
        pytest.skip("without OpenBLAS, prefill of 2,000 tokens takes minutes")
    options = ("--num-tokens", 2000, "--codec", "raw", "--codec", "turbo4+zstd")
    # Whatever else runs here may slow down the split second that a resume takes.
    runs = (run_demo(model_dir, tmp_path / str(i), *options) for i in range(3))
    assert any(is_fast(rows) for rows in runs)


def is_fast(rows):
    """Say whether a demo kept what issue 2 promises; an answer is never excused."""
    assert rows["raw"]["is_same"]
    return rows["raw"]["speedup"] >= 60 and rows["turbo4+zstd"]["speedup"] >= 40


def has_openblas():
    """Say whether a new process finds OpenBLAS."""
    program = "from kvstore.blas import *; raise SystemExit(load_openblas() is None)"
    return not subprocess.run([sys.executable, "-c", program], check=False).returncode


VERBS = {
    function.__name__: function
    for function in (save, resume, grow, restore, save_at_once, measure)
}

if __name__ == "__main__":
    load_openblas()
    print(json.dumps(VERBS[sys.argv[1]](*sys.argv[2:])))
