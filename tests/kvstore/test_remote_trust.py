"""Who may be pulled from: signers who are trusted, or all who may write."""

import shutil
from dataclasses import replace

import pytest
from kit import load_beside
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.errors import IntegrityError, SignerError
from kvstore.format.signature import new_secret, public_key
from kvstore.remote.layout import document_of, parse_document, parse_key, signed
from kvstore.remote.remotes import make_remote
from kvstore.server import remote as tiers
from kvstore.server.remote import RemoteTier
from kvstore.storage.keys import new_signing_key, trust_signer

config = load_beside("test_signing").config  # a fixture: nobody is trusted yet
URL = "s3://bucket/some/where"
MALLORY = new_secret()


@pytest.fixture
def remote(s3_server):
    return make_remote("team", URL, s3_server.options)


@pytest.fixture
def opened(tmp_path, empty_store, caches, remote):
    """Two stores, open and with the remote; the first has an entry."""
    paths = [shutil.copytree(empty_store, tmp_path / name / "store") for name in "ab"]
    with (
        kvstore.Store(paths[0], "raw") as left,
        kvstore.Store(paths[1], "raw") as right,
    ):
        for store in (left, right):
            store.remotes.add(remote)
        tokens, cache = caches.make_conversation(2, 1, extra=3)
        left.save(tokens, cache, caches.MODEL, name="doc")
        yield left, right


@pytest.fixture
def alice(config, monkeypatch, tmp_path):
    """The key of whoever pushes next; it is none of whoever pulls."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "alice"))
    return new_signing_key()


def push(store, monkeypatch, tmp_path):
    """Push as Alice, and go on as somebody else."""
    key = store.remotes.push("doc").key
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "bob"))
    return key


def put(s3_server, remote_entry):
    """Put a document there, whoever made it."""
    key, data = document_of(remote_entry)
    s3_server.objects[f"bucket/some/where/{key}"] = data
    return key


def read(s3_server):
    (path,) = s3_server.keys("/v1/entries/")
    return parse_document(
        parse_key(path.partition("where/")[2]), s3_server.objects[path]
    )


def test_what_nobody_signed_is_not_taken(opened, remote, caches):
    """By name, by its key, or by its tokens; unless all who may write are trusted."""
    left, right = opened
    key = left.remotes.push("doc").key
    tokens, _ = caches.make_conversation(2, 1, extra=3)
    for ref in ("doc", key.digest, key.path):
        with pytest.raises(SignerError, match="is not signed") as caught:
            right.remotes.pull(ref)
    assert "--trust" in caught.value.hint
    with pytest.raises(kvstore.EntryNotFoundError):
        right.remotes.pull(tokens, fingerprint=caches.MODEL)
    assert ["doc"] == [one.entry.name for one in right.remotes.entries().values()]
    entry = right.remotes.pull("doc", right.remotes.client(None, is_trusted=True))
    assert "" == entry.signer


def test_what_a_trusted_key_signed_is_taken(
    opened, alice, caches, monkeypatch, tmp_path
):
    """And says from then on who that was."""
    left, right = opened
    push(left, monkeypatch, tmp_path)
    with pytest.raises(SignerError, match=f"unknown key {alice}"):
        right.remotes.pull("doc")
    trust_signer("alice", alice)
    assert alice == right.remotes.pull("doc").signer
    tokens, _ = caches.make_conversation(2, 1, extra=3)
    assert tokens == right.load_entry("doc", caches.MODEL)[1]


def test_rows_of_somebody_else_are_not_called_signed_either(
    opened, alice, caches, monkeypatch, tmp_path
):
    """Where the store has other rows of the same tokens, they stay and say no name."""
    left, right = opened
    tokens, _ = caches.make_conversation(2, 1, extra=3)
    other = caches.make_cache(16, 9)
    right.save(tokens[:16], other, caches.MODEL)
    push(left, monkeypatch, tmp_path)
    trust_signer("alice", alice)
    assert "" == right.remotes.pull("doc").signer
    right.remove("doc")
    right.purge()
    for entry in right.entries():
        right.remove(entry)
    right.purge()
    assert alice == right.remotes.pull("doc").signer
    # What came in the shards that were signed is known by their names.
    assert alice == right.remotes.pull("doc", name="again").signer


def test_ones_own_key_is_trusted(opened, alice):
    """Who pushes here may pull there."""
    left, right = opened
    left.remotes.push("doc")
    assert alice == right.remotes.pull("doc").signer


def test_a_part_of_what_was_signed_is_signed(opened, alice, caches):
    """Of a prompt that goes on otherwise the blocks that it shares are taken."""
    left, right = opened
    left.remotes.push("doc")
    tokens, _ = caches.make_conversation(2, 1, extra=3)
    entry = right.remotes.pull([*tokens[:19], 7], fingerprint=caches.MODEL)
    assert (16, None, alice) == (entry.num_tokens, entry.name, entry.signer)


def test_a_server_takes_what_was_signed(opened, alice, caches):
    """Under no name, though its name was signed."""
    left, right = opened
    left.remotes.push("doc")
    tokens, _ = caches.make_conversation(2, 1, extra=3)
    model, like = caches.MODEL.digest, [KVCache(), KVCache()]
    tier = RemoteTier(right, timeout_s=60)
    tier.bring(model, [*tokens, 7], 1, like=like, min_bits=0, prefill=None)
    assert [(None, alice)] == [(e.name, e.signer) for e in right.entries()]


def test_a_server_finds_what_is_trusted_or_there_later(
    opened, alice, caches, s3_server, monkeypatch, tmp_path
):
    """A signer that nobody trusted yet, and a document that a replica lacks."""
    monkeypatch.setattr(tiers, "_PAUSE_S", 0.0)
    left, right = opened
    push(left, monkeypatch, tmp_path)
    tokens, _ = caches.make_conversation(2, 1, extra=3)
    model, like = caches.MODEL.digest, [KVCache(), KVCache()]
    tier = RemoteTier(right, timeout_s=60)

    def bring():
        tier._known_at.clear()
        tier.bring(model, [*tokens, 7], 1, like=like, min_bits=0, prefill=None)
        return len(right.entries())

    assert 0 == bring()
    trust_signer("alice", alice)
    s3_server.fault = lambda at: 404 if "/v1/entries/" in at.path else None
    assert 0 == bring()
    s3_server.fault = lambda at: None
    assert 1 == bring()


def test_a_later_entry_of_somebody_else_hides_nothing(
    opened, alice, s3_server, monkeypatch, tmp_path, caplog
):
    """The latest that a trusted key signed counts, and the others are named."""
    left, right = opened
    push(left, monkeypatch, tmp_path)
    trust_signer("alice", alice)
    mine = read(s3_server)
    later = replace(mine.entry, updated_at=mine.entry.updated_at + 9, codec="raw")
    unsigned = replace(mine, entry=later, signature=None)
    put(s3_server, unsigned)
    put(s3_server, signed(unsigned, MALLORY))
    assert alice == right.remotes.pull("doc").signer
    assert "is not signed" in caplog.text
    assert public_key(MALLORY) in caplog.text


def test_a_signature_is_of_one_entry(opened, alice, s3_server, monkeypatch, tmp_path):
    """It is none of what was changed, though the remote's writers are trusted."""
    left, right = opened
    push(left, monkeypatch, tmp_path)
    trust_signer("alice", alice)
    mine = read(s3_server)
    trusting = right.remotes.client(None, is_trusted=True)
    for changed in (
        replace(mine, entry=replace(mine.entry, model="another")),
        replace(mine, block_size=8, blocks=mine.blocks * 2),
        replace(mine, shards=(replace(mine.shards[0], name="0" * 64),)),
        replace(mine, signature=replace(mine.signature, key=public_key(MALLORY))),
    ):
        s3_server.objects = {
            k: v for k, v in s3_server.objects.items() if "/v1/entries/" not in k
        }
        put(s3_server, changed)
        for client in (None, trusting):
            with pytest.raises(IntegrityError):
                right.remotes.pull("doc", client)
    assert [] == right.entries()


def test_a_store_that_takes_only_signed_ones_trusts_no_remote(opened, alice):
    """Its policy comes before that of the remote."""
    left, right = opened
    left.remotes.push("doc")
    right.set_policy(is_signed_only=True)
    assert alice == right.remotes.pull("doc").signer


def test_a_policy_holds_for_remotes_that_are_trusted(opened):
    """Who may write there is not whom this store trusts."""
    left, right = opened
    left.remotes.push("doc")
    right.set_policy(is_signed_only=True)
    with pytest.raises(SignerError, match="takes only what a trusted key signed"):
        right.remotes.pull("doc", right.remotes.client(None, is_trusted=True))


def test_the_command_line_trusts_when_it_is_told(opened, run_cli, alice, remote):
    """Once by `pull`, or for good by `remote add`; a list says who signed."""
    left, right = opened
    left.remotes.push("doc")

    def run(*words):
        return run_cli(*words, store=right.path)

    assert "you" in run("ls", "--remote")[1]
    assert '"trusted":false' in (right.path / "remotes.json").read_text()
    right.remotes.remove("team")
    right.remotes.add(replace(remote, is_trusted=True))
    assert '"trusted":true' in (right.path / "remotes.json").read_text()
    assert right.remotes.all()[0].is_trusted
