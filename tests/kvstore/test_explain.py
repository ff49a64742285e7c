"""`explain`: where a prompt leaves what is stored, and what else has it."""

import json

import apsw
import mlx.core as mx
import pytest

import kvstore
from kvstore.cli.commands import lookup as lookup_verb
from kvstore.ops.explain import WINDOW, OtherModel

BLOCK = 16
TOKENS = list(range(100, 100 + 4 * BLOCK + 5))


@pytest.fixture
def make_store(store_path, caches):
    """A function that opens a store of some codec with entries saved in it."""
    opened = []

    def make(entries, codec="raw", model=caches.MODEL, **options):
        store = kvstore.Store(store_path, codec=codec, **options)
        opened.append(store)
        for name, tokens in entries.items():
            cache = caches.make_cache(len(tokens), seed=len(tokens))
            store.save(tokens, cache, model, name=name)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def model(caches):
    """The model that is asked for."""
    return caches.MODEL


def leave_at(at, num_more=20):
    """Return a prompt that has the stored tokens up to a position."""
    return TOKENS[:at] + [-1 - i for i in range(num_more)]


@pytest.mark.parametrize("at", [1, BLOCK - 1, 2 * BLOCK + 7, 4 * BLOCK + 2])
def test_the_first_token_that_differs_is_shown_with_its_surroundings(
    make_store, model, at
):
    """Both sides are cut out around it, and an entry is named that has the stored."""
    found = make_store({"chat": TOKENS}).explain(leave_at(at), model)
    divergence = found.divergence
    start = max(0, at - WINDOW)
    assert (divergence.position, divergence.start, found.num_common) == (at, start, at)
    assert list(divergence.stored) == TOKENS[start : at + WINDOW]
    assert list(divergence.given) == leave_at(at)[start : at + WINDOW]
    assert divergence.entry == found.entry == "chat"
    assert (found.match.num_tokens, found.match.reason) == (at, "divergence")
    assert found.other is found.damage is None


@pytest.mark.parametrize("at", [0, 2 * BLOCK])
def test_a_block_may_differ_in_its_first_token(make_store, model, at):
    """Where no block begins as the prompt goes on, what is stored there is shown."""
    store = make_store({"chat": TOKENS})
    divergence = store.explain(leave_at(at), model).divergence
    side = list(divergence.stored)[divergence.position - divergence.start :]
    assert (divergence.position, side) == (at, TOKENS[at : at + WINDOW])
    assert divergence.entry == "chat"


def test_a_lossy_block_does_not_hide_where_the_prompt_differs(make_store, model):
    """A match ends at the end of a lossy block, a divergence where the tokens do."""
    found = make_store({"chat": TOKENS}, "turbo4").explain(leave_at(BLOCK + 7), model)
    assert (found.match.num_tokens, found.match.reason) == (BLOCK, "inexact")
    assert found.divergence.position == found.num_common == BLOCK + 7


def test_tokens_are_told_apart_from_exact_rows(make_store, model):
    """Of what is stored and not exact, nothing is restored, and the tokens are told."""
    store = make_store({"chat": TOKENS}, "turbo4")
    found = store.explain(leave_at(3 * BLOCK + 1), model, exact=True)
    assert (found.match.num_tokens, found.num_common) == (0, 3 * BLOCK + 1)
    assert found.divergence.position == 3 * BLOCK + 1


def test_of_several_that_differ_there_the_one_an_entry_has_is_shown(make_store, model):
    """A block that no entry needs any more tells less."""
    left = [*TOKENS[:BLOCK], *[5] * BLOCK]
    right = [*TOKENS[:BLOCK], *[6] * BLOCK]
    store = make_store({"left": left, "right": right})
    for gone, kept, token in (("left", "right", 6), ("right", None, 5)):
        store.remove(gone)
        divergence = store.explain(leave_at(BLOCK), model).divergence
        assert divergence.entry == kept
        assert kept is None or divergence.stored[WINDOW] == token


def test_what_ends_does_not_differ(make_store, model):
    """Where the stored tokens end, or the prompt, there is no divergence."""
    store = make_store({"chat": TOKENS})
    longer = store.explain([*TOKENS, 1, 2], model)
    assert (longer.match.reason, longer.divergence) == ("end", None)
    assert (longer.num_common, longer.entry) == (len(TOKENS), "chat")
    for prompt in (TOKENS, TOKENS[: 2 * BLOCK], [*TOKENS[:-1], -1]):
        whole = store.explain(prompt, model)
        assert (whole.match.reason, whole.divergence) == ("whole", None)


def test_an_entry_that_goes_on_is_shown_rather_than_one_that_ends(make_store, model):
    """Of a conversation and what another made of it, the other one differs."""
    store = make_store({"longer": TOKENS})
    store.save(TOKENS[:40], store.load(TOKENS[:41], model)[0], model, name="short")
    assert store.explain(leave_at(40), model).divergence.entry == "longer"


def test_nothing_stored_is_nothing_to_explain(make_store, model):
    """An empty store has nothing beside the match."""
    found = make_store({}).explain(TOKENS, model)
    assert (found.match.num_tokens, found.match.reason) == (0, "fingerprint")
    assert (found.num_common, found.divergence, found.entry) == (0, None, None)
    assert found.other is found.damage is None


def test_another_model_is_named_by_the_field_that_differs(make_store, caches, model):
    """The one that has most of the prompt is told of, with both values."""
    make_store({"far": leave_at(BLOCK)}, model=caches.OTHER_ADAPTER)
    store = make_store({"near": leave_at(3 * BLOCK)}, model=caches.OTHER_WEIGHTS)
    found = store.explain(TOKENS, model)
    assert (found.match.num_tokens, found.num_common) == (0, 0)
    assert (found.other.entry, found.other.num_tokens) == ("near", 3 * BLOCK)
    assert found.other.model == "model-b"
    assert found.other.difference == 'weights: stored "b", given "a"'


def test_another_model_is_named_where_it_has_none_of_the_prompt(make_store, caches):
    """Where nothing can be used, what is stored last is told of."""
    make_store({"one": TOKENS}, model=caches.MODEL)
    found = make_store({}).explain([1, 2, 3], caches.OTHER_ADAPTER)
    assert (found.other.entry, found.other.num_tokens) == ("one", 0)
    assert found.other.difference == 'adapter: stored null, given "c"'


def test_of_models_that_have_none_of_the_prompt_the_last_is_named(
    make_store, caches, model
):
    """It is the one that whoever asks is the likeliest to have meant."""
    make_store({"first": TOKENS}, model=caches.OTHER_WEIGHTS)
    store = make_store({"last": TOKENS}, model=caches.OTHER_ADAPTER)
    assert store.explain([1, 2, 3], model).other.entry == "last"
    store.save(TOKENS, store.load_entry("first", None)[0], caches.OTHER_WEIGHTS)
    assert store.explain([1, 2, 3], model).other.model == "model-b"


def test_another_model_counts_only_where_it_has_more(make_store, caches, model):
    """What can be used comes first, and what has more beside it."""
    make_store({"other": TOKENS}, model=caches.OTHER_WEIGHTS)
    store = make_store({"mine": leave_at(2 * BLOCK)})
    found = store.explain(TOKENS, model)
    assert (found.num_common, found.divergence.entry) == (2 * BLOCK, "mine")
    assert (found.other.entry, found.other.num_tokens) == ("other", len(TOKENS))
    assert store.explain(leave_at(2 * BLOCK), model).other is None


def test_another_salt_is_told_of_and_not_told(make_store, model):
    """What is kept apart on purpose is not usable, and the salt stays unknown."""
    found = make_store({"mine": TOKENS}).explain(TOKENS, model.with_salt("other"))
    assert found.other.difference == "salt: another one"


def test_another_kind_of_cache_is_told_of(make_store, caches, model):
    """Rows of quantized caches are not those that a prompt cache of rows asks for."""
    cache = [c.to_quantized(64, 4) for c in caches.make_cache(len(TOKENS))]
    mx.eval([c.state for c in cache])
    store = make_store({})
    store.save(TOKENS, cache, model, name="quantized")
    assert store.explain(TOKENS, model, like=cache).other is None
    assert store.explain(TOKENS, model).other.difference == (
        "layers: stored as codes of a live cache, given none"
    )
    like = caches.make_cache(1)
    found = store.explain(TOKENS, model, like=like)
    assert (found.match.num_tokens, found.other.entry) == (0, "quantized")
    assert found.other.difference == (
        "layer 0: stored QuantizedKVCache(bits=4, group_size=64), given KVCache"
    )
    found = store.explain(TOKENS, model, like=like[:1])
    assert found.other.difference == "layers: stored 2, given 1"


def shard_of(store, ref, block):
    """Return the file that holds a block of an entry."""
    place, stored = store.chain(ref)[block]
    path = next(store.path.glob(f"shards/*/{place.shard}.safetensors"))
    return path, stored.block.hash.hex()[:12]


@pytest.mark.parametrize("block", [0, 2])
def test_a_damaged_block_is_named(make_store, model, flip_bit, block):
    """First as what is wrong with its shard, then as what an entry lacks."""
    store = make_store({})
    for number in range(3):  # a shard for each block
        tokens = TOKENS[: (number + 1) * BLOCK]
        held = store.load([*tokens, 0], model)[0]
        cache = make_longer(held, len(tokens))
        store.save(tokens, cache, model, name="chat")
    path, name = shard_of(store, "chat", block)
    flip_bit(path, 8 * 60)
    store.close()
    store = make_store({})
    first = store.explain(TOKENS, model)
    assert first.damage.startswith(f"block {name}: ")
    assert first.match.num_tokens == block * BLOCK
    begin, end = block * BLOCK, (block + 1) * BLOCK - 1
    assert store.explain(TOKENS, model).damage == (
        f"block {name} of `chat`, tokens {begin} to {end}, is damaged or missing"
    )


def make_longer(held, num_tokens):
    """Return a prompt cache with random rows added behind those it has."""
    from mlx_lm.models.cache import KVCache

    held = held or [KVCache() for _ in range(2)]
    more = num_tokens - held[0].offset
    rows = mx.random.normal((1, 2, more, 64)).astype(mx.bfloat16)
    for cache in held:
        cache.update_and_fetch(rows, rows)
    return held


def test_a_lost_tail_is_named(make_store, model):
    """A tail that is gone is found by the tokens of the prompt."""
    store = make_store({"chat": TOKENS})
    path, _ = shard_of(store, "chat", 0)
    tip = store.entry("chat").tip[:12]
    path.unlink()
    found = store.explain([*TOKENS, 1], model)
    assert "is missing" in found.damage
    begin, end = 4 * BLOCK, 4 * BLOCK + 4
    assert store.explain([*TOKENS, 1], model).damage == (
        f"block {tip} of `chat`, tokens {begin} to {end}, is damaged or missing"
    )
    assert store.explain(leave_at(BLOCK), model).damage is None


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE blocks SET parent = hash",
        "UPDATE roots SET layout = '[]'",
        "UPDATE roots SET fingerprint = 'x'",
        "UPDATE blocks SET nbytes = nbytes + 1",
        "DELETE FROM shards",
    ],
)
def test_an_index_that_lies_ends_in_an_answer(make_store, model, store_path, change):
    """Circles and wrong rows cost a hit at most."""
    store = make_store({"chat": TOKENS})
    store.close()
    apsw.Connection(str(store_path / "index.sqlite")).execute(change)
    store = make_store({})
    found = store.explain(leave_at(3 * BLOCK + 2), model)
    assert found.match.num_tokens <= 3 * BLOCK + 2
    assert found.other is None
    assert store.stats().num_entries == 1


# On the command line

DOCUMENT = "The quick brown fox jumps over the lazy dog, and then some more."


@pytest.fixture
def look_up(run_cli, tiny_model):
    """A function that saves a text and looks another one up with `--explain`."""

    def call(saved, asked, *options, model=tiny_model):
        words = ("--ignore-chat-template", "--prompt")
        code, _, err = run_cli(
            "save", "--model", tiny_model, "--name", "doc", *words, saved
        )
        assert code == 0, err
        code, out, err = run_cli(
            "lookup", "--model", model, "--explain", *options, *words, asked
        )
        assert code == 0, err
        return out

    return call


def test_the_command_line_shows_both_texts(look_up):
    """Two lines with the token marked, below each other, and the ids before them."""
    lines = look_up(DOCUMENT, DOCUMENT.replace("fox", "dog")).splitlines()
    assert lines[0].startswith("16 of 64 tokens held: divergence: ")
    assert lines[1:] == [
        "token 16: stored 69 in `doc`, given 67",
        "stored: …quick brown ⟦f⟧ox jumps ov…",
        "given:  …quick brown ⟦d⟧og jumps ov…",
    ]


def test_the_command_line_shows_what_cannot_be_seen(look_up):
    """Line ends and control characters are spelled out: nothing moves a cursor."""
    out = look_up("one two\n\x1b[31m three", "one two\t four")
    assert out.splitlines()[2:] == [
        "stored: …one two⟦\\n⟧\\x1b[31m three…",
        "given:  …one two⟦\\t⟧ four…",
    ]


def test_half_a_character_is_no_error(look_up):
    """Tokens that differ within a character show what there is of it."""
    lines = look_up("caf\u00e9 au lait", "caf\u00ea au lait").splitlines()
    assert lines[2:] == [
        "stored: …caf⟦é⟧ au lait…",
        "given:  …caf⟦ê⟧ au lait…",
    ]


def test_the_command_line_names_the_field_of_another_model(look_up, other_model):
    """Who asks for other weights reads so, and which entry there is."""
    out = look_up(DOCUMENT, DOCUMENT, model=other_model)
    assert out.startswith("0 of 64 tokens held: ")
    assert "not usable: `doc` of " in out
    assert "has 64 tokens of the prompt, and differs in weights: stored " in out


def test_of_another_tokenizer_no_tokens_are_counted():
    """It has none of the prompt's, which says nothing of the text."""
    other = OtherModel(0, "weights: stored a, given b", "a/model", "doc")
    assert lookup_verb._explain_other(other) == (
        "not usable: `doc` of a/model differs in weights: stored a, given b"
    )


def test_json_has_all_of_it(look_up):
    """The document has the match, tokens and texts of both sides."""
    asked = DOCUMENT.replace("fox", "dog")
    found = json.loads(look_up(DOCUMENT, asked, "--json"))
    assert (found["num_tokens"], found["reason"]) == (16, "divergence")
    told = found["explanation"]
    assert (told["num_common"], told["entry"], told["other"]) == (16, "doc", None)
    divergence = told["divergence"]
    assert (divergence["position"], divergence["start"]) == (16, 4)
    assert divergence["stored"][12:14] == [69, 78]
    assert divergence["given_text"] == {
        "before": "quick brown ",
        "token": "d",
        "after": "og jumps ov",
    }


class PickyTokenizer:
    """A tokenizer that refuses numbers that are no tokens of its own."""

    def decode(self, tokens):
        """Return a character for each token."""
        if any(token < 0 for token in tokens):
            raise OverflowError("can't convert negative int to unsigned")
        return "".join(map(chr, tokens))


def test_what_the_tokenizer_refuses_is_shown_as_numbers():
    """An image's token is negative, and no tokenizer decodes it."""
    divergence = kvstore.ops.explain.Divergence(
        2, 0, (97, 98, 99), (97, 98, -7, 100), entry=None
    )
    stored, given = lookup_verb._sides(divergence, PickyTokenizer())
    assert lookup_verb._marked(**stored) == "…ab⟦c⟧…"
    assert lookup_verb._marked(**given) == "…ab⟦<-7>⟧d…"


def test_the_nearest_is_the_entry_with_most_of_the_tokens(make_store, model):
    """Wherever they stand in it; of another model nothing is taken."""
    store = make_store({"begins": TOKENS[:20], "shifted": [7, 8, *TOKENS[:50]]})
    entry, tokens = store.nearest(TOKENS, model)
    assert (entry.name, tokens) == ("shifted", [7, 8, *TOKENS[:50]])
    assert store.nearest(TOKENS, model.with_salt("other")) is None


def test_a_damaged_entry_is_not_the_nearest(make_store, model):
    """What cannot be read is passed over."""
    store = make_store({"whole": [7, *TOKENS[:20]], "broken": TOKENS})
    for name in {place.shard for place, _ in store.chain("broken")}:
        (shard,) = (store.path / "shards").glob(f"??/{name}*")
        shard.unlink()
    assert store.nearest(TOKENS, model)[0].name == "whole"
