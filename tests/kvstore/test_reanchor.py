"""Re-anchored rows: near what is computed, marked, and found only where asked for."""

import random
import signal
import time
from contextlib import closing
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from kit import load_beside
from mlx_lm.models.cache import make_prompt_cache

import kvstore
from kvstore.caches.live import read_provenance
from kvstore.caches.provenance import Provenance
from kvstore.caches.reanchor import NUM_FRESH, MovedRun, Sketch, find_runs
from kvstore.cli import cli
from kvstore.format.chain import common_run
from kvstore.server import DiskPromptCache, ServedModel
from kvstore.server.generator import Batch
from kvstore.server.prompt_cache import TenantPromptCache
from kvstore.server.provider import Provider

architectures, beside = load_beside("architectures"), load_beside("servers")
HEAD, OLD, NEW = list(range(10, 40)), [3, 4, 5], [6, 7, 8, 9, 6]
TAIL = [(7 * i * i + 3 * i + i // 9) % 89 + 10 for i in range(300)]
TOKENS, PROMPT = HEAD + OLD + TAIL, HEAD + NEW + TAIL + [5, 6]


@pytest.fixture(scope="module")
def model():
    """A model whose keys can be moved."""
    return architectures.make_model("llama", layer_types=["full_attention"] * 4)


@pytest.fixture(scope="module")
def near(model):
    """The same, measured."""
    return kvstore.Reanchoring(model)


@pytest.fixture
def store(store_path):
    """A store of exact rows."""
    with kvstore.Store(store_path, "raw") as opened:
        yield opened


def compute(model, tokens, prompt_cache=None):
    """Return a prompt cache of these tokens."""
    held = prompt_cache or make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=held))
    return held


@pytest.fixture
def saved(store, model, caches):
    """The store, with the old prompt in it."""
    store.save(TOKENS, compute(model, TOKENS), caches.MODEL)
    return store


def sides(cache):
    """Return its keys and values, without the room for more."""
    return [side[:, :, : cache.offset] for side in (cache.keys, cache.values)]


def error(found, expected, rows=slice(None)):
    """Return how far keys and values of some rows are from others, at worst."""
    return max(
        float(mx.abs(one[:, :, rows] - other[:, :, rows]).max())
        for cache, exact in zip(found, expected, strict=True)
        for one, other in zip(sides(cache), sides(exact), strict=True)
    )


def test_what_is_the_same_in_front_is_kept_and_what_differs_is_computed(
    saved, model, near, caches
):
    """Only what stands behind the fresh tokens is taken over."""
    found, rest = saved.load(PROMPT, caches.MODEL, near=near)
    assert near.count(found) == len(TAIL) - NUM_FRESH
    assert rest == [5, 6]
    exact = compute(model, PROMPT[:-2])
    first = len(HEAD + NEW) + NUM_FRESH
    assert error(found, exact, slice(0, first)) < 1e-4 < error(found, exact)


def test_in_the_first_layer_moved_rows_are_those_of_their_new_places(
    saved, model, near, caches
):
    """There no token has seen another, so all of the difference is the rotation."""
    found, _ = saved.load(PROMPT, caches.MODEL, near=near)
    exact = compute(model, PROMPT[:-2])
    assert error(found[:1], exact[:1]) < 1e-4


def test_nobody_gets_them_who_did_not_ask(saved, near, caches):
    """Without `near`, the same prompt is a hit on its head only; `exact` refuses."""
    _, rest = saved.load(PROMPT, caches.MODEL)
    assert rest == PROMPT[len(HEAD) :]
    with pytest.raises(kvstore.ArgumentError, match="never exact"):
        saved.load(PROMPT, caches.MODEL, near=near, exact=True)


def test_several_changes_are_a_chain(store, model, near, caches):
    """Behind each change some tokens are computed, and the rest is taken over."""
    tokens = HEAD + OLD + TAIL + OLD + TAIL[::-1]
    prompt = HEAD + NEW + TAIL + NEW + NEW + TAIL[::-1] + [1]
    store.save(tokens, compute(model, tokens), caches.MODEL)
    found, rest = store.load(prompt, caches.MODEL, near=near)
    assert near.count(found) == 2 * (len(TAIL) - NUM_FRESH)
    assert rest == [1]
    assert error(found[:1], compute(model, prompt[:-1])[:1]) < 1e-4


def test_a_longer_prefix_of_another_prompt_is_the_base(saved, model, near, caches):
    """What has the new head is loaded, and the rows behind it come from elsewhere."""
    begun = HEAD + NEW + [9, 9, 8, 7]
    saved.save(begun, compute(model, begun), caches.MODEL)
    prompt = [*begun, *TAIL, 5]
    found, rest = saved.load(prompt, caches.MODEL, near=near)
    assert (near.count(found), rest) == (len(TAIL) - NUM_FRESH, [5])
    exact = compute(model, begun)
    assert error(found, exact, slice(0, len(begun))) < 1e-4


def test_a_head_that_comes_back_costs_only_what_is_new(saved, model, near, caches):
    """What was said behind another head meanwhile goes on from the exact rows."""
    said = [(5 * i * i + i // 7) % 83 + 10 for i in range(120)]
    saved.save(PROMPT + said, compute(model, PROMPT + said), caches.MODEL)
    prompt = [*TOKENS, 5, 6, *said, 7]
    found, rest = saved.load(prompt, caches.MODEL, near=near)
    assert (rest, near.count(found)) == ([7], len(said) + 2 - NUM_FRESH)
    exact = compute(model, prompt[:-1])
    assert error(found, exact, slice(0, len(TOKENS) + NUM_FRESH)) < 1e-4
    assert error(found[:1], exact[:1]) < 1e-4


def test_what_was_damaged_is_found_once_it_is_saved_again(saved, model, caches):
    """By the model that has looked for it in vain."""
    near = kvstore.Reanchoring(model)
    for shard in saved.path.glob("shards/**/*.safetensors"):
        shard.unlink()
    assert saved.load(PROMPT, caches.MODEL, near=near) == (None, PROMPT)
    saved.save(TOKENS, compute(model, TOKENS), caches.MODEL)
    assert saved.load(PROMPT, caches.MODEL, near=near)[1] == [5, 6]


@pytest.mark.parametrize(
    "prompt",
    [TOKENS, [*TOKENS, 5], TOKENS[:50], HEAD + NEW + TAIL[:40], NEW, NEW * 50, [-1, 5]],
    ids=len,
)
def test_where_little_is_the_same_nothing_is_taken_over(saved, near, caches, prompt):
    """What only goes on, or shares too few tokens behind a change, is a plain hit."""
    found, rest = saved.load(prompt, caches.MODEL, near=near)
    expected, plain = saved.load(prompt, caches.MODEL)
    assert rest == plain
    if expected:
        assert (near.count(found), error(found, expected)) == (0, 0)


def test_they_are_stored_under_a_mark_for_good(saved, model, near, caches):
    """However they are saved: no prompt finds them but one that asks for such rows."""
    found, rest = saved.load(PROMPT, caches.MODEL, near=near)
    compute(model, rest, found)
    entry = saved.save(PROMPT, found, caches.MODEL)
    saved.save_blocks(PROMPT, found, caches.MODEL)
    longer = [*PROMPT, 7, 7]
    assert saved.lookup(longer, caches.MODEL).num_tokens == len(HEAD)
    again, rest = saved.load(longer, caches.MODEL, near=near)
    assert rest == [7, 7]
    assert error(again, found) == 0
    assert read_provenance(again) == Provenance(0, num_moved=len(PROMPT))
    with pytest.raises(kvstore.FingerprintError, match="re-anchored"):
        saved.load_entry(entry.id, caches.MODEL)
    taken, _ = saved.load_entry(entry.id, None)
    assert near.count(taken) == len(PROMPT)
    for wanted in ({"exact": True}, {"max_kl": 1.0}):
        with pytest.raises(kvstore.KVStoreError, match="behind other words"):
            saved.load_entry(entry.id, None, **wanted)
    assert saved.loss(entry.id).kl is None


def test_no_file_of_mlx_lm_holds_them(saved, model, near, caches, tmp_path):
    """Its readers know no mark, so `kvstore load -o` writes none, and leaves none."""
    found, rest = saved.load(PROMPT, caches.MODEL, near=near)
    compute(model, rest, found)
    saved.save(PROMPT, found, caches.MODEL, name="moved")
    path = tmp_path / "moved.safetensors"
    done = CliRunner().invoke(
        cli, ["--store", str(saved.path), "load", "moved", "-o", str(path)]
    )
    assert "go into no file of mlx-lm's" in str(done.exception)
    assert list(tmp_path.glob("*moved*")) == []


def test_adopting_them_keeps_the_mark(saved, model, near, caches):
    """Whoever vouches for a model vouches for no rows that no model computes."""
    found, rest = saved.load(PROMPT, caches.MODEL, near=near)
    compute(model, rest, found)
    saved.save(PROMPT, found, caches.MODEL, name="moved")
    with pytest.raises(kvstore.FingerprintError, match="of this model already"):
        saved.adopt("moved", caches.MODEL)
    other = caches.MODEL.with_salt("other")
    saved.adopt("moved", other)
    with pytest.raises(kvstore.FingerprintError, match="re-anchored"):
        saved.load_entry("moved", other)
    assert saved.lookup([*PROMPT, 7], other).num_tokens == 0


def test_what_goes_on_from_them_is_reused_behind_the_next_change(
    saved, model, near, caches
):
    """A clock in the head costs its own tokens in each turn, and no more."""
    prompt = TOKENS
    rng = random.Random(5)
    for turn in range(4):
        prompt = [*HEAD, turn, turn + 5, *prompt[len(HEAD) + len(OLD) - (turn > 0) :]]
        prompt += [rng.randrange(10, 99) for _ in range(40)]
        found, rest = saved.load(prompt, caches.MODEL, near=near)
        assert len(rest) == 40
        assert len(prompt) - 40 - near.count(found) <= len(HEAD) + 2 + NUM_FRESH
        compute(model, rest, found)
        saved.save(prompt, found, caches.MODEL)
    exact = compute(model, prompt)
    assert error(found[:1], exact[:1]) < 1e-4


@pytest.mark.parametrize("bits", [None, 8])
def test_a_server_that_makes_codes_of_rows_reuses_none(model, near, caches, bits):
    """However `--kv-bits` is spelled: mlx-lm's codes have no mark."""
    provider = Provider.__new__(Provider)
    vars(provider).update(
        loaded=caches.MODEL,
        model_key="it",
        model=model,
        draft_model=None,
        near=near,
        cli_args=SimpleNamespace(kv_bits=bits, kv_group_size=64),
        find_shapes=list,
        make_title=str,
    )
    assert (provider.describe("it").near is None) == (bits is not None)


def test_what_is_shared_with_tenants_is_exact(store, model, near, caches):
    """Rows of the operator's that were re-anchored may come from what is not shared."""
    shown = ServedModel(caches.MODEL, (make_prompt_cache(model),), near=near)
    with closing(TenantPromptCache(store, lambda key: shown, ())) as held:
        assert held._served(("it", "")).near is None
        assert held._served(("it", "alice")).near is near


def test_a_copy_and_a_cut_keep_the_mark(saved, model, near, caches):
    """And a tier of another server stores them under it too."""
    found, rest = saved.load(PROMPT, caches.MODEL, near=near)
    compute(model, rest, found)
    for cache in found:
        cache.trim(10)
    with kvstore.tier(
        model, path=saved.path, fingerprint=caches.MODEL, min_tokens=1
    ) as tier:
        assert tier.put(PROMPT, found)
        tier.flush()
        held, _ = tier.fetch(PROMPT)
        assert held[0].offset == len(HEAD)


@pytest.fixture
def served(model, near, caches):
    """The model as a server has it, allowed to re-anchor."""
    return ServedModel(caches.MODEL, (make_prompt_cache(model),), near=near)


def test_a_server_says_how_many_were_taken_over(store_path, served, model, caches):
    """From disk first, then from memory; and after a restart what is exact is so."""
    tier = DiskPromptCache(kvstore.Store(store_path, "raw"), lambda key: served)
    tier.insert_cache("m", TOKENS, compute(model, TOKENS))
    assert tier.flush()
    found, rest = tier.fetch_nearest_cache("m", PROMPT)
    sums = tier.lookup_of(PROMPT).sums()
    num_moved, num_new = len(TAIL) - NUM_FRESH, len(NEW) + NUM_FRESH
    assert sums == {
        "memory_tokens": 0,
        "disk_tokens": len(HEAD) + num_moved,
        "computed_tokens": num_new + len(rest),
    }
    assert tier.lookup_of(PROMPT).num_reanchored == num_moved
    assert f"{num_moved} re-anchored" in str(tier.lookup_of(PROMPT))
    compute(model, rest, found)
    tier.insert_cache("m", PROMPT, found)
    tier.fetch_nearest_cache("m", [*PROMPT, 8])
    assert tier.lookup_of([*PROMPT, 8]).num_reanchored == num_moved
    # What memory holds of the old prompt is worth more than what could be moved.
    tier.fetch_nearest_cache("m", [*TOKENS, *NEW * 30])
    assert tier.lookup_of([*TOKENS, *NEW * 30]).num_reanchored == 0
    tier.close()
    with kvstore.Store(store_path) as store:
        assert store.lookup(PROMPT, caches.MODEL).num_tokens == len(HEAD)
        assert store.lookup([*TOKENS, 1], caches.MODEL).num_tokens == len(TOKENS)


def test_the_turn_before_is_waited_for(store_path, served, model, monkeypatch):
    """A little, where it is much like the prompt; what is not, keeps nobody waiting."""
    tier = DiskPromptCache(kvstore.Store(store_path, "raw"), lambda key: served)
    tier.store.note_prefill(served.fingerprint, 100, 1000.0)
    tier.store.note_prefill(served.fingerprint, 1000, 10_000.0)
    waits, wait_for = [], tier._disk._writer.wait_for

    def note(is_wanted, timeout_s):
        waits.append(timeout_s)
        wait_for(is_wanted, timeout_s)

    monkeypatch.setattr(tier._disk._writer, "wait_for", note)
    tier.insert_cache("m", TOKENS, compute(model, TOKENS))
    # Nothing has waited for the disk.
    assert len(tier.fetch_nearest_cache("m", PROMPT)[1]) == 2
    assert waits[0] > 60
    changed = tier._disk._writer._changed
    with changed, monkeypatch.context() as patched:  # no job can leave meanwhile
        patched.setattr(changed, "wait", None)
        wait_for(lambda job: False, 60)
    tier.close()


def test_a_disk_that_was_too_slow_is_left_alone(store_path, served, model):
    """Also for rows that would be re-anchored."""
    tier = DiskPromptCache(kvstore.Store(store_path, "raw"), lambda key: served)
    tier.insert_cache("m", TOKENS, compute(model, TOKENS))
    assert tier.flush()
    tier.trim_to(n_sequences=0)
    tier._disk._read_again_at = time.monotonic() + 60
    assert tier.fetch_nearest_cache("m", PROMPT) == (None, PROMPT)
    tier._disk._read_again_at = 0
    assert len(tier.fetch_nearest_cache("m", PROMPT)[1]) == 2
    tier.close()


def test_a_batch_does_not_forget_what_was_moved(saved, model, near, caches):
    """Not at the end of a segment, nor at the end, nor where it is given up."""
    kept = []
    batch = Batch(
        lambda tokens, cache: kept.append(near.count(cache)),
        lambda *_: None,
        model,
        prefill_step_size=64,
        completion_batch_size=8,
    )
    prompts = {}
    for number, last in enumerate([[5, 6], [7, 8, 9]]):
        # One is computed, and one re-anchored.
        prompt = (HEAD + NEW + TAIL if number else TOKENS) + last
        found, rest = saved.load(prompt, caches.MODEL, near=near)
        (uid,) = batch.insert_segments(
            segments=[[rest[:1], rest[1:]]],
            max_tokens=[4],
            caches=[found],
            all_tokens=[prompt[: -len(rest)]],
        )
        prompts[uid] = near.count(found)
    assert sorted(prompts.values()) == [0, len(TAIL) - NUM_FRESH]
    ends = {}
    while len(ends) < 2:
        begun, made = batch.next()
        segments = [r.uid for r in begun if r.end_of_segment and not r.end_of_prompt]
        for uid, (cache, _) in batch.extract_cache(segments).items():
            assert near.count(cache) == prompts[uid]
        for response in made:
            if response.finish_reason:
                ends[response.uid] = near.count(response.prompt_cache)
    assert ends == prompts
    found, rest = saved.load(PROMPT, caches.MODEL, near=near)
    batch.insert_segments(
        segments=[[rest]], max_tokens=[9], caches=[found], all_tokens=[PROMPT[:-2]]
    )
    while not batch.next()[1]:
        pass
    batch.give_up()
    assert kept == [len(TAIL) - NUM_FRESH]
    assert batch._marks == {}


@pytest.mark.slow
def test_a_clock_in_the_head_costs_its_own_tokens(tiny_model, tmp_path):
    """Turn for turn, and after a kill; without the option, all of it each time."""
    computed = {}
    for words in ((), ("--reanchor",)):
        servers = beside.Servers(tmp_path / f"home{len(words)}")
        folder, found = tmp_path / f"store{len(words)}", []
        server = servers.kvstore(folder, tiny_model, *words)
        talk = [
            {"role": "user", "content": "Read the file, and say what is in it. " * 20}
        ]
        for turn in range(6):
            head = f"Today is Monday, 09:{turn:02}:17. Answer briefly."
            answer = server.ask([{"role": "system", "content": head}, *talk])
            usage = answer.usage.kvstore
            found.append(usage["computed_tokens"])
            if turn and words:
                assert usage["reanchored_tokens"] > 0
            talk += [
                {"role": "assistant", "content": "A poem."},
                {"role": "user", "content": f"And number {turn}?"},
            ]
            time.sleep(0.5)
            if turn == 3:
                told = "prompts differ again and again, now in line 2" in server.text()
                assert told != bool(words)
                server.stop(signal.SIGKILL)
                server = servers.kvstore(folder, tiny_model, *words)
        assert (" re-anchored" in server.text()) == bool(words)
        servers.close()
        computed[words] = found
    assert min(computed[()][1:]) > 700
    assert max(computed["--reanchor",][1:]) < 160


def test_windows_hold_what_they_still_see(store, caches):
    """A model with sliding layers goes on as from computed rows, but nearly."""
    model = architectures.make_model("gemma3_text")
    near = kvstore.Reanchoring(model)
    store.save(TOKENS, compute(model, TOKENS), caches.MODEL)
    found, rest = store.load(PROMPT, caches.MODEL, near=near)
    assert (near.count(found), rest) == (len(TAIL) - NUM_FRESH, [5, 6])
    exact = compute(model, PROMPT[:-2])
    assert [mine.offset for mine in found] == [other.offset for other in exact]
    assert type(found[0]).__name__ == "RotatingKVCache"
    first = [c._temporal_order(c.keys)[:, :, -8:] for c in (found[0], exact[0])]
    assert mx.abs(first[0] - first[1]).max() < 1e-4
    logits = [model(mx.array([rest]), cache=c)[0, -1] for c in (found, exact)]
    assert mx.abs(logits[0] - logits[1]).max() < 0.1 * mx.abs(logits[1]).max()


def test_a_model_whose_keys_cannot_be_moved_is_refused():
    """By name, before anything is loaded."""
    with pytest.raises(kvstore.UnsupportedCacheError, match="recurrent states"):
        kvstore.Reanchoring(architectures.make_model("mamba"))
    with pytest.raises(kvstore.ArgumentError, match="0 tokens computed"):
        kvstore.Reanchoring(None, num_fresh=0)


def runs(stored, given):
    """Return the runs of two lists of tokens, behind what they begin with."""
    begin = common_run(stored, given)
    return find_runs(Sketch.of(stored), Sketch.of(given), begin, 40)


def test_runs_are_found_in_order_and_at_their_full_length():
    """Wherever they stand, and however often a token comes."""
    rng = random.Random(3)
    a, b, c = ([rng.randrange(50) for _ in range(n)] for n in (200, 200, 50))
    assert runs(a + b, [1, 2, *a, *c, *b]) == [
        MovedRun(0, 2, 200),
        MovedRun(200, 252, 200),
    ]
    # Parts in another order: only what is in the order of both.
    assert runs(a + b + c, a + c + b) == [MovedRun(200, 250, 200)]
    assert runs(a, a[:39] + c) == []
    assert runs([5] * 100, [7] + [5] * 80) == [MovedRun(0, 1, 80)]
    assert runs(a, []) == runs([], a) == []


def test_runs_of_what_is_had_already_are_cut():
    """Where they begin in front of it; of less than is worth moving none is left."""
    rng = random.Random(3)
    a, b = ([rng.randrange(50) for _ in range(200)] for _ in range(2))
    stored, given = Sketch.of([1, *a, *b]), Sketch.of([2, 3, *a, 4, *b])
    whole = [MovedRun(1, 2, 200), MovedRun(201, 203, 200)]
    assert find_runs(stored, given, 0, 40) == whole
    assert find_runs(stored, given, 102, 40) == [MovedRun(101, 102, 100), whole[1]]
    assert find_runs(stored, given, 170, 40) == whole[1:]
    assert find_runs(stored, given, 300, 40) == [MovedRun(298, 300, 103)]
    assert find_runs(stored, given, 390, 40) == []


def test_behind_a_large_change_nothing_is_reused():
    """Of more than 256 tokens, or a quarter of what follows, on either side."""
    rng = random.Random(3)
    a, b, c = ([rng.randrange(50) for _ in range(n)] for n in (100, 2000, 300))
    for size, found in ((256, 1), (257, 0)):
        assert len(runs(a + b, a + c[:size] + b)) == found
        assert len(runs(a + c[:size] + b, a + b)) == found
    for size, found in ((50, 1), (51, 0)):
        assert len(runs(a + b[:200], a + c[:size] + b[:200])) == found


def test_a_long_prompt_that_has_nothing_in_common_costs_little():
    """Prompts are told apart by a few hashes; of one token over and over, too."""
    rng = random.Random(4)
    one, other = ([rng.randrange(1000) for _ in range(5000)] for _ in range(2))
    assert not Sketch.of(one).marks & Sketch.of(other).marks
    shared = Sketch.of(one).marks & Sketch.of([*other[:77], *one[200:400]]).marks
    assert shared
    assert runs([5] * 5000, other) == []
