"""A store with a basis: what is saved with it is found, and loaded with it alone."""

import io
import os
import tarfile
import time
from unittest.mock import patch

import kit
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore.codecs import fitting
from kvstore.format.basis import basis_digest
from kvstore.format.calibration import Calibration
from kvstore.ops.transfer import export_bundle
from kvstore.remote.client import Remote
from kvstore.storage.bases import (
    add_basis,
    basis_path,
    calibration_path,
    list_bases,
    write_calibration,
)
from kvstore.storage.folder import open_folder

MODEL = kvstore.Fingerprint({"weights": "fitted"}, "fitted")
TOKENS = list(range(600))
LAYERS = 2


def fitted_cache(num_tokens, seed=0, layers=LAYERS):
    """Return a prompt cache of rows that have few directions."""
    random = np.random.default_rng(seed)
    directions = np.random.default_rng(7).standard_normal((layers, 2, 1, 2, 16, 16))
    found = []
    for layer in range(layers):
        cache = KVCache()
        sides = [
            random.standard_normal((1, 2, num_tokens, 16))
            * 2.0 ** -np.arange(16)
            @ directions[layer, side]
            for side in (0, 1)
        ]
        cache.update_and_fetch(*(mx.array(x.astype(np.float32)) for x in sides))
        found.append(cache)
    return found


def make_basis(seed=5):
    """Return the file of a basis that was fitted to such rows."""
    caches = fitted_cache(512, seed)
    pairs = [[np.array(x)[0] for x in cache.keys_and_values()] for cache in caches]
    group = fitting.make_group((0, 1), 2, 16, fitting.NO_ROTATION)
    fit = fitting.GroupFit(group, fitting.NO_ROTATION)
    fit.add(fitting.Sample(0, "F32", np.stack([np.concatenate(p) for p in pairs])))
    return fitting.finish_basis([fit], {"seed": seed})


@pytest.fixture(scope="module")
def basis():
    """Return the file of a basis, made once."""
    return make_basis()


@pytest.fixture
def store(tmp_path, basis):
    """Return a store that saves with the basis."""
    path = tmp_path / "store"
    kvstore.Store(path).close()
    digest = add_basis(open_folder(path), basis)
    with kvstore.Store(path, codec=f"fit3@{digest}+zstd") as opened:
        yield opened


def rows_of(prompt_cache):
    """Return all rows of a prompt cache."""
    return [np.array(x) for c in prompt_cache for x in c.keys_and_values()]


def relative_error(one, two):
    """Return by how much rows differ, as a part of how large they are."""
    lost = sum(((a - b) ** 2).sum() for a, b in zip(one, two, strict=True))
    return (lost / sum((a**2).sum() for a in one)) ** 0.5


def test_what_is_saved_in_a_basis_is_loaded(store):
    """It takes a fraction of the bytes and comes back nearly as it was."""
    cache = fitted_cache(600)
    entry = store.save(TOKENS, cache, MODEL)
    assert entry.nbytes * 8 < 12 * 600 * 2 * LAYERS * 2 * 16
    loaded, rest = store.load([*TOKENS, 7], MODEL)
    assert [7] == rest
    assert relative_error(rows_of(cache), rows_of(loaded)) < 0.05
    # The tail is stored without loss, and so are the sinks.
    for exact, found in zip(rows_of(cache), rows_of(loaded), strict=True):
        assert kit.bits_of(exact[:, :, 512:]) == kit.bits_of(found[:, :, 512:])
        assert kit.bits_of(exact[:, :, :4]) == kit.bits_of(found[:, :, :4])
    assert [] == store.verify(read_data=True)


def test_a_store_of_another_codec_reads_it(store):
    """A block names its basis, whatever codec the store is opened with."""
    cache = fitted_cache(600)
    store.save(TOKENS, cache, MODEL)
    expected = rows_of(store.load([*TOKENS, 7], MODEL)[0])
    with kvstore.Store(store.path) as other:
        found = rows_of(other.load([*TOKENS, 7], MODEL)[0])
    for one, two in zip(expected, found, strict=True):
        assert kit.bits_of(one) == kit.bits_of(two)


def test_rows_that_were_coded_are_not_coded_again(store):
    """What is loaded and saved in another store is stored there as it was loaded."""
    store.save(TOKENS, fitted_cache(600), MODEL)
    loaded, _ = store.load([*TOKENS, 7], MODEL)
    with kvstore.Store(store.path.parent / "other", codec="turbo2") as other:
        other.save(TOKENS, loaded, MODEL)
        again, _ = other.load([*TOKENS, 7], MODEL)
    for one, two in zip(rows_of(loaded), rows_of(again), strict=True):
        assert kit.bits_of(one) == kit.bits_of(two)


def test_without_its_basis_a_block_is_a_miss(store, basis):
    """Nothing is decoded with another basis; once it is there again, all is."""
    store.save(TOKENS, fitted_cache(600), MODEL)
    digest = store.codec.partition("@")[2].partition("+")[0]
    basis_path(open_folder(store.path), digest).unlink()
    # This process still holds the basis, by the path of the store.
    moved = store.path.rename(store.path.with_name("moved"))
    with kvstore.Store(moved) as other:
        assert (None, [*TOKENS, 7]) == other.load([*TOKENS, 7], MODEL)
        (entry,) = other.entries()
        with pytest.raises(kvstore.IntegrityError, match="lacks the basis"):
            other.load_entry(entry.id, MODEL)
        add_basis(open_folder(moved), basis)
        assert other.load_entry(entry.id, MODEL)


def test_a_codec_of_a_basis_that_is_not_there_is_refused(tmp_path):
    """A store is not opened with a codec that it could not save with."""
    with pytest.raises(kvstore.IntegrityError, match="lacks the basis"):
        kvstore.Store(tmp_path / "store", codec=f"fit2@{'ab' * 32}+zstd")


@pytest.mark.parametrize(
    "codec", ["fit2", "fit2+zstd", f"fit2@{'ab' * 31}", "@", "a@b"]
)
def test_a_name_that_is_no_codec_makes_no_folder(tmp_path, codec):
    """It is refused before anything is made."""
    with pytest.raises(kvstore.CodecError):
        kvstore.Store(tmp_path / "store", codec=codec)
    assert not (tmp_path / "store").exists()


def test_a_copy_in_a_basis_goes_for_better_ones_only(store):
    """`fit3` counts as 5 bits, since it loses far less than `turbo4`."""
    fit, cache = store.codec, fitted_cache(600)
    expected = [("turbo4", 4), (fit, 5), (fit, 5), ("turbo6", 6)]
    for codec, found in zip(("turbo4", fit, "turbo5", "turbo6"), expected, strict=True):
        with kvstore.Store(store.path, codec=codec) as other:
            entry = other.save(TOKENS, cache, MODEL, name="doc")
            stored = [stored for _, stored in other.chain(entry.id)][:2]
            assert [found] * 2 == [(one.codec, one.bits) for one in stored]


# --- Handing over. ---


def bundle_of(store, entry):
    """Return the bundle of an entry."""
    file = io.BytesIO()
    store.export_bundle(entry.id, file)
    return file.getvalue()


def test_a_bundle_brings_the_basis(store, tmp_path, basis):
    """Another store loads from it what this one loads, and exports the same bytes."""
    entry = store.save(TOKENS, fitted_cache(600), MODEL)
    bundle = bundle_of(store, entry)
    assert basis in bundle
    with kvstore.Store(tmp_path / "other") as other:
        taken = other.import_bundle(io.BytesIO(bundle))
        assert bundle == bundle_of(other, taken)
        expected = store.load([*TOKENS, 7], MODEL)[0]
        found = other.load([*TOKENS, 7], MODEL)[0]
    for one, two in zip(rows_of(expected), rows_of(found), strict=True):
        assert kit.bits_of(one) == kit.bits_of(two)


def test_a_bundle_without_its_basis_is_for_who_has_it(store, tmp_path, basis):
    """Who lacks it is told so, and takes nothing over."""
    entry = store.save(TOKENS, fitted_cache(600), MODEL)
    file = io.BytesIO()
    store.export_bundle(entry.id, file, without_basis=True)
    assert basis not in file.getvalue()
    with kvstore.Store(tmp_path / "other") as other:
        with pytest.raises(kvstore.IntegrityError, match="lacks the basis"):
            other.import_bundle(io.BytesIO(file.getvalue()))
        assert [] == other.entries()
        add_basis(open_folder(other.path), basis)
        taken = other.import_bundle(io.BytesIO(file.getvalue()))
        found = other.load_entry(taken.id, MODEL)[0]
    for one, two in zip(
        rows_of(store.load_entry(entry.id, MODEL)[0]), rows_of(found), strict=True
    ):
        assert kit.bits_of(one) == kit.bits_of(two)


def test_a_bundle_unpacked_by_tar_is_a_store(store, tmp_path):
    """The basis lies in it where a store has it."""
    entry = store.save(TOKENS, fitted_cache(600), MODEL)
    with tarfile.open(fileobj=io.BytesIO(bundle_of(store, entry))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    with kvstore.Store(tmp_path / "unpacked") as other:
        assert other.load([*TOKENS, 7], MODEL)[0]


def test_a_bundle_of_damaged_or_other_bases_is_refused(store, tmp_path, basis):
    """A flipped bit, and a basis that no block names, leave the store as it was."""
    entry = store.save(TOKENS, fitted_cache(600), MODEL)
    bundle = bundle_of(store, entry)
    place = bundle.index(basis)
    flipped = bytearray(bundle)
    flipped[place + len(basis) // 2] ^= 1
    other = make_basis(seed=6)
    plain = kvstore.Store(tmp_path / "plain")
    lossless = plain.save(TOKENS, fitted_cache(600), MODEL)
    file = io.BytesIO()
    digests = {basis_digest(other): other}
    with patch.object(export_bundle, "read_named", lambda *_: digests):
        plain.export_bundle(lossless.id, file)
    plain.close()
    for wrong in (bytes(flipped), file.getvalue()):
        with kvstore.Store(tmp_path / "other") as target:
            with pytest.raises(kvstore.IntegrityError):
                target.import_bundle(io.BytesIO(wrong))
            assert [] == list(target.entries())
            assert [] == list_bases(open_folder(target.path))


remotes = kit.load_beside("test_pull")


@pytest.fixture
def pushed(store, s3_server):
    """Return the remote that an entry was pushed into, and the entry's key."""
    url, options = "s3://bucket/some/where", s3_server.options
    remote = Remote("team", url, options, is_trusted=True)
    store.save(TOKENS, fitted_cache(600), MODEL, name="doc")
    done = remotes.push(store.path, remote)
    assert (3, 0) == (done.num_sent, done.num_there)
    again = remotes.push(store.path, remote)
    assert (0, 3) == (again.num_sent, again.num_there)
    return remote, done.key


def test_a_remote_brings_the_basis(store, pushed, s3_server, tmp_path, basis):
    """It is pushed once, before the entry, and pulled where it is lacking."""
    assert [basis] == [s3_server.objects[key] for key in s3_server.keys("/v1/bases/")]
    with kvstore.Store(tmp_path / "other") as other:
        remotes.fetch(other.path, *pushed)
        assert list_bases(open_folder(other.path)) == list_bases(
            open_folder(store.path)
        )
        expected = store.load([*TOKENS, 7], MODEL)[0]
        found = other.load([*TOKENS, 7], MODEL)[0]
    for one, two in zip(rows_of(expected), rows_of(found), strict=True):
        assert kit.bits_of(one) == kit.bits_of(two)


def test_a_remote_without_the_right_basis_is_refused(pushed, s3_server, tmp_path):
    """Flipped, or gone: nothing of the entry is taken over."""
    (key,) = s3_server.keys("/v1/bases/")
    data = bytearray(s3_server.objects[key])
    data[-1] ^= 1
    for change in (
        lambda: s3_server.objects.update({key: bytes(data)}),
        lambda: s3_server.objects.pop(key),
    ):
        change()
        with kvstore.Store(tmp_path / "other") as other:
            with pytest.raises(kvstore.IntegrityError, match="basis"):
                remotes.fetch(other.path, *pushed)
            assert [] == other.entries()
            assert [] == list_bases(open_folder(other.path))


def test_an_entry_without_its_basis_is_not_exported(store, tmp_path):
    """A bundle that nobody could read is not written."""
    entry = store.save(TOKENS, fitted_cache(600), MODEL)
    for digest in list_bases(open_folder(store.path)):
        basis_path(open_folder(store.path), digest).unlink()
    file = io.BytesIO()
    with pytest.raises(kvstore.IntegrityError, match="lacks the basis"):
        store.export_bundle(entry.id, file)
    assert file.getvalue() == b""


def basis_file(store):
    """Return the file of the only basis of a store."""
    folder = open_folder(store.path)
    (digest,) = list_bases(folder)
    return basis_path(folder, digest)


def age(path, seconds=7200):
    """Say that a file was written long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_pruning_keeps_the_basis(store):
    """What blocks name stays, however old."""
    store.save(TOKENS, fitted_cache(600), MODEL, name="kept")
    age(basis_file(store))
    store.plan_prune(now=True).execute()
    assert store.load([*TOKENS, 7], MODEL)[0]
    assert basis_file(store).exists()


def test_a_basis_that_nothing_names_is_pruned(store):
    """An hour after it came, and not while a calibration or a block names it."""
    path = basis_file(store)
    nbytes = path.stat().st_size
    assert {} == store.plan_prune().bases
    age(path)
    calibration = Calibration(MODEL.digest, "model", path.stem, 0, ())
    write_calibration(open_folder(store.path), calibration)
    assert {} == store.plan_prune().bases
    calibration_path(open_folder(store.path), MODEL.digest).unlink()
    plan = store.plan_prune()
    assert {path.stem: nbytes} == plan.bases
    entry = store.save(TOKENS, fitted_cache(600), MODEL)  # since the plan was made
    assert 0 == plan.execute()
    assert path.exists()
    store.remove(entry.id)
    store.plan_prune(now=True).execute()
    assert nbytes == store.plan_prune().execute()
    assert [] == list_bases(open_folder(store.path))


def test_a_basis_that_is_named_since_the_plan_stays(store, basis):
    """By a calibration, or because it was added again."""
    path = basis_file(store)
    folder = open_folder(store.path)
    age(path)
    plan = store.plan_prune()
    assert [path.stem] == list(plan.bases)
    write_calibration(folder, Calibration(MODEL.digest, "model", path.stem, 0, ()))
    assert 0 == plan.execute()
    calibration_path(folder, MODEL.digest).unlink()
    add_basis(folder, basis)
    assert 0 == plan.execute()
    age(path)
    assert 0 < plan.execute()
    assert not path.exists()


def test_a_basis_stays_while_nobody_knows_what_needs_it(store):
    """A shard that cannot be read, or that was set aside, may name it."""
    entry = store.save(TOKENS, fitted_cache(600), MODEL)
    age(basis_file(store))
    (shard,) = (store.path / "shards").glob("*/*.safetensors")
    data = shard.read_bytes()
    shard.chmod(0o600)
    shard.write_bytes(b"damaged" + data)
    store.remove(entry.id)
    assert {} == store.plan_prune().bases
    aside = store.path / "quarantine" / shard.name
    shard.rename(aside)
    assert {} == store.plan_prune().bases
    aside.unlink()
    assert 1 == len(store.plan_prune().bases)


def test_a_shard_that_is_set_aside_since_the_plan_keeps_its_basis(store):
    """It may be whole and come back, and nobody could decode it then."""
    path = basis_file(store)
    age(path)
    plan = store.plan_prune()
    assert [path.stem] == list(plan.bases)
    store.save(TOKENS, fitted_cache(600), MODEL, name="doc")
    (shard,) = (store.path / "shards").glob("*/*.safetensors")
    shard.rename(store.path / "quarantine" / shard.name)  # it was misread
    plan.execute()
    assert path.exists()
    store.repair()
    assert store.load_entry("doc", MODEL)[1] == TOKENS


def test_no_block_is_published_without_its_basis(store):
    """A save that `prune` overtook fails, and leaves nothing that nobody can read."""
    basis_file(store).unlink()
    with pytest.raises(kvstore.IntegrityError, match="lacks the basis"):
        store.save(TOKENS, fitted_cache(600), MODEL)
    assert [] == list((store.path / "shards").glob("*/*.safetensors"))


def test_verify_looks_at_bases(store):
    """One that is missing or damaged is told, with the entries that need it."""
    store.save(TOKENS, fitted_cache(600), MODEL, name="doc")
    path = basis_file(store)
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    def found():
        findings = store.verify(read_data=0)
        return [(finding.kind, finding.entries) for finding in findings]

    lost = ("missing-block", ("doc",))
    assert [("damaged-basis", ()), lost] == found()
    path.unlink()
    assert [("missing-basis", ()), lost] == found()
    path.write_bytes(data)
    assert [] == found()
    calibration_path(open_folder(store.path), MODEL.digest).write_bytes(b"{}")
    assert [("damaged-basis", ())] == found()
