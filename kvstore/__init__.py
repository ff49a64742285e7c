"""A disk-persistent prompt-cache store for MLX and mlx-lm.

::

    with kvstore.Store() as store:
        store.save(tokens, prompt_cache, fingerprint, name="handbook")
        prompt_cache, rest = store.load(tokens, fingerprint)
"""

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
from .store import Store
from .types import Entry, Finding, Match, Stats

__version__ = "0.1.0"

__all__ = [
    "CodecError",
    "Entry",
    "EntryExistsError",
    "EntryNotFoundError",
    "Finding",
    "Fingerprint",
    "FingerprintError",
    "FormatError",
    "IntegrityError",
    "KVStoreError",
    "Match",
    "Stats",
    "Store",
    "StoreLockedError",
    "StoreNotFoundError",
    "UnsupportedCacheError",
    "__version__",
    "codec_names",
    "get_codec",
]
