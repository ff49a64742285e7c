"""Encrypted stores: what lies on disk, what opens it, and what does not."""

import io
import json
import os
import shutil
import stat
from types import SimpleNamespace

import pytest
from kit import load_beside

import kvstore
from kvstore.cli import cli
from kvstore.cli.failures import run
from kvstore.errors import IntegrityError, KeyNotFoundError, KVStoreError
from kvstore.format.entry import entry_id
from kvstore.remote.remotes import make_remote
from kvstore.storage import vault
from kvstore.storage.blocks import BlockStore
from kvstore.storage.folder import create_folder, open_folder
from kvstore.storage.index import Score

BLOCK = 16
NAME, TITLE = "clandestine", "Whispered at midnight"
TOKENS = [8_123_457 + 7 * number for number in range(5 * BLOCK + 3)]
forging = load_beside("forging")
bits_of, export, take = forging.bits_of, forging.export, forging.take


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """An empty encrypted store of small blocks, to be copied, and its key's file."""
    home = tmp_path_factory.mktemp("made")
    key = home / "key"
    create_folder(home / "store", BLOCK, vault.keep_by_file(vault.new_key(), key))
    return home / "store", key


@pytest.fixture
def path(made, tmp_path):
    """An empty encrypted store."""
    return shutil.copytree(made[0], tmp_path / "sealed")


def fill(path, caches, tokens=TOKENS, name=NAME, **options):
    """Save a conversation, and return its prompt cache."""
    cache = caches.make_cache(len(tokens), 3)
    with kvstore.Store(path, "raw") as store:
        store.save(tokens, cache, caches.MODEL, name=name, title=TITLE, **options)
    return cache


def told(path, cache):
    """Return what of a conversation can be found in any file of a folder, and where."""
    entry = entry_id(NAME, "")
    row = bits_of(cache)[0][2]
    words = {NAME.encode(), TITLE.encode(), entry.encode(), bytes.fromhex(entry)}
    words |= {str(token).encode() for token in TOKENS}
    words |= {
        token.to_bytes(8, order) for token in TOKENS for order in ("big", "little")
    }
    rows = {row[i : i + 24] for i in range(0, len(row), 1000)}
    words |= {part for part in rows if any(part)}
    with kvstore.Store(path) as store:
        for place, _ in store.chain(NAME):
            words |= {bytes(place.hash), place.hash.hex().encode()}
        found = store.entry(NAME)
        words |= {found.root.encode(), bytes.fromhex(found.root)}
        digest = store.fingerprint_of(NAME).digest
        words |= {digest.encode(), bytes.fromhex(digest)}
        # While it is open, with its write-ahead log.
        files = [file for file in path.rglob("*") if file.is_file()]
        names = b"\n".join(str(file).encode() for file in files)
        data = [(file, file.read_bytes()) for file in files] + [("names", names)]
    return {(file, word) for file, octets in data for word in words if word in octets}


def test_no_byte_of_the_folder_tells_anything(path, store_path, caches):
    """No token, name, title, hash or row is in any file; in the clear, all are."""
    cache = fill(path, caches)
    fill(store_path, caches)
    with kvstore.Store(path) as store:
        store.load([*TOKENS, 1], caches.MODEL)
        store.note_prefill(caches.MODEL, 100, 1.0)
        store.notes.add_request(Score(b"asked", "", NAME, *[1] * 7, TITLE, 1, 1.0, 1.0))
        store.pin(NAME)
        assert store.scores()[0].model == NAME
    assert told(path, cache) == set()
    shown = {word for _, word in told(store_path, cache)}
    first = TOKENS[0]
    for word in (NAME.encode(), TITLE.encode(), str(first).encode()):
        assert word in shown
    assert any(len(word) == 24 for word in shown)


def test_a_first_token_is_not_told_by_the_index(path, caches):
    """Two first tokens of the same parent differ, and the number is not the token."""
    fill(path, caches)
    blocks = BlockStore(open_folder(path))
    rows = blocks.index._execute("SELECT first_token FROM blocks", ())
    blocks.close()
    assert not {token for (token,) in rows} & set(TOKENS)
    assert len(set(rows)) == len(rows) == 6


def test_what_is_loaded_is_what_was_saved(path, caches):
    """Rows come back to the bit, whole, by a prefix, and for a prompt that parts."""
    cache = fill(path, caches)
    with kvstore.Store(path) as store:
        assert [entry.name for entry in store.entries()] == [NAME]
        assert store.entry(entry_id(NAME, "")[:8]).title == TITLE
        whole, _ = store.load_entry(NAME, caches.MODEL)
        part, rest = store.load([*TOKENS[:40], 5, 6], caches.MODEL)
        assert store.verify(read_data=1.0) == []
    assert bits_of(whole) == bits_of(cache)
    assert rest == [5, 6]
    assert part[0].offset == 40


def test_one_block_is_read_without_the_others(path, caches):
    """A prefix is restored though what follows cannot be decrypted."""
    fill(path, caches)
    (shard,) = path.glob("shards/*/*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # of the last block
    shard.chmod(0o600)
    shard.write_bytes(data)
    with kvstore.Store(path) as store:
        part, _ = store.load(TOKENS[: 4 * BLOCK + 1], caches.MODEL)
        assert part[0].offset == 4 * BLOCK
        with pytest.raises(IntegrityError, match="does not match its digest"):
            store.load_entry(NAME, caches.MODEL)
        kinds = {finding.kind for finding in store.verify(read_data=1.0)}
    assert "damaged-block" in kinds


def test_every_flipped_bit_is_found(path, caches, flip_bit):
    """Of a shard and of an entry no bit can change unnoticed."""
    fill(path, caches, TOKENS[: BLOCK + 1])
    (shard,), (entry,) = path.glob("shards/*/*"), path.glob("entries/*")
    for file in (shard, entry):
        good = file.read_bytes()
        step = max(1, len(good) * 8 // 31)
        for bit in range(0, len(good) * 8, step):
            flip_bit(file, bit)
            with kvstore.Store(path) as store:
                assert store.verify(read_data=1.0)
            file.chmod(0o600)
            file.write_bytes(good)


def test_parts_of_other_shards_do_not_open(path, caches, tmp_path):
    """A block, an entry or a shard in the place of another is damage."""
    fill(path, caches, TOKENS[:BLOCK])
    fill(path, caches, [TOKENS[0] + 1, *TOKENS[1:BLOCK]], name="other")
    one, two = sorted(path.glob("shards/*/*"))
    first, second = sorted(path.glob("entries/*"))
    data = first.read_bytes()
    second.write_bytes(data)
    # Of two blocks that are as long, in shards of one key.
    size = len(one.read_bytes())
    assert size == len(two.read_bytes())
    mixed = one.read_bytes()[: size // 2] + two.read_bytes()[size // 2 :]
    one.chmod(0o600)
    one.write_bytes(mixed)
    with kvstore.Store(path) as store:
        kinds = [finding.kind for finding in store.verify(read_data=1.0)]
    assert {"damaged-entry", "damaged-block"} <= set(kinds)


@pytest.fixture
def forgotten(monkeypatch):
    """What this process knows of keys is forgotten."""
    monkeypatch.setattr(vault, "_known", {})


def test_without_its_key_nothing_is_read_and_nothing_is_lost(
    path, made, caches, forgotten, tmp_path, monkeypatch
):
    """A key that is gone, or another's, is said so; with the right one all is there."""
    cache = fill(path, caches)
    before = forging.tree(path)
    for text in (None, "00" * 32, "no key", ""):
        vault._known.clear()
        file = tmp_path / "given"
        if text is not None:
            file.write_text(text)
        monkeypatch.setenv("KVSTORE_KEY_FILE", str(file))
        with pytest.raises(KeyNotFoundError, match="key"):
            kvstore.Store(path, create=False)
        with pytest.raises(KeyNotFoundError):
            kvstore.Store(path)
    assert forging.tree(path) == before
    monkeypatch.delenv("KVSTORE_KEY_FILE")
    with kvstore.Store(path) as store:
        assert bits_of(store.load_entry(NAME, caches.MODEL)[0]) == bits_of(cache)


def test_a_bundle_goes_in_and_out(path, store_path, caches):
    """Bundles are the same whatever the store; on its disk none is in the clear."""
    cache = fill(store_path, caches)
    data = export(store_path, NAME)
    take(path, data)
    assert told(path, cache) == set()
    assert export(path, NAME) == data
    with kvstore.Store(path) as store:
        assert store.verify(read_data=1.0) == []


def test_a_bundle_on_its_way_in_is_sealed(path, store_path, caches, monkeypatch):
    """What is staged of a bundle, before it is seen, is sealed already."""
    from kvstore.ops.transfer import import_bundle as importing

    cache = fill(store_path, caches)
    seen = []

    def look(*args, **options):
        staged = list(path.glob("tmp/*"))
        row = bits_of(cache)[0][2][:24]
        octets = b"".join(file.read_bytes() for file in staged)
        seen.append((len(staged), row in octets, str(TOKENS[0]).encode() in octets))
        return original(*args, **options)

    original = importing.admit
    monkeypatch.setattr(importing, "admit", look)
    take(path, export(store_path, NAME))
    assert seen == [(1, False, False)]


@pytest.mark.parametrize("change", ["short", "long", "other", "under its own name"])
def test_a_bundle_that_lies_is_refused(path, store_path, caches, change, flip_bit):
    """A shard that is not what its name says is refused, and leaves nothing."""
    fill(store_path, caches)
    manifest, (shard,) = forging.unpack(export(store_path, NAME))
    digest = manifest["shards"][0]["name"]
    shard = {
        "short": shard[:-1],
        "long": shard + b"\0",
        "other": flip_bit(shard, 8 * len(shard) - 3),
        "under its own name": flip_bit(shard, 8 * len(shard) - 3),
    }[change]
    if change == "under its own name":
        digest = forging.shard_name(shard)
    name = forging.bundles.shard_member(digest)
    data = b"".join([*forging.heads(manifest), forging.member(name, shard)])
    forging.assert_refused(path, data + bytes(1024), IntegrityError)


@pytest.mark.parametrize("is_base_sealed", [True, False])
def test_a_base_may_be_of_the_other_kind(path, store_path, caches, is_base_sealed):
    """What is copied from it is sealed, or opened, on the way."""
    base, own = (path, store_path) if is_base_sealed else (store_path, path)
    cache = fill(base, caches)
    with kvstore.Store(own, base=base) as store:
        restored, _ = store.load_entry(NAME, caches.MODEL)
        store.save(TOKENS, restored, caches.MODEL, name=NAME)
    with kvstore.Store(own) as store:
        assert bits_of(store.load_entry(NAME, caches.MODEL)[0]) == bits_of(cache)
        assert store.verify(read_data=1.0) == []
    assert is_base_sealed or told(own, cache) == set()


def test_housekeeping_works(path, caches):
    """Prune, rename, pin, remove for good and repair do what they do elsewhere."""
    cache = fill(path, caches)
    fill(path, caches, [9, *TOKENS], name="other")
    with kvstore.Store(path) as store:
        store.rename("other", "another")
        store.pin(NAME)
        traces = store.traces_of("another")
        store.remove("another")
        store.purge(traces)
        assert len(list(path.glob("shards/*/*"))) == 1
        (entry,) = path.glob("entries/*")
        entry.write_bytes(b"damaged")
        assert {finding.kind for finding in store.repair()} == {"damaged-entry"}
        assert store.entry(NAME).pinned
        store.close()
    (path / "index.sqlite").write_bytes(b"damaged")
    with kvstore.Store(path) as store:
        assert bits_of(store.load_entry(NAME, caches.MODEL)[0]) == bits_of(cache)
        assert store.verify(read_data=1.0) == []


def test_a_store_that_is_made_anew_is_encrypted_too(path, caches):
    """Where it was deleted, what is saved next is not in the clear."""
    cache = fill(path, caches)
    with kvstore.Store(path, "raw") as store:
        shutil.rmtree(path)
        assert store.remake()
        store.save(TOKENS, cache, caches.MODEL, name=NAME)
    assert told(path, cache) == set()


def test_the_same_shard_is_written_once(path, caches):
    """The same blocks give the same bytes, so that equal shards have equal names."""
    fill(path, caches)
    names = [shard.name for shard in path.glob("shards/*/*")]
    with kvstore.Store(path) as store:
        store.remove(NAME)
        store.purge()
    assert not list(path.glob("shards/*/*"))
    fill(path, caches)
    assert [shard.name for shard in path.glob("shards/*/*")] == names


def test_a_remote_is_refused(path, caches):
    """What lies in a remote is in the clear, so an encrypted store has none."""
    fill(path, caches)
    there = make_remote("there", str(path.parent / "there"), {})
    with kvstore.Store(path) as store:
        for use in (lambda: store.remotes.push(NAME), lambda: store.remotes.add(there)):
            with pytest.raises(KVStoreError, match="in the clear"):
                use()
    assert not (path.parent / "there").exists()


def test_a_release_that_knows_no_keys_refuses_it(path):
    """Its format has another number, so nobody takes it for a damaged store."""
    assert json.loads((path / "config.json").read_bytes())["format"] == 2


def kv(capsys, *args, code=0):
    """Run a verb in this process; return what it printed."""
    assert run(cli, [str(word) for word in args]) == code
    return capsys.readouterr()


def test_init_does_not_take_the_store_of_another_for_encrypted(
    tmp_path, capsys, monkeypatch
):
    """One that another process makes while a passphrase is typed is in the clear."""
    store, keep = tmp_path / "store", vault.keep_by_file

    def keep_slowly(*arguments):
        create_folder(store)
        return keep(*arguments)

    monkeypatch.setattr(vault, "keep_by_file", keep_slowly)
    words = ("--store", store, "init", "--encrypt", "--key-file", tmp_path / "key")
    assert "there is a store already" in kv(capsys, *words, code=1).err


def test_init_keeps_the_key_in_a_file(tmp_path, capsys, forgotten):
    """`init --encrypt --key-file` makes a store that only that file opens."""
    key, store = tmp_path / "key", tmp_path / "store"
    make = ("--store", store, "init", "--encrypt", "--key-file", key)
    out = kv(capsys, *make)
    assert "the key is kept by a file" in out.out
    assert "the data is lost" in out.err
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    assert "there is a store already" in kv(capsys, *make, code=1).err
    other = ("--store", tmp_path / "other", "init", "--key-file", key)
    assert "go with" in kv(capsys, *other, code=2).err
    told = kv(capsys, *other, "--encrypt", code=1).err
    assert "there is a file already" in told
    key.unlink()
    vault._known.clear()
    told = kv(capsys, "--store", store, "ls", code=1).err
    assert "its key cannot be read" in told
    assert "$KVSTORE_KEY_FILE" in told


@pytest.mark.parametrize("refused", ["foreign", "file"])
def test_a_folder_that_is_refused_leaves_no_key_file(
    tmp_path, capsys, forgotten, refused
):
    """What no store was made for needs no key."""
    key, store = tmp_path / "key", tmp_path / "store"
    if refused == "foreign":
        store.mkdir()
        (store / "letter.txt").write_text("mine")
    else:
        store.write_text("mine")
    make = ("--store", store, "init", "--encrypt", "--key-file", key)
    assert "choose" in kv(capsys, *make, code=10).err
    assert not key.exists()


def other_config(path, store_path, names):
    """Put the configuration of a store in the clear over an encrypted one's."""
    for name in names:
        shutil.copy(store_path / name, path / name)


def files_of(path):
    """Return all files of a store but those of the index."""
    found = (p for p in path.rglob("*") if p.is_file())
    return {p: p.read_bytes() for p in found if "index" not in p.name}


CONFIGS = ("config.json", "config.copy.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_keys_are_refused(path, store_path, caches, capsys, name):
    """One plain configuration beside the right one: nothing is opened or repaired."""
    fill(path, caches)
    good = (path / name).read_bytes()
    other_config(path, store_path, [name])
    before = files_of(path)
    for verb in (["ls"], ["verify", "--repair"], ["prune", "--now"]):
        told = kv(capsys, "--store", path, *verb, code=1).err
        assert "different keys" in told
        assert "delete the one" in told
    assert files_of(path) == before
    (path / name).unlink()  # as the hint says
    with kvstore.Store(path) as store:
        assert store.load_entry(NAME, caches.MODEL)[1] == TOKENS
        store.repair()
    assert (path / name).read_bytes() == good


def test_a_repair_without_the_key_takes_nothing_away(path, store_path, caches):
    """Both copies are plain: what is encrypted stays until the right ones are back."""
    fill(path, caches)
    good = {name: (path / name).read_bytes() for name in CONFIGS}
    other_config(path, store_path, CONFIGS)
    before = files_of(path)
    with kvstore.Store(path, "raw") as store:
        assert store.load([*TOKENS, 7], caches.MODEL)[0] is None
        assert {found.kind for found in store.repair()} >= {"newer-format"}
        store.plan_prune(now=True).execute()
    assert files_of(path) == before
    for name, data in good.items():
        (path / name).write_bytes(data)
    with kvstore.Store(path) as store:
        assert store.load_entry(NAME, caches.MODEL)[1] == TOKENS
        store.repair()
        assert store.verify() == []


def test_a_repair_with_a_strange_key_takes_nothing_away(path, store_path, caches):
    """Both copies of a store in the clear are those of an encrypted one."""
    with kvstore.Store(store_path, "raw") as store:
        tokens, cache = caches.make_conversation(3, 1)
        store.save(tokens, cache, caches.MODEL, name="plain")
    good = {name: (store_path / name).read_bytes() for name in CONFIGS}
    other_config(store_path, path, CONFIGS)
    before = files_of(store_path)
    with kvstore.Store(store_path, "raw") as store:
        assert {found.kind for found in store.repair()} >= {"newer-format"}
        store.plan_prune(now=True).execute()
    assert files_of(store_path) == before
    for name, data in good.items():
        (store_path / name).write_bytes(data)
    with kvstore.Store(store_path) as store:
        assert store.load_entry("plain", caches.MODEL)[1] == tokens


def test_a_key_in_the_keychain(tmp_path, forgotten, monkeypatch):
    """The keychain gives the key back; without it, nothing opens."""
    import keyring.errors

    held = {}
    chain = SimpleNamespace(
        errors=keyring.errors,
        set_password=lambda *where_and_what: held.update([(1, where_and_what)]),
        get_password=lambda *where: held[1][2] if held[1][:2] == where else None,
    )
    monkeypatch.setattr(vault, "_keyring", lambda: chain)
    key = vault.new_key()
    kept = vault.keep_by_keychain(key)
    vault._known.clear()
    assert vault.unlock(kept) == key
    vault._known.clear()
    held[1] = ("kvstore", "another", key.hex())
    with pytest.raises(KeyNotFoundError):
        vault.unlock(kept)


def test_a_key_for_an_age_identity(tmp_path, forgotten, monkeypatch):
    """Only the identity of the recipient opens it."""
    pyrage = pytest.importorskip("pyrage")
    mine, other = (pyrage.x25519.Identity.generate() for _ in range(2))
    key = vault.new_key()
    kept = vault.keep_by_recipient(key, str(mine.to_public()))
    vault._known.clear()
    with pytest.raises(KeyNotFoundError, match="no age identity"):
        vault.unlock(kept)
    file = tmp_path / "identity"
    monkeypatch.setenv("KVSTORE_IDENTITY", str(file))
    file.write_text(f"# created\n{other}\n")
    with pytest.raises(KeyNotFoundError):
        vault.unlock(kept)
    file.write_text(f"# created\n{mine}\n")
    assert vault.unlock(kept) == key
    with pytest.raises(KVStoreError, match="no age recipient"):
        vault.keep_by_recipient(key, "age1nobody")


def test_where_nobody_can_be_asked_for_a_passphrase(tmp_path, capsys, monkeypatch):
    """One line says how to give it, and no store is made."""
    monkeypatch.delenv("KVSTORE_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    store = ("--store", tmp_path / "store", "init", "--encrypt")
    assert "`$KVSTORE_PASSPHRASE` gives it" in kv(capsys, *store, code=1).err
    assert not (tmp_path / "store").exists()


@pytest.mark.slow  # to try a passphrase takes seconds, on purpose
def test_a_key_under_a_passphrase(tmp_path, capsys, forgotten, monkeypatch):
    """`init --encrypt` alone asks for a passphrase, and only that one opens it."""
    store = ("--store", tmp_path / "store")
    monkeypatch.setenv("KVSTORE_PASSPHRASE", "correct horse")
    assert "kept by a passphrase" in kv(capsys, *store, "init", "--encrypt").out
    vault._known.clear()
    monkeypatch.setenv("KVSTORE_PASSPHRASE", "wrong horse")
    assert "Decryption failed" in kv(capsys, *store, "ls", code=1).err
    monkeypatch.delenv("KVSTORE_PASSPHRASE")
    assert "no passphrase was given" in kv(capsys, *store, "ls", code=1).err
    monkeypatch.setenv("KVSTORE_PASSPHRASE", "correct horse")
    assert kv(capsys, *store, "ls", "--json").out == "[]\n"


def test_a_shell_that_completes_asks_for_no_passphrase(tmp_path, monkeypatch):
    """Names of a store that is shut are not offered, and nobody has to answer."""
    import click

    from kvstore.cli.options import complete_entries

    kept = {"method": "passphrase", "check": "0" * 64, "wrapped": "00"}
    with pytest.raises(KeyNotFoundError):
        create_folder(tmp_path / "store", BLOCK, kept)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    asked = []
    monkeypatch.setattr(click, "prompt", lambda *a, **k: asked.append(a) or "no")
    context = click.Context(cli, resilient_parsing=True)
    context.meta["kvstore.store"] = tmp_path / "store"
    assert complete_entries(context, None, "") == []
    assert asked == []


def test_a_sealed_shard_is_a_safetensors_file(path, caches):
    """Any program that reads safetensors sees its parts, and nothing in them."""
    from safetensors import safe_open

    fill(path, caches)
    (shard,) = path.glob("shards/*/*")
    with safe_open(shard, framework="numpy") as opened:
        assert sorted(opened.keys()) == [*map(str, range(6)), "header"]
        assert list(opened.metadata()) == ["kvstore_sealed"]
