"""Defaults by variables, and by a small file: model, codec, limit.

`$KVSTORE_MODEL`, `$KVSTORE_CODEC` and `$KVSTORE_LIMIT` win over `model`, `codec` and
`limit` in `$XDG_CONFIG_HOME/kvstore/config.toml`, or `~/.config/kvstore/config.toml`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import click

from ..storage.keys import config_home

NAMES = ("model", "codec", "limit")


def setting(name: str) -> str | None:
    """Return a default, or ``None`` where nobody has set it.

    Raises:
        click.UsageError: The file is not what it should be.
    """
    return os.environ.get(f"KVSTORE_{name.upper()}") or _read().get(name)


def _path() -> Path:
    return config_home() / "config.toml"


def _read() -> dict[str, str]:
    path = _path()
    try:
        found = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from error
    if not all(k in NAMES and isinstance(v, str) for k, v in found.items()):
        raise click.UsageError(f"{path} has more than texts for {', '.join(NAMES)}")
    return found
