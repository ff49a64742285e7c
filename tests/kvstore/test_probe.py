"""`save --measure`: what is stored of an entry is held against what was computed."""

import io
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import blake3
import kit
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import kvstore
from kvstore.errors import IntegrityError, KVStoreError
from kvstore.format.documents import canonical_json
from kvstore.format.entry import entry_to_bytes, parse_entry
from kvstore.format.probe import Probe
from kvstore.models import LoadedModel, calibrate, save_prompt
from kvstore.models.probe import NUM_TOKENS, compare, log_probabilities
from kvstore.models.session import CacheOptions, LiveCache, prefill
from kvstore.ops.transfer import export_bundle

architectures = kit.load_beside("architectures")
TOKENS = [(7 * i) % architectures.VOCABULARY for i in range(300)]
FINGERPRINT = kvstore.Fingerprint({"weights": "a"}, "a")


def load(name="llama", *, ends=(), **changes):
    """Return a model whose replies end at some tokens."""
    model = architectures.make_model(name, **changes)
    tokenizer = SimpleNamespace(
        eos_token_ids=set(ends),
        has_chat_template=False,
        decode=lambda tokens, **_: "",
    )
    return LoadedModel(model, tokenizer, FINGERPRINT, None)


def measure(loaded, store, tokens=TOKENS, **options):
    """Save tokens, measure the entry, and return it."""
    steps = []
    entry, _ = save_prompt(
        loaded,
        tokens,
        store=store,
        measure=lambda done, total: steps.append((done, total)),
        **options,
    )
    assert (NUM_TOKENS, NUM_TOKENS) == steps[-1]
    return entry


@pytest.fixture
def open_store(tmp_path):
    """Return what opens the store with a codec."""
    return lambda codec: kvstore.Store(tmp_path / "store", codec=codec)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2", "qwen3_next"])
def test_what_loses_nothing_changes_nothing(open_store, name):
    """Of caches that grow, of windows, and of states."""
    with open_store("planes+zstd") as store:
        found = measure(load(name), store)
        assert store.loss(found.id).probe == found.probe
    assert (0.0, 1.0, NUM_TOKENS) == (
        found.probe.kl,
        found.probe.same_choice,
        found.probe.num_tokens,
    )


def test_it_is_what_the_stored_rows_change(open_store):
    """The same as is found by hand; more with fewer bits."""
    loaded, found = load(), {}
    for codec in ("turbo2", "turbo4"):
        with open_store(codec) as store:
            entry = measure(loaded, store, name=codec, tokens=[len(codec), *TOKENS])
        found[codec] = entry.probe.kl
    assert found["turbo2"] > found["turbo4"] > 0


def test_by_hand(open_store):
    """The tokens are drawn from what the model says behind its own rows."""
    loaded = load()
    with open_store("turbo3") as store:
        entry = measure(loaded, store)
        stored, _ = store.load_entry(entry.id, FINGERPRINT)
    exact = prefill(loaded.model, TOKENS[:-1], make_prompt_cache(loaded.model))
    logits, losses = log_probabilities(loaded.model, exact, TOKENS[-1:]), []
    for number in range(NUM_TOKENS):
        token = int(mx.random.categorical(logits[0], key=mx.random.key(number)))
        logits, coded = (
            log_probabilities(loaded.model, held, [token]) for held in (exact, stored)
        )
        losses.append(compare(logits, coded)[0])
    assert entry.probe.kl == pytest.approx(np.mean(losses), rel=0.02)


def test_lossy_rows_are_computed_anew(open_store):
    """Else what was lost before would be lost on both sides."""
    loaded = load()
    with open_store("turbo2") as store:
        save_prompt(loaded, TOKENS, store=store)
        _, restored = save_prompt(loaded, [*TOKENS, 1], store=store)
        assert restored > 0
        _, restored = save_prompt(
            loaded, [*TOKENS, 2], store=store, measure=lambda *_: None
        )
        assert 0 == restored


def test_what_is_no_number_is_not_noted(open_store):
    """The entry stays, and nothing is said of it."""
    loaded = load()
    loaded.model.lm_head.weight *= float("nan")
    with open_store("turbo4") as store:
        with pytest.raises(KVStoreError, match="`doc` is saved, and was not measured"):
            measure(loaded, store, name="doc")
        assert store.entry("doc").probe is None


def test_it_goes_on_past_the_end_of_a_reply(open_store):
    """Few tokens would tell little: those that end it are not drawn."""
    with open_store("turbo4") as store:
        whole = load(ends=range(2, architectures.VOCABULARY))
        assert NUM_TOKENS == measure(whole, store).probe.num_tokens


def test_it_ends_with_the_context_of_the_model(open_store):
    """What is said behind that means nothing; where little is left, it is refused."""
    with open_store("turbo4") as store:
        loaded = replace(load(), context_length=320)
        entry, _ = save_prompt(loaded, TOKENS, store=store, measure=lambda *_: None)
        assert 20 == entry.probe.num_tokens
        with pytest.raises(KVStoreError, match="made for 320 tokens"):
            measure(loaded, store, [*TOKENS, *range(20)])
        assert 1 == len(store.entries())


def test_codes_are_not_measured_against_themselves(open_store):
    """A live cache that keeps codes is no measure of what was lost."""
    with open_store("raw") as store:
        for bits in ("turbo4", 4):
            options = CacheOptions(kv_bits=bits, kv_group_size=32)
            with pytest.raises(ValueError, match="in codes cannot be measured"):
                measure(load(head_dim=32), store, cache=options)
        assert [] == store.entries()


def test_an_entry_that_changes_meanwhile_is_not_measured(open_store):
    """Neither is what another process has put in its place."""
    loaded = load()
    with open_store("turbo4") as store:

        def take_name(done, total):
            if done == 5:
                store.rename("doc", "other")

        with pytest.raises(KVStoreError, match="is saved, and was not measured"):
            save_prompt(loaded, TOKENS, store=store, name="doc", measure=take_name)
        assert store.entry("other").probe is None


def test_it_counts_while_the_blocks_are_the_same(open_store):
    """An entry that grew, or was stored anew, is measured no more."""
    loaded = load()
    with open_store("planes+zstd") as store:
        entry = measure(loaded, store, name="doc")
        assert 0.0 == store.loss("doc").kl
        other = store.rename("doc", "first")
        assert entry.probe == other.probe
        shared = measure(loaded, store, [*TOKENS, 5], name="doc")
        store.recompress("doc", "turbo2")
        assert store.entry("doc").probe is None
        # It shares blocks with what was recompressed.
        assert store.entry("first").probe == entry.probe
        assert store.loss("first").probe is None
        assert shared.probe
        grown, _ = save_prompt(loaded, [*TOKENS, 6, 7], store=store, name="first")
        assert grown.probe is None


def test_it_lets_an_entry_be_loaded(open_store):
    """Where nothing else was measured; what was counts where it is worse."""
    with open_store("turbo2") as store:
        entry = measure(load(), store, name="doc")
        store.load_entry("doc", FINGERPRINT, max_kl=entry.probe.kl)
        with pytest.raises(KVStoreError, match="worse rows"):
            store.load_entry("doc", FINGERPRINT, max_kl=entry.probe.kl * 0.99)
        loss = store.loss("doc")
        known = SimpleNamespace(kl=entry.probe.kl * 2)
        assert known.kl == replace(loss, unknown="", worst=known).kl
        known.kl = 0.0
        assert entry.probe.kl == replace(loss, unknown="", worst=known).kl


@pytest.mark.parametrize("is_forged", [False, True])
def test_a_bundle_does_not_carry_it(open_store, tmp_path, monkeypatch, is_forged):
    """It would be the word of anybody."""
    with open_store("turbo4+zstd") as store:
        entry = measure(load(), store, name="doc")

        def keep_probe(entry, nbytes, real=export_bundle.bundled_entry):
            return replace(real(entry, nbytes), probe=entry.probe)

        if is_forged:
            monkeypatch.setattr(export_bundle, "bundled_entry", keep_probe)
        file = io.BytesIO()
        store.export_bundle("doc", file)
    assert is_forged == (b'"probe"' in file.getvalue())
    file.seek(0)
    with kvstore.Store(tmp_path / "other") as other:
        assert other.import_bundle(file).probe is None
        assert other.entry("doc").tip == entry.tip


def test_what_has_moved_on_is_not_noted(open_store):
    """It was measured of what the entry was."""
    with open_store("turbo4") as store:
        entry = measure(load(), store, name="doc")
        store.pin("doc")
        with pytest.raises(KVStoreError, match="changed meanwhile"):
            store.note_probe(entry, replace(entry.probe, kl=7.0))
        assert entry.probe == store.entry("doc").probe


def test_what_is_measured_is_not_held(open_store):
    """Its rows grow while it is measured."""
    with open_store("raw") as store, pytest.raises(ValueError, match="held live"):
        measure(load(), store, live=LiveCache())


PROBE = asdict(Probe(0.1, 0.5, 64, "ab" * 32))


@pytest.mark.parametrize(
    "probe",
    [
        [],
        {},
        "x",
        {**PROBE, "more": 1},
        {**PROBE, "kl": -0.1},
        {**PROBE, "kl": True},
        {**PROBE, "kl": 10**400},
        {**PROBE, "same_choice": 1.5},
        {**PROBE, "num_tokens": 0},
        {**PROBE, "num_tokens": 1.5},
        {**PROBE, "blocks": "ab"},
        {**PROBE, "blocks": None},
    ],
    ids=str,
)
def test_one_that_cannot_be_is_refused(open_store, probe):
    """An entry that says such things of itself is damaged, whatever its digest."""
    with open_store("raw") as store:
        entry, _ = save_prompt(load(), TOKENS[:20], store=store)
    path = store.path / "entries" / f"{entry.id}.json"
    body = json.loads(entry_to_bytes(entry)) | {"probe": probe}
    del body["digest"]
    digest = blake3.blake3(canonical_json(body)).hexdigest()
    with pytest.raises(IntegrityError):
        parse_entry(path, canonical_json(body | {"digest": digest}))


def test_the_command_says_it(run_cli, tiny_model, monkeypatch):
    """When it is saved, in `inspect`, and in JSON."""
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--model", str(tiny_model), "--name", "doc", "--codec", "turbo2"]
    status, out, _ = run_cli("save", *words, "--measure", "all of it " * 60)
    assert 0 == status
    assert "that the model said behind it" in out
    assert "that the model said behind it" in run_cli("inspect", "doc")[1]
    entry = json.loads(run_cli("inspect", "doc", "--json")[1])["entry"]
    assert entry["probe"]["kl"] > 0
    # What is saved anew is measured anew, or not at all.
    again = run_cli("save", *words, "all of it " * 60)
    assert "that the model said behind it" not in again[1]


def test_what_a_model_rules_out_costs_nothing():
    """Its probability is zero on both sides, and no NaN."""
    x = mx.array([[0.0, -mx.inf, 0.0]]) - mx.log(2)
    y = mx.array([[0.0, -mx.inf, 1.0]])
    y = y - mx.logsumexp(y)
    kl, _ = compare(x, y)
    assert kl == pytest.approx(float((mx.exp(x) * (x - y))[0, ::2].sum()))
    assert not compare(x, x)[0].any()


def test_a_codec_that_gives_no_numbers_is_not_measured(monkeypatch):
    """The others are."""
    real = calibrate._load

    def load_broken(path):
        prompt_cache = real(path)
        if "turbo2" in path.name:
            prompt_cache[0].keys = prompt_cache[0].keys * mx.nan
        return prompt_cache

    monkeypatch.setattr(calibrate, "_load", load_broken)
    monkeypatch.setattr(calibrate, "PREFIX", 280)
    model, codecs = load().model, ["turbo2", "turbo4", "turbo8"]
    found = calibrate.measure(model, [TOKENS], codecs, [], lambda *_: None)
    assert ["turbo4", "turbo8"] == [one.codec for one in found]


def test_what_is_no_number_is_no_small_loss():
    """The largest of nothing and NaN would be nothing."""
    x = mx.zeros((1, 8))
    assert np.isinf(compare(x, x * mx.nan)[0]).all()
    with pytest.raises(KVStoreError, match="no numbers"):
        compare(x * mx.nan, x)
