"""The campaign runs, finds nothing, and would find a store that is wrong."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(folder, *words):
    """Run the campaign; return exit code, lines of the table, and failures."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.campaign", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    table = [line.split("|")[1:4] for line in done.stdout.splitlines()]
    return done.returncode, [[c.strip() for c in row] for row in table], done.stderr


@pytest.mark.slow
def test_a_small_campaign_finds_nothing(tmp_path):
    """Every act at least once."""
    counts = {"kills": "6", "errors": "60", "damage": "60", "fuzz": "20000"}
    counts |= {"poison": "20"}
    words = [word for act, count in counts.items() for word in (f"--{act}", count)]
    code, table, told = run(tmp_path, "--seed", "7", *words)
    expected = [[act, f"{int(count):,}", "0"] for act, count in counts.items()]
    assert (code, table) == (0, expected), told


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_power_cuts_lose_nothing(tmp_path):
    """The order of syncs, on a disk that forgets what was not synced."""
    code, table, told = run(tmp_path, "--power-cuts", "4")
    assert (0, [["power-cuts", "4", "0"]]) == (code, table), told


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_a_server_outlives_its_disk(tmp_path):
    """A full disk, a deleted store and a power cut, with clients of every kind."""
    code, table, told = run(tmp_path, "--requests", "40")
    assert (0, [["requests", "40", "0"]]) == (code, table), told


@pytest.mark.slow
def test_bad_connections_lose_nothing(tmp_path):
    """How many are broken in a round is for chance to say."""
    code, table, told = run(tmp_path, "--connections", "9", "--replies", "9")
    assert (0, ["0", "0"]) == (code, [row[2] for row in table]), told
    assert all(int(row[1]) >= 9 for row in table)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a folder is not synced", "a header's digest is not compared"]
)
def test_a_mutant_is_caught(tmp_path, name):
    """By the suite, and by the campaign itself; `--mutants` alone tries all."""
    assert run(tmp_path, "--mutants", name)[:2] == (0, [["mutants", "1", "0"]])


def test_every_mutant_is_of_the_code_as_it_is(monkeypatch):
    """What it changes is there once."""
    monkeypatch.syspath_prepend(ROOT)
    from tools.campaign.mutants import MUTANTS

    texts = {m.file: (ROOT / "kvstore" / m.file).read_text() for m in MUTANTS.values()}
    assert [n for n, m in MUTANTS.items() if texts[m.file].count(m.old) != 1] == []


def test_a_damaged_store_keeps_one_configuration(tmp_path):
    """Without both it is no store, and nothing could heal it."""
    sys.path.insert(0, str(ROOT))
    try:
        from tools.campaign.damage import damage_store
    finally:
        sys.path.remove(str(ROOT))
    for seed in range(50):
        path = tmp_path / str(seed)
        path.mkdir()
        names = ("config.json", "config.copy.json", "shard", "entry")
        files = [path / name for name in names]
        for file in files:
            file.write_bytes(b"x" * 100)
        assert damage_store(random.Random(seed), path)
        wholes = [f.is_file() and f.read_bytes() == b"x" * 100 for f in files]
        assert any(wholes[:2])
