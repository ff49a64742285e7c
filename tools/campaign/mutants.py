"""The code with one rule taken away: the tests that hold it must notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COPIED = ("kvstore", "turboquant", "tests", "tools", "pyproject.toml")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


@dataclass(frozen=True)
class Mutant:
    """A change of the code, and what runs against it."""

    file: str
    old: str
    new: str
    # A test file with `-k` words, or options of the campaign.
    caught_by: tuple[str, ...]


def _test(name: str, *words: str) -> tuple[str, ...]:
    where = f"tests/kvstore/test_{name}.py"
    return ("-m", "pytest", "-qx", "-p", "no:cacheprovider", where, "-k", *words)


def _campaign(*words: str) -> tuple[str, ...]:
    return ("-m", "tools.campaign", *words)


MUTANTS = {
    "a shard is not synced": Mutant(
        "storage/shards.py", "        files.sync(descriptor)\n", "",
        _test("shards", "synced"),
    ),
    "a folder is not synced": Mutant(
        "storage/files.py", "path, target)\n    sync_dir(target.parent)\n",
        "path, target)\n", _test("files", "synced"),
    ),
    "a shard is not synced, and the power goes": Mutant(
        "storage/shards.py", "        files.sync(descriptor)\n", "",
        _campaign("--power-cuts", "20"),
    ),
    "a folder is not synced, and the power goes": Mutant(
        "storage/files.py", "path, target)\n    sync_dir(target.parent)\n",
        "path, target)\n", _campaign("--power-cuts", "20"),
    ),
    "published before it is synced": Mutant(
        "storage/files.py",
        "        sync(descriptor)\n        if path.read_bytes() != data:",
        "        if path.read_bytes() != data:", _test("files", "synced"),
    ),
    "an entry before its blocks": Mutant(
        "ops/commit.py",
        "    if len(places) < len(found):\n        return None\n", "",
        _test("prune", "pruned_during_a_save"),
    ),
    "rows after the file is gone": Mutant(
        "storage/blocks.py",
        "            if not self.index.has_shard(name):\n", "            if True:\n",
        _test("prune", "published_again"),
    ),
    "an entry is written in place": Mutant(
        "storage/entries.py",
        "    files.write_atomic(path, sealed, folder.staging)\n",
        "    path.unlink(missing_ok=True)\n    descriptor = files.create(path)\n"
        "    files.write_all(descriptor, sealed)\n    files.sync(descriptor)\n",
        _test("faults", "error_at_any_call_of_a_save and write"),
    ),
    "a digest is not compared": Mutant(
        "storage/shards.py",
        "self._fill_hashed(buffers, begin, portion) == stored.digest",
        "bool(self._fill_hashed(buffers, begin, portion))",
        _test("faults", "the_table and codes"),
    ),
    "a tag is not compared": Mutant(
        "storage/cipher.py",
        "            decryptor.finalize_with_tag(bytes(scratch[:TAG_BYTES]))\n",
        "            pass\n", _test("encrypted", "one_block or flipped_bit"),
    ),
    "a bundle is sealed unread": Mutant(
        "storage/shards.py", "if blake3_hex(data) != stored.digest:", "if False:",
        _test("encrypted", "a_bundle_that_lies"),
    ),
    "an index in the clear": Mutant(
        "storage/index.py",
        "            values = [self.written(value) for value in values]\n",
        "            pass\n", _test("encrypted", "no_byte_of_the_folder"),
    ),
    "a key is not checked": Mutant(
        "storage/vault.py", "len(key) != KEY_BYTES or _check(key) != check", "not key",
        _test("encrypted", "without_its_key"),
    ),
    "a signature is not checked": Mutant(
        "format/bundle.py", "            if self._signature is not None:\n",
        "            if False:\n", _test("signing", "something_else"),
    ),
    "rows of somebody else count as signed": Mutant(
        "ops/transfer/admit.py",
        "    if all(rows(held[name]) == rows(signed[name]) for name in held):\n",
        "    if True:\n", _test("signing", "somebody_else"),
    ),
    "a header's digest is not compared": Mutant(
        "format/shard.py", "    if digest != blake3_hex(blank):\n", "    if False:\n",
        _campaign("--fuzz", "3000"),
    ),
    "a size is believed": Mutant(
        "storage/shards.py", "length > min(MAX_HEADER_BYTES, size - 8)", "False",
        _test("shards", "longer_than_its_file and 9223372036854775808"),
    ),
    "an unreadable entry frees": Mutant(
        "ops/upkeep/prune.py",
        "            unreadable += [] if copied else [entry_id]\n", "",
        _test("single_faults", "stops_all_freeing"),
    ),
    "what goes is not compared": Mutant(
        "ops/upkeep/prune.py", "    if freed := {*plan.removed, *plan.repacked}:\n",
        "    if freed := set():\n", _test("compared", "to_go"),
    ),
    "a tenant is no salt": Mutant(
        "server/prompt_cache.py", "served.fingerprint.with_salt(key[1])",
        "served.fingerprint", _test("tenants", "its_own_only"),
    ),
    "a remote's signature is not checked": Mutant(
        "remote/layout.py",
        "    check_signature(whole.signature, _KIND, _body(whole))\n", "",
        _test("remote_trust", "signature_is"),
    ),
    "all who may write to a remote are trusted": Mutant(
        "remote/catalog.py",
        "    if remote.is_trusted or key in known_keys():\n        return key\n",
        "    return key\n", _test("remote_trust", "nobody_signed"),
    ),
    "a base is written to": Mutant(
        "storage/borrowed.py", "def _quarantine", "def _unused",
        _test("borrowed", "never_changed"),
    ),
}  # fmt: skip


def find_survivors(names: list[str], root: Path, folder: Path) -> list[str]:
    """Return the mutants that nothing notices.

    What is to notice a mutant runs on the code as it is first, and must pass.
    """
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=_IGNORED)
        else:
            shutil.copy(root / name, folder / name)
    chosen = {name: MUTANTS[name] for name in names}
    sound: dict[tuple[str, ...], int] = {}
    found = []
    for name, mutant in chosen.items():
        if mutant.caught_by not in sound:
            sound[mutant.caught_by] = _run(mutant.caught_by, folder)
        if sound[mutant.caught_by] != 0:
            found.append(f"{name}: {mutant.caught_by} fails without it")
        elif _run_mutant(mutant, folder) != 1:
            found.append(f"{name}: nothing fails")
    return found


def _run_mutant(mutant: Mutant, folder: Path) -> int:
    path = folder / "kvstore" / mutant.file
    good = path.read_text()
    if good.count(mutant.old) != 1:
        return -1  # the code has moved on, and this file has not
    path.write_text(good.replace(mutant.old, mutant.new))
    try:
        return _run(mutant.caught_by, folder)
    finally:
        path.write_text(good)


def _run(words: tuple[str, ...], folder: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-B", *words],
        cwd=folder,
        # Options of an outer pytest, a folder say, are not this one's.
        env={**os.environ, "PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode
