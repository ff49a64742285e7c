"""Generation with a store says what mlx-lm says, and keeps what it computed."""

import subprocess
import sys
from contextlib import closing

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

import kvstore
from kvstore.generate import entry_tokens, prefill, save_prompt, stream_generate

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

    def check(tokens, prompt_cache, fingerprint, *, name, replace, progress):
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
        "kvstore.generate.make_prompt_cache",
        lambda model: [RotatingKVCache(512) for _ in model.layers],
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
    other = kvstore.model.load_model(str(other_model))
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
    monkeypatch.setattr("kvstore.generate.make_prompt_cache", lambda model: caches)
    with pytest.raises(kvstore.UnsupportedCacheError, match="layer 1 "):
        save(loaded, store, PROMPT)
    assert caches[0].offset == 0


KILLED = """
import os, sys
import mlx.core as mx
from mlx_lm import load
import kvstore
from kvstore import generate

folder, path, stop, signal = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
model, tokenizer = load(folder)[:2]
fingerprint = kvstore.Fingerprint.from_path(folder)

def progress(done, total):
    print(done, flush=True)
    if done >= stop:
        if signal == "kill":
            os.kill(os.getpid(), 9)
        raise KeyboardInterrupt

with kvstore.Store(path) as store:
    prompt = [i % 90 + 3 for i in range(4000)]
    generate.save_prompt(
        model, prompt, store=store, fingerprint=fingerprint, name="long",
        prefill_step_size=400, prompt_progress_callback=progress,
    )
"""


@pytest.mark.parametrize("signal", ["kill", "interrupt"])
@pytest.mark.parametrize("stop", [400, 1200, 2000, 2800, 3999])
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
    match = store.lookup([*PROMPT, *first, 5], fingerprint)
    assert match.num_tokens >= len(PROMPT)
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
