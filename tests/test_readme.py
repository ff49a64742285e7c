"""Commands and programs of README and guide, in their order, on a tiny model."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import kit
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs/GUIDE.md").read_text()
TEXT = "The treasurer may sign for sums of less than a hundred. " * 40
SERVE = "kvstore serve"


def commands():
    """Return the lines of the section on the command line, without their comments."""
    section = README.split("## On the command line\n")[1]
    (block, *_) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return [line.partition(" #")[0].rstrip() for line in block.splitlines()]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a handbook, for somebody who has a store, and `kvstore` to call."""
    (tmp_path / "handbook.txt").write_text(TEXT)
    (tmp_path / "team").mkdir()
    monkeypatch.chdir(tmp_path)
    # Where a browser would open, nothing does.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name, value in {
        "HOME": tmp_path,
        "XDG_CONFIG_HOME": tmp_path / "config",
        "KVSTORE_DIR": tmp_path / "store",
        "PATH": path,
        "TMPDIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def run(command, **options):
    """Run a command in a shell; return what it prints."""
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def serve(command):
    """Start a server, wait until it answers, and end it; return its exit code."""
    port = kit.load_beside("servers").free_port()
    command = re.sub(r"--port \d+", f"--port {port}", command)
    with subprocess.Popen(f"exec {command}", shell=True) as server:
        url = f"http://127.0.0.1:{port}/health"
        deadline = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url, timeout=60).close()
            except OSError:
                time.sleep(0.05)
            else:
                break
        server.terminate()
    return server.returncode


def test_every_command_does_what_it_says(home, tiny_model):
    """One after another, by somebody who types nothing else but where the team is."""
    run(f"kvstore remote add team file://{home}/team")
    printed = {}
    for line in commands():
        command = re.sub(r"\bM\b", str(tiny_model), line)
        if line.startswith(SERVE):
            assert serve(command) == 0
        else:
            printed[line] = run(command, input="Who may sign?\n" * ("chat" in line))
    assert len(printed) == len(commands()) - 1
    assert re.search(
        r"(?s)handbook.*daily|daily.*handbook", printed["kvstore ls --tree"]
    )
    assert (home / "handbook.kvbundle").stat().st_size > 10_000
    assert list((home / "team").rglob("*.safetensors"))
    page = Path(printed["kvstore view"].strip())
    assert "handbook" in page.read_text()
    shown = run("kvstore show handbook")
    assert shown.count("The treasurer may sign") == 40
    assert "Who may sign?" not in shown


def test_its_programs_run_as_one(home, tiny_model):
    """Every block of Python, in the order of the pages."""
    blocks = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)
    assert len(blocks) > 3
    program = "\n".join(blocks).replace("path/to/model", str(tiny_model))
    (home / "program.py").write_text(program)
    run(f"{sys.executable} program.py")
    assert run("kvstore ls --json").count('"name": "handbook"') == 1
