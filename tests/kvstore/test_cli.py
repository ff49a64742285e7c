"""The command line does what it says, in every mode, and says what went wrong."""

import errno
import importlib.util
import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import kvstore
from kvstore.cli import cli
from kvstore.cli.failures import explain
from kvstore.cli.options import json_object, percentage
from kvstore.cli.output import format_bytes
from kvstore.format.entry import Entry, entry_id
from kvstore.storage import files
from kvstore.storage.entries import write_entry
from kvstore.storage.folder import create_folder

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = "The quick brown fox. " * 30


def make_entry(name, at=1_700_000_000.0):
    """Return an entry whose blocks do not exist."""
    tip = f"{abs(hash(name)):064x}"
    return Entry(
        id=entry_id(name, tip),
        name=name,
        tip=tip,
        root=tip,
        num_tokens=1000,
        nbytes=2_000_000,
        codec="turbo4+zstd",
        model="a/model",
        made_with={"mlx": "1"},
        created_at=at,
        updated_at=at,
    )


@pytest.fixture
def two_entries(tmp_path):
    """A store with the entries `one` and `two`."""
    folder = create_folder(tmp_path / "store")
    for number, name in enumerate(["one", "two"]):
        entry = make_entry(name, 1_700_000_000.0 + number)
        write_entry(folder, entry)
    return folder


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A store with the entry `doc`, made by the tiny model."""
    from kvstore.models import load_models, save_prompt
    from kvstore.models.templates import Template

    model = load_models(str(tiny_model))
    tokens = Template(model.tokenizer).encode_prompt(DOCUMENT, is_open=True)
    with kvstore.Store(tmp_path / "store") as store:
        entry, _ = save_prompt(model, tokens, store=store, name="doc")
    return entry


def assert_error(err, text):
    """Assert that stderr is one error and one hint."""
    lines = [line for line in err.splitlines() if line]
    # A machine without OpenBLAS is told so, whatever happens then.
    lines = [line for line in lines if not line.startswith("warning: prompts are read")]
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"]
    assert text in lines[0]


# Errors and exit codes


@pytest.mark.parametrize(
    "words",
    [
        ("load", "x"),
        ("lookup", "--model", "MODEL", "--prompt", "x"),
        ("ls",),
        ("inspect", "x"),
        ("rm", "x", "-y"),
        ("verify",),
    ],
)
def test_a_verb_that_reads_makes_no_store(run_cli, tiny_model, tmp_path, words):
    """Without a store, all verbs but those that save exit with 10 and make none."""
    words = [str(tiny_model) if word == "MODEL" else word for word in words]
    code, out, err = run_cli(*words)
    assert (code, out) == (10, "")
    assert_error(err, f"no store at {tmp_path / 'store'}")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["lss"], "no such command `lss`"),
        (["ls", "--sotre", "x"], "no such option `--sotre`"),
        (["rm"], "missing argument"),
        (["save", "--prompt", "x"], "missing option `--model`"),
        (["ls", "--json", "-q"], "exclude each other"),
        (["verify", "--read-data=200%"], "is not a percentage"),
        (["load", "x", "--adapter-path", "y"], "needs `--model`"),
        (["save", "--model", "m", "--prompt", ""], "the prompt is empty"),
        (["save", "--model", "m", "--prompt", "x", "--chat-template-config", "["],
         "not valid JSON"),
        (["save", "--model", "m", "--prompt", "x", "--chat-template-config",
          '{"a":' * 100_000 + "1" + "}" * 100_000], "nested too deeply"),
        (["generate", "--model", "m", "--prompt", "x", "--system-prompt", "\udcff"],
         "not UTF-8"),
        (["chat", "--model", "m", "--system-prompt", "\udcff"], "not UTF-8"),
        (["demo", "--model", "m", "--question", "\udcff"], "not UTF-8"),
        (["chat", "--model", ""], "it is empty"),
        (["chat", "--model", "m", "--draft-model", ""], "it is empty"),
        (["load", "x", "--model", ""], "it is empty"),
        (["ls", "--store", ""], "it is empty"),
        (["ls", "--store", "\udcff"], "the path of the store is not UTF-8"),
        (["chat", "--model", "m", "--codec", "foo"], "unknown codec `foo`"),
        (["serve", "--model", "m", "--codec", "foo"], "unknown codec `foo`"),
        (["demo", "--model", "m", "--codec", "foo"], "unknown codec `foo`"),
        (["save", "--model", "m", "x", "--codec", "raw", "--quality", "high"],
         "`--codec` and `--quality` exclude each other"),
        (["import", "/none/x.safetensors"], "`FILE`: file `/none/x.safetensors`"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(run_cli, words, text):
    """What cannot be understood is one error, one hint, and the code 2."""
    code, out, err = run_cli(*words)
    assert (code, out) == (2, "")
    assert_error(err, text)


def test_a_mistyped_verb_is_guessed(run_cli):
    """The hint names what was meant."""
    assert "did you mean `save`?" in run_cli("sav")[2]
    assert "`remove`" in run_cli("remov")[2]
    assert "did you mean `--store`" in run_cli("ls", "--stor")[2]


@pytest.mark.parametrize("verb", ["load", "inspect"])
def test_an_unknown_entry_exits_with_1(run_cli, two_entries, verb):
    """What is not found is one error, one hint, and the code 1."""
    code, out, err = run_cli(verb, "three")
    assert (code, out) == (1, "")
    assert_error(err, "no entry `three`")


def test_a_locked_store_exits_with_11():
    """The code tells a script that waiting may help."""
    error = kvstore.StoreLockedError("locked", hint="wait")
    assert explain(error) == ("locked", "wait", 11)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "owner and mode"),
        (errno.EIO, "the disk fails"),
        (errno.EROFS, "can be written"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENAMETOOLONG, "a shorter name"),
        (errno.ENOTDIR, "check the path"),
    ],
)
def test_an_error_of_the_system_has_a_hint(number, hint):
    """A full disk, a wrong mode and a failing disk are told apart."""
    message, told, code = explain(OSError(number, os.strerror(number), "/a/file"))
    assert message.endswith(": /a/file")
    assert hint in told
    assert code == 1


@pytest.mark.parametrize("words", [["save", "--model"], ["ls"]])
def test_below_a_file_there_is_no_store(run_cli, tiny_model, tmp_path, words):
    """Who makes a store there is told what who reads one is."""
    path = tmp_path / "file"
    path.write_text("")
    if words[-1] == "--model":
        words = [*words, tiny_model, "--prompt", "x"]
    code, _, err = run_cli(*words, store=path / "store")
    assert code == 10
    assert_error(err, f"no store at {path / 'store'}")


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [
        (["rm", "one"], [0], 2),
        (["ls"], [1], 0),
        (["ls"], [0, 1, 2], 0),
        (["import", "-"], [0], 1),
        (["generate", "--model", "m", "--prompt", "-"], [0], 2),
    ],
)
def test_a_closed_stream_is_an_empty_one(two_entries, words, closed, code):
    """Services and cron may start a process without the standard streams."""
    finished = subprocess.run(
        [sys.executable, "-m", "kvstore", "--store", two_entries.path, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        preexec_fn=lambda: [os.close(number) for number in closed],
    )
    assert finished.returncode == code
    assert "internal error" not in finished.stderr


def test_an_option_without_its_argument_is_told_where_options_are_listed(run_cli):
    """The hint names the verb, of which the parser knows nothing."""
    for verb in (("save",), ("remote", "ls")):
        code, _, err = run_cli(*verb, "--store")
        assert code == 2
        assert f"hint: `kvstore {' '.join(verb)} -h` shows" in err


def test_a_prompt_from_stdin_must_be_utf8(run_cli, monkeypatch):
    """Bytes that are none are told in one sentence."""
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    code, _, err = run_cli("generate", "--model", "m", "--prompt", "-")
    assert code == 2
    assert_error(err, "the prompt is not UTF-8")


def test_a_full_stdout_is_one_error(two_entries, kvstore_cli):
    """When the result cannot be written, the verb has failed."""
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "kvstore", "--store", two_entries.path, "ls"]
        finished = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert finished.returncode == 1
    assert_error(finished.stderr, "no space left on device")


def test_a_reader_that_leaves_is_no_error(two_entries):
    """`kvstore ls | head` prints nothing on stderr."""
    words = [sys.executable, "-m", "kvstore", "--store", two_entries.path, "ls"]
    reading, writing = os.pipe()
    os.close(reading)
    finished = subprocess.run(
        words, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, check=False
    )
    os.close(writing)
    assert finished.stderr == b""


def test_a_narrow_encoding_prints_escapes(two_entries, kvstore_cli):
    """Where stdout cannot spell a name, it is escaped and the verb goes on."""
    entry = make_entry("日本")
    write_entry(two_entries, entry)
    finished = kvstore_cli("ls", env={"PYTHONIOENCODING": "latin-1"})
    assert finished.returncode == 0
    assert "\\u65e5\\u672c" in finished.stdout


def test_a_bug_is_told_without_a_traceback(run_cli, two_entries, monkeypatch):
    """An error that nobody expected is one line; the traceback comes with -vv."""

    def fail(self):
        raise KeyError("surprise")

    monkeypatch.setattr(kvstore.Store, "entries", fail)
    code, _, err = run_cli("ls")
    assert code == 1
    assert_error(err, "internal error: KeyError: 'surprise'")
    assert "Traceback" in run_cli("ls", "-vv")[2]


# Listing and removing


def test_ls_is_a_table(run_cli, two_entries):
    """The latest entry comes first, and the last line has the sums."""
    _, out, _ = run_cli("ls")
    lines = out.splitlines()
    assert lines[0].split() == [
        "NAME",
        "ID",
        "TOKENS",
        "SIZE",
        "USED",
        "MODEL",
        "SAVED",
        "CODEC",
        "TITLE",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["two", "one", "2"]
    assert lines[3].split() == ["2", "entries", "2,000", "4.0", "MB"]


@pytest.mark.parametrize("words", [("--json", "ls"), ("ls", "--json")])
def test_ls_is_a_document(run_cli, two_entries, words):
    """In JSON sizes are bytes and times RFC 3339, wherever the option stands."""
    _, out, err = run_cli(*words)
    first = json.loads(out)[0]
    assert (first["name"], first["nbytes"]) == ("two", 2_000_000)
    assert first["updated_at"] == "2023-11-14T22:13:21.000Z"
    assert err == ""


def test_ls_is_ids(run_cli, two_entries):
    """With -q each line is an id, as other verbs take it."""
    _, out, _ = run_cli("ls", "-q")
    assert out.split() == [entry_id("two", ""), entry_id("one", "")]


def test_rm_asks_and_names_the_flag(run_cli, two_entries):
    """Without a terminal and without -y nothing is removed."""
    code, _, err = run_cli("rm", "one")
    assert code == 2
    assert_error(err, "no terminal")
    assert "`-y`" in err
    assert len(run_cli("ls", "-q")[1].split()) == 2


@pytest.mark.parametrize(("answer", "num_left"), [(b"y\n", 1), (b"n\n", 2)])
def test_rm_does_what_is_answered(two_entries, answer, num_left, run_cli):
    """On a terminal the question says what and how many bytes."""
    outer, inner = pty.openpty()
    words = [sys.executable, "-m", "kvstore", "--store", two_entries.path, "rm", "one"]
    running = subprocess.Popen(
        words, stdin=inner, stdout=inner, stderr=inner, cwd=ROOT, close_fds=True
    )
    os.close(inner)
    asked = b""
    while b"remove 1 entry: `one`: 1,000 tokens, 2.0 MB" not in asked:
        asked += os.read(outer, 4096)
    os.write(outer, answer)
    assert running.wait(timeout=300) == (0 if num_left == 1 else 1)
    os.close(outer)
    assert len(run_cli("ls", "-q")[1].split()) == num_left


@pytest.mark.parametrize("words", [["rm", "one"], ["prune", "--max-size", "0B"]])
def test_ctrl_c_instead_of_an_answer_removes_nothing(
    run_cli, two_entries, monkeypatch, words
):
    """The hint says so, and promises nothing else."""

    def interrupt(self, question, *, is_answered):
        raise click.Abort

    monkeypatch.setattr("kvstore.cli.output.Output.confirm", interrupt)
    plan = "kvstore.ops.upkeep.prune.PrunePlan"
    monkeypatch.setattr(f"{plan}.freed_bytes", 1, raising=False)
    code, _, err = run_cli(*words)
    assert code == 130
    assert err.endswith("error: interrupted\nhint: nothing was removed\n")


def test_a_dry_run_removes_nothing(run_cli, two_entries):
    """With -n the verb says what it would do, and asks nothing."""
    code, out, _ = run_cli("rm", "one", "two", "-n")
    assert code == 0
    assert (
        out == "would remove 2 entries: `one`, `two`: 2,000 tokens, 4.0 MB of blocks\n"
    )
    assert len(run_cli("ls", "-q")[1].split()) == 2


def test_rm_removes_all_or_none(run_cli, two_entries):
    """A name that is not there is found before the first entry is removed."""
    assert run_cli("rm", "one", "three", "-y")[0] == 1
    assert len(run_cli("ls", "-q")[1].split()) == 2
    code, out, _ = run_cli("rm", "one", "one", "two", "-y", "--json")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)["entries"]] == ["one", "two"]
    assert run_cli("ls", "-q")[1] == ""


def test_dir_is_the_folder(run_cli, two_entries):
    """The path stands alone on a line, for scripts."""
    assert run_cli("dir")[1] == f"{two_entries.path}\n"
    assert json.loads(run_cli("dir", "--json")[1]) == {"path": str(two_entries.path)}
    elsewhere = two_entries.path / "elsewhere"  # where there is none yet
    assert run_cli("dir", store=elsewhere)[:2] == (0, f"{elsewhere}\n")
    assert not elsewhere.exists()


# Looking closely


def test_inspect_shows_blocks_and_shards(run_cli, saved):
    """The document holds the whole fingerprint and every block."""
    _, out, _ = run_cli("inspect", "doc")
    assert "model_type" not in out
    assert out.splitlines()[0].split() == ["name:", "doc"]
    _, out, _ = run_cli("inspect", saved.id[:8], "--json")
    found = json.loads(out)
    assert found["fingerprint"]["config"]["model_type"] == "llama"
    assert sum(block["num_tokens"] for block in found["blocks"]) == saved.num_tokens
    assert [block["start"] for block in found["blocks"]] == [0, 256, 512]


@pytest.mark.parametrize("words", [(), ("--read-data",), ("--read-data=10%",)])
def test_verify_finds_nothing_wrong(run_cli, saved, words):
    """A whole store is verified with the code 0."""
    assert run_cli("verify", *words)[:2] == (0, "nothing is wrong\n")


def test_verify_finds_damage(run_cli, saved, tmp_path):
    """A flipped bit is a finding with the entry's name, and the code 1."""
    with kvstore.Store(tmp_path / "store") as store:
        name = store.chain("doc")[0][0].shard
    shard = tmp_path / f"store/shards/{name[:2]}/{name}.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)
    assert run_cli("verify")[0] == 0
    code, out, err = run_cli("verify", "--read-data")
    assert code == 1
    assert_error(err, "finding")
    assert "doc" in out
    code, out, _ = run_cli("verify", "--read-data", "--json")
    assert code == 1
    kinds = {finding["kind"] for finding in json.loads(out)["findings"]}
    assert "damaged-block" in kinds
    assert_error(run_cli("load", "doc")[2], "block ")


# Running a model


def test_save_then_save_computes_one_token(run_cli, tiny_model):
    """What is held is not computed again."""
    words = ("save", "--model", tiny_model, "--prompt", DOCUMENT, "--name", "doc")
    first = json.loads(run_cli(*words, "--codec", "raw", "--json")[1])
    again = json.loads(run_cli(*words, "--codec", "raw", "--json")[1])
    assert first["num_restored_tokens"] == 0
    assert first["num_computed_tokens"] == first["entry"]["num_tokens"]
    assert again["num_computed_tokens"] == 1
    assert again["entry"]["id"] == first["entry"]["id"]


def test_a_prompt_may_come_from_stdin(kvstore_cli, tiny_model):
    """With `-` the prompt is what stdin holds."""
    words = ("save", "--model", tiny_model, "--prompt")
    piped = kvstore_cli(*words, "-", "-q", input=DOCUMENT)
    given = kvstore_cli(*words, DOCUMENT, "-q")
    assert piped.stdout == given.stdout
    assert len(piped.stdout.strip()) == 32


def test_generate_continues_an_entry(run_cli, saved, tiny_model):
    """The prompt goes on with the conversation, and the name moves on with it."""
    words = ("generate", "--model", tiny_model, "--name", "doc", "--max-tokens", "8")
    first = json.loads(run_cli(*words, "--prompt", "What?", "--json")[1])
    assert first["num_restored_tokens"] == saved.num_tokens
    assert first["num_generated_tokens"] == 8
    second = json.loads(run_cli(*words, "--prompt", "And?", "--json")[1])
    assert second["num_restored_tokens"] == first["entry"]["num_tokens"]
    assert second["entry"]["id"] == saved.id


def test_generate_says_what_mlx_lm_says(run_cli, loaded, tiny_model):
    """Greedy text is the one that mlx-lm generates from the same prompt."""
    import mlx_lm

    model, tokenizer, _ = loaded
    messages = [{"role": "user", "content": DOCUMENT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    words = ("generate", "--model", tiny_model, "--prompt", DOCUMENT)
    words += ("--max-tokens", "12", "--codec", "raw")
    for _ in range(2):
        code, out, err = run_cli(*words)
        assert (code, out) == (0, f"{expected}\n")
        assert "kept" in err
    assert run_cli(*words, "-q")[1:] == (f"{expected}\n", "")


def test_a_seed_gives_the_same_text(run_cli, tiny_model):
    """Sampling is reproducible."""
    words = ("generate", "--model", tiny_model, "--prompt", "x", "--temp", "1", "-q")
    runs = [run_cli(*words, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_prompt_that_names_a_file_is_told(run_cli, tiny_model, tmp_path):
    """Whoever meant the file's text learns how to give it; the name stays a prompt."""
    file = tmp_path / "prompt.txt"
    file.write_text("what the file says")
    code, _, err = run_cli("save", "--model", str(tiny_model), str(file))
    assert (code, f"`< {file}` gives its text" in err) == (0, True)
    assert "is a file" not in run_cli("save", "--model", str(tiny_model), "hello")[2]


def test_a_system_prompt_cannot_come_late(run_cli, saved, tiny_model):
    """A conversation that has begun takes no system prompt."""
    code, _, err = run_cli(
        "generate", "--model", tiny_model, "--name", "doc", "--prompt", "x",
        "--system-prompt", "be kind",
    )  # fmt: skip
    assert code == 2
    assert_error(err, "comes too late")


def test_another_model_is_refused(run_cli, saved, other_model):
    """The error names the field that differs."""
    words = ("--model", other_model, "--prompt", "x", "--name", "doc")
    code, _, err = run_cli("generate", *words)
    assert code == 1
    assert_error(err, "`doc` was made by another model: weights")
    assert_error(run_cli("load", "doc", "--model", other_model)[2], "another model")
    assert_error(run_cli("save", *words)[2], "the name `doc` is taken")


def test_lookup_counts_and_explains(run_cli, saved, tiny_model, other_model):
    """A miss is an answer, with its reason, and the code 0."""
    words = ("lookup", "--prompt", DOCUMENT, "--model")
    code, out, _ = run_cli(*words, tiny_model, "--json")
    found = json.loads(out)
    assert (code, found["num_tokens"]) == (0, saved.num_tokens)
    assert found["reason"] == "end"
    code, out, _ = run_cli(*words, other_model)
    assert code == 0
    assert out.startswith("0 of ")
    assert run_cli(*words, other_model, "-q")[1] == "0\n"


def test_load_writes_what_mlx_lm_continues(run_cli, saved, tiny_model, tmp_path):
    """mlx_lm.generate goes on from the file as `generate` does from the store."""
    path = tmp_path / "doc.safetensors"
    words = ("load", "doc", "-o", path)
    code, out, _ = run_cli(*words, "--model", tiny_model)
    assert code == 0
    assert f"wrote {format_bytes(path.stat().st_size)}: {path}" in out
    assert_error(run_cli(*words)[2], "there is a file already")
    assert run_cli(*words, "--overwrite")[0] == 0
    finished = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", "--prompt-cache-file", path,
         "--prompt", " What?", "--max-tokens", "8", "--verbose", "False"],
        capture_output=True, check=True,
    )  # fmt: skip
    ours = run_cli(
        "generate", "--model", tiny_model, "--name", "doc", "--prompt", " What?",
        "--max-tokens", "8", "-q",
    )[1]  # fmt: skip
    assert finished.stdout.decode(errors="replace") == ours


def test_load_alone_is_a_check(run_cli, saved):
    """Without -o an entry is restored, and nothing is written."""
    code, out, _ = run_cli("load", "doc", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["entry"]["num_tokens"] == saved.num_tokens
    assert found["nbytes"] > 100_000
    assert "file" not in found


def test_load_refuses_rows_worse_than_wanted(run_cli, tiny_model, tmp_path):
    """What `generate` would not go on from is not written as a file either."""
    path = tmp_path / "doc.safetensors"
    words = ("save", "--model", tiny_model, "--prompt", DOCUMENT * 9, "--name", "doc")
    assert run_cli(*words, "--codec", "turbo4")[0] == 0
    for option, reason in (
        (["--exact"], "the block behind token 0 is not exact"),
        (["--min-bits", 5], "of 4 bits, and at least 5 are wanted"),
    ):
        code, out, err = run_cli("load", "doc", "-o", path, *option)
        assert (code, out) == (1, "")
        assert_error(err, reason)
        assert not path.exists()
    assert run_cli("load", "doc", "-o", path, "--min-bits", 4)[0] == 0
    assert run_cli(*words, "--exact")[0] == 0
    assert run_cli("load", "doc", "--exact")[0] == 0


def test_a_missing_model_leaves_no_store(kvstore_cli, tmp_path):
    """A wrong name is found before a store is made."""
    finished = kvstore_cli("save", "--model", tmp_path / "none", "--prompt", "x")
    assert finished.returncode == 1
    assert_error(finished.stderr, "no model")
    assert not (tmp_path / "store").exists()


def test_ctrl_c_keeps_what_was_said(tiny_model, tmp_path, run_cli):
    """An interrupted reply exits with 130, and its tokens are in the store."""
    words = [sys.executable, "-m", "kvstore", "--store", tmp_path / "store",
             "generate", "--model", tiny_model, "--prompt", "x", "--name", "chat",
             "--max-tokens", "1000000"]  # fmt: skip
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    running.stdout.read(100)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert b"error: interrupted" in err
    assert b"Traceback" not in err
    (entry,) = json.loads(run_cli("ls", "--json")[1])
    assert entry["name"] == "chat"
    assert entry["num_tokens"] > 50
    assert run_cli("verify", "--read-data")[0] == 0


# What holds for all verbs


@pytest.mark.parametrize(
    "words",
    [["-h"], ["save", "-h"], ["ls"], ["rm", "doc", "-n"], ["inspect", "doc"],
     ["verify"], ["dir"], ["completion", "bash"]],
)  # fmt: skip
def test_a_verb_without_a_model_imports_no_mlx_lm(saved, tmp_path, words):
    """Whatever runs no model answers without mlx-lm."""
    program = (
        "import sys\nfrom kvstore.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx_lm', 'rich')])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, "--store", tmp_path / "store", *words],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert finished.stdout.splitlines()[-1] == "[]"


def test_ls_of_a_thousand_entries_reads_each_once(tmp_path, monkeypatch):
    """Listing opens both configurations, each entry and the index, and no more."""
    folder = create_folder(tmp_path / "store")
    for number in range(1000):
        entry = make_entry(f"entry-{number}")
        write_entry(folder, entry)
    opened = []
    original = files.open_regular
    monkeypatch.setattr(
        files, "open_regular", lambda path: opened.append(path) or original(path)
    )
    listed = CliRunner().invoke(cli, ["--store", str(folder.path), "ls"])
    assert listed.stdout.count("\n") == 1002
    assert len(opened) == len(set(opened)) == 1002


def test_ls_imports_nothing_heavy(kvstore_cli, tmp_path, monkeypatch):
    """Listing starts fast, since it brings in neither arrays nor models."""
    create_folder(tmp_path / "store")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    told = kvstore_cli("ls").stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "kvstore.cli" in imported
    assert set() == imported & {"mlx", "mlx_lm", "numpy", "rich", "transformers"}


def test_every_verb_is_documented():
    """Each verb and each of its options says in a sentence what it does."""
    for name, verb in cli.commands.items():
        assert verb.help, name
        assert verb.help.splitlines()[0].endswith("."), name
        for option in verb.params:
            if isinstance(option, click.Option):
                assert option.help, (name, option.name)


def test_the_page_is_up_to_date():
    """docs/CLI.md, and the manual, are what `make docs` writes."""
    spec = importlib.util.spec_from_file_location(
        "cli_docs", ROOT / "tools/cli_docs.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs/CLI.md").read_text() == tool.render()
    assert (ROOT / "docs/kvstore.1").read_text() == tool.render_manual()


def test_percentages_are_parts():
    """`10%` is a tenth, and nothing without the sign is taken."""
    assert percentage("10%") == 0.1
    for wrong in ("10", "x%", "-1%", "101%"):
        with pytest.raises(click.BadParameter):
            percentage(wrong)


def test_a_json_option_is_an_object():
    """A list or a number is refused."""
    assert json_object('{"a": 1}') == {"a": 1}
    with pytest.raises(click.BadParameter):
        json_object("[1]")


@pytest.mark.slow
@pytest.mark.model
def test_the_demo_model_goes_on_in_another_process(kvstore_cli, tmp_path):
    """A real model answers from a restored prompt as it does from a computed one."""
    model = ROOT / ".cache/smollm2"
    words = ("--model", model, "--max-tokens", "24", "-q", "--codec", "raw")
    document = "France is a country. Its capital is Paris. " * 3
    assert kvstore_cli("save", *words[:2], "--prompt", document).returncode == 0
    prompt = ("--prompt", f"{document}What is the capital of France?")
    resumed = kvstore_cli("generate", *words, *prompt)
    fresh = kvstore_cli("generate", *words, *prompt, store=tmp_path / "fresh")
    assert "Paris" in resumed.stdout
    assert resumed.stdout == fresh.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("generate", "--model", "m", "--prompt", "x", "--name", ""), 2, "a name has"),
        (("save", "--model", "m", "--prompt", "x", "--name", "-n"), 2, "a name has"),
        (("rename", "doc", "two\nlines"), 2, "a name has"),
        (("generate", "--model", "m", "--prompt", "\udcff"), 2, "is not UTF-8"),
        (("inspect", "\udcff"), 1, "no entry"),
        (("rm", "-y", "a"), 1, "no entry"),
    ],
)
def test_what_cannot_be_meant_is_refused(run_cli, tmp_path, args, code, message):
    """Names and prompts that are none are told at once, and nothing is loaded."""
    kvstore.Store(tmp_path / "store").close()
    found, _, stderr = run_cli(*args)
    assert found == code
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")


def test_a_file_that_cannot_be_written_is_told_first(
    run_cli, tmp_path, monkeypatch, caches
):
    """Nothing is restored for a file that has no folder."""
    with kvstore.Store(tmp_path / "store") as store:
        store.save(*caches.make_conversation(1, 1), caches.MODEL, name="doc")
    monkeypatch.setattr(kvstore.Store, "load_entry", None)
    code, _, stderr = run_cli("load", "doc", "-o", tmp_path / "none/x.safetensors")
    assert code == 1
    assert stderr.startswith("error: no such folder")
