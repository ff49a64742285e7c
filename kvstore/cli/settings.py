"""Defaults by variables, and by a small file: model, codec, limit.

`$KVSTORE_MODEL`, `$KVSTORE_CODEC` and `$KVSTORE_LIMIT` win over `model`, `codec` and
`limit` in `$XDG_CONFIG_HOME/kvstore/config.toml`, or `~/.config/kvstore/config.toml`.
A table `limits` there has what each of some models may take, by what it is called.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import click

from ..storage.keys import config_home
from .output import format_bytes

NAMES = ("model", "codec", "limit")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_TOO_MANY_BYTES = 2**63


def setting(name: str) -> str | None:
    """Return a default, or ``None`` where nobody has set it."""
    return os.environ.get(f"KVSTORE_{name.upper()}") or _read()[0].get(name)


def limits() -> dict[str, int]:
    """Return how many bytes each of some models may take."""
    return {model: some_bytes(text) for model, text in _read()[1].items()}


def size(text: str, *, least: int = 0) -> int:
    """Return the bytes of a size such as ``20GB``; the units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text.lower())
    if match is None:
        raise click.BadParameter(f"`{text}` is not a size such as 20GB")
    nbytes = float(match[1]) * _UNITS[match[2]]
    if not least <= nbytes < _TOO_MANY_BYTES:
        few, many = format_bytes(least), format_bytes(_TOO_MANY_BYTES)
        raise click.BadParameter(f"`{text}` is not from {few} to {many}")
    return int(nbytes)


def some_bytes(text: str) -> int:
    """Return the bytes of a size that is not zero."""
    return size(text, least=1)


def _path() -> Path:
    return config_home() / "config.toml"


def _read() -> tuple[dict[str, str], dict[str, str]]:
    """Return defaults, and limits by model."""
    path = _path()
    try:
        found = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except (ValueError, OSError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from error
    sizes = found.pop("limits", {})
    texts = [*found.values(), *(sizes.values() if isinstance(sizes, dict) else [0])]
    if not set(found) <= set(NAMES) or not all(isinstance(t, str) for t in texts):
        raise click.UsageError(
            f"{path} has more than texts for {', '.join(NAMES)} and in `limits`"
        )
    return found, sizes
