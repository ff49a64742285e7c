"""What an imported bundle does to a store, and what others at work do to both."""

import io
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit import load_beside
from mlx_lm.models.cache import make_prompt_cache

import kvstore
from kvstore.ops.transfer import admit as admitting
from kvstore.ops.transfer import export_bundle as exporting
from kvstore.ops.transfer import import_bundle as importing
from kvstore.storage import blocks as reading
from kvstore.storage.entries import write_entry
from kvstore.storage.folder import open_folder

HERE = Path(__file__).parent
BLOCK = 16


architectures, forging = load_beside("architectures"), load_beside("forging")
export, take, tree, bits_of = (
    forging.export, forging.take, forging.tree, forging.bits_of,
)  # fmt: skip
unpack, bundle_names = forging.unpack, forging.bundle_names
assert_refused = forging.assert_refused
# Fixtures.
stores, small, tiny = forging.stores, forging.small, forging.tiny


# --- Sharing. ---


def shard_bytes(path):
    """Return the bytes of all shards of a store."""
    return sum(shard.stat().st_size for shard in path.glob("shards/*/*"))


def written(path):
    """Return how many bytes a store has counted as written."""
    with kvstore.Store(path, create=False) as store:
        return store.stats().counters.get("written_bytes", 0)


def test_blocks_that_are_there_are_not_written_again(stores, small, caches):
    """Of a shard that is known nothing is written, of one half known the other half."""
    size = 30 * BLOCK
    part = caches.grow(None, small.rows[..., :size, :])
    with kvstore.Store(stores[0], "raw") as store:
        store.save(small.tokens[:size], part, caches.MODEL, name="mine")
    before = shard_bytes(stores[0])
    take(stores[0], small.data)
    added = shard_bytes(stores[0]) - before
    assert written(stores[0]) == before + added
    _, contents = unpack(small.data)
    assert 0.4 < added / sum(map(len, contents)) < 0.65
    shard_names = {path.stem for path in stores[0].glob("shards/*/*")}
    assert bundle_names(small.data)[1] in shard_names
    assert bundle_names(small.data)[0] not in shard_names
    with kvstore.Store(stores[0]) as store:
        assert store.verify() == []
        received, tokens = store.load_entry("doc", caches.MODEL)
        assert store.load_entry("mine", caches.MODEL)[1] == small.tokens[:size]
    assert tokens == small.tokens
    assert bits_of(received) == bits_of(small.cache)
    take(stores[0], small.data)
    assert shard_bytes(stores[0]) == before + added


@pytest.mark.parametrize("rebuild", [False, True])
def test_what_the_store_has_is_never_replaced(stores, caches, rebuild):
    """Foreign rows that call themselves exact do not take the place of our lossy ones.

    Not even when the index is built anew from the shards.
    """
    tokens, cache = caches.make_conversation(4, 3)
    with kvstore.Store(stores[0], "raw") as store:
        store.save([*tokens, 7], caches.make_cache(65, 4), caches.MODEL, name="doc")
    with kvstore.Store(stores[1], "turbo4") as store:
        store.save(tokens, cache, caches.MODEL, name="mine")
        mine, _ = store.load_entry("mine", caches.MODEL)
    take(stores[1], export(stores[0]))
    if rebuild:
        for path in stores[1].glob("index.sqlite*"):
            path.unlink()
    with kvstore.Store(stores[1]) as store:
        assert store.verify() == [] or rebuild
        assert bits_of(store.load_entry("mine", caches.MODEL)[0]) == bits_of(mine)
        assert not any(p.is_exact for p, _ in store.chain("doc")[:4])
        assert store.load([*tokens, 1], caches.MODEL, exact=True)[0] is None


def test_what_is_said_of_an_entry_is_not_replaced(stores, tiny):
    """The same blocks with other words about them change no word of ours."""
    first = take(stores[0], tiny)
    manifest, contents = unpack(tiny)
    lies = {"model": "other", "codec": "turbo2", "made_with": {"x": "y"}}
    manifest["entry"] |= lies | {"created_at": 7.0}
    again = take(stores[0], forging.pack(manifest, contents))
    assert replace(again, updated_at=first.updated_at) == first
    assert take(stores[1], forging.pack(manifest, contents)).model == "other"


def test_our_own_exact_rows_replace_foreign_ones(stores, caches):
    """What came lossy from elsewhere is made exact by a save, as any lossy block."""
    tokens, cache = caches.make_conversation(4, 3)
    with kvstore.Store(stores[0], "turbo2") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
    take(stores[1], export(stores[0]))
    with kvstore.Store(stores[1], "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
        found, _ = store.load([*tokens, 1], caches.MODEL, exact=True)
    assert bits_of(found) == bits_of(cache)


RECURRENT = kvstore.Fingerprint({"weights": "x"})


def save_recurrent(stores):
    """Save the start of a text in one store, and in the other all of it at once."""
    model = architectures.make_model("mamba2")
    tokens = list(range(48))
    cache = make_prompt_cache(model)
    with kvstore.Store(stores[0], "raw") as store:
        architectures.feed(model, cache, tokens[:32])
        store.save(tokens[:32], cache, RECURRENT, name="doc")
    with kvstore.Store(stores[1], "raw") as store:
        architectures.feed(model, cache, tokens[32:])
        store.save(tokens, cache, RECURRENT, name="mine")


def test_an_entry_that_our_blocks_cannot_carry_is_refused(stores):
    """Ours lacks the state that it needs and is not replaced: that is said."""
    save_recurrent(stores)
    before = tree(stores[1])
    with pytest.raises(kvstore.KVStoreError, match="never replaced"):
        take(stores[1], export(stores[0]))
    assert set(tree(stores[1])) == set(before)
    with kvstore.Store(stores[1]) as store:
        store.load_entry("mine", RECURRENT)


def test_what_cannot_be_restored_is_not_exported(stores):
    """An entry whose last block lacks its state is no use to anybody."""
    save_recurrent(stores)
    (entry,) = stores[0].glob("entries/*")
    shutil.copy(entry, stores[1] / "entries")
    with (
        kvstore.Store(stores[1]) as store,
        pytest.raises(kvstore.IntegrityError, match="cannot be rebuilt"),
    ):
        store.export_bundle("doc", io.BytesIO())


def test_what_all_descends_from_is_told_to_an_index_that_lost_it(stores, tiny, caches):
    """Where nothing is missing but the root, prompts find it again."""
    take(stores[0], tiny)
    with kvstore.Store(stores[0]) as store:
        store._blocks.index._query("DELETE FROM roots")
        assert store.lookup([*range(17), 1], caches.MODEL).num_tokens == 0
        store.import_bundle(io.BytesIO(tiny))
        assert store.lookup([*range(17), 1], caches.MODEL).num_tokens == 17


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_a_damaged_block_of_ours_is_healed_by_a_bundle(
    stores, caches, flip_bit, num_blocks
):
    """What cannot be read is not ours any more, and a good copy takes its place.

    Even a shard of the very name of one that was found damaged.
    """
    tokens, cache = caches.make_conversation(num_blocks, 3)
    for path in stores[:2]:
        with kvstore.Store(path, "raw") as store:
            store.save(tokens, cache, caches.MODEL, name="doc")
    (shard,) = stores[1].glob("shards/*/*")
    flip_bit(shard, shard.stat().st_size * 8 - 5)
    with kvstore.Store(stores[1]) as store:
        with pytest.raises(kvstore.IntegrityError):
            store.load_entry("doc", caches.MODEL)
        store.import_bundle(io.BytesIO(export(stores[0])))
        received, _ = store.load_entry("doc", caches.MODEL)
    assert bits_of(received) == bits_of(cache)


# --- Names. ---


def test_a_taken_name_is_refused(stores, tiny, caches):
    """As with a save: not without `replace`, unless it goes on with the same entry."""
    tokens, cache = caches.make_conversation(2, 9)
    with kvstore.Store(stores[0], "raw") as store:
        mine = store.save(tokens, cache, caches.MODEL, name="doc")
    before = tree(stores[0])
    with pytest.raises(kvstore.EntryExistsError, match="`doc` is taken"):
        take(stores[0], tiny)
    assert set(tree(stores[0])) == set(before)
    assert take(stores[0], tiny, name="theirs").num_tokens == 17
    with kvstore.Store(stores[0]) as store:
        assert store.entry("doc") == mine
    assert take(stores[0], tiny, replace=True).num_tokens == 17


def test_a_name_goes_on_with_its_entry(stores, store_path, caches):
    """A bundle that continues an entry takes its name; the shorter one does not."""
    rows = caches.random_rows(50, 1)
    for path, size in zip(stores, (20, 50), strict=False):
        with kvstore.Store(path, "raw") as store:
            cache = caches.grow(None, rows[..., :size, :])
            store.save(list(range(size)), cache, caches.MODEL, name="doc")
    short, long = export(stores[0]), export(stores[1])
    first = take(store_path, short)
    second = take(store_path, long)
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert take(store_path, long).num_tokens == 50
    with pytest.raises(kvstore.EntryExistsError):
        take(store_path, short)


def test_a_name_that_is_taken_meanwhile_is_refused(stores, tiny, caches, monkeypatch):
    """Who commits first has the name; nothing is published for the other."""
    tokens, cache = caches.make_conversation(2, 9)

    def save():
        with kvstore.Store(stores[0], "raw") as store:
            store.save(tokens, cache, caches.MODEL, name="doc")

    meanwhile(monkeypatch, admitting, "make_room", save)
    with pytest.raises(kvstore.EntryExistsError, match="`doc` is taken"):
        take(stores[0], tiny)
    with kvstore.Store(stores[0]) as store:
        assert store.load_entry("doc", caches.MODEL)[1] == tokens
        assert store.stats().num_shards == 1


def test_a_wrong_name_is_refused_before_anything_is_read(stores, tiny):
    """`name=` is a name or nothing happens."""
    file = io.BytesIO(tiny)
    with kvstore.Store(stores[0]) as store, pytest.raises(ValueError, match="a name"):
        store.import_bundle(file, name="-x")
    assert file.tell() == 0


# --- Others at work. ---


def meanwhile(monkeypatch, owner, name, work):
    """Have something happen once, just before a function runs."""
    original = getattr(owner, name)
    waiting = [work]

    def first(*arguments, **options):
        if waiting:
            waiting.pop()()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, first)


def grown(path, caches):
    """Let a store hold an entry in several shards, each with dead blocks."""
    rows = caches.random_rows(6 * BLOCK, 1)
    with kvstore.Store(path, "raw") as store:
        for size in (2 * BLOCK, 6 * BLOCK):
            cache = caches.grow(None, rows[..., :size, :])
            store.save(list(range(size)), cache, caches.MODEL, name="long")
        cache = caches.grow(None, rows[..., : 3 * BLOCK, :])
        store.save(list(range(3 * BLOCK)), cache, caches.MODEL, name="doc")
        store.remove("long")


def test_an_export_follows_blocks_that_prune_moves(stores, caches, monkeypatch):
    """Between the two readings, blocks move; the bundle is the same."""
    grown(stores[0], caches)
    expected = export(stores[0])
    names = {shard.name for shard in stores[0].glob("shards/*/*")}

    def move():
        with kvstore.Store(stores[0]) as store:
            assert store.plan_prune(now=True).execute() > 0

    meanwhile(monkeypatch, exporting, "write_bundle", move)
    assert export(stores[0]) == expected
    assert {shard.name for shard in stores[0].glob("shards/*/*")} != names


def test_an_export_follows_blocks_that_move_under_its_eyes(stores, caches, monkeypatch):
    """A block that lies elsewhere, and at another place there, is the same block."""
    rows = caches.random_rows(6 * BLOCK, 1)
    tokens = list(range(6 * BLOCK))
    for codec, size, name in (("turbo4", 6, "doc"), ("raw", 4, "exact")):
        with kvstore.Store(stores[0], codec) as store:
            cache = caches.grow(None, rows[..., : size * BLOCK, :])
            store.save(tokens[: size * BLOCK], cache, caches.MODEL, name=name)
    expected = export(stores[0])

    def move():
        with kvstore.Store(stores[0]) as store:
            assert store.plan_prune(now=True).execute() > 0

    def move_later():
        # Between finding where blocks lie and opening the file.
        meanwhile(monkeypatch, reading.BlockStore, "read", move)

    meanwhile(monkeypatch, exporting, "write_bundle", move_later)
    assert export(stores[0]) == expected


def test_an_export_of_what_prune_removes_is_no_bundle(stores, caches, monkeypatch):
    """Where blocks are gone for good, the export fails, and so does what it wrote."""
    grown(stores[0], caches)

    def remove():
        with kvstore.Store(stores[0]) as store:
            store.remove("doc")
            store.plan_prune(now=True).execute()

    meanwhile(monkeypatch, exporting, "write_bundle", remove)
    file = io.BytesIO()
    with (
        kvstore.Store(stores[0]) as store,
        pytest.raises(kvstore.IntegrityError, match="missing"),
    ):
        store.export_bundle("doc", file)
    assert_refused(stores[1], file.getvalue(), kvstore.IntegrityError)


def test_an_export_of_another_copy_is_no_bundle(stores, caches, monkeypatch):
    """Rows that a save makes exact meanwhile do not get into a lossy bundle."""
    tokens, cache = caches.make_conversation(4, 3)
    with kvstore.Store(stores[0], "turbo4") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")

    def improve():
        with kvstore.Store(stores[0], "raw") as store:
            store.save(tokens, cache, caches.MODEL, name="doc")

    meanwhile(monkeypatch, exporting, "write_bundle", improve)
    file = io.BytesIO()
    with (
        kvstore.Store(stores[0]) as store,
        pytest.raises(kvstore.IntegrityError, match="replaced") as caught,
    ):
        store.export_bundle("doc", file)
    assert caught.value.hint
    assert_refused(stores[1], file.getvalue(), kvstore.IntegrityError)


@pytest.mark.parametrize("when", ["_prepared", "make_room"])
def test_an_import_writes_what_prune_takes_away(
    stores, small, caches, monkeypatch, when
):
    """Blocks that were there when it began, and are gone, come from the bundle."""
    with kvstore.Store(stores[0], "raw") as store:
        part = caches.grow(None, small.rows[..., :160, :])
        store.save(small.tokens[:160], part, caches.MODEL, name="mine")

    def remove():
        with kvstore.Store(stores[0]) as store:
            store.remove("mine")
            assert store.plan_prune(now=True).execute() > 0

    meanwhile(monkeypatch, admitting, when, remove)
    take(stores[0], small.data)
    with kvstore.Store(stores[0]) as store:
        assert store.verify() == []
        assert bits_of(store.load_entry("doc", caches.MODEL)[0]) == bits_of(small.cache)


def test_an_import_keeps_what_a_save_is_faster_with(stores, small, caches, monkeypatch):
    """Blocks that somebody computes here meanwhile are ours, and stay."""
    own = caches.make_cache(160, 99, layers=1, heads=1, dim=8)

    def save():
        with kvstore.Store(stores[0], "turbo8") as store:
            store.save(small.tokens[:160], own, caches.MODEL, name="mine")

    meanwhile(monkeypatch, admitting, "make_room", save)
    take(stores[0], small.data)
    with kvstore.Store(stores[0]) as store:
        assert store.verify() == []
        assert not any(p.is_exact for p, _ in store.chain("doc")[:10])
        assert all(p.is_exact for p, _ in store.chain("doc")[10:])


def test_two_may_import_the_same_at_once(stores, small, caches):
    """One of them writes the blocks; both have the entry."""
    done = []

    def work():
        done.append(take(stores[0], small.data))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in done] == ["doc", "doc"]
    assert len(list(stores[0].glob("shards/*/*"))) == 2
    with kvstore.Store(stores[0]) as store:
        assert store.verify() == []


def test_an_import_makes_room(stores, small, caches):
    """A store with a limit evicts what has no name, as for a save."""
    with kvstore.Store(stores[0], "raw") as store:
        for seed in range(3, 9):
            tokens, cache = caches.make_conversation(3, seed)
            store.save(tokens, cache, caches.MODEL)
        store.set_limit(len(small.data) + 20_000)
        store.import_bundle(io.BytesIO(small.data))
        assert shard_bytes(stores[0]) <= len(small.data) + 20_000
        assert store.entries()[0].name == "doc"
        assert len(store.entries()) < 4


def test_a_refused_import_evicts_nothing(stores, small, caches):
    """Room is made when nothing stands in the way any more."""
    with kvstore.Store(stores[0], "raw") as store:
        for seed, name in ((3, None), (4, "doc")):
            tokens, cache = caches.make_conversation(3, seed)
            store.save(tokens, cache, caches.MODEL, name=name)
        store.set_limit(1000)
        with pytest.raises(kvstore.EntryExistsError):
            store.import_bundle(io.BytesIO(small.data))
        assert len(store.entries()) == 2


def test_a_long_import_keeps_its_staged_files(stores, small, monkeypatch):
    """`prune` takes staged files for forgotten after an hour, so they are touched."""
    monkeypatch.setattr(importing, "_TOUCH_EVERY_S", -1.0)
    touched = []
    monkeypatch.setattr(os, "utime", lambda path: touched.append(path.exists()))
    take(stores[0], small.data)
    assert touched == [True] * 3


# --- A disk that fails, and kills. ---


def test_damage_is_found_before_anything_is_written(stores, caches, flip_bit):
    """An entry with a damaged block is not exported."""
    tokens, cache = caches.make_conversation(4, 3)
    with kvstore.Store(stores[0], "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
    (shard,) = stores[0].glob("shards/*/*")
    flip_bit(shard, shard.stat().st_size * 8 - 5)
    file = io.BytesIO()
    with kvstore.Store(stores[0]) as store:
        with pytest.raises(kvstore.IntegrityError, match="does not match its digest"):
            store.export_bundle("doc", file)
        with pytest.raises(kvstore.EntryNotFoundError):
            store.export_bundle("other", file)
    assert file.getvalue() == b""


def test_what_nobody_could_read_is_not_exported(stores, caches):
    """A bundle that a reader would refuse is not begun."""
    tokens, cache = caches.make_conversation(1, 3)
    file = io.BytesIO()
    with kvstore.Store(stores[0], "raw") as store:
        entry = store.save(tokens, cache, caches.MODEL, name="doc")
        folder = open_folder(stores[0])
        strange = replace(entry, created_at=1e18)
        write_entry(folder, strange)
        with pytest.raises(kvstore.IntegrityError, match="time is out of range"):
            store.export_bundle("doc", file)
    assert file.getvalue() == b""


def test_a_full_disk_is_told_before_anything_is_staged(stores, tiny, monkeypatch):
    """What cannot fit is not begun."""
    disk = os.statvfs(stores[0])
    fake = SimpleNamespace(f_bavail=3, f_frsize=512, f_blocks=disk.f_blocks)
    monkeypatch.setattr(admitting.os, "statvfs", lambda path: fake)
    with kvstore.Store(stores[0]) as store, pytest.raises(OSError, match="No space"):
        store.import_bundle(io.BytesIO(tiny))
    assert os.listdir(stores[0] / "tmp") == []


LIMITED = """
import resource, sys, io, kvstore
data = open(sys.argv[2], "rb").read()
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with kvstore.Store(sys.argv[1]) as store:
        store.import_bundle(io.BytesIO(data))
except OSError as error:
    print("OSError", error.errno)
else:
    print("imported")
"""


@pytest.mark.parametrize("limit", [40_000, 1 << 20])
def test_a_limit_on_the_size_of_files_loses_nothing(
    stores, small, tmp_path, run_python, limit
):
    """With `ulimit -f`, an import fails as a whole, or works."""
    bundle = tmp_path / "bundle"
    bundle.write_bytes(small.data)
    said = run_python(LIMITED, stores[0], bundle, limit).stdout.split()
    assert said[0] == ("imported" if limit == 1 << 20 else "OSError")
    assert os.listdir(stores[0] / "tmp") == []
    with kvstore.Store(stores[0]) as store:
        assert store.verify() == []
        assert len(store.entries()) == (limit == 1 << 20)


# Prepares everything, and then dies in one child after the other, each at another call.
KILLED = """
import io, os, shutil, signal, sys
import caches, kvstore, mlx_lm.models.cache
from kvstore.ops import commit
from kvstore.ops.transfer import admit, import_bundle
from pathlib import Path

template, bundle, folder, calls = sys.argv[1:]
data = Path(bundle).read_bytes()

def work(store, call, when):
    original, seen = getattr(os, call), 0
    def wrapped(*arguments, **options):
        nonlocal seen
        seen += 1
        if seen == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(os, call, wrapped)
    with kvstore.Store(store) as opened:
        opened.import_bundle(io.BytesIO(data))

for call in calls.split(","):
    status, when = 9, 0
    while os.WIFSIGNALED(status):
        when += 1
        store = Path(folder) / f"{call}-{when}"
        shutil.copytree(template, store)
        child = os.fork()
        if child == 0:
            try:
                work(store, call, when)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(store)
"""


def check_killed(path, small, caches, mine):
    """Check a store in which an import was killed, and import again."""
    with kvstore.Store(path, create=False) as store:
        assert [f"{f.kind}: {f.detail}" for f in store.verify()] == []
        assert bits_of(store.load_entry("mine", caches.MODEL)[0]) == mine
        names = [entry.name for entry in store.entries()]
        assert names in (["mine"], ["doc", "mine"])
        if "doc" in names:
            received, _ = store.load_entry("doc", caches.MODEL)
            assert bits_of(received) == bits_of(small.cache)
        store.import_bundle(io.BytesIO(small.data))
        received, tokens = store.load_entry("doc", caches.MODEL)
        assert (tokens, bits_of(received)) == (small.tokens, bits_of(small.cache))
        assert store.verify() == []
    assert len(os.listdir(path / "tmp")) <= 4
    return "doc" in names


@pytest.fixture
def shared(stores, small, caches):
    """A store that has some of the small bundle's blocks, and the bits of its entry."""
    part = caches.grow(None, small.rows[..., :160, :])
    with kvstore.Store(stores[0], "raw") as store:
        store.save(small.tokens[:160], part, caches.MODEL, name="mine")
    return stores[0], bits_of(part)


@pytest.mark.parametrize(
    "calls",
    ["fsync,replace,unlink", pytest.param("open,write,close", marks=pytest.mark.slow)],
)
def test_a_kill_at_any_call_leaves_all_or_nothing(
    shared, small, tmp_path, caches, run_python, calls
):
    """Killed before each sync, rename and removal: the entry is there, or it is not."""
    path, mine = shared
    bundle, folder = tmp_path / "bundle", tmp_path / "killed"
    bundle.write_bytes(small.data)
    folder.mkdir()
    said = run_python(KILLED, path, bundle, folder, calls).stdout.split()
    seen = [check_killed(Path(store), small, caches, mine) for store in said]
    assert len(said) > 15
    assert True in seen
    assert False in seen


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(
    "when", [9, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 30, 3))]
)
def test_a_kill_while_the_index_is_written_leaves_all_or_nothing(
    shared, small, tmp_path, caches, run_python, when
):
    """SQLite's own writes are points to die at, too."""
    path, mine = shared
    bundle = tmp_path / "bundle"
    bundle.write_bytes(small.data)
    program = LIMITED.replace("resource.setrlimit", "(lambda *arguments: None)")
    inject = f"inject=pwrite64:signal=KILL:when={when}"
    command = ["strace", "-f", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", inject]
    done = subprocess.run(
        [*command, sys.executable, "-c", program, path, bundle, "1"],
        capture_output=True, check=False, env=os.environ, cwd=HERE.parent.parent,
    )  # fmt: skip
    assert done.returncode in (0, -9, 137)
    check_killed(path, small, caches, mine)


class OneByOne(io.RawIOBase):
    """A stream that cannot be sought in and gives few bytes at a time."""

    def __init__(self, data):
        self._rest = data

    def readable(self):
        """Say that it can be read."""
        return True

    def read(self, size=-1):
        """Return fewer bytes than asked for."""
        size = min(size, 1 + size // 3)
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


def test_a_stream_may_give_less_than_is_asked_for(stores, small):
    """A pipe is read as it comes, and a short write goes on."""

    class Short(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data)[: 1 + len(data) // 2])

    with kvstore.Store(stores[0]) as store:
        store.import_bundle(OneByOne(small.data))
        file = Short()
        store.export_bundle("doc", file)
    assert file.getvalue() == small.data


def test_memory_does_not_grow_with_the_bundle(stores, caches, run_python, tmp_path):
    """A bundle is read a block at a time."""
    program = """
import resource, sys, tracemalloc, io, kvstore, mlx_lm.models.cache
from kvstore.ops.transfer import import_bundle
with kvstore.Store(sys.argv[1]) as store, open(sys.argv[2], "rb") as file:
    tracemalloc.start()
    store.import_bundle(file)
    print(tracemalloc.get_traced_memory()[1])
"""
    tokens = list(range(40 * BLOCK))
    cache = caches.make_cache(len(tokens), 1, layers=4, heads=8, dim=256)
    with kvstore.Store(stores[0], "raw") as store:
        store.save(tokens, cache, caches.MODEL, name="doc")
    data = export(stores[0])
    (tmp_path / "bundle").write_bytes(data)
    peak = int(run_python(program, stores[1], tmp_path / "bundle").stdout)
    assert len(data) > 20_000_000
    assert peak < 6_000_000
