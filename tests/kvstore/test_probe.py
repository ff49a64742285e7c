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
from kvstore.models import LoadedModel, save_prompt
from kvstore.models.probe import NUM_TOKENS, compare, log_probabilities
from kvstore.models.session import LiveCache, prefill

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
        with pytest.raises(KVStoreError, match="no numbers"):
            measure(loaded, store, name="doc")
        assert store.entry("doc").probe is None


def test_it_ends_where_the_model_does(open_store):
    """What is said behind the end means nothing."""
    with open_store("turbo4") as store:
        whole = load(ends=range(architectures.VOCABULARY))
        assert 1 == measure(whole, store).probe.num_tokens


def test_it_counts_while_the_blocks_are_the_same(open_store):
    """An entry that grew, or was stored anew, is measured no more."""
    loaded = load()
    with open_store("planes+zstd") as store:
        entry = measure(loaded, store, name="doc")
        assert 0.0 == store.loss("doc").kl
        again, _ = save_prompt(loaded, TOKENS, store=store, name="doc")
        assert entry.probe == again.probe
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


def test_a_bundle_carries_it(open_store, tmp_path):
    """It counts for whoever takes the blocks as they are."""
    with open_store("turbo4+zstd") as store:
        entry = measure(load(), store, name="doc")
        file = io.BytesIO()
        store.export_bundle("doc", file)
    file.seek(0)
    with kvstore.Store(tmp_path / "other") as other:
        other.import_bundle(file)
        assert other.loss("doc").probe == entry.probe


def test_what_has_moved_on_is_not_noted(open_store):
    """It was measured of what the entry was."""
    with open_store("turbo4") as store:
        entry = measure(load(), store, name="doc")
        pinned = store.pin("doc")
        probe = replace(entry.probe, kl=7.0)
        assert pinned == store.note_probe(entry, probe) == store.entry("doc")


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
    kl = f"{entry['probe']['kl']:.2g}"
    assert kl in run_cli("ls")[1].split()


def test_what_is_no_number_is_no_small_loss():
    """The largest of nothing and NaN would be nothing."""
    x = mx.zeros((1, 8))
    for pair in ((x, x * mx.nan), (x * mx.nan, x)):
        with pytest.raises(KVStoreError, match="no numbers"):
            compare(*pair)
