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


@pytest.mark.slow
def test_it_prints_a_row_for_each_change(tool, tiny_model, monkeypatch, capsys):
    """KL with its error, the first choice, and the time."""
    words = ["--model", str(tiny_model), "--texts", "1", "--tokens", "300"]
    monkeypatch.setattr(sys, "argv", ["reanchor.py", *words])
    tool.main()
    rows = [row for row in capsys.readouterr().out.splitlines() if row[:1] == "|"][2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| date",
        "| git status",
        "| tools in another order",
        "| one tool removed",
        "| 100 tokens cut",
        "| another document in front",
    ]
    # To this model each letter is a token: a tool is more than may change, and so is a
    # third of such a short text.
    found = [row.split(" | ")[2] for row in rows]
    assert [kl == "refused" for kl in found] == [n > 1 for n in range(6)]
    assert all(float(kl) >= 0 for kl in found if kl != "refused")


@pytest.mark.slow
def test_it_asks_about_what_stayed_and_what_did_not(
    tool, tiny_model, monkeypatch, capsys
):
    """The same answers, and which have the fact."""
    words = ["--model", str(tiny_model), "--texts", "1", "--tokens", "300"]
    monkeypatch.setattr(sys, "argv", ["reanchor.py", *words, "--questions"])
    tool.main()
    rows = [row for row in capsys.readouterr().out.splitlines() if row[:1] == "|"][2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {fact}", "1"] for fact in ("unchanged", "changed", "removed")
    ]
