"""Calibration: a basis from rows or from a model, what is measured, what it is for."""

import io
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from unittest.mock import patch

import blake3
import kit
import numpy as np
import pytest
from click.testing import CliRunner

import kvstore
from kvstore.cli import cli
from kvstore.cli.commands.calibrate import format_calibration
from kvstore.cli.output import format_codec
from kvstore.codecs import fitting
from kvstore.errors import IntegrityError
from kvstore.format.block import StoredBlock
from kvstore.format.calibration import (
    Calibration,
    Measured,
    calibration_to_bytes,
    nominal_bits,
    parse_calibration,
    rank,
)
from kvstore.format.documents import canonical_json
from kvstore.format.entry import entry_to_bytes, parse_entry
from kvstore.models import calibrate, corpus
from kvstore.ops.quality import find_loss
from kvstore.storage.bases import (
    basis_path,
    calibrated_bases,
    calibration_path,
    list_bases,
    read_basis,
    read_calibration,
    write_calibration,
)
from kvstore.storage.folder import create_folder, open_folder

architectures = kit.load_beside("architectures")
fitted = kit.load_beside("test_fit_store")
DIGEST = "ab" * 32
FOUND = Calibration(
    "cd" * 32,
    "model",
    DIGEST,
    4,
    (
        Measured(f"fit1@{DIGEST}+zstd", 1.1, 0.006, 0.001, 0.95),
        Measured(f"fit2@{DIGEST}+zstd", 2.1, 0.0009, 0.00005, 0.98),
        Measured("turbo4+zstd", 4.2, 0.004, 0.0005, 0.97),
    ),
)


def test_a_quality_is_the_smallest_codec_that_meets_it():
    """Where none does, nothing is lost; where nothing was measured, it is as usual."""
    assert f"fit2@{DIGEST}+zstd" == FOUND.choose("high")
    assert f"fit2@{DIGEST}+zstd" == FOUND.choose("balanced")
    assert f"fit1@{DIGEST}+zstd" == FOUND.choose("small")
    lucky = replace(FOUND.measured[0], kl_error=0.005)
    unsure = replace(FOUND, measured=(lucky, *FOUND.measured[1:]))
    assert f"fit2@{DIGEST}+zstd" == unsure.choose("small")
    few = replace(FOUND, num_contexts=3)  # of one there is no error at all
    assert "turbo6+zstd" == few.choose("high")
    assert "planes+zstd" == FOUND.choose("exact")
    assert "planes+zstd" == replace(FOUND, measured=FOUND.measured[2:]).choose("high")
    assert "turbo4+zstd" == replace(FOUND, measured=()).choose("balanced")


def codecs_of(store, fingerprint, seed):
    """Return the codecs that a store saves full blocks of a model with."""
    tokens = [seed * 1000 + i for i in range(600)]
    entry = store.save(tokens, fitted.fitted_cache(600, seed), fingerprint)
    return {stored.codec for _, stored in store.chain(entry.id)[:2]}


def note(store, **changes):
    """Keep a calibration of the model of a store that has a basis."""
    folder = open_folder(store.path)
    (basis,) = list_bases(folder)
    fit = Measured(f"fit3@{basis}+zstd", 3.0, 0.0009, 0.0, 0.99)
    turbo = Measured("turbo5+zstd", 5.2, 0.0007, 0.0, 0.99)
    digest = fitted.MODEL.digest
    found = Calibration(digest, "model", basis, 4, (fit, turbo))
    write_calibration(folder, replace(found, **changes))
    return fit.codec


def test_a_store_of_a_quality_saves_with_what_was_measured(saved):
    """Of each model its own; whoever's the rows are; as usual where nothing was."""
    saved.calibrate()
    fit = note(saved)
    with kvstore.Store(saved.path, "high") as store:
        assert "high" == store.codec
        assert {fit} == codecs_of(store, fitted.MODEL, 11)
        assert {fit} == codecs_of(store, fitted.MODEL.with_salt("ann"), 11)
        other = kvstore.Fingerprint({"weights": "other"}, "other")
        assert {"turbo6+zstd"} == codecs_of(store, other, 11)
    with kvstore.Store(saved.path) as store:
        assert "balanced" == store.codec
        assert {fit} == codecs_of(store, fitted.MODEL, 12)
    with kvstore.Store(saved.path, "exact") as store:
        assert {"planes+zstd"} == codecs_of(store, fitted.MODEL, 13)


def test_a_quality_goes_without_what_cannot_be_used(saved, caplog):
    """A basis that is gone, and a calibration that is damaged, end no save."""
    saved.calibrate()
    note(saved)
    moved = saved.path.rename(saved.path.with_name("moved"))
    folder = open_folder(moved)
    basis_path(folder, list_bases(folder)[0]).unlink()
    with kvstore.Store(moved, "high") as store:
        assert {"turbo5+zstd"} == codecs_of(store, fitted.MODEL, 11)
        calibration_path(folder, fitted.MODEL.digest).write_bytes(b"{}")
        assert {"turbo6+zstd"} == codecs_of(store, fitted.MODEL, 12)
    assert "is left out" in caplog.text


def test_a_basis_that_goes_while_a_process_runs_is_not_chosen(saved):
    """Saves fall back to what else was measured, or lose nothing."""
    saved.calibrate()
    fit = note(saved)
    folder = open_folder(saved.path)
    with kvstore.Store(saved.path, "high") as store:
        assert {fit} == codecs_of(store, fitted.MODEL, 11)
        only = read_calibration(folder, fitted.MODEL.digest).measured[:1]
        path = basis_path(folder, list_bases(folder)[0])
        data = path.read_bytes()
        path.unlink()
        assert {"turbo5+zstd"} == codecs_of(store, fitted.MODEL, 12)
        path.write_bytes(data)
        note(saved, measured=only)
        path.unlink()
        assert {"planes+zstd"} == codecs_of(store, fitted.MODEL, 13)


def test_a_new_basis_keeps_what_was_measured(saved):
    """And the basis that it was measured with; whoever's the rows are."""
    old = saved.calibrate()
    note(saved)
    folder = open_folder(saved.path)
    before = read_calibration(folder, fitted.MODEL.digest)
    salted = fitted.MODEL.with_salt("ann")
    for seed in range(4, 8):
        tokens = [seed * 1000 + i for i in range(600)]
        saved.save(tokens, fitted.fitted_cache(600, seed), salted)
    found = saved.calibrate(salted)
    assert found == read_calibration(folder, fitted.MODEL.digest)
    assert old.basis != found.basis
    assert (before.measured, 4) == (found.measured, found.num_contexts)
    assert {old.basis, found.basis} == calibrated_bases(folder)


def test_a_calibration_comes_back():
    """What is read is what was written; what was changed or is another's is refused."""
    data = calibration_to_bytes(FOUND)
    assert FOUND == parse_calibration(data, FOUND.fingerprint)
    for wrong in (data + b" ", data.replace(b"0.006", b'"x"'), b"{}", b"[]", b""):
        with pytest.raises(IntegrityError):
            parse_calibration(wrong, FOUND.fingerprint)
    with pytest.raises(IntegrityError):
        parse_calibration(data, "ef" * 32)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return a store with rows of one model, stored without loss."""
    monkeypatch.setattr(fitting, "RATES", ("3",))
    with kvstore.Store(tmp_path / "store", "planes+zstd") as store:
        for seed in range(4):
            tokens = [(seed + 1) * 1000 + i for i in range(600)]
            store.save(tokens, fitted.fitted_cache(600, seed), fitted.MODEL)
        yield store


def test_a_basis_is_made_of_what_is_stored(saved):
    """It needs no model, and codes its rows in few bits."""
    found = saved.calibrate()
    assert fitted.MODEL.digest == found.fingerprint
    assert [found.basis] == list_bases(open_folder(saved.path))
    assert found == read_calibration(open_folder(saved.path), fitted.MODEL.digest)
    with kvstore.Store(saved.path, f"fit3@{found.basis}+zstd") as store:
        cache = fitted.fitted_cache(600, 9)
        entry = store.save(fitted.TOKENS, cache, fitted.MODEL)
        assert entry.nbytes * 8 < 13 * 600 * 2 * fitted.LAYERS * 2 * 16
        loaded, _ = store.load([*fitted.TOKENS, 7], fitted.MODEL)
    error = fitted.relative_error(fitted.rows_of(cache), fitted.rows_of(loaded))
    assert error < 0.05


def test_calibrating_from_a_store_writes_no_rows_to_files(saved, tmp_path, monkeypatch):
    """Those of an encrypted store would lie there in the clear."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    created = []

    def note(event, arguments):
        if event == "open" and created is not None:
            path, _, flags = arguments
            written = flags & (os.O_WRONLY | os.O_RDWR)
            if written and not str(path).startswith(str(saved.path)):
                created.append(path)

    sys.addaudithook(note)
    basis = saved.calibrate().basis
    found, created = created, None
    assert basis in list_bases(open_folder(saved.path))
    assert ([], []) == (found, list(temporary.iterdir()))


def test_a_purge_names_the_bases_of_stored_rows(saved):
    """One that a calibration needs stays, and says so; an old one goes."""
    basis = saved.calibrate().basis
    entries = [entry.id for entry in saved.entries()]
    options = ["--store", str(saved.path), "rm", "-y", "--purge", entries[0]]
    done = CliRunner().invoke(cli, options)
    assert f"basis {basis[:12]} stays" in done.output
    for path in saved.path.glob("bases/*.json"):
        path.unlink()
    assert saved.purge() == []
    assert list_bases(open_folder(saved.path)) == []


def test_the_verb_makes_a_basis_of_what_is_stored(saved):
    """It names the basis; measuring or reading texts needs a model."""
    runner = CliRunner()
    options = ["--store", str(saved.path), "calibrate", "--from-store"]
    done = runner.invoke(cli, [*options, "-q"])
    assert 0 == done.exit_code, done.output
    assert list_bases(open_folder(saved.path)) == done.stdout.split()
    assert 2 == runner.invoke(cli, [*options, "--measure-only"]).exit_code


def test_what_is_measured_is_shown():
    """Each codec has a line, and each quality says what it means."""
    text = format_calibration(FOUND)
    assert "turbo4  4.20  0.00400  0.00050" in text
    assert f"balanced: fit2@{DIGEST[:12]}+zstd" in text


def test_what_was_coded_is_not_learned_from(tmp_path):
    """Lossy rows, too few rows and several models' make no basis."""
    with kvstore.Store(tmp_path / "store") as store:
        for seed in range(5):
            tokens = [seed * 1000 + i for i in range(512)]
            store.save(tokens, fitted.fitted_cache(512, seed), fitted.MODEL)
        with pytest.raises(kvstore.KVStoreError, match="without loss"):
            store.calibrate()
    with kvstore.Store(tmp_path / "two", "planes") as store:
        for name in ("one", "two"):
            model = kvstore.Fingerprint({"weights": name}, name)
            store.save(fitted.TOKENS, fitted.fitted_cache(600), model)
        with pytest.raises(kvstore.KVStoreError, match="several models"):
            store.calibrate()
    assert [] == list_bases(open_folder(tmp_path / "store"))


def test_what_was_reanchored_is_not_learned_from(saved, tmp_path):
    """Rows that were moved are of no model: they make no basis, nor add to one."""
    moved = fitted.MODEL.reanchored
    with kvstore.Store(tmp_path / "moved", "planes") as store:
        for seed in range(5):
            tokens = [seed * 1000 + i for i in range(512)]
            store.save(tokens, fitted.fitted_cache(512, seed), moved)
        with pytest.raises(kvstore.KVStoreError, match="without loss"):
            store.calibrate()
    before = saved.calibrate().basis
    saved.save([9, *fitted.TOKENS], fitted.fitted_cache(601, 77), moved)
    assert before == saved.calibrate().basis


@pytest.fixture
def small(monkeypatch):
    """Make contexts short."""
    monkeypatch.setattr(calibrate, "PREFIX", 256)
    monkeypatch.setattr(calibrate, "CONTEXT", 272)
    monkeypatch.setattr(calibrate, "TURBO", ("turbo4",))
    monkeypatch.setattr(fitting, "RATES", ("2", "4"))


def test_gradients_say_what_an_error_does(small):
    """They are what the log-probability of drawn tokens changes by."""
    model = architectures.make_model("llama")
    tokens = np.random.default_rng(1).integers(3, 60, 272).tolist()
    groups = calibrate._groups(model, tokens[0])
    (sample,) = calibrate._samples(model, groups, tokens, (1, 2))
    one, other = sample.gradients
    assert not np.array_equal(one, other)
    assert one.shape == sample.x.shape
    assert np.isfinite(one).all()
    assert (np.abs(one).max(axis=(1, 2, 3)) > 0).all()


def test_a_model_is_calibrated(small, tmp_path):
    """The basis lies in the store, and every codec was measured."""
    model = architectures.make_model("llama")
    loaded = kit.LoadedModel(model, None, fitted.MODEL)
    random = np.random.default_rng(1)
    contexts = random.integers(3, 60, (6, 272)).tolist()
    with kvstore.Store(tmp_path / "store") as store:
        found = calibrate.calibrate_model(
            loaded, store, contexts, bar=lambda what: lambda done, total: None
        )
    names = [one.codec.partition("@")[0] for one in found.measured]
    assert ["fit2", "fit4", "turbo4"] == names
    assert found.measured[0].kl > found.measured[1].kl >= 0
    assert [found.basis] == list_bases(open_folder(tmp_path / "store"))
    assert found == read_calibration(
        open_folder(tmp_path / "store"), fitted.MODEL.digest
    )


def test_rates_of_one_step_are_measured_once(small, tmp_path, monkeypatch):
    """Both names have the figures; of each name a quality may be chosen."""
    monkeypatch.setattr(fitting, "RATES", ("2", "2.001", "4"))
    asked = []

    def measure(model, contexts, codecs, *_):
        asked.extend(codecs)
        return [Measured(codec, 2.0, 0.1 * n, 0, 1) for n, codec in enumerate(codecs)]

    monkeypatch.setattr(calibrate, "measure", measure)
    loaded = kit.LoadedModel(architectures.make_model("llama"), None, fitted.MODEL)
    contexts = np.random.default_rng(1).integers(3, 60, (5, 272)).tolist()
    with kvstore.Store(tmp_path / "store") as store:
        found = calibrate.calibrate_model(
            loaded, store, contexts, bar=lambda what: lambda done, total: None
        )
    steps = read_basis(open_folder(tmp_path / "store"), found.basis).steps
    assert steps["2"] == steps["2.001"] > steps["4"]
    first, same, finer, turbo = found.measured
    assert [first.codec, finer.codec, turbo.codec] == asked
    assert f"fit2.001@{found.basis}+zstd" == same.codec
    assert first == replace(same, codec=first.codec)
    assert finer.kl > first.kl


def test_a_basis_that_was_pruned_while_it_was_measured_is_there(small, tmp_path):
    """The calibration names no basis that the store lacks."""
    loaded = kit.LoadedModel(architectures.make_model("llama"), None, fitted.MODEL)
    contexts = np.random.default_rng(1).integers(3, 60, (5, 272)).tolist()
    folder = create_folder(tmp_path / "store")

    def measure(*_):
        basis_path(folder, list_bases(folder)[0]).unlink()
        return []

    with (
        kvstore.Store(tmp_path / "store") as store,
        patch.object(calibrate, "measure", measure),
    ):
        found = calibrate.calibrate_model(
            replace(loaded, fingerprint=fitted.MODEL.with_salt("ann")),
            store,
            contexts,
            bar=lambda what: lambda done, total: None,
        )
    assert [found.basis] == list_bases(folder)
    assert found == read_calibration(folder, fitted.MODEL.digest)


def test_who_is_stopped_while_codecs_are_measured_keeps_the_basis(small, tmp_path):
    """Measuring alone goes on with it, and no quality chooses it before."""
    loaded = kit.LoadedModel(architectures.make_model("llama"), None, fitted.MODEL)
    contexts = np.random.default_rng(1).integers(3, 60, (5, 272)).tolist()
    folder = create_folder(tmp_path / "store")

    def bar(what):
        if what == "measure":
            raise KeyboardInterrupt
        return lambda done, total: None

    with kvstore.Store(tmp_path / "store") as store:
        with pytest.raises(KeyboardInterrupt):
            calibrate.calibrate_model(loaded, store, contexts, bar=bar)
        left = read_calibration(folder, fitted.MODEL.digest)
        assert (list_bases(folder), ()) == ([left.basis], left.told)
        with patch.object(calibrate, "measure", lambda *_: []):
            found = calibrate.calibrate_model(
                loaded,
                store,
                contexts,
                measure_only=True,
                bar=lambda what: lambda done, total: None,
            )
    assert left.basis == found.basis


class Words:
    """A tokenizer of letters."""

    chat_template = None

    def encode(self, text):
        """Return a token for each letter."""
        return list(text.encode())


def test_stretches_share_no_token():
    """Of each text the same number comes, none twice."""
    texts = [list(range(100)), list(range(1000, 1035))]
    found = list(corpus.cut(texts, 10))
    assert 13 == len(found)
    assert 130 == len({token for stretch in found for token in stretch})


def test_usual_texts_are_of_many_kinds():
    """There is enough of them on any machine."""
    found = corpus.usual_contexts(Words(), 40, 1280)
    assert 40 == len(found)
    assert 40 == len(set(map(tuple, found)))


def test_every_stretch_begins_as_a_text_does():
    """With the token that begins every prompt, and as long as the others."""

    class Begun(Words):
        def encode(self, text):
            return [999, *super().encode(text), 998]

    given = ["first " * 20, "second " * 20]
    expected = corpus.given_contexts(Words(), given, 8, 20)
    found = corpus.given_contexts(Begun(), given, 8, 21)
    assert [[999, *stretch] for stretch in expected[:4]] == found[:4]


# --- Receipts. ---


def test_an_entry_says_what_was_lost(saved, tmp_path):
    """By its codecs; another store has it from the bundle; worse is refused."""
    saved.calibrate()
    fit = note(saved)
    with kvstore.Store(saved.path, "high") as store:
        entry = store.save(fitted.TOKENS, fitted.fitted_cache(600, 9), fitted.MODEL)
        assert [fit] == [one.codec for one in entry.receipts]
        assert 0.0009 == store.loss(entry.id).kl
        assert store.load_entry(entry.id, fitted.MODEL, max_kl=0.001)
        with pytest.raises(kvstore.KVStoreError, match=r"KL 0\.0009"):
            store.load_entry(entry.id, fitted.MODEL, max_kl=0.0001)
        bundle = io.BytesIO()
        store.export_bundle(entry.id, bundle)
        exact = next(one for one in store.entries() if one.codec == "planes+zstd")
        assert 0.0 == store.loss(exact.id).kl
    with kvstore.Store(tmp_path / "other") as other:
        taken = other.import_bundle(io.BytesIO(bundle.getvalue()))
        assert entry.receipts == taken.receipts
        assert 0.0009 == other.loss(taken.id).kl


def test_what_was_not_measured_is_not_known(saved):
    """Neither a codec that was not, nor rows that came out of another store's codes."""
    saved.calibrate()
    note(saved)
    with kvstore.Store(saved.path, "turbo4") as store:
        entry = store.save(fitted.TOKENS, fitted.fitted_cache(600, 9), fitted.MODEL)
        assert () == entry.receipts
        assert "turbo4" in store.loss(entry.id).unknown
        with pytest.raises(kvstore.KVStoreError, match="nobody knows"):
            store.load_entry(entry.id, fitted.MODEL, max_kl=9)
        loaded, _ = store.load_entry(entry.id, fitted.MODEL)
    with kvstore.Store(saved.path.parent / "other") as other:
        copied = other.save(fitted.TOKENS, loaded, fitted.MODEL)
        assert "rows that were coded" in other.loss(copied.id).unknown


def block(codec, bits):
    """Return what a shard says of a block of this codec."""
    lossless = codec == "planes"
    return StoredBlock(None, codec, lossless, bits, 0, "", 0, 0, {})


@pytest.mark.parametrize(
    ("chain", "is_known"),
    [
        ([("planes", 255), ("turbo3", 3), ("planes", 255)], True),
        ([("turbo3", 3), ("turbo3", 3)], True),
        ([("turbo3", 3), ("turbo4", 4), ("planes", 255)], True),
        ([("turbo3", 3), ("planes", 3)], False),
        ([("turbo3", 3), ("turbo4", 3), ("planes", 3)], False),
        ([("planes", 255), ("turbo3", 3), ("planes", 3)], False),
        ([("planes", 255), ("turbo3", 3), ("turbo4", 3)], False),
        ([("planes", 3), ("turbo3", 3)], False),
        ([("turbo4", 3), ("turbo3", 3)], False),
        ([("turbo4", 4), ("planes", 3)], False),
        ([("fit1.75", 4), ("planes", 255)], True),
        ([("fit1.75", 3)], False),
    ],
)
def test_rows_of_unknown_origin_are_not_measured(chain, is_known):
    """What coded rows did to rows that were computed from them, nobody knows."""
    kl = {"turbo3": 0.02, "turbo4": 0.004, "fit1.75": 0.002}
    receipts = [Measured(codec, 3.0, found, 0, 1) for codec, found in kl.items()]
    found = find_loss([block(*each) for each in chain], receipts)
    assert is_known == (found.kl is not None)


@pytest.mark.parametrize(
    ("codec", "kl", "bits"),
    [
        ("fit1.5@" + 64 * "0", 0.0036, 4),
        ("fit1@" + 64 * "0", 0.01, 3),
        ("fit3@" + 64 * "0", 0.00028, 5),
        ("fit4@" + 64 * "0", 0.5, 1),
        ("turbo3", 0.0036, 3),
        ("planes", 0, None),
    ],
)
def test_codecs_are_ranked_by_what_was_measured(codec, kl, bits):
    """A codec in a basis counts as the widest `turbo` that loses no less."""
    turbo = {5: 0.001, 4: 0.0045, 3: 0.0238, 2: 0.16}
    measured = [Measured(f"turbo{n}+zstd", n, kl, 0, 1) for n, kl in turbo.items()]
    own = Measured(f"{codec}+zstd", 2.0, kl, 0, 1)
    assert bits == rank(codec, [*measured, own] if kl else measured)
    assert nominal_bits(codec) == rank(codec, measured)


def test_text_of_before_a_calibration_gets_better(saved):
    """What `turbo4` had is written anew where a better codec was measured, not back."""
    tokens = fitted.TOKENS
    path, cache = saved.path, fitted.fitted_cache(600, 9)
    with kvstore.Store(path, "turbo4+zstd") as store:
        entry = store.save(tokens, cache, fitted.MODEL)
    saved.calibrate()
    fit = note(saved)
    turbo = (
        Measured("turbo5+zstd", 5, 0.001, 0, 1),
        Measured("turbo4+zstd", 4, 0.004, 0, 1),
    )
    note(saved, measured=(Measured(fit, 3.0, 0.0009, 0, 0.99), *turbo))
    for codec in ("high", "turbo4+zstd"):
        with kvstore.Store(path, codec) as store:
            store.save(tokens, fitted.fitted_cache(600, 9), fitted.MODEL)
            assert [fit, fit] == [s.codec for _, s in store.chain(entry.id)][:2]


@pytest.mark.parametrize(
    "receipts", [[], [{}], [1], {}, "x", [asdict(FOUND.measured[0])] * 2]
)
def test_a_receipt_that_cannot_be_is_refused(saved, receipts):
    """An entry that says such things of itself is damaged, whatever its digest."""
    (entry, *_) = saved.entries()
    path = open_folder(saved.path).entries / f"{entry.id}.json"
    body = json.loads(entry_to_bytes(entry)) | {"receipts": receipts}
    del body["digest"]
    digest = blake3.blake3(canonical_json(body)).hexdigest()
    with pytest.raises(IntegrityError):
        parse_entry(path, canonical_json(body | {"digest": digest}))


def test_entries_are_shown_with_what_was_lost(saved):
    """`inspect` says it in words, `ls` in a column, `load` refuses what is worse."""
    saved.calibrate()
    fit = note(saved)
    with kvstore.Store(saved.path, "high") as store:
        cache = fitted.fitted_cache(600, 9)
        store.save(fitted.TOKENS, cache, fitted.MODEL, name="doc")

    def run(*words):
        words = ["--store", str(saved.path), *words]
        return CliRunner().invoke(cli, words, env={"COLUMNS": "200"})

    shown = run("inspect", "doc").stdout
    assert "KL 0.0009, the first choice the same in 99.0%" in shown
    assert fit not in shown
    assert format_codec(fit) in shown
    assert 0.0009 == json.loads(run("inspect", "doc", "--json").stdout)["loss"]["kl"]
    assert 0 == run("load", "doc", "--max-kl", "0.001").exit_code
    refused = run("load", "doc", "--max-kl", "0.0001")
    assert 1 == refused.exit_code
    assert "worse rows" in str(refused.exception)
    assert ["doc", "0.0009"] == [
        word for word in run("ls").stdout.split() if word in ("doc", "0.0009")
    ]


def test_exact_blocks_are_recompressed_in_a_basis(saved):
    """By a quality, as if they had been saved so; the entry says what was lost."""
    entry = next(one for one in saved.entries() if one.codec == "planes+zstd")
    rows = fitted.rows_of(saved.load_entry(entry.id, fitted.MODEL)[0])
    saved.calibrate()
    fit = note(saved)
    done = saved.recompress(entry.id, "high")
    assert [fit, fit, "planes+zstd"] == [s.codec for _, s in saved.chain(done.id)]
    assert 0.0009 == saved.loss(done.id).kl
    assert [fit] == [one.codec for one in done.receipts]
    found = fitted.rows_of(saved.load_entry(done.id, fitted.MODEL)[0])
    assert fitted.relative_error(rows, found) < 0.05
