"""`verify --recompute`: what a model computes anew, against what is stored of it."""

import json
import random
from dataclasses import replace

import mlx.core as mx
import pytest
from kit import load_beside

import kvstore
from kvstore.cli import cli
from kvstore.cli.failures import run
from kvstore.models.load import load_models
from kvstore.models.recompute import _error, count_quantized, recompute
from kvstore.models.session import prefill
from kvstore.storage.folder import create_folder

TOKENS = random.Random(3).choices(range(256), k=150)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_models(str(tiny_model))


def fill(path, model, codec, computed_from=TOKENS):
    """Save what a model computes of some tokens as that of others."""
    cache = prefill(model.model, computed_from, prefill_step_size=31)
    with kvstore.Store(path, codec) as store:
        store.save(TOKENS, cache, model.fingerprint, name="doc")


def look(path, model, num_blocks=6):
    with kvstore.Store(path) as store:
        return recompute(store, model, num_blocks, progress=lambda done, total: None)


@pytest.mark.parametrize("codec", ["raw", "planes+zstd", "turbo4", "turbo2"])
def test_what_the_model_computed_is_right(store_path, model, codec):
    """Other steps and lossy codes are no forgery; each block is looked at once."""
    fill(store_path, model, codec)
    found = look(store_path, model)
    assert len({one.block for one in found}) == len(found) == 6
    assert all(one.is_right for one in found)
    assert len(look(store_path, model, 100)) == 10


@pytest.mark.parametrize("codec", ["raw", "turbo2"])
def test_rows_of_other_tokens_are_found(store_path, model, codec):
    """Rows under tokens that they were not computed from are found, digests or not."""
    other = [(token * 7 + 11) % 256 for token in TOKENS]
    fill(store_path, model, codec, other)
    with kvstore.Store(store_path) as store:
        assert store.verify() == []
    found = look(store_path, model)
    assert not any(one.is_right for one in found)
    assert {one.finding.kind for one in found} == {"foreign-rows"}


def test_rows_that_are_no_numbers_are_found(store_path, model):
    """A NaN in the last layer is no smaller than what the others differ by."""
    cache = prefill(model.model, TOKENS, prefill_step_size=31)
    cache[-1].values = cache[-1].values * float("nan")
    with kvstore.Store(store_path, "raw") as store:
        store.save(TOKENS, cache, model.fingerprint, name="doc")
    assert not any(one.is_right for one in look(store_path, model))


@pytest.mark.parametrize("num_foreign", [0, 1])
def test_one_foreign_row_among_many_is_found(num_foreign):
    """All rows together differ by less than rounding may; the row alone does not."""
    mx.random.seed(1)
    wanted = mx.random.normal((1, 2, 256, 8))
    rows = wanted * 1.01
    rows[:, :, 100 : 100 + num_foreign] = mx.random.normal((1, 2, num_foreign, 8))
    assert (_error((rows, 0), (wanted, 0), 0, 256) > 0.1) == bool(num_foreign)


@pytest.fixture(scope="module")
def recurrent(model):
    """A model that has states and no rows."""
    made = load_beside("architectures").make_model("mamba", vocab_size=260)
    return replace(model, model=made)


def save_states(path, model, tokens):
    """Save what a model has read of some tokens as that of others, in two turns."""
    with kvstore.Store(path, "raw") as store:
        for stop in (80, len(TOKENS)):
            cache = prefill(model.model, tokens[:stop])
            store.save(TOKENS[:stop], cache, model.fingerprint, name="doc")


def test_a_state_is_compared_at_the_end_of_its_entry(store_path, recurrent):
    """What lies in the middle is counted."""
    save_states(store_path, recurrent, TOKENS)
    found = look(store_path, recurrent, 100)
    assert all(one.is_right for one in found)
    assert {one.start for one in found if one.has_unseen_state} == {64}


def test_a_state_of_other_tokens_is_found(store_path, recurrent):
    """It shows in the last block, and in no other."""
    save_states(store_path, recurrent, TOKENS[::-1])
    found = look(store_path, recurrent, 100)
    assert {one.start for one in found if not one.is_right} == {144}


def test_entries_of_codes_are_counted(store_path, model):
    """Rows that mlx-lm has quantized are not those that the model computes."""
    cache = prefill(model.model, TOKENS)
    with kvstore.Store(store_path, "raw") as store:
        coded = [layer.to_quantized(group_size=32, bits=8) for layer in cache]
        store.save(TOKENS, coded, model.fingerprint, name="coded")
        assert count_quantized(store, model) == 1
        store.save(TOKENS[:50], prefill(model.model, TOKENS[:50]), model.fingerprint)
        assert count_quantized(store, model) == 1
    assert all(one.is_right for one in look(store_path, model, 100))


def test_where_the_tokens_part_the_rows_do(store_path, model):
    """Of tokens that begin alike, the blocks before the change are right."""
    fill(store_path, model, "raw", [*TOKENS[:80], *TOKENS[:70]])
    found = look(store_path, model, 10)
    assert {one.start for one in found if one.is_right} == set(range(0, 80, 16))


def test_a_store_without_this_model_is_said_so(store_path, model, caches):
    """Nothing is drawn from what another model made."""
    with kvstore.Store(store_path, "raw") as store:
        store.save(range(40), caches.make_cache(40), caches.MODEL, name="other")
    with pytest.raises(kvstore.KVStoreError, match="no entry that this model made"):
        look(store_path, model)


def test_the_verb(tmp_path, tiny_model, model, capsys):
    """`verify --recompute N` names what is wrong, and exits with 1."""
    path = create_folder(tmp_path / "store", 16).path
    words = ("--store", path, "verify", "--recompute", 3, "--model", tiny_model)
    fill(path, model, "raw")
    assert run(cli, list(map(str, words))) == 0
    told = capsys.readouterr()
    assert "nothing is wrong" in told.out
    assert "3 blocks computed anew: they differ by" in told.err
    with kvstore.Store(path, "raw") as store:
        cache = prefill(model.model, TOKENS[::-1])
        store.remove("doc")
        store.purge()
        store.save(TOKENS, cache, model.fingerprint, name="doc")
    assert run(cli, list(map(str, (*words, "--json")))) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [one["kind"] for one in findings] == ["foreign-rows"] * 3
    assert all((path / one["path"]).exists() for one in findings)
