"""A disk-persistent prompt-cache store for MLX and mlx-lm.

::

    with kvstore.Store() as store:
        store.save(tokens, prompt_cache, fingerprint, name="handbook")
        prompt_cache, rest = store.load(tokens, fingerprint)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .caches.kinds import register_kind
    from .caches.reanchor import Reanchoring
    from .codecs import codec_names, get_codec
    from .errors import (
        ArgumentError,
        CodecError,
        EntryExistsError,
        EntryNotFoundError,
        FingerprintError,
        FormatError,
        IndexDamagedError,
        IntegrityError,
        KeyNotFoundError,
        KVStoreError,
        RemoteError,
        SignerError,
        StoreLockedError,
        StoreNotFoundError,
        UnsupportedCacheError,
    )
    from .fingerprint import Fingerprint
    from .format.entry import Entry
    from .models.chat import Chat
    from .models.generate import save_prompt, stream_generate
    from .models.load import LoadedModel
    from .ops.explain import Explanation
    from .ops.load import Match
    from .ops.speeds import Speeds
    from .ops.stats import Stats
    from .ops.upkeep.check import Finding
    from .server.prompt_cache import DiskPromptCache
    from .server.tier import Tier, tier
    from .store import Store

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Chat",
    "CodecError",
    "DiskPromptCache",
    "Entry",
    "EntryExistsError",
    "EntryNotFoundError",
    "Explanation",
    "Finding",
    "Fingerprint",
    "FingerprintError",
    "FormatError",
    "IndexDamagedError",
    "IntegrityError",
    "KVStoreError",
    "KeyNotFoundError",
    "LoadedModel",
    "Match",
    "Reanchoring",
    "RemoteError",
    "SignerError",
    "Speeds",
    "Stats",
    "Store",
    "StoreLockedError",
    "StoreNotFoundError",
    "Tier",
    "UnsupportedCacheError",
    "__version__",
    "codec_names",
    "get_codec",
    "register_kind",
    "save_prompt",
    "stream_generate",
    "tier",
]

# Imported when first asked for: `import kvstore` alone loads neither NumPy nor MLX, so
# that the command line starts fast and can put a better BLAS under MLX first.
_HOMES = {
    "codecs": ("codec_names", "get_codec"),
    "errors": (
        "ArgumentError",
        "CodecError",
        "EntryExistsError",
        "EntryNotFoundError",
        "FingerprintError",
        "FormatError",
        "IndexDamagedError",
        "IntegrityError",
        "KVStoreError",
        "KeyNotFoundError",
        "RemoteError",
        "SignerError",
        "StoreLockedError",
        "StoreNotFoundError",
        "UnsupportedCacheError",
    ),
    "fingerprint": ("Fingerprint",),
    "format.entry": ("Entry",),
    "ops.upkeep.check": ("Finding",),
    "ops.explain": ("Explanation",),
    "ops.load": ("Match",),
    "ops.speeds": ("Speeds",),
    "ops.stats": ("Stats",),
    "store": ("Store",),
    "models.chat": ("Chat",),
    "models.load": ("LoadedModel",),
    "models.generate": ("save_prompt", "stream_generate"),
    "server.prompt_cache": ("DiskPromptCache",),
    "server.tier": ("Tier", "tier"),
    "caches.kinds": ("register_kind",),
    "caches.reanchor": ("Reanchoring",),
}


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, for what completes them."""
    return __all__
