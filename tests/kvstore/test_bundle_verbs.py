"""`kvstore export` and `kvstore import`: files, pipes, other users, and refusals."""

import json
import os
import pty
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kit import load_beside

import kvstore
from kvstore.storage.folder import create_folder

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = "The quick brown fox. " * 30
NOBODY = 65534


tree = load_beside("forging").tree


def words(store, *args):
    """Return a command line."""
    command = (sys.executable, "-m", "kvstore", "--store", store, *args)
    return [str(word) for word in command]


def pipe(sender, receiver, **options):
    """Run one command into another; return the receiver's output and both codes."""
    with subprocess.Popen(
        sender, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as first:
        second = subprocess.run(
            receiver, stdin=first.stdout, capture_output=True, text=True, check=False,
            cwd=ROOT, **options,
        )  # fmt: skip
        first.stdout.close()
        told = first.stderr.read().decode()
    return second, first.returncode, told


@pytest.fixture(scope="module")
def sent(tiny_model, tmp_path_factory):
    """A store with the entry `doc`, the text that follows it, and its bundle."""
    folder = tmp_path_factory.mktemp("sent")
    common = ("--model", tiny_model, "--name", "doc", "-q")
    run(folder / "a", "save", *common, "--prompt", DOCUMENT, "--codec", "planes+zstd")
    run(folder / "a", "export", "doc", "-o", folder / "doc.kvbundle")
    shutil.copytree(folder / "a", folder / "b")
    text = run(folder / "b", "generate", *common, "--prompt", " What?").stdout
    assert len(text) > 20
    return folder / "a", folder / "doc.kvbundle", text


def run(store, *args, code=0, **options):
    """Run a verb as a process of its own."""
    done = subprocess.run(
        words(store, *args), capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, **options,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def assert_error(err, text):
    """Assert that stderr is one error and one hint."""
    lines = [line.partition(": ") for line in err.splitlines() if line]
    assert [line[0] for line in lines] == ["error", "hint"]
    assert text in lines[0][2]


def test_another_machine_goes_on_with_the_same_text(sent, tiny_model, tmp_path):
    """Through a pipe, into an empty store elsewhere: what follows is the same."""
    path, bundle, text = sent
    store = tmp_path / "elsewhere" / "store"
    done, code, told = pipe(
        words(path, "export", "doc", "-o", "-"), words(store, "import", "-")
    )
    assert (done.returncode, code) == (0, 0), done.stderr
    assert "exported" in told
    assert f"made by {tiny_model}, fingerprint " in done.stdout
    options = ("--model", tiny_model, "--name", "doc", "--prompt", " What?", "-q")
    assert run(store, "generate", *options).stdout == text
    again = run(store, "import", bundle, "--name", "again", "--model", tiny_model)
    assert "as `again`" in again.stdout
    run(store, "verify", "--read-data")


def other_user(folder):
    """Return words that run a command as somebody else, who gets a folder."""
    setpriv = shutil.which("setpriv")
    become = [setpriv, "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
    become = list(map(str, become))
    if os.geteuid() == 0 and setpriv:
        program = "import kvstore, mlx.core; open('kvstore/store.py').close()"
        os.chown(folder, NOBODY, NOBODY)
        tried = subprocess.run(
            [*become, sys.executable, "-c", program],
            capture_output=True, check=False, cwd=ROOT,
        )  # fmt: skip
        if tried.returncode == 0:
            return become
        os.chown(folder, 0, 0)
    return []


@pytest.fixture
def elsewhere():
    """A folder of another user's, and the words that make us that user."""
    with tempfile.TemporaryDirectory() as name:
        become = other_user(Path(name))
        yield Path(name), become


@pytest.mark.slow
@pytest.mark.model
def test_another_user_goes_on_with_the_same_text(elsewhere, tmp_path):
    """A real model's entry is handed to another user, who goes on from it."""
    folder, become = elsewhere
    model = os.environ.get("KVSTORE_DEMO_MODEL") or ROOT / ".cache/smollm2"
    common = ("--model", model, "--name", "doc", "-q")
    run(tmp_path, "save", *common, "--prompt", DOCUMENT, "--codec", "planes+zstd")
    done, code, _ = pipe(
        words(tmp_path, "export", "doc", "-o", "-"),
        [*become, *words(folder / "store", "import", "-")],
        env=os.environ | {"XDG_CACHE_HOME": str(folder), "HOME": str(folder)},
    )
    assert (done.returncode, code) == (0, 0), done.stderr
    if become:
        assert {p.stat().st_uid for p in folder.rglob("*")} == {NOBODY}
    goes_on = ("generate", *common, "--prompt", " What does the fox do?")
    theirs = subprocess.run(
        [*become, *words(folder / "store", *goes_on, "--max-tokens", 24)],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(folder), "HOME": str(folder)},
    )  # fmt: skip
    ours = run(tmp_path, *goes_on, "--max-tokens", 24)
    assert theirs.stdout == ours.stdout
    assert len(ours.stdout) > 20


# Export


def test_a_bundle_is_private_and_there_as_a_whole(sent, run_cli, tmp_path):
    """Only its owner can read it; a file that is there is replaced when asked to."""
    path, bundle, _ = sent
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    target = tmp_path / "x.kvbundle"
    target.write_text("mine")
    code, _, err = run_cli("export", "doc", "-o", target, store=path)
    assert code == 1
    assert_error(err, "there is a file already")
    assert target.read_text() == "mine"
    options = ("-o", target, "--overwrite", "--json")
    _, out, _ = run_cli("export", "doc", *options, store=path)
    assert json.loads(out)["file_bytes"] == target.stat().st_size
    assert target.read_bytes() == bundle.read_bytes()
    assert os.listdir(tmp_path) == ["x.kvbundle"]


def test_an_export_that_fails_leaves_nothing(sent, run_cli, tmp_path, flip_bit):
    """A damaged entry, or none: no file, no half of one, and nothing on stdout."""
    store = shutil.copytree(sent[0], tmp_path / "store")
    for shard in store.glob("shards/*/*"):
        flip_bit(shard, shard.stat().st_size * 8 - 5)
    for name, text in (("doc", "does not match its digest"), ("other", "no entry")):
        code, _, err = run_cli("export", name, "-o", tmp_path / "x")
        assert code == 1
        assert_error(err, text)
    done = run(store, "export", "doc", "-o", "-", code=1)
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("doc",), "missing option `-o`"),
        (("doc", "-o", "-", "--json"), "exclude each other"),
        (("-o", "x"), "missing argument"),
    ],
)
def test_wrong_usage_of_export(sent, run_cli, options, text):
    """What cannot be understood is one error and the code 2."""
    code, _, err = run_cli("export", *options, store=sent[0])
    assert code == 2
    assert_error(err, text)


def test_a_terminal_gets_no_bundle(sent):
    """Bytes that a terminal would run as commands do not go there."""
    leader, follower = pty.openpty()
    done = subprocess.run(
        words(sent[0], "export", "doc", "-o", "-"),
        stdout=follower, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    os.close(follower)
    os.close(leader)
    assert done.returncode == 2
    assert_error(done.stderr, "not for a terminal")


def test_nothing_but_the_bundle_goes_to_stdout(sent):
    """With -q nothing is said; without, it is said on stderr."""
    for options, said in (((), "exported"), (("-q",), "")):
        done = subprocess.run(
            words(sent[0], "export", "doc", "-o", "-", *options),
            capture_output=True, check=True, cwd=ROOT,
        )  # fmt: skip
        assert done.stdout == sent[1].read_bytes()
        assert said.encode() in done.stderr
        assert bool(done.stderr) == bool(said)


def test_a_reader_that_leaves_is_no_error(sent):
    """When nobody reads any more, the export ends without a word."""
    reader = [sys.executable, "-c", "import sys; sys.stdin.buffer.read(10)"]
    done, code, told = pipe(words(sent[0], "export", "doc", "-o", "-"), reader)
    assert (done.returncode, code, told) == (0, 1, "")


def test_a_device_is_not_replaced(sent, run_cli):
    """`--overwrite` replaces files."""
    options = ("-o", "/dev/null", "--overwrite")
    code, _, err = run_cli("export", "doc", *options, store=sent[0])
    assert code == 1
    assert_error(err, "not a regular file: `/dev/null`")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_that_is_not_there_is_not_made(sent, run_cli, tmp_path):
    """It is named, before anything is read."""
    target = tmp_path / "nowhere" / "x.kvbundle"
    code, _, err = run_cli("export", "doc", "-o", target, store=sent[0])
    assert code == 1
    assert_error(err, f"no such folder: `{target.parent}`")


# Import


def test_no_bundle_is_awaited_from_a_terminal(tmp_path):
    """`import -` without a redirection says so, and does not wait for ever."""
    leader, follower = pty.openpty()
    done = subprocess.run(
        words(tmp_path / "store", "import", "-"), stdin=follower,
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip
    os.close(follower)
    os.close(leader)
    assert done.returncode == 2
    assert_error(done.stderr, "does not come from a terminal")


def test_a_maker_without_a_name_is_told_so(sent, run_cli, tmp_path):
    """A bundle need not say what its model was called."""
    forging = load_beside("forging")
    manifest, contents = forging.unpack(sent[1].read_bytes())
    manifest["entry"]["model"] = ""
    bundle = tmp_path / "x.kvbundle"
    bundle.write_bytes(forging.pack(manifest, contents))
    out = run_cli("import", bundle)[1]
    assert "made by a model without a name, fingerprint " in out


def test_a_bundle_that_is_refused_leaves_no_store(sent, other_model, tmp_path, run_cli):
    """Damaged, cut off, another model's: one line, and no store."""
    good = sent[1].read_bytes()
    cut, changed = tmp_path / "cut", tmp_path / "changed"
    cut.write_bytes(good[:600])
    changed.write_bytes(good[:1600] + b"?" + good[1601:])
    for expected, options, text in (
        (1, (cut,), "cut off"),
        (1, (changed,), "entry file is damaged"),
        (1, (sent[1], "--model", other_model), "made by another model: weights"),
        (2, (sent[1], "--name", "-x"), "a name has 1 to"),
    ):
        code, out, err = run_cli("import", *options)
        assert (code, out) == (expected, "")
        assert_error(err, text)
        assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    assert run_cli("import", cut)[0] == 1
    assert os.listdir(tmp_path / "store") == []


def test_a_refused_bundle_leaves_a_store_as_it_was(sent, run_cli, tmp_path):
    """A store that was there, empty or not, stays."""
    store = create_folder(tmp_path / "store").path
    before = tree(store)
    cut = tmp_path / "cut"
    cut.write_bytes(sent[1].read_bytes()[:-600])
    assert run_cli("import", cut)[0] == 1
    assert tree(store) == before


def test_a_bundle_refused_late_harms_nobody_in_the_store_it_made(
    sent, tmp_path, caches, monkeypatch
):
    """Another process may be using the store by then: what is saved there stays."""
    path = tmp_path / "store"
    tokens, cache = caches.make_conversation(2, 3)
    cut = tmp_path / "cut"
    cut.write_bytes(sent[1].read_bytes()[:-600])
    run(path, "import", cut, code=1)
    with kvstore.Store(path, "raw", create=False) as store:
        store.save(tokens, cache, caches.MODEL, name="mine")
        run(path, "import", cut, code=1)
        assert store.verify() == []
        assert store.load_entry("mine", caches.MODEL)[1] == tokens


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--prompt", "x"), "`--prompt` is not for a bundle"),
        (("--codec", "raw"), "`--codec` is not for a bundle"),
        (("--system-prompt", "x"), "`--system-prompt` is not for a bundle"),
        (("--adapter-path", "x"), "need `--model`"),
        (("--draft-model", "x"), "need `--model`"),
    ],
)
def test_wrong_usage_with_a_bundle(sent, run_cli, options, text):
    """A bundle knows its prompt and its codec."""
    code, out, err = run_cli("import", sent[1], *options)
    assert (code, out) == (2, "")
    assert_error(err, text)


def test_a_cache_file_asks_for_model_and_prompt(run_cli, tmp_path):
    """What is no bundle is taken for a cache file, which does not know them."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"1234567890")
    for options in ((), ("--model", "m"), ("--prompt", "x")):
        code, _, err = run_cli("import", path, *options)
        assert code == 2
        assert_error(err, "needs `--model` and `--prompt`")
    options = ("--model", "m", "--prompt", "x", "--draft-model", "d")
    assert_error(run_cli("import", path, *options)[2], "not for a cache file")


def test_only_a_bundle_comes_by_a_pipe(tmp_path):
    """A cache file on stdin is refused with the way to give it."""
    done = run(tmp_path / "store", "import", "-", code=1, input="x" * 2000)
    assert_error(done.stderr, "this is no bundle")
    assert "given by its path" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_named_pipe_is_read(sent, tmp_path):
    """What a shell's `<(…)` gives is read as stdin is."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cp", sent[1], fifo]) as writer:
        run(tmp_path / "store", "import", fifo)
    assert writer.returncode == 0


def test_import_is_a_document(sent, run_cli, tmp_path):
    """With --json the entry and the fingerprint are told."""
    code, out, _ = run_cli("import", sent[1], "--json")
    found = json.loads(out)
    assert code == 0
    assert found["entry"]["name"] == "doc"
    with kvstore.Store(tmp_path / "store") as store:
        assert store.fingerprint_of("doc").digest == found["fingerprint"]
    assert run_cli("import", sent[1], "-q")[1].strip() == found["entry"]["id"]
