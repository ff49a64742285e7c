"""Pulling entries out of a remote: what arrives, and everything that must not."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import pytest
from kit import shard_name
from mlx_lm.models.cache import ArraysCache

import kvstore
from kvstore.errors import EntryExistsError, IntegrityError, KVStoreError, RemoteError
from kvstore.remote import client as requests
from kvstore.remote import pull as pulling
from kvstore.remote.client import Client, Limits, Remote
from kvstore.remote.layout import document_of, parse_document, parse_key
from kvstore.remote.pull import pull_entry
from kvstore.remote.push import push_entry
from kvstore.storage.blocks import BlockStore
from kvstore.storage.entries import Catalog
from kvstore.storage.folder import create_folder, open_folder

BLOCK = 16
NUM_TOKENS = 6 * BLOCK + 3


@pytest.fixture
def remote(s3_server):
    return Remote("team", "s3://bucket/some/where", s3_server.options, is_trusted=True)


@pytest.fixture
def stores(tmp_path, empty_store):
    """Two stores of small blocks, as if of two people."""
    return [shutil.copytree(empty_store, tmp_path / name / "store") for name in "ab"]


def client_of(remote):
    return Client(remote, Limits(retries=0), create=True)


def push(path, remote, ref="doc"):
    folder = open_folder(path)
    blocks = BlockStore(folder)
    entry = Catalog(blocks).find(ref)
    try:
        return push_entry(blocks, entry, client_of(remote), lambda done, total: None)
    finally:
        blocks.close()


def fetch(path, remote, key, name=None, replace=False, progress=None):
    folder, client = open_folder(path), client_of(remote)
    blocks = BlockStore(folder)
    try:
        return pull_entry(
            blocks,
            Catalog(blocks),
            client,
            parse_document(key, client.read_whole(str(key), 10**7)),
            name,
            replace=replace,
            progress=progress or (lambda done, total: None),
        )
    finally:
        blocks.close()


@pytest.fixture
def pushed(s3_server, stores, remote, caches):
    """An entry of two shards, one for each of two saves, and what is in it."""
    with kvstore.Store(stores[0], "raw") as store:
        for num_tokens in (4 * BLOCK + 5, NUM_TOKENS):
            cache = caches.make_cache(num_tokens, 1)
            store.save(range(num_tokens), cache, caches.MODEL, name="doc")
    key = push(stores[0], remote).key
    s3_server.log.clear()
    return key


def load(path, caches, ref="doc"):
    with kvstore.Store(path) as store:
        cache, tokens = store.load_entry(ref, caches.MODEL)
        return caches.rows_of(cache), tokens


def nothing_is_seen(path):
    """Whether a store shows nothing at all."""
    with kvstore.Store(path) as store:
        clean = not store.entries() and not store.verify()
        return clean and not list(path.glob("shards/*/*"))


def test_what_was_pushed_is_pulled(stores, remote, pushed, caches):
    """On another machine the same rows come back, and nothing else is there."""
    entry = fetch(stores[1], remote, pushed)
    assert ("doc", NUM_TOKENS) == (entry.name, entry.num_tokens)
    assert load(stores[0], caches) == load(stores[1], caches)
    assert [] == os.listdir(stores[1] / "tmp")
    with kvstore.Store(stores[1]) as store:
        assert [] == store.verify()


def test_only_what_the_entry_needs_is_read(s3_server, stores, remote, pushed, caches):
    """The tail that the entry has outgrown stays in the remote."""
    seen = []
    fetch(stores[1], remote, pushed, progress=lambda *done: seen.append(done))
    with kvstore.Store(stores[0]) as store:
        needed = sum(place.nbytes for place, _ in store.chain("doc"))
    assert (needed, needed) == seen[-1]
    with kvstore.Store(stores[1]) as store:
        assert 7 == sum(1 for _ in store.chain("doc"))


def test_shards_keep_their_names(stores, remote, caches, s3_server):
    """What is needed whole has the same bytes here as there."""
    with kvstore.Store(stores[0], "raw") as store:
        cache = caches.make_cache(NUM_TOKENS, 1)
        store.save(range(NUM_TOKENS), cache, caches.MODEL, name="doc")
    fetch(stores[1], remote, push(stores[0], remote).key)
    names = [{p.name: p.read_bytes() for p in s.glob("shards/*/*")} for s in stores]
    assert names[0] == names[1]


def test_what_the_store_has_is_not_read(s3_server, stores, remote, pushed, caches):
    """Blocks that are there are neither read nor replaced."""
    with kvstore.Store(stores[1], "raw") as store:
        cache = caches.make_cache(4 * BLOCK, 1)
        store.save(range(4 * BLOCK), cache, caches.MODEL, name="mine")
        mine = [place for place, _ in store.chain("mine")]
    fetch(stores[1], remote, pushed)
    with kvstore.Store(stores[1]) as store:
        assert mine == [place for place, _ in store.chain("doc")][:4]
    s3_server.log.clear()
    fetch(stores[1], remote, pushed, name="again")
    assert 0 == s3_server.sent("GET", "/v1/shards/")


def test_a_folder_is_pulled_from_too(stores, tmp_path, caches, remote, pushed):
    """A remote in a folder serves the same."""
    disk = Remote("disk", (tmp_path / "disk").as_uri(), is_trusted=True)
    fetch(stores[1], disk, push(stores[0], disk).key)
    assert load(stores[0], caches) == load(stores[1], caches)


def test_a_name_that_is_taken_costs_no_rows(s3_server, stores, remote, pushed, caches):
    """Whether the name may be had is known before anything large is read."""
    with kvstore.Store(stores[1], "raw") as store:
        cache = caches.make_cache(BLOCK, 9)
        store.save(range(500, 500 + BLOCK), cache, caches.MODEL, name="doc")
    with pytest.raises(EntryExistsError):
        fetch(stores[1], remote, pushed)
    assert 2 == s3_server.sent("GET", "/v1/shards/")
    assert NUM_TOKENS == fetch(stores[1], remote, pushed, replace=True).num_tokens
    assert "other" == fetch(stores[1], remote, pushed, name="other").name


def test_another_block_size_is_refused(tmp_path, remote, pushed):
    """A store of other blocks could not find them."""
    path = create_folder(tmp_path / "wide", 32).path
    with pytest.raises(KVStoreError, match="blocks of 16 tokens, and the store of 32"):
        fetch(path, remote, pushed)


def test_blocks_that_cannot_carry_the_entry_are_named(stores, remote, caches):
    """Own blocks without the state that an entry needs are not replaced."""
    tokens = list(range(2 * BLOCK))
    state = ArraysCache(1)
    state.cache = [mx.ones((1, 4, 8))]

    def cache_at(num_tokens):
        return [*caches.make_cache(num_tokens, 1, layers=1), state]

    with kvstore.Store(stores[0], "raw") as store:
        cache = cache_at(BLOCK)
        store.save(tokens[:BLOCK], cache, caches.MODEL, name="doc")
    key = push(stores[0], remote).key
    with kvstore.Store(stores[1], "raw") as store:
        store.save(tokens, cache_at(2 * BLOCK), caches.MODEL, name="longer")
    with pytest.raises(KVStoreError, match="never replaced"):
        fetch(stores[1], remote, key)


# --- What does not arrive, or not at once. ---


@pytest.mark.parametrize("fault", ["cut", "lost", "stall", 500])
def test_a_connection_that_fails_now_and_then_is_no_failure(
    s3_server, stores, remote, pushed, caches, fault, monkeypatch
):
    """Every second request fails, and the entry arrives."""
    if fault == "stall":
        # Who does not wait long asks often: a busy machine stalls too.
        monkeypatch.setattr(requests, "_PAUSE_S", 0.01)
        impatient = Client(remote, Limits(timeout_s=0.5, retries=0, tries=12))
        monkeypatch.setattr(sys.modules[__name__], "client_of", lambda _: impatient)
    count = iter(range(10**6))
    s3_server.fault = lambda request: fault if next(count) % 2 else None
    fetch(stores[1], remote, pushed)
    s3_server.fault = lambda request: None
    assert load(stores[0], caches) == load(stores[1], caches)


def test_a_pull_goes_on_where_it_stopped(s3_server, stores, remote, pushed, caches):
    """What came before a failure is not read again."""
    ranged = []

    def refuse_later(request):
        if request.command == "GET" and request.headers["Range"]:
            ranged.append(request.headers["Range"])
            return 503 if len(ranged) > 3 else None
        return None

    s3_server.fault = refuse_later
    with pytest.raises(RemoteError, match="503"):
        fetch(stores[1], remote, pushed)
    assert nothing_is_seen(stores[1])
    s3_server.fault = lambda request: None
    seen = []
    fetch(stores[1], remote, pushed, progress=lambda *done: seen.append(done))
    assert 0 < seen[0][0] < seen[0][1]
    assert load(stores[0], caches) == load(stores[1], caches)
    assert [] == os.listdir(stores[1] / "tmp")


def test_a_pull_goes_on_after_it_was_refused_a_name(
    s3_server, stores, remote, pushed, monkeypatch, caches
):
    """All had come when the end failed: the next try reads headers only."""

    def fail(*args, **options):
        raise OSError("the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(pulling, "admit", fail)
        with pytest.raises(OSError, match="the disk fails"):
            fetch(stores[1], remote, pushed)
    s3_server.log.clear()
    fetch(stores[1], remote, pushed)
    assert 2 == s3_server.sent("GET", "/v1/shards/")
    assert load(stores[0], caches) == load(stores[1], caches)


def test_a_full_disk_is_told_before_rows_come(
    s3_server, stores, remote, pushed, monkeypatch
):
    """What has no room is not begun."""

    def refuse(folder, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pulling, "check_space", refuse)
    with pytest.raises(OSError, match="No space"):
        fetch(stores[1], remote, pushed)
    assert 2 == s3_server.sent("GET", "/v1/shards/")


# --- What must not arrive. ---


def shard_paths(server):
    return server.keys("/v1/shards/")


def poisons(server):
    """Yield a label and a function that poisons the objects of a remote."""
    first, second = shard_paths(server)
    data = dict(server.objects)
    begin = 8 + int.from_bytes(data[first][:8], "little")
    yield "gone", lambda o: o.pop(first)
    yield "empty", lambda o: o.update({first: b""})
    yield "another", lambda o: o.update({first: data[second]})
    yield "swapped", lambda o: o.update({first: data[second], second: data[first]})
    yield "garbage", lambda o: o.update({first: os.urandom(len(data[first]))})
    for cut in (1, len(data[first]) - begin, len(data[first]) - 4):
        cut_off = data[first][: len(data[first]) - cut]
        yield f"cut by {cut}", lambda o, cut_off=cut_off: o.update({first: cut_off})
    for at in [*range(0, begin, 61), *range(begin, len(data[first]), 997)]:
        changed = bytearray(data[first])
        changed[at] ^= 1
        yield f"flip {at}", lambda o, c=bytes(changed): o.update({first: c})


@pytest.mark.slow
def test_no_poisoned_shard_becomes_visible(s3_server, stores, remote, pushed):
    """Every poisoned object is named, and the store shows nothing of its entry."""
    good = dict(s3_server.objects)
    first, second = shard_paths(s3_server)
    outgrown = outgrown_tail(stores[0], first) or outgrown_tail(stores[0], second)
    count = 0
    for label, poison in poisons(s3_server):
        s3_server.objects = dict(good)
        poison(s3_server.objects)
        error = refusal(stores[1], remote, pushed)
        if error is not None:
            names = [p.rpartition("/")[2][:12] for p in (first, second)]
            assert any(name in str(error) for name in names), (label, str(error))
            assert not any(stores[1].glob("shards/*/*")), label
            count += 1
            continue
        # Nobody has read the tail that the entry has outgrown.
        at = int(label.removeprefix("flip "))
        assert outgrown[0] <= at < outgrown[1], label
        shutil.rmtree(stores[1])
        shutil.copytree(stores[0].parent.parent / "empty", stores[1])
    assert count > 50
    assert nothing_is_seen(stores[1])
    s3_server.objects = good
    fetch(stores[1], remote, pushed)


def refusal(path, remote, key):
    """Return why an entry was refused, or ``None`` if it was taken in."""
    try:
        fetch(path, remote, key)
    except (IntegrityError, RemoteError) as error:
        return error
    return None


def outgrown_tail(path, key):
    """Return where in a shard the tail lies that the entry has outgrown."""
    with kvstore.Store(path) as store:
        needed = {stored.block.hash for _, stored in store.chain("doc")}
    from kvstore.storage.shards import open_shard

    name = key.rpartition("/")[2].partition(".")[0]
    with open_shard(open_folder(path), name) as opened:
        header = opened.header
    for stored in header.blocks:
        if stored.block.hash not in needed:
            return header.data_begin + stored.begin, header.data_begin + stored.end
    return None


@pytest.fixture(autouse=True)
def keep_an_empty_store(stores, tmp_path):
    shutil.copytree(stores[1], tmp_path / "empty")


def test_no_byte_of_a_document_can_be_another(s3_server, remote, pushed):
    """A document that was changed anywhere is refused by its name."""
    path = next(iter(s3_server.keys("/v1/entries/")))
    data = s3_server.objects[path]
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(IntegrityError, match=pushed.digest[:12]):
            parse_document(pushed, bytes(changed))
    for cut in range(1, len(data), 97):
        with pytest.raises(IntegrityError, match=pushed.digest[:12]):
            parse_document(pushed, data[:-cut])


def renamed(server, key, change):
    """Return the document of an entry that was changed and named anew, and its key."""
    (path,) = server.keys("/v1/entries/")
    return document_of(change(parse_document(key, server.objects[path])))


LIES = {
    "another model": lambda r: replace(r, fingerprint="0" * 64),
    "another root": lambda r: replace(r, entry=replace(r.entry, root="0" * 64)),
    "a shard that is not there": lambda r: replace(
        r, shards=(replace(r.shards[0], name="0" * 64), *r.shards[1:])
    ),
    "another header size": lambda r: replace(
        r,
        shards=(
            replace(r.shards[0], header_nbytes=r.shards[0].header_nbytes + 8),
            *r.shards[1:],
        ),
    ),
    "another size": lambda r: replace(
        r, shards=(replace(r.shards[0], nbytes=r.shards[0].nbytes + 1), *r.shards[1:])
    ),
    "shards exchanged": lambda r: replace(r, shards=r.shards[::-1]),
    "the name of one shard for the other": lambda r: replace(
        r,
        shards=(
            replace(r.shards[0], name=r.shards[1].name),
            replace(r.shards[1], name=r.shards[0].name),
        ),
    ),
    "blocks in another order": lambda r: replace(
        r, blocks=(*r.blocks[1::-1], *r.blocks[2:])
    ),
    "a block left out": lambda r: replace(
        r,
        entry=replace(r.entry, num_tokens=r.entry.num_tokens - BLOCK),
        blocks=r.blocks[1:],
    ),
    "more tokens": lambda r: replace(
        r, entry=replace(r.entry, num_tokens=r.entry.num_tokens + 1)
    ),
    "another codec": lambda r: replace(r, entry=replace(r.entry, codec="nonsense")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_document_that_lies_is_refused(s3_server, stores, remote, pushed, lie):
    """Somebody with a right to write pushes what was never saved."""
    key, data = renamed(s3_server, pushed, LIES[lie])
    s3_server.objects[f"bucket/some/where/{key}"] = data
    with pytest.raises((IntegrityError, RemoteError)) as caught:
        fetch(stores[1], remote, key)
    assert "refused" in str(caught.value) or "bytes of" in str(caught.value)
    assert nothing_is_seen(stores[1])


def test_a_replayed_document_is_refused(s3_server, remote, pushed):
    """The document of one entry under the key of another is not taken for it."""
    (path,) = s3_server.keys("/v1/entries/")
    data = s3_server.objects[path]
    digest = hashlib.sha256(data).hexdigest()
    for key in (
        replace(pushed, fingerprint="0" * 64),
        replace(pushed, entry_id="0" * 32),
    ):
        assert digest == key.digest
        with pytest.raises(IntegrityError, match="key of another"):
            parse_document(key, data)


def test_contradictions_are_refused(s3_server, remote, pushed):
    """What a document says twice must agree."""
    changes = [
        lambda r: replace(r, blocks=r.blocks[:-1]),
        lambda r: replace(r, blocks=((r.blocks[0][0], 5), *r.blocks[1:])),
        lambda r: replace(r, shards=(*r.shards, replace(r.shards[0], name="1" * 64))),
        lambda r: replace(r, shards=(r.shards[0], r.shards[0])),
        lambda r: replace(r, block_size=0),
        lambda r: replace(r, entry=replace(r.entry, id="0" * 32)),
        lambda r: replace(r, shards=(replace(r.shards[0], header_nbytes=2**40),)),
    ]
    for change in changes:
        key, data = renamed(s3_server, pushed, change)
        with pytest.raises(IntegrityError, match=r"remote entry .* is refused"):
            parse_document(key, data)


def test_keys_of_others_are_none_of_ours():
    """Only what looks like a document's key is read as one."""
    good = f"v1/entries/{'a' * 64}/{'b' * 32}/{'c' * 64}.json"
    assert good == str(parse_key(good))
    for key in (good.upper(), good + "x", "x/" + good, good.replace("/b", "-b"), ""):
        assert parse_key(key) is None


# --- All of it at once. ---


@pytest.mark.parametrize("seed", range(2))
def test_a_bad_connection_loses_nothing(
    s3_server, stores, remote, caches, monkeypatch, seed
):
    """Replies are lost, cut, late or wrong at random: what counts is right."""
    with kvstore.Store(stores[0], "raw") as store:
        for number in range(3):
            tokens, cache = caches.make_conversation(
                2 + number, 10 + number, extra=number
            )
            store.save(tokens, cache, caches.MODEL, name=f"doc {number}")
    monkeypatch.setattr(requests, "_PAUSE_S", 0.01)
    chance = random.Random(seed)
    wrong = []

    def fail_often(request):
        if chance.random() < 0.6:
            return None
        wrong.append(chance.choice(["lost", "cut", 500, 503, "flip"]))
        return wrong[-1]

    s3_server.fault = fail_often
    keys = [
        persist(lambda n=n: push(stores[0], remote, f"doc {n}").key) for n in range(3)
    ]
    for key in keys:
        persist(lambda key=key: fetch(stores[1], remote, key))
    s3_server.fault = lambda request: None
    for number in range(3):
        assert load(stores[0], caches, f"doc {number}") == load(
            stores[1], caches, f"doc {number}"
        )
    for key, data in s3_server.objects.items():
        is_shard = "/shards/" in key
        own = shard_name(data) if is_shard else hashlib.sha256(data).hexdigest()
        assert own in key
    with kvstore.Store(stores[1]) as store:
        assert [] == store.verify()
    assert len(wrong) > 5, wrong


def persist(work, tries=100):
    """Do something again until it succeeds; only refusals are in the way."""
    for _ in range(tries):
        try:
            return work()
        except (IntegrityError, RemoteError):
            continue
    raise AssertionError("it never succeeds")


@pytest.mark.slow
def test_a_thousand_lost_replies_lose_nothing(s3_server, stores, remote, caches):
    """Each reply to a PUT is lost, a thousand times."""
    lost = []

    def lose(request):
        if request.command == "PUT":
            lost.append(request.key)
            return "lost"
        return None

    s3_server.fault = lose
    with kvstore.Store(stores[0], "raw") as store:
        for number in range(500):
            cache = caches.make_cache(BLOCK, number, layers=1, heads=1, dim=8)
            start = 1000 * number
            tokens = range(start, start + BLOCK)
            store.save(tokens, cache, caches.MODEL, name=f"doc {number}")
    for number in range(500):
        assert 2 == push(stores[0], remote, f"doc {number}").num_sent
    assert len(lost) >= 1000
    assert 1000 == len(s3_server.objects)
    for key, data in s3_server.objects.items():
        is_shard = "/shards/" in key
        own = shard_name(data) if is_shard else hashlib.sha256(data).hexdigest()
        assert own in key


@pytest.mark.slow
@pytest.mark.parametrize("job", ["push", "pull"])
def test_a_kill_on_the_way_loses_nothing(s3_server, stores, remote, caches, job):
    """Killed again and again, it goes on each time, and nothing is half there."""
    with kvstore.Store(stores[0], "raw") as store:
        tokens, cache = caches.make_conversation(40, 3)
        store.save(tokens, cache, caches.MODEL, name="doc")
    for path in stores:
        with kvstore.Store(path) as store:
            store.remotes.add(remote)
    program = f"import kvstore; kvstore.Store({str(stores[job == 'pull'])!r})"
    words = [sys.executable, "-c", f"{program}.remotes.{job}('doc')"]
    if job == "pull":
        push(stores[0], remote)
    s3_server.log.clear()
    chance = random.Random(1)
    for _ in range(8):
        process = subprocess.Popen(words)
        num_asked = len(s3_server.log) + chance.randint(1, 5)
        while process.poll() is None and len(s3_server.log) < num_asked:
            time.sleep(0.005)
        time.sleep(chance.random() / 20)
        process.kill()
        process.wait()
        with kvstore.Store(stores[1]) as store:
            assert all(entry.num_tokens == len(tokens) for entry in store.entries())
            assert [] == store.verify()
    with kvstore.Store(stores[0]) as here, kvstore.Store(stores[1]) as there:
        here.remotes.push("doc")
        there.remotes.pull("doc")
    assert load(stores[0], caches) == load(stores[1], caches)
