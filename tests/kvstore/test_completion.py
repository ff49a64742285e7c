"""The shell completes verbs, options, codecs, models, and names, quoted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

import kvstore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def complete(store_path, caches, tmp_path):
    """Completes the last word of a command line, as Bash asks for it."""
    with kvstore.Store(store_path, "raw") as store:
        for seed, name in enumerate(("one", "my hand book", "it's")):
            store.save(*caches.make_conversation(1, seed), caches.MODEL, name=name)
    hub = tmp_path / "hub" / "models--mlx-community--Small-4bit"
    hub.mkdir(parents=True)

    def run(*words):
        line = subprocess.list2cmdline(["kvstore", *words])
        environment = {
            "_KVSTORE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words)),
            "KVSTORE_DIR": str(store_path),
            "HF_HUB_CACHE": str(hub.parent),
        }
        said = subprocess.run(
            [sys.executable, "-m", "kvstore"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        return said.splitlines()

    run.store = store_path
    return run


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ver"], ["plain,verify"]),
        (["rm", "o"], ["plain,one"]),
        (["inspect", "my h"], ["plain,my hand book"]),
        (["save", "--model", "mlx"], ["plain,mlx-community/Small-4bit"]),
        (["save", "--codec", "turbo7"], ["plain,turbo7", "plain,turbo7+zstd"]),
        (["serve", "--prompt-cache-b"], ["plain,--prompt-cache-bytes"]),
        (["serve", "--max-q"], ["plain,--max-queue"]),
    ],
    ids=lambda value: "-".join(value)[:24],
)
def test_a_word_is_completed(complete, words, found):
    """With what there is, of this program, its store, the model cache and mlx-lm."""
    assert complete(*words) == found


@pytest.mark.skipif(not shutil.which("bash"), reason="needs Bash")
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("my", r"my\ hand\ book "),
        (r"my\ h", r"my\ hand\ book "),
        ('"my', '"my hand book" '),
        ("it", r"it\'s "),
    ],
)
def test_bash_quotes_a_name(complete, typed, line):
    """In a terminal, where what is completed must be one word again."""
    script = subprocess.run(
        [sys.executable, "-m", "kvstore", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    path = complete.store.parent / "script"
    path.write_text(script)
    shell = pexpect.spawn(
        "bash",
        ["--norc", "--noprofile", "-i"],
        encoding="utf-8",
        env=os.environ
        | {"KVSTORE_DIR": str(complete.store), "PS1": "> ", "TERM": "dumb"}
        | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    shell.sendline(f'kvstore() {{ {sys.executable} -m kvstore "$@"; }}; . {path}')
    shell.sendline("echo re''ady")
    shell.expect("ready")
    shell.send(f"kvstore inspect {typed}\t")
    shell.expect_exact(f"inspect {line}")
    shell.close(force=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(run_cli, shell):
    """Each shell's script asks this program."""
    assert "_KVSTORE_COMPLETE" in run_cli("completion", shell)[1]


def test_an_unknown_shell_is_asked_for(run_cli, monkeypatch):
    """Where the shell cannot be told, it must be named."""
    monkeypatch.setenv("SHELL", "/bin/unknown")
    code, _, err = run_cli("completion")
    assert code == 2
    assert err.startswith("error: cannot tell which shell")
