"""Processes that save and load at once, in a store that holds half of what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import kvstore

POOL, NUM_BLOCKS = 40, 8
_CHILD = """
import json, random, sys, time
from collections import Counter
import caches, kvstore
path, seed, pool, num_blocks = sys.argv[1], *map(int, sys.argv[2:])
chance, done = random.Random(seed), Counter()
print("ready", flush=True)
until = float(input())
while time.time() < until:
    with kvstore.Store(path, "raw") as store:
        for _ in range(20):
            number = chance.randrange(pool)
            tokens, cache = caches.make_conversation(num_blocks, number)
            if chance.random() < 0.5:
                entry = store.save(tokens, cache, caches.MODEL)
                done["saves"] += 1
                continue
            found, rest = store.load([*tokens, 1], caches.MODEL)
            done["loads" if found else "misses"] += 1
            held = len(tokens) + 1 - len(rest)
            if found and caches.rows_of(found) != caches.rows_of(cache, 0, held):
                sys.exit(f"wrong rows of {held} tokens")
print(json.dumps(done))
"""


def crowd(
    path: Path, num_processes: int, seconds: float, seed: int, tests: Path
) -> Counter[str]:
    """Let processes save and load what does not fit, and verify meanwhile.

    Args:
        path: An empty store of blocks of 16 tokens.
        num_processes: How many.
        seconds: For how long.
        seed: Of what each does.
        tests: The folder with the makers of the tests.

    Returns:
        How often they did what.
    """
    with kvstore.Store(path) as store:
        # Rows of 16 tokens in two layers, two heads, 64 numbers, keys and values.
        block_bytes = 16 * 2 * 2 * 64 * 2 * 2
        store.set_limit(POOL * NUM_BLOCKS * block_bytes // 2)
    words = [str(POOL), str(NUM_BLOCKS)]
    roots = os.pathsep.join([str(tests / "kvstore"), str(tests), str(tests.parent)])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(path), str(seed + number), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": roots},
        )
        for number in range(num_processes)
    ]
    done = Counter[str]()
    try:
        for child in children:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
        until = time.time() + seconds
        for child in children:
            assert child.stdin
            child.stdin.write(f"{until}\n")
            child.stdin.flush()
        while time.time() < until:
            with kvstore.Store(path) as store:
                findings = store.verify()
            assert not findings, findings
            done["verifications"] += 1
    finally:
        ended = [(child.communicate(timeout=300), child) for child in children]
    for (said, told), child in ended:
        assert child.returncode == 0, told
        done.update(json.loads(said))
    with kvstore.Store(path) as store:
        findings = store.verify(read_data=1.0)
        assert not findings, findings
        found = store.stats()
        assert found.nbytes <= found.max_bytes, found
        store.plan_prune(now=True).execute()
    assert not list(path.glob("tmp/*"))
    assert not list(path.glob("quarantine/*"))
    return done
