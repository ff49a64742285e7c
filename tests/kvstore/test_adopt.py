"""Entries are taken over for a model that somebody vouches for, and say so."""

import json
import shutil

import pytest

import kvstore
from kvstore.format.entry import ADOPTED

TOKENS = list(range(100))
OTHER = kvstore.Fingerprint({"weights": "other"}, "other-model")


def saved(path, caches, codec="turbo3", name="x"):
    """Save an entry and return it."""
    with kvstore.Store(path, codec=codec) as store:
        return store.save(TOKENS, caches.make_cache(100, 1), caches.MODEL, name=name)


@pytest.mark.parametrize("name", ["x", None])
def test_what_was_another_model_s_is_this_one_s(store_path, caches, name):
    """The same rows, bits and codecs are found by the new model, and by no other."""
    entry = saved(store_path, caches, name=name)
    with kvstore.Store(store_path) as store:
        before = caches.rows_of(store.load_entry(entry.id, None)[0])
        old = [(b.codec, b.bits, b.digest) for _, b in store.chain(entry.id)]
        adopted = store.adopt(entry.id, OTHER)
        restored, rest = store.load([*TOKENS, 7], OTHER)
        assert rest == [7]
        assert caches.rows_of(restored) == before
        assert [(b.codec, b.bits, b.digest) for _, b in store.chain(adopted.id)] == old
        assert store.entries() == [adopted]
        assert (adopted.name, adopted.created_at) == (name, entry.created_at)
        store.plan_prune(now=True).execute()
        assert store.load([*TOKENS, 7], caches.MODEL) == (None, [*TOKENS, 7])
        assert store.verify(read_data=True) == []


def test_it_says_where_it_is_from_when_it_has_grown(store_path, caches):
    """A later save of the same conversation keeps the note; another one has none."""
    saved(store_path, caches)
    with kvstore.Store(store_path) as store:
        note = store.adopt("x", OTHER).made_with[ADOPTED]
        assert note == f"model-a, fingerprint {caches.MODEL.digest[:12]}"
        cache, _ = store.load_entry("x", OTHER)
        caches.grow(cache, caches.random_rows(9, 2))
        grown = store.save([*TOKENS, *range(9)], cache, OTHER, name="x")
        assert grown.made_with[ADOPTED] == note
        fresh = caches.make_cache(40, 3)
        anew = store.save([9] * 40, fresh, OTHER, name="x", replace=True)
        assert ADOPTED not in anew.made_with


def test_what_is_of_the_model_already_is_refused(store_path, caches):
    """There is nothing to take over."""
    saved(store_path, caches)
    with (
        kvstore.Store(store_path) as store,
        pytest.raises(kvstore.FingerprintError, match="of this model already"),
    ):
        store.adopt("x", caches.MODEL)


def test_adopt_asks_and_inspect_tells(run_cli, tiny_model, tmp_path):
    """It names what differs, takes the entry over, and the model goes on from it."""
    words = ["--prompt", "lorem ipsum " * 30, "--name", "n"]
    assert run_cli("save", "--model", tiny_model, *words)[0] == 0
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 10001.0}))
    code, _, error = run_cli("adopt", "n", "--model", other)
    assert (code, "needs a confirmation" in error) == (2, True)
    code, _, error = run_cli("adopt", "n", "--model", other, "-n")
    assert (code, "rope_theta" in error) == (0, True)
    assert run_cli("adopt", "n", "--model", other, "-y")[0] == 0
    assert f"adopted from {tiny_model}, fingerprint" in run_cli("inspect", "n")[1]
    words = ["--prompt", "go on", "--name", "n", "--max-tokens", "2", "--json"]
    code, said, _ = run_cli("generate", "--model", other, *words)
    assert code == 0
    assert json.loads(said)["num_restored_tokens"] > 300
