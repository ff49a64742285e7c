"""tools/changed_head.py measures what it says, on a tiny model."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent.parent / "tools" / "changed_head.py"


@pytest.mark.slow
def test_it_prints_the_first_token_and_the_miss(tiny_model, monkeypatch, capsys):
    """Each with what it is compared with."""
    spec = importlib.util.spec_from_file_location("changed_head", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    words = ["--tokens", "600", "--entries", "2", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["changed_head.py", str(tiny_model), *words])
    tool.main()
    hit, miss = capsys.readouterr().out.splitlines()
    assert hit.startswith("first token of 600 tokens: ")
    assert hit.endswith("(1 runs)")
    assert miss.startswith("a miss among 2 entries: ")
