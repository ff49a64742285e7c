"""Pushing entries into a remote: what is sent, in which order, and what is not."""

import json
import shutil

import pytest
from kit import shard_name

import kvstore
from kvstore.errors import IntegrityError, RemoteError
from kvstore.format import shard as shards
from kvstore.format.documents import canonical_json
from kvstore.remote import client as requests
from kvstore.remote.client import Client, Limits, Remote
from kvstore.remote.layout import parse_document, parse_key
from kvstore.remote.push import push_entry
from kvstore.storage.blocks import BlockStore
from kvstore.storage.entries import Catalog
from kvstore.storage.folder import open_folder

BLOCK = 16


@pytest.fixture
def server(s3_server):
    return s3_server


@pytest.fixture
def remote(server):
    return Remote("team", "s3://bucket/some/where", server.options)


@pytest.fixture
def store(store_path, caches):
    """A store with an entry of two shards: it was saved, and grew."""
    with kvstore.Store(store_path, "raw") as opened:
        for num_tokens in (4 * BLOCK + 3, 6 * BLOCK):
            cache = caches.make_cache(num_tokens, 1)
            opened.save(range(num_tokens), cache, caches.MODEL, name="doc")
    return store_path


def push(path, remote, ref="doc", progress=lambda done, total: None):
    folder = open_folder(path)
    client = Client(remote, Limits(retries=0), create=True)
    blocks = BlockStore(folder)
    entry = Catalog(blocks).find(ref)
    try:
        return push_entry(blocks, entry, client, progress)
    finally:
        blocks.close()


def shards_of(path):
    return {file.name: file.read_bytes() for file in path.glob("shards/*/*")}


def documents(server):
    keys = server.keys("/v1/entries/")
    return [
        parse_document(parse_key(k.partition("where/")[2]), server.objects[k])
        for k in keys
    ]


def test_shards_are_sent_as_they_are_and_the_entry_last(server, store, remote, caches):
    """A shard lies in the remote with the bytes that it has on disk."""
    seen = []
    pushed = push(store, remote, progress=lambda *done: seen.append(done))
    sent = {key.rpartition("/")[2]: server.objects[key] for key in server.keys("/v1/s")}
    assert shards_of(store) == sent
    assert 2 == len(sent)
    puts = [path for method, path in server.log if method == "PUT"]
    assert f"/bucket/some/where/{pushed.key}" == puts[-1]
    (document,) = documents(server)
    assert caches.MODEL.digest == document.fingerprint == pushed.key.fingerprint
    assert 6 == len(document.blocks)
    assert (3, 0) == (pushed.num_sent, pushed.num_there)
    total = sum(map(len, sent.values()))
    assert [(total, total)] == seen[-1:]


def turned_round(data):
    """Return a shard with the bytes of its blocks in the opposite order."""
    size = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:size])
    meta = json.loads(tensors.pop("__metadata__")["kvstore"]) | {
        "header_digest": "0" * 64
    }
    found, moved = b"", {"__metadata__": {"kvstore": canonical_json(meta).decode()}}
    for name in sorted(tensors, key=lambda n: -int(n.partition(".")[0])):
        begin, end = tensors[name]["data_offsets"]
        place = [len(found), len(found) + end - begin]
        moved[name] = tensors[name] | {"data_offsets": place}
        found += data[size + begin : size + end]
    text = json.dumps(moved).encode()
    return len(text).to_bytes(8, "little") + shards._seal(text) + found


def test_blocks_that_lie_in_another_order_are_sent_as_they_lie(server, store, remote):
    """A shard that another program wrote arrives with the bytes that it has."""
    for path in store.glob("shards/*/*"):
        data = turned_round(path.read_bytes())
        path.unlink()
        name = shard_name(data)
        place = store / "shards" / name[:2] / f"{name}.safetensors"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    for path in store.glob("index.sqlite*"):
        path.unlink()
    push(store, remote)
    sent = {key.rpartition("/")[2]: server.objects[key] for key in server.keys("/v1/s")}
    assert shards_of(store) == sent


def test_what_is_there_is_not_sent_again(server, store, remote):
    """The second push of an entry sends nothing."""
    push(store, remote)
    before = dict(server.objects)
    pushed = push(store, remote)
    assert 3 == server.sent("PUT")
    assert (0, 3, 0) == (pushed.num_sent, pushed.num_there, pushed.sent_bytes)
    assert before == server.objects


def test_a_folder_is_a_remote_too(server, store, remote, tmp_path):
    """The same objects lie in a folder, under the same keys."""
    push(store, remote)
    push(store, Remote("disk", (tmp_path / "my remote").as_uri()))
    files = {
        str(file.relative_to(tmp_path / "my remote")): file.read_bytes()
        for file in (tmp_path / "my remote").rglob("*")
        if file.is_file()
    }
    stored = {k.partition("where/")[2]: v for k, v in server.objects.items()}
    assert stored == files


def test_a_chat_that_grew_sends_what_is_new(server, store, remote, caches):
    """One more block moves the bytes of one block and a document."""
    push(store, remote)
    with kvstore.Store(store, "raw") as opened:
        cache = caches.make_cache(7 * BLOCK, 1)
        opened.save(range(7 * BLOCK), cache, caches.MODEL, name="doc")
        new = opened.chain("doc")[-1][0]
    pushed = push(store, remote)
    assert 2 == pushed.num_sent
    size = len((store / f"shards/{new.shard[:2]}/{new.shard}.safetensors").read_bytes())
    assert size <= pushed.sent_bytes < size + 4096
    assert 2 == len(documents(server))


def test_large_shards_go_in_parts(server, store_path, remote, caches):
    """A shard that is larger than a part arrives whole."""
    num_tokens = 20 * BLOCK
    cache = caches.make_cache(num_tokens, 1, layers=4, heads=8, dim=512)
    with kvstore.Store(store_path, "raw") as opened:
        opened.save(range(num_tokens), cache, caches.MODEL, name="doc")
    push(store_path, remote)
    assert server.sent("PUT", "partNumber") >= 2
    for key in server.keys("/v1/shards/"):
        name = key.rpartition("/")[2].partition(".")[0]
        assert shard_name(server.objects[key]) == name


def test_a_server_that_puts_no_parts_together_gets_the_whole(
    server, store_path, remote, caches
):
    """Where the end of an upload in parts fails, one request does it."""
    num_tokens = 20 * BLOCK
    cache = caches.make_cache(num_tokens, 1, layers=4, heads=8, dim=512)
    with kvstore.Store(store_path, "raw") as opened:
        opened.save(range(num_tokens), cache, caches.MODEL, name="doc")
    server.fault = lambda request: 503 if "uploadId" in request.query else None
    push(store_path, remote)
    assert shards_of(store_path) == {
        key.rpartition("/")[2]: server.objects[key] for key in server.keys("/v1/s")
    }


def test_tokens_of_others_are_not_sent(server, store_path, remote, caches):
    """A shard that holds more than the entry is sent without it."""
    with kvstore.Store(store_path, "raw") as opened:
        tokens = list(range(4 * BLOCK))
        opened.save(tokens, caches.make_cache(4 * BLOCK, 1), caches.MODEL, name="long")
        short = caches.make_cache(2 * BLOCK, 1)
        opened.save(tokens[: 2 * BLOCK], short, caches.MODEL, name="doc")
    assert 1 == len(shards_of(store_path))
    push(store_path, remote)
    (key,) = server.keys("/v1/shards/")
    data = server.objects[key]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    meta = json.loads(header["__metadata__"]["kvstore"])
    assert tokens[: 2 * BLOCK] == [t for row in meta["blocks"] for t in row["tokens"]]
    assert shard_name(data) in key
    push(store_path, remote)
    assert 1 == len(server.keys("/v1/shards/"))


def test_a_lost_reply_is_no_failure(server, store, remote):
    """The server has done what was asked, and its reply is lost: nothing is amiss."""
    server.fault = lambda request: "lost" if request.command == "PUT" else None
    push(store, remote)
    assert 2 == len(server.keys("/v1/shards/"))
    assert 1 == len(documents(server))


def test_a_server_that_cannot_say_what_is_missing_gets_it(server, store, remote):
    """Of three nodes one is down: nobody can say what is not there, and all can put."""

    def refuse_to_say(request):
        is_head = request.command == "HEAD"
        return 503 if is_head and request.key not in server.objects else None

    server.fault = refuse_to_say
    assert 3 == push(store, remote).num_sent
    assert 0 == push(store, remote).num_sent


def test_a_push_goes_on_where_it_stopped(server, store, remote):
    """What arrived before a failure is not sent again, and no entry is seen before."""
    first = []

    def refuse_the_second(request):
        if request.command != "PUT" or request.key in (first or [request.key]):
            first.append(request.key)
            return None
        return 503

    server.fault = lambda r: refuse_the_second(r) if r.command == "PUT" else None
    with pytest.raises(RemoteError, match=r"remote `team`.*503"):
        push(store, remote)
    assert 1 == len(server.keys("/v1/shards/"))
    assert [] == documents(server)
    server.fault = lambda request: None
    assert 2 == push(store, remote).num_sent
    assert 1 == len(documents(server))


@pytest.mark.parametrize("part", [1 << 23, 4096])
def test_a_damaged_shard_is_not_sent(
    server, store, remote, flip_bit, monkeypatch, part
):
    """What the store could not read must not reach others, whole or in parts."""
    monkeypatch.setattr(requests, "PART_BYTES", part)
    path = sorted(store.glob("shards/*/*"))[0]
    flip_bit(path, path.stat().st_size * 8 - 1)
    with pytest.raises(IntegrityError):
        push(store, remote)
    assert not any(path.stem in key for key in server.objects)
    assert [] == documents(server)


def test_an_object_of_another_size_is_named(server, store, remote):
    """A truncated object is neither believed nor replaced."""
    push(store, remote)
    key = server.keys("/v1/shards/")[0]
    server.objects[key] = server.objects[key][:-1]
    before = dict(server.objects)
    with pytest.raises(RemoteError, match=key.rpartition("/")[2]):
        push(store, remote)
    assert before == server.objects


def test_refusals_are_said_in_one_line(server, store, remote):
    """Whatever the server says, the error is one line with the remote's name."""
    server.fault = lambda request: 403
    with pytest.raises(RemoteError, match="remote `team`: access is denied") as caught:
        push(store, remote)
    assert "credentials" in caught.value.hint
    server.close()
    with pytest.raises(RemoteError) as caught:
        push(store, remote)
    assert "\n" not in str(caught.value)


def test_a_url_must_be_of_a_kind_that_is_known(store):
    """What is no object store is refused before anything is read."""
    with pytest.raises(RemoteError, match="ftp"):
        push(store, Remote("team", "ftp://host/x"))


def test_pins_and_places_stay_at_home(server, store, remote):
    """Whether an entry is pinned is not sent."""
    with kvstore.Store(store) as opened:
        opened.pin("doc")
    push(store, remote)
    assert not documents(server)[0].entry.pinned


def test_the_same_store_elsewhere_sends_nothing_new(server, store, remote, tmp_path):
    """A copy of a store has the same objects."""
    push(store, remote)
    copy = shutil.copytree(store, tmp_path / "copy")
    assert 0 == push(copy, remote).num_sent
