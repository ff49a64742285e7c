"""One quality contract: how many bits rows have is kept, asked for, and made better."""

import json

import pytest
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.server import DiskPromptCache, ServedModel

TOKENS = list(range(600))
PROMPT = [*TOKENS, 7]


def blocks_of(path):
    """Return codec and bits of each block of the one entry."""
    with kvstore.Store(path, create=False) as store:
        (entry,) = store.entries()
        return [(stored.codec, stored.bits) for _, stored in store.chain(entry.id)]


def save(path, cache, caches, codec):
    """Save a prompt cache with a codec."""
    with kvstore.Store(path, codec=codec) as store:
        store.save(TOKENS, cache, caches.MODEL, name="x")


def held(path, caches, **options):
    """Return how many tokens a load restores."""
    with kvstore.Store(path, create=False) as store:
        found = store.lookup(PROMPT, caches.MODEL, **options).num_tokens
        assert len(store.load(PROMPT, caches.MODEL, **options)[1]) == 601 - found
        return found


def test_rows_of_fewer_bits_than_are_asked_for_are_refused(tmp_path, caches):
    """A least number of bits is held against every block, exact rows among them."""
    save(tmp_path, caches.make_cache(600, 1), caches, "turbo5v3")
    assert blocks_of(tmp_path) == [("turbo5v3", 3)] * 2 + [("raw", 255)]
    assert held(tmp_path, caches, min_bits=3) == 600
    assert held(tmp_path, caches, min_bits=4) == 0
    assert held(tmp_path, caches, exact=True) == 0
    with kvstore.Store(tmp_path) as store:
        reasons = [
            store.lookup(PROMPT, caches.MODEL, **options).detail
            for options in ({"min_bits": 4}, {"exact": True})
        ]
    assert reasons == [
        "the block behind token 0 is of 3 bits, and at least 4 are wanted",
        "the block behind token 0 is not exact",
    ]


def test_where_a_prompt_differs_is_told_of_a_lossy_block_too(tmp_path, caches):
    """The cause of a miss comes first, then why the block before it is no help."""
    save(tmp_path, caches.make_cache(600, 1), caches, "turbo4")
    block = "the block behind token 256 is lossy and cannot be cut"
    with kvstore.Store(tmp_path) as store:
        other = store.lookup([*range(300), 1, 2], caches.MODEL)
        shorter = store.lookup(list(range(301)), caches.MODEL)
    assert other.detail == f"token 300 differs: stored 300, given 1; {block}"
    assert (shorter.num_tokens, shorter.detail) == (256, block)


def test_what_is_computed_behind_lossy_rows_has_no_more_bits(tmp_path, caches):
    """Rows that went on from 3 bits are of 3 bits, whatever stores them."""
    save(tmp_path, caches.make_cache(600, 1), caches, "turbo3")
    with kvstore.Store(tmp_path, codec="planes+zstd") as store:
        cache, _ = store.load_entry("x", caches.MODEL)
        caches.grow(cache, caches.random_rows(300, 2))
        store.save([*TOKENS, *range(300)], cache, caches.MODEL, name="x")
    assert blocks_of(tmp_path) == [("turbo3", 3)] * 2 + [("planes+zstd", 3)] * 2


def test_better_rows_take_the_place_of_worse_ones_and_not_the_reverse(tmp_path, caches):
    """Computed again and stored in more bits, blocks are replaced."""
    cache = caches.make_cache(600, 1)
    for codec, bits in (("turbo2", 2), ("turbo4", 4), ("turbo3", 4), ("raw", 255)):
        save(tmp_path, cache, caches, codec)
        assert [found for _, found in blocks_of(tmp_path)] == [bits, bits, 255]
    save(tmp_path, cache, caches, "turbo4")
    assert held(tmp_path, caches, exact=True) == 600


def test_a_server_reads_what_it_is_told_and_says_of_what_quality(tmp_path, caches, log):
    """A hit's line in the log names its quality; too few bits are no hit."""
    save(tmp_path, caches.make_cache(600, 1), caches, "turbo4+zstd")
    served = ServedModel(caches.MODEL, ([KVCache(), KVCache()],))
    for options, num_left in (({}, 1), ({"min_bits": 5}, 601), ({"exact": True}, 601)):
        store = kvstore.Store(tmp_path, codec="planes+zstd")
        server = DiskPromptCache(store, lambda key: served, **options)
        assert len(server.fetch_nearest_cache("m", PROMPT)[1]) == num_left
        server.close()
    assert any("600 read from disk in" in line and ", 4 bits" in line for line in log())


def test_a_server_that_wants_exact_rows_makes_the_store_exact(tmp_path, caches):
    """What it computes for want of exact rows is exact for the next one."""
    cache = caches.make_cache(600, 1)
    save(tmp_path, cache, caches, "turbo4+zstd")
    served = ServedModel(caches.MODEL, ([KVCache(), KVCache()],))
    store = kvstore.Store(tmp_path, codec="planes+zstd")
    server = DiskPromptCache(store, lambda key: served, exact=True)
    server.insert_cache("m", TOKENS, cache)
    server.close()
    assert held(tmp_path, caches, exact=True) == 600


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_a_codec_has_the_bits_of_its_worse_side(bits):
    """Keys or values, whichever are coded in fewer."""
    assert kvstore.get_codec(f"turbo{bits}v8+zstd").bits == bits
    assert kvstore.get_codec(f"turbo8v{bits}").bits == bits


def test_generate_goes_on_from_exact_rows_only(run_cli, tiny_model, tmp_path):
    """`--exact` computes what is lossy anew, stores it lossless, and hits it then."""
    words = ["generate", "--model", tiny_model, "--prompt", "lorem ipsum " * 60]
    words += ["--max-tokens", "2", "--json"]

    def num_restored(*options):
        code, said, error = run_cli(*words, *options)
        assert code == 0, error
        return json.loads(said)["num_restored_tokens"]

    found = [num_restored(*w) for w in ((), (), ["--min-bits", "5"], ["--exact"])]
    assert found[0] == 0
    assert found[1] > 700
    assert found[2] == 0
    assert found[3] > 700


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-bits", "8"], "`--exact` and `--kv-bits` exclude each other"),
        (["--codec", "turbo4"], "`--codec turbo4` stores 4 bits per number"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_what_makes_exact_rows_useless_is_refused(run_cli, verb, options, message):
    """Codes in memory, or on disk, with `--exact`: a wrong usage, told at once."""
    words = ["--model", "no/such", *(["--prompt", "x"] if verb == "generate" else [])]
    code, _, error = run_cli(verb, *words, "--exact", *options)
    assert code == 2
    assert message in error
