"""tools/reanchor.py measures what it says, on a tiny model."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tool():
    """The script as a module."""
    path = Path(__file__).parent.parent.parent / "tools" / "reanchor.py"
    spec = importlib.util.spec_from_file_location("reanchor_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_a_row_for_each_change(tool, tiny_model, monkeypatch, capsys):
    """KL with its error, the first choice, and the time."""
    words = ["--model", str(tiny_model), "--texts", "2", "--tokens", "300"]
    monkeypatch.setattr(sys, "argv", ["reanchor.py", *words])
    tool.main()
    rows = [row for row in capsys.readouterr().out.splitlines() if row[:1] == "|"][2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| date",
        "| git status",
        "| 100 tokens cut",
    ]
    assert all(float(row.split(" | ")[2]) >= 0 for row in rows)
