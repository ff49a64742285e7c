"""Generation with a store says what mlx-lm says, and keeps what it computed."""

import subprocess
import sys
import time
from contextlib import closing

import mlx.core as mx
import mlx_lm
import pytest
from kit import save_prompt, stream_generate
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

import kvstore
from kvstore.models.load import LoadedModel
from kvstore.models.session import (
    CacheOptions,
    LiveCache,
    entry_tokens,
    make_empty_cache,
    prefill,
)

PROMPT = [(7 * i) % 250 for i in range(300)]


@pytest.fixture
def store(tmp_path):
    """An empty store that loses nothing."""
    with kvstore.Store(tmp_path / "store", codec="raw") as opened:
        yield opened


def tokens_of(responses):
    """Return the tokens of a reply."""
    return [response.token for response in responses]


def generate(loaded, store, prompt, **options):
    """Return the tokens of a reply, generated with a store."""
    model, tokenizer, fingerprint = loaded
    responses = stream_generate(
        model, tokenizer, prompt, store=store, fingerprint=fingerprint, **options
    )
    return tokens_of(responses)


def save(loaded, store, tokens, **options):
    """Save a prompt; return the entry and how many tokens were restored."""
    model, _, fingerprint = loaded
    return save_prompt(model, tokens, store=store, fingerprint=fingerprint, **options)


def rows(prompt_cache):
    """Return all rows of a prompt cache in one array."""
    # mlx-lm 0.31 has no `keys_and_values`.
    sides = [
        side[:, :, : cache.offset]
        for cache in prompt_cache
        for side in (cache.keys, cache.values)
    ]
    return mx.stack(sides)


def rows_equal(left, right):
    """Say whether two prompt caches hold the same bits."""
    return mx.array_equal(rows(left), rows(right)).item()


def rows_close(left, right):
    """Say whether two prompt caches were computed from the same tokens."""
    return mx.allclose(rows(left), rows(right), atol=1e-3).item()


def test_processors_see_the_whole_prompt(loaded, store):
    """A penalty for what was said counts what was restored, as without a store."""
    seen: list[list[int]] = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    for restored in (False, True):
        seen.clear()
        said = generate(loaded, store, PROMPT, logits_processors=[look], max_tokens=3)
        assert seen[:3] == [[*PROMPT, *said[:n]] for n in range(3)], restored
    assert store.lookup([*PROMPT, 1], loaded[2]).num_tokens == len(PROMPT)


def test_a_reply_is_the_one_of_mlx_lm(loaded, store):
    """With an empty store and with a full one, greedy text is what mlx-lm generates."""
    model, tokenizer, _ = loaded
    expected = tokens_of(mlx_lm.stream_generate(model, tokenizer, PROMPT, 20))
    assert generate(loaded, store, PROMPT, max_tokens=20) == expected
    assert generate(loaded, store, PROMPT, max_tokens=20) == expected


def test_a_second_run_computes_one_token(loaded, store):
    """A prompt that is held whole is restored but for the token that must be fed."""
    model, tokenizer, fingerprint = loaded
    save(loaded, store, PROMPT)
    responses = stream_generate(
        model, tokenizer, PROMPT, store=store, fingerprint=fingerprint, max_tokens=2
    )
    assert [response.prompt_tokens for response in responses] == [1, 1]


def test_text_is_encoded_as_mlx_lm_does(loaded, store):
    """A prompt may be text; the same tokens are looked up and fed."""
    model, tokenizer, _ = loaded
    expected = tokens_of(mlx_lm.stream_generate(model, tokenizer, "some text", 5))
    assert generate(loaded, store, "some text", max_tokens=5) == expected
    assert entry_tokens(store, "x") is None
    (entry,) = store.entries()
    assert entry.num_tokens == len("some text") + 5


def test_what_is_saved_is_what_was_said(loaded, store):
    """The entry holds prompt and reply, and its rows are those of a prefill."""
    model, _, fingerprint = loaded
    said = generate(loaded, store, PROMPT, max_tokens=9, name="chat")
    assert entry_tokens(store, "chat", fingerprint) == PROMPT + said
    restored, tokens = store.load_entry("chat", fingerprint)
    again = prefill(model, PROMPT)
    for token in said:
        model(mx.array([[token]]), cache=again)
    assert tokens == PROMPT + said
    assert rows_equal(restored, again)


def test_the_end_of_a_reply_is_saved_too(loaded, store):
    """The token that ends a reply is fed by mlx-lm, so its rows are kept."""
    _, tokenizer, _ = loaded
    end = next(iter(tokenizer.eos_token_ids))
    said = generate(
        loaded, store, PROMPT, name="chat", sampler=lambda logprobs: mx.array([end])
    )
    assert said == [end]
    assert entry_tokens(store, "chat") == [*PROMPT, end]


def test_a_prefill_is_measured(loaded, store, monkeypatch):
    """How long the model took is noted; what the disk took is not counted."""
    _, _, fingerprint = loaded
    save_blocks = kvstore.Store.save_blocks

    def slowly(*args, **options):
        time.sleep(1)
        return save_blocks(*args, **options)

    monkeypatch.setattr(kvstore.Store, "save_blocks", slowly)
    begin = time.perf_counter()
    save(loaded, store, PROMPT, prefill_step_size=150)
    elapsed = time.perf_counter() - begin
    seconds = store.speeds(fingerprint).prefill_s(len(PROMPT))
    assert elapsed > 2
    assert 0 < seconds <= elapsed - 2
    # A restored prompt leaves too little to measure.
    generate(loaded, store, [*PROMPT, 1], max_tokens=1)
    assert store.speeds(fingerprint).prefill_s(len(PROMPT)) == seconds


def test_a_consumer_may_stop(loaded, store):
    """What was said before the generator was closed is kept, and no more."""
    model, tokenizer, fingerprint = loaded
    said = []
    responses = stream_generate(
        model, tokenizer, PROMPT, store=store, fingerprint=fingerprint, name="chat"
    )
    with closing(responses):
        for response in responses:
            said.append(response.token)
            if len(said) == 5:
                break
    assert entry_tokens(store, "chat") == PROMPT + said
    store.load_entry("chat", fingerprint)


@pytest.fixture
def interrupt(monkeypatch):
    """A function that has the N-th update of a layer interrupted.

    That comes between a cache's offset and its rows.
    """
    update = KVCache.update_and_fetch
    calls = []

    def arm(stop):
        def update_or_interrupt(self, keys, values):
            calls.append(1)
            if len(calls) == stop:
                self.offset += keys.shape[2]
                raise KeyboardInterrupt
            return update(self, keys, values)

        monkeypatch.setattr(KVCache, "update_and_fetch", update_or_interrupt)

    return arm


@pytest.mark.parametrize("stop", range(1, 13))
def test_an_interrupt_never_saves_a_row_that_is_not_there(
    loaded, store, interrupt, monkeypatch, stop
):
    """Ctrl-C between any two updates of the cache keeps right rows only."""
    kept = []

    def check(tokens, prompt_cache, fingerprint, *, name, **_):
        exact = prefill(loaded[0], tokens)
        offsets = [cache.offset for cache in prompt_cache]
        kept.append((list(tokens), offsets, name, rows_close(prompt_cache, exact)))

    interrupt(stop)
    monkeypatch.setattr(store, "save", check)
    with pytest.raises(KeyboardInterrupt):
        generate(loaded, store, PROMPT, prefill_step_size=100, name="chat")
    for tokens, offsets, name, are_right in kept:
        assert are_right
        assert offsets == [len(tokens)] * 2
        assert tokens[: len(PROMPT)] == PROMPT[: len(tokens)]
        assert name == ("chat" if len(tokens) >= len(PROMPT) else None)
    assert bool(kept) == (stop > 2)


def test_an_interrupted_window_is_not_saved(loaded, store, monkeypatch):
    """What cannot be cut back to the last whole row is not kept."""
    monkeypatch.setattr(
        "kvstore.models.session.make_prompt_cache",
        lambda model, _: [RotatingKVCache(512) for _ in model.layers],
    )

    def stop(done, total):
        if done >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(
            loaded, store, PROMPT, prefill_step_size=100, prompt_progress_callback=stop
        )
    assert store.entries() == []


def test_an_interrupted_prefill_is_taken_up(loaded, store):
    """After Ctrl-C in a prefill the same command goes on from what is kept."""

    def stop(done, total):
        if done >= 200:
            raise KeyboardInterrupt

    options = {"name": "doc", "prefill_step_size": 100}
    with pytest.raises(KeyboardInterrupt):
        save(loaded, store, PROMPT, prompt_progress_callback=stop, **options)
    assert entry_tokens(store, "doc") is None
    entry, num_restored = save(loaded, store, PROMPT, **options)
    assert (entry.num_tokens, num_restored) == (300, 200)


def test_an_error_saves_nothing(loaded, store):
    """When the model fails, its rows may be anything: none are kept."""

    def fail(logprobs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        generate(loaded, store, PROMPT, sampler=fail)
    assert store.entries() == []


def test_prefill_has_the_boundaries_of_mlx_lm(loaded):
    """The rows are those that `mlx_lm.cache_prompt` computes, bit for bit."""
    from mlx_lm.generate import generate_step

    model = loaded[0]
    expected = make_prompt_cache(model)
    for _ in generate_step(
        mx.array(PROMPT),
        model,
        max_tokens=0,
        prompt_cache=expected,
        prefill_step_size=64,
    ):
        pass
    assert rows_equal(prefill(model, PROMPT, prefill_step_size=64), expected)


def test_a_restored_prefix_gives_the_bits_of_an_unbroken_run(loaded, store):
    """Restoring all but one token and feeding that is what `generate_step` does."""
    model, _, fingerprint = loaded
    save(loaded, store, PROMPT)
    restored, rest = store.load(PROMPT, fingerprint)
    assert rows_equal(prefill(model, rest, restored), prefill(model, PROMPT))


def test_a_taken_name_is_refused_before_the_prefill(loaded, store):
    """A name that another conversation has is refused while nothing is computed."""
    save(loaded, store, PROMPT, name="doc")
    computed = []
    with pytest.raises(kvstore.EntryExistsError):
        save(
            loaded, store, PROMPT[::-1], name="doc",
            prompt_progress_callback=lambda done, total: computed.append(done),
        )  # fmt: skip
    assert computed == []
    save(loaded, store, PROMPT[::-1], name="doc", replace=True)
    assert entry_tokens(store, "doc") == PROMPT[::-1]


def test_a_name_is_another_models(loaded, store, other_model):
    """The same tokens under the same name, computed by another model, are refused."""
    save(loaded, store, PROMPT, name="doc")
    other = kvstore.models.load.load_model(str(other_model))
    with pytest.raises(kvstore.EntryExistsError):
        save(other, store, PROMPT, name="doc")
    with pytest.raises(kvstore.FingerprintError, match="weights"):
        entry_tokens(store, "doc", other[2])


@pytest.mark.parametrize("name", ["", "-x", "a\nb", "x" * 201])
def test_a_bad_name_is_refused_before_the_prefill(loaded, store, name):
    """A name that cannot be typed is refused while nothing is computed."""
    with pytest.raises(ValueError, match="a name has"):
        save(loaded, store, PROMPT, name=name, prompt_progress_callback=None)
    assert store.entries() == []


def test_an_id_is_no_name(loaded, store):
    """The start of an id does not stand for a name where a name is asked for."""
    entry, _ = save(loaded, store, PROMPT)
    assert entry_tokens(store, entry.id[:6]) is None


def test_an_unknown_class_is_refused_before_the_prefill(loaded, store, monkeypatch):
    """A model whose caches cannot be stored is refused with the layer's number."""

    class Subclass(KVCache):
        pass

    caches = [KVCache(), Subclass()]
    monkeypatch.setattr("kvstore.models.session.make_prompt_cache", lambda *_: caches)
    with pytest.raises(kvstore.UnsupportedCacheError, match="layer 1 "):
        save(loaded, store, PROMPT)
    assert caches[0].offset == 0


KILLED = """
import os, sys
import mlx.core as mx
from mlx_lm import load
import kvstore
from kvstore.models import Callbacks, LoadedModel, PrefillOptions, save_prompt

folder, path, stop, signal = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
fingerprint = kvstore.Fingerprint.from_path(folder)
model = LoadedModel(*load(folder)[:2], fingerprint)

def progress(done, total):
    print(done, flush=True)
    if done >= stop:
        if signal == "kill":
            os.kill(os.getpid(), 9)
        raise KeyboardInterrupt

with kvstore.Store(path) as store:
    prompt = [i % 90 + 3 for i in range(4000)]
    save_prompt(
        model, prompt, store=store, name="long", prefilling=PrefillOptions(400),
        callbacks=Callbacks(on_prefill=progress),
    )
"""


@pytest.mark.parametrize("signal", ["kill", "interrupt"])
@pytest.mark.parametrize(
    "stop",
    [1200, *(pytest.param(n, marks=pytest.mark.slow) for n in (400, 2000, 2800, 3999))],
)
def test_a_stopped_prefill_goes_on_where_it_was_stored(
    tiny_model, tmp_path, signal, stop
):
    """After kill -9 or Ctrl-C, the next save computes only what was not stored."""
    path = tmp_path / "store"
    arguments = [sys.executable, "-c", KILLED, tiny_model, path]
    stopped = subprocess.run([*arguments, str(stop), signal], capture_output=True)
    assert stopped.returncode != 0
    with kvstore.Store(path) as store:
        assert store.verify() == []
        assert [entry.name for entry in store.entries() if entry.name] == []
    again = subprocess.run(
        [*arguments, "99999", "-"], capture_output=True, check=True, text=True
    )
    computed = max(int(line) for line in again.stdout.split())
    # A step that was killed before its callback ended was not stored yet.
    stored = stop if signal == "interrupt" else stop - 400
    assert computed <= 4000 - stored // 256 * 256
    with kvstore.Store(path) as store:
        assert store.entry("long").num_tokens == 4000
        assert store.verify() == []


@pytest.mark.parametrize(
    ("kv_bits", "cache_class"),
    [("turbo3", "TurboQuantKVCache"), (4, "QuantizedKVCache")],
)
def test_a_quantized_live_cache_is_kept_as_its_codes(
    loaded, store, kv_bits, cache_class
):
    """A run with `kv_bits` is resumed with the codes it had, and says the same."""
    model, tokenizer, fingerprint = loaded[:3]

    def say(prompt, max_tokens):
        responses = stream_generate(
            model,
            tokenizer,
            prompt,
            store=store,
            fingerprint=fingerprint,
            kv_bits=kv_bits,
            kv_group_size=32,
            max_tokens=max_tokens,
        )
        return [response.token for response in responses]

    first = say(PROMPT, 8)
    longer = [*PROMPT, *first, 5]
    assert store.lookup(longer, fingerprint).num_tokens == 0  # no codes unasked
    options = CacheOptions(kv_bits=kv_bits, kv_group_size=32)
    like = make_empty_cache(LoadedModel(*loaded[:3]), options)
    assert store.lookup(longer, fingerprint, like=like).num_tokens >= len(PROMPT)
    entry = store.entries()[0]
    cache, tokens = store.load_entry(entry.id, fingerprint)
    assert {type(layer).__name__ for layer in cache} == {cache_class}
    # A new process would restore the same and go on alike.
    again = say([*PROMPT, *first], 4)
    assert len(again) == 4
    assert tokens == [*PROMPT, *first][: len(tokens)]


def test_a_recurrent_model_is_resumed_at_the_end_of_the_prompt(store, caches):
    """Where the reply is rendered otherwise, the prompt's own state is still found."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent / "architectures.py"
    spec = importlib.util.spec_from_file_location("kvstore_tests_architectures", path)
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    model = architectures.make_model("falcon_h1")
    prompt = [i % 50 + 3 for i in range(40)]
    save_prompt(model, prompt, store=store, fingerprint=caches.MODEL)
    match = store.lookup([*prompt[:-1], 1, 2, 3], caches.MODEL)
    assert match.num_tokens == 39
    entry, restored = save_prompt(
        model, [*prompt[:-1], 1, 2, 3], store=store, fingerprint=caches.MODEL
    )
    assert (entry.num_tokens, restored) == (42, 39)


# Draft models.


@pytest.fixture(scope="module")
def drafts(loaded, small_model, other_model):
    """Draft models by how well they guess."""
    others = {"sometimes right": small_model, "never right": other_model}
    models = {kind: mlx_lm.load(str(path))[0] for kind, path in others.items()}
    return {"always right": loaded[0], **models}


KINDS = ("always right", "sometimes right", "never right")


def parts(loaded, draft, prompt_cache):
    """Return each model with its part of a prompt cache."""
    num_layers = len(loaded[0].layers)
    return (
        (loaded[0], prompt_cache[:num_layers]),
        (draft, prompt_cache[num_layers:]),
    )


def are_whole(loaded, draft, prompt_cache, tokens):
    """Say whether both models' rows are those of these tokens."""
    return all(
        [cache.offset for cache in part] == [len(tokens)] * len(part)
        and rows_close(part, prefill(model, tokens))
        for model, part in parts(loaded, draft, prompt_cache)
    )


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model_changes_no_token(loaded, store, drafts, kind, num_draft_tokens):
    """Greedy text is that of the model alone, from an empty store and from a full."""
    options = {"draft_model": drafts[kind], "num_draft_tokens": num_draft_tokens}
    model, tokenizer, _ = loaded
    expected = tokens_of(mlx_lm.stream_generate(model, tokenizer, PROMPT, 20))
    for _ in range(2):
        assert generate(loaded, store, PROMPT, max_tokens=20, **options) == expected


@pytest.mark.parametrize("num_said", range(1, 10))
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_draft_model_takes_part_in_is_whole(
    loaded, store, drafts, kind, num_said
):
    """Wherever the consumer stops, both models' rows of all that was said are saved."""
    model, tokenizer, fingerprint = loaded
    said = []
    responses = stream_generate(
        model,
        tokenizer,
        PROMPT[:40],
        store=store,
        fingerprint=fingerprint,
        name="chat",
        draft_model=drafts[kind],
        num_draft_tokens=3,
    )
    with closing(responses):
        for response in responses:
            said.append(response.token)
            if len(said) == num_said:
                break
    restored, tokens = store.load_entry("chat", fingerprint)
    assert tokens == PROMPT[:40] + said
    assert are_whole(loaded, drafts[kind], restored, tokens)


@pytest.mark.parametrize("num_said", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_may_have_its_last_token_anywhere(
    loaded, store, drafts, kind, num_said
):
    """The most tokens allowed may be reached by a guess, or by the model itself."""
    said = generate(
        loaded, store, PROMPT[:40], name="chat", draft_model=drafts[kind],
        num_draft_tokens=3, max_tokens=num_said,
    )  # fmt: skip
    restored, tokens = store.load_entry("chat", loaded[2])
    assert tokens == PROMPT[:40] + said
    assert len(said) == num_said
    assert are_whole(loaded, drafts[kind], restored, tokens)


@pytest.mark.parametrize("stop", range(1, 60, 3))
@pytest.mark.parametrize("kind", ["always right", "sometimes right"])
def test_an_interrupt_with_a_draft_model_saves_right_rows_only(
    loaded, store, drafts, interrupt, monkeypatch, kind, stop
):
    """Ctrl-C between any two updates of either model's caches keeps right rows only."""
    kept = []
    prompt = PROMPT[:60]

    def keep(tokens, prompt_cache, fingerprint, *, name, **_):
        kept.append((list(tokens), prompt_cache, name))

    interrupt(stop)
    monkeypatch.setattr(store, "save", keep)
    with pytest.raises(KeyboardInterrupt):
        generate(
            loaded, store, prompt, prefill_step_size=20, name="chat", max_tokens=30,
            draft_model=drafts[kind], num_draft_tokens=3,
        )  # fmt: skip
    monkeypatch.undo()
    for tokens, prompt_cache, name in kept:
        assert are_whole(loaded, drafts[kind], prompt_cache, tokens)
        assert tokens[: len(prompt)] == prompt[: len(tokens)]
        assert name == ("chat" if len(tokens) >= len(prompt) else None)
    assert kept or stop < 6


def test_a_long_prompt_is_stored_as_it_goes_with_a_draft_model(loaded, store, drafts):
    """Steps of both models are told, stored, and may be the last."""
    options = {"draft_model": drafts["sometimes right"], "prefill_step_size": 256}
    prompt = PROMPT * 3
    seen = []

    def note(done, total):
        seen.append((done, total))
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(loaded, store, prompt, prompt_progress_callback=note, **options)
    assert seen == [(0, 900), (256, 900), (512, 900)]
    model, tokenizer, fingerprint = loaded
    responses = stream_generate(
        model, tokenizer, prompt, store=store, fingerprint=fingerprint, max_tokens=1,
        **options,
    )  # fmt: skip
    assert [response.prompt_tokens for response in responses] == [900 - 512]


def test_no_limit_is_none_with_a_draft_model(loaded, store, drafts):
    """A reply without a limit ends where the consumer stops."""
    model, tokenizer, fingerprint = loaded
    responses = stream_generate(
        model, tokenizer, PROMPT, store=store, fingerprint=fingerprint, max_tokens=-1,
        draft_model=drafts["sometimes right"],
    )  # fmt: skip
    with closing(responses):
        assert len([next(responses) for _ in range(40)]) == 40


@pytest.mark.parametrize("kv_bits", ["turbo3", 4])
def test_caches_of_both_models_are_quantized(loaded, store, drafts, kv_bits):
    """With `kv_bits`, model and draft model keep codes, and are resumed with them."""
    options = {
        "draft_model": drafts["sometimes right"],
        "kv_bits": kv_bits,
        "kv_group_size": 32,
    }
    said = generate(loaded, store, PROMPT, max_tokens=9, name="chat", **options)
    restored, tokens = store.load_entry("chat", loaded[2])
    (kind,) = {type(cache).__name__ for cache in restored}
    assert kind == ("TurboQuantKVCache" if kv_bits == "turbo3" else "QuantizedKVCache")
    assert [cache.offset for cache in restored] == [len(PROMPT) + 9] * 3
    assert tokens == PROMPT + said
    assert len(generate(loaded, store, [*tokens, 5], max_tokens=4, **options)) == 4


def test_a_prompt_is_saved_for_both_models(loaded, store, drafts):
    """`save_prompt` computes the draft model's rows too."""
    draft = drafts["sometimes right"]
    entry, num_restored = save(loaded, store, PROMPT, draft_model=draft, name="doc")
    assert (entry.num_tokens, num_restored) == (300, 0)
    restored, _ = store.load_entry("doc", loaded[2])
    assert are_whole(loaded, draft, restored, PROMPT)


def test_a_window_takes_no_draft_model(loaded, store, drafts, monkeypatch):
    """Guesses cannot be taken back from a window, which mlx-lm would not tell."""
    monkeypatch.setattr(
        "kvstore.models.session.make_prompt_cache",
        lambda model, *_: [RotatingKVCache(512) for _ in model.layers],
    )
    with pytest.raises(kvstore.UnsupportedCacheError, match="layer 0 is a Rotating"):
        generate(loaded, store, PROMPT, draft_model=drafts["always right"])


@pytest.mark.parametrize("kv_bits", ["turbo3", 4])
def test_codes_of_one_run_are_no_rows_of_another(loaded, store, tmp_path, kv_bits):
    """A run without `kv_bits` says what it says where nobody used `kv_bits` before."""
    prompt = [*PROMPT, 5, 6]
    generate(loaded, store, PROMPT, max_tokens=8, kv_bits=kv_bits, kv_group_size=32)
    empty = make_empty_cache(LoadedModel(*loaded))
    assert store.lookup(prompt, loaded[2], like=empty).num_tokens == 0
    mixed = generate(loaded, store, prompt, max_tokens=8)
    with kvstore.Store(tmp_path / "fresh", "planes+zstd") as fresh:
        assert generate(loaded, fresh, prompt, max_tokens=8) == mixed


# Live caches.


def test_a_live_cache_goes_on_without_the_disk(loaded, store, monkeypatch):
    """What a live cache holds is neither restored nor computed."""
    live = LiveCache()
    said = generate(loaded, store, PROMPT, max_tokens=5, live=live)
    assert live.tokens == PROMPT + said
    monkeypatch.setattr(store, "load", None)
    model, tokenizer, fingerprint = loaded
    responses = stream_generate(
        model, tokenizer, [*live.tokens, 7, 8], store=store, fingerprint=fingerprint,
        max_tokens=3, live=live,
    )  # fmt: skip
    assert {response.prompt_tokens for response in responses} == {2}
    assert len(live.tokens) == 310
    assert rows_close(live.prompt_cache, prefill(model, live.tokens))


def test_a_live_cache_is_cut_where_the_prompt_leaves_it(loaded, store, monkeypatch):
    """Rows behind the first token that differs are dropped, those before are kept."""
    live = LiveCache()
    generate(loaded, store, PROMPT, max_tokens=5, live=live)
    monkeypatch.setattr(store, "load", None)
    expected = prefill(loaded[0], [*PROMPT[:200], 9, 9])
    entry, num_held = save(loaded, store, [*PROMPT[:200], 9, 9], live=live)
    assert (entry.num_tokens, num_held) == (202, 200)
    assert live.tokens == [*PROMPT[:200], 9, 9]
    assert rows_close(live.prompt_cache, expected)


def test_a_live_cache_that_holds_all_is_fed_a_token(loaded, store):
    """To generate, the last token is fed again; to save, nothing is."""
    live = LiveCache()
    said = generate(loaded, store, PROMPT, max_tokens=5, live=live)
    held = list(live.tokens)
    assert save(loaded, store, held, live=live)[1] == len(held)
    expected = generate(loaded, store, held, max_tokens=3)
    assert generate(loaded, store, held, max_tokens=3, live=live) == expected
    assert live.tokens == PROMPT + said + expected


def test_a_live_cache_of_another_kind_is_left(loaded, store):
    """Rows of another class of cache are not gone on from."""
    live = LiveCache()
    generate(loaded, store, PROMPT, max_tokens=5, live=live)
    generate(loaded, store, PROMPT, max_tokens=5, live=live, kv_bits="turbo4")
    assert {type(cache).__name__ for cache in live.prompt_cache} == {
        "TurboQuantKVCache"
    }


def test_a_failed_run_leaves_no_live_cache(loaded, store):
    """When the model fails, its rows may be anything: the next run asks the store."""
    live = LiveCache()
    generate(loaded, store, PROMPT, max_tokens=5, live=live)

    def fail(logprobs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        generate(loaded, store, [*live.tokens, 7], sampler=fail, live=live)
    assert (live.tokens, live.prompt_cache) == ([], [])


def test_a_reply_that_cannot_be_saved_stays_in_memory(loaded, store, monkeypatch):
    """When the disk is full, the live cache holds what was said."""
    live = LiveCache()

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save", fail)
    with pytest.raises(OSError, match="No space"):
        generate(loaded, store, PROMPT, max_tokens=5, live=live)
    assert len(live.tokens) == 305


# Stopping.


def stop_after(num):
    """Return a function that says at its N-th call, and after, that it is enough."""
    calls = []

    def should_stop():
        calls.append(1)
        return len(calls) >= num

    return should_stop


@pytest.fixture(scope="module")
def windowed_or_recurrent():
    """Models by what their caches forget."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent / "architectures.py"
    spec = importlib.util.spec_from_file_location("kvstore_tests_architectures", path)
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    kinds = ("falcon_h1", "gemma3_text", "recurrent_gemma")
    return {kind: architectures.make_model(kind) for kind in kinds}


@pytest.mark.parametrize("num", range(1, 8))
@pytest.mark.parametrize("kind", ["falcon_h1", "gemma3_text", "recurrent_gemma"])
def test_any_model_may_be_stopped_between_steps(
    loaded, store, caches, windowed_or_recurrent, kind, num
):
    """A stop in the prompt or in the reply keeps windows and states as they were."""
    model, tokenizer = windowed_or_recurrent[kind], loaded[1]
    prompt = [(3 * i) % 100 + 3 for i in range(60)]

    def say(prompt, **options):
        responses = stream_generate(
            model, tokenizer, prompt, store=store, fingerprint=caches.MODEL,
            prefill_step_size=20, **options,
        )  # fmt: skip
        return tokens_of(responses)

    expected = tokens_of(
        mlx_lm.stream_generate(model, tokenizer, prompt, 12, prefill_step_size=20)
    )
    said = say(prompt, should_stop=stop_after(num), name="chat")
    # Asked before the prompt, behind its first two steps, and behind each token.
    assert said == expected[: max(0, num - 4)]
    held = [60 + len(said)] if said else [20 * (num - 1)] if num < 4 else [59]
    assert [entry.num_tokens for entry in store.entries()] == [n for n in held if n]
    assert [entry.name for entry in store.entries() if entry.name] == (
        ["chat"] if said else []
    )
    restored = store.lookup([*prompt, *said, 5], caches.MODEL).num_tokens
    assert restored == held[0]
    assert said + say([*prompt, *said], max_tokens=12 - len(said)) == expected


def test_half_a_question_of_a_live_conversation_is_no_entry(loaded, store):
    """Its blocks are stored, and what is computed stays in the live cache."""
    live = LiveCache()
    options = {"prefill_step_size": 256, "live": live}
    said = generate(
        loaded, store, PROMPT * 2, name="chat", should_stop=stop_after(2), **options
    )
    assert said == []
    assert store.entries() == []
    assert live.tokens == (PROMPT * 2)[:256]
    assert store.lookup(PROMPT * 2, loaded[2]).num_tokens == 256
