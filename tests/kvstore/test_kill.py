"""Kill -9 during saves: what was acknowledged is there, nothing is wrong, all goes on.

The oracle is a file in which the killed process had noted what `save` returned from.
A power cut, which also takes what was not synced, takes a disk of its own: the campaign
has one (`--power-cuts`), and the order of syncs is held by `test_files.py`.
"""

import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvstore

HERE = Path(__file__).parent
STRACE = shutil.which("strace")

# Imports once what takes a second, and forks a worker each time it is asked to. That
# says when it is ready, begins when it is told, and notes each save that returned.
NURSERY = """
import ctypes, fcntl, itertools, os, signal, socket, struct, sys
import caches, kvstore, kvstore.caches.fit, kvstore.ops.recognise, kvstore.ops.save
from kvstore.storage import files

def publish_in_place(source, target):
    data = source.read_bytes()
    with open(target, "wb", buffering=0) as file:
        file.write(data[: len(data) // 2])
        os.sync()
        file.write(data[len(data) // 2 :])

def cut_power(path, acknowledged, when):
    # Before the K-th call to the disk; otherwise says how many there were.
    count, disk = itertools.count(1), os.open(path, os.O_RDONLY)
    def numbered(real):
        def call(*arguments, **options):
            if (number := next(count)) == when:
                fcntl.ioctl(disk, 0x8004587D, struct.pack("I", 2))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in ("create", "write_all", "sync", "sync_dir", "publish", "remove"):
        setattr(files, name, numbered(getattr(files, name)))
    def tell():
        with open(acknowledged + ".calls", "w") as file:
            file.write(str(next(count)))
    return tell

def work(parent, path, acknowledged, base, mutant):
    noted = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    if mutant == "in place":
        files.publish = publish_in_place
    tell = lambda: None
    if mutant.startswith("cut "):
        tell = cut_power(path, acknowledged, int(mutant[4:]))
    if sys.platform == "linux":  # any process may trace us
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))
    work = caches.make_work(int(base))
    parent.send(b"ready")
    if not parent.recv(2):
        return
    with kvstore.Store(path, codec="raw") as store:
        for number, (name, tokens, cache) in enumerate(work):
            if mutant == "acknowledge first":
                os.write(noted, bytes([number]))
            store.save(tokens, cache, caches.MODEL, name=name, replace=True)
            if mutant != "acknowledge first":
                os.write(noted, bytes([number]))
    tell()

line = socket.socket(fileno=int(sys.argv[1]))
while True:
    said, descriptors, _, _ = socket.recv_fds(line, 65_536, 1)
    if not said:
        break
    if descriptors:
        if (pid := os.fork()) == 0:
            line.close()
            words = said.decode().split("\\0")
            try:
                work(socket.socket(fileno=descriptors[0]), *words)
            except (OSError, kvstore.KVStoreError):
                if not words[-1].startswith("cut "):  # its disk is gone
                    raise
            os._exit(0)
        os.close(descriptors[0])
        line.send(pid.to_bytes(4, "little"))
    else:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        line.send(code.to_bytes(4, "little", signed=True))
"""


@functools.cache
def nursery():
    """Start what workers come from; return the line to it."""
    line, theirs = socket.socketpair()
    line.settimeout(120)
    subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{os.getcwd()}"},
    )
    theirs.close()
    return line


class Worker:
    """A process that saves what `caches.make_work` gives, when it is told to go."""

    def __init__(self, store, acknowledged, base, mutant=""):
        self.store, self.acknowledged, self.base = store, acknowledged, base
        words = map(str, [store, acknowledged, base, mutant])
        self.line, theirs = socket.socketpair()
        socket.send_fds(nursery(), ["\0".join(words).encode()], [theirs.fileno()])
        theirs.close()
        self.pid = int.from_bytes(nursery().recv(4), "little")
        assert self.line.recv(5) == b"ready"

    def go(self):
        """Let it save."""
        self.line.send(b"go")

    def kill(self):
        """Kill it; it keeps its number until somebody has waited for it."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        """Wait for its end and return whether it was killed."""
        nursery().send(b"wait")
        code = int.from_bytes(nursery().recv(4), "little", signed=True)
        self.line.close()
        return code == -signal.SIGKILL

    def noted(self):
        """Return the numbers of the saves that it had acknowledged."""
        return list(self.acknowledged.read_bytes())


def find_problems(worker, caches):
    """Return what is wrong with a store after a kill; nothing, as it should be."""
    problems = []
    noted = worker.noted()
    work = caches.make_work(worker.base)
    last = {work[number][0]: number for number in noted}
    with kvstore.Store(worker.store, codec="raw", create=False) as store:
        problems += [f"{found.kind}: {found.detail}" for found in store.verify()]
        for number, (_, tokens, cache) in enumerate(work):
            restored, rest = store.load([*tokens, -1], caches.MODEL)
            held = len(tokens) + 1 - len(rest)
            if restored and caches.rows_of(restored) != caches.rows_of(cache, 0, held):
                problems.append(f"save {number}: wrong rows")
            if number in noted and held != len(tokens):
                problems.append(f"save {number}: only {held} of {len(tokens)} tokens")
        entries = {entry.name or entry.id: entry for entry in store.entries()}
        for name, number in last.items():
            # The save that was under way may have got through, unacknowledged.
            fitting = [w[1] for w in work[number:] if w[0] == name]
            found = [e for e in entries.values() if e.name == name]
            held = [store.load_entry(e.id, caches.MODEL)[1] for e in found]
            if not any(tokens in fitting for tokens in held):
                problems.append(f"save {number}: entry {name} lost")
        for name in entries:
            try:
                restored, tokens = store.load_entry(name, caches.MODEL)
            except kvstore.KVStoreError as error:
                problems.append(f"entry {name}: {error}")
                continue
            if caches.rows_of(restored) != caches.rows_of(caches.cache_of(tokens)):
                problems.append(f"entry {name}: wrong rows")
    return problems


def save_again(path, base, caches):
    """Do all saves, as the next process would."""
    with kvstore.Store(path, codec="raw", create=False) as store:
        for name, tokens, cache in caches.make_work(base):
            store.save(tokens, cache, caches.MODEL, name=name, replace=True)
            restored, rest = store.load([*tokens, -1], caches.MODEL)
            assert [-1] == rest
            assert caches.rows_of(cache) == caches.rows_of(restored)


def kill_in_turn(store_path, tmp_path, caches, kills):
    """Kill one process after the other in one store; return how many were killed."""
    killed = 0
    for number, kill in enumerate(kills):
        worker = Worker(store_path, tmp_path / f"noted-{number}", 10 * number)
        killed += kill(worker)
        assert [] == find_problems(worker, caches)
        save_again(store_path, worker.base, caches)
        # What kills leave is garbage, and only garbage.
        assert len(list((store_path / "tmp").iterdir())) <= 3 * (number + 1)
    return killed


# --- At an exact system call. ---

CALLS = ["fsync", "rename", "unlink", "pwrite64", "write", "openat", "fdatasync"]


def names_of(call):
    """Return all names under which a system call goes."""
    names = {"rename": "rename,renameat,renameat2", "write": "write,writev"}
    return names.get(call, call)


def trace(worker, *options):
    """Let strace follow a worker, and the worker go; return whether it was killed."""
    command = [STRACE, "-f", "-p", str(worker.pid), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        said = tracer.stderr.readline()
        if "attached" not in said:
            worker.kill()
            worker.wait()
            pytest.skip(f"strace may not trace here: {said}")
        worker.go()
        killed = worker.wait()
        tracer.communicate()
    return killed


def at_call(call, when):
    """Return a function that lets a worker die at its K-th system call of a kind."""
    names = names_of(call)
    options = ["-o", "/dev/null", "-e", f"trace={names}"]
    options += ["-e", f"inject={names}:signal=KILL:when={when}"]
    return lambda worker: trace(worker, *options)


@pytest.fixture(scope="session")
def counts(tmp_path_factory, empty_store):
    """How often the saves make each system call."""
    if not STRACE:
        pytest.skip("needs strace, to kill at an exact system call")
    return count_calls(tmp_path_factory.mktemp("count"), empty_store)


def count_calls(folder, empty_store):
    """Return how often the saves make each system call."""
    store = shutil.copytree(empty_store, folder / "store")
    names = ",".join(map(names_of, CALLS))
    worker = Worker(store, folder / "noted", 0)
    assert not trace(worker, "-o", str(folder / "log"), "-e", f"trace={names}")
    text = (folder / "log").read_text()
    return {
        call: sum(
            len(re.findall(rf"\b{name}\(", text)) for name in names_of(call).split(",")
        )
        for call in CALLS
    }


def pick(counts, number, seed):
    """Return so many points to die at, over all system calls."""
    chance = random.Random(seed)
    calls = [call for call in CALLS if counts[call]]
    chosen = [calls[i % len(calls)] for i in range(number)]
    return [(call, chance.randint(1, counts[call])) for call in chosen]


def test_the_saves_make_the_system_calls_that_matter(counts):
    """The kills below fall on syncs, renames, removals and SQLite's writes."""
    for call in ("fsync", "rename", "unlink", "pwrite64", "write"):
        assert counts[call] > 0, call


def test_a_kill_at_any_system_call_loses_nothing(store_path, tmp_path, caches, counts):
    """A few processes die, each at another system call."""
    points = pick(counts, 6, 1)
    kills = [at_call(*point) for point in points]
    assert kill_in_turn(store_path, tmp_path, caches, kills) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_kills_lose_nothing(store_path, tmp_path, caches, counts, seed):
    """Hundreds of processes die, twenty in each store."""
    kills = [at_call(*point) for point in pick(counts, 20, seed)]
    assert kill_in_turn(store_path, tmp_path, caches, kills) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "unlink", "pwrite64"])
def test_every_kill_of_one_kind_loses_nothing(
    empty_store, tmp_path, caches, counts, call
):
    """Each sync, rename, removal and database write is a kill's turn, in new stores."""
    for when in range(1, min(counts[call], 40) + 1):
        folder = tmp_path / str(when)
        folder.mkdir()
        store = shutil.copytree(empty_store, folder / "store")
        kill_in_turn(store, folder, caches, [at_call(call, when)])


# --- At any time, without strace. ---


def at_random(delay):
    """Return a function that kills a worker so many seconds after it began."""

    def kill(worker):
        worker.go()
        time.sleep(delay)
        worker.kill()
        return worker.wait()

    return kill


def time_saves(store_path, tmp_path):
    """Return how many seconds the saves take here."""
    worker = Worker(store_path, tmp_path / "timed", 5000)
    started = time.monotonic()
    worker.go()
    worker.wait()
    return time.monotonic() - started


@pytest.mark.parametrize(
    "number", [3, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_kill_at_any_time_loses_nothing(store_path, tmp_path, caches, number):
    """Processes die at random moments of their saves."""
    duration = time_saves(store_path, tmp_path)
    chance = random.Random(number)
    kills = [at_random(chance.random() * duration) for _ in range(number)]
    assert kill_in_turn(store_path, tmp_path, caches, kills) > 0


# --- Teeth. ---


@pytest.mark.parametrize(
    ("mutant", "call", "when", "expected"),
    [
        # The first thing that is published is the index, which heals.
        ("in place", "sync", 2, "damaged-shard"),
        ("in place", "sync", 3, "damaged-entry"),
        ("acknowledge first", "fsync", 3, "entry chat lost"),
    ],
)
def test_the_harness_finds_a_store_that_is_wrong(
    store_path, tmp_path, caches, counts, mutant, call, when, expected
):
    """Writing in place, or acknowledging too early, does not pass these tests."""
    worker = Worker(store_path, tmp_path / "noted", 0, mutant)
    assert at_call(call, when)(worker)
    assert [] != [text for text in find_problems(worker, caches) if expected in text]
