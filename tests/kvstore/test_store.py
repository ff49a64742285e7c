"""What a store promises: right rows, shared blocks, names, exactness."""

import copy
import threading
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, trim_prompt_cache

import kvstore
from kvstore.format import shard
from kvstore.ops import save
from kvstore.storage.folder import create_folder

BLOCK = 16
MODEL = kvstore.Fingerprint({"weights": "a", "config": {"rope_theta": 1e4}}, "model-a")
OTHER = kvstore.Fingerprint({"weights": "a", "config": {"rope_theta": 5e4}}, "model-b")


@pytest.fixture
def path(tmp_path):
    """A store of small blocks."""
    create_folder(tmp_path / "store", BLOCK)
    return tmp_path / "store"


def random_rows(num_tokens, seed, *, layers=3, heads=2, dim=64, dtype=mx.bfloat16):
    """Return rows as a model would add them: per layer, keys and values."""
    mx.random.seed(seed)
    shape = (layers, 2, 1, heads, num_tokens, dim)
    return mx.random.normal(shape).astype(dtype)


def grow(prompt_cache, rows):
    """Append rows to a prompt cache, made now where it is None."""
    prompt_cache = prompt_cache or [KVCache() for _ in range(rows.shape[0])]
    for layer, cache in enumerate(prompt_cache):
        cache.update_and_fetch(rows[layer, 0], rows[layer, 1])
    return prompt_cache


def make_cache(num_tokens, seed=0, **options):
    """Return a prompt cache of random rows."""
    return grow(None, random_rows(num_tokens, seed, **options))


def rows_of(prompt_cache, start=0, stop=None):
    """Return the bits of some rows of every layer."""
    stop = prompt_cache[0].offset if stop is None else stop
    return [
        bytes(memoryview(mx.contiguous(side[..., start:stop, :]).view(mx.uint8)))
        for cache in prompt_cache
        for side in (cache.keys, cache.values)
    ]


def stored_bytes(store):
    """Return the size of every shard by name."""
    shards = store.path.glob("shards/*/*.safetensors")
    return {shard.name: shard.stat().st_size for shard in shards}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("codec", ["raw", "raw+zstd", "planes", "planes+zstd"])
def test_lossless_codecs_restore_every_bit(path, codec, dtype):
    """A lossless codec gives back the bits that were saved, full blocks and tail."""
    cache = make_cache(3 * BLOCK + 5, dtype=dtype)
    tokens = list(range(3 * BLOCK + 5))
    with kvstore.Store(path, codec=codec) as store:
        store.save(tokens, cache, MODEL, name="chat")
        restored, held = store.load_entry("chat", MODEL)
    assert held == tokens
    assert rows_of(restored) == rows_of(cache)
    assert [c.keys.dtype for c in restored] == [dtype] * 3


@pytest.mark.parametrize("num_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK])
def test_load_leaves_a_token_to_feed(path, num_tokens):
    """A prompt that is held whole is restored less its last token."""
    tokens = list(range(num_tokens))
    cache = make_cache(num_tokens)
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, cache, MODEL)
        restored, rest = store.load(tokens, MODEL)
    assert rest == tokens[-1:]
    if num_tokens > 1:
        assert rows_of(restored) == rows_of(cache, 0, num_tokens - 1)
    else:
        assert restored is None


def test_a_long_label_is_cut(path, caches):
    """However a model is called, the entry's file can be read again."""
    tokens, held = caches.make_conversation(1, 1)
    model = kvstore.Fingerprint(MODEL.fields, "x" * 100_000)
    with kvstore.Store(path) as store:
        store.save(tokens, held, model, name="doc")
        assert store.entry("doc").model == "x" * 1000


@pytest.mark.parametrize("ref", ["", "a", "abc", "\udcff", "no/such", "x" * 10_000])
def test_a_slip_of_the_hand_names_no_entry(path, caches, ref):
    """Fewer than four digits of an id are not taken for it, nor is what is no text."""
    with kvstore.Store(path) as store:
        for seed in range(1, 40):
            store.save(*caches.make_conversation(1, seed), MODEL)
        with pytest.raises(kvstore.EntryNotFoundError):
            store.remove(ref)
        entry = store.entries()[0]
        assert store.entry(entry.id[:8]) == entry


@pytest.mark.parametrize("codec", ["raw", "planes+zstd", "turbo4+zstd", "turbo5v3"])
def test_several_encoders_write_the_same_bytes(tmp_path, caches, monkeypatch, codec):
    """However many cores a machine has, shards have the same names."""
    tokens, held = caches.make_conversation(40, 1, extra=3)
    names = []
    for number in (1, 4):
        monkeypatch.setattr("kvstore.ops.save.NUM_THREADS", number)
        path = create_folder(tmp_path / str(number), caches.BLOCK).path
        with kvstore.Store(path, codec) as store:
            store.save(tokens, held, caches.MODEL)
        names.append(sorted(p.name for p in path.glob("shards/??/*")))
    assert len(names[0]) == 1
    assert names[0] == names[1]


def test_a_hit_ends_where_the_prompt_diverges(path):
    """A prompt that leaves a stored one inside a lossless block hits up to there."""
    tokens = list(range(3 * BLOCK))
    cache = make_cache(3 * BLOCK)
    prompt = tokens[: 2 * BLOCK + 7] + [-1] * 20
    with kvstore.Store(path, codec="planes+zstd") as store:
        store.save(tokens, cache, MODEL)
        restored, rest = store.load(prompt, MODEL)
        match = store.lookup(prompt, MODEL)
    assert rest == [-1] * 20
    assert rows_of(restored) == rows_of(cache, 0, 2 * BLOCK + 7)
    assert (match.num_tokens, match.reason) == (2 * BLOCK + 7, "divergence")
    assert f"stored {tokens[2 * BLOCK + 7]}, given -1" in match.detail


def test_a_lossy_block_is_never_cut(path):
    """A hit on lossy blocks ends at the end of a block, and lookup says why."""
    tokens = list(range(3 * BLOCK))
    prompt = tokens[: 2 * BLOCK + 7] + [-1] * 20
    with kvstore.Store(path, codec="turbo4") as store:
        store.save(tokens, make_cache(3 * BLOCK), MODEL)
        match = store.lookup(prompt, MODEL)
        whole = store.lookup(tokens, MODEL)
    assert (match.num_tokens, match.reason) == (2 * BLOCK, "inexact")
    assert (whole.num_tokens, whole.reason) == (2 * BLOCK, "inexact")


def test_a_tail_is_lossless_whatever_the_codec(path):
    """The short last block keeps its bits under a lossy codec."""
    cache = make_cache(BLOCK + 9)
    tokens = list(range(BLOCK + 9))
    with kvstore.Store(path, codec="turbo2+zstd") as store:
        store.save(tokens, cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    assert rows_of(restored, BLOCK) == rows_of(cache, BLOCK)
    assert rows_of(restored, 0, 4) == rows_of(cache, 0, 4)  # the sinks
    assert rows_of(restored, 4, BLOCK) != rows_of(cache, 4, BLOCK)


def test_a_shared_prefix_is_stored_once(path):
    """Two conversations over one prefix share its blocks and keep their own tokens."""
    prefix = random_rows(4 * BLOCK, 1)
    left = grow(grow(None, prefix), random_rows(BLOCK, 2))
    right = grow(grow(None, prefix), random_rows(BLOCK, 3))
    tokens = list(range(4 * BLOCK))
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens + [1] * BLOCK, left, MODEL, name="left")
        before = set(stored_bytes(store))
        store.save(tokens + [2] * BLOCK, right, MODEL, name="right")
        added = set(stored_bytes(store)) - before
        assert rows_of(store.load_entry("left", MODEL)[0]) == rows_of(left)
        assert rows_of(store.load_entry("right", MODEL)[0]) == rows_of(right)
        assert [len(store.chain(name)) for name in ("left", "right")] == [5, 5]
        assert sum(stored_bytes(store)[name] for name in added) < 2 * 5 * 1024 * BLOCK


@pytest.mark.parametrize("codec", ["planes+zstd", "turbo4+zstd"])
def test_growing_encodes_no_row_twice(path, codec):
    """A chat grown from its restored cache keeps every stored row bit for bit."""
    tokens = list(range(8 * BLOCK))
    cache = make_cache(8 * BLOCK)
    with kvstore.Store(path, codec=codec) as store:
        store.save(tokens, cache, MODEL, name="chat")
    for turn in range(5):
        with kvstore.Store(path, codec=codec) as store:
            cache, _ = store.load_entry("chat", MODEL)
            before = rows_of(cache)
            cache = grow(cache, random_rows(13, 100 + turn))
            tokens += [1000 + turn] * 13
            shards = stored_bytes(store)
            store.save(tokens, cache, MODEL, name="chat")
            after, _ = store.load_entry("chat", MODEL)
            assert rows_of(after, 0, len(tokens) - 13 - BLOCK) == rows_of(
                cache, 0, len(tokens) - 13 - BLOCK
            )
            assert before == rows_of(cache, 0, len(tokens) - 13)
            written = sum(
                size for name, size in stored_bytes(store).items() if name not in shards
            )
            # 3 layers, 2 sides, 2 heads, 64 numbers of 2 bytes, and a header.
            assert written <= (13 + BLOCK) * 3 * 2 * 2 * 64 * 2 + 6144


def test_what_follows_a_lossy_prefix_is_never_exact(path):
    """Rows computed after a lossy restore are stored, and not served as exact."""
    tokens = list(range(2 * BLOCK))
    with kvstore.Store(path, codec="turbo4") as store:
        store.save(tokens, make_cache(2 * BLOCK), MODEL)
    with kvstore.Store(path, codec="raw") as store:
        cache, rest = store.load([*tokens, 7], MODEL)
        assert rest == [7]
        cache = grow(copy.deepcopy(cache), random_rows(BLOCK, 9))
        tokens += [7] * BLOCK
        store.save(tokens, cache, MODEL, name="after")
        assert [row.is_exact for _, row in store.chain("after")] == [False] * 3
        assert store.load([*tokens, 8], MODEL, exact=True) == (None, [*tokens, 8])
        assert store.lookup([*tokens, 8], MODEL, exact=True).reason == "inexact"
        # The mark outlives a second restore, of lossless blocks too.
        again, _ = store.load_entry("after", MODEL)
        tokens += [9] * BLOCK
        store.save(tokens, grow(again, random_rows(BLOCK, 10)), MODEL, name="after")
        assert [row.is_exact for _, row in store.chain("after")] == [False] * 4


def test_an_exact_copy_replaces_a_lossy_one_and_not_the_reverse(path):
    """A block is stored a second time only to make a lossy one exact."""
    tokens = list(range(2 * BLOCK))
    cache = make_cache(2 * BLOCK)
    with kvstore.Store(path, codec="turbo4") as store:
        store.save(tokens, cache, MODEL, name="x")
        lossy = len(stored_bytes(store))
    with kvstore.Store(path, codec="planes") as store:
        store.save(tokens, cache, MODEL, name="x")
        assert len(stored_bytes(store)) == lossy + 1
        assert rows_of(store.load_entry("x", MODEL)[0]) == rows_of(cache)
    for codec in ("turbo4", "raw"):
        with kvstore.Store(path, codec=codec) as store:
            store.save(tokens, cache, MODEL, name="x")
            assert len(stored_bytes(store)) == lossy + 1
            assert rows_of(store.load_entry("x", MODEL)[0]) == rows_of(cache)


def test_coded_rows_are_not_coded_again_in_another_store(path, tmp_path):
    """Rows that were restored from codes are stored lossless elsewhere."""
    tokens = list(range(2 * BLOCK))
    with kvstore.Store(path, codec="turbo3") as store:
        store.save(tokens, make_cache(2 * BLOCK), MODEL, name="x")
        coded, _ = store.load_entry("x", MODEL)
    create_folder(tmp_path / "other", BLOCK)
    with kvstore.Store(tmp_path / "other", codec="turbo3") as other:
        other.save(tokens, coded, MODEL, name="x")
        again, _ = other.load_entry("x", MODEL)
        assert rows_of(again) == rows_of(coded)
        assert [row.is_exact for _, row in other.chain("x")] == [False, False]


def test_rows_past_the_offset_are_not_stored(path):
    """What a trimmed conversation left behind in the buffer is not written."""
    cache = make_cache(2 * BLOCK)
    trim_prompt_cache(cache, 5)
    tokens = list(range(2 * BLOCK - 5))
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    assert restored[0].offset == 2 * BLOCK - 5
    left = mx.abs(restored[0].keys[..., 2 * BLOCK - 5 :, :]).max().item()
    assert left == 0


def test_a_restored_cache_goes_on_like_the_one_that_was_saved(path):
    """A restored cache has mlx-lm's buffers, room to grow, and trims as it should."""
    cache = make_cache(2 * BLOCK)
    more = random_rows(300, 5)
    with kvstore.Store(path, codec="raw") as store:
        store.save(list(range(2 * BLOCK)), cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    assert restored[0].keys.shape[2] % KVCache.step == 0
    assert restored[0].keys.shape[2] > restored[0].offset
    grow(cache, more)
    grow(restored, more)
    assert rows_of(restored) == rows_of(cache)
    assert trim_prompt_cache(restored, 100) == 100
    assert restored[0].offset == 2 * BLOCK + 200


def test_keys_and_values_may_differ_in_dimension(path):
    """Layers whose values are narrower than their keys are restored."""
    cache = [KVCache() for _ in range(2)]
    for layer in cache:
        layer.update_and_fetch(
            mx.random.normal((1, 2, 20, 96)), mx.random.normal((1, 2, 20, 64))
        )
    with kvstore.Store(path, codec="planes+zstd") as store:
        store.save(list(range(20)), cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    assert rows_of(restored) == rows_of(cache)


def test_layers_of_different_shape_are_grouped_apart(path):
    """Layers that differ in heads or dtype are restored each as it was."""
    cache = [
        *make_cache(20, 1, layers=2, heads=2),
        *make_cache(20, 2, layers=1, heads=4, dtype=mx.float16),
        *make_cache(20, 3, layers=1, heads=2),
    ]
    with kvstore.Store(path, codec="turbo8+zstd") as store:
        store.save(list(range(20)), cache, MODEL, name="x")
        restored, _ = store.load_entry("x", MODEL)
    assert rows_of(restored, BLOCK) == rows_of(cache, BLOCK)
    assert [c.keys.shape[1] for c in restored] == [2, 2, 4, 2]
    assert [c.keys.dtype for c in restored][2] == mx.float16


def test_another_model_gets_nothing(path):
    """Blocks of one fingerprint are invisible to another, and a name says the field."""
    tokens = list(range(BLOCK))
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, make_cache(BLOCK), MODEL, name="x")
        assert store.load([*tokens, 1], OTHER) == (None, [*tokens, 1])
        assert store.lookup([*tokens, 1], OTHER).reason == "fingerprint"
        with pytest.raises(kvstore.FingerprintError, match=r"config\.rope_theta"):
            store.load_entry("x", OTHER)


def test_salts_share_nothing(path):
    """What was saved under one salt is no hit under another, nor under none."""
    tokens = list(range(BLOCK))
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, make_cache(BLOCK), MODEL.with_salt("a"))
        assert store.lookup([*tokens, 1], MODEL.with_salt("b")).num_tokens == 0
        assert store.lookup([*tokens, 1], MODEL).num_tokens == 0
        assert store.lookup([*tokens, 1], MODEL.with_salt("a")).num_tokens == BLOCK
    assert MODEL.with_salt("a").with_salt("") == MODEL


def test_several_layouts_live_under_one_fingerprint(path):
    """The longest hit of any layout is taken, or of the one asked for."""
    tokens = list(range(3 * BLOCK))
    half = make_cache(2 * BLOCK, 1, dtype=mx.float16)
    full = make_cache(BLOCK, 2, dtype=mx.float32)
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens[: 2 * BLOCK], half, MODEL)
        store.save(tokens[:BLOCK], full, MODEL)
        restored, rest = store.load(tokens, MODEL)
        assert restored[0].keys.dtype == mx.float16
        assert rest == tokens[2 * BLOCK :]
        empty = [KVCache() for _ in range(3)]
        assert store.load(tokens, MODEL, like=empty)[1] == rest
        assert store.load(tokens, MODEL, like=empty[:2])[0] is None


def test_a_name_moves_only_along_its_conversation(path):
    """A name follows a longer conversation and is not taken by another one."""
    rows = random_rows(2 * BLOCK, 1)
    tokens = list(range(2 * BLOCK))
    with kvstore.Store(path, codec="raw") as store:
        first = store.save(tokens[:20], grow(None, rows[..., :20, :]), MODEL, name="x")
        second = store.save(tokens, grow(None, rows), MODEL, name="x")
        assert (second.id, second.num_tokens) == (first.id, 2 * BLOCK)
        assert second.created_at == first.created_at
        with pytest.raises(kvstore.EntryExistsError, match="`x`"):
            store.save([9, 9], make_cache(2), MODEL, name="x")
        assert store.entry("x") == second
        third = store.save([9, 9], make_cache(2), MODEL, name="x", replace=True)
        assert [entry.num_tokens for entry in store.entries()] == [third.num_tokens]


def test_a_name_is_taken_from_the_entry_that_is_meant(path):
    """Where an entry is given, one that has moved on since is left alone."""
    rows = random_rows(2 * BLOCK, 1)
    tokens = list(range(2 * BLOCK))
    with kvstore.Store(path, codec="raw") as store:
        first = store.save(tokens[:20], grow(None, rows[..., :20, :]), MODEL, name="x")
        second = store.save(tokens, grow(None, rows), MODEL, name="x")
        with pytest.raises(kvstore.EntryExistsError):
            store.save([9, 9], make_cache(2), MODEL, name="x", replace=first)
        with pytest.raises(kvstore.EntryNotFoundError, match="another conversation"):
            store.rename(first, "y")
        with pytest.raises(kvstore.EntryNotFoundError, match="another conversation"):
            store.remove(first)
        assert store.entries() == [second]
        third = store.save([9, 9], make_cache(2), MODEL, name="x", replace=second)
        fourth = store.rename(third, "y")
        assert store.remove(fourth).num_tokens == 2
        assert store.entries() == []


def test_entries_are_found_by_name_and_by_the_start_of_their_id(path, monkeypatch):
    """An entry without a name has its id; a start that fits two is refused."""
    monkeypatch.setattr("kvstore.storage.entries.MIN_ID", 1)  # so that some do
    with kvstore.Store(path, codec="raw") as store:
        entry = store.save([1, 2, 3], make_cache(3), MODEL)
        assert store.entry(entry.id[:6]) == entry
        for seed in range(40):
            store.save([seed], make_cache(1, seed), MODEL)
        firsts = [entry.id[0] for entry in store.entries()]
        double = next(digit for digit in firsts if firsts.count(digit) > 1)
        with pytest.raises(kvstore.EntryNotFoundError, match="ids start so"):
            store.entry(double)
        with pytest.raises(kvstore.EntryNotFoundError, match="no entry `zz`"):
            store.entry("zz")


def test_removing_an_entry_leaves_the_others_whole(path):
    """Blocks that another entry needs stay when an entry goes."""
    tokens = list(range(2 * BLOCK))
    cache = make_cache(2 * BLOCK)
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, cache, MODEL, name="a")
        store.save(tokens, cache, MODEL, name="b")
        store.remove("a")
        assert [entry.name for entry in store.entries()] == ["b"]
        assert rows_of(store.load_entry("b", MODEL)[0]) == rows_of(cache)
        with pytest.raises(kvstore.EntryNotFoundError):
            store.remove("a")


@pytest.mark.parametrize(
    ("tokens", "rows", "message"),
    [
        ([1, 2, 3], 4, "holds 4 rows for 3 tokens"),
        ([1, 2, 3, 4, 5], 4, "holds 4 rows for 5 tokens"),
        ([], 4, "holds 4 rows for 0 tokens"),
    ],
)
def test_tokens_and_rows_must_agree(path, tokens, rows, message):
    """A save of other tokens than the cache holds is refused."""
    with (
        kvstore.Store(path, codec="raw") as store,
        pytest.raises(ValueError, match=message),
    ):
        store.save(tokens, make_cache(rows), MODEL)


@pytest.mark.parametrize("name", ["", "-x", "a\nb", "x" * 201])
def test_a_name_can_be_typed_and_printed(path, name):
    """Names that a terminal could not show are refused."""
    with (
        kvstore.Store(path, codec="raw") as store,
        pytest.raises(ValueError, match="a name has"),
    ):
        store.save([1], make_cache(1), MODEL, name=name)


def test_negative_and_large_tokens_are_kept(path):
    """Token ids are signed 64-bit numbers; vision prompts have negative ones."""
    tokens = [-1, -(2**63), 2**63 - 1]
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, make_cache(3), MODEL, name="x")
        assert store.load_entry("x", MODEL)[1] == tokens


def test_progress_ends_at_the_total(path):
    """Progress rises and ends where it said it would, for save and for load."""
    tokens = list(range(5 * BLOCK))
    saved, loaded = [], []
    with kvstore.Store(path, codec="raw") as store:
        store.save(
            tokens,
            make_cache(5 * BLOCK),
            MODEL,
            name="x",
            progress=lambda *p: saved.append(p),
        )
        store.load_entry("x", MODEL, progress=lambda *p: loaded.append(p))
    assert saved == sorted(saved)
    assert loaded == sorted(loaded)
    assert saved[-1] == loaded[-1] == (5 * BLOCK, 5 * BLOCK)


def test_the_same_input_gives_the_same_shards(tmp_path):
    """Two stores that were given the same hold byte-identical shards."""
    names = []
    for side in ("a", "b"):
        create_folder(tmp_path / side, BLOCK)
        with kvstore.Store(tmp_path / side, codec="turbo3+zstd") as store:
            store.save(list(range(100)), make_cache(100), MODEL, name="x")
            names.append(stored_bytes(store))
    assert names[0] == names[1]
    assert names[0]


def test_many_blocks_make_several_shards(path):
    """A shard closes at 64 blocks."""
    tokens = list(range(130 * BLOCK))
    cache = make_cache(130 * BLOCK, layers=1, heads=1)
    with kvstore.Store(path, codec="raw") as store:
        store.save(tokens, cache, MODEL, name="x")
        assert len(stored_bytes(store)) == 3
        assert rows_of(store.load_entry("x", MODEL)[0]) == rows_of(cache)


def test_a_shard_is_written_while_the_one_before_is_synced(path, monkeypatch):
    """Also where blocks do not fill a shard to the byte."""
    both = threading.Barrier(2)
    staged_shard, block_bytes = save.staged_shard, 2 * 2 * BLOCK * 64 * 2

    @contextmanager
    def meet(*given):
        with staged_shard(*given) as staged:
            both.wait(timeout=60)
            yield staged

    monkeypatch.setattr(save, "staged_shard", meet)
    factor, most = save._MAX_STAGED // shard.MAX_BYTES, block_bytes * 3 // 2
    monkeypatch.setattr(shard, "MAX_BYTES", most)
    monkeypatch.setattr(save, "_MAX_STAGED", factor * most)
    cache = make_cache(4 * BLOCK, layers=1, heads=2)
    with kvstore.Store(path, codec="raw") as store:
        store.save(list(range(4 * BLOCK)), cache, MODEL, name="x")
        assert len(stored_bytes(store)) == 2


def test_a_prompt_may_leave_many_conversations(path):
    """Of many stored continuations of a prefix, the one that fits longest is found."""
    prefix = random_rows(BLOCK, 1)
    tokens = list(range(BLOCK))
    caches = {}
    with kvstore.Store(path, codec="raw") as store:
        for turn in range(20):
            caches[turn] = grow(grow(None, prefix), random_rows(10, 50 + turn))
            store.save(tokens + [5, 5, turn] + [6] * 7, caches[turn], MODEL)
        restored, rest = store.load([*tokens, 5, 5, 13, 6, 6, 0], MODEL)
    assert rest == [0]
    assert rows_of(restored) == rows_of(caches[13], 0, BLOCK + 5)


def test_a_save_counts_only_over_shards_that_are_there(store_path, caches, monkeypatch):
    """A shard that vanishes before the entry is committed is written again."""
    from kvstore.ops import save

    real, left = save.commit, [1]

    def commit(blocks, *arguments, **options):
        while left and left.pop():
            for path in store_path.glob("shards/*/*.safetensors"):
                path.unlink()
        return real(blocks, *arguments, **options)

    monkeypatch.setattr(save, "commit", commit)
    tokens, cache = caches.make_conversation(2, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(tokens, cache, caches.MODEL, name="x")
        assert [] == store.verify()
        restored, held = store.load_entry("x", caches.MODEL)
    assert (tokens, caches.rows_of(cache)) == (held, caches.rows_of(restored))


@pytest.mark.parametrize("way", ["save", "save_blocks", "save_snapshot"])
def test_a_block_that_no_parent_leads_to_is_noticed_by_a_save(store_path, caches, way):
    """A snapshot, which has no time, takes its rows for stored: they are, too."""
    tokens, cache = caches.make_conversation(2, 1)
    with kvstore.Store(store_path, codec="raw") as store:
        store.save(tokens, cache, caches.MODEL)
        store._blocks.index._query("UPDATE blocks SET parent = zeroblob(32)")
        taken = store.snapshot(tokens, cache, caches.MODEL)
        if way == "save_snapshot":
            store.save_snapshot(taken)
        else:
            getattr(store, way)(tokens, cache, caches.MODEL)
        first, second = taken.chain.blocks
        children = store._blocks.index.children(first.hash, tokens[BLOCK])
    assert not taken.rows.hashes
    assert [second.hash] == [place.hash for place in children]
