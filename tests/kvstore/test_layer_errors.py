"""Lossy blocks tell how far their rows are from those that were given, by layer."""

import json

import kit
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import kvstore
from kvstore.caches.layer_errors import _relative_error, known_errors
from kvstore.cli import cli
from kvstore.format.block import LayerError
from kvstore.ops.quality import join_errors

caches = kit.load_beside("caches")
fitted = kit.load_beside("test_fit_store")
NUM_BLOCKS = 18
TOKENS = list(range(NUM_BLOCKS * caches.BLOCK + 3))


def told(store, entry):
    """Return what the blocks of an entry tell."""
    return join_errors(stored for _, stored in store.chain(entry.id))


def true_errors(exact, found, start=0):
    """Return the errors of rows from some token on, by layer and side."""
    errors = {}
    for number, pair in enumerate(zip(exact, found, strict=True)):
        for name in ("keys", "values"):
            x, y = (
                np.array(getattr(one, name).astype(mx.float32))[..., start:-3, :]
                for one in pair
            )
            size = np.linalg.norm(x)
            errors[number, name[0]] = np.linalg.norm(y - x) / size
    return errors


@pytest.fixture
def open_small(store_path):
    """Return what opens a store of small blocks with a codec."""
    return lambda codec: kvstore.Store(store_path, codec=codec)


@pytest.mark.parametrize("codec", ["turbo3", "turbo4+zstd", "turbo8v4"])
def test_a_sample_tells_what_all_rows_lost(open_small, codec):
    """Of keys and values in every layer; rows of one layer may be larger."""
    rows = caches.random_rows(len(TOKENS), 0, layers=3, heads=4, dim=128)
    rows[1] *= 50
    with open_small(codec) as store:
        given = caches.grow(None, rows)
        found = told(store, store.save(TOKENS, given, caches.MODEL, name="doc"))
        loaded, _ = store.load_entry("doc", caches.MODEL)
    assert (NUM_BLOCKS, 2) == (found.num_lossy, found.num_measured)
    for layer, side, error in found.layers:
        assert error == pytest.approx(true_errors(given, loaded)[layer, side], rel=0.15)
    assert 6 == len(found.layers)


def test_what_is_lossless_tells_nothing(open_small):
    """Neither do tails, which lose nothing in any codec."""
    with open_small("planes+zstd") as store:
        entry = store.save(TOKENS, caches.make_cache(len(TOKENS)), caches.MODEL)
        assert not told(store, entry).layers
        assert all(not stored.errors for _, stored in store.chain(entry.id))


@pytest.mark.parametrize("value", [mx.nan, mx.inf, 1e30])
def test_a_block_with_broken_rows_tells_nothing(open_small, value):
    """What it said of other layers would be taken for all."""
    rows = caches.random_rows(len(TOKENS), 0, dtype=mx.float32)
    rows[1, 1, ..., 7, :] = value
    with open_small("turbo4") as store:
        entry = store.save(TOKENS, caches.grow(None, rows), caches.MODEL)
        blocks = [stored for _, stored in store.chain(entry.id)]
    told = {number for number, block in enumerate(blocks) if block.errors}
    assert told == ({0, 16} if value == 1e30 else {16})


def test_rows_of_zeros_that_are_not_stored_so_are_no_small_error():
    """Nothing divided by nothing is told as nothing only where it is."""
    zeros, ones = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
    assert 0.0 == _relative_error(zeros, zeros)
    assert (LayerError(0, "k", 0.5),) == known_errors([LayerError(0, "k", 0.5)])
    broken = LayerError(1, "k", _relative_error(zeros, ones))
    assert () == known_errors([LayerError(0, "k", 0.5), broken])


def test_an_error_does_not_depend_on_the_order_of_numbers():
    """Machines add up in different orders, and name shards alike."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        x = random.standard_normal((4, 4, 32)).astype(np.float32)
        y = x + np.float32(0.09) * random.standard_normal(x.shape).astype(np.float32)
        order = random.permutation(x.size)
        turned = (each.ravel()[order] for each in (x, y))
        assert _relative_error(x, y) == _relative_error(*turned)


def test_an_entry_that_is_recompressed_tells_it(tmp_path, monkeypatch):
    """And one of a basis, whose codec takes keys and values together."""
    monkeypatch.setattr("kvstore.codecs.fitting.RATES", ("3",))
    with kvstore.Store(tmp_path / "store", "planes+zstd") as store:
        for seed in range(4):
            tokens = [(seed + 1) * 1000 + i for i in range(600)]
            given = fitted.fitted_cache(600, seed)
            entry = store.save(tokens, given, fitted.MODEL)
        basis = store.calibrate().basis
        done = store.recompress(entry.id, f"fit3@{basis}+zstd")
        found = told(store, done)
        loaded, _ = store.load_entry(done.id, fitted.MODEL)
    exact, rows = fitted.rows_of(given), fitted.rows_of(loaded)
    assert 2 * fitted.LAYERS == len(found.layers)
    mean = np.mean([one.error for one in found.layers])
    assert mean == pytest.approx(fitted.relative_error(exact, rows), rel=0.5)


def test_inspect_says_it(open_small):
    """In words, and each layer in JSON."""
    with open_small("turbo4+zstd") as store:
        store.save(TOKENS, caches.make_cache(len(TOKENS)), caches.MODEL, name="doc")
        expected = told(store, store.entry("doc"))

    def run(*words):
        words = ["--store", str(store.path), "inspect", "doc", *words]
        return CliRunner().invoke(cli, words, env={"COLUMNS": "200"}).stdout

    assert "of their size (at most " in run()
    assert "measured in 2 of 18 lossy blocks" in run()
    found = json.loads(run("--json"))["errors"]
    assert (2, 18) == (found["num_measured"], found["num_lossy"])
    assert [tuple(one.values()) for one in found["layers"]] == list(expected.layers)
