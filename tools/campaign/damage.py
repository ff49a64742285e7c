"""Ways in which a file of a store is damaged."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

Way = Callable[[random.Random, bytearray], bytes | bytearray]


def _flip(chance: random.Random, data: bytearray) -> bytearray:
    for _ in range(chance.choice((1, 1, 1, 8))):
        bit = chance.randrange(8 * len(data) or 1)
        if data:
            data[bit // 8] ^= 1 << bit % 8
    return data


def _zero(chance: random.Random, data: bytearray) -> bytearray:
    begin = chance.randrange(len(data) or 1)
    size = min(chance.choice((16, 512, 4096)), len(data) - begin)
    data[begin : begin + size] = bytes(size)
    return data


def _shift(chance: random.Random, data: bytearray) -> bytearray:
    begin = chance.randrange(len(data) or 1)
    del data[begin : begin + chance.choice((1, 7, 512))]
    return data


BYTES: dict[str, Way] = {
    "bits flipped": _flip,
    "zeros": _zero,
    "cut out": _shift,
    "cut off": lambda chance, data: data[: chance.randrange(len(data) or 1)],
    "longer": lambda chance, data: data + chance.randbytes(chance.choice((1, 4096))),
    "garbage": lambda chance, data: chance.randbytes(chance.choice((10, len(data)))),
    "empty": lambda chance, data: b"",
}
PLACES: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: None,
    "a folder": os.mkdir,
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/dev/null"),
}


def damage_store(chance: random.Random, path: Path) -> str:
    """Damage one to three files of a store; return what was done.

    Of the two copies of its configuration one stays: without both it is no store.
    """
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "lock")
    spared = chance.choice([p for p in found if p.name.startswith("config")])
    done = []
    for file in chance.sample([p for p in found if p != spared], chance.randint(1, 3)):
        way = chance.choice([*BYTES] * 3 + [*PLACES] + ["another's"])
        _damage(chance, file, way, found)
        done.append(f"{file.relative_to(path)}: {way}")
    return "; ".join(done)


def _damage(chance: random.Random, file: Path, way: str, found: list[Path]) -> None:
    if way == "another's":
        other = chance.choice([p for p in found if p.is_file() and p != file])
        data = other.read_bytes()
    elif way in BYTES:
        data = bytes(BYTES[way](chance, bytearray(file.read_bytes())))
    mode = file.stat().st_mode
    file.unlink()
    if way in PLACES:
        PLACES[way](file)
        return
    file.write_bytes(data)
    file.chmod(mode)
