"""What goes wrong on a disk, and what each way of asking then answers.

One table: fault × (`load(tokens)`, `load_entry(NAME)`, `verify`) → outcome. Nothing
wrong is ever loaded, nothing else is lost, and saving again heals.
"""

import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

import kvstore
from kvstore.storage import files
from kvstore.storage.folder import open_folder

BLOCKS = 4
EXTRA = 5
CODEC = "turbo4+zstd"


class WrongRowsError(AssertionError):
    """Rows were loaded that are not those that were saved."""


# --- What is stored, once; every test works on a copy. ---


@pytest.fixture(scope="session")
def world(tmp_path_factory, empty_store, caches):
    """A store with two conversations, and what a clean load of them gives."""
    return make_world(tmp_path_factory.mktemp("faults"), empty_store, caches)


def make_world(folder, empty_store, caches):
    """Return that store, made in a folder."""
    path = shutil.copytree(empty_store, folder / "store")
    saved = {
        name: caches.make_conversation(BLOCKS, seed, extra=EXTRA)
        for seed, name in ((1, "a"), (2, "b"))
    }
    shards = {}
    for name, (tokens, cache) in saved.items():
        before = set(path.glob("shards/*/*.safetensors"))
        with kvstore.Store(path, codec=CODEC) as store:
            store.save(tokens, cache, caches.MODEL, name=name)
        (shard,) = set(path.glob("shards/*/*.safetensors")) - before
        shards[name] = shard.relative_to(path)
    with kvstore.Store(path, codec=CODEC) as store:
        rows = {}
        for name in saved:
            restored, tokens = store.load_entry(name, caches.MODEL)
            assert saved[name][0] == tokens
            rows[name] = caches.rows_of(restored)
        ids = {name: store.entry(name).id for name in saved}
        assert [] == store.verify()
    return SimpleNamespace(path=path, saved=saved, shards=shards, rows=rows, ids=ids)


@pytest.fixture
def broken(world, caches, tmp_path):
    """A copy of the store, and the three ways of asking."""
    return Broken(world, caches, shutil.copytree(world.path, tmp_path / "broken"))


class Broken:
    """A store that something happens to."""

    def __init__(self, world, caches, path):
        self.world = world
        self.caches = caches
        self.path = path
        self.model = caches.MODEL

    def shard(self, name="a"):
        """Return the shard that holds a conversation."""
        return self.path / self.world.shards[name]

    def entry(self, name="a"):
        """Return the file of an entry."""
        return self.path / "entries" / f"{self.world.ids[name]}.json"

    @property
    def index(self):
        """Return the file of the index."""
        return self.path / "index.sqlite"

    def check_rows(self, name, restored, num_tokens):
        """Raise an error unless a prompt cache holds a conversation's first rows."""
        num_bytes = 64 * 2  # of one row of one head, bfloat16
        for clean, found in zip(
            self.world.rows[name], self.caches.rows_of(restored), strict=True
        ):
            heads = len(clean) // num_bytes // (BLOCKS * self.caches.BLOCK + EXTRA)
            for head in range(heads):
                size = len(clean) // heads
                begin = clean[head * size : head * size + num_tokens * num_bytes]
                mine = len(found) // heads
                if found[head * mine : (head + 1) * mine] != begin:
                    raise WrongRowsError(f"{name}: {num_tokens} tokens")

    def load(self, name="a"):
        """Load by tokens: `right`, `part`, `miss`, or an error's name."""
        tokens = self.world.saved[name][0]
        try:
            with kvstore.Store(self.path, create=False) as store:
                restored, rest = store.load([*tokens, 7], self.model)
        except (kvstore.KVStoreError, OSError) as error:
            return type(error).__name__
        held = len(tokens) + 1 - len(rest)
        assert [*tokens, 7][held:] == rest
        if restored is None:
            assert 0 == held
            return "miss"
        assert held == restored[0].offset
        self.check_rows(name, restored, held)
        return "right" if held == len(tokens) else "part"

    def load_entry(self, name="a"):
        """Load by name: `right`, or an error's name."""
        try:
            with kvstore.Store(self.path, create=False) as store:
                restored, tokens = store.load_entry(name, self.model)
        except (kvstore.KVStoreError, OSError) as error:
            return type(error).__name__
        assert self.world.saved[name][0] == tokens
        self.check_rows(name, restored, len(tokens))
        return "right"

    def verify(self):
        """Return the kinds of findings, or an error's name."""
        try:
            with kvstore.Store(self.path, create=False) as store:
                return " ".join(sorted({finding.kind for finding in store.verify()}))
        except (kvstore.KVStoreError, OSError) as error:
            return type(error).__name__

    def save(self, name="a"):
        """Save a conversation again."""
        tokens, cache = self.world.saved[name]
        with kvstore.Store(self.path, codec=CODEC, create=False) as store:
            return store.save(tokens, cache, self.caches.MODEL, name=name)


# --- The faults. ---


def flip(path, bit):
    """Flip one bit of a file, whatever its mode."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    overwrite(path, bytes(data))


def overwrite(path, data):
    """Change a file in place, whatever its mode."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(mode)


def truncate(path, size):
    """Cut a file off."""
    overwrite(path, path.read_bytes()[:size])


def header_of(path):
    """Return a shard's header, and where its data begins."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def flip_tensor(path, name):
    """Flip a bit in the middle of a tensor of a shard."""
    header, begin = header_of(path)
    first, last = header[name]["data_offsets"]
    flip(path, (begin + (first + last) // 2) * 8 + 3)


def swap_shards(store):
    """Give two shards each other's names."""
    a, b = store.shard("a").read_bytes(), store.shard("b").read_bytes()
    overwrite(store.shard("a"), b)
    overwrite(store.shard("b"), a)


def remove_index(store):
    """Delete the index."""
    for path in store.path.glob("index.sqlite*"):
        path.unlink()


def use_model(name):
    """Return a fault that is a question by another model."""

    def fault(store):
        store.model = getattr(store.caches, name)

    return fault


def clear(store):
    """Let the folder be something else."""
    shutil.rmtree(store.path)
    store.path.mkdir()
    (store.path / "thesis.txt").write_text("years of work")


FAULTS = {
    "nothing": lambda s: None,
    "other weights": use_model("OTHER_WEIGHTS"),
    "other adapter": use_model("OTHER_ADAPTER"),
    "shard: missing": lambda s: s.shard().unlink(),
    "shard: empty": lambda s: truncate(s.shard(), 0),
    "shard: cut in the header": lambda s: truncate(s.shard(), 100),
    "shard: cut by a byte": lambda s: truncate(s.shard(), -1),
    "shard: a byte more": lambda s: overwrite(s.shard(), s.shard().read_bytes() + b"x"),
    "shard: zeros": lambda s: overwrite(s.shard(), bytes(9000)),
    "shard: length flipped": lambda s: flip(s.shard(), 3),
    "shard: header flipped": lambda s: flip(s.shard(), 8000),
    "shard: sinks flipped": lambda s: flip_tensor(s.shard(), "0.0.k.sinks"),
    "shard: norms flipped": lambda s: flip_tensor(s.shard(), "1.0.v.norms"),
    "shard: codes flipped": lambda s: flip_tensor(s.shard(), "2.0.k.codes"),
    "shard: mean flipped": lambda s: flip_tensor(s.shard(), "3.0.k.mean"),
    "shard: tail flipped": lambda s: flip_tensor(s.shard(), "4.0.k.high"),
    "shards: swapped": swap_shards,
    "entry: missing": lambda s: s.entry().unlink(),
    "entry: flipped": lambda s: flip(s.entry(), 777),
    "entry: empty": lambda s: truncate(s.entry(), 0),
    "entry: another's": lambda s: overwrite(s.entry(), s.entry("b").read_bytes()),
    "index: missing": remove_index,
    "index: empty": lambda s: truncate(s.index, 0),
    "index: cut": lambda s: truncate(s.index, 5000),
    "index: garbage": lambda s: overwrite(s.index, b"x" * 9000),
    "index: magic flipped": lambda s: flip(s.index, 3 * 8),
    "index: page size flipped": lambda s: flip(s.index, 16 * 8 + 1),
    "index: page 1 flipped": lambda s: flip(s.index, 100 * 8),
    "index: a newer release's": lambda s: flip(s.index, 63 * 8 + 1),
    "no store": clear,
}
# Full disks, Ctrl-C, kills and unknown classes have tests of their own.
OUTCOMES = """
fault                    | load    | load NAME          | verify
-------------------------|---------|--------------------|---------------------------
nothing                  | right   | right              |
other weights            | miss    | FingerprintError   |
other adapter            | miss    | FingerprintError   |
shard: missing           | miss    | IntegrityError     | missing-block missing-shard
shard: empty             | miss    | IntegrityError     | damaged-shard missing-block
shard: cut in the header | miss    | IntegrityError     | damaged-shard missing-block
shard: cut by a byte     | miss    | IntegrityError     | damaged-shard missing-block
shard: a byte more       | miss    | IntegrityError     | damaged-shard missing-block
shard: zeros             | miss    | IntegrityError     | damaged-shard missing-block
shard: length flipped    | miss    | IntegrityError     | damaged-shard missing-block
shard: header flipped    | miss    | IntegrityError     | damaged-shard missing-block
shard: sinks flipped     | miss    | IntegrityError     | damaged-block missing-block
shard: norms flipped     | part    | IntegrityError     | damaged-block missing-block
shard: codes flipped     | part    | IntegrityError     | damaged-block missing-block
shard: mean flipped      | part    | IntegrityError     | damaged-block missing-block
shard: tail flipped      | part    | IntegrityError     | damaged-block missing-block
shards: swapped          | right   | right              | damaged-index damaged-shard
entry: missing           | right   | EntryNotFoundError |
entry: flipped           | right   | IntegrityError     | damaged-entry
entry: empty             | right   | IntegrityError     | damaged-entry
entry: another's         | right   | IntegrityError     | damaged-entry
index: missing           | right   | right              | damaged-index
index: empty             | right   | right              | damaged-index
index: cut               | right   | right              | damaged-index
index: garbage           | right   | right              | damaged-index
index: magic flipped     | right   | right              | damaged-index
index: page size flipped | right   | right              | damaged-index
index: page 1 flipped    | right   | right              | damaged-index
index: a newer release's | refused | FormatError        | FormatError
no store                 | refused | StoreNotFoundError | StoreNotFoundError
"""


def read_table(text):
    """Return fault to outcome for each way of asking."""
    rows = [
        [cell.strip() for cell in line.split("|")] for line in text.split("\n")[3:-1]
    ]
    return {
        fault: {
            "load": name if load == "refused" else load,
            "load_entry": name,
            "verify": verify,
        }
        for fault, load, name, verify in rows
    }


TABLE = read_table(OUTCOMES)
# Where nothing is left that could heal.
HOPELESS = {"no store", "index: a newer release's"}


def test_every_fault_has_outcomes():
    """The table is of all faults, and of no others."""
    assert list(FAULTS) == list(TABLE)


@pytest.mark.parametrize("ask", ["load", "load_entry", "verify"])
@pytest.mark.parametrize("fault", TABLE)
def test_the_table(broken, fault, ask):
    """Each fault has one outcome for each way of asking."""
    FAULTS[fault](broken)
    assert TABLE[fault][ask] == getattr(broken, ask)()


@pytest.mark.parametrize("ask", ["load", "load_entry", "verify"])
@pytest.mark.parametrize("fault", sorted(TABLE.keys() - HOPELESS))
def test_saving_again_heals(broken, fault, ask):
    """After any fault and question, one save puts everything right again."""
    FAULTS[fault](broken)
    getattr(broken, ask)()
    broken.model = broken.caches.MODEL
    if ask == "verify":
        broken.load()  # to verify changes nothing, so damage of data is not known yet
    broken.save()
    assert ("right", "right") == (broken.load_entry(), broken.load())
    if fault != "shards: swapped":
        # There, both are damaged.
        assert ("right", "right") == (broken.load_entry("b"), broken.load("b"))
    with kvstore.Store(broken.path) as store:
        assert [] == [f for f in store.verify() if f.entries]


@pytest.mark.parametrize("fault", sorted(TABLE.keys() - HOPELESS - {"shards: swapped"}))
def test_the_other_entry_is_untouched(broken, fault):
    """What happens to one conversation leaves the other as it was."""
    FAULTS[fault](broken)
    broken.load()
    broken.load_entry()
    broken.model = broken.caches.MODEL
    assert ("right", "right") == (broken.load("b"), broken.load_entry("b"))
    assert broken.shard("b").exists()


@pytest.mark.parametrize("fault", sorted(f for f in TABLE if f.startswith("shard: ")))
def test_a_save_finds_missing_and_unreadable_shards_itself(broken, fault):
    """A save without a load before it does not build on shards that are gone."""
    FAULTS[fault](broken)
    broken.save()
    if fault.removeprefix("shard: ").split()[0] in ("norms", "codes", "mean", "tail"):
        # A save reads the data of the first lossy block only: a load says so of the
        # others, and the next save heals.
        assert "IntegrityError" == broken.load_entry()
        broken.save()
    assert "right" == broken.load_entry()


@pytest.mark.parametrize("fault", sorted(TABLE.keys() - HOPELESS))
def test_repairing_leaves_nothing_to_find(broken, fault):
    """After `repair`, the only findings are entries that lack a block."""
    FAULTS[fault](broken)
    with kvstore.Store(broken.path) as store:
        store.repair()
        assert {f.kind for f in store.verify()} <= {"missing-block"}
    broken.model = broken.caches.MODEL
    if fault != "shards: swapped":
        assert "right" == broken.load_entry("b")


def snapshot(path):
    """Return everything in a store but SQLite's own helpers."""
    return {
        str(child.relative_to(path)): child.read_bytes()
        for child in path.rglob("*")
        if child.is_file() and child.suffix not in (".sqlite-wal", ".sqlite-shm")
    }


@pytest.mark.parametrize("fault", sorted(TABLE.keys() - HOPELESS))
def test_verifying_never_writes(broken, fault):
    """A damaged store looks the same after `verify`."""
    FAULTS[fault](broken)
    before = snapshot(broken.path)
    broken.verify()
    assert before == snapshot(broken.path)


# --- The index, all over. ---


def break_index(broken, good, bits):
    """Put the index back, and flip bits of it."""
    for path in broken.path.glob("index.sqlite*"):
        path.unlink()
    data = bytearray(good)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    broken.index.write_bytes(data)


def try_index(broken, good, bits):
    """Flip bits of the index, ask, prune, and ask again."""
    shards = sorted(broken.path.glob("shards/*/*"))
    break_index(broken, good, bits)
    by_tokens, by_name = broken.load(), broken.load_entry()
    if "FormatError" in (by_tokens, by_name):
        assert set(bits) & set(range(60 * 8, 64 * 8)), "only the version is newer"
        return
    assert by_tokens in ("right", "part", "miss"), by_tokens
    assert "right" == by_name
    assert shards == sorted(broken.path.glob("shards/*/*"))
    broken.save()
    assert ("right", "right") == (broken.load(), broken.load_entry("b"))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_of_the_index_lose_nothing(broken, seed):
    """Whatever bit flips in the index, entries load and no shard goes."""
    good = broken.index.read_bytes()
    chance = random.Random(seed)
    for _ in range(25):
        count = chance.choice([1, 1, 1, 1, 2, 50])
        bits = [chance.randrange(len(good) * 8) for _ in range(count)]
        try_index(broken, good, bits)


def used_bytes(data):
    """Return where the index has anything but zeros."""
    return [at for at, value in enumerate(data) if value]


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_of_rows_of_the_index_lose_nothing(broken, seed):
    """Where the index says something, a flip of it costs no more than time."""
    good = broken.index.read_bytes()
    chance = random.Random(seed)
    for at in chance.sample(used_bytes(good), 25):
        try_index(broken, good, [at * 8 + chance.randrange(8)])


@pytest.mark.slow
@pytest.mark.parametrize("eighth", range(8))
def test_every_used_byte_of_the_index_may_flip(broken, eighth):
    """One bit of each byte that is used: nothing is lost."""
    good = broken.index.read_bytes()
    chance = random.Random(eighth)
    for at in used_bytes(good)[eighth::8]:
        try_index(broken, good, [at * 8 + chance.randrange(8)])


def change_index(broken, sql):
    """Change rows of the index."""
    import apsw

    connection = apsw.Connection(str(broken.index))
    connection.execute(sql)
    connection.close()


OTHER = "(SELECT id FROM shards WHERE id <> blocks.shard)"
LIES = {
    "blocks lie in the other shard": f"UPDATE blocks SET shard = {OTHER}",
    "one block lies in the other shard": f"UPDATE blocks SET shard = {OTHER}"
    " WHERE hash = (SELECT min(hash) FROM blocks)",
    "blocks lie in no shard": "UPDATE blocks SET shard = 77",
    "all blocks are exact": "UPDATE blocks SET quality = 511",
    "all blocks are lossless": "UPDATE blocks SET quality = 9",
    "all blocks are lossy": "UPDATE blocks SET quality = 8",
    "blocks are empty": "UPDATE blocks SET num_tokens = 0, nbytes = 0",
    "blocks are huge": "UPDATE blocks SET num_tokens = 1 << 40, nbytes = 1 << 50",
    "blocks have no parent": "UPDATE blocks SET parent = zeroblob(32)",
    "blocks begin otherwise": "UPDATE blocks SET first_token = 99",
    "no blocks": "DELETE FROM blocks",
    "every second block": "DELETE FROM blocks WHERE num_tokens = 16 AND hash > x'80'",
    "no roots": "DELETE FROM roots",
    "roots of others": "UPDATE roots SET fingerprint = 'x'",
    "a layout that is no JSON": "UPDATE roots SET layout = '[{'",
    "a layout of other layers": "UPDATE roots SET layout = '[]'",
    "shards of other names": "UPDATE shards SET name = 'x' || id",
    "shards of right-looking names":
        "UPDATE shards SET name = printf('%064x', id)",
    "shards are empty": "UPDATE shards SET nbytes = 0",
    "no shards": "DELETE FROM shards",
    "nothing": "DELETE FROM blocks; DELETE FROM shards; DELETE FROM roots",
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_index_that_lies_costs_time_and_nothing_else(broken, lie):
    """Whatever the index says, entries load right and no shard is taken away."""
    change_index(broken, lie)
    shards = sorted(broken.path.glob("shards/*/*"))
    assert broken.load() in ("right", "part", "miss")
    assert "right" == broken.load_entry()
    assert "right" == broken.load_entry("b")
    assert shards == sorted(broken.path.glob("shards/*/*"))
    broken.save()
    assert ("right", "right") == (broken.load(), broken.load_entry())


def compare_first(broken):
    """Have the index compared with the shards, none of which changes from then on."""
    with kvstore.Store(broken.path, create=False) as store:
        store.plan_prune()


@pytest.mark.parametrize("is_compared", [False, True], ids=["", "compared"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_pruning_by_an_index_that_lies_takes_nothing_that_is_needed(
    broken, lie, is_compared
):
    """What an entry needs is never freed because the index is wrong."""
    if is_compared:
        compare_first(broken)
    change_index(broken, lie)
    with kvstore.Store(broken.path, create=False) as store:
        store.plan_prune(now=True).execute()
    assert ["right", "right"] == [broken.load_entry(name) for name in "ab"]


@pytest.mark.parametrize("is_compared", [False, True], ids=["", "compared"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_save_by_an_index_that_lies_takes_nothing_that_is_needed(
    broken, lie, is_compared
):
    """Making room by a wrong index evicts no named entry's blocks."""
    if is_compared:
        compare_first(broken)
    change_index(broken, lie)
    for path in broken.path.glob("shards/*/*"):
        os.utime(path, (1e9, 1e9))
    change_index(broken, "UPDATE shards SET added_at = 1000.0")
    with kvstore.Store(broken.path, create=False) as store:
        store.set_limit(1000)
        tokens, cache = broken.caches.make_conversation(1, 9)
        store.save(tokens, cache, broken.caches.MODEL, name="c")
    assert ["right", "right"] == [broken.load_entry(name) for name in "ab"]


def test_a_lie_about_exactness_gives_no_lossy_rows(broken):
    """Exact rows are asked of the shard, not of the index."""
    change_index(broken, "UPDATE blocks SET quality = 511")
    tokens = broken.world.saved["a"][0]
    with kvstore.Store(broken.path, create=False) as store:
        restored, _ = store.load([*tokens, 7], broken.caches.MODEL, exact=True)
    assert restored is None


def test_a_stale_log_beside_a_rebuilt_index_is_not_replayed(broken, run_python):
    """The write-ahead log of a killed process does not spoil another index."""
    program = """
import os, sys, caches, kvstore
store = kvstore.Store(sys.argv[1], codec="raw")
for seed in range(3, 40):
    tokens, cache = caches.make_conversation(1, seed)
    store.save(tokens, cache, caches.MODEL)
os.kill(os.getpid(), 9)
"""
    assert -9 == run_python(program, broken.path, check=False).returncode
    assert (broken.path / "index.sqlite-wal").stat().st_size > 0
    broken.index.unlink()
    shards = {broken.shard("a"), broken.shard("b")}
    for path in set(broken.path.glob("shards/*/*")) - shards:
        path.unlink()
    for path in set(broken.path.glob("entries/*")) - {broken.entry(n) for n in "ab"}:
        path.unlink()
    assert ["right"] * 4 == [
        ask(name) for name in "ab" for ask in (broken.load_entry, broken.load)
    ]
    with kvstore.Store(broken.path) as store:
        assert [] == store.verify()
        assert 2 == store.stats().num_shards


def test_two_processes_that_find_the_index_damaged_build_one(broken, run_python):
    """A rebuilt index is not thrown away by a process that saw the old one."""
    tokens = broken.world.saved["a"][0]
    with kvstore.Store(broken.path) as first, kvstore.Store(broken.path) as second:
        first.stats()
        second.stats()
        change_index(broken, "UPDATE blocks SET quality = 'x'")
        for store in (first, second):
            restored, _ = store.load([*tokens, 7], broken.caches.MODEL)
            broken.check_rows("a", restored, len(tokens))
        assert 1 == len(list(broken.path.glob("quarantine/*.sqlite")))


# --- A disk that fails, and interrupts. ---


class Stop(BaseException):
    """Stands for an interrupt, so that no handler of errors can swallow it."""


def count_calls(monkeypatch, name, when=None, error=None):
    """Count calls of a function of `os`; raise at one of them."""
    seen = SimpleNamespace(count=0)
    original = getattr(os, name)

    def wrapped(*arguments, **options):
        seen.count += 1
        if seen.count == when:
            if name == "close":
                original(*arguments)  # it is closed, whatever it says
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(os, name, wrapped)
    return seen


CALLS = ["writev", "fsync", "replace", "open", "unlink", "fchmod", "close"]


def save_third(broken):
    """Save a third conversation."""
    tokens, cache = broken.caches.make_conversation(2, 3, extra=3)
    with kvstore.Store(broken.path, codec="raw") as store:
        store.save(tokens, cache, broken.caches.MODEL, name="c")
    return tokens, cache


def check_after_failed_save(broken):
    """Nothing acknowledged is lost, nothing is half there, the next save works."""
    assert ["right"] * 4 == [
        ask(name) for name in "ab" for ask in (broken.load_entry, broken.load)
    ]
    with kvstore.Store(broken.path, codec="raw") as store:
        assert [] == store.verify()
        tokens, cache = broken.caches.make_conversation(2, 3, extra=3)
        rows = broken.caches.rows_of
        restored, rest = store.load([*tokens, 7], broken.caches.MODEL)
        held = len(tokens) + 1 - len(rest)
        if held:
            assert rows(cache, 0, held) == rows(restored)
        store.save(tokens, cache, broken.caches.MODEL, name="c")
        again, _ = store.load_entry("c", broken.caches.MODEL)
        assert rows(cache) == rows(again)
    assert [] == os.listdir(broken.path / "tmp")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_error_at_any_call_of_a_save_loses_nothing(broken, monkeypatch, call, error):
    """Ctrl-C or a full disk at the K-th call, for every K until the save passes."""
    good = snapshot(broken.path)
    for when in range(1, 200):
        with monkeypatch.context() as patch:
            seen = count_calls(patch, call, when, error)
            try:
                save_third(broken)
                passed = True
            except type(error):
                passed = False
        if passed and seen.count < when:
            break
        # A cleanup may fail too, which leaves a file in `tmp` for `prune`.
        for left in (broken.path / "tmp").iterdir():
            assert call in ("unlink", "close")
            left.unlink()
        check_after_failed_save(broken)
        for path in broken.path.rglob("*"):
            if path.is_file() and str(path.relative_to(broken.path)) not in good:
                path.unlink()
        overwrite(broken.index, good["index.sqlite"])
    assert when > 1


def test_a_full_disk_from_some_call_on_loses_nothing(broken, monkeypatch):
    """A disk that stays full fails the save, and nothing else."""
    for when in (1, 2, 3, 5, 8):
        with monkeypatch.context() as patch:
            original, calls = os.writev, SimpleNamespace(count=0)

            def write(descriptor, data, original=original, calls=calls, when=when):
                calls.count += 1
                if calls.count >= when:
                    original(descriptor, [data[0][: len(data[0]) // 2]])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(descriptor, data)

            patch.setattr(os, "writev", write)
            with suppress(OSError):
                save_third(broken)
                assert calls.count < when
            assert ["right", "right"] == [broken.load(), broken.load_entry("b")]
        check_after_failed_save(broken)


SAVE = """
import resource, sys, caches, kvstore
tokens, cache = caches.make_conversation(20, 3)
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with kvstore.Store(sys.argv[1], codec="raw") as store:
        store.save(tokens, cache, caches.MODEL, name="c")
except (OSError, kvstore.KVStoreError) as error:
    print(type(error).__name__, getattr(error, "errno", None))
else:
    print("saved")
"""


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 40_000, 1 << 20])
def test_a_limit_on_the_size_of_files_loses_nothing(broken, run_python, limit):
    """With `ulimit -f`, a save fails as a whole with the system's error, or works."""
    said = run_python(SAVE, broken.path, limit).stdout.split()
    assert said[0] in ("saved", "OSError")
    assert (limit in (0, 1 << 20)) == (said == ["saved"])
    assert ["right"] * 2 == [broken.load_entry(name) for name in "ab"]
    with kvstore.Store(broken.path) as store:
        assert [] == store.verify()
    assert [] == os.listdir(broken.path / "tmp")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 6 MB, where we may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", path]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small disk")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_disk_that_fills_up_loses_nothing(small_disk, world, caches, kvstore_cli):
    """Saves until the disk is full: what was acknowledged stays, and can be listed."""
    path = shutil.copytree(world.path, small_disk / "store")
    broken = Broken(world, caches, path)
    acknowledged, failures = [], set()
    for seed in range(10, 40):
        tokens, cache = caches.make_conversation(20, seed)
        try:
            with kvstore.Store(path, codec="raw") as store:
                store.save(tokens, cache, caches.MODEL, name=str(seed))
            acknowledged.append((seed, tokens, cache))
        except OSError as error:
            failures.add(error.errno)
    assert acknowledged
    assert {errno.ENOSPC} == failures
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    # Full to the last byte, SQLite may find no room for what it shares with others.
    listed = kvstore_cli("ls", "--json", store=path)
    assert {str(seed) for seed, *_ in acknowledged} <= {
        entry["name"] for entry in json.loads(listed.stdout)
    }, listed.stderr
    for name in "ab":
        assert {broken.load_entry(name), broken.load(name)} <= {"right", "OSError"}
    filler.unlink()
    assert ["right"] * 4 == [
        ask(name) for name in "ab" for ask in (broken.load_entry, broken.load)
    ]
    with kvstore.Store(path) as store:
        for seed, tokens, cache in acknowledged:
            restored, held = store.load_entry(str(seed), caches.MODEL)
            assert (tokens, caches.rows_of(cache)) == (held, caches.rows_of(restored))
        assert [] == store.verify()


INTERRUPTED = """
import sys, threading, caches, kvstore
tokens, cache = caches.make_conversation(150, 3)
with kvstore.Store(sys.argv[1], codec="raw") as store:
    print("ready", flush=True)
    store.save(tokens, cache, caches.MODEL, name="c")
print("saved", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
def test_ctrl_c_during_a_save_loses_nothing(broken, tmp_path, delay):
    """A real SIGINT ends a save; what was there before is there after it."""
    from pathlib import Path

    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, broken.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.getcwd()}"},
    )
    assert "ready\n" == process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    said, trace = process.communicate(timeout=300)
    assert "saved" in said or "KeyboardInterrupt" in trace
    assert ["right"] * 2 == [broken.load_entry(name) for name in "ab"]
    with kvstore.Store(broken.path) as store:
        assert [] == store.verify()
        if "saved" in said:
            assert store.entry("c")
    assert [] == os.listdir(broken.path / "tmp")


def test_an_unknown_class_is_refused_before_anything_is_written(broken):
    """A cache that cannot be stored is named with its layer, and nothing changes."""
    from mlx_lm.models.cache import KVCache

    class OddCache(KVCache):
        """May keep more than keys and values."""

    tokens, cache = broken.caches.make_conversation(2, 3)
    cache[1] = OddCache()
    before = snapshot(broken.path)
    with (
        kvstore.Store(broken.path) as store,
        pytest.raises(kvstore.UnsupportedCacheError, match=r"layer 1 .*OddCache"),
    ):
        store.save(tokens, cache, broken.caches.MODEL, name="c")
    assert before == snapshot(broken.path)


def test_a_store_that_cannot_be_written_can_be_read(broken, monkeypatch):
    """Damage found on a read-only disk is reported, though not put right."""
    flip_tensor(broken.shard(), "2.0.k.codes")

    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "publish", refuse)
    assert "part" == broken.load()
    assert "IntegrityError" == broken.load_entry()


def test_the_store_is_what_it_says(world):
    """The copies that these tests break are of a sound store."""
    assert open_folder(world.path).block_size == 16
