"""An error at each call that a job makes to the disk: numbered, once and lasting.

Every write, sync, rename, removal and read goes through `storage.files`. A job is run
once to count its calls. Then the K-th call fails, for every K, with an error of the
system, and either the job says so or it has done what it promised.
"""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvstore
from kvstore.storage import files

PRIMITIVES = (
    "create", "write_all", "sync", "sync_file", "sync_dir", "publish", "remove",
    "open_regular", "read_into", "make_private_dir",
)  # fmt: skip
KEPT = "kept"
QUICK = {("save", errno.ENOSPC), ("rebuild", errno.EACCES)}


class Disk:
    """Counts the calls to `storage.files` and lets some of them fail.

    Args:
        monkeypatch: Puts the real functions back.
    """

    def __init__(self, monkeypatch):
        self.count = 0
        self.first = self.last = 0
        self.errno = 0
        self.failed = []
        for name in PRIMITIVES:
            monkeypatch.setattr(files, name, self._numbered(name))

    def _numbered(self, name):
        original = getattr(files, name)

        def call(*arguments, **options):
            self.count += 1
            if self.first <= self.count <= self.last:
                self.failed.append(name)
                path = next((str(a) for a in arguments if isinstance(a, Path)), None)
                raise OSError(self.errno, os.strerror(self.errno), path)
            return original(*arguments, **options)

        return call

    def fail(self, first, last, number):
        """Let the calls from ``first`` to ``last`` fail with an error."""
        self.count, self.first, self.last, self.errno = 0, first, last, number
        self.failed = []

    def work(self):
        """Let nothing fail."""
        self.fail(0, 0, 0)


@pytest.fixture(scope="module")
def template(tmp_path_factory, empty_store, caches):
    """A store with an entry to keep, one to work on, dead blocks, and a bundle."""
    return make_template(tmp_path_factory.mktemp("injected"), empty_store, caches)


def make_template(folder, empty_store, caches):
    """Return that store, made in a folder."""
    path = shutil.copytree(empty_store, folder / "store")
    kept, worked = caches.make_conversation(3, 1), caches.make_conversation(3, 2)
    other = caches.make_conversation(2, 3)
    with kvstore.Store(path, "raw") as store:
        store.save(*other, caches.MODEL, name="other")
        with (folder / "bundle").open("wb") as file:
            store.export_bundle("other", file)
        store.remove("other")
        store.save(*kept, caches.MODEL, name=KEPT)
        store.save(*worked, caches.MODEL, name="worked")
    return SimpleNamespace(
        path=path, kept=kept, worked=worked, bundle=folder / "bundle", caches=caches
    )


def do_save(path, made):
    """Save a conversation of two shards."""
    tokens, cache = made.caches.make_conversation(4, 9, extra=5)
    with kvstore.Store(path, "turbo4+zstd") as store:
        store.save(tokens, cache, made.caches.MODEL, name="new")
    return {"new": tokens}


def do_save_at_the_limit(path, made):
    """Save where something must go first."""
    with kvstore.Store(path, "raw") as store:
        store.set_limit(store.stats().nbytes)
    tokens, cache = made.caches.make_conversation(4, 9, extra=5)
    with kvstore.Store(path, "raw") as store:
        store.save(tokens, cache, made.caches.MODEL, name="new")
    return {"new": tokens}


def do_load(path, made):
    """Load a conversation."""
    tokens, _ = made.worked
    with kvstore.Store(path) as store:
        restored, rest = store.load([*tokens, -7], made.caches.MODEL)
    if restored is not None:
        held = len(tokens) + 1 - len(rest)
        expected = made.caches.rows_of(made.worked[1], 0, held)
        assert made.caches.rows_of(restored) == expected
    return {}


def do_rename(path, made):
    """Rename an entry."""
    with kvstore.Store(path) as store:
        store.rename("worked", "renamed")
    return {"renamed": made.worked[0]}


def do_pin(path, made):
    """Pin an entry."""
    with kvstore.Store(path) as store:
        store.pin("worked")
    return {"worked": made.worked[0]}


def do_remove(path, made):
    """Remove an entry."""
    with kvstore.Store(path) as store:
        store.remove("worked")
    return {"worked": None}


def do_prune(path, made):
    """Free dead blocks."""
    with kvstore.Store(path) as store:
        store.plan_prune(now=True).execute()
    return {"worked": made.worked[0]}


def do_verify(path, made):
    """Read all of a store."""
    with kvstore.Store(path) as store:
        store.verify(read_data=True)
    return {"worked": made.worked[0]}


def do_import(path, made):
    """Import a bundle."""
    with kvstore.Store(path) as store, made.bundle.open("rb") as file:
        entry = store.import_bundle(file, name="imported")
    return {"imported": list(range(3000, 3000 + entry.num_tokens))}


def do_rebuild(path, made):
    """Open a store without an index."""
    for index in path.glob("index.sqlite*"):
        index.unlink()
    with kvstore.Store(path) as store:
        store.lookup([*made.worked[0], -7], made.caches.MODEL)
    return {"worked": made.worked[0]}


JOBS = {
    name.removeprefix("do_"): job
    for name, job in list(globals().items())
    if name.startswith("do_")
}


def check_store(path, made, promised):
    """Assert that a store keeps what it acknowledged, and works again."""
    model = made.caches.MODEL
    with kvstore.Store(path, "raw") as store:
        cache, tokens = store.load_entry(KEPT, model)
        assert tokens == made.kept[0]
        assert made.caches.rows_of(cache) == made.caches.rows_of(made.kept[1])
        for name, held in promised.items():
            if held is None:
                with pytest.raises(kvstore.EntryNotFoundError):
                    store.entry(name)
            else:
                assert store.load_entry(name, model)[1] == held
        store.repair()
        assert store.verify(read_data=True) == []
        tokens, cache = made.caches.make_conversation(2, 7)
        store.save(tokens, cache, model, name="after")
        found, _ = store.load_entry("after", model)
        assert made.caches.rows_of(found) == made.caches.rows_of(cache)
        # Nothing is left but what `prune` knows of.
        store.plan_prune(now=True).execute()
    assert os.listdir(path / "tmp") == []


def attempt(job, path, made):
    """Run a job; return what it promises and the error that it ended with."""
    try:
        return job(path, made), None
    except (OSError, kvstore.KVStoreError) as error:
        return {}, error


def is_told(error, number):
    """Say whether a job told what happened: the system's error, or what to do."""
    if isinstance(error, OSError):
        return error.errno == number
    return error is None or bool(error.hint)


CASES = [
    pytest.param(
        job,
        number,
        lasting,
        id=f"{job}-{errno.errorcode[number]}-{'lasting' if lasting else 'once'}",
        # A few in every run, all of them in the long one.
        marks=[] if (job, number) in QUICK and not lasting else pytest.mark.slow,
    )
    for job in JOBS
    for number in (errno.ENOSPC, errno.EIO, errno.EACCES)
    for lasting in (False, True)
]


@pytest.mark.parametrize(("job", "number", "lasting"), CASES)
def test_an_error_at_any_call_loses_nothing(
    template, tmp_path, monkeypatch, job, number, lasting
):
    """A job fails with the system's own error, or has done what it promises."""
    disk = Disk(monkeypatch)
    total = count_calls(disk, job, template, tmp_path / "counted")
    assert total > 2
    for when in range(1, total + 1):
        last = total * 10 if lasting else when
        fail_at(disk, job, number, (when, last), template, tmp_path / f"store-{when}")


def count_calls(disk, job, template, folder):
    """Return how many calls a job makes."""
    path = shutil.copytree(template.path, folder)
    disk.work()
    JOBS[job](path, template)
    return disk.count


def fail_at(disk, job, number, calls, template, folder):
    """Let some calls of a job fail, and hold what it says and leaves."""
    path = shutil.copytree(template.path, folder)
    disk.fail(*calls, number)
    promised, error = attempt(JOBS[job], path, template)
    disk.work()
    assert is_told(error, number), (calls, disk.failed, error)
    check_store(path, template, promised)
    shutil.rmtree(path)
