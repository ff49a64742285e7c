"""The file `config.json`, which makes a folder a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FormatError, IntegrityError
from .documents import JSON, blake3_hex, canonical_json, strict_json

FORMAT = 1
ENCRYPTED_FORMAT = 2
"""Of an encrypted store: who does not know of keys must not take it for damaged."""
CONFIG = "config.json"
CONFIG_COPY = "config.copy.json"
"""The same bytes again, read where the first file is damaged."""
MAX_CONFIG_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a store's `config.json` says."""

    # 32 hex digits, drawn when the store was created.
    id: str
    # Tokens in a full block.
    block_size: int
    # The size limit that was set, in bytes of shards, or ``None``.
    max_bytes: int | None = None
    # Entries from elsewhere are taken only where a trusted key signed them.
    is_signed_only: bool = False
    # Of an encrypted store, where its key is; see ``storage.vault``.
    encryption: JSON | None = field(default=None, hash=False)


def config_to_bytes(config: StoreConfig) -> bytes:
    """Return a configuration as canonical JSON with a digest of itself."""
    values: JSON = {
        "format": ENCRYPTED_FORMAT if config.encryption else FORMAT,
        "id": config.id,
        "block_size": config.block_size,
    }
    if config.max_bytes is not None:
        values["max_bytes"] = config.max_bytes
    if config.is_signed_only:
        values["signed_only"] = True
    if config.encryption:
        values["encryption"] = config.encryption
    return canonical_json({"digest": blake3_hex(canonical_json(values)), **values})


def parse_config(path: Path, data: bytes) -> StoreConfig:
    """Return the configuration that ``data`` spells.

    Raises:
        FormatError: A newer release wrote it.
        IntegrityError: It is damaged.
    """
    try:
        values = strict_json(data, allow_floats=True)
        form = values["format"]
        # Checked first, since the rest may differ in another format.
        if type(form) is int and form not in (FORMAT, ENCRYPTED_FORMAT):
            raise FormatError(
                f"store has format {form}, this release reads {FORMAT} and"
                f" {ENCRYPTED_FORMAT}: {path}",
                hint="upgrade mlx-kvstore",
            )
        digest = values.pop("digest")
        if digest != blake3_hex(canonical_json(values)):
            raise ValueError("digest mismatch")
        config = StoreConfig(
            values["id"],
            values["block_size"],
            values.get("max_bytes"),
            values.get("signed_only", False),
            values["encryption"] if form == ENCRYPTED_FORMAT else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise damaged_config(path) from error
    if type(form) is not int or not _is_valid(config):
        raise damaged_config(path)
    return config


def _is_valid(config: StoreConfig) -> bool:
    limit = config.max_bytes
    return (
        isinstance(config.id, str)
        and type(config.block_size) is int
        and config.block_size >= 8
        and type(config.is_signed_only) is bool
        and (config.encryption is None or isinstance(config.encryption, dict))
        and (limit is None or (type(limit) is int and limit > 0))
    )


def damaged_config(path: Path) -> IntegrityError:
    """Return the error for a configuration that cannot be read."""
    return IntegrityError(
        f"the store's configuration is damaged: {path}",
        path=path,
        hint=f"`kvstore verify --repair` takes {CONFIG_COPY}, if that is whole",
    )
