"""Every example does what its first lines say, on a tiny model."""

import importlib.util
import json
import shutil
import threading
import urllib.request
from pathlib import Path

import pytest

import kvstore

FOLDER = Path(__file__).parent.parent / "examples"
TEXT = "The treasurer may sign for sums of less than a hundred. " * 10


def load_example(name):
    """Import an example, whose name is that of its file."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """The store that an example opens without being told which."""
    path = tmp_path / "store"
    monkeypatch.setenv("KVSTORE_DIR", str(path))
    return path


def test_a_handbook_stays_as_it_is(tiny_model, tmp_path, own_store, capsys):
    """Questions are answered, and nothing but the document is kept."""
    document = tmp_path / "handbook.txt"
    document.write_text(TEXT)
    words = (str(tiny_model), str(document), "Who may sign?", "For how much?")
    for _ in range(2):
        load_example("shared_handbook").main(*words)
    assert capsys.readouterr().out.count("\n") >= 4
    with kvstore.Store(own_store) as store:
        assert [entry.name for entry in store] == ["handbook"]


def test_a_notebook_may_be_run_again(tiny_model, monkeypatch, capsys):
    """All cells in their order; the second time the document comes from the disk."""
    monkeypatch.setenv("KVSTORE_MODEL", str(tiny_model))
    notebook = json.loads((FOLDER / "notebook.ipynb").read_text())
    cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    for _ in range(2):
        names = {}
        for cell in cells:
            exec("".join(cell), names)
        names["store"].close()
    held, _, prompt = capsys.readouterr().out.splitlines()[-1].split()[:3]
    assert int(prompt) > int(held) > 256


def test_an_agent_computes_its_instructions_once(tiny_model, capsys):
    """The second task, and each one after a restart, starts from the disk."""
    for _ in range(2):
        load_example("agent").main(str(tiny_model), "Look.", "Write.")
    told = [x for x in capsys.readouterr().out.splitlines() if x.endswith("from disk")]
    counts = [int(line.split()[2]) for line in told]
    assert counts[0] == 0
    assert min(counts[1:]) > 256


def test_a_small_server_reads_what_it_has_read(tiny_model):
    """The same prompt comes from the disk, whichever server was asked before."""
    held = []
    for _ in range(2):
        with load_example("small_server").make_server(str(tiny_model), 0) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}"
            with urllib.request.urlopen(url, TEXT.encode(), timeout=300) as answer:
                held.append(int(answer.headers["X-From-Disk"]))
            thread.join()
    assert held[0] == 0
    assert held[1] > 256


def test_a_team_store_is_read_and_left_alone(tiny_model, tmp_path, own_store, capsys):
    """What the team has comes from there; what is new goes to the own store."""
    example = load_example("team_base")
    team = tmp_path / "team"
    kvstore.Store(team).close()
    example.main(str(tiny_model), str(team), TEXT)
    shutil.rmtree(team)
    own_store.rename(team)
    before = sorted(path.name for path in (team / "shards").rglob("*"))
    example.main(str(tiny_model), str(team), TEXT + "And more.", TEXT + "And more.")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" 0 from mine")
    assert lines[1].endswith(" from the team's")
    assert lines[2].endswith(" from mine")
    assert sorted(path.name for path in (team / "shards").rglob("*")) == before
