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
    from .codecs import codec_names, get_codec
    from .errors import (
        CodecError,
        EntryExistsError,
        EntryNotFoundError,
        FingerprintError,
        FormatError,
        IntegrityError,
        KVStoreError,
        StoreLockedError,
        StoreNotFoundError,
        UnsupportedCacheError,
    )
    from .fingerprint import Fingerprint
    from .speeds import Speeds
    from .store import Store
    from .types import Entry, Explanation, Finding, Match, Stats

__version__ = "0.1.0"

__all__ = [
    "CodecError",
    "Entry",
    "EntryExistsError",
    "EntryNotFoundError",
    "Explanation",
    "Finding",
    "Fingerprint",
    "FingerprintError",
    "FormatError",
    "IntegrityError",
    "KVStoreError",
    "Match",
    "Speeds",
    "Stats",
    "Store",
    "StoreLockedError",
    "StoreNotFoundError",
    "UnsupportedCacheError",
    "__version__",
    "codec_names",
    "get_codec",
]

# Imported when first asked for: `import kvstore` alone loads neither NumPy nor MLX, so
# that the command line starts fast and can put a better BLAS under MLX first.
_HOMES = {
    "codecs": ("codec_names", "get_codec"),
    "errors": (
        "CodecError",
        "EntryExistsError",
        "EntryNotFoundError",
        "FingerprintError",
        "FormatError",
        "IntegrityError",
        "KVStoreError",
        "StoreLockedError",
        "StoreNotFoundError",
        "UnsupportedCacheError",
    ),
    "fingerprint": ("Fingerprint",),
    "speeds": ("Speeds",),
    "store": ("Store",),
    "types": ("Entry", "Explanation", "Finding", "Match", "Stats"),
}


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it, or `kvstore.generate`."""
    if name == "generate":
        return import_module(".generate", __name__)
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
