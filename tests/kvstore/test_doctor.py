"""The doctor finds what is wrong, names the remedy, and leaves nothing behind."""

import json
import os
import shutil
import sys
from collections import namedtuple

import pytest

from kvstore import blas
from kvstore.cli import failures
from kvstore.models.context import context_length
from kvstore.models.doctor import examine_model
from kvstore.ops.upkeep import doctor, selftest
from kvstore.storage import disk, files

SUBJECTS = [
    *("versions", "BLAS", "back end", "codecs", "store", "file system"),
    *("free space", "disk", "lock", "weights", "context", "model"),
]
Space = namedtuple("Space", "f_bavail f_frsize f_blocks")


def find(found, subject):
    """Return what was found about a subject."""
    (one,) = (diagnosis for diagnosis in found if diagnosis.subject == subject)
    return one


def assert_wrong(diagnosis, state, detail, remedy):
    """Hold what was found against what is to be told."""
    assert diagnosis.state == state
    assert detail in diagnosis.detail
    assert remedy in diagnosis.remedy


def test_a_sound_machine_is_told(run_cli, store_path, tiny_model):
    """Every check says what it saw; a store is not changed."""
    before = sorted(store_path.rglob("*"))
    code, out, _ = run_cli("doctor", "--model", tiny_model)
    assert code == 0
    for subject in SUBJECTS:
        assert f"  {subject}: " in out
    assert before == sorted(store_path.rglob("*"))


def test_no_store_is_made(run_cli, tmp_path):
    """Where there is no store, the doctor says so and makes none."""
    code, out, _ = run_cli("doctor", "--json", store=tmp_path / "a" / "b")
    found = json.loads(out)
    assert code == 0
    (store,) = (one for one in found["findings"] if one["subject"] == "store")
    assert store["detail"].startswith("none yet at")
    assert [] == list(tmp_path.iterdir())


def test_what_is_bad_is_an_exit_code(run_cli, tmp_path, tiny_model):
    """A folder that holds something else, and a model that is not there."""
    (tmp_path / "mine").write_text("x")
    code, out, _ = run_cli("doctor", "--model", "no-such", "--json", store=tmp_path)
    found = {one["subject"]: one for one in json.loads(out)["findings"]}
    assert code == 1
    assert (found["store"]["state"], found["model"]["state"]) == ("bad", "bad")
    assert all(one["remedy"] for one in found.values() if one["state"] != "good")


# The machine.


def test_another_mlx_lm_is_told(monkeypatch):
    """A release of mlx-lm that was never tried is a warning."""
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: {"mlx-lm": "0.40.1"}.get(name, "2.0")
    )
    wrong = doctor.examine_versions()
    assert_wrong(wrong, "warning", "mlx-lm 0.40.1", "mlx-lm>=0.31,<0.33")


def test_a_missing_openblas_is_told(monkeypatch):
    """The slow BLAS is named with the package that mends it."""
    monkeypatch.setattr(doctor, "is_openblas_needed", lambda: True)
    monkeypatch.setattr(doctor, "load_openblas", lambda: None)
    monkeypatch.setattr(doctor, "openblas_in_process", lambda: None)
    wrong = doctor.examine_blas()
    assert_wrong(wrong, "warning", "12 times more slowly", "libopenblas0-pthread")
    monkeypatch.setenv("KVSTORE_OPENBLAS", "0")
    assert_wrong(doctor.examine_blas(), "warning", "switched off", "unset")


def test_every_run_names_a_missing_openblas(
    run_cli, store_path, tiny_model, monkeypatch
):
    """Who reads a prompt slowly is told why, and how to mend it."""
    words = ("save", "--model", tiny_model, "--prompt", "x")
    assert "OpenBLAS" not in run_cli(*words)[2]
    monkeypatch.delitem(sys.modules, "mlx.core")  # as before the first import
    monkeypatch.delenv("KVSTORE_OPENBLAS", raising=False)
    monkeypatch.setattr(blas, "_searched_in_vain", [])
    monkeypatch.setattr(blas, "is_openblas_needed", lambda: True)
    monkeypatch.setattr(blas, "_candidates", lambda: iter(()))
    assert blas.load_openblas() is None
    assert blas.is_openblas_missing()
    monkeypatch.undo()
    monkeypatch.setattr(blas, "_searched_in_vain", [True])
    assert "warning: prompts are read about 12 times faster" in run_cli(*words)[2]


def test_no_back_end_is_told(monkeypatch):
    """MLX without its library is bad, and the extra that brings it is named."""
    message = "libmlx.so: cannot open shared object file"
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    wrong = doctor.examine_back_end()
    assert_wrong(wrong, "bad", "MLX does not run", "mlx-kvstore[cpu]")
    told, hint, _ = failures.explain(ImportError(message))
    assert told == f"MLX has no back end: {message}"
    assert "mlx-kvstore[cpu]" in hint


def test_a_wrong_codec_is_told(monkeypatch):
    """Kernels that make other bytes than everywhere else are found."""
    monkeypatch.setitem(selftest._DIGESTS, "turbo4", "0" * 32)
    assert_wrong(doctor.examine_codecs(), "bad", "turbo4", "report it")


# The store's folder.


def test_a_folder_that_others_can_read_is_told(store_path):
    """A store holds prompts: it is for its owner."""
    store_path.chmod(0o755)
    wrong = find(doctor.examine_store(store_path), "store")
    assert_wrong(wrong, "warning", "others may read", "chmod 700")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(store_path):
    """What cannot be written is found by writing."""
    (store_path / "tmp").chmod(0o500)
    wrong = find(doctor.examine_store(store_path), "disk")
    (store_path / "tmp").chmod(0o700)
    assert_wrong(wrong, "bad", "cannot be written", "owner, mode")


def test_a_disk_that_fails_is_told(store_path, monkeypatch):
    """An error of the disk is a finding and no crash."""

    def fail(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "write_all", fail)
    wrong = find(doctor.examine_store(store_path), "disk")
    assert_wrong(wrong, "bad", "Read-only file system", "--store")
    assert [] == list((store_path / "tmp").iterdir())


def test_a_slow_disk_is_told(store_path, monkeypatch):
    """A disk whose syncs take long is a warning with its numbers."""
    speed = {"write_bps": 200e6, "read_bps": 300e6, "sync_s": 0.5}
    monkeypatch.setattr(doctor, "measure_disk", lambda folder: speed)
    wrong = find(doctor.examine_store(store_path), "disk")
    assert_wrong(wrong, "warning", "500.0 ms", "faster disk")
    assert wrong.values["sync_s"] == 0.5


@pytest.mark.parametrize(
    ("free", "state", "remedy"),
    [(10, "bad", "prune --now"), (1000, "warning", "--limit"), (100_000, "good", "")],
)
def test_little_space_is_told(store_path, monkeypatch, free, state, remedy):
    """The disk must have room for what the store may become."""
    space = Space(free, 1_000_000, 100_000)
    monkeypatch.setattr("os.statvfs", lambda path: space)
    found = find(doctor.examine_store(store_path), "free space")
    assert found.state == state
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("kind", "detail"), [("nfs4", "over a network"), ("tmpfs", "all is lost")]
)
def test_a_file_system_that_keeps_nothing_is_told(
    store_path, monkeypatch, kind, detail
):
    """Network and memory are no place for a store."""
    monkeypatch.setattr(doctor, "file_system_of", lambda path: kind)
    wrong = find(doctor.examine_store(store_path), "file system")
    assert_wrong(wrong, "warning", detail, "KVSTORE_DIR")


def test_a_held_lock_is_told(store_path):
    """Another process that holds the lock is named as such."""
    with files.locked(store_path / "lock", exclusive=True):
        wrong = find(doctor.examine_store(store_path), "lock")
    assert_wrong(wrong, "warning", "another process", "wait")


def test_the_deepest_mount_counts(monkeypatch, tmp_path):
    """A file system is that of the last mount over a path; escapes are read."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        "2 1 8:2 / /mnt/a\\040b rw shared:1 - xfs /dev/b rw\n"
        "3 1 8:2 / /mnt/a\\040b rw shared:1 - nfs4 host:/b rw\n"
    )
    monkeypatch.setattr(disk, "_MOUNTS", mounts)
    monkeypatch.setattr(sys, "platform", "linux")
    paths = [tmp_path / "x", disk.Path("/mnt/a b/c"), disk.Path("/mnt/a")]
    assert [disk.file_system_of(path) for path in paths] == ["ext4", "nfs4", "ext4"]


# The model.


def test_weights_that_are_cut_off_are_told(tiny_model, tmp_path, run_cli):
    """A download that broke off is named by its file, by the doctor and by a run."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    wrong = find(examine_model(str(folder)), "weights")
    assert_wrong(wrong, "bad", "model.safetensors is cut off", "download")
    code, _, err = run_cli("save", "--model", folder, "--prompt", "x")
    assert code == 1
    assert "internal error" not in err
    assert "kvstore doctor --model" in err


def test_a_model_without_a_template_is_told(tiny_model, tmp_path):
    """Without a chat template, prompts are plain text."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    wrong = find(examine_model(str(folder)), "model")
    assert_wrong(wrong, "warning", "no chat template", "plain text")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"n_ctx": 32}, 32),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True}, None),
        ({}, None),
    ],
)
def test_how_long_a_text_a_model_takes(config, expected):
    """The configuration says it under several names, or not at all."""
    assert context_length(config) == expected
