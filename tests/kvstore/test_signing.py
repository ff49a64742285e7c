"""Who signed what comes from elsewhere, and what is refused because of it."""

import io
import json
import os
import tarfile

import pytest
from kit import load_beside

import kvstore
from kvstore.cli import cli
from kvstore.cli.failures import run
from kvstore.errors import EntryExistsError, IntegrityError, SignerError
from kvstore.format import bundle as bundles
from kvstore.format.signature import new_secret, public_key, sign, signature_to_bytes
from kvstore.ops.transfer import admit
from kvstore.storage import keys

BLOCK = 16
forging = load_beside("forging")
take, tree, assert_refused = forging.take, forging.tree, forging.assert_refused
stores, small, tiny = forging.stores, forging.small, forging.tiny  # fixtures

ALICE, MALLORY = new_secret(), new_secret()


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """Nobody is trusted yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/kvstore"


def signed(path, secret, ref="doc"):
    """Return the bundle of an entry, signed."""
    file = io.BytesIO()
    with kvstore.Store(path, create=False) as store:
        store.export_bundle(ref, file, secret=secret)
    return file.getvalue()


@pytest.fixture
def sent(stores, small):
    """A store that has the entry `doc`, and another to take it."""
    take(stores[0], small.data)
    return stores


def lose_block(store):
    """Have the index of a store forget a block of the entry `doc`."""
    place, _ = store.chain("doc")[-2]
    with store._blocks.index.transaction():
        store._blocks.index.drop_block(place.hash, place.shard)


def kv(capsys, *args, code=0):
    """Run a verb in this process; return what it printed."""
    assert run(cli, [str(word) for word in args]) == code
    return capsys.readouterr()


def test_the_signer_stays_with_the_entry(sent, small):
    """A signed bundle says who signed it, for as long as the entry is what it was."""
    data = signed(sent[0], ALICE)
    assert take(sent[1], data).signer == public_key(ALICE)
    with kvstore.Store(sent[1], "raw") as store:
        assert store.entry("doc").signer == public_key(ALICE)
        assert store.rename("doc", "other").signer == public_key(ALICE)
        assert store.verify() == []
        store.rename("other", "doc")
    # Who gives it on vouches for it anew, or nobody does.
    assert forging.export(sent[1]) == small.data


def save_grown(store, small, caches, name):
    """Save what an entry holds and three tokens more; return the new entry."""
    rows = caches.random_rows(3, 6, layers=1, heads=1, dim=8)
    cache, _ = store.load_entry("doc", caches.MODEL)
    tokens = [*small.tokens, 1, 2, 3]
    return store.save(tokens, caches.grow(cache, rows), caches.MODEL, name=name)


def test_what_goes_on_from_it_is_not_signed(sent, small, caches):
    """An entry that has grown here is not what was signed."""
    take(sent[1], signed(sent[0], ALICE))
    with kvstore.Store(sent[1], "raw") as store:
        grown = save_grown(store, small, caches, "doc")
    assert grown.signer == ""


def test_rows_of_somebody_else_are_not_called_signed(sent, small, caches):
    """Where the store has other rows of the same tokens, the signature says nothing."""
    rows = caches.random_rows(2 * BLOCK, 9, layers=1, heads=1, dim=8)
    with kvstore.Store(sent[1], "raw") as store:
        store.save(small.tokens[: 2 * BLOCK], caches.grow(None, rows), caches.MODEL)
    assert take(sent[1], signed(sent[0], ALICE)).signer == ""


@pytest.mark.parametrize("name", ["doc", "other"])
@pytest.mark.parametrize("again", [False, True])
def test_rows_that_come_later_are_somebody_elses(sent, small, name, again):
    """A signed entry that lost a block, and gets it from another, is signed no more."""
    take(sent[1], signed(sent[0], ALICE))
    with kvstore.Store(sent[1], "raw") as store:
        lose_block(store)
    take(sent[1], signed(sent[0], ALICE if again else None), name=name)
    with kvstore.Store(sent[1], "raw") as store:
        assert store.entry("doc").signer == (public_key(ALICE) if again else "")
        assert store.verify() == []


def test_what_is_refused_takes_no_signature(sent, small, caches, monkeypatch):
    """Where another process takes the name in the last moment, no block comes."""
    take(sent[1], signed(sent[0], ALICE))
    with kvstore.Store(sent[1], "raw") as store:
        lose_block(store)

        def take_name(*_):
            tokens, cache = caches.make_conversation(1, 7)
            store.save(tokens, cache, caches.MODEL, name="other")

        monkeypatch.setattr(admit, "make_room", take_name)
        with pytest.raises(EntryExistsError):
            take(sent[1], signed(sent[0], None), name="other")
        assert store.entry("doc").signer == public_key(ALICE)


def test_what_was_signed_is_not_recompressed_by_the_way(sent, small, caches):
    """Another entry that shares its blocks leaves them as they are."""
    take(sent[1], signed(sent[0], ALICE))
    with kvstore.Store(sent[1], "raw") as store:
        save_grown(store, small, caches, "longer")
        store.recompress("longer", "turbo4")
        assert store.entry("doc").signer == public_key(ALICE)
        assert {stored.codec for _, stored in store.chain("doc")} == {"raw"}


def parts_of(data):
    """Return the files of a bundle, by their names."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def join(parts):
    found = [forging.member(name, data) for name, data in parts.items()]
    return b"".join(found) + bytes(1024)


@pytest.mark.parametrize("what", ["entry", "shards", "other"])
def test_a_signature_of_something_else_is_refused(sent, what, caches):
    """Whoever changes a bundle, or takes the signature of another, is found out."""
    parts = parts_of(signed(sent[0], ALICE))
    entry = next(name for name in parts if name.startswith("entries/"))
    if what == "entry":
        body = json.loads(parts[entry]) | {"title": "Trust me"}
        parts[entry] = forging.seal(body)
    elif what == "shards":
        rows = caches.random_rows(20, 3, layers=1, heads=1, dim=8)
        with kvstore.Store(sent[0], "raw") as store:
            cache = caches.grow(None, rows)
            store.save(range(20), cache, caches.MODEL, name="doc", replace=True)
        other = parts_of(forging.export(sent[0]))
        signature = {"signature.json": parts["signature.json"]}
        first = {name: other.pop(name) for name in list(other)[:2]}
        parts = first | signature | other
    else:
        signature = sign(ALICE, "remote entry", [])
        parts["signature.json"] = signature_to_bytes(signature)
    assert_refused(sent[1], join(parts), IntegrityError, match="signature of key")


def test_a_bit_of_a_signature_is_not_let_through(stores, tiny, flip_bit):
    """Every bit of the signature's file and of its header counts."""
    take(stores[0], tiny)
    data = signed(stores[0], ALICE)
    begin = data.index(b"signature.json\0")
    end = begin + 512 + len(parts_of(data)["signature.json"])
    before = tree(stores[1])
    for bit in range(begin * 8, end * 8, 13):
        with pytest.raises(kvstore.KVStoreError):
            take(stores[1], flip_bit(data, bit))
    assert tree(stores[1]) == before


def test_a_store_that_asks_for_signatures(sent, small):
    """Nothing comes in unless a trusted key, or one's own, signed it."""
    with kvstore.Store(sent[1]) as store:
        store.set_policy(is_signed_only=True)
    assert_refused(sent[1], small.data, SignerError, match="not signed")
    data = signed(sent[0], MALLORY)
    assert_refused(sent[1], data, SignerError, match="unknown key")
    keys.trust_signer("alice", public_key(ALICE))
    assert_refused(sent[1], data, SignerError, match="unknown key")
    assert take(sent[1], signed(sent[0], ALICE)).signer
    keys.new_signing_key()
    assert take(sent[1], signed(sent[0], keys.signing_key()), name="mine").signer


def test_the_policy_outlives_the_store(sent, small):
    """A store that is made anew where it was deleted asks for signatures too."""
    with kvstore.Store(sent[1]) as store:
        store.set_policy(is_signed_only=True)
        store.set_limit(10**9)
        forging.shutil.rmtree(sent[1])
        assert store.remake()
        assert store.config.is_signed_only
    assert_refused(sent[1], small.data, SignerError)


def test_the_verbs(sent, small, capsys, tmp_path, config):
    """From `key new` to `ls`, and what is said where a signer is another."""
    public = kv(capsys, "key", "new", "-q").out.strip()
    assert os.stat(config / "signing.key").st_mode & 0o777 == 0o600
    assert "there is a key already" in kv(capsys, "key", "new", code=1).err
    bundle = tmp_path / "doc.kvbundle"
    common = ("--store", sent[0], "export", "doc", "-o", bundle)
    kv(capsys, *common, "--sign")
    (config / "signing.key").rename(tmp_path / "moved")
    told = kv(capsys, *common, "--sign", "--overwrite", code=1).err
    assert "`kvstore key new` makes one" in told
    other = ("--store", sent[1])
    take_it = (*other, "import", bundle)
    assert "no signer `alice`" in kv(capsys, *take_it, "--from", "alice", code=1).err
    kv(capsys, "key", "trust", "alice", public_key(ALICE))
    told = kv(capsys, *take_it, "--from", "alice", code=1).err
    assert f"signed by the unknown key {public}, and not by `alice`" in told
    kv(capsys, "key", "trust", "bob", public)
    assert "has another key" in kv(capsys, "key", "trust", "bob", "1" * 64, code=1).err
    assert f"signed by bob, {public}" in kv(capsys, *take_it, "--from", "bob").out
    assert "bob" in kv(capsys, *other, "ls").out
    assert json.loads(kv(capsys, *other, "ls", "--json").out)[0]["signer"] == public
    assert f"signed by bob, {public}" in kv(capsys, *other, "inspect", "doc").out
    assert "alice" in kv(capsys, "key", "show").out
    kv(capsys, "key", "trust", "bob", "--off")
    assert "unknown key" in kv(capsys, *other, "inspect", "doc").out
    assert kv(capsys, *other, "key", "policy", "-q").out == "any\n"
    kv(capsys, *other, "key", "policy", "signed-only")
    told = kv(capsys, *take_it, code=1).err
    assert "takes only what a trusted key signed" in told


def test_a_bundle_that_was_not_signed_is_as_before(small):
    """Without a key, an entry has the one bundle that it always had."""
    assert bundles._SIGNATURE not in parts_of(small.data)
