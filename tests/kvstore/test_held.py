"""A calibration that is stopped goes on from the samples that lie in the store."""

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import kit
import numpy as np
import pytest

import kvstore
from kvstore.codecs import fitting
from kvstore.codecs.floats import narrow
from kvstore.models import calibrate
from kvstore.models.held import HeldSamples, Outline
from kvstore.ops.upkeep import prune
from kvstore.storage import files, vault
from kvstore.storage.bases import list_bases
from kvstore.storage.folder import create_folder, open_folder

architectures = kit.load_beside("architectures")
fitted = kit.load_beside("test_fit_store")
MODEL = kvstore.Fingerprint({"weights": "held"}, "held")
CONTEXTS = np.random.default_rng(1).integers(3, 60, (5, 272)).tolist()
OUTLINES = [Outline("BF16", (1, 2, 8, 4), 1), Outline("F32", (1, 2, 8, 4), 1)]


def shorten(patch):
    """Make contexts short, and measure nothing."""
    patch.setattr(calibrate, "PREFIX", 256)
    patch.setattr(calibrate, "CONTEXT", 272)
    patch.setattr(calibrate, "measure", lambda *_: [])
    patch.setattr(fitting, "RATES", ("2", "4"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Make calibrations take a second."""
    shorten(monkeypatch)


@pytest.fixture
def computed(monkeypatch):
    """Return a list to which the contexts are added whose samples are computed."""
    found = []

    def samples(model, groups, tokens, seeds, *, real=calibrate._samples):
        found.append(CONTEXTS.index(tokens))
        return real(model, groups, tokens, seeds)

    monkeypatch.setattr(calibrate, "_samples", samples)
    return found


def nothing(done, total):
    """Show no progress."""


def run(path, *, contexts=CONTEXTS, model=MODEL, progress=nothing):
    """Calibrate a model in a store, and return the digest of its basis."""
    loaded = kit.LoadedModel(architectures.make_model("llama"), None, model)
    with kvstore.Store(path) as store:
        found = calibrate.calibrate_model(
            loaded, store, contexts, bar=lambda what: progress
        )
    return found.basis


def stop_at(number):
    """Return a progress callback that is interrupted before a context."""

    def progress(done, total):
        if done == number:
            raise KeyboardInterrupt

    return progress


def stopped(path, number, **options):
    """Return the files that a calibration has left which was stopped."""
    with pytest.raises(KeyboardInterrupt):
        run(path, progress=stop_at(number), **options)
    return sorted(path.glob("tmp/*"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return the digest of the basis that a run makes which nothing stops."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return run(tmp_path_factory.mktemp("whole") / "store")


# --- A run that is stopped. ---


def test_a_run_that_was_stopped_goes_on(tmp_path, computed, expected):
    """With the context that it was at, to the same bytes, and leaves nothing then."""
    path = tmp_path / "store"
    assert 2 == len(stopped(path, 2))
    assert 3 == len(stopped(path, 3))
    assert expected == run(path)
    assert [0, 1, 2, 3] == computed
    assert [] == list(path.glob("tmp/*"))


def test_who_is_stopped_while_codecs_are_measured_computes_nothing_again(
    tmp_path, computed, expected, monkeypatch
):
    """The same command goes on with the samples, as with the basis."""
    path = tmp_path / "store"

    def measure(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert [expected] == list_bases(open_folder(path))
    assert expected == run(path)
    assert [0, 1, 2, 3] == computed


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import pytest, test_held
from kvstore.storage import files

count, write_all = itertools.count(), files.write_all

def write(descriptor, *buffers):
    if len(buffers) > 1 and next(count) == 2:
        write_all(descriptor, *buffers[:2])
        os.kill(os.getpid(), signal.SIGKILL)
    write_all(descriptor, *buffers)

files.write_all = write
test_held.shorten(pytest.MonkeyPatch())
test_held.run(Path(sys.argv[1]))
"""


def test_a_run_that_was_killed_goes_on(tmp_path, computed, expected):
    """In the middle of a file too: half of one is not taken for a sample."""
    here = Path(__file__).parent
    path = tmp_path / "store"
    words = [sys.executable, "-c", KILLED, path, here, here.parent]
    assert -signal.SIGKILL == subprocess.run(words, check=False).returncode
    left = list(path.glob("tmp/*"))
    assert [".samples", ".samples", ""] == sorted(p.suffix for p in left)[::-1]
    assert expected == run(path)
    assert [2, 3] == computed
    for each in path.glob("tmp/*"):
        os.utime(each, (0, 0))
    with kvstore.Store(path) as store:
        store.plan_prune().execute()
    assert [] == list(path.glob("tmp/*"))


def flip(path):
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    """Take the last byte away."""
    os.truncate(path, path.stat().st_size - 1)


def swap(path):
    """Put the samples of another context in the place of these."""
    (other,) = set(path.parent.glob("*.samples")) - {path}
    shutil.copy(other, path)


def link(path):
    """Put a link to the file in its place."""
    path.symlink_to(path.rename(path.parent / "elsewhere"))


@pytest.mark.parametrize("damage", [flip, cut, swap, link, Path.unlink])
def test_what_is_damaged_is_computed_again(tmp_path, computed, expected, damage):
    """No number is learned from that was not computed of that context."""
    path = tmp_path / "store"
    stopped(path, 1)
    (first,) = path.glob("tmp/*")
    stopped(path, 2)
    damage(first)
    assert expected == run(path)
    assert [0, 1, 0, 2, 3] == computed


def test_what_there_is_no_room_for_is_computed_again(tmp_path, computed, monkeypatch):
    """Of it only sums are kept, as in a run that nothing stops."""
    monkeypatch.setattr(fitting, "_MAX_HELD_BYTES", 1)
    path = tmp_path / "store"
    assert 1 == len(stopped(path, 3))
    assert run(tmp_path / "whole") == run(path)
    assert [0, 1, 2, 0, 1, 2, 3, 1, 2, 3] == computed


# --- Others. ---


def test_runs_of_other_models_share_nothing(tmp_path, computed):
    """Nor do other draws of a context; what each left stays for itself."""
    path = tmp_path / "store"
    other = kvstore.Fingerprint({"weights": "other"}, "other")
    one = stopped(path, 2)
    both = stopped(path, 1, model=other)
    turned = stopped(path, 1, contexts=CONTEXTS[1:])
    assert (2, 3, 4) == (len(one), len(both), len(turned))
    assert [0, 1, 0, 1] == computed
    run(path, model=other)
    assert set(one) == set(path.glob("tmp/*")) - (set(turned) - set(both))


@pytest.mark.parametrize(
    "changes",
    [{"version": lambda name: "0"}, {"usual_step_size": lambda: 64}],
)
def test_samples_of_other_conditions_are_computed_again(
    tmp_path, computed, monkeypatch, changes
):
    """What the last places of a number depend on is in the name of a file."""
    path = tmp_path / "store"
    stopped(path, 1)
    for name, value in changes.items():
        monkeypatch.setattr(calibrate, name, value)
    assert 2 == len(stopped(path, 1))
    assert [0, 0] == computed


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path, expected):
    """The one that ends first takes nothing away that the other still reads."""
    path = tmp_path / "store"

    def progress(done, total):
        if done == 3:
            assert expected == run(path)
            assert [] == list(path.glob("tmp/*"))

    assert expected == run(path, progress=progress)


def test_an_encrypted_store_has_no_samples(tmp_path, monkeypatch, expected):
    """They are in the clear; nor has any folder names of them."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path = tmp_path / "store"
    create_folder(path, 256, vault.keep_by_file(vault.new_key(), tmp_path / "key"))
    assert [] == stopped(path, 3)
    assert [] == list(temporary.iterdir())
    assert expected == run(path)


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_full_disk_is_told(tmp_path, monkeypatch, expected, is_encrypted):
    """By one error; what was computed before stays, and nothing half written."""
    path = tmp_path / "store"
    keep = vault.keep_by_file(vault.new_key(), tmp_path / "key")
    create_folder(path, 256, keep if is_encrypted else None)
    left = stopped(path, 1)

    def write_all(descriptor, *buffers):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", write_all)
        with pytest.raises(kvstore.KVStoreError, match="no room"):
            run(path)
    assert left == list(path.glob("tmp/*"))
    assert expected == run(path)


# --- What others see in the store. ---


def test_samples_are_counted_and_forgotten_as_what_saves_leave(tmp_path):
    """An hour after a run looked at them last; until then no `prune` takes them."""
    path = tmp_path / "store"
    left = stopped(path, 2)
    with kvstore.Store(path) as store:
        stats = store.stats()
        nbytes = sum(each.stat().st_size for each in left)
        assert (2, nbytes) == (stats.num_staged, stats.staged_bytes)
        store.plan_prune(now=True).execute()
        assert left == sorted(path.glob("tmp/*"))
        for each in left:
            os.utime(each, (time.time() - prune.GRACE_S - 1,) * 2)
        stopped(path, 1)
        store.plan_prune().execute()
        assert 1 == len(set(left).intersection(path.glob("tmp/*")))


def test_a_long_run_is_not_forgotten(tmp_path):
    """While it goes on, all of its samples are as young as the last."""
    path = tmp_path / "store"

    def progress(done, total):
        files = list(path.glob("tmp/*"))
        if done == 2:
            for each in files:
                os.utime(each, (0, 0))
        if done == 3:
            assert 3 == sum(each.stat().st_mtime > 0 for each in files)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, progress=progress)


def test_samples_are_young_when_no_more_are_kept(tmp_path, monkeypatch):
    """Of a large model most contexts come then."""
    monkeypatch.setattr(fitting, "_MAX_HELD_BYTES", 1)
    path, ages = tmp_path / "store", []

    def progress(done, total):
        files = list(path.glob("tmp/*"))
        ages.extend(each.stat().st_mtime for each in files if done == 3)
        for each in files if done == 2 else ():
            os.utime(each, (0, 0))

    run(path, progress=progress)
    assert ages
    assert min(ages) > 0


def test_samples_are_young_while_codecs_are_measured(tmp_path, monkeypatch):
    """That may take longer than an hour."""
    path = tmp_path / "store"

    def measure(model, contexts, codecs, bases, progress):
        for each in path.glob("tmp/*"):
            os.utime(each, (0, 0))
        progress(1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert 4 == len(list(path.glob("tmp/*")))
    assert {} == prune.forgotten(open_folder(path))


def test_a_save_that_needs_room_takes_old_samples(tmp_path):
    """Before any entry goes; they count with what the store has."""
    path = tmp_path / "store"
    left = stopped(path, 2)
    nbytes = sum(each.stat().st_size for each in left)
    with kvstore.Store(path, "raw") as store:
        store.set_limit(nbytes)
        first = store.save(range(300), fitted.fitted_cache(300), MODEL)
        assert left == sorted(path.glob("tmp/*"))
        for each in left:
            os.utime(each, (0, 0))
        second = store.save(range(1, 301), fitted.fitted_cache(300), MODEL)
        assert {first.id, second.id} == {entry.id for entry in store.entries()}
    assert [] == list(path.glob("tmp/*"))


def test_a_purge_takes_samples_and_stops_no_run(tmp_path, expected):
    """What the run still reads it has open; it goes on to the same basis."""
    path = tmp_path / "store"

    def progress(done, total):
        if done == 2:
            with kvstore.Store(path) as store:
                store.purge()
            assert [] == list(path.glob("tmp/*"))

    assert expected == run(path, progress=progress)


# --- Files. ---


def given():
    """Return samples as they are computed."""
    random = np.random.default_rng(1)
    rows = random.integers(0, 2**16, (1, 2, 8, 4)).astype(np.uint16)
    gradient = random.standard_normal(rows.shape, np.float32)
    one = fitting.Sample(0, "BF16", rows, (gradient,))
    return [one, replace(one, x=gradient, dtype="F32")]


@pytest.mark.parametrize("has_names", [False, True])
def test_samples_are_held_in_files(tmp_path, monkeypatch, has_names):
    """They are as they were, gradients in 16 bits; by default no folder shows them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = HeldSamples(tmp_path if has_names else None)
    found = held.get({}, OUTLINES, given)
    assert has_names == len(list(tmp_path.iterdir()))
    for sample, expected in zip(found, given(), strict=True):
        assert isinstance(sample.x.base.base.obj, mmap.mmap)
        assert (expected.start, expected.dtype) == (sample.start, sample.dtype)
        assert kit.bits_of(expected.x) == kit.bits_of(sample.x)
        (gradient,) = expected.gradients
        rounded = kit.bits_of(narrow(gradient, "BF16"))
        assert [rounded] == [kit.bits_of(each) for each in sample.gradients]
    held.remove()
    assert [] == list(tmp_path.iterdir())


def test_a_disk_that_loses_what_was_written_is_told(tmp_path, monkeypatch):
    """Nothing is learned from samples that cannot be read back."""
    write_all = files.write_all

    def write(descriptor, *buffers):
        write_all(descriptor, bytes(len(buffers[0])), *buffers[1:])

    monkeypatch.setattr(files, "write_all", write)
    with pytest.raises(OSError, match="reads otherwise"):
        HeldSamples(tmp_path).get({}, OUTLINES, given)


# --- The command. ---


@pytest.mark.parametrize(
    ("words", "is_encrypted", "hint"),
    [
        ((), False, "what was computed is kept; run the same command to go on"),
        ((), True, "an encrypted store keeps no rows of texts"),
        (("--measure-only",), False, "run the same command again"),
    ],
)
def test_who_stops_it_is_told_what_is_kept(
    run_cli, tiny_model, tmp_path, monkeypatch, words, is_encrypted, hint
):
    """In the line that every interrupted command ends with."""
    if is_encrypted:
        keep = vault.keep_by_file(vault.new_key(), tmp_path / "key")
        create_folder(tmp_path / "store", 256, keep)

    def calibrate_model(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate_model", calibrate_model)
    code, _, err = run_cli("calibrate", "--model", tiny_model, *words)
    assert (130, 1) == (code, err.count("hint:")), err
    assert hint in err
