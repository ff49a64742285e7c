"""Bundles: what is exported is imported elsewhere, and anything else is refused."""

import copy
import io
import json
import os
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import blake3
import mlx.core as mx
import pytest
from kit import load_beside, shard_name
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

import kvstore
from kvstore.caches import restore
from kvstore.format import bundle as bundles
from kvstore.format.block import Origin, Part
from kvstore.format.chain import hash_block_tokens, hash_root
from kvstore.ops.transfer import admit as admitting
from kvstore.storage.entries import write_entry
from kvstore.storage.folder import create_folder, open_folder

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
BLOCK = 16


architectures, forging = load_beside("architectures"), load_beside("forging")
export, take, tree, bits_of = (
    forging.export, forging.take, forging.tree, forging.bits_of,
)  # fmt: skip
unpack, pack, seal, member = (
    forging.unpack, forging.pack, forging.seal, forging.member,
)  # fmt: skip
decode, encode, rehash = forging.decode, forging.encode, forging.rehash
assert_refused = forging.assert_refused
KINDS = [
    "gemma3_text", "falcon_h1", "mamba2", "recurrent_gemma", "deepseek_v32", "gpt_oss",
]  # fmt: skip
# Fixtures.
stores, small, tiny = forging.stores, forging.small, forging.tiny


# --- What is handed over. ---


@pytest.mark.parametrize("codec", kvstore.codec_names())
def test_a_bundle_brings_everything(stores, caches, codec):
    """Whatever the codec, what is imported is what was exported, to the bit."""
    tokens, cache = caches.make_conversation(5, 3, extra=7)
    with kvstore.Store(stores[0], codec) as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
        sent, _ = store.load_entry("doc", caches.MODEL)
    data = export(stores[0])
    entry = take(stores[1], data, fingerprint=caches.MODEL)
    with kvstore.Store(stores[1], create=False) as store:
        assert store.verify() == []
        assert store.entry("doc") == entry
        received, held = store.load_entry("doc", caches.MODEL)
        found, rest = store.load([*tokens, 1], caches.MODEL)
    assert (held, rest) == (tokens, [1])
    assert bits_of(received) == bits_of(sent) == bits_of(found)
    assert export(stores[1]) == data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [9, 61])
def test_windows_and_states_travel(stores, kind, num_tokens):
    """A model with windows or states goes on as if it had never been stored."""
    model = architectures.make_model(kind)
    tokens = [(7 * i * i + 3 * i) % 97 for i in range(num_tokens)]
    fingerprint = kvstore.Fingerprint({"weights": kind})
    cache = make_prompt_cache(model)
    with kvstore.Store(stores[0], "planes+zstd") as store:
        for done in range(0, num_tokens, 10):
            logits = architectures.feed(model, cache, tokens[done : done + 10])
            store.save_blocks(tokens[: done + 10], cache, fingerprint)
        store.save(tokens, cache, fingerprint, name="doc")
        sent, _ = store.load_entry("doc", fingerprint)
    take(stores[1], export(stores[0]))
    with kvstore.Store(stores[1], create=False) as store:
        received, _ = store.load_entry("doc", fingerprint)
    assert bits_of(received) == bits_of(sent)
    expected = architectures.go_on(model, cache, logits, 6)
    actual = architectures.go_on(model, received, logits, 6)
    assert actual[0] == expected[0]
    assert architectures.bits(actual[1]) == architectures.bits(expected[1])


def test_lists_of_caches_and_unused_layers_travel(stores, caches):
    """A `CacheList`, and a layer that the model never uses, are handed over too."""
    first, second = caches.make_cache(40, 1), caches.make_cache(40, 2, dim=32)
    cache = [CacheList(first[0], second[0]), KVCache(), first[1]]
    with kvstore.Store(stores[0], "raw") as store:
        store.save(list(range(40)), cache, caches.MODEL, name="doc")
    take(stores[1], export(stores[0]))
    with kvstore.Store(stores[1], create=False) as store:
        received, _ = store.load_entry("doc", caches.MODEL)
    assert type(received[0]) is CacheList
    assert bits_of(received) == bits_of(cache)


def test_the_same_entry_gives_the_same_bytes(stores, caches):
    """What else is in a store, and how its blocks lie there, is not seen."""
    rows = caches.random_rows(9 * BLOCK + 3, 1)
    tokens = list(range(9 * BLOCK + 3))
    made = {}
    for path, steps in ((stores[0], [147]), (stores[1], [20, 64, 147])):
        with kvstore.Store(path, "raw") as store:
            for size in steps:
                cache = caches.grow(None, rows[..., :size, :])
                store.save(tokens[:size], cache, caches.MODEL, name="doc")
            entry = store.entry("doc")
        folder = open_folder(path)
        stamped = replace(entry, created_at=1.5e9, updated_at=2e9, pinned=True)
        write_entry(folder, stamped)
        made[path] = export(path)
    assert len(list(stores[1].glob("shards/*/*"))) == 3
    with kvstore.Store(stores[1], "raw") as store:
        other, cache = caches.make_conversation(3, 8)
        store.save(other, cache, caches.MODEL, name="other")
        longer = caches.grow(None, caches.random_rows(200, 4))
        store.save([*tokens, *range(53)], longer, caches.MODEL, name="longer")
        store.rename("doc", "old")
        store.rename("old", "doc")
    assert export(stores[1]) == made[stores[0]] == made[stores[1]]


def test_tar_unpacks_a_bundle_to_a_store(small, tmp_path, caches):
    """It is an archive of private files that lie as they do in a store."""
    with tarfile.open(fileobj=io.BytesIO(small.data)) as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path / "store", filter="data")
    assert {(m.mode, m.uid, m.mtime, m.type) for m in members} == {
        (0o600, 0, 0, tarfile.REGTYPE)
    }
    with kvstore.Store(tmp_path / "store", create=False) as store:
        (entry,) = store.entries()
        assert (entry.name, entry.num_tokens) == ("doc", len(small.tokens))
        found, tokens = store.load_entry("doc", caches.MODEL)
        assert store.lookup([*small.tokens, 1], caches.MODEL).num_tokens == len(tokens)
        longer = caches.grow(None, caches.random_rows(40, 4, layers=1, heads=1, dim=8))
        store.save(list(range(40)), longer, caches.MODEL, name="more")
        assert store.verify() == []
    assert tokens == small.tokens
    assert bits_of(found) == bits_of(small.cache)
    assert export(tmp_path / "store") == small.data


def test_headers_are_those_of_tarfile(small):
    """Our own headers are ustar's: another implementation writes the same fields."""
    for name, size in ((bundles.CONFIG, 7), (bundles.shard_member("ab" * 32), 8**10)):
        info = tarfile.TarInfo.frombuf(bundles._header(name, size), "ascii", "strict")
        assert (info.name, info.size) == (name, size)
        assert info.mode == 0o600


def test_a_pinned_entry_arrives_unpinned(stores, caches):
    """Pins and times of use stay where they are; when it was first saved travels."""
    tokens, cache = caches.make_conversation(2, 3)
    with kvstore.Store(stores[0], "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
        sent = store.pin("doc")
    received = take(stores[1], export(stores[0]))
    assert not received.pinned
    assert received.updated_at > sent.updated_at
    assert received == replace(sent, pinned=False, updated_at=received.updated_at)


def test_an_entry_without_a_name_stays_so(stores, caches):
    """It can be imported under a name, too."""
    tokens, cache = caches.make_conversation(2, 3)
    with kvstore.Store(stores[0], "raw") as store:
        entry = store.save(tokens, cache, caches.MODEL)
    data = export(stores[0], entry.id)
    assert take(stores[1], data).id == entry.id
    assert take(stores[1], data, name="doc").name == "doc"
    with kvstore.Store(stores[1]) as store:
        assert len(store.entries()) == 2
        assert store.stats().num_shards == 1


def test_a_bundle_of_this_format_is_read_for_ever(stores):
    """What an earlier release exported is imported, and exported again to the bit."""
    data = (GOLDEN / "format-1.kvbundle").read_bytes()
    golden = load_beside("test_golden")
    entry = take(stores[0], data, fingerprint=golden.MODEL)
    assert (entry.name, entry.num_tokens) == ("golden", 40)
    with kvstore.Store(stores[0]) as store:
        cache, tokens = store.load_entry("golden", golden.MODEL)
    assert tokens == golden.TOKENS
    saved = golden.make_cache()
    tail = [mx.array_equal(c[0].keys[..., 32:40, :], saved[0].keys[..., 32:40, :])
            for c in (cache,)]  # fmt: skip
    assert all(same.item() for same in tail)
    assert mx.array_equal(cache[2][0], saved[2][0]).item()
    assert export(stores[0], "golden") == data


# --- What is not such a bundle. ---


def refusals(path, data, variants):
    """Return the variants of a bundle that are not refused, or leave something."""
    accepted = []
    before = tree(path)
    with kvstore.Store(path, create=False) as store:
        for label, changed in variants:
            try:
                store.import_bundle(io.BytesIO(changed))
                accepted.append(label)
            except (kvstore.IntegrityError, kvstore.FormatError) as error:
                if not error.hint or os.listdir(path / "tmp"):
                    accepted.append(label)
        assert tree(path) == before
        assert store.entries() == []
    return accepted


def flipped(data, positions, mask):
    """Yield a bundle with one byte after the other changed."""
    for at in positions:
        changed = bytearray(data)
        changed[at] ^= mask(at)
        yield at, bytes(changed)


def test_any_byte_changed_is_refused(stores, tiny):
    """No byte of a bundle can be another, whatever it stands for."""
    mask = random.Random(1)
    variants = flipped(tiny, range(0, len(tiny), 3), lambda at: mask.randrange(1, 256))
    assert refusals(stores[0], tiny, variants) == []


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_any_bit_flipped_is_refused(stores, tiny, bit):
    """The same, bit by bit."""
    variants = flipped(tiny, range(len(tiny)), lambda at: 1 << bit)
    assert refusals(stores[0], tiny, variants) == []


def test_a_bundle_cut_off_or_continued_is_refused(stores, tiny):
    """It ends where it ends: at every record, at odd places, and not a byte later."""
    ends = {*range(0, len(tiny), 512), *range(1, len(tiny), 509), len(tiny) - 1}
    variants = [(end, tiny[:end]) for end in sorted(ends)]
    more = [bytes(1), bytes(512), bytes(10240), b"x", tiny]
    variants += [("more", tiny + rest) for rest in more]
    assert refusals(stores[0], tiny, variants) == []


def test_what_the_forger_changes_nothing_in_is_accepted(stores, tiny):
    """The bundles below are refused for what was changed, not for how it was done."""
    manifest, contents = unpack(tiny)
    assert pack(manifest, contents) == tiny
    origin, blocks = decode(contents[0])
    assert encode(origin, blocks) == contents[0]
    assert take(stores[0], tiny).name == "doc"


def archive(members, form=tarfile.USTAR_FORMAT, **options):
    """Return an archive that Python's `tarfile` makes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, **options) as made:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            made.addfile(info, io.BytesIO(data))
    return file.getvalue()


def info(name, **fields):
    """Return a member's description, private as ours are."""
    made = tarfile.TarInfo(name)
    for key, value in {"mode": 0o600, **fields}.items():
        setattr(made, key, value)
    return made


def hostile_archives(data):
    """Yield label and bytes of archives that hold more, or other, than a bundle."""
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        names = opened.getnames()
        contents = [opened.extractfile(name).read() for name in names]
    files = list(zip(names, contents, strict=True))
    whole = [(info(name), content) for name, content in files]
    parts = [member(*file) for file in files]
    end = bytes(1024)
    assert b"".join(parts) + end == data
    yield "padded to whole records, as tar does", archive(whole)
    yield "as pax", archive(whole, tarfile.PAX_FORMAT)
    yield "as GNU's", archive(whole, tarfile.GNU_FORMAT)
    headers = {"path": "/etc/passwd"}
    yield (
        "with a pax header", archive(whole, tarfile.PAX_FORMAT, pax_headers=headers)
    )  # fmt: skip
    long = info(f"shards/{'a' * 200}.safetensors")
    yield "with a long name", archive([*whole[:2], (long, b"x")], tarfile.GNU_FORMAT)
    for at, (name, content) in enumerate(files):

        def instead(header, at=at, content=content):
            rest = content + bytes(-len(content) % 512)
            return b"".join([*parts[:at], header + rest, *parts[at + 1 :]]) + end

        for label, kind in (
            ("symlink", tarfile.SYMTYPE),
            ("hard link", tarfile.LNKTYPE),
            ("directory", tarfile.DIRTYPE),
            ("device", tarfile.CHRTYPE),
            ("fifo", tarfile.FIFOTYPE),
            ("sparse file", tarfile.GNUTYPE_SPARSE),
            ("contiguous file", tarfile.CONTTYPE),
            ("old regular file", tarfile.AREGTYPE),
        ):
            made = info(name, type=kind, linkname="/etc/passwd", size=len(content))
            yield f"a {label} for {name}", instead(made.tobuf(tarfile.USTAR_FORMAT))
        for label, fields in (
            ("another mode", {"mode": 0o4755}),
            ("an owner", {"uid": 1000, "uname": "root"}),
            ("a time", {"mtime": 1}),
            ("a size too small", {"size": len(content) - 1}),
            ("a size too large", {"size": len(content) + 1}),
            ("a huge size", {"size": 8**11 - 1}),
            ("no size", {"size": 0}),
            ("an absolute path", {"name": "/tmp/" + name}),
            ("a path upwards", {"name": "../" + name}),
            ("a path around", {"name": "shards/../" + name}),
            ("another name", {"name": name.replace("s", "5")}),
            ("no name", {"name": ""}),
        ):
            made = info(**{"name": name, "size": len(content), **fields})
            header = made.tobuf(tarfile.USTAR_FORMAT)
            yield f"{label} for {name}", instead(header)
        binary = info(name, size=8**12).tobuf(tarfile.GNU_FORMAT)
        yield f"a size in binary for {name}", instead(binary)
        yield f"{name} twice", b"".join([*parts[: at + 1], *parts[at:]]) + end
        yield f"without {name}", b"".join([*parts[:at], *parts[at + 1 :]]) + end
        yield f"padding of {name}", data.replace(parts[at], parts[at][:-1] + b"x")
    config, entry, *shards = parts
    body = b"".join(shards)
    huge = bundles._header(bundles.CONFIG, bundles.MAX_CONFIG_BYTES + 1)
    yield "a huge configuration", huge + bytes(4096)
    huge = bundles._header(names[1], bundles.MAX_BYTES + 1)
    yield "a huge entry", config + huge + bytes(4096)
    yield "a shard in another folder", data.replace(b"shards/", b"shardz/")
    yield "one member more", config + entry + body + member("x", b"x") + end
    yield "another order", entry + config + body + end
    yield "shards first", body + config + entry + end
    yield "one zero record at the end", config + entry + body + bytes(512)
    yield "three zero records at the end", config + entry + body + bytes(1536)
    yield "no end", config + entry + body
    yield "nothing", b""
    yield "a cache file", (100).to_bytes(8, "little") + b'{"__metadata__":{}}' * 99
    yield "a shard", contents[2]


def test_archives_that_hold_anything_else_are_refused(stores, tiny, tmp_path):
    """Links, paths, duplicates, sizes, modes, other formats of tar: none of it."""
    first, *variants = hostile_archives(tiny)
    assert refusals(stores[0], tiny, [first]) == []  # to look at entries makes an index
    before = set(tmp_path.rglob("*"))
    assert refusals(stores[0], tiny, variants) == []
    assert set(tmp_path.rglob("*")) == before
    assert len(variants) > 50


def test_no_size_is_believed(stores, tiny):
    """Of what says it is huge, no more is read than says so."""
    manifest, _ = unpack(tiny)
    config, entry = forging.heads(manifest)
    shard = bundles.shard_member(manifest["shards"][0]["name"])
    name = bundles.entry_member(manifest["entry"]["id"])
    largest = bundles.MAX_SHARD_BYTES
    for head, member_name, nbytes, more in (
        (b"", bundles.CONFIG, bundles.MAX_CONFIG_BYTES + 1, 0),
        (config, name, bundles.MAX_BYTES + 1, 0),
        (config + entry, shard, largest, 8),
    ):
        head += bundles._header(member_name, nbytes)
        file = io.BytesIO(head + b"\xff" * 100_000)
        with (
            kvstore.Store(stores[0]) as store,
            pytest.raises(kvstore.IntegrityError, match="header"),
        ):
            store.import_bundle(file)
        assert file.tell() == len(head) + more


def edit_manifest(change):
    """Return a lie about what a bundle is, all of whose digests are put right."""

    def lie(manifest, contents):
        change(manifest)
        return pack(manifest, contents)

    return lie


def edit_entry(**fields):
    """Return a lie about the entry."""
    return edit_manifest(lambda manifest: manifest["entry"].update(fields))


def unsettled(change):
    """Return a lie that nothing else is adapted to."""

    def lie(manifest, contents):
        manifest = forging.settled(manifest, contents)
        change(manifest)
        return pack(manifest, contents, settle=lambda manifest, _: manifest)

    return lie


def edit_blocks(change):
    """Return a lie told in the shard, all of whose digests are put right."""

    def lie(manifest, contents):
        origin, blocks = decode(contents[0])
        found = change(blocks)
        return pack(manifest, [encode(origin, found or blocks)])

    return lie


def edit_block(number, **fields):
    """Return a lie about one block."""

    def change(blocks):
        blocks[number] = replace(blocks[number], **fields)

    return edit_blocks(change)


def edit_chain(number, **fields):
    """Return a lie about the tokens, hash, parent or start of one block."""

    def change(blocks):
        block = replace(blocks[number].block, **fields)
        blocks[number] = replace(blocks[number], block=block)

    return edit_blocks(change)


def edit_part(number, **fields):
    """Return a lie about the first part of one block."""

    def change(blocks):
        first, *rest = blocks[number].parts
        parts = (replace(first, **fields), *rest)
        blocks[number] = replace(blocks[number], parts=parts)

    return edit_blocks(change)


def add_part(part):
    """Return a lie that is one part too many."""

    def change(blocks):
        blocks[1] = replace(blocks[1], parts=(*blocks[1].parts, part))

    return edit_blocks(change)


def relocated(change, *, tokens=None, keep_shard=False):
    """Return a lie about the origin that is consistent to the last hash."""

    def lie(manifest, contents):
        change(manifest)
        digest = kvstore.Fingerprint(manifest["fingerprint"]).digest
        root = hash_root(digest, manifest["layout"])
        manifest["entry"]["root"] = root.hex()
        if keep_shard:
            return pack(manifest, contents)
        origin = Origin(manifest["fingerprint"], manifest["layout"])
        blocks = rehash(decode(contents[0])[1], root, tokens and list(tokens))
        manifest["entry"]["tip"] = blocks[-1].block.hash.hex()
        stop = blocks[-1].block.start + len(blocks[-1].block.tokens)
        manifest["entry"]["num_tokens"] = stop
        return pack(manifest, [encode(origin, blocks)])

    return lie


def edit_layout(change, **options):
    """Return a lie about the layout that is consistent to the last hash."""
    return relocated(lambda manifest: change(manifest["layout"][0]), **options)


def edit_row(at, value):
    """Return a lie about the keys in the layout."""
    return edit_layout(lambda layer: layer["rows"][0].__setitem__(at, value))


def stranger(blocks):
    """Return the blocks and one of another chain."""
    block = replace(blocks[0].block, tokens=tuple(range(50, 66)))
    own = hash_block_tokens(block.parent, block.tokens)
    return [*blocks, replace(blocks[0], block=replace(block, hash=own))]


def split_shards(manifest, contents):
    """Return a bundle whose shards are in another order."""
    origin, blocks = decode(contents[0])
    return pack(manifest, [encode(origin, [block]) for block in blocks[::-1]])


def empty_shard(manifest, contents):
    """Return a bundle with a shard that holds nothing before the other."""
    origin, _ = decode(contents[0])
    return pack(manifest, [encode(origin, []), *contents])


def other_origin(manifest, contents):
    """Return a bundle whose blocks are of the root, and whose shard is not."""
    origin, blocks = decode(contents[0])
    other = replace(origin, fingerprint=origin.fingerprint | {"weights": "b"})
    return pack(manifest, [encode(other, blocks)])


def misnamed(manifest, contents):
    """Return a bundle whose shard is sound and has another's name."""
    origin, blocks = decode(contents[0])
    first = replace(blocks[0].parts[0], data=bytes(256))
    parts = (first, *blocks[0].parts[1:])
    other = encode(origin, [replace(blocks[0], parts=parts), *blocks[1:]])
    name = bundles.shard_member(manifest["shards"][0]["name"])
    return b"".join(forging.heads(manifest)) + member(name, other) + bytes(1024)


def split_shard(manifest, contents):
    """Return a bundle with a shard for each block, and an entry of one block."""
    origin, blocks = decode(contents[0])
    manifest["entry"]["num_tokens"] = 16
    return pack(manifest, [encode(origin, [block]) for block in blocks])


def old_root(blocks):
    return rehash(blocks, bytes(32))


def other_tokens(blocks):
    """Change a token and name that block by it, but not the one behind."""
    block = blocks[0].block
    tokens = (99, *block.tokens[1:])
    changed = replace(
        block, tokens=tokens, hash=hash_block_tokens(block.parent, tokens)
    )
    return [replace(blocks[0], block=changed), blocks[1]]


ROWS = Part("0.k.rows", "BF16", (1, 1, 16, 8), bytes(256))
FRAME = replace(ROWS, dtype="U8", shape=(256,), raw_nbytes=256)
LIES = {
    "another tip": edit_entry(tip="ab" * 32),
    "the tip before": lambda m, c: pack(
        m | {"entry": m["entry"] | {"tip": decode(c[0])[1][0].block.hash.hex()}}, c
    ),
    "fewer tokens": edit_entry(num_tokens=16),
    "more tokens": edit_entry(num_tokens=18),
    "no tokens": edit_entry(num_tokens=0),
    "countless tokens": edit_entry(num_tokens=2**70),
    "tokens as text": edit_entry(num_tokens="17"),
    "another root": edit_entry(root="ab" * 32),
    "a short tip": edit_entry(tip="ab"),
    "an unknown codec of the entry": edit_entry(codec="zip"),
    "a name that is an option": edit_entry(name="-rf"),
    "a name with a line end": edit_entry(name="a\nb"),
    "a name with an escape": edit_entry(name="\x1b[2J"),
    "an empty name": edit_entry(name=""),
    "a long name": edit_entry(name="x" * 201),
    "a name that is a number": edit_entry(name=7),
    "half a character": edit_entry(name="\ud800"),
    "a model that is null": edit_entry(model=None),
    "a model without end": edit_entry(model="x" * 70_000),
    "versions that are a list": edit_entry(made_with=[]),
    "versions that are numbers": edit_entry(made_with={"mlx": 1}),
    "a time long ago": edit_entry(created_at=-1.0),
    "a time that never comes": edit_entry(created_at=1e18),
    "a time that is true": edit_entry(created_at=True),
    "a pinned entry": edit_entry(pinned=True),
    "an entry that was updated": unsettled(
        lambda m: m["entry"].update(updated_at=m["entry"]["created_at"] + 1)
    ),
    "another size": unsettled(lambda m: m["entry"].update(nbytes=7)),
    "another id": unsettled(lambda m: m.update(id="ab" * 16)),
    "another id of both": unsettled(
        lambda m: (m.update(id="ab" * 16), m["entry"].update(id="ab" * 16))
    ),
    "a field more": edit_entry(x=1),
    "a field more beside": edit_manifest(lambda m: m.update(x=1)),
    "a size limit": edit_manifest(lambda m: m.update(max_bytes=1000)),
    "a field less": edit_manifest(lambda m: m["entry"].pop("model")),
    "a format that is text": edit_manifest(lambda m: m.update(format="1")),
    "an entry's format that is text": edit_manifest(
        lambda m: m["entry"].update(format="1")
    ),
    "blocks of no size": edit_manifest(lambda m: m.update(block_size=0)),
    "another fingerprint, the root too": relocated(
        lambda m: m["fingerprint"].update(weights="b"), keep_shard=True
    ),
    "no layers": relocated(lambda m: m.update(layout=[])),
    "an unknown class": edit_layout(lambda layer: layer.update({"class": "Evil"})),
    "another class": edit_layout(
        lambda layer: layer.update(
            {"class": "RotatingKVCache", "params": {"keep": 4, "max_size": 8}}
        )
    ),
    "a class without its parameters": edit_layout(
        lambda layer: layer.update({"class": "QuantizedKVCache"})
    ),
    "more states than there is memory": edit_layout(
        lambda layer: layer.update(
            {"class": "ArraysCache", "params": {"size": 2**40}, "rows": []}
        )
    ),
    "parameters that nobody asked for": edit_layout(
        lambda layer: layer["params"].update(x=1)
    ),
    "rows of another name": edit_row(0, "q"),
    "rows that begin later": edit_row(4, 3),
    "more heads than rows": edit_row(1, 2),
    "rows of another dtype": edit_row(3, "F32"),
    "rows of no dtype": edit_row(3, "X"),
    "rows without end": edit_row(2, 2**40),
    "other tokens": edit_chain(0, tokens=(9, *range(1, 16))),
    "other tokens in the tail": edit_chain(1, tokens=(9,)),
    "other tokens, hashed": edit_blocks(other_tokens),
    "another parent": edit_chain(1, parent=bytes(32)),
    "another start": edit_chain(1, start=17),
    "a chain from elsewhere": edit_blocks(old_root),
    "blocks in another order": edit_blocks(lambda blocks: blocks[::-1]),
    "shards in another order": split_shards,
    "more shards than blocks": split_shard,
    "a shard without blocks": empty_shard,
    "a shard of another model": other_origin,
    "a shard of another name": misnamed,
    "a block twice": edit_blocks(lambda blocks: [blocks[0], *blocks]),
    "a block too few": edit_blocks(lambda blocks: blocks[1:]),
    "no tail": edit_blocks(lambda blocks: blocks[:1]),
    "a block too many": edit_blocks(stranger),
    "no blocks": edit_blocks(lambda blocks: blocks.clear()),
    "short blocks before the last": relocated(
        lambda m: None, tokens=[tuple(range(15)), (15, 16)]
    ),
    "a long tail": relocated(
        lambda m: None, tokens=[tuple(range(16)), tuple(range(17))]
    ),
    "an unknown codec": edit_block(0, codec="zip"),
    "another codec": edit_block(0, codec="planes"),
    "a lossy codec": edit_block(
        0, codec="turbo4", is_lossless=False, bits=4
    ),
    "a lossless block that says it is lossy": edit_block(
        0, is_lossless=False, bits=4
    ),
    "a lossy block that says it is not": edit_block(0, codec="turbo4"),
    "a frame that is none": edit_block(
        0, codec="raw+zstd",
        parts=(FRAME, replace(FRAME, name="0.v.rows")),
    ),
    "windows that are not there": edit_block(0, num_extras=3),
    "a checkpoint that is not there": edit_block(0, num_extras=2**40),
    "a tensor more": add_part(replace(ROWS, name="0.k.more")),
    "a tensor of a layer that is none": add_part(replace(ROWS, name="1.k.rows")),
    "a tensor of another name": edit_part(0, name="0.k.raws"),
    "a tensor of another dtype": edit_part(0, dtype="F16"),
    "a tensor of another shape": edit_part(0, shape=(1, 1, 8, 16)),
    "a tensor that is longer": edit_part(
        0, shape=(1, 1, 17, 8), data=bytes(1 * 17 * 8 * 2)
    ),
    "a tensor that is far longer": edit_part(
        0, shape=(1, 1, 4096, 8), data=bytes(4096 * 8 * 2)
    ),
    "a tensor less": edit_blocks(
        lambda blocks: [replace(b, parts=b.parts[:1]) for b in blocks]
    ),
    "a block that says it has nothing": edit_block(
        0, parts=(Part("nothing", "U8", (1,), bytes(1)),)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, empty_store):
    """A store that stays as it is, whatever it is given."""
    return shutil.copytree(empty_store, tmp_path_factory.mktemp("same") / "store")


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_bundle_that_lies_is_refused(untouched, tiny, lie):
    """Whatever it says that does not fit the rest, with all digests put right."""
    manifest, contents = unpack(tiny)
    data = lie(copy.deepcopy(manifest), list(contents))
    assert data != tiny
    assert_refused(untouched, data, kvstore.IntegrityError, match="refused")


def test_states_that_are_missing_are_refused(stores):
    """An entry that could not be restored does not come in."""
    model = architectures.make_model("mamba2")
    cache = make_prompt_cache(model)
    architectures.feed(model, cache, list(range(20)))
    fingerprint = kvstore.Fingerprint({"weights": "x"})
    with kvstore.Store(stores[0], "raw") as store:
        store.save(list(range(20)), cache, fingerprint, name="doc")
    manifest, contents = unpack(export(stores[0]))
    origin, blocks = decode(contents[0])
    blocks[-1] = replace(
        blocks[-1], parts=(Part("nothing", "U8", (1,), bytes(1)),), num_extras=0
    )
    data = pack(manifest, [encode(origin, blocks)])
    assert_refused(stores[1], data, kvstore.IntegrityError, match="state or rows")


def test_json_spelled_otherwise_is_refused(stores, tiny):
    """JSON has many spellings; one of them is a bundle's."""
    manifest, contents = unpack(tiny)
    shard = bundles.shard_member(manifest["shards"][0]["name"])
    rest = member(shard, contents[0]) + bytes(1024)
    name = bundles.entry_member(manifest["entry"]["id"])
    config, entry = forging.heads(manifest)
    assert config + entry + rest == tiny

    def spellings(good):
        yield json.dumps(json.loads(good)).encode()
        yield good + b" "
        yield good[:-1] + b',"format":1}'
        yield good.replace(b'"id"', b'"\\u0069d"')
        yield good.replace(b'"format":1', b'"format":NaN')
        yield b"[" * 60_000
        yield b"null"
        yield b"\xff"

    good = seal(manifest["entry"])
    variants = [(s[:30], config + member(name, s) + rest) for s in spellings(good)]
    size = int(config[124:135], 8)
    for text in spellings(config[512 : 512 + size]):
        variants.append((text[:30], member(bundles.CONFIG, text) + entry + rest))
    assert refusals(stores[0], tiny, variants) == []


def test_a_newer_format_says_so(stores, tiny):
    """A later release's bundle, entry or shard asks for an upgrade."""
    manifest, contents = unpack(tiny)
    newer = pack(manifest | {"format": 3}, contents)
    assert_refused(stores[0], newer, kvstore.FormatError, match="has format 3")
    newer = pack(manifest | {"entry": manifest["entry"] | {"format": 2}}, contents)
    assert_refused(stores[0], newer, kvstore.FormatError, match="has format 2")
    shard = contents[0].replace(b'\\"format\\":1', b'\\"format\\":2')
    size = int.from_bytes(shard[:8], "little")
    text = shard[8 : 8 + size]
    at = text.index(b"header_digest") + len(b'header_digest\\":\\"')
    blank = text[:at] + b"0" * 64 + text[at + 64 :]
    digest = blake3.blake3(blank).hexdigest().encode()
    shard = shard[:8] + blank[:at] + digest + blank[at + 64 :] + shard[8 + size :]
    newer = pack(manifest, [shard])
    assert_refused(stores[0], newer, kvstore.FormatError, match="has format 2")


def test_what_is_too_large_is_not_read(untouched, tiny, monkeypatch):
    """Neither a tensor longer than its rows nor a frame of gigabytes is opened."""
    long = edit_part(0, shape=(1, 1, 4096, 8), data=bytes(4096 * 8 * 2))
    nbytes = 16 * 2**28 * 2
    frame = replace(FRAME, raw_nbytes=nbytes)

    def bomb(manifest, contents):
        for row in manifest["layout"][0]["rows"]:
            row[2] = 2**28
        parts = (frame, replace(frame, name="0.v.rows"))
        _, blocks = decode(contents[0])
        blocks = [replace(b, codec="raw+zstd", parts=parts) for b in blocks]
        origin = Origin(manifest["fingerprint"], manifest["layout"])
        contents[0] = encode(origin, blocks)
        return relocated(lambda m: None)(manifest, contents)

    monkeypatch.setattr(restore, "memory_bytes", lambda: 1 << 50)
    for lie in (long, bomb):
        data = lie(*unpack(tiny))
        assert_refused(untouched, data, kvstore.IntegrityError, match="too large")


def test_blocks_that_no_memory_holds_are_refused(stores, tiny, monkeypatch):
    """Frames of a few bytes each may not stand for more than a machine could hold."""
    nbytes = 17 * 2 * 8 * 2  # of both blocks
    monkeypatch.setattr(admitting, "_MAX_ENTRY_BYTES", nbytes - 1)
    assert_refused(stores[0], tiny, kvstore.IntegrityError, match="all blocks are too")
    monkeypatch.setattr(admitting, "_MAX_ENTRY_BYTES", nbytes)
    take(stores[0], tiny)


@pytest.mark.parametrize("where", ["model", "made_with", "fingerprint"])
def test_half_a_character_is_refused(stores, tiny, where):
    """What JSON can spell and no terminal can print is in no bundle."""
    manifest, contents = unpack(tiny)
    if where == "model":
        data = edit_entry(model="a\ud800")(manifest, contents)
    elif where == "made_with":
        data = edit_entry(made_with={"a\ud800": "1"})(manifest, contents)
    else:
        add = relocated(lambda m: m["fingerprint"].update(x=["a\ud800"]))
        data = add(manifest, contents)
    assert_refused(stores[0], data, kvstore.IntegrityError, match="half a character")


def test_a_model_in_a_folder_of_odd_bytes_is_exported(stores, caches):
    """Its label has characters that are none; it does not keep the entry at home."""
    fingerprint = replace(caches.MODEL, label="models/\udce4")
    cache = caches.make_cache(17, 6, layers=1, heads=1, dim=8)
    with kvstore.Store(stores[0], "raw") as store:
        store.save(list(range(17)), cache, fingerprint, name="doc")
    assert take(stores[1], export(stores[0])).model == "models/?"


def test_a_fingerprint_nested_deeply_is_refused(stores, tiny):
    """What a deeper call could not read again does not come in."""
    nested = []
    for _ in range(70):
        nested = [nested]
    data = relocated(lambda m: m["fingerprint"].update(x=nested))(*unpack(tiny))
    assert_refused(stores[0], data, kvstore.IntegrityError, match="nested too deeply")


def test_a_bundle_without_end_is_refused_before_the_disk_is_full(stores, tiny):
    """Blocks that go on after the entry's last one are not staged for ever."""
    _, contents = unpack(tiny)
    endless = edit_blocks(stranger)(*unpack(tiny))[:-1024]
    name = bundles.shard_member(shard_name(contents[0]))
    data = endless + 50 * member(name, contents[0])
    assert_refused(stores[0], data, kvstore.IntegrityError, match="shard")


def test_a_shard_larger_than_the_disk_is_not_staged(stores, tiny):
    """Neither what the entry says nor what a header says may fill the disk."""
    huge = unsettled(lambda m: m["entry"].update(nbytes=2**62))(*unpack(tiny))
    assert_refused(stores[0], huge, OSError, match="No space")


def test_what_a_sender_means_cannot_be_checked(stores, tiny):
    """A lie that is consistent to the last hash is believed: rows prove no tokens."""
    manifest, contents = unpack(tiny)
    tokens = [tuple(range(500, 516)), (516,)]
    data = relocated(lambda m: None, tokens=tokens)(manifest, list(contents))
    take(stores[0], data)
    with kvstore.Store(stores[0]) as store:
        held = [token for _, b in store.chain("doc") for token in b.block.tokens]
    assert held == list(range(500, 517))


def test_another_model_is_refused_by_its_field(stores, tiny, caches):
    """Given a fingerprint, what another model made is refused, and the field named."""
    before = tree(stores[0])
    for other, field in ((caches.OTHER_WEIGHTS, "weights"),
                         (caches.OTHER_ADAPTER, "adapter")):  # fmt: skip
        with pytest.raises(kvstore.FingerprintError, match=f"another model: {field}"):
            take(stores[0], tiny, fingerprint=other)
    assert tree(stores[0]) == before


def test_what_another_model_made_is_found_by_that_model_only(stores, tiny, caches):
    """Taken without a fingerprint, it is filed under the one that it states."""
    take(stores[0], tiny)
    prompt = [*range(17), 1]
    with kvstore.Store(stores[0]) as store:
        assert store.lookup(prompt, caches.OTHER_WEIGHTS).num_tokens == 0
        assert store.lookup(prompt, caches.MODEL).num_tokens == 17
        with pytest.raises(kvstore.FingerprintError):
            store.load_entry("doc", caches.OTHER_WEIGHTS)


def test_salts_are_kept_apart(stores, caches):
    """A salt travels in a bundle, and who lacks it finds nothing."""
    tokens, cache = caches.make_conversation(2, 3)
    salted = caches.MODEL.with_salt("ann")
    with kvstore.Store(stores[0], "raw") as store:
        store.save(tokens, cache, salted, name="doc")
    data = export(stores[0])
    with kvstore.Store(stores[1]) as store:
        with pytest.raises(kvstore.FingerprintError, match="salt"):
            store.import_bundle(io.BytesIO(data), fingerprint=caches.MODEL)
        store.import_bundle(io.BytesIO(data), fingerprint=salted)
        assert store.lookup([*tokens, 1], salted).num_tokens == len(tokens)
        assert store.lookup([*tokens, 1], caches.MODEL).num_tokens == 0


def test_blocks_of_another_size_are_refused(tmp_path, tiny):
    """Blocks of 16 tokens would never be found among blocks of 256."""
    path = create_folder(tmp_path / "usual").path
    assert_refused(path, tiny, match="blocks of 16 tokens, and the store of 256")
