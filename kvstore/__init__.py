"""A disk-persistent prompt-cache store for MLX and mlx-lm.

::

    with kvstore.Store() as store:
        store.save(tokens, prompt_cache, fingerprint, name="handbook")
        prompt_cache, rest = store.load(tokens, fingerprint)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors
from .errors import ArgumentError as ArgumentError
from .errors import CodecError as CodecError
from .errors import EntryExistsError as EntryExistsError
from .errors import EntryNotFoundError as EntryNotFoundError
from .errors import FingerprintError as FingerprintError
from .errors import FormatError as FormatError
from .errors import IndexDamagedError as IndexDamagedError
from .errors import IntegrityError as IntegrityError
from .errors import KeyNotFoundError as KeyNotFoundError
from .errors import KVStoreError as KVStoreError
from .errors import RemoteError as RemoteError
from .errors import SignerError as SignerError
from .errors import StoreLockedError as StoreLockedError
from .errors import StoreNotFoundError as StoreNotFoundError
from .errors import UnsupportedCacheError as UnsupportedCacheError

if TYPE_CHECKING:
    from .caches.kinds import register_kind as register_kind
    from .caches.reanchor import Reanchoring as Reanchoring
    from .codecs import codec_names as codec_names
    from .codecs import get_codec as get_codec
    from .fingerprint import Fingerprint as Fingerprint
    from .format.entry import Entry as Entry
    from .models.chat import Chat as Chat
    from .models.generate import save_prompt as save_prompt
    from .models.generate import stream_generate as stream_generate
    from .models.load import LoadedModel as LoadedModel
    from .ops.explain import Explanation as Explanation
    from .ops.load import Match as Match
    from .ops.speeds import Speeds as Speeds
    from .ops.stats import Stats as Stats
    from .ops.upkeep.check import Finding as Finding
    from .server.prompt_cache import DiskPromptCache as DiskPromptCache
    from .server.tier import Tier as Tier
    from .server.tier import tier as tier
    from .store import Store as Store

__version__ = "0.1.0"

# Imported when first asked for: `import kvstore` alone loads neither NumPy nor MLX, so
# that the command line starts fast and can put a better BLAS under MLX first.
_HOMES = {
    "register_kind": "caches.kinds",
    "Reanchoring": "caches.reanchor",
    "codec_names": "codecs",
    "get_codec": "codecs",
    "Fingerprint": "fingerprint",
    "Entry": "format.entry",
    "Chat": "models.chat",
    "save_prompt": "models.generate",
    "stream_generate": "models.generate",
    "LoadedModel": "models.load",
    "Explanation": "ops.explain",
    "Match": "ops.load",
    "Speeds": "ops.speeds",
    "Stats": "ops.stats",
    "Finding": "ops.upkeep.check",
    "DiskPromptCache": "server.prompt_cache",
    "Tier": "server.tier",
    "tier": "server.tier",
    "Store": "store",
}
_ERRORS = [name for name in vars(errors) if name.endswith("Error")]
__all__ = sorted(["__version__", *_ERRORS, *_HOMES])


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Return the public names, for what completes them."""
    return __all__
